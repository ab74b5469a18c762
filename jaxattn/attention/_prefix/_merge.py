"""A context and the state of a prefix: one sum, in one kernel or in two parts.

``in_two`` is exact attention to the context and a product of features with the
state, merged; JAX differentiates it. ``in_one`` is a kernel, or ``in_two``
where there is none, with the gradient that is common to both: that of exact
attention whose log-sum-exp is of all weights, see ``pallas_kernels``.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _compat
from jaxattn._dispatch import Branch, dispatch
from jaxattn.attention import _rows
from jaxattn.attention._prefix.exact import context_part
from jaxattn.features import FeatureMap, apply_feature_map
from jaxattn.numerics._dtypes import accumulator
from jaxattn.softmax import (
  BlockSizes,
  OnlineSoftmax,
  online_softmax_finalize,
  online_softmax_merge,
)
from jaxattn.softmax.exact import attention_gradients
from pallas_kernels.flash_attention import operands as flash_operands
from pallas_kernels.ntk_attention import Total, mosaic_gpu, mosaic_tpu
from pallas_kernels.ntk_attention.gradients import keys_share, prefix_share
from pallas_kernels.ntk_attention.operands import Operands, Options

# Query features of a tile: 16 MiB of float32.
_TILE_FEATURES = 1 << 22


class Call(NamedTuple):
  """Static facts of one call.

  Attributes:
    implementation: as asked for.
    scale: factor on the logits of the context; None = that of the prefix.
    is_causal: query t sees keys 0 to t of the context.
    block_sizes: of the context.
    precision: of the matrix products.
    on_mesh: whether operands lie on a mesh with explicit axes.
  """

  implementation: str | None
  scale: Any
  is_causal: bool
  block_sizes: BlockSizes | None
  precision: Any
  on_mesh: bool


class Context(NamedTuple):
  """What exact attention takes: (B, T, N, H), (B, S, K, H), (B, S, K, Hv)."""

  query: Any
  key: Any
  value: Any
  bias: Any
  mask: Any


class Prefix(NamedTuple):
  """What the prefix's sums are made of.

  Attributes:
    feature_map: of the call.
    query: (B, T, N, H), not scaled.
    z: (K|N, r, Hv), of the accumulator's dtype, as ``k``, ``scale``.
    k: (K|N, r).
    scale: () factor on the logits.
  """

  feature_map: FeatureMap
  query: Any
  z: Any
  k: Any
  scale: Any


def in_two(
  call: Call, context: Context | None, prefix: Prefix
) -> tuple[jax.Array, Total]:
  """Output (B, T, N, Hv) and the sum of all weights, from two parts."""
  dtype = accumulator(prefix.query.dtype)
  sums = _compat.over_explicit_axes(
    functools.partial(_prefix_sums, call.precision), prefix.query
  )
  acc, denom = sums(prefix)
  if context is None:
    merged = _scaled(acc, denom, None)
  else:
    query, key, value = (x.astype(dtype) for x in context[:3])
    part = context_part(
      query,
      key,
      value,
      context.bias,
      context.mask,
      scale=call.scale,
      is_causal=call.is_causal,
      block_sizes=call.block_sizes,
      implementation=call.implementation,
      precision=call.precision,
    )
    merged = online_softmax_merge(part, _scaled(acc, denom, part.max))
  none = merged.denom == 0
  out = online_softmax_finalize(merged)[0]
  out = jnp.where(none[..., None], 0, out).astype(prefix.query.dtype)
  log = merged.max + jnp.log(jnp.abs(jnp.where(none, 1, merged.denom)))
  log = jnp.where(none, -jnp.inf, log)
  return out, Total(log, jnp.sign(merged.denom))


def prefix_total(call: Call, prefix: Prefix) -> jax.Array:
  """(B, T, N) sum of the weights of the prefix."""
  no_values = prefix._replace(z=prefix.z[..., :0])
  sums = functools.partial(_prefix_sums, call.precision)
  return _compat.over_explicit_axes(sums, prefix.query)(no_values)[1]


def least(dtype: Any) -> float:
  """Logarithm of what counts as 0."""
  return math.log(jnp.finfo(dtype).tiny)


def _scaled(
  acc: jax.Array, denom: jax.Array, other: jax.Array | None
) -> OnlineSoftmax:
  """Sums over the prefix as a part that no other one exceeds.

  Relative to the size of the sums rather than to 1: a state whose features
  vanish must not hide a context with very negative logits.
  """
  size = jnp.maximum(jnp.abs(denom), jnp.abs(acc).max(-1))
  peak = jnp.log(lax.stop_gradient(size))
  if other is not None:
    peak = jnp.maximum(peak, lax.stop_gradient(other))
  # What is smaller than this is 0, and has no gradient.
  bottom = least(denom.dtype)
  weight = jnp.where(peak < bottom, 0, jnp.exp(-jnp.maximum(peak, bottom)))
  return OnlineSoftmax(acc * weight[..., None], denom * weight, peak)


def _prefix_sums(
  precision: lax.PrecisionLike, x: Prefix
) -> tuple[jax.Array, jax.Array]:
  """(B, T, N, Hv) and (B, T, N): features of queries times z and k."""
  query = x.query.astype(accumulator(x.query.dtype))
  b, t, n, h = query.shape
  moments = jnp.concatenate((x.z, x.k[..., None]), -1)
  heads = len(moments)

  def one_tile(query: jax.Array) -> jax.Array:
    phi = apply_feature_map(x.feature_map, query, scale=x.scale)
    return jnp.einsum("bkgtr,krv->bkgtv", phi, moments, precision=precision)

  query = jnp.moveaxis(query.reshape(b, t, heads, n // heads, h), 1, 3)
  rows = b * n * moments.shape[1]
  num_tiles = _rows.count_tiles(t, _TILE_FEATURES // rows)
  if num_tiles == 1:
    sums = one_tile(query)
  else:
    # Features of a tile are computed again for the gradient, not kept.
    tiles = _rows.tile(query, num_tiles)
    sums = _rows.untile(lax.map(jax.checkpoint(one_tile), tiles), t)
  sums = _rows.from_rows(sums)
  return sums[..., :-1], sums[..., -1]


def _forward_pass(
  call: Call, context: Context, prefix: Prefix
) -> tuple[jax.Array, Total]:
  options = Options(
    call.scale, call.is_causal, call.block_sizes, precision=call.precision
  )

  def kernel(**kwargs: Any) -> Any:
    def run(context: Context, prefix: Prefix) -> Any:
      x = _kernel_operands(context, prefix)
      return mosaic_tpu.forward(x, options, **kwargs)

    return run

  def gpu_kernel(context: Context, prefix: Prefix) -> Any:
    # It begins with the sums: features need not be kept.
    sums = _prefix_sums(call.precision, prefix)
    x = flash_operands.Operands(context.query, context.key, context.value)
    return mosaic_gpu.forward_from(x, options, *sums)

  x = jax.eval_shape(_kernel_operands, context, prefix)
  reasons = [y.supports(x, options) for y in (mosaic_tpu, mosaic_gpu)]
  if call.on_mesh:
    mesh = "a mesh with explicit axes needs jax.shard_map around the call"
    reasons = [mesh, mesh]
  two = functools.partial(in_two, call._replace(implementation="xla"))
  branches = {
    "xla": Branch(two),
    "pallas": (
      Branch(kernel(), "tpu", reasons[0]),
      Branch(gpu_kernel, "cuda", reasons[1]),
    ),
    "pallas_interpret": Branch(kernel(interpret=True)),
  }
  return dispatch(call.implementation, branches, context, prefix)


def _kernel_operands(context: Context, prefix: Prefix) -> Operands:
  query = prefix.query.astype(prefix.z.dtype)
  features = apply_feature_map(prefix.feature_map, query, scale=prefix.scale)
  return Operands(
    context.query,
    context.key,
    context.value,
    features,
    prefix.z,
    prefix.k,
    bias=context.bias,
    mask=context.mask,
  )


in_one: Any = jax.custom_vjp(_forward_pass, nondiff_argnums=(0,))


def _in_one_fwd(call: Call, context: Context, prefix: Prefix) -> Any:
  out, total = in_one(call, context, prefix)
  return (out, total), (context, prefix, out, total)


def _in_one_bwd(call: Call, residuals: Any, bars: Any) -> Any:
  context, prefix, out, total = residuals
  gradients = attention_gradients(
    call.implementation,
    context.query,
    context.key,
    context.value,
    context.bias,
    context.mask,
    out,
    total.log,
    *keys_share(total, *bars),
    scale=call.scale,
    is_causal=call.is_causal,
    block_sizes=call.block_sizes,
    precision=call.precision,
  )
  # Features are computed again, a tile at a time.
  sums = functools.partial(_prefix_sums, call.precision)
  _, vjp = jax.vjp(sums, prefix)
  (prefix_bar,) = vjp(prefix_share(out, total, *bars))
  context_bar = Context(*gradients, mask=None)
  return _sum_like(context_bar, context), _sum_like(prefix_bar, prefix)


in_one.defvjp(_in_one_fwd, _in_one_bwd)


def _sum_like(bars: Any, primals: Any) -> Any:
  """Cotangents as ``shard_map`` wants them; None for what has none."""

  def one(primal: Any, bar: Any) -> Any:
    if bar is None or bar.dtype == jax.dtypes.float0:
      return None
    return _compat.sum_like(bar, primal)

  return jax.tree.map(one, primals, bars, is_leaf=lambda x: x is None)
