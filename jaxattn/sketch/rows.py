r"""Sampling of rows, and how many of them it takes.

With m rows drawn independently with probabilities :math:`p_i` and weighted by
:math:`1 / (m p_i)`, sums over rows are unbiased:
:math:`E \sum_t w_t a_{i_t} a_{i_t}^\top = A^\top A`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks


def row_sample(
  rng: jax.Array, prob: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
  r"""Draws rows with replacement.

  .. math:: P(i_t = i) = p_i, \qquad w_t = \frac{1}{m p_{i_t}}

  Args:
    rng: PRNG key. The same key and probabilities give the same rows.
    prob: (n,), non-negative; scaled to sum to 1.
    num_rows: m, rows to draw.

  Returns:
    Indices (m,) int32 and weights (m,). A row of probability 0 is never drawn.

  Raises:
    ValueError: if ``prob`` is no floating vector, is concrete and holds a
      negative number or only zeros, or ``num_rows`` is not positive.

  Cost:
    O(n + m log n).

  Source:
    a standard fact.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> prob = jnp.array([0.0, 0.25, 0.75])
    >>> indices, weights = row_sample(jax.random.key(0), prob, 1000)
    >>> int(indices.min()), round(float(weights.sum()), 1)
    (1, 2.0)
  """
  prob = _probabilities(prob)
  _checks.check_integer("num_rows", num_rows, 1, None)
  ends = lax.cummax(jnp.cumsum(prob))
  total = ends[-1]
  # In (0, total]: the first row whose end is at least that has p > 0.
  u = total * (1 - jax.random.uniform(rng, (num_rows,), prob.dtype))
  indices = jnp.searchsorted(ends, u).astype(jnp.int32)
  # A parallel sum may step, by its rounding, where the probability is 0.
  rows = jnp.arange(len(prob), dtype=jnp.int32)
  indices = lax.cummax(jnp.where(prob > 0, rows, 0))[
    jnp.minimum(indices, len(prob) - 1)
  ]
  return indices, total / (num_rows * prob[indices])


def row_sample_poisson(
  rng: jax.Array, prob: jax.Array
) -> tuple[jax.Array, jax.Array]:
  r"""Takes each row or leaves it, independently.

  .. math:: P(z_i = 1) = p_i, \qquad w_i = z_i / p_i

  Args:
    rng: PRNG key.
    prob: (n,) in [0, 1]; larger values count as 1.

  Returns:
    A boolean mask (n,) and weights (n,), 0 where the mask is False.

  Raises:
    ValueError: if ``prob`` is no floating vector, or is concrete and holds a
      negative number or only zeros.

  Cost:
    O(n).

  Source:
    a standard fact.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> mask, weights = row_sample_poisson(
    ...   jax.random.key(0), jnp.full(1000, 0.25)
    ... )
    >>> bool(200 < mask.sum() < 300), float(weights.max())
    (True, 4.0)
  """
  prob = jnp.minimum(_probabilities(prob), 1)
  mask = jax.random.uniform(rng, prob.shape, prob.dtype) < prob
  return mask, jnp.where(mask, 1 / jnp.where(mask, prob, 1), 0)


def chernoff_rows(
  dim: int, eps: float, delta: float, *, beta: float = 1.0
) -> int:
  r"""Rows that keep all quadratic forms within a factor.

  .. math:: m = \lceil 3 d \ln(2 d / \delta) / (\beta \varepsilon^2) \rceil

  rows drawn with :math:`p_i \ge \beta \tau_i / d`, :math:`\tau` the leverage
  scores, give :math:`(1 \pm \varepsilon)` with probability
  :math:`1 - \delta`. About four times as many as it takes.

  Args:
    dim: d, columns.
    eps: in (0, 1).
    delta: probability of failure, in (0, 1).
    beta: in (0, 1], how good the probabilities are.

  Returns:
    m.

  Raises:
    ValueError: if an argument is out of its range.

  Cost:
    O(1).

  Source:
    the matrix Chernoff bound.

  Example:
    >>> chernoff_rows(8, 0.5, 0.05)
    554
  """
  _checks.check_integer("dim", dim, 1, None)
  _checks.check_range("eps", eps, 0.0, 1.0, closed=False)
  _checks.check_range("delta", delta, 0.0, 1.0, closed=False)
  _checks.check_positive("beta", beta)
  _checks.check_range("beta", beta, 0.0, 1.0)
  return math.ceil(3 * dim * math.log(2 * dim / delta) / (beta * eps**2))


def _probabilities(prob: jax.Array) -> jax.Array:
  prob = jnp.asarray(prob)
  _checks.check_rank("prob", prob, 1)
  _checks.check_floating("prob", prob)
  _checks.check_nonnegative("prob", prob)
  if _checks.is_concrete(prob) and not np.asarray(prob).any():
    raise ValueError("prob must not be 0 everywhere")
  return prob
