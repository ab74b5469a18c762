"""Centers, rounding, affine hulls, and what is unbounded or empty."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import newton
from jaxattn.sampling import (
  Polytope,
  Spectrahedron,
  analytic_center,
  barrier_hessian,
  chebyshev_center,
  full_dim_polytope,
  round_polytope,
)
from jaxattn.sampling.dikin import bodies
from tests.sampling import _bodies

_SQUARE = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])


def test_chebyshev_center():
  """Of a right triangle: the incircle."""
  a = np.array([[-1.0, 0], [0, -1], [3, 4]])
  center, radius = chebyshev_center(a, np.array([0.0, 0, 12]))
  np.testing.assert_allclose(radius, (4 + 3 - 5) / 2, rtol=1e-9)
  np.testing.assert_allclose(center, [1, 1], rtol=1e-9)
  # The scale of a row says nothing.
  scale = np.array([10.0, 1, 0.01])
  again, same = chebyshev_center(scale[:, None] * a, scale * [0, 0, 12])
  np.testing.assert_allclose(same, radius, rtol=1e-9)
  np.testing.assert_allclose(again, center, rtol=1e-9)


def test_analytic_center_of_a_polytope_is_newtons():
  body = _bodies.random_polytope(12, 3)
  got, want = analytic_center(body), newton.analytic_center(*body)
  np.testing.assert_array_equal(got.x, want.x)


def test_analytic_center_of_a_spectrahedron():
  """Diagonal matrices are a polytope; a shift takes 0 out of the body."""
  a, b = _bodies.random_polytope(8, 2)
  want = newton.analytic_center(a, b).x + 7
  mats = -jnp.stack([jnp.diag(column) for column in a.T])
  body = Spectrahedron(mats, -jnp.diag(b + a @ jnp.full(2, 7.0)))
  got = analytic_center(body)
  np.testing.assert_allclose(got.x, want, rtol=1e-7)
  from_there = analytic_center(body, got.x + 1e-3)
  np.testing.assert_allclose(from_there.x, got.x, rtol=1e-7)


@pytest.mark.slow
def test_analytic_center_of_a_cone():
  """All eigenvalues are equal: three of X and 1 - tr X."""
  found = analytic_center(_bodies.psd_cone(3))
  want = _bodies.flat_symmetric(np.eye(3) / 4)
  np.testing.assert_allclose(found.x, want, atol=1e-8)


def test_rounding():
  body = _bodies.random_polytope(12, 3)
  a, b, affine = round_polytope(*body)
  np.testing.assert_allclose(a.T @ a, np.eye(3), atol=1e-9)
  np.testing.assert_array_equal(b, 1)
  center = analytic_center(body).x
  np.testing.assert_allclose(affine.offset, center, atol=1e-9)
  hessian = np.asarray(barrier_hessian(body, center))
  got = affine.matrix.T @ hessian @ affine.matrix
  np.testing.assert_allclose(got, np.eye(3), atol=1e-6)
  # Points of the one are points of the other.
  y = np.random.default_rng(0).normal(size=(50, 3))
  slack = (1 - y @ a.T) * np.asarray(body.b - body.a @ center)
  x = y @ affine.matrix.T + affine.offset
  got = np.asarray(body.b) - x @ np.asarray(body.a).T
  np.testing.assert_allclose(got, slack, atol=1e-7)


def test_affine_hulls():
  """A triangle in the plane of sum 0, a fixed coordinate, a slack bound."""
  eq = np.array([[1.0, 1, 1, 0, 0], [0, 0, 0, 1, -2]])
  lb = np.array([-1.0, -1, -1, 3, -np.inf])
  ub = np.array([1.0, 50, np.inf, 3, 9])
  body, affine = full_dim_polytope(eq, lb, ub)
  assert affine.matrix.shape == (5, 2)
  # x0 <= 1 cuts the triangle; x1 <= 50 does not.
  assert body.a.shape == (4, 2)
  assert (body.b > 0).all()
  y = np.random.default_rng(0).normal(size=(200, 2))
  x = y @ affine.matrix.T + affine.offset
  np.testing.assert_allclose(x @ eq.T, 0, atol=1e-9)
  np.testing.assert_allclose(x[:, 3:], [[3, 1.5]] * 200, atol=1e-9)
  inside = (np.asarray(body.b) - y @ np.asarray(body.a).T > 0).all(1)
  want = ((x[:, :3] > lb[:3]) & (x[:, :3] < ub[:3])).all(1)
  np.testing.assert_array_equal(inside, want)
  assert 20 < inside.sum() < 180


def test_coordinates_that_constraints_fix_together():
  """x0 + x1 = 0 and both at least 0."""
  eq = np.array([[1.0, 1, 0]])
  body, affine = full_dim_polytope(eq, np.zeros(3), np.full(3, 2.0))
  assert body.a.shape == (2, 1)
  np.testing.assert_allclose(affine.matrix[:2], 0, atol=1e-12)
  np.testing.assert_allclose(affine.offset[:2], 0, atol=1e-9)
  assert 0 < affine.offset[2] < 2


@pytest.mark.parametrize(
  ("body", "bounded"),
  [
    (_bodies.box(3), True),
    (_bodies.random_polytope(12, 3), True),
    (Polytope(-jnp.eye(3), jnp.zeros(3)), False),
    (Polytope(jnp.asarray(_SQUARE[:3]), jnp.ones(3)), False),
    (Polytope(jnp.ones((4, 2)), jnp.ones(4)), False),
    (_bodies.psd_cone(3), True),
    (_bodies.random_spectrahedron(4, 3), True),
    (_bodies.hidden_simplex(3, 2), True),
    (
      Spectrahedron(
        jnp.stack([jnp.eye(2), jnp.diag(jnp.array([1.0, -1]))]), -jnp.eye(2)
      ),
      False,
    ),
    (Spectrahedron(jnp.diag(jnp.array([1.0, 0]))[None], -jnp.eye(2)), False),
    (Spectrahedron(jnp.zeros((1, 2, 2)), -jnp.eye(2)), False),
  ],
)
def test_what_is_bounded(body, bounded):
  if bounded:
    bodies.check_bounded(body)
  else:
    with pytest.raises(ValueError, match="body is unbounded"):
      bodies.check_bounded(body)


_PAIR = np.array([[1.0], [-1.0]])


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: chebyshev_center(_PAIR, np.array([-1.0, 0.0])),
      "polytope has empty interior, radius=-0.5",
    ),
    (
      lambda: chebyshev_center(_PAIR, np.zeros(2)),
      "polytope has empty interior, radius=0",
    ),
    (
      lambda: chebyshev_center(-np.eye(2), np.zeros(2)),
      "polytope is unbounded: it holds balls of any radius",
    ),
    (lambda: chebyshev_center(np.ones(2), np.ones(2)), "a must have 2 dim"),
    (lambda: chebyshev_center(_PAIR, np.ones(3)), "b must have shape (2,)"),
    (
      lambda: chebyshev_center(np.full((2, 1), np.nan), np.ones(2)),
      "a must be finite",
    ),
    (
      lambda: round_polytope(-np.eye(2), np.zeros(2)),
      "the polytope",
    ),
    (
      lambda: analytic_center(_bodies.psd_cone(2), jnp.full(3, -1.0)),
      "x0 is not in the interior: smallest eigenvalue -2",
    ),
    (
      lambda: analytic_center(_bodies.psd_cone(2), jnp.zeros(2)),
      "x0 must have shape (3,)",
    ),
    (
      lambda: analytic_center(
        Spectrahedron(jnp.diag(jnp.array([1.0, -1]))[None], jnp.eye(2))
      ),
      "spectrahedron has empty interior, smallest eigenvalue at best -1",
    ),
    (
      lambda: analytic_center(
        Spectrahedron(jnp.eye(2)[None], jnp.zeros((2, 2))), jnp.ones(1)
      ),
      "the spectrahedron is unbounded and has no center",
    ),
    (
      lambda: full_dim_polytope(np.ones((1, 2)), np.ones(2), np.full(2, 2.0)),
      "polytope is empty: no x with eq x = 0, lb <= x <= ub",
    ),
    (
      lambda: full_dim_polytope(np.ones((1, 2)), np.zeros(2), np.ones(2)),
      "polytope is a single point",
    ),
    (
      lambda: full_dim_polytope(
        np.zeros((1, 2)), np.array([0, -np.inf]), np.ones(2)
      ),
      "polytope is unbounded in coordinate 1",
    ),
    (
      lambda: full_dim_polytope(np.ones((1, 2)), np.ones(3), np.ones(2)),
      "lb must have shape (2,)",
    ),
    (lambda: full_dim_polytope(np.ones(2), np.ones(2), np.ones(2)), "eq must"),
  ],
)
def test_refused_inputs(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
