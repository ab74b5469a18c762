"""What experiments about Newton's method for regression share.

Paths of several methods towards one minimum, errors in the norm in which the
theory holds, those of sampled Hessians, seconds of a step, and the rates that
are read off them.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib import ticker
from matplotlib.axes import Axes

from experiments import harness
from jaxattn import newton
from jaxattn.numerics import spectral_bounds
from jaxattn.sketch import leverage_scores

_UNIFORM = 0.1
# Steps after which the solver samples; its first ones are exact.
_PAST_EXACT = 2
# Where a path counts as converged, and as lost.
_FLOOR, _CEILING = 1e-10, 1e6
_ROUNDING = 1e-12
# Steps to a minimum, and from nearly to wholly exact.
_MOST_STEPS, _POLISH = 200, 3


class Minimum(NamedTuple):
  """Where all paths lead.

  Attributes:
    x: (p,), the minimum.
    root: (p, p), the lower Cholesky factor of its Hessian H.
  """

  x: jax.Array
  root: jax.Array

  def error(self, points: Any) -> np.ndarray:
    """(...,) sqrt((y - x)^T H (y - x)) of points y, (..., p)."""
    off = np.asarray(points) - np.asarray(self.x)
    return np.linalg.norm(off @ np.asarray(self.root), axis=-1)


def find_minimum(
  problem: newton.Problem, x0: jax.Array, data: Any, *, mu0: float
) -> Minimum:
  """The minimum that exact steps from x0 end in, to rounding."""
  path = newton_path(problem, x0, data, mu0=mu0, num_steps=_MOST_STEPS)
  # Damped steps end where rounding hides whether the loss falls.
  x = pure_path(problem, path[-1], data, num_steps=_POLISH)[-1]
  return Minimum(x, jnp.linalg.cholesky(hessian(problem, x, data)))


@functools.partial(jax.jit, static_argnums=0)
def hessian(problem: newton.Problem, x: jax.Array, data: Any) -> jax.Array:
  """The whole matrix, (p, p)."""
  assert problem.curvature is not None
  return newton.curvature_dense(problem.curvature(x, data), dim=len(x))


# --- paths ---


def newton_path(
  problem: newton.Problem,
  x0: jax.Array,
  data: Any,
  *,
  mu0: float,
  num_steps: int,
) -> jax.Array:
  """(at most num_steps + 1, p) points of the solver, until it stops."""
  config = newton.NewtonConfig(rtol=1e-12, mu0=mu0)
  return _path(problem, x0, data, config, num_steps)


def pure_path(
  problem: newton.Problem, x0: jax.Array, data: Any, *, num_steps: int
) -> jax.Array:
  """(num_steps + 1, p) points of x - H^-1 g."""
  config = newton.NewtonConfig(rtol=0.0, pure=True)
  return _path(problem, x0, data, config, num_steps)


@functools.partial(jax.jit, static_argnames=("problem", "config"))
def _start(
  problem: newton.Problem, x: jax.Array, data: Any, config: newton.NewtonConfig
) -> newton.NewtonState:
  return newton.init(problem, x, data, config=config)


def _path(
  problem: newton.Problem,
  x0: jax.Array,
  data: Any,
  config: newton.NewtonConfig,
  num_steps: int,
) -> jax.Array:
  state = _start(problem, x0, data, config)
  path = [state.x]
  while state.reason < 0 and len(path) <= num_steps:
    state, _ = newton.step(problem, state, data, config=config)
    path.append(state.x)
  return jnp.stack(path)


@functools.partial(
  jax.jit, static_argnames=("problem", "num_rows", "num_steps")
)
def sampled_paths(
  problem: newton.Problem,
  x0: jax.Array,
  data: Any,
  prob: jax.Array,
  rngs: jax.Array,
  *,
  num_rows: int,
  num_steps: int,
) -> jax.Array:
  """(rngs, num_steps + 1, p) points of x - H^-1 g, with H of fresh rows.

  Undamped and with as many rows in each step: what theory speaks of.
  """
  assert problem.curvature is not None
  curvature = problem.curvature

  def one(x: jax.Array, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = curvature(x, data)
    assert isinstance(h, newton.StructuredCurvature)
    h = newton.curvature_sample(rng, h, prob, num_rows)
    _, grad = problem.value_and_grad(x, data)
    return x - jnp.linalg.solve(newton.curvature_dense(h), grad), x

  def path(rng: jax.Array) -> jax.Array:
    return lax.scan(one, x0, jax.random.split(rng, num_steps + 1))[1]

  return lax.map(path, rngs)


def first_order_path(
  optimizer: optax.GradientTransformation,
  problem: newton.Problem,
  x0: jax.Array,
  data: Any,
  *,
  scale: float,
  num_steps: int,
) -> jax.Array:
  """(num_steps + 1, p) points of an optimizer of optax on scale times L."""
  update = optax.with_extra_args_support(optimizer).update

  def loss(x: jax.Array, data: Any) -> jax.Array:
    return scale * problem.loss(x, data)

  @jax.jit
  def run(x0: jax.Array, data: Any) -> jax.Array:
    def one(carry: Any, _: None) -> tuple[Any, jax.Array]:
      x, state = carry
      value, grad = problem.value_and_grad(x, data)
      updates, state = update(
        scale * grad,
        state,
        x,
        value=scale * value,
        grad=scale * grad,
        value_fn=functools.partial(loss, data=data),
      )
      return (optax.apply_updates(x, updates), state), x

    start = x0, optimizer.init(x0)
    return lax.scan(one, start, length=num_steps + 1)[1]

  return run(x0, data)


def best_adam_path(
  rates: tuple[float, ...], minimum: Minimum, *args: Any, **options: Any
) -> np.ndarray:
  """The path that ends nearest to the minimum, of several step sizes."""
  paths = [
    np.asarray(first_order_path(optax.adam(rate), *args, **options))
    for rate in rates
  ]
  ends = [np.nan_to_num(minimum.error(path[-1]), nan=np.inf) for path in paths]
  return paths[int(np.argmin(ends))]


# --- sampling ---


@jax.jit
def leverage_probabilities(h: newton.StructuredCurvature) -> jax.Array:
  """Of rows: leverage of the weighted, centered ones, one tenth uniform."""
  n = len(h.weight)
  rows = newton.design_rows(h.design, jnp.arange(n))
  if h.center is not None:
    rows -= h.center[None]
  score = leverage_scores(jnp.sqrt(jnp.abs(h.weight))[:, None] * rows)
  return (1 - _UNIFORM) * score / score.sum() + _UNIFORM / n


@functools.partial(jax.jit, static_argnames="num_rows")
def sketch_errors(
  h: newton.StructuredCurvature,
  prob: jax.Array,
  rngs: jax.Array,
  *,
  num_rows: int,
) -> jax.Array:
  """(rngs,) spectral norms of H^-1/2 (H' - H) H^-1/2, H' of sampled rows."""
  exact = newton.curvature_dense(h)

  def error(rng: jax.Array) -> jax.Array:
    drawn = newton.curvature_sample(rng, h, prob, num_rows)
    low, high = spectral_bounds(exact, newton.curvature_dense(drawn))
    return jnp.maximum(high - 1, 1 - low)

  return lax.map(error, rngs)


def sketch_law(rows_per_dim: Any) -> np.ndarray:
  """The error that random matrix theory predicts for m = rows_per_dim p."""
  gamma = 1 / np.asarray(rows_per_dim, float)
  return 2 * np.sqrt(gamma) + gamma


# --- seconds ---


def step_seconds(
  problem: newton.Problem,
  x: jax.Array,
  data: Any,
  configs: Mapping[str, newton.NewtonConfig],
  *,
  rounds: int,
  at_least: float,
) -> dict[str, float]:
  """Least seconds of one step from x, of each way to take it."""
  runs = {}
  for name, config in configs.items():
    state = _start(problem, x, data, config)
    state = state._replace(num_steps=jnp.full((), _PAST_EXACT, jnp.int32))
    runs[name] = functools.partial(
      newton.step,
      problem,
      state,
      data,
      config=config,
      rng=jax.random.key(0),
    )
  return harness.least_seconds(runs, rounds=rounds, at_least=at_least)


# --- rates ---


def order(errors: np.ndarray) -> float:
  """Exponent q of e' = c e^q, from the last three errors above rounding."""
  relative = errors / errors[0]
  logs = np.log(relative[relative > _ROUNDING])
  if len(logs) < 3:
    return float("nan")
  return float((logs[-1] - logs[-2]) / (logs[-2] - logs[-3]))


def factor_per_step(errors: np.ndarray) -> float:
  """Geometric mean over paths, (paths, steps + 1), while neither end is near.

  Of each path the steps count before it has converged, or is lost.
  """
  relative = np.nan_to_num(errors / errors[:, :1], nan=np.inf)
  done = (relative <= _FLOOR) | (relative >= _CEILING)
  num = np.where(done.any(1), done.argmax(1), errors.shape[1]) - 1
  # Whoever converges, or is lost, at once still took one step.
  num = np.maximum(num, 1)
  ends = np.clip(relative[np.arange(len(num)), num], _FLOOR, _CEILING)
  return float(np.exp((np.log(ends) / num).mean()))


def steps_to(errors: np.ndarray, levels: Any) -> np.ndarray:
  """(levels,) mean steps until errors are a level times their first.

  NaN where a path never gets there.
  """
  relative = errors / errors[:, :1]
  reached = relative[:, :, None] <= np.asarray(levels)
  first = np.where(reached.any(1), reached.argmax(1), np.nan)
  return first.mean(0)


def line(x: Any, y: Any) -> tuple[float, float]:
  """Slope and R squared of the least-squares line."""
  slope = np.polyfit(x, y, 1)[0]
  return float(slope), float(np.corrcoef(x, y)[0, 1] ** 2)


# --- panels ---


def draw_errors(
  ax: Axes,
  errors: np.ndarray,
  label: str,
  color: str,
  style: str,
  *,
  first: int = 0,
) -> None:
  """Errors by step, the median of several paths."""
  middle = np.median(errors, 0) if errors.ndim == 2 else errors
  at = first + np.arange(len(middle))
  ax.semilogy(at, middle, style, color=color, label=label, markersize=5)


def draw_steps(
  ax: Axes, paths: Mapping[str, np.ndarray], tens: np.ndarray
) -> None:
  """Steps that an error takes to fall by powers of ten, with their line."""
  for name, errors in paths.items():
    steps = steps_to(errors, 10.0**-tens)
    slope, r_squared = line(tens, steps)
    label = f"{name}: {slope:.2f} a decade, $R^2$ = {r_squared:.4f}"
    (dots,) = ax.plot(tens, steps, "o", label=label)
    fit = np.polyval(np.polyfit(tens, steps, 1), tens)
    ax.plot(tens, fit, color=dots.get_color(), alpha=0.55)
  ax.set(
    title="Sampled steps are linear in log(1/eps)",
    xlabel="decades by which the error falls",
    ylabel="steps",
    ylim=(0, None),
  )
  ax.legend()


def draw_law(ax: Axes, rows_per_dim: Any, errors: np.ndarray) -> None:
  """Errors of sampled Hessians, (rows, draws), with what is predicted."""
  rows = np.asarray(rows_per_dim)
  for i, row in enumerate(errors):
    at = np.full(len(row), rows[i])
    label = "draws" if i == 0 else None
    ax.loglog(at, row, ".", color=harness.PALETTE[5], label=label)
  middle = np.median(errors, 1)
  ax.loglog(rows, middle, "o", color=harness.PALETTE[0], label="median")
  law = r"$2\sqrt{d/m} + d/m$"
  ax.loglog(rows, sketch_law(rows), color="k", linewidth=1.2, label=law)
  ax.set(
    title="Error of a sampled Hessian",
    xlabel="m / d, rows for each unknown",
    ylabel=r"$\|H^{-1/2} (\tilde H - H) H^{-1/2}\|$",
  )
  ax.set_xticks(rows, [str(r) for r in rows], minor=False)
  ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.legend()
