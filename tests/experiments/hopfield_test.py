"""The experiment's own mathematics, its sizes, and the claims it decides."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from experiments import _hopfield_bags as bags
from experiments import harness
from experiments import hopfield as experiment
from tests.experiments import smoke

_CONFIG = "configs/hopfield.py"


def test_rank_is_that_of_the_softmax():
  x, patterns = experiment.instance(60, 4, 2.0, 0)
  weights = special.softmax(x @ patterns.T / 4, axis=1)
  sizes = np.linalg.svd(weights, compute_uv=False)
  for tol in (1e-1, 1e-2, 1e-3):
    want = int((sizes > tol * sizes[0]).sum())
    assert experiment.numerical_rank(x, patterns, tol) == want
  assert experiment.numerical_rank(x, patterns, 1e-3) > 10
  logits = x @ (patterns - patterns.mean(0)).T / 4
  want = np.abs(logits).max()
  np.testing.assert_allclose(experiment.largest_logit(x, patterns), want)


def test_crossing_lies_between_the_bounds_around_it():
  config = harness.load_config(f"{_CONFIG}:cpu")
  ranks = np.array([5, 5, 15, 31, 62, 170, 294])
  unit = math.sqrt(math.log(1024))
  got = experiment.crossing(config, ranks)
  want = 3 + (256 - 170) / (294 - 170)
  np.testing.assert_allclose(got, want / unit)
  assert math.isnan(experiment.crossing(config, ranks // 2))


def test_numbers_that_nobody_measured_are_none():
  config = harness.load_config(f"{_CONFIG}:smoke")
  config.capacity_max = 32
  point = experiment.capacity_point(config, 9)
  assert point["first"] == math.inf
  assert max(point["shares"]) <= config.failures
  # The theorem says nothing there, and something here.
  assert not point["promised"]
  point = experiment.promised_point(config, 1.0, 75)
  assert 10 < point["promised"] < 11
  assert math.isnan(experiment.promised_point(config, 1.0, 9)["promised"])


def test_failures_are_small_own_weights():
  config = harness.load_config(f"{_CONFIG}:smoke")
  got = experiment.failures(config, 5, 8)
  rng = np.random.default_rng((config.seed, 5, 8))
  failed = []
  for _ in range(-(-config.capacity_samples // 8)):
    patterns = experiment.sphere(rng, 8, 5, 2.0)
    np.testing.assert_allclose(np.linalg.norm(patterns, axis=1), 2)
    own = np.diag(special.softmax(patterns @ patterns.T, axis=1))
    failed += list(own < 0.5)
  assert got == np.mean(failed[: config.capacity_samples])
  assert 0 < got < 1


def test_bags_hold_what_their_labels_say():
  misses, hits = -np.ones((30, 3)), np.ones((20, 3))
  x, mask, label = bags.sample_bags(
    jax.random.key(0), misses, hits, batch_size=200, sizes=(2, 6)
  )
  found = ((x[..., 0] > 0) & mask).sum(1)
  np.testing.assert_array_equal(found, label)
  assert 60 < label.sum() < 140
  assert set(np.asarray(mask.sum(1)).tolist()) == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("pooling", bags.POOLINGS)
def test_pooling_looks_at_no_order_and_at_nothing_hidden(pooling):
  model = bags.BagClassifier(pooling, 8, 4)
  x = jax.random.normal(jax.random.key(0), (2, 6, 3))
  mask = jnp.arange(6)[None].repeat(2, 0) < 4
  params = model.init(jax.random.key(1), x, mask)
  want = model.apply(params, x, mask)
  # The last two are hidden, and the others change places.
  other = x.at[:, 4:].set(7.0)[:, jnp.array([3, 1, 0, 2, 5, 4])]
  np.testing.assert_allclose(model.apply(params, other, mask), want, rtol=1e-5)
  changed = model.apply(params, x.at[:, 0].add(1.0), mask)
  assert (changed != want).all()


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  shape = (max(config.timed_lengths), config.timed_dim)
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  for call in experiment.timed_calls(config):
    assert jax.eval_shape(call, x, x).shape == shape


def test_smoke(tmp_path):
  with jax.enable_x64(False):
    verdict = smoke.run_twice("hopfield", tmp_path, num_checks=24)
  # What does not depend on the clock or on small sizes.
  for name, (low, high) in verdict.accepted.items():
    if "bound" in name or "growth" in name or "K=3" in name:
      got = verdict.measured[name]
      assert (-math.inf if low is None else low) <= got, name
      assert got <= (math.inf if high is None else high), name
