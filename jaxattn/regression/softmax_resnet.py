r"""Softmax regression with an identity skip.

With :math:`y = Ax`, :math:`u = e^y + \rho y` and :math:`\alpha = \sum_i u_i`,

.. math::

  f = u / \alpha, \qquad c = f - b, \qquad
  L(x) = \tfrac12 \|f - b\|^2 + \tfrac12 \|w \circ Ax\|^2
    + \tfrac12 \lambda \|x\|^2.

``residual_scale`` is :math:`\rho`: 1 in the source, and 0 for softmax
regression. Everything is computed from :math:`e^{y - M}`,
:math:`M = \max(\max_i y_i, 0)`, so that nothing overflows. f need not be
positive for :math:`\rho > 0`, and :math:`\alpha` can vanish: the domain is
:math:`\alpha \ge \alpha_{\min} n`.

The Hessian is :math:`A^\top \operatorname{diag}(D) A` plus rank two plus a
constant; unlike the abstract of the source says, it is indefinite in general.
Source: arXiv 2309.13482; the formulas are derived here and checked against
automatic differentiation.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxattn import _checks, newton
from jaxattn.regression import _designs

__all__ = [
  "SoftmaxResnetData",
  "curvature",
  "fit_softmax_resnet",
  "gauss_newton",
  "log_alpha",
  "loss",
  "predict",
  "prepare",
  "problem",
  "value_and_grad",
]


class SoftmaxResnetData(NamedTuple):
  """One problem, with what never changes computed once.

  Attributes:
    a: (n, d), the features.
    b: (n,), the target.
    w2: (n,), squared weights of the regularizer.
    const: (d, d), A^T diag(w^2) A + ridge I.
    ridge: ().
    residual_scale: (), rho.
  """

  a: jax.Array | newton.Design
  b: jax.Array
  w2: jax.Array
  const: jax.Array
  ridge: jax.Array
  residual_scale: jax.Array


class _Parts(NamedTuple):
  """What loss and derivatives share, all divided by alpha."""

  y: jax.Array
  f: jax.Array
  slope: jax.Array  # v: of u in y.
  bend: jax.Array  # z: of the slope.
  total: jax.Array  # alpha e^-M
  top: jax.Array  # M


def prepare(
  a: jax.Array | newton.Design,
  b: jax.Array,
  *,
  w: float | jax.Array = 0.0,
  ridge: float | jax.Array = 0.0,
  residual_scale: float | jax.Array = 1.0,
) -> SoftmaxResnetData:
  r"""Collects a problem and computes the constant part of its Hessian.

  Args:
    a: (n, d), or a sparse :class:`jaxattn.newton.Design`.
    b: (n,). It need not sum to 1, though f does.
    w: weight of the regularizer, at least 0: a number or (n,). The loss of f is
      of order 1 / n: beyond about w = 1 / n the answer is 0.
    ridge: lambda, at least 0.
    residual_scale: rho, at least 0.

  Returns:
    A :class:`SoftmaxResnetData`.

  Raises:
    ValueError: if shapes or dtypes do not fit, or a number is negative.

  Cost:
    O(n d^2).

  Source:
    arXiv 2309.13482.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import softmax_resnet
    >>> data = softmax_resnet.prepare(jnp.eye(3), jnp.full(3, 1 / 3))
    >>> data.const.shape
    (3, 3)
  """
  a, n, dtype = _designs.check_design("a", a)
  b = jnp.asarray(b)
  _checks.check_shape("b", b, (n,), "(n,)")
  _checks.check_floating("b", b)
  _check_scale(residual_scale)
  w2, ridge, const = _designs.regularizer(a, w, ridge, n, dtype)
  rho = jnp.asarray(residual_scale, dtype)
  return SoftmaxResnetData(a, b.astype(dtype), w2, const, ridge, rho)


def predict(
  x: jax.Array,
  a: jax.Array | newton.Design,
  *,
  residual_scale: float | jax.Array = 1.0,
) -> jax.Array:
  """The normalized profile f.

  Args:
    x: (d,).
    a: (n, d).
    residual_scale: rho, at least 0.

  Returns:
    (n,), summing to 1; with ``residual_scale=0`` the softmax of A x.

  Raises:
    ValueError: if shapes do not fit or ``residual_scale`` is not a number of at
      least 0.

  Cost:
    O(n d).

  Source:
    arXiv 2309.13482.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import softmax_resnet
    >>> f = softmax_resnet.predict(jnp.ones(2), jnp.array([[800.0, 0], [1, 1]]))
    >>> print(f)
    [1. 0.]
  """
  _check_scale(residual_scale)
  return _parts(x, a, residual_scale).f


def log_alpha(
  x: jax.Array,
  a: jax.Array | newton.Design,
  *,
  residual_scale: float | jax.Array = 1.0,
) -> tuple[jax.Array, jax.Array]:
  r"""The normalizer :math:`\alpha = \sum_i (e^{y_i} + \rho y_i)`.

  Args:
    x: (d,).
    a: (n, d).
    residual_scale: rho, at least 0.

  Returns:
    Its sign and the logarithm of its size, as ``jnp.linalg.slogdet``.

  Raises:
    ValueError: if shapes do not fit or ``residual_scale`` is not a number of at
      least 0.

  Cost:
    O(n d).

  Source:
    arXiv 2309.13482.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import softmax_resnet
    >>> sign, log = softmax_resnet.log_alpha(jnp.zeros(2), jnp.eye(2))
    >>> float(sign * jnp.exp(log))
    2.0
  """
  _check_scale(residual_scale)
  parts = _parts(x, a, residual_scale)
  return jnp.sign(parts.total), jnp.log(jnp.abs(parts.total)) + parts.top


def loss(x: jax.Array, data: SoftmaxResnetData) -> jax.Array:
  """The loss, one half of the squared error and of the penalties.

  Args:
    x: (d,).
    data: from :func:`prepare`.

  Returns:
    ().

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n d).

  Source:
    arXiv 2309.13482, times one half.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import softmax_resnet
    >>> data = softmax_resnet.prepare(jnp.eye(2), jnp.array([1.0, 0.0]))
    >>> print(softmax_resnet.loss(jnp.zeros(2), data))
    0.25
  """
  return _loss(x, data, _parts(x, data.a, data.residual_scale))


def value_and_grad(
  x: jax.Array, data: SoftmaxResnetData
) -> tuple[jax.Array, jax.Array]:
  r"""The loss and its gradient.

  .. math:: \nabla L = A^\top \big( v \circ (c - \langle c, f \rangle)
    + w^2 \circ y \big) + \lambda x, \qquad v = (e^y + \rho) / \alpha

  Args:
    x: (d,).
    data: from :func:`prepare`.

  Returns:
    () and (d,).

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n d).

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import softmax_resnet
    >>> data = softmax_resnet.prepare(jnp.eye(2), jnp.array([1.0, 0.0]))
    >>> print(softmax_resnet.value_and_grad(jnp.zeros(2), data)[1])
    [-0.5  0.5]
  """
  parts = _parts(x, data.a, data.residual_scale)
  grad = newton.design_vecmat(_gradient_row(parts, data), data.a)
  return _loss(x, data, parts), grad + data.ridge * x


def curvature(
  x: jax.Array, data: SoftmaxResnetData
) -> newton.StructuredCurvature:
  r"""The Hessian.

  .. math::

    \nabla^2 L = A^\top \big( \operatorname{diag}(D) + [v, p]\, C\, [v, p]^\top
      + \operatorname{diag}(w^2) \big) A + \lambda I, \\
    D = v^2 + (c - \langle c, f \rangle) \circ z, \quad p = v \circ (f + c),
    \quad C = \begin{bmatrix} \|f\|^2 + 2 \langle c, f \rangle & -1 \\
      -1 & 0 \end{bmatrix}, \quad z = e^y / \alpha

  Args:
    x: (d,).
    data: from :func:`prepare`.

  Returns:
    A structured curvature, centered for sampling at A^T D / sum(D).

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n d): one pass over A for all row-side vectors. In float32 take the means
    of the columns off features that have large ones, because the diagonal and
    the rank-two part cancel in them; without a skip f does not depend on means.

  Source:
    derived here; rank two where the source says "low".

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn import newton
    >>> from jaxattn.regression import softmax_resnet
    >>> data = softmax_resnet.prepare(jnp.eye(2), jnp.array([0.5, 0.5]))
    >>> h = softmax_resnet.curvature(jnp.zeros(2), data)
    >>> print(newton.curvature_dense(h))
    [[ 0.5 -0.5]
     [-0.5  0.5]]
  """
  parts = _parts(x, data.a, data.residual_scale)
  weight, rows, core = _hessian_parts(parts, data)
  return _structured(weight, newton.design_vecmat(rows, data.a), core, data)


def gauss_newton(
  x: jax.Array, data: SoftmaxResnetData
) -> newton.StructuredCurvature:
  r"""The positive semidefinite part of the Hessian.

  .. math:: J^\top J + A^\top \operatorname{diag}(w^2) A + \lambda I, \qquad
    J = (\operatorname{diag}(v) - f v^\top) A

  Args:
    x: (d,).
    data: from :func:`prepare`.

  Returns:
    A structured curvature.

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n d).

  Source:
    derived here: the Hessian with c = 0.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import softmax_resnet
    >>> data = softmax_resnet.prepare(jnp.eye(2), jnp.array([1.0, 0.0]))
    >>> h = softmax_resnet.gauss_newton(jnp.zeros(2), data)
    >>> bool((h.weight >= 0).all())
    True
  """
  parts = _parts(x, data.a, data.residual_scale)
  weight, rows, core = _quadratic(parts, parts.slope**2, parts.f, 0.0)
  return _structured(weight, newton.design_vecmat(rows, data.a), core, data)


@functools.lru_cache(maxsize=64)
def problem(
  *, alpha_min: float = 1e-2, positive: bool = False
) -> newton.Problem:
  r"""The problem for :func:`jaxattn.newton.minimize`.

  Args:
    alpha_min: alpha must stay above this times n, where it is n at x = 0; at
      most 1, which x = 0 still meets.
    positive: ask instead that all entries of f be positive. Steps are shortened
      at that wall and do not slide along it: a fit that meets it stops there,
      in general not at the least loss of all positive profiles.

  Returns:
    A :class:`jaxattn.newton.Problem`; the same call gives the same object.

  Raises:
    ValueError: if ``alpha_min`` is not in (0, 1].

  Cost:
    O(1).

  Source:
    arXiv 2309.13482; the domain is this project's.

  Example:
    >>> from jaxattn.regression import softmax_resnet
    >>> softmax_resnet.problem() is softmax_resnet.problem()
    True
  """
  _checks.check_positive("alpha_min", alpha_min)
  _checks.check_range("alpha_min", alpha_min, 0, 1)
  _checks.check_choice("positive", positive, (False, True))

  def in_domain(x: jax.Array, data: SoftmaxResnetData) -> jax.Array:
    parts = _parts(x, data.a, data.residual_scale)
    if positive:
      return _is_positive(parts.y, data.residual_scale)
    n = len(parts.f)
    return parts.total >= alpha_min * n * jnp.exp(-parts.top)

  return newton.Problem(
    loss, value_and_grad, curvature, gauss_newton, in_domain, _expand
  )


def fit_softmax_resnet(
  a: jax.Array | newton.Design,
  b: jax.Array,
  *,
  w: float | jax.Array = 0.0,
  ridge: float | jax.Array = 0.0,
  residual_scale: float | jax.Array = 1.0,
  x0: jax.Array | None = None,
  config: newton.NewtonConfig = newton.NewtonConfig(),
  rng: jax.Array | None = None,
) -> newton.NewtonResult:
  """Fits a normalized profile b over n items by their features.

  For several targets map over ``b`` with ``jax.vmap``.

  Args:
    a: (n, d), or a sparse :class:`jaxattn.newton.Design`.
    b: (n,), the profile: a histogram, a mean image, a row of attention.
    w: weight of the regularizer, as in :func:`prepare`.
    ridge: as in :func:`prepare`.
    residual_scale: rho; 0 is softmax regression.
    x0: (d,), the start; None = 0, which is always in the domain.
    config: of the solver.
    rng: PRNG key, for a sketch only.

  Returns:
    A :class:`jaxattn.newton.NewtonResult`.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, as "a must have 2
      dimensions, got shape (5,)".

  Cost:
    O(n d^2 + d^3) a step, or O(n d + m d^2 + d^3) with m sampled rows.

  Source:
    arXiv 2309.13482.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import fit_softmax_resnet, softmax_resnet
    >>> a = jax.random.normal(jax.random.key(0), (200, 3))
    >>> b = softmax_resnet.predict(jnp.array([0.5, -1.0, 0.2]), a)
    >>> print(fit_softmax_resnet(a, b).x.round(3))
    [ 0.5 -1.   0.2]
  """
  data = prepare(a, b, w=w, ridge=ridge, residual_scale=residual_scale)
  x0 = _designs.check_start(x0, len(data.const), data.b.dtype)
  return newton.minimize(problem(), x0, data, config=config, rng=rng)


def _check_scale(residual_scale: Any) -> None:
  _checks.check_scalar("residual_scale", residual_scale)
  _checks.check_nonnegative("residual_scale", residual_scale)


def _parts(
  x: jax.Array, a: jax.Array | newton.Design, residual_scale: Any
) -> _Parts:
  y = newton.design_matvec(a, x)
  rho = jnp.asarray(residual_scale, y.dtype)
  top = jnp.maximum(y.max(), 0)
  e, z = jnp.exp(-top), jnp.exp(y - top)
  u, v = z + rho * y * e, z + rho * e
  total = u.sum()
  return _Parts(y, u / total, v / total, z / total, total, top)


def _is_positive(y: jax.Array, rho: jax.Array) -> jax.Array:
  """Whether all e^y + rho y are; f itself has entries that round to 0."""
  # A softmax is positive even where e^y itself rounds to 0.
  return jnp.where(rho == 0, y > -jnp.inf, jnp.exp(y) + rho * y > 0).all()


def _loss(x: jax.Array, data: SoftmaxResnetData, parts: _Parts) -> jax.Array:
  c = parts.f - data.b
  penalty = data.w2 @ parts.y**2 + data.ridge * (x @ x)
  return (c @ c + penalty) / 2


def _gradient_row(parts: _Parts, data: SoftmaxResnetData) -> jax.Array:
  """Of the loss in y."""
  c = parts.f - data.b
  return parts.slope * (c - c @ parts.f) + data.w2 * parts.y


def _hessian_parts(
  parts: _Parts, data: SoftmaxResnetData
) -> tuple[jax.Array, jax.Array, jax.Array]:
  f, c = parts.f, parts.f - data.b
  mean = c @ f
  weight = parts.slope**2 + (c - mean) * parts.bend
  return _quadratic(parts, weight, f + c, 2 * mean)


def _quadratic(
  parts: _Parts, weight: jax.Array, column: jax.Array, rest: jax.Array | float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Weights D; rows v, p and D to be multiplied by A; the core C."""
  v = parts.slope
  corner = parts.f @ parts.f + rest
  one = jnp.ones_like(corner)
  core = jnp.array([[corner, -one], [-one, 0 * one]])
  return weight, jnp.stack([v, v * column, weight]), core


def _structured(
  weight: jax.Array,
  products: jax.Array,
  core: jax.Array,
  data: SoftmaxResnetData,
) -> newton.StructuredCurvature:
  *low, shift = products
  total = weight.sum()
  # Where the weights cancel there is no center to take.
  center = jnp.where(total == 0, 0, shift / jnp.where(total == 0, 1, total))
  return newton.StructuredCurvature(
    data.a, weight, jnp.stack(low, 1), core, data.const, center, shift
  )


def _expand(
  x: jax.Array, data: SoftmaxResnetData
) -> tuple[jax.Array, jax.Array, Partial]:
  """Loss, gradient and Hessian from two passes over A instead of four."""
  parts = _parts(x, data.a, data.residual_scale)
  weight, rows, core = _hessian_parts(parts, data)
  rows = jnp.concatenate([_gradient_row(parts, data)[None], rows])
  grad, *products = newton.design_vecmat(rows, data.a)
  hessian = Partial(_structured, weight, jnp.stack(products), core)
  return _loss(x, data, parts), grad + data.ridge * x, hessian
