"""Exact attention on a GPU: what one warp group does with one block.

What passes by is copied into one of two slots of shared memory, while the other
is worked on.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._compat import block_ids, pl, plgpu
from pallas_kernels.flash_attention import _blocks
from pallas_kernels.flash_attention._blocks import Plan

SLOTS = 2


def ids() -> tuple[Any, ...]:
  """Batch element, head and block."""
  return block_ids("batch", "head", "block")


def column(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  return lax.broadcast_in_dim(x, shape, (0,))


def row(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  return lax.broadcast_in_dim(x, shape, (1,))


def _stream(
  low: Any, high: Any, num: int, copies: Any, step: Any, carry: Any
) -> Any:
  """Folds ``step(block, slot, carry)``; copies run one block ahead.

  ``copies`` are (source of a block, slots, barriers); there are ``num`` blocks.
  """

  def fetch(block: Any) -> None:
    slot = lax.rem(block - low, np.int32(SLOTS))
    for source, slots, barriers in copies:
      plgpu.copy_gmem_to_smem(source(block), slots.at[slot], barriers.at[slot])

  for ahead in range(min(SLOTS, num)):
    block = low + np.int32(ahead)
    pl.when(block < high)(functools.partial(fetch, block))

  def body(block: Any, carry: Any) -> Any:
    slot = lax.rem(block - low, np.int32(SLOTS))
    for _, _, barriers in copies:
      plgpu.barrier_wait(barriers.at[slot])
    carry = step(block, slot, carry)
    later = block + np.int32(SLOTS)

    @pl.when(later < high)
    def _():
      plgpu.commit_smem()  # All warps have read what is overwritten now.
      fetch(later)

    return carry

  return lax.fori_loop(low, high, body, carry)


def store(*copies: Any) -> None:
  """Copies buffers of shared memory to global memory."""
  plgpu.commit_smem()
  for buffer, target in copies:
    plgpu.copy_smem_to_gmem(buffer, target)
  plgpu.wait_smem_to_gmem(0)


def fetch_once(copies: Any) -> None:
  for source, buffer, barrier in copies:
    plgpu.copy_gmem_to_smem(source, buffer, barrier)
  for _, _, barrier in copies:
    plgpu.barrier_wait(barrier)


class Tile(NamedTuple):
  """Inside a kernel: products of tiles, and what hides scores."""

  plan: Plan
  scale: float
  interpret: bool
  bounds: Any = None

  def times_transposed(self, a: Any, b: Any) -> jax.Array:
    """(m, h), (n, h) in shared memory -> (m, n), in float32."""
    if self.interpret:  # knows no transposed operand
      contract = ((1,), (1,)), ((), ())
      return lax.dot_general(
        a[...], b[...], contract, preferred_element_type=jnp.float32
      )

    def multiply(acc_ref: Any) -> jax.Array:
      plgpu.wgmma(acc_ref, a, b.transpose((1, 0)))
      return acc_ref[...]

    shape = a.shape[0], b.shape[0]
    return pl.run_scoped(
      multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
    )

  def add_product(self, total: jax.Array, a: jax.Array, b: Any) -> jax.Array:
    """``total`` + (m, n) in registers times (n, h) in shared memory."""
    if self.interpret:  # knows no operand in registers
      return total + jnp.matmul(a, b[...], preferred_element_type=jnp.float32)

    def multiply(acc_ref: Any) -> None:
      plgpu.wgmma(acc_ref, a, b)

    start: Any = plgpu.WGMMAAccumulatorRef.init(total)
    return pl.run_state(multiply)(start)

  def hide(
    self, logits: jax.Array, b: Any, i: Any, j: Any, axis: int
  ) -> jax.Array:
    """-inf where hidden; queries lie along ``axis``."""
    plan, bounds = self.plan, self.bounds
    if not plan.edges:
      return logits
    shape = logits.shape
    query = lax.broadcasted_iota(jnp.int32, shape, axis)
    query += i * np.int32(plan.block_q)
    key = lax.broadcasted_iota(jnp.int32, shape, 1 - axis)
    key += j * np.int32(plan.block_k)
    seen = (key < bounds[2, b]) & (query < bounds[1, b])
    query += bounds[0, b]
    if plan.before is not None:
      seen &= key >= query - np.int32(plan.before)
    if plan.after is not None:
      seen &= key <= query + np.int32(plan.after)
    return jnp.where(seen, logits, -jnp.inf)


def over_keys(
  tile: Tile, at: tuple[Any, Any, Any], copies: Any, step: Any, start: Any
) -> Any:
  """Folds ``step(j, slot, carry)`` over the keys that a block of queries sees.

  ``at`` is ``ids()``, ``copies`` are (keys or values, slots, barriers).
  """
  plan, (b, n, i) = tile.plan, at
  head = lax.div(n, np.int32(plan.group))
  size = np.int32(plan.block_k)

  def source(ref: Any) -> Any:
    return lambda j: ref.at[b, pl.ds(j * size, plan.block_k), head]

  seen = _blocks.keys_seen(plan, tile.bounds, b, i)
  copies = [(source(ref), *to) for ref, *to in copies]
  return _stream(seen.low, seen.high, plan.num_k, copies, step, start)


def over_queries(
  tile: Tile,
  at: tuple[Any, Any, Any],
  wide: Any,
  thin: Any,
  step: Any,
  start: Any,
) -> Any:
  """Folds ``step(i, slot, carry)`` over queries that see a block of keys.

  ``at`` is ``ids()``; ``wide`` and ``thin``, vectors of a query and numbers,
  are (source, slots, barriers).
  """
  plan, (b, n, j) = tile.plan, at
  seen = _blocks.queries_seeing(plan, tile.bounds, b, j)
  each = lax.max(seen.high - seen.low, np.int32(0))

  # All heads of the group, one after another.
  def place(step: Any) -> Any:
    size = lax.max(each, np.int32(1))
    g, i = lax.div(step, size), seen.low + lax.rem(step, size)
    rows = pl.ds(i * np.int32(plan.block_q), plan.block_q)
    return n * np.int32(plan.group) + g, i, rows

  def wide_source(ref: Any) -> Any:
    def source(step: Any) -> Any:
      head, _, rows = place(step)
      return ref.at[b, rows, head]

    return source

  def thin_source(ref: Any) -> Any:
    def source(step: Any) -> Any:
      head, _, rows = place(step)
      return ref.at[b, head, rows]

    return source

  copies = [(wide_source(ref), *to) for ref, *to in wide]
  copies += [(thin_source(ref), *to) for ref, *to in thin]
  steps, num = each * np.int32(plan.group), plan.group * plan.num_q
  return _stream(
    np.int32(0),
    steps,
    num,
    copies,
    lambda at, slot, carry: step(place(at)[1], slot, carry),
    start,
  )


def forward_kernel(tile: Tile, bounds: Any, *refs: Any) -> None:
  plan, tile = tile.plan, tile._replace(bounds=bounds)
  query_ref, key_ref, value_ref, out_ref, lse_ref, buffers, barriers = refs
  query, keys, values, out, lse = buffers
  query_barrier, key_barriers, value_barriers = barriers
  b, n, i = at = ids()
  rows = pl.ds(i * np.int32(plan.block_q), plan.block_q)
  fetch_once([(query_ref.at[b, rows, n], query, query_barrier.at[0])])
  zeros = jnp.zeros((plan.block_q,), jnp.float32)
  start = jnp.zeros(out.shape, jnp.float32), zeros - jnp.inf, zeros
  copies = (
    (key_ref, keys, key_barriers),
    (value_ref, values, value_barriers),
  )
  acc, top, total = online_softmax(tile, at, query, copies, start)
  none = total == 0
  safe = jnp.where(none, 1.0, total)
  out[...] = (acc / column(safe, out.shape)).astype(out.dtype)
  lse[...] = jnp.where(none, -jnp.inf, top + jnp.log(safe))
  store((out, out_ref.at[b, rows, n]), (lse, lse_ref.at[b, n, rows]))


def online_softmax(
  tile: Tile, at: tuple[Any, Any, Any], query: Any, copies: Any, start: Any
) -> Any:
  """Adds all keys to (o, m, l), of which o and l are relative to exp(m)."""
  plan, (b, _, i) = tile.plan, at
  (_, keys, _), (_, values, _) = copies
  shape = plan.block_q, plan.block_k

  def add_keys(j: Any, slot: Any, carry: Any) -> Any:
    acc, top, total = carry
    logits = tile.times_transposed(query, keys.at[slot]) * tile.scale
    logits = tile.hide(logits, b, i, j, 0)
    before, top = top, jnp.maximum(top, logits.max(1))
    # Nothing seen yet: any finite shift makes exp(-inf - shift) 0, not NaN.
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(logits - column(shift, shape))
    keep = jnp.exp(before - shift)
    total = total * keep + weights.sum(1)
    acc = tile.add_product(
      acc * column(keep, acc.shape),
      weights.astype(values.dtype),
      values.at[slot],
    )
    return acc, top, total

  return over_keys(tile, at, copies, add_keys, start)


def query_kernel(tile: Tile, bounds: Any, *refs: Any) -> None:
  plan, tile = tile.plan, tile._replace(bounds=bounds)
  query_ref, key_ref, value_ref, bar_ref, lse_ref, delta_ref = refs[:6]
  out_ref, buffers, barriers = refs[6:]
  query, out_bar, lse, delta, keys, values = buffers
  once, (key_barriers, value_barriers) = barriers[:4], barriers[4:]
  b, n, i = ids()
  rows = pl.ds(i * np.int32(plan.block_q), plan.block_q)
  sources = (
    query_ref.at[b, rows, n], bar_ref.at[b, rows, n], lse_ref.at[b, n, rows],
    delta_ref.at[b, n, rows],
  )  # fmt: skip
  fetch_once(
    [
      (s, t, c.at[0])
      for s, t, c in zip(sources, buffers[:4], once, strict=True)
    ]
  )
  shape = plan.block_q, plan.block_k

  def add_keys(j: Any, slot: Any, acc: jax.Array) -> jax.Array:
    logits = tile.times_transposed(query, keys.at[slot]) * tile.scale
    logits = tile.hide(logits, b, i, j, 0)
    weights = jnp.exp(logits - column(lse[...], shape))
    bar = tile.times_transposed(out_bar, values.at[slot])
    bar = weights * (bar - column(delta[...], shape))
    return tile.add_product(acc, bar.astype(keys.dtype), keys.at[slot])

  copies = (
    (key_ref, keys, key_barriers),
    (value_ref, values, value_barriers),
  )
  start = jnp.zeros(query.shape, jnp.float32)
  acc = over_keys(tile, (b, n, i), copies, add_keys, start)
  query[...] = (acc * tile.scale).astype(query.dtype)
  store((query, out_ref.at[b, rows, n]))


def key_value_kernel(tile: Tile, bounds: Any, *refs: Any) -> None:
  plan, tile = tile.plan, tile._replace(bounds=bounds)
  query_ref, key_ref, value_ref, bar_ref, lse_ref, delta_ref = refs[:6]
  key_bar_ref, value_bar_ref, buffers, barriers = refs[6:]
  key, value, queries, out_bars, lses, deltas = buffers
  b, n, j = ids()
  columns = pl.ds(j * np.int32(plan.block_k), plan.block_k)
  fetch_once(
    [
      (key_ref.at[b, columns, n], key, barriers[0].at[0]),
      (value_ref.at[b, columns, n], value, barriers[1].at[0]),
    ]
  )
  shape = plan.block_k, plan.block_q

  def add_queries(i: Any, slot: Any, carry: Any) -> Any:
    key_bar, value_bar = carry
    query, out_bar = queries.at[slot], out_bars.at[slot]
    logits = tile.times_transposed(key, query) * tile.scale
    logits = tile.hide(logits, b, i, j, 1)
    weights = jnp.exp(logits - row(lses.at[slot][...], shape))
    value_bar = tile.add_product(
      value_bar, weights.astype(query.dtype), out_bar
    )
    bar = tile.times_transposed(value, out_bar)
    bar = weights * (bar - row(deltas.at[slot][...], shape))
    key_bar = tile.add_product(key_bar, bar.astype(query.dtype), query)
    return key_bar, value_bar

  sources = query_ref, bar_ref, lse_ref, delta_ref
  copies = list(zip(sources, buffers[2:], barriers[2:], strict=True))
  start = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
  key_bar, value_bar = over_queries(
    tile, (b, n, j), copies[:2], copies[2:], add_queries, start
  )
  key[...] = (key_bar * tile.scale).astype(key.dtype)
  value[...] = value_bar.astype(value.dtype)
  store(
    (key, key_bar_ref.at[b, columns, n]),
    (value, value_bar_ref.at[b, columns, n]),
  )
