"""What does top-k attention cost beside selecting from all scores at once?

Peers: the same attention by ``lax.top_k`` on the full score matrix, which
streaming must not be much slower than while it holds a fraction of the matrix,
and dense attention, which decoding must beat; float32, H=64.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from jax import lax

from benchmarks import _race
from jaxattn.attention import topk_attention

_DIM = 64


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = [*streaming(num_heads=1), *streaming(num_heads=8)]
  for length, k in ((65536, 128), (65536, 4096), (262144, 16384)):
    rows += decoding(length, k, num_heads=1)
  rows += decoding(65536, 4096, num_heads=8)
  _race.publish("attention_sparsity", "Top-k attention", rows)


def streaming(num_heads: int) -> list[_race.Row]:
  """256 queries on 16384 keys: as fast as from the full matrix, or nearly."""
  length, keys, k = 256, 16384, 128
  arrays = _inputs(length, keys, num_heads)
  ours = jax.jit(functools.partial(topk_attention, k=k))
  contestants = {
    "ours": ours,
    "full": jax.jit(functools.partial(full_matrix_attention, k=k)),
    "selection": jax.jit(functools.partial(full_matrix_selection, k=k)),
  }
  seconds = _race.race(_calls(contestants, arrays))
  matrix = 4 * num_heads * length * keys
  name = f"N = {num_heads}, T = {length}, S = {keys}, k = {k}"
  # 1.5 times the time is two thirds of the speed.
  return [
    _race.ratio(
      f"{name}: attention from full scores / ours",
      seconds,
      "ours",
      "full",
      2 / 3,
    ),
    _race.ratio(
      f"{name}: full scores and top_k alone / ours",
      seconds,
      "ours",
      "selection",
      2 / 3,
    ),
    _race.figure(
      f"{name}: bytes of the score matrix / ours",
      matrix / _race.temporary_bytes(ours, *arrays),
      8.0,
    ),
  ]


def decoding(length: int, k: int, num_heads: int) -> list[_race.Row]:
  """One query on many keys."""
  arrays = _inputs(1, length, num_heads)
  contestants = {
    "ours": jax.jit(functools.partial(topk_attention, k=k)),
    "jax.nn": jax.jit(jax.nn.dot_product_attention),
    "products": jax.jit(dense_decoding),
  }
  seconds = _race.race(_calls(contestants, arrays))
  name = f"N = {num_heads}, T = 1, S = {length}, k = {k}"
  return [
    _race.ratio(f"{name}: jax.nn / ours", seconds, "ours", "jax.nn", 1.3),
    _race.ratio(
      f"{name}: dense with keys first / ours", seconds, "ours", "products"
    ),
  ]


def full_matrix_selection(
  query: jax.Array, key: jax.Array, value: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
  """The k largest scores and where they are."""
  del value
  scores = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(_DIM)
  return lax.top_k(scores, k)


def full_matrix_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, *, k: int
) -> jax.Array:
  """Top-k attention as one would write it down."""
  scores, indices = full_matrix_selection(query, key, value, k=k)
  take = functools.partial(jnp.take, axis=0)
  rows = jax.vmap(jax.vmap(take, in_axes=(1, 0)))(value, indices)
  return jnp.einsum("bntk,bntkh->btnh", jax.nn.softmax(scores), rows)


def dense_decoding(
  query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
  """Dense attention of one query, with products in the order XLA likes."""
  scores = jnp.einsum("bsnh,btnh->bnst", key, query)[..., 0] / np.sqrt(_DIM)
  return jnp.einsum("bsnh,bns->bnh", value, jax.nn.softmax(scores))[:, None]


def _calls(
  contestants: dict[str, Callable[..., object]], arrays: list[jax.Array]
) -> dict[str, Callable[[], object]]:
  return {n: functools.partial(f, *arrays) for n, f in contestants.items()}


def _inputs(length: int, keys: int, num_heads: int) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  shapes = [(1, n, num_heads, _DIM) for n in (length, keys, keys)]
  return [jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes]


if __name__ == "__main__":
  app.run(main)
