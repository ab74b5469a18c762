"""Ridge regression and eigenvalues: against numpy and scipy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxattn.numerics import linalg


def _system(n, p, k=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, p)), rng.normal(size=(n, k))


def _psd(p, rank, seed):
  rows = np.random.default_rng(seed).normal(size=(rank, p))
  return rows.T @ rows


# --- ridge_solve ---


@pytest.mark.parametrize(("n", "p"), [(30, 7), (7, 30), (9, 9)])
@pytest.mark.parametrize("ridge", [0.0, 1e-2, 10.0])
def test_ridge_solve_is_the_pseudoinverse_of_the_stacked_system(n, p, ridge):
  a, b = _system(n, p)
  tall = np.concatenate([a, ridge**0.5 * np.eye(p)])
  want = np.linalg.pinv(tall) @ np.concatenate([b, np.zeros((p, 3))])
  got = linalg.ridge_solve(a, b, ridge)
  np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
  one = linalg.ridge_solve(a, b[:, 0], ridge)
  np.testing.assert_allclose(one, want[:, 0], rtol=1e-10, atol=1e-12)


def test_primal_and_dual_agree():
  a, b = _system(6, 16)
  primal = np.linalg.solve(a.T @ a + 0.1 * np.eye(16), a.T @ b)
  np.testing.assert_allclose(
    linalg.ridge_solve(a, b, 0.1), primal, rtol=0, atol=1e-13
  )


def test_no_ridge_does_not_square_the_condition():
  rng = np.random.default_rng(1)
  u, _ = np.linalg.qr(rng.normal(size=(40, 6)))
  v, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  a = u @ np.diag(np.logspace(0, -9, 6)) @ v.T
  planted = rng.normal(size=6)
  got = linalg.ridge_solve(a, a @ planted, 0.0)
  # By the normal equations the condition would be 1e18: nothing right.
  np.testing.assert_allclose(got, planted, rtol=0, atol=1e-5)


def test_ridge_solve_in_jit_vmap_and_grad():
  a, b = _system(12, 4, k=1)
  ridges = jnp.array([0.1, 1.0, 10.0])
  got = jax.jit(
    jax.vmap(jax.grad(lambda r: (linalg.ridge_solve(a, b, r) ** 2).sum()))
  )(ridges)
  step = 1e-6

  def size(ridge):
    return float((linalg.ridge_solve(a, b, ridge) ** 2).sum())

  want = [(size(r + step) - size(r - step)) / (2 * step) for r in ridges]
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_dtypes():
  a, b = _system(40, 5)
  want = np.linalg.lstsq(a, b, rcond=None)[0]
  for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
    low = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    got = linalg.ridge_solve(*low, 0.0)
    assert got.dtype == dtype
    np.testing.assert_allclose(
      got.astype(jnp.float64), want, rtol=0, atol=tolerance
    )


# --- power_iteration ---


def test_power_iteration_finds_the_largest():
  matrix = _psd(20, 30, 0)
  values, vectors = np.linalg.eigh(matrix)
  value, vector = linalg.power_iteration(
    lambda v: jnp.asarray(matrix) @ v, jnp.ones(20), num_steps=300
  )
  np.testing.assert_allclose(value, values[-1], rtol=1e-12)
  np.testing.assert_allclose(abs(vector @ vectors[:, -1]), 1, rtol=1e-12)


def test_power_iteration_converges_at_the_squared_gap():
  matrix = jnp.diag(jnp.array([1.0, 0.8, 0.1]))
  errors = [
    1
    - linalg.power_iteration(lambda v: matrix @ v, jnp.ones(3), num_steps=n)[0]
    for n in (10, 11)
  ]
  np.testing.assert_allclose(errors[1] / errors[0], 0.64, rtol=1e-2)


def test_power_iteration_of_zero_and_of_other_shapes():
  value, vector = linalg.power_iteration(jnp.zeros_like, jnp.ones((2, 2)))
  assert value == 0
  np.testing.assert_array_equal(vector, np.full((2, 2), 0.5))


# --- spectral_bounds ---


def test_bounds_are_generalized_eigenvalues():
  gram, approx = _psd(8, 20, 0), _psd(8, 20, 1)
  want = scipy.linalg.eigh(approx, gram, eigvals_only=True)
  low, high = linalg.spectral_bounds(gram, approx)
  np.testing.assert_allclose([low, high], want[[0, -1]], rtol=1e-10)


def test_bounds_on_the_range_of_a_singular_gram():
  rng = np.random.default_rng(2)
  basis, _ = np.linalg.qr(rng.normal(size=(8, 8)))
  basis = basis[:, :5]
  gram, approx = _psd(5, 9, 3), _psd(5, 9, 4)
  want = scipy.linalg.eigh(approx, gram, eigvals_only=True)[[0, -1]]
  wide = [basis @ g @ basis.T for g in (gram, approx)]
  np.testing.assert_allclose(linalg.spectral_bounds(*wide), want, rtol=1e-9)
  low, high = linalg.spectral_bounds(wide[0], wide[1] + 1e-3 * np.eye(8))
  assert np.isinf(high)
  assert np.isfinite(low)
  # And a singular approximation has low 0.
  low, high = linalg.spectral_bounds(np.eye(8), wide[1])
  np.testing.assert_allclose(low, 0, atol=1e-12)
  assert np.isfinite(high)


# --- refused ---


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: linalg.ridge_solve(jnp.ones(3), jnp.ones(3), 0.0),
      "a must have 2 dimensions, got shape (3,)",
    ),
    (
      lambda: linalg.ridge_solve(jnp.ones((3, 2)), jnp.ones(4), 0.0),
      "b must have shape (3,) = (n,) or (n, k), got (4,)",
    ),
    (
      lambda: linalg.ridge_solve(jnp.ones((3, 2)), jnp.ones(3), -1.0),
      "ridge must be non-negative, got -1.0",
    ),
    (
      lambda: linalg.ridge_solve(jnp.ones((3, 2)), jnp.ones(3), np.ones(2)),
      "ridge must be a real scalar, got array([1., 1.])",
    ),
    (
      lambda: linalg.ridge_solve(jnp.ones((3, 2), int), jnp.ones(3), 1.0),
      "a must have a floating dtype, got int64",
    ),
    (
      lambda: linalg.power_iteration(lambda v: v, jnp.zeros(3)),
      "v0 must not be 0",
    ),
    (
      lambda: linalg.power_iteration(lambda v: v, jnp.ones(3), num_steps=0),
      "num_steps must be >= 1, got 0",
    ),
    (
      lambda: linalg.spectral_bounds(jnp.ones((3, 2)), jnp.ones((3, 2))),
      "gram must have shape (3, 3) = (p, p), got (3, 2)",
    ),
    (
      lambda: linalg.spectral_bounds(jnp.eye(3), jnp.eye(2)),
      "gram_approx must have shape (3, 3) = (p, p), got (2, 2)",
    ),
    (
      lambda: linalg.spectral_bounds(jnp.zeros((3, 3)), jnp.eye(3)),
      "gram must not be 0",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


# --- kernel ridge ---


@pytest.mark.parametrize("columns", [(), (2,)])
def test_kernel_ridge(columns):
  rng = np.random.default_rng(0)
  k = _psd(12, 12, 0)
  y = rng.normal(size=(12, *columns)) + 3
  fit = linalg.kernel_ridge_fit(k, y, relative_ridge=0.1)
  shift = 0.1 * np.trace(k) / 12 * np.eye(12)
  want = np.linalg.solve(k + shift, y - y.mean(0))
  np.testing.assert_allclose(fit.coef, want, rtol=1e-10)
  np.testing.assert_allclose(fit.offset, y.mean(0), rtol=1e-14)
  got = linalg.kernel_ridge_predict(k[:5], fit)
  np.testing.assert_allclose(got, k[:5] @ want + y.mean(0), rtol=1e-12)
  exact = linalg.kernel_ridge_fit(k, y, relative_ridge=0.0)
  np.testing.assert_allclose(
    linalg.kernel_ridge_predict(k, exact), y, rtol=1e-8
  )


@pytest.mark.parametrize("columns", [(), (2,)])
def test_leaving_one_out_is_fitting_without_it(columns):
  rng = np.random.default_rng(1)
  k = _psd(9, 5, 1)
  y = rng.normal(size=(9, *columns))
  errors = linalg.loo_residuals(k, y, relative_ridge=0.05)
  full = k + 0.05 * np.trace(k) / 9 * np.eye(9)
  mean = y.mean(0)
  for i in range(9):
    rest = np.delete(np.arange(9), i)
    coef = np.linalg.solve(full[rest][:, rest], y[rest] - mean)
    error = y[i] - mean - k[i, rest] @ coef
    np.testing.assert_allclose(errors[i], error, rtol=1e-10)


def test_kernel_ridge_of_16_bits():
  k = _psd(6, 6, 2).astype("float16")
  y = np.arange(6, dtype="float16")
  fit = linalg.kernel_ridge_fit(k, y, relative_ridge=1.0)
  assert fit.coef.dtype == fit.offset.dtype == "float16"
  assert linalg.kernel_ridge_predict(k, fit).dtype == "float16"
  assert linalg.loo_residuals(k, y, relative_ridge=1.0).dtype == "float16"


def test_kernel_ridge_refuses():
  k, y = np.eye(3), np.ones(3)
  fit = linalg.KernelRidge(jnp.ones(3), jnp.ones(()))
  for call in (linalg.kernel_ridge_fit, linalg.loo_residuals):
    for args, ridge, message in (
      ((k[:2], y), 0.1, "k must have shape (2, 2) = (n, n), got (2, 3)"),
      ((k, y[:2]), 0.1, "y must have shape (3,) = (n,) or (n, k), got (2,)"),
      ((k, y.astype("float32")), 0.1, "all arrays must have one dtype"),
      ((k, y), -0.1, "relative_ridge must be non-negative, got -0.1"),
      ((k, y), y, "relative_ridge must be a real scalar"),
    ):
      with pytest.raises(ValueError, match=re.escape(message)):
        call(*args, relative_ridge=ridge)
  for args, message in (
    ((k[0], fit), "k_test must have 2 dimensions, got shape (3,)"),
    ((k[:, 1:], fit), "k_test must have shape (*, 3) = (n_test, n)"),
    ((k, fit._replace(offset=y)), "offset of fit must have shape (), got (3,)"),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      linalg.kernel_ridge_predict(*args)
