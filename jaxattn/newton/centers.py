r"""The analytic center of a polytope.

.. math:: \operatorname{argmin}_x\; -\sum_i \log (b - A x)_i

Where 0 is no interior point, one is found first (Phase I) by maximizing t
subject to :math:`b - A x \ge t`, again with a logarithmic barrier.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy import linalg

from jaxattn import _checks
from jaxattn.newton.curvature import (
  StructuredCurvature,
  curvature_dense,
  design_matvec,
  design_vecmat,
)
from jaxattn.newton.minimize import NewtonConfig, NewtonResult, minimize
from jaxattn.newton.problem import Problem
from jaxattn.numerics.linalg import above_rounding

__all__ = ["analytic_center"]

# Of Phase I: it is done when t is known to rounding to this power, times the
# size of b; the weight of t grows by this factor; Newton steps for each weight.
_PRECISION, _GROWTH, _STEPS = 0.6, 10.0, 20
# A center exists where Newton's decrement falls below 1: the barrier is self-
# concordant. Where the solver stops above, and its step costs no row more than
# this share of its slack, it has run away.
_DECREMENT, _ESCAPE = 0.5, 1e-3


def analytic_center(
  a: jax.Array,
  b: jax.Array,
  x0: jax.Array | None = None,
  *,
  config: NewtonConfig = NewtonConfig(),
) -> NewtonResult:
  r"""The analytic center of the polytope A x <= b.

  .. math:: \operatorname{argmin}_x\; -\sum_i \log (b - A x)_i

  Nothing depends on the scale of a row of (A, b), nor on the units of x: the
  solver works in coordinates in which the Hessian at the start is the identity.

  Args:
    a: (n, d), floating, of full column rank.
    b: (n,).
    x0: (d,), an interior point to start from. None = 0 if that is one, or else
      what a Phase I finds.
    config: of the solver.

  Returns:
    A :class:`jaxattn.newton.NewtonResult`, whose ``x`` is always an interior
    point if there is any. Its ``grad_norm``, and the log's ``grad_norm``,
    ``shift`` and ``step_norm``, are in the norms of the Hessian at the start.
    Under a transformation of JAX nothing can be raised: ``reason`` is 4 where
    there is no interior point, ``x0`` is none, the rank is deficient or a
    number is not finite, and 0 where the polytope is unbounded.

  Raises:
    ValueError: if shapes or dtypes do not fit; outside transformations also
      "the polytope has no interior point, best slack -0.12", if it is
      unbounded (or 1e10 times as long as it looks from the start), if the rank
      is deficient, or if ``x0`` is no interior point.

  Cost:
    O(n d^2) a step, some ten of them; Phase I some twenty to eighty more.

  Source:
    Boyd and Vandenberghe, Convex Optimization, sections 8.5.3 and 11.4.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn import newton
    >>> a = jnp.array([[-1.0, 0.0], [0.0, -1.0], [1.0, 1.0]])
    >>> found = newton.analytic_center(a, jnp.array([0.0, 0.0, 3.0]))
    >>> print(found.x.round(3))
    [1. 1.]
  """
  a, b = jnp.asarray(a), jnp.asarray(b)
  _checks.check_rank("a", a, 2)
  _checks.check_floating("a", a)
  n, d = a.shape
  _checks.check_shape("b", b, (n,), "(n,)")
  _checks.check_floating("b", b)
  if x0 is not None:
    x0 = jnp.asarray(x0)
    _checks.check_shape("x0", x0, (d,), "(d,)")
    _checks.check_floating("x0", x0)
    x0 = x0.astype(a.dtype)
  found, facts = _center(a, b.astype(a.dtype), x0, config)
  if _checks.is_concrete(found.x):
    _raise_if_none(facts, given=x0 is not None)
  return found


def _raise_if_none(facts: Any, *, given: bool) -> None:
  slack, rank, dim, unbounded = (np.asarray(fact).item() for fact in facts)
  if not np.isfinite(slack):
    return
  if slack <= 0 and given:
    raise ValueError(f"x0 is not in the interior: min(b - Ax) = {slack:.3g}")
  if slack <= 0:
    raise ValueError(
      f"the polytope has no interior point, best slack {slack:.3g}"
    )
  if rank < dim:
    raise ValueError(f"a must have full column rank {dim}, got rank {rank}")
  if unbounded:
    raise ValueError("the polytope is unbounded and has no analytic center")


@functools.partial(jax.jit, static_argnames="config")
def _center(
  a: jax.Array, b: jax.Array, x0: jax.Array | None, config: NewtonConfig
) -> tuple[NewtonResult, tuple[jax.Array, ...]]:
  """The center, and best slack, rank, d and whether it runs to infinity."""
  n, d = a.shape
  start = _interior_point(a, b) if x0 is None else x0
  slack = b - a @ start
  # In y = R (x - x0) columns are orthonormal, and slacks relative to the first.
  basis, triangle = jnp.linalg.qr(a / slack[:, None])
  # Nor may the units of x decide what its rank is.
  units = jnp.linalg.norm(triangle, axis=0)
  scaled = triangle / jnp.where(units > 0, units, 1)[None]
  rank = above_rounding(jnp.linalg.svd(scaled, compute_uv=False)).sum()
  # NaN is what the solver takes for a bad start.
  usable = ((slack > 0) & jnp.isfinite(slack)).all() & (rank == d)
  basis = jnp.where(usable, basis, jnp.nan)
  # Slacks start at e: next to a loss of 0 no rounding would be forgiven.
  data = np.e * basis, jnp.full_like(b, np.e), jnp.zeros(d, a.dtype)
  found = minimize(_BARRIER, data[2], data, config=config)
  decrement, escape = _outlook(found.x, data)
  none = (decrement >= _DECREMENT) & (found.reason != 4)
  unbounded = none & (found.reason != 0) & (escape <= _ESCAPE)
  offset = n - jnp.log(jnp.where(usable, slack, 1)).sum()
  moved = linalg.solve_triangular(triangle, found.x)
  found = found._replace(
    x=jnp.where(found.reason == 4, start, start + moved),
    loss=found.loss + offset,
    reason=jnp.where(none, 0, found.reason),
    log=found.log._replace(loss=found.log.loss + offset),
  )
  return found, (slack.min(), rank, jnp.array(d), unbounded)


def _outlook(y: jax.Array, data: Any) -> tuple[jax.Array, jax.Array]:
  """Newton's decrement, and the largest relative loss of slack in its step."""
  _, grad = _BARRIER.value_and_grad(y, data)
  assert _BARRIER.curvature is not None
  hessian = curvature_dense(_BARRIER.curvature(y, data))
  step = -jnp.linalg.solve(hessian, grad)
  return jnp.sqrt(-grad @ step), (data[0] @ step / _slack(y, data)).max()


def _interior_point(a: jax.Array, b: jax.Array) -> jax.Array:
  """0, or else another point of positive slack, or else of the best slack."""
  n, d = a.shape
  rows = jnp.concatenate([a, jnp.ones((n, 1), a.dtype)], 1)
  size = jnp.abs(b).max()
  size = jnp.where(size > 0, size, 1)
  # (x, t) = (0, t) with slacks between size and 3 size.
  z = jnp.zeros(d + 1, a.dtype).at[-1].set(b.min() - size)
  precision = jnp.finfo(a.dtype).eps ** _PRECISION
  num = 1 + int(np.ceil(-np.log(precision) / np.log(_GROWTH)))
  config = NewtonConfig(max_steps=_STEPS, rtol=0.0, mu0=1e-12)

  def again(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
    z, k = carry
    # Where 0 is inside nothing is to be done.
    return (z[-1] <= 0) & (k < num) & (b.min() <= 0)

  def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    z, k = carry
    # At the minimum t is at most n / weight below the best.
    weight = n / size * _GROWTH ** k.astype(a.dtype)
    data = rows, b, jnp.zeros(d + 1, a.dtype).at[-1].set(-weight)
    return minimize(_BARRIER, z, data, config=config).x, k + 1

  z, _ = lax.while_loop(again, body, (z, jnp.zeros((), jnp.int32)))
  return jnp.where(jnp.isfinite(z).all(), z[:-1], 0)


# --- the barrier of A x <= b with a linear term: data = (A, b, slope) ---


def _slack(x: jax.Array, data: Any) -> jax.Array:
  return data[1] - design_matvec(data[0], x)


def _loss(x: jax.Array, data: Any) -> jax.Array:
  return data[2] @ x - jnp.log(_slack(x, data)).sum()


def _value_and_grad(x: jax.Array, data: Any) -> tuple[jax.Array, jax.Array]:
  inverse = 1 / _slack(x, data)
  return _loss(x, data), data[2] + design_vecmat(inverse, data[0])


def _curvature(x: jax.Array, data: Any) -> StructuredCurvature:
  d, dtype = len(x), x.dtype
  return StructuredCurvature(
    data[0],
    1 / _slack(x, data) ** 2,
    jnp.zeros((d, 0), dtype),
    jnp.zeros((0, 0), dtype),
    jnp.zeros((), dtype),
  )


def _in_domain(x: jax.Array, data: Any) -> jax.Array:
  return (_slack(x, data) > 0).all()


_BARRIER = Problem(_loss, _value_and_grad, _curvature, in_domain=_in_domain)
