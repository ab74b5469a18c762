"""TensorSRHT: its rows, its mean, and its variance."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from jaxattn.sketch import tensor_srht_factors, tensor_srht_rows


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def _all_rows(rng, a):
  """H D A for the signs of one of the two keys, in numpy."""
  sign = jax.random.rademacher(jax.random.split(rng)[0], (len(a), 1), float)
  size = 1 << (len(a) - 1).bit_length()
  padded = np.zeros((size, a.shape[1]))
  padded[: len(a)] = sign * a
  return linalg.hadamard(size) @ padded


def test_rows_are_rows_of_the_kronecker_product():
  a1, a2, key, m = _normal(6, 2), _normal(3, 4, seed=1), jax.random.key(2), 50
  rng1, rng2 = jax.random.split(key)
  h1, h2 = _all_rows(rng1, a1), _all_rows(rng2, a2)
  i = jax.random.randint(jax.random.split(rng1)[1], (m,), 0, 8)
  j = jax.random.randint(jax.random.split(rng2)[1], (m,), 0, 4)
  x, y = tensor_srht_factors(key, a1, a2, m)
  np.testing.assert_allclose(x, h1[i], atol=1e-13)
  np.testing.assert_allclose(y, h2[j], atol=1e-13)
  want = np.kron(h1, h2)[4 * np.asarray(i) + np.asarray(j)] / m**0.5
  got = tensor_srht_rows(key, a1, a2, m)
  np.testing.assert_allclose(got, want, atol=1e-13)


def test_mean_and_variance_are_as_derived():
  """Of <S (x ⊗ a), S (y ⊗ b)>, with the moments of a random sign."""
  n, m, num = 16, 16, 40_000
  x, y, a, b = _normal(4, n)
  first, second = np.stack([x, y], 1), np.stack([a, b], 1)

  def product(key):
    p, q = tensor_srht_factors(key, first, second, m)
    return (p[:, 0] * p[:, 1] * q[:, 0] * q[:, 1]).mean()

  got = jax.jit(jax.vmap(product))(jax.random.split(jax.random.key(0), num))
  mean = (x @ y) * (a @ b)

  def second_moment(x, y):
    return x @ x * (y @ y) + 2 * (x @ y) ** 2 - 2 * (x**2) @ y**2

  want = (second_moment(x, y) * second_moment(a, b) - mean**2) / m
  assert abs(got.mean() - mean) < 4 * (want / num) ** 0.5
  np.testing.assert_allclose(got.var(), want, rtol=0.03)


def test_same_key_same_coins():
  key, a, m = jax.random.key(0), _normal(8, 3), 20
  x, _ = tensor_srht_factors(key, a, a, m)
  twice, _ = tensor_srht_factors(key, 2 * a, a, m)
  np.testing.assert_allclose(twice, 2 * x)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ((jnp.ones(3), jnp.ones((3, 1)), 4), "a1 must have 2 dimensions"),
    ((jnp.ones((3, 1)), jnp.ones(3), 4), "a2 must have 2 dimensions"),
    (
      (jnp.ones((3, 1)), jnp.ones((3, 1), jnp.float32), 4),
      "all arrays must have one dtype, got a2 of float32 and a1 of float64",
    ),
    ((jnp.ones((3, 1)), jnp.ones((3, 1)), 0), "num_rows must be >= 1, got 0"),
  ],
)
def test_refused_inputs(args, message):
  for call in (tensor_srht_factors, tensor_srht_rows):
    with pytest.raises(ValueError, match=re.escape(message)):
      call(jax.random.key(0), *args)
