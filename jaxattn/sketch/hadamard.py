r"""Walsh-Hadamard transforms.

.. math:: H_1 = 1, \qquad H_{2n} = \begin{pmatrix} H_n & H_n \\ H_n & -H_n
  \end{pmatrix}

so that entry (i, j) is -1 to the number of ones that i and j have in common,
in binary. Since :math:`H_{ab} = H_a \otimes H_b`, a transform of length
:math:`32^k` is k products with one matrix of 32 columns.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator

__all__ = ["fwht", "pad_to_pow2"]

# One product with the whole matrix up to the first length; products with
# matrices of _FACTOR up to the second; above it additions, two by two.
_DENSE, _FACTORED, _FACTOR = 128, 1 << 17, 32


def fwht(x: jax.Array, axis: int = -1, *, normalize: bool = False) -> jax.Array:
  r"""The product with a Walsh-Hadamard matrix, along one axis.

  .. math:: y = H_n x, \qquad H_n H_n = n I

  Args:
    x: floating; the axis has a length n that is a power of two.
    axis: which.
    normalize: divides by the root of n, so that the map is orthogonal.

  Returns:
    An array of the shape and dtype of ``x``; 16-bit inputs are added up in
    float32.

  Raises:
    ValueError: if the length is no power of two, the dtype is not floating, or
      there is no such axis.

  Cost:
    O(n log n) a vector; up to n = 2^17 as O(n) times 32 multiply-adds for each
    factor of 32, which matrix units make faster.

  Source:
    a standard fact.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sketch import fwht
    >>> print(fwht(jnp.array([1.0, 2.0, 3.0, 4.0])))
    [10. -2. -4.  0.]
  """
  x = jnp.asarray(x)
  _checks.check_floating("x", x)
  _checks.check_integer("axis", axis, -x.ndim, x.ndim - 1)
  n = x.shape[axis]
  if n < 1 or n & (n - 1):
    raise ValueError(f"fwht length must be a power of two, got {n}")
  return _fwht(x, axis=axis, normalize=bool(normalize))


def pad_to_pow2(x: jax.Array, axis: int = -1) -> jax.Array:
  """Zeros after the end of an axis, up to the next power of two.

  Args:
    x: an array.
    axis: which.

  Returns:
    ``x`` with an axis of length 1, 2, 4, 8, ...

  Raises:
    ValueError: if there is no such axis, or it is empty.

  Cost:
    One copy; none where the length is a power of two.

  Source:
    a standard fact.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sketch import pad_to_pow2
    >>> print(pad_to_pow2(jnp.array([1.0, 2.0, 3.0])))
    [1. 2. 3. 0.]
  """
  x = jnp.asarray(x)
  _checks.check_integer("axis", axis, -x.ndim, x.ndim - 1)
  n = x.shape[axis]
  if n < 1:
    raise ValueError(f"x must not be empty along axis {axis}, got {x.shape}")
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, (1 << (n - 1).bit_length()) - n)
  return jnp.pad(x, widths) if widths[axis][1] else x


@functools.partial(jax.jit, static_argnames=("axis", "normalize"))
def _fwht(x: jax.Array, *, axis: int, normalize: bool) -> jax.Array:
  n = x.shape[axis]
  y = jnp.moveaxis(x, axis, -1).astype(accumulator(x.dtype))
  if n <= _DENSE:
    y = y @ _matrix(n, y.dtype)
  else:
    y = _by_factors(y, _FACTOR if n <= _FACTORED else 2)
  if normalize:
    y = y / math.sqrt(n)
  return jnp.moveaxis(y, -1, axis).astype(x.dtype)


def _by_factors(x: jax.Array, factor: int) -> jax.Array:
  """One pass a factor of the length: each turns the digits of the index."""
  n = left = x.shape[-1]
  y = x
  while left > 1:
    size = min(factor, left)
    left //= size
    # The last digit is transformed and becomes the first: after all of them
    # the order is the old one.
    digits = y.reshape(*x.shape[:-1], n // size, size)
    if size == 2:
      low, high = digits[..., 0], digits[..., 1]
      y = jnp.stack([low + high, low - high], axis=-2)
    else:
      y = jnp.swapaxes(digits @ _matrix(size, x.dtype), -1, -2)
    y = y.reshape(x.shape)
  return y


def _matrix(n: int, dtype: jnp.dtype) -> jax.Array:
  matrix = np.ones((1, 1), np.int8)
  while len(matrix) < n:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  return jnp.asarray(matrix, dtype)
