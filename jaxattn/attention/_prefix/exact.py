r"""Exact attention to a prefix and a context: two softmaxes, merged.

With output :math:`o_1` and log-sum-exp :math:`l_1` of the context and
:math:`o_2, l_2` of the prefix, attention to both is :math:`(e^{l_1} o_1 +
e^{l_2} o_2) / (e^{l_1} + e^{l_2})`: neither keys nor values are put together.
A bias on all logits of the prefix is a shift of :math:`l_2`. Source: arXiv
2101.00190 for prefixes, arXiv 1805.02867 for the merge.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks, _compat
from jaxattn.attention import _rows
from jaxattn.numerics._dtypes import accumulator
from jaxattn.softmax import (
  BlockSizes,
  OnlineSoftmax,
  online_softmax_finalize,
  online_softmax_merge,
  softmax_attention,
)


def prefix_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  prefix_key: jax.Array,
  prefix_value: jax.Array,
  *,
  prefix_bias: float | jax.Array = 0.0,
  count_normalized: bool = False,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  mask: jax.Array | None = None,
  implementation: str | None = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  r"""Exact attention to a prefix and to a context, concatenating nothing.

  The softmax runs over prefix and context together. A causal mask and ``mask``
  are about the context alone: every query sees all of the prefix, also one
  that sees no context.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    key: (B, S, K, H), the context. K divides N.
    value: (B, S, K, Hv).
    prefix_key: (m, K, H), shared by the batch. Any floating dtype.
    prefix_value: (m, K, Hv).
    prefix_bias: added to the logits of the prefix.
    count_normalized: also subtract log m from them, so that the weight of the
      prefix does not grow with its length.
    scale: factor on the logits; None = 1 / sqrt(H). May be traced.
    is_causal: query t sees context keys 0 to t.
    mask: boolean, broadcastable to (B, N, T, S); True = attend.
    implementation: None or "xla".
    precision: of the matrix products.

  Returns:
    (B, T, N, Hv) of the dtype of ``query``.

  Raises:
    ValueError: if shapes, dtypes or options do not fit.

  Cost:
    2 T (S + m) (H + Hv) flops a head, and O(T + S + m) memory beside a tile.

  Source:
    arXiv 2101.00190; ``count_normalized`` is this project's.

  Example:
    >>> import jax
    >>> from jaxattn.softmax import prefix_init
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 4, 16))
    >>> prefix = prefix_init(jax.random.key(1), 64, 4, 16)
    >>> prefix_attention(q, k, v, *prefix, is_causal=True).shape
    (1, 128, 4, 16)
  """
  query, key, value = map(jnp.asarray, (query, key, value))
  prefix_key, prefix_value = jnp.asarray(prefix_key), jnp.asarray(prefix_value)
  mask = None if mask is None else jnp.asarray(mask)
  sizes = _checks.check_attention(query, key, value, mask=mask)
  _rows.check_options(scale, is_causal, None)
  _checks.check_choice("implementation", implementation, (None, "xla"))
  _check_prefix(prefix_key, prefix_value, sizes)
  _checks.check_scalar("prefix_bias", prefix_bias)
  _checks.check_range(
    "prefix_bias", prefix_bias, -jnp.inf, jnp.inf, closed=False
  )
  _checks.check_choice("count_normalized", count_normalized, (False, True))
  out = _prefix_attention(
    *map(_checks.four_dims, (query, key, value, mask)),
    prefix_key,
    prefix_value,
    prefix_bias,
    scale,
    count_normalized=count_normalized,
    is_causal=is_causal,
    implementation=implementation,
    precision=precision,
  )
  return out if sizes.batch else out[0]


@functools.partial(
  jax.jit,
  static_argnames=(
    "count_normalized",
    "is_causal",
    "implementation",
    "precision",
  ),
)
def _prefix_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None,
  prefix_key: jax.Array,
  prefix_value: jax.Array,
  prefix_bias: Any,
  scale: Any,
  *,
  count_normalized: bool,
  is_causal: bool,
  implementation: str | None,
  precision: lax.PrecisionLike,
) -> jax.Array:
  dtype = accumulator(query.dtype)
  # Both parts are rounded to the dtype of their query: they are merged before
  # that happens.
  inputs = (x.astype(dtype) for x in (query, key, value))
  wide, key, value = inputs
  context = context_part(
    wide,
    key,
    value,
    None,
    mask,
    scale=scale,
    is_causal=is_causal,
    implementation=implementation,
    precision=precision,
  )
  attend = functools.partial(
    _fold_batch, implementation=implementation, precision=precision
  )
  attend = _compat.over_explicit_axes(attend, query)
  pairs = (x.astype(dtype) for x in (prefix_key, prefix_value))
  out, lse = attend(wide, *pairs, scale)
  lse = lse + jnp.asarray(prefix_bias, dtype)
  if count_normalized:
    lse = lse - math.log(prefix_key.shape[0])
  prefix = OnlineSoftmax(out, jnp.ones_like(lse), lse)
  merged = online_softmax_merge(context, prefix)
  return online_softmax_finalize(merged)[0].astype(query.dtype)


def _fold_batch(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  scale: Any,
  *,
  implementation: str | None,
  precision: lax.PrecisionLike,
) -> tuple[jax.Array, jax.Array]:
  """Attention of a batch to the same keys, which are not copied for it."""
  b, t, n, h = query.shape
  out, lse = softmax_attention(
    query.reshape(1, b * t, n, h),
    key[None],
    value[None],
    scale=scale,
    return_residual=True,
    implementation=implementation,
    precision=precision,
  )
  return out.reshape(b, t, n, -1), lse.reshape(b, t, n)


def context_part(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None,
  mask: jax.Array | None,
  *,
  scale: Any,
  is_causal: bool = False,
  block_sizes: BlockSizes | None = None,
  implementation: str | None = None,
  precision: lax.PrecisionLike,
) -> OnlineSoftmax:
  """The context as one part of an online softmax."""
  out, lse = softmax_attention(
    query,
    key,
    value,
    bias,
    mask,
    scale=scale,
    is_causal=is_causal,
    return_residual=True,
    block_sizes=block_sizes,
    implementation=implementation,
    precision=precision,
  )
  return OnlineSoftmax(out, jnp.ones_like(lse), lse)


def _check_prefix(
  key: jax.Array, value: jax.Array, sizes: _checks.AttentionShapes
) -> None:
  for name, x in (("prefix_key", key), ("prefix_value", value)):
    _checks.check_floating(name, x)
    if 0 in x.shape:
      raise ValueError(f"{name} must not be empty, got shape {x.shape}")
  heads = sizes.num_kv_heads
  shape = None, heads, sizes.head_dim
  _checks.check_shape("prefix_key", key, shape, "(m, K, H)")
  shape = len(key), heads, sizes.value_dim
  _checks.check_shape("prefix_value", value, shape, "(m, K, Hv)")
