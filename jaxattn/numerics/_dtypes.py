"""Which dtype sums are kept in."""

from typing import Any

import jax.numpy as jnp


def accumulator(dtype: Any) -> Any:
  """The dtype of logits and sums for inputs of ``dtype``: 32 bits or more."""
  # Not jnp.promote_types: under strict promotion it refuses to mix dtypes.
  return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)
