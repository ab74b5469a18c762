r"""Monomial features: polynomials of an inner product, without redundancy.

For a multi-index :math:`\alpha` write :math:`x^\alpha = \prod_i x_i^{\alpha_i}`
and :math:`|\alpha| = \sum_i \alpha_i`. The multinomial theorem

.. math::

  \langle x, y \rangle^j = \sum_{|\alpha| = j} \frac{j!}{\alpha!}
  x^\alpha y^\alpha

makes any polynomial p of degree g an inner product of
:math:`\binom{d + g}{g}` features:
:math:`p(\langle x, y \rangle) = \sum_\alpha w_\alpha x^\alpha y^\alpha` with
:math:`w_\alpha = c_{|\alpha|} |\alpha|! / \alpha!`. Source: arXiv 2302.13214,
lemma 3.4, which counts more of them; the order of features is this project's.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike

from jaxattn import _checks
from jaxattn.features.coefficients import read_coefficients

MAX_FEATURES = 1 << 22


def feature_count(dim: int, degree: int) -> int:
  r"""Number of monomials in ``dim`` variables up to a degree.

  .. math:: \binom{d + g}{g}

  Args:
    dim: d, number of variables, at least 1.
    degree: g, at least 0.

  Returns:
    The number, constant included.

  Raises:
    ValueError: if an argument is no integer or too small.

  Cost:
    O(1).

  Source:
    a standard fact.

  Example:
    >>> feature_count(8, 2)
    45
  """
  _checks.check_integer("dim", dim, 1, None)
  _checks.check_integer("degree", degree, 0, None)
  return math.comb(dim + degree, degree)


def monomial_features(x: jax.Array, degree: int) -> jax.Array:
  r"""All monomials of a vector up to a degree, unweighted.

  Ordered by degree, then by largest variable v, then as the monomials of one
  degree less: those in variables up to v are a prefix of these.

  Args:
    x: (..., d), any dtype; the result has the same.
    degree: g, at least 0.

  Returns:
    (..., C(d + g, g)); the first is the constant 1.

  Raises:
    ValueError: if ``x`` is a scalar, the degree negative, or there would be
      more than 2^22 features.

  Cost:
    One product a feature, time and memory.

  Source:
    arXiv 2302.13214, lemma 3.4.

  Example:
    >>> import jax.numpy as jnp
    >>> print(monomial_features(jnp.array([2.0, 3.0]), 2))
    [1. 2. 3. 4. 6. 9.]
  """
  x = jnp.asarray(x)
  if x.ndim == 0:
    raise ValueError("x must have shape (..., d), got a scalar")
  check_feature_count(x.shape[-1], degree)
  return _features(x, degree)


def monomial_weights(dim: int, coefficients: ArrayLike) -> np.ndarray:
  r"""Weights that make monomial features a polynomial of the inner product.

  .. math:: \sum_j c_j \langle x, y \rangle^j
    = \sum_\alpha w_\alpha x^\alpha y^\alpha, \qquad
    w_\alpha = c_{|\alpha|} \frac{|\alpha|!}{\alpha!}

  Args:
    dim: d, number of variables.
    coefficients: (g + 1,) numbers c_0 to c_g, on the host.

  Returns:
    (C(d + g, g),) float64, in the order of :func:`monomial_features`.

  Raises:
    ValueError: if ``coefficients`` is empty or no vector, or there would be
      more than 2^22 weights.

  Cost:
    O(C(d + g, g)) on the host.

  Source:
    the multinomial theorem.

  Example:
    >>> print(monomial_weights(2, [1.0, 1.0, 0.5]))  # exp to second order
    [1.  1.  1.  0.5 1.  0.5]
  """
  coefficients = read_coefficients(coefficients)
  degree = len(coefficients) - 1
  check_feature_count(dim, degree)
  # Of each monomial: |a|! / a!, largest variable, and the power of that.
  counts, largest, power = np.ones(1), np.full(1, -1), np.zeros(1, int)
  weights = [coefficients[0] * counts]
  for j in range(1, degree + 1):
    before, variable = _parents(dim, j)
    power = np.where(largest[before] == variable, power[before], 0) + 1
    counts, largest = counts[before] * j / power, variable
    weights.append(coefficients[j] * counts)
  return np.concatenate(weights)


def taylor_features(
  x: jax.Array, degree: int, *, scale: float | jax.Array = 1.0
) -> jax.Array:
  r"""Symmetric features of the Taylor polynomial of exp.

  .. math:: \phi(x) \cdot \phi(y)
    = \sum_{j \le g} \frac{(s \langle x, y \rangle)^j}{j!}, \qquad
    \phi_\alpha(x) = \frac{(\sqrt s x)^\alpha}{\sqrt{\alpha!}}

  Args:
    x: (..., d), floating.
    degree: g, at least 0.
    scale: s > 0, shared by both sides; may be traced.

  Returns:
    (..., C(d + g, g)) of the dtype of ``x``.

  Raises:
    ValueError: as :func:`monomial_features`; if ``x`` is not floating or
      ``scale`` is not positive.

  Cost:
    Two products a feature.

  Source:
    arXiv 2302.13214, lemma 3.4 with c_j = 1 / j!.

  Example:
    >>> import jax.numpy as jnp
    >>> phi = taylor_features(jnp.array([0.1, 0.2]), 6)
    >>> print(f"{phi @ phi:.4f} {math.exp(0.05):.4f}")
    1.0513 1.0513
  """
  x = jnp.asarray(x)
  _checks.check_floating("x", x)
  _checks.check_positive("scale", scale)
  check_feature_count(x.shape[-1] if x.ndim else 0, degree)
  return _taylor_features(x, scale, degree)


def taylor_norm_bound(radius: float, degree: int) -> float:
  r"""Largest squared norm of Taylor features of a bounded vector.

  .. math:: \|\phi(x)\|^2 = \sum_{j \le g} \frac{(s \|x\|^2)^j}{j!}
    \le \sum_{j \le g} \frac{R^j}{j!}

  Args:
    radius: R >= 0, bound on s times the squared norm of x; a static number.
    degree: g, at least 0.

  Returns:
    The bound; reached where that product is R. Infinite where it overflows.

  Raises:
    ValueError: if ``radius`` is no real scalar, traced, or negative, or
      ``degree`` no integer >= 0.

  Cost:
    O(g).

  Source:
    a standard fact.

  Example:
    >>> taylor_norm_bound(1.0, 2)
    2.5
  """
  if not _checks.is_concrete(radius):
    raise ValueError("radius must be a static number, got a traced value")
  _checks.check_scalar("radius", radius)
  _checks.check_nonnegative("radius", radius)
  _checks.check_integer("degree", degree, 0, None)
  total = term = 1.0
  for j in range(1, degree + 1):
    term *= float(radius) / j
    total += term
  return total


def check_feature_count(dim: int, degree: int) -> None:
  """Refuses feature dimensions that explode."""
  num_features = feature_count(dim, degree)
  if num_features > MAX_FEATURES:
    raise ValueError(
      f"feature dimension C({dim}+{degree},{degree})={num_features} too large; "
      "lower degree or use a sketch"
    )


@functools.partial(jax.jit, static_argnums=2)
def _taylor_features(x: jax.Array, scale: Any, degree: int) -> jax.Array:
  features = _features(x * jnp.sqrt(jnp.asarray(scale, x.dtype)), degree)
  coefficients = [1 / math.factorial(j) for j in range(degree + 1)]
  weights = np.sqrt(monomial_weights(x.shape[-1], coefficients))
  weights = jnp.asarray(weights, x.dtype)
  return features * weights.reshape((1,) * (x.ndim - 1) + (-1,))


@functools.partial(jax.jit, static_argnums=1)
def _features(x: jax.Array, degree: int) -> jax.Array:
  blocks = monomial_blocks(jnp.moveaxis(x, -1, 0), degree, 0)
  return jnp.moveaxis(jnp.concatenate(blocks), 0, -1)


def monomial_blocks(
  x: jax.Array, degree: int, axis: int = -2
) -> tuple[jax.Array, ...]:
  """Monomials along another axis, those of the highest degree apart.

  Rows are looked up whole, so a lookup costs what a copy costs; and putting the
  blocks together would be a copy more.

  Args:
    x: (..., d, c).
    degree: g.
    axis: of the variables, and of the features.

  Returns:
    Blocks (..., m1, c), ... that make up all features, in order.
  """
  levels = [jnp.ones_like(lax.slice_in_dim(x, 0, 1, axis=axis))]
  for j in range(1, degree + 1):
    before, variable = _parents(x.shape[axis], j)
    if j == 1:
      levels.append(x)
      continue
    factors = (levels[-1], before), (x, variable)
    a, b = (jnp.take(y, rows, axis, mode="clip") for y, rows in factors)
    levels.append(a * b)
  if degree < 2:
    return (jnp.concatenate(levels, axis),)
  return jnp.concatenate(levels[:-1], axis), levels[-1]


@functools.lru_cache(maxsize=64)
def _parents(dim: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
  """What a monomial is the product of: one of a degree less, and a variable."""
  # Of each variable v: monomials of one degree less in variables 0 to v.
  sizes = [math.comb(v + degree - 1, degree - 1) for v in range(dim)]
  before = np.concatenate([np.arange(n) for n in sizes])
  variable = np.repeat(np.arange(dim), sizes)
  # Of one dtype with and without x64, which may change between two calls.
  return before.astype(np.int32), variable.astype(np.int32)
