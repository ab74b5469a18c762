"""Hit and run: chords, laws, refused inputs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.sampling import (
  Polytope,
  coordinate_hit_and_run,
  hit_and_run,
  sample_chains,
)
from tests.sampling import _bodies
from tests.sampling._bodies import assert_mean

_BOTH = [hit_and_run, coordinate_hit_and_run]
_CHAINS = 1000


def _draws(walk, starts, num_steps=30):
  key = jax.random.key(0)
  draws, infos, step_size = sample_chains(key, walk, starts, num_steps)
  assert step_size is None
  return np.asarray(draws), infos


@pytest.mark.parametrize("make", _BOTH)
def test_simplex(make):
  walk = make(None, _bodies.simplex(3))
  draws, infos = _draws(walk, _bodies.uniform_simplex(0, _CHAINS, 3))
  assert infos.is_accepted.all()
  assert_mean(draws, 1 / 4)
  off = draws - 1 / 4
  assert_mean(off**2, 3 / 80)
  assert_mean(off * np.roll(off, 1, -1), -1 / 80)


def test_tilted_box():
  slope = np.linspace(0.5, 4, 3)
  walk = hit_and_run(lambda x: -jnp.asarray(slope) @ x, _bodies.box(3))
  draws, infos = _draws(walk, _bodies.tilted_box(0, _CHAINS, slope))
  assert 0.3 < infos.acceptance_rate.mean() < 0.9
  assert_mean(draws, -(1 / np.tanh(slope) - 1 / slope))


def test_spectrahedron():
  """Coordinates of the cone are traces too: both ends of chords are needed."""
  n, d = 2, 3
  walk = hit_and_run(None, _bodies.psd_cone(n))
  draws, _ = _draws(walk, _bodies.psd_cone_draws(0, _CHAINS, n))
  mats = _bodies.symmetric(draws, n)
  trace = np.trace(mats, axis1=-2, axis2=-1)
  assert_mean(trace, d / (d + 1))
  share = (mats**2).sum((-1, -2)) / trace**2
  assert_mean(share, (2 * n + 2) / (n * (n + 1) + 2))


def test_chords_end_at_the_boundary():
  """In both kinds of body that are the same simplex."""
  x = jnp.array([0.1, 0.3, 0.2])
  lengths = []
  for body in (_bodies.simplex(3), _bodies.hidden_simplex(3, 1)):
    walk = coordinate_hit_and_run(None, body)
    many = jax.jit(jax.vmap(walk.step, (0, None)))
    after, info = many(_bodies.keys(500), walk.init(x))
    assert len(np.unique(np.argmax(np.asarray(after.position != x[None]), 1)))
    lengths.append(info.length)
  np.testing.assert_allclose(lengths[0], lengths[1], rtol=1e-9)
  # From a coordinate the others leave 1 minus their sum.
  want = {round(1 - 0.6 + float(v), 9) for v in x}
  assert {round(float(v), 9) for v in lengths[0]} == want


@pytest.mark.any_x64
def test_float32_stays_inside():
  """Where rounding may reach the walls."""
  box = Polytope(
    jnp.concatenate([jnp.eye(2), -jnp.eye(2)]).astype(jnp.float32),
    jnp.full(4, 1e-3, jnp.float32) + jnp.float32(1),
  )
  walk = hit_and_run(None, box)
  draws, infos = _draws(walk, jnp.zeros((50, 2), jnp.float32), 200)
  assert draws.dtype == np.float32
  assert (np.abs(draws) < 1.001).all()
  assert infos.is_accepted.mean() > 0.99


@pytest.mark.parametrize("make", _BOTH)
def test_refused_inputs(make):
  with pytest.raises(ValueError, match="body is unbounded"):
    make(None, Polytope(-jnp.eye(2), jnp.zeros(2)))
  with pytest.raises(ValueError, match="body must be a Polytope or"):
    make(None, jnp.eye(2))
  walk = make(None, _bodies.box(2))
  with pytest.raises(ValueError, match="position violates constraint 0 by 1"):
    walk.init(jnp.array([2.0, 0.0]))
  with pytest.raises(ValueError, match=re.escape("position must have shape")):
    walk.init(jnp.zeros(3))
  with pytest.raises(ValueError, match=r"step_size must be None, got 0\.5"):
    walk.step(jax.random.key(0), walk.init(jnp.zeros(2)), 0.5)
