"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import asymmetric_tsf as experiment
from experiments import harness
from tests.experiments import smoke

_CONFIG = "configs/asymmetric_tsf.py"


def test_errors_of_windows_whose_sign_changes():
  x = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
  y = np.array([[2.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
  found = experiment.forecast_errors(np.zeros((4, 2)), x, y)
  # The second and the third; a difference of 0 has no sign to change.
  assert found["share"] == 0.5
  assert found["changed"] == 1
  assert found["next"] == 6 / 4
  assert found["all"] == 6 / 8


def test_forecaster_is_the_best_of_its_checks():
  """Trained to forecast the opposite, it is worse by the step."""
  config = harness.load_config(f"{_CONFIG}:smoke").copy_and_resolve_references()
  x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 6)), jnp.float32)
  train, val = (x, x[:, -2:] + 9), (x, x[:, -2:] - 9)
  model = nn.Dense(2)
  losses = {}
  for checks in (1, 4):
    with config.unlocked():
      config.forecaster_checks = checks
    params = experiment.fit_forecaster(config, model, train, val)
    losses[checks] = jnp.square(model.apply(params, x) - val[1]).mean()
  assert losses[4] < losses[1]


def test_risk_of_the_forecast_zero():
  """The second moment of what comes, on all samples and where signs change."""
  config = harness.load_config(f"{_CONFIG}:cpu")
  point = experiment.risk_point(config, "zero", 0)
  theta = np.arccos(config.gamma)
  square = 1 - np.sin(theta) * np.cos(theta) / theta
  for key, want in (("id", 1), ("ood", square)):
    gap = point[key] - (want + config.noise**2)
    assert abs(gap) < 4.5 * point[f"{key} error"]


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  x = jax.ShapeDtypeStruct((config.num_train, config.dim), jnp.float32)
  y = jax.ShapeDtypeStruct((config.num_train,), jnp.float32)

  def fit(name, x, y):
    return experiment.trained(config, name, jax.random.key(0), (x, y))

  for name in ("plain", "position bias"):
    params = jax.eval_shape(functools.partial(fit, name), x, y)
    assert params["w"].shape == (config.width,)


def test_smoke(tmp_path):
  pytest.importorskip("statsmodels", reason="its series is of statsmodels")
  verdict = smoke.run_twice("asymmetric_tsf", tmp_path / "a", num_checks=6)
  measured = verdict.measured
  # A lower bound holds for any predictor that is blind, however trained.
  for name in experiment._BLIND:
    label = f"risk of {name} less the floor, in standard errors, least of draws"
    assert measured[label] > -4
