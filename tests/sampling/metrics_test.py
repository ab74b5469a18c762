"""Scores of forecasts and distances of clouds, against other ways to them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg, optimize, stats

from jaxattn.sampling import (
  Corrector,
  crps,
  energy_distance,
  energy_score,
  gaussian_w2,
  gmm_init,
  gmm_init_kl_bound,
  memorization_ratio,
  pinball,
  pit_histogram,
  sliced_w2,
  tv_kl_1d,
)
from tests.sampling._mixtures import line_mixture, random_mixture

_KEY = jax.random.key(0)


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


# --- forecasts ---


def test_crps_by_pairs():
  samples, y = _draw(7, 4, 3), _draw(4, 3, seed=1)
  pairs = np.abs(samples[:, None] - samples[None]).sum((0, 1)) / (2 * 7 * 6)
  want = np.abs(samples - y).mean(0) - pairs
  np.testing.assert_allclose(crps(samples, y), want, rtol=1e-12, atol=1e-13)
  np.testing.assert_allclose(
    energy_score(samples[..., None], y[..., None]), want, rtol=1e-11, atol=1e-12
  )


def test_crps_of_a_normal_forecast():
  samples = _draw(100_000)
  found = crps(samples, jnp.array(0.0))
  assert abs(found - (np.sqrt(2) - 1) / np.sqrt(np.pi)) < 3e-3
  assert crps(jnp.full(5, 2.5), jnp.array(2.5)) == 0


def test_crps_is_fair():
  """Unbiased for any number of samples: two are as good as the limit."""
  samples, y = _draw(2, 200_000), _draw(200_000, seed=1)
  found = np.asarray(crps(samples, y))
  # Of forecast and outcome N(0, 1): E|X - y| / 2 = 1 / sqrt(pi).
  error = found.std() / np.sqrt(len(y))
  assert abs(found.mean() - 1 / np.sqrt(np.pi)) < 4.5 * error


def test_energy_score_by_pairs():
  samples, y = _draw(6, 4, 3), _draw(4, 3, seed=1)
  near = np.linalg.norm(samples - y, axis=-1).mean(0)
  apart = np.linalg.norm(samples[:, None] - samples[None], axis=-1)
  want = near - apart.sum((0, 1)) / (2 * 6 * 5)
  np.testing.assert_allclose(energy_score(samples, y), want, rtol=1e-12)


def test_pinball_losses_and_their_mean():
  samples, y = _draw(4001, 5), _draw(5, seed=1)
  found = np.asarray(pinball(samples, y))
  levels = np.arange(1, 10) / 10
  gap = y[None] - np.quantile(samples, levels, axis=0)
  want = np.where(gap > 0, levels[:, None] * gap, (levels[:, None] - 1) * gap)
  np.testing.assert_allclose(found, want, rtol=1e-12)
  # Twice the integral over levels is the CRPS; nine levels come near.
  np.testing.assert_allclose(
    2 * found.mean(0), crps(samples, y), rtol=0.1, atol=0.01
  )


def test_histogram_of_ranks():
  samples, y = _draw(19, 40_000), _draw(40_000, seed=1)
  calibrated = np.asarray(pit_histogram(samples, y))
  np.testing.assert_allclose(calibrated.sum(), 1, rtol=1e-12)
  error = np.sqrt(0.1 * 0.9 / 40_000)
  assert (np.abs(calibrated - 0.1) < 4.5 * error).all()
  narrow = np.asarray(pit_histogram(samples / 3, y))
  assert narrow[0] > 0.2
  assert narrow[-1] > 0.2
  ties = pit_histogram(np.zeros((4, 3)), jnp.zeros(3), num_bins=5)
  np.testing.assert_array_equal(ties, [0, 0, 1, 0, 0])


def test_memorization():
  train = _draw(60, 3)
  assert memorization_ratio(train[:7], train) == 0
  apart = np.linalg.norm(train[:, None] - train[None], axis=-1)
  np.fill_diagonal(apart, np.inf)
  fresh = _draw(50, 3, seed=1)
  near = np.linalg.norm(fresh[:, None] - train[None], axis=-1).min(1)
  want = near.mean() / apart.min(1).mean()
  np.testing.assert_allclose(memorization_ratio(fresh, train), want, rtol=1e-12)
  assert 0.7 < want < 1.4


# --- clouds ---


def test_energy_distance_against_scipy():
  x, y = _draw(40, 1), 0.3 + 2 * _draw(60, 1, seed=1)
  want = stats.energy_distance(x[:, 0], y[:, 0]) ** 2
  np.testing.assert_allclose(energy_distance(x, y), want, rtol=1e-10)


def test_energy_distance_by_pairs():
  # More rows than are computed at a time, and far from the origin.
  x, y = 1e3 + _draw(300, 3), 1e3 + 0.5 * _draw(50, 3, seed=1)

  def mean(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=-1).mean()

  want = 2 * mean(x, y) - mean(x, x) - mean(y, y)
  np.testing.assert_allclose(energy_distance(x, y), want, rtol=1e-9)
  # Of 2 n pairs of n^2 the distance is 0, which products know to the root of
  # rounding.
  assert abs(energy_distance(x, x)) < 2 / 300 * np.sqrt(np.finfo(float).eps) * 5
  single = energy_distance(jnp.asarray(x, jnp.float32), jnp.asarray(y, "f4"))
  np.testing.assert_allclose(single, want, rtol=1e-3)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (6, 4), (3, 7)])
def test_sliced_distance_on_a_line(n, m):
  """One dimension has one direction: an optimal transport problem."""
  x, y = _draw(n, 1), 1 + _draw(m, 1, seed=1)
  cost = (x - y.T) ** 2
  rows = np.kron(np.eye(n), np.ones(m))
  columns = np.kron(np.ones(n), np.eye(m))
  plan = optimize.linprog(
    cost.ravel(),
    A_eq=np.concatenate([rows, columns]),
    b_eq=np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)]),
  )
  found = sliced_w2(_KEY, x, y, num_projections=3)
  np.testing.assert_allclose(found, np.sqrt(plan.fun), rtol=1e-7)


def test_sliced_distance_of_a_shift():
  """Clouds that differ by a shift c: E (theta c)^2 = |c|^2 / d."""
  x, c = _draw(200, 3), np.array([1.0, -2.0, 0.5])
  found = sliced_w2(_KEY, x, x + c, num_projections=1000)
  want = np.sqrt(c @ c / 3)
  # (theta c)^2 / |c|^2 is Beta(1/2, 1), of variance 4 / 45.
  spread = np.sqrt(4 / 45) * 3 / np.sqrt(1000)
  assert abs((found / want) ** 2 - 1) < 4.5 * spread
  assert sliced_w2(_KEY, x, x[::-1]) < 1e-12


def test_distance_of_gaussians():
  a, b = _draw(4, 4), _draw(4, 4, seed=1)
  c1, c2 = a @ a.T, b @ b.T
  m1, m2 = _draw(4, seed=2), _draw(4, seed=3)
  root = linalg.sqrtm(c1)
  cross = linalg.sqrtm(root @ c2 @ root).real
  want = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * cross)
  args = map(jnp.asarray, (m1, c1, m2, c2))
  np.testing.assert_allclose(gaussian_w2(*args), np.sqrt(want), rtol=1e-9)
  same = gaussian_w2(*map(jnp.asarray, (m1, c1, m1, c1)))
  assert same < 1e-6


# --- exact laws ---

# Measured in float64 by another implementation of the same chain.
_DDPM = {
  25: (0.1688, 0.102), 50: (0.0849, 0.0316), 100: (0.0418, 0.00899),
  200: (0.0207, 0.00245), 400: (0.0103, 0.00065),
}  # fmt: skip


@pytest.mark.slow
def test_exact_law_of_ddpm():
  gmm = line_mixture()
  found = {
    n: tv_kl_1d(gmm, method="ddpm", num_steps=n, t_max=5.0) for n in _DDPM
  }
  for n, law in found.items():
    np.testing.assert_allclose(law[:2], _DDPM[n], rtol=0.02)
    assert law.is_monotone
  logs = np.log(list(_DDPM))
  tv, kl = (np.log([law[i] for law in found.values()]) for i in (0, 1))
  assert -1.05 <= np.polyfit(logs, tv, 1)[0] <= -0.95
  assert -2.0 <= np.polyfit(logs[2:], kl[2:], 1)[0] <= -1.8


def test_exact_law_of_exponential_steps():
  law = functools.partial(tv_kl_1d, line_mixture(), method="ei", t_max=5.0)
  tv = [float(law(num_steps=n).tv) for n in (16, 256)]
  np.testing.assert_allclose(tv, [0.1216, 0.0079], rtol=0.01)
  assert 0.95 <= np.log(tv[0] / tv[1]) / np.log(16) <= 1.05


def test_exact_law_of_overdamped_corrector():
  """Of N(0, v) all steps are linear: the law is N(0, q)."""
  v, t_max, h, every, again = 0.4, 2.0, 0.1, 2, 3
  ts = np.linspace(t_max, 0.0, 7)
  var = np.exp(-2 * ts) * v - np.expm1(-2 * ts)
  step, q = ts[0] - ts[1], 1.0
  for n in range(6):
    q *= (np.exp(step) - np.expm1(step) / var[n]) ** 2
    if n % every == every - 1:
      for _ in range(again):
        q = (1 - h / var[n + 1]) ** 2 * q + 2 * h
  law = tv_kl_1d(
    gmm_init([1.0], jnp.zeros((1, 1)), [v]),
    method="dpom",
    num_steps=6,
    t_max=t_max,
    corrector=Corrector(h, num_steps=again, every=every),
  )
  want = (v / q - 1 - np.log(v / q)) / 2
  np.testing.assert_allclose(law.kl, want, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["heun", "dpm2"])
def test_exact_laws_of_second_order(method):
  law = functools.partial(
    tv_kl_1d, line_mixture(), method=method, t_max=8.0, t_min=0.1
  )
  tv = [float(law(num_steps=n).tv) for n in (64, 128)]
  assert np.log2(tv[0] / tv[1]) >= 1.8


def test_law_of_many_steps_is_that_of_their_start():
  """With steps of high order only the noise at T is wrong."""
  law = functools.partial(tv_kl_1d, method="rk4", num_steps=60, t_max=1.0)
  found = law(line_mixture())
  # Data processing, an equality for a map.
  assert 0 < found.kl <= gmm_init_kl_bound(line_mixture(), 1.0)
  means, variances = jnp.full((2, 1), 0.8), [0.4, 0.4]
  alone = gmm_init([0.5, 0.5], means, variances)
  want = gmm_init_kl_bound(alone, 1.0)
  np.testing.assert_allclose(law(alone).kl, want, rtol=1e-5)


@pytest.mark.parametrize("method", ["ddpm", "heun"])
def test_laws_of_other_scores(method):
  """Of a score that is wrong by a constant, on N(0, 1): the mean moves.

  The drift towards the data is x + 2 s = -x + 2 c of "ddpm", and x + s = c of
  the ODE, so that the means at 0 are near 2 c (1 - e^-T) and c T.
  """
  gmm = gmm_init([1.0], jnp.zeros((1, 1)), [1.0])
  off, t_max = 0.2, 2.0
  law = functools.partial(tv_kl_1d, gmm, method=method, t_max=t_max)

  @jax.jit
  def found_of(off):  # And under jit, with an error that is traced.
    return law(num_steps=100, score_fn=lambda x, t: off - x)

  found = found_of(off)
  mean = off * (2 * -np.expm1(-t_max) if method == "ddpm" else t_max)
  np.testing.assert_allclose(found.kl, mean**2 / 2, rtol=0.03)


def test_maps_that_fold_are_seen():
  gmm = gmm_init([0.5, 0.5], jnp.array([[-2.0], [2.0]]), [0.01, 0.01])
  law = tv_kl_1d(gmm, method="heun", num_steps=10, t_max=5.0)
  assert not law.is_monotone
  assert np.isnan(law.tv)
  assert np.isnan(law.kl)


# --- dtypes and refusals ---


@pytest.mark.any_x64
def test_dtype_of_the_samples():
  x, y = (jnp.asarray(_draw(6, 3, seed=i), jnp.bfloat16) for i in (0, 1))
  found = (
    crps(x, x[0]), energy_score(x, x[0]), pinball(x, x[0]),
    pit_histogram(x, x[0]), memorization_ratio(x, y), energy_distance(x, y),
    sliced_w2(_KEY, x, y), gaussian_w2(x[0], jnp.eye(3), y[0], jnp.eye(3)),
  )  # fmt: skip
  assert all(z.dtype == jnp.bfloat16 for z in found)


_ONE, _TWO = jnp.ones((1, 2)), jnp.ones((3, 2))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: crps(_ONE, _ONE[0]), "samples must hold 2 or more, got 1"),
    (lambda: crps(_TWO, _TWO), "samples must have 3 dimensions"),
    (
      lambda: crps(_TWO, jnp.ones(3)),
      "samples must have shape (*, 3) = (S, ...), got (3, 2)",
    ),
    (lambda: crps(jnp.ones((3, 2), int), _ONE[0]), "samples must have a float"),
    (
      lambda: energy_score(jnp.ones(3), jnp.array(1.0)),
      "y must have 1 or more dimensions, got shape ()",
    ),
    (
      lambda: pit_histogram(_TWO, _TWO[0], num_bins=0),
      "num_bins must be >= 1, got 0",
    ),
    (
      lambda: memorization_ratio(_TWO, _ONE),
      "train must hold 2 or more points, got shape (1, 2)",
    ),
    (lambda: energy_distance(_TWO, jnp.ones(3)), "y must have 2 dimensions"),
    (
      lambda: sliced_w2(_KEY, _TWO, jnp.ones((3, 4))),
      "y must have shape (*, 2) = (m, d), got (3, 4)",
    ),
    (
      lambda: sliced_w2(_KEY, _TWO, _TWO, num_projections=0),
      "num_projections must be >= 1, got 0",
    ),
    (
      lambda: gaussian_w2(_ONE[0], jnp.eye(3), _ONE[0], jnp.eye(2)),
      "c1 must have shape (2, 2) = (d, d), got (3, 3)",
    ),
  ],
)
def test_refused_clouds(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"gmm": random_mixture},
      "gmm must be of dimension d = 1, got d = 2",
    ),
    ({"method": "dpum"}, "method must be one of 'ddpm', 'ei', 'euler', 'heun'"),
    ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
    ({"t_min": 5.0}, "t_max must be above t_min, got t_max = 5.0 and t_min"),
    ({"method": "dpm3"}, "method 'dpm3' needs a finite log-SNR at each time"),
    (
      {"gmm": lambda k, d: gmm_init([1.0], jnp.zeros((1, 1)), [1e-6])},
      "the grid of 1401 points, 0.01 apart, does not resolve a component of "
      "standard deviation 0.001",
    ),
    (
      {"method": "dpom"},
      "corrector must be a Corrector for 'dpom', got None",
    ),
    (
      {"corrector": Corrector(0.1)},
      "corrector must be None for 'ddpm', got Corrector(",
    ),
    (
      {"method": "dpom", "corrector": Corrector(1e-4)},
      "the grid of 1401 points, 0.01 apart, does not resolve a step of "
      "standard deviation 0.0141",
    ),
    (
      {"num_steps": 100_000},
      "the grid of 1401 points, 0.01 apart, does not resolve a step of",
    ),
  ],
)
def test_refused_laws(options, message):
  call = {"method": "ddpm", "num_steps": 4, "t_max": 5.0} | options
  make = call.pop("gmm", None)
  gmm = line_mixture() if make is None else make(3, 2)
  with pytest.raises(ValueError, match=re.escape(message)):
    tv_kl_1d(gmm, **call)
