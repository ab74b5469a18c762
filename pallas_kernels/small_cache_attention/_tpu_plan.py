"""Attention for a small cache: its tiles, which are visited, and where.

Scores lie as (keys, rows), see ``flash_attention``; rows are the queries of all
heads of a group, one head after another, each padded to whole tiles. A product
adds ``depth`` terms to one tile at a time, innermost in its grid. The order of
the other axes is such that each phase moves the words that are counted in
arXiv 2410.09397, of a head; a step without work repeats an index.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._compat import pl
from pallas_kernels._sizes import up
from pallas_kernels.small_cache_attention.config import depth
from pallas_kernels.small_cache_attention.operands import Operands, Options

_ZERO = np.int32(0)


class Plan(NamedTuple):
  """Static sizes of one call.

  Attributes:
    batch: B.
    heads: K, key heads.
    group: G, query heads to a key head.
    queries: T.
    keys: S.
    block_q: queries in a tile.
    block_k: keys in a tile.
    num_q: tiles along the queries of a head.
    num_k: tiles along the keys.
    depth: terms that are added to a tile at a time.
    block_size: of tiles along a head.
    is_causal: whether query t sees keys 0 to t only.
    scale: factor on the logits.
  """

  batch: int
  heads: int
  group: int
  queries: int
  keys: int
  block_q: int
  block_k: int
  num_q: int
  num_k: int
  depth: int
  block_size: int
  is_causal: bool
  scale: float

  @property
  def num_rows(self) -> int:
    """Tiles along the rows."""
    return self.group * self.num_q

  @property
  def rows(self) -> int:
    """Queries of all heads of a group, padded."""
    return self.num_rows * self.block_q

  @property
  def padded_keys(self) -> int:
    """Keys, padded."""
    return self.num_k * self.block_k

  @property
  def edges(self) -> bool:
    """Whether some score is hidden."""
    return self.is_causal or self.padded_keys != self.keys

  def columns(self, size: int) -> tuple[int, int]:
    """Columns of a tile along a head of ``size``, and how many tiles."""
    block = min(self.block_size, up(size, self.depth))
    return block, -(-size // block)

  def last_key(self, i: Any) -> Any:
    """Last key that tile ``i`` of the rows sees."""
    t = lax.rem(i, np.int32(self.num_q))
    return t * np.int32(self.block_q) + np.int32(self.block_q - 1)


def plan(x: Operands, options: Options) -> Plan:
  """Cuts one call into tiles."""
  b, t, n, h = x.query.shape
  s, k = x.key.shape[1:3]
  size, terms = options.block_size, depth(options.block_size)
  block_q, block_k = (min(size, up(length, terms)) for length in (t, s))
  return Plan(
    b, k, n // k, t, s, block_q, block_k, -(-t // block_q), -(-s // block_k),
    terms, size, options.is_causal, 1 / math.sqrt(h),
  )  # fmt: skip


# --- arrays in the order of tiles ---


def rows_of(x: jax.Array, plan: Plan) -> jax.Array:
  """(B, T, N, H) -> (B K, rows, padded H)."""
  b, t, _, h = x.shape
  block, num = plan.columns(h)
  widths = (0, plan.num_q * plan.block_q - t), (0, 0), (0, block * num - h)
  x = jnp.pad(x, ((0, 0), *widths))
  x = x.reshape(b, x.shape[1], plan.heads, plan.group, -1)
  x = x.transpose(0, 2, 3, 1, 4)
  return x.reshape(b * plan.heads, plan.rows, -1)


def from_rows(x: jax.Array, plan: Plan, size: int) -> jax.Array:
  """(B K, rows, padded H) -> (B, T, N, H); undoes ``rows_of``."""
  x = x.reshape(plan.batch, plan.heads, plan.group, -1, x.shape[-1])
  x = x[..., : plan.queries, :size].transpose(0, 3, 1, 2, 4)
  return x.reshape(plan.batch, plan.queries, -1, size)


def lanes_of(x: jax.Array, plan: Plan, fill: float = 0) -> jax.Array:
  """(B, T, N) -> (B K, 1, rows)."""
  b, t, _ = x.shape
  widths = (0, 0), (0, plan.num_q * plan.block_q - t), (0, 0)
  x = jnp.pad(x, widths, constant_values=fill)
  x = x.reshape(b, x.shape[1], plan.heads, plan.group).transpose(0, 2, 3, 1)
  return x.reshape(b * plan.heads, 1, plan.rows)


def from_lanes(x: jax.Array, plan: Plan) -> jax.Array:
  """(B K, 1, rows) -> (B, T, N); undoes ``lanes_of``."""
  x = x.reshape(plan.batch, plan.heads, plan.group, -1)[..., : plan.queries]
  return x.transpose(0, 3, 1, 2).reshape(plan.batch, plan.queries, -1)


def keys_of(x: jax.Array, plan: Plan) -> jax.Array:
  """(B, S, K, H) -> (B K, padded S, padded H)."""
  b, s, k, h = x.shape
  block, num = plan.columns(h)
  widths = (0, plan.padded_keys - s), (0, 0), (0, block * num - h)
  x = jnp.swapaxes(jnp.pad(x, ((0, 0), *widths)), 1, 2)
  return x.reshape(b * k, *x.shape[2:])


def from_keys(x: jax.Array, plan: Plan, size: int) -> jax.Array:
  """(B K, padded S, padded H) -> (B, S, K, H); undoes ``keys_of``."""
  x = x.reshape(plan.batch, plan.heads, *x.shape[1:])
  return jnp.swapaxes(x, 1, 2)[:, : plan.keys, :, :size]


# --- grids ---


class Grid(NamedTuple):
  """Steps of one kind of product.

  Attributes:
    steps: along each axis; the last one adds terms.
    at: from a step to the places whose blocks it needs, a row, a key, a column
      and a term, each None where this kind has none.
    holds: from a step to whether there is work.
    parallel: how many axes may be taken in any order.
  """

  steps: tuple[int, ...]
  at: Callable[..., tuple[Any, Any, Any, Any]]
  holds: Callable[..., Any]
  parallel: int


def scores_by_rows(plan: Plan, size: int) -> Grid:
  """Tiles of scores; all keys of a row come together."""
  block, num = plan.columns(size)
  terms = block * num // plan.depth

  def holds(_h: Any, i: Any, j: Any, _k: Any) -> Any:
    return _seen(plan, i, j)

  def at(h: Any, i: Any, j: Any, k: Any) -> Any:
    if plan.is_causal:
      seen = holds(h, i, j, k)
      last = lax.div(plan.last_key(i), np.int32(plan.block_k))
      j, k = jnp.where(seen, j, last), jnp.where(seen, k, np.int32(terms - 1))
    return i, j, None, k

  steps = plan.batch * plan.heads, plan.num_rows, plan.num_k, terms
  return Grid(steps, at, holds, 2)


def scores_by_keys(plan: Plan, size: int) -> Grid:
  """Tiles of scores; all rows of a key come together."""
  block, num = plan.columns(size)
  terms = block * num // plan.depth

  def holds(_h: Any, j: Any, i: Any, _k: Any) -> Any:
    return _seen(plan, i, j)

  def at(h: Any, j: Any, i: Any, k: Any) -> Any:
    if plan.is_causal:
      seen, first = holds(h, j, i, k), j * np.int32(plan.block_k)
      t = lax.rem(i, np.int32(plan.num_q))
      first = lax.div(first, np.int32(plan.block_q))
      first = i - t + lax.min(first, np.int32(plan.num_q - 1))
      i, k = jnp.where(seen, i, first), jnp.where(seen, k, _ZERO)
    return i, j, None, k

  steps = plan.batch * plan.heads, plan.num_k, plan.num_rows, terms
  return Grid(steps, at, holds, 2)


def sums_over_keys(plan: Plan, size: int) -> Grid:
  """Tiles of what belongs to rows."""
  _, num = plan.columns(size)

  def holds(_h: Any, _c: Any, i: Any, k: Any) -> Any:
    if not plan.is_causal:
      return True
    return k * np.int32(plan.depth) <= plan.last_key(i)

  def at(_h: Any, c: Any, i: Any, k: Any) -> Any:
    if plan.is_causal:
      last = lax.div(plan.last_key(i), np.int32(plan.depth))
      k = lax.min(k, last)
    return i, None, c, k

  terms = plan.padded_keys // plan.depth
  return Grid(
    (plan.batch * plan.heads, num, plan.num_rows, terms), at, holds, 3
  )


def sums_over_rows(plan: Plan, size: int) -> Grid:
  """Tiles of what belongs to keys."""
  _, num = plan.columns(size)
  of_head = plan.num_q * plan.block_q // plan.depth

  def first(j: Any) -> Any:
    return lax.div(j * np.int32(plan.block_k), np.int32(plan.depth))

  def holds(_h: Any, j: Any, _c: Any, k: Any) -> Any:
    if not plan.is_causal:
      return True
    return lax.rem(k, np.int32(of_head)) >= first(j)

  def at(_h: Any, j: Any, c: Any, k: Any) -> Any:
    if plan.is_causal:
      t = lax.rem(k, np.int32(of_head))
      k = k - t + lax.min(lax.max(t, first(j)), np.int32(of_head - 1))
    return None, j, c, k

  terms = plan.rows // plan.depth
  return Grid((plan.batch * plan.heads, plan.num_k, num, terms), at, holds, 3)


def _seen(plan: Plan, i: Any, j: Any) -> Any:
  if not plan.is_causal:
    return True
  return j * np.int32(plan.block_k) <= plan.last_key(i)


# --- blocks ---

_ROW, _KEY, _COLUMN, _TERM = range(4)


class Specs(NamedTuple):
  """Blocks of operands in the order of a grid; columns along ``size``."""

  plan: Plan
  grid: Grid
  size: int

  def _spec(self, *axes: tuple[int, int | None]) -> pl.BlockSpec:
    """Of (B K, ...), from pairs of a block's size and a place."""

    def index(h: Any, *ids: Any) -> Any:
      places = self.grid.at(h, *ids)
      return h, *(_ZERO if a is None else places[a] for _, a in axes)

    return pl.BlockSpec((None, *(size for size, _ in axes)), index)

  def row_strip(self) -> pl.BlockSpec:
    """(block_q, depth) of rows."""
    return self._spec((self.plan.block_q, _ROW), (self.plan.depth, _TERM))

  def key_strip(self) -> pl.BlockSpec:
    """(block_k, depth) of keys."""
    return self._spec((self.plan.block_k, _KEY), (self.plan.depth, _TERM))

  def terms(self) -> pl.BlockSpec:
    """(depth, columns) of rows or keys, whichever are summed over."""
    block, _ = self.plan.columns(self.size)
    return self._spec((self.plan.depth, _TERM), (block, _COLUMN))

  def row_tile(self) -> pl.BlockSpec:
    """(block_q, columns) of rows."""
    block, _ = self.plan.columns(self.size)
    return self._spec((self.plan.block_q, _ROW), (block, _COLUMN))

  def key_tile(self) -> pl.BlockSpec:
    """(block_k, columns) of keys."""
    block, _ = self.plan.columns(self.size)
    return self._spec((self.plan.block_k, _KEY), (block, _COLUMN))

  def lanes(self) -> pl.BlockSpec:
    """(1, block_q): a number for each row."""
    return self._spec((1, None), (self.plan.block_q, _ROW))

  def scores(self) -> pl.BlockSpec:
    """(block_k, block_q) of scores."""
    return self._spec((self.plan.block_k, _KEY), (self.plan.block_q, _ROW))

  def scores_of_rows(self) -> pl.BlockSpec:
    """(depth, block_q) of scores."""
    return self._spec((self.plan.depth, _TERM), (self.plan.block_q, _ROW))

  def scores_of_keys(self) -> pl.BlockSpec:
    """(block_k, depth) of scores."""
    return self._spec((self.plan.block_k, _KEY), (self.plan.depth, _TERM))
