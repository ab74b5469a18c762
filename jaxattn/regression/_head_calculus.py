r"""The loss of one head of attention, and its derivatives in closed form.

Unknowns are flat, x = [vec X, vec Y]. All that is asked for is a sum over
queries, or a row for each of them: queries come in blocks, so that the (n1, n2)
weights never exist as a whole. ``Parts`` is what a block computes first.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks, newton
from jaxattn.softmax.jacobian import (
  softmax_jacobian_matvec,
  softmax_jacobian_matvec_jvp,
)

_MAX_DENSE = 4096
# Weights that a block of queries holds: what a cache holds, and not less than
# a product of matrices needs.
_BLOCK_ENTRIES = 1 << 17


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
    num_keys: (n1,), how many of the keys, from the first on, a query may see;
      None = all.
  """

  a1: jax.Array
  a2: jax.Array
  a3: jax.Array
  b: jax.Array
  ridge_x: jax.Array
  ridge_y: jax.Array
  bias: jax.Array | None = None
  num_keys: jax.Array | None = None


class Parts(NamedTuple):
  """What loss and derivatives of a block of queries share."""

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


# --- queries in blocks ---


def take_queries(
  data: AttentionRegressionData, take: Callable[[jax.Array], jax.Array]
) -> AttentionRegressionData:
  """The problem of some queries: ``take`` picks rows."""
  rows = data.a1, data.b, data.bias, data.num_keys
  a1, b, bias, num_keys = jax.tree.map(take, rows)
  return data._replace(a1=a1, b=b, bias=bias, num_keys=num_keys)


def over_queries(
  fn: Callable[..., tuple[Any, Any]],
  data: AttentionRegressionData,
  weight: jax.Array | None = None,
) -> tuple[Any, Any]:
  """Sums over queries and rows for each of them, a block at a time.

  ``fn`` is of data and weights of a block, and returns what is summed and what
  is kept by row.
  """
  n1 = len(data.a1)
  num = min(n1, -(-n1 * len(data.a2) // _BLOCK_ENTRIES))
  if num <= 1:
    return fn(data, weight)
  length = n1 // num

  def block(take: Callable[[jax.Array], jax.Array]) -> tuple[Any, Any]:
    return fn(take_queries(data, take), jax.tree.map(take, weight))

  def one(i: jax.Array) -> tuple[Any, Any]:
    return block(lambda z: lax.dynamic_slice_in_dim(z, i * length, length))

  def add(total: Any, i: jax.Array) -> tuple[Any, Any]:
    more, rows = one(i)
    return jax.tree.map(jnp.add, total, more), rows

  zeros = jax.tree.map(
    lambda z: jnp.zeros(z.shape, z.dtype), jax.eval_shape(one, 0)[0]
  )
  total, rows = lax.scan(add, zeros, jnp.arange(num))
  rows = jax.tree.map(lambda z: z.reshape(-1, *z.shape[2:]), rows)
  if n1 % num == 0:
    return total, rows
  more, rest = block(lambda z: z[num * length :])
  rows = jax.tree.map(lambda *z: jnp.concatenate(z), rows, rest)
  return jax.tree.map(jnp.add, total, more), rows


@jax.jit
def means(x: jax.Array, data: AttentionRegressionData) -> jax.Array:
  """S A3, (n1, d3)."""

  def some(data: AttentionRegressionData, _: Any) -> tuple[Any, jax.Array]:
    return (), weights(x, data) @ data.a3

  return over_queries(some, data)[1]


# --- loss and gradient ---


def weights(x: jax.Array, data: AttentionRegressionData) -> jax.Array:
  """S, of all queries that there are."""
  logits = data.a1 @ x @ data.a2.T
  if data.bias is not None:
    logits += data.bias
  if data.num_keys is not None:
    seen = jnp.arange(len(data.a2))[None] < data.num_keys[:, None]
    logits = jnp.where(seen, logits, -jnp.inf)
  return jax.nn.softmax(logits)


def parts_of(
  x: jax.Array, y: jax.Array, data: AttentionRegressionData
) -> Parts:
  s = weights(x, data)
  z = s @ data.a3
  return Parts(x, y, s, z, z @ y - data.b)


@jax.jit
def loss(x: jax.Array, data: AttentionRegressionData) -> jax.Array:
  matrix, y = split(x, data)
  return loss_of(means(matrix, data) @ y - data.b, matrix, y, data)


def loss_of(
  r: jax.Array, x: jax.Array, y: jax.Array, data: AttentionRegressionData
) -> jax.Array:
  """From all residuals."""
  penalty = data.ridge_x * (x**2).sum() + data.ridge_y * (y**2).sum()
  return ((r**2).sum() + penalty) / 2


@jax.jit
def value_and_grad(
  x: jax.Array, data: AttentionRegressionData
) -> tuple[jax.Array, jax.Array]:
  matrix, y = split(x, data)
  r, grad_x, grad_y = gradient(matrix, y, data)
  return loss_of(r, matrix, y, data), join(grad_x, grad_y)


def gradient(
  x: jax.Array, y: jax.Array, data: AttentionRegressionData
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Residuals, and the gradient with respect to X and to Y."""

  def some(data: AttentionRegressionData, _: Any) -> tuple[Any, jax.Array]:
    _, _, s, z, r = parts_of(x, y, data)
    p = softmax_jacobian_matvec(s, r @ y.T @ data.a3.T)
    return (data.a1.T @ (p @ data.a2), z.T @ r), r

  (grad_x, grad_y), r = over_queries(some, data)
  return r, grad_x + data.ridge_x * x, grad_y + data.ridge_y * y


# --- products with the Hessian ---


@functools.partial(jax.jit, static_argnames="exact")
def product(
  x: jax.Array,
  y: jax.Array,
  data: AttentionRegressionData,
  v: jax.Array,
  *,
  exact: bool,
) -> jax.Array:
  """The Hessian, or its Gauss-Newton part, times v."""
  dx, dy = split(v, data)

  def some(data: AttentionRegressionData, _: Any) -> tuple[Any, tuple[()]]:
    return _some_product(parts_of(x, y, data), data, dx, dy, exact=exact), ()

  (grad_x, grad_y), _ = over_queries(some, data)
  return join(grad_x + data.ridge_x * dx, grad_y + data.ridge_y * dy)


def _some_product(
  parts: Parts,
  data: AttentionRegressionData,
  dx: jax.Array,
  dy: jax.Array,
  *,
  exact: bool,
) -> tuple[jax.Array, jax.Array]:
  """What a block of queries adds to it, for X and for Y."""
  _, y, s, z, r = parts
  ds = softmax_jacobian_matvec(s, data.a1 @ dx @ data.a2.T)
  dz = ds @ data.a3
  dr = dz @ y + z @ dy
  grad_y = z.T @ dr
  if exact:
    q = r @ y.T @ data.a3.T
    dq = (dr @ y.T + r @ dy.T) @ data.a3.T
    dp = softmax_jacobian_matvec_jvp(s, ds, q, dq)
    grad_y += dz.T @ r
  else:
    dp = softmax_jacobian_matvec(s, dr @ y.T @ data.a3.T)
  return data.a1.T @ (dp @ data.a2), grad_y


# --- the Hessian by blocks of unknowns ---


class Pulled(NamedTuple):
  """What each query hands on: enough for its rows of the Jacobian."""

  w: jax.Array  # (n1, d2, dv)
  z: jax.Array  # (n1, d3)


def blocks(
  x: jax.Array,
  y: jax.Array,
  data: AttentionRegressionData,
  weight: jax.Array | None = None,
  *,
  exact: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """H_XX, H_XY and H_YY, with queries weighted if there are weights."""
  return blocks_and_rows(x, y, data, weight, exact=exact)[0]


@functools.partial(jax.jit, static_argnames="exact")
def blocks_and_rows(
  x: jax.Array,
  y: jax.Array,
  data: AttentionRegressionData,
  weight: jax.Array | None = None,
  *,
  exact: bool,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Pulled]:
  """The same, and what tells the Jacobian of each query."""
  (d1, d2), (d3, dv) = shapes(data)
  # Of keys alone: once for all queries.
  mixed, same = _pairs(data.a2, data.a3), _pairs(data.a2, data.a2)

  def some(
    data: AttentionRegressionData, weight: jax.Array | None
  ) -> tuple[Any, Pulled]:
    parts = parts_of(x, y, data)
    return _some_blocks(parts, data, weight, mixed, same if exact else None)

  (h_xx, h_xy, gram), rows = over_queries(some, data, weight)
  h_xx = h_xx.transpose(0, 2, 1, 3).reshape(d1 * d2, d1 * d2)
  h_yy = jnp.kron(gram, jnp.eye(dv, dtype=gram.dtype))
  found = (
    h_xx + data.ridge_x * jnp.eye(d1 * d2, dtype=h_xx.dtype),
    h_xy.reshape(d1 * d2, d3 * dv),
    h_yy + data.ridge_y * jnp.eye(d3 * dv, dtype=h_yy.dtype),
  )
  return found, rows


def _some_blocks(
  parts: Parts,
  data: AttentionRegressionData,
  weight: jax.Array | None,
  mixed: jax.Array,
  same: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Pulled]:
  """What a block of queries adds, without ridges; Gauss-Newton if no same."""
  _, y, s, z, r = parts
  a1, a2, a3 = data.a1, data.a2, data.a3
  (d1, d2), (d3, dv) = shapes(data)
  scaled = a1 if weight is None else weight[:, None] * a1
  mean = s @ a2
  c = (s @ mixed).reshape(-1, d2, d3) - _outer(mean, z)
  w = c @ y
  m = w @ w.swapaxes(1, 2)
  h_xy = _contract(_pairs(scaled, z), w).reshape(d1, d3, d2, dv)
  h_xy = h_xy.transpose(0, 2, 1, 3)
  if same is not None:
    p = softmax_jacobian_matvec(s, r @ y.T @ a3.T)
    pull = p @ a2
    m += (p @ same).reshape(-1, d2, d2)
    m -= _outer(pull, mean) + _outer(mean, pull)
    rest = _contract(_pairs(scaled, r), c).reshape(d1, dv, d2, d3)
    h_xy += rest.transpose(0, 2, 3, 1)
  h_xx = _contract(_pairs(scaled, a1), m).reshape(d1, d1, d2, d2)
  gram = z.T @ (z if weight is None else weight[:, None] * z)
  return (h_xx, h_xy, gram), Pulled(w, z)


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


def check_dense(
  data: AttentionRegressionData, advice: str = "linear_solver='cg'"
) -> None:
  if size(data) > _MAX_DENSE:
    raise ValueError(
      f"dense Hessian of size d1*d2 + d3*dv = {size(data)} exceeds max_dense = "
      f"{_MAX_DENSE}; use {advice}"
    )


def dense(
  x: jax.Array, data: AttentionRegressionData, *, exact: bool
) -> newton.DenseCurvature:
  check_dense(data)
  found = blocks(*split(x, data), data, exact=exact)
  return newton.DenseCurvature(assemble(found))


def operator(
  x: jax.Array, data: AttentionRegressionData, *, exact: bool
) -> newton.OperatorCurvature:
  matvec = functools.partial(product, exact=exact)
  return newton.OperatorCurvature(
    jax.tree_util.Partial(matvec, *split(x, data), data)
  )
