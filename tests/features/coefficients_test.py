"""Coefficient schemes against published tables, and the bounds they give."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import Polynomial, chebyshev
from scipy import optimize

from jaxattn.features import (
  attention_error_bound,
  coefficients,
  degree_for,
  polynomial_coefficients,
  polynomial_error,
  taylor_error_bound,
)

_EPS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
# Radius -> degrees for those eps: Taylor, interpolated exp, minimax.
_DEGREES = {
  0.5: ((2, 3, 4, 5, 7), (1, 2, 3, 4, 6), (1, 2, 3, 4, 5)),
  1: ((3, 5, 6, 7, 9), (2, 4, 5, 6, 7), (2, 3, 4, 5, 7)),
  2: ((7, 8, 10, 11, 14), (5, 6, 7, 8, 10), (3, 5, 6, 7, 9)),
  4: ((14, 15, 17, 19, 21), (9, 10, 11, 13, 15), (6, 7, 9, 10, 13)),
  8: ((28, 30, 31, 33, 36), (17, 19, 20, 22, 24), (10, 12, 14, 16, 19)),
}
_MINIMAX_ERRORS = {
  (0.5, 2): 5.148e-3,
  (0.5, 4): 1.614e-5,
  (1, 2): 3.974e-2,
  (1, 4): 5.030e-4,
  (1, 6): 3.017e-6,
  (2, 2): 0.2705,
  (2, 4): 1.450e-2,
  (2, 6): 3.556e-4,
  (2, 10): 4.6e-8,
  (2, 12): 3.0e-10,
  (4, 2): 0.8894,
  (4, 4): 0.2956,
  (4, 6): 3.258e-2,
}
_RADII = (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 10, 12)


def _real_roots(coefs):
  roots = np.polynomial.polynomial.polyroots(coefs)
  return roots[np.abs(roots.imag) <= 1e-9 * np.abs(roots)].real


def _interpolated_exp(degree, radius):
  """What interpolates exp itself, in absolute error, at Chebyshev nodes."""
  fit = chebyshev.chebinterpolate(lambda u: np.exp(radius * u), degree)
  return chebyshev.cheb2poly(fit) / float(radius) ** np.arange(degree + 1)


# --- the tables ---


@pytest.mark.parametrize("radius", _DEGREES)
def test_degrees(radius):
  taylor, interpolated, minimax = _DEGREES[radius]
  for eps, *want in zip(_EPS, taylor, interpolated, minimax, strict=True):
    first = next(
      g
      for g in range(1, 40)
      if polynomial_error(_interpolated_exp(g, radius), radius) < eps
    )
    assert [
      degree_for(eps, radius, kind="taylor", even=False),
      first,
      degree_for(eps, radius, even=False),
    ] == want
    assert degree_for(eps, radius) == want[2] + want[2] % 2


def test_degrees_of_the_closed_form_bound():
  radii = (0.0625, 0.25, 1, 2.25, 4, 9, 16)
  got = [degree_for(1e-3, r, kind="taylor_bound", even=False) for r in radii]
  assert got == [2, 3, 7, 12, 20, 41, 71]
  bounds = [taylor_error_bound(0.177, degree) for degree in (1, 2, 3, 4)]
  np.testing.assert_allclose(
    bounds, (2.2e-2, 1.3e-3, 5.8e-5, 2.1e-6), rtol=0.02
  )
  for r in radii:
    for degree in (0, 1, 6, 25):
      taylor = polynomial_coefficients(degree, r, kind="taylor")
      # Rounding of the sum itself, whose terms reach e^(2r) times the result.
      slack = 1e-15 * math.exp(2 * r)
      bound = taylor_error_bound(r, degree)
      assert polynomial_error(taylor, r) <= bound + slack


@pytest.mark.parametrize(("radius", "degree"), _MINIMAX_ERRORS)
def test_minimax_errors(radius, degree):
  error = polynomial_error(polynomial_coefficients(degree, radius), radius)
  want = _MINIMAX_ERRORS[radius, degree]
  np.testing.assert_allclose(error, want, rtol=0.02)


@pytest.mark.parametrize(("radius", "degree"), [(0.5, 3), (1, 4), (4, 6)])
def test_minimax_is_the_solution_of_the_linear_program(radius, degree):
  x = radius * np.cos(np.pi * np.arange(301) / 300)
  basis = chebyshev.chebvander(x / radius, degree) * np.exp(-x)[:, None]
  ones = np.ones((x.size, 1))
  # Least t with |basis @ c - 1| <= t.
  a = np.block([[basis, -ones], [-basis, -ones]])
  b = np.concatenate([np.ones(x.size), -np.ones(x.size)])
  cost = np.zeros(degree + 2)
  cost[-1] = 1
  best = optimize.linprog(cost, a, b, bounds=(None, None)).fun
  error = polynomial_error(polynomial_coefficients(degree, radius), radius)
  np.testing.assert_allclose(error, best, rtol=1e-3)


# --- facts that attention relies on ---


@pytest.mark.parametrize("radius", _RADII)
def test_minimax_is_positive_without_real_root(radius):
  for degree in range(11):
    coefs = polynomial_coefficients(degree, radius)
    assert coefs.shape == (degree + 1,)
    assert coefs.dtype == np.float64
    assert (coefs > 0).all()
    roots = _real_roots(coefs)
    if degree % 2 == 0:
      assert roots.size == 0
    else:
      assert roots.size == 1
      assert roots[0] < -radius


def test_root_of_odd_degree_is_just_left_of_the_radius():
  for radius, want in ((2, -2.35), (4, -4.04)):
    (root,) = _real_roots(polynomial_coefficients(3, radius))
    np.testing.assert_allclose(root, want, atol=5e-3)
  assert Polynomial(polynomial_coefficients(3, 8.0))(-8.08) < 0


def test_minimax_of_a_small_radius_is_taylor():
  for radius in (1e-5, 1e-40, 1e-300):
    got = polynomial_coefficients(6, radius)
    want = polynomial_coefficients(6, radius, kind="taylor")
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_gaussian_minimizes_its_mean_square():
  sigma, degree = 0.4, 4
  x = np.linspace(-12 * sigma, 12 * sigma, 20001)
  weight = np.exp(-(x**2) / (2 * sigma**2) + x)

  def mean_square(coefs):
    return (weight * (Polynomial(coefs)(x) * np.exp(-x) - 1) ** 2).sum()

  best = polynomial_coefficients(degree, 2.0, kind="gaussian", sigma=sigma)
  least = mean_square(best)
  for j in range(degree + 1):
    for step in (-1e-3, 1e-3):
      assert mean_square(best + step * best[j] * np.eye(degree + 1)[j]) > least
  for kind in ("taylor", "minimax"):
    other = polynomial_coefficients(degree, 2.0, kind=kind)
    assert mean_square(other) > least


def test_gaussian_has_real_roots_only_beyond_the_limit_of_sigma():
  for sigma in (0.05, 0.25, 0.5):
    for degree in (0, 2, 4, 6, 8, 10):
      coefs = polynomial_coefficients(degree, 1, kind="gaussian", sigma=sigma)
      assert (coefs > 0).all()
      assert _real_roots(coefs).size == 0
  for degree in (4, 6, 8):
    assert _real_roots(coefficients._gaussian(degree, 1.0)).size > 0


def test_fits_with_real_roots_are_refused(monkeypatch):
  monkeypatch.setattr(coefficients, "_MAX_SIGMA", 2.0)
  with pytest.raises(ValueError, match=r"sigma=1\.0 with degree=4 gives a"):
    polynomial_coefficients(4, 1, kind="gaussian", sigma=1.0)
  # Of an odd degree they are known, and asked for by name.
  polynomial_coefficients(3, 1, kind="gaussian", sigma=0.5)


def test_results_are_the_callers_own():
  polynomial_coefficients(3, 1.0)[:] = 0
  assert (polynomial_coefficients(3, 1.0) > 0).all()


# --- the bound on the output ---


def test_attention_error_bound_holds_and_is_tight():
  eps = 0.1
  want = 2 * math.tanh(0.5 * math.atanh(eps))
  value = np.array([1.0, -1.0]).reshape(2, 1, 1)
  bound = attention_error_bound(eps, value)
  assert bound.shape == (1, 1)
  np.testing.assert_allclose(bound, want, rtol=1e-14)
  # Two keys of weights p and 1 - p, errors of opposite sign.
  p = np.linspace(0.01, 0.99, 981)
  off = (1 + eps) * p / ((1 + eps) * p + (1 - eps) * (1 - p))
  error = 2 * (off - p)
  assert 0.9998 * want <= error.max() <= want * (1 + 1e-12)
  # Random weights and errors stay below.
  rng = np.random.default_rng(0)
  value = rng.standard_normal((30, 2, 3))
  bound = np.asarray(attention_error_bound(jnp.float64(eps), value))
  for _ in range(200):
    weights = rng.exponential(size=30)
    wrong = weights * (1 + eps * rng.choice([-1, 1], 30))
    exact, got = (
      np.einsum("s,skh->kh", w / w.sum(), value) for w in (weights, wrong)
    )
    assert (np.abs(got - exact) <= bound).all()


@pytest.mark.any_x64
def test_attention_error_bound_at_its_ends():
  value = jnp.arange(12, dtype=jnp.float32).reshape(2, 3, 1, 2)
  assert not attention_error_bound(0.0, value).any()
  spread = attention_error_bound(1.0, value)
  assert spread.dtype == jnp.float32
  np.testing.assert_array_equal(spread, np.full((2, 1, 2), 4, np.float32))
  traced = jax.jit(attention_error_bound)(0.5, value)
  np.testing.assert_allclose(traced, 4 * (2 - math.sqrt(3)), rtol=1e-6)


# --- refused ---


@pytest.mark.filterwarnings("error")
def test_error_at_radii_that_overflow():
  assert polynomial_error([1.0, 1.0, 0.5], 800.0) == math.inf
  assert polynomial_error([0.0], 800.0) == 1.0


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: polynomial_coefficients(-1, 1.0),
      "degree must be >= 0, got -1",
    ),
    (
      lambda: polynomial_coefficients(2, 0.0),
      "radius must be positive and finite, got 0.0",
    ),
    (
      lambda: polynomial_coefficients(2, math.inf),
      "radius must be positive and finite, got inf",
    ),
    (
      lambda: polynomial_coefficients(2, 12.5),
      "radius must be at most 12 for kind 'minimax', got 12.5",
    ),
    (
      lambda: polynomial_coefficients(2, "wide"),
      "radius must be a real scalar, got 'wide'",
    ),
    (
      lambda: jax.jit(lambda r: polynomial_coefficients(2, r)[0])(1.0),
      "radius must be a static number, got a traced value",
    ),
    (
      lambda: polynomial_coefficients(2, 1.0, kind="chebyshev"),
      "kind must be one of 'minimax', 'taylor', 'gaussian', got 'chebyshev'",
    ),
    (
      lambda: polynomial_coefficients(2, 1.0, kind="gaussian"),
      "sigma is required for kind 'gaussian', got None",
    ),
    (
      lambda: polynomial_coefficients(2, 1.0, kind="gaussian", sigma=0.6),
      "sigma must be in (0, 0.5], got 0.6: beyond, the fit has real roots",
    ),
    (
      lambda: polynomial_coefficients(2, 1.0, kind="gaussian", sigma=-0.1),
      "sigma must be positive and finite, got -0.1",
    ),
    (
      lambda: polynomial_coefficients(2, 1.0, sigma=0.2),
      "sigma is for kind 'gaussian', got it with 'minimax'",
    ),
    (
      lambda: polynomial_error([], 1.0),
      "coefficients must be a vector of at least one number, got shape (0,)",
    ),
    (lambda: polynomial_error([1.0], -1), "radius must be positive and finite"),
    (lambda: degree_for(0.0, 1.0), "eps must be positive and finite, got 0.0"),
    (
      lambda: degree_for(1e-30, 1.0),
      "eps = 1e-30 with radius = 1.0 needs a degree above 100, or more digits",
    ),
    (
      lambda: degree_for(0.1, 1.0, kind="gaussian"),
      "kind must be one of 'minimax', 'taylor', 'taylor_bound'",
    ),
    (
      lambda: degree_for(0.1, 1.0, even=1),
      "even must be one of False, True, got 1",
    ),
    (lambda: taylor_error_bound(0.0, 2), "radius must be positive and finite"),
    (lambda: taylor_error_bound(1.0, -2), "degree must be >= 0, got -2"),
    (
      lambda: attention_error_bound(1.5, np.zeros((3, 1, 1))),
      "eps must be in [0, 1], got 1.5",
    ),
    (
      lambda: attention_error_bound(0.1, np.zeros((3, 1))),
      "value must have shape (..., S, K, Hv), got (3, 1)",
    ),
    (
      lambda: attention_error_bound(0.1, np.zeros((3, 1, 1), int)),
      "value must have a floating dtype, got int",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
