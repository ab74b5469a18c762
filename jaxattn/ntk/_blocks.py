"""Gram matrices block by block, and what kernels ask of their arguments."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator

Apply = Callable[[Any, Any], jax.Array]

# Bytes of derivatives held for one block of examples: large matrix products
# are quicker, and fewer blocks are prepared again.
_BLOCK = 1 << 29


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
    chunk_size: most data of a block. Blocks are as few and as equal as that
      allows; the last is filled up with copies of the last datum.

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
  return gram_of(lambda x: x, fn, x1, x2, chunk_size)


def gram_of(
  prepare: Callable[[Any], Any],
  fn: Callable[[Any, Any], jax.Array],
  x1: Any,
  x2: Any,
  chunk_size: int,
) -> jax.Array:
  """:func:`blocked_gram` of what ``prepare`` makes of blocks.

  Two prepared blocks are held at a time: each block of rows is prepared once,
  and a block of columns for each block of rows that it meets.
  """
  n1, n2 = num_data(x1), num_data(x1 if x2 is None else x2)
  size1, size2 = even_blocks(n1, chunk_size), even_blocks(n2, chunk_size)
  blocks1 = _split(x1, size1)
  blocks2 = blocks1 if x2 is None else _split(x2, size2)
  num1, num2 = -(-n1 // size1), -(-n2 // size2)
  block = jax.eval_shape(
    lambda *firsts: fn(*map(prepare, firsts)), *map(_first, (blocks1, blocks2))
  )
  half = block.ndim // 2
  if block.ndim % 2 or block.shape[0] != size1 or block.shape[half] != size2:
    raise ValueError(
      f"fn must return ({size1}, ..., {size2}, ...), an even number of axes, "
      f"got {block.shape}"
    )
  if num1 == num2 == 1:
    rows = prepare(x1)
    return fn(rows, rows if x2 is None else prepare(x2))
  order = (*range(half, 2 * half), *range(half))

  def visit_row(gram: jax.Array, row: Any) -> tuple[jax.Array, None]:
    r, rows = row
    rows = prepare(rows)

    def visit(gram: jax.Array, column: Any) -> tuple[jax.Array, None]:
      c, columns = column
      if x2 is not None:
        value = fn(rows, prepare(columns))
      else:
        value = lax.cond(
          c >= r,
          lambda: fn(rows, prepare(columns)),
          lambda: jnp.zeros(block.shape, block.dtype),
        )
        mirrored = jnp.transpose(value, order)
        gram = _place(gram, mirrored, half, c * size1, r * size1)
      return _place(gram, value, half, r * size1, c * size2), None

    return lax.scan(visit, gram, (jnp.arange(num2), blocks2))[0], None

  shape = list(block.shape)
  shape[0], shape[half] = num1 * size1, num2 * size2
  # From the last row up: what a row leaves at 0, those after it write.
  gram, _ = lax.scan(
    visit_row,
    jnp.zeros(shape, block.dtype),
    (jnp.arange(num1), blocks1),
    reverse=True,
  )
  return lax.slice_in_dim(gram[:n1], 0, n2, axis=half)


def even_blocks(n: int, chunk_size: int) -> int:
  """The size of as few blocks as there must be, all of one size."""
  return -(-n // -(-n // chunk_size))


def _first(blocks: Any) -> Any:
  return jax.tree.map(lambda x: x[0], blocks)


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


def inner_products(x1: jax.Array, x2: jax.Array, lead: int) -> jax.Array:
  """Of rows over the axes from ``lead`` on, as one matrix product, wide."""
  rows1, rows2 = (x.reshape(math.prod(x.shape[:lead]), -1) for x in (x1, x2))
  return jnp.einsum(
    "ip,jp->ij",
    rows1,
    rows2,
    precision=lax.Precision.HIGHEST,
    preferred_element_type=accumulator(x1.dtype),
  )


def largest_chunk(bytes_of_one: int) -> int:
  """The most examples whose derivatives fit."""
  return max(1, _BLOCK // max(bytes_of_one, 1))


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
