r"""Leverage scores: how much a row is needed to span the others.

.. math:: \tau_i = a_i^\top (A^\top A)^+ a_i = \|Q_i\|^2

with Q an orthonormal basis of the columns of A; they lie in [0, 1] and sum to
the rank. Derivatives of them, and of barriers that are weighted by them, need
products with the squares of the entries of :math:`P = Q Q^\top`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.scipy import linalg

from jaxattn import _checks
from jaxattn.numerics import _dtypes
from jaxattn.numerics.linalg import above_rounding

__all__ = ["hadamard_square_matvec", "leverage_scores"]

# Buckets of the sketch for each pair of columns, and columns of the projection.
_BUCKETS, _PROJECTION = 4, 16


def leverage_scores(
  a: jax.Array, *, method: str = "qr", rng: jax.Array | None = None
) -> jax.Array:
  r"""Leverage scores of the rows of a matrix.

  Directions whose singular value is below rounding, relative to the largest
  one, are dropped, so that duplicate, zero and constant columns do no harm.

  Args:
    a: (n, d), floating.
    method: ``"qr"``, exact, by an orthonormal basis; ``"cholesky"``, faster and
      exact where A is well conditioned: the error is about the square of the
      condition number times rounding, and a singular A gives NaN;
      ``"sketch"``, within some ten percent for up to 16 columns and within a
      factor of about 2 for more, in less than O(n d^2); exact, as ``"qr"``, for
      up to 4 d^2 rows.
    rng: PRNG key, for ``"sketch"`` only.

  Returns:
    (n,), summing to the rank of A; for ``"sketch"`` about that.

  Raises:
    ValueError: if ``a`` is no floating matrix, or ``method`` and ``rng`` do not
      fit.

  Cost:
    O(n d^2); for ``"sketch"`` O(n d min(d, 16) + d^4). 16-bit inputs are
    computed with in float32.

  Source:
    Drineas et al., arXiv 1109.3843, for the approximate ones.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sketch import leverage_scores
    >>> a = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> print(leverage_scores(a).round(3))
    [0.5 0.5 1. ]
  """
  a = jnp.asarray(a)
  _checks.check_rank("a", a, 2)
  _checks.check_floating("a", a)
  _checks.check_choice("method", method, ("qr", "cholesky", "sketch"))
  if method != "sketch" and rng is not None:
    raise ValueError(f"rng must be None with method={method!r}")
  if method == "sketch" and rng is None:
    raise ValueError("rng is required with method='sketch'")
  wide = a.astype(_dtypes.accumulator(a.dtype))
  return _leverage_scores(wide, rng, method).astype(a.dtype)


@jax.jit
def hadamard_square_matvec(q: jax.Array, t: jax.Array) -> jax.Array:
  r"""The product of a vector with the squared entries of Q Q^T.

  .. math:: (P \circ P)\, t = \operatorname{rowsum}\big(
    (Q\, (Q^\top \operatorname{diag}(t)\, Q)) \circ Q \big), \qquad P = Q Q^\top

  No (n, n) matrix is formed. With orthonormal columns :math:`P \circ P` has the
  leverage scores :math:`\sigma` as its row sums, and
  :math:`\operatorname{diag}(\sigma) - P \circ P` is a Laplacian.

  Args:
    q: (n, d), floating; its columns need not be orthonormal.
    t: (n,), floating.

  Returns:
    (n,).

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(n d^2) time, O(n d) memory.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sketch import hadamard_square_matvec
    >>> q = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    >>> print(hadamard_square_matvec(q, jnp.ones(2)))
    [29.  5.]
  """
  _checks.check_rank("q", q, 2)
  _checks.check_floating("q", q)
  _checks.check_shape("t", t, (len(q),), "(n,)")
  _checks.check_floating("t", t)
  return ((q @ (q.T @ (t[:, None] * q))) * q).sum(1)


@functools.partial(jax.jit, static_argnames="method")
def _leverage_scores(
  a: jax.Array, rng: jax.Array | None, method: str
) -> jax.Array:
  n, d = a.shape
  num = _BUCKETS * d * d
  # With as many buckets as rows a sketch saves nothing, and loses rank.
  if method == "qr" or (method == "sketch" and n <= num):
    # Of the triangle, not of A: the same singular values, and d x d.
    q, r = jnp.linalg.qr(a)
    u, sizes, _ = jnp.linalg.svd(r, full_matrices=False)
    return jnp.clip(((q @ u) ** 2 * above_rounding(sizes)[None]).sum(1), 0, 1)
  if method == "cholesky":
    factor = jnp.linalg.cholesky(a.T @ a)
    rows = linalg.solve_triangular(factor, a.T, lower=True)
    return jnp.clip((rows**2).sum(0), 0, 1)
  assert rng is not None
  rng_bucket, rng_sign, rng_draw = jax.random.split(rng, 3)
  bucket = jax.random.randint(rng_bucket, (n,), 0, num)
  sign = jax.random.rademacher(rng_sign, (n,), a.dtype)
  sketched = jax.ops.segment_sum(sign[:, None] * a, bucket, num_segments=num)
  _, sizes, v = jnp.linalg.svd(sketched, full_matrices=False)
  kept = above_rounding(sizes)
  inverse = v.T * jnp.where(kept, 1 / jnp.where(kept, sizes, 1), 0)[None]
  width = inverse.shape[1]
  # Fewer columns than the projection has are cheaper, and more accurate, as is.
  if width > _PROJECTION:
    draw = jax.random.normal(rng_draw, (width, _PROJECTION), a.dtype)
    inverse = inverse @ (draw / _PROJECTION**0.5)
  return ((a @ inverse) ** 2).sum(1)
