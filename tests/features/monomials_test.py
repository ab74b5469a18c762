"""Monomial features against powers of the inner product, and their order."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxattn.features import (
  feature_count,
  monomial_features,
  monomial_weights,
  taylor_features,
  taylor_norm_bound,
)
from tests._recompile import no_recompilation

_SIZES = [(4, 3), (8, 2), (3, 6), (5, 4), (1, 5), (6, 0), (7, 1)]


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(("dim", "degree"), _SIZES)
def test_weighted_gram_is_the_polynomial(dim, degree):
  x, y = _normal(9, dim), _normal(11, dim, seed=1)
  coefficients = _normal(degree + 1, seed=2)
  features = [np.asarray(monomial_features(z, degree)) for z in (x, y)]
  assert features[0].shape == (9, math.comb(dim + degree, degree))
  weights = monomial_weights(dim, coefficients)
  got = features[0] * weights @ features[1].T
  want, scale = (
    sum(c * gram**j for j, c in enumerate(factors))
    for factors, gram in (
      (coefficients, x @ y.T),
      # The inner product of orthogonal vectors is itself known only to this.
      (np.abs(coefficients), np.abs(x) @ np.abs(y).T),
    )
  )
  assert (np.abs(got - want) / scale).max() < 1e-13
  assert np.abs(got - want).max() < 1e-13 * np.abs(want).max()


@pytest.mark.parametrize(("dim", "degree"), _SIZES)
def test_features_are_all_monomials_each_once(dim, degree):
  primes = np.array([2, 3, 5, 7, 11, 13, 17, 19][:dim], float)
  got = np.asarray(monomial_features(primes, degree))
  want = [
    math.prod(c)
    for j in range(degree + 1)
    for c in itertools.combinations_with_replacement(primes.tolist(), j)
  ]
  # By degree; within one, unique factorization tells monomials apart.
  np.testing.assert_allclose(np.sort(got), np.sort(want), rtol=1e-14)
  counts = [math.comb(dim + j - 1, j) for j in range(degree + 1)]
  for j, part in enumerate(np.split(got, np.cumsum(counts)[:-1])):
    powers = [c for c in want if _degree(c, primes) == j]
    np.testing.assert_allclose(np.sort(part), np.sort(powers), rtol=1e-14)


def _degree(number, primes):
  degree = 0
  for prime in primes:
    while number % prime == 0:
      number, degree = number // prime, degree + 1
  return degree


def test_feature_counts():
  # g = 2, 3, 4, 6, 8
  table = {
    4: (15, 35, 70, 210, 495),
    8: (45, 165, 495, 3003, 12870),
    16: (153, 969, 4845, 74613),
    32: (561, 6545, 58905),
    64: (2145, 47905, 814385),
    128: (8385, 366145),
  }
  for dim, counts in table.items():
    got = [feature_count(dim, g) for g in (2, 3, 4, 6, 8)[: len(counts)]]
    assert got == list(counts)


def test_taylor_features():
  x, y = _normal(7, 5), _normal(6, 5, seed=1)
  for degree in (0, 1, 4):
    got = (
      taylor_features(x, degree, scale=0.3)
      @ taylor_features(y, degree, scale=0.3).T
    )
    powers = np.arange(degree + 1)[:, None, None]
    want = ((0.3 * x @ y.T) ** powers / special.factorial(powers)).sum(0)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    norms = (np.asarray(taylor_features(x, degree, scale=0.3)) ** 2).sum(-1)
    radius = 0.3 * (x**2).sum(-1)
    bounds = [taylor_norm_bound(float(r), degree) for r in radius]
    np.testing.assert_allclose(norms, bounds, rtol=1e-12)


def test_norm_bound_of_high_degrees():
  np.testing.assert_allclose(taylor_norm_bound(1.0, 300), math.e, rtol=1e-14)
  np.testing.assert_allclose(taylor_norm_bound(20, 200), math.exp(20))
  assert taylor_norm_bound(1e300, 5) == math.inf


def test_jit_vmap_grad_and_dtype():
  x = jnp.asarray(_normal(4, 3))
  by_row = jax.vmap(lambda z: monomial_features(z, 3))(x)
  np.testing.assert_array_equal(by_row, monomial_features(x, 3))
  jacobian = jax.jacobian(lambda z: monomial_features(z, 2))(x[0])
  # The last feature is the square of the last variable.
  np.testing.assert_allclose(jacobian[-1], [0, 0, 2 * x[0, 2]])
  assert jacobian.shape == (10, 3)
  assert monomial_features(jnp.arange(3), 2).dtype == jnp.arange(3).dtype
  assert taylor_features(x.astype(jnp.bfloat16), 2).dtype == jnp.bfloat16
  taylor_features(x, 2, scale=0.5)
  y = 2 * x
  with no_recompilation():
    taylor_features(y, 2, scale=0.5)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: feature_count(0, 2), "dim must be >= 1, got 0"),
    (lambda: feature_count(3, -1), "degree must be >= 0, got -1"),
    (lambda: feature_count(3, 2.0), "degree must be an integer >= 0, got 2.0"),
    (
      lambda: monomial_features(jnp.zeros(64), 6),
      "feature dimension C(64+6,6)=131115985 too large; lower degree",
    ),
    (lambda: monomial_features(1.0, 2), "x must have shape (..., d)"),
    (
      lambda: monomial_weights(3, np.zeros((2, 2))),
      "coefficients must be a vector of at least one number, got shape (2, 2)",
    ),
    (lambda: monomial_weights(3, []), "got shape (0,)"),
    (
      lambda: taylor_features(jnp.zeros(3), 2, scale=0.0),
      "scale must be positive, got 0.0",
    ),
    (
      lambda: taylor_features(jnp.zeros(3, int), 2),
      "x must have a floating dtype, got int",
    ),
    (lambda: taylor_norm_bound(-1.0, 2), "radius must be non-negative"),
    (
      lambda: taylor_norm_bound("a", 2),
      "radius must be a real scalar, got 'a'",
    ),
    (
      lambda: jax.jit(lambda r: taylor_norm_bound(r, 2))(1.0),
      "radius must be a static number",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
