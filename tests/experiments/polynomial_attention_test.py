"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments import polynomial_attention as experiment
from jaxattn.features import (
  degree_for,
  feature_count,
  polynomial_coefficients,
  polynomial_error,
)
from tests.experiments import smoke

_CONFIG = "configs/polynomial_attention.py"


def test_crossover_of_power_laws():
  n = np.array([64, 128, 256, 512])
  # 40 n against n^2 cross at 40, between 1/4 n^2 and 50 n at 200.
  assert experiment.crossover(n, n**2, 40 * n) == 64
  np.testing.assert_allclose(experiment.crossover(n, n**2 / 4, 50 * n), 200)
  assert experiment.crossover(n, n**2, 1000 * n) == 512
  # Where they cross more than once, the last one counts.
  wave = np.array([2.0, 0.5, 2.0, 2.0])
  assert experiment.crossover(n, wave, np.ones(4)) > 128


def test_limits_are_where_a_degree_starts_to_fit():
  config = harness.load_config(f"{_CONFIG}:smoke")
  limits = experiment.limit_point(config, 0.1)
  assert limits["degree"] == [2, 4, 6]
  for log_n, degree, b in zip(*limits.values(), strict=True):
    assert feature_count(log_n, degree) <= 2**log_n
    assert feature_count(log_n - 1, degree) > 2 ** (log_n - 1)
    assert degree_for(0.1, 0.99 * b**2) <= degree
    assert degree_for(0.1, 1.01 * b**2) == degree + 2


def test_error_is_the_dense_one_and_below_the_bound():
  config = harness.load_config(f"{_CONFIG}:smoke")
  bound = 1.0
  got = experiment.error_point(config, bound)
  rngs = jax.random.split(experiment._key(config, 1000), 2)
  shape = (1, config.error_length, 1, config.error_dim)
  query, key = bound * experiment._uniform(rngs[0], (2, *shape))[:, 0, :, 0]
  value = experiment._uniform(rngs[1], shape)[0, :, 0]
  logits = np.asarray(query @ key.T / config.error_dim)
  weights = np.exp(logits)
  exact = weights @ value / weights.sum(-1, keepdims=True)
  for i, degree in enumerate(config.degrees):
    coefs = polynomial_coefficients(degree, bound**2)
    weights = np.polynomial.polynomial.polyval(logits, coefs)
    approx = weights @ value / weights.sum(-1, keepdims=True)
    want = np.abs(approx - exact).max()
    np.testing.assert_allclose(got["error"][i], want, rtol=1e-6)
    eps = polynomial_error(coefs, bound**2)
    limit = np.ptp(value, 0).max() * math.tanh(math.atanh(eps) / 2)
    np.testing.assert_allclose(got["bound"][i], limit, rtol=1e-9)
    assert want / limit <= got["used"][i] <= 1


@pytest.mark.parametrize("mode", experiment._MODES)
def test_full_size_is_traced(mode):
  config = harness.load_config(f"{_CONFIG}:full")
  sizes, lengths = experiment._grid(config, mode)
  dim, degree = max(sizes)
  x = jax.ShapeDtypeStruct((1, max(lengths), 1, dim), jnp.float32)
  for g in (None, degree):
    call = experiment.timed_call(g, *experiment._MODES[mode])
    out = jax.eval_shape(call, x, x, x, x)
    leaves = jax.tree.leaves(out)
    assert len(leaves) == (4 if "backward" in mode else 1)
    assert all(leaf.shape == x.shape for leaf in leaves)


def test_full_errors_and_gradients_are_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  n, dim = config.gradient_length, config.gradient_dim
  x = jax.ShapeDtypeStruct((1, n, 1, dim), jnp.float64)

  def gradient(query, key, value, cotangent):
    attend = functools.partial(
      experiment.polynomial_attention,
      degree=max(config.degrees),
      radius=1.0,
      backward="closed_form",
    )
    return jax.vjp(attend, query, key, value)[1](cotangent)

  assert [g.shape for g in jax.eval_shape(gradient, x, x, x, x)] == [
    x.shape
  ] * 3


def test_smoke(tmp_path):
  verdict = smoke.run_twice("polynomial_attention", tmp_path, num_checks=22)
  # What does not depend on the clock holds at any size.
  for name, (low, high) in verdict.accepted.items():
    if name in verdict.measured:
      assert verdict.measured[name] >= (-math.inf if low is None else low), name
      assert verdict.measured[name] <= (math.inf if high is None else high), (
        name
      )
