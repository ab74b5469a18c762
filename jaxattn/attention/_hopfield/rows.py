"""Functions of rows, mapped over some rows at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Numbers that exist at a time where rows are worked on in parts: more of them
# leave the cache, and take five times as long.
PART = 1 << 20


def by_rows(fn: Callable[..., Any], width: int, *arrays: jax.Array) -> Any:
  """Maps a function of rows over (L, ...) arrays, some rows at a time.

  ``width`` numbers exist for each row; they are computed again for gradients.
  """
  rows = max(1, PART // width)
  if len(arrays[0]) <= rows:
    return jax.vmap(fn)(*arrays)
  one = jax.checkpoint(fn)
  return lax.map(lambda x: one(*x), arrays, batch_size=rows)


def in_parts(
  fn: Callable[[jax.Array], jax.Array], width: int, x: jax.Array
) -> jax.Array:
  """Applies a function of (L, d) arrays to some rows at a time.

  As :func:`by_rows`, for a function that does better on rows together.
  """
  rows = max(1, PART // width)
  if len(x) <= rows:
    return fn(x)
  num = -(-len(x) // rows)
  size = -(-len(x) // num)
  parts = jnp.pad(x, ((0, num * size - len(x)), (0, 0)))
  out = lax.map(jax.checkpoint(fn), parts.reshape(num, size, -1))
  return out.reshape(num * size, *out.shape[2:])[: len(x)]


def flat(x: jax.Array) -> jax.Array:
  return x.reshape(-1, x.shape[-1])
