"""Leverage scores of a barrier's rows, inverted: rates, recovery, noise, time.

Five questions about arXiv 2404.13785, on random polytopes around 0 and a hidden
point at a share of the way to the wall:

1. How does the error fall, step by step: Newton's method, Gauss-Newton steps
   (Levenberg-Marquardt), gradient descent? Which order, which factor?
2. How often is the point found, by how near it is to the wall, from one start
   and from several? How often by a solver that does not know of the wall?
3. How does the error grow with noise in the scores, and with a regularizer?
4. How do seconds of a Hessian grow with n and d?
5. A real table of features, for one hidden point.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import optimize

from experiments import _regression, harness
from jaxattn import newton
from jaxattn.newton.centers import analytic_center
from jaxattn.newton.first_order import gradient_descent
from jaxattn.regression import leverage_inversion
from jaxattn.regression.leverage_inversion import (
  LeverageInversionData,
  invert_leverage,
  leverage,
  leverage_jacobian,
)
from jaxattn.scaling import fit_slope

_METHODS = ("Newton", "Gauss-Newton", "gradient descent")
# Errors below this are rounding, and drawn there.
_ROUNDING = 1e-16

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Sizes = tuple[int, int]


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  curves = {
    (n, d): wd.point(
      f"curves/n={n},d={d}", functools.partial(curves_point, config, n, d)
    )
    for n, d in harness.progress(config.sizes, "convergence")
  }
  recovery = _recovery(wd)
  scipy = wd.point("scipy", functools.partial(scipy_point, config))
  noise = wd.point("noise", functools.partial(noise_point, config))
  real = wd.point("diabetes", functools.partial(diabetes_point, config))
  seconds = {
    "n": _seconds(wd, [(n, config.dim_of_lengths) for n in config.lengths]),
    "d": _seconds(wd, [(config.length_of_dims, d) for d in config.dims]),
  }
  figure = _draw(config, curves, recovery, noise, seconds)
  harness.save_figure(
    wd, figure, _figure_data(config, curves, recovery, noise, seconds)
  )
  return harness.finish(
    wd,
    claim=(
      "The leverage scores of the rows of a logarithmic barrier tell where in "
      "the polytope it was taken: from them the point is recovered by Newton's "
      "method, with a local rate that is quadratic, and by gradient descent, "
      "with one that is linear."
    ),
    source="arXiv:2404.13785, abstract",
    paper="a first-order and a second-order method converge (no numbers)",
    checks=[
      *_rate_checks(config, curves),
      *_recovery_checks(config, recovery, scipy),
      *_noise_checks(config, noise),
      harness.Check(
        "relative error on the diabetes table",
        real["error"],
        high=config.accepted.real_error,
      ),
      harness.Check("steps on the diabetes table", real["steps"]),
    ],
    timed=_time_checks(config, seconds),
  )


def _recovery(wd: harness.Workdir) -> dict[str, np.ndarray]:
  """(shares, polytopes) errors, by way of searching."""
  config: Config = wd.config
  ways = {
    "Newton": ("newton", 1),
    f"Newton, {config.num_starts} starts": ("newton", config.num_starts),
    "Gauss-Newton": ("gauss_newton", 1),
  }
  return {
    name: np.stack(
      [
        wd.point(
          f"recovery/{curvature}/starts={num},share={share:g}",
          functools.partial(recovery_point, config, curvature, share, num),
        )["error"]
        for share in harness.progress(config.shares, f"recovery, {name}")
      ]
    )
    for name, (curvature, num) in ways.items()
  }


def _seconds(wd: harness.Workdir, sizes: list[Sizes]) -> np.ndarray:
  return np.array(
    [
      wd.point(
        f"seconds/{i}/n={n},d={d}",
        functools.partial(seconds_point, wd.config, n, d),
      )["hessian"]
      for i, (n, d) in enumerate(sizes)
    ]
  )


# --- instances ---


def instance(
  n: int, d: int, seed: int, share: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A polytope A x > b around 0, and a point this share of the way out."""
  rng = np.random.default_rng(seed)
  a, b = rng.normal(size=(n, d)), -1 - rng.uniform(size=n)
  return a, b, _outwards(a, b, rng, share)


def _outwards(
  a: np.ndarray, b: np.ndarray, rng: np.random.Generator, share: float
) -> np.ndarray:
  """The point in a random direction from 0, a share of the way to the wall."""
  side = rng.normal(size=a.shape[1])
  side /= np.linalg.norm(side)
  speed = a @ side
  wall = (b[speed < 0] / speed[speed < 0]).min()
  return share * wall * side


def planted(
  n: int, d: int, seed: int, share: float
) -> tuple[LeverageInversionData, jax.Array, jax.Array]:
  """Data with the scores of a point, that point, and the analytic center."""
  a, b, x = (jnp.asarray(y) for y in instance(n, d, seed, share))
  data = leverage_inversion.prepare(a, b, leverage(x, a, b))
  return data, x, center_of(data)


def center_of(data: LeverageInversionData) -> jax.Array:
  """The analytic center of a polytope around 0."""
  zero = jnp.zeros_like(data.a[0])
  return analytic_center(-data.a, -data.b, zero).x


# --- rates ---


def curves_point(config: Config, n: int, d: int) -> dict[str, Any]:
  """Errors by step, from the center and from nearby; extreme eigenvalues."""
  with jax.enable_x64(True):
    data, x, center = planted(n, d, config.seed, config.share)
    path = functools.partial(newton_path, config.linear_solver, data)
    paths = {
      "Newton": path(center, num_steps=config.newton_steps),
      "Gauss-Newton": path(
        center, num_steps=config.newton_steps, curvature="gauss_newton"
      ),
      "gradient descent": descent_path(
        data,
        center,
        num_steps=config.descent_steps,
        every=config.descent_every,
      ),
    }
    side = jax.random.normal(jax.random.key(config.seed), x.shape, x.dtype)
    side /= jnp.linalg.norm(side)
    start = x + config.pure_distance * side
    pure = path(start, num_steps=config.pure_steps, pure=True)
    sizes = jnp.linalg.eigvalsh(leverage_inversion.curvature(x, data).matrix)
    start = x + config.fixed_distance * side
    fixed = fixed_path(data, start, 1 / sizes[-1], num_steps=config.fixed_steps)
    rows, b = np.asarray(data.a), np.asarray(data.b)
    slack = min((np.asarray(p) @ rows.T - b).min() for p in paths.values())
  best = np.asarray(x)
  errors = {
    name: np.linalg.norm(np.asarray(p) - best, axis=1)
    for name, p in {**paths, "pure": pure, "fixed": fixed}.items()
  }
  relative = {name: errors[name] / np.linalg.norm(best) for name in _METHODS}
  near = {name: errors[name] for name in ("pure", "fixed")}
  extremes = {"least": float(sizes[0]), "largest": float(sizes[-1])}
  return {**relative, **near, **extremes, "slack": float(slack)}


def newton_path(
  linear_solver: str,
  data: LeverageInversionData,
  x0: jax.Array,
  *,
  num_steps: int,
  **options: Any,
) -> jax.Array:
  """(num_steps + 1, d) points of the solver."""
  problem = leverage_inversion.problem(matrix_free=linear_solver == "cg")
  config = newton.NewtonConfig(rtol=0.0, linear_solver=linear_solver, **options)

  @jax.jit
  def walk(x0: jax.Array, data: LeverageInversionData) -> jax.Array:
    def one(state: Any, _: None) -> tuple[Any, jax.Array]:
      return newton.step(problem, state, data, config=config)[0], state.x

    state = newton.init(problem, x0, data, config=config)
    return lax.scan(one, state, length=num_steps + 1)[1]

  return walk(x0, data)


def descent_path(
  data: LeverageInversionData, x0: jax.Array, *, num_steps: int, every: int
) -> jax.Array:
  """(num_steps / every + 1, d) points of descent with a line search."""
  inside = leverage_inversion.problem().in_domain
  assert inside is not None

  @jax.jit
  def walk(x0: jax.Array, data: LeverageInversionData) -> jax.Array:
    def walled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
      value, grad = leverage_inversion.value_and_grad(x, data)
      return jnp.where(inside(x, data), value, jnp.inf), grad

    def one(carry: tuple[jax.Array, ...], _: None) -> tuple[Any, jax.Array]:
      x, size = carry
      found = gradient_descent(
        walled, x, step_size=size, num_steps=every, backtracking=True
      )
      size = found.log.step_size[-1]
      return (found.x, jnp.where(size > 0, 2 * size, 1.0)), x

    start = x0, jnp.ones((), x0.dtype)
    return lax.scan(one, start, length=num_steps // every + 1)[1]

  return walk(x0, data)


def fixed_path(
  data: LeverageInversionData,
  x0: jax.Array,
  step_size: jax.Array,
  *,
  num_steps: int,
) -> jax.Array:
  """(num_steps + 1, d) points of descent with steps of one size."""

  @jax.jit
  def walk(x0: jax.Array, data: LeverageInversionData) -> jax.Array:
    def one(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
      grad = leverage_inversion.value_and_grad(x, data)[1]
      return x - step_size * grad, x

    return lax.scan(one, x0, length=num_steps + 1)[1]

  return walk(x0, data)


# --- recovery ---


def recovery_point(
  config: Config, curvature: str, share: float, num_starts: int
) -> dict[str, Any]:
  """(polytopes,) distances from the hidden point."""
  solver = newton.NewtonConfig(rtol=1e-13, curvature=curvature)
  n, d = config.recovery_size
  rngs = jax.random.split(jax.random.key(config.seed), config.num_polytopes)
  errors = []
  with jax.enable_x64(True):
    for i, rng in enumerate(rngs):
      data, x, center = planted(n, d, 100 + i, share)
      found = invert_leverage(
        data.a,
        data.b,
        data.sigma,
        x0=center,
        num_starts=num_starts,
        rng=rng if num_starts > 1 else None,
        config=solver,
      )
      errors.append(np.linalg.norm(found.x - x))
  return {"error": np.array(errors)}


def scipy_point(config: Config) -> dict[str, float]:
  """How often scipy's Levenberg-Marquardt finds the point, or leaves."""
  n, d = config.recovery_size
  found, left = [], []
  with jax.enable_x64(True):

    def residual(x: np.ndarray, data: LeverageInversionData) -> np.ndarray:
      return np.asarray(leverage(jnp.asarray(x), data.a, data.b) - data.sigma)

    # SciPy's annotations know of names of methods only.
    def jacobian(x: np.ndarray, data: LeverageInversionData) -> Any:
      return np.asarray(leverage_jacobian(jnp.asarray(x), data.a, data.b))

    jac: Any = jacobian

    for i in range(config.num_scipy):
      data, x, center = planted(n, d, 100 + i, config.share)
      end = optimize.least_squares(
        residual, center, jac, method="lm", args=(data,), xtol=1e-15
      ).x
      found.append(np.linalg.norm(end - x) < config.recovered_within)
      left.append((data.a @ end - data.b).min() < 0)
  return {"found": float(np.mean(found)), "left": float(np.mean(left))}


# --- noise ---


def noise_point(config: Config) -> dict[str, Any]:
  """(levels, seeds) errors of noisy scores, and biases by weight."""
  n, d = config.noise_size
  seeds = range(config.seed, config.seed + config.noise_seeds)

  def error(seed: int, level: float, weight: float) -> float:
    data, x, center = planted(n, d, seed, config.share)
    z = np.random.default_rng(7 + seed).normal(size=n)
    found = invert_leverage(
      data.a,
      data.b,
      data.sigma * (1 + level * z),
      x0=center,
      w=weight,
      normalize_sigma=True,
    )
    return float(jnp.linalg.norm(found.x - x) / jnp.linalg.norm(x))

  with jax.enable_x64(True):
    by_level = [
      [error(seed, level, 0.0) for seed in seeds]
      for level in harness.progress(config.noise, "noise")
    ]
    bias = [error(seeds[0], 0.0, weight) for weight in config.weights]
  return {"error": np.array(by_level), "bias": np.array(bias)}


def diabetes_point(config: Config) -> dict[str, float]:
  """One hidden point among the rows of a standardized table, 442 x 10."""
  # An extra of this package, so not imported with it.
  from sklearn import datasets

  n, d = config.table_size
  table, _ = datasets.load_diabetes(return_X_y=True)
  rows = np.asarray(table, float)[:n, :d]
  rows = (rows - rows.mean(0)) / rows.std(0)
  b = -(1 + np.linalg.norm(rows, axis=1))
  x = _outwards(rows, b, np.random.default_rng(config.seed), config.share)
  with jax.enable_x64(True):
    sigma = leverage(jnp.asarray(x), jnp.asarray(rows), jnp.asarray(b))
    data = leverage_inversion.prepare(jnp.asarray(rows), jnp.asarray(b), sigma)
    found = invert_leverage(data.a, data.b, data.sigma, x0=center_of(data))
    error = float(jnp.linalg.norm(found.x - x) / np.linalg.norm(x))
  return {"error": error, "steps": int(found.num_steps)}


# --- time ---


def seconds_point(config: Config, n: int, d: int) -> dict[str, float]:
  """Seconds of a Hessian."""
  with jax.enable_x64(True):
    a, b, x = (
      jnp.asarray(y) for y in instance(n, d, config.seed, config.share)
    )
    data = leverage_inversion.prepare(a, b, leverage(x, a, b))
    return harness.least_seconds(
      {"hessian": functools.partial(timed_call(), x, data)},
      rounds=config.rounds,
      at_least=config.seconds_per_point,
    )


def timed_call() -> Callable[..., Any]:
  """The Hessian, compiled."""
  return jax.jit(lambda x, data: leverage_inversion.curvature(x, data).matrix)


# --- checks ---


def _rate_checks(
  config: Config, curves: dict[Sizes, dict[str, Any]]
) -> list[harness.Check]:
  checks = []
  for (n, d), curve in curves.items():
    name = f"n={n}, d={d}"
    order = _regression.order(curve["pure"])
    checks.append(
      harness.Check(f"order of Newton, {name}", order, *config.accepted.order)
    )
    errors = curve["fixed"]
    predicted = 1 - curve["least"] / curve["largest"]
    excess = errors[-1] / errors[-2] - predicted
    checks.append(
      harness.Check(
        f"factor of descent minus that of eigenvalues, {name}",
        excess,
        *config.accepted.factor,
      )
    )
    checks.append(
      harness.Check(f"1 - least / largest eigenvalue, {name}", predicted)
    )
    checks += [
      harness.Check(f"relative error at the end, {m}, {name}", curve[m][-1])
      for m in _METHODS
    ]
  slack = min(curve["slack"] for curve in curves.values())
  # Above 0: a point on the wall is outside.
  least = float(np.finfo(float).tiny)
  checks.append(harness.Check("least slack of any step", slack, least))
  return checks


def _rates(config: Config, recovery: dict[str, np.ndarray]) -> dict[str, Any]:
  within = config.recovered_within
  return {way: (e < within).mean(1) for way, e in recovery.items()}


def _recovery_checks(
  config: Config, recovery: dict[str, np.ndarray], scipy: dict[str, float]
) -> list[harness.Check]:
  accepted = config.accepted
  lows = {
    ("Newton", 0.7): accepted.recovered,
    (f"Newton, {config.num_starts} starts", 0.97): accepted.recovered_near,
    ("Gauss-Newton", 0.7): accepted.recovered,
  }
  checks = [
    harness.Check(
      f"recovered at {share:g} of the way, {way}",
      rate,
      lows.get((way, share), -np.inf),
    )
    for way, rates in _rates(config, recovery).items()
    for share, rate in zip(config.shares, rates, strict=True)
  ]
  where = f"at {config.share:g} of the way, scipy's solver"
  return [
    *checks,
    harness.Check(f"recovered {where}", scipy["found"]),
    harness.Check(f"outside of the polytope {where}", scipy["left"]),
  ]


def _noise_fit(config: Config, noise: dict[str, Any]) -> tuple[Any, Any]:
  """Medians over seeds, and their power law."""
  medians = np.median(noise["error"], axis=1)
  return medians, fit_slope(config.noise, medians)


def _noise_checks(config: Config, noise: dict[str, Any]) -> list[harness.Check]:
  accepted, bias = config.accepted, noise["bias"]
  return [
    harness.Check(
      "slope of the error in the noise",
      _noise_fit(config, noise)[1].slope,
      *accepted.noise_slope,
    ),
    harness.Check(
      "bias over that of half the weight",
      bias[0] / bias[1],
      *accepted.bias_ratio,
    ),
    harness.Check(f"relative bias, weight {config.weights[0]:g}", bias[0]),
  ]


def _time_checks(
  config: Config, seconds: dict[str, np.ndarray]
) -> list[harness.Check]:
  return [
    harness.Check(
      f"slope of seconds of a Hessian in n, d={config.dim_of_lengths}",
      fit_slope(config.lengths, seconds["n"]).slope,
      *config.accepted.length_slope,
    ),
    harness.Check(
      f"slope of seconds of a Hessian in d, n={config.length_of_dims}",
      fit_slope(config.dims, seconds["d"]).slope,
      high=config.accepted.dim_slope,
    ),
  ]


# --- figure ---


def _figure_data(
  config: Config,
  curves: dict[Sizes, dict[str, Any]],
  recovery: dict[str, np.ndarray],
  noise: dict[str, Any],
  seconds: dict[str, np.ndarray],
) -> dict[str, Any]:
  data = {
    f"error, {method}, n={n}, d={d}": curve[method]
    for (n, d), curve in curves.items()
    for method in (*_METHODS, "pure", "fixed")
  }
  data |= {f"recovery, {way}": e for way, e in recovery.items()}
  data |= {f"noise, {key}": x for key, x in noise.items()}
  data |= {f"seconds by {key}": x for key, x in seconds.items()}
  keys = ("shares", "lengths", "dims", "weights", "descent_every")
  return data | {key: config[key] for key in keys} | {"levels": config.noise}


def _draw(
  config: Config,
  curves: dict[Sizes, dict[str, Any]],
  recovery: dict[str, np.ndarray],
  noise: dict[str, Any],
  seconds: dict[str, np.ndarray],
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(3, 2, figsize=(12.5, 14))
  _draw_steps(axes[0, 0], config, curves)
  _draw_descent(axes[0, 1], config, curves)
  _draw_recovery(axes[1, 0], config, recovery)
  _draw_noise(axes[1, 1], config, noise)
  _draw_seconds(axes[2, 0], "n, number of rows", config.lengths, seconds["n"])
  _draw_seconds(axes[2, 1], "d, number of columns", config.dims, seconds["d"])
  fixed = (f"d = {config.dim_of_lengths}", f"n = {config.length_of_dims}")
  for ax, what in zip(axes[2], fixed, strict=True):
    ax.set_title(f"Time of a Hessian, {what}")
  return figure


def _draw_steps(
  ax: Axes, config: Config, curves: dict[Sizes, dict[str, Any]]
) -> None:
  for (n, d), color in zip(config.shown, harness.PALETTE):
    for method, style in (("Newton", "o-"), ("Gauss-Newton", "s--")):
      errors = np.maximum(curves[n, d][method], _ROUNDING)
      label = f"{method}, n={n}, d={d}"
      ax.semilogy(errors, style, color=color, label=label)
  ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  ax.set(
    title="From the analytic center: second order",
    xlabel="step",
    ylabel="relative error of x",
  )
  ax.legend()


def _draw_descent(
  ax: Axes, config: Config, curves: dict[Sizes, dict[str, Any]]
) -> None:
  for ((n, d), curve), color in zip(curves.items(), harness.PALETTE):
    errors = np.maximum(curve["gradient descent"], _ROUNDING)
    steps = config.descent_every * np.arange(len(errors))
    ax.semilogy(steps, errors, color=color, label=f"n={n}, d={d}")
  ax.set(
    title="Gradient descent with a line search",
    xlabel="step",
    ylabel="relative error of x",
  )
  ax.legend()


def _draw_recovery(
  ax: Axes, config: Config, recovery: dict[str, np.ndarray]
) -> None:
  rates = _rates(config, recovery).items()
  for (way, rate), style in zip(rates, ("o-", "s-", "^--")):
    ax.plot(config.shares, 100 * rate, style, label=way)
  n, d = config.recovery_size
  ax.set(
    title=f"Recovered to {config.recovered_within:g} (n={n}, d={d})",
    xlabel="share of the way from 0 to the wall",
    ylabel="% of polytopes",
    ylim=(0, 105),
  )
  ax.legend(loc="lower left")


def _draw_noise(ax: Axes, config: Config, noise: dict[str, Any]) -> None:
  medians, _ = _noise_fit(config, noise)
  n, d = config.noise_size
  harness.plot_loglog(ax, config.noise, medians, label="median of polytopes")
  ax.set(
    title=f"Error is proportional to noise (n={n}, d={d})",
    xlabel="relative noise of the scores",
    ylabel="relative error of x",
  )
  ax.legend()


def _draw_seconds(
  ax: Axes, label: str, sizes: tuple[int, ...], seconds: np.ndarray
) -> None:
  harness.plot_loglog(ax, sizes, 1000 * seconds, label="measured")
  ax.set(xlabel=label, ylabel="milliseconds")
  ax.legend()


if __name__ == "__main__":
  harness.main(run, "leverage-score-inversion")
