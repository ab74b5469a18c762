"""What do linear attention and the two-row evaluation of the network save?

Linear attention against our own exact attention and ``jax.nn``, 16 numbers to a
head, float32; the fixed network by two rows of attention against all scores.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import _race
from jaxattn.attention import (
  linear_attention,
  relu_attention,
  softmax_attention,
)
from jaxattn.data import separation_dataset
from jaxattn.models import separation_network

_HEAD_DIM = 16
_NETWORK_BAR = 100.0
_FORWARD_BAR = 20.0


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = [
    network(4096, 258),
    *attention(8192, is_causal=False),
    *attention(8192, is_causal=True),
    *gradient(8192),
    *relu(4096),
  ]
  _race.publish("softmax_vs_linear", "Linear and ReLU attention", rows)


def network(length: int, dim: int) -> _race.Row:
  """F of one matrix: two rows of attention, or all scores."""
  a, _ = separation_dataset(
    jax.random.key(0), length=length, dim=dim, amplitude=0.7, b=0.3
  )
  signs = jax.random.rademacher(jax.random.key(1), (104, dim), jnp.float32)
  run = functools.partial(separation_network, b=0.3)
  seconds = _race.race(
    {
      "two rows": functools.partial(jax.jit(run), a, signs),
      "dense": functools.partial(
        jax.jit(run), a, signs, x=jnp.ones((dim, dim))
      ),
    }
  )
  name = f"fixed network, n = {length}, d = {dim}: all scores / two rows"
  return _race.ratio(name, seconds, "two rows", "dense", _NETWORK_BAR)


def attention(length: int, *, is_causal: bool) -> list[_race.Row]:
  """Forward pass of one head."""
  arrays = _inputs(length)
  contestants = {
    "ours": functools.partial(linear_attention, is_causal=is_causal),
    "exact": functools.partial(softmax_attention, is_causal=is_causal),
    "jax.nn": functools.partial(
      jax.nn.dot_product_attention, is_causal=is_causal
    ),
  }
  seconds = _race.race(_calls(contestants, arrays))
  how = "causal, " if is_causal else ""
  name = f"{how}T = {length}, H = {_HEAD_DIM}"
  bar = None if is_causal else _FORWARD_BAR
  return [
    _race.ratio(f"{name}: exact / linear", seconds, "ours", "exact", bar),
    _race.ratio(f"{name}: jax.nn / linear", seconds, "ours", "jax.nn"),
  ]


def gradient(length: int) -> list[_race.Row]:
  """Forward and backward pass of one head."""
  arrays = _inputs(length)

  def both(attend: Callable[..., Any]) -> Callable[..., object]:
    def loss(*arrays: jax.Array) -> jax.Array:
      return attend(*arrays).sum()

    return jax.grad(loss, (0, 1, 2))

  contestants = {
    "ours": both(linear_attention),
    "exact": both(softmax_attention),
  }
  seconds = _race.race(_calls(contestants, arrays))
  name = f"with gradient, T = {length}, H = {_HEAD_DIM}: exact / linear"
  return [_race.ratio(name, seconds, "ours", "exact")]


def relu(length: int) -> list[_race.Row]:
  """Dense ReLU attention costs about what exact attention does."""
  arrays = _inputs(length)
  ours = functools.partial(relu_attention, alpha=2)
  contestants = {
    "ours": ours,
    "exact": softmax_attention,
    "matrix": _full_matrix,
  }
  seconds = _race.race(_calls(contestants, arrays))
  name = f"T = {length}, H = {_HEAD_DIM}, alpha = 2"
  return [
    _race.ratio(f"{name}: exact / relu", seconds, "ours", "exact"),
    _race.ratio(f"{name}: full matrix / relu", seconds, "ours", "matrix"),
    _race.figure(
      f"{name}: bytes of the score matrix / relu",
      4 * length**2 / _race.temporary_bytes(jax.jit(ours), *arrays),
    ),
  ]


def _full_matrix(
  query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
  """ReLU attention as one would write it down."""
  scores = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(_HEAD_DIM)
  weights = jax.nn.relu(scores) ** 2
  total = weights.sum(-1, keepdims=True)
  weights = weights / jnp.where(total == 0, 1, total)
  return jnp.einsum("bnts,bsnh->btnh", weights, value)


def _calls(
  contestants: Mapping[str, Callable[..., object]], arrays: list[jax.Array]
) -> dict[str, Callable[[], object]]:
  return {
    name: functools.partial(jax.jit(fn), *arrays)
    for name, fn in contestants.items()
  }


def _inputs(length: int) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  shape = (1, length, 1, _HEAD_DIM)
  return [jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(3)]


if __name__ == "__main__":
  app.run(main)
