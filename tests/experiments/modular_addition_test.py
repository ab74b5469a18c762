"""What the experiment measures, its sizes, and that it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

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
  model = experiment.attention_model(config)
  terms = shape((8, config.attention_terms), jnp.int32)
  params = jax.eval_shape(model.init, rng, terms)
  logits = jax.eval_shape(model.apply, params, terms)
  assert logits.shape == (8, config.attention_modulus)
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
    verdict = smoke.run_twice("modular_addition", tmp_path, num_checks=8)
  measured = verdict.measured
  assert measured["exact networks, largest error of margin / gamma*"] < 1e-9
  # With a weight this small the margin of a trained network is near the best.
  assert 0.5 < measured["least margin / gamma*, k=2, p=5, 64 neurons"] < 1.0001
