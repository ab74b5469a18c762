"""ReLU attention on a GPU: what one warp group does with one block.

Blocks pass by as those of exact attention.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._compat import pl
from pallas_kernels.flash_attention._gpu_kernels import (
  Tile,
  column,
  fetch_once,
  ids,
  over_keys,
  over_queries,
  row,
  store,
)
from pallas_kernels.relu_attention._norms import reciprocal


def forward_kernel(tile: Tile, bounds: Any, *refs: Any, alpha: int) -> None:
  plan, tile = tile.plan, tile._replace(bounds=bounds)
  query_ref, key_ref, value_ref, threshold_ref, scale_ref = refs[:5]
  out_ref, norm_ref, buffers, barriers = refs[5:]
  query, threshold, keys, values, out, norm = buffers
  b, n, i = at = ids()
  rows = pl.ds(i * np.int32(plan.block_q), plan.block_q)
  sources = query_ref.at[b, rows, n], threshold_ref.at[b, n, rows]
  _fetch_all(sources, buffers[:2], barriers[:2])
  scale, shape, wide = scale_ref[b], (plan.block_q, plan.block_k), out.shape

  def add_keys(j: Any, slot: Any, carry: Any) -> Any:
    acc, before, total = carry
    scores = tile.times_transposed(query, keys.at[slot])
    excess = scores * scale - column(threshold[...], shape)
    excess = tile.hide(excess, b, i, j, 0)
    top = jnp.maximum(before, excess.max(1))
    keep = _power(reciprocal(top, before), alpha)
    passing = jnp.maximum(excess, 0.0) * column(reciprocal(top), shape)
    weights = _power(passing, alpha)
    total = total * keep + weights.sum(1)
    acc = tile.add_product(
      acc * column(keep, wide), weights.astype(values.dtype), values.at[slot]
    )
    return acc, top, total

  zeros = jnp.zeros((plan.block_q,), jnp.float32)
  start = jnp.zeros(wide, jnp.float32), zeros, zeros
  copies = (key_ref, keys, barriers[2]), (value_ref, values, barriers[3])
  acc, top, total = over_keys(tile, at, copies, add_keys, start)
  none = total == 0
  safe = jnp.where(none, 1.0, total)
  out[...] = (acc / column(safe, wide)).astype(out.dtype)
  root = safe if alpha == 1 else jnp.exp(jnp.log(safe) / alpha)
  norm[...] = jnp.where(none, 0.0, root / reciprocal(top))
  store((out, out_ref.at[b, rows, n]), (norm, norm_ref.at[b, n, rows]))


def query_kernel(tile: Tile, bounds: Any, *refs: Any, alpha: int) -> None:
  """Of queries; and of the excesses, added up alone and times the scores."""
  plan, tile = tile.plan, tile._replace(bounds=bounds)
  query_ref, key_ref, value_ref, bar_ref, *lane_refs, scale_ref = refs[:8]
  *out_refs, buffers, barriers = refs[8:]
  query, out_bar, threshold, inverse, delta, keys, values, *sums = buffers
  b, n, i = at = ids()
  rows = pl.ds(i * np.int32(plan.block_q), plan.block_q)
  _fetch_all(
    [ref.at[b, rows, n] for ref in (query_ref, bar_ref)]
    + [ref.at[b, n, rows] for ref in lane_refs],
    buffers[:5],
    barriers[:5],
  )
  scale, shape, wide = scale_ref[b], (plan.block_q, plan.block_k), query.shape

  def add_keys(j: Any, slot: Any, carry: Any) -> Any:
    acc, total, product = carry
    scores = tile.times_transposed(query, keys.at[slot])
    excess = scores * scale - column(threshold[...], shape)
    excess = tile.hide(excess, b, i, j, 0)
    _, slope = _weights(excess, column(inverse[...], shape), alpha)
    bar = tile.times_transposed(out_bar, values.at[slot])
    bar = slope * (bar - column(delta[...], shape))
    total, product = total + bar.sum(1), product + (bar * scores).sum(1)
    acc = tile.add_product(acc, bar.astype(keys.dtype), keys.at[slot])
    return acc, total, product

  zeros = jnp.zeros((plan.block_q,), jnp.float32)
  start = jnp.zeros(wide, jnp.float32), zeros, zeros
  copies = (key_ref, keys, barriers[5]), (value_ref, values, barriers[6])
  acc, *totals = over_keys(tile, at, copies, add_keys, start)
  factor = inverse[...] * alpha
  query[...] = (acc * column(factor * scale, wide)).astype(query.dtype)
  for ref, total in zip(sums, totals, strict=True):
    ref[...] = factor * total
  store(
    (query, out_refs[0].at[b, rows, n]),
    *((y, ref.at[b, n, rows]) for y, ref in zip(sums, out_refs[1:])),
  )


def key_value_kernel(tile: Tile, bounds: Any, *refs: Any, alpha: int) -> None:
  plan, tile = tile.plan, tile._replace(bounds=bounds)
  query_ref, key_ref, value_ref, bar_ref, *lane_refs, scale_ref = refs[:8]
  key_bar_ref, value_bar_ref, buffers, barriers = refs[8:]
  key, value, queries, out_bars, thresholds, inverses, deltas = buffers
  b, n, j = at = ids()
  columns = pl.ds(j * np.int32(plan.block_k), plan.block_k)
  sources = [ref.at[b, columns, n] for ref in (key_ref, value_ref)]
  _fetch_all(sources, buffers[:2], barriers[:2])
  scale, shape = scale_ref[b], (plan.block_k, plan.block_q)

  def add_queries(i: Any, slot: Any, carry: Any) -> Any:
    key_bar, value_bar = carry
    query, out_bar = queries.at[slot], out_bars.at[slot]
    # Numbers of queries are read where they are used: registers are few.
    excess = tile.times_transposed(key, query) * scale
    excess -= row(thresholds.at[slot][...], shape)
    excess = tile.hide(excess, b, i, j, 1)
    inverse = row(inverses.at[slot][...], shape)
    weights, slope = _weights(excess, inverse, alpha)
    slope *= inverse
    value_bar = tile.add_product(
      value_bar, weights.astype(query.dtype), out_bar
    )
    bar = tile.times_transposed(value, out_bar)
    bar = slope * (bar - row(deltas.at[slot][...], shape))
    key_bar = tile.add_product(key_bar, bar.astype(query.dtype), query)
    return key_bar, value_bar

  sources = query_ref, bar_ref, *lane_refs
  copies = list(zip(sources, buffers[2:], barriers[2:], strict=True))
  start = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
  key_bar, value_bar = over_queries(
    tile, at, copies[:2], copies[2:], add_queries, start
  )
  key[...] = (key_bar * (scale * alpha)).astype(key.dtype)
  value[...] = value_bar.astype(value.dtype)
  store(
    (key, key_bar_ref.at[b, columns, n]),
    (value, value_bar_ref.at[b, columns, n]),
  )


def _fetch_all(sources: Any, buffers: Any, barriers: Any) -> None:
  each = zip(sources, buffers, barriers, strict=True)
  fetch_once([(source, to, barrier.at[0]) for source, to, barrier in each])


def _weights(
  excess: jax.Array, inverse: jax.Array, alpha: int
) -> tuple[jax.Array, jax.Array]:
  """Of excesses over a norm; and their derivatives, over alpha."""
  # Not by a selection: NaN must not get lost.
  passing = jnp.maximum(excess, 0.0) * inverse
  slope = jnp.where(passing > 0, _power(passing, alpha - 1), 0.0)
  return slope * passing, slope


def _power(x: jax.Array, exponent: int) -> jax.Array:
  """``x ** exponent``; Mosaic has none below 2."""
  if exponent > 1:
    return lax.integer_pow(x, exponent)
  return x if exponent else jnp.ones_like(x)
