"""How much faster is polynomial attention than exact attention, and from where?

One head, float32, degree and head size (d, g). The baseline is our own exact
attention, which is many times faster than ``jax.nn`` at these lengths; ratios
to ``jax.nn`` are given beside it. Peer: the features of
``taylor-series-linear-attention`` (PyTorch, degree 2, all d^2 products) with
the products that its module forms.
"""

import functools
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
from jaxattn.attention import polynomial_attention, softmax_attention
from jaxattn.features import feature_count

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
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = []
  for (dim, degree, length), bar in _FORWARD.items():
    rows += forward(dim, degree, length, bar)
  for (dim, degree, length), bar in _BOTH.items():
    rows += both(dim, degree, length, bar)
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
  functions = {"ours": ours, "causal": causal, "exact": softmax_attention}
  if length <= 8192:
    functions["jax.nn"] = jax.nn.dot_product_attention
  seconds = _race.race(
    {k: functools.partial(jax.jit(f), *arrays) for k, f in functions.items()}
  )
  name = f"forward, d = {dim}, g = {degree}, n = {length}"
  return _rows(name, seconds, bar)


def both(
  dim: int, degree: int, length: int, bar: float | None
) -> list[_race.Row]:
  """Forward and backward pass against those of exact attention."""
  arrays = _inputs(dim, length, num=4)
  ours = functools.partial(polynomial_attention, degree=degree, radius=2.0)
  functions = {
    "ours": ours,
    "causal": functools.partial(ours, is_causal=True),
    "exact": softmax_attention,
    "jax.nn": jax.nn.dot_product_attention,
  }
  seconds = _race.race(
    {k: functools.partial(_pullback(f), *arrays) for k, f in functions.items()}
  )
  name = f"forward and backward, d = {dim}, g = {degree}, n = {length}"
  return _rows(name, seconds, bar)


def _rows(
  name: str, seconds: dict[str, list[float]], bar: float | None
) -> list[_race.Row]:
  rows = [
    _race.ratio(f"{name}: exact / ours", seconds, "ours", "exact", bar),
    _race.ratio(f"{name}: ours causal / ours", seconds, "ours", "causal"),
  ]
  if "jax.nn" in seconds:
    rows.append(
      _race.ratio(f"{name}: jax.nn / ours", seconds, "ours", "jax.nn")
    )
  return rows


def crossover(dim: int, degree: int) -> _race.Row:
  """Length from which polynomial attention wins, over the feature count."""
  ours = functools.partial(polynomial_attention, degree=degree, radius=2.0)
  ours, exact = jax.jit(ours), jax.jit(softmax_attention)
  log_ratio = []
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
    log_ratio.append(np.log(row.measured))
  # Where the line between two lengths crosses 1; the ends if it never does.
  length = np.exp(np.interp(0.0, log_ratio, np.log(_LENGTHS)))
  num_features = feature_count(dim, degree)
  return _race.figure(
    f"crossover, d = {dim}, g = {degree}: n / C(d + g, g) = n / {num_features}",
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
  want, got = np.asarray(ours(*arrays)), _torch_attention(*tensors)
  np.testing.assert_allclose(got.transpose(1, 2).numpy(), want, atol=1e-4)
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
