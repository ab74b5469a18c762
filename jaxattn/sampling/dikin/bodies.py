r"""Convex bodies: polytopes A x <= b and spectrahedra sum_i x_i A_i >= C.

What is here runs on the host, in float64, before a walk: where a body is empty
or unbounded an error says so.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import linalg
from jax.typing import ArrayLike
from scipy import linalg as host_linalg
from scipy import optimize

from jaxattn import _checks, newton
from jaxattn.sampling.dikin import _feasibility

__all__ = [
  "Affine",
  "Polytope",
  "Spectrahedron",
  "analytic_center",
  "chebyshev_center",
  "full_dim_polytope",
  "round_polytope",
]

# A center exists where Newton's decrement falls below 1: the barrier is self-
# concordant.
_DECREMENT = 0.5
# Of Phase I in a spectrahedron: the weight of the objective grows by a factor,
# this often, with so many Newton steps for each.
_GROWTH, _ROUNDS, _STEPS = 10.0, 14, 30
# In units of the largest bound: a width below is none, and a facet that cuts
# off less is redundant.
_FLAT = 1e-9


LogDensity = Callable[[jax.Array], Any]


class Polytope(NamedTuple):
  """All x with A x <= b.

  Attributes:
    a: (n, d).
    b: (n,).
  """

  a: jax.Array
  b: jax.Array


class Spectrahedron(NamedTuple):
  """All x for which sum_i x_i mats_i - const is positive semidefinite.

  Attributes:
    mats: (d, n, n), symmetric.
    const: (n, n), symmetric.
  """

  mats: jax.Array
  const: jax.Array


class Affine(NamedTuple):
  """x = matrix y + offset.

  Attributes:
    matrix: (d, k).
    offset: (d,).
  """

  matrix: np.ndarray
  offset: np.ndarray


def chebyshev_center(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, float]:
  r"""The center and the radius of a largest ball in A x <= b.

  .. math:: \max_{x, r}\; r \quad\text{with}\quad A x + r \|a_i\|_i \le b

  Args:
    a: (n, d).
    b: (n,).

  Returns:
    The center (d,), one of them where there are several, and the radius.

  Raises:
    ValueError: if shapes do not fit, a number is not finite, the polytope holds
      balls of any size, or none: "polytope has empty interior, radius=-0.5".

  Cost:
    One linear program of d + 1 unknowns.

  Source:
    Boyd and Vandenberghe, Convex Optimization, section 4.3.1.

  Example:
    >>> import numpy as np
    >>> from jaxattn.sampling import chebyshev_center
    >>> a = np.array([[-1.0, 0.0], [0.0, -1.0], [1.0, 1.0]])
    >>> center, radius = chebyshev_center(a, np.array([0.0, 0.0, 1.0]))
    >>> print(center.round(3), round(radius, 3))
    [0.293 0.293] 0.293
  """
  rows, bound = _polytope(a, b)
  lengths = np.linalg.norm(rows, axis=1)
  found = optimize.linprog(
    np.append(np.zeros(rows.shape[1]), -1.0),
    A_ub=np.column_stack([rows, lengths]),
    b_ub=bound,
    bounds=(None, None),
    method="highs",
  )
  # HiGHS may not tell which of the two it is; here it cannot be infeasible.
  if found.status in (3, 4):
    raise ValueError("polytope is unbounded: it holds balls of any radius")
  if found.status != 0:
    raise ValueError(f"polytope: the linear program failed, {found.message}")
  # 0.0 + makes a 0 of a -0.
  radius = 0.0 + float(found.x[-1])
  if radius <= 0:
    raise ValueError(f"polytope has empty interior, radius={radius:.3g}")
  return found.x[:-1], radius


def analytic_center(
  body: Polytope | Spectrahedron, x0: jax.Array | None = None
) -> newton.NewtonResult:
  r"""The point where the barrier of a body is least.

  .. math:: \operatorname{argmin}_x -\sum_i \log(b - A x)_i
    \qquad\text{or}\qquad
    \operatorname{argmin}_x -\log\det\big(\textstyle\sum_i x_i A_i - C\big)

  Args:
    body: a :class:`Polytope` or a :class:`Spectrahedron`.
    x0: (d,), an interior point. None = 0 if it is one, or else what is found.

  Returns:
    The result of the solver, whose ``x`` is the center.

  Raises:
    ValueError: if shapes do not fit, ``x0`` is no interior point, there is no
      interior, or there is no center because the body is unbounded.

  Cost:
    That of :func:`jaxattn.newton.analytic_center`; of a spectrahedron
    O(d n^3 + d^2 n^2) a step, and up to some hundred of them without ``x0``.

  Source:
    Boyd and Vandenberghe, Convex Optimization, sections 8.5.3 and 11.4.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn import sampling
    >>> interval = jnp.array([[1.0], [-1.0]]), jnp.array([3.0, 1.0])
    >>> found = sampling.analytic_center(sampling.Polytope(*interval))
    >>> print(found.x.round(3))
    [1.]
  """
  body = check_body(body)
  if isinstance(body, Polytope):
    return newton.analytic_center(body.a, body.b, x0)
  start = _interior_point(body) if x0 is None else jnp.asarray(x0)
  _checks.check_shape("x0", start, (len(body.mats),), "(d,)")
  start = start.astype(body.mats.dtype)
  least = float(jnp.linalg.eigvalsh(slack_matrix(body, start))[0])
  if least <= 0:
    raise ValueError(
      f"x0 is not in the interior: smallest eigenvalue {least:.3g}"
    )
  data = body, jnp.zeros_like(start)
  found = newton.minimize(_LOG_DET, start, data)
  if not _decrement(found.x, data) < _DECREMENT:
    raise ValueError("the spectrahedron is unbounded and has no center")
  return found


def round_polytope(
  a: ArrayLike, b: ArrayLike
) -> tuple[np.ndarray, np.ndarray, Affine]:
  r"""Coordinates in which the barrier is round at the analytic center.

  .. math:: x = c + L^{-\top} y, \qquad H(c) = L L^\top, \qquad
    A_c L^{-\top} y \le 1

  Afterwards the polytope holds the unit ball, and is held by the ball of radius
  n. A Dikin walk gains nothing from it; hit and run does.

  Args:
    a: (n, d).
    b: (n,).

  Returns:
    The polytope of y: a, of orthonormal columns, and b, of ones; and the
    :class:`Affine` map from y to x.

  Raises:
    ValueError: if shapes do not fit, or there is no analytic center.

  Cost:
    That of :func:`jaxattn.newton.analytic_center`.

  Source:
    arXiv:2410.05700 for the containment, at the center; Boyd and Vandenberghe,
    Convex Optimization, section 8.5.3.

  Example:
    >>> import numpy as np
    >>> from jaxattn.sampling import round_polytope
    >>> a = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> _, b, affine = round_polytope(a, np.array([5.0, 5.0, 0.1, 0.1]))
    >>> print(b.round(3), affine.matrix.round(3).diagonal())
    [1. 1. 1. 1.] [3.536 0.071]
  """
  rows, bound = _polytope(a, b)
  found = newton.analytic_center(jnp.asarray(rows), jnp.asarray(bound))
  center = np.asarray(found.x, np.float64)
  # The rows of R are those of L^T up to sign, without squaring A.
  q, triangle = np.linalg.qr(rows / (bound - rows @ center)[:, None])
  sign = np.sign(np.diag(triangle))
  matrix = host_linalg.solve_triangular(triangle, np.diag(sign))
  return q * sign, np.ones(len(bound)), Affine(matrix, center)


def full_dim_polytope(
  eq: ArrayLike, lb: ArrayLike, ub: ArrayLike
) -> tuple[Polytope, Affine]:
  r"""Coordinates in which a polytope with equations has an interior.

  .. math:: \{ x : E x = 0,\; l \le x \le u \}
    = \{ N y + x_0 : A y \le b \}

  Coordinates that the constraints together fix are found and taken out, and so
  are bounds that follow from the others. The columns of N are orthonormal.

  Args:
    eq: (m, d), E.
    lb: (d,), may be minus infinity.
    ub: (d,), may be infinity.

  Returns:
    The :class:`Polytope` of y and the :class:`Affine` map from y to x; 0 is an
    interior point.

  Raises:
    ValueError: if shapes do not fit, no x is feasible, only one is, or a
      coordinate is unbounded.

  Cost:
    2 d linear programs of d unknowns, and one for each bound that is ever
    attained.

  Source:
    a standard reduction.

  Example:
    >>> import numpy as np
    >>> from jaxattn.sampling import full_dim_polytope
    >>> eq = np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> body, affine = full_dim_polytope(eq, np.zeros(3), np.ones(3))
    >>> body.a.shape, affine.matrix.shape
    ((2, 1), (3, 1))
  """
  equations, low, high = (np.asarray(x, np.float64) for x in (eq, lb, ub))
  _checks.check_rank("eq", equations, 2)
  _checks.check_shape("lb", low, (equations.shape[1],), "(d,)")
  _checks.check_shape("ub", high, (equations.shape[1],), "(d,)")
  ends = _feasibility.extreme_points(equations, low, high)
  least, most = ends[0].diagonal(), ends[1].diagonal()
  small = _FLAT * max(1.0, float(np.abs(ends).max()))
  flat = most - least <= small
  fixed = np.eye(len(low))[flat]
  matrix = host_linalg.null_space(np.concatenate([equations, fixed]))
  if matrix.shape[1] == 0:
    raise ValueError("polytope is a single point: nothing to sample")
  # The mean of points on all sides is inside, relative to the affine hull; the
  # linear programs solve the equations to 1e-7 only.
  offset = ends.mean((0, 1))
  offset -= np.linalg.lstsq(equations, equations @ offset)[0]
  # What is never attained cuts nothing off.
  upper, lower = (
    ~flat & (high <= most + small),
    ~flat & (low >= least - small),
  )
  a = np.concatenate([matrix[upper], -matrix[lower]])
  b = np.concatenate([(high - offset)[upper], (offset - low)[lower]])
  keep = _feasibility.irredundant(a, b, small)
  body = Polytope(jnp.asarray(a[keep]), jnp.asarray(b[keep]))
  return body, Affine(matrix, offset)


# --- what the other modules need of a body ---


def dim(body: Polytope | Spectrahedron) -> int:
  """Number of coordinates."""
  return body.a.shape[1] if isinstance(body, Polytope) else len(body.mats)


def check_body(body: Any) -> Any:
  """The body as arrays; raises if their shapes or dtypes do not fit."""
  if isinstance(body, Polytope):
    return _check_arrays("a", body.a, "b", body.b, 2)
  if isinstance(body, Spectrahedron):
    return _check_arrays("mats", body.mats, "const", body.const, 3)
  raise ValueError(
    f"body must be a Polytope or a Spectrahedron, got {type(body).__name__}"
  )


def check_inside(body: Polytope | Spectrahedron, position: jax.Array) -> None:
  """Raises unless a concrete position is strictly inside."""
  if not all(map(_checks.is_concrete, (*body, position))):
    return
  if isinstance(body, Spectrahedron):
    least = float(jnp.linalg.eigvalsh(slack_matrix(body, position))[0])
    if not least > 0:
      raise ValueError(
        "position must be inside the spectrahedron, got smallest eigenvalue "
        f"{least:.3g}"
      )
    return
  slack = np.asarray(body.b - body.a @ position)
  worst = int(np.argmin(slack))
  if not slack[worst] > 0:
    raise ValueError(
      f"position violates constraint {worst} by {0 - slack[worst]:.3g}"
    )


def check_bounded(body: Polytope | Spectrahedron) -> None:
  """Raises unless a concrete body is bounded."""
  if not all(map(_checks.is_concrete, body)):
    return
  if isinstance(body, Polytope):
    bounded = _feasibility.is_bounded(np.asarray(body.a, np.float64))
  else:
    bounded = _feasibility.has_certificate(np.asarray(body.mats, np.float64))
  if not bounded:
    raise ValueError(
      "body is unbounded: nothing is uniform on it; give a logdensity_fn that "
      "can be normalized and allow_unbounded=True"
    )


def logdensity(fn: LogDensity | None, x: jax.Array) -> jax.Array:
  """The value of a log density, in the dtype of x; 0 if there is none."""
  if fn is None:
    return jnp.zeros((), x.dtype)
  value = jnp.asarray(fn(x))
  _checks.check_shape("logdensity_fn(position)", value, (), "a scalar")
  return value.astype(x.dtype)


def slack_matrix(body: Spectrahedron, x: jax.Array) -> jax.Array:
  """S(x)."""
  return jnp.tensordot(x, body.mats, 1) - body.const


def whiten(mats: jax.Array, factor: jax.Array) -> jax.Array:
  """L^-1 A_i L^-T of all symmetric A_i."""
  left = jax.vmap(_solve, (None, 0))(factor, mats)
  return jax.vmap(_solve, (None, 0))(factor, left.mT)


def spectrahedron_hessian(body: Spectrahedron, factor: jax.Array) -> jax.Array:
  """The Hessian of -log det S where S is L L^T."""
  flat = whiten(body.mats, factor).reshape(len(body.mats), -1)
  return flat @ flat.T


def _solve(factor: jax.Array, b: jax.Array) -> jax.Array:
  return linalg.solve_triangular(factor, b, lower=True)


# --- checks ---


def _check_arrays(
  name: str, x: Any, other: str, y: Any, rank: int
) -> Polytope | Spectrahedron:
  x, y = jnp.asarray(x), jnp.asarray(y)
  _checks.check_rank(name, x, rank)
  if x.dtype not in (jnp.float32, jnp.float64):
    raise ValueError(f"{name} must be float32 or float64, got {x.dtype}")
  if 0 in x.shape:
    raise ValueError(f"{name} must not be empty, got shape {x.shape}")
  if rank == 2:
    _checks.check_shape(other, y, (len(x),), "(n,)")
  else:
    d, n, _ = x.shape
    _checks.check_shape(name, x, (d, n, n), "(d, n, n)")
    _checks.check_shape(other, y, (n, n), "(n, n)")
  y = y.astype(x.dtype)
  for which, array in ((name, x), (other, y)):
    if _checks.is_concrete(array):
      _check_values(which, np.asarray(array), symmetric=rank == 3)
  return Polytope(x, y) if rank == 2 else Spectrahedron(x, y)


def _check_values(name: str, x: np.ndarray, *, symmetric: bool) -> None:
  if not np.isfinite(x).all():
    raise ValueError(f"{name} must be finite")
  if symmetric:
    gap = float(np.abs(x - x.swapaxes(-1, -2)).max())
    if gap > 1e-6 * float(np.abs(x).max()):
      raise ValueError(f"{name} must be symmetric, got asymmetry {gap:.3g}")


def _polytope(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """On the host, in float64."""
  rows, bound = np.asarray(a, np.float64), np.asarray(b, np.float64)
  _checks.check_rank("a", rows, 2)
  _checks.check_shape("b", bound, (len(rows),), "(n,)")
  _check_values("a", rows, symmetric=False)
  _check_values("b", bound, symmetric=False)
  return rows, bound


# --- minus log det of S, with a linear term: data = (body, slope) ---


def _loss(x: jax.Array, data: Any) -> jax.Array:
  factor = jnp.linalg.cholesky(slack_matrix(data[0], x))
  return data[1] @ x - 2 * jnp.log(factor.diagonal()).sum()


def _value_and_grad(x: jax.Array, data: Any) -> tuple[jax.Array, jax.Array]:
  body, slope = data
  factor = jnp.linalg.cholesky(slack_matrix(body, x))
  traces = jnp.trace(whiten(body.mats, factor), axis1=1, axis2=2)
  return _loss(x, data), slope - traces


def _curvature(x: jax.Array, data: Any) -> newton.DenseCurvature:
  factor = jnp.linalg.cholesky(slack_matrix(data[0], x))
  return newton.DenseCurvature(spectrahedron_hessian(data[0], factor))


def _in_domain(x: jax.Array, data: Any) -> jax.Array:
  return jnp.isfinite(jnp.linalg.cholesky(slack_matrix(data[0], x))).all()


_LOG_DET = newton.Problem(
  _loss, _value_and_grad, _curvature, in_domain=_in_domain
)


def _decrement(x: jax.Array, data: Any) -> jax.Array:
  _, grad = _value_and_grad(x, data)
  return jnp.sqrt(grad @ jnp.linalg.solve(_curvature(x, data).matrix, grad))


def _interior_point(body: Spectrahedron) -> jax.Array:
  """0, or else what the same solver finds for S(x) + t I with t pushed down."""
  d, dtype = len(body.mats), body.mats.dtype
  eye = jnp.eye(len(body.const), dtype=dtype)
  lifted = Spectrahedron(jnp.concatenate([body.mats, eye[None]]), body.const)
  low = jnp.linalg.eigvalsh(-body.const)[0]
  if low > 0:
    return jnp.zeros(d, dtype)
  size = 1 + jnp.abs(body.const).max()
  z = jnp.zeros(d + 1, dtype).at[-1].set(size - low)
  config = newton.NewtonConfig(max_steps=_STEPS, rtol=0.0, mu0=1e-12)
  for k in range(_ROUNDS):
    slope = jnp.zeros(d + 1, dtype).at[-1].set(len(eye) / size * _GROWTH**k)
    z = newton.minimize(_LOG_DET, z, (lifted, slope), config=config).x
    if z[-1] < 0:
      return z[:-1]
  raise ValueError(
    "spectrahedron has empty interior, smallest eigenvalue at best "
    f"{-z[-1]:.3g}"
  )
