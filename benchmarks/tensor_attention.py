"""How much faster is polynomial tensor attention than exact ones?

One head, float32, entries uniform on [-1, 1], head size and degree (d, g). The
baselines are our own exact attention, in linear memory, and an einsum over all
logits at once, our transcription of the formula; it stands for
``simplicial-attention``, which is not installed here and whose own fast path is
a kernel of a sliding window on a GPU. It goes up to n = 256, beyond which all
logits are half a gigabyte and more. What an attention to pairs costs beside one
to single tokens, its gradient beside itself, and a causal call beside one that
is not, are given, too, and the gradient of the training loss, exact beside
polynomial.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import _race
from jaxattn.attention import (
  polynomial_attention,
  polynomial_tensor_attention,
  tensor_attention,
  tensor_attention_loss_gradient,
)

# (d, g, n): bar against our own exact attention, or None.
_FORWARD = {
  (4, 4, 256): None,
  (4, 4, 512): None,
  (8, 2, 64): None,
  (8, 2, 128): None,
  (8, 2, 256): 30.0,
  (8, 2, 512): 150.0,
  (16, 2, 256): None,
  (16, 2, 512): None,
}
_LENGTHS = ((8, 2, 8192), (8, 2, 32768), (16, 2, 8192))
_EINSUM_LENGTH = 256
_RADIUS = 1.5
# Times of ordinary polynomial attention, and forwards of a gradient: at most.
_BAR_MATRIX, _BAR_GRADIENT = 2.0, 4.0


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows: list[_race.Row] = []
  for (dim, degree, length), bar in _FORWARD.items():
    rows += forward(dim, degree, length, bar)
  for length in (128, 256):
    rows += exact_gradient(8, length)
  for dim, degree, length in _LENGTHS:
    rows += linear(dim, degree, length)
  for length in (64, 256):
    rows.append(loss_gradient(8, 2, length))
  _race.publish("tensor_attention", "Tensor attention", rows)


def forward(
  dim: int, degree: int, length: int, bar: float | None
) -> list[_race.Row]:
  """Forward pass against exact attention, ours and all logits at once."""
  arrays = _inputs(dim, length)
  functions = {"ours": _ours(degree), "exact": tensor_attention}
  if length <= _EINSUM_LENGTH:
    functions["einsum"] = _einsum
  seconds = _race.race(_runs(functions, arrays))
  name = f"forward, d = {dim}, g = {degree}, n = {length}"
  rows = [_race.ratio(f"{name}: exact / ours", seconds, "ours", "exact", bar)]
  if "einsum" not in functions:
    return rows
  return [
    *rows,
    _race.ratio(f"{name}: einsum / ours", seconds, "ours", "einsum"),
    _race.ratio(f"{name}: einsum / exact", seconds, "exact", "einsum"),
  ]


def exact_gradient(dim: int, length: int) -> list[_race.Row]:
  """Exact attention with its gradient: time, and memory, of both forms."""
  arrays = _inputs(dim, length)
  functions = {
    "exact": _pullback(tensor_attention),
    "einsum": _pullback(_einsum),
  }
  seconds = _race.race(_runs(functions, arrays))
  used = {
    name: _race.temporary_bytes(jax.jit(fn), *arrays)
    for name, fn in functions.items()
  }
  name = f"exact, forward and backward, d = {dim}, n = {length}: einsum / exact"
  return [
    _race.ratio(name, seconds, "exact", "einsum"),
    _race.figure(f"{name}, memory", used["einsum"] / used["exact"]),
  ]


def linear(dim: int, degree: int, length: int) -> list[_race.Row]:
  """What pairs, a gradient and a causal mask cost, beside going without."""
  arrays = _inputs(dim, length)
  ours = _ours(degree)
  # Without the mean of its keys, which is work that ours does not do.
  matrix = functools.partial(
    polynomial_attention, degree=degree, radius=_RADIUS, center_keys=False
  )
  causal = functools.partial(ours, is_causal=True)
  functions = {
    "ours": ours,
    "matrix": lambda q, k1, k2, v1, v2: matrix(q, k1, v1),
    "gradient": _pullback(ours),
    "causal": causal,
    "causal gradient": _pullback(causal),
  }
  seconds = _race.race(_runs(functions, arrays))
  name = f"d = {dim}, g = {degree}, n = {length}"
  # A bar is what a figure must reach: of at most twice, half.
  return [
    _race.ratio(
      f"{name}: polynomial_attention / ours",
      seconds,
      "ours",
      "matrix",
      1 / _BAR_MATRIX,
    ),
    _race.ratio(
      f"{name}: ours forward / ours forward and backward",
      seconds,
      "gradient",
      "ours",
      1 / _BAR_GRADIENT,
    ),
    _race.ratio(f"{name}: causal / ours", seconds, "ours", "causal"),
    _race.ratio(
      f"{name}: causal forward and backward / causal forward",
      seconds,
      "causal",
      "causal gradient",
    ),
  ]


def loss_gradient(dim: int, degree: int, length: int) -> _race.Row:
  """Gradient of the training loss: exact against polynomial."""
  rng = np.random.default_rng(0)
  tall, small = (
    list(jnp.asarray(rng.uniform(-1, 1, (6, n, dim)), jnp.float32))
    for n in (length, dim)
  )
  arrays = tuple(small[:3]), *tall[:5], *small[3:5], tall[5]
  exact = tensor_attention_loss_gradient
  ours = functools.partial(exact, degree=degree, radius=_RADIUS)
  functions = {"ours": ours, "exact": exact}
  seconds = _race.race(
    {k: functools.partial(f, *arrays) for k, f in functions.items()}
  )
  name = f"gradient of the loss, d = {dim}, g = {degree}, n = {length}"
  return _race.ratio(f"{name}: exact / ours", seconds, "ours", "exact")


def _ours(degree: int) -> Callable[..., jax.Array]:
  return functools.partial(
    polynomial_tensor_attention, degree=degree, radius=_RADIUS
  )


def _einsum(
  query: jax.Array, key1: jax.Array, key2: jax.Array, *values: jax.Array
) -> jax.Array:
  scale = 1 / math.sqrt(query.shape[-1])
  logits = scale * jnp.einsum("bthc,bjhc,bkhc->bhtjk", query, key1, key2)
  weights = jax.nn.softmax(logits, (-2, -1))
  # The last axis first: any other order has all of (t, j, k, c) in memory.
  inner = jnp.einsum("bhtjk,bkhc->bhtjc", weights, values[1])
  return jnp.einsum("bhtjc,bjhc->bthc", inner, values[0])


def _inputs(dim: int, length: int) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  shape = (5, 1, length, 1, dim)
  return list(jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32))


def _runs(functions: dict[str, Any], arrays: list[jax.Array]) -> dict[str, Any]:
  return {
    k: functools.partial(jax.jit(f), *arrays) for k, f in functions.items()
  }


def _pullback(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
  def run(*arrays: jax.Array) -> Any:
    out, pull = jax.vjp(attend, *arrays)
    return out, pull(out)

  return run


if __name__ == "__main__":
  app.run(main)
