r"""The tangent kernel of a prefix whose values are its keys.

One attention head that sees nothing but a prefix of m columns
:math:`w_r \in R^d`, which are keys and, up to fixed signs :math:`a_r = \pm 1`,
values too:

.. math::

  o(x) = \sum_r s_r a_r w_r, \qquad s = \mathrm{softmax}(W x).

The model that is trained is :math:`f = m\, o`; the kernel is
:math:`H = m \sum_\theta \partial_\theta o\, \partial_\theta o^\top
= \tfrac1m \sum_\theta \partial_\theta f\, \partial_\theta f^\top`, which has a
limit as m grows. Source: arXiv 2406.14036 for the model; the closed forms are
this project's.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.ntk._prefix import context as contexts
from jaxattn.ntk._prefix import finite
from jaxattn.ntk._prefix.context import einsum


def tied_prefix_init(
  rng: jax.Array,
  length: int,
  dim: int,
  *,
  sigma: float = 1.0,
  paired: bool = True,
  dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
  """Draws Gaussian columns and their signs.

  Args:
    rng: PRNG key.
    length: m, number of columns; even if ``paired``.
    dim: d.
    sigma: standard deviation of the entries.
    paired: the second half of the columns is the first with opposite signs, so
      that the output is 0; False draws all columns and signs independently.
    dtype: of both arrays, floating.

  Returns:
    Columns (m, d) and signs (m,).

  Raises:
    ValueError: if a size is no positive integer, ``length`` is odd and
      ``paired``, or ``sigma`` is negative.

  Cost:
    O(m d).

  Source:
    arXiv 2406.14036, the model of its convergence theorem.

  Example:
    >>> import jax
    >>> w, a = tied_prefix_init(jax.random.key(0), 4, 3)
    >>> w.shape, a.tolist()
    ((4, 3), [1.0, 1.0, -1.0, -1.0])
  """
  _checks.check_integer("length", length, 1, None)
  _checks.check_integer("dim", dim, 1, None)
  _checks.check_choice("paired", paired, (False, True))
  _checks.check_nonnegative("sigma", sigma)
  if paired and length % 2:
    raise ValueError(f"length must be even for paired columns, got {length}")
  rng_w, rng_a = jax.random.split(rng)
  drawn = length // 2 if paired else length
  w = sigma * jax.random.normal(rng_w, (drawn, dim), dtype)
  if not paired:
    return w, jax.random.rademacher(rng_a, (length,), dtype)
  return jnp.tile(w, (2, 1)), jnp.repeat(jnp.array([1, -1], dtype), drawn)


def tied_prefix_output(w: jax.Array, a: jax.Array, x: jax.Array) -> jax.Array:
  r"""Output of the tied prefix model, a convex combination of the a_r w_r.

  .. math:: o(x) = \sum_r \mathrm{softmax}(W x)_r\, a_r w_r

  Args:
    w: (m, d) prefix columns, floating.
    a: (m,) their signs.
    x: (n, d) queries.

  Returns:
    (n, d). The model of the paper is m times this.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(n m d) time, O(n m) memory.

  Source:
    arXiv 2406.14036, the model of its convergence theorem.

  Example:
    >>> import jax.numpy as jnp
    >>> w, a = jnp.ones((4, 3)), jnp.array([1.0, 1.0, 1.0, -1.0])
    >>> print(tied_prefix_output(w, a, jnp.zeros((1, 3))))
    [[0.5 0.5 0.5]]
  """
  w, a, x = map(jnp.asarray, (w, a, x))
  _check(w, a, x=x)
  return _output(w, a, x)


def tied_prefix_jacobian(w: jax.Array, a: jax.Array, x: jax.Array) -> jax.Array:
  r"""Derivatives of the output with respect to all prefix columns.

  .. math:: \frac{\partial o(x)}{\partial w_r}
    = s_r (a_r I + u_r x^\top), \qquad u_r = a_r w_r - o(x)

  Args:
    w: (m, d) prefix columns, floating.
    a: (m,) their signs.
    x: (n, d) queries.

  Returns:
    (n, d, m, d): output of a datum first, then the entry of ``w``.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(n m d^2) time and memory; :func:`tied_prefix_ntk` never forms it.

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> w, a = jnp.zeros((2, 1)), jnp.array([1.0, -1.0])
    >>> print(tied_prefix_jacobian(w, a, jnp.ones((1, 1)))[0, 0, :, 0])
    [ 0.5 -0.5]
  """
  w, a, x = map(jnp.asarray, (w, a, x))
  _check(w, a, x=x)
  return _jacobian(w, a, x)


def tied_prefix_ntk(
  w: jax.Array,
  a: jax.Array,
  x1: jax.Array,
  x2: jax.Array | None = None,
  *,
  chunk_size: int | None = None,
) -> jax.Array:
  r"""Tangent kernel of the tied prefix model, in closed form.

  With :math:`s, u` of x and :math:`s', u'` of x',

  .. math::

    H(x, x') = m \sum_r s_r s'_r \big[ a_r^2 I + a_r x' u_r'^\top
    + a_r u_r x^\top + (x \cdot x')\, u_r u_r'^\top \big].

  Args:
    w: (m, d) prefix columns, floating.
    a: (m,) their signs.
    x1: (n1, d) queries.
    x2: (n2, d) queries; None = ``x1``.
    chunk_size: columns visited at a time; memory only. None = as many as fit
      some tens of MiB.

  Returns:
    (n1, d, n2, d): outputs of x1 by outputs of x2; positive semidefinite as an
    (n1 d, n1 d) matrix if ``x2`` is None.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``chunk_size`` is no
      positive integer.

  Cost:
    O(n1 n2 d^2 m) time; O((n1 + n2) (m + d chunk_size) + n1 n2 d^2) memory.

  Source:
    the closed form is this project's; arXiv 2406.14036 studies the kernel.

  Example:
    >>> import jax
    >>> w = jax.random.normal(jax.random.key(0), (256, 3))
    >>> x = jax.random.normal(jax.random.key(1), (5, 3))
    >>> tied_prefix_ntk(w, w[:, 0] * 0 + 1, x).shape
    (5, 3, 5, 3)
  """
  w, a, x1 = map(jnp.asarray, (w, a, x1))
  _check(w, a, x1=x1)
  if x2 is not None:
    x2 = jnp.asarray(x2)
    _check(w, a, x2=x2)
  m, d = w.shape
  if chunk_size is None:
    num_data = x1.shape[0] + (0 if x2 is None else x2.shape[0])
    chunk_size = max(1, finite.BLOCK // (num_data * (d + 1)))
  _checks.check_integer("chunk_size", chunk_size, 1, None)
  return _ntk(w, a, x1, x2, min(chunk_size, m))


def _check(w: jax.Array, a: jax.Array, **queries: jax.Array) -> None:
  _checks.check_floating("w", w)
  _checks.check_rank("w", w, 2)
  _checks.check_shape("a", a, w.shape[:1], "(m,)")
  for name, x in queries.items():
    _checks.check_shape(name, x, (None, w.shape[1]), "(n, d)")
  for name, x in {"a": a, **queries}.items():
    _checks.check_floating(name, x)
  for name, x in {"w": w, **queries}.items():
    if 0 in x.shape:
      raise ValueError(f"{name} must not be empty, got shape {x.shape}")


def _weights(w: jax.Array, x: jax.Array) -> jax.Array:
  """(n, m) softmax over the prefix."""
  return jax.nn.softmax(einsum("nd,md->nm", x, w), axis=-1)


@jax.jit
def _output(w: jax.Array, a: jax.Array, x: jax.Array) -> jax.Array:
  dtype, (w, a, x) = contexts.widen((w, a, x))
  return _wide_output(w, a, x).astype(dtype)


def _wide_output(w: jax.Array, a: jax.Array, x: jax.Array) -> jax.Array:
  return einsum("nm,md->nd", _weights(w, x), a[:, None] * w)


@jax.jit
def _jacobian(w: jax.Array, a: jax.Array, x: jax.Array) -> jax.Array:
  dtype, (w, a, x) = contexts.widen((w, a, x))
  s, d = _weights(w, x), w.shape[1]
  u = (a[:, None] * w)[None] - _wide_output(w, a, x)[:, None]
  own = einsum("nm,m,ij->nimj", s, a, jnp.eye(d, dtype=w.dtype))
  return (own + einsum("nm,nmi,nj->nimj", s, u, x)).astype(dtype)


@functools.partial(jax.jit, static_argnames="chunk_size")
def _ntk(
  w: jax.Array,
  a: jax.Array,
  x1: jax.Array,
  x2: jax.Array | None,
  chunk_size: int,
) -> jax.Array:
  d = w.shape[1]
  dtype, (w, a, x1, x2) = contexts.widen((w, a, x1, x2))
  products = _factor_products(w, a, x1, x2, chunk_size)
  x2 = x1 if x2 is None else x2
  both, left, right, signs = (
    products[:, :d, :, :d],
    products[:, :d, :, d],
    products[:, d, :, :d],
    products[:, d, :, d],
  )
  kernel = einsum("id,jd->ij", x1, x2)[:, None, :, None] * both
  kernel += einsum("ilj,ik->iljk", left, x1)
  kernel += einsum("ijk,jl->iljk", right, x2)
  kernel += einsum("ij,lk->iljk", signs, jnp.eye(d, dtype=w.dtype))
  return kernel.astype(dtype)


def _factor_products(
  w: jax.Array,
  a: jax.Array,
  x1: jax.Array,
  x2: jax.Array | None,
  chunk_size: int,
) -> jax.Array:
  """M sum_r s s' (u_r, a_r) (u'_r, a_r)^T: (n1, d + 1, n2, d + 1).

  All four terms of the kernel in one product over the prefix.
  """
  m, d = w.shape
  beta = a[:, None] * w
  data = [x1] if x2 is None else [x1, x2]
  parts = [(x, *finite.attend(w, beta, x, None, 0.0)) for x in data]
  shift = jnp.asarray(math.log(m) / 2, w.dtype)

  def step(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple:
    w, beta, seen, a = chunk
    rows = []
    for part in parts:
      found = finite.factors(part, shift, w, beta, seen)
      own = found["key"].reshape(len(part[0]), d, -1)
      own = jnp.concatenate((own, (found["value"] * a.T)[:, None]), 1)
      rows.append(own.reshape(-1, own.shape[-1]))
    return total + einsum("ac,bc->ab", rows[0], rows[-1]), None

  columns = w, beta, jnp.ones((m, 1), bool), a[:, None]
  chunks = tuple(finite.chunked(y, chunk_size) for y in columns)
  sizes = [len(x) * (d + 1) for x in (data[0], data[-1])]
  total, _ = lax.scan(step, jnp.zeros(sizes, w.dtype), chunks)
  return total.reshape(len(data[0]), d + 1, len(data[-1]), d + 1)
