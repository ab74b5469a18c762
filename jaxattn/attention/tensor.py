r"""Tensor attention: a softmax over tuples of tokens, for correlations of them.

With k key sequences, column products :math:`\oslash` of keys and values
(:func:`jaxattn.sketch.khatri_rao`), and a row of weights for each query,

.. math::

  O = \operatorname{softmax}\bigl(\text{scale} \cdot
    Q (K_1 \oslash \dots \oslash K_k)^\top\bigr)
    (V_1 \oslash \dots \oslash V_k),

a query i gives the tuple :math:`(j_1, \dots, j_k)` the logit
:math:`\text{scale} \sum_c q_{ic} k^1_{j_1 c} \cdots k^k_{j_k c}`; k = 1 is
ordinary attention, k = 2 also goes by the name of trilinear or 2-simplicial
attention. A polynomial p in place of exp makes the weights inner products,

.. math::

  p\Bigl(\sum_c q_c k^1_c \cdots k^k_c\Bigr) = \sum_\alpha w_\alpha
    q^\alpha (k^1)^\alpha \cdots (k^k)^\alpha,

with as many features as for matrices, :math:`m = \binom{H + g}{g}`, and the sum
over all tuples a product of k sums over tokens: almost linear time. Sources:
arXiv 2310.04064 (forward), arXiv 2405.16411 (gradient).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks, _compat
from jaxattn._dispatch import Branch, dispatch
from jaxattn.attention import _tensor_blocks, _tensor_kernels, polynomial
from jaxattn.attention.streaming.moments import (
  MomentState,
  check_even,
  moment_query,
)
from jaxattn.features import _chunks, _product_scan
from jaxattn.features.coefficients import polynomial_coefficients
from jaxattn.features.monomials import check_feature_count
from jaxattn.numerics._dtypes import accumulator
from pallas_kernels.tensor_attention import TensorBlockSizes
from pallas_kernels.tensor_attention.operands import Operands, Options

_NAMES = (("key1", "value1", "key_mask1"), ("key2", "value2", "key_mask2"))

Arrays = tuple[jax.Array, ...]
Masks = tuple[jax.Array | None, ...]


def tensor_attention(
  query: jax.Array,
  key1: jax.Array,
  key2: jax.Array,
  value1: jax.Array,
  value2: jax.Array,
  *,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  key_mask1: jax.Array | None = None,
  key_mask2: jax.Array | None = None,
  chunk_size: int | None = None,
  implementation: str | None = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  r"""Exact softmax attention to all pairs of tokens, in linear memory.

  .. math:: o_{ic} = \sum_{j, l} \operatorname{softmax}_{(j, l)}\Bigl(
    \text{scale} \sum_c q_{ic} k^1_{jc} k^2_{lc}\Bigr) v^1_{jc} v^2_{lc}

  By attention of paired queries :math:`q_i \circ k^1_j` to the second keys, a
  block of queries at a time; the gradient makes them again.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    key1: (B, S1, K, H). K divides N: each key head serves N / K query heads.
    key2: (B, S2, K, H).
    value1: (B, S1, K, Hv).
    value2: (B, S2, K, Hv).
    scale: factor on the logits; None = 1 / sqrt(H). May be traced.
    is_causal: query t sees the pairs of keys 0 to t; T = S1 = S2.
    key_mask1: boolean (B, S1); True = attend.
    key_mask2: boolean (B, S2); True = attend.
    chunk_size: queries at a time; None = chosen from sizes. Memory and speed
      only. Kernels take multiples of 128.
    implementation: None = best of the platform, "xla" = blocks of queries in
      XLA, "pallas" = the kernels of ``pallas_kernels.tensor_attention``, which
      round a bfloat16 pair of keys once more, "pallas_interpret" = those,
      interpreted on any platform.
    precision: of the matrix products.

  Returns:
    (B, T, N, Hv) of the dtype of ``query``; 0 for a query that sees no pair.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, or a head has more than
      2^34 logits.
    NotImplementedError: if the named implementation cannot run here.

  Cost:
    T S1 S2 (H + Hv) multiply-adds a head, masked or not; the gradient four
    times that, and in kernels 2.5 times. Causal kernels skip blocks that no
    query sees. O(T + S1 + S2) memory beside a block.

  Source:
    arXiv 2310.04064.

  Example:
    >>> import jax
    >>> arrays = jax.random.normal(jax.random.key(0), (5, 1, 32, 2, 8))
    >>> tensor_attention(*arrays).shape
    (1, 32, 2, 8)
  """
  keys, values = (key1, key2), (value1, value2)
  masks = (key_mask1, key_mask2)
  call = _read(query, keys, values, masks, _NAMES, scale, is_causal, chunk_size)
  _tensor_blocks.check_num_logits(
    (call.query, *call.keys),
    "exact tensor attention would need {} scores a head; use "
    "polynomial_tensor_attention",
  )
  out = _tensor_kernels.attend(
    implementation,
    Options(is_causal, _block_sizes(chunk_size), precision),
    _operands(call, scale),
  )
  return out if call.batch else out[0]


def polynomial_tensor_attention(
  query: jax.Array,
  key1: jax.Array,
  key2: jax.Array,
  value1: jax.Array,
  value2: jax.Array,
  *,
  degree: int,
  radius: float,
  coefficients: str = "minimax",
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  key_mask1: jax.Array | None = None,
  key_mask2: jax.Array | None = None,
  mask: None = None,
  bias: None = None,
  chunk_size: int | None = None,
  backward: str = "surrogate",
  implementation: str | None = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  r"""Attention to pairs with exp replaced by a polynomial, in linear time.

  .. math:: o_i = \frac{\phi(q_i)^\top [w \circ (\phi(K_1)^\top V_1) \circ
    (\phi(K_2)^\top V_2)]}{\phi(q_i)^\top [w \circ (\phi(K_1)^\top 1) \circ
    (\phi(K_2)^\top 1)]}

  :func:`polynomial_order_attention` for two key sequences, with
  the layout of :func:`tensor_attention`. Faster than that from some 64 tokens
  on. How large logits are: :func:`jaxattn.attention.tensor_logit_radius`; they
  are products of three entries, and grow fast. What error to expect:
  :func:`jaxattn.features.attention_error_bound` of
  :func:`jaxattn.features.polynomial_error`, for values
  :math:`v^1_j \circ v^2_l`. Nothing here checks that logits stay within the
  radius.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    key1: (B, S1, K, H). K divides N: each key head serves N / K query heads.
    key2: (B, S2, K, H).
    value1: (B, S1, K, Hv).
    value2: (B, S2, K, Hv).
    degree: g, even, at least 0.
    radius: R > 0, bound on the logits; a static number.
    coefficients: ``"minimax"`` or ``"taylor"``, as in
      :func:`jaxattn.features.polynomial_coefficients`.
    scale: factor on the logits; None = 1 / sqrt(H). May be traced.
    is_causal: query t sees the pairs of keys 0 to t; T = S1 = S2.
    key_mask1: boolean (B, S1); True = attend.
    key_mask2: boolean (B, S2); True = attend.
    mask: must be None: of an arbitrary mask nothing in linear time can make
      use.
    bias: must be None, for the same reason.
    chunk_size: tokens at a time; None = chosen from sizes. Memory and speed
      only.
    backward: ``"surrogate"`` is the gradient of what the forward computes. Its
      relative error is that of the polynomial times up to some 20, more than
      for attention to single tokens, and most where the radius is small: a
      derivative has a degree less. ``"closed_form"`` puts the approximate
      weights into the exact formula: closer to the gradient of exact attention
      at an equal degree, of H times as many products, and not with
      ``is_causal``.
    implementation: None or "xla".
    precision: of the matrix products.

  Returns:
    (B, T, N, Hv) of the dtype of ``query``; 0 for a query that sees no pair.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, for instance "degree
      must be even, got 3".

  Cost:
    (T + S1 + S2) m (Hv + 1) multiply-adds a head with m = C(H + g, g); the
    gradient two to three times that, in multiply-adds and as measured on a CPU.
    O(T + S1 + S2) memory and m (Hv + 1) a head, or H times that for the closed
    form. Causal, running sums of a chunk of tokens, m (Hv + 1) numbers each,
    exist at a time, and about 2 sqrt(T / chunk) of them for the gradient.

  Source:
    arXiv 2310.04064; arXiv 2405.16411 for ``backward="closed_form"``.

  Example:
    >>> import jax
    >>> arrays = 0.5 * jax.random.normal(jax.random.key(0), (5, 1, 64, 2, 4))
    >>> out = polynomial_tensor_attention(*arrays, degree=4, radius=1.0)
    >>> bool(abs(out - tensor_attention(*arrays)).max() < 1e-3)
    True
  """
  keys, values = (key1, key2), (value1, value2)
  masks = (key_mask1, key_mask2)
  return _polynomial(
    (query, keys, values, masks, _NAMES),
    degree=degree,
    radius=radius,
    coefficients=coefficients,
    scale=scale,
    is_causal=is_causal,
    mask=mask,
    bias=bias,
    chunk_size=chunk_size,
    backward=backward,
    implementation=implementation,
    precision=precision,
  )


def polynomial_order_attention(
  query: jax.Array,
  keys: Arrays,
  values: Arrays,
  *,
  degree: int,
  radius: float,
  coefficients: str = "minimax",
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  key_masks: Masks | None = None,
  mask: None = None,
  bias: None = None,
  chunk_size: int | None = None,
  backward: str = "surrogate",
  implementation: str | None = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  r"""Polynomial attention to tuples of any number of tokens, in linear time.

  .. math:: o_i = \frac{\phi(q_i)^\top [w \circ
    (\phi(K_1)^\top V_1) \circ \dots \circ (\phi(K_k)^\top V_k)]}
    {\phi(q_i)^\top [w \circ
    (\phi(K_1)^\top 1) \circ \dots \circ (\phi(K_k)^\top 1)]}

  One key sequence: :func:`jaxattn.attention.polynomial_attention` with
  ``local="polynomial"`` and ``center_keys=False``. Two:
  :func:`polynomial_tensor_attention`.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    keys: k arrays (B, S_r, K, H). K divides N.
    values: k arrays (B, S_r, K, Hv), each with as many tokens as its keys.
    degree: g, even, at least 0.
    radius: R > 0, bound on the logits; a static number.
    coefficients: ``"minimax"`` or ``"taylor"``.
    scale: factor on the logits; None = 1 / sqrt(H). May be traced.
    is_causal: query t sees the tuples of keys 0 to t; all lengths are T.
    key_masks: k booleans (B, S_r), or None for those that hide nothing.
    mask: must be None: of an arbitrary mask nothing in linear time can make
      use.
    bias: must be None, for the same reason.
    chunk_size: tokens at a time; None = chosen from sizes. Memory and speed
      only.
    backward: ``"surrogate"`` or ``"closed_form"``, as in
      :func:`polynomial_tensor_attention`.
    implementation: None or "xla".
    precision: of the matrix products.

  Returns:
    (B, T, N, Hv) of the dtype of ``query``; 0 for a query that sees no tuple.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, for instance "keys and
      values must be tuples of one length, got 2 and 3".

  Cost:
    (T + S_1 + ... + S_k) m (Hv + 1) multiply-adds a head; else as
    :func:`polynomial_tensor_attention`.

  Source:
    arXiv 2310.04064.

  Example:
    >>> import jax
    >>> q, *kv = 0.5 * jax.random.normal(jax.random.key(0), (7, 1, 64, 2, 4))
    >>> keys, values = tuple(kv[:3]), tuple(kv[3:])
    >>> polynomial_order_attention(q, keys, values, degree=4, radius=1.0).shape
    (1, 64, 2, 4)
  """
  for name, x in (("keys", keys), ("values", values)):
    if not isinstance(x, tuple) or not x:
      raise ValueError(f"{name} must be a tuple of arrays, got {x!r:.60}")
  masks = (None,) * len(keys) if key_masks is None else key_masks
  if not isinstance(masks, tuple):
    raise ValueError(f"key_masks must be a tuple or None, got {masks!r:.60}")
  for name, x in (("values", values), ("key_masks", masks)):
    if len(x) != len(keys):
      raise ValueError(
        f"keys and {name} must be tuples of one length, got {len(keys)} and "
        f"{len(x)}"
      )
  names = tuple(
    (f"keys[{r}]", f"values[{r}]", f"key_masks[{r}]") for r in range(len(keys))
  )
  return _polynomial(
    (query, keys, values, masks, names),
    degree=degree,
    radius=radius,
    coefficients=coefficients,
    scale=scale,
    is_causal=is_causal,
    mask=mask,
    bias=bias,
    chunk_size=chunk_size,
    backward=backward,
    implementation=implementation,
    precision=precision,
  )


def tensor_moment_query(
  state1: MomentState,
  state2: MomentState,
  query: jax.Array,
  *,
  radius: float,
  coefficients: str = "minimax",
  scale: float | jax.Array | None = None,
  return_info: bool = False,
) -> Any:
  r"""Attention of queries to all pairs of tokens of two streams so far.

  What :func:`polynomial_tensor_attention` of all their tokens gives, to
  rounding. Decoding a causal layer keeps nothing but the two states: they are
  updated with the keys and values of a token, and then asked.

  Args:
    state1: of the stream of first keys and values; see
      :func:`jaxattn.attention.moment_init`.
    state2: of that of second ones, of the same sizes.
    query: (B, T, N, H), floating; K divides N.
    radius: R > 0, bound on the logits; a static number. Nothing checks it; see
      ``return_info``.
    coefficients: ``"minimax"`` or ``"taylor"``.
    scale: factor on the logits; None = 1 / sqrt(H). May be traced.
    return_info: also return a :class:`jaxattn.attention.MomentInfo`.

  Returns:
    (B, T, N, Hv) of the dtype of ``query``; 0 where a batch element has no
    tokens in one of the streams. With ``return_info`` a pair of it and the
    info.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, or if, outside of
      ``jit``, there are no pairs in any batch element.

  Cost:
    m (Hv + 1) multiply-adds a query, whatever the lengths of the streams.

  Source:
    arXiv 2310.04064 for the product of states.

  Example:
    >>> import jax
    >>> from jaxattn.attention import moment_init, moment_update
    >>> arrays = 0.5 * jax.random.normal(jax.random.key(0), (5, 1, 64, 2, 4))
    >>> q, k1, k2, v1, v2 = arrays
    >>> empty = moment_init(1, 2, 4, 4, degree=4)
    >>> states = moment_update(empty, k1, v1), moment_update(empty, k2, v2)
    >>> out = tensor_moment_query(*states, q, radius=1.0)
    >>> bool(abs(out - tensor_attention(*arrays)).max() < 1e-3)
    True
  """
  if state1.degree != state2.degree:
    raise ValueError(
      "state1 and state2 must have one degree, got "
      f"{state1.degree} and {state2.degree}"
    )
  shape = state1.moments.shape
  _checks.check_shape("state2.moments", state2.moments, shape, "of state1")
  _checks.check_one_dtype(
    **{"state1.moments": state1.moments, "state2.moments": state2.moments}
  )
  for name, state in (("state1", state1), ("state2", state2)):
    if _checks.is_concrete(state.count) and not np.any(np.asarray(state.count)):
      raise ValueError(f"{name} must hold tokens, got one without any update")
  # A sum over pairs is the product of two sums, and so are these.
  moments = state1.moments * state2.moments
  pairs = MomentState(
    moments,
    jnp.zeros_like(moments),
    state1.max_norm * state2.max_norm,
    jnp.minimum(state1.count, state2.count),
    state1.degree,
  )
  return moment_query(
    pairs,
    query,
    radius=radius,
    coefficients=coefficients,
    scale=scale,
    return_info=return_info,
  )


class _Call:
  """Checked arrays of one call, in the layout with a batch."""

  def __init__(
    self, query: Any, keys: Any, values: Any, masks: Any, batch: Any
  ):
    self.batch = batch
    self.query = _checks.four_dims(query)
    self.keys = tuple(map(_checks.four_dims, keys))
    self.values = tuple(map(_checks.four_dims, values))
    self.masks = tuple(
      None if m is None else m.reshape(k.shape[:2])
      for m, k in zip(masks, self.keys, strict=True)
    )


def _read(
  query: Any,
  keys: Any,
  values: Any,
  masks: Any,
  names: Any,
  scale: Any,
  is_causal: Any,
  chunk_size: Any,
) -> _Call:
  """Checks what all functions of this module take."""
  query = jnp.asarray(query)
  keys, values = (tuple(map(jnp.asarray, x)) for x in (keys, values))
  masks = tuple(None if m is None else jnp.asarray(m) for m in masks)
  first: Any = None
  for k, v, m, name in zip(keys, values, masks, names, strict=True):
    sizes = _checks.check_attention(query, k, v, key_mask=m, names=name)
    first = first or sizes
    heads = (first.num_kv_heads, first.head_dim)
    _checks.check_shape(name[0], k, (*first.batch, None, *heads), "(..., K, H)")
    heads = (first.num_kv_heads, first.value_dim)
    _checks.check_shape(
      name[1], v, (*first.batch, None, *heads), "(..., K, Hv)"
    )
  _checks.check_choice("is_causal", is_causal, (False, True))
  lengths = [k.shape[-3] for k in keys]
  if is_causal and set(lengths) != {first.query_length}:
    listed = ", ".join(f"S{r + 1}={s}" for r, s in enumerate(lengths))
    raise ValueError(
      f"is_causal needs {', '.join(n[0] for n in names)} and query of one "
      f"length, got T={first.query_length}, {listed}"
    )
  if scale is not None:
    _checks.check_scalar("scale", scale)
  if chunk_size is not None:
    _checks.check_integer("chunk_size", chunk_size, 1, None)
  return _Call(query, keys, values, masks, first.batch)


def _operands(call: _Call, scale: Any) -> Operands:
  """First keys, scaled, and first values are as wide as sums are."""
  dtype = accumulator(call.query.dtype)
  scale = 1 / math.sqrt(call.query.shape[-1]) if scale is None else scale
  (key1, key2), (value1, value2) = call.keys, call.values
  return Operands(
    call.query,
    key1.astype(dtype) * jnp.asarray(scale, dtype),
    key2,
    value1.astype(dtype),
    value2,
    *call.masks,
  )


def _block_sizes(chunk_size: int | None) -> TensorBlockSizes | None:
  """Tiles of so many queries."""
  if chunk_size is None:
    return None
  slab = -(-TensorBlockSizes().slab_q_bwd // chunk_size) * chunk_size
  return TensorBlockSizes(
    block_q=chunk_size, block_q_bwd=chunk_size, slab_q_bwd=slab
  )


def _run(
  attend: Any, call: _Call, scale: Any, implementation: str | None
) -> jax.Array:
  attend = _compat.over_explicit_axes(attend, call.query)
  operands = (call.query, call.keys, call.values, call.masks, scale)
  out = dispatch(implementation, {"xla": Branch(attend)}, *operands)
  return out if call.batch else out[0]


def _polynomial(
  arrays: tuple[Any, Any, Any, Any, Any],
  *,
  degree: int,
  radius: float,
  coefficients: str,
  scale: Any,
  is_causal: bool,
  mask: Any,
  bias: Any,
  chunk_size: int | None,
  backward: str,
  implementation: str | None,
  precision: Any,
) -> jax.Array:
  """Checks the options of a polynomial, and attends."""
  call = _read(*arrays, scale, is_causal, chunk_size)
  _checks.check_no_mask(mask, bias)
  check_even(degree)
  check_feature_count(call.query.shape[-1], degree)
  _checks.check_choice("coefficients", coefficients, ("minimax", "taylor"))
  _checks.check_choice("backward", backward, ("surrogate", "closed_form"))
  closed_form = backward == "closed_form"
  if closed_form and is_causal:
    raise ValueError(
      "backward must be 'surrogate' with is_causal=True, got 'closed_form'"
    )
  found = polynomial_coefficients(degree, radius, kind=coefficients)
  spec = _chunks.Spec(
    coefficients=tuple(map(float, found)),
    closed_form=closed_form,
    is_causal=is_causal,
    chunk_size=chunk_size,
    precision=precision,
  )
  attend = functools.partial(_polynomial_attention, spec=spec)
  return _run(attend, call, scale, implementation)


def _prepared(
  query: jax.Array, keys: Arrays, values: Arrays, masks: Masks, scale: Any
) -> tuple[jax.Array, Arrays, Arrays]:
  """Scaled queries; keys and values without what is hidden; accumulators."""
  dtype = accumulator(query.dtype)
  scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
  query = query.astype(dtype) * jnp.asarray(scale, dtype)
  keys, values = (
    tuple(
      _chunks.hide(x.astype(dtype), m) for x, m in zip(xs, masks, strict=True)
    )
    for xs in (keys, values)
  )
  return query, keys, values


@functools.partial(jax.jit, static_argnames="spec")
def _polynomial_attention(
  query: jax.Array,
  keys: Arrays,
  values: Arrays,
  masks: Masks,
  scale: Any,
  *,
  spec: _chunks.Spec,
) -> jax.Array:
  q, keys, values = _prepared(query, keys, values, masks, scale)
  assert spec.coefficients is not None
  shown = tuple(
    polynomial.sample(k) if m is None else k
    for k, m in zip(keys, masks, strict=True)
  )
  degree = len(spec.coefficients) - 1
  q, keys = polynomial.balanced(q, keys, shown, degree)
  values = tuple(
    _chunks.hide(_chunks.ones_column(v), m)
    for v, m in zip(values, masks, strict=True)
  )
  return _product_scan.attend(q, keys, values, spec).astype(query.dtype)
