"""Exact attention on a TPU: how arrays lie, and which block a step takes.

A tile's ``rows`` are one block of queries of all G heads that share the keys,
G * block_q of them. Scores lie as (keys, rows), so that maxima and sums over
keys go down the sublanes, and what belongs to a query (log-sum-exp, delta) is a
row of lanes. Arrays are arranged so once, outside, and padded to whole blocks:

    query (B, K, R, H) with R = num_q * rows, key (B, K, S, H),
    per query (B, K, 1, R), bias and mask (B|1, K|1, G|1, S|1, T|1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._compat import pl
from pallas_kernels.flash_attention._blocks import (
  ZERO,
  Plan,
  keys_seen,
  queries_seeing,
)


def rows_of(x: jax.Array, plan: Plan, fill: float = 0) -> jax.Array:
  """(B, T, N, ...) -> (B, K, R, ...), the order of the tiles."""
  b, t = x.shape[:2]
  size = plan.num_q * plan.block_q
  widths = ((0, 0), (0, size - t)) + ((0, 0),) * (x.ndim - 2)
  x = jnp.pad(x, widths, constant_values=fill)
  x = x.reshape(b, plan.num_q, plan.block_q, plan.heads, plan.group, -1)
  x = x.transpose(0, 3, 1, 4, 2, 5)
  return x.reshape(b, plan.heads, plan.num_q * plan.rows, -1)


def from_rows(x: jax.Array, plan: Plan, length: int) -> jax.Array:
  """(B, K, R, H) -> (B, T, N, H); undoes ``rows_of``."""
  b, k, _, h = x.shape
  x = x.reshape(b, k, plan.num_q, plan.group, plan.block_q, h)
  x = x.transpose(0, 2, 4, 1, 3, 5)
  return x.reshape(b, -1, k * plan.group, h)[:, :length]


def lanes_of(x: jax.Array, plan: Plan, fill: float = 0) -> jax.Array:
  """(B, T, N) -> (B, K, 1, R)."""
  return jnp.swapaxes(rows_of(x, plan, fill), 2, 3)


def keys_of(x: jax.Array, plan: Plan) -> jax.Array:
  """(B, S, K, H) -> (B, K, S, H), padded."""
  size = plan.num_k * plan.block_k
  x = jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0)))
  return jnp.swapaxes(x, 1, 2)


def from_keys(x: jax.Array, length: int) -> jax.Array:
  """(B, K, S, H) -> (B, S, K, H)."""
  return jnp.swapaxes(x, 1, 2)[:, :length]


def scores_of(x: jax.Array, plan: Plan) -> jax.Array:
  """(B|1, N|1, T|1, S|1) -> (B|1, K|1, G|1, S|1, T|1), padded."""
  b, n, t, s = x.shape
  heads = (1, 1) if n == 1 else (plan.heads, plan.group)
  x = jnp.swapaxes(x.reshape(b, *heads, t, s), 3, 4)
  sizes = plan.num_k * plan.block_k, plan.num_q * plan.block_q
  pads = (size - have if have > 1 else 0 for size, have in zip(sizes, (s, t)))
  return jnp.pad(x, ((0, 0),) * 3 + tuple((0, p) for p in pads))


Maps = Callable[..., tuple[Any, Any, Any, Any]]


class Specs(NamedTuple):
  """Block specs of a pass, from ``at(*grid ids, bounds) -> (b, k, i, j)``."""

  plan: Plan
  at: Maps

  def rows(self, size: int) -> pl.BlockSpec:
    """Of (B, K, R, size)."""
    return pl.BlockSpec(
      (None, None, self.plan.rows, size),
      lambda *ids: (*self._query(ids), ZERO),
    )

  def lanes(self) -> pl.BlockSpec:
    """Of (B, K, 1, R)."""

    def index(*ids: Any) -> Any:
      b, k, i = self._query(ids)
      return b, k, ZERO, i

    return pl.BlockSpec((None, None, 1, self.plan.rows), index)

  def keys(self, size: int) -> pl.BlockSpec:
    """Of (B, K, S, size)."""

    def index(*ids: Any) -> Any:
      b, k, _, j = self.at(*ids)
      return b, k, j, ZERO

    return pl.BlockSpec((None, None, self.plan.block_k, size), index)

  def scores(self, shape: tuple[int, ...]) -> pl.BlockSpec:
    """Of (B|1, K|1, G|1, S|1, T|1)."""
    blocks = self.plan.block_k, self.plan.block_q
    tile = (a if n > 1 else 1 for a, n in zip(blocks, shape[3:]))

    def index(*ids: Any) -> Any:
      b, k, i, j = self.at(*ids)
      places = (b, k, ZERO, j, i)
      return tuple(a if n > 1 else ZERO for a, n in zip(places, shape))

    return pl.BlockSpec((None, None, shape[2], *tile), index)

  def query_segments(self) -> pl.BlockSpec:
    """Of (B, 1, R)."""

    def index(*ids: Any) -> Any:
      b, _, i = self._query(ids)
      return b, ZERO, i

    return pl.BlockSpec((None, 1, self.plan.rows), index)

  def key_segments(self) -> pl.BlockSpec:
    """Of (B, S, 1)."""

    def index(*ids: Any) -> Any:
      b, _, _, j = self.at(*ids)
      return b, j, ZERO

    return pl.BlockSpec((None, self.plan.block_k, 1), index)

  def _query(self, ids: tuple[Any, ...]) -> tuple[Any, ...]:
    return self.at(*ids)[:3]


def by_queries(plan: Plan) -> Maps:
  """Grid (B, K, num_q, key_steps): keys pass by a block of queries."""

  def at(b: Any, k: Any, i: Any, step: Any, bounds: Any) -> Any:
    seen = keys_seen(plan, bounds, b, i)
    return b, k, i, seen.block(step, plan.num_k)

  return at


def by_keys(plan: Plan) -> Maps:
  """Grid (B, K, num_k, query_steps): queries pass by a block of keys."""

  def at(b: Any, k: Any, j: Any, step: Any, bounds: Any) -> Any:
    seen = queries_seeing(plan, bounds, b, j)
    return b, k, seen.block(step, plan.num_q), j

  return at
