"""Exact attention on a TPU: what is done with one tile.

Scores are (keys, rows), see ``_tpu_arrays``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._compat import pl
from pallas_kernels._products import FIRST, LAST, MIDDLE, dot, precision_of
from pallas_kernels.flash_attention import _blocks
from pallas_kernels.flash_attention._blocks import Plan
from pallas_kernels.flash_attention.operands import (
  Options,
)


class Tile:
  """Inside a kernel: the tile at (b, i, j), and what hides its scores."""

  def __init__(self, plan: Plan, options: Options, bounds: Any, extras: Any):
    self.plan, self.bounds, self.extras = plan, bounds, extras
    self.scale, self.precision = options.scale, precision_of(options.precision)

  def dot(self, a: jax.Array, b: jax.Array, contract: Any) -> jax.Array:
    """A product of matrices, in the accumulator's dtype."""
    return dot(a, b, contract, self.precision)

  def visit(self, b: Any, i: Any, j: Any, holds: Any, body: Any) -> None:
    """Runs ``body(edge)`` if the tile holds work; masks only where needed."""
    if not self.plan.edges:
      pl.when(holds)(lambda: body(None))
      return
    edge = _blocks.is_edge(self.plan, self.bounds, b, i, j)
    pl.when(holds & edge)(lambda: body((b, i, j)))
    pl.when(holds & jnp.logical_not(edge))(lambda: body(None))

  def keys(self, ref: Any, edge: Any) -> jax.Array:
    """(block_k, H); 0 where no query of the tile sees it: 0 * NaN is NaN."""
    if edge is None:
      return ref[...]
    b, i, j = edge
    first = i * np.int32(self.plan.block_q)
    last = first + np.int32(self.plan.block_q - 1)
    seen = self._band(b, first, last, self._key_at(j))
    return jnp.where(seen, ref[...], jnp.zeros_like(ref[...]))

  def logits(self, query: jax.Array, key: jax.Array, edge: Any) -> jax.Array:
    """(block_k, rows), -inf where hidden."""
    logits = self.dot(key, query, LAST) * self.scale
    if "bias" in self.extras:
      logits += self._expand(self.extras["bias"][...].astype(logits.dtype))
    return self.hide(logits, edge)

  def hide(self, logits: jax.Array, edge: Any) -> jax.Array:
    """(block_k, rows), -inf where hidden."""
    plan, extras = self.plan, self.extras
    seen = []
    if edge is not None:
      b, i, j = edge
      at = i * np.int32(plan.block_q) + lax.broadcasted_iota(
        jnp.int32, (1, plan.block_q), 1
      )
      at = jnp.concatenate([at] * plan.group, 1)
      seen.append(self._band(b, at, at, self._key_at(j)))
      seen.append(at < self.bounds[1, b])
    if "mask" in extras:
      seen.append(self._expand(extras["mask"][...].astype(jnp.int32)) != 0)
    if "key_segments" in extras:
      one, other = extras["key_segments"][...], extras["query_segments"][...]
      seen.append(one == other)
    for part in seen:
      logits = jnp.where(part, logits, -jnp.inf)
    return logits

  def weights_and_bar(self, refs: Any, edge: Any) -> Any:
    """Weights p, cotangents of the logits; and query, key, out_bar, typed."""
    query_ref, key_ref, value_ref, bar_ref, lse_ref, delta_ref = refs
    query, out_bar = query_ref[...], bar_ref[...]
    key, value = self.keys(key_ref, edge), self.keys(value_ref, edge)
    logits = self.logits(query, key, edge)
    weights = jnp.exp(logits - lse_ref[...])
    bar = weights * (self.dot(value, out_bar, LAST) - delta_ref[...])
    return weights, bar, query, key, out_bar

  def _key_at(self, j: Any) -> jax.Array:
    block = self.plan.block_k
    at = lax.broadcasted_iota(jnp.int32, (block, 1), 0)
    return at + j * np.int32(block)

  def _band(self, b: Any, first: Any, last: Any, key_at: jax.Array) -> Any:
    """Whether queries between ``first`` and ``last`` see these keys."""
    plan, offset = self.plan, self.bounds[0, b]
    seen = key_at < self.bounds[2, b]
    if plan.before is not None:
      seen &= key_at >= first + (offset - np.int32(plan.before))
    if plan.after is not None:
      seen &= key_at <= last + (offset + np.int32(plan.after))
    return seen

  def _expand(self, x: jax.Array) -> jax.Array:
    """(G|1, block_k|1, block_q|1) -> (block_k, rows), or what broadcasts."""
    plan = self.plan
    if x.shape[2] == 1 and x.shape[0] == 1:
      return x[0]
    tile = x.shape[1], plan.block_q
    heads = (x[g if x.shape[0] > 1 else 0] for g in range(plan.group))
    return jnp.concatenate([jnp.broadcast_to(y, tile) for y in heads], 1)

  def collapse(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(block_k, rows) -> (G|1, block_k|1, block_q|1), summed; the transpose."""
    size = self.plan.block_q
    heads = [x[:, g * size : (g + 1) * size] for g in range(self.plan.group)]
    if shape[0] == 1:
      heads = [functools.reduce(jnp.add, heads)]
    for axis in (0, 1):
      if shape[1 + axis] == 1:
        heads = [y.sum(axis, keepdims=True) for y in heads]
    return jnp.stack(heads)


def with_names(
  kernel: Any,
  plan: Plan,
  options: Options,
  names: tuple[str, ...],
  num_inputs: int,
  num_outputs: int,
  bounds: Any,
  *refs: Any,
) -> None:
  """Hands a kernel its tile, inputs, outputs and scratch, each by itself."""
  inputs, rest = refs[:num_inputs], refs[num_inputs:]
  extras = dict(zip(names, rest[: len(names)], strict=True))
  rest = rest[len(names) :]
  tile = Tile(plan, options, bounds, extras)
  kernel(tile, inputs, rest[:num_outputs], rest[num_outputs:])


def _key_step(tile: Tile) -> tuple[Any, ...]:
  """(b, i, j, step, whether there is work) of ``by_queries``."""
  b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  seen = _blocks.keys_seen(tile.plan, tile.bounds, b, i)
  return b, i, seen.block(step, tile.plan.num_k), step, seen.holds(step)


def forward_kernel(tile: Tile, inputs: Any, outputs: Any, scratch: Any) -> None:
  out_ref, lse_ref = outputs
  acc_ref, top_ref, total_ref = scratch
  b, i, j, step, holds = _key_step(tile)

  @pl.when(step == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)
    top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)

  add = functools.partial(add_keys, tile, inputs, scratch)
  tile.visit(b, i, j, holds, add)

  @pl.when(step == tile.plan.key_steps - 1)
  def _():
    total = total_ref[...]
    none = total == 0
    safe = jnp.where(none, jnp.ones_like(total), total)
    out_ref[...] = (acc_ref[...] / safe).T.astype(out_ref.dtype)
    lse = top_ref[...] + jnp.log(safe)
    lse_ref[...] = jnp.where(none, jnp.full_like(lse, -jnp.inf), lse)


def add_keys(tile: Tile, inputs: Any, scratch: Any, edge: Any) -> None:
  """Adds a tile to (o, m, l), of which o and l are relative to exp(m)."""
  query_ref, key_ref, value_ref = inputs
  acc_ref, top_ref, total_ref = scratch
  key, value = tile.keys(key_ref, edge), tile.keys(value_ref, edge)
  logits = tile.logits(query_ref[...], key, edge)
  before = top_ref[...]
  top = jnp.maximum(before, logits.max(0, keepdims=True))
  # Nothing seen yet: any finite shift makes exp(-inf - shift) 0, not NaN.
  shift = jnp.where(top == -jnp.inf, jnp.zeros_like(top), top)
  weights, keep = jnp.exp(logits - shift), jnp.exp(before - shift)
  top_ref[...] = top
  total_ref[...] = keep * total_ref[...] + weights.sum(0, keepdims=True)
  part = tile.dot(value, weights.astype(value.dtype), FIRST)
  acc_ref[...] = keep * acc_ref[...] + part


def query_kernel(tile: Tile, inputs: Any, outputs: Any, scratch: Any) -> None:
  (bar_ref,), (acc_ref,) = outputs, scratch
  b, i, j, step, holds = _key_step(tile)

  @pl.when(step == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  def add_keys(edge: Any) -> None:
    _, bar, _, key, _ = tile.weights_and_bar(inputs, edge)
    acc_ref[...] += tile.dot(key, bar.astype(key.dtype), FIRST)

  tile.visit(b, i, j, holds, add_keys)

  @pl.when(step == tile.plan.key_steps - 1)
  def _():
    bar_ref[...] = (acc_ref[...] * tile.scale).T.astype(bar_ref.dtype)


def key_value_kernel(
  tile: Tile, inputs: Any, outputs: Any, scratch: Any
) -> None:
  plan = tile.plan
  b, j, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  seen = _blocks.queries_seeing(plan, tile.bounds, b, j)
  key_bar_ref, value_bar_ref = scratch

  @pl.when(step == 0)
  def _():
    for ref in scratch:
      ref[...] = jnp.zeros_like(ref)

  def add_queries(edge: Any) -> None:
    weights, bar, query, _, out_bar = tile.weights_and_bar(inputs, edge)
    weights, bar = weights.astype(query.dtype), bar.astype(query.dtype)
    value_bar_ref[...] += tile.dot(weights, out_bar, MIDDLE)
    key_bar_ref[...] += tile.dot(bar, query, MIDDLE)

  i = seen.block(step, plan.num_q)
  tile.visit(b, i, j, seen.holds(step), add_queries)

  @pl.when(step == plan.query_steps - 1)
  def _():
    for ref, acc_ref, scale in zip(outputs, scratch, (tile.scale, 1.0)):
      ref[...] = (acc_ref[...] * scale).astype(ref.dtype)


def bias_kernel(
  tile: Tile, inputs: Any, outputs: Any, scratch: Any, ids: Any, inner: Any
) -> None:
  del scratch
  (bar_ref,) = outputs
  places = [pl.program_id(axis) for axis in range(4)]
  b, _, i, j = ids(*places)
  first = functools.reduce(
    jnp.logical_and, [places[axis] == 0 for axis in inner], jnp.bool_(True)
  )

  @pl.when(first)
  def _():
    bar_ref[...] = jnp.zeros_like(bar_ref)

  def add_tile(edge: Any) -> None:
    _, bar, *_ = tile.weights_and_bar(inputs, edge)
    bar_ref[...] += tile.collapse(bar, bar_ref.shape)

  seen = _blocks.keys_seen(tile.plan, tile.bounds, b, i)
  holds = (j >= seen.low) & (j < seen.high)
  tile.visit(b, i, j, holds, add_tile)
