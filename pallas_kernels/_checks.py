"""Checks that operations have in common; they raise what users see."""

from typing import Any

import jax
import jax.numpy as jnp


def check_implementation(implementation: str, known: tuple[str, ...]) -> None:
  """Refuses all but the ``known`` names.

  Raises:
    ValueError: naming those.
  """
  if implementation not in known:
    raise ValueError(
      f"implementation must be one of {known}, got {implementation!r}"
    )


def check_heads(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  names: tuple[str, str] = ("key", "value"),
) -> None:
  """Refuses all but (B, T, N, H), (B, S, K, H) and (B, S, K, Hv), K dividing N.

  Args:
    query: floating.
    key: of the dtype of ``query``.
    value: of the dtype of ``query``.
    names: what users call key and value.

  Raises:
    ValueError: naming the argument, what came and what was expected.
  """
  key_name, value_name = names
  for name, x in (("query", query), (key_name, key), (value_name, value)):
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f"{name} must be floating of 4 dimensions, got {x.dtype} {x.shape}"
      )
    if 0 in x.shape:
      raise ValueError(f"{name} must hold numbers, got shape {x.shape}")
    if x.dtype != query.dtype:
      raise ValueError(
        f"query, {key_name} and {value_name} must have one dtype, got {name} "
        f"of {x.dtype} and query of {query.dtype}"
      )
  b, _, n, h = query.shape
  s, k = key.shape[1:3]
  if key.shape != (b, s, k, h):
    raise ValueError(
      f"{key_name} must have shape {(b, s, k, h)}, got {key.shape}"
    )
  if value.shape[:3] != (b, s, k):
    raise ValueError(
      f"{value_name} must have shape {(b, s, k)} + Hv, got {value.shape}"
    )
  if n % k:
    raise ValueError(
      f"the {k} heads of {key_name} must divide the {n} of query"
    )


def check_scores(
  query: jax.Array, key: jax.Array, *, bias: Any = None, mask: Any = None
) -> None:
  """Refuses what does not broadcast to (B, N, T, S), and masks not boolean.

  Args:
    query: (B, T, N, H).
    key: (B, S, K, H).
    bias: None or an array.
    mask: None or an array.

  Raises:
    ValueError: naming the argument, what came and what was expected.
  """
  b, t, n, _ = query.shape
  sizes = b, n, t, key.shape[1]
  for name, x in (("bias", bias), ("mask", mask)):
    if x is not None and (
      x.ndim != 4 or any(a not in (1, z) for a, z in zip(x.shape, sizes))
    ):
      raise ValueError(
        f"{name} must have 4 dimensions, each 1 or that of {sizes}, got "
        f"{x.shape}"
      )
  if mask is not None and mask.dtype != jnp.bool_:
    raise ValueError(f"mask must be boolean, got {mask.dtype}")
