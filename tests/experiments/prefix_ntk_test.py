"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments import prefix_ntk as experiment
from jaxattn.softmax import Prefix, prefix_init
from tests.experiments import smoke

_CONFIG = "configs/prefix_ntk.py"


def test_digits_are_split_centered_and_of_unit_norm():
  x, y, x_test, labels = experiment.digits(1000)
  assert x.shape == (1000, 64)
  assert x_test.shape == (797, 64)
  assert labels.shape == (797,)
  np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1)
  assert np.abs(x.mean(0)).max() < 0.02
  np.testing.assert_allclose(y.sum(1), 0, atol=1e-12)


def test_rows_see_those_before_them():
  x, y = experiment.rows(3)
  np.testing.assert_array_equal(x[:, :, 1:], y[:, :, :-1])
  context = experiment.causal_context(x[0], x[0], x[0])
  position = x[0, 1, 4]
  weights = jnp.exp(x[0, 1, :5] @ position)
  np.testing.assert_allclose(context.log_mass[7 + 4], jnp.log(weights.sum()))
  np.testing.assert_allclose(
    context.output[7 + 4], weights @ x[0, 1, :5] / weights.sum(), atol=1e-14
  )


def test_sampling_error_is_that_of_a_mean():
  x = np.array([[0.3, 0.4], [0.0, 0.5]])
  w = np.random.default_rng(0).standard_normal((400_000, 2))
  # Weights of mean 1, the normalizer left out.
  s = np.exp(w @ x.T - np.square(x).sum(1) / 2)
  products = s[:, :, None] * s[:, None]
  kernel = np.exp(x @ x.T)
  np.testing.assert_allclose(products.mean(0), kernel, rtol=0.02)
  want = np.sqrt((products.var(0)).sum()) / np.linalg.norm(kernel)
  got = experiment.sampling_error(x, kernel)
  np.testing.assert_allclose(got, want, rtol=0.05)


def test_states_of_high_degree_are_as_good_as_the_prefix():
  initial, prefix = (
    Prefix(*(jnp.asarray(y, jnp.float64) for y in p))
    for p in (
      prefix_init(jax.random.key(i), 20, 1, 3, key_std=0.3) for i in (0, 1)
    )
  )
  x = jax.random.normal(jax.random.key(2), (2, 5, 3)) / 3
  errors = experiment.state_errors((2, 6), initial, prefix, x)
  for what in ("output", "learned"):
    low, high = (float(errors[f"{what}, taylor {g}"]) for g in (2, 6))
    assert high < 1e-5
    assert high < low < 0.1 < errors[f"{what}, elu"]
  assert errors["output, none"] > 0.05


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  rng = jax.random.key(0)
  m = max(config.scale_lengths)
  fn = functools.partial(experiment.train_at_scale, config)
  found = jax.eval_shape(
    lambda r: fn(r, m, jnp.float32(m), jnp.float32(0.5)), rng
  )
  assert found["loss"].shape == (config.scale_steps + 1,)


def test_smoke(tmp_path):
  with jax.enable_x64(False):
    smoke.run_twice("prefix_ntk", tmp_path, num_checks=10)
