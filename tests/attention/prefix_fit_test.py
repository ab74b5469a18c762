"""States of prefixes, fitted to outputs."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import (
  fit_prefix_state,
  ntk_attention,
  prefix_attention,
  softmax_attention,
)
from tests.attention._prefix import (
  dense_formula,
  prefix_call,
  refuse,
  state_of,
  uniform,
)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
def test_fit_finds_the_state_that_made_the_outputs(heads):
  n, kv = heads
  query, key, value, *prefix = prefix_call(
    2.0, t=300, s=9, m=20, h=4, n=n, kv=kv
  )
  made = state_of(*prefix, "elu")
  target = ntk_attention(query, key, value, made)
  found = fit_prefix_state(query, key, value, target, ridge=1e-20)
  for got, want in zip(found, made, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_mass", [False, True])
def test_fit_solves_the_normal_equations_of_all_unknowns(with_mass):
  ridge, r, hv = 1e-2, 3, 2
  query, key, *prefix = uniform(1.5, (40, 1, r), (6, 1, r), (9, 1, r))
  value, prefix_value = uniform(1.0, (6, 1, hv), (9, 1, hv), seed=1)
  call, prefix = (query, key, value), (*prefix, prefix_value)
  target = prefix_attention(*call, *prefix)
  context, lse = softmax_attention(*call, return_residual=True)
  _, mass = softmax_attention(query, *prefix, return_residual=True)
  total = np.logaddexp(lse, mass) if with_mass else np.maximum(lse, 0)
  x = query * r**-0.25
  phi = (np.where(x > 0, x + 1, np.exp(x)) * np.exp(-total)[..., None])[:, 0]
  rows = [
    np.concatenate((np.kron(phi_i, np.eye(hv)[h]), -o[h] * phi_i))
    for phi_i, o in zip(phi, target[:, 0], strict=True)
    for h in range(hv)
  ]
  right = np.ravel(np.exp(lse - total)[..., None] * (target - context))
  if with_mass:
    rows += [np.concatenate((np.zeros(r * hv), phi_i)) for phi_i in phi]
    right = np.concatenate((right, np.ravel(np.exp(mass - total))))
  matrix = np.array(rows)
  # In units of the mean eigenvalue of a column of z.
  damping = ridge * (phi**2).sum() / r
  gram = matrix.T @ matrix + damping * np.eye(matrix.shape[1])
  solution = np.linalg.solve(gram, matrix.T @ right)
  options = {"log_mass": mass} if with_mass else {}
  z, k = fit_prefix_state(*call, target, ridge=ridge, **options)
  np.testing.assert_allclose(z[0].ravel(), solution[: r * hv], atol=1e-10)
  np.testing.assert_allclose(k[0], solution[r * hv :], atol=1e-10)


def test_fitted_elu_beats_summed_elu_on_new_queries():
  query, key, value, *prefix = call = prefix_call(0.5, t=128)
  train, new = query[::2], query[1::2]
  _, mass = softmax_attention(train, *prefix, return_residual=True)
  target = prefix_attention(train, *call[1:])
  fitted = fit_prefix_state(train, key, value, target, log_mass=mass)
  exact = dense_formula(new, *call[1:])

  def error(state):
    return np.abs(ntk_attention(new, key, value, state) - exact).max()

  assert error(fitted) < 0.5 * error(state_of(*prefix, "elu"))


def test_the_ridge_is_as_small_for_a_long_prefix():
  """Its default must not outweigh rows that shrink like 1 / m."""
  query, key, value, *prefix = prefix_call(0.5, t=300, m=4096, h=4)
  target = prefix_attention(query, key, value, *prefix)
  _, mass = softmax_attention(query, *prefix, return_residual=True)
  states = [
    fit_prefix_state(query, key, value, target, log_mass=mass, **options)
    for options in ({}, {"ridge": 1e-14})
  ]
  outs = [ntk_attention(query, key, value, state) for state in states]
  np.testing.assert_allclose(*outs, rtol=0, atol=1e-5)


def test_refused_fits():
  query, key = jnp.ones((5, 4, 8)), jnp.ones((6, 2, 8))
  fit = functools.partial(fit_prefix_state, query, key, key)
  message = "target must have shape (5, 4, 8) = that of the output, got (5, 4,"
  refuse(message, fit, query[..., :3])
  refuse("target must have a floating dtype", fit, query.astype(int))
  message = "log_mass must have shape (5, 4) = (B, T, N), got (5,)"
  refuse(message, fit, query, log_mass=jnp.ones(5))
  message = "log_mass must have a floating dtype, got int"
  refuse(message, fit, query, log_mass=jnp.ones((5, 4), int))
  refuse("ridge must be positive, got 0.0", fit, query, ridge=0.0)
  refuse("scale must be positive, got -1.0", fit, query, scale=-1.0)
  message = "feature_map must be one of 'elu', 'identity', 'relu' or a Feat"
  refuse(message, fit, query, feature_map="taylor")
