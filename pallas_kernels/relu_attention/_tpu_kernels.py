"""ReLU attention on a TPU: what is done with one tile.

Scores are (keys, rows), as those of exact attention.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import pl
from pallas_kernels._products import FIRST, LAST, MIDDLE
from pallas_kernels.flash_attention import _blocks
from pallas_kernels.flash_attention._tpu_kernels import Tile
from pallas_kernels.relu_attention._norms import reciprocal


def forward_kernel(
  tile: Tile, inputs: Any, outputs: Any, scratch: Any, *, alpha: int
) -> None:
  query_ref, key_ref, value_ref, scale_ref, threshold_ref = inputs
  out_ref, norm_ref = outputs
  acc_ref, top_ref, total_ref = scratch
  b, i, j, step, holds = _key_step(tile)

  @pl.when(step == 0)
  def _():
    for ref in scratch:
      ref[...] = jnp.zeros_like(ref)

  def add_keys(edge: Any) -> None:
    key, value = tile.keys(key_ref, edge), tile.keys(value_ref, edge)
    scores = tile.dot(key, query_ref[...], LAST)
    excess = tile.hide(scores * scale_ref[...] - threshold_ref[...], edge)
    before = top_ref[...]
    top = jnp.maximum(before, excess.max(0, keepdims=True))
    factor, keep = reciprocal(top), reciprocal(top, before)
    keep = lax.integer_pow(keep, alpha)
    passing = jnp.maximum(excess, jnp.zeros_like(excess)) * factor
    weights = lax.integer_pow(passing, alpha)
    top_ref[...] = top
    total_ref[...] = keep * total_ref[...] + weights.sum(0, keepdims=True)
    acc_ref[...] = keep * acc_ref[...] + _dot(tile, value, weights, FIRST)

  tile.visit(b, i, j, holds, add_keys)

  @pl.when(step == tile.plan.key_steps - 1)
  def _():
    total = total_ref[...]
    none = total == 0
    safe = jnp.where(none, jnp.ones_like(total), total)
    out_ref[...] = (acc_ref[...] / safe).T.astype(out_ref.dtype)
    root = safe if alpha == 1 else jnp.exp(jnp.log(safe) / alpha)
    norm = root / reciprocal(top_ref[...])
    norm_ref[...] = jnp.where(none, jnp.zeros_like(norm), norm)


def query_kernel(
  tile: Tile, inputs: Any, outputs: Any, scratch: Any, *, alpha: int
) -> None:
  """Of queries; and of the threshold and the scale, a number a query."""
  scale, inverse = inputs[4], inputs[6]
  bar_ref, threshold_bar_ref, scale_bar_ref = outputs
  acc_ref, sum_ref, product_ref = scratch
  b, i, j, step, holds = _key_step(tile)

  @pl.when(step == 0)
  def _():
    for ref in scratch:
      ref[...] = jnp.zeros_like(ref)

  def add_keys(edge: Any) -> None:
    _, bar, scores, _, key, _ = _weights_and_bar(tile, inputs, edge, alpha)
    acc_ref[...] += _dot(tile, key, bar, FIRST)
    sum_ref[...] += bar.sum(0, keepdims=True)
    product_ref[...] += (bar * scores).sum(0, keepdims=True)

  tile.visit(b, i, j, holds, add_keys)

  @pl.when(step == tile.plan.key_steps - 1)
  def _():
    slope = inverse[...] * alpha
    bar = acc_ref[...] * (slope * scale[...])
    bar_ref[...] = bar.T.astype(bar_ref.dtype)
    threshold_bar_ref[...] = -slope * sum_ref[...]
    scale_bar_ref[...] = slope * product_ref[...]


def key_value_kernel(
  tile: Tile, inputs: Any, outputs: Any, scratch: Any, *, alpha: int
) -> None:
  plan, scale, inverse = tile.plan, inputs[4], inputs[6]
  b, j, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  seen = _blocks.queries_seeing(plan, tile.bounds, b, j)
  key_bar_ref, value_bar_ref = scratch

  @pl.when(step == 0)
  def _():
    for ref in scratch:
      ref[...] = jnp.zeros_like(ref)

  def add_queries(edge: Any) -> None:
    weights, bar, _, query, _, out_bar = _weights_and_bar(
      tile, inputs, edge, alpha
    )
    bar *= inverse[...] * scale[...] * alpha
    value_bar_ref[...] += _dot(tile, out_bar, weights, MIDDLE, flip=True)
    key_bar_ref[...] += _dot(tile, query, bar, MIDDLE, flip=True)

  i = seen.block(step, plan.num_q)
  tile.visit(b, i, j, seen.holds(step), add_queries)

  @pl.when(step == plan.query_steps - 1)
  def _():
    for ref, acc_ref in zip(outputs, scratch):
      ref[...] = acc_ref[...].astype(ref.dtype)


def _key_step(tile: Tile) -> tuple[Any, ...]:
  """(b, i, j, step, whether there is work), one block of queries at a time."""
  b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  seen = _blocks.keys_seen(tile.plan, tile.bounds, b, i)
  return b, i, seen.block(step, tile.plan.num_k), step, seen.holds(step)


def _weights_and_bar(tile: Tile, refs: Any, edge: Any, alpha: int) -> Any:
  """Weights; cotangents of the scores, but for factors of a row; and inputs."""
  query_ref, key_ref, value_ref, bar_ref, *lanes = refs
  scale, threshold, inverse, delta = (ref[...] for ref in lanes)
  query, out_bar = query_ref[...], bar_ref[...]
  key, value = tile.keys(key_ref, edge), tile.keys(value_ref, edge)
  scores = tile.dot(key, query, LAST)
  excess = tile.hide(scores * scale - threshold, edge)
  none, passes = jnp.zeros_like(excess), excess > 0
  # Not by a selection: NaN must not get lost.
  passing = jnp.maximum(excess, none) * inverse
  slope = jnp.where(passes, lax.integer_pow(passing, alpha - 1), none)
  bar = slope * (tile.dot(value, out_bar, LAST) - delta)
  return slope * passing, bar, scores, query, key, out_bar


def _dot(
  tile: Tile,
  x: jax.Array,
  wide: jax.Array,
  contract: Any,
  *,
  flip: bool = False,
) -> jax.Array:
  """A product with what was computed: bfloat16 is multiplied as such."""
  if x.dtype == jnp.bfloat16:
    wide = wide.astype(x.dtype)
  x = x.astype(wide.dtype)
  return tile.dot(*((wide, x) if flip else (x, wide)), contract)
