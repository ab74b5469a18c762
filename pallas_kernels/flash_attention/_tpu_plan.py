"""Exact attention on a TPU: its tiles, which of them are visited, and where.

A *tile* is ``block_k`` keys on the ``rows`` of one block of queries: those of
all G heads that share the keys, G * block_q of them. Scores lie as (keys,
rows), so that maxima and sums over keys go down the sublanes, and what belongs
to a query (log-sum-exp, delta) is a row of lanes. Arrays are arranged so once,
outside, and padded to whole blocks:

    query (B, K, R, H) with R = num_q * rows, key (B, K, S, H),
    per query (B, K, 1, R), bias and mask (B|1, K|1, G|1, S|1, T|1).

Which tiles exist is a matter of three numbers for each batch element, read
before the pipeline starts: position of query 0, number of queries, of keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._compat import pl
from pallas_kernels.flash_attention.config import BlockSizes
from pallas_kernels.flash_attention.operands import Operands, Options

# A plain 0 would be 64 bits wide under x64, and Mosaic refuses to compile it.
_ZERO = np.int32(0)


class Plan(NamedTuple):
  """Static sizes of one pass.

  Attributes:
    batch: B.
    heads: K, key heads.
    group: G, query heads to a key head.
    num_q: blocks of queries.
    num_k: blocks of keys.
    block_q: queries of a head in a tile.
    block_k: keys in a tile.
    before: as in ``Options``.
    after: as in ``Options``.
    offset: whether query 0 may stand elsewhere than at key 0.
    edges: whether some tile may hold a score that is hidden.
  """

  batch: int
  heads: int
  group: int
  num_q: int
  num_k: int
  block_q: int
  block_k: int
  before: int | None
  after: int | None
  offset: bool
  edges: bool

  @property
  def rows(self) -> int:
    """Queries of all heads in a tile."""
    return self.group * self.block_q

  @property
  def key_steps(self) -> int:
    """Most blocks of keys that a block of queries sees."""
    return self._steps(self.num_k, self.block_k, self.block_q, self.num_q)

  @property
  def query_steps(self) -> int:
    """Most blocks of queries that see a block of keys."""
    flipped = self._replace(before=self.after, after=self.before)
    return flipped._steps(self.num_q, self.block_q, self.block_k, self.num_k)

  def _steps(self, num: int, block: int, other: int, num_other: int) -> int:
    before, after = self.before, self.after
    if before is not None and after is not None:
      return min(num, -(-(other + before + after - 1) // block) + 1)
    if after is not None and not self.offset:
      return min(num, (num_other * other - 1 + after) // block + 1)
    return num


def plan(x: Operands, options: Options, sizes: BlockSizes, *, backward: bool):
  """Cuts one call into the blocks of ``sizes``."""
  b, t, n, _ = x.query.shape
  s, k = x.key.shape[1:3]
  block_q = sizes.block_q_bwd if backward else sizes.block_q
  block_k = sizes.block_k_bwd if backward else sizes.block_k
  num_q, num_k = -(-t // block_q), -(-s // block_k)
  edges = (
    num_k * block_k != s
    or options.before is not None
    or options.after is not None
    or x.query_lengths is not None
    or x.key_lengths is not None
  )
  return Plan(
    b, k, n // k, num_q, num_k, block_q, block_k, options.before,
    options.after, x.offset is not None, edges,
  )  # fmt: skip


def bounds(x: Operands) -> jax.Array:
  """(3, B) int32: position of query 0, number of queries, number of keys."""
  b, t = x.query.shape[:2]

  def row(values: Any, default: int, high: int | None) -> jax.Array:
    values = jnp.asarray(default if values is None else values)
    if high is not None:
      values = jnp.minimum(values, high)
    return jnp.broadcast_to(values.astype(jnp.int32), (b,))

  s = x.key.shape[1]
  return jnp.stack(
    [
      row(x.offset, 0, None),
      row(x.query_lengths, t, t),
      row(x.key_lengths, s, s),
    ]
  )


class Range(NamedTuple):
  """Blocks [low, high) along the axis that a pass walks."""

  low: Any
  high: Any

  def block(self, step: Any, num: int) -> Any:
    """The block of a step; steps past the end stay, and move nothing."""
    last = lax.max(self.high - 1, _ZERO)
    return lax.min(lax.min(self.low + step, last), np.int32(num - 1))

  def holds(self, step: Any) -> Any:
    """Whether there is work in this step."""
    return self.low + step < self.high


def _blocks_below(position: Any, block: int) -> Any:
  """How many blocks begin at or before ``position``."""
  size = np.int32(block)
  return lax.div(lax.max(position + size, _ZERO), size)


def keys_seen(plan: Plan, bounds: Any, b: Any, i: Any) -> Range:
  """Blocks of keys that block ``i`` of the queries sees."""
  offset, queries, keys = bounds[0, b], bounds[1, b], bounds[2, b]
  first = i * np.int32(plan.block_q) + offset
  low: Any = _ZERO
  high = _blocks_below(keys - 1, plan.block_k)
  if plan.before is not None:
    low = _blocks_below(first - np.int32(plan.before), plan.block_k) - 1
    low = lax.max(low, _ZERO)
  if plan.after is not None:
    last = first + np.int32(plan.block_q - 1 + plan.after)
    high = lax.min(high, _blocks_below(last, plan.block_k))
  return Range(low, jnp.where(first - offset < queries, high, _ZERO))


def queries_seeing(plan: Plan, bounds: Any, b: Any, j: Any) -> Range:
  """Blocks of queries that see block ``j`` of the keys."""
  offset, queries, keys = bounds[0, b], bounds[1, b], bounds[2, b]
  first = j * np.int32(plan.block_k)
  low: Any = _ZERO
  high = _blocks_below(queries - 1, plan.block_q)
  if plan.after is not None:
    at = first - np.int32(plan.after) - offset
    low = lax.max(_blocks_below(at, plan.block_q) - 1, _ZERO)
  if plan.before is not None:
    last = first + np.int32(plan.block_k - 1 + plan.before) - offset
    high = lax.min(high, _blocks_below(last, plan.block_q))
  return Range(low, jnp.where(first < keys, high, _ZERO))


def is_edge(plan: Plan, bounds: Any, b: Any, i: Any, j: Any) -> Any:
  """Whether block ``i`` of the queries may not see a key of block ``j``."""
  offset, queries, keys = bounds[0, b], bounds[1, b], bounds[2, b]
  query, key = i * np.int32(plan.block_q), j * np.int32(plan.block_k)
  query_end, key_end = query + np.int32(plan.block_q), key + plan.block_k
  edge = (query_end > queries) | (key_end > keys)
  if plan.before is not None:
    edge |= key < query_end + (offset - 1 - np.int32(plan.before))
  if plan.after is not None:
    edge |= key_end > query + (offset + 1 + np.int32(plan.after))
  return edge


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
      lambda *ids: (*self._query(ids), _ZERO),
    )

  def lanes(self) -> pl.BlockSpec:
    """Of (B, K, 1, R)."""

    def index(*ids: Any) -> Any:
      b, k, i = self._query(ids)
      return b, k, _ZERO, i

    return pl.BlockSpec((None, None, 1, self.plan.rows), index)

  def keys(self, size: int) -> pl.BlockSpec:
    """Of (B, K, S, size)."""

    def index(*ids: Any) -> Any:
      b, k, _, j = self.at(*ids)
      return b, k, j, _ZERO

    return pl.BlockSpec((None, None, self.plan.block_k, size), index)

  def scores(self, shape: tuple[int, ...]) -> pl.BlockSpec:
    """Of (B|1, K|1, G|1, S|1, T|1)."""
    blocks = self.plan.block_k, self.plan.block_q
    tile = (a if n > 1 else 1 for a, n in zip(blocks, shape[3:]))

    def index(*ids: Any) -> Any:
      b, k, i, j = self.at(*ids)
      places = (b, k, _ZERO, j, i)
      return tuple(a if n > 1 else _ZERO for a, n in zip(places, shape))

    return pl.BlockSpec((None, None, shape[2], *tile), index)

  def query_segments(self) -> pl.BlockSpec:
    """Of (B, 1, R)."""

    def index(*ids: Any) -> Any:
      b, _, i = self._query(ids)
      return b, _ZERO, i

    return pl.BlockSpec((None, 1, self.plan.rows), index)

  def key_segments(self) -> pl.BlockSpec:
    """Of (B, S, 1)."""

    def index(*ids: Any) -> Any:
      b, _, _, j = self.at(*ids)
      return b, j, _ZERO

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
