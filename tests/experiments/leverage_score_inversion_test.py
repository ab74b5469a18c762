"""The experiment's own mathematics, its sizes, and the claims it decides."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments import leverage_score_inversion as experiment
from jaxattn.regression import leverage_inversion
from tests.experiments import smoke

_CONFIG = "configs/leverage_score_inversion.py"


def test_hidden_points_are_at_their_share_of_the_way():
  a, b, x = experiment.instance(60, 5, 0, 0.7)
  slack = a @ x - b
  assert slack.min() > 0
  # 1 / 0.7 times as far one slack is gone, and no other.
  np.testing.assert_allclose((a @ x / 0.7 - b).min(), 0, atol=1e-12)
  again = experiment.instance(60, 5, 0, 0.9)[2]
  np.testing.assert_allclose(again, x * 0.9 / 0.7)


def test_paths_are_those_of_the_methods():
  data, x, center = experiment.planted(40, 3, 0, 0.7)
  path = experiment.newton_path("cholesky", data, center, num_steps=12)
  np.testing.assert_array_equal(path[0], center)
  np.testing.assert_allclose(path[-1], x, atol=1e-12)
  fixed = experiment.fixed_path(data, center, jnp.array(0.1), num_steps=2)
  _, grad = leverage_inversion.value_and_grad(fixed[1], data)
  np.testing.assert_allclose(fixed[2], fixed[1] - 0.1 * grad, rtol=1e-12)
  losses = [
    float(leverage_inversion.loss(y, data))
    for y in experiment.descent_path(data, center, num_steps=20, every=5)
  ]
  assert len(losses) == 5
  assert (np.diff(losses) < 0).all()


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  n, d = max(config.sizes)
  x = jax.ShapeDtypeStruct((d,), jnp.float64)
  rows = jax.ShapeDtypeStruct((n, d), jnp.float64)
  line = jax.ShapeDtypeStruct((n,), jnp.float64)
  data = jax.eval_shape(leverage_inversion.prepare, rows, line, line)

  def paths(x, data):
    solver = config.linear_solver
    return (
      experiment.newton_path(solver, data, x, num_steps=config.newton_steps),
      experiment.descent_path(
        data, x, num_steps=config.descent_steps, every=config.descent_every
      ),
    )

  newton, descent = jax.eval_shape(paths, x, data)
  assert newton.shape == (config.newton_steps + 1, d)
  assert descent.shape[1] == d
  assert jax.eval_shape(experiment.timed_call(), x, data).shape == (d, d)


def test_smoke(tmp_path):
  verdict = smoke.run_twice(
    "leverage_score_inversion", tmp_path / "a", num_checks=11
  )
  # What does not depend on the clock or on few polytopes holds at any size.
  accepted, measured = verdict.accepted, verdict.measured
  for name in measured:
    if name in accepted and not name.startswith("recovered"):
      low, high = accepted[name]
      assert (-np.inf if low is None else low) <= measured[name], name
      assert measured[name] <= (np.inf if high is None else high), name
