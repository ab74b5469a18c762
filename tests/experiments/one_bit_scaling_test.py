"""The experiment's own mathematics, its sizes, and that it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex_core

from experiments import harness
from experiments import one_bit_scaling as experiment
from tests.experiments import smoke

_CONFIG = "configs/one_bit_scaling.py"


def test_data_are_of_norm_one_and_balanced():
  config = harness.load_config(f"{_CONFIG}:cpu")
  for data in (
    experiment.digits(config),
    experiment.synthetic(config, "logarithm"),
  ):
    x, y, x_test, y_test = data
    assert len(x) == len(y)
    assert len(x_test) == len(y_test) >= len(x)
    np.testing.assert_allclose(jnp.linalg.norm(x, axis=1), 1, rtol=1e-5)
    assert abs(float(y.mean())) < 0.2
    assert abs(float(y.std()) - 1) < 0.2


def test_short_inputs_are_refused(tmp_path):
  config = harness.load_config(f"{_CONFIG}:smoke")
  config.path_dim = 7
  message = "sign kernels are meaningless for dim < 8, got config.path_dim=7"
  with pytest.raises(harness.UsageError, match=message):
    experiment.run(config, tmp_path)


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  n, num_test = config.synthetic_data
  d = config.synthetic_dim
  shape = jax.ShapeDtypeStruct
  train = experiment.twins(config.synthetic_steps, config.window)
  found = jax.eval_shape(
    lambda rng, *args: train(rng, max(config.synthetic_widths), *args),
    jax.eval_shape(jax.random.key, 0),
    shape((n, d), jnp.float32),
    shape((n,), jnp.float32),
    shape((num_test, d), jnp.float32),
    shape((num_test,), jnp.float32),
    shape((), jnp.float32),
  )
  assert found["gap"].shape == ()
  rate = jax.jit(
    lambda x: experiment.learning_rate(config, (x, None, None, None))
  ).trace(shape((n, d), jnp.float32))
  assert max(_sizes(rate.jaxpr.jaxpr)) < n**2 / 50


def _sizes(jaxpr):
  """Of every array that a program makes, its inner ones too."""
  for equation in jaxpr.eqns:
    yield from (v.aval.size for v in equation.outvars)
    for inner in jex_core.jaxprs_in_params(equation.params):
      yield from _sizes(inner)


def test_smoke(tmp_path):
  smoke.run_twice("one_bit_scaling", tmp_path / "a", num_checks=8)
