"""How fast are words counted, and how fast is a schedule simulated?

Also what the large-cache schedule buys on a CPU, where its tiles are those of
``softmax_attention``: time and temporary memory beside dense attention of XLA,
float32, B=1, N=8, H=64. A row of counting or simulating divides what was asked
for by what was measured: a million configurations a second, 20 seconds.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import _race
from jaxattn.attention import softmax_attention
from jaxattn.iocomplexity import io_count, simulate

_CONFIGURATIONS = 1_000_000
_COUNTED = ("fwd_large", "fwd_small", "bwd_two_pass", "bwd_small")
_SIMULATED = ("fwd_large", "fwd_small", "bwd_two_pass", "bwd_small")
_SHAPE, _CACHES = (256, 256, 32), (64, 256, 4096)
_SIMULATION_SECONDS = 20.0
_LENGTH, _HEADS, _DIM = 4096, 8, 64


def main(argv: list[str]) -> None:
  """Runs everything and rewrites the section of RESULTS.md."""
  del argv
  rows = [*counting(), *simulation(), *attention()]
  _race.publish("attention_io", "Words that attention moves", rows)


def counting() -> list[_race.Row]:
  """Configurations a second, in millions."""
  rng = np.random.default_rng(0)
  sizes = {
    "num_queries": rng.integers(1, 1 << 17, _CONFIGURATIONS),
    "num_keys": rng.integers(1, 1 << 17, _CONFIGURATIONS),
    "head_dim": rng.integers(8, 129, _CONFIGURATIONS),
    "cache_words": rng.integers(1 << 10, 1 << 18, _CONFIGURATIONS),
  }
  seconds = _race.race(
    {name: functools.partial(io_count, name, **sizes) for name in _COUNTED}
  )
  return [
    _share(
      f"{name}, {_CONFIGURATIONS} configurations at once: 1 s / ours",
      1.0,
      seconds[name],
      1.0,
    )
    for name in _COUNTED
  ]


def simulation() -> list[_race.Row]:
  """Seconds of a simulated schedule, its slowest cache."""
  nq, nk, d = _SHAPE
  rng = np.random.default_rng(0)
  query, key, value = (rng.standard_normal((n, d)) for n in (nq, nk, nk))
  arrays = {"query": query, "key": key, "value": value}
  scores = query @ key.T
  lse = np.log(np.exp(scores).sum(1))
  out = np.exp(scores - lse[:, None]) @ value
  backward = arrays | {"out": out, "lse": lse, "out_grad": query}
  rows = []
  for name in _SIMULATED:
    inputs = backward if name.startswith("bwd") else arrays
    # The large ones need 5 to 7 rows of the cache.
    least = 64 if name.endswith("small") else 256
    runs: dict[str, Callable[[], Any]] = {
      str(m): functools.partial(simulate, name, inputs, cache_words=m)
      for m in _CACHES
      if m >= least
    }
    seconds = _race.race(runs, rounds=3)
    slowest = max(seconds.values(), key=statistics.median)
    rows.append(
      _share(
        f"simulated {name}, {_SHAPE}: {_SIMULATION_SECONDS:g} s / ours",
        _SIMULATION_SECONDS,
        slowest,
        1.0,
      )
    )
  return rows


def attention() -> list[_race.Row]:
  """Tiles against dense attention, time and memory."""
  rng = np.random.default_rng(0)
  shape = (1, _LENGTH, _HEADS, _DIM)
  arrays = [rng.standard_normal(shape, np.float32) for _ in range(3)]
  ours = jax.jit(softmax_attention)
  dense = jax.jit(jax.nn.dot_product_attention)
  seconds = _race.race(
    {
      "ours": functools.partial(ours, *arrays),
      "dense": functools.partial(dense, *arrays),
    }
  )
  spec = jax.ShapeDtypeStruct(shape, jnp.float32)
  tiled, full = (_race.temporary_bytes(f, *(spec,) * 3) for f in (ours, dense))
  name = f"forward, T = S = {_LENGTH}"
  return [
    _race.ratio(f"{name}: dense / tiles", seconds, "ours", "dense", 1.0),
    _race.figure(f"{name}: temporary memory, dense / tiles", full / tiled, 4.0),
  ]


def _share(
  question: str, wanted: float, seconds: list[float], bar: float
) -> _race.Row:
  """How many times faster than wanted."""
  shares = [wanted / s for s in seconds]
  median = statistics.median(shares)
  return _race.Row(question, median, min(shares), max(shares), bar)


if __name__ == "__main__":
  app.run(main)
