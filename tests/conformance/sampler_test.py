"""What every sampler is: an algorithm in the form of blackjax."""

import inspect

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import sampling
from jaxattn.sampling import SamplingAlgorithm
from tests._recompile import no_recompilation
from tests.sampling import _bodies

_MEMBERS = {
  fn.__name__: fn
  for fn in (
    sampling.coordinate_hit_and_run,
    sampling.dikin_walk,
    sampling.hit_and_run,
  )
}


@pytest.fixture(params=sorted(_MEMBERS))
def make(request):
  return _MEMBERS[request.param]


def _slope(x):
  return -2 * x[0]


def _walk(make, dtype=None):
  box = jax.tree.map(lambda x: jnp.asarray(x, dtype), _bodies.box(2))
  return make(_slope, box)


def test_no_sampler_is_missing():
  public = {
    name: inspect.signature(getattr(sampling, name)).return_annotation
    for name in sampling.__all__
    if inspect.isfunction(getattr(sampling, name))
  }
  found = {
    n
    for n, a in public.items()
    if a in (SamplingAlgorithm, "SamplingAlgorithm")
  }
  assert found == set(_MEMBERS)


@pytest.mark.any_x64
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_states_and_infos(make, dtype):
  """What loops and diagnostics of blackjax read; a state keeps its form."""
  if dtype == jnp.float64 and not jax.config.jax_enable_x64:
    dtype = jnp.float32
  walk = _walk(make, dtype)
  state = walk.init(np.zeros(2), rng=jax.random.key(0))
  keys = jax.random.split(jax.random.key(1), 64)
  after, info = jax.jit(jax.vmap(walk.step, (0, None)))(keys, state)
  want = jax.tree.map(lambda x: (64, *x.shape), state)
  assert jax.tree.map(lambda x: x.shape, after) == want
  assert all(x.dtype == dtype for x in (*state, *after, info.acceptance_rate))
  np.testing.assert_allclose(
    after.logdensity,
    -2 * after.position[:, 0],
    rtol=1e-6,
    # Positions are of size 1: what rounding takes off them does not shrink
    # where they are near 0.
    atol=2 * jnp.finfo(dtype).eps,
  )
  assert ((info.acceptance_rate >= 0) & (info.acceptance_rate <= 1)).all()
  # A chain that was refused stays; one that moved is elsewhere, and inside.
  moved = (after.position != 0).any(1)
  np.testing.assert_array_equal(moved, info.is_accepted)
  assert moved.any()
  assert (abs(after.position) < 1).all()


def test_a_step_is_a_function_of_its_key(make):
  walk = _walk(make)
  state, step = walk.init(jnp.zeros(2)), jax.jit(walk.step)
  first, _ = step(jax.random.key(2), state)
  with no_recompilation():
    again, _ = step(jax.random.key(2), state)
  other, _ = step(jax.random.key(3), state)
  np.testing.assert_array_equal(first.position, again.position)
  assert (first.position != other.position).any()


def test_a_step_size_is_an_argument_or_refused(make):
  walk = _walk(make)
  state, key = walk.init(jnp.zeros(2)), jax.random.key(0)
  if walk.step_size is None:
    with pytest.raises(ValueError, match=r"step_size must be None, got 0\.5"):
      walk.step(key, state, 0.5)
    return
  step = jax.jit(walk.step)
  near, _ = step(key, state, jnp.asarray(1e-4))
  with no_recompilation():
    far, _ = step(key, state, jnp.asarray(1e-3))
  np.testing.assert_allclose(far.position, 10 * near.position, rtol=1e-6)
  assert (near.position != 0).all()


def test_loops_of_blackjax_run_it(make):
  """And the law is exp(-2 x) on [-1, 1], times a uniform one."""
  walk = _walk(make)

  def run(key):
    _, (state, _) = blackjax.util.run_inference_algorithm(
      key, walk, num_steps=600, initial_position=jnp.zeros(2)
    )
    return state.position

  draws = jax.vmap(run)(_bodies.keys(32))[:, 100:]
  means = np.array([-(1 / np.tanh(2) - 1 / 2), 0.0])
  _bodies.assert_mean(draws, means, 4.5)


def test_a_start_outside_is_refused(make):
  with pytest.raises(ValueError, match="position violates constraint"):
    _walk(make).init(jnp.array([0.0, 2.0]))
  with pytest.raises(ValueError, match=r"position must have shape \(2,\)"):
    _walk(make).init(jnp.zeros(3))
