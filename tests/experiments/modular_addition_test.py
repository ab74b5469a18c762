"""What the experiment measures, its sizes, and that it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments import modular_addition as experiment
from jaxattn import models
from jaxattn.ntk import margin
from tests.experiments import smoke

_CONFIG = "configs/modular_addition.py"


def test_statistics_of_an_exact_network():
  net = margin.fourier_network(7, 2, kind="paper")
  # A dead neuron of another kind changes nothing.
  net = margin.PolyNet(
    jnp.concatenate([net.inner, 1e-3 * jnp.eye(2, 7)[None]]),
    jnp.concatenate([net.outer, jnp.zeros((1, 7))]),
  )
  assert experiment.paper_neurons(2, 7) == len(net.outer) - 1
  found = experiment.network_statistics(net)
  assert found["active"] == len(net.outer) - 1
  for key in ("margin", "accuracy", "coverage", "alignment"):
    np.testing.assert_allclose(found[key], 1, atol=1e-5)
  np.testing.assert_allclose(found["power_share"], 1, atol=1e-5)


def test_exact_point():
  found = experiment.exact_point(2, 5)
  assert found["error"] < 1e-12
  assert (found["lattice"], found["grid3"], found["paper"]) == (12, 18, 16)


def _point(value):
  ones = np.ones(3)
  return {
    "margin": value,
    "power_share": value * ones,
    "coverage": value,
    "alignment": value,
    "active": 3,
    "power_share_before": ones,
  }


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_seed_that_failed_is_seen(place):
  config = harness.load_config(f"{_CONFIG}:cpu")
  points = [_point(1.0)] * 3
  points[place] = _point(np.nan)
  size = (3, 7, 96, config.weight, 5000)
  checks = experiment._trained_checks(
    config, {size: points}, [size], config.accepted
  )
  assert np.isnan([check.measured for check in checks[:3]]).all()
  assert harness.decide(checks) != "reproduced"
  checks = experiment._point_checks(config, "", points, True)
  assert np.isnan([check.measured for check in checks]).all()


def test_what_decides_of_a_sweep():
  config = harness.load_config(f"{_CONFIG}:cpu")
  decides = functools.partial(experiment._decides, config)
  assert decides(3, 1.0, 1e-4)
  assert decides(4, 2.0, 1e-5)
  assert decides(2, 4.0, 1e-4)
  assert not decides(2, 2.0, 1e-4)
  assert not decides(3, 0.5, 1e-4)
  assert not decides(3, 1.0, 1e-3)


def test_steps_to_know():
  point = {
    "step": np.array([2, 4, 6]),
    "train": np.array([0.5, 0.99, 0.9]),
    "test": np.array([0.5, 0.9, 0.98]),
  }
  assert experiment.first_step(point, "train") == 4
  assert experiment.first_step(point, "test") == np.inf
  # What is not reached has no row.
  found = [x.measured for x in experiment._step_checks([point], "")]
  assert found == [0, 4]
  other = {**point, "test": np.array([0.9, 0.9, 1.0])}
  found = [x.measured for x in experiment._step_checks([other], "")]
  assert found == [1, 4, 6, 2]


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  shape = jax.ShapeDtypeStruct
  rng = jax.eval_shape(lambda: jax.random.key(0))
  for k, p, m, weight, steps, batch_size in config.split:
    net = margin.PolyNet(
      shape((m, k, p), jnp.float32), shape((m, p), jnp.float32)
    )
    train = functools.partial(
      models.train_poly_net,
      num_steps=steps,
      reg_weight=weight,
      batch_size=batch_size,
      log_every=config.split_every,
    )
    inputs, labels = shape((p**k // 2, k), jnp.int32), shape((p**k // 2,), "i4")
    got, history = jax.eval_shape(
      lambda net, x, y, rng, train=train: train(net, x, y, rng=rng),
      net,
      inputs,
      labels,
      rng,
    )
    assert got.inner.shape == (m, k, p)
    assert history.loss.shape == (steps // config.split_every + 1,)
    # The weight leaves room for something else than zero.
    assert weight < 0.1 * margin.max_margin(p, k)
  for k, p in config.attention:
    model = experiment.attention_model(config, p)
    half = shape((p**k // 2, k), jnp.int32), shape((p**k // 2,), jnp.int32)
    batch = jax.eval_shape(
      lambda rng, half: experiment.batch_of(
        rng, 0, half, config.attention_batch
      ),
      rng,
      half,
    )
    params = jax.eval_shape(model.init, rng, half[0])
    loss = functools.partial(experiment.attention_loss, model.apply)
    grads = jax.eval_shape(jax.grad(loss, has_aux=True), params, batch, rng)[0]
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    # What all heads hold of a batch fits.
    assert len(batch[1]) * k * config.num_heads * config.head_dim < 2**27
  k, p = config.grokking[-1]
  model = experiment.grokking_model(config, p)
  half = shape((p**k // 2, k), jnp.int32), shape((p**k // 2,), jnp.int32)
  params = jax.eval_shape(model.init, rng, half[0])
  histories = jax.eval_shape(
    functools.partial(experiment.grokking_run, config=config, p=p),
    rng,
    params,
    half,
    half,
  )
  logs = config.grokking_steps // config.grokking_every
  assert [x.shape for x in histories] == [(logs,)] * 2


def test_smoke(tmp_path):
  with jax.enable_x64(False):
    verdict = smoke.run_twice("modular_addition", tmp_path, num_checks=10)
  measured = verdict.measured
  assert measured["exact networks, largest error of margin / gamma*"] < 1e-9
  # With a weight this small the margin of a trained network is near the best.
  assert 0.5 < measured["least margin / gamma*, k=2, p=5, 64 neurons"] < 1.0001
