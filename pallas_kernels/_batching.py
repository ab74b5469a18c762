"""``jax.vmap`` of a kernel that JAX cannot batch itself: a larger batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def fold_batch(kernel: Callable[..., Any]) -> Callable[..., Any]:
  """``kernel``, whose arrays all begin with their batch, under ``jax.vmap``.

  Args:
    kernel: from and to pytrees of arrays (B, ...), B the same in all.

  Returns:
    The same function. An axis that it is mapped over becomes part of B.
  """
  folded = custom_vmap(kernel)

  @folded.def_vmap
  def _(axis_size: int, in_batched: Any, *args: Any) -> Any:
    def fold(x: jax.Array, batched: bool) -> jax.Array:
      x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    def unfold(x: jax.Array) -> jax.Array:
      return x.reshape(axis_size, -1, *x.shape[1:])

    args = jax.tree.map(fold, args, tuple(in_batched))
    results = jax.tree.map(unfold, folded(*args))
    return results, jax.tree.map(lambda _: True, results)

  return folded
