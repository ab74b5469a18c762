"""Real time series that ship inside packages, and windows of them.

Nothing is downloaded. The usual way, without a leak from the test part into
anything: :func:`load_series`, :func:`split_series`, :func:`standardize` with
the training part, :func:`windows` of each part.
"""

import csv
import importlib
import importlib.resources
import types
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxattn import _checks

__all__ = [
  "SeriesData",
  "load_series",
  "sign_inconsistency_rate",
  "split_series",
  "standardize",
  "windows",
]

_TMY3_COLUMNS = (
  "Dry-bulb (C)",
  "Dew-point (C)",
  "RHum (%)",
  "Pressure (mbar)",
  "Wspd (m/s)",
  "GHI (W/m^2)",
  "TotCld (tenths)",
)
_MONTHS = 12


class SeriesData(NamedTuple):
  """A series as it was published.

  Attributes:
    values: (T, C) float32, one row a time step; nothing is missing.
    names: of the C columns, with units.
    freq: time between two rows, for example ``"hour"``.
    num_filled: entries that were missing and lie on a line between their
      neighbours now.
  """

  values: np.ndarray
  names: tuple[str, ...]
  freq: str
  num_filled: int


def load_series(name: str) -> SeriesData:
  """Returns one real series.

  ====================== ======  =======  =====================================
  name                   rows    columns  what it is
  ====================== ======  =======  =====================================
  ``"co2"``              2284    1        weekly carbon dioxide, Mauna Loa,
                                          1958 to 2001, 59 weeks filled
  ``"sunspots_yearly"``  309     1        sunspot numbers, 1700 to 2008
  ``"sunspots_monthly"`` 3120    1        the same, monthly means
  ``"elec_equip"``       257     1        monthly turnover of makers of
                                          electrical equipment, euro area
  ``"macrodata"``        203     12       quarterly data of the United States
  ``"tmy3"``             8760    7        hourly weather of Greensboro, NC, a
                                          typical year put together from months
                                          of several
  ``"taylor"``           4032    1        half-hourly electricity demand
  ====================== ======  =======  =====================================

  Args:
    name: one of the above.

  Returns:
    A :class:`SeriesData`.

  Raises:
    ValueError: if the name is unknown, or values are missing at an end.
    ImportError: if the package that ships it is missing, naming the extra that
      brings it.

  Cost:
    Milliseconds, once the package is imported; a second for ``"tmy3"``.

  Source:
    statsmodels (public domain), pvlib ("tmy3": NREL, public domain), pmdarima
    ("taylor": MIT).

  Example:
    >>> from jaxattn.data import load_series
    >>> co2 = load_series("co2")
    >>> co2.values.shape, co2.names, co2.num_filled
    ((2284, 1), ('co2 (ppm)',), 59)
  """
  _checks.check_choice("name", name, tuple(_LOADERS))
  raw, names, freq = _LOADERS[name]()
  values, num_filled = _filled(name, raw)
  return SeriesData(values.astype(np.float32), names, freq, num_filled)


def split_series(
  series: np.ndarray, *, train: float = 0.7, val: float = 0.1
) -> tuple[slice, slice, slice]:
  """Slices of time: training, validation, and what is left, for the test.

  Args:
    series: (T, ...).
    train: share of the first part, in (0, 1).
    val: share of the second, at least 0; together less than 1.

  Returns:
    Three slices of the first axis that follow each other. A window of the test
    may reach back for its history: begin at ``test.start - history``.

  Raises:
    ValueError: if shares are out of range, or the first or the last part would
      be empty.

  Cost:
    O(1).

  Source:
    this project.

  Example:
    >>> import numpy as np
    >>> from jaxattn.data import split_series
    >>> split_series(np.zeros((200, 3)))
    (slice(0, 140, None), slice(140, 160, None), slice(160, 200, None))
  """
  _checks.check_range("train", train, 0, 1, closed=False)
  _checks.check_nonnegative("val", val)
  if train + val >= 1:
    raise ValueError(
      f"train + val must be below 1, got {train} + {val}: nothing is left for "
      "the test"
    )
  num = len(series)
  # Of 0.7 + 0.1 and the like rounding must not take a step away.
  first, second = (int(num * share + 1e-9) for share in (train, train + val))
  if first == 0 or second == num:
    raise ValueError(
      f"series of {num} steps is too short for train={train} and val={val}"
    )
  return slice(0, first), slice(first, second), slice(second, num)


def standardize(
  series: np.ndarray, train: slice
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Each column less its mean, over its standard deviation, of ``train`` alone.

  Args:
    series: (T, C).
    train: slice of time; nothing outside of it is looked at.

  Returns:
    The standardized series (T, C), means (C,) and standard deviations (C,), in
    the dtype of the series. A column that is constant on ``train`` is divided
    by 1.

  Raises:
    ValueError: if the series is not (T, C), is not finite somewhere (the
      message says where first), or ``train`` is empty.

  Cost:
    O(T C).

  Source:
    this project.

  Example:
    >>> import numpy as np
    >>> from jaxattn.data import standardize
    >>> z, mean, std = standardize(np.array([[0.0], [2.0], [9.0]]), slice(0, 2))
    >>> z.ravel().tolist(), mean.tolist(), std.tolist()
    ([-1.0, 1.0, 8.0], [1.0], [1.0])
  """
  series = np.asarray(series)
  _check_finite("series", series)
  part = series[train]
  if not len(part):
    raise ValueError(
      f"train must hold a step, got {train} of {len(series)} steps"
    )
  # In double: single loses the mean of what hardly changes.
  mean, std = part.mean(0, dtype=np.float64), part.std(0, dtype=np.float64)
  # Not where std is 0: that of copies of one number is its rounding.
  std = np.where(part.max(0) > part.min(0), std, 1)
  z = (series - mean) / std
  dtype = series.dtype if series.dtype.kind == "f" else np.float64
  return z.astype(dtype), mean.astype(dtype), std.astype(dtype)


def windows(
  z: np.ndarray, history: int, horizon: int, *, stride: int = 1
) -> tuple[np.ndarray, np.ndarray]:
  """All pairs of a stretch of time and what follows it.

  Args:
    z: (T, C).
    history: steps of the first.
    horizon: steps of the second.
    stride: steps from one pair to the next.

  Returns:
    (n, history, C) and (n, horizon, C), views of ``z`` that cannot be written
    to, n = (T - history - horizon) // stride + 1.

  Raises:
    ValueError: if ``z`` is not (T, C) or not finite somewhere, a number is not
      positive, or history + horizon exceeds T.

  Cost:
    O(T C) to look for NaN; windows share the memory of ``z``.

  Source:
    this project.

  Example:
    >>> import numpy as np
    >>> from jaxattn.data import windows
    >>> x, y = windows(np.arange(6.0)[:, None], 3, 2)
    >>> x[..., 0].tolist(), y[..., 0].tolist()
    ([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]], [[3.0, 4.0], [4.0, 5.0]])
  """
  z = np.asarray(z)
  _check_finite("z", z)
  for name, value in (
    ("history", history),
    ("horizon", horizon),
    ("stride", stride),
  ):
    _checks.check_integer(name, value, 1, None)
  length = history + horizon
  if length > len(z):
    raise ValueError(
      f"history + horizon must be at most {len(z)}, the steps of z, got "
      f"{history} + {horizon}"
    )
  views = np.lib.stride_tricks.sliding_window_view(z, length, axis=0)[::stride]
  views = np.moveaxis(views, -1, 1)
  return views[:, :history], views[:, history:]


def sign_inconsistency_rate(
  series: np.ndarray, *, lag: int = 1, difference: bool = False
) -> np.ndarray:
  """Share of steps at which the sign changes, by column.

  Args:
    series: (T,) or (T, C); center it before, unless differences are taken.
    lag: steps between the two values.
    difference: whether signs are those of the differences of consecutive steps.

  Returns:
    () or (C,), share of the t with u_t u_{t + lag} < 0.

  Raises:
    ValueError: if the series is of another rank, not finite somewhere, or too
      short, or ``lag`` is not positive.

  Cost:
    O(T C).

  Source:
    arXiv:2412.06061, definition of sign-inconsistent prediction.

  Example:
    >>> import numpy as np
    >>> from jaxattn.data import sign_inconsistency_rate
    >>> print(sign_inconsistency_rate(np.array([1.0, -2.0, -3.0, 1.0, 2.0])))
    0.5
  """
  series = np.asarray(series)
  _checks.check_rank("series", series, (1, 2))
  _check_finite("series", series[:, None] if series.ndim == 1 else series)
  _checks.check_integer("lag", lag, 1, None)
  u = np.diff(series, axis=0) if difference else series
  if len(u) <= lag:
    raise ValueError(
      f"series of {len(series)} steps is too short for lag={lag}"
      + (" of its differences" if difference else "")
    )
  return (np.sign(u[:-lag]) * np.sign(u[lag:]) < 0).mean(0)


def _check_finite(name: str, x: np.ndarray) -> None:
  _checks.check_rank(name, x, 2)
  bad = np.flatnonzero(~np.isfinite(x).all(1))
  if bad.size:
    raise ValueError(
      f"{name} must be finite, got {int((~np.isfinite(x)).sum())} values that "
      f"are not, the first at step {bad[0]}"
    )


def _filled(name: str, raw: np.ndarray) -> tuple[np.ndarray, int]:
  """On a line between what is known, and how many values that is."""
  values = np.array(raw, np.float64)
  missing = np.isnan(values)
  steps = np.arange(len(values))
  for i, column in enumerate(missing.T):
    if column[0] or column[-1]:
      raise ValueError(f"series {name!r} lacks a value at an end")
    known = ~column
    values[:, i] = np.interp(steps, steps[known], values[known, i])
  return values, int(missing.sum())


def _import(module: str, name: str) -> types.ModuleType:
  # Extras of this package, so not imported with it.
  package = module.partition(".")[0]
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    raise ImportError(
      f"load_series({name!r}) needs {package}: pip install 'jaxattn[data]'"
    ) from error


_Raw = tuple[np.ndarray, tuple[str, ...], str]


def _co2() -> _Raw:
  data = _import("statsmodels.datasets", "co2").co2.load_pandas().data
  return data.to_numpy(), ("co2 (ppm)",), "week"


def _sunspots_yearly() -> _Raw:
  module = _import("statsmodels.datasets", "sunspots_yearly")
  data = module.sunspots.load_pandas().data
  return data[["SUNACTIVITY"]].to_numpy(), ("sunspots",), "year"


def _sunspots_monthly() -> _Raw:
  package = _import("statsmodels", "sunspots_monthly")
  path = importlib.resources.files(package.__name__)
  path = path / "datasets" / "sunspots" / "src" / "sunspots_monthly.dat"
  # A year and its months; all else is headings.
  lines = [line.split() for line in path.read_text("latin-1").splitlines()]
  rows = [
    line[1:]
    for line in lines
    if len(line) == 1 + _MONTHS and line[0].isdecimal()
  ]
  return np.array(rows, np.float64).reshape(-1, 1), ("sunspots",), "month"


def _elec_equip() -> _Raw:
  module = _import("statsmodels.datasets.elec_equip", "elec_equip")
  return module.load().data.to_numpy(), ("turnover index",), "month"


def _macrodata() -> _Raw:
  data = _import("statsmodels.datasets", "macrodata").macrodata
  table = data.load_pandas().data.drop(columns=["year", "quarter"])
  return table.to_numpy(), tuple(table.columns), "quarter"


def _tmy3() -> _Raw:
  package = _import("pvlib", "tmy3")
  path = importlib.resources.files(package.__name__) / "data" / "723170TYA.CSV"
  # The first line is about the station.
  lines = path.read_text("utf-8").splitlines()[1:]
  rows = [
    [float(row[column]) for column in _TMY3_COLUMNS]
    for row in csv.DictReader(lines)
  ]
  return np.array(rows), _TMY3_COLUMNS, "hour"


def _taylor() -> _Raw:
  data = _import("pmdarima.datasets", "taylor").load_taylor()
  return np.asarray(data)[:, None], ("demand (MW)",), "half hour"


_LOADERS: dict[str, Callable[[], _Raw]] = {
  "co2": _co2,
  "sunspots_yearly": _sunspots_yearly,
  "sunspots_monthly": _sunspots_monthly,
  "elec_equip": _elec_equip,
  "macrodata": _macrodata,
  "tmy3": _tmy3,
  "taylor": _taylor,
}
