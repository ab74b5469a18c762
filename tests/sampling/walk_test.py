"""The Dikin walk's step: its formula, its balance, what it refuses."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.sampling import (
  DikinInfo,
  LeverageSample,
  Polytope,
  Spectrahedron,
  TensorSRHT,
  barrier_hessian,
  dikin,
  dikin_walk,
)
from tests._recompile import no_recompilation
from tests.sampling import _bodies

_KINDS = ("log", "vaidya", "john", "lee_sidford")


def _metric(body, x, kind, step_size, threshold):
  """The metric as it is written down."""
  d = len(x)
  hessian = barrier_hessian(body, x, kind=kind)
  scale = math.sqrt(len(body.a) * d) if kind == "vaidya" else d
  return scale / step_size**2 * hessian + threshold * jnp.eye(d)


def _log_ratio(body, x, z, f, *args):
  at_x, at_z = _metric(body, x, *args), _metric(body, z, *args)
  half = (jnp.linalg.slogdet(at_z)[1] - jnp.linalg.slogdet(at_x)[1]) / 2
  move = z - x
  return f(x) - f(z) + half + move @ (at_x - at_z) @ move / 2


# --- the step ---


@pytest.mark.parametrize(
  ("kind", "soft"), [("log", False), *((kind, True) for kind in _KINDS)]
)
def test_acceptance_is_that_of_metropolis_and_hastings(kind, soft):
  body = _bodies.random_polytope(12, 3)

  def f(x):
    return (x**2).sum() + x[0]

  options = {"lipschitz": 3.0, "smoothness": 2.0} if soft else {}
  walk = dikin_walk(lambda x: -f(x), body, kind=kind, **options)
  state = walk.init(jnp.array([0.05, -0.1, 0.02]))
  for given in (None, 0.7):
    many = jax.jit(jax.vmap(walk.step, (0, None, None)))
    after, info = many(_bodies.keys(20), state, given)
    k = int(jnp.argmax(info.is_accepted))
    assert info.is_accepted[k]
    size, threshold = 1.0 if given is None else given, 3 * 2.0 * soft
    args = body, state.position, after.position[k], f, kind, size, threshold
    want = _log_ratio(*args)
    np.testing.assert_allclose(info.log_ratio[k], want, rtol=1e-9, atol=1e-10)
    rate = min(1.0, math.exp(want))
    np.testing.assert_allclose(info.acceptance_rate[k], rate, rtol=1e-9)
    # The state is that of a start there, whatever the step size was.
    new = type(after)(*(leaf[k] for leaf in after))
    for got, start in zip(new, walk.init(new.position), strict=True):
      np.testing.assert_allclose(got, start, rtol=1e-9, atol=1e-12)


def test_proposals_have_the_inverse_metric_as_covariance():
  """Not that of the solve with the other triangle."""
  body, x = _bodies.simplex(3), jnp.array([0.3, 0.5, 0.1])
  walk = dikin_walk(None, body, step_size=1e-4)
  many = jax.jit(jax.vmap(walk.step, (0, None)))
  after, info = many(_bodies.keys(20_000), walk.init(x))
  np.testing.assert_allclose(info.acceptance_rate, 1, atol=1e-2)
  moves = (after.position - x[None])[info.is_accepted]
  want = jnp.linalg.inv(_metric(body, x, "log", 1e-4, 0.0))
  factor = jnp.linalg.cholesky(jnp.linalg.inv(want))
  white = moves @ factor
  got = white.T @ white / len(white)
  # Entries of a Wishart matrix: variance 1 / num, 2 / num on the diagonal.
  np.testing.assert_allclose(got, jnp.eye(3), atol=4.5 * (2 / 20_000) ** 0.5)


def test_outside_is_never_taken():
  walk = dikin_walk(None, _bodies.box(2), step_size=5.0)
  many = jax.jit(jax.vmap(walk.step, (0, None)))
  start = walk.init(jnp.array([0.9, 0.9]))
  after, info = many(_bodies.keys(500), start)
  outside = ~info.is_inside
  assert outside.sum() > 100
  assert not (info.is_accepted & outside).any()
  assert (info.log_ratio[outside] == -jnp.inf).all()
  assert (info.acceptance_rate[outside] == 0).all()
  assert (jnp.abs(after.position) < 1).all()
  stayed = after.position[~info.is_accepted]
  np.testing.assert_array_equal(stayed, jnp.full_like(stayed, 0.9))


def test_density_is_evaluated_inside_only():
  """NaN outside of the body does not come out; nor does NaN inside stay."""
  body = _bodies.box(1)

  def logdensity(x):
    return jnp.where(jnp.abs(x[0]) < 1, jnp.sqrt(1 - x[0] ** 2), jnp.nan)

  walk = dikin_walk(logdensity, body, step_size=3.0)
  many = jax.jit(jax.vmap(walk.step, (0, None)))
  after, info = many(_bodies.keys(200), walk.init(jnp.zeros(1)))
  assert not info.is_inside.all()
  assert not jnp.isnan(info.log_ratio).any()
  assert jnp.isfinite(after.logdensity).all()
  walk = dikin_walk(lambda x: jnp.where(x[0] > 0.1, jnp.nan, 0.0), body)
  many = jax.jit(jax.vmap(walk.step, (0, None)))
  after, info = many(_bodies.keys(200), walk.init(jnp.zeros(1)))
  assert (after.position <= 0.1).all()
  assert info.is_accepted.any()


def test_lazy_walk_stays_half_of_the_time():
  body = _bodies.box(2)
  plain, lazy = (dikin_walk(None, body, lazy=lazy) for lazy in (False, True))
  start, keys = plain.init(jnp.zeros(2)), _bodies.keys(4000)
  moved, tossed = (
    jax.jit(jax.vmap(walk.step, (0, None)))(keys, start)[1]
    for walk in (plain, lazy)
  )
  np.testing.assert_array_equal(moved.log_ratio, tossed.log_ratio)
  assert not (tossed.is_accepted & ~moved.is_accepted).any()
  num = int(moved.is_accepted.sum())
  excess = int(tossed.is_accepted.sum()) - num / 2
  assert abs(excess) < 4.5 * (num / 4) ** 0.5


# --- balance, exactly ---


def test_detailed_balance_on_a_grid():
  """d = 1, K = [0, 1], f = 3 x: the chain of the formulas is reversible."""
  num = 400
  x = (np.arange(num) + 0.5) / num
  body = Polytope(jnp.array([[-1.0], [1.0]]), jnp.array([0.0, 1.0]))
  points = jnp.asarray(x)[:, None]
  hessian = jax.vmap(lambda x: barrier_hessian(body, x))(points)
  phi = np.asarray(hessian)[:, 0, 0] + 9.0
  move = x[None] - x[:, None]
  log_q = (np.log(phi)[:, None] - phi[:, None] * move**2) / 2
  # On a grid proposals do not sum to 1: what is missing stays.
  q = np.exp(log_q) / num / math.sqrt(2 * math.pi)
  q /= q.sum(1).max()
  log_ratio = -3 * move + log_q.T - log_q
  step = q * np.exp(np.minimum(0, log_ratio))
  np.fill_diagonal(step, 0)
  np.fill_diagonal(step, 1 - step.sum(1))
  law = np.exp(-3 * x) / np.exp(-3 * x).sum()
  flow = law[:, None] * step
  assert np.abs(flow - flow.T).max() < 1e-12
  assert np.abs(law @ step - law).sum() < 1e-10
  # And the walk computes the very same ratio.
  walk = dikin_walk(lambda x: -3 * x[0], body, lipschitz=3.0)
  i = 150
  many = jax.jit(jax.vmap(walk.step, (0, None)))
  after, info = many(_bodies.keys(50), walk.init(points[i]))
  z = np.asarray(after.position)[np.asarray(info.is_accepted), 0]

  def metric(z):
    return z**-2.0 + (1 - z) ** -2.0 + 9

  square = (z - x[i]) ** 2
  want = np.log(metric(z) / phi[i]) / 2 - square * (metric(z) - phi[i]) / 2
  want -= 3 * (z - x[i])
  got = info.log_ratio[info.is_accepted]
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


# --- limits ---


def test_small_steps_are_accepted():
  body = _bodies.random_polytope(12, 3)
  walk = dikin_walk(None, body)
  start = walk.init(jnp.zeros(3))
  many = jax.jit(jax.vmap(walk.step, (0, None, None)))
  rates = [
    many(_bodies.keys(500), start, r)[1].acceptance_rate.mean()
    for r in (1.0, 0.1, 0.01)
  ]
  assert rates[0] < rates[1] < rates[2]
  assert 1 - rates[2] < 0.02


def test_large_threshold_is_a_ball_walk():
  """Moves are normal with covariance eta I, wherever x is."""
  body, x = _bodies.box(3), jnp.array([0.5, -0.5, 0.0])
  walk = dikin_walk(lambda x: 0.0 * x.sum(), body, smoothness=1e6)
  many = jax.jit(jax.vmap(walk.step, (0, None)))
  after, info = many(_bodies.keys(20_000), walk.init(x))
  assert info.acceptance_rate.min() > 0.99
  moves = (after.position - x[None])[info.is_accepted] * math.sqrt(3e6)
  got = moves.T @ moves / len(moves)
  np.testing.assert_allclose(got, jnp.eye(3), atol=4.5 * (2 / 20_000) ** 0.5)


def test_the_smaller_threshold_counts():
  body, x = _bodies.box(2), jnp.zeros(2)

  def chol(**options):
    return dikin_walk(lambda x: -x[0], body, **options).init(x).chol

  both = chol(lipschitz=3.0, smoothness=2.0)
  np.testing.assert_array_equal(both, chol(smoothness=2.0))
  both = chol(lipschitz=1.0, smoothness=2.0)
  np.testing.assert_array_equal(both, chol(lipschitz=1.0))
  np.testing.assert_array_equal(chol(smoothness=0.0), chol())


# --- the form of blackjax, shapes, dtypes, compilation ---


def test_kernel_is_the_walk():
  body = _bodies.random_polytope(12, 3)
  options = {"kind": "vaidya", "smoothness": 1.0}

  def logdensity(x):
    return -(x**2).sum() / 2

  walk = dikin_walk(logdensity, body, **options)
  kernel = dikin.build_kernel(**options)
  state = dikin.init(jnp.zeros(3), logdensity, body, **options)
  key = jax.random.key(3)
  want = jax.jit(walk.step)(key, walk.init(jnp.zeros(3)), 0.8)
  call = jax.jit(kernel, static_argnums=2)
  got = call(key, state, logdensity, body, 0.8)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-12)
  assert isinstance(got[1], DikinInfo)


def test_no_recompilation():
  walk = dikin_walk(None, _bodies.box(2))
  step, keys = jax.jit(walk.step), _bodies.keys(3)
  state = walk.init(jnp.zeros(2))
  state, _ = step(keys[0], state, jnp.asarray(1.0))
  with no_recompilation():
    step(keys[1], state, jnp.asarray(0.5))


@pytest.mark.any_x64
@pytest.mark.parametrize("kind", ["log", "lee_sidford"])
def test_float32_stays(kind):
  body = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.float32), _bodies.random_polytope(12, 3)
  )
  walk = dikin_walk(lambda x: -x.sum(), body, kind=kind, lipschitz=2.0)
  state = walk.init(np.zeros(3))
  many = jax.jit(jax.vmap(walk.step, (0, None, None)))
  for given in (None, 0.5):
    after, info = many(_bodies.keys(50), state, given)
    floats = (*after, info.acceptance_rate, info.log_ratio)
    assert all(x.dtype == jnp.float32 for x in floats)
    assert info.is_accepted.any()


def test_chains_share_products_of_matrices():
  """The metric of all chains is one product: no batched one with A in it."""
  walk = dikin_walk(None, _bodies.random_polytope(12, 3))
  states = jax.vmap(walk.init)(jnp.zeros((64, 3)))
  text = str(jax.make_jaxpr(jax.vmap(walk.step))(_bodies.keys(64), states))
  shapes = re.findall(r"f64\[([\d,]+)\] = dot_general", text)
  # A z, the metrics, and the quadratic form in the factors.
  assert "64,9" in shapes
  assert all(math.prod(map(int, s.split(","))) < 64 * 12 * 9 for s in shapes)


# --- refused inputs ---

_BOX = _bodies.box(2)
_CONE = Polytope(-jnp.eye(2), jnp.zeros(2))
_SPECTRAHEDRON = _bodies.random_spectrahedron(3, 2)


def _slope(x):
  return -x.sum()


@pytest.mark.parametrize(
  ("args", "options", "message"),
  [
    ((None, Polytope(jnp.ones(3), jnp.ones(3))), {}, "a must have 2 dimens"),
    ((None, Polytope(jnp.ones((3, 1)), jnp.ones(2))), {}, "b must have shape"),
    ((None, _BOX), {"kind": "lewis"}, "kind must be one of 'log'"),
    ((None, _BOX), {"step_size": 0.0}, "step_size must be positive, got 0.0"),
    ((None, _BOX), {"step_size": -1.0}, "step_size must be positive, got -1"),
    ((None, _BOX), {"num_iters": 0}, "num_iters must be >= 1, got 0"),
    (
      (_slope, _BOX),
      {"lipschitz": -1.0},
      "lipschitz must be non-negative and finite, got -1.0",
    ),
    ((_slope, _BOX), {"smoothness": -2.0}, "smoothness must be non-negative"),
    ((None, _BOX), {"lipschitz": 1.0}, "lipschitz is of a logdensity_fn"),
    ((None, _BOX), {"coins": "common"}, "coins='common' needs a sketch"),
    (
      (None, _BOX),
      {"sketch": LeverageSample(4), "coins": "kept"},
      "coins must be one of 'fresh', 'common', got 'kept'",
    ),
    ((None, _BOX), {"sketch": 4}, "sketch must be None, a LeverageSample or"),
    (
      (None, _BOX),
      {"sketch": TensorSRHT(4)},
      "sketch of a Polytope must be a LeverageSample, got TensorSRHT",
    ),
    (
      (None, _SPECTRAHEDRON),
      {"sketch": LeverageSample(4)},
      "sketch of a Spectrahedron must be a TensorSRHT",
    ),
    (
      (None, _BOX),
      {"sketch": LeverageSample(1)},
      "num_rows must be >= 2, got 1",
    ),
    (
      (None, _SPECTRAHEDRON),
      {"sketch": TensorSRHT(1)},
      "num_rows must be >= 2, got 1",
    ),
    ((None, _CONE), {}, "body is unbounded: nothing is uniform on it"),
    ((_slope, _CONE), {}, "body is unbounded"),
    (
      (None, _CONE),
      {"allow_unbounded": True},
      "allow_unbounded=True needs a logdensity_fn",
    ),
    (
      (None, Spectrahedron(jnp.ones((1, 2, 2)), -jnp.eye(2))),
      {},
      "body is unbounded",
    ),
    ((None, _SPECTRAHEDRON), {"kind": "john"}, "kind must be one of 'log'"),
  ],
)
def test_refused_walks(args, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    dikin_walk(*args, **options)


@pytest.mark.parametrize(
  ("body", "position", "message"),
  [
    (_BOX, jnp.zeros(3), "position must have shape (2,) = (d,), got (3,)"),
    (
      _BOX,
      jnp.array([0.0, 1.25]),
      "position violates constraint 1 by 0.25",
    ),
    (_BOX, jnp.array([-1.0, 0.0]), "position violates constraint 2 by 0"),
    (_SPECTRAHEDRON, jnp.full(2, 50.0), "inside the spectrahedron, got small"),
  ],
)
def test_refused_starts(body, position, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    dikin_walk(None, body).init(position)
  # Where nothing can be raised no chain can start.
  if position.shape == (2,):
    state = jax.jit(dikin_walk(None, body).init)(position)
    assert state.logdensity == -jnp.inf


def test_refused_steps():
  walk = dikin_walk(lambda x: x, _BOX)
  with pytest.raises(ValueError, match=r"logdensity_fn\(position\) must have"):
    walk.init(jnp.zeros(2))
  walk = dikin_walk(None, _BOX)
  state = walk.init(jnp.zeros(2))
  with pytest.raises(ValueError, match="step_size must be positive, got 0"):
    walk.step(jax.random.key(0), state, 0.0)
  with pytest.raises(ValueError, match="step_size must be a real scalar"):
    walk.step(jax.random.key(0), state, jnp.ones(2))
