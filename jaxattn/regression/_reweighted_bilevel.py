r"""Reweighted examples of softmax regression, the bilevel form.

Examples :math:`(A_i, b_i)` with :math:`\ell_i(x) = \tfrac12
\|\mathrm{softmax}(A_i x) - b_i\|^2` have weights, and the regression is fitted
to them:

.. math::

  x^*(w) = \arg\min_x \sum_i w_i \ell_i(x) + \tfrac12 \lambda \|x\|^2, \qquad
  \min_{w \ge 0} \ell_{\mathrm{val}}(x^*(w)).

With :math:`H = \sum_i w_i \nabla^2 \ell_i + \lambda I`, at a stationary point,

.. math:: \frac{\partial \ell_{\mathrm{val}}}{\partial w_i}
  = -\nabla \ell_i(x^*)^\top H^{-1} \nabla \ell_{\mathrm{val}}(x^*) .
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks, newton
from jaxattn.numerics.linalg import ridge_solve
from jaxattn.regression import softmax_resnet
from jaxattn.regression._reweighted_objective import (
  STEP_SIZES,
  best_step,
  check_finite,
)
from jaxattn.regression.softmax_resnet import SoftmaxResnetData

_CONFIG = newton.NewtonConfig(max_steps=100)
# A point counts as stationary up to this power of the machine's precision.
_STATIONARY = 0.4


class BilevelResult(NamedTuple):
  """Weights of examples, and the regression that they lead to.

  Attributes:
    w: (m,), at least 0.
    x: (d,), the minimizer for these weights.
    val_losses: (steps + 1,), the validation loss before each step and after the
      last.
    grad_norms: (steps + 1,), norm of the gradient of the inner problem where
      each of these was taken: the derivative in w is right if it is small.
  """

  w: jax.Array
  x: jax.Array
  val_losses: jax.Array
  grad_norms: jax.Array


class _Weighted(NamedTuple):
  """The inner problem: m examples, stacked, and their weights."""

  w: jax.Array
  examples: SoftmaxResnetData
  ridge: jax.Array


def hypergradient(
  w: jax.Array,
  x: jax.Array,
  a: jax.Array,
  b: jax.Array,
  a_val: jax.Array,
  b_val: jax.Array,
  *,
  ridge: float | jax.Array,
) -> jax.Array:
  r"""The derivative of the validation loss in the weights of the examples.

  .. math:: -\nabla \ell_i(x)^\top H^{-1} \nabla \ell_{\mathrm{val}}(x)

  That is right at a stationary point only, so whether x is one is checked: its
  gradient must be small beside the sum of the examples' own, at x or at 0,
  whichever is larger: at an x that fits all of them there is rounding only.

  Args:
    w: (m,), weights.
    x: (d,), the minimizer for them.
    a: (m, n, d), features of the examples.
    b: (m, n), their targets.
    a_val: (V, n, d), features of the validation examples.
    b_val: (V, n), their targets.
    ridge: lambda, positive.

  Returns:
    (m,). Under ``jit``, where nothing can be raised, NaN if x is not
    stationary.

  Raises:
    ValueError: if shapes do not fit, ``ridge`` is not positive, or x is known
      not to be stationary.

  Cost:
    O((m + V) n d + m n d^2 + d^3).

  Source:
    the implicit function theorem, for the objective of arXiv 2310.03331.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import hypergradient
    >>> a = jax.random.normal(jax.random.key(0), (3, 5, 2))
    >>> b = jnp.full((3, 5), 0.2)
    >>> x = jnp.zeros(2)
    >>> print(hypergradient(jnp.ones(3), x, a, b, a, b, ridge=0.1))
    [0. 0. 0.]
  """
  data, val = _prepare(a, b, a_val, b_val, ridge)
  _checks.check_shape("w", w, data.w.shape, "(m,)")
  _checks.check_shape("x", x, a.shape[-1:], "(d,)")
  data = data._replace(w=jnp.asarray(w, data.w.dtype))
  out, relative = _hypergradient(x, data, val)
  return _where_stationary(
    out, relative, "x must be stationary", "solve the inner problem accurately"
  )


def ricl_bilevel(
  a: jax.Array,
  b: jax.Array,
  a_val: jax.Array,
  b_val: jax.Array,
  *,
  ridge: float | jax.Array,
  num_steps: int = 150,
  step_size: float | jax.Array = 20.0,
) -> BilevelResult:
  r"""Learns weights of the examples of a softmax regression.

  Projected gradient descent, :math:`w \leftarrow \max(w - \eta h, 0)` from
  w = 1, each time with the minimizer of the inner problem, which starts from
  the one before. Examples that do harm end at exactly 0. The derivative h is
  right at a minimizer only: whether each was one is checked, as in
  :func:`hypergradient`.

  Args:
    a: (m, n, d), features of the examples.
    b: (m, n), their targets.
    a_val: (V, n, d), features of examples that can be trusted.
    b_val: (V, n), their targets.
    ridge: lambda, positive.
    num_steps: steps.
    step_size: eta. Losses are of order 1 / n and their derivatives in w smaller
      still, so that it is large.

  Returns:
    A :class:`BilevelResult`. Under ``jit``, where nothing can be raised, its
    weights are NaN if an inner problem was not solved.

  Raises:
    ValueError: if shapes or dtypes do not fit, a value is not finite, a number
      is not positive, or an inner problem was not solved.

  Cost:
    A step: a few of Newton's, each O(m n d^2 + d^3).

  Source:
    arXiv 2310.03331, whose theory is about reweighted softmax regression; the
    algorithm is this project's.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import ricl_bilevel
    >>> a = jax.random.normal(jax.random.key(0), (4, 8, 2))
    >>> b = jax.nn.softmax(a @ jnp.array([1.0, -1.0]))
    >>> spoiled = b.at[0].set(jnp.eye(8)[0])
    >>> found = ricl_bilevel(a, spoiled, a, b, ridge=1e-2, num_steps=20)
    >>> bool(found.w[0] < 0.1), bool((found.w[1:] > 1).all())
    (True, True)
  """
  data, val = _prepare(a, b, a_val, b_val, ridge)
  _checks.check_integer("num_steps", num_steps, 1, None)
  _checks.check_positive("step_size", step_size)
  return _checked(*_ricl(data, val, step_size, num_steps))


def laricl_bilevel(
  a: jax.Array,
  b: jax.Array,
  a_val: jax.Array,
  b_val: jax.Array,
  *,
  ridge: float | jax.Array,
  weight_ridge: float | jax.Array = 1e-2,
  num_rounds: int = 1,
) -> BilevelResult:
  r"""The same by linear approximation: one regression of residuals on weights.

  With :math:`x^*(w + \delta) \approx x^*(w) - H^{-1} G^\top \delta`, the
  rows of G being :math:`\nabla \ell_i`, the residuals of validation examples
  are linear in the weights; ridge regression gives a step, of which 1, 1/2,
  1/4, 1/8 or 0 is taken, whichever has the smallest validation loss after
  negative weights became 0. Each round does this at the weights of the last.

  Args:
    a: (m, n, d), features of the examples.
    b: (m, n), their targets.
    a_val: (V, n, d), features of examples that can be trusted.
    b_val: (V, n), their targets.
    ridge: lambda of the inner problem, positive.
    weight_ridge: of the regression, on the step delta; positive.
    num_rounds: linearizations.

  Returns:
    As :func:`ricl_bilevel`, with num_rounds + 1 losses, none above the one
    before.

  Raises:
    ValueError: as :func:`ricl_bilevel`.

  Cost:
    A round: five inner solves at once, and O(V n (d^2 + m^2)).

  Source:
    arXiv 2310.03331 for the idea; the formula is this project's.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import laricl_bilevel
    >>> a = jax.random.normal(jax.random.key(0), (4, 8, 2))
    >>> b = jax.nn.softmax(a @ jnp.array([1.0, -1.0]))
    >>> spoiled = b.at[0].set(jnp.eye(8)[0])
    >>> found = laricl_bilevel(a, spoiled, a, b, ridge=1e-2)
    >>> bool(found.w[0] < found.w[1:].min())
    True
  """
  data, val = _prepare(a, b, a_val, b_val, ridge)
  _checks.check_positive("weight_ridge", weight_ridge)
  _checks.check_integer("num_rounds", num_rounds, 1, None)
  return _checked(*_laricl(data, val, weight_ridge, num_rounds))


# --- the inner problem ---


def _prepare(
  a: jax.Array,
  b: jax.Array,
  a_val: jax.Array,
  b_val: jax.Array,
  ridge: float | jax.Array,
) -> tuple[_Weighted, SoftmaxResnetData]:
  _checks.check_positive("ridge", ridge)
  stacked = []
  for name, x, y in (("a", a, b), ("a_val", a_val, b_val)):
    _checks.check_rank(name, x, 3)
    _checks.check_floating(name, x)
    if not len(x):
      raise ValueError(f"{name} needs at least one example")
    target = "b" + name.removeprefix("a")
    _checks.check_shape(target, y, x.shape[:2], f"{name}.shape[:2]")
    check_finite(name, x)
    check_finite(target, y)
    stacked.append(jax.vmap(_example)(jnp.asarray(x), jnp.asarray(y)))
  _checks.check_shape("a_val", a_val, (None, None, a.shape[2]), "(V, n, d)")
  examples, val = stacked
  _checks.check_one_dtype(a=examples.b, a_val=val.b)
  dtype = examples.b.dtype
  weights = jnp.ones((len(examples.b),), dtype)
  return _Weighted(weights, examples, jnp.asarray(ridge, dtype)), val


def _example(a: jax.Array, b: jax.Array) -> SoftmaxResnetData:
  return softmax_resnet.prepare(a, b, residual_scale=0.0)


def _losses_and_grads(
  x: jax.Array, examples: SoftmaxResnetData
) -> tuple[jax.Array, jax.Array]:
  """(m,) and (m, d), of each example by itself."""
  return jax.vmap(softmax_resnet.value_and_grad, (None, 0))(x, examples)


def _value_and_grad(
  x: jax.Array, data: _Weighted
) -> tuple[jax.Array, jax.Array]:
  values, grads = _losses_and_grads(x, data.examples)
  loss = data.w @ values + data.ridge * (x @ x) / 2
  return loss, data.w @ grads + data.ridge * x


def _loss(x: jax.Array, data: _Weighted) -> jax.Array:
  return _value_and_grad(x, data)[0]


def _curvature(x: jax.Array, data: _Weighted) -> newton.DenseCurvature:
  def dense(example: SoftmaxResnetData) -> jax.Array:
    return newton.curvature_dense(softmax_resnet.curvature(x, example))

  each = jax.vmap(dense)(data.examples)
  identity = jnp.eye(len(x), dtype=x.dtype)
  return newton.DenseCurvature(
    jnp.einsum("i,ijk->jk", data.w, each) + data.ridge * identity
  )


_PROBLEM = newton.Problem(_loss, _value_and_grad, _curvature)


def _solve(x: jax.Array, data: _Weighted) -> jax.Array:
  return newton.implicit_solution(_PROBLEM, x, data, config=_CONFIG)


def _grad_norms(x: jax.Array, data: _Weighted) -> tuple[jax.Array, jax.Array]:
  """Norm of the inner gradient, and the same beside its summands."""

  def pull(x: jax.Array) -> jax.Array:
    _, grads = _losses_and_grads(x, data.examples)
    of_ridge = data.ridge * jnp.linalg.norm(x)
    return data.w @ jnp.linalg.norm(grads, axis=1) + of_ridge

  norm = jnp.linalg.norm(_value_and_grad(x, data)[1])
  size = jnp.maximum(pull(x), pull(jnp.zeros_like(x)))
  return norm, norm / jnp.where(size > 0, size, 1)


def _most(dtype: jnp.dtype) -> float:
  """Up to which relative gradient a point counts as stationary."""
  return float(jnp.finfo(dtype).eps) ** _STATIONARY


def _where_stationary(
  out: jax.Array, relative: jax.Array, complaint: str, advice: str
) -> jax.Array:
  """Raises, or gives NaN under ``jit``, unless the gradient is small."""
  most = _most(out.dtype)
  if _checks.is_concrete(relative) and not relative <= most:
    raise ValueError(
      f"{complaint}, got a gradient of relative size {float(relative):.1e}, "
      f"above {most:.1e}: {advice}"
    )
  return jnp.where(relative <= most, out, jnp.nan)


# --- the outer one ---


def _val_loss(x: jax.Array, val: SoftmaxResnetData) -> jax.Array:
  return jax.vmap(softmax_resnet.loss, (None, 0))(x, val).sum()


def _checked(result: BilevelResult, relative: jax.Array) -> BilevelResult:
  w = _where_stationary(
    result.w,
    relative.max(),
    "the inner problem must be solved",
    "take a larger ridge or a smaller step",
  )
  return result._replace(w=w)


@jax.jit
def _hypergradient(
  x: jax.Array, data: _Weighted, val: SoftmaxResnetData
) -> tuple[jax.Array, jax.Array]:
  """The derivative, and how large the inner gradient is."""
  _, grads = _losses_and_grads(x, data.examples)
  hessian = _curvature(x, data).matrix
  u = jnp.linalg.solve(hessian, jax.grad(_val_loss)(x, val))
  return -grads @ u, _grad_norms(x, data)[1]


@functools.partial(jax.jit, static_argnames="num_steps")
def _ricl(
  data: _Weighted,
  val: SoftmaxResnetData,
  step_size: float | jax.Array,
  num_steps: int,
) -> tuple[BilevelResult, jax.Array]:
  """The result, and relative sizes of all inner gradients."""

  def outer(w: jax.Array, x: jax.Array) -> tuple[jax.Array, Any]:
    x, row = _solved(x, data._replace(w=w), val)
    return row[0], (x, row)

  def step(carry: Any, _: None) -> tuple[Any, Any]:
    grad, (x, row) = jax.grad(outer, has_aux=True)(*carry)
    return (jnp.maximum(carry[0] - step_size * grad, 0), x), row

  (w, x), rows = lax.scan(step, _start(data), length=num_steps)
  _, (x, last) = outer(w, x)
  values, norms, relative = jax.tree.map(jnp.append, rows, last)
  return BilevelResult(w, x, values, norms), relative


@functools.partial(jax.jit, static_argnames="num_rounds")
def _laricl(
  data: _Weighted,
  val: SoftmaxResnetData,
  weight_ridge: float | jax.Array,
  num_rounds: int,
) -> tuple[BilevelResult, jax.Array]:
  """The result, and relative sizes of all inner gradients."""
  sizes = jnp.array(STEP_SIZES, data.w.dtype)

  def residual(x: jax.Array) -> jax.Array:
    each = jax.vmap(lambda a: softmax_resnet.predict(x, a, residual_scale=0.0))
    return (each(val.a) - val.b).reshape(-1)

  def solved(w: jax.Array, x: jax.Array) -> tuple[jax.Array, Any]:
    return _solved(x, data._replace(w=w), val)

  def step(carry: Any, _: None) -> tuple[Any, Any]:
    w, x = carry
    grads = _losses_and_grads(x, data.examples)[1]
    hessian = _curvature(x, data._replace(w=w)).matrix
    jacobian = -jax.jacfwd(residual)(x) @ jnp.linalg.solve(hessian, grads.T)
    delta = ridge_solve(jacobian, -residual(x), weight_ridge)
    trials = jnp.maximum(w[None] + sizes[:, None] * delta[None], 0)
    xs, rows = jax.vmap(solved, (0, None))(trials, x)
    values, _, relative = rows
    wrong = relative > _most(relative.dtype)
    best = best_step(jnp.where(wrong, jnp.inf, values))
    w, x, row = jax.tree.map(lambda x: x[best], (trials, xs, rows))
    return (w, x), row

  w, x = _start(data)
  x, first = solved(w, x)
  (w, x), rows = lax.scan(step, (w, x), length=num_rounds)
  values, norms, relative = jax.tree.map(jnp.append, first, rows)
  return BilevelResult(w, x, values, norms), relative


def _solved(
  x: jax.Array, data: _Weighted, val: SoftmaxResnetData
) -> tuple[jax.Array, Any]:
  """The minimizer; its validation loss, and how well it was found."""
  x = _solve(x, data)
  return x, (_val_loss(x, val), *_grad_norms(x, data))


def _start(data: _Weighted) -> tuple[jax.Array, jax.Array]:
  d = data.examples.const.shape[-1]
  return jnp.ones_like(data.w), jnp.zeros((d,), data.w.dtype)
