r"""The point of a polytope at which rows have given leverage scores.

With slacks :math:`s = Ax - b > 0`, rows rescaled to
:math:`A_x = \operatorname{diag}(s)^{-1} A` and :math:`P = QQ^\top` the
projection onto their column space,

.. math::

  \sigma(x) = \operatorname{diag} P, \qquad c = \sigma(x) - \sigma^*, \qquad
  L(x) = \tfrac12 \|c\|^2 + \tfrac12 \|w \circ Ax\|^2
    + \tfrac12 \lambda \|x\|^2.

Let :math:`\Lambda = \operatorname{diag}(\sigma) - P \circ P`, a Laplacian. Then
:math:`J = \partial \sigma / \partial x = -2 \Lambda A_x` and

.. math::

  \nabla L = J^\top c + \dots, \qquad \nabla^2 L = A_x^\top \big( 4 \Lambda^2
    + 6 \operatorname{diag}(c \circ \sigma - (P \circ P) c)
    - 4 (C (P \circ P) + (P \circ P) C) + 8 P \circ (PCP) \big) A_x + \dots

with :math:`C = \operatorname{diag}(c)`: indefinite away from a solution. No
(n, n) matrix is formed.

Scores do not change if all slacks grow alike, or if some change sign. They
determine x near a solution if :math:`\operatorname{rank} J = d`, which needs
n > d and fails where :math:`Av = s` for some v, as it does for all x if b lies
in the range of A. Source: arXiv 2404.13785; the formulas are derived here and
checked against automatic differentiation.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy import linalg
from jax.tree_util import Partial

from jaxattn import _checks, newton
from jaxattn.newton.centers import analytic_center
from jaxattn.newton.first_order import gradient_descent
from jaxattn.sketch.leverage import hadamard_square_matvec

__all__ = [
  "LeverageInversionData",
  "LeverageInversionResult",
  "barrier_matrix",
  "curvature",
  "gauss_newton",
  "hvp",
  "invert_leverage",
  "leverage",
  "leverage_jacobian",
  "loss",
  "prepare",
  "problem",
  "value_and_grad",
]

# Two rounds of Cholesky's factorization orthogonalize to rounding up to about
# the root of 1 / eps; this keeps a margin from there.
_MARGIN = 16.0
# Numbers in a block of products of pairs of columns.
_BLOCK_ENTRIES = 1 << 20
# Singular values below this multiple of rounding do not count.
_RANK_ROOM = 10.0
_SUM_ROOM = 1e-3
# Scores may have been computed in single precision, whatever the type of A.
_ENTRY_ROOM = 8 * float(jnp.finfo(jnp.float32).eps)
# Homotopy starts this share of the way from the scores of the start; random
# starts are drawn within these shares of the way to the wall.
_FIRST_SHARE, _SPREAD = 0.25, (0.3, 0.9)
# The first size that a line search of gradient descent tries.
_STEP_SIZE = 1.0
# As far as rounding goes. Away from a solution the whole Hessian is indefinite,
# and ends next to a wall more often.
_CONFIGS = {
  "newton": newton.NewtonConfig(rtol=1e-14, curvature="gauss_newton"),
  "gradient_descent": newton.NewtonConfig(rtol=1e-13),
}


class LeverageInversionData(NamedTuple):
  """One problem, with what never changes computed once.

  Attributes:
    a: (n, d), rows of the polytope A x > b.
    b: (n,).
    sigma: (n,), the scores that are asked for.
    w2: (n,), squared weights of the regularizer.
    const: (d, d), A^T diag(w^2) A + ridge I.
    ridge: ().
  """

  a: jax.Array
  b: jax.Array
  sigma: jax.Array
  w2: jax.Array
  const: jax.Array
  ridge: jax.Array


class LeverageInversionResult(NamedTuple):
  """The end of :func:`invert_leverage`.

  Attributes:
    x: (d,), the point.
    loss: ().
    grad_norm: ().
    num_steps: (), of all stages of a homotopy.
    reason: (), why it ended, as in :class:`jaxattn.newton.NewtonResult`.
    rank: (), of the Jacobian at x; x is determined by its scores if it is d.
    singular_values: (d,), of the Jacobian at x, in coordinates in which
      A_x^T A_x is the identity: they lie in [0, 1] and do not depend on units.
      An error of scores is magnified by up to 1 over the last of them.
    min_slack: (), smallest entry of A x - b, positive.
    log: a :class:`jaxattn.newton.NewtonInfo` of the last stage; with
      ``"gradient_descent"`` without a shift and a ratio.
  """

  x: jax.Array
  loss: jax.Array
  grad_norm: jax.Array
  num_steps: jax.Array
  reason: jax.Array
  rank: jax.Array
  singular_values: jax.Array
  min_slack: jax.Array
  log: newton.NewtonInfo


class _Parts(NamedTuple):
  """What loss and derivatives share."""

  rows: jax.Array  # A_x
  q: jax.Array
  sigma: jax.Array
  c: jax.Array


def barrier_matrix(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  r"""The rows of A over their slacks, :math:`A_x = a_i / (a_i^\top x - b_i)`.

  :math:`A_x^\top A_x` is the Hessian of the logarithmic barrier.

  Args:
    x: (d,), with A x > b.
    a: (n, d), floating.
    b: (n,).

  Returns:
    (n, d).

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(n d).

  Source:
    a standard definition.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import barrier_matrix
    >>> a, b = jnp.ones((2, 1)), jnp.array([0.0, -1.0])
    >>> print(barrier_matrix(jnp.ones(1), a, b))
    [[1. ]
     [0.5]]
  """
  x, a, b = _checked_point(x, a, b)
  return a / (a @ x - b)[:, None]


def leverage(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  r"""Leverage scores of the rescaled rows.

  .. math:: \sigma(x)_i = \big( A_x (A_x^\top A_x)^{-1} A_x^\top \big)_{ii}

  Args:
    x: (d,), with A x > b.
    a: (n, d), floating, of full column rank.
    b: (n,).

  Returns:
    (n,), in [0, 1] and summing to d; NaN if the rank is deficient.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(n d^2).

  Source:
    arXiv 2404.13785.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import leverage
    >>> a, b = jnp.ones((2, 1)), jnp.array([0.0, -1.0])
    >>> print(leverage(jnp.ones(1), a, b).round(3))
    [0.8 0.2]
  """
  x, a, b = _checked_point(x, a, b)
  return _at(x, a, b, jnp.zeros_like(b)).sigma


def leverage_jacobian(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  r"""The derivative of leverage scores, :math:`-2 \Lambda A_x`.

  Args:
    x: (d,), with A x > b.
    a: (n, d), floating, of full column rank.
    b: (n,).

  Returns:
    (n, d).

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    4 n d^3 flops.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import leverage_jacobian
    >>> a, b = jnp.ones((2, 1)), jnp.array([0.0, -1.0])
    >>> print(leverage_jacobian(jnp.ones(1), a, b).round(1))
    [[-0.2]
     [ 0.2]]
  """
  x, a, b = _checked_point(x, a, b)
  parts = _at(x, a, b, jnp.zeros_like(b))
  return -2 * _laplacian_times(parts, _square_times(parts.q, parts.rows)[1])


def prepare(
  a: jax.Array,
  b: jax.Array,
  sigma: jax.Array,
  *,
  w: float | jax.Array = 0.0,
  ridge: float | jax.Array = 0.0,
  normalize_sigma: bool = False,
) -> LeverageInversionData:
  r"""Collects a problem and computes the constant part of its Hessian.

  Args:
    a: (n, d), floating, of full column rank, n > d.
    b: (n,).
    sigma: (n,), in [0, 1] and summing to d.
    w: weight of the regularizer, at least 0: a number or (n,). It moves the
      solution by O(w^2).
    ridge: lambda, at least 0.
    normalize_sigma: rescale ``sigma`` to sum to d: scores with errors do not.

  Returns:
    A :class:`LeverageInversionData`.

  Raises:
    ValueError: if shapes or dtypes do not fit, or a number is negative; outside
      transformations also "sigma must lie in [0, 1], got min -0.1", "sigma must
      sum to d = 5 within 1e-3, got 3.2" and "a must have full column rank".

  Cost:
    O(n d^2).

  Source:
    arXiv 2404.13785.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import leverage_inversion
    >>> a, b = jnp.ones((2, 1)), jnp.array([0.0, -1.0])
    >>> data = leverage_inversion.prepare(a, b, jnp.array([0.8, 0.2]))
    >>> data.const.shape
    (1, 1)
  """
  a, b, sigma = jnp.asarray(a), jnp.asarray(b), jnp.asarray(sigma)
  _checks.check_rank("a", a, 2)
  _checks.check_floating("a", a)
  n, d = a.shape
  if n <= d:
    raise ValueError(
      f"a must have more rows than columns, got shape {a.shape}: n scores have "
      "n - 1 free numbers"
    )
  for name, value in (("b", b), ("sigma", sigma)):
    _checks.check_shape(name, value, (n,), "(n,)")
    _checks.check_floating(name, value)
  _checks.check_nonnegative("w", w)
  _checks.check_scalar("ridge", ridge)
  _checks.check_nonnegative("ridge", ridge)
  _checks.check_choice("normalize_sigma", normalize_sigma, (False, True))
  if jnp.ndim(w):
    _checks.check_shape("w", w, (n,), "(n,)")
  data, facts = _collect(a, b, sigma, w, ridge, normalize_sigma)
  _check_facts(facts, d)
  return data


def loss(x: jax.Array, data: LeverageInversionData) -> jax.Array:
  r"""The loss :math:`\tfrac12 \|\sigma(x) - \sigma^*\|^2` and the regularizers.

  Args:
    x: (d,), with A x > b.
    data: from :func:`prepare`.

  Returns:
    (); NaN if the rank is deficient. The formula has a value outside of the
    polytope too: there, other solutions exist.

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n d^2).

  Source:
    arXiv 2404.13785, squared and times one half: the same solutions.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import leverage_inversion
    >>> a, b = jnp.ones((2, 1)), jnp.array([0.0, -1.0])
    >>> data = leverage_inversion.prepare(a, b, jnp.array([0.8, 0.2]))
    >>> bool(leverage_inversion.loss(jnp.ones(1), data) < 1e-12)
    True
  """
  return _loss(x, data, _at(x, data.a, data.b, data.sigma))


def value_and_grad(
  x: jax.Array, data: LeverageInversionData
) -> tuple[jax.Array, jax.Array]:
  r"""The loss and its gradient.

  .. math:: \nabla L = -2 A_x^\top \Lambda c
    + (A^\top \operatorname{diag}(w^2) A + \lambda I)\, x

  Args:
    x: (d,), with A x > b.
    data: from :func:`prepare`.

  Returns:
    () and (d,).

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n d^2).

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import leverage_inversion
    >>> a, b = jnp.ones((2, 1)), jnp.array([0.0, -1.0])
    >>> data = leverage_inversion.prepare(a, b, jnp.array([0.8, 0.2]))
    >>> value, grad = leverage_inversion.value_and_grad(jnp.full(1, 2.0), data)
    >>> bool(grad > 0)
    True
  """
  parts = _at(x, data.a, data.b, data.sigma)
  row = _laplacian(parts, parts.c)
  grad = -2 * newton.design_vecmat(row, parts.rows) + data.const @ x
  return _loss(x, data, parts), grad


def hvp(x: jax.Array, v: jax.Array, data: LeverageInversionData) -> jax.Array:
  """The product of the Hessian with a vector.

  Args:
    x: (d,), with A x > b.
    v: (d,).
    data: from :func:`prepare`.

  Returns:
    (d,).

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n d^2): d times less than :func:`curvature`.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import leverage_inversion
    >>> a, b = jnp.ones((2, 1)), jnp.array([0.0, -1.0])
    >>> data = leverage_inversion.prepare(a, b, jnp.array([0.8, 0.2]))
    >>> print(leverage_inversion.hvp(jnp.ones(1), jnp.ones(1), data).round(3))
    [0.051]
  """
  return _operator(x, data)(v)


def curvature(
  x: jax.Array, data: LeverageInversionData
) -> newton.DenseCurvature:
  """The Hessian, by the formula of the module.

  Args:
    x: (d,), with A x > b.
    data: from :func:`prepare`.

  Returns:
    A dense curvature, (d, d).

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    4 n d^3 + O(n d^2 + d^4) flops: two products of matrices with the products
    of all pairs of columns of Q, of which a block of rows exists at a time.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import leverage_inversion
    >>> a, b = jnp.ones((2, 1)), jnp.array([0.0, -1.0])
    >>> data = leverage_inversion.prepare(a, b, jnp.array([0.8, 0.2]))
    >>> h = leverage_inversion.curvature(jnp.ones(1), data)
    >>> print(h.matrix.round(3))
    [[0.051]]
  """
  parts = _at(x, data.a, data.b, data.sigma)
  rows, q, sigma, c = parts
  table, squared = _square_times(q, rows)
  half = _laplacian_times(parts, squared)
  # C (P o P) A_x and its like on the other side, with 6 diag(...) A_x.
  weight = 6 * (c * sigma - hadamard_square_matvec(q, c))
  inner = weight[:, None] * rows - 8 * c[:, None] * squared
  matrix = 4 * half.T @ half + rows.T @ inner
  # P o (PCP) needs only the (d, d, d) table: the rows are summed out.
  core = q.T @ (c[:, None] * q)
  matrix += 8 * jnp.einsum("kla,km,mlb->ab", table, core, table)
  return newton.DenseCurvature((matrix + matrix.T) / 2 + data.const)


def gauss_newton(
  x: jax.Array, data: LeverageInversionData
) -> newton.DenseCurvature:
  r"""The positive semidefinite part :math:`J^\top J + \dots` of the Hessian.

  Args:
    x: (d,), with A x > b.
    data: from :func:`prepare`.

  Returns:
    A dense curvature, (d, d): the Hessian where c = 0.

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    4 n d^3 flops.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import leverage_inversion
    >>> a, b = jnp.ones((2, 1)), jnp.array([0.0, -1.0])
    >>> data = leverage_inversion.prepare(a, b, jnp.array([0.5, 0.5]))
    >>> h = leverage_inversion.gauss_newton(jnp.ones(1), data)
    >>> print(h.matrix.round(3))
    [[0.051]]
  """
  jacobian = leverage_jacobian(x, data.a, data.b)
  return newton.DenseCurvature(jacobian.T @ jacobian + data.const)


@functools.lru_cache(maxsize=2)
def problem(*, matrix_free: bool = False) -> newton.Problem:
  """The problem for :func:`jaxattn.newton.minimize`; its domain is A x > b.

  Args:
    matrix_free: whether curvatures are products with vectors, for large n d^3
      and ``linear_solver="cg"``, instead of matrices.

  Returns:
    A :class:`jaxattn.newton.Problem`; the same call gives the same object.

  Raises:
    ValueError: if ``matrix_free`` is no boolean.

  Cost:
    O(1).

  Source:
    arXiv 2404.13785.

  Example:
    >>> from jaxattn.regression import leverage_inversion
    >>> leverage_inversion.problem() is leverage_inversion.problem()
    True
  """
  _checks.check_choice("matrix_free", matrix_free, (False, True))

  def in_domain(x: jax.Array, data: LeverageInversionData) -> jax.Array:
    return (data.a @ x - data.b).min() > 0

  def products(
    x: jax.Array, data: LeverageInversionData, *, exact: bool
  ) -> newton.OperatorCurvature:
    build = _operator if exact else _gauss_newton_operator
    return newton.OperatorCurvature(build(x, data))

  exact, positive = curvature, gauss_newton
  if matrix_free:
    exact, positive = (
      functools.partial(products, exact=e) for e in (True, False)
    )
  return newton.Problem(loss, value_and_grad, exact, positive, in_domain)


def invert_leverage(
  a: jax.Array,
  b: jax.Array,
  sigma: jax.Array,
  *,
  x0: jax.Array | None = None,
  w: float | jax.Array = 0.0,
  ridge: float | jax.Array = 0.0,
  method: str = "newton",
  homotopy: int = 0,
  num_starts: int = 1,
  normalize_sigma: bool = False,
  config: newton.NewtonConfig | None = None,
  rng: jax.Array | None = None,
) -> LeverageInversionResult:
  r"""Recovers the interior point whose rescaled rows have given scores.

  For a target that is near a wall take several starts. For several targets map
  over ``sigma`` with ``jax.vmap``.

  Args:
    a: (n, d), of full column rank, n > d. The polytope is A x > b.
    b: (n,).
    sigma: (n,), the scores.
    x0: (d,), an interior point to start from; None = the analytic center, which
      an unbounded polytope does not have.
    w: weight of the regularizer, as in :func:`prepare`.
    ridge: as in :func:`prepare`.
    method: ``"newton"``, or ``"gradient_descent"`` with a line search, which
      takes all of ``config.max_steps``.
    homotopy: number of targets on the line from the scores of the start to
      ``sigma`` that are solved for first, each from the point before.
    num_starts: of which the one with the least loss counts: ``x0``, and points
      in random directions from there, 30 to 90 % of the way to the wall.
    normalize_sigma: as in :func:`prepare`.
    config: of the solver; None = ``rtol=1e-14``, as far as rounding goes, and
      ``curvature="gauss_newton"``: a Levenberg-Marquardt method, quadratic too
      where scores are met. ``curvature="newton"`` takes the whole Hessian,
      which away from a solution is indefinite and ends next to a wall more
      often; ``linear_solver="cg"`` forms neither. For gradient descent only
      ``max_steps``, ``atol`` and ``rtol`` may be set.
    rng: PRNG key; needed for several starts only.

  Returns:
    A :class:`LeverageInversionResult`. Under a transformation ``reason`` is 4
    where an input is not finite, the rank is deficient or ``x0`` is outside.

  Raises:
    ValueError: as :func:`prepare`; if an option does not fit. Outside
      transformations also "x0 is not in the interior: min(Ax-b) = -0.3", and
      if there is no interior point, or no ``x0`` and no analytic center.

  Cost:
    O(n d^3) a step, some ten of them; ``"gradient_descent"`` O(n d^2).

  Source:
    arXiv 2404.13785, its second-order and its first-order method.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import invert_leverage, leverage
    >>> a = jax.random.normal(jax.random.key(0), (50, 2))
    >>> b = -jnp.ones(50)
    >>> sigma = leverage(jnp.array([0.1, -0.2]), a, b)
    >>> print(invert_leverage(a, b, sigma).x.round(3))
    [ 0.1 -0.2]
  """
  _checks.check_choice("method", method, tuple(_CONFIGS))
  config = _CONFIGS[method] if config is None else config
  if method == "gradient_descent":
    _check_descent(config)
  _checks.check_integer("homotopy", homotopy, 0, None)
  _checks.check_integer("num_starts", num_starts, 1, None)
  if num_starts > 1 and rng is None:
    raise ValueError("rng is required with num_starts > 1")
  if num_starts == 1 and rng is not None:
    raise ValueError("rng must be None with num_starts=1")
  data = prepare(a, b, sigma, w=w, ridge=ridge, normalize_sigma=normalize_sigma)
  if x0 is None:
    x0 = _center(data)
  else:
    x0, *_ = _checked_point(x0, data.a, data.b, name="x0")
    _check_interior(x0, data)
  return _invert(data, x0, rng, config, method, homotopy, num_starts)


# --- checks ---


def _checked_point(
  x: jax.Array, a: jax.Array, b: jax.Array, *, name: str = "x"
) -> tuple[jax.Array, jax.Array, jax.Array]:
  x, a, b = jnp.asarray(x), jnp.asarray(a), jnp.asarray(b)
  _checks.check_rank("a", a, 2)
  _checks.check_floating("a", a)
  n, d = a.shape
  _checks.check_shape("b", b, (n,), "(n,)")
  _checks.check_floating("b", b)
  _checks.check_shape(name, x, (d,), "(d,)")
  _checks.check_floating(name, x)
  return x.astype(a.dtype), a, b.astype(a.dtype)


def _check_descent(config: newton.NewtonConfig) -> None:
  known = ("max_steps", "atol", "rtol")
  own = newton.NewtonConfig(**{name: getattr(config, name) for name in known})
  if config != own:
    raise ValueError(
      "method='gradient_descent' takes max_steps, atol and rtol of a config "
      f"and nothing else, got {config}"
    )


def _check_facts(facts: Any, d: int) -> None:
  """What scores must be, and A, where numbers can be read and are finite."""
  if not all(_checks.is_concrete(fact) for fact in facts):
    return
  low, high, total, rank, room = (np.asarray(fact).item() for fact in facts)
  if low < -room or high > 1 + room:
    which = f"min {low:.9g}" if low < -room else f"max {high:.9g}"
    raise ValueError(f"sigma must lie in [0, 1], got {which}")
  if abs(total - d) > _SUM_ROOM:
    raise ValueError(
      f"sigma must sum to d = {d} within {_SUM_ROOM:g}, got {total:.4g}; "
      "normalize_sigma=True rescales it"
    )
  if rank < d:
    raise ValueError(f"a must have full column rank {d}, got rank {rank}")


@functools.partial(jax.jit, static_argnames="normalize")
def _collect(
  a: jax.Array,
  b: jax.Array,
  sigma: jax.Array,
  w: float | jax.Array,
  ridge: float | jax.Array,
  normalize: bool,
) -> tuple[LeverageInversionData, tuple[jax.Array, ...]]:
  """Data, with least, largest and sum of the scores, the rank, and rounding."""
  n, d = a.shape
  sigma = sigma.astype(a.dtype)
  if normalize:
    sigma = sigma * (d / sigma.sum())
  w2 = jnp.broadcast_to(jnp.asarray(w, a.dtype) ** 2, (n,))
  ridge = jnp.asarray(ridge, a.dtype)
  const = newton.weighted_gram(a, w2) + ridge * jnp.eye(d, dtype=a.dtype)
  sizes = jnp.linalg.svd(jnp.linalg.qr(a, mode="r"), compute_uv=False)
  # Where something is not finite, the solver says so.
  rank = jnp.where(
    jnp.isfinite(sizes).all(), (sizes > _noise(a) * sizes[0]).sum(), d
  )
  room = jnp.asarray(_ENTRY_ROOM, a.dtype)
  data = LeverageInversionData(a, b.astype(a.dtype), sigma, w2, const, ridge)
  return data, (sigma.min(), sigma.max(), sigma.sum(), rank, room)


def _check_interior(x0: jax.Array, data: LeverageInversionData) -> None:
  slack = (data.a @ x0 - data.b).min()
  if _checks.is_concrete(slack) and slack <= 0:
    raise ValueError(
      f"x0 is not in the interior: min(Ax-b) = {float(slack):.3g}"
    )


def _center(data: LeverageInversionData) -> jax.Array:
  """The analytic center; what is refused is said of A x > b."""
  try:
    return analytic_center(-data.a, -data.b).x
  except ValueError as error:
    raise ValueError(str(error).replace("the polytope", "Ax > b")) from error


# --- scores and their derivatives ---


@jax.jit
def _at(x: jax.Array, a: jax.Array, b: jax.Array, target: jax.Array) -> _Parts:
  rows = a / (a @ x - b)[:, None]
  q = _orthonormal(rows)
  sigma = (q**2).sum(1)
  return _Parts(rows, q, sigma, sigma - target)


def _noise(a: jax.Array) -> float:
  return max(a.shape) * float(jnp.finfo(a.dtype).eps)


def _orthonormal(rows: jax.Array) -> jax.Array:
  """A basis of the columns; NaN if they are dependent."""

  def half(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    factor = jnp.linalg.cholesky(rows.T @ rows)
    # Products with an inverse take half the time of solves for n rows; what
    # they lose of orthogonality the second round restores.
    eye = jnp.eye(len(factor), dtype=factor.dtype)
    return rows @ linalg.solve_triangular(factor, eye, lower=True).T, factor

  def slow() -> jax.Array:
    q, triangle = jnp.linalg.qr(rows)
    sizes = jnp.abs(jnp.diag(triangle))
    good = sizes.min() > _noise(rows) * sizes.max()
    return jnp.where(good, q, jnp.nan)

  first, factor = half(rows)
  sizes = jnp.diag(factor)
  limit = float(jnp.finfo(rows.dtype).eps) ** -0.5 / _MARGIN
  # Near a wall rows are so large that their squares lose half of the digits.
  # Under vmap both are computed, and one is chosen.
  tame = sizes.max() < limit * sizes.min()
  return lax.cond(tame, lambda: half(first)[0], slow)


def _loss(
  x: jax.Array, data: LeverageInversionData, parts: _Parts
) -> jax.Array:
  return (parts.c @ parts.c + x @ data.const @ x) / 2


def _laplacian(parts: _Parts, t: jax.Array) -> jax.Array:
  """Lambda t."""
  return parts.sigma * t - hadamard_square_matvec(parts.q, t)


def _laplacian_times(parts: _Parts, squared: jax.Array) -> jax.Array:
  """Lambda A_x, from (P o P) A_x."""
  return parts.sigma[:, None] * parts.rows - squared


@functools.partial(jax.jit, static_argnames="entries")
def _square_times(
  q: jax.Array, rows: jax.Array, *, entries: int = _BLOCK_ENTRIES
) -> tuple[jax.Array, jax.Array]:
  """(d, d, d) sums over i of q_ik q_il rows_ia, and (n, d) (P o P) rows.

  P o P = W W^T with W the products of all pairs of columns of Q, of which half
  are twice there: two products of matrices, a block of rows at a time.
  """
  n, d = q.shape
  first, second = np.triu_indices(d)
  num = -(-n // max(1, entries // len(first)))
  size = -(-n // num)
  # Rows of zeros add nothing.
  padding = (0, num * size - n), (0, 0)
  blocks = [jnp.pad(y, padding).reshape(num, size, d) for y in (q, rows)]

  def pairs(q: jax.Array) -> jax.Array:
    return q[:, first] * q[:, second]

  def add(table: jax.Array, block: Any) -> tuple[jax.Array, None]:
    q, rows = block
    return table + pairs(q).T @ rows, None

  table = jnp.zeros((len(first), d), q.dtype)
  table, _ = lax.scan(add, table, tuple(blocks))
  twice = jnp.asarray(np.where(first == second, 1, 2), q.dtype)[:, None]
  squared = lax.map(lambda q: pairs(q) @ (twice * table), blocks[0])
  which = np.empty((d, d), np.int32)
  which[first, second] = which[second, first] = np.arange(len(first))
  return table[which], squared.reshape(-1, d)[:n]


def _operator(x: jax.Array, data: LeverageInversionData) -> Partial:
  """The product of the Hessian with a vector, as a function of that."""
  parts = _at(x, data.a, data.b, data.sigma)
  _, q, sigma, c = parts
  weight = 6 * (c * sigma - hadamard_square_matvec(q, c))
  core = q.T @ (c[:, None] * q)
  return Partial(_product, parts, weight, core, data.const)


def _gauss_newton_operator(
  x: jax.Array, data: LeverageInversionData
) -> Partial:
  """The same for its positive semidefinite part."""
  parts = _at(x, data.a, data.b, data.sigma)
  return Partial(_gauss_newton_product, parts, data.const)


def _gauss_newton_product(
  parts: _Parts, const: jax.Array, v: jax.Array
) -> jax.Array:
  row = 4 * _laplacian(parts, _laplacian(parts, parts.rows @ v))
  return newton.design_vecmat(row, parts.rows) + const @ v


def _product(
  parts: _Parts,
  weight: jax.Array,
  core: jax.Array,
  const: jax.Array,
  v: jax.Array,
) -> jax.Array:
  rows, q, sigma, c = parts
  t = rows @ v
  squared = hadamard_square_matvec(q, t)
  row = 4 * _laplacian(parts, sigma * t - squared) + weight * t
  row -= 4 * (c * squared + hadamard_square_matvec(q, c * t))
  table = q.T @ (t[:, None] * q) @ core
  row += 8 * ((q @ table) * q).sum(1)
  return newton.design_vecmat(row, rows) + const @ v


# --- the search ---


@functools.partial(
  jax.jit, static_argnames=("config", "method", "homotopy", "num_starts")
)
def _invert(
  data: LeverageInversionData,
  x0: jax.Array,
  rng: jax.Array | None,
  config: newton.NewtonConfig,
  method: str,
  homotopy: int,
  num_starts: int,
) -> LeverageInversionResult:
  search = functools.partial(_search, data, config, method, homotopy)
  if num_starts == 1:
    found, num_steps = search(x0)
  else:
    found, num_steps = jax.vmap(search)(_starts(rng, x0, data, num_starts))
    value = jnp.where(found.reason == 4, jnp.inf, found.loss)
    best = jnp.argmin(jnp.where(jnp.isnan(value), jnp.inf, value))
    found, num_steps = jax.tree.map(lambda y: y[best], (found, num_steps))
  values = _singular_values(found.x, data)
  slack = data.a @ found.x - data.b
  least = _RANK_ROOM * _noise(data.a) * values.max()
  return LeverageInversionResult(
    x=found.x,
    loss=found.loss,
    grad_norm=found.grad_norm,
    num_steps=num_steps,
    reason=found.reason,
    rank=(values > least).sum(),
    singular_values=values,
    min_slack=slack.min(),
    log=found.log,
  )


def _search(
  data: LeverageInversionData,
  config: newton.NewtonConfig,
  method: str,
  homotopy: int,
  x0: jax.Array,
) -> tuple[newton.NewtonResult, jax.Array]:
  """From one start, over the stages of a homotopy; the steps of all of them."""
  solve = _descend if method == "gradient_descent" else _newton
  if not homotopy:
    found = solve(x0, data, config)
    return found, found.num_steps
  first = _at(x0, data.a, data.b, data.sigma).sigma

  def stage(
    x: jax.Array, share: jax.Array
  ) -> tuple[jax.Array, newton.NewtonResult]:
    sigma = (1 - share) * first + share * data.sigma
    found = solve(x, data._replace(sigma=sigma), config)
    return found.x, found

  shares = jnp.linspace(_FIRST_SHARE, 1, homotopy + 1, dtype=x0.dtype)
  _, stages = lax.scan(stage, x0, shares)
  return jax.tree.map(lambda y: y[-1], stages), stages.num_steps.sum()


def _newton(
  x0: jax.Array, data: LeverageInversionData, config: newton.NewtonConfig
) -> newton.NewtonResult:
  solved = problem(matrix_free=config.linear_solver == "cg")
  return newton.minimize(solved, x0, data, config=config)


def _descend(
  x0: jax.Array, data: LeverageInversionData, config: newton.NewtonConfig
) -> newton.NewtonResult:
  """Gradient descent, reported as Newton's method is."""
  inside = problem().in_domain
  assert inside is not None

  def walled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    value, grad = value_and_grad(x, data)
    return jnp.where(inside(x, data), value, jnp.inf), grad

  num = config.max_steps
  found = gradient_descent(
    walled, x0, step_size=_STEP_SIZE, num_steps=num, backtracking=True
  )
  log, norm = found.log, jnp.linalg.norm(found.grad)
  small = norm <= config.atol + config.rtol * log.grad_norm[0]
  bad = ~(jnp.isfinite(log.loss[0]) & jnp.isfinite(log.grad_norm[0]))
  none = jnp.full(num, jnp.nan, x0.dtype)
  count = jnp.full(num, -1, jnp.int32)
  info = newton.NewtonInfo(
    loss=log.loss,
    grad_norm=log.grad_norm,
    shift=none,
    step_size=log.step_size,
    ratio=none,
    step_norm=log.step_size * log.grad_norm,
    num_rows=count,
    num_shifts=count,
  )
  reason = jnp.where(bad, 4, jnp.where(small, 1, 0)).astype(jnp.int32)
  steps = jnp.where(bad, 0, num).astype(jnp.int32)
  return newton.NewtonResult(found.x, found.loss, norm, steps, reason, info)


def _starts(
  rng: jax.Array | None,
  x0: jax.Array,
  data: LeverageInversionData,
  num_starts: int,
) -> jax.Array:
  """x0, and others around it, uniform in direction as its barrier sees them."""
  assert rng is not None
  rng_side, rng_share = jax.random.split(rng)
  slack = data.a @ x0 - data.b
  triangle = jnp.linalg.qr(data.a / slack[:, None], mode="r")
  shape = num_starts - 1, len(x0)
  side = jax.random.normal(rng_side, shape, x0.dtype)
  side = linalg.solve_triangular(triangle, side.T).T
  # Relative loss of slack; if no wall is ahead, as far as the one behind.
  speed = -(side @ data.a.T) / slack[None]
  ahead = speed.max(1, keepdims=True)
  behind = jnp.abs(speed).max(1, keepdims=True)
  low, high = _SPREAD
  share = jax.random.uniform(rng_share, (shape[0], 1), x0.dtype, low, high)
  moved = x0[None] + share * side / jnp.where(ahead > 0, ahead, behind)
  return jnp.concatenate([x0[None], moved])


def _singular_values(x: jax.Array, data: LeverageInversionData) -> jax.Array:
  """Of -2 Lambda Q."""
  parts = _at(x, data.a, data.b, data.sigma)
  squared = _square_times(parts.q, parts.q)[1]
  jacobian = 2 * (parts.sigma[:, None] * parts.q - squared)
  triangle = jnp.linalg.qr(jacobian, mode="r")
  return jnp.linalg.svd(triangle, compute_uv=False)
