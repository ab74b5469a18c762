r"""A minimizer as a differentiable function of the data.

At a minimum :math:`g(x^*, d) = 0`, hence
:math:`dx^*/dd = -H^{-1} \partial g / \partial d`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.newton import _solve
from jaxattn.newton.curvature import (
  Curvature,
  StructuredCurvature,
  curvature_dense,
)
from jaxattn.newton.minimize import NewtonConfig, minimize
from jaxattn.newton.problem import Problem


def implicit_solution(
  problem: Problem,
  x0: jax.Array,
  data: Any,
  *,
  config: NewtonConfig = NewtonConfig(),
  rng: jax.Array | None = None,
) -> jax.Array:
  r"""The minimizer that Newton's method finds, with a gradient in the data.

  .. math:: \bar d = -\Big(\frac{\partial g}{\partial d}\Big)^\top
    H^{-1} \bar x

  Nothing is differentiated through the iteration: the gradient is right where
  it has converged, and to the accuracy to which it has.

  Args:
    problem: as for :func:`jaxattn.newton.minimize`; with an exact curvature.
    x0: (p,), the start, on which the result does not depend to first order: its
      gradient is 0.
    data: pytree of arrays, differentiated in where they are floating.
    config: static options of the solver.
    rng: PRNG key; needed with a sketch only. The gradient is exact.

  Returns:
    (p,), the minimizer.

  Raises:
    ValueError: as :func:`jaxattn.newton.minimize`; if the problem has no exact
      curvature.

  Cost:
    The solver's; the gradient adds one factorization of H, or conjugate
    gradients with ``linear_solver="cg"``; with ``"dual"`` one of an (n, n)
    matrix, for a structured Hessian whose constant is a scalar.

  Source:
    the implicit function theorem.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn import newton
    >>> problem = newton.least_squares_problem(lambda x, y: x**2 - y)
    >>> def root(y):
    ...   return newton.implicit_solution(problem, jnp.ones(1), y)[0]
    >>> print(round(float(jax.grad(root)(jnp.array([4.0]))[0]), 3))
    0.25
  """
  if problem.curvature is None:
    raise ValueError("curvature='newton' is not provided by this problem")
  return _solution(problem, config, jnp.asarray(x0), data, rng)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _solution(
  problem: Problem,
  config: NewtonConfig,
  x0: jax.Array,
  data: Any,
  rng: jax.Array | None,
) -> jax.Array:
  return minimize(problem, x0, data, config=config, rng=rng).x


def _solution_fwd(
  problem: Problem,
  config: NewtonConfig,
  x0: jax.Array,
  data: Any,
  rng: jax.Array | None,
) -> tuple[jax.Array, Any]:
  x = minimize(problem, x0, data, config=config, rng=rng).x
  return x, (x, data)


def _solution_bwd(
  problem: Problem, config: NewtonConfig, residuals: Any, cotangent: jax.Array
) -> tuple[Any, ...]:
  x, data = residuals
  assert problem.curvature is not None
  curvature = problem.curvature(x, data)
  u = _solve_exact(curvature, cotangent, config.linear_solver)
  _, pull = jax.vjp(lambda d: problem.value_and_grad(x, d)[1], data)
  (d_data,) = pull(-u)
  return jnp.zeros_like(x), d_data, None


def _solve_exact(
  curvature: Curvature, b: jax.Array, linear_solver: str
) -> jax.Array:
  """H^-1 b; no matrix larger than the solver had is formed."""
  zero = jnp.zeros((), b.dtype)
  if linear_solver == "cg":
    eps = float(jnp.finfo(b.dtype).eps)
    return _solve.cg_solve(curvature, b, zero, eps)
  # The solver may have had another curvature than the exact one.
  if (
    linear_solver == "dual"
    and isinstance(curvature, StructuredCurvature)
    and not jnp.ndim(curvature.const)
  ):
    return _solve.structured_solver(curvature, b, dual=True)(zero)
  matrix = curvature_dense(curvature, dim=len(b), dtype=b.dtype)
  return jnp.linalg.solve(matrix, b)


_solution.defvjp(_solution_fwd, _solution_bwd)
