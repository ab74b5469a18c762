r"""The loss of one head of attention, and its derivatives in closed form.

Unknowns are flat, x = [vec X, vec Y]. What loss, gradient and Hessian have in
common stands in ``Parts``, so that many products at one point compute it once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import _checks, newton
from jaxattn.softmax.jacobian import (
  softmax_jacobian_matvec,
  softmax_jacobian_matvec_jvp,
)

_MAX_DENSE = 4096


class AttentionRegressionData(NamedTuple):
  """One problem.

  Attributes:
    a1: (n1, d1), inputs of queries.
    a2: (n2, d2), inputs of keys.
    a3: (n2, d3), inputs of values.
    b: (n1, dv), targets.
    ridge_x: (), lambda of X.
    ridge_y: (), lambda of Y.
    bias: (n1, n2), added to the logits, -inf where a key is hidden; or None.
  """

  a1: jax.Array
  a2: jax.Array
  a3: jax.Array
  b: jax.Array
  ridge_x: jax.Array
  ridge_y: jax.Array
  bias: jax.Array | None = None


class Parts(NamedTuple):
  """What loss and derivatives share."""

  x: jax.Array
  y: jax.Array
  s: jax.Array
  z: jax.Array  # S A3
  r: jax.Array  # S A3 Y - B


def shapes(
  data: AttentionRegressionData,
) -> tuple[tuple[int, int], tuple[int, int]]:
  x = data.a1.shape[1], data.a2.shape[1]
  return x, (data.a3.shape[1], data.b.shape[1])


def size(data: AttentionRegressionData) -> int:
  (d1, d2), (d3, dv) = shapes(data)
  return d1 * d2 + d3 * dv


def split(
  x: jax.Array, data: AttentionRegressionData
) -> tuple[jax.Array, jax.Array]:
  _checks.check_shape("x", x, (size(data),), "(d1 d2 + d3 dv,)")
  shape_x, shape_y = shapes(data)
  num = shape_x[0] * shape_x[1]
  return x[:num].reshape(shape_x), x[num:].reshape(shape_y)


def join(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.concatenate([x.reshape(-1), y.reshape(-1)])


def weights(
  x: jax.Array, a1: jax.Array, a2: jax.Array, bias: jax.Array | None
) -> jax.Array:
  logits = a1 @ x @ a2.T
  return jax.nn.softmax(logits if bias is None else logits + bias)


def parts_of(
  x: jax.Array, y: jax.Array, data: AttentionRegressionData
) -> Parts:
  s = weights(x, data.a1, data.a2, data.bias)
  z = s @ data.a3
  return Parts(x, y, s, z, z @ y - data.b)


def loss(x: jax.Array, data: AttentionRegressionData) -> jax.Array:
  return loss_of(parts_of(*split(x, data), data), data)


def value_and_grad(
  x: jax.Array, data: AttentionRegressionData
) -> tuple[jax.Array, jax.Array]:
  parts = parts_of(*split(x, data), data)
  return loss_of(parts, data), join(*gradient(parts, data))


def loss_of(parts: Parts, data: AttentionRegressionData) -> jax.Array:
  penalty = data.ridge_x * (parts.x**2).sum()
  penalty += data.ridge_y * (parts.y**2).sum()
  return ((parts.r**2).sum() + penalty) / 2


def gradient(
  parts: Parts, data: AttentionRegressionData
) -> tuple[jax.Array, jax.Array]:
  x, y, s, z, r = parts
  p = softmax_jacobian_matvec(s, r @ y.T @ data.a3.T)
  return (
    data.a1.T @ (p @ data.a2) + data.ridge_x * x,
    z.T @ r + data.ridge_y * y,
  )


def tangent(
  parts: Parts, data: AttentionRegressionData, dx: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Changes of S, of S A3 and of the output."""
  ds = softmax_jacobian_matvec(parts.s, data.a1 @ dx @ data.a2.T)
  dz = ds @ data.a3
  return ds, dz, dz @ parts.y + parts.z @ dy


def product(
  parts: Parts, data: AttentionRegressionData, v: jax.Array, *, exact: bool
) -> jax.Array:
  """The Hessian, or its Gauss-Newton part, times v."""
  _, y, s, z, r = parts
  dx, dy = split(v, data)
  ds, dz, dr = tangent(parts, data, dx, dy)
  grad_y = z.T @ dr
  if exact:
    q = r @ y.T @ data.a3.T
    dq = (dr @ y.T + r @ dy.T) @ data.a3.T
    dp = softmax_jacobian_matvec_jvp(s, ds, q, dq)
    grad_y += dz.T @ r
  else:
    dp = softmax_jacobian_matvec(s, dr @ y.T @ data.a3.T)
  grad_x = data.a1.T @ (dp @ data.a2)
  return join(grad_x + data.ridge_x * dx, grad_y + data.ridge_y * dy)


def blocks(
  parts: Parts,
  data: AttentionRegressionData,
  weight: jax.Array | None,
  *,
  exact: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """H_XX, H_XY and H_YY, with queries weighted if there are weights."""
  _, y, s, z, r = parts
  a1, a2, a3 = data.a1, data.a2, data.a3
  (d1, d2), (d3, dv) = shapes(data)
  scaled = a1 if weight is None else weight[:, None] * a1
  mean = s @ a2
  c = (s @ _pairs(a2, a3)).reshape(-1, d2, d3) - _outer(mean, z)
  w = c @ y
  m = w @ w.swapaxes(1, 2)
  mixed = _contract(_pairs(scaled, z), w).reshape(d1, d3, d2, dv)
  h_xy = mixed.transpose(0, 2, 1, 3)
  if exact:
    p = softmax_jacobian_matvec(s, r @ y.T @ a3.T)
    pull = p @ a2
    m += (p @ _pairs(a2, a2)).reshape(-1, d2, d2)
    m -= _outer(pull, mean) + _outer(mean, pull)
    mixed = _contract(_pairs(scaled, r), c).reshape(d1, dv, d2, d3)
    h_xy += mixed.transpose(0, 2, 3, 1)
  h_xx = _contract(_pairs(scaled, a1), m).reshape(d1, d1, d2, d2)
  h_xx = h_xx.transpose(0, 2, 1, 3).reshape(d1 * d2, d1 * d2)
  gram = z.T @ (z if weight is None else weight[:, None] * z)
  h_yy = jnp.kron(gram, jnp.eye(dv, dtype=gram.dtype))
  return (
    h_xx + data.ridge_x * jnp.eye(d1 * d2, dtype=h_xx.dtype),
    h_xy.reshape(d1 * d2, d3 * dv),
    h_yy + data.ridge_y * jnp.eye(d3 * dv, dtype=h_yy.dtype),
  )


def _pairs(a: jax.Array, b: jax.Array) -> jax.Array:
  """All products of an entry of a row of a with one of the same row of b."""
  return _outer(a, b).reshape(len(a), -1)


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
  return a[:, :, None] * b[:, None, :]


def _contract(a: jax.Array, b: jax.Array) -> jax.Array:
  """Sums over rows, of all products of entries."""
  return a.T @ b.reshape(len(b), -1)


def assemble(parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
  h_xx, h_xy, h_yy = parts
  return jnp.block([[h_xx, h_xy], [h_xy.T, h_yy]])


def check_dense(data: AttentionRegressionData) -> None:
  if size(data) > _MAX_DENSE:
    raise ValueError(
      f"dense Hessian of size {size(data)} exceeds max_dense = {_MAX_DENSE}; "
      "use linear_solver='cg'"
    )


def dense(
  x: jax.Array, data: AttentionRegressionData, *, exact: bool
) -> newton.DenseCurvature:
  check_dense(data)
  parts = parts_of(*split(x, data), data)
  return newton.DenseCurvature(assemble(blocks(parts, data, None, exact=exact)))


def operator(
  x: jax.Array, data: AttentionRegressionData, *, exact: bool
) -> newton.OperatorCurvature:
  parts = parts_of(*split(x, data), data)
  matvec = functools.partial(product, exact=exact)
  return newton.OperatorCurvature(jax.tree_util.Partial(matvec, parts, data))
