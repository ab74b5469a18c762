r"""Weights of the rows of a polytope: what a barrier's Hessian gives each.

Iterations are of a fixed number and start from one place, so that the weights
are a function of the matrix alone: a walk that uses them is reversible however
few they are.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import linalg

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator

__all__ = ["john_weights", "lewis_weights"]

# Above so many numbers the products of all pairs of columns are not kept.
_MOST_PRODUCTS = 2e8


class Rows(NamedTuple):
  """A matrix, prepared for sums over its rows.

  Attributes:
    a: (n, d).
    products: (n, d^2), of all pairs of columns, or None if that is too large.
  """

  a: jax.Array
  products: jax.Array | None


def prepare_rows(a: jax.Array) -> Rows:
  """Makes a sum over rows, of all chains at once, one product of matrices."""
  n, d = a.shape
  if n * d * d > _MOST_PRODUCTS:
    return Rows(a, None)
  return Rows(a, (a[:, :, None] * a[:, None, :]).reshape(n, d * d))


def gram(rows: Rows, weight: jax.Array) -> jax.Array:
  """A^T diag(weight) A."""
  a, products = rows
  if products is None:
    return (weight[:, None] * a).T @ a
  return (weight @ products).reshape(a.shape[1], a.shape[1])


def quadratic(rows: Rows, factor: jax.Array) -> jax.Array:
  """a_i^T (L L^T)^-1 a_i for each row."""
  a, products = rows
  if products is None:
    return (linalg.solve_triangular(factor, a.T, lower=True) ** 2).sum(0)
  eye = jnp.eye(len(factor), dtype=factor.dtype)
  return products @ linalg.cho_solve((factor, True), eye).reshape(-1)


def leverage(rows: Rows, weight: jax.Array) -> jax.Array:
  """Of the rows scaled by the square root of ``weight``."""
  factor = jnp.linalg.cholesky(gram(rows, weight))
  return weight * quadratic(rows, factor)


def lewis(rows: Rows, scale: jax.Array, p: float, num_iters: int) -> jax.Array:
  """Lewis weights of the rows times the square root of ``scale``."""
  n, d = rows.a.shape
  # At the solution this step contracts by (p - 2) / (p + 2); the step 2 / p of
  # the textbooks by 1 - 2 / p.
  step = min(1.0, 4 / (p + 2))

  def body(_: int, log_w: jax.Array) -> jax.Array:
    inner = scale * jnp.exp((1 - 2 / p) * log_w)
    factor = jnp.linalg.cholesky(gram(rows, inner))
    best = p / 2 * jnp.log(scale * quadratic(rows, factor))
    return (1 - step) * log_w + step * best

  start = jnp.full((n,), math.log(d / n), rows.a.dtype)
  return jnp.exp(jax.lax.fori_loop(0, num_iters, body, start))


def john(rows: Rows, scale: jax.Array, num_iters: int) -> jax.Array:
  """John's weights of the rows times the square root of ``scale``."""
  n, d = rows.a.shape
  power = john_power(n, d)

  def body(_: int, w: jax.Array) -> jax.Array:
    return leverage(rows, scale * w**power) + d / (2 * n)

  start = jnp.full((n,), d / n, rows.a.dtype)
  return jax.lax.fori_loop(0, num_iters, body, start)


def john_power(n: int, d: int) -> float:
  """The exponent a of :func:`john_weights`."""
  return 1 - 1 / math.log2(2 * n / d)


def lewis_weights(a: jax.Array, p: float, *, num_iters: int = 4) -> jax.Array:
  r"""The :math:`\ell_p` Lewis weights of the rows of a matrix.

  The w > 0 with

  .. math::

    w_i = \sigma_i(W^{1/2 - 1/p} A), \qquad
    \text{that is} \qquad
    w_i^{2/p} = a_i^\top (A^\top W^{1 - 2/p} A)^{-1} a_i,

  :math:`\sigma` the leverage scores, which are w for p = 2. They sum to d.

  Args:
    a: (n, d), floating, of full column rank.
    p: a positive number.
    num_iters: steps of :math:`\log w \mathrel{+}= \theta (\log w_{new} - \log
      w)`, :math:`\theta = \min(1, 4 / (p + 2))`, from w = d / n. For
      p >= 2 they converge linearly, by (p - 2) / (p + 2) near the solution.

  Returns:
    (n,); without meaning if the rank is deficient, where NaN is likely.

  Raises:
    ValueError: if ``a`` is no floating matrix with at least as many rows as
      columns, ``p`` is not positive and finite, or ``num_iters`` is below 1.

  Cost:
    O(n d^2) a step.

  Source:
    Cohen and Peng, arXiv:1412.0588, definition 2.2; the step size is derived
    here from the linearization at the solution.

  Example:
    >>> import jax
    >>> from jaxattn.sampling import lewis_weights
    >>> a = jax.random.normal(jax.random.key(0), (30, 4))
    >>> w = lewis_weights(a, 4.0, num_iters=30)
    >>> print(w.sum().round(4))
    4.0
  """
  a = _matrix(a)
  if not 0 < p < math.inf:
    raise ValueError(f"p must be positive and finite, got {p}")
  _checks.check_integer("num_iters", num_iters, 1, None)
  return _lewis(a, p=float(p), num_iters=num_iters)


def john_weights(a: jax.Array, *, num_iters: int = 20) -> jax.Array:
  r"""Weights of John's walk, of the rows of a matrix.

  .. math::

    w = \sigma(W^{\alpha/2} A) + \frac{d}{2 n}, \qquad
    \alpha = 1 - \frac{1}{\log_2(2 n / d)},

  which sum to 3 d / 2.

  Args:
    a: (n, d), floating, of full column rank.
    num_iters: steps of this equation, from w = d / n.

  Returns:
    (n,); without meaning if the rank is deficient, where NaN is likely.

  Raises:
    ValueError: if ``a`` is no floating matrix with at least as many rows as
      columns, or ``num_iters`` is below 1.

  Cost:
    O(n d^2) a step.

  Source:
    Chen, Dwivedi, Wainwright, Yu, arXiv:1710.08165, section 2.

  Example:
    >>> import jax
    >>> from jaxattn.sampling import john_weights
    >>> a = jax.random.normal(jax.random.key(0), (30, 4))
    >>> print(john_weights(a).sum().round(4))
    6.0
  """
  a = _matrix(a)
  _checks.check_integer("num_iters", num_iters, 1, None)
  return _john(a, num_iters=num_iters)


@functools.partial(jax.jit, static_argnames=("p", "num_iters"))
def _lewis(a: jax.Array, *, p: float, num_iters: int) -> jax.Array:
  wide = a.astype(accumulator(a.dtype))
  ones = jnp.ones(len(a), wide.dtype)
  return lewis(Rows(wide, None), ones, p, num_iters).astype(a.dtype)


@functools.partial(jax.jit, static_argnames="num_iters")
def _john(a: jax.Array, *, num_iters: int) -> jax.Array:
  wide = a.astype(accumulator(a.dtype))
  ones = jnp.ones(len(a), wide.dtype)
  return john(Rows(wide, None), ones, num_iters).astype(a.dtype)


def _matrix(a: jax.Array) -> jax.Array:
  a = jnp.asarray(a)
  _checks.check_rank("a", a, 2)
  _checks.check_floating("a", a)
  n, d = a.shape
  if n < d or d == 0:
    raise ValueError(
      f"a must have at least as many rows as columns, got shape {a.shape}"
    )
  return a
