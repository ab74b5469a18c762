"""The residual state-space task: its law, and closed forms of its risks."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import data as lib
from tests._recompile import no_recompilation

_DIMS = (3, 8, 32)
_GAMMAS = (-0.5, 0.0, 0.5, 0.9)
# d = 3 has no room for the most negative: (1 - g) / (1 + g) = 3 > 2.
_CASES = [c for c in itertools.product(_DIMS, _GAMMAS) if c != (3, -0.5)]
_KINDS = {"unit": {"gamma": 0.5}, "paper": {}}
_BOTH = (lib.sample_residual_ssm, lib.sample_sign_inconsistent)
_NUM = 200_000


def _ssm(dim=8, seed=0, **options):
  return lib.residual_ssm(jax.random.key(seed), dim, **options)


@functools.cache
def _samples(draw, **options):
  """One set of samples for all tests that look at them."""
  return jax.tree.map(
    np.asarray, draw(jax.random.key(2), _ssm(**options), _NUM)
  )


def _theta(ssm):
  c = np.asarray(ssm.coef)
  return np.arccos(c[-1] / np.linalg.norm(c))


# --- coefficients ---


@pytest.mark.parametrize("dim", _DIMS)
def test_unit_coefficients(dim):
  gammas = jnp.array([g for d, g in _CASES if d == dim])
  rngs = jax.random.split(jax.random.key(0), len(gammas))
  draw = lambda rng, gamma: lib.residual_ssm(rng, dim, gamma=gamma).coef  # noqa: E731
  coef = jax.jit(jax.vmap(draw))(rngs, gammas)
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
  close(jnp.linalg.norm(coef, axis=1), 1)
  close(coef.sum(1), 1)
  close(coef[:, -1], gammas)


def test_unit_coefficients_point_anywhere_that_is_left():
  rngs = jax.random.split(jax.random.key(1), 4000)
  coef = jax.vmap(lambda rng: lib.residual_ssm(rng, 8).coef)(rngs)[:, :-1]
  # Mean (1 - gamma) / (d - 1) each, and no direction across it preferred.
  across = np.asarray(coef - coef.mean(1, keepdims=True))
  np.testing.assert_allclose(coef.mean(1), 0.5 / 7, rtol=1e-12)
  want = 0.714286 / 6 * (np.eye(7) - 1 / 7)
  np.testing.assert_allclose(across.T @ across / 4000, want, atol=0.012)


def test_paper_coefficients():
  coef = _ssm(8, kind="paper").coef
  np.testing.assert_allclose(coef, [1 / 56] * 7 + [7 / 8])
  # A norm below 1: the source's properties contradict each other.
  np.testing.assert_allclose(coef @ coef, (7 / 8) ** 2 + 1 / (64 * 7))
  np.testing.assert_allclose(coef.sum(), 1)
  np.testing.assert_allclose(_ssm(2, kind="paper").coef, [0.5, 0.5])


def test_least_gamma_leaves_nothing_to_draw():
  # (1 - g) / (1 + g) = d - 1.
  for dim in (3, 8):
    coef = _ssm(dim, gamma=2 / dim - 1).coef
    np.testing.assert_allclose(coef[:-1].std(), 0, atol=1e-7)
    np.testing.assert_allclose([coef.sum(), coef @ coef], 1, atol=1e-12)
  traced = jax.jit(lambda g: _ssm(3, gamma=g).coef)
  assert np.isnan(traced(-0.5)).any()
  assert np.isfinite(traced(-0.3)).all()


# --- samples ---


@pytest.mark.parametrize("dim", _DIMS)
def test_share_of_inconsistent_samples(dim):
  """Within .004 of arccos(gamma) / pi, at 2e5 samples: 3.6 deviations."""

  def found(gamma):
    ssm = _ssm(dim, gamma=gamma)
    _, _, u = lib.sample_residual_ssm(jax.random.key(2), ssm, _NUM)
    share = (u[:, -2] * u[:, -1] < 0).mean()
    return share, lib.inconsistency_probability(ssm)

  gammas = jnp.array([g for d, g in _CASES if d == dim])
  share, closed = jax.jit(lambda g: jax.lax.map(found, g))(gammas)
  want = np.arccos(gammas) / np.pi
  np.testing.assert_allclose(closed, want)
  np.testing.assert_allclose(share, want, rtol=0, atol=0.004)


@pytest.mark.parametrize("draw", _BOTH)
def test_samples_are_the_latents_and_noise(draw):
  x, y, u = _samples(draw, gamma=0.5)
  coef = np.asarray(_ssm(gamma=0.5).coef)
  np.testing.assert_allclose(u[:, :-1] @ coef, u[:, -1], atol=1e-12)
  noise = (np.concatenate([x, y[:, None]], 1) - u) / 0.1
  # 81 entries, each of a deviation of at most (2 / n)^1/2.
  tol = 5 * (2 / _NUM) ** 0.5
  np.testing.assert_allclose(noise.T @ noise / _NUM, np.eye(9), atol=tol)
  assert abs(noise.T @ u / _NUM).max() < tol
  x, y, u = draw(jax.random.key(3), _ssm(noise=0.0), 10)
  np.testing.assert_array_equal(x, u[:, :-1])
  np.testing.assert_array_equal(y, u[:, -1])


@pytest.mark.parametrize("gamma", _GAMMAS)
def test_inconsistent_samples(gamma):
  """All are, and their moments are within .006 of the closed forms."""
  _, _, u = _samples(lib.sample_sign_inconsistent, gamma=gamma)
  last, following = u[:, -2], u[:, -1]
  assert (last * following < 0).all()
  square, product = lib.conditional_moments(_ssm(gamma=gamma))
  wanted = (square, square, product)
  for x, want in zip((last**2, following**2, last * following), wanted):
    assert abs(x.mean() - want) < 4 * x.std() / np.sqrt(_NUM)
    if gamma == 0.5:
      assert abs(x.mean() - want) < 0.006
  if gamma == 0.5:
    np.testing.assert_allclose([square, product], [0.5865, -0.3270], atol=5e-5)


@pytest.mark.parametrize("kind", _KINDS)
def test_inconsistent_law_is_that_of_rejection(kind):
  """All moments of second and fourth order, beside rejected samples' own."""
  options = {"kind": kind, **_KINDS[kind]}
  _, _, u = _samples(lib.sample_residual_ssm, **options)
  kept = u[u[:, -2] * u[:, -1] < 0]
  _, _, u = _samples(lib.sample_sign_inconsistent, **options)
  u = u[: 10 * len(kept)]
  i, j = np.triu_indices(9)
  for power in (1, 2):
    a, b = ((s[:, i] * s[:, j]) ** power for s in (u, kept))
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    # 90 of them, two kinds: 4.5 deviations.
    assert (abs(a.mean(0) - b.mean(0)) < 4.5 * error + 1e-12).all()
  # First moments are 0.
  assert (abs(u.mean(0)) < 4.5 * u.std(0) / np.sqrt(len(u))).all()
  # What comes next has the second moment of the last, scaled.
  ssm = _ssm(**options)
  square, product = lib.conditional_moments(ssm)
  size = np.linalg.norm(ssm.coef)
  last, following = kept[:, -2], kept[:, -1]
  wanted = (square, size**2 * square, product)
  for x, want in zip((last**2, following**2, last * following), wanted):
    assert abs(x.mean() - want) < 4 * x.std() / np.sqrt(len(x))


def test_strictly_inconsistent_in_float32():
  with jax.enable_x64(False):
    ssm = _ssm(3, gamma=0.99)
    x, y, u = lib.sample_sign_inconsistent(jax.random.key(7), ssm, 200_000)
    assert x.dtype == y.dtype == u.dtype == jnp.float32
    last, following = u[:, -2], u[:, -1]
    assert bool((jnp.sign(last) * jnp.sign(following) == -1).all())


def test_maps_over_tasks():
  gammas = jnp.array([-0.5, 0.2])

  def last(rng, gamma):
    ssm = lib.residual_ssm(rng, 8, gamma=gamma)
    return lib.sample_sign_inconsistent(rng, ssm, 10)[0]

  rngs = jax.random.split(jax.random.key(0), 2)
  together = jax.jit(jax.vmap(last))(rngs, gammas)
  alone = [last(rng, float(g)) for rng, g in zip(rngs, gammas)]
  np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_second_draw_compiles_nothing():
  first, second = _ssm(8), _ssm(8, seed=1)
  rngs = [jax.random.key(i) for i in range(2)]
  for draw in _BOTH:
    draw(rngs[0], first, 10)
    with no_recompilation():
      draw(rngs[1], second, 10)


# --- risks ---


def _squared_error(predict, draw, **options):
  x, y, _ = _samples(draw, **options)
  errors = (predict(x) - y) ** 2
  return errors.mean(), errors.std() / np.sqrt(len(errors))


def _residual(v):
  return lambda x: (x[:, :-1] - x[:, -1:]) @ v + x[:, -1]


@pytest.mark.parametrize("draw", _BOTH)
def test_exact_residual_linear_risk_is_noise(draw):
  ssm = _ssm(gamma=0.5)
  want = lib.residual_linear_risk(ssm)
  np.testing.assert_allclose(want, 2 * 0.1**2, rtol=1e-12)
  predict = _residual(np.asarray(ssm.coef[:-1]))
  found, error = _squared_error(predict, draw, gamma=0.5)
  assert abs(found - want) < 4 * error
  assert error < 2e-4


@pytest.mark.parametrize("kind", _KINDS)
def test_residual_linear_risk_of_any_vector(kind):
  options = {"kind": kind, **_KINDS[kind]}
  ssm = _ssm(**options)
  v = np.random.default_rng(0).normal(size=7)
  found, error = _squared_error(_residual(v), _BOTH[0], **options)
  assert abs(found - lib.residual_linear_risk(ssm, v)) < 4 * error
  # The terms of the noise, which is small there.
  big = ssm._replace(noise=jnp.asarray(2.0))
  none = ssm._replace(noise=jnp.asarray(0.0))
  got = lib.residual_linear_risk(big, v) - lib.residual_linear_risk(none, v)
  np.testing.assert_allclose(got, 4 * (1 + v @ v + (1 - v.sum()) ** 2))


def test_the_tasks_own_vector_is_the_best_up_to_fourth_order():
  """With weights w of sum 1: w = (c + s^2 / d) / (1 + s^2) is best."""
  for noise in (0.1, 0.05):
    ssm = _ssm(8, noise=noise)
    risk = functools.partial(lib.residual_linear_risk, ssm)
    best = (ssm.coef + noise**2 / 8) / (1 + noise**2)
    np.testing.assert_allclose(best.sum(), 1)
    np.testing.assert_allclose(jax.grad(risk)(best[:-1]), 0, atol=1e-15)
    # Fourth order: 7/8 s^4.
    np.testing.assert_allclose(
      (risk() - risk(best[:-1])) / noise**4, 7 / 8, rtol=0.02
    )


def test_persistence_on_inconsistent_samples():
  ssm = _ssm(gamma=0.5)
  theta = _theta(ssm)
  sin, cos = np.sin(theta), np.cos(theta)
  want = 2 * (1 - sin * cos / theta) - 2 * (cos - sin / theta) + 2 * 0.1**2
  square, product = lib.conditional_moments(ssm)
  np.testing.assert_allclose(2 * square - 2 * product + 0.02, want, rtol=1e-12)
  found, error = _squared_error(lambda x: x[:, -1], _BOTH[1], gamma=0.5)
  assert abs(found - want) < 4 * error


def test_floor_of_what_ignores_order():
  ssm = _ssm(8, gamma=0.5, noise=0.0)
  floor = lib.permutation_floor(ssm)
  np.testing.assert_allclose(floor, 0.75 - 0.25 / 7, rtol=1e-12)
  np.testing.assert_allclose(floor, 0.7143, atol=5e-5)
  x, _, _ = lib.sample_residual_ssm(jax.random.key(11), ssm, 200)
  past, x = np.asarray(ssm.coef[:-1]), np.asarray(x)
  orders = np.array(list(itertools.permutations(range(7))))
  # The variance over all orders is what the best such function loses.
  lost = np.array([(row[:-1][orders] @ past).var() for row in x])
  error = lost.std() / np.sqrt(len(lost))
  assert abs(lost.mean() - floor) < 3 * error
  # In closed form, for each sample.
  spread = ((x[:, :-1] - x[:, :-1].mean(1, keepdims=True)) ** 2).sum(1) / 6
  np.testing.assert_allclose(lost, floor * spread, rtol=1e-10)


def test_floors_that_vanish():
  assert lib.permutation_floor(_ssm(2, kind="paper")) == 0
  np.testing.assert_allclose(
    lib.permutation_floor(_ssm(8, kind="paper")), 0, atol=1e-30
  )
  # At the least gamma all lags have one coefficient.
  np.testing.assert_allclose(
    lib.permutation_floor(_ssm(8, gamma=2 / 8 - 1)), 0, atol=1e-12
  )


def test_the_papers_own_task_is_a_poor_one():
  ssm = _ssm(8, kind="paper")
  square, _ = lib.conditional_moments(ssm)
  # E y^2 = .011, of which .010 is noise.
  following = ssm.coef @ ssm.coef * square
  np.testing.assert_allclose(following + ssm.noise**2, 0.0115, atol=5e-5)


# --- refused ---


@pytest.mark.parametrize(
  ("dim", "options", "message"),
  [
    (2, {}, "dim must be >= 3 for kind='unit', got 2"),
    (1, {"kind": "paper"}, "dim must be >= 2 for kind='paper', got 1"),
    (8.0, {}, "dim must be an integer >= 3, got 8.0"),
    (8, {"kind": "toy"}, "kind must be one of 'unit', 'paper', got 'toy'"),
    (8, {"gamma": 1.0}, "gamma must be in (-1, 1), got 1.0"),
    (8, {"gamma": -1.0}, "gamma must be in (-1, 1), got -1.0"),
    (3, {"gamma": -0.5}, "gamma too negative for dim=3"),
    (8, {"gamma": jnp.zeros(2)}, "gamma must be a real scalar"),
    (8, {"noise": -0.1}, "noise must be non-negative, got -0.1"),
    (8, {"noise": jnp.ones(2)}, "noise must be a real scalar"),
    (8, {"kind": "paper", "gamma": 0.5}, "gamma must be None for kind='paper'"),
  ],
)
def test_refused_tasks(dim, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    _ssm(dim, **options)


_RNG = jax.random.key(0)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda ssm: lib.sample_residual_ssm(_RNG, ssm, 0),
      "num_samples must be >= 1, got 0",
    ),
    (
      lambda ssm: lib.sample_sign_inconsistent(_RNG, ssm, 1.5),
      "num_samples must be an integer >= 1, got 1.5",
    ),
    (
      lambda ssm: lib.sample_sign_inconsistent(
        _RNG, ssm._replace(coef=jnp.eye(8)[-1]), 5
      ),
      "ssm.coef must have weight on a lag before the last",
    ),
    (
      lambda ssm: lib.permutation_floor(ssm._replace(coef=jnp.ones((2, 2)))),
      "ssm.coef must have 1 dimensions, got shape (2, 2)",
    ),
    (
      lambda ssm: lib.conditional_moments(ssm._replace(coef=jnp.ones(1))),
      "ssm.coef must have 2 entries or more",
    ),
    (
      lambda ssm: lib.inconsistency_probability(
        ssm._replace(coef=jnp.arange(3))
      ),
      "ssm.coef must have a floating dtype",
    ),
    (
      lambda ssm: lib.sample_residual_ssm(
        _RNG, ssm._replace(noise=jnp.array(-1.0)), 5
      ),
      "ssm.noise must be non-negative, got -1.0",
    ),
    (
      lambda ssm: lib.residual_linear_risk(ssm, jnp.ones(8)),
      "v must have shape (7,) = (d - 1,), got (8,)",
    ),
  ],
)
def test_refused_arguments(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call(_ssm(8))
