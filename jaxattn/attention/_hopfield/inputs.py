"""What the functions of Hopfield memories refuse."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator


def check_query(
  x: Any, patterns: Any, beta: Any
) -> tuple[jax.Array, jax.Array]:
  x, patterns = jnp.asarray(x), jnp.asarray(patterns)
  check_patterns(patterns)
  _checks.check_one_dtype(x=x, patterns=patterns)
  check_dim(x, patterns.shape[1])
  check_beta(beta)
  return x, patterns


def check_patterns(patterns: jax.Array) -> None:
  if patterns.ndim != 2:
    raise ValueError(f"patterns must be (M, d), got shape {patterns.shape}")
  _checks.check_floating("patterns", patterns)
  if not patterns.size:
    raise ValueError(f"patterns must not be empty, got shape {patterns.shape}")


def check_dim(x: jax.Array, dim: int) -> None:
  if x.ndim == 0:
    raise ValueError("x must have shape (..., d), got a scalar")
  if x.shape[-1] != dim:
    raise ValueError(f"query dim {x.shape[-1]} != pattern dim {dim}")
  if not x.size:
    raise ValueError(f"x must not be empty, got shape {x.shape}")


def check_beta(beta: Any) -> None:
  _checks.check_scalar("beta", beta)
  _checks.check_positive("beta", beta)
  if _checks.is_concrete(beta) and not math.isfinite(float(beta)):
    raise ValueError(
      f"beta must be finite, got {beta}: the limit is topk_attention with k=1"
    )


def check_dtype(name: str, x: jax.Array, dtype: Any) -> None:
  """Raises unless ``x`` is accumulated in ``dtype``, which a state has."""
  _checks.check_floating(name, x)
  if accumulator(x.dtype) != dtype:
    raise ValueError(
      f"{name} must have a dtype that is accumulated in that of the state, "
      f"{dtype}, got {x.dtype}"
    )


def check_values(values: jax.Array, patterns: jax.Array) -> None:
  _checks.check_one_dtype(patterns=patterns, values=values)
  _checks.check_shape("values", values, (len(patterns), None), "(M, Hv)")
