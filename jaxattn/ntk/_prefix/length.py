"""How long a prefix must be for its kernel to be that of the limit."""

import math
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from scipy import special

from jaxattn import _checks
from jaxattn.scaling import fit_slope


class RequiredLength(NamedTuple):
  """A length that is enough, as a power law has it.

  Source: this project.

  Attributes:
    length: smallest m with a predicted gap below the tolerance.
    interval: (low, high), the 95 % t-interval of it, from the scatter of the
      gaps around the law.
    slope: of a line fitted freely to the logarithms; far from -1/2 the law does
      not hold at these lengths, nor does ``length``.
  """

  length: int
  interval: tuple[int, int]
  slope: float


def required_length(
  lengths: ArrayLike, gaps: ArrayLike, tol: float
) -> RequiredLength:
  r"""Length from which on kernels of prefixes are close to their limit.

  Sampling of the prefix makes a gap of :math:`A m^{-1/2}`, and everything else
  one of order :math:`m^{-1}`, training included: A is the geometric mean of
  gap times root of length, and the answer :math:`(A / \mathrm{tol})^2`. Leave
  out lengths at which the gap is not small yet. Runs on the host.

  Args:
    lengths: (k,) lengths of prefixes, at least two of them different; k >= 3.
    gaps: (k,) the gaps there, positive: for instance :math:`\|H - H_\infty\| /
      \|H_\infty\|`, medians over draws.
    tol: the gap that is small enough.

  Returns:
    The length with its interval.

  Raises:
    ValueError: if lengths or gaps are no vectors of at least three positive
      numbers, ``tol`` is not positive, or gaps do not fall with length.

  Cost:
    O(k).

  Source:
    this project.

  Example:
    >>> from jaxattn.ntk import required_length
    >>> need = required_length([64, 256, 1024], [0.4, 0.2, 0.1], 0.01)
    >>> need.length, round(need.slope, 3)
    (102401, -0.5)
  """
  _checks.check_scalar("tol", tol)
  _checks.check_positive("tol", tol)
  fit = fit_slope(lengths, gaps)
  if fit.slope >= 0:
    raise ValueError(
      f"gaps must fall with length, got a slope of {fit.slope:.3g}"
    )
  logs = np.log(np.asarray(gaps, float)) + np.log(lengths) / 2
  error = logs.std(ddof=1) / math.sqrt(len(logs))
  error *= special.stdtrit(len(logs) - 1, 0.975)

  def smallest(log_factor: float) -> int:
    # Strictly above, unless rounding is all that keeps it from being exact.
    return math.floor(math.exp(2 * log_factor) / tol**2 * (1 + 1e-12)) + 1

  middle = float(logs.mean())
  low, high = smallest(middle - error), smallest(middle + error)
  return RequiredLength(smallest(middle), (low, high), fit.slope)
