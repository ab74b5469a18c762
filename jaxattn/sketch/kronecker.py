r"""Products of two matrices column by column, and row by row.

For matrices with as many columns, :math:`A \oslash B` (Khatri-Rao) holds the
Kronecker products of their columns; for matrices with as many rows,
:math:`A \ominus B` (face-splitting) those of their rows. With the Kronecker
product :math:`\otimes` and the entrywise one :math:`\circ`,

.. math::

  (A \otimes B) (C \oslash D) &= (A C) \oslash (B D), \\
  (A \oslash B)^\top (C \oslash D) &= (A^\top C) \circ (B^\top D), \\
  (A \oslash B) \ominus (C \oslash D) &= (A \ominus C) \oslash (B \ominus D).

The second is why attention over pairs of tokens has a linear-time form: a sum
over all pairs is a product of two sums over tokens. Sources: arXiv 2310.04064,
arXiv 2405.16411.
"""

import jax
import jax.numpy as jnp

from jaxattn import _checks


def khatri_rao(a: jax.Array, b: jax.Array) -> jax.Array:
  r"""Kronecker products of the columns of two matrices.

  .. math:: (A \oslash B)_{(i, j), c} = A_{ic} B_{jc}

  Args:
    a: (n, d), floating.
    b: (m, d), of the same dtype.

  Returns:
    (n m, d); row i m + j is the product of row i and row j, as in
    ``scipy.linalg.khatri_rao``.

  Raises:
    ValueError: if these are no two floating matrices of one dtype with as many
      columns.

  Cost:
    n m d products.

  Source:
    arXiv 2310.04064.

  Example:
    >>> import jax.numpy as jnp
    >>> a = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> print(khatri_rao(a, a)[1])
    [3. 8.]
  """
  a, b = _matrices(a, b)
  _checks.check_shape("b", b, (None, a.shape[1]), "columns of a")
  return (a[:, None] * b[None]).reshape(-1, a.shape[1])


def face_splitting(a: jax.Array, b: jax.Array) -> jax.Array:
  r"""Kronecker products of the rows of two matrices.

  .. math:: (A \ominus B)_{i, (c, e)} = A_{ic} B_{ie}

  Args:
    a: (n, d1), floating.
    b: (n, d2), of the same dtype.

  Returns:
    (n, d1 d2); column c d2 + e is the product of columns c and e.

  Raises:
    ValueError: if these are no two floating matrices of one dtype with as many
      rows.

  Cost:
    n d1 d2 products.

  Source:
    arXiv 2405.16411.

  Example:
    >>> import jax.numpy as jnp
    >>> a = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> print(face_splitting(a, a)[1])
    [ 9. 12. 12. 16.]
  """
  a, b = _matrices(a, b)
  _checks.check_shape("b", b, (a.shape[0], None), "rows of a")
  return (a[:, :, None] * b[:, None]).reshape(a.shape[0], -1)


def _matrices(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  a, b = jnp.asarray(a), jnp.asarray(b)
  _checks.check_rank("a", a, 2)
  _checks.check_rank("b", b, 2)
  _checks.check_one_dtype(a=a, b=b)
  return a, b
