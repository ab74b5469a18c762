"""What does a state of moments save, and what does it cost to keep?

Peers: exact attention to a cache of all keys and values; and a cache of as many
bytes as the state, of the first four tokens and the last ones, as
StreamingLLM (arXiv 2309.17453) keeps. B=1, one head, float32, degree 2, chunks
of 1024 tokens. glassroom's sata_attention, the same sums by symmetric monomials
in PyTorch, is not among the packages that are installed here, and not raced.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import _race
from experiments import _streams
from jaxattn.attention import (
  moment_init,
  moment_query,
  moment_update,
  softmax_attention,
  state_bytes,
  streaming,
  three_sketch_decode,
  three_sketch_finalize,
  three_sketch_init,
  three_sketch_update_key,
  three_sketch_update_query,
  three_sketch_update_value,
)

_CHUNK, _CONTEXT, _SINKS = 1024, 65_536, 4
# Tokens a second that an update must reach, by head size.
_TOKENS_PER_SECOND = {8: 1e7, 64: 3e5}
_STEP_BAR = 7.0
# A step takes as long behind many tokens: at most half as long again.
_CONSTANT_BAR = 0.67
# One alone, of some 20 us, would be measured cold.
_STEPS = 100
# Queries that three sketches are asked about.
_QUERIES = 1 << 20


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = [
    *(throughput(dim, bar) for dim, bar in _TOKENS_PER_SECOND.items()),
    *(row for dim in (8, 64) for row in decoding(dim)),
    *(constant(dim) for dim in (8, 64)),
    noise_at_equal_memory(8),
    photograph_at_equal_memory(8),
    *three_sketches(8),
  ]
  _race.publish("streaming_attention", "Attention over streams", rows)


def throughput(dim: int, bar: float, rounds: int = 9) -> _race.Row:
  """Tokens a second of compensated updates, over the bar."""
  num = 2048 if dim == 8 else 64
  pairs = _normal(0, (num, 2, 1, _CHUNK, 1, dim))
  empty = moment_init(1, 1, dim, dim, degree=2)
  question = f"tokens a second of updates, H = {dim}, over {bar:.0e}"
  return _rate(
    question,
    lambda: streaming.stream(_add, empty, pairs),
    num * _CHUNK / bar,
    rounds,
    1.0,
  )


def _rate(
  question: str, run: Any, work: float, rounds: int, bar: float | None = None
) -> _race.Row:
  """Work a second of a call."""
  jax.block_until_ready(run())
  rates = []
  for _ in range(rounds):
    start = time.perf_counter()
    jax.block_until_ready(run())
    rates.append(work / (time.perf_counter() - start))
  middle = float(np.median(rates))
  return _race.Row(question, middle, min(rates), max(rates), bar)


def decoding(dim: int) -> list[_race.Row]:
  """Tokens and answers by turns, beside the answers of a cache alone."""
  rows = []
  for n in (1024, _CONTEXT):
    key, value = _normal(1, (2, 1, n, 1, dim))
    empty = moment_init(1, 1, dim, dim, degree=2)
    query = key[:, :1]
    state = moment_update(empty, key, value)
    contestants = {
      "state": functools.partial(_steps, state, query),
      "cache": functools.partial(_cached_steps, query, key, value),
    }
    seconds = _race.race(contestants, rounds=15)
    rows.append(
      _race.ratio(
        f"{_STEPS} steps of decoding, H = {dim}, n = {n}: cache / state",
        seconds,
        "state",
        "cache",
        _STEP_BAR if n == _CONTEXT else None,
      )
    )
  return rows


def constant(dim: int) -> _race.Row:
  """Steps of decoding behind few tokens and behind many."""
  empty = moment_init(1, 1, dim, dim, degree=2)
  contestants = {}
  for n in (1024, _CONTEXT):
    key, value = _normal(1, (2, 1, n, 1, dim))
    state = moment_update(empty, key, value)
    contestants[str(n)] = functools.partial(_steps, state, key[:, :1])
  seconds = _race.race(contestants, rounds=15)
  return _race.ratio(
    f"{_STEPS} steps of a state, H = {dim}: n = 1024 / n = {_CONTEXT}",
    seconds,
    str(_CONTEXT),
    "1024",
    _CONSTANT_BAR,
  )


def noise_at_equal_memory(dim: int, num_queries: int = 256) -> _race.Row:
  """Of tokens that have nothing to do with each other."""
  rng = np.random.default_rng(2)
  key, value = rng.uniform(-1, 1, (2, _CONTEXT, dim))
  query = rng.uniform(-1, 1, (num_queries, dim))
  # No logit is larger than sqrt(H).
  return _error_at_equal_memory("noise", query, key, value, dim**0.5)


def photograph_at_equal_memory(dim: int, num_queries: int = 256) -> _race.Row:
  """Of the pixels of a photograph, by their patches, line by line."""
  pixels, patches = _streams.load_image(1 << 19)
  # Logits up to 2 in sqrt(H) of their scale.
  key = _streams.stream_keys(patches, dim, 2.0 * dim**0.5)
  probes = np.random.default_rng(2).choice(len(key), num_queries, replace=False)
  return _error_at_equal_memory("a photograph", key[probes], key, pixels, 2.0)


def _error_at_equal_memory(
  name: str, query: Any, key: Any, value: Any, radius: float
) -> _race.Row:
  """Error of sinks and a window, over that of a state of as many bytes."""
  query, key, value = (
    jnp.asarray(x, jnp.float32)[None, :, None] for x in (query, key, value)
  )
  dim, value_dim, n = key.shape[-1], value.shape[-1], key.shape[1]
  state = moment_init(1, 1, dim, value_dim, degree=2)
  window = state_bytes(state) // (4 * (dim + value_dim)) - _SINKS
  state = moment_update(state, key, value)
  exact = softmax_attention(query, key, value)
  ours = abs(moment_query(state, query, radius=radius) - exact).max()
  kept = (
    jnp.concatenate([x[:, :_SINKS], x[:, -window:]], 1) for x in (key, value)
  )
  theirs = abs(softmax_attention(query, *kept) - exact).max()
  return _race.figure(
    f"largest error on {name}, n = {n}, {state_bytes(state)} bytes each: "
    f"{_SINKS} sinks and a window of {window} / state",
    float(theirs / ours),
  )


def three_sketches(dim: int, rounds: int = 5) -> list[_race.Row]:
  """Pairs a second into sketches of 800 buckets, and queries out of them."""
  num = 256
  pairs = _normal(0, (num, 2, _CHUNK, dim))
  empty = three_sketch_init(
    jax.random.key(0), dim=dim, value_dim=dim, degree=2, k=16, eps1=0.5,
    eps2=0.05,
  )  # fmt: skip

  def fill() -> Any:
    # As two streams: a chunk of the one, and its number.
    chunks = jnp.arange(num, dtype=jnp.uint32) * _CHUNK, pairs
    return streaming.stream(_sketch, empty, chunks)

  state = three_sketch_finalize(fill())
  for i in range(0, _QUERIES, 1 << 16):
    few = jnp.zeros((1 << 16, dim)).at[::4096].set(pairs[0, 0, :16])
    state = three_sketch_update_query(state, i, few, radius=1.0)

  def decode() -> Any:
    return three_sketch_decode(state, num_queries=_QUERIES, k=16)

  return [
    _rate(
      f"pairs a second into three sketches, H = {dim}, over 1e+05",
      fill,
      num * _CHUNK / 1e5,
      rounds,
    ),
    _rate(
      f"queries a second that are decoded, {dim} columns, {_QUERIES} queries, "
      "over 1e+05",
      decode,
      _QUERIES / 1e5,
      2,
    ),
  ]


def _sketch(state: Any, chunk: tuple[jax.Array, jax.Array]) -> Any:
  start, (key, value) = chunk
  state = three_sketch_update_value(state, start, value)
  return three_sketch_update_key(state, start, key)


def _add(state: Any, pair: jax.Array) -> Any:
  return moment_update(state, pair[0], pair[1])


@jax.jit
def _step(state: Any, token: jax.Array) -> Any:
  state = moment_update(state, token, token)
  return state, moment_query(state, token, radius=1.0)


def _steps(state: Any, token: jax.Array) -> Any:
  out = None
  for _ in range(_STEPS):
    state, out = jax.block_until_ready(_step(state, token))
  return out


def _cached_steps(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
  out = None
  for _ in range(_STEPS):
    out = jax.block_until_ready(_attention(query, key, value))
  return out


_attention = jax.jit(softmax_attention)


def _normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
  rng = jax.random.key(seed)
  return jax.random.normal(rng, shape, jnp.float32) / shape[-1]


if __name__ == "__main__":
  app.run(main)
