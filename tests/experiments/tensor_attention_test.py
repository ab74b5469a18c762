"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments import tensor_attention as experiment
from tests.experiments import smoke

_CONFIG = "configs/tensor_attention.py"


def test_radius_of_an_error():
  radius = experiment.largest_radius(2, 1e-3)
  coefs = experiment.polynomial_coefficients(2, radius)
  eps = experiment.polynomial_error(coefs, radius)
  np.testing.assert_allclose(
    2 * math.tanh(math.atanh(eps) / 2), 1e-3, rtol=1e-6
  )


def test_largest_entry_is_where_the_library_errs_so_much():
  config = harness.load_config(f"{_CONFIG}:smoke")
  point = experiment.limit_point(config, 2)
  np.testing.assert_allclose(point["error"], config.eps, rtol=0.02)
  assert all(b > law for b, law in zip(point["b"], point["law"], strict=True))


def test_inputs_are_waves():
  config = harness.load_config(f"{_CONFIG}:smoke")
  tokens = jnp.array([[0, 5, 18]])
  x = np.asarray(experiment.match3_inputs(config, tokens, 19))
  assert x.shape == (1, 3, 16)
  np.testing.assert_allclose(
    x[0, 1, 2], math.cos(2 * math.pi * 15 / 19), atol=1e-6
  )
  np.testing.assert_allclose(
    x[0, 2, 5], math.sin(2 * math.pi * 36 / 19), atol=1e-6
  )
  np.testing.assert_array_equal(x[..., 8:], 1)


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  for degree, n in ((None, config.exact_lengths[-1]), (2, config.lengths[-1])):
    x = jax.ShapeDtypeStruct((1, n, 1, 16), jnp.float32)
    call = experiment.timed_call(degree, with_gradient=degree is not None)
    out = jax.eval_shape(call, *[x] * 5)
    assert all(y.shape == x.shape for y in jax.tree.leaves(out))
  _, length = config.tasks[-1]
  for kind in config.kinds:
    model = experiment.match3_model(config, kind)
    x = jnp.zeros((1, length, config.dim))
    batch = (
      jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), jnp.float32),
      jax.ShapeDtypeStruct((config.batch_size, length), bool),
    )
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    loss = functools.partial(experiment.match3_loss, model=model)
    grad = jax.grad(loss, has_aux=True)
    got, _ = jax.eval_shape(grad, params, batch, jax.random.key(0))
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, params)


def test_smoke(tmp_path):
  verdict = smoke.run_twice("tensor_attention", tmp_path, num_checks=10)
  # What depends neither on the clock nor on training holds at any size.
  for name in (
    "largest error over its bound",
    "least of largest entries over their law",
  ):
    low, high = verdict.accepted[name]
    assert verdict.measured[name] >= (0 if low is None else low)
    assert verdict.measured[name] <= (math.inf if high is None else high)
