"""Power laws with limits: recovery, coverage, lack of fit, the joint law."""

import math

import numpy as np
import pytest
from scipy import optimize

from jaxattn.scaling import (
  fit_joint_power_law,
  fit_power_law,
  lower_envelope,
)

_SIZES = 2.0 ** np.arange(5, 13)
_LAWS = [(0.05, 3.0, 0.5), (0.0, 3.0, 0.25), (0.2, 3.0, 0.5)]


def _law(limit, scale, exponent, sizes=_SIZES):
  return limit + scale * sizes**-exponent


def _noisy(rng, losses, num_seeds, std=0.05):
  return losses * np.exp(std * rng.normal(size=(num_seeds, losses.size)))


@pytest.mark.parametrize("law", _LAWS)
def test_exact_laws_are_recovered(law):
  fit = fit_power_law(_SIZES, np.tile(_law(*law), (2, 1)))
  np.testing.assert_allclose(fit[:3], law, rtol=1e-6, atol=1e-12)
  np.testing.assert_allclose(fit.exponent_interval, 2 * law[2:], rtol=1e-6)
  # No scatter, and no error either: nothing to test.
  assert math.isnan(fit.lack_of_fit)
  assert fit.is_power_law is None


def test_without_scatter_any_error_is_too_much():
  losses = np.tile(np.exp(-_SIZES / 500), (3, 1))
  fit = fit_power_law(_SIZES, losses)
  assert fit.lack_of_fit == 0
  assert fit.is_power_law is False


@pytest.mark.parametrize("num_seeds", [3, 8])
@pytest.mark.parametrize("law", _LAWS)
def test_intervals_cover(law, num_seeds):
  rng = np.random.default_rng(0)
  fits = [
    fit_power_law(_SIZES, _noisy(rng, _law(*law), num_seeds))
    for _ in range(200)
  ]
  low, high = np.array([f.exponent_interval for f in fits]).T
  covered = np.mean((low <= law[2]) & (law[2] <= high))
  assert 0.9 <= covered <= 0.99
  # A law is refused at the rate of the test, 1 %: at most 7 of 200.
  assert np.mean([f.lack_of_fit < 0.01 for f in fits]) < 0.04


def test_an_exponential_is_no_power_law():
  rng = np.random.default_rng(1)
  losses = np.exp(-_SIZES / 500)
  for irreducible in (True, False):
    fit = fit_power_law(_SIZES, _noisy(rng, losses, 4), irreducible=irreducible)
    assert fit.lack_of_fit < 0.01
    assert fit.is_power_law is False


def test_without_a_limit_it_is_the_line_and_misses_a_floor():
  rng = np.random.default_rng(2)
  losses = _noisy(rng, _law(0.2, 3.0, 0.5), 4)
  fit = fit_power_law(_SIZES, losses, irreducible=False)
  slope, level = np.polyfit(np.log(_SIZES), np.log(losses).mean(0), 1)
  assert fit.limit == 0
  np.testing.assert_allclose(fit.exponent, -slope, rtol=1e-10)
  np.testing.assert_allclose(math.log(fit.scale), level, rtol=1e-10)
  assert fit.lack_of_fit < 1e-6 < fit_power_law(_SIZES, losses).lack_of_fit
  # Rising losses have a negative exponent.
  rising = fit_power_law(_SIZES, _noisy(rng, _SIZES**0.5, 4))
  assert rising.exponent_interval[0] < -0.5 < rising.exponent_interval[1]


def test_agrees_with_curve_fit():
  rng = np.random.default_rng(3)
  logs = np.log(_noisy(rng, _law(0.05, 3.0, 0.5), 5))
  fit = fit_power_law(_SIZES, np.exp(logs))
  error = math.sqrt(((logs - logs.mean(0)) ** 2).sum() / (4 * 8) / 5)
  want, covariance = optimize.curve_fit(
    lambda n, limit, a, b: np.logaddexp(limit, a - b * np.log(n)),
    _SIZES,
    logs.mean(0),
    p0=(-3, 1, 0.5),
    sigma=np.full(8, error),
    absolute_sigma=True,
  )
  got = (math.log(fit.limit), math.log(fit.scale), fit.exponent)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(fit.covariance, covariance, rtol=1e-3)
  assert fit.degrees == 32
  assert fit.is_power_law is True


def test_flat_losses_do_not_determine_an_exponent():
  rng = np.random.default_rng(4)
  undetermined = 0
  for _ in range(20):
    fit = fit_power_law(_SIZES, _noisy(rng, np.ones(8), 4))
    assert fit.exponent_interval[0] < 0 < fit.exponent_interval[1]
    # Either a covariance, or infinities where there is a parameter: no NaN.
    assert not np.isnan(fit.covariance).any()
    undetermined += math.isinf(fit.exponent_interval[1])
    kept = slice(0 if fit.limit else 1, 3)
    same = np.isinf(fit.covariance[kept, kept])
    assert (same == math.isinf(fit.exponent_interval[1])).all()
  assert 0 < undetermined < 20


# --- size and data ---

_N, _D = (
  x.ravel() for x in np.meshgrid(2.0 ** np.arange(4, 9), 3.0 ** np.arange(5))
)
_JOINT = (40.0, 7.0, 0.4, 0.25)


def _joint(n_scale, d_scale, a, b):
  return ((n_scale / _N) ** (a / b) + d_scale / _D) ** b


def test_joint_law_is_recovered():
  losses = np.tile(_joint(*_JOINT), (2, 1))
  fit = fit_joint_power_law(_N, _D, losses)
  np.testing.assert_allclose(fit[:4], _JOINT, rtol=1e-6)
  # Units of the losses change scales alone: here of Kaplan's own law.
  language = (8.8e13, 5.4e13, 0.076, 0.095)
  fit = fit_joint_power_law(_N, _D, np.tile(_joint(*language), (2, 1)))
  np.testing.assert_allclose(fit[:4], language, rtol=1e-5)


def test_joint_intervals_cover():
  rng = np.random.default_rng(5)
  fits = [
    fit_joint_power_law(_N, _D, _noisy(rng, _joint(*_JOINT), 3))
    for _ in range(200)
  ]
  for name, want in (("n_interval", 0.4), ("d_interval", 0.25)):
    low, high = np.array([getattr(f, name) for f in fits]).T
    assert 0.9 <= np.mean((low <= want) & (want <= high)) <= 0.99
  assert np.mean([not f.is_power_law for f in fits]) < 0.04
  wrong = _noisy(rng, _joint(*_JOINT) * (1 + 0.5 * (_N > 60) * (_D > 5)), 3)
  assert fit_joint_power_law(_N, _D, wrong).lack_of_fit < 0.01


def test_losses_that_do_not_fall_determine_no_joint_law():
  rng = np.random.default_rng(7)
  for losses in (np.ones(25), _N**0.5, 1 / _N):
    fit = fit_joint_power_law(_N, _D, _noisy(rng, losses, 3))
    assert fit.d_interval[0] < 0 < fit.d_interval[1]


# --- envelope ---


def test_envelope_against_all_pairs():
  rng = np.random.default_rng(6)
  compute = rng.integers(1, 12, 60).astype(float)
  losses = np.exp(rng.normal(size=(3, 60))) / compute**0.3
  means = np.log(losses).mean(0)
  kept = [
    i
    for i in range(60)
    if not any(
      compute[j] <= compute[i] and means[j] < means[i] for j in range(60)
    )
  ]
  kept = sorted(kept, key=lambda i: compute[i])
  got_compute, got_losses = lower_envelope(compute, losses)
  np.testing.assert_array_equal(got_compute, compute[kept])
  np.testing.assert_array_equal(got_losses, losses[:, kept])
  assert (np.diff(got_compute) > 0).all()


# --- refused ---

_GOOD = np.ones((2, 4))


def _with(value):
  losses = np.ones((2, 4))
  losses[1, 2] = value
  return losses


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: fit_power_law([1, 2], _GOOD[:, :2]),
      "sizes must hold at least 3 for a fit of 3 parameters, got 2",
    ),
    (
      lambda: fit_power_law([1], _GOOD[:, :1], irreducible=False),
      "at least 2 for a fit of 2 parameters, got 1",
    ),
    (lambda: fit_power_law([[1.0]], _GOOD), r"sizes must be a vector, got sh"),
    (lambda: fit_power_law([1, 0, 2, 3], _GOOD), "sizes must be positive and"),
    (lambda: fit_power_law([1, 2, 2, 3], _GOOD), "sizes must be different"),
    (
      lambda: fit_power_law([1, 2, 3, 4], _GOOD[:1]),
      r"shape \(S, 4\) with S >= 2 seeds, got \(1, 4\)",
    ),
    (lambda: fit_power_law([1, 2, 3, 4], _GOOD[0]), r"S >= 2 seeds, got \(4,"),
    (
      lambda: fit_power_law([1, 2, 64, 128], _with(np.nan)),
      "losses must be positive and finite, got nan for seed 1 and size 64",
    ),
    (
      lambda: fit_power_law([1, 2, 64, 128], _with(0.0)),
      r"positive and finite, got 0\.0 for seed 1 and size 64",
    ),
    (
      lambda: fit_joint_power_law([1, 2, 3, 4], [1, 2, 3], _GOOD),
      "n and d must have one length, at least 4, got lengths 4 and 3",
    ),
    (
      lambda: fit_joint_power_law([1, 2, 3, 4], [5, 5, 5, 5], _GOOD),
      r"d must hold two different numbers, got \[5, 5, 5, 5\]",
    ),
    (
      lambda: fit_joint_power_law([1, 1, 2, 2], [1, 2, 1, 2], _with(-1.0)),
      r"got -1\.0 for seed 1 and point 2",
    ),
    (
      lambda: lower_envelope([1, 2, 3, 4], _with(np.inf)),
      "got inf for seed 1 and run 2",
    ),
    (lambda: lower_envelope([1, -2, 3, 4], _GOOD), "compute must be positive"),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
