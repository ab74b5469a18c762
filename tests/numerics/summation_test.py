"""Compensated sums against exact ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxattn.numerics import compensated_add

pytestmark = pytest.mark.any_x64


def test_many_small_terms_keep_their_digits():
  x = np.random.default_rng(0).uniform(size=(1 << 16, 2)).astype(np.float32)

  @jax.jit
  def sums(x):
    def step(carry, y):
      total, compensation, plain = carry
      return (*compensated_add(total, compensation, y), plain + y), None

    zero = jnp.zeros_like(x[0])
    return lax.scan(step, (zero, zero, zero), x)[0]

  # With the optimizations that users have.
  jitted = sums.lower(x).compile({"xla_backend_optimization_level": 3})
  total, compensation, plain = (np.float64(y) for y in jitted(x))
  want = np.array([math.fsum(column) for column in x.T])
  assert (abs(total / want - 1) <= 2**-24).all()
  assert (abs((total - compensation) / want - 1) < 1e-9).all()
  assert (abs(plain / want - 1) > 1e-7).all()


def test_refused():
  x = jnp.zeros(3)
  with pytest.raises(ValueError, match=r"x must have shape \(3,\)"):
    compensated_add(x, x, jnp.zeros(2))
  with pytest.raises(ValueError, match="compensation of float16"):
    compensated_add(x, x.astype(jnp.float16), x)
  with pytest.raises(ValueError, match="total must have a floating dtype"):
    compensated_add(x.astype(int), x, x)
