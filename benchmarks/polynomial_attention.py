"""How much faster is polynomial attention than exact attention, and from where?

One head, float32, degree and head size (d, g). The baseline is our own exact
attention, with its own tiles or 64, 128 or 256 queries on all keys, whichever
is fastest; it is many times faster than ``jax.nn`` at these lengths, and ratios
to ``jax.nn`` are given beside it. Peer: the features of
``taylor-series-linear-attention`` (PyTorch, degree 2, all d^2 products) with
the products that its module forms.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from absl import app
from taylor_series_linear_attention.attention import (  # pyright: ignore[reportMissingImports]
  second_taylor_expansion,
)

from benchmarks import _race
from experiments.polynomial_attention import crossover as crossing
from jaxattn.attention import polynomial_attention, softmax_attention
from jaxattn.features import feature_count
from pallas_kernels.flash_attention import BlockSizes

# (d, g, n): bar against our own exact attention, or None.
_FORWARD = {
  (4, 4, 8192): None,
  (8, 2, 8192): 15.0,
  (8, 4, 8192): None,
  (16, 2, 8192): 8.0,
  (32, 2, 8192): 3.0,
  (64, 2, 8192): 1.3,
  (8, 2, 32768): None,
}
_BOTH = {(8, 2, 4096): 30.0, (16, 2, 8192): 12.0, (32, 2, 8192): None}
_LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_QUERIES = (64, 128, 256)
# (d, g, n) of races between the backward modes.
_CLOSED = ((8, 4, 4096), (16, 2, 4096))


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = []
  for (dim, degree, length), bar in _FORWARD.items():
    rows += forward(dim, degree, length, bar)
  for (dim, degree, length), bar in _BOTH.items():
    rows += both(dim, degree, length, bar)
  for dim, degree, length in _CLOSED:
    rows += closed_form(dim, degree, length)
  for dim in (8, 16, 32, 64):
    rows.append(crossover(dim, 2))
  rows.append(peer(8, 16384))
  rows.append(peer(16, 16384))
  _race.publish("polynomial_attention", "Polynomial attention", rows)


def forward(
  dim: int, degree: int, length: int, bar: float | None
) -> list[_race.Row]:
  """Forward pass against exact attention, causal and not."""
  arrays = _inputs(dim, length)
  ours = functools.partial(polynomial_attention, degree=degree, radius=2.0)
  causal = functools.partial(ours, is_causal=True)
  functions = {"ours": ours, "causal": causal, **_exact(length)}
  runs = {
    k: functools.partial(jax.jit(f), *arrays) for k, f in functions.items()
  }
  name = f"forward, d = {dim}, g = {degree}, n = {length}"
  rows = _rows(name, _race.race(runs), bar)
  if length <= 8192:
    theirs = functools.partial(jax.jit(jax.nn.dot_product_attention), *arrays)
    rows.append(_against_jax_nn(name, runs["ours"], theirs))
  return rows


def _exact(length: int) -> dict[str, Callable[..., jax.Array]]:
  """Exact attention with its own tiles, and with blocks of some queries."""
  functions = {"exact": softmax_attention}
  for block in _QUERIES:
    tiles = BlockSizes(block, length, block, length)
    functions[f"exact, {block} queries"] = functools.partial(
      softmax_attention, block_sizes=tiles
    )
  return functions


def both(
  dim: int, degree: int, length: int, bar: float | None
) -> list[_race.Row]:
  """Forward and backward pass against those of exact attention."""
  arrays = _inputs(dim, length, num=4)
  ours = functools.partial(polynomial_attention, degree=degree, radius=2.0)
  functions = {
    "ours": ours,
    "causal": functools.partial(ours, is_causal=True),
    **_exact(length),
  }
  runs = {
    k: functools.partial(_pullback(f), *arrays) for k, f in functions.items()
  }
  runs["forward"] = functools.partial(jax.jit(ours), *arrays[:3])
  seconds = _race.race(runs)
  name = f"forward and backward, d = {dim}, g = {degree}, n = {length}"
  theirs = _pullback(jax.nn.dot_product_attention)
  return [
    *_rows(name, seconds, bar),
    _against_jax_nn(name, runs["ours"], functools.partial(theirs, *arrays)),
    _race.ratio(f"{name}: ours / ours forward", seconds, "forward", "ours"),
  ]


def closed_form(dim: int, degree: int, length: int) -> list[_race.Row]:
  """Both backward modes, at one degree and with two more for the surrogate."""
  arrays = _inputs(dim, length, num=4)
  ours = functools.partial(polynomial_attention, degree=degree, radius=2.0)
  functions = {
    "closed": functools.partial(ours, backward="closed_form"),
    "surrogate": ours,
    "two more": functools.partial(ours, degree=degree + 2),
  }
  seconds = _race.race(
    {k: functools.partial(_pullback(f), *arrays) for k, f in functions.items()}
  )
  name = f"forward and backward, d = {dim}, n = {length}: closed form of g = "
  return [
    _race.ratio(
      f"{name}{degree} / surrogate of g = {g}", seconds, who, "closed"
    )
    for who, g in (("surrogate", degree), ("two more", degree + 2))
  ]


def _rows(
  name: str, seconds: dict[str, list[float]], bar: float | None
) -> list[_race.Row]:
  """Against exact attention as it comes, and with the best of all tiles."""
  best = min(
    (k for k in seconds if k.startswith("exact")),
    key=lambda k: statistics.median(seconds[k]),
  )
  rows = [
    _race.ratio(f"{name}: {exact} / ours", seconds, "ours", exact, bar)
    for exact in dict.fromkeys(("exact", best))
  ]
  rows.append(
    _race.ratio(f"{name}: ours causal / ours", seconds, "ours", "causal")
  )
  return rows


def _against_jax_nn(
  name: str, ours: Callable[[], Any], theirs: Callable[[], Any]
) -> _race.Row:
  """A race of its own: what runs after jax.nn is slower than by itself."""
  seconds = _race.race({"ours": ours, "jax.nn": theirs}, rounds=5)
  return _race.ratio(f"{name}: jax.nn / ours", seconds, "ours", "jax.nn")


def crossover(dim: int, degree: int) -> _race.Row:
  """Length from which polynomial attention wins, over the feature count."""
  ours = functools.partial(polynomial_attention, degree=degree, radius=2.0)
  ours, exact = jax.jit(ours), jax.jit(softmax_attention)
  ratios = []
  for length in _LENGTHS:
    arrays = _inputs(dim, length)
    seconds = _race.race(
      {
        "ours": functools.partial(ours, *arrays),
        "exact": functools.partial(exact, *arrays),
      },
      rounds=5,
    )
    row = _race.ratio("", seconds, "ours", "exact")
    ratios.append(row.measured)
  length = crossing(np.array(_LENGTHS), np.array(ratios), np.ones(len(ratios)))
  # An end of the lengths is no crossing, only a bound on it.
  bounds = {_LENGTHS[0]: ", at most", _LENGTHS[-1]: ", at least"}
  num_features = feature_count(dim, degree)
  return _race.figure(
    f"crossover, d = {dim}, g = {degree}: n / C(d + g, g) = n / {num_features}"
    f"{bounds.get(int(length), '')}",
    length / num_features,
  )


def peer(dim: int, length: int) -> _race.Row:
  """Forward pass of degree 2 against the PyTorch package, 8 heads."""
  arrays = _inputs(dim, length, heads=8)
  ours = functools.partial(
    polynomial_attention,
    degree=2,
    radius=2.0,
    coefficients="taylor",
    center_keys=False,
  )
  tensors = [torch.from_numpy(np.asarray(x)).transpose(1, 2) for x in arrays]
  seconds = _race.race(
    {
      "ours": functools.partial(jax.jit(ours), *arrays),
      "torch": functools.partial(_torch_attention, *tensors),
    }
  )
  return _race.ratio(
    f"forward, d = {dim}, g = 2, n = {length}, 8 heads: "
    "taylor-series-linear-attention / ours",
    seconds,
    "ours",
    "torch",
  )


def _torch_attention(query: Any, key: Any, value: Any) -> Any:
  with torch.inference_mode():
    query = second_taylor_expansion(query * query.shape[-1] ** -0.5)
    key = second_taylor_expansion(key)
    moments = torch.einsum("bhnd,bhne->bhde", key, value)
    denominator = torch.einsum("bhnd,bhd->bhn", query, key.sum(-2))
    out = torch.einsum("bhnd,bhde->bhne", query, moments)
    return out / denominator[..., None]


def _inputs(
  dim: int, length: int, num: int = 3, heads: int = 1
) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  shape = (num, 1, length, heads, dim)
  return list(jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32))


def _pullback(attend: Callable[..., jax.Array]) -> Any:
  def run(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
    out, pull = jax.vjp(attend, query, key, value)
    return out, pull(cotangent)

  return jax.jit(run)


if __name__ == "__main__":
  app.run(main)
