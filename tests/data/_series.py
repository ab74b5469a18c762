"""Real series for tests, which need not be installed."""

import functools

import pytest

from jaxattn.data import load_series

PACKAGES = {
  "co2": "statsmodels",
  "sunspots_yearly": "statsmodels",
  "sunspots_monthly": "statsmodels",
  "elec_equip": "statsmodels",
  "macrodata": "statsmodels",
  "tmy3": "pvlib",
  "taylor": "pmdarima",
}


@functools.cache
def load_or_skip(name):
  """One of the series, or a skipped test where its package is missing."""
  package = PACKAGES[name]
  pytest.importorskip(package, reason=f"series {name!r} needs {package}")
  return load_series(name)
