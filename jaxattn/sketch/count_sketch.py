r"""CountSketch of a long vector that arrives in parts, and its large entries.

Row r of a table adds each entry, with a sign, to one of w buckets,

.. math:: C_{r b} = \sum_{i : h_r(i) = b} \sigma_r(i) x_i ,

and :math:`\sigma_r(i) C_{r h_r(i)}` is an unbiased estimate of :math:`x_i`, off
by about :math:`\|x\|_2 / \sqrt w`. Tables add, and nothing as long as x is ever
kept: buckets and signs are computed from an index and a seed, by the block
cipher of JAX's random numbers. Sources: Charikar, Chen and Farach-Colton,
ICALP 2002; the refinement by least squares is this project's.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator
from jaxattn.numerics.select import topk_merge
from jaxattn.sketch.tensor import TensorSketch


def count_sketch_rows(sketch: TensorSketch, a: jax.Array) -> jax.Array:
  r"""CountSketch S a of the rows of a matrix, by hashes that are stored.

  .. math:: (S a)_b = \sum_{i : h(i) = b} \sigma(i) a_i, \qquad
    E \langle S x, S y \rangle = \langle x, y \rangle, \qquad
    \mathrm{Var} = \frac{1}{m} \Bigl( \|x\|^2 \|y\|^2 + \langle x, y \rangle^2
    - 2 \sum_i x_i^2 y_i^2 \Bigr)

  for columns x and y of a. What a regression on fewer rows starts with; rows
  that arrive in parts, or are sketched more than once, are for
  :func:`count_sketch_table`.

  Args:
    sketch: of n rows and degree 1, ``tensor_sketch_init(rng, n, m, 1)``: its
      S is that of ``tensor_sketch_apply`` too, which acts on a last axis.
    a: (n, d), floating.

  Returns:
    (m, d) of the dtype of ``a``; summed in float32 for 16-bit inputs.

  Raises:
    ValueError: if the sketch is of a higher degree, or shapes or dtypes do not
      fit.

  Cost:
    One addition an entry.

  Source:
    Clarkson and Woodruff, STOC 2013.

  Example:
    >>> import jax
    >>> from jaxattn.sketch import tensor_sketch_init
    >>> a = jax.random.normal(jax.random.key(0), (1000, 3))
    >>> sketch = tensor_sketch_init(jax.random.key(1), 1000, 400, 1)
    >>> b = count_sketch_rows(sketch, a)
    >>> print(b.shape, bool(abs(b.T @ b - a.T @ a).max() < 200))
    (400, 3) True
  """
  a = jnp.asarray(a)
  degree, num = sketch.bucket.shape
  if degree != 1:
    raise ValueError(f"sketch must have degree 1, got degree {degree}")
  _checks.check_floating("a", a)
  _checks.check_shape("a", a, (num, None), "(n, d) of the sketch")
  return _rows(sketch, a)


def count_sketch_table(
  seeds: jax.Array,
  x: jax.Array,
  sketch_dim: int,
  *,
  start: int | jax.Array = 0,
) -> jax.Array:
  r"""CountSketches of a vector, or of each column of a matrix.

  .. math:: C_{r b} = \sum_{i : h_r(i) = b} \sigma_r(i) x_i

  Linear: the tables of parts of x, each with the ``start`` where it begins, add
  up to that of x. For two matrices and one row of seeds,
  :math:`E \|C(a)^\top C(b) - a^\top b\|_F^2 \le \frac{2}{w} \|a\|_F^2
  \|b\|_F^2`.

  Args:
    seeds: (depth, 2) uint32, a row for each row of the table:
      ``jax.random.bits(rng, (depth, 2), "uint32")``.
    x: (n,) or (n, columns), floating.
    sketch_dim: w, number of buckets.
    start: index of the first row of x, with start + n <= 2^32; may be traced.

  Returns:
    (depth, w) or (depth, w, columns) of the dtype of ``x``; summed in float32
    for 16-bit inputs.

  Raises:
    ValueError: if shapes, dtypes or sizes do not fit, or ``start`` is a
      negative number.

  Cost:
    One addition and one random number an entry and row of the table.

  Source:
    Charikar, Chen and Farach-Colton, ICALP 2002.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> seeds = jax.random.bits(jax.random.key(0), (5, 2), "uint32")
    >>> x = jax.random.normal(jax.random.key(1), (1000,))
    >>> whole = count_sketch_table(seeds, x, 64)
    >>> parts = [count_sketch_table(seeds, x[i:i + 500], 64, start=i)
    ...          for i in (0, 500)]
    >>> bool(jnp.allclose(whole, sum(parts), atol=1e-5))
    True
  """
  seeds, x = jnp.asarray(seeds), jnp.asarray(x)
  check_seeds(seeds)
  _checks.check_rank("x", x, (1, 2))
  _checks.check_floating("x", x)
  _checks.check_integer("sketch_dim", sketch_dim, 1, None)
  check_start(start)
  return _table(seeds, x, jnp.asarray(start, jnp.uint32), sketch_dim)


def count_sketch_recover(
  seeds: jax.Array,
  table: jax.Array,
  size: int,
  k: int,
  *,
  refine: bool = True,
  chunk_size: int = 4096,
) -> tuple[jax.Array, jax.Array]:
  r"""The largest entries of a vector, from its CountSketches alone.

  Each entry is estimated by the median over the rows of the table, a chunk of
  entries at a time. Of the 2k that seem largest, the values are then fitted to
  the table all together, by least squares, and the k largest are kept: entries
  that share a bucket no longer disturb each other. With w = 4 k / eps buckets
  and a depth of 9 the distance of x to the result is, with probability 0.99, at
  most 1 + eps times that to the best vector of k entries. Without the fit that
  takes twice as many buckets and a depth of 13.

  Args:
    seeds: (depth, 2) uint32, of the table.
    table: (depth, w), or (depth, w, columns) for as many vectors.
    size: n, number of entries of a vector.
    k: number to find, at least 1; no more than ``size`` are returned.
    refine: fit values to the table; False leaves the medians.
    chunk_size: entries estimated at a time. Memory and speed only.

  Returns:
    Indices (k,) or (columns, k), int32, largest entries first, and their
    values, of the dtype of ``table``.

  Raises:
    ValueError: if shapes, dtypes or sizes do not fit; or if, with ``refine``,
      there are more entries to fit, 2 k or ``size``, than numbers in a table.

  Cost:
    O(n depth) for each vector, and O(k^3) for the fit; memory of one chunk, and
    of a few times (2 k)^2 numbers, one vector at a time.

  Source:
    Charikar, Chen and Farach-Colton, ICALP 2002; the fit is this project's.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> seeds = jax.random.bits(jax.random.key(0), (9, 2), "uint32")
    >>> x = jnp.zeros(10_000).at[17].set(1.0).at[4242].set(-2.0)
    >>> table = count_sketch_table(seeds, x, 16)
    >>> indices, values = count_sketch_recover(seeds, table, 10_000, 2)
    >>> indices.tolist(), values.round(4).tolist()
    ([4242, 17], [-2.0, 1.0])
  """
  seeds, table = jnp.asarray(seeds), jnp.asarray(table)
  check_seeds(seeds)
  _checks.check_rank("table", table, (2, 3))
  _checks.check_floating("table", table)
  _checks.check_shape(
    "table", table, (len(seeds), *[None] * (table.ndim - 1)), "(depth, w, ...)"
  )
  # Indices are returned as int32.
  _checks.check_integer("size", size, 1, (1 << 31) - 1)
  _checks.check_integer("k", k, 1, None)
  _checks.check_choice("refine", refine, (False, True))
  _checks.check_integer("chunk_size", chunk_size, 1, None)
  depth, width = table.shape[:2]
  if refine and min(2 * k, size) > depth * width:
    raise ValueError(
      f"k must be at most depth * w / 2 = {depth * width // 2} with "
      f"refine=True, got {k}"
    )
  columns = table if table.ndim == 3 else table[..., None]
  found = _recover(
    seeds, columns, size, min(k, size), refine, min(chunk_size, size)
  )
  return found if table.ndim == 3 else (found[0][0], found[1][0])


def check_seeds(seeds: jax.Array) -> None:
  """Refuses what are no seeds."""
  _checks.check_shape("seeds", seeds, (None, 2), "(depth, 2)")
  if seeds.dtype != jnp.uint32:
    raise ValueError(f"seeds must be uint32, got {seeds.dtype}")


def check_start(start: Any) -> None:
  """Refuses an index of a first row that is none."""
  if not _checks.is_concrete(start) or isinstance(start, jax.Array):
    dtype = jnp.result_type(start)
    if jnp.ndim(start) or not jnp.issubdtype(dtype, jnp.integer):
      raise ValueError(f"start must be an integer scalar, got {start!r}")
    if not _checks.is_concrete(start):
      return
    start = int(start)
  _checks.check_integer("start", start, 0, (1 << 32) - 1)


def _hashes(
  seeds: jax.Array, indices: jax.Array, sketch_dim: int
) -> tuple[jax.Array, jax.Array]:
  """Buckets (depth, n) int32 and signs (depth, n) int32 of indices (n,)."""
  keys = jax.random.wrap_key_data(seeds, impl="threefry2x32")
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  words = jax.vmap(fold, (0, None))(keys, indices.astype(jnp.uint32))
  words = jax.random.key_data(words)
  bucket = (words[..., 0] % jnp.uint32(sketch_dim)).astype(jnp.int32)
  return bucket, 1 - 2 * (words[..., 1] & 1).astype(jnp.int32)


@jax.jit
def _rows(sketch: TensorSketch, a: jax.Array) -> jax.Array:
  wide = a.astype(accumulator(a.dtype))
  signed = sketch.sign[0].astype(wide.dtype)[:, None] * wide
  sums = jax.ops.segment_sum(signed, sketch.bucket[0], sketch.sketch_dim)
  return sums.astype(a.dtype)


@functools.partial(jax.jit, static_argnames="sketch_dim")
def _table(
  seeds: jax.Array, x: jax.Array, start: jax.Array, sketch_dim: int
) -> jax.Array:
  indices = start + jnp.arange(len(x), dtype=jnp.uint32)
  bucket, sign = _hashes(seeds, indices, sketch_dim)
  wide = x.astype(accumulator(x.dtype))

  def row(bucket: jax.Array, sign: jax.Array) -> jax.Array:
    signed = sign.astype(wide.dtype).reshape(-1, *[1] * (x.ndim - 1)) * wide
    return jax.ops.segment_sum(signed, bucket, sketch_dim)

  return jax.vmap(row)(bucket, sign).astype(x.dtype)


@functools.partial(
  jax.jit, static_argnames=("size", "k", "refine", "chunk_size")
)
def _recover(
  seeds: jax.Array,
  table: jax.Array,
  size: int,
  k: int,
  refine: bool,
  chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
  """Table (depth, w, c) -> indices and values (c, k)."""
  dtype, (_, width, num) = table.dtype, table.shape
  table = table.astype(accumulator(dtype))
  keep = min(2 * k, size) if refine else k

  def step(kept: Any, i: jax.Array) -> tuple[Any, None]:
    indices = i * chunk_size + jnp.arange(chunk_size, dtype=jnp.int32)
    bucket, sign = _hashes(seeds, indices, width)
    signed = jax.vmap(lambda row, b: row[b])(table, bucket)
    estimates = jnp.median(signed * sign[..., None].astype(table.dtype), 0)
    # Behind the last one int32 may wrap.
    inside = (indices >= 0) & (indices < size)
    sizes = jnp.where(inside[:, None], abs(estimates), -1)
    values, places = kept
    return topk_merge(values, places, sizes.T, indices), None

  kept = (
    jnp.full((num, keep), -1, table.dtype),
    jnp.zeros((num, keep), jnp.int32),
  )
  steps = jnp.arange(-(-size // chunk_size), dtype=jnp.int32)
  (_, indices), _ = lax.scan(step, kept, steps)
  fit = functools.partial(_values, seeds, refine=refine)
  columns = indices, jnp.moveaxis(table, -1, 0)
  values = lax.map(lambda column: fit(*column), columns)
  order = lax.top_k(abs(values), k)[1]
  indices, values = (
    jnp.take_along_axis(x, order, -1) for x in (indices, values)
  )
  return indices, values.astype(dtype)


def _values(
  seeds: jax.Array, indices: jax.Array, table: jax.Array, *, refine: bool
) -> jax.Array:
  """Entries of one vector at indices (j,), from its table (depth, w)."""
  bucket, sign = _hashes(seeds, indices, table.shape[1])
  sign = sign.astype(table.dtype)
  signed = sign * jnp.take_along_axis(table, bucket, 1)
  if not refine:
    return jnp.median(signed, 0)
  # Normal equations: the design has one sign a row of the table and entry.
  # One row after the other: all pairs of entries in each would be too many.

  def add(gram: jax.Array, row: Any) -> tuple[jax.Array, None]:
    b, s = row
    return gram + jnp.where(
      b[:, None] == b[None], s[:, None] * s[None], 0
    ), None

  j = len(indices)
  gram, _ = lax.scan(add, jnp.zeros((j, j), table.dtype), (bucket, sign))
  inverse = jnp.linalg.pinv(gram, hermitian=True)
  return jnp.matmul(inverse, signed.sum(0), precision=lax.Precision.HIGHEST)
