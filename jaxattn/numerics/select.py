"""Selection of the largest: index sets of static size, ties to the lower index.

All functions work on the last axis, batch over the others, are differentiable
in the values that they return, and have static shapes. As in ``lax.top_k``, NaN
ranks above everything and -0.0 below 0.0.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks


def topk_indices(
  scores: jax.Array, k: int, *, block_size: int = 1
) -> jax.Array:
  """Indices of the k largest scores, in ascending order.

  Ties go to the lower index. With ``block_size`` > 1 whole blocks of
  neighboring entries compete by the sum of their scores, and the indices are
  those of the k / block_size best blocks. O(n log k) time, O(n) memory a row.

  Args:
    scores: (..., n) real numbers.
    k: number of entries to keep; a multiple of block_size in [1, n].
    block_size: entries in a block; divides n.

  Returns:
    (..., k // block_size) int32 indices of entries, or of blocks.

  Raises:
    ValueError: if k is outside [1, n], or if block_size does not divide n
      and k.

  Source:
    A standard textbook fact (selection by partial sorting).

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.numerics import topk_indices
    >>> print(topk_indices(jnp.array([0.0, 3.0, 1.0, 3.0]), 2))
    [1 3]
    >>> print(topk_indices(jnp.array([0.0, 3.0, 1.0, 3.0]), 2, block_size=2))
    [1]
  """
  n = scores.shape[-1]
  _checks.check_integer("k", k, 1, n)
  _checks.check_integer("block_size", block_size, 1, n)
  if n % block_size or k % block_size:
    raise ValueError(
      f"block_size must divide the {n} scores and k = {k}, got {block_size}"
    )
  if block_size > 1:
    scores = scores.reshape(*scores.shape[:-1], n // block_size, block_size)
    scores = scores.sum(-1)
  _, indices = lax.top_k(scores, k // block_size)
  return lax.sort(indices)


def topk_merge(
  values: jax.Array,
  indices: jax.Array,
  new_values: jax.Array,
  new_indices: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Folds new entries into a running list of the k largest.

  Folding a row block by block, in order, gives what one ``lax.top_k`` of the
  row gives, ties included: a tie goes to ``values``, whose indices are the
  lower ones then. O((k + m) log k) time, O(k + m) memory a row.

  Args:
    values: (..., k) the running list, in descending order.
    indices: (..., k) integers, where the values came from.
    new_values: (..., m) further values, in the order of their indices.
    new_indices: (..., m) or (m,) integers of the same dtype; (m,) where all
      rows share them.

  Returns:
    The new list: k values in descending order and their indices.

  Raises:
    ValueError: if shapes do not fit, or if the index dtypes differ.

  Source:
    This project.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.numerics import topk_merge
    >>> kept = jnp.array([3.0, 1.0]), jnp.array([0, 1])
    >>> print(*topk_merge(*kept, jnp.array([2.0, 3.0]), jnp.array([2, 3])))
    [3. 3.] [0 3]
  """
  *rows, k = values.shape
  _checks.check_shape("indices", indices, values.shape, "shape of values")
  _checks.check_shape("new_values", new_values, (*rows, None), "(..., m)")
  m = new_values.shape[-1]
  if new_indices.ndim != 1:
    _checks.check_shape("new_indices", new_indices, new_values.shape)
  else:
    _checks.check_shape("new_indices", new_indices, (m,), "(m,)")
  if indices.dtype != new_indices.dtype:
    raise ValueError(
      "indices and new_indices must have one dtype, got "
      f"{indices.dtype} and {new_indices.dtype}"
    )
  merged, position = lax.top_k(jnp.concatenate([values, new_values], -1), k)
  return merged, _pick(position, indices, new_indices)


def _pick(
  position: jax.Array, indices: jax.Array, new_indices: jax.Array
) -> jax.Array:
  # Reading the two lists apart spares a concatenated copy of the indices, as
  # long as the row of scores itself.
  k = indices.shape[-1]
  old = jnp.take_along_axis(indices, jnp.minimum(position, k - 1), -1)
  place = jnp.maximum(position - k, 0)
  if new_indices.ndim == 1:
    new = new_indices[place]
  else:
    new = jnp.take_along_axis(new_indices, place, -1)
  return jnp.where(position < k, old, new)
