"""How well a memory retrieves, and how much it holds."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.attention._hopfield import inputs, rows
from jaxattn.attention._hopfield.dense import half_largest_square
from jaxattn.numerics import lambertw
from jaxattn.numerics._dtypes import accumulator

_HIGHEST = lax.Precision.HIGHEST


class RetrievalErrorBound(NamedTuple):
  r"""Two bounds on :math:`|T(x) - \xi_\mu|`, the first the smaller.

  Attributes:
    weight: (...,) :math:`2 m (1 - p_\mu)`, by the weight of the pattern.
    gap: (...,) :math:`2 m (M - 1) e^{-\beta g}`, by how much more similar x is
      to the pattern than to any other.
  """

  weight: jax.Array
  gap: jax.Array


class CapacityBound(NamedTuple):
  """How many random patterns can be stored; see :func:`capacity_lower_bound`.

  Attributes:
    c: () the base of the exponential.
    n: () number of patterns; says nothing unless ``ok``.
    ok: () whether the theorem applies.
  """

  c: jax.Array
  n: jax.Array
  ok: jax.Array


def pattern_separation(patterns: jax.Array) -> jax.Array:
  r"""How much more similar each pattern is to itself than to any other.

  .. math:: \Delta_\mu = \xi_\mu \cdot \xi_\mu
    - \max_{\nu \ne \mu} \xi_\mu \cdot \xi_\nu

  With N patterns of norm at most m, a pattern is stored, and retrieved from
  nearby, if :math:`\Delta_\mu \ge \frac{2}{\beta N} + \frac1\beta \ln(2 (N - 1)
  N \beta m^2)`.

  Args:
    patterns: (M, d), floating.

  Returns:
    (M,) of the dtype of ``patterns``; infinite for a pattern alone.

  Raises:
    ValueError: if shape or dtype do not fit.

  Cost:
    2 M^2 d flops; no more than some 2^20 similarities at a time.

  Source:
    arXiv 2008.02217, equation 4 and theorem 5.

  Example:
    >>> import jax.numpy as jnp
    >>> print(pattern_separation(jnp.array([[2.0, 0.0], [1.0, 1.0]])))
    [2. 0.]
  """
  patterns = jnp.asarray(patterns)
  inputs.check_patterns(patterns)
  return _separation(patterns)


def retrieval_error_bound(
  x: jax.Array,
  patterns: jax.Array,
  mu: int | jax.Array,
  beta: float | jax.Array,
) -> RetrievalErrorBound:
  r"""Bounds the distance of one dense update from a pattern.

  .. math:: |T(x) - \xi_\mu| \le 2 m (1 - p_\mu)
    \le 2 m (M - 1) e^{-\beta (\xi_\mu \cdot x
      - \max_{\nu \ne \mu} \xi_\nu \cdot x)}

  with :math:`p = \mathrm{softmax}(\beta \Xi x)` and m the largest norm.

  Args:
    x: (..., d), floating.
    patterns: (M, d), of the same dtype.
    mu: index of the pattern: one, or (...,) of them; negative ones count from
      the end.
    beta: inverse temperature, > 0; may be traced.

  Returns:
    Both bounds, each (...,) of the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit, ``beta`` is not positive, or
      ``mu`` is no index.

  Cost:
    2 M d flops a query; no more than some 2^20 similarities at a time.

  Source:
    arXiv 2008.02217, theorem 4; the first bound is this project's.

  Example:
    >>> import jax.numpy as jnp
    >>> patterns = 2 * jnp.eye(3)
    >>> bound = retrieval_error_bound(patterns[0], patterns, 0, 1.0)
    >>> print(f"{bound.weight:.3f} {bound.gap:.3f}")
    0.141 0.147
  """
  x, patterns = inputs.check_query(x, patterns, beta)
  mu = jnp.asarray(mu)
  if not jnp.issubdtype(mu.dtype, jnp.integer):
    raise ValueError(f"mu must be integers, got dtype {mu.dtype}")
  if mu.ndim:
    _checks.check_shape("mu", mu, x.shape[:-1], "that of x without d")
  _checks.check_range("mu", mu, -len(patterns), len(patterns) - 1)
  return _error_bound(x, patterns, mu, beta)


def capacity_lower_bound(
  beta: float | jax.Array,
  norm_scale: float | jax.Array,
  dim: int,
  delta: float | jax.Array,
) -> CapacityBound:
  r"""Number of random patterns that can be stored: exponential in d.

  For patterns uniform on the sphere of radius :math:`K \sqrt{d - 1}`, with

  .. math::

    a = \frac{2}{d - 1} (1 + \ln(2 \beta K^2 p (d - 1))), \quad
    b = \frac{2 K^2 \beta}{5}, \quad c = \frac{b}{W_0(e^{a + \ln b})},

  if :math:`c \ge (2 / \sqrt p)^{4 / (d - 1)}` then with probability 1 - p at
  least :math:`N = \sqrt p\, c^{(d - 1) / 4}` of them can be.

  Args:
    beta: inverse temperature, > 0; a number or an array, may be traced.
    norm_scale: K > 0.
    dim: d >= 2.
    delta: p in (0, 1), probability of failure.

  Returns:
    c, N and whether the condition holds, in JAX's default floating dtype.

  Raises:
    ValueError: if an argument is out of range.

  Cost:
    O(1).

  Source:
    arXiv 2008.02217, theorem 3.

  Example:
    >>> bound = capacity_lower_bound(1.0, 3.0, 20, 0.001)
    >>> print(f"{bound.c:.4f} {bound.n:.2f} {bound.ok}")
    3.1546 7.41 True
  """
  _checks.check_positive("beta", beta)
  _checks.check_positive("norm_scale", norm_scale)
  _checks.check_integer("dim", dim, 2, None)
  _checks.check_range("delta", delta, 0, 1, closed=False)
  beta, scale, p = (jnp.asarray(x, float) for x in (beta, norm_scale, delta))
  power = 4 / (dim - 1)
  b = 2 * scale**2 * beta / 5
  a = power / 2 * (1 + jnp.log(2 * beta * scale**2 * p * (dim - 1)))
  z = b * jnp.exp(a)
  # W(z) = z up to z^2, also where that underflows.
  tiny = z < jnp.finfo(z.dtype).eps
  log_w = jnp.log(lambertw(jnp.where(tiny, 1, z)))
  log_c = jnp.where(tiny, -a, jnp.log(b) - log_w)
  n = jnp.exp(jnp.log(p) / 2 + log_c / power)
  ok = log_c >= power * (math.log(2) - jnp.log(p) / 2)
  return CapacityBound(jnp.exp(log_c), n, ok)


@jax.jit
def _separation(patterns: jax.Array) -> jax.Array:
  wide = patterns.astype(accumulator(patterns.dtype))

  def one(x: jax.Array, mu: jax.Array) -> jax.Array:
    similar = jnp.matmul(wide, x, precision=_HIGHEST)
    own = jnp.arange(len(wide)) == mu
    return similar[mu] - jnp.where(own, -jnp.inf, similar).max()

  gaps = rows.by_rows(one, len(wide), wide, jnp.arange(len(wide)))
  return gaps.astype(patterns.dtype)


@jax.jit
def _error_bound(
  x: jax.Array, patterns: jax.Array, mu: jax.Array, beta: Any
) -> RetrievalErrorBound:
  dtype = accumulator(x.dtype)
  keys = patterns.astype(dtype)
  beta, num = jnp.asarray(beta, dtype), len(keys)
  factor = 2 * jnp.sqrt(2 * half_largest_square(keys))
  mu = jnp.broadcast_to(mu % num, x.shape[:-1]).reshape(-1)

  def one(x: jax.Array, mu: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = beta * jnp.matmul(keys, x, precision=_HIGHEST)
    own = jnp.arange(num) == mu
    # The sum of the others: 1 - p would be rounded to 0.
    weight = jnp.where(own, 0, jax.nn.softmax(logits)).sum()
    gap = logits[mu] - jnp.where(own, -jnp.inf, logits).max()
    return factor * weight, factor * (num - 1) * jnp.exp(-gap)

  bounds = rows.by_rows(one, num, rows.flat(x).astype(dtype), mu)
  return RetrievalErrorBound(
    *(b.reshape(x.shape[:-1]).astype(x.dtype) for b in bounds)
  )
