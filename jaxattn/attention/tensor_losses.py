r"""The loss of tensor attention training theory, and its gradient.

For weights :math:`f = \mathrm{softmax}(s\, A_1 X (A_2 \otimes A_3)^\top)` by
rows, :math:`h = (A_4 \otimes A_5)(Y_1 \oslash Y_2) = (A_4 Y_1) \oslash
(A_5 Y_2)` and a target :math:`E`,

.. math::

  L(X) = \tfrac12 \|f h - E\|_F^2, \qquad
  \frac{dL}{dX} = s\, A_1^\top F (A_2 \otimes A_3), \quad
  F = f \circ q - \mathrm{diag}((f \circ q) 1) f, \quad q = (f h - E) h^\top.

For factors :math:`X = X_1 (X_2 \oslash X_3)^\top` this is tensor attention
with :math:`Q = A_1 X_1`, :math:`K_1 = A_2 X_2`, :math:`K_2 = A_3 X_3`. A
general X is one with :math:`d^2` features, :math:`Q = A_1 X`, of which there
are too many monomials for linear time. Source: arXiv 2405.16411.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.attention.streaming.moments import check_even
from jaxattn.attention.tensor import tensor_attention
from jaxattn.features import _chunks
from jaxattn.features.coefficients import (
  polynomial_coefficients,
  static_positive,
)
from jaxattn.features.monomials import check_feature_count
from jaxattn.sketch.kronecker import khatri_rao

Factors = tuple[jax.Array, jax.Array, jax.Array]
_NAMES = ("a1", "a2", "a3", "a4", "a5", "y1", "y2", "e")


def tensor_attention_loss(
  x: jax.Array | Factors,
  a1: jax.Array,
  a2: jax.Array,
  a3: jax.Array,
  a4: jax.Array,
  a5: jax.Array,
  y1: jax.Array,
  y2: jax.Array,
  e: jax.Array,
  *,
  scale: float | jax.Array | None = None,
) -> jax.Array:
  r"""Half the squared distance of tensor attention to a target.

  .. math::

    L(X) = \tfrac12 \|\mathrm{softmax}(s\, A_1 X (A_2 \otimes A_3)^\top)
    (A_4 Y_1 \oslash A_5 Y_2) - E\|_F^2

  Args:
    x: (d, d * d), column c d + e for columns c of ``a2`` and e of ``a3``; or
      its factors, three of (d, h), :math:`X = X_1 (X_2 \oslash X_3)^\top`.
    a1: (n, d), floating.
    a2: (s1, d).
    a3: (s2, d).
    a4: (s1, d).
    a5: (s2, d).
    y1: (d, v), value weights.
    y2: (d, v).
    e: (n, v), the target.
    scale: the factor s; None = 1 / d, as in the source. May be traced.

  Returns:
    () of the dtype of ``a1``.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(n s1 s2 (d^2 + v)) time, with factors O(n s1 s2 (h + v)); linear memory.

  Source:
    arXiv 2405.16411.

  Example:
    >>> import jax
    >>> a = jax.random.normal(jax.random.key(0), (8, 4, 4))
    >>> x = jax.random.normal(jax.random.key(1), (4, 16))
    >>> tensor_attention_loss(x, *a).shape
    ()
  """
  scale = _check(x, (a1, a2, a3, a4, a5, y1, y2, e), scale)
  return _loss(x, (a1, a2, a3, a4, a5, y1, y2, e), scale)


def tensor_attention_loss_gradient(
  x: jax.Array | Factors,
  a1: jax.Array,
  a2: jax.Array,
  a3: jax.Array,
  a4: jax.Array,
  a5: jax.Array,
  y1: jax.Array,
  y2: jax.Array,
  e: jax.Array,
  *,
  scale: float | jax.Array | None = None,
  degree: int | None = None,
  radius: float | None = None,
) -> jax.Array:
  r"""Gradient of :func:`tensor_attention_loss` in X: exact, or in linear time.

  With ``degree`` the weights f are those of a polynomial, in the residual as in
  the closed form. With :math:`f = \phi(Q) \mathrm{diag}(w) (\phi(K_1) \oslash
  \phi(K_2))^\top`, its rows divided by their sums, each term is a product of
  three moments of features with rows of :math:`A_r \ominus V_r`.

  Args:
    x: (d, d * d), or its factors, three of (d, h), which ``degree`` needs.
    a1: (n, d), floating.
    a2: (s1, d).
    a3: (s2, d).
    a4: (s1, d).
    a5: (s2, d).
    y1: (d, v), value weights.
    y2: (d, v).
    e: (n, v), the target.
    scale: factor on the logits; None = 1 / d, as in the source. May be traced.
    degree: even degree of the polynomial; None = exact.
    radius: bound on the absolute logits, a static number; with ``degree`` only.

  Returns:
    (d, d * d), of the dtype of ``a1``: the gradient in X, not in its factors.

  Raises:
    ValueError: if shapes or dtypes do not fit, one of ``degree`` and ``radius``
      comes without the other or is out of range, or ``degree`` without factors:
      "degree needs x as factors (x1, x2, x3), got an array of shape (4, 16)".

  Cost:
    Exact: as the loss, some times. With a degree: O((n + s1 + s2) m d v)
    multiply-adds, m = C(h + degree, degree), and m d^3 v; memory for three
    tables of m d (v + 1) numbers, and for what is made of a chunk of tokens.

  Source:
    arXiv 2405.16411.

  Example:
    >>> import jax
    >>> a = 0.5 * jax.random.normal(jax.random.key(0), (8, 4, 4))
    >>> x = tuple(a[:3] + 0.1)
    >>> exact = tensor_attention_loss_gradient(x, *a)
    >>> fast = tensor_attention_loss_gradient(x, *a, degree=6, radius=1.0)
    >>> bool(abs(exact - fast).max() < 1e-4 * abs(exact).max())
    True
  """
  arrays = (a1, a2, a3, a4, a5, y1, y2, e)
  scale = _check(x, arrays, scale)
  if (degree is None) != (radius is None):
    raise ValueError(
      "degree and radius must come together, got "
      f"degree={degree}, radius={radius}"
    )
  if degree is None or radius is None:
    return _exact_gradient(x, arrays, scale)
  if not isinstance(x, tuple):
    raise ValueError(
      "degree needs x as factors (x1, x2, x3), got an array of shape "
      f"{x.shape}: its {x.shape[1]} columns are too many variables"
    )
  check_even(degree)
  check_feature_count(x[0].shape[1], degree)
  radius = static_positive("radius", radius)
  return _fast_gradient(x, arrays, scale, degree=degree, radius=radius)


def _check(x: Any, arrays: Any, scale: Any) -> Any:
  """Checks the arrays of a loss; returns the factor on its logits."""
  factors = x if isinstance(x, tuple) else (x,)
  if len(factors) not in (1, 3):
    raise ValueError(f"x must be an array or three factors, got {len(factors)}")
  named = dict(zip(_NAMES, arrays, strict=True))
  named |= {f"x[{r}]": factor for r, factor in enumerate(factors)}
  for name, array in named.items():
    _checks.check_rank(name, array, 2)
  _checks.check_one_dtype(**named)
  a1, a2, a3, a4, a5, y1, y2, e = arrays
  d = a1.shape[1]
  for name, array in (("a2", a2), ("a3", a3), ("a4", a4), ("a5", a5)):
    _checks.check_shape(name, array, (None, d), "columns of a1")
  _checks.check_shape("a4", a4, (a2.shape[0], d), "rows of a2")
  _checks.check_shape("a5", a5, (a3.shape[0], d), "rows of a3")
  _checks.check_shape("y1", y1, (d, None), "columns of a4")
  _checks.check_shape("y2", y2, (d, y1.shape[1]), "shape of y1")
  _checks.check_shape("e", e, (a1.shape[0], y1.shape[1]), "rows a1, cols y1")
  if len(factors) == 1:
    _checks.check_shape("x", x, (d, d * d), "d, d * d")
  for r, factor in enumerate(factors[1:] and factors):
    _checks.check_shape(f"x[{r}]", factor, (d, factors[0].shape[1]), "d, h")
  if scale is None:
    return 1 / d
  _checks.check_scalar("scale", scale)
  return scale


def _heads(x: Any, arrays: Any) -> tuple[jax.Array, ...]:
  """Query, two keys and two values, (n, features) each."""
  a1, a2, a3, a4, a5, y1, y2, _ = arrays
  values = a4 @ y1, a5 @ y2
  if isinstance(x, tuple):
    x1, x2, x3 = x
    return a1 @ x1, a2 @ x2, a3 @ x3, *values
  # Feature (c, e) of the first keys is column c, of the second column e.
  d = a1.shape[1]
  return a1 @ x, jnp.repeat(a2, d, 1), jnp.tile(a3, (1, d)), *values


def _one_head(*arrays: jax.Array) -> list[jax.Array]:
  return [array[:, None] for array in arrays]


@jax.jit
def _loss(x: Any, arrays: Any, scale: Any) -> jax.Array:
  out = tensor_attention(*_one_head(*_heads(x, arrays)), scale=scale)
  return ((out[:, 0] - arrays[-1]) ** 2).sum() / 2


@jax.jit
def _exact_gradient(x: Any, arrays: Any, scale: Any) -> jax.Array:
  if isinstance(x, tuple):
    x1, x2, x3 = x
    x = x1 @ khatri_rao(x2, x3).T
  query, *others = _one_head(*_heads(x, arrays))
  out, vjp = jax.vjp(
    lambda query: tensor_attention(query, *others, scale=scale), query
  )
  (query_gradient,) = vjp(out - arrays[-1][:, None])
  return arrays[0].T @ query_gradient[:, 0]


@functools.partial(jax.jit, static_argnames=("degree", "radius"))
def _fast_gradient(
  x: Factors, arrays: Any, scale: Any, *, degree: int, radius: float
) -> jax.Array:
  # Tokens last, as features are made: (d, n).
  a1, a2, a3, a4, a5, *_, e = (a.T for a in arrays)
  y1, y2 = arrays[5:7]
  scale = jnp.asarray(scale, e.dtype)
  coefficients = polynomial_coefficients(degree, radius)
  spec = _chunks.Spec(coefficients=tuple(map(float, coefficients)))
  query, key1, key2 = (
    factor.T @ a for factor, a in zip(x, (a1, a2, a3), strict=True)
  )
  query, dim = scale * query, len(query)
  values = [
    jnp.concatenate([y.T @ a, jnp.ones((1, a.shape[1]), a.dtype)])
    for y, a in ((y1, a4), (y2, a5))
  ]
  keys = key1, key2
  table = [
    _chunks.moments(k[None], v[None], spec)
    for k, v in zip(keys, values, strict=True)
  ]
  weighted = spec.weigh(table[0] * table[1], dim)
  summed = _chunks.sums(query[None, :, None], weighted, spec)[0, :, 0]
  out = summed[:-1] / summed[-1:]
  residual = out - e
  inner = (residual * out).sum(0, keepdims=True)
  cotangent = jnp.concatenate([residual, -inner]) / summed[-1:]

  # (m, d v) of each of the three.
  triple = zip(
    (query, key1, key2), (a1, a2, a3), (cotangent, *values), strict=True
  )
  t1, t2, t3 = (_face_split_moments(x, a, v, spec) for x, a, v in triple)
  # One sum over m and v, as over tokens that are features themselves.
  t1, t2, t3 = (
    jnp.moveaxis(t.reshape(len(t), len(a1), -1), 1, 0).reshape(len(a1), -1)
    for t in (spec.weigh(t1, dim), t2, t3)
  )
  return scale * _face_split_moments(t1, t2, t3, _chunks.Spec())


def _face_split_moments(
  x: jax.Array, a: jax.Array, v: jax.Array, spec: _chunks.Spec
) -> jax.Array:
  """Features of x (h, n), by products of rows of a (d, n), v (v, n): (m, d v).

  Of these products a chunk of tokens exists at a time.
  """

  def columns(x: jax.Array, both: jax.Array) -> jax.Array:
    del x
    return _chunks.pairs(*jnp.split(both, (len(a),), 1))

  both = jnp.concatenate([a, v])
  return _chunks.moments(x[None], both[None], spec, columns)[0]
