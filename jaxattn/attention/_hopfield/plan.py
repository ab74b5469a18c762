"""What a retrieval will cost, by either way."""

import math
from typing import NamedTuple

from jaxattn import _checks
from jaxattn.features import (
  degree_for,
  feature_count,
  taylor_error_bound,
)
from jaxattn.features.monomials import MAX_FEATURES


class HopfieldPlan(NamedTuple):
  """What a retrieval will cost, on the host; see :func:`hopfield_plan`.

  Attributes:
    method: "lowrank" if that takes fewer flops and no more than the 2^22
      features that :func:`hopfield_store` allows, else "dense".
    degree: least even degree that meets the error, or None if none up to 100
      does.
    rank: r, its number of features; None without a degree.
    flops_dense: of all updates.
    flops_lowrank: of storing and of all updates; infinite without a degree.
    bound: on the error of an entry of one update by that degree, in units of
      the largest entry of a value; infinite without a degree.
  """

  method: str
  degree: int | None
  rank: int | None
  flops_dense: float
  flops_lowrank: float
  bound: float


def hopfield_plan(
  radius: float,
  dim: int,
  num_patterns: int,
  num_queries: int,
  *,
  eps: float = 1e-3,
  num_steps: int = 1,
) -> HopfieldPlan:
  r"""Says beforehand whether the low-rank path pays, and with which degree.

  With all logits in [-A, A] and Taylor features of degree g each weight is off
  by a factor within :math:`1 \pm \varepsilon`, and each entry of an update by

  .. math:: |\tilde T(x) - T(x)| \le
    \frac{2 \varepsilon}{1 - \varepsilon} \max |v|, \qquad
    \varepsilon = \frac{e^{2A} A^{g+1}}{(g+1)!}.

  The rank :math:`\binom{d + g}{g}` grows fast: the fast path is for small d or
  small logits, and the flops say how small.

  Args:
    radius: A >= 0, bound on :math:`|\beta x \cdot (\xi - \bar\xi)|`:
      :func:`jaxattn.attention.logit_radius` with ``center_keys=True`` measures
      it. A static number.
    dim: d.
    num_patterns: M.
    num_queries: L.
    eps: error of an entry of one update that is asked for, in units of the
      largest entry of a value.
    num_steps: updates of each query.

  Returns:
    The plan, on the host.

  Raises:
    ValueError: if an argument is out of range, as "eps must be positive and
      finite, got 0.0".

  Cost:
    Microseconds.

  Source:
    arXiv 2402.04520, theorem 4.1, for the existence of a degree; the search for
    it is this project's.

  Example:
    >>> plan = hopfield_plan(0.25, 8, 10_000, 10_000)
    >>> plan.method, plan.degree, plan.rank
    ('lowrank', 4, 495)
    >>> hopfield_plan(4.0, 8, 10_000, 10_000).method
    'dense'
  """
  for name, size in (
    ("dim", dim),
    ("num_patterns", num_patterns),
    ("num_queries", num_queries),
    ("num_steps", num_steps),
  ):
    _checks.check_integer(name, size, 1, None)
  _checks.check_scalar("radius", radius)
  _checks.check_scalar("eps", eps)
  if not 0 <= radius < math.inf:
    raise ValueError(f"radius must be at least 0 and finite, got {radius}")
  if not 0 < eps < math.inf:
    raise ValueError(f"eps must be positive and finite, got {eps}")
  updates = num_queries * num_steps
  flops_dense = 4.0 * num_patterns * updates * dim
  # Then 2 eps' / (1 - eps') <= eps.
  degree = _degree(eps / (2 + eps), radius)
  if degree is None:
    return HopfieldPlan("dense", None, None, flops_dense, math.inf, math.inf)
  rank = feature_count(dim, degree)
  # Two products a feature, and those with the d + 1 columns of the state.
  flops_lowrank = 2.0 * (num_patterns + updates) * rank * (dim + 2)
  error = taylor_error_bound(radius, degree) if radius else 0.0
  cheap = flops_lowrank < flops_dense and rank <= MAX_FEATURES
  return HopfieldPlan(
    "lowrank" if cheap else "dense",
    degree,
    rank,
    flops_dense,
    flops_lowrank,
    2 * error / (1 - error),
  )


def _degree(eps: float, radius: float) -> int | None:
  """Least even degree of a relative error below ``eps``, if there is one."""
  if radius == 0:
    # All weights are 1.
    return 0
  try:
    return degree_for(eps, radius, kind="taylor_bound")
  except ValueError:
    # The arguments are fine: no degree that can be computed with will do.
    return None
