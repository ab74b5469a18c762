r"""Least squares behind ``fit_prefix_state``, for one key head.

A query with features :math:`\phi_i`, context output :math:`c_i`, log-sum-exp
:math:`l_i` and target :math:`o_i` asks for

.. math::

  w_i Z^\top \phi_i - o_i\, w_i k^\top \phi_i = w_i e^{l_i} (o_i - c_i),

linear in (Z, k), and if the sum :math:`p_i` over the prefix is known also for
:math:`w_i k^\top \phi_i = w_i p_i`. The weight :math:`w_i` is one over the
denominator, as far as that is known: residuals are then errors of the output.
All columns of Z share one matrix, so that they are eliminated by one QR
factorization; what is left is a problem in k alone, whose rows are folded
column by column of the values into a triangle of size r + 1.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

_HIGHEST = lax.Precision.HIGHEST
# Numbers in the rows that are folded at a time: few factorizations of tall
# matrices are quicker than many of small ones.
_BLOCK = 1 << 22


def fit_head(
  phi: jax.Array,
  target: jax.Array,
  context: jax.Array,
  lse: jax.Array,
  log_mass: jax.Array | None,
  ridge: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Ridge solution of one head.

  Args:
    phi: (R, r) features of the queries.
    target: (R, Hv) wanted outputs.
    context: (R, Hv) outputs of attention to the context alone.
    lse: (R,) its log-sum-exp.
    log_mass: (R,) logarithm of the wanted sum over the prefix, or None.
    ridge: factor on half the sum of squares of all unknowns, in units of the
      mean of the sums of squares of the weighted features.

  Returns:
    z (r, Hv) and k (r,).
  """
  r = phi.shape[1]
  log_total = jnp.maximum(lse, 0)
  if log_mass is not None:
    log_total = jnp.logaddexp(lse, log_mass)
  phi = jnp.exp(-log_total)[:, None] * phi
  wanted = jnp.exp(lse - log_total)[:, None] * (target - context)
  # The weights shrink like 1 / m for long prefixes, which a number of its own
  # would outweigh.
  damping = jnp.sqrt(ridge * (phi**2).sum() / r) * jnp.eye(r, dtype=phi.dtype)
  q, triangle = jnp.linalg.qr(jnp.concatenate((phi, damping)))

  def rest(x: jax.Array) -> jax.Array:
    """What z cannot explain of (R, ...) right-hand sides."""
    x = jnp.concatenate((x, jnp.zeros((r, *x.shape[1:]), x.dtype)))
    return x - _dot(q, _dot(q.T, x))

  def fold(kept: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.linalg.qr(jnp.concatenate((kept, rows)), mode="r")

  def some_columns(
    kept: jax.Array, columns: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    o, y = (x.T[..., None] for x in columns)
    rows = rest(jnp.concatenate((o * phi[:, None], -y), -1))
    return fold(kept, rows.reshape(-1, r + 1)), None

  # Starts as the damping of k.
  kept = jnp.pad(damping, ((0, 1), (0, 1)))
  if log_mass is not None:
    mass = jnp.exp(log_mass - log_total)[:, None]
    kept = fold(kept, jnp.concatenate((phi, mass), 1))
  groups = _groups(target, q.size), _groups(wanted, q.size)
  kept, _ = lax.scan(some_columns, kept, groups)
  k = solve_triangular(kept[:r, :r], kept[:r, r])
  known = wanted + target * _dot(phi, k)[:, None]
  z = solve_triangular(triangle, _dot(q[: len(phi)].T, known))
  return z, k


def _groups(x: jax.Array, size: int) -> jax.Array:
  """(R, Hv) columns as (groups, columns of a group, R), filled up with 0."""
  columns = x.shape[1]
  num = -(-columns * size // _BLOCK)
  width = -(-columns // num)
  x = jnp.pad(x, ((0, 0), (0, width * num - columns)))
  return x.T.reshape(num, width, -1)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.tensordot(a, b, 1, precision=_HIGHEST)
