"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from experiments import flow_matching_tsf as experiment
from experiments import harness
from jaxattn.sampling import flow_loss
from tests.experiments import smoke

_CONFIG = "configs/flow_matching_tsf.py"


def test_law_is_that_of_the_series():
  """By conditioning the covariance of past and future together."""
  config = harness.load_config(f"{_CONFIG}:cpu")
  law = experiment.law_of(config)
  noise = config.noise**2 * np.eye(config.history + config.horizon)
  joint = law.basis @ law.basis.T + noise
  n = config.history
  gain = np.linalg.solve(joint[:n, :n], joint[:n, n:])
  np.testing.assert_allclose(law.gain, gain, atol=1e-10)
  cov = joint[n:, n:] - joint[n:, :n] @ gain
  np.testing.assert_allclose(law.cov, cov, atol=1e-10)
  # The least loss by quadrature.
  values = np.linalg.eigvalsh(cov)
  least = integrate.quad(
    lambda t: (values / (t**2 * values + (1 - t) ** 2)).sum(), 0, 1
  )[0]
  np.testing.assert_allclose(law.floor, least, rtol=1e-6)


def test_windows_have_that_law():
  config = harness.load_config(f"{_CONFIG}:cpu")
  law = experiment.law_of(config)
  history, future = experiment.draw_windows(config, 0, 20_000)
  off = np.asarray(future[..., 0]) - np.asarray(history[..., 0]) @ law.gain
  assert np.abs(off.mean(0)).max() < 5 * np.sqrt(law.cov.max() / 20_000)
  np.testing.assert_allclose(off.T @ off / 20_000, law.cov, atol=0.05)


def test_gaussian_scores():
  """Against the integral that defines them."""
  off, std = np.array([0.3, -1.2]), np.array([0.5, 2.0])

  def plain(y, s):
    below = integrate.quad(lambda x: stats.norm.cdf(x / s) ** 2, -40, y)[0]
    above = integrate.quad(lambda x: stats.norm.sf(x / s) ** 2, y, 40)[0]
    return below + above

  want = [plain(*pair) for pair in zip(off, std, strict=True)]
  np.testing.assert_allclose(experiment.gaussian_crps(off, std), want)


def test_parts_do_not_overlap():
  """Futures of a part lie in it, whatever its histories reach back to."""
  pytest.importorskip("statsmodels", reason="its series is of statsmodels")
  config = harness.load_config(f"{_CONFIG}:cpu")
  config.stride = 1
  parts = experiment.parts_of(config, "co2", 104, 26)
  assert len(parts.train[0]) == 1469
  assert len(parts.test[0]) == 432
  # The last of training, then the first of validation.
  assert not (parts.train[1][-1, -1] == parts.val[1][0, 0]).all()
  np.testing.assert_array_equal(parts.val[0][26, -26:], parts.val[1][0])
  scores = experiment.baselines(parts, 52)
  np.testing.assert_allclose(scores["N-Linear mse"], 0.0033, rtol=0.02)
  np.testing.assert_allclose(scores["persistence mse"], 0.0891, rtol=0.02)


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  model = experiment.dit_of(config)
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  num = config.batch_size
  history, future = (
    shape((num, n, 1)) for n in (config.history, config.horizon)
  )
  rng = jax.random.key(0)
  params = jax.eval_shape(model.init, rng, future, shape((num,)), history)

  def gradient(params, history, future):
    def loss(params):
      batch = history, future
      return flow_loss(rng, params, batch, apply_fn=model.apply)[0]

    return jax.grad(loss)(params)

  found = jax.eval_shape(gradient, params, history, future)
  assert jax.tree.structure(found) == jax.tree.structure(params)
  assert sum(x.size for x in jax.tree.leaves(found)) > 3e7


def test_smoke(tmp_path):
  pytest.importorskip("statsmodels", reason="its series is of statsmodels")
  verdict = smoke.run_twice("flow_matching_tsf", tmp_path / "a", num_checks=11)
  # What does not depend on training holds at any size.
  for name in (
    "error of Euler's method towards a point",
    "contraction on a logarithmic grid over the predicted one, less 1",
  ):
    assert verdict.measured[name] <= verdict.accepted[name][1], name
