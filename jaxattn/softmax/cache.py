"""Keys and values that attention meets again: trainable prefixes.

A prefix is m extra pairs of key and value for each head, shared by all queries
of all batch elements, which every query sees whatever its mask. Source: prefix
tuning, Li and Liang, arXiv 2101.00190.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import _checks


class Prefix(NamedTuple):
  """Keys and values of a prefix; unpacks into ``prefix_attention``.

  Source: arXiv 2101.00190.

  Attributes:
    key: (m, K, H).
    value: (m, K, Hv).
  """

  key: jax.Array
  value: jax.Array


def prefix_init(
  rng: jax.Array,
  length: int,
  num_kv_heads: int,
  head_dim: int,
  *,
  value_dim: int | None = None,
  key_std: float = 1.0,
  value_std: float = 1.0,
  dtype: Any = jnp.float32,
) -> Prefix:
  """Draws a prefix of independent Gaussian entries.

  Args:
    rng: PRNG key.
    length: m, number of pairs of key and value.
    num_kv_heads: K, key heads of the attention.
    head_dim: H, size of a key.
    value_dim: Hv, size of a value; None = H.
    key_std: standard deviation of key entries; 0 is allowed.
    value_std: the same of value entries.
    dtype: of both arrays, floating.

  Returns:
    The prefix: key (m, K, H) and value (m, K, Hv).

  Raises:
    ValueError: if a size is no positive integer, a standard deviation is
      negative, or ``dtype`` is not floating.

  Cost:
    O(m K (H + Hv)) time and memory.

  Source:
    arXiv 2101.00190 for prefixes; arXiv 2406.14036 draws them like this.

  Example:
    >>> import jax
    >>> from jaxattn.softmax import prefix_init
    >>> prefix = prefix_init(jax.random.key(0), 16, 2, 8)
    >>> prefix.key.shape, prefix.value.shape
    ((16, 2, 8), (16, 2, 8))
  """
  value_dim = head_dim if value_dim is None else value_dim
  for name, size in (
    ("length", length),
    ("num_kv_heads", num_kv_heads),
    ("head_dim", head_dim),
    ("value_dim", value_dim),
  ):
    _checks.check_integer(name, size, 1, None)
  _checks.check_nonnegative("key_std", key_std)
  _checks.check_nonnegative("value_std", value_std)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype must be floating, got {jnp.dtype(dtype)}")
  rngs = jax.random.split(rng)
  key = jax.random.normal(rngs[0], (length, num_kv_heads, head_dim), dtype)
  value = jax.random.normal(rngs[1], (length, num_kv_heads, value_dim), dtype)
  return Prefix(
    key * jnp.asarray(key_std, dtype), value * jnp.asarray(value_std, dtype)
  )
