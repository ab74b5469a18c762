"""The experiment's own mathematics, its sizes, and that it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import _regression, harness
from experiments import softmax_resnet_regression as experiment
from jaxattn import newton
from jaxattn.regression import softmax_resnet
from tests.experiments import smoke

_CONFIG = "configs/softmax_resnet_regression.py"


def _residual(x, y):
  return x**2 - y


def test_order_and_factor():
  quadratic = 0.5 ** (2.0 ** np.arange(8))
  np.testing.assert_allclose(_regression.order(quadratic), 2)
  np.testing.assert_allclose(_regression.order(0.1 ** np.arange(5)), 1)
  assert np.isnan(_regression.order(np.array([1.0, 1e-20, 1e-30])))
  # Two paths of factors 0.1 and 0.4: the second does not end.
  steps = np.arange(31)
  paths = np.stack([3 * 0.1**steps, 0.4**steps])
  np.testing.assert_allclose(_regression.factor_per_step(paths), 0.2)
  # Rounding after convergence, and whatever comes after being lost.
  paths = np.array([[1, 1e-4, 1e-8, 1e-12, 1e-12], [1, 1e3, np.nan, 5, 5]])
  want = np.sqrt(1e-4 * 1e3)
  np.testing.assert_allclose(_regression.factor_per_step(paths), want)


def test_steps_to_levels():
  errors = np.array([[2.0, 0.2, 0.1, 0.01], [1.0, 1.0, 0.05, 0.04]])
  got = _regression.steps_to(errors, [0.1, 0.05, 1e-3])
  np.testing.assert_array_equal(got, [1.5, 2.0, np.nan])
  slope, r_squared = _regression.line([1, 2, 3], [2.0, 4.0, 6.0])
  np.testing.assert_allclose([slope, r_squared], [2, 1])


def test_errors_are_in_the_norm_of_the_hessian():
  problem = newton.least_squares_problem(_residual)
  y = jnp.array([4.0, 9.0])
  minimum = _regression.find_minimum(problem, jnp.ones(2), y, mu0=1e-2)
  np.testing.assert_allclose(minimum.x, [2, 3], rtol=1e-14)
  # H = diag(4 x^2) = diag(16, 36).
  got = minimum.error([[2.0, 3.0], [2.5, 3.0], [3.0, 4.0]])
  np.testing.assert_allclose(got, [0, 2, np.sqrt(52)], atol=1e-12)


def test_pure_path_is_newtons_method():
  problem = newton.least_squares_problem(_residual)
  x, y = np.array([2.5]), np.array([4.0])
  path = _regression.pure_path(problem, jnp.asarray(x), y, num_steps=3)
  for got in path:
    np.testing.assert_allclose(got, x, rtol=1e-12)
    # L = (x^2 - 4)^2 / 2.
    x = x - 2 * x * (x**2 - y) / (6 * x**2 - 2 * y)


def test_optimizers_of_optax_see_the_scaled_loss():
  problem = newton.least_squares_problem(_residual)
  x0, y = jnp.array([1.5]), jnp.array([4.0])
  run = functools.partial(
    _regression.first_order_path, problem=problem, x0=x0, data=y, num_steps=1
  )
  got = run(optax.sgd(0.1), scale=2.0)
  grad = 2 * 2 * 1.5 * (1.5**2 - 4)
  np.testing.assert_allclose(got, [[1.5], [1.5 - 0.1 * grad]])
  minimum = _regression.find_minimum(problem, x0, y, mu0=1e-2)
  rates = (1e-3, 0.3)
  best = _regression.best_adam_path(
    rates, minimum, problem, x0, y, scale=1.0, num_steps=1
  )
  np.testing.assert_allclose(best[1], [1.8], rtol=1e-6)


def test_sampling_all_rows_often_is_exact():
  config = harness.load_config(f"{_CONFIG}:smoke")
  data, x = experiment.planted(config, 50, 3, condition=1.0, weight=0.1)
  h = softmax_resnet.curvature(x, data)
  prob = _regression.leverage_probabilities(h)
  np.testing.assert_allclose(prob.sum(), 1)
  assert prob.min() >= 0.1 / 50
  rngs = jax.random.split(jax.random.key(0), 3)
  few, many = (
    _regression.sketch_errors(h, prob, rngs, num_rows=m) for m in (50, 200_000)
  )
  assert many.max() < 0.05 < few.min()


def test_planted_problem():
  config = harness.load_config(f"{_CONFIG}:smoke")
  for condition in (1.0, 30.0):
    data, x = experiment.planted(
      config, 400, 5, condition=condition, weight=0.1
    )
    size = jnp.linalg.norm(data.a, axis=0)
    np.testing.assert_allclose(size[0] / size[-1], condition, rtol=0.2)
    # Entries of x grow as columns shrink: logits do not depend on it.
    assert 0.3 < jnp.std(data.a @ x) < 3
    f = softmax_resnet.predict(x, data.a)
    np.testing.assert_allclose(jnp.std(data.b / f), config.noise, rtol=0.15)
    np.testing.assert_allclose(data.w2, (0.1 / 400) ** 2)


def test_features_of_digits():
  table = experiment.cosines(4, with_constant=True)
  np.testing.assert_allclose(table.T @ table, np.eye(16), atol=1e-12)
  np.testing.assert_allclose(table[:, 0], 1 / 8)
  np.testing.assert_array_equal(
    experiment.cosines(4, with_constant=False), table[:, 1:]
  )
  digits = experiment.mean_digits()
  assert digits.shape == (10, 64)
  np.testing.assert_allclose(digits.sum(1), 1)
  # A zero is empty in the middle, a one is not.
  middle = digits[:, 27] * 64
  assert middle[0] < 0.5 < 1.5 < middle[1]


def test_targets_at_once():
  config = harness.load_config(f"{_CONFIG}:smoke")
  config.targets_length, config.targets_dim = 2000, 4
  found = experiment.targets_point(config)
  assert all(x.shape == (config.num_targets,) for x in found.values())
  assert found["off"].dtype == jnp.float32
  assert (found["reason"] == 1).all()
  # Noise of 5 %, of 2000 items: about 0.05 sqrt(4 / 2000).
  assert found["off"].max() < 0.02


def test_full_size_of_targets_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  rng = jax.eval_shape(lambda: jax.random.key(0))
  found = jax.eval_shape(functools.partial(experiment.fit_targets, config), rng)
  assert found["off"].shape == (32,)
  assert found["off"].dtype == jnp.float32


@pytest.mark.parametrize("name", experiment._TIMED)
def test_full_size_of_steps_is_traced(name):
  config = harness.load_config(f"{_CONFIG}:full")
  n, d = config.length_of_dims, max(config.dims)
  array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float64)
  data = softmax_resnet.SoftmaxResnetData(
    array((n, d)), array((n,)), array((n,)), array((d, d)), array(()), array(())
  )
  options = experiment.timed_configs(config, d)[name]

  def run(x0, data, rng):
    problem = softmax_resnet.problem()
    state = newton.init(problem, x0, data, config=options)
    return newton.step(problem, state, data, config=options, rng=rng)

  rng = jax.eval_shape(lambda: jax.random.key(0))
  state, _ = jax.eval_shape(run, array((d,)), data, rng)
  assert state.x.shape == (d,)


def test_smoke(tmp_path):
  verdict = smoke.run_twice("softmax_resnet_regression", tmp_path, num_checks=9)
  # What does not depend on the clock, or on size.
  for name in ("order of convergence, exact steps",):
    low, high = verdict.accepted[name]
    assert low <= verdict.measured[name] <= high
