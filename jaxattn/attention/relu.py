r"""ReLU attention: weights that are powers of a rectified score.

.. math::

  w_{ij} = \max(\text{scale} \cdot q_i \cdot k_j - b_i,\ 0)^\alpha, \qquad
  o_i = \frac{\sum_j w_{ij} v_j}{\sum_j w_{ij}},

and 0 where no key passes the threshold. Unlike a softmax it gives most keys a
weight of exactly 0. Numerator and denominator are plain sums over keys, so they
are added up block by block and every block is computed again for the gradient.

The ratio does not change if all weights of a query are divided by one number.
Here that is a power of two (exact in floating point) just above the largest
excess :math:`\text{scale} \cdot q_i \cdot k_j - b_i` among the keys that the
query sees, so that no power :math:`\alpha` overflows and some do not vanish.
Source: arXiv 2410.10165, definition of ReLU attention; it leaves 0/0 open.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks, _compat
from jaxattn._dispatch import Branch, dispatch
from jaxattn.attention import _relu, _rows
from jaxattn.numerics._dtypes import accumulator
from pallas_kernels.relu_attention import mosaic_gpu, mosaic_tpu
from pallas_kernels.relu_attention.operands import Gradients, Operands, Options

_IMPLEMENTATIONS = (None, "xla", "pallas", "pallas_interpret")


def relu_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  threshold: float | jax.Array = 0.0,
  alpha: int = 1,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  mask: jax.Array | None = None,
  implementation: str | None = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  r"""Attention with weights max(scale q.k - threshold, 0)^alpha, normalized.

  All keys are scored; no (T, S) array is ever held. A query that no key passes
  gives 0 with zero gradient, and so does one that sees no key. Where a score
  equals the threshold the derivative is taken to be 0. Reverse mode of any
  order works; forward mode (``jax.jvp``) with ``implementation="xla"`` alone.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    key: (B, S, K, H). K divides N: each key head serves N / K query heads.
    value: (B, S, K, Hv).
    threshold: what a scaled score must exceed to count; a real scalar, or
      (B, T, N), one for each query. May be traced; has a gradient.
    alpha: power of the weights, a positive integer.
    scale: factor on the scores; None = 1 / sqrt(H). May be traced.
    is_causal: query t sees keys 0 to t.
    mask: boolean, broadcastable to (B, N, T, S); True = attend.
    implementation: None = best of the platform, "xla" = tiles in XLA, "pallas"
      = the kernels of ``pallas_kernels.relu_attention``, "pallas_interpret" =
      those, interpreted on any platform.
    precision: of the matrix products.

  Returns:
    (B, T, N, Hv) of the dtype of ``query``.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, for instance "alpha
      must be >= 1, got 0".
    NotImplementedError: if the named implementation cannot run here.

  Cost:
    2 T S (2 H + Hv) flops a head forward, half of H's for the largest scores,
    and 5 T S (H + Hv) backward; a causal mask saves none. O(T + S) memory
    beside a tile of scores, also for the gradient.

  Source:
    arXiv 2410.10165 (ReLU^alpha attention), without its sparse search.

  Example:
    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 4, 16))
    >>> relu_attention(q, k, v, threshold=0.5, alpha=2).shape
    (1, 128, 4, 16)
  """
  query, key, value = map(jnp.asarray, (query, key, value))
  mask = None if mask is None else jnp.asarray(mask)
  sizes = _checks.check_attention(query, key, value, mask=mask)
  _checks.check_integer("alpha", alpha, 1, None)
  _checks.check_choice("implementation", implementation, _IMPLEMENTATIONS)
  _rows.check_options(scale, is_causal, None)
  threshold = _threshold(threshold, query)
  query, key, value, mask = map(_checks.four_dims, (query, key, value, mask))
  scale = 1 / math.sqrt(sizes.head_dim) if scale is None else scale
  x = Operands(
    query,
    key,
    value,
    jnp.broadcast_to(threshold, query.shape[:3]),
    jnp.asarray(scale, threshold.dtype),
    mask,
  )
  options = Options(alpha, is_causal, precision=precision)
  mesh = _compat.typeof(query).sharding.mesh
  call = _Call(
    implementation, options, _compat.AxisType.Explicit in mesh.axis_types
  )
  attend = functools.partial(_attend, call)
  out = _compat.over_explicit_axes(attend, query)(x)
  return out if sizes.batch else out[0]


def _threshold(threshold: Any, query: jax.Array) -> jax.Array:
  """A scalar, or (B, T, N), in the dtype of the scores."""
  if jnp.ndim(threshold) == 0:
    _checks.check_scalar("threshold", threshold)
  else:
    _checks.check_floating("threshold", threshold)
    meaning = "(B, T, N)" if query.ndim == 4 else "(T, N)"
    _checks.check_shape("threshold", threshold, query.shape[:-1], meaning)
  threshold = jnp.asarray(threshold, accumulator(query.dtype))
  return threshold[None] if threshold.ndim == 2 else threshold


class _Call(NamedTuple):
  """Static facts of one call.

  Attributes:
    implementation: as asked for.
    options: of the attention.
    on_mesh: whether operands lie on a mesh with explicit axes.
  """

  implementation: str | None
  options: Options
  on_mesh: bool


@functools.partial(jax.jit, static_argnums=0)
def _attend(call: _Call, x: Operands) -> jax.Array:
  if call.implementation == "xla":
    # Not inside a custom_vjp, which offers no forward mode.
    return _relu.forward(x, call.options)[0]
  return _attention(call, x)[0]


def _forward_pass(call: _Call, x: Operands) -> tuple[jax.Array, jax.Array]:
  return _dispatch(call, "forward", x)


_attention: Any = jax.custom_vjp(_forward_pass, nondiff_argnums=(0,))


def _attention_fwd(call: _Call, x: Operands) -> Any:
  out, norm = _attention(call, x)
  return (out, norm), (x, out, norm)


def _attention_bwd(call: _Call, residuals: Any, bars: Any) -> tuple[Operands]:
  x, out, norm = residuals
  bars = _gradients(call, x, out, norm, *bars)
  return (Operands(*_sum_like(bars, x[:5]), mask=None),)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _backward_pass(call: _Call, x: Operands, *rest: jax.Array) -> Gradients:
  return _dispatch(call, "backward", x, *rest)


_gradients: Any = jax.custom_vjp(_backward_pass, nondiff_argnums=(0,))


def _gradients_fwd(call: _Call, *args: Any) -> Any:
  return _gradients(call, *args), args


def _gradients_bwd(call: _Call, args: Any, bars: Any) -> Any:
  # Kernels have no derivatives: those of higher order are JAX's.
  x, *rest = args
  floats = (*x[:5], *rest)

  def gradients(*floats: jax.Array) -> Gradients:
    x_ = Operands(*floats[:5], mask=x.mask)
    return _relu.backward(x_, call.options, *floats[5:])

  _, vjp = jax.vjp(gradients, *floats)
  bars = _sum_like(vjp(bars), floats)
  return (Operands(*bars[:5], mask=None), *bars[5:])


_gradients.defvjp(_gradients_fwd, _gradients_bwd)


def _sum_like(bars: Any, primals: Any) -> list[jax.Array]:
  """Cotangents as ``shard_map`` wants them."""
  return [_compat.sum_like(*pair) for pair in zip(bars, primals, strict=True)]


def _dispatch(call: _Call, name: str, *args: Any) -> Any:
  """Runs a pass of the implementation that is asked for."""

  def branch(module: Any, **kwargs: Any) -> Any:
    def run(x: Operands, *rest: jax.Array) -> Any:
      return getattr(module, name)(x, call.options, *rest, **kwargs)

    return run

  def kernel(platform: str, module: Any) -> Branch:
    reason = module.supports(args[0], call.options)
    if call.on_mesh:
      reason = "a mesh with explicit axes needs jax.shard_map around the call"
    return Branch(branch(module), platform, reason)

  branches = {
    "xla": Branch(branch(_relu)),
    "pallas": (kernel("tpu", mosaic_tpu), kernel("cuda", mosaic_gpu)),
    "pallas_interpret": Branch(branch(mosaic_tpu, interpret=True)),
  }
  return dispatch(call.implementation, branches, *args)
