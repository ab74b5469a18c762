r"""Power laws of sweeps: the one least-squares line of tests and verdicts.

A quantity that behaves like :math:`y = A x^b` is a straight line in logarithms,
:math:`\log y = \log A + b \log x`. Its slope *b*, with an interval that says
how well the points determine it, decides every claim about a rate.
"""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from scipy import special

_CONFIDENCE = 0.95


class Slope(NamedTuple):
  """Least-squares line through points in log-log coordinates.

  Source: a standard textbook fact (simple linear regression).

  Attributes:
    slope: exponent b of y = A x^b.
    intercept: log A, natural logarithm.
    interval: (low, high), the 95 % t-interval of the slope under independent
      normal errors of equal variance in log y.
    r_squared: share of the variance of log y that the line explains; 1 where
      log y is constant and the line fits it.
  """

  slope: float
  intercept: float
  interval: tuple[float, float]
  r_squared: float


def fit_slope(x: ArrayLike, y: ArrayLike) -> Slope:
  """Fits y = A x^b by least squares of log y on log x.

  Runs on the host in float64, outside ``jit``. The t-interval measures scatter
  around the line only: where y is a smooth curve with a bend, or points share
  their noise, it is too narrow. O(n) time and memory for n points.

  Args:
    x: (n,) positive finite numbers, at least two of them different.
    y: (n,) positive finite numbers; n >= 3.

  Returns:
    The line as a :class:`Slope`.

  Raises:
    ValueError: if x or y is not a vector of at least three positive finite
      numbers, if their lengths differ, or if all x are equal.

  Source:
    A standard textbook fact (simple linear regression).

  Example:
    >>> from jaxattn.scaling import fit_slope
    >>> fit = fit_slope([1, 2, 4, 8], [3, 12, 48, 192])
    >>> print(round(fit.slope, 6), round(fit.r_squared, 6))
    2.0 1.0
  """
  log_x, log_y = _log("x", x), _log("y", y)
  if log_x.size != log_y.size:
    raise ValueError(
      "x and y must have the same length, got lengths "
      f"{log_x.size} and {log_y.size}"
    )
  if np.ptp(log_x) == 0:
    raise ValueError(f"x must hold two different numbers, got {x}")
  dx, dy = log_x - log_x.mean(), log_y - log_y.mean()
  slope = dx @ dy / (dx @ dx)
  residual = dy - slope * dx
  degrees = log_x.size - 2
  error = np.sqrt(residual @ residual / degrees / (dx @ dx))
  half_width = special.stdtrit(degrees, 0.5 + _CONFIDENCE / 2) * error
  total = dy @ dy
  return Slope(
    slope=float(slope),
    intercept=float(log_y.mean() - slope * log_x.mean()),
    interval=(float(slope - half_width), float(slope + half_width)),
    r_squared=float(1 - residual @ residual / total) if total > 0 else 1.0,
  )


def _log(name: str, values: ArrayLike) -> np.ndarray:
  array = np.asarray(values, np.float64)
  if array.ndim != 1 or array.size < 3:
    raise ValueError(
      f"{name} must be a vector of at least 3 numbers, got shape {array.shape}"
    )
  if not np.all(np.isfinite(array) & (array > 0)):
    raise ValueError(f"{name} must be positive and finite, got {values}")
  return np.log(array)
