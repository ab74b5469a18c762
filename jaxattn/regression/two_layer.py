r"""Two layers: a rectified readout of a softmax, or a softmax of ReLU units.

``order="softmax_relu"``, the default, with a1 (n, d) and a2 (m, n):

.. math::

  f = \operatorname{softmax}(A_1 x), \quad o = A_2 f, \quad
  h = \max(o, 0), \quad
  L(x) = \tfrac12 \|h - b\|^2 + \tfrac12 \|w \circ A_1 x\|^2
    + \tfrac12 \lambda \|x\|^2.

``order="relu_softmax"``, with a1 (m, d), a2 (n, m) and b (n,), is
:math:`f = \operatorname{softmax}(A_2 \max(A_1 x, 0))` and
:math:`\tfrac12 \|f - b\|^2`.

With s the active units, :math:`t = s \circ (h - b)`,
:math:`r = f \circ (A_2^\top t - \langle f, A_2^\top t \rangle)` and J the
Jacobian of h, the Hessian of the first is

.. math:: \tilde A^\top \operatorname{diag}(r) \tilde A + J^\top J
  + A_1^\top \operatorname{diag}(w^2) A_1 + \lambda I, \qquad
  \tilde A = A_1 - 1 (A_1^\top f)^\top,

because :math:`\sum_i r_i = 0`. It holds between kinks, where a unit is 0;
there the slope of a unit counts as 0. Sources: arXiv 2311.15390, and
arXiv 2308.08358 for the other order; the formulas are derived here and checked
against automatic differentiation.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import linalg
from jax.tree_util import Partial

from jaxattn import _checks, newton
from jaxattn.regression import _designs
from jaxattn.softmax import softmax_jacobian_matvec

__all__ = [
  "TwoLayerData",
  "active_set",
  "curvature",
  "fit_two_layer",
  "gauss_newton",
  "kink_margin",
  "loss",
  "predict",
  "prepare",
  "problem",
  "value_and_grad",
]

_ORDERS = ("softmax_relu", "relu_softmax")


class TwoLayerData(NamedTuple):
  """One problem, with what never changes computed once.

  Attributes:
    a1: the first layer, (n, d); for ``"relu_softmax"`` (m, d).
    a2: the second, (m, n); for ``"relu_softmax"`` (n, m).
    b: the target, (m,); for ``"relu_softmax"`` (n,).
    w2: squared weights of the regularizer, one for each row of a1.
    const: (d, d), A1^T diag(w^2) A1 + ridge I.
    ridge: ().
  """

  a1: jax.Array | newton.Design
  a2: jax.Array
  b: jax.Array
  w2: jax.Array
  const: jax.Array
  ridge: jax.Array


def prepare(
  a1: jax.Array | newton.Design,
  a2: jax.Array,
  b: jax.Array,
  *,
  w: float | jax.Array = 0.0,
  ridge: float | jax.Array = 0.0,
) -> TwoLayerData:
  """Collects a problem and computes the constant part of its Hessian.

  Args:
    a1: the first layer, (n, d), or a sparse :class:`jaxattn.newton.Design`.
    a2: the second, (m, n).
    b: the target, (m,).
    w: weight of the regularizer, at least 0: a number or (n,).
    ridge: at least 0.

  Returns:
    A :class:`TwoLayerData`.

  Raises:
    ValueError: if shapes or dtypes do not fit, or a number is negative.

  Cost:
    O(n d^2).

  Source:
    arXiv 2311.15390.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import two_layer
    >>> two_layer.prepare(jnp.eye(3), jnp.ones((2, 3)), jnp.ones(2)).w2.shape
    (3,)
  """
  a1, n, dtype = _designs.check_design("a1", a1)
  a2, b = jnp.asarray(a2), jnp.asarray(b)
  _checks.check_rank("a2", a2, 2)
  _checks.check_shape("a2", a2, (None, n), "(m, n), n = rows of a1")
  _checks.check_floating("a2", a2)
  if not len(a2):
    raise ValueError(f"a2 must have at least one row, got shape {a2.shape}")
  _checks.check_shape("b", b, (len(a2),), "(m,)")
  _checks.check_floating("b", b)
  w2, ridge, const = _designs.regularizer(a1, w, ridge, n, dtype)
  return TwoLayerData(a1, a2.astype(dtype), b.astype(dtype), w2, const, ridge)


def predict(
  x: jax.Array,
  a1: jax.Array | newton.Design,
  a2: jax.Array,
  *,
  order: str = "softmax_relu",
) -> jax.Array:
  """The output of both layers.

  Args:
    x: (d,).
    a1: the first layer.
    a2: the second.
    order: ``"softmax_relu"`` or ``"relu_softmax"``.

  Returns:
    One number for each row of ``a2``.

  Raises:
    ValueError: if ``order`` is another or shapes do not fit.

  Cost:
    O(n d + m n).

  Source:
    arXiv 2311.15390, 2308.08358.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import two_layer
    >>> a2 = jnp.array([[1.0, 3.0], [-1.0, -1.0]])
    >>> print(two_layer.predict(jnp.zeros(2), jnp.eye(2), a2))
    [2. 0.]
  """
  _checks.check_choice("order", order, _ORDERS)
  return _output(newton.design_matvec(a1, x), a2, order)


def loss(
  x: jax.Array, data: TwoLayerData, *, order: str = "softmax_relu"
) -> jax.Array:
  """The loss, one half of the squared error and of the penalties.

  Args:
    x: (d,).
    data: from :func:`prepare`.
    order: ``"softmax_relu"`` or ``"relu_softmax"``.

  Returns:
    ().

  Raises:
    ValueError: if ``order`` is another or shapes do not fit.

  Cost:
    O(n d + m n).

  Source:
    arXiv 2311.15390.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import two_layer
    >>> data = two_layer.prepare(jnp.eye(2), jnp.ones((1, 2)), jnp.zeros(1))
    >>> print(two_layer.loss(jnp.zeros(2), data))
    0.5
  """
  _checks.check_choice("order", order, _ORDERS)
  y = newton.design_matvec(data.a1, x)
  return _loss(x, data, y, _output(y, data.a2, order))


def value_and_grad(
  x: jax.Array, data: TwoLayerData, *, order: str = "softmax_relu"
) -> tuple[jax.Array, jax.Array]:
  r"""The loss and its gradient.

  .. math:: \nabla L = A_1^\top (r + w^2 \circ y) + \lambda x

  Args:
    x: (d,).
    data: from :func:`prepare`.
    order: ``"softmax_relu"`` or ``"relu_softmax"``.

  Returns:
    () and (d,). At a kink the slope of a unit counts as 0.

  Raises:
    ValueError: if ``order`` is another or shapes do not fit.

  Cost:
    O(n d + m n).

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import two_layer
    >>> a2 = jnp.array([[1.0, 3.0]])
    >>> data = two_layer.prepare(jnp.eye(2), a2, jnp.array([1.0]))
    >>> print(two_layer.value_and_grad(jnp.zeros(2), data)[1])
    [-0.5  0.5]
  """
  _checks.check_choice("order", order, _ORDERS)
  a1, a2 = data.a1, data.a2
  y = newton.design_matvec(a1, x)
  if order == "softmax_relu":
    f, output, residual = _forward(y, data)
    row = softmax_jacobian_matvec(f, residual @ a2)
  else:
    output = _output(y, a2, order)
    back = softmax_jacobian_matvec(output, output - data.b)
    row = jnp.where(y > 0, back @ a2, 0)
  grad = newton.design_vecmat(row + data.w2 * y, a1) + data.ridge * x
  return _loss(x, data, y, output), grad


def curvature(
  x: jax.Array,
  data: TwoLayerData,
  *,
  order: str = "softmax_relu",
  sketch_target: str = "data",
) -> newton.StructuredCurvature:
  """The Hessian between kinks.

  Args:
    x: (d,).
    data: from :func:`prepare`.
    order: ``"softmax_relu"`` or ``"relu_softmax"``.
    sketch_target: what a solver that samples rows samples: ``"data"``, the term
      that changes with x; ``"all"``, the regularizer with it, as the source
      does, which is far less accurate and there for comparison.

  Returns:
    A structured curvature.

  Raises:
    ValueError: if an option is not one of its choices or shapes do not fit.

  Cost:
    O(n d + m n d): the Jacobian is one product of matrices.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn import newton
    >>> from jaxattn.regression import two_layer
    >>> a2 = jnp.array([[1.0, 3.0]])
    >>> data = two_layer.prepare(jnp.eye(2), a2, jnp.array([2.0]))
    >>> h = two_layer.curvature(jnp.zeros(2), data)
    >>> print(newton.curvature_dense(h))
    [[ 0.25 -0.25]
     [-0.25  0.25]]
  """
  return _curvature(x, data, order, sketch_target)


def gauss_newton(
  x: jax.Array, data: TwoLayerData, *, order: str = "softmax_relu"
) -> newton.StructuredCurvature:
  """The positive semidefinite part of the Hessian: r, or the residual, as 0.

  Args:
    x: (d,).
    data: from :func:`prepare`.
    order: ``"softmax_relu"`` or ``"relu_softmax"``.

  Returns:
    A structured curvature. For ``"softmax_relu"`` it has no rows: all of it is
    of the rank of the units, but for the constant.

  Raises:
    ValueError: if ``order`` is another or shapes do not fit.

  Cost:
    O(n d + m n d).

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn import newton
    >>> from jaxattn.regression import two_layer
    >>> a2 = jnp.array([[1.0, 3.0]])
    >>> data = two_layer.prepare(jnp.eye(2), a2, jnp.array([7.0]))
    >>> h = two_layer.gauss_newton(jnp.zeros(2), data)
    >>> print(newton.curvature_dense(h))
    [[ 0.25 -0.25]
     [-0.25  0.25]]
  """
  _checks.check_choice("order", order, _ORDERS)
  y = newton.design_matvec(data.a1, x)
  if order == "softmax_relu":
    return _gauss_newton(y, data)
  return _relu_softmax(y, data, exact=False)


def active_set(x: jax.Array, data: TwoLayerData) -> jax.Array:
  """Which rectified outputs are positive, for ``order="softmax_relu"``.

  Args:
    x: (d,).
    data: from :func:`prepare`.

  Returns:
    (m,) boolean.

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n d + m n).

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import two_layer
    >>> a2 = jnp.array([[1.0, 3.0], [-1.0, -1.0]])
    >>> data = two_layer.prepare(jnp.eye(2), a2, jnp.zeros(2))
    >>> print(two_layer.active_set(jnp.zeros(2), data))
    [ True False]
  """
  y = newton.design_matvec(data.a1, x)
  return data.a2 @ jax.nn.softmax(y) > 0


def kink_margin(x: jax.Array, data: TwoLayerData) -> jax.Array:
  r"""How near the closest kink is, for ``order="softmax_relu"``.

  .. math:: \min_j |o_j| / \|a_{2,j}\|

  Args:
    x: (d,).
    data: from :func:`prepare`.

  Returns:
    (), the least distance in f. Where it is about 0 neither Newton's method nor
    any other of second order is quadratic. A row of zeros has no kink.

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n d + m n).

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import two_layer
    >>> a2 = jnp.array([[3.0, 4.0]])
    >>> data = two_layer.prepare(jnp.eye(2), a2, jnp.zeros(1))
    >>> print(two_layer.kink_margin(jnp.zeros(2), data))
    0.7
  """
  y = newton.design_matvec(data.a1, x)
  size = jnp.linalg.norm(data.a2, axis=1)
  distance = jnp.abs(data.a2 @ jax.nn.softmax(y)) / jnp.where(size > 0, size, 1)
  return jnp.where(size > 0, distance, jnp.inf).min()


@functools.lru_cache(maxsize=64)
def problem(
  *, order: str = "softmax_relu", sketch_target: str = "data"
) -> newton.Problem:
  """The problem for :func:`jaxattn.newton.minimize`.

  Args:
    order: ``"softmax_relu"`` or ``"relu_softmax"``.
    sketch_target: as for :func:`curvature`.

  Returns:
    A :class:`jaxattn.newton.Problem`; the same call gives the same object.

  Raises:
    ValueError: if an option is not one of its choices.

  Cost:
    O(1).

  Source:
    arXiv 2311.15390, 2308.08358.

  Example:
    >>> from jaxattn.regression import two_layer
    >>> two_layer.problem() is two_layer.problem()
    True
  """
  _checks.check_choice("order", order, _ORDERS)
  _check_target(sketch_target, order)
  with_order = functools.partial(functools.partial, order=order)
  is_shared = order == "softmax_relu" and sketch_target == "data"
  return newton.Problem(
    with_order(loss),
    with_order(value_and_grad),
    functools.partial(curvature, order=order, sketch_target=sketch_target),
    with_order(gauss_newton),
    expand=_expand if is_shared else None,
  )


def fit_two_layer(
  a1: jax.Array | newton.Design,
  a2: jax.Array,
  b: jax.Array,
  *,
  w: float | jax.Array = 0.0,
  ridge: float | jax.Array = 0.0,
  x0: jax.Array | None = None,
  order: str = "softmax_relu",
  num_starts: int = 1,
  config: newton.NewtonConfig = newton.NewtonConfig(mu0=1.0),
  rng: jax.Array | None = None,
) -> newton.NewtonResult:
  """Fits the unknown of two layers to targets.

  Newton's method is local: with several starts, the first of them ``x0`` and
  the others standard normal, the best end is returned. With a sketch they run
  one after the other, because under ``jax.vmap`` each step would take the time
  of an exact one.

  Args:
    a1: the first layer, (n, d).
    a2: the second, (m, n).
    b: the targets, (m,).
    w: weight of the regularizer, as in :func:`prepare`.
    ridge: as in :func:`prepare`.
    x0: (d,), the first start; None = 0, but for ``"relu_softmax"``, whose
      gradient is 0 there, one more draw.
    order: ``"softmax_relu"`` or ``"relu_softmax"``.
    num_starts: starts.
    config: of the solver. The default differs from that of
      :class:`jaxattn.newton.NewtonConfig` in ``mu0=1.0``, because starts are
      badly scaled: one's own should have it too.
    rng: PRNG key, for several starts or a sketch.

  Returns:
    A :class:`jaxattn.newton.NewtonResult`.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, ``rng`` is missing, or
      ``x0`` is, for one start with ``order="relu_softmax"``.

  Cost:
    O(n d^2 + m n d + d^3) a step and start.

  Source:
    arXiv 2311.15390.

  Example:
    >>> import jax
    >>> from jaxattn.regression import fit_two_layer, two_layer
    >>> rngs = jax.random.split(jax.random.key(0), 3)
    >>> a1 = jax.random.normal(rngs[0], (200, 3))
    >>> a2 = jax.random.normal(rngs[1], (20, 200))
    >>> b = two_layer.predict(0.5 * jax.random.normal(rngs[2], (3,)), a1, a2)
    >>> bool(fit_two_layer(a1, a2, b).loss < 1e-6)
    True
  """
  _checks.check_integer("num_starts", num_starts, 1, None)
  _checks.check_choice("order", order, _ORDERS)
  data = prepare(a1, a2, b, w=w, ridge=ridge)
  drawn = x0 is None and order == "relu_softmax"
  _check_starts(num_starts, rng, drawn=drawn)
  x0 = _designs.check_start(x0, len(data.const), data.b.dtype)
  solve = functools.partial(
    newton.minimize, problem(order=order), data=data, config=config
  )
  if num_starts == 1:
    return solve(x0, rng=rng)
  assert rng is not None
  rng_starts, rng_solve = jax.random.split(rng)
  num_drawn = num_starts if drawn else num_starts - 1
  starts = jax.random.normal(rng_starts, (num_drawn, len(x0)), x0.dtype)
  starts = starts if drawn else jnp.concatenate([x0[None], starts])
  rngs = jax.random.split(rng_solve, num_starts)
  found = _solve_all(solve, starts, rngs, in_turn=config.sketch is not None)
  # A start that is not finite has no loss.
  best = jnp.argmin(jnp.where(jnp.isfinite(found.loss), found.loss, jnp.inf))
  return jax.tree.map(lambda z: z[best], found)


def _check_starts(
  num_starts: int, rng: jax.Array | None, *, drawn: bool
) -> None:
  if num_starts > 1 and rng is None:
    raise ValueError(f"rng is required when num_starts={num_starts}")
  if num_starts == 1 and drawn:
    raise ValueError(
      "x0 is required for one start with order='relu_softmax': at x = 0 the "
      "gradient is 0"
    )


def _solve_all(
  solve: Callable[..., newton.NewtonResult],
  starts: jax.Array,
  rngs: jax.Array,
  *,
  in_turn: bool,
) -> newton.NewtonResult:
  def one(args: tuple[jax.Array, jax.Array]) -> newton.NewtonResult:
    x, rng = args
    return solve(x, rng=rng)

  # Of mapped branches, as those of the solver's row counts, all are computed.
  run = functools.partial(jax.lax.map, one) if in_turn else jax.vmap(one)
  return run((starts, rngs))


def _check_target(sketch_target: str, order: str) -> None:
  _checks.check_choice("sketch_target", sketch_target, ("data", "all"))
  if sketch_target == "all" and order == "relu_softmax":
    raise ValueError(
      "sketch_target must be 'data' with order='relu_softmax', got 'all'"
    )


def _output(y: jax.Array, a2: jax.Array, order: str) -> jax.Array:
  if order == "softmax_relu":
    return jnp.maximum(a2 @ jax.nn.softmax(y), 0)
  return jax.nn.softmax(a2 @ jnp.maximum(y, 0))


def _loss(
  x: jax.Array, data: TwoLayerData, y: jax.Array, output: jax.Array
) -> jax.Array:
  residual = output - data.b
  penalty = data.w2 @ y**2 + data.ridge * (x @ x)
  return (residual @ residual + penalty) / 2


def _forward(
  y: jax.Array, data: TwoLayerData
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The softmax f, the outputs h, and the residuals t of active ones."""
  f = jax.nn.softmax(y)
  o = data.a2 @ f
  h = jnp.maximum(o, 0)
  return f, h, jnp.where(o > 0, h - data.b, 0)


def _curvature(
  x: jax.Array, data: TwoLayerData, order: str, sketch_target: str
) -> newton.StructuredCurvature:
  _checks.check_choice("order", order, _ORDERS)
  _check_target(sketch_target, order)
  y = newton.design_matvec(data.a1, x)
  if order == "relu_softmax":
    return _relu_softmax(y, data, exact=True)
  if sketch_target == "data":
    return _softmax_relu(y, data)
  # The regularizer has the same rows, and is drawn with the rest.
  const = data.ridge * jnp.eye(len(data.const), dtype=data.const.dtype)
  found = _softmax_relu(y, data._replace(const=const))
  return found._replace(weight=found.weight + data.w2, center=None)


def _softmax_relu(
  y: jax.Array, data: TwoLayerData
) -> newton.StructuredCurvature:
  f, h, t = _forward(y, data)
  r = softmax_jacobian_matvec(f, t @ data.a2)
  sums = newton.design_vecmat(_softmax_rows(f, r, data), data.a1)
  return _structured(r, h, sums, data)


def _softmax_rows(f: jax.Array, r: jax.Array, data: TwoLayerData) -> jax.Array:
  """What the Hessian multiplies by A_1."""
  return jnp.concatenate([jnp.stack([r, f]), data.a2 * f[None]])


def _structured(
  r: jax.Array, h: jax.Array, sums: jax.Array, data: TwoLayerData
) -> newton.StructuredCurvature:
  shift, mean = sums[:2]
  low, core, const = _outer(_jacobian(h, sums[1:]), data)
  low = jnp.concatenate([jnp.stack([mean, shift], 1), low], 1)
  pair = jnp.array([[0, -1], [-1, 0]], low.dtype)
  core = linalg.block_diag(pair, core)
  return newton.StructuredCurvature(data.a1, r, low, core, const, mean, shift)


def _jacobian(h: jax.Array, sums: jax.Array) -> jax.Array:
  """Of the units, (m, d), from the sums f A_1 and diag(f) A_1 over rows."""
  mean, products = sums[0], sums[1:]
  # Inactive units have no slope.
  return jnp.where((h > 0)[:, None], products - h[:, None] * mean[None], 0)


def _outer(
  jacobian: jax.Array, data: TwoLayerData
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """J^T J beside the constant: as columns while they are few."""
  num_units, d = jacobian.shape
  if num_units <= d:
    return jacobian.T, jnp.eye(num_units, dtype=jacobian.dtype), data.const
  nothing = jnp.zeros((d, 0), jacobian.dtype)
  return nothing, nothing[:0], data.const + jacobian.T @ jacobian


def _gauss_newton(
  y: jax.Array, data: TwoLayerData
) -> newton.StructuredCurvature:
  """Without r no row of A_1 has a weight: there is no product of A_1."""
  f, h, _ = _forward(y, data)
  rows = jnp.concatenate([f[None], data.a2 * f[None]])
  sums = newton.design_vecmat(rows, data.a1)
  low, core, const = _outer(_jacobian(h, sums), data)
  no_rows = jnp.zeros((0, len(low)), low.dtype)
  return newton.StructuredCurvature(no_rows, no_rows[:, 0], low, core, const)


def _expand(
  x: jax.Array, data: TwoLayerData
) -> tuple[jax.Array, jax.Array, Partial]:
  """Loss, gradient and Hessian from two passes over A_1 instead of four."""
  y = newton.design_matvec(data.a1, x)
  f, h, t = _forward(y, data)
  r = softmax_jacobian_matvec(f, t @ data.a2)
  rows = _softmax_rows(f, r, data)
  rows = jnp.concatenate([(r + data.w2 * y)[None], rows])
  sums = newton.design_vecmat(rows, data.a1)
  hessian = Partial(_structured, r, h, sums[1:])
  return _loss(x, data, y, h), sums[0] + data.ridge * x, hessian


def _relu_softmax(
  y: jax.Array, data: TwoLayerData, *, exact: bool
) -> newton.StructuredCurvature:
  f = _output(y, data.a2, "relu_softmax")
  c = f - data.b
  weight = f**2 + (softmax_jacobian_matvec(f, c) if exact else 0)
  active = jnp.where((y > 0)[None], data.a2, 0)
  design = newton.design_vecmat(active, data.a1)
  centered = design - (f @ design)[None]
  low = jnp.zeros((design.shape[1], 0), design.dtype)
  core = jnp.zeros((0, 0), design.dtype)
  return newton.StructuredCurvature(centered, weight, low, core, data.const)
