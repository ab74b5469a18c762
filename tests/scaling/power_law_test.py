"""The log-log line: against scipy, on exact laws, and its interval."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxattn.scaling import Slope, fit_slope


def test_exact_power_law():
  x = np.array([3.0, 10.0, 41.0, 700.0])
  fit = fit_slope(x, 2.5 * x**-0.75)
  np.testing.assert_allclose(fit.slope, -0.75, rtol=1e-12)
  np.testing.assert_allclose(fit.intercept, math.log(2.5), rtol=1e-12)
  np.testing.assert_allclose(fit.interval, (-0.75, -0.75), rtol=1e-6)
  np.testing.assert_allclose(fit.r_squared, 1, rtol=1e-12)


def test_agrees_with_scipy():
  rng = np.random.default_rng(0)
  x = np.exp(rng.uniform(0, 8, 9))
  y = 3 * x**1.3 * np.exp(0.2 * rng.standard_normal(9))
  fit = fit_slope(x, y)
  want = stats.linregress(np.log(x), np.log(y))
  half_width = stats.t.ppf(0.975, 7) * want.stderr
  assert isinstance(fit, Slope)
  np.testing.assert_allclose(fit.slope, want.slope, rtol=1e-10)
  np.testing.assert_allclose(fit.intercept, want.intercept, rtol=1e-10)
  np.testing.assert_allclose(fit.r_squared, want.rvalue**2, rtol=1e-10)
  np.testing.assert_allclose(
    fit.interval, (want.slope - half_width, want.slope + half_width), rtol=1e-9
  )


def test_interval_covers_95_percent():
  rng = np.random.default_rng(1)
  x = 2.0 ** np.arange(4, 10)
  noise = np.exp(0.1 * rng.standard_normal((2000, 6)))
  fits = [fit_slope(x, x**0.5 * row) for row in noise]
  covered = sum(f.interval[0] <= 0.5 <= f.interval[1] for f in fits)
  # Four standard deviations of a binomial around 1900.
  assert abs(covered - 1900) < 4 * math.sqrt(2000 * 0.95 * 0.05)


def test_constant_y_is_explained():
  fit = fit_slope([1, 2, 4], [7, 7, 7])
  assert fit.slope == 0
  assert fit.r_squared == 1


@pytest.mark.parametrize(
  ("x", "y", "message"),
  [
    ([1, 2], [1, 2], r"x must be a vector of at least 3 numbers, got shape"),
    ([1, 2, 3], [[1, 2, 3]], r"y must be a vector of .*, got shape \(1, 3\)"),
    ([1, 2, 3], [1, 2, 3, 4], "same length, got lengths 3 and 4"),
    ([1, 0, 3], [1, 2, 3], r"x must be positive and finite, got \[1, 0, 3\]"),
    ([1, 2, 3], [1, -2, 3], "y must be positive and finite"),
    ([1, 2, 3], [1, math.nan, 3], "y must be positive and finite"),
    ([1, math.inf, 3], [1, 2, 3], "x must be positive and finite"),
    ([5, 5, 5], [1, 2, 3], r"x must hold two different numbers, got \[5"),
  ],
)
def test_refused(x, y, message):
  with pytest.raises(ValueError, match=message):
    fit_slope(x, y)
