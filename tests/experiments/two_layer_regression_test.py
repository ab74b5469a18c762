"""The experiment's own mathematics, its sizes, and that it runs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments import two_layer_regression as experiment
from jaxattn import newton
from jaxattn.regression import two_layer
from tests.experiments import smoke

_CONFIG = "configs/two_layer_regression.py"


def test_best_of_several_starts():
  losses = np.array([5.0, 1.0, 2.0, 7.0])
  got = experiment.best_of(losses)
  for k in range(1, 5):
    drawn = itertools.combinations(losses, k)
    want = np.mean([min(some) for some in drawn])
    np.testing.assert_allclose(got[k - 1], want)


def test_share_of_starts_at_the_best_loss():
  starts = {
    "zero": np.array([[2.0, 1.0, 1.005], [3.0, 3.0, 3.0]]),
    "planted": np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.02]]),
  }
  found = experiment.reached(starts)
  np.testing.assert_allclose(found["zero"], [2 / 3, 0])
  np.testing.assert_allclose(found["planted"], [1, 2 / 3])


def test_groups():
  a2 = np.asarray(experiment.group_means(0, 569, 32))
  np.testing.assert_allclose(a2.sum(1), 0, atol=1e-9)
  f = np.random.default_rng(0).dirichlet(np.ones(569))
  # Every patient is in one group, of 17 or 18.
  member = a2 > 0
  assert member.sum(0).tolist() == [1] * 569
  assert set(member.sum(1)) == {17, 18}
  want = [569 * f[m].mean() - 1 for m in member]
  np.testing.assert_allclose(a2 @ f, want)
  features, ill = experiment.patients()
  np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(features.std(0), 1, rtol=1e-5)
  assert ill.sum() == 212


@pytest.mark.parametrize(("entries", "density"), [(1, 0.01), (4, 4 / 64)])
def test_sparse_problem(entries, density):
  config = harness.load_config(f"{_CONFIG}:cpu")
  data, x = experiment.sparse_problem(config, 20_000, entries, density)
  stored = (data.a1.values != 0).sum()
  np.testing.assert_allclose(
    stored, 20_000 * config.timed_dim * density, rtol=0.02
  )
  assert data.a1.values.shape == (20_000, entries)
  out = two_layer.predict(x, data.a1, data.a2)
  np.testing.assert_allclose(jnp.std(data.b - out), config.noise, rtol=0.4)


@pytest.mark.parametrize("name", experiment._TIMED)
def test_full_size_is_traced(name):
  config = harness.load_config(f"{_CONFIG}:full")
  n, d = max(config.timed_lengths), config.timed_dim
  m, k = config.timed_units, config.entries
  array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float64)
  a1 = newton.Design(array((n, k), dtype=jnp.int32), array((n, k)), d)
  data = two_layer.TwoLayerData(
    a1, array((m, n)), array((m,)), array((n,)), array((d, d)), array(())
  )
  rng = jax.eval_shape(lambda: jax.random.key(0))
  options = experiment.timed_configs(config)[name]

  def run(x0, data, rng):
    problem = two_layer.problem()
    state = newton.init(problem, x0, data, config=options)
    return newton.step(problem, state, data, config=options, rng=rng)

  state, _ = jax.eval_shape(run, array((d,)), data, rng)
  assert state.x.shape == (d,)


def test_smoke(tmp_path):
  verdict = smoke.run_twice("two_layer_regression", tmp_path, num_checks=6)
  name = "order of convergence, exact steps, w=0.01"
  low, high = verdict.accepted[name]
  assert low <= verdict.measured[name] <= high
