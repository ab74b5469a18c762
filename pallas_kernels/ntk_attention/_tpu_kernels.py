"""NTK-Attention on a TPU: exact attention whose sums begin with the prefix.

Features lie as (rows, features), the state of a prefix as (Hv + 1, features):
its z, and its k in the last row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._compat import pl
from pallas_kernels._products import LAST
from pallas_kernels.flash_attention import _blocks
from pallas_kernels.flash_attention._tpu_kernels import Tile, add_keys


def forward_kernel(
  tile: Tile, inputs: Any, outputs: Any, scratch: Any, *, feature_steps: int
) -> None:
  """First all blocks of features, then all blocks of keys."""
  *flash_inputs, features_ref, state_ref = inputs
  acc_ref, top_ref, total_ref = scratch
  plan, start = tile.plan, np.int32(feature_steps)
  b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  key_step = lax.max(step - start, np.int32(0))

  @pl.when(step == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)
    total_ref[...] = jnp.zeros_like(total_ref)

  @pl.when(step < start)
  def _():
    sums = _read(tile, state_ref, features_ref)
    acc_ref[...] += sums[:-1]
    total_ref[...] += sums[-1:]

  @pl.when(step == start - 1)
  def _():
    # Relative to the largest of them, as one more part of an online softmax.
    acc, total = acc_ref[...], total_ref[...]
    size = jnp.maximum(jnp.abs(acc).max(0, keepdims=True), jnp.abs(total))
    none = size < jnp.finfo(size.dtype).tiny
    safe = jnp.where(none, jnp.ones_like(size), size)
    shrink = jnp.where(none, jnp.zeros_like(size), 1 / safe)
    acc_ref[...] = acc * shrink
    total_ref[...] = total * shrink
    top_ref[...] = jnp.where(none, -jnp.inf, jnp.log(safe))

  seen = _blocks.keys_seen(plan, tile.bounds, b, i)
  add = functools.partial(add_keys, tile, flash_inputs, scratch)
  holds = (step >= start) & seen.holds(key_step)
  tile.visit(b, i, seen.block(key_step, plan.num_k), holds, add)

  @pl.when(step == start + np.int32(plan.key_steps - 1))
  def _():
    out_ref, log_ref, sign_ref = outputs
    total = total_ref[...]
    none = total == 0
    size = jnp.where(none, jnp.ones_like(total), jnp.abs(total))
    sign = total / size
    out_ref[...] = (acc_ref[...] * sign / size).T.astype(out_ref.dtype)
    log = top_ref[...] + jnp.log(size)
    log_ref[...] = jnp.where(none, jnp.full_like(log, -jnp.inf), log)
    sign_ref[...] = sign


def _read(tile: Tile, state_ref: Any, features_ref: Any) -> jax.Array:
  """(Hv + 1, rows): what the prefix adds to (o, l) by these features."""
  if state_ref.shape[0] == 1:
    return tile.dot(state_ref[0], features_ref[...], LAST)
  size = tile.plan.block_q
  heads = (
    tile.dot(state_ref[g], features_ref[g * size : (g + 1) * size], LAST)
    for g in range(tile.plan.group)
  )
  return jnp.concatenate(list(heads), 1)
