"""Predictions of a fixed kernel: against training of linear models."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
