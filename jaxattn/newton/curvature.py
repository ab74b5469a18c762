r"""Hessians that are products of thin factors.

.. math:: H = A^\top \operatorname{diag}(D) A + L C L^\top + K

with a design A of n rows, dense or sparse, weights D of either sign, a few
columns L and a constant matrix K: all that the problems of this project need,
in O(n p^2) time to form and O(n p) to multiply.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.sketch import row_sample

# Rows of a design at a time: a block and its weighted copy stay in cache.
_BLOCK_ENTRIES = 1 << 19


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["indices", "values"],
  meta_fields=["dim"],
)
@dataclasses.dataclass(frozen=True)
class Design:
  """A sparse matrix of as many stored entries in each row (the ELL layout).

  Accepted wherever a dense (n, p) design is.

  Attributes:
    indices: (n, k) integers in [0, dim), the columns.
    values: (n, k). Entries of one column in a row add up; pad with 0.
    dim: p, number of columns.
  """

  indices: jax.Array
  values: jax.Array
  dim: int


class StructuredCurvature(NamedTuple):
  r"""A Hessian A^T diag(D) A + L C L^T + K.

  Attributes:
    design: A, (n, p) or a :class:`Design`.
    weight: D, (n,), of either sign.
    low: L, (p, k); k may be 0.
    core: C, (k, k), symmetric.
    const: K, (p, p), or () for a multiple of the identity.
    center: a, (p,), which rows of A are taken relative to before some of them
      are sampled; None = 0. It does not change H.
    moment: A^T D, (p,), if it is known; None = computed where it is needed. It
      saves a pass over A where rows are sampled.
  """

  design: jax.Array | Design
  weight: jax.Array
  low: jax.Array
  core: jax.Array
  const: jax.Array
  center: jax.Array | None = None
  moment: jax.Array | None = None


class DenseCurvature(NamedTuple):
  """A Hessian as a matrix.

  Attributes:
    matrix: (p, p).
  """

  matrix: jax.Array


class OperatorCurvature(NamedTuple):
  """A Hessian as a function.

  Attributes:
    matvec: (p,) -> (p,), a ``jax.tree_util.Partial``.
  """

  matvec: Any


Curvature = StructuredCurvature | DenseCurvature | OperatorCurvature


def design_matvec(a: jax.Array | Design, x: jax.Array) -> jax.Array:
  """The product A x.

  Args:
    a: (n, p), or a :class:`Design`.
    x: (p,) or (p, k).

  Returns:
    (n,) or (n, k).

  Raises:
    ValueError: if ``x`` does not have p rows.

  Cost:
    O(n p k), or k times the stored entries.

  Source:
    a standard fact.

  Example:
    >>> import jax.numpy as jnp
    >>> a = Design(jnp.array([[0], [2]]), jnp.array([[2.0], [3.0]]), 3)
    >>> print(design_matvec(a, jnp.array([1.0, 1.0, 10.0])))
    [ 2. 30.]
  """
  if not isinstance(a, Design):
    _checks.check_rank("a", a, 2)
  p = _num_columns(a)
  _checks.check_rank("x", x, (1, 2))
  _checks.check_shape("x", x, (p, *jnp.shape(x)[1:]), "(p, ...)")
  if not isinstance(a, Design):
    return a @ x
  picked = x[a.indices]
  if picked.ndim == 2:
    return (a.values * picked).sum(1)
  return (a.values[..., None] * picked).sum(1)


def design_vecmat(v: jax.Array, a: jax.Array | Design) -> jax.Array:
  """The product V A of row vectors, all in one pass over A.

  Args:
    v: (n,) or (k, n).
    a: (n, p), or a :class:`Design`.

  Returns:
    (p,) or (k, p).

  Raises:
    ValueError: if ``v`` does not have n columns.

  Cost:
    O(n p k), or k times the stored entries; several vectors in one call cost
    little more than one, because reading A is what takes time.

  Source:
    a standard fact.

  Example:
    >>> import jax.numpy as jnp
    >>> a = Design(jnp.array([[0], [2]]), jnp.array([[2.0], [3.0]]), 3)
    >>> print(design_vecmat(jnp.array([1.0, 10.0]), a))
    [ 2.  0. 30.]
  """
  _checks.check_rank("v", v, (1, 2))
  n = _num_rows(a)
  _checks.check_shape("v", v, (*jnp.shape(v)[:-1], n), "(..., n)")
  if not isinstance(a, Design):
    return v @ a
  rows = v.reshape(-1, n).T

  def add(out: jax.Array, entries: tuple[jax.Array, ...]) -> Any:
    columns, values = entries
    return out.at[columns].add(values[:, None] * rows), None

  # An entry of each row at a time: products with all would be k times A.
  dtype = jnp.result_type(v, a.values)
  zeros = jnp.zeros((a.dim, rows.shape[1]), dtype)
  out, _ = lax.scan(add, zeros, (a.indices.T, a.values.T))
  return out.T.reshape(*v.shape[:-1], a.dim)


def design_rows(a: jax.Array | Design, indices: jax.Array) -> jax.Array:
  """Some rows of A, dense.

  Args:
    a: (n, p), or a :class:`Design`.
    indices: (m,) integers in [0, n).

  Returns:
    (m, p).

  Raises:
    ValueError: if ``indices`` is no vector of integers.

  Cost:
    O(m p).

  Source:
    a standard fact.

  Example:
    >>> import jax.numpy as jnp
    >>> a = Design(jnp.array([[0], [2]]), jnp.array([[2.0], [3.0]]), 3)
    >>> print(design_rows(a, jnp.array([1])))
    [[0. 0. 3.]]
  """
  indices = jnp.asarray(indices)
  _checks.check_rank("indices", indices, 1)
  if not jnp.issubdtype(indices.dtype, jnp.integer):
    raise ValueError(f"indices must be integers, got dtype {indices.dtype}")
  if not isinstance(a, Design):
    return a[indices]
  columns, values = a.indices[indices], a.values[indices]
  row = jnp.arange(len(indices))[:, None]
  zeros = jnp.zeros((len(indices), a.dim), values.dtype)
  return zeros.at[row, columns].add(values)


def weighted_gram(
  a: jax.Array | Design,
  weight: jax.Array,
  *,
  center: jax.Array | None = None,
) -> jax.Array:
  r"""The matrix of second moments of weighted, centered rows.

  .. math:: (A - 1 c^\top)^\top \operatorname{diag}(D) (A - 1 c^\top)

  Args:
    a: (n, p), or a :class:`Design`.
    weight: D, (n,), of either sign.
    center: c, (p,); None = 0.

  Returns:
    (p, p).

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    2 n p^2 flops, a block of rows at a time: no second (n, p) array.

  Source:
    a standard fact.

  Example:
    >>> import jax.numpy as jnp
    >>> a = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> print(weighted_gram(a, jnp.array([1.0, -1.0])))
    [[ -8. -10.]
     [-10. -12.]]
  """
  if not isinstance(a, Design):
    _checks.check_rank("a", a, 2)
  n, p = _num_rows(a), _num_columns(a)
  _checks.check_shape("weight", weight, (n,), "(n,)")
  if center is not None:
    _checks.check_shape("center", center, (p,), "(p,)")

  def gram(rows: jax.Array, w: jax.Array) -> jax.Array:
    rows = rows if center is None else rows - center[None]
    return rows.T @ (w[:, None] * rows)

  block = max(1, _BLOCK_ENTRIES // p)
  num, rest = divmod(n, block)
  if num < 2:
    return gram(_block_of(a, 0, n), weight)

  def add(i: jax.Array, total: jax.Array) -> jax.Array:
    start = i * block
    w = lax.dynamic_slice_in_dim(weight, start, block)
    return total + gram(_block_of(a, start, block), w)

  total = gram(_block_of(a, num * block, rest), weight[num * block :])
  return lax.fori_loop(0, num, add, total)


def curvature_matvec(curvature: Curvature, v: jax.Array) -> jax.Array:
  """The product H v.

  Args:
    curvature: any of the three types.
    v: (p,).

  Returns:
    (p,).

  Raises:
    ValueError: if ``v`` is no vector.

  Cost:
    O(n p) for a structured one.

  Source:
    a standard fact.

  Example:
    >>> import jax.numpy as jnp
    >>> print(curvature_matvec(DenseCurvature(2 * jnp.eye(2)), jnp.ones(2)))
    [2. 2.]
  """
  _checks.check_rank("v", v, 1)
  if isinstance(curvature, DenseCurvature):
    return curvature.matrix @ v
  if isinstance(curvature, OperatorCurvature):
    return curvature.matvec(v)
  a, weight, low, core, const, *_ = curvature
  product = design_vecmat(weight * design_matvec(a, v), a)
  product += low @ (core @ (low.T @ v))
  return product + (const * v if jnp.ndim(const) == 0 else const @ v)


def curvature_dense(
  curvature: Curvature, *, dim: int | None = None, dtype: Any = None
) -> jax.Array:
  """The matrix H.

  Args:
    curvature: any of the three types.
    dim: p; for an :class:`OperatorCurvature` only, which needs it.
    dtype: of the vectors that an :class:`OperatorCurvature` takes; None = JAX's
      default. The other types have their own.

  Returns:
    (p, p).

  Raises:
    ValueError: if an operator comes without ``dim``.

  Cost:
    O(n p^2) for a structured one; p products for an operator.

  Source:
    a standard fact.

  Example:
    >>> import jax.numpy as jnp
    >>> h = StructuredCurvature(
    ...   jnp.eye(2),
    ...   jnp.array([1.0, 2.0]),
    ...   jnp.ones((2, 1)),
    ...   jnp.ones((1, 1)),
    ...   jnp.array(0.0),
    ... )
    >>> print(curvature_dense(h))
    [[2. 1.]
     [1. 3.]]
  """
  if isinstance(curvature, DenseCurvature):
    return curvature.matrix
  if isinstance(curvature, OperatorCurvature):
    if dim is None:
      raise ValueError("dim is required for an OperatorCurvature")
    return jax.vmap(curvature.matvec)(jnp.eye(dim, dtype=dtype)).T
  a, weight, low, core, const, *_ = curvature
  matrix = weighted_gram(a, weight) + low @ core @ low.T
  return matrix + _constant(const, matrix)


def curvature_sample(
  rng: jax.Array,
  curvature: StructuredCurvature,
  prob: jax.Array,
  num_rows: int,
) -> StructuredCurvature:
  r"""The same Hessian from some rows of its design, drawn at random.

  With :math:`h = A^\top D`, :math:`\delta = \sum_i D_i` and the center a,

  .. math::
    A^\top D A = \tilde A^\top D \tilde A + h a^\top + a h^\top
      - \delta a a^\top, \qquad \tilde A = A - 1 a^\top

  of which only the first term is sampled, and everything else is exact.

  Args:
    rng: PRNG key.
    curvature: a structured one.
    prob: (n,) probabilities of the rows, which sum to 1.
    num_rows: m, rows to draw, with replacement.

  Returns:
    A :class:`StructuredCurvature` of m dense rows, unbiased.

  Raises:
    ValueError: if the curvature is not structured or sizes do not fit.

  Cost:
    O(n p) for h unless the curvature has it, and O(n + m p).

  Source:
    this project; without the centering the error is of order 100 for
    concentrated softmax outputs, with it below 1.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> a = jax.random.normal(jax.random.key(0), (500, 3))
    >>> h = StructuredCurvature(
    ...   a,
    ...   jnp.ones(500),
    ...   jnp.zeros((3, 0)),
    ...   jnp.zeros((0, 0)),
    ...   jnp.array(1.0),
    ... )
    >>> prob = jnp.full(500, 1 / 500)
    >>> low = curvature_sample(jax.random.key(1), h, prob, 400)
    >>> error = curvature_dense(low) / curvature_dense(h) - 1
    >>> bool(abs(jnp.diag(error)).max() < 0.3)
    True
  """
  if not isinstance(curvature, StructuredCurvature):
    raise ValueError(
      f"curvature must be a StructuredCurvature, got {type(curvature).__name__}"
    )
  a, weight, low, core, const, center, shift = curvature
  _checks.check_shape("prob", prob, (_num_rows(a),), "(n,)")
  indices, scale = row_sample(rng, prob, num_rows)
  rows = design_rows(a, indices)
  sampled = weight[indices] * scale
  if center is None:
    return StructuredCurvature(rows, sampled, low, core, const)
  if shift is None:
    shift = design_vecmat(weight, a)
  zero, one = jnp.zeros_like(weight[0]), jnp.ones_like(weight[0])
  extra = jnp.array([[zero, one], [one, -weight.sum()]])
  k = low.shape[1]
  whole = jnp.zeros((k + 2, k + 2), core.dtype)
  whole = whole.at[:k, :k].set(core).at[k:, k:].set(extra)
  columns = jnp.concatenate([low, shift[:, None], center[:, None]], 1)
  return StructuredCurvature(
    rows - center[None], sampled, columns, whole, const
  )


def _constant(const: jax.Array, like: jax.Array) -> jax.Array:
  """K as a matrix."""
  if jnp.ndim(const):
    return const
  return const * jnp.eye(len(like), dtype=like.dtype)


def _num_rows(a: jax.Array | Design) -> int:
  return len(a.values if isinstance(a, Design) else a)


def _num_columns(a: jax.Array | Design) -> int:
  return a.dim if isinstance(a, Design) else a.shape[1]


def _block_of(a: jax.Array | Design, start: Any, size: int) -> jax.Array:
  """Rows start to start + size, dense."""
  if isinstance(a, Design):
    return design_rows(a, start + jnp.arange(size))
  return lax.dynamic_slice_in_dim(a, start, size)
