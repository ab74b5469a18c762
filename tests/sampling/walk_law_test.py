"""The laws of Dikin walks, against moments that are known exactly.

Chains start from exact draws of the law, so that nothing has to mix: what a
wrong step would change shows in the means over chains.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.sampling import (
  LeverageSample,
  Polytope,
  TensorSRHT,
  dikin_walk,
  potential_scale_reduction,
  sample_chains,
)
from jaxattn.sampling.dikin import walk as walk_module
from tests.sampling import _bodies
from tests.sampling._bodies import assert_mean

_CHAINS, _STEPS = 2000, 40


def _draws(walk, starts, num_steps=_STEPS, seed=0):
  key = jax.random.key(seed)
  draws, infos, _ = sample_chains(key, walk, starts, num_steps)
  return np.asarray(draws), np.asarray(infos.acceptance_rate)


def _assert_simplex(draws):
  """d = 3: means 1/4, variances 3/80, covariances -1/80."""
  assert_mean(draws, 1 / 4)
  off = draws - 1 / 4
  assert_mean(off**2, 3 / 80)
  assert_mean(off * np.roll(off, 1, -1), -1 / 80)


@pytest.mark.parametrize(
  ("kind", "num_iters"),
  [
    ("log", 4),
    ("vaidya", 4),
    ("john", 1),
    ("lee_sidford", 3),
    *(
      pytest.param(kind, num, marks=pytest.mark.slow)
      for kind, num in (
        ("john", 3),
        ("john", 8),
        ("lee_sidford", 1),
        ("lee_sidford", 8),
      )
    ),
  ],
)
def test_simplex(kind, num_iters):
  """However few the iterations for the weights are."""
  walk = dikin_walk(None, _bodies.simplex(3), kind=kind, num_iters=num_iters)
  starts = _bodies.uniform_simplex(0, _CHAINS, 3)
  draws, rates = _draws(walk, starts)
  assert rates.mean() > 0.3
  _assert_simplex(draws)


@pytest.mark.slow
def test_wrong_triangle_is_noticed(monkeypatch):
  """The covariance (L^T L)^-1 passes in boxes, not here: .229, .237, .253."""
  solve = walk_module.linalg.solve_triangular

  class Linalg:
    @staticmethod
    def solve_triangular(factor, b, trans, lower):
      del trans
      return solve(factor, b, lower=lower)

  walk = dikin_walk(None, _bodies.simplex(3))
  monkeypatch.setattr(walk_module, "linalg", Linalg)
  starts = _bodies.uniform_simplex(0, 3 * _CHAINS, 3)
  draws, _ = _draws(walk, starts, 200)
  with pytest.raises(AssertionError):
    assert_mean(draws[:, 100:], 1 / 4, 6.0)


def test_cold_chains_mix():
  """From a corner, with a step size that the warm-up finds."""
  starts = jnp.full((32, 3), 0.01)
  draws, infos, step_size = sample_chains(
    jax.random.key(0),
    dikin_walk(None, _bodies.simplex(3), step_size=0.1),
    starts,
    6000,
    thin=30,
    num_warmup=500,
  )
  assert abs(infos.acceptance_rate.mean() - 0.35) < 0.03
  assert 1 < step_size < 2.5
  _assert_simplex(np.asarray(draws))
  assert (potential_scale_reduction(draws) < 1.02).all()


def test_box():
  d = 10
  walk = dikin_walk(None, _bodies.box(d))
  draws, _ = _draws(walk, _bodies.uniform_box(0, _CHAINS, d))
  assert_mean(draws, 0)
  assert_mean(draws**2, 1 / 3)


@pytest.mark.parametrize(
  "lipschitz", [pytest.param(None, marks=pytest.mark.slow), 17.5]
)
def test_exponential_tilt(lipschitz):
  slope = np.linspace(0.5, 8, 10)
  walk = dikin_walk(
    lambda x: -jnp.asarray(slope) @ x, _bodies.box(10), lipschitz=lipschitz
  )
  starts = _bodies.tilted_box(0, _CHAINS, slope)
  if lipschitz is None:
    draws, _ = _draws(walk, starts)
  else:
    # A step size that is given, in which the threshold counts otherwise.
    draws, _ = _draws(walk._replace(step_size=3.0), starts)
  mean = -(1 / np.tanh(slope) - 1 / slope)
  assert_mean(draws, mean)
  variance = 1 / slope**2 - 1 / np.sinh(slope) ** 2
  assert_mean((draws - mean) ** 2, variance)


@pytest.mark.parametrize(
  "n", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 5))]
)
def test_correlation_matrices(n):
  """S = I + sum_ij r_ij (E_ij + E_ji): variance 1 / (n + 1) each."""
  rows, columns = np.triu_indices(n, 1)
  mats = np.zeros((len(rows), n, n))
  each = np.arange(len(rows))
  mats[each, rows, columns] = mats[each, columns, rows] = 1
  body = walk_module.Spectrahedron(jnp.asarray(mats), -jnp.eye(n))
  starts = _bodies.elliptope_draws(0, _CHAINS, n)
  # Steps that are safe in a spectrahedron: r^2 as 1 / n.
  walk = dikin_walk(None, body, step_size=1.5 / n**0.5)
  draws, rates = _draws(walk, starts)
  assert rates.mean() > 0.3
  assert_mean(draws, 0)
  assert_mean(draws**2, 1 / (n + 1))


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4])
def test_positive_matrices_of_bounded_trace(n):
  d = n * (n + 1) // 2
  starts = _bodies.psd_cone_draws(0, _CHAINS, n)
  draws, _ = _draws(dikin_walk(None, _bodies.psd_cone(n)), starts)
  mats = _bodies.symmetric(draws, n)
  trace = np.trace(mats, axis1=-2, axis2=-1)
  assert_mean(trace, d / (d + 1))
  share = (mats**2).sum((-1, -2)) / trace**2
  assert_mean(share, (2 * n + 2) / (n * (n + 1) + 2))


def test_linear_maps_change_nothing():
  """In law: a box, and the same box in coordinates of condition 1e4."""
  d = 6
  box, rng = _bodies.box(d), np.random.default_rng(0)
  q1, q2 = (np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(2))
  m = q1 @ np.diag(np.geomspace(1, 1e4, d)) @ q2
  skew = Polytope(box.a @ m, box.b)
  starts = _bodies.uniform_box(0, _CHAINS, d)
  plain, rates = _draws(dikin_walk(None, box), starts, 30)
  turned = jnp.asarray(np.linalg.solve(m, np.asarray(starts).T).T)
  other, rates_other = _draws(dikin_walk(None, skew), turned, 30)
  other = other @ m.T
  assert_mean(rates - rates_other, 0)
  for moment in (lambda x: x, np.square):
    assert_mean(moment(other) - moment(plain), 0)
  # How far a step goes, too.
  jump, jump_other = (
    ((x[:, 1:] - x[:, :-1]) ** 2).sum(-1) for x in (plain, other)
  )
  assert_mean(jump - jump_other, 0)


# --- sketches ---


def _sketched(which, num_rows, coins):
  if which == "polytope":
    a, b = _bodies.simplex(3)
    body = Polytope(jnp.tile(a, (16, 1)), jnp.tile(b, 16))
    sketch = LeverageSample(num_rows)
  else:
    body, sketch = _bodies.hidden_simplex(3, 2), TensorSRHT(num_rows)
  return dikin_walk(None, body, step_size=2.0, sketch=sketch, coins=coins)


@pytest.mark.parametrize(
  ("which", "num_rows", "coins"),
  [
    ("polytope", 12, "common"),
    ("spectrahedron", 16, "fresh"),
    pytest.param("polytope", 12, "fresh", marks=pytest.mark.slow),
    pytest.param("spectrahedron", 16, "common", marks=pytest.mark.slow),
  ],
)
def test_sketched_walks_are_exact(which, num_rows, coins):
  walk = _sketched(which, num_rows, coins)
  draws, rates = _draws(walk, _bodies.uniform_simplex(0, 1000, 3))
  assert 0.1 < rates.mean() < 0.9
  _assert_simplex(draws)


@pytest.mark.slow
def test_quadratic_terms_are_needed(monkeypatch):
  """Without them a sketched walk has another law."""
  walk = _sketched("spectrahedron", 16, "fresh")
  monkeypatch.setattr(walk_module, "_half_squares", lambda x: 0.0)
  draws, _ = _draws(walk, _bodies.uniform_simplex(0, _CHAINS, 3))
  with pytest.raises(AssertionError):
    _assert_simplex(draws)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["polytope", "spectrahedron"])
def test_acceptance_grows_with_rows_and_with_common_coins(which):
  starts = _bodies.uniform_simplex(0, _CHAINS, 3)
  rates = {
    (num, coins): _draws(_sketched(which, num, coins), starts, 20)[1].mean()
    for num in (12, 48)
    for coins in ("fresh", "common")
  }
  assert rates[12, "fresh"] < rates[12, "common"]
  assert rates[48, "fresh"] < rates[48, "common"]
  assert rates[12, "fresh"] < rates[48, "fresh"]


# --- unbounded bodies ---


@pytest.mark.slow
def test_a_cone_with_a_density():
  """x >= 0 and f = x1 + x2: exponential."""
  cone = Polytope(-jnp.eye(2), jnp.zeros(2))
  walk = dikin_walk(lambda x: -x.sum(), cone, allow_unbounded=True)
  rng = np.random.default_rng(0)
  starts = jnp.asarray(rng.exponential(size=(_CHAINS, 2)))
  draws, _ = _draws(walk, starts)
  assert_mean(draws, 1)
  assert_mean(draws**2, 2)


def test_a_half_space_with_a_normal_density():
  """The barrier alone has a metric of rank 1; the threshold is enough."""
  half = Polytope(jnp.array([[-1.0, 0.0]]), jnp.zeros(1))
  walk = dikin_walk(
    lambda x: -(x**2).sum() / 2, half, smoothness=1.0, allow_unbounded=True
  )
  rng = np.random.default_rng(0)
  starts = rng.normal(size=(_CHAINS, 2))
  starts[:, 0] = abs(starts[:, 0])
  draws, _ = _draws(walk, jnp.asarray(starts))
  assert_mean(draws[..., 0], (2 / np.pi) ** 0.5)
  assert_mean(draws**2, 1)
  assert_mean(draws[..., 1], 0)
