"""The experiment's bodies and chains, its sizes, and the claims it decides."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _convex_bodies, harness
from experiments import dikin_walk as experiment
from jaxattn.sampling import LeverageSample, Polytope, dikin, dikin_walk
from tests.experiments import smoke
from tests.sampling._bodies import assert_mean

_CONFIG = "configs/dikin_walk.py"


def test_bodies_are_what_they_are_called():
  once, often, everywhere = (
    _convex_bodies.repeated_box(3, k, everywhere=whole)
    for k, whole in ((1, False), (5, False), (5, True))
  )
  assert (once.a.shape, often.a.shape) == ((6, 3), (14, 3))
  assert everywhere.a.shape == (30, 3)
  x = np.random.default_rng(0).uniform(-2, 2, (50, 3))
  want = (np.abs(x) < 1).all(1)
  for body in (once, often, everywhere):
    np.testing.assert_array_equal((body.a @ x.T < 1).all(0), want)
    assert (np.abs(body.a).sum(1) == 1).all()
  body, to_cube = _convex_bodies.rotated_box(3, 100.0, 0)
  cube = np.asarray(_convex_bodies.box_draws(0, 50, 3))
  x = np.linalg.solve(to_cube, 1.5 * cube.T).T
  inside = (np.asarray(body.a) @ x.T < np.asarray(body.b)[:, None]).all(0)
  np.testing.assert_array_equal(inside, (np.abs(1.5 * cube) < 1).all(1))
  edges = 1 / np.linalg.norm(to_cube, axis=1)
  np.testing.assert_allclose(edges, [1, 10, 100], rtol=1e-12)


def test_draws_of_positive_matrices_are_uniform():
  n, d = 3, 6
  x = np.asarray(_convex_bodies.bounded_trace_draws(0, 4000, n))
  body = _convex_bodies.bounded_trace(n)
  slack = np.tensordot(x, np.asarray(body.mats), 1) - np.asarray(body.const)
  assert (np.linalg.eigvalsh(slack)[:, 0] > 0).all()
  mats = slack[:, :n, :n]
  np.testing.assert_array_equal(x, mats[:, *np.triu_indices(n)])
  trace = np.trace(mats, axis1=1, axis2=2)
  share = (mats**2).sum((1, 2)) / trace**2
  assert_mean(trace[:, None], d / (d + 1))
  assert_mean(share[:, None], (2 * n + 2) / (n * (n + 1) + 2))


def test_each_chain_has_its_own_step_size():
  walk = dikin_walk(None, _convex_bodies.repeated_box(2, 1, everywhere=True))
  many = experiment.sized(walk)
  key, x = jax.random.key(3), jnp.array([0.3, -0.2])
  step = jax.jit(many.step)
  for size in (0.4, 0.8):
    state, info = step(key, many.init(jnp.append(x, size)))
    want, want_info = walk.step(key, walk.init(x), size)
    assert info.is_accepted
    got = state.position
    np.testing.assert_allclose(got, jnp.append(want.position, size), rtol=1e-9)
    np.testing.assert_allclose(info.log_ratio, want_info.log_ratio, rtol=1e-9)


def test_steps_for_a_draw_in_many_short_chains():
  """Of an autoregression, (1 + rho) / (1 - rho)."""
  rho, rng = np.array([0.9, 0.0]), np.random.default_rng(0)
  x = np.zeros((256, 400, 2))
  x[:, 0] = rng.normal(size=(256, 2))
  for t in range(1, 400):
    noise = rng.normal(size=(256, 2))
    x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * noise
  times = experiment.autocorrelation_time(3 * x, 10, 9.0)
  np.testing.assert_allclose(times, 10 * (1 + rho) / (1 - rho), rtol=0.15)
  got = experiment.per_thousand(3 * x, 10, 9.0)
  np.testing.assert_allclose(got, 1000 / times.max())
  # Chains that are too short tell that steps are many.
  assert experiment.autocorrelation_time(x[:, :12], 1, 1.0)[0] > 4


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  n, d = config.sketch_sizes.polytope
  how = LeverageSample(max(config.sketch_rows.polytope))

  def step(rng, a, b, x):
    body, keys = Polytope(a, b), jax.random.split(rng, len(x))
    kernel = dikin.build_kernel(sketch=how, coins="common")
    states = jax.vmap(lambda x: dikin.init(x, None, body, sketch=how))(x)
    many = jax.vmap(lambda key, state: kernel(key, state, None, body, 1.0))
    return many(keys, states)

  rng = jax.eval_shape(lambda: jax.random.key(0))
  shapes = (n, d), (n,), (config.chains, d)
  arrays = (jax.ShapeDtypeStruct(shape, jnp.float64) for shape in shapes)
  state, info = jax.eval_shape(step, rng, *arrays)
  assert state.position.shape == (config.chains, d)
  assert info.acceptance_rate.shape == (config.chains,)


def test_smoke(tmp_path):
  verdict = smoke.run_twice("dikin_walk", tmp_path / "a", num_checks=14)
  # Laws are exact at any size.
  for name, value in verdict.measured.items():
    if name.endswith("standard errors"):
      assert value < 5, name
