r"""Attention to a context and to the state of a prefix.

With c the attention to the context alone, :math:`l = \log \sum_j e^{s_j}` and
any M,

.. math::

  o(q) = \frac{e^{l - M} c + e^{-M} Z^\top \phi(q)}
  {e^{l - M} + e^{-M} k^\top \phi(q)}:

the state is one more part of an online softmax. M is the larger of l and of the
logarithm of the prefix's sums, so that nothing overflows and what is largest is
kept. If every ratio :math:`\phi(q) \cdot \phi(k) / e^{s\, q \cdot k}` over a
prefix lies within :math:`1 \pm \epsilon`, outputs differ from exact ones by at
most :math:`2 \epsilon / (1 - \epsilon) \max |v|`. Source: arXiv 2406.14036; the
merge and the bound are this project's.
"""

import functools
import math
import numbers
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks, _compat
from jaxattn.attention import _rows
from jaxattn.attention._prefix import _merge
from jaxattn.attention._prefix.state import (
  PrefixState,
  check_scale,
  check_state,
  scale_of,
)
from jaxattn.features import FeatureMap
from jaxattn.features.maps import as_feature_map
from jaxattn.numerics._dtypes import accumulator
from jaxattn.softmax import BlockSizes
from pallas_kernels.ntk_attention import Total

_KERNELS = ("pallas", "pallas_interpret")
_IMPLEMENTATIONS = (None, "xla", *_KERNELS)
# For each number of a query, that ``implementation=None`` keeps for a kernel.
_MOST_FEATURES = 4


class NTKAttentionInfo(NamedTuple):
  """What a prefix state did to each query, of the accumulation dtype.

  Source: this project.

  Attributes:
    denominator: (B, T, N) sum of weights over context and prefix, in units of
      the larger of the two. Where it is near 0 or below, features of an odd
      degree (or a fitted state) have left their range and the output means
      nothing.
    prefix_mass: (B, T, N) share of the sum of weights that is the prefix's; 0
      where that is 0.
  """

  denominator: jax.Array
  prefix_mass: jax.Array


@overload
def ntk_attention(
  query: jax.Array,
  key: jax.Array | None,
  value: jax.Array | None,
  state: PrefixState,
  *,
  feature_map: str | FeatureMap = ...,
  bias: jax.Array | None = ...,
  allow_odd: bool = ...,
  block_sizes: BlockSizes | None = ...,
  return_info: Literal[False] = ...,
  scale: float | jax.Array | None = ...,
  is_causal: bool = ...,
  mask: jax.Array | None = ...,
  implementation: str | None = ...,
  precision: lax.PrecisionLike = ...,
) -> jax.Array: ...


@overload
def ntk_attention(
  query: jax.Array,
  key: jax.Array | None,
  value: jax.Array | None,
  state: PrefixState,
  *,
  feature_map: str | FeatureMap = ...,
  bias: jax.Array | None = ...,
  allow_odd: bool = ...,
  block_sizes: BlockSizes | None = ...,
  return_info: Literal[True],
  scale: float | jax.Array | None = ...,
  is_causal: bool = ...,
  mask: jax.Array | None = ...,
  implementation: str | None = ...,
  precision: lax.PrecisionLike = ...,
) -> tuple[jax.Array, NTKAttentionInfo]: ...


def ntk_attention(
  query: jax.Array,
  key: jax.Array | None,
  value: jax.Array | None,
  state: PrefixState,
  *,
  feature_map: str | FeatureMap = "elu",
  bias: jax.Array | None = None,
  allow_odd: bool = False,
  block_sizes: BlockSizes | None = None,
  return_info: bool = False,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  mask: jax.Array | None = None,
  implementation: str | None = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array | tuple[jax.Array, NTKAttentionInfo]:
  r"""Attention to a context and to a prefix that is folded into a state.

  .. math:: o(q) = \frac{\sum_j e^{s_j} v_j + Z^\top \phi(q)}
    {\sum_j e^{s_j} + k^\top \phi(q)}

  What it costs does not depend on the length of the prefix. With Taylor
  features the state of a prefix approximates attention to it. With ``"elu"``
  it does not: that map is a way to *train* a prefix (z and k are parameters),
  and the sum over a given prefix is far from it. A causal mask, ``mask`` and
  ``bias`` are about the context alone.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    key: (B, S, K, H), the context. K divides N. None, or S = 0, is none.
    value: (B, S, K, Hv), or None as ``key``.
    state: of K or of N heads, of any floating dtype; has a gradient.
    feature_map: "elu", "identity", "relu" or a ``FeatureMap``, applied to
      queries times sqrt(scale).
    bias: floating, broadcastable to (B, N, T, S), added to the logits of the
      context.
    allow_odd: permit Taylor features of odd degree, whose kernel is negative
      where logits are (below -1 at degree 1, -1.6 at degree 3). Those of even
      degree are safe for sums over real keys; a trained or fitted k, and
      "identity", promise nothing: see ``return_info``.
    block_sizes: tile sizes of the context; speed and memory only.
    return_info: also return the denominator and the share of the prefix.
    scale: factor on the logits, positive; None = 1 / sqrt(H). May be traced.
    is_causal: query t sees context keys 0 to t.
    mask: boolean, broadcastable to (B, N, T, S); True = attend.
    implementation: None = best of the platform, "xla" = exact attention in
      XLA and the prefix, merged, "pallas" = the kernel of
      ``pallas_kernels.ntk_attention``, "pallas_interpret" = that, interpreted
      on any platform.
    precision: of the matrix products.

  Returns:
    (B, T, N, Hv) of the dtype of ``query``, 0 where the sum of all weights is;
    with ``return_info`` also an :class:`NTKAttentionInfo`.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, for instance "degree
      must be even unless allow_odd=True, got 1".
    NotImplementedError: if the named implementation cannot run here.

  Cost:
    2 T S (H + Hv) flops a head for the context and 2 T r Hv for the prefix,
    r features; O(T + S + r Hv) memory beside a tile, also for the gradient. A
    kernel reads all features, O(T r); None takes it for at most 4 H of them.

  Source:
    arXiv 2406.14036.

  Example:
    >>> import jax
    >>> from jaxattn.attention import prefix_attention, prefix_state_init
    >>> from jaxattn.attention import prefix_state_update
    >>> from jaxattn.features import taylor_map
    >>> q, k, v = 0.3 * jax.random.normal(jax.random.key(0), (3, 64, 2, 8))
    >>> prefix = 0.3 * jax.random.normal(jax.random.key(1), (2, 1000, 2, 8))
    >>> taylor = taylor_map(2)
    >>> state = prefix_state_init(2, 45, 8)
    >>> state = prefix_state_update(state, *prefix, feature_map=taylor)
    >>> out = ntk_attention(q, k, v, state, feature_map=taylor)
    >>> bool(abs(out - prefix_attention(q, k, v, *prefix)).max() < 1e-3)
    True
  """
  query, state = jnp.asarray(query), PrefixState(*map(jnp.asarray, state))
  key, value, bias, mask = (
    None if x is None else jnp.asarray(x) for x in (key, value, bias, mask)
  )
  feature_map = as_feature_map(feature_map)
  if key is not None and value is not None and 0 in key.shape[-3:-2]:
    key, value, bias, mask = _hidden_context(query, key, value, bias, mask)
  sizes = query, key, value, bias, mask
  batched = _check_call(*sizes, is_causal, block_sizes, state, feature_map)
  _rows.check_options(scale, is_causal, None)
  check_scale(scale)
  _checks.check_choice("implementation", implementation, _IMPLEMENTATIONS)
  _checks.check_choice("allow_odd", allow_odd, (False, True))
  _checks.check_choice("return_info", return_info, (False, True))
  _check_degree(feature_map, allow_odd)
  if key is None and implementation in _KERNELS:
    key, value, bias, mask = _no_context(query, state)
  arrays = map(_checks.four_dims, (query, key, value, bias, mask))
  query, *context = arrays
  in_one = key is not None and _is_for_a_kernel(implementation, query, state)
  logit_scale = 1 / math.sqrt(query.shape[-1]) if scale is None else None
  if in_one and isinstance(scale, numbers.Real):
    logit_scale = float(scale)
  out = _ntk_attention(
    _merge.Call(
      implementation,
      logit_scale,
      is_causal,
      block_sizes,
      precision,
      _compat.has_explicit_axes(query),
    ),
    None if key is None else _merge.Context(query, *context),
    _merge.Prefix(feature_map, query, *state, scale_of(scale, query)),
    in_one=in_one,
    return_info=return_info,
  )
  return out if batched else jax.tree.map(lambda x: x[0], out)


@functools.partial(jax.jit, static_argnames=("call", "in_one", "return_info"))
def _ntk_attention(
  call: _merge.Call,
  context: _merge.Context | None,
  prefix: _merge.Prefix,
  *,
  in_one: bool,
  return_info: bool,
) -> Any:
  dtype = accumulator(prefix.query.dtype)
  z, k = (x.astype(dtype) for x in (prefix.z, prefix.k))
  scale = jnp.asarray(prefix.scale, dtype)
  prefix = prefix._replace(z=z, k=k, scale=scale)
  # In two parts, they are merged before either is rounded.
  narrow = prefix.query.dtype if in_one else dtype
  if context is not None:
    query, key, value = (x.astype(narrow) for x in context[:3])
    if call.scale is None:
      query, call = query * scale.astype(narrow), call._replace(scale=1.0)
    context = _merge.Context(query, key, value, *context[3:])
  attend = functools.partial(_merge.in_two, call)
  if in_one:
    attend = functools.partial(_merge.in_one, call)
    attend = _compat.over_explicit_axes(attend, prefix.query)
  out, total = attend(context, prefix)
  if not return_info:
    return out
  return out, _info(_merge.prefix_total(call, prefix), total)


def _info(denom: jax.Array, total: Total) -> NTKAttentionInfo:
  """From the prefix's sum of weights, and the sum of all."""
  size = jnp.log(jnp.abs(denom))
  top = jnp.maximum(jnp.maximum(size, total.log), _merge.least(denom.dtype))
  top = lax.stop_gradient(top)
  prefix = jnp.sign(denom) * jnp.exp(size - top)
  both = total.sign * jnp.exp(total.log - top)
  none = both == 0
  larger = jnp.where(none, 1, jnp.maximum(jnp.abs(prefix), both - prefix))
  share = jnp.where(none, 0, prefix / jnp.where(none, 1, both))
  return NTKAttentionInfo(both / larger, share)


def _is_for_a_kernel(
  implementation: str | None, query: jax.Array, state: PrefixState
) -> bool:
  """Whether context and prefix go into one kernel, where there is one."""
  if implementation is None:
    # The features of all queries lie in memory then.
    few = state.z.shape[1] <= _MOST_FEATURES * query.shape[-1]
    return few and not _compat.has_explicit_axes(query)
  return implementation in _KERNELS


def _no_context(query: jax.Array, state: PrefixState) -> Any:
  """One token that nobody sees, for kernels, which need a context."""
  heads, _, value_dim = state.z.shape
  shape = *query.shape[:-3], 0, heads
  key = jnp.zeros((*shape, query.shape[-1]), query.dtype)
  value = jnp.zeros((*shape, value_dim), query.dtype)
  return _hidden_context(query, key, value, None, None)


def _hidden_context(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None,
  mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
  """One token that nobody sees, in place of no tokens."""

  def one(x: jax.Array, axis: int) -> jax.Array:
    shape = list(x.shape)
    shape[axis] = max(shape[axis], 1)
    return jnp.zeros(shape, x.dtype)

  bias = None if bias is None else one(bias, -1)
  if mask is None:
    mask = jnp.zeros((1,) * query.ndim, bool)
  return one(key, -3), one(value, -3), bias, one(mask, -1)


def _check_call(
  query: jax.Array,
  key: jax.Array | None,
  value: jax.Array | None,
  bias: jax.Array | None,
  mask: jax.Array | None,
  is_causal: bool,
  block_sizes: BlockSizes | None,
  state: PrefixState,
  feature_map: FeatureMap,
) -> bool:
  """Checks layout and state, and says whether there is a batch."""
  if key is not None and value is not None:
    sizes = _checks.check_attention(query, key, value, bias=bias, mask=mask)
    heads = {"query": sizes.num_heads, "key": sizes.num_kv_heads}
    dims = sizes.head_dim, sizes.value_dim
    check_state(state, heads, feature_map, *dims)
    return bool(sizes.batch)
  for name, x in (
    ("key", key),
    ("value", value),
    ("bias", bias),
    ("mask", mask),
    ("is_causal", is_causal or None),
    ("block_sizes", block_sizes),
  ):
    if x is not None:
      got = getattr(x, "shape", x)
      raise ValueError(f"{name} must not be set without a context, got {got}")
  _checks.check_rank("query", query, (3, 4))
  _checks.check_floating("query", query)
  if 0 in query.shape:
    raise ValueError(f"query must not be empty, got shape {query.shape}")
  *batch, _, n, h = query.shape
  check_state(state, None, feature_map, h, None)
  if n % len(state.z):
    raise ValueError(f"state.z has {len(state.z)} heads, query has {n}")
  return bool(batch)


def _check_degree(feature_map: FeatureMap, allow_odd: bool) -> None:
  if feature_map.kind == "taylor" and not allow_odd:
    (degree,) = feature_map.degrees
    if degree % 2:
      raise ValueError(
        f"degree must be even unless allow_odd=True, got {degree}"
      )
