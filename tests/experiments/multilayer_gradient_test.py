"""The experiment's own mathematics, its sizes, and that it runs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments import multilayer_gradient as experiment
from jaxattn.attention import softmax_attention
from tests.experiments import smoke

pytest.importorskip("flax", reason="the models need flax")

_CONFIG = "configs/multilayer_gradient.py"


def test_dense_attention_in_tiles_is_softmax():
  query, key, value, _ = experiment.table_inputs(jax.random.key(0), 4)
  want = softmax_attention(query, key, value, scale=1.0)
  for rows in (160, 100, 32):
    got = experiment.dense_attention(query, key, value, rows=rows)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_errors_of_the_table_by_hand():
  d, rng = 4, jax.random.key(0)
  query, key, value, g = (
    np.asarray(x[0, :, 0]) for x in experiment.table_inputs(rng, d)
  )

  def attend(weights_fn, query, key, value):
    weights = weights_fn(query @ key.T)
    return weights / weights.sum(1, keepdims=True) @ value

  def taylor(x):
    return 1 + x + x**2 / 2

  got, relative = experiment.table_errors(rng, d)[..., 0]
  results = []
  for fn in (jnp.exp, taylor):
    out, vjp = jax.vjp(functools.partial(attend, fn), query, key, value)
    results.append((np.ravel(out), np.concatenate(vjp(g), None)))
  want = [
    np.linalg.norm(x - y) / np.linalg.norm(x + y)
    for x, y in zip(*results, strict=True)
  ]
  np.testing.assert_allclose(got, want, rtol=1e-4)
  want = [
    np.linalg.norm(x - y) / np.linalg.norm(x)
    for x, y in zip(*results, strict=True)
  ]
  np.testing.assert_allclose(relative, want, rtol=1e-4)


def test_spread_of_weights():
  model = experiment.error_model(2)
  params, (x, _) = experiment.random_model([0], model, 32)
  layers = params["params"]["layers"]
  assert x.shape == (1, 32, 16)
  assert (layers["mlp_norm"]["scale"] == 1).all()
  for name, spread in (("query", 0.7), ("key", 0.7), ("mlp_in", 1.0)):
    kernel = layers[name]["kernel"]
    assert kernel.shape[0] == 2
    np.testing.assert_allclose(kernel.std(), spread / 4, rtol=0.15)


def test_text_models_differ_in_attention_alone():
  config = harness.load_config(f"{_CONFIG}:cpu")
  exact = experiment.text_model(config, "exact,R=2")
  low = experiment.text_model(config, "degree=4,R=2")
  np.testing.assert_allclose(exact.qk_norm**2, 2)
  assert dict(low.attention_options)["radius"] == 2
  assert dict(low.attention_options)["degree"] == 4
  assert exact == low._replace(attention="softmax", attention_options=())
  names = experiment._text_names(config)
  assert len(names) == len(config.radii) * (1 + len(config.text_degrees))


def test_race_runs_in_turn_after_a_warm_up():
  order = []
  names = ("a", "b")
  contestants = {n: functools.partial(order.append, n) for n in names}
  seconds = harness.least_seconds(contestants, rounds=2)
  assert order == ["a", "b"] * 3
  assert all(0 < seconds[n] < math.inf for n in names)


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  n = max(config.lengths)
  for attention in ("softmax", "polynomial", "dot_product"):
    model = experiment.step_model(config, attention, 8)
    params, _ = experiment.random_model([0], model, 32)
    x = jax.ShapeDtypeStruct((1, n, config.step_dim), jnp.float32)
    grads = jax.eval_shape(experiment.step(model), params, x)
    assert jax.tree.structure(grads) == jax.tree.structure(params)

  from jaxattn.models import Transformer

  model = Transformer(experiment.text_model(config, "degree=4,R=4"))
  shape = (config.batch_size, config.text_length + 1)
  batch = jax.ShapeDtypeStruct(shape, jnp.int32)
  rng = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.eval_shape(lambda rng, b: model.init(rng, b[:, 1:]), rng, batch)
  loss = functools.partial(experiment.text_loss, model)
  flag = jax.ShapeDtypeStruct((), jnp.bool_)
  loss, metrics = jax.eval_shape(loss, params, (batch, flag), rng)
  assert loss.shape == metrics["logit_radius"].shape == ()
  errors = jax.eval_shape(lambda r: experiment.table_errors(r, 12), rng)
  assert errors.shape == (2, 2, 2)


def test_largest_logit_is_measured_where_it_is_logged():
  from jaxattn.models import Transformer

  config = harness.load_config(f"{_CONFIG}:smoke")
  model = Transformer(experiment.text_model(config, "degree=4,R=1"))
  ids = jax.random.randint(jax.random.key(0), (2, 17), 0, 128)
  params = model.init(jax.random.key(1), ids[:, :-1])

  @jax.jit
  def gradient(params, is_logged):
    def loss(params):
      return experiment.text_loss(model, params, (ids, is_logged), ids)

    return jax.grad(loss, has_aux=True)(params)

  _, stats = model.apply(params, ids[:, :-1], return_stats=True)
  for is_logged, want in ((True, stats.logit_radius.max()), (False, 0)):
    _, metrics = gradient(params, is_logged)
    np.testing.assert_allclose(metrics["logit_radius"], want, rtol=1e-5)


def test_other_depths_and_lengths_are_decided_without_what_is_missing():
  config = harness.load_config(f"{_CONFIG}:cpu")
  errors = {
    depth: {"weights": [[0.1]], "inputs": [[0.2]], "eps": [[0.4]]}
    for depth in (1, 2)
  }
  names = [c.name for c in experiment._error_checks(config, errors)]
  assert len(names) == 4
  assert not any("growth" in name for name in names)
  seconds = {
    f"{a}/{d}": float(d)
    for a in ("polynomial", "softmax")
    for d in config.depths
  }
  steps = {n: {k: n * s for k, s in seconds.items()} for n in config.lengths}
  matrix = {n: {"matrix/1": n**2} for n in (256, 512, 1024)}
  names = [c.name for c in experiment._step_checks(config, steps, matrix)]
  assert not any("whole matrix, 1 layer, n=" in name for name in names)


def test_speed_up_of_a_step_is_decided_at_all_depths():
  config = harness.load_config(f"{_CONFIG}:cpu")
  steps = {}
  for n in config.lengths:
    ours = {f"polynomial/{d}": d * n / 1e5 for d in config.depths}
    steps[n] = ours | {
      "softmax/1": 6 * n**2 / 8192e5,
      "softmax/8": 4 * 8 * n / 1e5,
    }
  matrix = {n: {"matrix/1": n**2} for n in config.matrix_lengths}
  checks = experiment._step_checks(config, steps, matrix)
  decided = {c.name: c.measured >= c.low for c in checks if c.low > 0}
  assert decided["speed-up of a step, 1 layer, n=8192"]
  assert not decided["speed-up of a step, 8 layers, n=8192"]
  assert decided["slope of seconds by length, exact, 1 layer"]


def test_smoke(tmp_path):
  smoke.run_twice("multilayer_gradient", tmp_path, num_checks=14)
