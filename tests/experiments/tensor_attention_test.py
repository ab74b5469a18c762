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
  point = {k: np.array(x) for k, x in experiment.limit_point(config, 2).items()}
  np.testing.assert_allclose(point["error"], config.eps, rtol=0.02)
  ratio = point["b"] / point["law"]
  assert ((ratio >= 1) & (ratio < 1.05)).all()
  assert (point["uniform"] > point["b"]).all()


def test_aligned_inputs_reach_the_largest_logits():
  config = harness.load_config(f"{_CONFIG}:smoke")
  query, keys, values = experiment.aligned_inputs(config, 2, 4)
  assert np.abs(query).max() == np.abs(keys).max() == 1
  logits = np.einsum("c,jc,kc->jk", query[0], *keys)
  assert logits.max() == query.shape[1]
  # Where the error of degree 4 turns.
  np.testing.assert_allclose(logits.min() / logits.max(), math.cos(math.pi / 5))
  products = values[0, :, None, 0] * values[1, None, :, 0]
  np.testing.assert_array_equal(products == 1, logits == logits.max())


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
  tall, small = (
    jax.ShapeDtypeStruct((n, 8), jnp.float32)
    for n in (config.loss_lengths[-1], 8)
  )
  arrays = *[tall] * 5, small, small, tall
  call = experiment.timed_loss_gradient(2)
  assert jax.eval_shape(call, (small,) * 3, *arrays).shape == (8, 64)
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
  verdict = smoke.run_twice("tensor_attention", tmp_path, num_checks=22)
  # What depends neither on the clock nor on training holds at any size.
  for name in (
    "largest error over its bound",
    "least of largest entries over their law",
    "greatest of largest entries over their law",
    "error of the library at these entries over 0.001, off 1 by",
    "least exponent of largest entries over its law",
    "largest logit of what is timed, n=32",
  ):
    low, high = verdict.accepted[name]
    assert verdict.measured[name] >= (0 if low is None else low)
    assert verdict.measured[name] <= (math.inf if high is None else high)
