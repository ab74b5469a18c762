r"""Sampling of rows, and how many of them it takes.

With m rows drawn independently with probabilities :math:`p_i` and weighted by
:math:`w = 1 / (m p_i)`, sums over rows are unbiased:
:math:`E \sum_t w_t a_{i_t} a_{i_t}^\top = A^\top A`. The weights are those of
squares, and of any other sum over rows: a sampled matrix S with
:math:`E\, S^\top S = A^\top A` has the rows :math:`\sqrt{w_t}\, a_{i_t}`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks
from jaxattn.numerics import _dtypes


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
    Indices (m,) int32 and weights (m,), by which terms of a sum over rows are
    multiplied; a row itself by the square root. A row of probability 0 is never
    drawn. Probabilities are met to some 2^-23 / sqrt(n) in float32.

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
  wide = prob.astype(_dtypes.accumulator(prob.dtype))
  # One uniform number has too few bits for 1e6 rows and more, and one running
  # sum drops what is small: first a block of rows is drawn, then one of them.
  size = 1 << math.ceil(math.log2(len(wide)) / 2)
  blocks = jnp.pad(wide, (0, -len(wide) % size)).reshape(-1, size)
  totals = blocks.sum(1)
  rng_block, rng_row = jax.random.split(rng)
  first = jnp.zeros(num_rows, jnp.int32)
  block = _draw(rng_block, totals[None], first)
  indices = size * block + _draw(rng_row, blocks, block)
  weights = totals.sum() / (num_rows * wide[indices])
  return indices, weights.astype(prob.dtype)


def row_sample_poisson(
  rng: jax.Array, prob: jax.Array
) -> tuple[jax.Array, jax.Array]:
  r"""Takes each row or leaves it, independently.

  .. math:: P(z_i = 1) = p_i, \qquad w_i = z_i / p_i

  Args:
    rng: PRNG key.
    prob: (n,) in [0, 1]; larger values count as 1.

  Returns:
    A boolean mask (n,) and weights (n,), 0 where the mask is False; of terms of
    a sum, as those of :func:`row_sample`.

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
  wide = prob.astype(_dtypes.accumulator(prob.dtype))
  # Multiples of a unit of rounding would take the rarest rows far too often.
  coarse, fine = jax.random.uniform(rng, (2, len(wide)), wide.dtype)
  u = coarse + jnp.finfo(wide.dtype).eps * fine
  mask = (u < wide) | (wide == 1)
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


def _draw(rng: jax.Array, prob: jax.Array, of: jax.Array) -> jax.Array:
  """Columns (m,) of the rows ``of`` (m,) of (k, s) unscaled probabilities."""
  ends = lax.cummax(jnp.cumsum(prob, 1), 1)
  # In (0, total]: the first column whose end is at least that has p > 0.
  u = ends[of, -1] * (1 - jax.random.uniform(rng, of.shape, prob.dtype))
  count, last = jnp.zeros_like(of), prob.shape[1] - 1
  # How many ends are below u, by bisection: a gather of rows would be large.
  for bit in reversed(range(last.bit_length())):
    more = count + (1 << bit)
    below = ends[of, jnp.minimum(more, last) - 1] < u
    count = jnp.where((more <= last) & below, more, count)
  # A parallel sum may step, by its rounding, where the probability is 0.
  columns = jnp.arange(prob.shape[1], dtype=jnp.int32)[None]
  return lax.cummax(jnp.where(prob > 0, columns, 0), 1)[of, count]


def _probabilities(prob: jax.Array) -> jax.Array:
  prob = jnp.asarray(prob)
  _checks.check_rank("prob", prob, 1)
  _checks.check_floating("prob", prob)
  _checks.check_nonnegative("prob", prob)
  if _checks.is_concrete(prob) and not np.asarray(prob).any():
    raise ValueError("prob must not be 0 everywhere")
  return prob
