"""Predictions of a fixed kernel: against training of linear models."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxattn import ntk
from jaxattn.ntk import linearized_loss
from tests._recompile import no_recompilation


def _linear_model(n=5, outputs=2, num_params=7, seed=0):
  """Features (n, O, P) of a model that is linear in P parameters; targets."""
  rng = np.random.default_rng(seed)
  features = rng.standard_normal((n, outputs, num_params))
  return features, rng.standard_normal((n, outputs))


@pytest.mark.parametrize("fraction", [0.5, 1.9, 2.5])
def test_equals_descent_on_a_linear_model(fraction):
  features, y = _linear_model()
  kernel = np.einsum("iap,jbp->iajb", features, features)
  largest = np.linalg.eigvalsh(kernel.reshape(10, 10))[-1]
  theta, losses = np.zeros(7), []
  for _ in range(41):
    error = features @ theta - y
    losses.append((error**2).sum() / 2)
    gradient = np.einsum("ia,iap->p", error, features)
    theta = theta - fraction / largest * gradient
  got = linearized_loss(kernel, y, fraction / largest, 40)
  np.testing.assert_allclose(got, losses, rtol=1e-10)
  # Beyond 2 / lambda_max the loss grows, and the prediction says so.
  assert (got[-1] > got[0]) == (fraction > 2)


def test_one_output_may_be_left_out():
  features, y = _linear_model(outputs=1)
  kernel = np.einsum("iap,jbp->iajb", features, features)
  np.testing.assert_array_equal(
    linearized_loss(kernel[:, 0, :, 0], y[:, 0], 0.01, 9),
    linearized_loss(kernel, y, 0.01, 9),
  )


def test_directions_that_the_kernel_lacks_keep_their_residual():
  kernel, residual = np.diag([1.0, 0.0]), np.array([3.0, 4.0])
  losses = linearized_loss(kernel, residual, 1.0, 3)
  np.testing.assert_allclose(losses, [12.5, 8.0, 8.0, 8.0], rtol=1e-12)


def test_asymmetry_by_rounding_does_not_matter_and_float32_stays():
  features, y = _linear_model()
  kernel = np.einsum("iap,jbp->iajb", features, features)
  exact = linearized_loss(kernel, y, 0.01, 20)
  noise = 1e-7 * np.random.default_rng(1).standard_normal(kernel.shape)
  noisy = linearized_loss(
    jnp.asarray(kernel + noise, jnp.float32), jnp.float32(y), 0.01, 20
  )
  assert noisy.dtype == jnp.float32
  np.testing.assert_allclose(noisy, exact, rtol=1e-5)


def test_traced_rates_do_not_recompile():
  features, y = _linear_model(outputs=1)
  kernel = np.einsum("iap,jbp->ij", features, features)
  run = jax.vmap(lambda rate: linearized_loss(kernel, y[:, 0], rate, 5))
  first = run(jnp.array([0.01, 0.02]))
  assert first.shape == (2, 6)
  linearized_loss(kernel, y[:, 0], 0.01, 5)
  with no_recompilation():
    linearized_loss(kernel, y[:, 0], 0.02, 5)


@pytest.mark.parametrize(
  ("kernel", "residual", "rate", "steps", "message"),
  [
    ((4, 4), (3,), 0.1, 1, "kernel must have shape (3, 3) = residual twice"),
    ((4, 4), (2, 2), 0.1, 1, "kernel must have shape (2, 2, 2, 2) = residual"),
    ((2, 2), (2, 1, 1), 0.1, 1, "residual must have 1 or 2 dimensions, got"),
    ((2, 2), (2,), 0.0, 1, "learning_rate must be positive, got 0.0"),
    ((2, 2), (2,), [0.1], 1, "learning_rate must be a real scalar, got [0.1]"),
    ((2, 2), (2,), 0.1, -1, "num_steps must be >= 0, got -1"),
  ],
)
def test_refused(kernel, residual, rate, steps, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    linearized_loss(np.ones(kernel), np.ones(residual), rate, steps)


def test_refused_dtype():
  with pytest.raises(ValueError, match="kernel must have a floating dtype"):
    linearized_loss(np.eye(2, dtype=int), np.ones(2), 0.1, 1)


# --- predictions of outputs ---


def _kernels(n=5, outputs=2, num_params=12):
  """Kernels (n, O, n, O) on data and (n2, O, n, O) from them to others."""
  features, y = _linear_model(n, outputs, num_params)
  other = _linear_model(3, outputs, num_params, seed=1)[0]
  own = np.einsum("iap,jbp->iajb", features, features)
  return own, np.einsum("iap,jbp->iajb", other, features), y


def _flat(kernel):
  half = kernel.ndim // 2
  rows = int(np.prod(kernel.shape[:half]))
  return np.asarray(kernel).reshape(rows, -1)


def test_flow_is_the_differential_equation():
  kernel, test, y = _kernels()
  matrix, others = _flat(kernel), _flat(test)
  times = np.array([0.02, 0.1, 0.7])

  def move(_, state):
    error = y.ravel() - state[:10]
    return np.concatenate((matrix @ error, others @ error))

  want = solve_ivp(
    move, (0, 0.7), np.zeros(16), t_eval=times, rtol=1e-10, atol=1e-12
  ).y.T
  factor = ntk.kernel_factor(kernel)
  got = ntk.flow_train(factor, y, times)
  np.testing.assert_allclose(got, want[:, :10].reshape(3, 5, 2), atol=1e-6)
  got = ntk.flow_test(factor, test, y, times)
  np.testing.assert_allclose(got, want[:, 10:].reshape(3, 3, 2), atol=1e-6)
  one = ntk.flow_test(factor, test, y, times[1])
  np.testing.assert_allclose(one, got[1], rtol=1e-12)


@pytest.mark.parametrize("fraction", [0.3, 1.0, 1.9])
def test_descent_is_the_explicit_loop(fraction):
  kernel, test, y = _kernels()
  matrix, others = _flat(kernel), _flat(test)
  rate = fraction / np.linalg.eigvalsh(matrix)[-1]
  steps, path = [0, 1, 2, 7, 200], []
  moved, moved_test = np.zeros(10), np.zeros(6)
  for t in range(201):
    if t in steps:
      path.append((moved.copy(), moved_test.copy()))
    error = y.ravel() - moved
    moved, moved_test = (
      moved + rate * matrix @ error,
      moved_test + rate * others @ error,
    )
  want = np.stack([p[0] for p in path]).reshape(5, 5, 2)
  want_test = np.stack([p[1] for p in path]).reshape(5, 3, 2)
  factor = ntk.kernel_factor(kernel)
  near = {"rtol": 0, "atol": 1e-10}
  got = ntk.descent_train(factor, y, rate, steps)
  np.testing.assert_allclose(got, want, **near)
  got = ntk.descent_test(factor, test, y, rate, steps)
  np.testing.assert_allclose(got, want_test, **near)
  error, alpha = ntk.descent_recursion(kernel, y, rate, steps)
  np.testing.assert_allclose(y[None] - error, want, **near)
  np.testing.assert_allclose(
    np.einsum("iajb,sjb->sia", test, alpha), want_test, **near
  )
  last = ntk.descent_recursion(kernel, y, rate, 200)
  np.testing.assert_array_equal(last[0], error[-1])


def test_one_kernel_for_outputs_that_do_not_mix():
  k, k_test, _ = _kernels(outputs=1)
  k, k_test = k[:, 0, :, 0], k_test[:, 0, :, 0]
  y, eye = np.random.default_rng(3).standard_normal((5, 4)), np.eye(4)
  whole = (
    np.einsum("ij,ab->iajb", k, eye),
    np.einsum("ij,ab->iajb", k_test, eye),
  )
  small, large = ntk.kernel_factor(k), ntk.kernel_factor(whole[0])
  assert small.eigenvectors.shape == (5, 5)
  rate, steps = 0.5 / small.eigenvalues[-1], jnp.array([3, 50])
  for got, want in (
    (
      ntk.flow_test(small, k_test, y, rate * steps),
      ntk.flow_test(large, whole[1], y, rate * steps),
    ),
    (
      ntk.descent_train(small, y, rate, steps),
      ntk.descent_train(large, y, rate, steps),
    ),
    (
      ntk.descent_recursion(k, y, rate, steps)[1],
      ntk.descent_recursion(whole[0], y, rate, steps)[1],
    ),
  ):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  one = ntk.descent_train(small, y[:, 0], rate, 3)
  np.testing.assert_allclose(
    one, ntk.descent_train(small, y, rate, 3)[:, 0], atol=1e-14
  )


def test_long_times_interpolate_and_missing_directions_stay():
  kernel, _, y = _kernels()
  factor = ntk.kernel_factor(kernel)
  np.testing.assert_allclose(
    ntk.flow_train(factor, y, 1e6), y, rtol=0, atol=1e-8
  )
  flat = ntk.kernel_factor(jnp.diag(jnp.array([2.0, 0.0])))
  r, k_test = jnp.array([1.0, 3.0]), jnp.array([[0.0, 1.0]])
  np.testing.assert_allclose(ntk.flow_train(flat, r, 1e9), [1, 0])
  # A kernel that sees the missing direction from elsewhere moves with it.
  np.testing.assert_allclose(ntk.flow_test(flat, k_test, r, 5.0), [15.0])
  moved = ntk.descent_test(flat, k_test, r, 0.5, [0, 10])
  np.testing.assert_allclose(moved, [[0.0], [15.0]])


def _trained(f, y, theta, rate, num_steps, momentum=0.0):
  """Outputs after descent on a half of the SUM of squares, by autodiff."""

  def loss(theta):
    return jnp.square(f(theta) - y).sum() / 2

  def step(_, state):
    theta, last = state
    push = momentum * (theta - last) - rate * jax.grad(loss)(theta)
    return theta + push, theta

  return f(jax.lax.fori_loop(0, num_steps, step, (theta, theta))[0])


def _model(scale, theta, features):
  return scale * jnp.einsum("iap,p->ia", features, theta)


@pytest.mark.parametrize("width", [3, 12, 40])
def test_linear_model_follows_the_prediction_at_every_width(width):
  features, y = _linear_model(num_params=width)
  theta = np.random.default_rng(4).standard_normal(width)
  moved = []
  for scale in (1.0, 2.0):
    apply_fn = functools.partial(_model, scale)
    kernel = ntk.empirical_ntk(apply_fn, theta / scale, features)
    factor = ntk.kernel_factor(kernel)
    rate = 0.9 / factor.eigenvalues[-1]
    want = _trained(
      lambda theta, f=apply_fn: f(theta, features), y, theta / scale, rate, 50
    )
    start = apply_fn(theta / scale, features)
    moved.append(ntk.descent_train(factor, y - start, rate, 50))
    np.testing.assert_allclose(start + moved[-1], want, rtol=0, atol=1e-10)
  # A scale of 2 makes the kernel 4 times as large; c / lambda_max undoes it.
  np.testing.assert_allclose(*moved, rtol=0, atol=1e-10)


@pytest.mark.any_x64
def test_descent_in_float32():
  features, y = map(np.float32, _linear_model(num_params=12))
  kernel = np.einsum("iap,jbp->iajb", features, features)
  factor = ntk.kernel_factor(kernel)
  rate, moved = 0.9 / float(factor.eigenvalues[-1]), np.zeros((5, 2))
  for _ in range(30):
    moved += rate * np.einsum("iajb,jb->ia", kernel.astype(float), y - moved)
  got = ntk.descent_train(factor, y, rate, 30)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, moved, rtol=0, atol=1e-5 * np.abs(y).max())


def test_heavy_ball_by_modes():
  # Each mode repeats e_{t+1} = (1 + b - rate lambda) e_t - b e_{t-1}: powers of
  # a 2 by 2 matrix, here by its eigenvalues.
  features, y = _linear_model(num_params=12)
  kernel = ntk.empirical_ntk(
    functools.partial(_model, 1.0), np.zeros(12), features
  )
  factor = ntk.kernel_factor(kernel)
  rate, momentum, num_steps = 1.5 / factor.eigenvalues[-1], 0.6, 60
  vectors = factor.eigenvectors.reshape(10, 10)
  gains = []
  for value in np.asarray(factor.eigenvalues):
    roots = np.roots([1, rate * value - 1 - momentum, momentum]) + 0j
    # e_{-1} = e_0 = 1: weights of the two powers.
    weights = np.linalg.solve(np.stack([np.ones(2), 1 / roots]), np.ones(2))
    gains.append((weights * roots**num_steps).sum().real)
  want = y - (vectors @ (np.array(gains) * (vectors.T @ y.ravel()))).reshape(
    y.shape
  )
  got = _trained(
    lambda theta: _model(1.0, theta, features),
    y,
    jnp.zeros(12),
    rate,
    num_steps,
    momentum,
  )
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


def test_recursion_takes_kernels_that_are_not_symmetric():
  kernel = np.array([[1.0, 0.5], [-0.5, 1.0]])
  error, alpha = ntk.descent_recursion(kernel, np.ones(2), 0.1, 30)
  want = np.linalg.matrix_power(np.eye(2) - 0.1 * kernel, 30) @ np.ones(2)
  np.testing.assert_allclose(error, want, rtol=1e-12)
  np.testing.assert_allclose(kernel @ alpha, 1 - error, rtol=1e-12)


def test_rounding_of_the_kernel_is_taken_off_and_more_is_refused():
  features, _ = _linear_model(num_params=4)  # rank 4 of 10
  kernel = np.einsum("iap,jbp->iajb", features, features).astype("float32")
  factor = ntk.kernel_factor(kernel)
  assert factor.eigenvalues.dtype == jnp.float32
  assert (factor.eigenvalues >= 0).all()
  message = "kernel must be symmetric and positive semidefinite up to rounding"
  for bad in (np.diag([1.0, -0.1]), np.array([[1.0, 0.5], [0.0, 1.0]])):
    with pytest.raises(ValueError, match=message):
      ntk.kernel_factor(bad)
    with pytest.raises(ValueError, match=message):
      linearized_loss(bad, np.ones(2), 0.1, 1)
    assert jnp.isnan(jax.jit(ntk.kernel_factor)(bad).eigenvalues).all()
  for bad in (np.nan, np.inf):
    with pytest.raises(ValueError, match="kernel must be finite, got one that"):
      ntk.kernel_factor(np.diag([1.0, bad]))


def test_predictions_under_jit_vmap_and_compiled_once():
  kernel, test, y = _kernels()

  def predict(kernel, rate):
    factor = ntk.kernel_factor(kernel)
    return ntk.descent_test(factor, test, y, rate, jnp.arange(3))

  rates = jnp.array([0.001, 0.002])
  got = jax.jit(jax.vmap(predict, (None, 0)))(kernel, rates)
  np.testing.assert_allclose(got[1], predict(kernel, 0.002), rtol=1e-9)
  factor = ntk.kernel_factor(kernel)
  for _ in ntk.flow_train(factor, y, 0.1), ntk.kernel_factor(2 * kernel):
    pass
  other = 2 * kernel
  with no_recompilation():
    ntk.flow_train(ntk.kernel_factor(other), y, 0.2)
    predict(other, 0.001)


def test_predictions_refuse():
  kernel, test, y = _kernels()
  factor = ntk.kernel_factor(kernel)
  eye = ntk.kernel_factor(2 * np.eye(2))
  for call, message in (
    (
      lambda: ntk.kernel_factor(np.ones((2, 3))),
      "kernel must have shape (2, 2) = its own half, twice, got (2, 3)",
    ),
    (
      lambda: ntk.kernel_factor(np.ones(3)),
      "kernel must have 2 or 4 dimensions, got shape (3,)",
    ),
    (
      lambda: ntk.kernel_factor(np.ones((0, 0))),
      "kernel must not be empty, got shape (0, 0)",
    ),
    (
      lambda: ntk.flow_train(factor, y[:, 0], 1.0),
      "residual must have shape (5, 2) = data of the kernel, got (5,)",
    ),
    (
      lambda: ntk.flow_train(factor, y, -1.0),
      "times must be non-negative, got -1.0",
    ),
    (
      lambda: ntk.flow_train(factor, y, np.ones((1, 1))),
      "times must have 0 or 1 dimensions, got shape (1, 1)",
    ),
    (
      lambda: ntk.flow_test(factor, test[:, 0], y, 1.0),
      "k_test_train must have shape (*, 2, 5, 2) = (n2, O, n, O), got",
    ),
    (
      lambda: ntk.descent_train(eye, np.ones(2), 1.0, 5),
      "learning_rate=1 >= 2/lambda_max=1: the recursion diverges",
    ),
    (
      lambda: ntk.descent_test(eye, np.eye(2), np.ones(2), 1.5, 5),
      "learning_rate=1.5 >= 2/lambda_max=1: the recursion diverges",
    ),
    (
      lambda: ntk.descent_train(eye, np.ones(2), 0.0, 5),
      "learning_rate must be positive, got 0.0",
    ),
    (
      lambda: ntk.descent_train(eye, np.ones(2), 0.1, -5),
      "num_steps must be non-negative, got -5",
    ),
    (
      lambda: ntk.descent_train(eye, np.ones(2), 0.1, 1.5),
      "num_steps must be integers, got float",
    ),
    (
      lambda: ntk.descent_recursion(np.eye(2), np.ones(2), 0.1, [2, 1]),
      "num_steps must be ascending, got [2 1]",
    ),
    (
      lambda: ntk.descent_recursion(np.eye(2), np.ones(3), 0.1, 2),
      "residual must have shape (2,) = data of the kernel, got (3,)",
    ),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      call()
