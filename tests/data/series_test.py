"""Real series: what is in them, and windows that do not look ahead."""

import re
import sys

import numpy as np
import pytest

from jaxattn.data import series
from tests.data._series import PACKAGES, load_or_skip

# Rows, columns, what is filled; first and last value of the first column.
_PUBLISHED = {
  "co2": (2284, 1, 59, 316.1, 371.5),
  "sunspots_yearly": (309, 1, 0, 5.0, 2.9),
  "sunspots_monthly": (3120, 1, 0, 58.0, 0.8),
  "elec_equip": (257, 1, 0, 66.19, 97.86),
  "macrodata": (203, 12, 0, 2710.349, 12990.341),
  "tmy3": (8760, 7, 0, 10.0, 2.2),
  "taylor": (4032, 1, 0, 22262.0, 23132.0),
}
# Shares of values, and of differences, that change their sign.
_INCONSISTENT = {
  ("co2", 0): (0.006, 0.333),
  ("sunspots_monthly", 0): (0.105, 0.585),
  ("tmy3", 0): (0.031, 0.130),
  ("tmy3", 5): (0.087, 0.099),
  ("taylor", 0): (0.043, 0.178),
  ("elec_equip", 0): (0.305, 0.671),
  ("sunspots_yearly", 0): (0.182, 0.228),
}


def test_all_series_are_here():
  assert set(_PUBLISHED) == set(PACKAGES) == set(series._LOADERS)


@pytest.mark.parametrize("name", _PUBLISHED)
def test_series_is_as_published(name):
  rows, columns, num_filled, first, last = _PUBLISHED[name]
  found = load_or_skip(name)
  assert found.values.shape == (rows, columns)
  assert found.values.dtype == np.float32
  assert len(found.names) == columns
  assert found.num_filled == num_filled
  assert np.isfinite(found.values).all()
  ends = found.values[[0, -1], 0]
  np.testing.assert_allclose(ends, [first, last], rtol=1e-6)


@pytest.mark.parametrize("case", _INCONSISTENT, ids=str)
def test_share_of_inconsistent_signs(case):
  name, column = case
  values = load_or_skip(name).values[:, [column]]
  z, *_ = series.standardize(values, series.split_series(values)[0])
  rates = [
    series.sign_inconsistency_rate(z, difference=difference)[0]
    for difference in (False, True)
  ]
  np.testing.assert_allclose(rates, _INCONSISTENT[case], rtol=0, atol=6e-4)


def test_weather_is_weather():
  found = load_or_skip("tmy3")
  columns = dict(zip(found.names, found.values.T))
  assert columns["Dew-point (C)"].mean() < columns["Dry-bulb (C)"].mean()
  sun = columns["GHI (W/m^2)"].reshape(365, 24).mean(0)
  assert sun[0] == 0 < 300 < sun[12]


def test_gaps_are_filled_on_a_line():
  gap = np.array([[0.0, 5.0], [np.nan, 7.0], [np.nan, np.nan], [3.0, 4.0]])
  values, num_filled = series._filled("x", gap)
  np.testing.assert_allclose(values, [[0, 5], [1, 7], [2, 5.5], [3, 4]])
  assert num_filled == 3
  assert np.isnan(gap).sum() == 3
  for end in (gap[1:], gap[:3]):
    with pytest.raises(ValueError, match="'x' lacks a value at an end"):
      series._filled("x", end)


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_missing_package_names_the_extra(monkeypatch, name, package):
  loaded = [m for m in sys.modules if m.partition(".")[0] == package]
  for module in {package, *loaded}:
    monkeypatch.setitem(sys.modules, module, None)
  message = (
    f"load_series('{name}') needs {package}: pip install 'jaxattn[data]'"
  )
  with pytest.raises(ImportError, match=re.escape(message)):
    series.load_series(name)


# --- splits ---


@pytest.mark.parametrize("num", [10, 203, 309, 2280, 2284, 3120, 8760])
def test_split_follows_time(num):
  parts = series.split_series(np.zeros((num, 2)))
  assert parts[0].start == 0
  # Of integers: 0.7 + 0.1 is a little less than 0.8.
  assert parts[0].stop == parts[1].start == 7 * num // 10
  assert parts[1].stop == parts[2].start == 8 * num // 10
  assert parts[2].stop == num


def test_split_without_validation():
  parts = series.split_series(np.zeros(10), train=0.5, val=0)
  assert parts == (slice(0, 5), slice(5, 5), slice(5, 10))


def test_standardize_looks_at_the_training_part_only():
  rng = np.random.default_rng(0)
  x = 5 + 3 * rng.normal(size=(100, 2))
  train = slice(0, 70)
  z, mean, std = series.standardize(x, train)
  np.testing.assert_allclose(z[train].mean(0), 0, atol=1e-14)
  np.testing.assert_allclose(z[train].std(0), 1, rtol=1e-14)
  np.testing.assert_allclose(z * std + mean, x, rtol=1e-14)
  x[70:] = 1e6
  for got, want in zip(series.standardize(x, train)[1:], (mean, std)):
    np.testing.assert_array_equal(got, want)


def test_standardize_constant_columns_and_dtypes():
  # The mean of copies of 0.1 is not 0.1, so that their deviation is not 0.
  x = np.full((70, 1), 0.1)
  x[-1] = 2.1
  z, _, std = series.standardize(x, slice(0, 69))
  assert std == 1
  np.testing.assert_allclose(z[[0, -1], 0], [0, 2], atol=1e-15)
  x32 = np.full((70, 1), 1e4, np.float32)
  x32[::2] += 1
  for out in series.standardize(x32, slice(0, 70)):
    assert out.dtype == np.float32
  np.testing.assert_allclose(series.standardize(x32, slice(0, 70))[2], 0.5)
  assert series.standardize(np.arange(6).reshape(3, 2), slice(0, 2))[
    0
  ].tolist() == [[-1, -1], [1, 1], [3, 3]]


# --- windows ---


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_windows_are_neighbours_in_time(stride):
  z = np.stack([np.arange(23.0), -np.arange(23.0)], 1)
  x, y = series.windows(z, 4, 3, stride=stride)
  starts = range(0, 23 - 4 - 3 + 1, stride)
  assert x.shape == (len(starts), 4, 2)
  assert y.shape == (len(starts), 3, 2)
  for i, start in enumerate(starts):
    np.testing.assert_array_equal(x[i], z[start : start + 4])
    np.testing.assert_array_equal(y[i], z[start + 4 : start + 7])
  assert not x.flags.writeable


def test_windows_of_the_test_reach_back_and_not_forward():
  z = np.arange(200.0)[:, None]
  train, val, test = series.split_series(z)
  history, horizon = 10, 5
  x, y = series.windows(z[test.start - history :], history, horizon)
  assert y.min() == test.start
  assert x.min() == test.start - history >= val.start
  assert len(x) == 200 - test.start - horizon + 1
  assert series.windows(z[train], history, horizon)[1].max() < val.start


def test_one_window():
  x, y = series.windows(np.arange(5.0)[:, None], 3, 2)
  assert (x.shape, y.shape) == ((1, 3, 1), (1, 2, 1))


# --- signs ---


def test_signs_by_lag_and_difference():
  u = np.array([1.0, -2.0, 0.0, 3.0, 4.0, -1.0])
  rate = series.sign_inconsistency_rate
  # Nothing is inconsistent with 0.
  assert rate(u) == 2 / 5
  assert rate(u, lag=2) == 2 / 4
  # -3, 2, 3, 1, -5
  assert rate(u, difference=True) == 2 / 4
  both = np.stack([u, abs(u)], 1)
  assert rate(both).tolist() == [2 / 5, 0]
  # Products of values would round to 0.
  assert rate(np.array([1e-200, -1e-200])) == 1


def test_signs_of_a_gaussian_process():
  # P = arccos(r) / pi, of an autoregression with r = 1/2.
  rng = np.random.default_rng(0)
  u = rng.normal(size=200_000)
  for i in range(1, len(u)):
    u[i] = u[i - 1] / 2 + np.sqrt(3 / 4) * u[i]
  assert abs(series.sign_inconsistency_rate(u) - 1 / 3) < 0.006


# --- refused ---

_GOOD = np.arange(20.0)[:, None]
_NAN = _GOOD.copy()
_NAN[3], _NAN[7] = np.nan, np.inf
_NAN_MESSAGE = "must be finite, got 2 values that are not, the first at step 3"


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: series.load_series("ett"),
      "name must be one of 'co2', 'sunspots_yearly', 'sunspots_monthly', "
      "'elec_equip', 'macrodata', 'tmy3', 'taylor', got 'ett'",
    ),
    (
      lambda: series.split_series(_GOOD, train=1.0),
      "train must be in (0, 1), got 1.0",
    ),
    (
      lambda: series.split_series(_GOOD, val=-0.1),
      "val must be non-negative, got -0.1",
    ),
    (
      lambda: series.split_series(_GOOD, train=0.8, val=0.2),
      "train + val must be below 1, got 0.8 + 0.2",
    ),
    (
      lambda: series.split_series(_GOOD[:1]),
      "series of 1 steps is too short for train=0.7 and val=0.1",
    ),
    (lambda: series.standardize(_NAN, slice(0, 9)), "series " + _NAN_MESSAGE),
    (
      lambda: series.standardize(_GOOD[:, 0], slice(0, 9)),
      "series must have 2 dimensions, got shape (20,)",
    ),
    (
      lambda: series.standardize(_GOOD, slice(20, 30)),
      "train must hold a step, got slice(20, 30, None) of 20 steps",
    ),
    (lambda: series.windows(_NAN, 2, 2), "z " + _NAN_MESSAGE),
    (
      lambda: series.windows(_GOOD[:, 0], 2, 2),
      "z must have 2 dimensions, got shape (20,)",
    ),
    (
      lambda: series.windows(_GOOD, 15, 6),
      "history + horizon must be at most 20, the steps of z, got 15 + 6",
    ),
    (
      lambda: series.windows(_GOOD, 2, 2, stride=0),
      "stride must be >= 1, got 0",
    ),
    (lambda: series.windows(_GOOD, 0, 2), "history must be >= 1, got 0"),
    (
      lambda: series.windows(_GOOD, 2, 1.5),
      "horizon must be an integer >= 1, got 1.5",
    ),
    (lambda: series.sign_inconsistency_rate(_NAN), "series " + _NAN_MESSAGE),
    (
      lambda: series.sign_inconsistency_rate(_GOOD[None]),
      "series must have 1 or 2 dimensions, got shape (1, 20, 1)",
    ),
    (
      lambda: series.sign_inconsistency_rate(_GOOD, lag=0),
      "lag must be >= 1, got 0",
    ),
    (
      lambda: series.sign_inconsistency_rate(_GOOD[:2], difference=True),
      "series of 2 steps is too short for lag=1 of its differences",
    ),
  ],
)
def test_refused_arguments(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
