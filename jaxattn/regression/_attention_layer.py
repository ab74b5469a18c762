r"""The attention layer of an inversion, its derivative and the adjoint of that.

Heads are a leading axis throughout. All that the gradient, the Gauss-Newton
matrix and the Hessian have in common stands in ``Parts`` and ``Slopes``, so
that many products at one point compute it once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.softmax.jacobian import (
  softmax_jacobian_matvec,
  softmax_jacobian_matvec_jvp,
)


class AttentionInversionData(NamedTuple):
  """One problem; heads are stacked even if there is one.

  Attributes:
    w: (N, d, d), queries against keys of each head.
    v: (N, d, Hv); None if no output is observed.
    weights: (N, n, n), the observed S, or None.
    output: (N, n, Hv), the observed O, or None.
    ridge: ().
    bias: (n, n), added to the logits: minus infinity on masked keys; None = 0.
  """

  w: jax.Array
  v: jax.Array | None
  weights: jax.Array | None
  output: jax.Array | None
  ridge: jax.Array
  bias: jax.Array | None


class Parts(NamedTuple):
  """What loss and derivatives share."""

  tokens: jax.Array
  left: jax.Array  # T W
  right: jax.Array  # T W^T
  probs: jax.Array  # S
  values: jax.Array | None  # T V
  output: jax.Array | None  # O


class Slopes(NamedTuple):
  """What the gradient leaves behind for products with the Hessian."""

  parts: Parts
  data: AttentionInversionData
  gap: jax.Array | None  # O minus what was observed.
  upper: jax.Array  # G: of the loss with respect to S.
  inner: jax.Array  # E: of the loss with respect to the logits.


def num_tokens(data: AttentionInversionData) -> int:
  """The number of tokens that were observed."""
  observed = data.output if data.weights is None else data.weights
  assert observed is not None
  return observed.shape[-2]


def parts_of(x: jax.Array, data: AttentionInversionData) -> Parts:
  d = data.w.shape[-1]
  _checks.check_shape("x", x, (num_tokens(data) * d,), "(n d,)")
  return layer(x.reshape(-1, d), data.w, data.v, data.bias)


def layer(
  tokens: jax.Array,
  w: jax.Array,
  v: jax.Array | None,
  bias: jax.Array | None,
) -> Parts:
  left = tokens @ w
  logits = left @ tokens.T
  if bias is not None:
    logits += bias[None]
  probs = jax.nn.softmax(logits)
  values = None if v is None else tokens @ v
  output = None if values is None else probs @ values
  right = tokens @ w.transpose(0, 2, 1)
  return Parts(tokens, left, right, probs, values, output)


def residuals(
  parts: Parts, data: AttentionInversionData
) -> tuple[jax.Array | None, jax.Array | None]:
  weights = None if data.weights is None else parts.probs - data.weights
  if parts.output is None or data.output is None:
    return weights, None
  return weights, parts.output - data.output


def loss_of(parts: Parts, data: AttentionInversionData) -> jax.Array:
  total = data.ridge * (parts.tokens**2).sum()
  for residual in residuals(parts, data):
    if residual is not None:
      total += (residual**2).sum()
  return total / 2


def push(
  parts: Parts, data: AttentionInversionData, tokens_dot: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
  """How S, O and the values T V change with the tokens."""
  logits_dot = tokens_dot @ parts.right.transpose(0, 2, 1)
  logits_dot += parts.left @ tokens_dot.T
  probs_dot = softmax_jacobian_matvec(parts.probs, logits_dot)
  if data.v is None or parts.values is None:
    return probs_dot, None, None
  values_dot = tokens_dot @ data.v
  output_dot = probs_dot @ parts.values + parts.probs @ values_dot
  return probs_dot, output_dot, values_dot


def pull(
  parts: Parts,
  data: AttentionInversionData,
  upper: jax.Array | None,
  gap: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The adjoint: back to the tokens, with G and E on the way.

  ``upper`` weighs S, and ``gap`` O, where they were observed.
  """
  if gap is not None:
    through = _outer(gap, parts.values)
    upper = through if upper is None else upper + through
  assert upper is not None
  inner = softmax_jacobian_matvec(parts.probs, upper)
  grad = _to_tokens(inner, parts.right, parts.left)
  if gap is not None:
    grad += _through_values(_mix(parts.probs, gap), data)
  return grad, upper, inner


def _to_tokens(
  inner: jax.Array, right: jax.Array, left: jax.Array
) -> jax.Array:
  """E T W^T + E^T T W, summed over heads: T enters the logits twice."""
  grad = jnp.einsum("hij,hjd->id", inner, right)
  return grad + jnp.einsum("hij,hid->jd", inner, left)


def _mix(probs: jax.Array, gap: jax.Array) -> jax.Array:
  return jnp.einsum("hij,hik->hjk", probs, gap)


def _outer(gap: jax.Array, values: jax.Array | None) -> jax.Array:
  assert values is not None
  return jnp.einsum("hik,hjk->hij", gap, values)


def _through_values(
  mixed: jax.Array, data: AttentionInversionData
) -> jax.Array:
  assert data.v is not None
  return jnp.einsum("hjk,hdk->jd", mixed, data.v)


def slopes_of(x: jax.Array, data: AttentionInversionData) -> Slopes:
  parts = parts_of(x, data)
  weights, gap = residuals(parts, data)
  _, upper, inner = pull(parts, data, weights, gap)
  return Slopes(parts, data, gap, upper, inner)


def hessian_product(slopes: Slopes, v: jax.Array) -> jax.Array:
  parts, data, gap, upper, inner = slopes
  dot = v.reshape(parts.tokens.shape)
  probs_dot, output_dot, values_dot = push(parts, data, dot)
  upper_dot = jnp.zeros_like(probs_dot) if data.weights is None else probs_dot
  if gap is not None and output_dot is not None and values_dot is not None:
    upper_dot += _outer(output_dot, parts.values) + _outer(gap, values_dot)
  inner_dot = softmax_jacobian_matvec_jvp(
    parts.probs, probs_dot, upper, upper_dot
  )
  out = _to_tokens(inner_dot, parts.right, parts.left)
  out += jnp.einsum("hic,hdc->id", inner @ dot, data.w)
  out += jnp.einsum("hjc,hcd->jd", inner.transpose(0, 2, 1) @ dot, data.w)
  if gap is not None and output_dot is not None:
    mixed = _mix(probs_dot, gap) + _mix(parts.probs, output_dot)
    out += _through_values(mixed, data)
  return (out + data.ridge * dot).reshape(-1)


def gauss_newton_product(
  parts: Parts, data: AttentionInversionData, v: jax.Array
) -> jax.Array:
  dot = v.reshape(parts.tokens.shape)
  probs_dot, output_dot, _ = push(parts, data, dot)
  seen = None if data.weights is None else probs_dot
  grad, _, _ = pull(parts, data, seen, output_dot)
  return (grad + data.ridge * dot).reshape(-1)


def dense_hessian(slopes: Slopes) -> jax.Array:
  """The Hessian as a matrix, (n d, n d), in a few large products.

  With K_i, (n, n), the second derivative with respect to the logits of row i
  and l_ij = t_i W t_j, all of it is contractions of K with T W and T W^T, and
  of what mixes logits and values. Half is computed of what comes with its
  transpose.
  """
  parts, data, gap, _, inner = slopes
  _, left, right, probs, _, _ = parts
  n, d = parts.tokens.shape
  eye = jnp.eye(n, dtype=probs.dtype)
  rows = _logits_hessian(slopes, eye)
  through = jnp.einsum("hijk,hkc->hijc", rows, right)
  half = jnp.einsum("hijc,hie->icje", through, left)
  half += jnp.einsum("hij,hce->icje", inner, data.w)
  block = jnp.einsum("hjc,hije->ice", right, through)
  both = _over_rows(rows, left, left)
  both += jnp.einsum("ij,ice->icje", eye, block)
  if gap is not None and data.v is not None:
    half += _mixed_half(slopes, gap, data.v, eye)
    seen = jnp.einsum("hki,hkj->hij", probs, probs)
    gram = jnp.einsum("hcq,heq->hce", data.v, data.v)
    both += jnp.einsum("hij,hce->icje", seen, gram)
  half, both = (x.reshape(n * d, n * d) for x in (half, both))
  return both + half + half.T + data.ridge * jnp.eye(n * d, dtype=both.dtype)


def _logits_hessian(slopes: Slopes, eye: jax.Array) -> jax.Array:
  """K, (N, n, n, n): diagonal plus low rank for each row of logits."""
  parts, data, gap, _, diagonal = slopes
  probs, lean = parts.probs, diagonal
  if data.weights is not None:
    squares = probs**2
    diagonal = diagonal + squares
    lean = diagonal - probs * squares.sum(-1, keepdims=True) / 2
  outer = jnp.einsum("hij,hik->hijk", lean, probs)
  rows = jnp.einsum("hij,jk->hijk", diagonal, eye) - outer
  rows -= outer.swapaxes(2, 3)
  if gap is not None and parts.output is not None:
    moved = _centered(probs, parts.values, parts.output)
    rows += jnp.einsum("hijq,hikq->hijk", moved, moved)
  return rows


def _mixed_half(
  slopes: Slopes, gap: jax.Array, v: jax.Array, eye: jax.Array
) -> jax.Array:
  """Second derivatives by logits and by values, one way round."""
  _, left, right, probs, values, output = slopes.parts
  assert values is not None
  assert output is not None
  back = jnp.einsum("hjq,hcq->hjc", values, v)
  mean = jnp.einsum("hiq,hcq->hic", output, v)
  pull = jnp.einsum("hiq,hcq->hic", gap, v)
  moved = _centered(probs, back, mean)
  local = jnp.einsum("hjc,hije->hice", right, moved)
  half = jnp.einsum("hij,hice->icje", probs, local)
  turned = _centered(probs, right, probs @ right)
  half += jnp.einsum("hijc,hie->icje", turned, pull)
  pairs = jnp.einsum("hki,hkj->hkij", probs, probs)
  half += jnp.einsum("hkij,hkc,hie->icje", pairs, left, back)
  half -= _over_rows(pairs, left, mean + pull)
  own = jnp.einsum("hki,hkc,hke->ice", probs, left, pull)
  return half + jnp.einsum("ij,ice->icje", eye, own)


def _over_rows(rows: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  """The sum over heads and rows k of rows_kij x_kc y_ke: one large product."""
  pairs = jnp.einsum("hkc,hke->hkce", x, y)
  return jnp.einsum("hkij,hkce->icje", rows, pairs)


def _centered(
  probs: jax.Array, x: jax.Array | None, mean: jax.Array
) -> jax.Array:
  """The Jacobian of each row's softmax times x, (N, n, n, q)."""
  assert x is not None
  return probs[..., None] * (x[:, None] - mean[:, :, None])
