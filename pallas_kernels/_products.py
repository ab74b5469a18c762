"""Products of matrices inside of kernels: their axes, dtypes and precision."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Axes that a product contracts.
LAST = (1,), (1,)  # (m, h), (n, h) -> (m, n)
FIRST = (0,), (0,)  # (h, m), (h, n) -> (m, n)
MIDDLE = (1,), (0,)  # (m, h), (h, n) -> (m, n)


def accumulator(dtype: Any) -> Any:
  """The dtype that sums are kept in: float64 for itself, float32 for others."""
  return jnp.float64 if dtype == jnp.float64 else jnp.float32


def dot(
  a: jax.Array, b: jax.Array, contract: Any, precision: Any = None
) -> jax.Array:
  """A product of two matrices, in the accumulator's dtype."""
  return lax.dot_general(
    a, b, (contract, ((), ())), precision=precision,
    preferred_element_type=accumulator(a.dtype),
  )  # fmt: skip


def precision_of(asked: Any) -> lax.Precision | None:
  """The one precision that a kernel is asked for; None = the default."""
  asked = asked if isinstance(asked, tuple | list) else (asked,)
  names = {None if p is None else lax.Precision(p) for p in asked}
  return names.pop() if len(names) == 1 else None


def tpu_reason(dtype: Any, dtypes: tuple[Any, ...], asked: Any) -> str | None:
  """Why a TPU kernel cannot multiply so; None if it can.

  Args:
    dtype: of the operands.
    dtypes: those that the kernel takes.
    asked: precision, as users give it.
  """
  if dtype not in dtypes:
    names = " or ".join(jnp.dtype(d).name for d in dtypes)
    return f"the TPU kernel takes {names}, got {dtype}"
  default, highest = lax.Precision.DEFAULT, lax.Precision.HIGHEST
  if precision_of(asked) not in (None, default, highest):
    return (
      "the TPU kernel multiplies with precision None, 'default' or 'highest', "
      f"got {asked!r}"
    )
  return None
