r"""Calibration of Gaussian noise.

Adding :math:`N(0, \sigma^2 I)` to what one record can move by at most
:math:`\Delta` in Euclidean norm is :math:`(\varepsilon, \delta)`-private if and
only if

.. math::

  \Phi\Big(\frac{\Delta}{2\sigma} - \frac{\varepsilon\sigma}{\Delta}\Big)
  - e^\varepsilon\,
  \Phi\Big(-\frac{\Delta}{2\sigma} - \frac{\varepsilon\sigma}{\Delta}\Big)
  \le \delta.

The classical :math:`\sigma = \sqrt{2 \ln(1.25 / \delta)}\, \Delta /
\varepsilon` is larger than need be below :math:`\varepsilon = 1`, and no
theorem above it: at 10 it is too small. T releases are one with
:math:`\sigma / \sqrt T`, exactly.

Everything here is arithmetic on the host, in double precision, before any jit.
Source: Balle and Wang, arXiv 1805.06530, theorem 8.
"""

import math
from collections.abc import Callable
from typing import Any

from scipy import optimize, special

from jaxattn import _checks


def gaussian_sigma(
  epsilon: float,
  delta: float,
  sensitivity: float = 1.0,
  *,
  num_steps: int = 1,
  sample_rate: float = 1.0,
) -> float:
  """The least noise that makes a release private.

  Args:
    epsilon: positive.
    delta: in (0, 1).
    sensitivity: how far one record moves the release, in Euclidean norm.
    num_steps: releases of the same data in all.
    sample_rate: share of records that each of them sees, drawn independently
      (Poisson sampling); less noise is needed below 1.

  Returns:
    The standard deviation of the noise on each entry.

  Raises:
    ValueError: if an argument is out of range, as "epsilon must be positive,
      got -1.0".
    ImportError: for a ``sample_rate`` below 1 if dp-accounting is missing,
      naming the extra that brings it.

  Cost:
    Microseconds; with sampling up to seconds.

  Source:
    arXiv 1805.06530, theorem 8; with sampling the dp-accounting package.

  Example:
    >>> from jaxattn.privacy import gaussian_sigma
    >>> round(gaussian_sigma(1.0, 1e-5), 4)
    3.7306
    >>> round(gaussian_sigma(1.0, 1e-5, num_steps=100), 4)
    37.3063
  """
  _checks.check_positive("epsilon", epsilon)
  _check(delta, sensitivity, num_steps, sample_rate)
  if sample_rate < 1:
    return sensitivity * _sampled_sigma(epsilon, delta, num_steps, sample_rate)

  def excess(log_sigma: float) -> float:
    return _log_delta(epsilon, math.exp(log_sigma)) - math.log(delta)

  # Twice the classical noise of epsilon <= 1, more than enough; nearly none.
  classical = math.sqrt(2 * math.log(1.25 / delta)) + 1
  high = math.log(2 * classical / min(epsilon, 1.0))
  low = -math.log(2 * math.sqrt(epsilon) + 2 * classical + 2 * epsilon)
  root = _root(excess, low, high, 1e-14)
  return sensitivity * math.sqrt(num_steps) * math.exp(root)


def gaussian_epsilon(
  sigma: float,
  delta: float,
  sensitivity: float = 1.0,
  *,
  num_steps: int = 1,
  sample_rate: float = 1.0,
) -> float:
  """What noise costs: the inverse of :func:`gaussian_sigma`.

  Args:
    sigma: standard deviation of the noise on each entry, positive.
    delta: in (0, 1).
    sensitivity: as for :func:`gaussian_sigma`.
    num_steps: as for :func:`gaussian_sigma`.
    sample_rate: as for :func:`gaussian_sigma`.

  Returns:
    The least epsilon; 0 if delta alone covers it.

  Raises:
    ValueError: if an argument is out of range.
    ImportError: as :func:`gaussian_sigma`.

  Cost:
    Microseconds; with sampling up to seconds.

  Source:
    arXiv 1805.06530, theorem 8; with sampling the dp-accounting package.

  Example:
    >>> from jaxattn.privacy import gaussian_epsilon
    >>> round(gaussian_epsilon(3.7306, 1e-5), 3)
    1.0
  """
  _checks.check_positive("sigma", sigma)
  _check(delta, sensitivity, num_steps, sample_rate)
  if sample_rate < 1:
    accountant = _accountant(sigma / sensitivity, num_steps, sample_rate)
    return float(accountant.get_epsilon(delta))
  ratio = sigma / sensitivity / math.sqrt(num_steps)

  def excess(epsilon: float) -> float:
    return _log_delta(epsilon, ratio) - math.log(delta)

  if excess(0.0) <= 0:
    return 0.0
  high = 1.0
  while excess(high) > 0:
    high *= 2
  return _root(excess, 0.0, high, 1e-13)


def _log_delta(epsilon: float, sigma: float) -> float:
  """Logarithm of the least delta for this noise, of sensitivity 1."""
  shift, slope = 1 / (2 * sigma), epsilon * sigma
  first = special.log_ndtr(shift - slope)
  second = epsilon + special.log_ndtr(-shift - slope)
  # The difference is positive; rounding of it may not be.
  gap = min(float(second - first), -1e-16)
  return float(first) + math.log(-math.expm1(gap))


def _root(
  fn: Callable[[float], float], low: float, high: float, tol: float
) -> float:
  found = optimize.root_scalar(fn, bracket=(low, high), xtol=tol, rtol=tol)
  return float(found.root)


def _check(
  delta: float, sensitivity: float, num_steps: int, sample_rate: float
) -> None:
  _checks.check_range("delta", delta, 0.0, 1.0, closed=False)
  _checks.check_positive("sensitivity", sensitivity)
  if not math.isfinite(sensitivity):
    raise ValueError(f"sensitivity must be finite, got {sensitivity}")
  _checks.check_integer("num_steps", num_steps, 1, None)
  _checks.check_positive("sample_rate", sample_rate)
  _checks.check_range("sample_rate", sample_rate, 0.0, 1.0)


# --- sampling of records ---


def _sampled_sigma(
  epsilon: float, delta: float, num_steps: int, sample_rate: float
) -> float:
  def excess(log_sigma: float) -> float:
    accountant = _accountant(math.exp(log_sigma), num_steps, sample_rate)
    return accountant.get_epsilon(delta) - epsilon

  # Without sampling more noise is needed: that bounds it.
  high = math.log(gaussian_sigma(epsilon, delta, num_steps=num_steps))
  low = high - 1
  while excess(low) < 0:
    low -= 1
  return math.exp(_root(excess, low, high, 1e-6))


def _accountant(sigma: float, num_steps: int, sample_rate: float) -> Any:
  # An extra of this package, so not imported with it.
  try:
    import dp_accounting  # pyright: ignore[reportMissingImports]
    from dp_accounting import rdp  # pyright: ignore[reportMissingImports]
  except ModuleNotFoundError as error:
    raise ImportError(
      "a sample_rate below 1 needs dp-accounting: "
      "pip install 'jaxattn[privacy]'"
    ) from error
  step = dp_accounting.PoissonSampledDpEvent(
    sample_rate, dp_accounting.GaussianDpEvent(sigma)
  )
  accountant = rdp.RdpAccountant()
  return accountant.compose(dp_accounting.SelfComposedDpEvent(step, num_steps))
