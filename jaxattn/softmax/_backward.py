r"""Gradient of tiled exact attention, by recomputing the weights.

With :math:`p_{ij} = e^{s_{ij} - L_i}` and :math:`\delta_i = \bar o_i \cdot o_i
- \bar L_i`, the cotangent of a logit is :math:`p_{ij} (\bar o_i \cdot v_j -
\delta_i)`. One pass over the tiles feeds all gradients: those of keys and
values are carried along the queries, that of the queries is added in place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _compat
from jaxattn.numerics._dtypes import accumulator
from jaxattn.softmax import _call, _tiles


def backward(
  x: _call.Operands,
  out: jax.Array,
  lse: jax.Array,
  out_bar: jax.Array,
  lse_bar: jax.Array,
  *,
  spec: _call.Spec,
  cpu: bool,
) -> _call.Gradients:
  """Cotangents of the differentiable operands.

  Args:
    x: the operands.
    out: (B, T, K, G, Hv), from the forward pass.
    lse: (B, T, K, G), from the forward pass.
    out_bar: cotangent of ``out``.
    lse_bar: cotangent of ``lse``.
    spec: static facts.
    cpu: whether to plan for a CPU.

  Returns:
    Cotangents, each of its operand's dtype.
  """
  plan = _call.plan(x, spec, cpu=cpu, backward=True)
  dtype = accumulator(x.query.dtype)
  axes = _compat.varying_axes(x, out_bar, lse_bar)

  def step(group: _call.Group, total: _call.Gradients) -> _call.Gradients:
    def cut(y: jax.Array) -> jax.Array:
      return _call.cut(y, group.batch, group.head, plan)

    o_bar = cut(out_bar).astype(group.value.dtype)
    delta = (o_bar.astype(dtype) * cut(out).astype(dtype)).sum(-1)
    delta -= cut(lse_bar[..., None])[..., 0]
    shift = _shift(cut(lse[..., None])[..., 0])
    part = _group_backward(group, o_bar, shift, delta, total.bias, axes)
    return _call.Gradients(
      _call.put(total.query, part.query, group),
      _call.put(total.key, part.key[:, None], group),
      _call.put(total.value, part.value[:, None], group),
      part.bias,
    )

  def zeros(like: jax.Array) -> jax.Array:
    return _compat.full_varying(like.shape, 0, dtype, axes)

  start = _call.Gradients(
    zeros(x.query),
    zeros(x.key[:, :, :, None]),
    zeros(x.value[:, :, :, None]),
    None if x.bias is None else zeros(x.bias),
  )
  total = _call.over_groups(x, spec, plan, step, start, cpu=cpu)
  return _call.Gradients(
    total.query.astype(x.query.dtype),
    total.key[:, :, :, 0].astype(x.key.dtype),
    total.value[:, :, :, 0].astype(x.value.dtype),
    None if x.bias is None else total.bias.astype(x.bias.dtype),
  )


def _group_backward(
  group: _call.Group,
  out_bar: jax.Array,
  shift: jax.Array,
  delta: jax.Array,
  bias_bar: jax.Array | None,
  axes: frozenset[str],
) -> _call.Gradients:
  """Gradients (P, G, T, H), (P, S, H), (P, S, Hv), and of all the bias."""
  # Tiles of scores are (keys, queries) here: then no product contracts the
  # first axis of both factors, which would cost a transposed copy of a tile.
  spec, plan = group.spec, group.plan
  p, g, t, h = group.query.shape
  s, hv = plan.keys.size, group.value.shape[-1]
  dtype = shift.dtype
  full = functools.partial(_compat.full_varying, fill=0, dtype=dtype, axes=axes)
  key_t = jnp.swapaxes(group.key, 1, 2)

  def key_block(j: Any, carry: Any) -> Any:
    def query_block(i: Any, carry: Any, edge: bool) -> Any:
      query_bar, key_bar, value_bar, bias_bar = carry
      query, factor = _call.scaled_query(group, i)
      key, value = _call.key_value(group, i, j, edge)
      o_bar = _call.tile_rows(out_bar, i, plan)
      logits = _call.dot(key, query, spec, dtype)
      logits = _call.mask_logits(
        logits, factor, group, i, j, edge=edge, transposed=True
      )
      weights = jnp.exp(logits - _call.tile_rows(shift, i, plan)[:, None])
      value_bar += _call.matmul(weights.astype(o_bar.dtype), o_bar, spec, dtype)
      score_bar = _call.dot(value, o_bar, spec, dtype)
      score_bar -= _call.tile_rows(delta, i, plan)[:, None]
      score_bar *= weights
      if bias_bar is not None:
        bias_bar = _add_bias_bar(bias_bar, score_bar, group, i, j)
      score_bar = score_bar.astype(query.dtype)
      key_bar += _call.matmul(score_bar, query, spec, dtype) * factor
      columns = _key_columns(key_t, key, plan.keys, j, edge)
      part = _call.matmul(columns, score_bar, spec, dtype)
      query_bar = _add_query_bar(query_bar, part, plan, i)
      return query_bar, key_bar, value_bar, bias_bar

    query_bar, key_bar, value_bar, bias_bar = carry
    block = plan.keys.block
    start = query_bar, full((p, block, h)), full((p, block, hv)), bias_bar
    query_bar, key_part, value_part, bias_bar = _tiles.walk(
      _visit_queries(group, j), query_block, start
    )
    key_bar = _add_key_bar(key_bar, key_part, plan.keys, j)
    value_bar = _add_key_bar(value_bar, value_part, plan.keys, j)
    return query_bar, key_bar, value_bar, bias_bar

  start = full((p, h, g, t)), full((p, s, h)), full((p, s, hv)), bias_bar
  query_bar, key_bar, value_bar, bias_bar = _tiles.loop(
    0, plan.keys.num_blocks, key_block, start
  )
  query_bar = jnp.moveaxis(query_bar, 1, 3) * spec.scale
  return _call.Gradients(query_bar, key_bar, value_bar, bias_bar)


def _shift(lse: jax.Array) -> jax.Array:
  # A query that sees nothing has lse -inf; +inf makes its weights 0, not NaN.
  return jnp.where(jnp.isneginf(lse), jnp.inf, lse)


def _visit_queries(group: _call.Group, j: Any) -> _tiles.Visit:
  """Blocks of queries that see keys of block ``j``."""
  plan, band = group.plan, group.spec.band
  first = plan.keys.start(j) - _call.offset(group.call)
  last = first + plan.keys.block - 1
  visit = _tiles.visit(plan.queries, first, last, band.flip())
  if not plan.keys.ragged:
    return visit
  # The last block repeats keys of the one before it: mask all of it.
  repeats = j == plan.keys.num_blocks - 1
  inner_high = jnp.where(repeats, visit.inner_low, visit.inner_high)
  return visit._replace(inner_high=inner_high)


def _key_columns(
  key_t: jax.Array, key: jax.Array, axis: _tiles.Axis, j: Any, edge: bool
) -> jax.Array:
  """Block ``j`` of the keys as (P, H, block_k)."""
  if edge:  # hidden keys were zeroed: take those, not the stored ones
    return jnp.swapaxes(key, 1, 2)
  return lax.dynamic_slice_in_dim(key_t, axis.start(j), axis.block, 2)


def _add_query_bar(
  total: jax.Array, part: jax.Array, plan: _call.Plan, i: Any
) -> jax.Array:
  """Adds (P, H, rows) of block ``i`` to (P, H, G, T)."""
  part = part.reshape(*part.shape[:2], plan.query_heads, plan.queries.block)
  at = _tiles.at(0, 0, 0, plan.queries.start(i))
  part += lax.dynamic_slice(total, at, part.shape)
  return lax.dynamic_update_slice(total, part, at)


def _add_key_bar(
  total: jax.Array, part: jax.Array, axis: _tiles.Axis, j: Any
) -> jax.Array:
  """Adds (P, block_k, ...) of block ``j`` to (P, S, ...)."""
  start = axis.start(j)
  if axis.ragged:
    part += lax.dynamic_slice_in_dim(total, start, axis.block, 1)
  return lax.dynamic_update_slice_in_dim(total, part, start, 1)


def _add_bias_bar(
  total: jax.Array, score_bar: jax.Array, group: _call.Group, i: Any, j: Any
) -> jax.Array:
  """Adds one tile to the cotangent of the bias, summed where it broadcasts."""
  b, k, g, q, s = group.plan.tile
  part = jnp.moveaxis(score_bar.reshape(b, k, s, g, q), 2, 4)
  at, sizes = _call.tile_of(total, group, i, j)
  part = part.sum(_broadcast_axes(total), keepdims=True)
  part += lax.dynamic_slice(total, at, sizes)
  return lax.dynamic_update_slice(total, part, at)


def _broadcast_axes(bias: jax.Array) -> tuple[int, ...]:
  return tuple(axis for axis, size in enumerate(bias.shape) if size == 1)


def dense_backward(
  x: _call.Operands,
  out: jax.Array,
  lse: jax.Array,
  out_bar: jax.Array,
  lse_bar: jax.Array,
  *,
  spec: _call.Spec,
) -> _call.Gradients:
  """The formula of :func:`backward` on whole (T, S) arrays.

  Differentiable to any order; takes O(T S) memory. Arguments and result are
  those of :func:`backward`.
  """
  b, t, k, g, _ = x.query.shape
  s = x.key.shape[1]
  axes = _tiles.Axis(t, t), _tiles.Axis(s, s)
  plan = _call.Plan(b, k, (1, 1), g, *axes)
  group = _call.Group(x, spec, plan, 0, 0, x.query, x.key, x.value)
  dtype = accumulator(x.query.dtype)
  query, key, value, out, out_bar = (
    y.astype(dtype) for y in (x.query, x.key, x.value, out, out_bar)
  )
  einsum = functools.partial(jnp.einsum, precision=spec.precision)

  def rows(y: jax.Array) -> jax.Array:
    return jnp.einsum("btkg->bkgt", y)[..., None]

  logits = einsum("btkgh,bskh->bkgts", query, key)
  logits = _call.mask_logits(logits, spec.scale, group, 0, 0, edge=True)
  weights = jnp.exp(logits - rows(_shift(lse)))
  score_bar = einsum("btkgh,bskh->bkgts", out_bar, value)
  score_bar = weights * (score_bar - rows((out_bar * out).sum(-1) - lse_bar))
  bias_bar = None
  if x.bias is not None:
    bias_bar = score_bar.sum(_broadcast_axes(x.bias), keepdims=True)
    bias_bar = bias_bar.astype(x.bias.dtype)
  query_bar = einsum("bkgts,bskh->btkgh", score_bar, key) * spec.scale
  key_bar = einsum("bkgts,btkgh->bskh", score_bar, query) * spec.scale
  value_bar = einsum("bkgts,btkgh->bskh", weights, out_bar)
  return _call.Gradients(
    query_bar.astype(x.query.dtype),
    key_bar.astype(x.key.dtype),
    value_bar.astype(x.value.dtype),
    bias_bar,
  )
