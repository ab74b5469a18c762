"""Sums of many small terms that lose no digits."""

import jax
import jax.numpy as jnp

from jaxattn import _checks


def compensated_add(
  total: jax.Array, compensation: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  r"""Adds to a running sum and keeps what rounding takes from it.

  .. math:: y = x - c, \quad t = s + y, \quad c' = (t - s) - y, \quad s' = t

  The error of n terms is about one rounding of the result, where that of a
  plain running sum grows with n. The sum itself is ``total``; ``total -
  compensation``, in a wider dtype, has twice its digits. XLA keeps the order
  of the operations on CPUs, under ``jit`` as well.

  Args:
    total: s, the sum so far; floating.
    compensation: c, of the shape of s; zeros before the first term.
    x: what to add, of the shape of s.

  Returns:
    The new s and c, of the dtype of ``total``.

  Raises:
    ValueError: if shapes or dtypes differ, or are not floating.

  Cost:
    Four additions an entry.

  Source:
    W. Kahan, Communications of the ACM 8 (1965), page 40.

  Example:
    >>> import jax.numpy as jnp
    >>> total = compensation = jnp.float32(0)
    >>> plain = jnp.float32(0)
    >>> for x in [1.0] + [3e-8] * 100:
    ...   x = jnp.float32(x)
    ...   plain = plain + x
    ...   total, compensation = compensated_add(total, compensation, x)
    >>> print(f"{plain:.7f} {total:.7f}")
    1.0000000 1.0000030
  """
  arrays = tuple(map(jnp.asarray, (total, compensation, x)))
  total, compensation, x = arrays
  _checks.check_one_dtype(total=total, compensation=compensation, x=x)
  for name, y in (("compensation", compensation), ("x", x)):
    _checks.check_shape(name, y, total.shape, "shape of total")
  y = x - compensation
  new = total + y
  return new, (new - total) - y
