"""Solvers of one regression problem, each to the same size of the gradient.

A solver is a call without arguments that returns x. Peers get our jitted loss
and gradient, times a number that brings the loss near 1, for tolerances that
are absolute; compilation and the choice of tolerances are over before they run.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix  # pyright: ignore[reportMissingImports]
from scipy import optimize

from benchmarks import _race
from jaxattn import newton
from jaxattn.regression import softmax_resnet

Solver = Callable[[], Any]
_MAX_STEPS, _MAX_NEWTON_STEPS = 2000, 50
# Of optimistix, which looks at x and the loss: from loose to tight.
_TOLERANCES = (1e-4, 1e-6, 1e-8, 1e-10, 1e-12)


def planted(
  n: int, d: int, *, condition: float = 30.0, noise: float = 0.05
) -> softmax_resnet.SoftmaxResnetData:
  """Softmax regression with a skip whose columns shrink to 1 / condition."""
  rng = np.random.default_rng(1)
  a = rng.normal(size=(n, d)) * (np.geomspace(1, 1 / condition, d) / d**0.5)
  b = softmax_resnet.predict(jnp.asarray(rng.normal(size=d)), jnp.asarray(a))
  return softmax_resnet.prepare(
    a, b * (1 + noise * rng.normal(size=n)), w=0.1 / n
  )


def relative_gradient(
  problem: newton.Problem, x: Any, x0: jax.Array, data: Any
) -> float:
  """Norm of the gradient at x, over that at x0."""
  end, start = (
    jnp.linalg.norm(problem.value_and_grad(jnp.asarray(y), data)[1])
    for y in (x, x0)
  )
  return float(end / start)


def ours(
  problem: newton.Problem,
  x0: jax.Array,
  data: Any,
  config: newton.NewtonConfig,
) -> Solver:
  """Our solver."""
  rng = None if config.sketch is None else jax.random.key(0)
  return lambda: newton.minimize(problem, x0, data, config=config, rng=rng).x


def steps(
  problem: newton.Problem, x: jax.Array, data: Any, *, num_rows: int
) -> dict[str, Solver]:
  """One step of ours from x, exact and with sampled rows."""
  sampled = newton.NewtonConfig(sketch="leverage", num_rows=num_rows)
  found: dict[str, Solver] = {}
  for name, config in {
    "exact": newton.NewtonConfig(),
    "sampled": sampled,
  }.items():
    state = newton.init(problem, x, data, config=config)
    # The first steps are exact whatever the sketch.
    state = state._replace(num_steps=jnp.full((), 2, jnp.int32))
    found[name] = functools.partial(
      newton.step, problem, state, data, config=config, rng=jax.random.key(0)
    )
  return found


def scipy(
  method: str,
  problem: newton.Problem,
  x0: jax.Array,
  data: Any,
  *,
  scale: float,
  tol: float,
) -> Solver:
  """L-BFGS-B or trust-krylov; the latter with our products with the Hessian."""
  evaluate = jax.jit(problem.value_and_grad)
  goal = tol * scale * np.linalg.norm(evaluate(x0, data)[1])
  size = math.inf

  def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
    nonlocal size
    value, grad = evaluate(x, data)
    grad = scale * np.asarray(grad)
    size = float(np.linalg.norm(grad))
    return scale * float(value), grad

  @jax.jit
  def times_hessian(x: jax.Array, v: jax.Array) -> jax.Array:
    assert problem.curvature is not None
    return scale * newton.curvature_matvec(problem.curvature(x, data), v)

  def product(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.asarray(times_hessian(x, v))

  def stop(intermediate_result: optimize.OptimizeResult) -> None:
    # Their own tests are of another norm, or of the loss.
    if size <= goal:
      raise StopIteration

  if method == "L-BFGS-B":
    options = {"ftol": 0.0, "gtol": 0.0, "maxfun": 2 * _MAX_STEPS}
    options["maxiter"] = _MAX_STEPS
  else:
    # A step is a whole system of equations, by its own iteration.
    options = {"gtol": goal, "maxiter": _MAX_NEWTON_STEPS}
  hessian = {} if method == "L-BFGS-B" else {"hessp": product}

  def run() -> np.ndarray:
    found = optimize.minimize(
      value_and_grad,
      np.asarray(x0),
      jac=True,
      method=method,
      callback=stop,
      options=options,
      **hessian,
    )
    return found.x

  return run


def optax_lbfgs(
  problem: newton.Problem,
  x0: jax.Array,
  data: Any,
  *,
  scale: float,
  tol: float,
) -> Solver:
  """L-BFGS of optax with its own line search, in one compiled loop."""
  optimizer = optax.lbfgs()

  def loss(x: jax.Array, data: Any) -> jax.Array:
    return scale * problem.loss(x, data)

  @jax.jit
  def run(x0: jax.Array, data: Any) -> jax.Array:
    def evaluate(x: Any) -> tuple[jax.Array, jax.Array]:
      value, grad = problem.value_and_grad(x, data)
      return scale * value, scale * grad

    value, grad = evaluate(x0)
    goal = tol * jnp.linalg.norm(grad)

    def running(carry: Any) -> jax.Array:
      _, _, _, grad, num = carry
      return (jnp.linalg.norm(grad) > goal) & (num < _MAX_STEPS)

    def body(carry: Any) -> Any:
      x, state, value, grad, num = carry
      updates, state = optimizer.update(
        grad,
        state,
        x,
        value=value,
        grad=grad,
        value_fn=functools.partial(loss, data=data),
      )
      x = optax.apply_updates(x, updates)
      return (x, state, *evaluate(x), num + 1)

    start = x0, optimizer.init(x0), value, grad, 0
    return jax.lax.while_loop(running, body, start)[0]

  return lambda: run(x0, data)


def optimistix_bfgs(
  problem: newton.Problem,
  x0: jax.Array,
  data: Any,
  *,
  scale: float,
  tol: float,
) -> Solver:
  """BFGS of optimistix, by the loosest tolerance that gets there."""

  def loss(x: jax.Array, data: Any) -> jax.Array:
    return scale * problem.loss(x, data)

  def with_tolerance(rtol: float) -> Solver:
    solver = optimistix.BFGS(rtol=rtol, atol=rtol)
    run = jax.jit(
      lambda x0, data: (
        optimistix.minimise(
          loss, solver, x0, data, max_steps=_MAX_STEPS, throw=False
        ).value
      )
    )
    return lambda: run(x0, data)

  return loosest(
    [with_tolerance(rtol) for rtol in _TOLERANCES], problem, x0, data, tol
  )


def optimistix_lm(
  residual: Callable[[jax.Array, Any], jax.Array],
  problem: newton.Problem,
  x0: jax.Array,
  data: Any,
  *,
  tol: float,
) -> Solver:
  """Levenberg-Marquardt of optimistix on a residual whose loss it is."""

  def with_tolerance(rtol: float) -> Solver:
    solver = optimistix.LevenbergMarquardt(rtol=rtol, atol=rtol)
    run = jax.jit(
      lambda x0, data: (
        optimistix.least_squares(
          residual, solver, x0, data, max_steps=_MAX_STEPS, throw=False
        ).value
      )
    )
    return lambda: run(x0, data)

  return loosest(
    [with_tolerance(rtol) for rtol in _TOLERANCES], problem, x0, data, tol
  )


def loosest(
  solvers: Sequence[Solver],
  problem: newton.Problem,
  x0: jax.Array,
  data: Any,
  tol: float,
) -> Solver:
  """The first that gets there, or else the last."""
  for solver in solvers:
    if relative_gradient(problem, solver(), x0, data) <= tol:
      return solver
  return solvers[-1]


def hessians(
  name: str,
  problem: newton.Problem,
  x: jax.Array,
  data: Any,
  a: jax.Array,
  bar: float,
) -> list[_race.Row]:
  """The whole (d, d) matrix by JAX and by us.

  And the one product of the rows of A with themselves that is in it: what XLA
  takes for that alone is what nobody can go below.
  """

  @jax.jit
  def by_us(x: jax.Array, data: Any) -> jax.Array:
    assert problem.curvature is not None
    return newton.curvature_dense(problem.curvature(x, data))

  by_jax = jax.jit(jax.hessian(problem.loss))
  product = jax.jit(newton.weighted_gram)
  seconds = _race.race(
    {
      "ours": functools.partial(by_us, x, data),
      "jax": functools.partial(by_jax, x, data),
      "product": functools.partial(product, a, a[:, 0]),
    },
    rounds=21,
  )
  name = f"Hessian, {name}: jax.hessian /"
  return [
    _race.ratio(f"{name} ours", seconds, "ours", "jax", bar),
    _race.ratio(f"{name} its one product", seconds, "product", "jax"),
  ]


def race(
  name: str,
  solvers: dict[str, Solver],
  problem: newton.Problem,
  x0: jax.Array,
  data: Any,
  tol: float,
  *,
  bars: dict[str, float],
  rounds: int,
) -> list[_race.Row]:
  """A row for each peer of "ours", which says who stopped short."""
  labels = _labels(solvers, problem, x0, data, tol)
  seconds = _race.race(solvers, rounds=rounds)
  return [
    _race.ratio(
      f"{name}: {labels[peer]} / {labels['ours']}",
      seconds,
      "ours",
      peer,
      bars.get(peer),
    )
    for peer in solvers
    if peer != "ours"
  ]


def _labels(
  solvers: dict[str, Solver],
  problem: newton.Problem,
  x0: jax.Array,
  data: Any,
  tol: float,
) -> dict[str, str]:
  """Names for the table, which say who stopped short of the tolerance."""
  found = {}
  for name, solver in solvers.items():
    end = relative_gradient(problem, solver(), x0, data)
    found[name] = name if end <= tol else f"{name} (stops at {end:.0e})"
  return found
