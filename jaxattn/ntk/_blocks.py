"""Gram matrices block by block, and what kernels ask of their arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks

Apply = Callable[[Any, Any], jax.Array]

# Bytes of derivatives held for one block of examples.
_BLOCK = 1 << 28


def blocked_gram(
  fn: Callable[[Any, Any], jax.Array],
  x1: Any,
  x2: Any = None,
  *,
  chunk_size: int,
) -> jax.Array:
  """A Gram matrix, block by block.

  Args:
    fn: the kernel of two blocks: ``(block1, block2) -> (c1, ..., c2, ...)``,
      an even number of axes, the data of the second block on the first axis of
      the second half. Without ``x2`` it must be symmetric: exchanging the
      blocks exchanges the halves.
    x1: pytree of arrays (n1, ...).
    x2: pytree of arrays (n2, ...); None = ``x1``, and then only blocks on or
      above the diagonal are computed, the others are their mirror images.
    chunk_size: data of a block. The last block is filled up with copies of the
      last datum.

  Returns:
    (n1, ..., n2, ...).

  Raises:
    ValueError: if ``chunk_size`` < 1, there are no data, or the result of
      ``fn`` does not fit.

  Cost:
    The result, and ``fn`` on one pair of blocks at a time. Nothing is compiled
    here: call it under ``jit``.

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import blocked_gram
    >>> x = jnp.arange(3.0)[:, None]
    >>> print(blocked_gram(lambda a, b: a @ b.T, x, chunk_size=2))
    [[0. 0. 0.]
     [0. 1. 2.]
     [0. 2. 4.]]
  """
  _checks.check_integer("chunk_size", chunk_size, 1, None)
  x1, x2 = check_data(x1, x2)
  n1, n2 = num_data(x1), num_data(x1 if x2 is None else x2)
  size1, size2 = min(chunk_size, n1), min(chunk_size, n2)
  blocks1 = _split(x1, size1)
  blocks2 = blocks1 if x2 is None else _split(x2, size2)
  first = [
    jax.tree.map(lambda x: x[0], blocks) for blocks in (blocks1, blocks2)
  ]
  block = jax.eval_shape(fn, *first)
  half = block.ndim // 2
  if block.ndim % 2 or block.shape[0] != size1 or block.shape[half] != size2:
    raise ValueError(
      f"fn must return ({size1}, ..., {size2}, ...), an even number of axes, "
      f"got {block.shape}"
    )
  num1, num2 = -(-n1 // size1), -(-n2 // size2)
  if num1 == num2 == 1:
    return fn(x1, x1 if x2 is None else x2)
  pairs = [
    (r, c) for r in range(num1) for c in range(r if x2 is None else 0, num2)
  ]

  def visit(gram: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
    r, c = pair
    rows = jax.tree.map(lambda x: x[r], blocks1)
    columns = jax.tree.map(lambda x: x[c], blocks2)
    value = fn(rows, columns)
    if x2 is None:
      order = (*range(half, 2 * half), *range(half))
      mirrored = jnp.transpose(value, order)
      gram = _place(gram, mirrored, half, c * size1, r * size1)
    return _place(gram, value, half, r * size1, c * size2), None

  shape = list(block.shape)
  shape[0], shape[half] = num1 * size1, num2 * size2
  gram, _ = lax.scan(visit, jnp.zeros(shape, block.dtype), jnp.array(pairs))
  return lax.slice_in_dim(gram[:n1], 0, n2, axis=half)


def _place(
  gram: jax.Array, value: jax.Array, half: int, row: jax.Array, col: jax.Array
) -> jax.Array:
  start = [jnp.zeros_like(row)] * gram.ndim
  start[0], start[half] = row, col
  return lax.dynamic_update_slice(gram, value, start)


def _split(x: Any, size: int) -> Any:
  """Leaves (n, ...) as (blocks, size, ...)."""

  def split(leaf: jax.Array) -> jax.Array:
    pad = -len(leaf) % size
    copies = jnp.broadcast_to(leaf[-1:], (pad, *leaf.shape[1:]))
    full = jnp.concatenate((leaf, copies))
    return full.reshape(-1, size, *leaf.shape[1:])

  return jax.tree.map(split, x)


def largest_chunk(bytes_of_one: int) -> int:
  """The largest power of two of examples whose derivatives fit."""
  return 1 << max(0, (_BLOCK // max(bytes_of_one, 1)).bit_length() - 1)


def num_data(x: Any) -> int:
  return len(jax.tree.leaves(x)[0])


def check_data(x1: Any, x2: Any, name: str = "x1") -> tuple[Any, Any]:
  x1 = jax.tree.map(jnp.asarray, x1)
  leaves = jax.tree.leaves(x1)
  if not leaves or any(x.ndim == 0 or not len(x) for x in leaves):
    raise ValueError(
      f"{name} must be one or more arrays (n, ...) with n >= 1, got shapes "
      f"{[x.shape for x in leaves]}"
    )
  if len({len(x) for x in leaves}) > 1:
    raise ValueError(
      f"arrays of {name} must have one first axis, got shapes "
      f"{[x.shape for x in leaves]}"
    )
  if x2 is None:
    return x1, None
  x2, _ = check_data(x2, None, "x2")
  facts1, facts2 = (
    (
      jax.tree.structure(x),
      [(y.shape[1:], y.dtype) for y in jax.tree.leaves(x)],
    )
    for x in (x1, x2)
  )
  if facts1 != facts2:
    got = [
      [jax.typeof(y).str_short() for y in jax.tree.leaves(x)] for x in (x1, x2)
    ]
    raise ValueError(
      "x1 and x2 must agree in all but the first axis, got "
      f"{', '.join(got[0])} and {', '.join(got[1])}"
    )
  return x1, x2


def check_output(apply_fn: Apply, params: Any, x: Any) -> jax.ShapeDtypeStruct:
  out = jax.eval_shape(apply_fn, params, x)
  n = num_data(x)
  fits = isinstance(out, jax.ShapeDtypeStruct) and out.ndim == 2
  if not fits or len(out.shape) != 2 or out.shape[0] != n:
    got = jax.tree.map(jnp.shape, out)
    raise ValueError(f"apply_fn must return ({n}, O) for {n} data, got {got}")
  return out


def check_kernel(kernel: jax.Array, name: str = "kernel") -> None:
  _checks.check_rank(name, kernel, (2, 4))
  _checks.check_floating(name, kernel)
  half = kernel.shape[: kernel.ndim // 2]
  _checks.check_shape(name, kernel, half * 2, "its own half, twice")
  if 0 in half:
    raise ValueError(f"{name} must not be empty, got shape {kernel.shape}")


def check_residual(
  residual: jax.Array, half: tuple[int, ...], name: str = "residual"
) -> None:
  """Of an (n, n) kernel (n,) or (n, O), of an (n, O, n, O) one (n, O)."""
  _checks.check_floating(name, residual)
  if len(half) == 1 and residual.ndim == 2:
    half = (*half, residual.shape[1])
  _checks.check_shape(name, residual, half, "data of the kernel")
