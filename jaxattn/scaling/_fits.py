"""Least squares of power laws: models, starts, and the scatter of seeds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from scipy import optimize, special

CONFIDENCE = 0.95
# Exponents that a search starts from.
_EXPONENTS = np.geomspace(0.02, 2.0, 100)
# Below this p-value of the test of fit a law is none.
SIGNIFICANCE = 0.01
# Errors of log L that are rounding, where there is no scatter.
_EXACT = 1e-6
# Share of the sum at which a search for a term begins that seems to be none.
_NONE = 1e-3


# --- models: values and derivatives of log L ---


def power_law(p: np.ndarray, log_x: np.ndarray) -> tuple[np.ndarray, ...]:
  limit, scale, exponent = p
  falling = scale - exponent * log_x
  log_loss = np.logaddexp(limit, falling)
  share = np.exp(falling - log_loss)
  return log_loss, np.stack([1 - share, share, -share * log_x], 1)


def joint(
  p: np.ndarray, log_n: np.ndarray, log_d: np.ndarray
) -> tuple[np.ndarray, ...]:
  n_scale, d_scale, a, b = p
  of_n, of_d = a / b * (n_scale - log_n), d_scale - log_d
  total = np.logaddexp(of_n, of_d)
  share = np.exp(of_n - total)
  derivatives = [
    a * share,
    b * (1 - share),
    share * (n_scale - log_n),
    total - share * of_n,
  ]
  return b * total, np.stack(derivatives, 1)


# --- fits ---


def with_limit(
  log_x: np.ndarray, means: np.ndarray
) -> tuple[np.ndarray, bool] | None:
  """(log limit, log scale, exponent), and whether the search came to an end.

  None where no limit helps.
  """
  columns = np.exp(-means), np.exp(-np.outer(_EXPONENTS, log_x) - means)
  limit, scale, error = _two_nonnegative(*columns)
  error = np.where((limit > 0) & (scale > 0), error, np.inf)
  best = np.argmin(error)
  if not np.isfinite(error[best]):
    return None
  start = np.array([np.log(limit[best]), np.log(scale[best]), _EXPONENTS[best]])
  return polish(lambda p: power_law(p, log_x), start, means)


def is_law(lack_of_fit: float) -> bool | None:
  """None where there is nothing to test."""
  return None if np.isnan(lack_of_fit) else lack_of_fit >= SIGNIFICANCE


def line(log_x: np.ndarray, means: np.ndarray) -> tuple[float, float]:
  """(log scale, exponent) without a limit; ``log_x`` has mean 0."""
  return float(means.mean()), float(-(log_x @ means) / (log_x @ log_x))


def joint_start(
  log_n: np.ndarray, log_d: np.ndarray, means: np.ndarray
) -> np.ndarray:
  exponents = np.geomspace(0.02, 2.0, 30)
  a, b = (x.reshape(-1, 1) for x in np.meshgrid(exponents, exponents))
  center = np.array([log_n.mean(), log_d.mean(), means.mean()])
  goal = (means - center[2]) / b
  of_n, of_d, error = _two_nonnegative(
    np.exp(-a / b * (log_n - center[0]) - goal),
    np.exp(center[1] - log_d - goal),
  )
  i = np.argmin(error * b[:, 0] ** 2)  # errors of L, not of its power
  # Logarithms are to be searched: neither may begin at 0.
  total = _NONE * (of_n[i] + of_d[i])
  of_n, of_d = max(of_n[i], total), max(of_d[i], total)
  (a, b), level = (a[i, 0], b[i, 0]), center[2] / b[i, 0]
  return np.array(
    [
      center[0] + (np.log(of_n) + level) * b / a,
      center[1] + np.log(of_d) + level,
      a,
      b,
    ]
  )


def _two_nonnegative(
  u: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Least squares of p u + q v = 1 with p, q >= 0: (p, q, error) of each row.

  A solution with both positive, else the better of the two with one.
  """
  u, v = np.broadcast_arrays(u, v)
  uu, uv, vv = (u * u).sum(-1), (u * v).sum(-1), (v * v).sum(-1)
  u1, v1 = u.sum(-1), v.sum(-1)
  with np.errstate(divide="ignore", invalid="ignore"):
    det = uu * vv - uv**2
    p, q = (u1 * vv - v1 * uv) / det, (v1 * uu - u1 * uv) / det
  inside = (det > 0) & (p >= 0) & (q >= 0)
  first = u1**2 / uu > v1**2 / vv
  p = np.where(inside, p, np.where(first, u1 / uu, 0.0))
  q = np.where(inside, q, np.where(first, 0.0, v1 / vv))
  error = ((p[:, None] * u + q[:, None] * v - 1) ** 2).sum(-1)
  return p, q, error


def polish(
  model: Callable[[np.ndarray], tuple[np.ndarray, ...]],
  start: np.ndarray,
  means: np.ndarray,
) -> tuple[np.ndarray, bool]:
  """The least squares, and whether the search came to an end.

  It does not where a parameter runs off to where it does not matter.
  """
  # SciPy's annotations know of names of methods only.
  jacobian: Any = lambda p: model(p)[1]  # noqa: E731
  found = optimize.least_squares(
    lambda p: model(p)[0] - means,
    start,
    jacobian,
    method="lm",
    xtol=1e-15,
    ftol=1e-15,
    gtol=1e-15,
  )
  return found.x, bool(found.success)


# --- statistics ---


class Noise(NamedTuple):
  """Scatter of log losses of seeds, the same at all sizes."""

  variance: float
  num_seeds: int
  degrees: int

  @classmethod
  def of(cls, logs: np.ndarray) -> "Noise":
    s, w = logs.shape
    degrees = (s - 1) * w
    # Rounding of means is no scatter.
    centered = logs - logs.mean(0) if np.ptp(logs, 0).any() else 0 * logs
    return cls(float((centered**2).sum() / degrees), s, degrees)

  def covariance(self, jacobian: np.ndarray, ended: bool) -> np.ndarray:
    """Of the parameters; infinite where the data do not determine them."""
    gram = jacobian.T @ jacobian
    if not ended or np.linalg.cond(gram) > 1e14:
      return np.full(gram.shape, np.inf)
    return self.variance / self.num_seeds * np.linalg.inv(gram)

  def interval(self, value: float, variance: float) -> tuple[float, float]:
    quantile = special.stdtrit(self.degrees, 0.5 + CONFIDENCE / 2)
    half_width = quantile * np.sqrt(variance)
    return float(value - half_width), float(value + half_width)

  def lack_of_fit(self, residual: np.ndarray, num_parameters: int) -> float:
    degrees = residual.size - num_parameters
    if degrees == 0:
      return float("nan")
    if self.variance == 0:
      return 0.0 if np.abs(residual).max() > _EXACT else float("nan")
    between = self.num_seeds * (residual @ residual) / degrees
    ratio = between / self.variance
    return float(special.fdtrc(degrees, self.degrees, ratio))


# --- checks ---


def log_sizes(
  name: str, values: ArrayLike, *, different: bool = True
) -> np.ndarray:
  array = np.asarray(values, np.float64)
  if array.ndim != 1 or not array.size:
    raise ValueError(f"{name} must be a vector, got shape {array.shape}")
  if not np.all(np.isfinite(array) & (array > 0)):
    raise ValueError(f"{name} must be positive and finite, got {values}")
  if different and np.unique(array).size < array.size:
    raise ValueError(f"{name} must be different, got {values}")
  return np.log(array)


def log_losses(
  losses: ArrayLike, name: str, labels: np.ndarray, *, num_seeds: int = 2
) -> np.ndarray:
  array = np.asarray(losses, np.float64)
  if (
    array.ndim != 2
    or array.shape[0] < num_seeds
    or array.shape[1] != labels.size
  ):
    raise ValueError(
      f"losses must have shape (S, {labels.size}) with S >= {num_seeds} seeds, "
      f"got {array.shape}"
    )
  bad = np.argwhere(~(np.isfinite(array) & (array > 0)))
  if bad.size:
    seed, i = bad[0]
    raise ValueError(
      f"losses must be positive and finite, got {array[seed, i]} for seed "
      f"{seed} and {name} {labels[i]:g}"
    )
  return np.log(array)
