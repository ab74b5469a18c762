"""How fast is a TensorSketch, and a CountSketch of rows?

Peers: scikit-learn's ``PolynomialCountSketch``, which takes the FFT of
CountSketches, on 4096 float32 vectors of 64 entries; and SciPy's
``clarkson_woodruff_transform``, which draws its hashes in the call. Ours are
drawn before (``count_sketch_rows``), or computed in the call from indices
(``count_sketch_table``).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from scipy.linalg import clarkson_woodruff_transform
from sklearn.kernel_approximation import (  # pyright: ignore[reportMissingImports]
  PolynomialCountSketch,
)

from benchmarks import _race
from jaxattn.sketch import (
  count_sketch_rows,
  count_sketch_table,
  tensor,
  tensor_sketch_apply,
  tensor_sketch_init,
)

_VECTORS, _DIM, _SKETCH_DIM = 4096, 64, 1024


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = [
    *power(2),
    *power(4),
    *count_sketch(16_384, 64, 256),
    *count_sketch(262_144, 16, 1024),
  ]
  _race.publish("sketch", "TensorSketch and CountSketch", rows)


def power(
  degree: int, vectors: int = _VECTORS, rounds: int = 15
) -> list[_race.Row]:
  """A power of all vectors, by both of our paths and by the peer."""
  x = np.random.default_rng(0).standard_normal((vectors, _DIM), np.float32)
  sketch = tensor_sketch_init(jax.random.key(0), _DIM, _SKETCH_DIM, degree)
  peer = PolynomialCountSketch(
    gamma=1.0, degree=degree, n_components=_SKETCH_DIM, random_state=0
  ).fit(x)
  array = jnp.asarray(x)
  by_fft = functools.partial(tensor._tensor_sketch, by_matmul=False)
  seconds = _race.race(
    {
      "ours": functools.partial(tensor_sketch_apply, sketch, array),
      "fft": functools.partial(by_fft, sketch, (array,)),
      "scikit-learn": functools.partial(peer.transform, x),
    },
    rounds=rounds,
  )
  name = f"{vectors} x {_DIM} to {_SKETCH_DIM}, degree {degree}"
  return [
    _race.ratio(
      f"{name}: scikit-learn / ours", seconds, "ours", "scikit-learn", 2.0
    ),
    _race.ratio(f"{name}: by FFT / by matrices", seconds, "ours", "fft"),
  ]


def count_sketch(
  num: int, dim: int, sketch_dim: int, rounds: int = 15
) -> list[_race.Row]:
  """Fewer rows of one matrix, with hashes stored, computed, and the peer's."""
  a = np.random.default_rng(0).standard_normal((num, dim), np.float32)
  array = jnp.asarray(a)
  sketch = tensor_sketch_init(jax.random.key(0), num, sketch_dim, 1)
  seeds = jax.random.bits(jax.random.key(0), (1, 2), jnp.uint32)
  seconds = _race.race(
    {
      "rows": functools.partial(count_sketch_rows, sketch, array),
      "table": functools.partial(count_sketch_table, seeds, array, sketch_dim),
      "SciPy": functools.partial(
        clarkson_woodruff_transform, a, sketch_dim, rng=0
      ),
    },
    rounds=rounds,
  )
  name = f"CountSketch of {num} x {dim} to {sketch_dim}"
  return [
    _race.ratio(f"{name}: SciPy / ours", seconds, "rows", "SciPy", 1.0),
    _race.ratio(
      f"{name}: SciPy / ours with its hashes", seconds, "table", "SciPy"
    ),
  ]


if __name__ == "__main__":
  app.run(main)
