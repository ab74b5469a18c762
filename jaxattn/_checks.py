"""Argument validation: every ValueError that a user sees is worded here.

Shapes, dtypes and static arguments are known while tracing, so they are always
checked. Values are looked at only where :func:`is_concrete` says that there are
any: no check ever waits for a device under ``jit``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


class AttentionShapes(NamedTuple):
  """Sizes of one attention call, as :func:`check_attention` read them.

  Attributes:
    batch: tuple of leading dimensions: ``()`` or ``(B,)``.
    query_length: T, number of queries.
    key_length: S, number of keys.
    num_heads: N, number of query heads.
    num_kv_heads: K, number of key and value heads; divides N.
    head_dim: H, size of a query or key vector.
    value_dim: Hv, size of a value vector.
  """

  batch: tuple[int, ...]
  query_length: int
  key_length: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  value_dim: int


def is_concrete(x: Any) -> bool:
  """Says whether the values of ``x`` can be read (it is not being traced)."""
  return not isinstance(x, jax.core.Tracer)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
  """Raises unless ``value`` is one of ``choices``."""
  if not any(
    value is c or (type(value) is type(c) and value == c) for c in choices
  ):
    listed = ", ".join(repr(c) for c in choices)
    raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def check_rank(name: str, x: Any, ranks: int | Sequence[int]) -> None:
  """Raises unless the array ``x`` has one of the ``ranks``."""
  ranks = (ranks,) if isinstance(ranks, int) else tuple(ranks)
  if jnp.ndim(x) not in ranks:
    expected = " or ".join(str(r) for r in ranks)
    raise ValueError(
      f"{name} must have {expected} dimensions, got shape {jnp.shape(x)}"
    )


def check_shape(
  name: str, x: Any, shape: Sequence[int | None], meaning: str = ""
) -> None:
  """Raises unless ``x`` has ``shape``, in which None stands for any size."""
  got = jnp.shape(x)
  fits = len(got) == len(shape) and all(
    want is None or want == have for want, have in zip(shape, got, strict=True)
  )
  if not fits:
    sizes = ["*" if s is None else str(s) for s in shape]
    want = f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"
    note = f" = {meaning}" if meaning else ""
    raise ValueError(f"{name} must have shape {want}{note}, got {got}")


def check_positive(name: str, value: Any) -> None:
  """Raises unless a concrete number or array is positive everywhere."""
  if is_concrete(value) and not np.all(np.asarray(value) > 0):
    raise ValueError(f"{name} must be positive, got {value}")


def check_nonnegative(name: str, value: Any) -> None:
  """Raises unless a concrete number or array is non-negative everywhere."""
  if is_concrete(value) and not np.all(np.asarray(value) >= 0):
    raise ValueError(f"{name} must be non-negative, got {value}")


def check_range(
  name: str, value: Any, low: float, high: float, *, closed: bool = True
) -> None:
  """Raises unless a concrete value lies in [low, high], or in (low, high)."""
  if not is_concrete(value):
    return
  x = np.asarray(value)
  inside = (x >= low) & (x <= high) if closed else (x > low) & (x < high)
  if not np.all(inside):
    interval = f"[{low}, {high}]" if closed else f"({low}, {high})"
    raise ValueError(f"{name} must be in {interval}, got {value}")


def check_integer(name: str, value: Any, low: int, high: int | None) -> None:
  """Raises unless ``value`` is a Python integer in [low, high]."""
  is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
  if not is_int or value < low or (high is not None and value > high):
    interval = f"in [{low}, {high}]" if high is not None else f">= {low}"
    kind = "" if is_int else "an integer "
    raise ValueError(f"{name} must be {kind}{interval}, got {value!r}")


def check_scalar(name: str, x: Any) -> None:
  """Raises unless ``x`` is a real number, or an array that holds one."""
  is_array = isinstance(x, (np.ndarray, np.generic, jax.Array))
  is_real = is_array and not jnp.issubdtype(x.dtype, jnp.complexfloating)
  if not (is_real and x.ndim == 0) and not isinstance(x, (int, float)):
    raise ValueError(f"{name} must be a real scalar, got {x!r}")


def check_floating(name: str, x: Any) -> None:
  """Raises unless ``x`` is an array of a real floating dtype."""
  dtype = jnp.result_type(x)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"{name} must have a floating dtype, got {dtype}")


def check_one_dtype(**arrays: Any) -> None:
  """Raises unless all arrays have the floating dtype of the first."""
  first, *_ = arrays
  for name, x in arrays.items():
    check_floating(name, x)
    if x.dtype != arrays[first].dtype:
      raise ValueError(
        f"all arrays must have one dtype, got {name} of {x.dtype} and {first} "
        f"of {arrays[first].dtype}"
      )


def check_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  key_mask: jax.Array | None = None,
  names: tuple[str, str, str] = ("key", "value", "key_mask"),
) -> AttentionShapes:
  """Checks the layout that all attention functions share, and reads its sizes.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch.
    key: (B, S, K, H); K divides N.
    value: (B, S, K, Hv).
    bias: floating, broadcastable to (B, N, T, S).
    mask: boolean, broadcastable to (B, N, T, S); True = attend.
    key_mask: boolean (B, S); True = attend.
    names: what the caller calls its keys, their values and their mask.

  Returns:
    The sizes as :class:`AttentionShapes`.

  Raises:
    ValueError: if ranks, sizes or dtypes do not fit; the message names the
      argument, what came and what was expected.
  """
  key_name, value_name, mask_name = names
  for name, x in (("query", query), (key_name, key), (value_name, value)):
    check_rank(name, x, (3, 4))
    check_floating(name, x)
    if x.dtype != query.dtype:
      raise ValueError(
        f"query, {key_name} and {value_name} must have one dtype, got {name} "
        f"of {x.dtype} and query of {query.dtype}"
      )
    if 0 in x.shape:
      raise ValueError(f"{name} must not be empty, got shape {x.shape}")
  *batch, t, n, h = query.shape
  layout = "(B, S, K, H)" if batch else "(S, K, H)"
  check_shape(key_name, key, (*batch, None, None, h), layout)
  s, k = key.shape[-3:-1]
  check_shape(value_name, value, (*batch, s, k, None), layout[:-2] + "Hv)")
  if n % k:
    raise ValueError(
      f"the {k} heads of {key_name} and {value_name} must divide the {n} heads "
      "of query"
    )
  logits = (*batch, n, t, s)
  if bias is not None:
    check_floating("bias", bias)
    _check_broadcastable("bias", bias, logits)
  if mask is not None:
    check_boolean("mask", mask)
    _check_broadcastable("mask", mask, logits)
  if key_mask is not None:
    check_boolean(mask_name, key_mask)
    check_shape(mask_name, key_mask, (*batch, s), "(B, S)" if batch else "(S,)")
  return AttentionShapes(tuple(batch), t, s, n, k, h, value.shape[-1])


def check_boolean(name: str, x: jax.Array) -> None:
  """Raises unless ``x`` is a boolean array."""
  if x.dtype != jnp.bool_:
    raise ValueError(
      f"{name} must be boolean (True = attend), got dtype {x.dtype}; an "
      "additive mask is a bias"
    )


def check_no_mask(mask: Any, bias: Any) -> None:
  """Raises if there is a mask or a bias, which linear time cannot honour."""
  for name, x in (("mask", mask), ("bias", bias)):
    if x is not None:
      raise ValueError(
        f"{name} must be None, got shape {jnp.shape(x)}: linear-time attention "
        "cannot take an arbitrary mask or bias; use key_mask / is_causal"
      )


def _check_broadcastable(
  name: str, x: jax.Array, shape: tuple[int, ...]
) -> None:
  target = (1,) * (4 - len(shape)) + shape
  got = (1,) * (4 - x.ndim) + x.shape
  fits = len(got) == 4 and all(
    have in (1, want) for have, want in zip(got, target, strict=True)
  )
  if not fits:
    axes = "(B, N, T, S)" if len(shape) == 4 else "(N, T, S)"
    raise ValueError(
      f"{name} must be broadcastable to {axes} = {shape}, got shape {x.shape}"
    )


def four_dims(x: Any) -> Any:
  """Adds leading axes of size 1 to an argument of attention; None stays."""
  return None if x is None else x.reshape((1,) * (4 - x.ndim) + x.shape)
