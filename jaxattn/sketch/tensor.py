r"""Sketches of tensor powers: a power of an inner product in few dimensions.

The maps S: R^n -> R^m satisfy, without forming x ⊗ ... ⊗ x of size n^p,

.. math:: E \langle S x, S y \rangle = \langle x, y \rangle^p .

*TensorSketch* multiplies p independent CountSketches
:math:`(C_j x)_b = \sum_{i: h_j(i) = b} s_j(i) x_i` in the Fourier domain, which
is a CountSketch of the tensor product with hash :math:`\sum_j h_j \bmod m`.
*PolySketch* multiplies Gaussian projections along a binary tree. *TensorSRHT*
draws entries of a transform that mixes the coordinates, and acts on matrices of
any number of columns. Sources: Pham and Pagh, KDD 2013; arXiv 1909.01410; arXiv
2310.01655.

An error is about :math:`\|x\|^p \|y\|^p / \sqrt m`, whatever
:math:`\langle x, y \rangle` is: for rough accuracy only.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator
from jaxattn.sketch.hadamard import fwht, pad_to_pow2
from jaxattn.sketch.kronecker import face_splitting

# A product of a bucket and a frequency fits into 32 bits up to here.
_MAX_MATMUL_BUCKETS = 1 << 16


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["bucket", "sign"],
  meta_fields=["sketch_dim"],
)
@dataclasses.dataclass(frozen=True)
class TensorSketch:
  """The p CountSketches of a TensorSketch.

  Source: Pham and Pagh, KDD 2013.

  Attributes:
    bucket: (p, n) int32, h_j(i) in [0, m).
    sign: (p, n) int8, s_j(i).
    sketch_dim: m, static.
  """

  bucket: jax.Array
  sign: jax.Array
  sketch_dim: int


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["projections"],
  meta_fields=["degree", "nonnegative"],
)
@dataclasses.dataclass(frozen=True)
class PolySketch:
  """The Gaussian projections of a PolySketch.

  Source: arXiv 2310.01655, section 2.

  Attributes:
    projections: pairs of matrices, one for each inner node of the tree, a node
      after its two subtrees.
    degree: p, static.
    nonnegative: whether sketches are squares of sketches of degree p / 2.
  """

  projections: tuple[tuple[jax.Array, ...], ...]
  degree: int
  nonnegative: bool


def tensor_sketch_init(
  rng: jax.Array, dim: int, sketch_dim: int, degree: int
) -> TensorSketch:
  """Draws a TensorSketch of a power, or of a product of p vectors.

  Args:
    rng: key.
    dim: n, size of a vector.
    sketch_dim: m, size of a sketch.
    degree: p >= 1, number of factors.

  Returns:
    The sketch, as a pytree.

  Raises:
    ValueError: if a size is too small.

  Cost:
    O(p n) time and memory.

  Source:
    Pham and Pagh, KDD 2013, with fully random hashes.

  Example:
    >>> import jax
    >>> sketch = tensor_sketch_init(jax.random.key(0), 64, 256, 2)
    >>> sketch.bucket.shape
    (2, 64)
  """
  _check_sizes(dim, sketch_dim, degree, least=1)
  rng_bucket, rng_sign = jax.random.split(rng)
  shape = (degree, dim)
  bucket = jax.random.randint(rng_bucket, shape, 0, sketch_dim, jnp.int32)
  sign = jax.random.rademacher(rng_sign, shape, jnp.int8)
  return TensorSketch(bucket, sign, sketch_dim)


def tensor_sketch_apply(sketch: TensorSketch, *xs: jax.Array) -> jax.Array:
  r"""Sketches a tensor power of one vector, or the product of several.

  .. math:: E \langle S(x_1, .., x_p), S(y_1, .., y_p) \rangle
    = \prod_j \langle x_j, y_j \rangle, \qquad
    \mathrm{Var} \le \frac{3^p - 1}{m} \prod_j \|x_j\|^2 \|y_j\|^2

  Linear in each argument. Where n <= 4 m the CountSketches and their transforms
  are one matrix product each, else sums over buckets and a real FFT; the two
  agree to rounding.

  Args:
    sketch: from :func:`tensor_sketch_init`.
    *xs: one (..., n) whose p-th power is meant, or p of one shape; floating.

  Returns:
    (..., m) of the dtype of ``xs``; computed in float32 for 16-bit inputs.

  Raises:
    ValueError: if there are neither 1 nor p vectors, or shapes or dtypes do
      not fit.

  Cost:
    p n m multiply-adds a vector, or O(p (n + m log m)), and one inverse FFT of
    m; memory of p results.

  Source:
    Pham and Pagh, KDD 2013, section 3; the matrix form is this project's.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x, y = jnp.ones(8), jnp.arange(8.0) / 8
    >>> sketch = tensor_sketch_init(jax.random.key(0), 8, 4096, 2)
    >>> sx, sy = (tensor_sketch_apply(sketch, z) for z in (x, y))
    >>> print(jnp.dot(x, y) ** 2, sx.shape, abs(sx @ sy - 12.25) < 1)
    12.25 (4096,) True
  """
  xs = tuple(map(jnp.asarray, xs))
  degree, dim = sketch.bucket.shape
  if len(xs) not in (1, degree):
    raise ValueError(
      f"xs must be 1 or {degree} vectors (degree of the sketch), got {len(xs)}"
    )
  for x in xs:
    _check_vector(x, dim)
    if (x.shape, x.dtype) != (xs[0].shape, xs[0].dtype):
      raise ValueError(
        "xs must have one shape and dtype, got "
        f"{x.shape} {x.dtype} and {xs[0].shape} {xs[0].dtype}"
      )
  size = sketch.sketch_dim
  by_matmul = dim <= 4 * size and size <= _MAX_MATMUL_BUCKETS
  return _tensor_sketch(sketch, xs, by_matmul)


def poly_sketch_init(
  rng: jax.Array,
  dim: int,
  sketch_dim: int,
  degree: int,
  *,
  nonnegative: bool = False,
) -> PolySketch:
  r"""Draws a Gaussian PolySketch of a power.

  .. math:: S_1(x) = x, \qquad S_p(x) = \frac{1}{\sqrt m}
    \bigl(S_{\lceil p/2 \rceil}(x) G_1 \circ S'_{\lfloor p/2 \rfloor}(x) G_2
    \bigr)

  with independent S, S' and standard Gaussian matrices.

  Args:
    rng: key.
    dim: n, size of a vector.
    sketch_dim: m, size of a sketch; a square number with ``nonnegative``.
    degree: p >= 2; even and >= 4 with ``nonnegative``.
    nonnegative: the sketch is the tensor square of one of degree p / 2 and
      size sqrt(m), so that estimates are squares; about three times the error.

  Returns:
    The sketch, as a pytree.

  Raises:
    ValueError: if a size is too small, or does not suit ``nonnegative``.

  Cost:
    O(p m (n + m)) time and memory.

  Source:
    arXiv 2310.01655, algorithm 1; arXiv 1909.01410.

  Example:
    >>> import jax
    >>> sketch = poly_sketch_init(jax.random.key(0), 64, 256, 4)
    >>> [g.shape for g, _ in sketch.projections]
    [(64, 256), (64, 256), (256, 256)]
  """
  _check_sizes(dim, sketch_dim, degree, least=2)
  _checks.check_choice("nonnegative", nonnegative, (False, True))
  size, power = sketch_dim, degree
  if nonnegative:
    size, power = math.isqrt(sketch_dim), degree // 2
    if size**2 != sketch_dim:
      raise ValueError(
        f"sketch_dim must be a square if nonnegative, got {sketch_dim}"
      )
    if degree % 2 or degree < 4:
      raise ValueError(
        f"degree must be even and >= 4 if nonnegative, got {degree}"
      )
  shapes = list(_projection_shapes(dim, size, power))
  rngs = jax.random.split(rng, len(shapes))
  projections = tuple(
    tuple(
      jax.random.normal(r, shape)
      for r, shape in zip(jax.random.split(one), pair, strict=True)
    )
    for one, pair in zip(rngs, shapes, strict=True)
  )
  return PolySketch(projections, degree, nonnegative)


def poly_sketch_apply(sketch: PolySketch, x: jax.Array) -> jax.Array:
  r"""Sketches the tensor power of a vector by Gaussian projections.

  :math:`E \langle S x, S y \rangle = \langle x, y \rangle^p` with an rms error
  of about :math:`\|x\|^p \|y\|^p / \sqrt m` where x and y are nearly
  orthogonal; some three times that if ``nonnegative``.

  Args:
    sketch: from :func:`poly_sketch_init`.
    x: (..., n), floating.

  Returns:
    (..., m) of the dtype of ``x``; computed in float32 for 16-bit inputs.

  Raises:
    ValueError: if the shape or dtype of ``x`` does not fit.

  Cost:
    About p m (n + m) multiply-adds a vector; memory of p results.

  Source:
    arXiv 2310.01655, algorithm 1.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> rng = jax.random.key(0)
    >>> sketch = poly_sketch_init(rng, 8, 256, 4, nonnegative=True)
    >>> sx, sy = poly_sketch_apply(sketch, jnp.eye(2, 8))
    >>> sx.shape, bool(sx @ sy >= 0)
    ((256,), True)
  """
  x = jnp.asarray(x)
  _check_vector(x, sketch.projections[0][0].shape[0])
  return _poly_sketch(sketch, x)


def tensor_srht_factors(
  rng: jax.Array, a1: jax.Array, a2: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
  r"""The two factors of a TensorSRHT of a Kronecker product.

  .. math:: x_t = (H D_1 A_1)_{i_t}, \qquad y_t = (H D_2 A_2)_{j_t}

  with H Walsh-Hadamard matrices of entries -1 and 1, random signs D on the rows
  of A, which zeros fill up to a power of two, and indices drawn uniformly and
  independently. The sketch of :math:`A_1 \otimes A_2` has the rows :math:`x_t
  \otimes y_t / \sqrt m`, see :func:`tensor_srht_rows`, and so the sketch of
  vec(B) has the entries :math:`x_t^\top B y_t / \sqrt m`: no row of d1 d2
  numbers is needed.

  Args:
    rng: PRNG key. The same key gives the same signs and indices.
    a1: (n1, d1), floating.
    a2: (n2, d2), of the same dtype.
    num_rows: m.

  Returns:
    x, (m, d1), and y, (m, d2).

  Raises:
    ValueError: if these are no two floating matrices of one dtype, or
      ``num_rows`` is not positive.

  Cost:
    O(d1 n1 log n1 + d2 n2 log n2), as :func:`fwht`, and m (d1 + d2) numbers.

  Source:
    arXiv 1909.01410, definition 15.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxattn.sketch import tensor_srht_factors
    >>> x, y = tensor_srht_factors(
    ...   jax.random.key(0), jnp.ones((8, 2)), jnp.ones((4, 3)), 5
    ... )
    >>> x.shape, y.shape
    ((5, 2), (5, 3))
  """
  a1, a2 = jnp.asarray(a1), jnp.asarray(a2)
  _checks.check_rank("a1", a1, 2)
  _checks.check_rank("a2", a2, 2)
  _checks.check_one_dtype(a1=a1, a2=a2)
  _checks.check_integer("num_rows", num_rows, 1, None)
  rng1, rng2 = jax.random.split(rng)
  return _srht_rows(rng1, a1, num_rows), _srht_rows(rng2, a2, num_rows)


def tensor_srht_rows(
  rng: jax.Array, a1: jax.Array, a2: jax.Array, num_rows: int
) -> jax.Array:
  r"""A TensorSRHT of a Kronecker product.

  .. math:: (S (A_1 \otimes A_2))_t = \frac{1}{\sqrt m}\,
    (H D_1 A_1)_{i_t} \otimes (H D_2 A_2)_{j_t}, \qquad
    E\, S^\top S = I

  Args:
    rng: PRNG key.
    a1: (n1, d1), floating.
    a2: (n2, d2), of the same dtype.
    num_rows: m.

  Returns:
    (m, d1 d2), columns in the order of ``numpy.kron``.

  Raises:
    ValueError: as :func:`tensor_srht_factors`.

  Cost:
    That of :func:`tensor_srht_factors`, and m d1 d2 numbers.

  Source:
    arXiv 1909.01410, definition 15.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxattn.sketch import tensor_srht_rows
    >>> key, a = jax.random.key(0), jnp.eye(4)
    >>> tensor_srht_rows(key, a, a, 8).shape
    (8, 16)
  """
  x, y = tensor_srht_factors(rng, a1, a2, num_rows)
  return face_splitting(x, y) / math.sqrt(num_rows)


def _check_sizes(dim: int, sketch_dim: int, degree: int, least: int) -> None:
  _checks.check_integer("dim", dim, 1, None)
  _checks.check_integer("sketch_dim", sketch_dim, 1, None)
  _checks.check_integer("degree", degree, least, None)


def _check_vector(x: jax.Array, dim: int) -> None:
  if x.ndim == 0 or x.shape[-1] != dim:
    raise ValueError(f"x must have shape (..., {dim}), got {x.shape}")
  _checks.check_floating("x", x)


@functools.partial(jax.jit, static_argnames="by_matmul")
def _tensor_sketch(
  sketch: TensorSketch, xs: tuple[jax.Array, ...], by_matmul: bool
) -> jax.Array:
  dtype, size = accumulator(xs[0].dtype), sketch.sketch_dim
  transform = _spectrum_by_matmul if by_matmul else _spectrum_by_fft
  factors = (
    transform(xs[j % len(xs)].astype(dtype), bucket, sign, size)
    for j, (bucket, sign) in enumerate(
      zip(sketch.bucket, sketch.sign.astype(dtype))
    )
  )
  out = jnp.fft.irfft(functools.reduce(operator.mul, factors), size)
  return out.astype(xs[0].dtype)


def _spectrum_by_matmul(
  x: jax.Array, bucket: jax.Array, sign: jax.Array, size: int
) -> jax.Array:
  """rfft(C x) as two products with rows of a table of cosines and sines."""
  # From the integer h f mod m: a float angle loses digits as m grows.
  frequency = jnp.arange(size // 2 + 1, dtype=jnp.uint32)[None]
  place = bucket.astype(jnp.uint32)[:, None] * frequency % jnp.uint32(size)
  angle = -2 * np.pi * np.arange(size) / size
  cos, sin = (
    sign[:, None] * jnp.asarray(table, sign.dtype)[place]
    for table in (np.cos(angle), np.sin(angle))
  )
  # A transform in bfloat16, the default on some devices, would be none.
  multiply = functools.partial(jnp.matmul, x, precision=lax.Precision.HIGHEST)
  return lax.complex(multiply(cos), multiply(sin))


def _spectrum_by_fft(
  x: jax.Array, bucket: jax.Array, sign: jax.Array, size: int
) -> jax.Array:
  # Sums over whole rows: a scatter along the last axis is several times slower.
  rows = jnp.moveaxis(x, -1, 0)
  signed = sign.reshape(-1, *(1,) * (x.ndim - 1)) * rows
  sums = jax.ops.segment_sum(signed, bucket, size)
  return jnp.fft.rfft(jnp.moveaxis(sums, 0, -1))


def _projection_shapes(
  dim: int, size: int, power: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
  """Shapes of both projections of each inner node, subtrees first."""
  halves = power - power // 2, power // 2
  for half in halves:
    if half > 1:
      yield from _projection_shapes(dim, size, half)
  first, second = ((size if half > 1 else dim, size) for half in halves)
  yield first, second


@jax.jit
def _poly_sketch(sketch: PolySketch, x: jax.Array) -> jax.Array:
  dtype = accumulator(x.dtype)
  nodes = iter(sketch.projections)
  power = sketch.degree // 2 if sketch.nonnegative else sketch.degree
  out = _poly_tree(nodes, x.astype(dtype), power)
  if sketch.nonnegative:
    out = (out[..., :, None] * out[..., None, :]).reshape(*x.shape[:-1], -1)
  return out.astype(x.dtype)


def _poly_tree(
  nodes: Iterator[tuple[jax.Array, ...]], x: jax.Array, power: int
) -> jax.Array:
  if power == 1:
    return x
  children = [
    _poly_tree(nodes, x, half) for half in (power - power // 2, power // 2)
  ]
  first, second = (
    child @ g.astype(x.dtype)
    for child, g in zip(children, next(nodes), strict=True)
  )
  return first * second / math.sqrt(first.shape[-1])


@functools.partial(jax.jit, static_argnames="num_rows")
def _srht_rows(rng: jax.Array, a: jax.Array, num_rows: int) -> jax.Array:
  rng_sign, rng_row = jax.random.split(rng)
  sign = jax.random.rademacher(rng_sign, (len(a), 1), a.dtype)
  mixed = fwht(pad_to_pow2(sign * a, 0), 0)
  return mixed[jax.random.randint(rng_row, (num_rows,), 0, len(mixed))]
