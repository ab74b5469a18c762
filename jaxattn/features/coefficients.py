r"""Polynomials that stand in for exp, and how far they are from it.

For logits promised to lie in [-R, R], softmax attention needs a polynomial of
small *relative* error

.. math:: \varepsilon = \max_{|x| \le R} |p(x) e^{-x} - 1|,

because a softmax is a ratio. Sources: arXiv 2302.13214, section 3, for
polynomials in place of exp; schemes and bounds below are this project's. All of
it is host arithmetic in float64 on static numbers.

At x = -R the terms of p are as large as e^R and their sum is e^-R: evaluated in
a dtype of unit round-off u, p itself is only good to about u e^(2R).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import Polynomial, chebyshev, hermite_e
from numpy.typing import ArrayLike

from jaxattn import _checks

_KINDS = ("minimax", "taylor", "gaussian")
_GRID = 4001
_NODES = 400
_HERMITE_NODES = 60
_MAX_SIGMA = 0.5
_MAX_SWEEPS = 200
# The best polynomial is at most this much better, relatively.
_LAWSON_GAP = 1e-4
_MAX_DEGREE = 100
# Up to here the facts of the docstring were checked; p(-R) is e^-R with terms
# of e^R, so that float64 has few digits of it beyond.
_MAX_RADIUS = 12.0
# Logarithm of a radius^(g + 1) below which there is no error to level.
_UNDERFLOW = -600.0


def polynomial_coefficients(
  degree: int,
  radius: float,
  *,
  kind: str = "minimax",
  sigma: float | None = None,
) -> np.ndarray:
  r"""Coefficients of a polynomial that approximates exp on [-R, R].

  * ``"minimax"`` minimizes the largest relative error
    :math:`\max_{|x| \le R} |p(x) e^{-x} - 1|`. Its coefficients are positive,
    and with an even degree p has no real root, so that weights stay positive
    even where logits exceed R. (Measured for R from 0.25 to 12, degree <= 10.)
  * ``"taylor"`` is :math:`c_j = 1 / j!`: best near 0, and at -R off by about
    :math:`e^R R^{g+1} / (g+1)!`.
  * ``"gaussian"`` minimizes the mean square of :math:`p(x) e^{-x} - 1` under
    the density of N(0, sigma^2) times e^x, which is what attention sees where
    logits are about N(0, sigma^2): smallest error on average, none promised.

  Args:
    degree: g >= 0. An odd one has a real root, for minimax just left of -R.
    radius: R > 0, a static number; only ``"minimax"`` depends on it.
    kind: ``"minimax"``, ``"taylor"`` or ``"gaussian"``.
    sigma: spread of the logits, in (0, 0.5]; for ``"gaussian"`` only.

  Returns:
    (g + 1,) float64, constant first.

  Raises:
    ValueError: if an argument is out of range, as a radius above 12 for
      minimax; if ``sigma`` is missing, given for another kind, or so large
      that fits have real roots.

  Cost:
    Up to 200 least-squares solves of 400 x (g + 1), some 20 ms, once: results
    are kept.

  Source:
    Lawson's iteration for minimax, a standard algorithm; the weighted fit and
    the choice of relative error are this project's.

  Example:
    >>> print(polynomial_coefficients(2, 1.0).round(3))
    [1.027 1.114 0.469]
    >>> print(polynomial_coefficients(2, 1.0, kind="taylor"))
    [1.  1.  0.5]
  """
  _checks.check_integer("degree", degree, 0, None)
  _checks.check_choice("kind", kind, _KINDS)
  radius = static_positive("radius", radius)
  if kind != "gaussian":
    if sigma is not None:
      raise ValueError(f"sigma is for kind 'gaussian', got it with {kind!r}")
    fit = _minimax if kind == "minimax" else _taylor
    return fit(degree, radius).copy()
  if sigma is None:
    raise ValueError("sigma is required for kind 'gaussian', got None")
  sigma = static_positive("sigma", sigma)
  if sigma > _MAX_SIGMA:
    raise ValueError(
      f"sigma must be in (0, {_MAX_SIGMA}], got {sigma}: beyond, the fit has "
      "real roots; take kind 'minimax'"
    )
  coefs = _gaussian(degree, sigma)
  if degree % 2 == 0 and _has_real_root(coefs):
    raise ValueError(
      f"sigma={sigma} with degree={degree} gives a fit with real roots, and "
      "weights of both signs; take kind 'minimax'"
    )
  return coefs.copy()


def polynomial_error(coefficients: ArrayLike, radius: float) -> float:
  r"""Largest relative error of a polynomial as exp on [-R, R].

  .. math:: \varepsilon = \max_{|x| \le R} |p(x) e^{-x} - 1|

  Args:
    coefficients: (g + 1,) numbers, constant first.
    radius: R > 0, a static number.

  Returns:
    The error on a grid of 4001 points with both ends; infinite where it
    overflows.

  Raises:
    ValueError: if ``coefficients`` is empty or no vector, or ``radius`` not a
      positive finite number.

  Cost:
    O(g) on each of 4001 points.

  Source:
    This project.

  Example:
    >>> print(round(polynomial_error([1.0, 1.0, 0.5], 1.0), 4))
    0.3591
  """
  coefficients = read_coefficients(coefficients)
  radius = static_positive("radius", radius)
  x = np.linspace(-radius, radius, _GRID)
  values = np.polynomial.polynomial.polyval(x, coefficients)
  # Where exp(-x) is too large for a float64, so is the error, but at a root.
  with np.errstate(over="ignore", invalid="ignore"):
    ratio = np.where(values == 0, 0, values * np.exp(-x))
  return float(np.abs(ratio - 1).max())


def degree_for(
  eps: float, radius: float, *, kind: str = "minimax", even: bool = True
) -> int:
  r"""Smallest degree whose relative error on [-R, R] is below eps.

  Args:
    eps: relative error of each weight, > 0. Through
      :func:`attention_error_bound` it bounds the error of attention.
    radius: R > 0, bound on the logits; a static number.
    kind: ``"minimax"`` or ``"taylor"``, the error of
      :func:`polynomial_coefficients`; or ``"taylor_bound"``, the closed form
      :func:`taylor_error_bound`.
    even: look at even degrees only, which keep weights positive.

  Returns:
    The degree.

  Raises:
    ValueError: if an argument is out of range, or if no degree up to 100
      reaches ``eps`` in float64.

  Cost:
    One error for each degree that is tried.

  Source:
    This project; arXiv 2302.13214, lemma 3.2, has the order of growth.

  Example:
    >>> print(degree_for(1e-3, 1.0), degree_for(1e-3, 1.0, kind="taylor"))
    4 6
  """
  eps = static_positive("eps", eps)
  radius = static_positive("radius", radius)
  _checks.check_choice("kind", kind, ("minimax", "taylor", "taylor_bound"))
  _checks.check_choice("even", even, (False, True))
  error: Callable[[int], float] = {
    "minimax": lambda g: polynomial_error(_minimax(g, radius), radius),
    "taylor": lambda g: polynomial_error(_taylor(g, radius), radius),
    "taylor_bound": lambda g: taylor_error_bound(radius, g),
  }[kind]
  # Below this a polynomial cannot even be evaluated.
  rounding = np.finfo(float).eps * math.exp(2 * min(radius, 300.0))
  if kind == "taylor_bound" or eps > rounding:
    for degree in range(0, _MAX_DEGREE + 1, 2 if even else 1):
      if error(degree) < eps:
        return degree
  raise ValueError(
    f"eps = {eps} with radius = {radius} needs a degree above {_MAX_DEGREE}, "
    "or more digits than float64 has"
  )


def taylor_error_bound(radius: float, degree: int) -> float:
  r"""Closed-form bound on the relative error of the Taylor polynomial.

  .. math:: \Bigl| e^{-x} \sum_{j \le g} \frac{x^j}{j!} - 1 \Bigr|
    \le \frac{e^{2R} R^{g+1}}{(g+1)!}, \qquad |x| \le R

  Args:
    radius: R > 0, a static number.
    degree: g >= 0.

  Returns:
    The bound; infinite where it overflows.

  Raises:
    ValueError: if ``radius`` is not positive and finite or ``degree`` negative.

  Cost:
    O(1).

  Source:
    Lagrange's remainder, a standard textbook fact.

  Example:
    >>> print(round(taylor_error_bound(0.5, 3), 5))
    0.00708
  """
  radius = static_positive("radius", radius)
  _checks.check_integer("degree", degree, 0, None)
  order = degree + 1
  log = 2 * radius + order * math.log(radius) - math.lgamma(order + 1)
  return math.exp(log) if log < 709 else math.inf


def attention_error_bound(
  eps: float | jax.Array, value: jax.Array
) -> jax.Array:
  r"""Bound on the error of attention whose weights have relative error eps.

  If every unnormalized weight is off by a factor in [1 - eps, 1 + eps], each
  column of the output is off by at most

  .. math::

    (\max_j v_j - \min_j v_j) \tanh(\tfrac12 \operatorname{artanh} \varepsilon)
    = (\max_j v_j - \min_j v_j) \frac{\varepsilon}{1 + \sqrt{1-\varepsilon^2}}.

  Tight: two keys of equal weight, errors of opposite sign. Random data use 3
  to 30 % of it.

  Args:
    eps: relative error in [0, 1], such as :func:`polynomial_error`; a scalar,
      may be traced.
    value: (..., S, K, Hv) of attention, floating.

  Returns:
    (..., K, Hv) of the dtype of ``value``: a bound for every query.

  Raises:
    ValueError: if ``eps`` is outside [0, 1] or no scalar, or ``value`` is not
      floating or has fewer than three dimensions.

  Cost:
    One pass over ``value``.

  Source:
    This project; arXiv 2302.13214, lemma 3.6, has a weaker bound.

  Example:
    >>> import jax.numpy as jnp
    >>> value = jnp.array([-1.0, 1.0]).reshape(2, 1, 1)
    >>> print(round(float(attention_error_bound(0.1, value)[0, 0]), 4))
    0.1003
  """
  value = jnp.asarray(value)
  if value.ndim < 3:
    raise ValueError(
      f"value must have shape (..., S, K, Hv), got {value.shape}"
    )
  _checks.check_floating("value", value)
  _checks.check_scalar("eps", eps)
  _checks.check_range("eps", eps, 0, 1)
  eps = jnp.asarray(eps, value.dtype)
  share = eps / (1 + jnp.sqrt(1 - eps * eps))
  return (value.max(-3) - value.min(-3)) * share


def read_coefficients(coefficients: ArrayLike) -> np.ndarray:
  """Reads the coefficients of a polynomial, constant first.

  Args:
    coefficients: (g + 1,) numbers, on the host.

  Returns:
    The same in float64.

  Raises:
    ValueError: if there are none, or they are no vector.
  """
  coefficients = np.asarray(coefficients, np.float64)
  if coefficients.ndim != 1 or not coefficients.size:
    raise ValueError(
      "coefficients must be a vector of at least one number, got shape "
      f"{coefficients.shape}"
    )
  return coefficients


def static_positive(name: str, value: float) -> float:
  """Reads a positive finite number that coefficients depend on.

  Args:
    name: of the argument.
    value: a number, or an array that holds one.

  Returns:
    The number as a Python float.

  Raises:
    ValueError: if it is traced, or not a positive finite real scalar.
  """
  if not _checks.is_concrete(value):
    raise ValueError(
      f"{name} must be a static number, got a traced value: coefficients are "
      "computed on the host"
    )
  _checks.check_scalar(name, value)
  number = float(value)
  if not 0 < number < math.inf:
    raise ValueError(f"{name} must be positive and finite, got {value}")
  return number


@functools.lru_cache(maxsize=512)
def _taylor(degree: int, radius: float) -> np.ndarray:
  del radius
  return np.array([1 / math.factorial(j) for j in range(degree + 1)])


@functools.lru_cache(maxsize=512)
def _minimax(degree: int, radius: float) -> np.ndarray:
  """Taylor's polynomial plus the correction that levels the error."""
  if radius > _MAX_RADIUS:
    raise ValueError(
      f"radius must be at most {_MAX_RADIUS:g} for kind 'minimax', got "
      f"{radius}: scale the logits down"
    )
  if (degree + 1) * math.log(radius) < _UNDERFLOW:
    return _taylor(degree, radius)
  u = np.cos(np.pi * (np.arange(_NODES) + 0.5) / _NODES)
  basis = chebyshev.chebvander(u, degree) * np.exp(-radius * u)[:, None]
  fit = _lawson(basis, _taylor_remainder(radius * u, degree))
  return _taylor(degree, radius) + _rescaled(chebyshev.cheb2poly(fit), radius)


def _lawson(basis: np.ndarray, target: np.ndarray) -> np.ndarray:
  """Coefficients that minimize the largest |basis @ x - target|."""
  weight = np.full(target.shape, 1 / target.size)
  least, best = math.inf, weight
  for _ in range(_MAX_SWEEPS):
    fit = _least_squares(basis, target, weight)
    residual = np.abs(basis @ fit - target)
    if residual.max() < least:
      least, best = residual.max(), fit
    # A weighted mean square never exceeds the error of the best polynomial.
    if least <= (1 + _LAWSON_GAP) * math.sqrt(weight @ residual**2):
      break
    weight = weight * residual
    weight /= weight.sum()
  return best


@functools.lru_cache(maxsize=512)
def _gaussian(degree: int, sigma: float) -> np.ndarray:
  z, weight = hermite_e.hermegauss(_HERMITE_NODES)
  basis = hermite_e.hermevander(z, degree) * np.exp(-sigma * z)[:, None]
  target = _taylor_remainder(sigma * z, degree)
  fit = _least_squares(basis, target, weight * np.exp(sigma * z))
  powers = _rescaled(hermite_e.herme2poly(fit), sigma)
  return _taylor(degree, sigma) + powers


def _has_real_root(coefs: np.ndarray) -> bool:
  """Whether a polynomial of even degree is 0 or negative somewhere."""
  fit = Polynomial(coefs)
  critical = fit.deriv().roots()
  real = critical[np.abs(critical.imag) <= 1e-9 * (1 + np.abs(critical))].real
  return coefs[-1] <= 0 or bool((fit(real) <= 0).any())


def _least_squares(
  basis: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> np.ndarray:
  root = np.sqrt(weight)
  return np.linalg.lstsq(basis * root[:, None], target * root, rcond=None)[0]


def _rescaled(powers: np.ndarray, radius: float) -> np.ndarray:
  """Coefficients in x of a polynomial in x / radius."""
  return powers / radius ** np.arange(len(powers))


def _taylor_remainder(x: np.ndarray, degree: int) -> np.ndarray:
  r"""1 - e^-x sum_{j <= g} x^j / j!, with all its digits where it is small."""
  # Summed from its own first term: the difference would cancel.
  term = np.exp(-x)
  for j in range(1, degree + 2):
    term = term * x / j
  total, j = np.zeros_like(x), degree + 2
  while np.any(np.abs(term) > 1e-17 * np.abs(total)):
    total, term, j = total + term, term * x / j, j + 1
  return total
