"""Linear systems (H + shift I) x = b, by the kinds of curvature."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy import linalg

from jaxattn.newton.curvature import (
  Curvature,
  StructuredCurvature,
  curvature_matvec,
  design_rows,
  weighted_gram,
)


def cholesky_factor(matrix: jax.Array, shift: jax.Array) -> jax.Array:
  """Lower factor of matrix + shift I; NaN where that is not positive."""
  return jnp.linalg.cholesky(
    matrix + shift * jnp.eye(len(matrix), dtype=matrix.dtype)
  )


def cholesky_solve(factor: jax.Array, b: jax.Array) -> jax.Array:
  return linalg.cho_solve((factor, True), b)


def structured_solver(
  curvature: StructuredCurvature, b: jax.Array, *, dual: bool
) -> Callable[[jax.Array], jax.Array]:
  """Shift -> (H + shift I)^-1 b, the low-rank part apart, by Woodbury.

  The core may be singular. What is left is a (p, p) matrix, or for ``dual``,
  where p > n and the constant is a multiple of the identity, an (n, n) one. It
  may be indefinite though H is not, so that it is solved by elimination.
  """
  low, core = curvature.low, curvature.core
  both = jnp.concatenate([low, b[:, None]], 1)
  solve_rest = (_dual_rest if dual else _rest)(curvature, both)

  def solve(shift: jax.Array) -> jax.Array:
    solved = solve_rest(shift)
    left, right = solved[:, :-1], solved[:, -1]
    if not len(core):
      return right
    capacity = jnp.eye(len(core), dtype=core.dtype) + core @ (low.T @ left)
    return right - left @ jnp.linalg.solve(capacity, core @ (low.T @ right))

  return solve


def _rest(
  curvature: StructuredCurvature, b: jax.Array
) -> Callable[[jax.Array], jax.Array]:
  const, p = curvature.const, len(b)
  eye = jnp.eye(p, dtype=b.dtype)
  gram = weighted_gram(curvature.design, curvature.weight)
  gram += const if jnp.ndim(const) else const * eye
  return lambda shift: jnp.linalg.solve(gram + shift * eye, b)


def _dual_rest(
  curvature: StructuredCurvature, b: jax.Array
) -> Callable[[jax.Array], jax.Array]:
  a, weight = curvature.design, curvature.weight
  rows = design_rows(a, jnp.arange(len(weight)))
  gram = weight[:, None] * (rows @ rows.T)
  right = weight[:, None] * (rows @ b)
  eye = jnp.eye(len(rows), dtype=rows.dtype)

  def solve(shift: jax.Array) -> jax.Array:
    ridge = shift + curvature.const
    return (b - rows.T @ jnp.linalg.solve(gram + ridge * eye, right)) / ridge

  return solve


def cg_solve(
  curvature: Curvature,
  b: jax.Array,
  shift: jax.Array,
  tol: jax.Array | float,
  factor: jax.Array | None = None,
) -> jax.Array:
  """Conjugate gradients up to a relative residual, or negative curvature.

  ``factor``, a lower Cholesky factor of about the same matrix, preconditions
  them.
  """
  limit = (tol * jnp.linalg.norm(b)) ** 2

  def precondition(r: jax.Array) -> jax.Array:
    return r if factor is None else cholesky_solve(factor, r)

  def cond(state: tuple[jax.Array, ...]) -> jax.Array:
    _, r, _, _, num, stop = state
    return (r @ r > limit) & (num < 2 * len(b)) & ~stop

  def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    x, r, p, residual, num, _ = state
    product = curvature_matvec(curvature, p) + shift * p
    bend = p @ product
    stop = ~(bend > 0)
    step = jnp.where(stop, 0, residual / jnp.where(stop, 1, bend))
    x, r = x + step * p, r - step * product
    # The first direction is one of descent, whatever the curvature.
    x = jnp.where(stop & (num == 0), p, x)
    z = precondition(r)
    new = r @ z
    return x, r, z + new / residual * p, new, num + 1, stop

  first = precondition(b)
  start = (
    jnp.zeros_like(b),
    b,
    first,
    b @ first,
    jnp.zeros((), jnp.int32),
    jnp.zeros((), bool),
  )
  return lax.while_loop(cond, body, start)[0]
