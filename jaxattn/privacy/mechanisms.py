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

Which data are neighbours the sensitivity says. A sum of vectors of norm at most
C moves by C if a record is added or removed, and by up to 2 C if it is replaced
by another. With a ``sample_rate`` below 1 neighbours differ by one record added
or removed; nothing is said of replacement.

Everything here is arithmetic on the host, in double precision, before any jit.
Source: Balle and Wang, arXiv 1805.06530, theorem 8.
"""

import math
from collections.abc import Callable
from typing import Any

from scipy import special

from jaxattn import _checks

# To which share of itself an answer is found: about rounding, and what an
# accountant that takes milliseconds is worth.
_PRECISION, _SAMPLED_PRECISION = 1e-14, 1e-6


def gaussian_sigma(
  epsilon: float,
  delta: float,
  sensitivity: float = 1.0,
  *,
  num_steps: int = 1,
  sample_rate: float = 1.0,
) -> float:
  """Noise that makes a release private: the least, if nothing is sampled.

  Args:
    epsilon: positive and finite.
    delta: in (0, 1).
    sensitivity: how far one record moves the release, in Euclidean norm: when
      it is added or removed, or, unless ``sample_rate`` is below 1, replaced.
    num_steps: releases of the same data in all.
    sample_rate: share of records that each of them sees, drawn independently
      (Poisson sampling); below 1 less noise is needed.

  Returns:
    The standard deviation of the noise on each entry, rounded up. With sampling
    it is enough by Rényi's divergences, which is some percent above the least.

  Raises:
    ValueError: if an argument is out of range, as "epsilon must be positive,
      got -1.0".
    ImportError: for a ``sample_rate`` below 1 if dp-accounting is missing,
      naming the extra that brings it.

  Cost:
    Less than a millisecond; with sampling seconds, or more for much noise.

  Source:
    arXiv 1805.06530, theorem 8; with sampling the dp-accounting package.

  Example:
    >>> from jaxattn.privacy import gaussian_sigma
    >>> round(gaussian_sigma(1.0, 1e-5), 4)
    3.7306
    >>> round(gaussian_sigma(1.0, 1e-5, num_steps=100), 4)
    37.3063
  """
  _check_size("epsilon", epsilon)
  _check(delta, sensitivity, num_steps, sample_rate)

  def enough(sigma: float) -> bool:
    return _log_delta(epsilon, sigma) <= math.log(delta)

  def enough_sampled(sigma: float) -> bool:
    cost = gaussian_epsilon(
      sigma, delta, num_steps=num_steps, sample_rate=sample_rate
    )
    return cost <= epsilon

  whole = math.sqrt(num_steps) * _least(enough, 1.0, _PRECISION)
  if sample_rate == 1:
    return sensitivity * whole
  return sensitivity * _least(enough_sampled, whole, _SAMPLED_PRECISION)


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
    The least epsilon, rounded up; 0 if delta alone covers it. With sampling the
    smaller of what Rényi's divergences show and of the epsilon without any.

  Raises:
    ValueError: if an argument is out of range.
    ImportError: as :func:`gaussian_sigma`.

  Cost:
    Less than a millisecond; with sampling seconds, or more for much noise.

  Source:
    arXiv 1805.06530, theorem 8; with sampling the dp-accounting package.

  Example:
    >>> from jaxattn.privacy import gaussian_epsilon
    >>> round(gaussian_epsilon(3.7306, 1e-5), 3)
    1.0
  """
  _check_size("sigma", sigma)
  _check(delta, sensitivity, num_steps, sample_rate)
  ratio = sigma / sensitivity / math.sqrt(num_steps)

  def enough(epsilon: float) -> bool:
    return _log_delta(epsilon, ratio) <= math.log(delta)

  whole = 0.0 if enough(0.0) else _least(enough, 1.0, _PRECISION)
  if sample_rate == 1:
    return whole
  # Whoever sees all records sees more. Rényi's bound may be above that.
  accountant = _accountant(sigma / sensitivity, num_steps, sample_rate)
  return min(whole, float(accountant.get_epsilon(delta)))


def _log_delta(epsilon: float, sigma: float) -> float:
  """Logarithm of the least delta for this noise, of sensitivity 1."""
  shift, slope = 1 / (2 * sigma), epsilon * sigma
  first = special.log_ndtr(shift - slope)
  second = epsilon + special.log_ndtr(-shift - slope)
  # The difference is positive; rounding of it may not be.
  gap = min(float(second - first), -1e-16)
  return float(first) + math.log(-math.expm1(gap))


def _least(
  enough: Callable[[float], bool], start: float, precision: float
) -> float:
  """The least positive number that is enough, rounded up, by bisection."""
  high = start
  while not enough(high):
    high *= 2
  low = high / 2
  while enough(low):
    low, high = low / 2, low
  while high > low * (1 + precision):
    middle = (low + high) / 2
    low, high = (low, middle) if enough(middle) else (middle, high)
  return high


def _check(
  delta: float, sensitivity: float, num_steps: int, sample_rate: float
) -> None:
  _checks.check_range("delta", delta, 0.0, 1.0, closed=False)
  _check_size("sensitivity", sensitivity)
  _checks.check_integer("num_steps", num_steps, 1, None)
  _checks.check_positive("sample_rate", sample_rate)
  _checks.check_range("sample_rate", sample_rate, 0.0, 1.0)


def _check_size(name: str, value: float) -> None:
  _checks.check_positive(name, value)
  if not math.isfinite(value):
    raise ValueError(f"{name} must be finite, got {value}")


# --- sampling of records ---


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
