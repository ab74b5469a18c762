"""Draws of the fixed network on separating data."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.data import separation_dataset
from jaxattn.models import (
  separation_network,
)

_DELTA = 0.01


def num_neurons(length):
  return math.ceil(8 * math.log(length / _DELTA))


def draw_signs(rng, num_neurons, dim):
  return jax.random.rademacher(rng, (num_neurons, dim), jnp.float64)


def outputs(*args, **options):
  """F over (num_seeds,) draws of position and signs; a NaN is no 0."""
  out = np.asarray(_outputs(*args, **options))
  assert np.isfinite(out).all()
  return out


@functools.partial(
  jax.jit, static_argnames=("attention", "num_seeds", "length", "dim", "m")
)
def _outputs(rng, amplitude, b, *, attention, num_seeds, length, dim, m):
  def one(rng):
    place, sign = jax.random.split(rng)
    a, _ = separation_dataset(
      place,
      length=length,
      dim=dim,
      amplitude=amplitude,
      b=b,
      dtype="float64",
    )
    signs = draw_signs(sign, m, dim)
    return separation_network(a, signs, b=b, attention=attention)[0]

  return jax.lax.map(one, jax.random.split(rng, num_seeds))
