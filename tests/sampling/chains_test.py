"""Many chains: warm-up, thinning, meshes, and blackjax's own loop."""

import re

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax import diagnostics as peer

from jaxattn import _compat
from jaxattn.sampling import dikin_walk, hit_and_run, sample_chains
from tests._recompile import no_recompilation
from tests.sampling import _bodies

_WALK = dikin_walk(None, _bodies.box(2))


def test_layout_and_thinning():
  """Thinned chains are the same chains."""
  key, starts = jax.random.key(0), jnp.zeros((6, 2))
  every, infos, step_size = sample_chains(key, _WALK, starts, 12)
  assert every.shape == (6, 12, 2)
  assert infos.acceptance_rate.shape == infos.is_accepted.shape == (6, 12)
  assert step_size == 1.0
  some, info, _ = sample_chains(key, _WALK, starts, 12, thin=4)
  np.testing.assert_array_equal(some, every[:, 3::4])
  np.testing.assert_array_equal(info.log_ratio, infos.log_ratio[:, 3::4])
  moved = (jnp.diff(every, axis=1) != 0).any(-1)
  np.testing.assert_array_equal(moved, infos.is_accepted[:, 1:])
  assert len(jnp.unique(every[:, -1])) > 6


def test_warm_up_meets_the_target_and_then_stays():
  key, starts = jax.random.key(1), jnp.zeros((64, 2))
  for target, low, high in ((0.35, 1.5, 6.0), (0.8, 0.2, 1.5)):
    _, infos, step_size = sample_chains(
      key,
      _WALK,
      starts,
      100,
      num_warmup=300,
      target_acceptance_rate=target,
    )
    assert low < step_size < high
    assert abs(infos.acceptance_rate.mean() - target) < 0.04
  # With the step size that came out the same law, and no warm-up.
  walk = _WALK._replace(step_size=float(step_size))
  _, infos, again = sample_chains(key, walk, starts, 100)
  assert again == step_size
  assert abs(infos.acceptance_rate.mean() - 0.8) < 0.06


def test_blackjax_runs_the_walk():
  walk = dikin_walk(lambda x: -3 * x[0], _bodies.box(1), lipschitz=3.0)

  def run(key):
    _, (state, info) = blackjax.util.run_inference_algorithm(
      key, walk, num_steps=1500, initial_position=jnp.zeros(1)
    )
    return state, info

  state, info = jax.vmap(run)(_bodies.keys(16))
  draws = state.position[:, 200:]
  with jax.numpy_rank_promotion("allow"):
    assert (peer.potential_scale_reduction(draws) < 1.05).all()
    assert (peer.effective_sample_size(draws) > 500).all()
  assert 0.2 < info.acceptance_rate.mean() < 0.95
  _bodies.assert_mean(draws, -(1 / np.tanh(3) - 1 / 3), 4.5)


def test_algorithms_of_blackjax_run_here():
  """They have no step size to adapt: the warm-up is a burn-in."""
  algorithm = blackjax.rmh(
    lambda x: -(x**2).sum() / 2,
    blackjax.mcmc.random_walk.normal(1.5 * jnp.eye(2)),
  )
  draws, infos, step_size = sample_chains(
    jax.random.key(0),
    algorithm,
    jnp.full((64, 2), 5.0),
    400,
    num_warmup=200,
  )
  assert step_size is None
  assert infos.acceptance_rate.shape == (64, 400)
  _bodies.assert_mean(draws, 0, 4.5)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_chains_on_a_mesh(kind):
  axis_type = getattr(_compat.AxisType, kind)
  mesh = _compat.make_mesh((8,), ("chains",), axis_types=(axis_type,))
  starts = _bodies.uniform_box(0, 16, 2)
  options = {"thin": 2, "num_warmup": 20}
  key = jax.random.key(0)
  want, _, size = sample_chains(key, _WALK, starts, 8, **options)
  spec = jax.sharding.PartitionSpec("chains")
  with jax.set_mesh(mesh):
    spread = jax.device_put(starts, jax.NamedSharding(mesh, spec))
    got, infos, step_size = sample_chains(key, _WALK, spread, 8, **options)
  assert len(got.sharding.device_set) == 8
  np.testing.assert_allclose(got, want, rtol=1e-9)
  np.testing.assert_allclose(step_size, size, rtol=1e-12)
  assert infos.log_ratio.shape == (16, 4)


def test_no_recompilation():
  key, starts = jax.random.key(0), jnp.zeros((6, 2))
  others = starts + 0.1
  sample_chains(key, _WALK, starts, 10, num_warmup=5)
  with no_recompilation():
    sample_chains(key, _WALK, others, 10, num_warmup=5)


_STARTS = jnp.zeros((2, 2))


@pytest.mark.parametrize(
  ("args", "options", "message"),
  [
    ((jnp.zeros(2), 4), {}, "positions must have 2 dimensions, got shape (2,)"),
    ((jnp.zeros((2, 2), int), 4), {}, "positions must have a floating dtype"),
    ((_STARTS, 0), {}, "num_steps must be >= 1, got 0"),
    ((_STARTS, 4), {"thin": 0}, "thin must be >= 1, got 0"),
    ((_STARTS, 4), {"thin": 3}, "num_steps must be a multiple of thin=3"),
    ((_STARTS, 4), {"num_warmup": -1}, "num_warmup must be >= 0, got -1"),
    (
      (_STARTS, 4),
      {"target_acceptance_rate": 1.0},
      "target_acceptance_rate must be in (0.0, 1.0), got 1.0",
    ),
    ((jnp.zeros((2, 3)), 4), {}, "position must have shape (2,)"),
    (
      (_STARTS.at[1, 0].set(1.5), 4),
      {},
      "positions[1]: position violates constraint 0 by 0.5",
    ),
  ],
)
def test_refused_inputs(args, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    sample_chains(jax.random.key(0), _WALK, *args, **options)


def test_density_of_zero_at_a_start():
  walk = hit_and_run(lambda x: jnp.where(x[0] > 0, 0.0, -jnp.inf), _WALK_BODY)
  with pytest.raises(ValueError, match=r"positions\[0\] has log density -inf"):
    sample_chains(jax.random.key(0), walk, -0.5 * jnp.ones((2, 2)), 4)


_WALK_BODY = _bodies.box(2)
