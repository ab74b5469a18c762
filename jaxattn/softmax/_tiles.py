"""Geometry of tiled attention: which tiles exist, and what is visible in them.

Causal masks and local windows are one thing here, a *band*: query ``t`` sees
key ``s`` iff ``t - before <= s <= t + after``, where None means no limit. A
tile that lies inside the band needs no mask, one outside is never visited.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Band(NamedTuple):
  """Static part of the visibility: limits relative to the query's position."""

  before: int | None = None
  after: int | None = None

  @property
  def bounded(self) -> bool:
    """Whether anything is hidden at all."""
    return self.before is not None or self.after is not None

  def sees(self, first: Any, last: Any, key: jax.Array) -> jax.Array:
    """Whether a query between ``first`` and ``last`` sees ``key``."""
    seen = jnp.bool_(True)
    if self.before is not None:
      seen = seen & (key >= first - self.before)
    if self.after is not None:
      seen = seen & (key <= last + self.after)
    return seen

  def flip(self) -> "Band":
    """The band seen from the keys: which queries see key ``s``."""
    return Band(before=self.after, after=self.before)


class Axis(NamedTuple):
  """A sequence cut into blocks; the last block is moved back to fit.

  ``start(i)`` is where block ``i`` is read; items before ``i * block`` in it
  belong to block ``i - 1`` and must be ignored or recomputed. The first
  ``skipped`` items of each block are left out (see ``tail``).
  """

  size: int
  block: int
  skipped: int = 0

  @property
  def num_blocks(self) -> int:
    """Number of blocks."""
    return -(-self.size // self.block)

  @property
  def ragged(self) -> bool:
    """Whether the last block overlaps the one before it."""
    return self.size % (self.skipped + self.block) != 0

  def start(self, i: Any) -> Any:
    """First item of block ``i`` as it is read."""
    if not self.ragged:
      return i * (self.skipped + self.block) + self.skipped
    return jnp.minimum(i * self.block, self.size - self.block)

  def tail(self, skipped: int) -> "Axis":
    """The same blocks without their first items; they must not be ragged."""
    return Axis(self.size, self.block - skipped, skipped)

  def positions(self, i: Any) -> jax.Array:
    """Positions of the items in block ``i`` as it is read."""
    return self.start(i) + lax.iota(jnp.int32, self.block)

  def owned(self, i: Any) -> jax.Array:
    """Which items of block ``i`` belong to no earlier block."""
    return self.positions(i) >= i * self.block


class Visit(NamedTuple):
  """Blocks to visit: those of [low, high).

  Of these, [inner_low, inner_high) lie inside the band and repeat no item.
  """

  low: Any
  inner_low: Any
  inner_high: Any
  high: Any

  def inner(self) -> "Visit":
    """The blocks that lie inside the band, alone."""
    low, high = self.inner_low, self.inner_high
    return Visit(low, low, high, high)


def visit(axis: Axis, first: Any, last: Any, band: Band) -> Visit:
  """Blocks of ``axis`` that items ``first`` to ``last`` of the other axis see.

  Args:
    axis: the axis walked along.
    first: position of the first item on the other axis.
    last: position of the last item on the other axis.
    band: limits as seen from the other axis.

  Returns:
    Block numbers; Python integers where nothing is hidden.
  """
  num, inner_num = axis.num_blocks, axis.size // axis.block
  if not band.bounded:
    return Visit(0, 0, inner_num, num)
  low, inner_low, inner_high, high = 0, 0, inner_num, num
  if band.before is not None:
    low = jnp.clip((first - band.before) // axis.block, 0, num)
    inner_low = jnp.clip(-((band.before - last) // axis.block), 0, num)
  if band.after is not None:
    high = jnp.clip(-(-(last + band.after + 1) // axis.block), low, num)
    inner_high = jnp.clip((first + band.after + 1) // axis.block, 0, inner_num)
  inner_low = jnp.clip(inner_low, low, high)
  inner_high = jnp.clip(inner_high, inner_low, high)
  return Visit(low, inner_low, inner_high, high)


def walk(v: Visit, step: Callable[[Any, Any, bool], Any], carry: Any) -> Any:
  """Folds ``step(block, carry, edge)`` over the blocks of a visit.

  Inner blocks go first with ``edge=False``; the others follow, in one loop.
  """
  carry = loop(v.inner_low, v.inner_high, lambda i, c: step(i, c, False), carry)
  left = v.inner_low - v.low

  def edge(e: Any, c: Any) -> Any:
    return step(
      jnp.where(e < left, v.low + e, v.inner_high + e - left), c, True
    )

  return loop(0, left + v.high - v.inner_high, edge, carry)


def at(*starts: Any) -> tuple[jax.Array, ...]:
  """Start indices of a slice, all int32: mixed integer dtypes are refused."""
  return tuple(jnp.asarray(s, jnp.int32) for s in starts)


def loop(low: Any, high: Any, step: Callable[..., Any], carry: Any) -> Any:
  """``lax.fori_loop`` with an int32 index under x64 too; empty if it can be."""
  if isinstance(low, int) and isinstance(high, int):
    if high <= low:
      return carry
    return lax.fori_loop(np.int32(low), np.int32(high), step, carry)
  low, high = jnp.asarray(low, jnp.int32), jnp.asarray(high, jnp.int32)
  return lax.fori_loop(low, high, step, carry)
