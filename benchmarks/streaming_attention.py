"""What does a state of moments save, and what does it cost to keep?

Peers: exact attention to a cache of all keys and values; and a cache of as many
bytes as the state, of the first four tokens and the last ones, as
StreamingLLM (arXiv 2309.17453) keeps. B=1, one head, float32, degree 2, chunks
of 1024 tokens.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import _race
from jaxattn.attention import (
  moment_init,
  moment_query,
  moment_update,
  softmax_attention,
  state_bytes,
  streaming,
)

_CHUNK, _CONTEXT, _SINKS = 1024, 65_536, 4
# Tokens a second that an update must reach, by head size.
_TOKENS_PER_SECOND = {8: 1e7, 64: 3e5}
_STEP_BAR = 7.0


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = [
    *(throughput(dim, bar) for dim, bar in _TOKENS_PER_SECOND.items()),
    *(row for dim in (8, 64) for row in decoding(dim)),
    error_at_equal_memory(8),
  ]
  _race.publish("streaming_attention", "Attention over streams", rows)


def throughput(dim: int, bar: float, rounds: int = 9) -> _race.Row:
  """Tokens a second of compensated updates, over the bar."""
  num = 2048 if dim == 8 else 64
  pairs = _normal(0, (num, 2, 1, _CHUNK, 1, dim))
  empty = moment_init(1, 1, dim, dim, degree=2)

  def run() -> Any:
    return streaming.stream(_add, empty, pairs)

  jax.block_until_ready(run())
  rates = []
  for _ in range(rounds):
    start = time.perf_counter()
    jax.block_until_ready(run())
    rates.append(num * _CHUNK / (time.perf_counter() - start) / bar)
  question = f"tokens a second of updates, H = {dim}, over {bar:.0e}"
  return _race.Row(question, float(np.median(rates)), min(rates), max(rates), 1)


def decoding(dim: int) -> list[_race.Row]:
  """One token more and one answer, beside the answer of a cache alone."""
  rows = []
  for n in (1024, _CONTEXT):
    key, value = _normal(1, (2, 1, n, 1, dim))
    empty = moment_init(1, 1, dim, dim, degree=2)
    query = key[:, :1]
    contestants = {
      "state": functools.partial(
        _step, moment_update(empty, key, value), query
      ),
      "cache": functools.partial(jax.jit(softmax_attention), query, key, value),
    }
    seconds = _race.race(contestants, rounds=21)
    rows.append(
      _race.ratio(
        f"a step of decoding, H = {dim}, n = {n}: cache / state",
        seconds,
        "state",
        "cache",
        _STEP_BAR if n == _CONTEXT else None,
      )
    )
  return rows


def error_at_equal_memory(dim: int, num_queries: int = 256) -> _race.Row:
  """Error of sinks and a window, over that of a state of as many bytes."""
  rng = np.random.default_rng(2)
  key, value = (
    jnp.asarray(rng.uniform(-1, 1, (1, _CONTEXT, 1, dim)), jnp.float32)
    for _ in range(2)
  )
  query = jnp.asarray(rng.uniform(-1, 1, (1, num_queries, 1, dim)), jnp.float32)
  state = moment_init(1, 1, dim, dim, degree=2)
  window = state_bytes(state) // (2 * 4 * dim) - _SINKS
  state = moment_update(state, key, value)
  exact = softmax_attention(query, key, value)
  # No logit is larger than sqrt(H).
  ours = abs(moment_query(state, query, radius=dim**0.5) - exact).max()
  kept = (
    jnp.concatenate([x[:, :_SINKS], x[:, -window:]], 1) for x in (key, value)
  )
  theirs = abs(softmax_attention(query, *kept) - exact).max()
  return _race.figure(
    f"largest error, n = {_CONTEXT}, {state_bytes(state)} bytes each: "
    f"{_SINKS} sinks and a window of {window} / state",
    float(theirs / ours),
  )


def _add(state: Any, pair: jax.Array) -> Any:
  return moment_update(state, pair[0], pair[1])


@jax.jit
def _step(state: Any, token: jax.Array) -> Any:
  state = moment_update(state, token, token)
  return state, moment_query(state, token, radius=1.0)


def _normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
  rng = jax.random.key(seed)
  return jax.random.normal(rng, shape, jnp.float32) / shape[-1]


if __name__ == "__main__":
  app.run(main)
