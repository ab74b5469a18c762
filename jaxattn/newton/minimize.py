r"""A damped Newton method that may sample its Hessian.

Each step solves :math:`(H + \lambda I) p = -g` with
:math:`\lambda = \mu \|g\|`, which keeps convergence quadratic, shortens p until
the loss falls, and moves :math:`\mu` by how well the quadratic model predicted
the fall.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy import linalg

from jaxattn import _checks
from jaxattn.newton import _solve
from jaxattn.newton._loop import (
  BAD_START,
  FLAT,
  GRADIENT,
  RUNNING,
  STUCK,
  iterate,
)
from jaxattn.newton.curvature import (
  Curvature,
  DenseCurvature,
  StructuredCurvature,
  curvature_dense,
  curvature_matvec,
  curvature_sample,
  design_matvec,
)
from jaxattn.newton.problem import Problem

_MU_MIN, _MU_MAX = 1e-12, 1e12
_ARMIJO = 1e-4
_MAX_HALVINGS, _MAX_SHIFTS = 40, 60
_ROUND_OFF = 50.0
# Columns of the random projection behind approximate leverage scores, and the
# share of uniform probability mixed into them.
_PROJECTION, _UNIFORM = 16, 0.1
_ROWS_PER_DIM = 32
# Of the ladder: rows, four times as many, all.
_LADDER, _EXACT, _GOOD_STEPS = 4, 2, 3
# Steps that are exact whatever the sketch, and leave the probabilities.
_FIRST_EXACT = 2


class NewtonConfig(NamedTuple):
  """Static options of :func:`minimize`.

  Attributes:
    max_steps: steps at most.
    atol: stop where the norm of the gradient is at most this ...
    rtol: ... plus this times what it was at the start.
    mu0: first damping, a multiple of the gradient's norm. 1 or 0.1 for starts
      that are badly scaled.
    pure: x - H^-1 g and nothing else, as papers analyse it: to measure rates.
    curvature: ``"newton"``, the exact Hessian, or ``"gauss_newton"``.
    linear_solver: ``"cholesky"`` of the whole matrix; ``"woodbury"`` with the
      low-rank part apart; ``"dual"`` in n instead of p dimensions; ``"cg"``
      from products alone.
    sketch: None, or how rows of the design are drawn: ``"leverage"`` or
      ``"uniform"``. With ``linear_solver="cholesky"`` the sample stands in for
      the Hessian; with ``"cg"`` it preconditions products with the Hessian
      itself, and steps converge as fast as exact ones.
    num_rows: rows to draw; None = 32 p. In place of the Hessian the solver
      takes four times as many, and then all, where that does not converge.
    refresh: with a sketch, every how many steps the probabilities of the rows
      are renewed, by an exact step where the sample is in the Hessian's place;
      0 = by the first two steps alone, and by exact ones that the solver takes
      by itself.
  """

  max_steps: int = 50
  atol: float = 0.0
  rtol: float = 1e-10
  mu0: float = 1e-2
  pure: bool = False
  curvature: str = "newton"
  linear_solver: str = "cholesky"
  sketch: str | None = None
  num_rows: int | None = None
  refresh: int = 0


class NewtonState(NamedTuple):
  """What a step hands to the next.

  Attributes:
    x: (p,), the current point.
    loss: ().
    grad: (p,).
    mu: (), damping over the norm of the gradient.
    num_steps: ().
    reason: (), -1 while running; see :class:`NewtonResult`.
    start_loss: (), the first loss.
    start_norm: (), norm of the first gradient.
    num_flat: (), exact steps in a row that promised a fall of the loss, or
      moved x, by no more than rounding, be it after they were shortened.
    level: (), of the ladder of row counts: 0, 1, or 2 for all rows.
    num_good: (), steps in a row that converged well.
    prob: (n,) probabilities of rows; (0,) without a sketch.
    hessian: what ``Problem.expand`` told of the Hessian at x; () without it.
  """

  x: jax.Array
  loss: jax.Array
  grad: jax.Array
  mu: jax.Array
  num_steps: jax.Array
  reason: jax.Array
  start_loss: jax.Array
  start_norm: jax.Array
  num_flat: jax.Array
  level: jax.Array
  num_good: jax.Array
  prob: jax.Array
  hessian: Any


class NewtonInfo(NamedTuple):
  """What happened in a step.

  Attributes:
    loss: (), before the step.
    grad_norm: (), before the step.
    shift: (), lambda that was added to the Hessian.
    step_size: (), the share of the Newton step that was taken; 0 = rejected.
    ratio: (), fall of the loss over what the quadratic model promised.
    step_norm: (), how far x moved.
    num_rows: (), rows of the design that were used; -1 = no design.
    num_shifts: (), how often lambda had to grow before the step went down.
  """

  loss: jax.Array
  grad_norm: jax.Array
  shift: jax.Array
  step_size: jax.Array
  ratio: jax.Array
  step_norm: jax.Array
  num_rows: jax.Array
  num_shifts: jax.Array


class NewtonResult(NamedTuple):
  """The end of :func:`minimize`.

  Attributes:
    x: (p,).
    loss: ().
    grad_norm: ().
    num_steps: ().
    reason: (): 0 = ``max_steps``; 1 = the gradient is small enough; 2 = two
      exact steps in a row were within rounding, unshortened; 3 = stuck, at a
      kink or at the edge of the domain: not even the shortest step was
      accepted, or none but such as are within rounding; 4 = the start is not
      finite, or outside the domain, and is handed back as x.
    log: a :class:`NewtonInfo` of (max_steps,) arrays, NaN or -1 after the end.
  """

  x: jax.Array
  loss: jax.Array
  grad_norm: jax.Array
  num_steps: jax.Array
  reason: jax.Array
  log: NewtonInfo


def init(
  problem: Problem,
  x0: jax.Array,
  data: Any,
  *,
  config: NewtonConfig = NewtonConfig(),
) -> NewtonState:
  """The state before the first step.

  Args:
    problem: what to minimize; hashable.
    x0: (p,), the start.
    data: what the problem's functions take.
    config: static options.

  Returns:
    The state; its ``reason`` is not -1 if there is nothing to do.

  Raises:
    ValueError: if ``x0`` is no floating vector or an option does not fit.

  Cost:
    One gradient.

  Source:
    this project.

  Example:
    See :func:`minimize`.
    >>> import jax.numpy as jnp
    >>> from jaxattn import newton
    >>> problem = newton.least_squares_problem(lambda x, y: x**2 - y)
    >>> state = newton.init(problem, jnp.ones(1), jnp.array([4.0]))
    >>> print(state.loss, state.grad)
    4.5 [-6.]
  """
  x0 = jnp.asarray(x0)
  _check(problem, x0, config)
  return _init(problem, x0, data, config)


def step(
  problem: Problem,
  state: NewtonState,
  data: Any,
  *,
  config: NewtonConfig = NewtonConfig(),
  rng: jax.Array | None = None,
) -> tuple[NewtonState, NewtonInfo]:
  """One step of :func:`minimize`, for loops of one's own.

  Args:
    problem: as for :func:`init`.
    state: of the step before.
    data: as for :func:`init`.
    config: as for :func:`init`.
    rng: PRNG key of this step; needed with a sketch only.

  Returns:
    The new state, and what happened.

  Raises:
    ValueError: as :func:`minimize`.

  Cost:
    One curvature, a factorization and a few losses.

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn import newton
    >>> problem = newton.least_squares_problem(lambda x, y: x**2 - y)
    >>> data = jnp.array([4.0])
    >>> state = newton.init(problem, jnp.array([2.5]), data)
    >>> state, info = newton.step(problem, state, data)
    >>> print(round(float(state.x[0]), 1), info.step_size)
    2.1 1.0
  """
  _check(problem, state.x, config)
  _check_rng(config, rng)
  return _step(problem, state, data, config, rng)


def minimize(
  problem: Problem,
  x0: jax.Array,
  data: Any,
  *,
  config: NewtonConfig = NewtonConfig(),
  rng: jax.Array | None = None,
) -> NewtonResult:
  r"""Minimizes the loss of a regression problem.

  Unless ``pure``, every step that is taken lowers the loss and stays in the
  domain. Near a
  minimum with a regular Hessian convergence is quadratic; with a sketch it is
  linear, by a factor of about :math:`\sqrt{p / m}` a step for m rows.

  Compiled once for a problem, a configuration and shapes; maps over starts and
  data with ``jax.vmap``. With a sketch in the Hessian's place take
  ``jax.lax.map`` instead: under ``vmap`` every step computes the exact Hessian
  as well.

  Args:
    problem: what to minimize; hashable.
    x0: (p,), the start; a matrix of unknowns is flattened row by row.
    data: pytree of arrays that the problem's functions take.
    config: static options.
    rng: PRNG key; needed with a sketch only.

  Returns:
    A :class:`NewtonResult`. Nothing in it is NaN, but for the unused rows of
    its log, for a start that is not finite, and where ``pure`` diverges.

  Raises:
    ValueError: if ``x0`` is no floating vector, an option is not one of its
      choices, a sketch comes without ``rng``, or the problem does not provide
      the curvature asked for.

  Cost:
    A step: one gradient, a few losses, O(n p^2) for a structured Hessian or
    O(n p + m p^2) for m sampled rows, and O(p^3).

  Source:
    this project's solver for arXiv 2303.15725, 2304.10411 and 2308.08358; the
    shift follows the norm of the gradient as in Levenberg-Marquardt methods.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn import newton
    >>> problem = newton.least_squares_problem(lambda x, y: x**2 - y)
    >>> found = newton.minimize(problem, jnp.ones(2), jnp.array([4.0, 9.0]))
    >>> print(found.x, found.reason)
    [2. 3.] 1
  """
  x0 = jnp.asarray(x0)
  _check(problem, x0, config)
  _check_rng(config, rng)
  return _minimize(problem, x0, data, config, rng)


class _Model(NamedTuple):
  """What a step takes the Hessian to be."""

  curvature: Curvature
  # What is factored: the curvature, or what preconditions it; None = nothing.
  matrix: jax.Array | None
  num_rows: jax.Array
  # Of the ladder.
  level: jax.Array
  is_exact: jax.Array
  # Whether its factor renews the probabilities of rows.
  renews: jax.Array


# --- checks ---


def _check(problem: Problem, x0: jax.Array, config: NewtonConfig) -> None:
  if x0.ndim != 1:
    raise ValueError(f"x0 must be 1-D, got shape {x0.shape}")
  _checks.check_floating("x0", x0)
  _checks.check_integer("max_steps", config.max_steps, 1, None)
  _checks.check_nonnegative("atol", config.atol)
  _checks.check_nonnegative("rtol", config.rtol)
  _checks.check_range("mu0", config.mu0, _MU_MIN, _MU_MAX)
  _checks.check_choice("pure", config.pure, (False, True))
  _checks.check_choice(
    "curvature", config.curvature, ("newton", "gauss_newton")
  )
  _checks.check_choice(
    "linear_solver",
    config.linear_solver,
    ("cholesky", "woodbury", "dual", "cg"),
  )
  _checks.check_choice("sketch", config.sketch, (None, "leverage", "uniform"))
  if config.num_rows is not None:
    _checks.check_integer("num_rows", config.num_rows, 1, None)
  _checks.check_integer("refresh", config.refresh, 0, None)
  if config.sketch is None:
    if config.num_rows is not None or config.refresh:
      raise ValueError("num_rows and refresh are of no use without a sketch")
  elif config.linear_solver not in ("cholesky", "cg"):
    raise ValueError(
      f"linear_solver must be 'cholesky' or 'cg' with a sketch, got "
      f"{config.linear_solver!r}"
    )
  if _curvature_fn(problem, config) is None:
    raise ValueError(
      f"curvature={config.curvature!r} is not provided by this problem"
    )


def _check_rng(config: NewtonConfig, rng: jax.Array | None) -> None:
  if config.sketch is not None and rng is None:
    raise ValueError(f"rng is required when sketch={config.sketch!r}")


def _check_gradient(loss: jax.Array, grad: jax.Array, x0: jax.Array) -> None:
  if jnp.shape(grad) != x0.shape or jnp.shape(loss) != ():
    raise ValueError(
      "value_and_grad must return shapes () and that of x0, "
      f"{x0.shape}; got {jnp.shape(loss)} and {jnp.shape(grad)}"
    )
  for name, z in (("loss", loss), ("gradient", grad)):
    if z.dtype != x0.dtype:
      raise ValueError(
        f"x0 must have the dtype of the {name}, {z.dtype}, got {x0.dtype}"
      )


def _check_curvature(curvature: Curvature, config: NewtonConfig) -> None:
  solver = config.linear_solver
  asks = None
  if config.sketch is not None:
    asks = f"sketch={config.sketch!r}"
  elif solver in ("woodbury", "dual"):
    asks = f"linear_solver={solver!r}"
  if asks is None:
    return
  if not isinstance(curvature, StructuredCurvature):
    raise ValueError(
      f"{asks} needs a StructuredCurvature, got {type(curvature).__name__}"
    )
  if config.sketch is not None and not curvature.weight.shape[0]:
    raise ValueError(f"{asks} needs rows to draw, and the curvature has none")
  if solver == "dual" and jnp.ndim(curvature.const):
    raise ValueError(
      "linear_solver='dual' needs const = ridge * I, given as a scalar; got "
      f"shape {jnp.shape(curvature.const)}"
    )


# --- the iteration ---


def _curvature_fn(problem: Problem, config: NewtonConfig) -> Any:
  if config.curvature == "newton":
    return problem.curvature
  return problem.gauss_newton


def _expands(problem: Problem, config: NewtonConfig) -> bool:
  return problem.expand is not None and config.curvature == "newton"


def _evaluate(
  problem: Problem, x: jax.Array, data: Any, config: NewtonConfig
) -> tuple[jax.Array, jax.Array, Any]:
  """The loss, the gradient, and what is told of the Hessian with them."""
  if _expands(problem, config):
    assert problem.expand is not None
    loss, grad, hessian = problem.expand(x, data)
  else:
    (loss, grad), hessian = problem.value_and_grad(x, data), ()
  _check_gradient(loss, grad, x)
  return loss, grad, hessian


def _evaluate_inside(
  problem: Problem, x: jax.Array, data: Any, config: NewtonConfig
) -> tuple[jax.Array, jax.Array, Any]:
  """The same, the loss infinite outside the domain or if not finite."""
  loss, grad, hessian = _evaluate(problem, x, data, config)
  good = jnp.isfinite(loss)
  if problem.in_domain is not None:
    good &= problem.in_domain(x, data)
  return jnp.where(good, loss, jnp.inf), grad, hessian


def _init(
  problem: Problem, x0: jax.Array, data: Any, config: NewtonConfig
) -> NewtonState:
  loss, grad, hessian = _evaluate_inside(problem, x0, data, config)
  norm = jnp.linalg.norm(grad)
  prob = jnp.zeros((0,), x0.dtype)
  if config.sketch is not None:
    shape = jax.eval_shape(_curvature_fn(problem, config), x0, data)
    _check_curvature(shape, config)
    n = shape.weight.shape[0]
    prob = jnp.full((n,), 1 / n, x0.dtype)
  bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
  done = jnp.where(norm <= config.atol + config.rtol * norm, GRADIENT, RUNNING)
  zero = jnp.zeros((), jnp.int32)
  return NewtonState(
    x=x0,
    loss=loss,
    grad=grad,
    mu=jnp.asarray(config.mu0, x0.dtype),
    num_steps=zero,
    reason=jnp.where(bad, BAD_START, done).astype(jnp.int32),
    start_loss=loss,
    start_norm=norm,
    num_flat=zero,
    level=zero,
    num_good=zero,
    prob=prob,
    hessian=hessian,
  )


@functools.partial(jax.jit, static_argnums=(0, 3))
def _step(
  problem: Problem,
  state: NewtonState,
  data: Any,
  config: NewtonConfig,
  rng: jax.Array | None,
) -> tuple[NewtonState, NewtonInfo]:
  x, loss, grad = state.x, state.loss, state.grad
  eps = jnp.finfo(x.dtype).eps
  norm = jnp.linalg.norm(grad)
  if _expands(problem, config):
    exact = state.hessian(data)
  else:
    exact = _curvature_fn(problem, config)(x, data)
  _check_curvature(exact, config)
  model = _model(exact, state, config, rng)
  curvature = model.curvature
  direction, shift, num_shifts = _direction(model, state, config)
  slope = grad @ direction
  bend = direction @ curvature_matvec(curvature, direction)

  # Of a sum of squares that goes to 0 the rounding is that of its roots.
  floor = jnp.maximum(jnp.abs(loss), eps * jnp.abs(state.start_loss))

  def promise(size: jax.Array) -> jax.Array:
    return -(size * slope + size**2 * bend / 2)

  def within_rounding(size: jax.Array) -> jax.Array:
    flat = promise(size) <= _ROUND_OFF * eps * floor
    length = size * jnp.linalg.norm(direction)
    return flat | (length <= _ROUND_OFF * eps * jnp.linalg.norm(x))

  one = jnp.ones((), x.dtype)
  flat = within_rounding(one)

  def attempt(size: jax.Array) -> tuple[Any, jax.Array]:
    found = _evaluate_inside(problem, x + size * direction, data, config)
    value, slopes, _ = found
    most = loss + _ARMIJO * size * slope + 2 * eps * jnp.abs(loss)
    # Where the loss is all rounding, the gradient still tells.
    near = flat & (value <= loss + _ROUND_OFF * eps * floor)
    near &= jnp.linalg.norm(slopes) <= norm
    return found, (value <= most) | near

  old = loss, grad, state.hessian
  if config.pure:
    size, accepted = one, jnp.array(True)
    new = _evaluate(problem, x + direction, data, config)
  else:
    size, new, accepted = _halve(attempt, old)
  new_loss, new_grad, hessian = jax.tree.map(
    lambda z, y: jnp.where(accepted, z, y), new, old
  )
  new_norm = jnp.linalg.norm(new_grad)

  promised = promise(size)
  ratio = (loss - new_loss) / jnp.where(promised == 0, 1, promised)
  ratio = jnp.where(flat, 1, jnp.where(accepted, ratio, 0)).astype(x.dtype)
  x = jnp.where(accepted, x + size * direction, x)
  moved = jnp.where(accepted, size, 0) * jnp.linalg.norm(direction)
  mu = jnp.clip(shift / norm, _MU_MIN, _MU_MAX)
  better = accepted & (ratio > 0.75) & (size == 1)
  worse = ~accepted | (ratio < 0.25)
  idle = flat | (accepted & within_rounding(size))
  factor = jnp.where(better, 0.25, jnp.where(worse, 4.0, 1.0))
  mu = jnp.clip(mu * factor.astype(x.dtype), _MU_MIN, _MU_MAX)
  # Of sampled Hessians a promise below rounding says little.
  num_flat = state.num_flat + model.is_exact.astype(jnp.int32)
  num_flat = jnp.where(idle, num_flat, 0)

  reason = jnp.full((), RUNNING, jnp.int32)
  if not config.pure:
    still = jnp.where(flat, FLAT, STUCK)
    reason = jnp.where(num_flat >= 2, still, reason)
    reason = jnp.where(~accepted & (mu >= _MU_MAX), STUCK, reason)
  target = config.atol + config.rtol * state.start_norm
  reason = jnp.where(new_norm <= target, GRADIENT, reason)
  bad = worse | idle | (new_norm > 0.8 * norm)
  level, num_good = _climb(state, model.level, bad)
  info = NewtonInfo(
    loss=loss,
    grad_norm=norm,
    shift=shift,
    step_size=jnp.where(accepted, size, 0),
    ratio=ratio,
    step_norm=moved,
    num_rows=model.num_rows,
    num_shifts=num_shifts,
  )
  prob = _probabilities(exact, model, shift, state, config, rng)
  state = NewtonState(
    x=x,
    loss=new_loss,
    grad=new_grad,
    mu=mu,
    num_steps=state.num_steps + 1,
    reason=reason.astype(jnp.int32),
    start_loss=state.start_loss,
    start_norm=state.start_norm,
    num_flat=num_flat,
    level=level,
    num_good=num_good,
    prob=prob,
    hessian=hessian,
  )
  return state, info


@functools.partial(jax.jit, static_argnums=(0, 3))
def _minimize(
  problem: Problem,
  x0: jax.Array,
  data: Any,
  config: NewtonConfig,
  rng: jax.Array | None,
) -> NewtonResult:
  state = _init(problem, x0, data, config)

  def one(state: NewtonState) -> tuple[tuple[NewtonState], NewtonInfo]:
    key = None if rng is None else jax.random.fold_in(rng, state.num_steps)
    state, info = _step(problem, state, data, config, key)
    return (state,), info

  return result_of(*iterate(one, (state,), config.max_steps))


def result_of(state: NewtonState, log: NewtonInfo) -> NewtonResult:
  """What a loop hands back at its end."""
  return NewtonResult(
    x=state.x,
    loss=state.loss,
    grad_norm=jnp.linalg.norm(state.grad),
    num_steps=state.num_steps,
    reason=state.reason,
    log=log,
  )


def _halve(attempt: Any, old: Any) -> tuple[jax.Array, Any, jax.Array]:
  """The largest of 1, 1/2, 1/4, ... that passes, with what was found there.

  Gradient and Hessian come with the loss: the first size mostly passes, and the
  data need not be read again.
  """

  def again(carry: Any) -> jax.Array:
    _, num, _, passed = carry
    return ~passed & (num <= _MAX_HALVINGS)

  def body(carry: Any) -> Any:
    size, num, _, _ = carry
    return size / 2, num + 1, *attempt(size / 2)

  # The loop makes the first attempt too: what is written once compiles once.
  start = jnp.full((), 2, old[0].dtype), jnp.zeros((), jnp.int32)
  size, _, new, passed = lax.while_loop(
    again, body, (*start, old, jnp.array(False))
  )
  return size, new, passed


def _direction(
  model: _Model, state: NewtonState, config: NewtonConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """A direction of descent, the shift it took, and how often that grew."""
  grad, dtype = state.grad, state.x.dtype
  norm = jnp.linalg.norm(grad)
  shift = jnp.zeros((), dtype) if config.pure else state.mu * norm
  solve, scale = _solver(model, grad, norm / state.start_norm, config)

  def attempt(shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    p = solve(shift)
    return p, jnp.isfinite(p).all() & (grad @ p < 0)

  if config.pure:
    return solve(shift), shift, jnp.zeros((), jnp.int32)
  tiny = jnp.finfo(dtype).tiny

  def again(carry: tuple[jax.Array, ...]) -> jax.Array:
    _, _, num, good = carry
    return ~good & (num < _MAX_SHIFTS)

  def body(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    _, shift, num, _ = carry
    larger = jnp.maximum(4 * shift, 1e-6 * scale + tiny)
    shift = jnp.where(num < 0, shift, larger)
    p, good = attempt(shift)
    return p, shift, num + 1, good

  start = grad, shift, jnp.full((), -1, jnp.int32), jnp.array(False)
  p, shift, num, good = lax.while_loop(again, body, start)
  # However ill the Hessian: down the gradient.
  return jnp.where(good, p, -grad), shift, num


def _solver(
  model: _Model, grad: jax.Array, progress: jax.Array, config: NewtonConfig
) -> tuple[Any, jax.Array]:
  """Shift -> -(H + shift I)^-1 g, and a size of H."""
  curvature, matrix = model.curvature, model.matrix
  if matrix is None:
    product = curvature_matvec(curvature, grad)
    scale = jnp.linalg.norm(product) / jnp.linalg.norm(grad)
  else:
    scale = jnp.abs(jnp.diag(matrix)).mean()
  if config.linear_solver == "cholesky":
    assert matrix is not None
    if config.pure:
      # As written, whatever the signs of the Hessian.
      return lambda _: -jnp.linalg.solve(matrix, grad), progress

    def solve(shift: jax.Array) -> jax.Array:
      factor = _solve.cholesky_factor(matrix, shift)
      return -_solve.cholesky_solve(factor, grad)

    return solve, scale
  if config.linear_solver == "cg":
    tol = jnp.minimum(0.1, jnp.sqrt(progress))
    if config.pure:
      tol = float(jnp.finfo(grad.dtype).eps)

    def solve_by_products(shift: jax.Array) -> jax.Array:
      factor = None
      if matrix is not None:
        factor = _solve.cholesky_factor(matrix, shift)
        # A sample may be indefinite where the Hessian is not.
        eye = jnp.eye(len(grad), dtype=grad.dtype)
        factor = jnp.where(jnp.isfinite(factor).all(), factor, eye)
      return -_solve.cg_solve(curvature, grad, shift, tol, factor)

    return solve_by_products, scale
  assert isinstance(curvature, StructuredCurvature)
  dual = config.linear_solver == "dual"

  solve_system = _solve.structured_solver(curvature, grad, dual=dual)
  return lambda shift: -solve_system(shift), scale


# --- the ladder of row counts ---


def _is_due(state: NewtonState, config: NewtonConfig) -> jax.Array:
  """Whether this step must renew the probabilities of rows."""
  due = state.num_steps < _FIRST_EXACT
  if config.refresh:
    due |= state.num_steps % config.refresh == 0
  return due


def _row_counts(n: int, p: int, config: NewtonConfig) -> tuple[int, int, int]:
  fewest = config.num_rows or _ROWS_PER_DIM * p
  return min(fewest, n), min(_LADDER * fewest, n), n


def _model(
  exact: Curvature,
  state: NewtonState,
  config: NewtonConfig,
  rng: jax.Array | None,
) -> _Model:
  """The curvature of the step, and the matrix that is factored for it."""
  p, dtype = len(state.x), state.x.dtype
  structured = isinstance(exact, StructuredCurvature)
  all_rows = jnp.array(_EXACT, jnp.int32)
  yes = jnp.array(True)
  if config.sketch is None:
    num_rows = len(exact.weight) if structured else -1
    matrix = None
    if config.linear_solver == "cholesky":
      # Once, for the factors and for what the step promises.
      matrix = curvature_dense(exact, dim=p, dtype=dtype)
      exact = DenseCurvature(matrix)
    num_rows = jnp.array(num_rows, jnp.int32)
    return _Model(exact, matrix, num_rows, all_rows, is_exact=yes, renews=yes)
  assert rng is not None
  assert structured
  n = len(exact.weight)
  counts = _row_counts(n, p, config)

  def some(num_rows: int) -> jax.Array:
    if num_rows == n:
      return curvature_dense(exact)
    return curvature_dense(curvature_sample(rng, exact, state.prob, num_rows))

  due = _is_due(state, config)
  if config.linear_solver == "cg":
    num_rows = jnp.array(counts[0], jnp.int32)
    matrix = some(counts[0])
    return _Model(exact, matrix, num_rows, all_rows, is_exact=yes, renews=due)
  level = jnp.where(due, _EXACT, state.level)
  matrix = lax.switch(level, [functools.partial(some, c) for c in counts])
  num_rows = jnp.array(counts, jnp.int32)[level]
  told = num_rows == n
  curvature = DenseCurvature(matrix)
  return _Model(curvature, matrix, num_rows, level, is_exact=told, renews=told)


def _climb(
  state: NewtonState, used: jax.Array, bad: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """One up after a bad step, one down after three good ones."""
  own = used == state.level
  num_good = jnp.where(bad, 0, state.num_good + 1)
  down = num_good >= _GOOD_STEPS
  level = jnp.where(bad, state.level + 1, state.level - down.astype(jnp.int32))
  level = jnp.clip(level, 0, _EXACT)
  num_good = jnp.where(down, 0, num_good)
  # Steps that are exact anyway say nothing about the rung below.
  num_good = jnp.where(own, num_good, state.num_good)
  return jnp.where(own, level, state.level), num_good


def _probabilities(
  structured: Curvature,
  model: _Model,
  shift: jax.Array,
  state: NewtonState,
  config: NewtonConfig,
  rng: jax.Array | None,
) -> jax.Array:
  """Of rows: their leverage, as the factor of the step tells it."""
  if config.sketch != "leverage":
    return state.prob
  assert rng is not None
  assert isinstance(structured, StructuredCurvature)
  matrix = model.matrix
  assert matrix is not None

  def renewed() -> jax.Array:
    factor = _solve.cholesky_factor(matrix, shift)
    shape = len(factor), _PROJECTION
    draw = jax.random.normal(jax.random.fold_in(rng, 1), shape, factor.dtype)
    w = linalg.solve_triangular(factor.T, draw) / _PROJECTION**0.5
    rows = design_matvec(structured.design, w)
    if structured.center is not None:
      rows -= (structured.center @ w)[None]
    score = jnp.abs(structured.weight) * (rows**2).sum(1)
    total = score.sum()
    n = len(score)
    prob = (1 - _UNIFORM) * score / total + _UNIFORM / n
    return jnp.where(jnp.isfinite(total) & (total > 0), prob, state.prob)

  return lax.cond(model.renews, renewed, lambda: state.prob)
