"""Linear systems (H + shift I) x = b, by the kinds of curvature."""

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


def structured_solve(
  curvature: StructuredCurvature,
  b: jax.Array,
  shift: jax.Array,
  *,
  dual: bool,
) -> jax.Array:
  """The low-rank part apart, by Woodbury's identity; its core may be singular.

  What is left is factored as a (p, p) matrix, or for ``dual``, where p > n and
  the constant is a multiple of the identity, as an (n, n) one.
  """
  a, weight, low, core, const, _ = curvature
  if dual:
    shift = shift + const
    rows = design_rows(a, jnp.arange(len(weight)))
    small = weight[:, None] * (rows @ rows.T)
    small += shift * jnp.eye(len(rows), dtype=rows.dtype)
    both = jnp.concatenate([low, b[:, None]], 1)
    y = jnp.linalg.solve(small, weight[:, None] * (rows @ both))
    both = (both - rows.T @ y) / shift
  else:
    gram = weighted_gram(a, weight)
    if jnp.ndim(const):
      gram += const
    else:
      shift = shift + const
    factor = cholesky_factor(gram, shift)
    both = cholesky_solve(factor, jnp.concatenate([low, b[:, None]], 1))
  left, right = both[:, :-1], both[:, -1]
  if not len(core):
    return right
  capacity = jnp.eye(len(core), dtype=core.dtype) + core @ (low.T @ left)
  return right - left @ jnp.linalg.solve(capacity, core @ (low.T @ right))


def cg_solve(
  curvature: Curvature,
  b: jax.Array,
  shift: jax.Array,
  tol: jax.Array | float,
) -> jax.Array:
  """Conjugate gradients up to a relative residual, or negative curvature."""
  limit = (tol * jnp.linalg.norm(b)) ** 2

  def cond(state: tuple[jax.Array, ...]) -> jax.Array:
    _, _, _, residual, num, stop = state
    return (residual > limit) & (num < 2 * len(b)) & ~stop

  def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    x, r, p, residual, num, _ = state
    product = curvature_matvec(curvature, p) + shift * p
    bend = p @ product
    stop = ~(bend > 0)
    step = jnp.where(stop, 0, residual / jnp.where(stop, 1, bend))
    x, r = x + step * p, r - step * product
    # The first direction is one of descent, whatever the curvature.
    x = jnp.where(stop & (num == 0), p, x)
    new = r @ r
    return x, r, r + new / residual * p, new, num + 1, stop

  start = (
    jnp.zeros_like(b),
    b,
    b,
    b @ b,
    jnp.zeros((), jnp.int32),
    jnp.zeros((), bool),
  )
  return lax.while_loop(cond, body, start)[0]
