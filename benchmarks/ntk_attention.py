"""What does a prefix cost once it is folded into a state?

Peers: attention of ``jax.nn`` to prefix and context put together, which is what
a prefix costs otherwise, and our own ``prefix_attention``; B=1, T=S=256, N=8,
H=64, float32, elu features. With Taylor features of degree 2 the state has 2145
rows and pays from a longer prefix on.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import _race
from jaxattn.attention import (
  PrefixState,
  ntk_attention,
  prefix_attention,
  prefix_state_init,
  prefix_state_update,
)
from jaxattn.features import feature_count, taylor_map

# Length of the prefix, and how many times faster a state must be.
_BARS = {256: None, 1024: 3.0, 4096: None, 16384: 30.0}


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = []
  for length, bar in _BARS.items():
    rows += serving(length, bar)
  _race.publish("ntk_attention", "NTK-Attention", rows)


def serving(
  length: int,
  bar: float | None,
  *,
  queries: int = 256,
  heads: int = 8,
  dim: int = 64,
) -> list[_race.Row]:
  """One forward pass, the state made beforehand."""
  rng = np.random.default_rng(0)
  query, key, value = _normal(rng, (3, 1, queries, heads, dim))
  prefix = tuple(_normal(rng, (2, length, heads, dim)))
  taylor = taylor_map(2)
  quadratic = functools.partial(ntk_attention, feature_map=taylor)
  call = query, key, value
  contestants = {
    "ours": (jax.jit(ntk_attention), _state(prefix, dim)),
    "quadratic": (
      jax.jit(quadratic),
      _state(prefix, feature_count(dim, 2), feature_map=taylor),
    ),
    "prefix": (jax.jit(_prefix), prefix),
    "jax.nn": (jax.jit(_concatenated), prefix),
  }
  seconds = _race.race(
    {
      name: functools.partial(fn, *call, what)
      for name, (fn, what) in contestants.items()
    }
  )
  name = f"m = {length}"
  return [
    _race.ratio(
      f"{name}: jax.nn, prefix and context together / state",
      seconds,
      "ours",
      "jax.nn",
      bar,
    ),
    _race.ratio(
      f"{name}: our prefix_attention / state", seconds, "ours", "prefix"
    ),
    _race.ratio(
      f"{name}: our prefix_attention / state of Taylor degree 2",
      seconds,
      "quadratic",
      "prefix",
    ),
    _race.ratio(
      f"{name}: jax.nn / our prefix_attention", seconds, "prefix", "jax.nn"
    ),
  ]


def _prefix(
  query: jax.Array, key: jax.Array, value: jax.Array, prefix: Any
) -> jax.Array:
  return prefix_attention(query, key, value, *prefix)


def _concatenated(
  query: jax.Array, key: jax.Array, value: jax.Array, prefix: Any
) -> jax.Array:
  key, value = (
    jnp.concatenate((p[None], x), 1)
    for p, x in zip(prefix, (key, value), strict=True)
  )
  return jax.nn.dot_product_attention(query, key, value)


def _state(prefix: Any, num_features: int, **options: Any) -> PrefixState:
  heads, dim = prefix[1].shape[1:]
  empty = prefix_state_init(heads, num_features, dim)
  return prefix_state_update(empty, *prefix, **options)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
  return jnp.asarray(rng.standard_normal(shape, np.float32))


if __name__ == "__main__":
  app.run(main)
