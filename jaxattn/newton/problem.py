r"""What a solver needs to know of a regression problem.

A problem is a few pure functions of a flat unknown x, (p,), and of its data,
any pytree of arrays. Nothing in it is an array, so that it is hashable and
static under ``jit``: call :func:`jaxattn.newton.minimize` with new data as
often as wanted, it compiles once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxattn import _checks
from jaxattn.newton.curvature import Curvature, OperatorCurvature


class Problem(NamedTuple):
  """A regression problem: pure functions of (x, data).

  Attributes:
    loss: (x, data) -> (), never NaN inside the domain.
    value_and_grad: (x, data) -> ((), (p,)), in closed form where there is one.
    curvature: (x, data) -> a ``Curvature``, the exact Hessian; None = there is
      none, and only ``gauss_newton`` is used.
    gauss_newton: the same for its positive semidefinite part; None = not
      provided.
    in_domain: (x, data) -> boolean (); None = everywhere. What the other
      functions return outside does not matter.
    expand: (x, data) -> ((), (p,), h), what ``value_and_grad`` returns and a
      ``jax.tree_util.Partial`` that makes of the same data what ``curvature``
      does: h(data). One pass over the data where the two take one each; h
      itself should hold none of them. None = the solver calls the two. If
      given, it is taken in their place, so replace it with either.
  """

  loss: Callable[[jax.Array, Any], jax.Array]
  value_and_grad: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]
  curvature: Callable[[jax.Array, Any], Curvature] | None = None
  gauss_newton: Callable[[jax.Array, Any], Curvature] | None = None
  in_domain: Callable[[jax.Array, Any], jax.Array] | None = None
  expand: (
    Callable[[jax.Array, Any], tuple[jax.Array, jax.Array, Partial]] | None
  ) = None


@functools.lru_cache(maxsize=64)
def least_squares_problem(
  residual: Callable[[jax.Array, Any], jax.Array], *, ridge: float = 0.0
) -> Problem:
  r"""The least-squares problem of a residual, differentiated by JAX.

  .. math:: L(x) = \tfrac12 \|r(x)\|^2 + \tfrac12 \lambda \|x\|^2, \qquad
    H \approx J^\top J + \lambda I

  Args:
    residual: (x, data) -> (r,), hashable; x is flat.
    ridge: lambda, at least 0.

  Returns:
    A :class:`Problem` whose curvatures are products with vectors: the exact
    Hessian and its Gauss-Newton part. The same call gives the same object.

  Raises:
    ValueError: if ``ridge`` is negative.

  Cost:
    A product with J and one with its transpose for each product with a vector,
    twice that for the exact Hessian; no (r, p) or (p, p) array.

  Source:
    the Gauss-Newton method.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn import newton
    >>> problem = newton.least_squares_problem(lambda x, y: x**2 - y)
    >>> found = newton.minimize(problem, jnp.ones(2), jnp.array([4.0, 9.0]))
    >>> print(found.x)
    [2. 3.]
  """
  _checks.check_nonnegative("ridge", ridge)

  def loss(x: jax.Array, data: Any) -> jax.Array:
    r = residual(x, data)
    return ((r**2).sum() + ridge * (x**2).sum()) / 2

  def value_and_grad(x: jax.Array, data: Any) -> tuple[jax.Array, jax.Array]:
    return jax.value_and_grad(loss)(x, data)

  def curvature(x: jax.Array, data: Any) -> OperatorCurvature:
    _, product = jax.linearize(lambda z: jax.grad(loss)(z, data), x)
    return OperatorCurvature(Partial(product))

  def gauss_newton(x: jax.Array, data: Any) -> OperatorCurvature:
    _, push = jax.linearize(lambda z: residual(z, data), x)
    pull = jax.linear_transpose(push, x)

    def product(v: jax.Array) -> jax.Array:
      return pull(push(v))[0] + jnp.asarray(ridge, v.dtype) * v

    return OperatorCurvature(Partial(product))

  return Problem(loss, value_and_grad, curvature, gauss_newton)
