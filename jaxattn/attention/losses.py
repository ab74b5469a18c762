r"""The attention loss of fast-gradient theory, and its gradient.

For :math:`f = \mathrm{softmax}(s\, A_1 X A_2^\top)` by rows, :math:`h = A_3 Y`
and a target :math:`E`,

.. math::

  L(X) = \tfrac12 \|f h - E\|_F^2, \qquad
  \frac{dL}{dX} = s\, A_1^\top p\, A_2, \quad
  p = f \circ q - \mathrm{diag}((f \circ q) 1) f, \quad q = (f h - E) h^\top.

With :math:`Q = A_1 X`, :math:`K = A_2`, :math:`V = h` this is attention, and
:math:`s\, p A_2` is the gradient of Q: the (n, n) matrices f, q and p are
never formed. Source: arXiv 2402.04497, definition 1.2 and section 4.
"""

import functools
from typing import Any

import jax

from jaxattn import _checks
from jaxattn.attention.polynomial import polynomial_attention
from jaxattn.features.coefficients import static_positive
from jaxattn.softmax.exact import softmax_attention


def attention_loss(
  x: jax.Array,
  a1: jax.Array,
  a2: jax.Array,
  a3: jax.Array,
  y: jax.Array,
  e: jax.Array,
  *,
  scale: float | jax.Array | None = None,
) -> jax.Array:
  r"""Half the squared distance of attention to a target, as a loss of ``x``.

  .. math::

    L(X) = \tfrac12 \|\mathrm{softmax}(s\, A_1 X A_2^\top) A_3 Y - E\|_F^2

  Args:
    x: (d, d2), the product of query and key weights; floating.
    a1: (n, d).
    a2: (m, d2).
    a3: (m, d3).
    y: (d3, c), the value weights.
    e: (n, c), the target.
    scale: the factor s; None = 1 / d, as in the source. May be traced.

  Returns:
    () of the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(n m (d2 + c)) time, O(n + m) memory beside a tile.

  Source:
    arXiv 2402.04497, definition 1.2.

  Example:
    >>> import jax
    >>> arrays = jax.random.normal(jax.random.key(0), (6, 4, 4))
    >>> attention_loss(*arrays).shape
    ()
  """
  scale = _check(x, a1, a2, a3, y, e, scale)
  return _loss(x, a1, a2, a3, y, e, scale)


def attention_loss_gradient(
  x: jax.Array,
  a1: jax.Array,
  a2: jax.Array,
  a3: jax.Array,
  y: jax.Array,
  e: jax.Array,
  *,
  scale: float | jax.Array | None = None,
  degree: int | None = None,
  radius: float | None = None,
) -> jax.Array:
  r"""Gradient of :func:`attention_loss` in ``x``: exact, or in linear time.

  With ``degree`` the softmax matrix f is replaced by its polynomial of that
  degree, in the loss's residual as in the closed form: its factors have
  m = C(d2 + degree, degree) columns, and :math:`f \circ q` has c times as many.

  Args:
    x: (d, d2), the product of query and key weights; floating.
    a1: (n, d).
    a2: (m, d2).
    a3: (m, d3).
    y: (d3, c), the value weights.
    e: (n, c), the target.
    scale: factor on the logits; None = 1 / d, as in the source. May be traced.
    degree: even degree of the polynomial; None = exact.
    radius: bound on the absolute logits, a static number; with ``degree`` only.

  Returns:
    (d, d2), of the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit, one of ``degree`` and ``radius``
      comes without the other, or is out of range.

  Cost:
    Exact: O(n m (d2 + c)) time. With a degree: O((n + m) d2 c) times the number
    of features. O(n + m) memory beside a tile or the moments.

  Source:
    arXiv 2402.04497, section 4 (gradient) and theorem 1.6 (linear time).

  Example:
    >>> import jax
    >>> arrays = jax.random.normal(jax.random.key(0), (6, 4, 4))
    >>> exact = attention_loss_gradient(*arrays)
    >>> fast = attention_loss_gradient(*arrays, degree=8, radius=4.0)
    >>> bool(abs(exact - fast).max() < 0.01 * abs(exact).max())
    True
  """
  scale = _check(x, a1, a2, a3, y, e, scale)
  if (degree is None) != (radius is None):
    raise ValueError(
      "degree and radius must come together, got "
      f"degree={degree}, radius={radius}"
    )
  if degree is not None and radius is not None:
    _checks.check_integer("degree", degree, 0, None)
    radius = static_positive("radius", radius)
  return _gradient(x, a1, a2, a3, y, e, scale, degree=degree, radius=radius)


def _check(
  x: jax.Array,
  a1: jax.Array,
  a2: jax.Array,
  a3: jax.Array,
  y: jax.Array,
  e: jax.Array,
  scale: Any,
) -> Any:
  """Checks the arrays of a loss; returns the factor on its logits."""
  named = {"x": x, "a1": a1, "a2": a2, "a3": a3, "y": y, "e": e}
  for name, array in named.items():
    _checks.check_rank(name, array, 2)
  _checks.check_one_dtype(**named)
  _checks.check_shape("x", x, (a1.shape[1], a2.shape[1]), "columns of a1, a2")
  _checks.check_shape("a3", a3, (a2.shape[0], None), "rows of a2")
  _checks.check_shape("y", y, (a3.shape[1], None), "columns of a3")
  _checks.check_shape("e", e, (a1.shape[0], y.shape[1]), "rows a1, cols y")
  if scale is None:
    return 1 / a1.shape[1]
  _checks.check_scalar("scale", scale)
  return scale


@jax.jit
def _loss(
  x: jax.Array,
  a1: jax.Array,
  a2: jax.Array,
  a3: jax.Array,
  y: jax.Array,
  e: jax.Array,
  scale: Any,
) -> jax.Array:
  operands = _one_head(a1 @ x, a2, a3 @ y)
  out = softmax_attention(*operands, scale=scale)
  return ((out[:, 0] - e) ** 2).sum() / 2


@functools.partial(jax.jit, static_argnames=("degree", "radius"))
def _gradient(
  x: jax.Array,
  a1: jax.Array,
  a2: jax.Array,
  a3: jax.Array,
  y: jax.Array,
  e: jax.Array,
  scale: Any,
  *,
  degree: int | None,
  radius: float | None,
) -> jax.Array:
  query, key, value = _one_head(a1 @ x, a2, a3 @ y)
  if degree is None or radius is None:
    attend = functools.partial(softmax_attention, scale=scale)
  else:
    attend = functools.partial(
      polynomial_attention,
      degree=degree,
      radius=radius,
      scale=scale,
      backward="closed_form",
      # The radius is one of the logits as they are.
      center_keys=False,
    )
  out, vjp = jax.vjp(lambda query: attend(query, key, value), query)
  (query_gradient,) = vjp(out - e[:, None])
  return a1.T @ query_gradient[:, 0]


def _one_head(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  return tuple(array[:, None] for array in arrays)
