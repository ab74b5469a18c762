r"""Fixed points: iterating a map until it stands still, and differentiating.

At :math:`x = f(\theta, x)` the implicit function theorem gives

.. math:: \bar\theta = \Big(\frac{\partial f}{\partial \theta}\Big)^\top u,
  \qquad (I - J^\top) u = \bar x, \qquad J = \frac{\partial f}{\partial x},

whatever way the point was found: nothing is kept of the iteration.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import gmres

from jaxattn import _checks

# Up to here the Jacobian is formed and solved with.
_DENSE_SIZE = 512


class FixedPointResult(NamedTuple):
  """Where an iteration ended.

  Attributes:
    x: the last iterate, a pytree like the start.
    residuals: (), largest change of any entry in the last step, 1 for an
      integer that is another one; with ``record`` (max_steps,) of all steps,
      NaN for those that were not taken.
    num_steps: (), int32, applications of the map.
    converged: (), whether the last residual is no larger than ``tol``.
  """

  x: Any
  residuals: jax.Array
  num_steps: jax.Array
  converged: jax.Array


def fixed_point_iteration(
  f: Callable[[Any], Any],
  x0: Any,
  *,
  tol: float | jax.Array = 0.0,
  max_steps: int,
  record: bool = False,
) -> FixedPointResult:
  r"""Applies a map until no entry changes by more than a tolerance.

  .. math:: x_{t+1} = f(x_t) \quad\text{until}\quad
    \max |x_{t+1} - x_t| \le \mathrm{tol}

  Under ``jax.vmap`` each member of the batch stops by itself. Not
  differentiable in reverse mode: see :func:`fixed_point`.

  Args:
    f: the map, from a pytree of arrays to one like it.
    x0: the start; floating or integer entries.
    tol: at least 0, which asks for exact equality.
    max_steps: at most so many applications, at least 1.
    record: keep the residual of each step.

  Returns:
    Where it ended.

  Raises:
    ValueError: if ``tol`` is negative or ``max_steps`` no integer >= 1.

  Cost:
    ``num_steps`` applications of the map, and two copies of its argument.

  Source:
    a standard textbook fact.

  Example:
    >>> import jax.numpy as jnp
    >>> found = fixed_point_iteration(jnp.cos, 1.0, tol=1e-5, max_steps=99)
    >>> print(f"{found.x:.4f} {bool(found.converged)}")
    0.7391 True
  """
  _check(tol, max_steps)
  _checks.check_choice("record", record, (False, True))
  x0 = jax.tree.map(jnp.asarray, x0)
  kept: Any = jnp.full(max_steps, jnp.nan) if record else ()

  def going(carry: Any) -> jax.Array:
    _, residual, num_steps, _ = carry
    return (num_steps < max_steps) & ~(residual <= tol)

  def step(carry: Any) -> Any:
    x, _, num_steps, kept = carry
    new = f(x)
    residual = _largest_change(x, new)
    if record:
      kept = kept.at[num_steps].set(residual.astype(kept.dtype))
    return new, residual, num_steps + 1, kept

  # Of the dtype that residuals have; no step has been taken.
  start = jnp.full_like(_largest_change(x0, x0), jnp.inf)
  carry = x0, start, jnp.int32(0), kept
  x, residual, num_steps, kept = lax.while_loop(going, step, carry)
  residuals = kept if record else residual
  return FixedPointResult(x, residuals, num_steps, residual <= tol)


def fixed_point(
  f: Callable[[Any, Any], Any],
  params: Any,
  x0: Any,
  *,
  tol: float,
  max_steps: int,
) -> Any:
  r"""The fixed point that iteration finds, with a gradient in its parameters.

  .. math:: \bar\theta = \Big(\frac{\partial f}{\partial \theta}\Big)^\top
    (I - J^\top)^{-1} \bar x

  The gradient is that of the fixed point next to where the iteration ended,
  right to the accuracy to which it has converged, and no gradient flows to the
  start. With up to 512 unknowns the Jacobian J is formed, with more the system
  is solved by GMRES.

  Args:
    f: ``f(params, x)``, like ``x``; what it closes over has no gradient.
    params: pytree of arrays, differentiated in where they are floating.
    x0: the start, a pytree of floating arrays.
    tol: as in :func:`fixed_point_iteration`; static.
    max_steps: at most so many applications.

  Returns:
    The last iterate, a pytree like ``x0``.

  Raises:
    ValueError: if ``tol`` is negative or ``max_steps`` no integer >= 1.

  Cost:
    The iteration's. The gradient: d products with J and O(d^3), or a product
    with J for each step of GMRES.

  Source:
    the implicit function theorem; Bai et al., arXiv 1909.01377, theorem 1.

  Example:
    >>> import jax
    >>> root = lambda y: fixed_point(
    ...   lambda y, x: (x + y / x) / 2, y, 1.0, tol=1e-6, max_steps=50
    ... )
    >>> print(f"{root(4.0):.3f} {jax.grad(root)(4.0):.3f}")
    2.000 0.250
  """
  _check(tol, max_steps)
  x0 = jax.tree.map(jnp.asarray, x0)
  for leaf in jax.tree.leaves(x0):
    _checks.check_floating("x0", leaf)
  return _fixed_point(f, float(tol), max_steps, params, x0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fixed_point(
  f: Callable[[Any, Any], Any], tol: float, max_steps: int, params: Any, x0: Any
) -> Any:
  step = functools.partial(f, params)
  return fixed_point_iteration(step, x0, tol=tol, max_steps=max_steps).x


def _fixed_point_fwd(
  f: Callable[[Any, Any], Any], tol: float, max_steps: int, params: Any, x0: Any
) -> tuple[Any, Any]:
  x = _fixed_point(f, tol, max_steps, params, x0)
  return x, (params, x)


def _fixed_point_bwd(
  f: Callable[[Any, Any], Any],
  tol: float,
  max_steps: int,
  residuals: Any,
  cotangent: Any,
) -> tuple[Any, Any]:
  del tol, max_steps
  params, x = residuals
  flat, unravel = ravel_pytree(x)

  def flat_f(y: jax.Array) -> jax.Array:
    return ravel_pytree(f(params, unravel(y)))[0]

  b = ravel_pytree(cotangent)[0]
  _, pull = jax.vjp(flat_f, flat)
  if flat.size <= _DENSE_SIZE:
    eye = jnp.eye(flat.size, dtype=flat.dtype)
    transposed = jax.vmap(lambda row: pull(row)[0], out_axes=1)(eye)
    u = jnp.linalg.solve(eye - transposed, b)
  else:
    eps = float(jnp.finfo(flat.dtype).eps)
    u, _ = gmres(lambda v: v - pull(v)[0], b, tol=10 * eps, restart=50)
  _, pull_params = jax.vjp(lambda p: f(p, x), params)
  return pull_params(unravel(u))[0], jax.tree.map(jnp.zeros_like, x)


_fixed_point.defvjp(_fixed_point_fwd, _fixed_point_bwd)


def _check(tol: Any, max_steps: Any) -> None:
  _checks.check_scalar("tol", tol)
  _checks.check_nonnegative("tol", tol)
  _checks.check_integer("max_steps", max_steps, 1, None)


def _largest_change(x: Any, y: Any) -> jax.Array:
  """Of any entry, in the widest floating dtype there is."""

  def change(a: jax.Array, b: jax.Array) -> jax.Array:
    # Differences of unsigned integers and of booleans wrap around.
    if not jnp.issubdtype(a.dtype, jnp.inexact):
      return (a != b).astype(jnp.float32).max(initial=0)
    return jnp.abs(b - a).max(initial=0)

  changes = jax.tree.leaves(jax.tree.map(change, x, y))
  widest = max((c.dtype for c in changes), key=lambda d: jnp.finfo(d).bits)
  return functools.reduce(jnp.maximum, [c.astype(widest) for c in changes])
