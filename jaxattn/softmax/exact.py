r"""Exact softmax attention in O(T + S) memory, forward and backward.

For logits :math:`s_{ij} = \text{scale} \cdot q_i \cdot k_j + b_{ij}`, hidden
where the mask is False, the output is :math:`o_i = \sum_j p_{ij} v_j` with
:math:`p_{ij} = e^{s_{ij} - L_i}` and :math:`L_i = \log \sum_j e^{s_{ij}}`. The
forward pass folds tiles of keys into an online softmax and keeps
:math:`(o, L)`; the backward pass recomputes :math:`p` tile by tile and uses

.. math::

  \bar s_{ij} = p_{ij} (\bar o_i \cdot v_j - \bar o_i \cdot o_i + \bar L_i).

Source: Rabe and Staats, arXiv 2112.05682; Dao et al., arXiv 2205.14135,
algorithms 1 and 4; Dao, arXiv 2307.08691, section 3.1.
"""

import functools
import math
import numbers
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks, _compat
from jaxattn._dispatch import Branch, dispatch
from jaxattn.softmax import _backward, _call, _forward, _kernels, _mesh
from jaxattn.softmax._tiles import Band
from pallas_kernels.flash_attention import BlockSizes

_IMPLEMENTATIONS = (None, "xla", "pallas", "pallas_interpret", "cudnn")
# A window of any length that is in use: more does not fit where it is added.
_WIDEST = 1 << 30


@overload
def softmax_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None = ...,
  mask: jax.Array | None = ...,
  *,
  scale: float | jax.Array | None = ...,
  is_causal: bool = ...,
  query_seq_lengths: jax.Array | None = ...,
  key_value_seq_lengths: jax.Array | None = ...,
  local_window_size: int | tuple[int, int] | None = ...,
  return_residual: Literal[False] = ...,
  block_sizes: BlockSizes | None = ...,
  implementation: str | None = ...,
  precision: lax.PrecisionLike = ...,
) -> jax.Array: ...


@overload
def softmax_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None = ...,
  mask: jax.Array | None = ...,
  *,
  scale: float | jax.Array | None = ...,
  is_causal: bool = ...,
  query_seq_lengths: jax.Array | None = ...,
  key_value_seq_lengths: jax.Array | None = ...,
  local_window_size: int | tuple[int, int] | None = ...,
  return_residual: Literal[True],
  block_sizes: BlockSizes | None = ...,
  implementation: str | None = ...,
  precision: lax.PrecisionLike = ...,
) -> tuple[jax.Array, jax.Array]: ...


def softmax_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  *,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  query_seq_lengths: jax.Array | None = None,
  key_value_seq_lengths: jax.Array | None = None,
  local_window_size: int | tuple[int, int] | None = None,
  return_residual: bool = False,
  block_sizes: BlockSizes | None = None,
  implementation: str | None = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  r"""Exact attention, a drop-in for ``jax.nn.dot_product_attention``.

  :math:`\mathrm{softmax}(\text{scale}\, Q K^\top + B)\, V` for each head,
  without ever holding a (T, S) array. Where it differs from ``jax.nn``:

  * a query that sees no key gives 0 with zero gradient (there: a mean of all
    values);
  * the log-sum-exp is float32 for 16-bit inputs, is -inf for such a query, and
    has a gradient (there: rounded to the input's dtype, gradient stopped);
  * the size of a value may differ from that of a key;
  * causal and windowed tiles that hold nothing are skipped, not masked;
  * forward-mode differentiation (``jax.jvp``) is not offered; reverse mode of
    any order is. Second derivatives take O(T S) memory.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    key: (B, S, K, H). K divides N: each key head serves N / K query heads.
    value: (B, S, K, Hv).
    bias: floating, broadcastable to (B, N, T, S), added to the logits; has a
      gradient. -inf hides a key.
    mask: boolean, broadcastable to (B, N, T, S); True = attend.
    scale: factor on the logits; None = 1 / sqrt(H). May be traced.
    is_causal: query t sees keys 0 to t.
    query_seq_lengths: (B,) integers; later queries give 0.
    key_value_seq_lengths: (B,) integers; later keys are hidden.
    local_window_size: (left, right) or one integer for both: query t sees keys
      t - left to t + right.
    return_residual: also return the log-sum-exp.
    block_sizes: tile sizes; None = chosen for the platform. Never changes the
      result beyond rounding.
    implementation: None = best of the platform, "xla" = this tiled code,
      "pallas" = the kernels of ``pallas_kernels.flash_attention``,
      "pallas_interpret" = those, interpreted on any platform, "cudnn" =
      ``jax.nn``'s cuDNN path.
    precision: of the matrix products.

  Returns:
    (B, T, N, Hv) of the dtype of ``query``; with ``return_residual`` also the
    log-sum-exp, (B, T, N).

  Raises:
    ValueError: if shapes, dtypes or options do not fit.
    NotImplementedError: if the named implementation cannot run here.

  Cost:
    4 T S H flops a head forward, 10 T S H backward; O(T + S) memory
    beside a tile. Causal masks halve the time, a window of w keys costs T w.

  Source:
    arXiv 2205.14135 (algorithms 1 and 4), arXiv 2112.05682.

  Example:
    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 4, 16))
    >>> softmax_attention(q, k, v, is_causal=True).shape
    (1, 128, 4, 16)
  """
  query, key, value = map(jnp.asarray, (query, key, value))
  bias, mask = (None if x is None else jnp.asarray(x) for x in (bias, mask))
  shapes = _checks.check_attention(query, key, value, bias=bias, mask=mask)
  _checks.check_choice("implementation", implementation, _IMPLEMENTATIONS)
  _check_block_sizes(block_sizes)
  band = _band(is_causal, local_window_size)
  lengths = [
    _lengths(name, x, shapes.batch)
    for name, x in (
      ("query_seq_lengths", query_seq_lengths),
      ("key_value_seq_lengths", key_value_seq_lengths),
    )
  ]
  if implementation == "cudnn":
    return _cudnn(
      query, key, value, bias, mask, scale, is_causal, query_seq_lengths,
      key_value_seq_lengths, local_window_size, return_residual, block_sizes,
      precision,
    )  # fmt: skip
  scale = 1 / math.sqrt(shapes.head_dim) if scale is None else scale
  if not isinstance(scale, numbers.Real):
    _checks.check_scalar("scale", scale)
    query, scale = query * jnp.asarray(scale, query.dtype), 1.0
  spec = _call.Spec(float(scale), band, block_sizes, precision)
  arrays = map(_checks.four_dims, (query, key, value, bias, mask))
  operands = _call.Operands(*arrays, *lengths)
  out, lse = _run(implementation, spec, operands)
  if not shapes.batch:
    out, lse = out[0], lse[0]
  return (out, lse) if return_residual else out


def _check_block_sizes(block_sizes: Any) -> None:
  if block_sizes is not None and not isinstance(block_sizes, BlockSizes):
    raise ValueError(f"block_sizes must be a BlockSizes, got {block_sizes!r}")


def _band(is_causal: bool, window: int | tuple[int, int] | None) -> Band:
  _checks.check_choice("is_causal", is_causal, (False, True))
  before = after = None
  if window is not None:
    sides = window if isinstance(window, tuple) else (window, window)
    if len(sides) != 2:
      raise ValueError(
        "local_window_size must be an integer or a pair (left, right), got "
        f"{window!r}"
      )
    for side in sides:
      _checks.check_integer("local_window_size", side, 0, None)
    before, after = (min(side, _WIDEST) for side in sides)
  return Band(before, 0 if is_causal else after)


def _lengths(
  name: str, x: jax.Array | None, batch: tuple[int, ...]
) -> jax.Array | None:
  if x is None:
    return None
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f"{name} must be integers, got dtype {x.dtype}")
  _checks.check_shape(name, x, batch or (1,), "(B,)")
  _checks.check_nonnegative(name, x)
  return x


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
  implementation: str | None, spec: _call.Spec, x: _call.Operands
) -> tuple[jax.Array, jax.Array]:
  attend = functools.partial(_attend, implementation, spec)
  return _mesh.over_explicit_axes(attend, x)


def _attend(
  implementation: str | None, spec: _call.Spec, x: _call.Operands
) -> tuple[jax.Array, jax.Array]:
  """Groups the heads, attends, and flattens the heads again."""
  b, t, n, _ = x.query.shape
  out, lse = _attention(implementation, spec, _grouped(x))
  return out.reshape(b, t, n, -1), lse.reshape(b, t, n)


def _grouped(x: _call.Operands) -> _call.Operands:
  b, t, n, h = x.query.shape
  k = x.key.shape[2]

  def grouped(y: jax.Array | None) -> jax.Array | None:
    if y is None:
      return None
    heads = (k, n // k) if y.shape[1] > 1 else (1, 1)
    return y.reshape(y.shape[0], *heads, *y.shape[2:])

  return x._replace(
    query=x.query.reshape(b, t, k, n // k, h),
    bias=grouped(x.bias),
    mask=grouped(x.mask),
  )


def attention_gradients(
  implementation: str | None,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None,
  mask: jax.Array | None,
  out: jax.Array,
  lse: jax.Array,
  out_bar: jax.Array,
  lse_bar: jax.Array,
  *,
  scale: float,
  is_causal: bool,
  block_sizes: BlockSizes | None,
  precision: lax.PrecisionLike,
) -> _call.Gradients:
  """Cotangents of query, key, value and bias; JAX can differentiate them.

  Of batched operands that are not on a mesh with explicit axes, as
  :func:`softmax_attention` names them.

  Args:
    implementation: of what.
    query: (B, T, N, H).
    key: (B, S, K, H).
    value: (B, S, K, Hv).
    bias: None or (B|1, N|1, T|1, S|1).
    mask: None or boolean, as ``bias``.
    out: (B, T, N, Hv), what the call gave.
    lse: (B, T, N), logarithm of what the sum of all weights was, which may be
      over more than these keys.
    out_bar: cotangent of ``out``.
    lse_bar: cotangent of ``lse``.
    scale: factor on the logits.
    is_causal: as in :func:`softmax_attention`.
    block_sizes: as there.
    precision: as there.

  Returns:
    Each of its operand's shape and dtype.
  """
  spec = _call.Spec(scale, _band(is_causal, None), block_sizes, precision)
  x = _grouped(_call.Operands(query, key, value, bias, mask))
  heads = x.query.shape[:4]
  rows = (y.reshape(*heads, *y.shape[3:]) for y in (out, lse, out_bar, lse_bar))
  bars = _gradients(implementation, spec, x, *rows)
  return _call.Gradients(
    bars.query.reshape(query.shape),
    bars.key,
    bars.value,
    None if bias is None else bars.bias.reshape(bias.shape),
  )


def _xla(pass_: Any, spec: _call.Spec) -> Branch:
  def on(*, cpu: bool) -> Any:
    return functools.partial(pass_, spec=spec, cpu=cpu)

  def xla(*operands: Any) -> Any:
    return lax.platform_dependent(
      *operands, cpu=on(cpu=True), default=on(cpu=False)
    )

  return Branch(xla)


def _forward_pass(
  implementation: str | None, spec: _call.Spec, x: _call.Operands
) -> tuple[jax.Array, jax.Array]:
  branches = {"xla": _xla(_forward.forward, spec)}
  return dispatch(implementation, branches | _kernels.forward(spec, x), x)


_attention: Any = jax.custom_vjp(_forward_pass, nondiff_argnums=(0, 1))


def _attention_fwd(
  implementation: str | None, spec: _call.Spec, x: _call.Operands
) -> Any:
  out, lse = _attention(implementation, spec, x)
  return (out, lse), (x, out, lse)


def _attention_bwd(
  implementation: str | None, spec: _call.Spec, residuals: Any, bars: Any
) -> tuple[_call.Operands]:
  x, out, lse = residuals
  bars = _gradients(implementation, spec, x, out, lse, *bars)
  bars = _sum_like(bars, x[:4])
  return (_call.Operands(*bars, *(None,) * (len(x) - 4)),)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _backward_pass(
  implementation: str | None,
  spec: _call.Spec,
  x: _call.Operands,
  out: jax.Array,
  lse: jax.Array,
  out_bar: jax.Array,
  lse_bar: jax.Array,
) -> _call.Gradients:
  branches = {"xla": _xla(_backward.backward, spec)} | _kernels.backward(
    spec, x
  )
  return dispatch(implementation, branches, x, out, lse, out_bar, lse_bar)


_gradients: Any = jax.custom_vjp(_backward_pass, nondiff_argnums=(0, 1))


def _gradients_fwd(
  implementation: str | None, spec: _call.Spec, *args: Any
) -> Any:
  return _gradients(implementation, spec, *args), args


def _gradients_bwd(
  implementation: str | None, spec: _call.Spec, args: Any, bars: Any
) -> Any:
  # Loops of unknown length have no transpose: from the second derivative on,
  # differentiate the dense formula instead.
  del implementation
  floats, rest = _split(args)

  def dense(*floats: Any) -> _call.Gradients:
    return _backward.dense_backward(*_join(floats, rest), spec=spec)

  _, vjp = jax.vjp(dense, *floats)
  return _join(_sum_like(vjp(bars), floats), (None,) * len(rest))


_gradients.defvjp(_gradients_fwd, _gradients_bwd)


def _sum_like(bars: Any, primals: Any) -> list[Any]:
  """Cotangents as ``shard_map`` wants them; None (no bias) stays."""
  return [
    None if bar is None else _compat.sum_like(bar, y)
    for bar, y in zip(bars, primals, strict=True)
  ]


def _split(args: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
  """Differentiable arguments of ``_gradients``, and the others."""
  x, *rest = args
  return (*x[:4], *rest), x[4:]


def _join(floats: Any, rest: Any) -> tuple[Any, ...]:
  return (_call.Operands(*floats[:4], *rest), *floats[4:])


def _cudnn(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None,
  mask: jax.Array | None,
  scale: Any,
  is_causal: bool,
  query_seq_lengths: Any,
  key_value_seq_lengths: Any,
  local_window_size: Any,
  return_residual: bool,
  block_sizes: BlockSizes | None,
  precision: Any,
) -> Any:
  """CuDNN through ``jax.nn``, whose own gradient rule it keeps."""
  reason = None
  if jax.default_backend() != "gpu":
    reason = (
      f"it needs a CUDA device, this process runs on {jax.default_backend()}"
    )
  elif query.dtype not in (jnp.bfloat16, jnp.float16):
    reason = f"it takes bfloat16 or float16, got {query.dtype}"
  elif block_sizes is not None or precision is not None:
    reason = "it takes neither block_sizes nor precision"

  def run(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
    return jax.nn.dot_product_attention(
      query, key, value, bias, mask, scale=scale, is_causal=is_causal,
      query_seq_lengths=query_seq_lengths,
      key_value_seq_lengths=key_value_seq_lengths,
      local_window_size=local_window_size, return_residual=return_residual,
      implementation="cudnn",
    )  # fmt: skip

  branches = {"cudnn": Branch(run, unsupported=reason)}
  return dispatch("cudnn", branches, query, key, value)
