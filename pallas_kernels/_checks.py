"""Checks that operations have in common; they raise what users see."""

import jax
import jax.numpy as jnp


def check_heads(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
  """Refuses all but (B, T, N, H), (B, S, K, H) and (B, S, K, Hv), K dividing N.

  Args:
    query: floating.
    key: of the dtype of ``query``.
    value: of the dtype of ``query``.

  Raises:
    ValueError: naming the argument, what came and what was expected.
  """
  for name, x in (("query", query), ("key", key), ("value", value)):
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f"{name} must be floating of 4 dimensions, got {x.dtype} {x.shape}"
      )
    if x.dtype != query.dtype:
      raise ValueError(
        f"query, key and value must have one dtype, got {name} of {x.dtype} "
        f"and query of {query.dtype}"
      )
  b, _, n, h = query.shape
  s, k = key.shape[1:3]
  if key.shape != (b, s, k, h):
    raise ValueError(f"key must have shape {(b, s, k, h)}, got {key.shape}")
  if value.shape[:3] != (b, s, k):
    raise ValueError(
      f"value must have shape {(b, s, k)} + Hv, got {value.shape}"
    )
  if n % k:
    raise ValueError(f"the {k} heads of key must divide the {n} of query")
