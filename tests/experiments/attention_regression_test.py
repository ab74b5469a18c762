"""The experiment's own mathematics, its sizes, and the claims it decides."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import attention_regression as experiment
from experiments import harness
from jaxattn import newton
from jaxattn.regression import attention
from tests.experiments import smoke

_CONFIG = "configs/attention_regression.py"


def test_steps_to_a_decade_are_read_between_steps():
  norms = np.array([10.0, 1.0, 1e-1, 1e-3])
  steps = experiment.steps_to(norms, 5)
  np.testing.assert_allclose(steps[:4], [1, 2, 2.5, 3])
  assert np.isnan(steps[4])


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_order_of_convergence(power):
  errors = [0.1]
  while errors[-1] > 1e-15 and len(errors) < 8:
    errors.append(0.5 * errors[-1] ** power)
  order = experiment.order(np.array(errors))
  np.testing.assert_allclose(order, power, rtol=1e-6)
  assert math.isnan(experiment.order(np.array([0.1, 1e-9, 1e-14])))


def test_digits_are_cut_into_rows_of_their_own_image():
  config = harness.load_config(f"{_CONFIG}:smoke")
  train, test = experiment.digits_data(config)
  for part in (train, test):
    n = 7 * config.images
    assert part["a1"].shape == (n, 15)
    assert part["mask"].sum() == 49 * config.images
    # The target is the next token's pixels, but for the last of an image.
    inner = np.arange(n) % 7 < 6
    now = np.roll(part["a1"][:, :8], -1, 0)
    np.testing.assert_array_equal(part["b"][inner], now[inner])
  assert not np.array_equal(train["b"], test["b"])
  data = attention.prepare(**train)
  allowed = np.isfinite(data.bias)
  np.testing.assert_array_equal(allowed[:7, :7], np.tri(7, dtype=bool))
  assert not allowed[:7, 7:].any()
  assert not allowed[7:14, :7].any()


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  n, d = config.length, config.dim
  rows = jax.ShapeDtypeStruct((n, d), jnp.float32)
  start = jax.ShapeDtypeStruct((d, d), jnp.float32)

  def fit(start, *arrays, method):
    return attention.fit_attention(
      jax.random.key(0),
      *arrays,
      method=method,
      x0=start,
      config=newton.NewtonConfig(linear_solver=config.linear_solver),
    )

  for method in config.methods:
    found = jax.eval_shape(
      lambda *z, method=method: fit(*z, method=method), start, *[rows] * 4
    )
    assert found.x.shape == found.y.shape == (d, d)
  small = jax.ShapeDtypeStruct(
    (config.rate_length, config.rate_dim), jnp.float32
  )
  found = jax.eval_shape(
    lambda *z: attention.fit_attention(
      jax.random.key(0), *z, method="sketched"
    ),
    *[small] * 4,
  )
  assert found.result.log.loss.dtype == jnp.float32


def test_both_methods_start_at_one_point_and_only_steps_are_timed():
  config = harness.load_config(f"{_CONFIG}:smoke")
  train, test = experiment.digits_data(config)
  data, held_out = attention.prepare(**train), attention.prepare(**test)
  start = experiment._with_values(experiment._digits_start(config), data)
  run = experiment._digits_adam(config)
  end, errors = run(start, data, held_out)
  alone, none = run(start, data)
  np.testing.assert_array_equal(alone, end)
  assert none is None
  np.testing.assert_allclose(errors[-1], experiment._error(end, held_out))
  first = experiment._digits_fit(config, train).result.log.loss[0]
  np.testing.assert_allclose(first, attention.loss(start, data), rtol=1e-6)


def test_smoke(tmp_path):
  verdict = smoke.run_twice(
    "attention_regression", tmp_path / "a", num_checks=4
  )
  config = harness.load_config(f"{_CONFIG}:smoke")
  assert verdict.measured["joint: most steps"] <= config.max_steps
