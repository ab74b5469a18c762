"""Walsh-Hadamard transforms, against scipy's matrices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from jaxattn.sketch import fwht, pad_to_pow2


def _normal(*shape):
  return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize("n", [1, 2, 64, 128, 256, 1024])
def test_is_the_product_with_the_matrix(n):
  x = _normal(3, n)
  want = x @ linalg.hadamard(n)
  np.testing.assert_allclose(fwht(x), want, rtol=0, atol=1e-11)
  np.testing.assert_allclose(fwht(x.T, 0), want.T, rtol=0, atol=1e-11)
  got = fwht(x, normalize=True)
  np.testing.assert_allclose(got, want / n**0.5, rtol=0, atol=1e-11)


@pytest.mark.any_x64
@pytest.mark.parametrize("n", [1, 2, 64, 1024, 1 << 17, 1 << 18])
def test_twice_is_n_times_the_vector(n):
  x = jnp.asarray(_normal(n), jnp.float32)
  twice = fwht(fwht(x))
  assert twice.dtype == x.dtype
  error = jnp.linalg.norm(twice - n * x) / jnp.linalg.norm(n * x)
  assert error < 1e-5


@pytest.mark.parametrize("n", [64, 512])
def test_gradient_is_the_transform(n):
  x, g = _normal(2, n)
  got = jax.grad(lambda x: fwht(x) @ g)(jnp.asarray(x))
  np.testing.assert_allclose(got, fwht(g), atol=1e-11)


def test_half_precision_adds_in_single():
  x = jnp.ones(1 << 12, jnp.bfloat16).at[0].set(2.0)
  got = fwht(x)
  # 4097 has 13 bits, of which 8 stay.
  assert got.dtype == jnp.bfloat16
  assert got[0] == jnp.asarray(4097.0, jnp.bfloat16)
  np.testing.assert_array_equal(got[1:], 1)


def test_padding():
  x = jnp.asarray(_normal(3, 5))
  padded = pad_to_pow2(x)
  assert padded.shape == (3, 8)
  np.testing.assert_array_equal(padded[:, :5], x)
  assert not padded[:, 5:].any()
  assert pad_to_pow2(x, 0).shape == (4, 5)
  assert pad_to_pow2(x[:, :4]).shape == (3, 4)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: fwht(jnp.ones(48)), "length must be a power of two, got 48"),
    (lambda: fwht(jnp.ones((4, 0))), "length must be a power of two, got 0"),
    (lambda: fwht(jnp.ones(4, int)), "x must have a floating dtype, got int64"),
    (lambda: fwht(jnp.ones(4), 1), "axis must be in [-1, 0], got 1"),
    (lambda: pad_to_pow2(jnp.ones(4), 1), "axis must be in [-1, 0], got 1"),
    (lambda: pad_to_pow2(jnp.ones((2, 0))), "x must not be empty along axis"),
  ],
)
def test_refused_inputs(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
