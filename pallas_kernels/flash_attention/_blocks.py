"""Exact attention in blocks: which of them there are, and which are visited.

A *tile* is ``block_k`` keys on one block of queries. Which tiles hold work is a
matter of three numbers for each batch element, read before or by the kernel:
position of query 0, number of queries, of keys. Index arithmetic is np.int32: a
plain number would be 64 bits wide under x64, and Mosaic refuses to compile it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.flash_attention.config import BlockSizes
from pallas_kernels.flash_attention.operands import Operands, Options

ZERO = np.int32(0)


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
    last = lax.max(self.high - 1, ZERO)
    return lax.min(lax.min(self.low + step, last), np.int32(num - 1))

  def holds(self, step: Any) -> Any:
    """Whether there is work in this step."""
    return self.low + step < self.high


def _blocks_below(position: Any, block: int) -> Any:
  """How many blocks begin at or before ``position``."""
  size = np.int32(block)
  return lax.div(lax.max(position + size, ZERO), size)


def keys_seen(plan: Plan, bounds: Any, b: Any, i: Any) -> Range:
  """Blocks of keys that block ``i`` of the queries sees."""
  offset, queries, keys = bounds[0, b], bounds[1, b], bounds[2, b]
  first = i * np.int32(plan.block_q) + offset
  low: Any = ZERO
  high = _blocks_below(keys - 1, plan.block_k)
  if plan.before is not None:
    low = _blocks_below(first - np.int32(plan.before), plan.block_k) - 1
    low = lax.max(low, ZERO)
  if plan.after is not None:
    last = first + np.int32(plan.block_q - 1 + plan.after)
    high = lax.min(high, _blocks_below(last, plan.block_k))
  return Range(low, jnp.where(first - offset < queries, high, ZERO))


def queries_seeing(plan: Plan, bounds: Any, b: Any, j: Any) -> Range:
  """Blocks of queries that see block ``j`` of the keys."""
  offset, queries, keys = bounds[0, b], bounds[1, b], bounds[2, b]
  first = j * np.int32(plan.block_k)
  low: Any = ZERO
  high = _blocks_below(queries - 1, plan.block_q)
  if plan.after is not None:
    at = first - np.int32(plan.after) - offset
    low = lax.max(_blocks_below(at, plan.block_q) - 1, ZERO)
  if plan.before is not None:
    last = first + np.int32(plan.block_k - 1 + plan.before) - offset
    high = lax.min(high, _blocks_below(last, plan.block_q))
  return Range(low, jnp.where(first < keys, high, ZERO))


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
