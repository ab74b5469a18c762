r"""Power laws of sweeps, with intervals that are honest about their noise.

A quantity that behaves like :math:`y = A x^b` is a straight line in logarithms,
:math:`\log y = \log A + b \log x`. Its slope *b*, with an interval that says
how well the points determine it, decides every claim about a rate.

Losses of networks level off, :math:`L(N) = L_\infty + A N^{-\alpha}`, and have
seeds: the scatter of seeds at one size says how well the exponent is known, and
whether the law is one at all.
"""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from scipy import special

from jaxattn.scaling import _fits

# A limit below this share of the least loss is none.
_NEGLIGIBLE = 1e-4


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
  half_width = special.stdtrit(degrees, 0.5 + _fits.CONFIDENCE / 2) * error
  total = dy @ dy
  return Slope(
    slope=float(slope),
    intercept=float(log_y.mean() - slope * log_x.mean()),
    interval=(float(slope - half_width), float(slope + half_width)),
    r_squared=float(1 - residual @ residual / total) if total > 0 else 1.0,
  )


class PowerLaw(NamedTuple):
  r"""A law :math:`L(N) = L_\infty + A N^{-\alpha}` fitted to losses of seeds.

  Attributes:
    limit: L_inf, not negative; 0 if the fit has none.
    scale: A.
    exponent: alpha, positive where losses fall.
    exponent_interval: (low, high), the 95 % t-interval of the exponent from the
      scatter of seeds.
    lack_of_fit: p-value of the F test of residuals of means against that
      scatter; below 0.01 it is not a power law. Without any scatter 0 where the
      law is off. NaN where there is nothing to test: as many sizes as
      parameters, or a law that is met exactly.
    covariance: (3, 3) of (log limit, log scale, exponent); zeros for a limit
      that the fit does not have, infinite where the data do not determine the
      others or the search for them does not come to an end.
    degrees: degrees of freedom of the scatter, (seeds - 1) sizes.
  """

  limit: float
  scale: float
  exponent: float
  exponent_interval: tuple[float, float]
  lack_of_fit: float
  covariance: np.ndarray
  degrees: int

  @property
  def is_power_law(self) -> bool | None:
    """Whether the test of fit passes; None where there is nothing to test."""
    return _fits.is_law(self.lack_of_fit)


class JointPowerLaw(NamedTuple):
  r"""A law of size and data, :math:`[(N_c/N)^{a/b} + D_c/D]^b`.

  Attributes:
    n_scale: N_c.
    d_scale: D_c.
    n_exponent: a, of :math:`L \to (N_c / N)^a` as D grows.
    d_exponent: b, of :math:`L \to (D_c / D)^b` as N grows.
    n_interval: 95 % t-interval of ``n_exponent``.
    d_interval: 95 % t-interval of ``d_exponent``.
    lack_of_fit: as that of :class:`PowerLaw`.
  """

  n_scale: float
  d_scale: float
  n_exponent: float
  d_exponent: float
  n_interval: tuple[float, float]
  d_interval: tuple[float, float]
  lack_of_fit: float

  @property
  def is_power_law(self) -> bool | None:
    """Whether the test of fit passes; None where there is nothing to test."""
    return _fits.is_law(self.lack_of_fit)


def fit_power_law(
  sizes: ArrayLike, losses: ArrayLike, *, irreducible: bool = True
) -> PowerLaw:
  r"""Fits :math:`L(N) = L_\infty + A N^{-\alpha}` by least squares of log L.

  Means over seeds of log L are fitted: from the best of 100 exponents, with
  nonnegative least squares for the other two, by Levenberg-Marquardt's method.
  A limit that comes out below 1e-4 of the least loss is dropped. The variance
  of log L within sizes, pooled, gives intervals; a bootstrap of few seeds would
  be too narrow.

  Args:
    sizes: (W,) different positive sizes: widths, numbers of data, compute.
    losses: (S, W) positive losses of S >= 2 seeds.
    irreducible: whether there is a limit; False = 0.

  Returns:
    The law as :class:`PowerLaw`. Runs on the host in float64.

  Raises:
    ValueError: if sizes or losses are not as above (a loss is named by seed and
      size), or if there are fewer sizes than parameters.

  Cost:
    O(100 W) time for the start, O(W) a step.

  Source:
    the law is that of arXiv 2001.08361, section 1.2; intervals and test are
    standard textbook facts (nonlinear regression, replicated design).

  Example:
    >>> import numpy as np
    >>> from jaxattn.scaling import fit_power_law
    >>> sizes = 2.0 ** np.arange(5, 13)
    >>> noise = np.exp(0.01 * np.random.default_rng(0).normal(size=(4, 8)))
    >>> fit = fit_power_law(sizes, (0.2 + 3 / sizes**0.5) * noise)
    >>> low, high = fit.exponent_interval
    >>> low < 0.5 < high, fit.lack_of_fit > 0.01, round(fit.limit, 1)
    (True, True, 0.2)
  """
  sizes = np.exp(_fits.log_sizes("sizes", sizes))
  logs = _fits.log_losses(losses, "size", sizes)
  num = 3 if irreducible else 2
  if sizes.size < num:
    raise ValueError(
      f"sizes must hold at least {num} for a fit of {num} parameters, got "
      f"{sizes.size}"
    )
  # Sizes around 1 keep scale and exponent apart.
  unit = np.exp(np.log(sizes).mean())
  log_x, means = np.log(sizes / unit), logs.mean(0)
  with_limit = _fits.with_limit(log_x, means) if irreducible else None
  least = np.log(_NEGLIGIBLE) + means.min()
  if with_limit is None or with_limit[0][0] < least:
    with_limit = np.array([-np.inf, *_fits.line(log_x, means)]), True
  found, ended = with_limit
  values, jacobian = _fits.power_law(found, log_x)
  has_limit = np.isfinite(found[0])
  jacobian = jacobian[:, 0 if has_limit else 1 :]
  noise = _fits.Noise.of(logs)
  inner = noise.covariance(jacobian, ended)
  # log A = log of the scale at unit size + alpha log unit.
  shift = np.eye(3)[:, 0 if has_limit else 1 :]
  shift[1, -1] = np.log(unit)
  covariance = np.zeros((3, 3))
  if np.isfinite(inner).all():
    covariance = shift @ inner @ shift.T
  else:
    covariance[0 if has_limit else 1 :, 0 if has_limit else 1 :] = np.inf
  return PowerLaw(
    limit=float(np.exp(found[0])),
    scale=float(np.exp(found[1] + found[2] * np.log(unit))),
    exponent=float(found[2]),
    exponent_interval=noise.interval(found[2], covariance[2, 2]),
    lack_of_fit=noise.lack_of_fit(means - values, jacobian.shape[1]),
    covariance=covariance,
    degrees=noise.degrees,
  )


def fit_joint_power_law(
  n: ArrayLike, d: ArrayLike, losses: ArrayLike
) -> JointPowerLaw:
  r"""Fits :math:`L(N, D) = [(N_c/N)^{a/b} + D_c/D]^b` to losses of seeds.

  Least squares of mean log L, as in :func:`fit_power_law`: with both exponents
  given, :math:`L^{1/b}` is linear in two nonnegative numbers. Losses that do
  not fall with both leave an exponent undetermined: its interval is infinite.

  Args:
    n: (P,) positive sizes of networks, at least two different ones.
    d: (P,) positive numbers of data, at least two different ones.
    losses: (S, P) positive losses of S >= 2 seeds; P >= 4.

  Returns:
    The law as :class:`JointPowerLaw`. Runs on the host in float64.

  Raises:
    ValueError: if n, d or losses are not as above.

  Cost:
    O(900 P) time for the start, O(P) a step.

  Source:
    arXiv 2001.08361, equation 1.5.

  Example:
    >>> import numpy as np
    >>> from jaxattn.scaling import fit_joint_power_law
    >>> n, d = (x.ravel() for x in np.meshgrid([8, 32, 128], [10, 90, 810]))
    >>> loss = ((4 / n) ** (0.3 / 0.5) + 7 / d) ** 0.5
    >>> fit = fit_joint_power_law(n, d, [loss, loss])
    >>> print(round(fit.n_exponent, 3), round(fit.d_exponent, 3))
    0.3 0.5
  """
  log_n = _fits.log_sizes("n", n, different=False)
  log_d = _fits.log_sizes("d", d, different=False)
  if log_n.size != log_d.size or log_n.size < 4:
    raise ValueError(
      "n and d must have one length, at least 4, got lengths "
      f"{log_n.size} and {log_d.size}"
    )
  for name, values in (("n", n), ("d", d)):
    if np.ptp(values) == 0:
      raise ValueError(f"{name} must hold two different numbers, got {values}")
  logs = _fits.log_losses(losses, "point", np.arange(log_n.size))
  means, noise = logs.mean(0), _fits.Noise.of(logs)
  start = _fits.joint_start(log_n, log_d, means)
  found, ended = _fits.polish(
    lambda p: _fits.joint(p, log_n, log_d), start, means
  )
  values, jacobian = _fits.joint(found, log_n, log_d)
  covariance = noise.covariance(jacobian, ended)
  with np.errstate(over="ignore"):
    n_scale, d_scale = np.exp(found[:2])
  return JointPowerLaw(
    n_scale=float(n_scale),
    d_scale=float(d_scale),
    n_exponent=float(found[2]),
    d_exponent=float(found[3]),
    n_interval=noise.interval(found[2], covariance[2, 2]),
    d_interval=noise.interval(found[3], covariance[3, 3]),
    lack_of_fit=noise.lack_of_fit(means - values, 4),
  )


def lower_envelope(
  compute: ArrayLike, losses: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
  """Keeps the runs that no run of less or equal compute beats.

  Runs are compared by the mean over seeds of log loss, so that all seeds of a
  run stay or go together. The least of many noisy means is too small: let seeds
  be many or runs few.

  Args:
    compute: (P,) positive compute of each run, as a network at a step.
    losses: (S, P) positive losses.

  Returns:
    (E,) compute, rising, and (S, E) losses, whose means fall: what
    :func:`fit_power_law` takes.

  Raises:
    ValueError: if compute or losses are not as above.

  Cost:
    O(P (log P + S)).

  Source:
    arXiv 2001.08361, section 6.1 (the compute-efficient frontier).

  Example:
    >>> from jaxattn.scaling import lower_envelope
    >>> compute, losses = lower_envelope([4, 1, 2, 2], [[3.0, 5.0, 4.0, 6.0]])
    >>> print(compute, losses)
    [1. 2. 4.] [[5. 4. 3.]]
  """
  log_compute = _fits.log_sizes("compute", compute, different=False)
  logs = _fits.log_losses(
    losses, "run", np.arange(log_compute.size), num_seeds=1
  )
  compute, means = np.asarray(compute, np.float64), logs.mean(0)
  order = np.lexsort((means, compute))
  best = np.minimum.accumulate(means[order])
  kept = order[np.r_[True, best[1:] < best[:-1]]]
  return compute[kept], np.asarray(losses, np.float64)[:, kept]


def _log(name: str, values: ArrayLike) -> np.ndarray:
  array = np.asarray(values, np.float64)
  if array.ndim != 1 or array.size < 3:
    raise ValueError(
      f"{name} must be a vector of at least 3 numbers, got shape {array.shape}"
    )
  if not np.all(np.isfinite(array) & (array > 0)):
    raise ValueError(f"{name} must be positive and finite, got {values}")
  return np.log(array)
