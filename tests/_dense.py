"""Dense attention in float64: the oracle of exact attention and its kin.

Written for reading: every logit of every head at once. A query that sees no key
gives 0, and nothing flows through it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def visible(
  t: int,
  s: int,
  *,
  is_causal: bool = False,
  window: tuple[int, int] | None = None,
) -> np.ndarray:
  """(T, S): which key each query sees, by positions alone."""
  gap = np.arange(s)[None, :] - np.arange(t)[:, None]
  seen = np.ones((t, s), bool)
  if is_causal:
    seen &= gap <= 0
  if window is not None:
    seen &= (-window[0] <= gap) & (gap <= window[1])
  return seen


def softmax(logits: jax.Array, seen: Any) -> tuple[jax.Array, jax.Array]:
  """Softmax over the last axis where ``seen``, and its log-sum-exp."""
  logits = jnp.where(seen, logits, -jnp.inf)
  some = jnp.any(jnp.isfinite(logits), -1, keepdims=True)
  # Rows that see nothing are replaced before and after: a NaN that is only
  # hidden after would come back as a gradient.
  logits = jnp.where(some, logits, 0)
  lse = jax.nn.logsumexp(logits, -1, keepdims=True)
  weights = jnp.where(some, jnp.exp(logits - lse), 0)
  return weights, jnp.where(some, lse, -jnp.inf)[..., 0]


def dense_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None = None,
  *,
  seen: Any = True,
  scale: Any = None,
  select: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Output (..., T, N, Hv) and log-sum-exp (..., T, N).

  Args:
    query: (..., T, N, H).
    key: (..., S, K, H).
    value: (..., S, K, Hv).
    bias: broadcastable to (..., N, T, S).
    seen: boolean, broadcastable to (..., N, T, S).
    scale: factor on the logits; None = 1 / sqrt(H).
    select: from logits, -inf where hidden, to a boolean of their shape: the
      keys that are used.
  """
  groups = query.shape[-2] // key.shape[-2]
  key, value = (jnp.repeat(x, groups, -2) for x in (key, value))
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  logits = jnp.einsum("...tnh,...snh->...nts", query, key) * scale
  logits = logits if bias is None else logits + bias
  if select is not None:
    seen = seen & select(jnp.where(seen, logits, -jnp.inf))
  weights, lse = softmax(logits, seen)
  out = jnp.einsum("...nts,...snh->...tnh", weights, value)
  return out, jnp.swapaxes(lse, -1, -2)


def float64(*arrays: Any) -> list[Any]:
  """The arrays as numpy float64; booleans, integers and None unchanged."""
  return [
    np.asarray(x, np.float64)
    if x is not None and jnp.issubdtype(x.dtype, jnp.floating)
    else x
    for x in arrays
  ]


def value_and_vjp(
  fn: Callable[..., Any], cotangent: Any, *args: jax.Array
) -> tuple[Any, tuple[jax.Array, ...]]:
  """``fn(*args)`` and the cotangents of ``args``."""
  out, vjp = jax.vjp(fn, *args)
  return out, vjp(cotangent)
