"""Flows that forecast: how near to the best, from how little, how quickly.

Four questions about arXiv 2503.14076, the first three on series whose law given
the past is known, so that the best velocity and the least loss are, too:

1. Approximation: the excess loss by size of the model, and by steps.
2. Generalization: the excess by number of windows, with and without the
   polynomial regularizer; what the regularizer does to the variance.
3. Efficiency: the error of samples by evaluations of the velocity, by solver,
   of the best velocity and of a trained one.
4. Real series: scores against N-Linear with Gaussian residuals, persistence and
   the season before.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments import harness
from jaxattn.data import load_series, split_series, standardize, windows
from jaxattn.models import (
  DiT,
  FlowMLP,
  nlinear_fit,
  nlinear_predict,
  persistence,
  sample_forecast,
  seasonal_naive,
  train_flow,
)
from jaxattn.sampling import (
  cfm_loss,
  crps,
  gaussian_cfm_floor,
  gaussian_velocity,
  integrate,
  straight,
  time_grid,
)
from jaxattn.scaling import fit_slope

# Evaluations of the velocity a step.
_PER_STEP = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
_SOLVERS = (*_PER_STEP, "log_euler")
# A grid of equal steps of the logarithm of 1 - t ends here.
_LOG_END = 1 - 1e-3
_BASELINES = ("N-Linear", "persistence", "season before")
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# A ConfigDict: what type a field has is known at run time only.
Config = Any


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  found = {
    "sizes": [
      [_size_point(wd, width, rate, config.num_steps, seed)
       for seed in range(config.size_seeds)]
      for width, rate in harness.progress(config.widths, "sizes")
    ],
    "steps": [
      _size_point(wd, config.width_of_steps, config.data_rate, steps, 0)
      for steps in harness.progress(config.steps, "steps")
    ],
    "dit": wd.point("dit", functools.partial(dit_point, config)),
    "data": _data(wd),
    "solvers": {
      name: wd.point(
        f"solvers/{name}", functools.partial(solver_point, config, name)
      )
      for name in ("best", "trained")
    },
    "exact": wd.point("exact", functools.partial(exact_point, config)),
    "real": {
      series[0]: _real(wd, series)
      for series in harness.progress(config.series, "series")
    },
  }  # fmt: skip
  figure = _draw(config, found)
  harness.save_figure(wd, figure, _figure_data(config, found))
  return harness.finish(
    wd,
    claim=(
      "Forecasters by flow matching approximate the conditional law to any "
      "accuracy, generalize from few windows by a polynomial regularizer, and "
      "sample in few steps, because these are gradient descent."
    ),
    source="arXiv:2503.14076, abstract",
    paper="three guarantees (no numbers, no experiments)",
    checks=[
      *_size_checks(config, found),
      *_data_checks(config, found["data"]),
      *_solver_checks(config, found),
      *_real_checks(config, found["real"]),
    ],
  )


def _size_point(
  wd: harness.Workdir, width: int, rate: float, steps: int, seed: int
) -> dict[str, Any]:
  call = functools.partial(size_point, wd.config, width, rate, steps, seed)
  return wd.point(f"size/width={width},steps={steps},seed={seed}", call)


def _data(wd: harness.Workdir) -> dict[str, np.ndarray]:
  """Each measure as (lengths, weights, seeds)."""
  config: Config = wd.config
  points = [
    [
      [
        wd.point(
          f"data/n={n},weight={weight:g},seed={seed}",
          functools.partial(data_point, config, n, weight, seed),
        )
        for seed in range(config.data_seeds)
      ]
      for weight in config.weights
    ]
    for n in harness.progress(config.lengths, "windows")
  ]
  return {
    name: np.array([[[p[name] for p in row] for row in a] for a in points])
    for name in points[0][0][0]
  }


def _real(wd: harness.Workdir, series: tuple[Any, ...]) -> dict[str, Any]:
  """Without the regularizer, and with the weight that validation prefers."""
  config: Config = wd.config
  by_weight = [
    wd.point(
      f"real/{series[0]}/weight={weight:g}",
      functools.partial(real_point, config, series, weight),
    )
    for weight in config.real_weights
  ]
  tuned = min(range(len(by_weight)), key=lambda i: by_weight[i]["val_crps"])
  return {
    **by_weight[0],
    **{f"tuned_{key}": value for key, value in by_weight[tuned].items()},
    "weight": float(config.real_weights[tuned]),
  }


# --- series whose law is known ---


class Law(NamedTuple):
  """Of a series given its past: N(history @ gain, cov).

  Attributes:
    basis: (L + T, K + 1), of which series are normal combinations.
    gain: (L, T).
    cov: (T, T).
    floor: () the least loss of flow matching.
  """

  basis: np.ndarray
  gain: np.ndarray
  cov: np.ndarray
  floor: float


def law_of(config: Config) -> Law:
  """Normal coefficients of Legendre polynomials, and noise."""
  tau = np.linspace(-1, 1, config.history + config.horizon)
  basis = np.polynomial.legendre.legvander(tau, config.degree)
  past, future = np.split(basis, [config.history])
  noise = config.noise**2
  inverse = np.linalg.inv(np.eye(config.degree + 1) + past.T @ past / noise)
  cov = future @ inverse @ future.T + noise * np.eye(config.horizon)
  gain = past @ inverse @ future.T / noise
  # Symmetric beyond rounding.
  cov = (cov + cov.T) / 2
  floor = float(gaussian_cfm_floor(jnp.asarray(cov)))
  return Law(basis, gain, cov, floor)


def draw_windows(
  config: Config, seed: int, num: int
) -> tuple[jax.Array, jax.Array]:
  """(num, L, 1) histories and (num, T, 1) futures, in single precision."""
  rng = np.random.default_rng(seed)
  basis = law_of(config).basis
  y = rng.normal(size=(num, basis.shape[1])) @ basis.T
  y += config.noise * rng.normal(size=y.shape)
  y = jnp.asarray(y[..., None], jnp.float32)
  return y[:, : config.history], y[:, config.history :]


def excess_of(config: Config, model: Any, params: Any) -> dict[str, float]:
  """The excess loss, and how far the loss is from floor + excess, in errors."""
  law = law_of(config)
  history, future = draw_windows(config, 10_000, config.num_eval)
  squares, loss = _squares(
    params,
    history,
    future,
    jnp.asarray(law.gain, jnp.float32),
    jnp.asarray(law.cov, jnp.float32),
    jax.random.key(config.seed + 1),
    model=model,
  )
  squares, loss = (np.asarray(x, np.float64) for x in (squares, loss))
  residual = loss - squares - law.floor
  error = residual.std() / np.sqrt(len(residual))
  return {
    "excess": float(squares.mean()),
    "gap": float(residual.mean() / error),
    "floor": law.floor,
    "num_params": int(sum(x.size for x in jax.tree.leaves(params))),
  }


@functools.partial(jax.jit, static_argnames="model")
def _squares(
  params: Any,
  history: jax.Array,
  future: jax.Array,
  gain: jax.Array,
  cov: jax.Array,
  rng: jax.Array,
  *,
  model: Any,
) -> tuple[jax.Array, jax.Array]:
  """(num,) squared distances to the best velocity, and to the target."""
  distance = {}

  def velocity(x: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
    v = model.apply(params, x, t, cond)
    best = gaussian_velocity(x[..., 0], t, cond[..., 0] @ gain, cov)
    distance["squares"] = ((v[..., 0] - best) ** 2).sum(1)
    return v

  _, info = cfm_loss(rng, velocity, future, history)
  return distance["squares"], info.squares


# --- approximation ---


def size_point(
  config: Config, width: int, rate: float, num_steps: int, seed: int
) -> dict[str, float]:
  """One network, on as many windows as it can use."""
  model = _mlp(config, width)
  return excess_of(config, model, trained(config, model, rate, num_steps, seed))


def dit_point(config: Config) -> dict[str, float]:
  """One transformer, on the same."""
  model = dit_of(config)
  params = trained(config, model, config.dit_rate, config.dit_steps, 0)
  return excess_of(config, model, params)


def dit_of(config: Config) -> DiT:
  """The transformer of the configuration."""
  width, num_layers, num_heads = config.dit
  return DiT(
    horizon=config.horizon,
    history=config.history,
    width=width,
    num_layers=num_layers,
    num_heads=num_heads,
    history_mode=config.dit_mode,
    dtype=jnp.dtype(config.dit_dtype),
  )


def trained(
  config: Config, model: Any, rate: float, num_steps: int, seed: int
) -> Any:
  """Parameters of a flow of the known law."""
  history, future = draw_windows(config, seed, config.num_windows)
  return train_flow(
    jax.random.key(config.seed + seed),
    model,
    history,
    future,
    num_steps=num_steps,
    batch_size=config.batch_size,
    learning_rate=rate,
    degree=config.degree,
    normalize=False,
  )[0]


def _mlp(config: Config, width: int) -> FlowMLP:
  return FlowMLP(horizon=config.horizon, history=config.history, width=width)


# --- generalization ---


def data_point(
  config: Config, num: int, weight: float, seed: int
) -> dict[str, float]:
  """Excess, errors of forecasts, and variance over the true one."""
  model = _mlp(config, config.data_width)
  history, future = draw_windows(config, 100 + seed, num)
  params, _ = train_flow(
    jax.random.key(config.seed + seed),
    model,
    history,
    future,
    num_steps=config.data_steps,
    batch_size=config.batch_size,
    learning_rate=config.data_rate,
    reg_weight=weight,
    degree=config.degree,
    normalize=False,
  )
  law = law_of(config)
  history, future = draw_windows(config, 20_000, config.num_histories)
  samples = sample_forecast(
    jax.random.key(config.seed + 2),
    params,
    history,
    model=model,
    num_samples=config.num_samples,
    num_steps=10,
    normalize=False,
  )
  x = np.asarray(samples[..., 0], np.float64)
  variance = x.var(0, ddof=1).sum(1)
  best = np.asarray(history[..., 0], np.float64) @ law.gain
  squares = ((x.mean(0) - best) ** 2).sum(1)
  return {
    "excess": excess_of(config, model, params)["excess"],
    # Less what few samples alone would cost.
    "mean_error": float((squares - variance / len(x)).mean()),
    "crps": float(crps(samples, future).mean()),
    "variance": float(variance.mean() / np.trace(law.cov)),
  }


# --- efficiency ---


def solver_point(config: Config, which: str) -> dict[str, Any]:
  """Root mean squares of distances from where exact solutions end."""
  law = law_of(config)
  history, _ = draw_windows(config, 30_000, config.num_paths)
  model = _mlp(config, config.data_width)
  params = None
  if which == "trained":
    params = trained(config, model, config.data_rate, config.num_steps, 0)
  with jax.enable_x64(True):
    wide = jnp.asarray(np.asarray(history), jnp.float64)
    mean, cov = wide[..., 0] @ jnp.asarray(law.gain), jnp.asarray(law.cov)
    z = jax.random.normal(jax.random.key(config.seed), mean.shape)
    if params is None:
      velocity = functools.partial(gaussian_velocity, mean=mean, cov=cov)
      values, vectors = np.linalg.eigh(law.cov)
      exact = mean + z @ ((vectors * np.sqrt(values)) @ vectors.T)
    else:
      velocity = functools.partial(_learned, model, params, wide)
      ts = jnp.linspace(0.0, 1.0, config.reference_steps + 1)
      exact = integrate(velocity, z, ts, method="rk4")

    def error(x: jax.Array) -> float:
      return float(jnp.sqrt(((x - exact) ** 2).sum(1).mean()))

    errors = {
      solver: np.array(
        [error(_solve(velocity, z, solver, n)) for n in config.evaluations]
      )
      for solver in _SOLVERS
    }
    adaptive = [_adaptive(velocity, z, tol) for tol in config.tolerances]
    return {
      **errors,
      "tsit5": np.array([error(x) for x, _ in adaptive]),
      "tsit5_evaluations": np.array([n for _, n in adaptive]),
    }


def _learned(
  model: Any, params: Any, history: jax.Array, x: jax.Array, t: jax.Array
) -> jax.Array:
  return model.apply(params, x[..., None], t, history)[..., 0]


def _solve(
  velocity: Callable[..., jax.Array], z: jax.Array, solver: str, num: int
) -> jax.Array:
  """With this many evaluations of the velocity."""
  if solver == "log_euler":
    ts = time_grid(
      num, kind="log", t_min=0.0, t_max=_LOG_END, schedule=straight()
    )
    return integrate(velocity, z, ts, method="euler")
  ts = jnp.linspace(0.0, 1.0, num // _PER_STEP[solver] + 1)
  return integrate(velocity, z, ts, method=solver)


def _adaptive(
  velocity: Callable[..., jax.Array], z: jax.Array, tol: float
) -> tuple[jax.Array, int]:
  """The end, and evaluations: of seven stages the last is the next first."""
  # An extra of this package, so not imported with it.
  import diffrax

  found = diffrax.diffeqsolve(
    diffrax.ODETerm(lambda t, x, args: velocity(x, t)),
    diffrax.Tsit5(),
    0.0,
    1.0,
    None,
    z,
    stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
  )
  assert found.ys is not None
  return found.ys[0], 6 * int(found.stats["num_steps"]) + 1


def exact_point(config: Config) -> dict[str, float]:
  """What holds exactly of the flow to a point, as a largest violation."""
  del config
  with jax.enable_x64(True):
    point = jnp.array([1.0, -2.0, 0.5])
    velocity = functools.partial(
      gaussian_velocity, mean=point, cov=jnp.zeros(3)
    )
    z = jax.random.normal(jax.random.key(0), (64, 3))
    ends = [_solve(velocity, z, "euler", n) for n in (1, 3, 7, 50)]
    euler = max(float(jnp.abs(x - point[None]).max()) for x in ends)
    n = 20
    shares = jnp.linalg.norm(
      _solve(velocity, z, "log_euler", n) - point[None], axis=1
    ) / jnp.linalg.norm(z - point[None], axis=1)
    # (1 - zeta)^n, with zeta of the grid.
    contraction = float(jnp.abs(shares / (1 - _LOG_END) - 1).max())
  return {"euler": euler, "contraction": contraction}


# --- real series ---


class Parts(NamedTuple):
  """Windows of a standardized series: (history, future) each."""

  train: tuple[np.ndarray, np.ndarray]
  val: tuple[np.ndarray, np.ndarray]
  test: tuple[np.ndarray, np.ndarray]


def parts_of(config: Config, name: str, history: int, horizon: int) -> Parts:
  """Windows of validation and test reach back for their past, not forward."""
  values = load_series(name).values
  train, val, test = split_series(values)
  z, _, _ = standardize(values, train)

  def part(start: int, stop: int, stride: int) -> Any:
    return windows(z[max(start - history, 0) : stop], history, horizon,
                   stride=stride)  # fmt: skip

  return Parts(
    part(train.start, train.stop, 1),
    part(val.start, val.stop, config.stride),
    part(test.start, test.stop, config.stride),
  )


def real_point(
  config: Config, series: tuple[Any, ...], weight: float
) -> dict[str, Any]:
  """Scores of a flow and of all else, of the first channel."""
  name, history, horizon, period = series
  parts = parts_of(config, name, history, horizon)
  model = FlowMLP(
    horizon=horizon,
    history=history,
    channels=parts.train[0].shape[2],
    width=config.real_width,
  )
  params, log = train_flow(
    jax.random.key(config.seed),
    model,
    *(jnp.asarray(x) for x in parts.train),
    num_steps=config.real_steps,
    batch_size=config.real_batch,
    learning_rate=config.real_rate,
    reg_weight=weight,
    val=(jnp.asarray(parts.val[0]), jnp.asarray(parts.val[1])),
    num_evals=config.num_evals,
  )
  draw = functools.partial(
    sample_forecast,
    jax.random.key(config.seed + 1),
    params,
    model=model,
    num_samples=config.real_samples,
    num_steps=10,
  )
  val, test = (draw(jnp.asarray(p[0]))[..., 0] for p in (parts.val, parts.test))
  truth = parts.test[1][..., 0]
  middle = len(truth) // 2
  return {
    "val_crps": float(crps(val, jnp.asarray(parts.val[1][..., 0])).mean()),
    "crps": float(crps(test, jnp.asarray(truth)).mean()),
    "mse": float(((np.asarray(test).mean(0) - truth) ** 2).mean()),
    "best": int(log.best),
    **baselines(parts, period),
    "past": parts.test[0][middle, :, 0],
    "truth": truth[middle],
    "fan": np.quantile(np.asarray(test[:, middle]), _QUANTILES, axis=0),
  }


def baselines(parts: Parts, period: int) -> dict[str, float]:
  """Scores of simple forecasts with Gaussian residuals, by step of horizon."""
  x, y = (a[..., 0] for a in parts.train)
  horizon = y.shape[1]
  w = np.asarray(nlinear_fit(jnp.asarray(x), jnp.asarray(y)))
  predict: dict[str, Callable[[np.ndarray], Any]] = {
    "N-Linear": lambda x: nlinear_predict(jnp.asarray(w), jnp.asarray(x)),
    "persistence": lambda x: persistence(jnp.asarray(x), horizon),
    "season before": lambda x: seasonal_naive(
      jnp.asarray(x), horizon, period=period
    ),
  }
  scores = {}
  for name, of in predict.items():
    std = np.sqrt(((np.asarray(of(x)) - y) ** 2).mean(0))
    test_x, test_y = (a[..., 0] for a in parts.test)
    off = test_y - np.asarray(of(test_x))
    scores[f"{name} crps"] = float(gaussian_crps(off, std).mean())
    scores[f"{name} mse"] = float((off**2).mean())
  return scores


def gaussian_crps(off: np.ndarray, std: np.ndarray) -> np.ndarray:
  """Of N(0, std^2), if the outcome is ``off``."""
  z = off / std
  tail = z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z)
  return std * (tail - 1 / np.sqrt(np.pi))


# --- checks ---


def _shares(found: dict[str, Any]) -> np.ndarray:
  """(sizes, seeds) excess over the least loss."""
  return np.array(
    [[p["excess"] / p["floor"] for p in row] for row in found["sizes"]]
  )


def _size_checks(config: Config, found: dict[str, Any]) -> list[harness.Check]:
  shares = _shares(found)
  means = shares.mean(1)
  errors = shares.std(1, ddof=1) / np.sqrt(shares.shape[1])
  rises = np.diff(means) / np.hypot(errors[1:], errors[:-1])
  gaps = [p["gap"] for row in found["sizes"] for p in row]
  farthest = max(gaps, key=abs)
  dit = found["dit"]
  return [
    harness.Check(
      "excess over the least loss, largest network",
      means[-1],
      high=config.accepted.excess,
    ),
    harness.Check(
      "largest rise from a size to the next, in standard errors",
      rises.max(),
      high=config.accepted.rise,
    ),
    harness.Check(
      "loss less least loss less excess, farthest from 0, in standard errors",
      farthest,
      *config.accepted.gap,
    ),
    harness.Check(
      "excess over the least loss, transformer", dit["excess"] / dit["floor"]
    ),
  ]


def _data_checks(
  config: Config, data: dict[str, np.ndarray]
) -> list[harness.Check]:
  excess = data["excess"].mean(2)
  few, many = len(config.lengths) - 2, len(config.lengths) - 1
  best = int(excess[many].argmin())
  checks = [
    harness.Check(
      f"excess that the regularizer takes off, {config.lengths[few]} windows",
      1 - excess[few].min() / excess[few, 0],
      low=config.accepted.gain,
    ),
    harness.Check(
      f"best weight, {config.lengths[many]} windows",
      config.weights[best],
      high=config.accepted.best_weight,
    ),
  ]
  names = {
    "excess": "excess",
    "mean_error": "squared error of the mean",
    "crps": "CRPS",
    "variance": "variance over the true one",
  }
  return checks + [
    harness.Check(
      f"{text}, {n} windows, weight {weight:g}", data[key].mean(2)[i, j]
    )
    for key, text in names.items()
    for i, n in enumerate(config.lengths)
    for j, weight in enumerate(config.weights)
  ]


def _solver_checks(
  config: Config, found: dict[str, Any]
) -> list[harness.Check]:
  accepted = config.accepted
  ranges = {
    "euler": tuple(accepted.euler),
    "midpoint": (-np.inf, accepted.midpoint),
    "rk4": tuple(accepted.rk4),
  }
  nums = np.array(config.evaluations)
  last = nums >= config.fit_from
  best = found["solvers"]["best"]
  return [
    *(
      harness.Check(
        f"slope of the error in evaluations, {name}",
        float(fit_slope(nums[last], best[name][last]).slope),
        *limits,
      )
      for name, limits in ranges.items()
    ),
    harness.Check(
      "error of Euler's method towards a point",
      found["exact"]["euler"],
      high=accepted.exact,
    ),
    harness.Check(
      "contraction on a logarithmic grid over the predicted one, less 1",
      found["exact"]["contraction"],
      high=accepted.exact,
    ),
  ]


def _real_checks(config: Config, real: dict[str, Any]) -> list[harness.Check]:
  checks = []
  for name, scores in real.items():
    high = config.accepted.crps if name == config.shown else np.inf
    checks.append(
      harness.Check(
        f"CRPS over that of N-Linear, {name}",
        scores["tuned_crps"] / scores["N-Linear crps"],
        high=high,
      )
    )
    checks += [
      harness.Check(f"weight by validation, {name}", scores["weight"]),
      harness.Check(f"CRPS, {name}", scores["tuned_crps"]),
      harness.Check(f"CRPS without the regularizer, {name}", scores["crps"]),
      harness.Check(f"squared error, {name}", scores["tuned_mse"]),
    ]
    checks += [
      harness.Check(f"{which}, {name}", scores[which])
      for which in (f"{b} {s}" for b in _BASELINES for s in ("crps", "mse"))
    ]
  return checks


# --- figure ---


def _figure_data(config: Config, found: dict[str, Any]) -> dict[str, Any]:
  flat = {
    "num_params": [row[0]["num_params"] for row in found["sizes"]],
    "size_excess": _shares(found),
    "steps": config.steps,
    "step_excess": [p["excess"] / p["floor"] for p in found["steps"]],
  }
  flat |= {f"data_{k}": v for k, v in found["data"].items()}
  flat |= {
    f"solver_{which}_{k}": v
    for which, errors in found["solvers"].items()
    for k, v in errors.items()
  }
  flat |= {
    f"real_{name}_{k}": v
    for name, scores in found["real"].items()
    for k, v in scores.items()
  }
  return flat


def _draw(config: Config, found: dict[str, Any]) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(2, 4, figsize=(18.5, 8.6))
  _draw_sizes(axes[0, 0], found)
  _draw_steps(axes[1, 0], config, found)
  _draw_data(axes[0, 1], config, found["data"], "excess", "Excess loss")
  _draw_data(
    axes[1, 1], config, found["data"], "variance", "Variance over the true one"
  )
  for ax, which in zip(axes[:, 2], ("best", "trained"), strict=True):
    _draw_solvers(ax, config, found["solvers"][which], which)
  _draw_scores(axes[0, 3], found["real"])
  _draw_fan(axes[1, 3], config.shown, found["real"][config.shown])
  return figure


def _draw_sizes(ax: Axes, found: dict[str, Any]) -> None:
  shares = _shares(found)
  sizes = [row[0]["num_params"] for row in found["sizes"]]
  for seed in shares.T:
    ax.loglog(sizes, seed, "o", color=harness.PALETTE[0], alpha=0.5)
  ax.loglog(sizes, shares.mean(1), color=harness.PALETTE[0], label="network")
  dit = found["dit"]
  ax.loglog(
    dit["num_params"],
    dit["excess"] / dit["floor"],
    "s",
    color=harness.PALETTE[1],
    label="transformer",
  )
  ax.set(
    title="Approximation, by size",
    xlabel="parameters",
    ylabel="excess / least loss",
  )
  ax.legend()


def _draw_steps(ax: Axes, config: Config, found: dict[str, Any]) -> None:
  widths = [width for width, _ in config.widths]
  steps = list(config.steps)
  shares = [p["excess"] / p["floor"] for p in found["steps"]]
  if config.width_of_steps in widths:
    row = _shares(found)[widths.index(config.width_of_steps)]
    steps, shares = [*steps, config.num_steps], [*shares, row.mean()]
  ax.loglog(steps, shares, "o-")
  ax.set(
    title=f"Approximation, by steps, width {config.width_of_steps}",
    xlabel="steps of training",
    ylabel="excess / least loss",
  )


def _draw_data(
  ax: Axes, config: Config, data: dict[str, np.ndarray], key: str, title: str
) -> None:
  for j, weight in enumerate(config.weights):
    values = data[key][:, j]
    color = harness.PALETTE[j]
    ax.plot(config.lengths, values, "o", color=color, alpha=0.4)
    ax.plot(
      config.lengths, values.mean(1), color=color, label=f"weight {weight:g}"
    )
  ax.set_xscale("log")
  if key == "excess":
    ax.set_yscale("log")
  else:
    ax.axhline(1, color="0.5", linestyle=":", linewidth=1)
  ax.set_xticks(config.lengths, [str(n) for n in config.lengths])
  ax.minorticks_off()
  ax.set(title=title, xlabel="windows of training", ylabel=key)
  ax.legend()


def _draw_solvers(
  ax: Axes, config: Config, errors: dict[str, Any], which: str
) -> None:
  nums = np.array(config.evaluations)
  last = nums >= config.fit_from
  for i, name in enumerate(_SOLVERS):
    label = name.replace("_", " ")
    if name != "log_euler":
      slope = float(fit_slope(nums[last], errors[name][last]).slope)
      label += f", slope {slope:.1f}"
    color = harness.PALETTE[i]
    ax.loglog(nums, errors[name], "o-", color=color, label=label)
  ax.loglog(
    errors["tsit5_evaluations"],
    errors["tsit5"],
    "s--",
    color=harness.PALETTE[5],
    label="tsit5",
  )
  ax.set(
    title=f"Samples of the {which} velocity",
    xlabel="evaluations of the velocity",
    ylabel="root mean square error",
  )
  ax.legend(fontsize=8.5)


def _draw_scores(ax: Axes, real: dict[str, Any]) -> None:
  rows = {"flow": "tuned_crps"} | {b: f"{b} crps" for b in _BASELINES}
  place = np.arange(len(real))
  for i, (label, key) in enumerate(rows.items()):
    ratios = [s[key] / s["N-Linear crps"] for s in real.values()]
    ax.bar(
      place + (i - 1.5) * 0.2, ratios, 0.19, color=harness.PALETTE[i],
      label=label,
    )  # fmt: skip
  ax.axhline(1, color="0.3", linestyle=":", linewidth=1)
  ax.set_yscale("log")
  ax.set_xticks(place, list(real))
  ax.set(title="Real series", ylabel="CRPS / that of N-Linear")
  ax.legend(fontsize=8.5)


def _draw_fan(ax: Axes, name: str, scores: dict[str, Any]) -> None:
  fan, truth = scores["tuned_fan"], scores["truth"]
  past = scores["past"][-2 * len(truth) :]
  ahead = np.arange(1, len(truth) + 1)
  ax.plot(np.arange(1 - len(past), 1), past, color="0.3", label="past")
  color = harness.PALETTE[0]
  for low, high, alpha in ((0, 4, 0.2), (1, 3, 0.35)):
    ax.fill_between(
      ahead, fan[low], fan[high], color=color, alpha=alpha, linewidth=0
    )
  ax.plot(ahead, fan[2], color=color, label="flow, 50 % and 90 %")
  ax.plot(ahead, truth, color=harness.PALETTE[1], label="what happened")
  ax.set(title=f"A forecast of {name}", xlabel="steps ahead", ylabel="z-score")
  ax.legend(fontsize=8.5)


if __name__ == "__main__":
  harness.main(run, "flow-matching-tsf")
