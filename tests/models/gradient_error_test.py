"""Errors of a model's gradients, by hand and below the polynomial's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.features import polynomial_coefficients, polynomial_error
from jaxattn.models import Transformer, TransformerConfig, gradient_error
from tests.models._transformer import (
  B,
  D,
  T,
  polynomial,
  random_params,
  vectors,
)

_CONFIG = TransformerConfig(
  num_layers=3, dim=D, num_heads=2, head_dim=2, mlp_ratio=2.0
)


@functools.cache
def _model(num_layers):
  """Residual, causal, four heads; weights N(0, 1/D), q and k 0.7 of it."""
  config = TransformerConfig(
    num_layers=num_layers, dim=16, num_heads=4, head_dim=4, qk_norm=None,
    positions=None,
  )  # fmt: skip
  x, targets = jax.random.normal(jax.random.key(1), (2, 1, 256, 16))
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), x)

  def draw(path, shape):
    name = jax.tree_util.keystr(path)
    if "norm" in name:
      return np.ones(shape.shape)
    rng = np.random.default_rng([len(name), *name.encode()])
    w = rng.standard_normal(shape.shape) / 4
    return w * (0.7 if "query" in name or "key" in name else 1)

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  apply = functools.partial(Transformer(config).apply, return_stats=True)
  _, stats = jax.jit(apply)(params, x)
  return config, params, x, targets, stats


def _error_and_eps(num_layers, degree):
  config, params, x, targets, stats = _model(num_layers)
  radius = float(stats.logit_radius.max())
  # Not the default, which attends to neighbors exactly.
  config = polynomial(config, degree, radius, local="polynomial")
  error = gradient_error(params, (x, targets), config)
  eps = polynomial_error(polynomial_coefficients(degree, radius), radius)
  np.testing.assert_allclose(error.logit_radius, stats.logit_radius)
  assert error.eps.max() <= eps * (1 + 1e-6)
  return error, eps


def test_gradient_error_is_below_that_of_the_polynomial():
  error, eps = _error_and_eps(2, 6)
  assert 1e-4 < error.weights < eps
  assert 1e-4 < error.inputs < eps
  assert error.relative.shape == error.max_abs.shape == (2,)
  assert (error.relative < eps).all()


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [1, 2, 4, 8, 12])
def test_gradient_error_by_depth_and_degree(num_layers):
  for degree in (2, 4, 6, 8):
    error, eps = _error_and_eps(num_layers, degree)
    assert error.weights <= eps
    assert error.inputs <= eps


def test_gradient_error_by_hand():
  config = _CONFIG._replace(vocab_size=13)
  ids = jax.random.randint(jax.random.key(3), (B, T + 1), 0, 13)
  inputs, targets = ids[:, :-1], ids[:, 1:]
  params = random_params(config, inputs)
  low = polynomial(config, 2, 1.0, local="polynomial")

  def loss(params, x, config):
    log_p = jax.nn.log_softmax(Transformer(config).apply(params, x))
    return -jnp.take_along_axis(log_p, targets[..., None], -1).mean()

  x = params["params"]["embed"]["embedding"][inputs]
  grad = jax.grad(loss, argnums=(0, 1))
  both = jax.jit(lambda params, x: [grad(params, x, c) for c in (low, config)])
  (got, got_dx), (want, want_dx) = jax.device_get(both(params, x))

  def relative(got, want):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    parts = [(((a - b) ** 2).sum(), (b**2).sum()) for a, b in pairs]
    above, below = np.sum(parts, 0)
    return np.sqrt(above / below)

  error = gradient_error(params, (inputs, targets), low)
  np.testing.assert_allclose(error.weights, relative(got, want))
  np.testing.assert_allclose(error.inputs, relative(got_dx, want_dx))
  layers = [g["params"]["layers"] for g in (got, want)]
  for i in range(3):
    a, b = (jax.tree.map(lambda x, i=i: x[i], g) for g in layers)
    np.testing.assert_allclose(error.relative[i], relative(a, b))
    largest = jax.tree.map(lambda a, b: np.abs(a - b).max(), a, b)
    np.testing.assert_allclose(error.max_abs[i], max(jax.tree.leaves(largest)))


def test_exact_attention_has_no_error():
  config = _CONFIG._replace(tied_layers=True, norm="layer")
  batch = tuple(vectors(2, B, T, D))
  error = gradient_error(random_params(config), batch, config)
  assert error.weights == error.inputs == 0
  assert error.relative.shape == (1,)
  assert error.logit_radius.shape == (3,)
  assert np.isnan(error.eps).all()


def test_bad_targets_are_refused():
  params, x = random_params(_CONFIG), vectors()
  with pytest.raises(ValueError, match=r"targets must have shape \(2, 11, 8\)"):
    gradient_error(params, (x, x[:, 1:]), _CONFIG)
