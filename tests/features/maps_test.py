"""Feature maps: the kernels that they give, exactly or in expectation."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.features import (
  FeatureMap,
  apply_feature_map,
  favor_map,
  sketched_map,
  taylor_map,
)
from tests._recompile import no_recompilation, quick_jit


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def _key(seed=0):
  return jax.random.key(seed)


def _gram(feature_map, x, y, scale=1.0):
  x, y = (
    np.asarray(apply_feature_map(feature_map, z, scale=scale)) for z in (x, y)
  )
  return x @ y.T


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


# --- kernels ---


def test_names():
  x = _normal(4, 5)
  got = apply_feature_map("elu", x, scale=0.25)
  want = np.where(x > 0, x / 2 + 1, np.exp(x / 2))
  np.testing.assert_allclose(got, want, rtol=1e-14)
  assert (np.asarray(got) > 0).all()
  np.testing.assert_array_equal(apply_feature_map("identity", x), x)
  np.testing.assert_array_equal(apply_feature_map("relu", x), np.maximum(x, 0))


@pytest.mark.parametrize("degree", [0, 1, 2, 5])
def test_taylor_kernel(degree):
  x, y = _normal(2, 6, 3)
  logits = 0.3 * x @ y.T
  want = sum(logits**j / math.factorial(j) for j in range(degree + 1))
  got = _gram(taylor_map(degree), x, y, scale=0.3)
  np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
  if degree == 1:
    assert apply_feature_map(taylor_map(1), x).shape == (6, 4)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_favor_is_unbiased(orthogonal):
  draws, features = 4000, 6
  x, y = _normal(2, 4) / 2

  @quick_jit
  def estimates(rngs):
    def one(rng):
      feature_map = favor_map(rng, 4, features, orthogonal=orthogonal)
      phi = apply_feature_map(feature_map, jnp.stack((x, y)), scale=0.5)
      return phi[0] @ phi[1], phi.min()

    return jax.vmap(one)(rngs)

  estimate, least = estimates(jax.random.split(_key(), draws))
  assert (np.asarray(least) > 0).all()
  error = np.std(estimate) / math.sqrt(draws)
  assert abs(np.mean(estimate) - math.exp(0.5 * x @ y)) < 4 * error


def test_orthogonal_projections():
  w = np.asarray(favor_map(_key(), 8, 20).arrays)
  assert w.shape == (20, 8)
  gram = _unit(w[:8]) @ _unit(w[:8]).T
  np.testing.assert_allclose(gram, np.eye(8), atol=1e-12)
  # Lengths are those of Gaussian vectors, not 1: their squares average H.
  many = np.asarray(favor_map(_key(1), 8, 4000).arrays)
  squares = (many**2).sum(-1)
  np.testing.assert_allclose(squares.mean(), 8, rtol=0.03)
  np.testing.assert_allclose(squares.var(), 16, rtol=0.15)


@pytest.mark.parametrize("method", ["tensor_sketch", "poly_sketch"])
def test_sketched_kernel_is_unbiased(method):
  coefficients, draws = (0.9, 1.1, 0.0, 0.2, 0.05), 1000
  x, y = _unit(_normal(2, 6))
  y = _unit(x + 0.7 * y)

  @quick_jit
  def estimates(rngs):
    def one(rng):
      phi = sketched_map(rng, 6, coefficients, 16, method=method)
      return apply_feature_map(phi, x) @ apply_feature_map(phi, y)

    return jax.lax.map(one, rngs, batch_size=100)

  estimate = np.asarray(estimates(jax.random.split(_key(), draws)))
  want = sum(c * (x @ y) ** j for j, c in enumerate(coefficients))
  error = estimate.std() / math.sqrt(draws)
  assert abs(estimate.mean() - want) < 4 * error
  # One standard deviation of the terms that are sketched.
  assert estimate.std() < 3 * (0.2 + 0.05) / math.sqrt(16)


def test_low_degrees_of_a_sketch_are_exact():
  x, y = _normal(2, 5, 4)
  phi = sketched_map(_key(), 4, (2.0, 3.0), 7)
  np.testing.assert_allclose(_gram(phi, x, y), 2 + 3 * x @ y.T, rtol=1e-12)
  assert apply_feature_map(phi, x).shape == (5, 5)
  # Terms that are 0 take no features.
  pure = sketched_map(_key(), 4, (0, 0, 0, 0, 1.0), 7)
  assert apply_feature_map(pure, x).shape == (5, 7)


# --- what a caller relies on ---

_MAPS = {
  "elu": "elu",
  "relu": "relu",
  "identity": "identity",
  "taylor": taylor_map(2),
  "favor": lambda: favor_map(_key(), 4, 6),
  "tensor_sketch": lambda: sketched_map(_key(), 4, (1, 1, 0.5), 6),
  "poly_sketch": lambda: sketched_map(
    _key(), 4, (1, 1, 0.5), 6, method="poly_sketch"
  ),
}


@pytest.mark.any_x64
@pytest.mark.parametrize("name", _MAPS)
def test_pytree_dtypes_gradient_and_compilation(name):
  feature_map = _MAPS[name]() if callable(_MAPS[name]) else _MAPS[name]
  x = jnp.asarray(_normal(2, 3, 4), jnp.float32)
  static = 0 if isinstance(feature_map, str) else ()
  apply = jax.jit(apply_feature_map, static_argnums=static)
  out = apply(feature_map, x, scale=0.5)
  assert out.dtype == jnp.float32
  assert out.shape[:2] == (2, 3)
  eager = apply_feature_map(feature_map, x, scale=0.5)
  np.testing.assert_allclose(eager, out, atol=1e-5)
  with jax.numpy_dtype_promotion("strict"):
    low = apply_feature_map(feature_map, x.astype(jnp.bfloat16), scale=0.5)
  assert low.dtype == jnp.bfloat16
  low = low.astype(jnp.float32)
  np.testing.assert_allclose(low, out, rtol=0.05, atol=0.05)

  def total(scale):
    return apply_feature_map(feature_map, x, scale=scale).sum()

  assert np.isfinite(jax.grad(total)(0.5))
  with no_recompilation():
    apply_feature_map(feature_map, x, scale=0.7)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: apply_feature_map("foo", np.zeros(3)),
      "feature_map must be one of 'elu', 'identity', 'relu' or a FeatureMap, "
      "got 'foo'",
    ),
    (
      lambda: apply_feature_map(np.exp, np.zeros(3)),
      "or a FeatureMap, got <ufunc 'exp'>",
    ),
    (lambda: apply_feature_map("elu", 1.0), "x must have shape (..., H), got"),
    (
      lambda: apply_feature_map("elu", np.zeros(3, int)),
      "x must have a floating dtype, got int",
    ),
    (
      lambda: apply_feature_map("elu", np.zeros(3), scale=0.0),
      "scale must be positive, got 0.0",
    ),
    (
      lambda: apply_feature_map("elu", np.zeros(3), scale=np.ones(3)),
      "scale must be a real scalar, got array",
    ),
    (
      lambda: apply_feature_map(favor_map(_key(), 4, 2), np.zeros((2, 3))),
      "x must have shape (..., 4), got (2, 3)",
    ),
    (
      lambda: apply_feature_map(
        sketched_map(_key(), 4, (1, 1), 2), np.zeros((2, 3))
      ),
      "x must have shape (..., 4), got (2, 3)",
    ),
    (lambda: taylor_map(-1), "degree must be >= 0, got -1"),
    (lambda: favor_map(_key(), 0, 2), "dim must be >= 1, got 0"),
    (lambda: favor_map(_key(), 2, 0), "num_features must be >= 1, got 0"),
    (
      lambda: favor_map(_key(), 2, 2, orthogonal=2),
      "orthogonal must be one of False, True, got 2",
    ),
    (
      lambda: sketched_map(_key(), 2, (1.0, -1.0), 4),
      "coefficients must be a vector of finite numbers >= 0, not all of them 0,"
      " got [ 1. -1.]",
    ),
    (lambda: sketched_map(_key(), 2, (0, 0), 4), "not all of them 0, got"),
    (lambda: sketched_map(_key(), 2, np.ones((1, 1)), 4), "got shape (1, 1)"),
    (
      lambda: sketched_map(_key(), 2, (1, 1, 1), 0),
      "sketch_dim must be >= 1, got 0",
    ),
    (
      lambda: sketched_map(_key(), 2, (1, 1, 1), 4, method="srht"),
      "method must be one of 'tensor_sketch', 'poly_sketch', got 'srht'",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


def test_a_map_of_no_arrays_is_hashable():
  assert taylor_map(2) == FeatureMap("taylor", degrees=(2,))
  assert hash(taylor_map(2)) == hash(taylor_map(2))


def test_elu_keeps_its_small_values():
  x = jnp.array([-40.0, -1.0, 0.0, 2.0], jnp.float32)
  want = np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
  np.testing.assert_allclose(apply_feature_map("elu", x), want, rtol=1e-6)
  slopes = jax.vmap(jax.grad(lambda y: apply_feature_map("elu", y[None])[0]))(x)
  np.testing.assert_allclose(slopes, np.exp(np.minimum(x, 0)), rtol=1e-6)
