"""What sums of weights are relative to, on every platform."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def reciprocal(top: jax.Array, before: jax.Array | None = None) -> jax.Array:
  """A power of two in (1 / (2 top), 1 / top]; over that of ``before``.

  Of numbers >= 0. It is finite and not 0: for the smallest and the largest
  numbers, the nearest one that is.
  """
  bits = {4: jnp.int32, 8: jnp.int64}[top.dtype.itemsize]
  info = jnp.finfo(top.dtype)
  one = np.array((1 << (info.nexp - 1)) - 1, bits)
  shift = np.array(info.nmant, bits)

  def exponent(x: jax.Array) -> jax.Array:
    found = lax.shift_right_logical(lax.bitcast_convert_type(x, bits), shift)
    return jnp.maximum(2 * one - 1 - found, np.array(1, bits))

  result = exponent(top)
  if before is not None:
    result = jnp.maximum(one + result - exponent(before), np.array(0, bits))
  return lax.bitcast_convert_type(lax.shift_left(result, shift), top.dtype)


def inverse_and_delta(
  alpha: int, out: Any, norm: Any, out_bar: Any, norm_bar: Any
) -> tuple[jax.Array, jax.Array]:
  """1 / norm, and what the cotangent of a weight is less than that of values.

  Both (B, T, N), of the norm's dtype.
  """
  dtype = norm.dtype
  delta = (out_bar.astype(dtype) * out.astype(dtype)).sum(-1)
  delta -= norm_bar.astype(dtype) * norm / alpha
  # Nothing passes where the norm is 0: any finite inverse will do.
  inverse = jnp.where(norm == 0, 0, 1 / jnp.where(norm == 0, 1, norm))
  return inverse, delta
