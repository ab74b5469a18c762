"""Forecasts where the sign changes: attention to scalars and linear rivals.

On the residual state-space task of arXiv 2412.06061, all samples or only those
whose next value has another sign than the last:

1. Risks of attention in its variants, of linear networks and of the forecast 0,
   beside the risk of the task's own coefficients and the floor of what ignores
   the order of lags.
2. Gradient descent on few samples, as the theory has it, in float64: does the
   training risk vanish, and do heads align with their signs?
3. Risks by correlation of neighbours, number of lags, and noise.
4. Real series: N-Linear and small transformers, all windows and those in which
   the next difference changes its sign.
"""

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import harness
from jaxattn import data as tasks
from jaxattn import models

# What is trained, and how: options of its kind.
_MODELS: dict[str, dict[str, Any]] = {
  "plain, signs fixed": {"kind": "plain", "train_output": False},
  "plain": {"kind": "plain"},
  "plain, weight decay": {"kind": "plain", "decayed": True},
  "residual": {"kind": "residual"},
  "differential": {"kind": "differential"},
  "rope": {"kind": "rope"},
  "patch": {"kind": "patch"},
  "position bias": {"kind": "position_bias"},
}
_REMEDY, _LINEAR, _ZERO = "position bias", "linear residual", "zero"
# Those that cannot see the order of the past, and decide.
_BLIND = ("plain, signs fixed", "plain")
_SWEPT = ("plain", _REMEDY, _LINEAR)
_FORECASTERS: dict[str, dict[str, Any]] = {
  "attention": {"kind": "plain", "residual": False},
  "attention, residual": {"kind": "plain"},
  "differential, residual": {"kind": "differential"},
  "rope, residual": {"kind": "rope"},
  "position bias, residual": {"kind": "position_bias"},
}
_SERIES = {
  ("co2", 0): "CO2",
  ("sunspots_monthly", 0): "sunspots",
  ("tmy3", 0): "temperature",
  ("tmy3", 5): "sunshine",
  ("taylor", 0): "demand",
  ("elec_equip", 0): "orders",
}

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Point = dict[str, Any]
Data = tuple[jax.Array, jax.Array]
Draw = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  risks = _risks(wd)
  descent = _descent(wd)
  sweeps = {what: _sweep(wd, what) for what in ("gamma", "dim", "noise")}
  series = _real(wd)
  figure = _draw(config, risks, descent, sweeps, series)
  data = _figure_data(config, risks, descent, sweeps, series)
  harness.save_figure(wd, figure, data)
  return harness.finish(
    wd,
    claim=(
      "Gradient descent on attention of two layers begins to move each hidden "
      "weight along the sign of its output weight; trained, it misses the "
      "residual feature and has a large risk where the next step has another "
      "sign than the last, while that of a linear residual network is of the "
      "order of the noise."
    ),
    source="arXiv:2412.06061, theorem 5.2 and propositions 6.3, J.1",
    paper=(
      "risk of attention bounded below, O(sigma^2) of the linear network; also "
      "training losses below any epsilon, and aligned heads (no numbers)"
    ),
    checks=[
      *_risk_checks(config, risks),
      *_descent_checks(config, descent),
      *_sweep_checks(config, sweeps),
      *_series_checks(series),
    ],
  )


def _risks(wd: harness.Workdir) -> dict[str, list[Point]]:
  """A point for each draw, by model."""
  config: Config = wd.config
  names = (*config.models, _LINEAR, _ZERO)
  return {
    name: [
      wd.point(
        f"risks/{_slug(name)}/draw={draw}",
        functools.partial(risk_point, config, name, draw),
      )
      for draw in range(config.draws)
    ]
    for name in harness.progress(names, "models")
  }


def _descent(wd: harness.Workdir) -> dict[tuple[str, int], list[Point]]:
  """A point for each draw, by kind of task and number of heads."""
  config: Config = wd.config
  pairs = [
    (kind, width)
    for kind in config.descent_kinds
    for width in config.descent_widths
  ]
  return {
    (kind, width): [
      wd.point(
        f"descent/{kind}/m={width},draw={draw}",
        functools.partial(descent_point, config, kind, width, draw),
      )
      for draw in range(config.descent_draws)
    ]
    for kind, width in harness.progress(pairs, "gradient descent")
  }


def _sweep(wd: harness.Workdir, what: str) -> dict[str, list[Point]]:
  """A point for each value of one property of the task, by model."""
  config: Config = wd.config
  values = config[f"{what}s"]
  return {
    name: [
      wd.point(
        f"sweep/{_slug(name)}/{what}={value:g}",
        functools.partial(risk_point, config, name, 0, **{what: value}),
      )
      for value in values
    ]
    for name in harness.progress(_SWEPT, f"risks by {what}")
  }


def _real(wd: harness.Workdir) -> dict[str, dict[str, Point]]:
  """A point for each forecaster, by series."""
  config: Config = wd.config
  names = ("persistence", "N-Linear", *config.forecasters)
  return {
    _SERIES[spec[:2]]: {
      name: wd.point(
        f"series/{spec[0]}/{spec[1]}/{_slug(name)}",
        functools.partial(series_point, config, spec, name),
      )
      for name in names
    }
    for spec in harness.progress(config.series, "series")
  }


def _slug(name: str) -> str:
  """A name of a model as part of the name of a point."""
  return name.replace(",", "").replace(" ", "_")


# --- the task ---


def _task(
  config: Config,
  draw: int,
  *,
  gamma: float | None = None,
  dim: int | None = None,
  noise: float | None = None,
) -> tuple[tasks.ResidualSSM, Data, dict[str, Data]]:
  """A task, samples to train on, and all and sign-inconsistent ones."""
  rngs = jax.random.split(_rng(config, draw), 4)
  ssm = tasks.residual_ssm(
    rngs[0],
    config.dim if dim is None else dim,
    gamma=config.gamma if gamma is None else gamma,
    noise=config.noise if noise is None else noise,
  )
  train = tasks.sample_residual_ssm(rngs[1], ssm, config.num_train)[:2]
  sets = {
    "id": tasks.sample_residual_ssm(rngs[2], ssm, config.num_eval)[:2],
    "ood": tasks.sample_sign_inconsistent(rngs[3], ssm, config.num_eval)[:2],
  }
  return ssm, train, sets


def _rng(config: Config, draw: int) -> jax.Array:
  return jax.random.fold_in(jax.random.key(config.seed), draw)


# --- risks ---


def risk_point(
  config: Config, name: str, draw: int, **properties: Any
) -> Point:
  """Risks of a fitted model with their standard errors, and the floor."""
  ssm, train, sets = _task(config, draw, **properties)
  if name == _LINEAR:
    v = models.residual_linear_fit(*train)
    predict = functools.partial(models.residual_linear_apply, v)
  elif name == _ZERO:
    predict = lambda x: jnp.zeros(len(x))  # noqa: E731
  else:
    rng = jax.random.fold_in(_rng(config, draw), 4)
    params = trained(config, name, rng, train)
    kind = _MODELS[name]["kind"]
    predict = functools.partial(
      models.scalar_attention_apply, params, kind=kind
    )
  point: Point = {
    "floor": float(tasks.permutation_floor(ssm)),
    "oracle": float(tasks.residual_linear_risk(ssm)),
  }
  for key, (x, y) in sets.items():
    squares = np.asarray(predict(x) - y, np.float64) ** 2
    point[key] = squares.mean()
    point[f"{key} error"] = squares.std() / np.sqrt(len(squares))
  return point


def trained(
  config: Config, name: str, rng: jax.Array, data: Data
) -> dict[str, jax.Array]:
  """One of the models of attention, trained."""
  options = {"train_output": True, "decayed": False, **_MODELS[name]}
  kind = options["kind"]
  rng_init, rng_batch = jax.random.split(rng)
  params = models.scalar_attention_init(
    rng_init,
    config.width,
    data[0].shape[1],
    kind=kind,
    patch_size=config.patch_size if kind == "patch" else None,
  )
  decay = config.weight_decay if options["decayed"] else 0.0
  return models.train_scalar_attention(
    params,
    data,
    kind=kind,
    num_steps=config.num_steps,
    log_every=config.num_steps,
    optimizer=_optimizer(config.learning_rate, config.num_steps, decay),
    batch_size=config.batch_size,
    rng=rng_batch,
    train_output=options["train_output"],
  )[0]


# The same object for the same numbers: nothing compiles twice.
@functools.cache
def _optimizer(
  rate: float, num_steps: int, decay: float
) -> optax.GradientTransformation:
  schedule = optax.cosine_decay_schedule(rate, num_steps)
  return optax.adamw(schedule, weight_decay=decay)


# --- gradient descent, as in the theory ---


def descent_point(config: Config, kind: str, width: int, draw: int) -> Point:
  """The history of training, and how many heads begin along their signs."""
  rngs = jax.random.split(_rng(config, draw), 4)
  # The kernel's rank is one of many small eigenvalues.
  with jax.enable_x64(True):
    gamma = config.gamma if kind == "unit" else None
    options = {"gamma": gamma, "noise": config.noise, "kind": kind}
    ssm = tasks.residual_ssm(rngs[0], config.dim, **options)
    x, y, _ = tasks.sample_residual_ssm(rngs[1], ssm, config.descent_train)
    draws = {
      "id": tasks.sample_residual_ssm,
      "ood": tasks.sample_sign_inconsistent,
    }
    sets = {
      key: sample(rngs[2], ssm, config.descent_eval)[:2]
      for key, sample in draws.items()
    }
    params = models.scalar_attention_init(rngs[3], width, config.dim)
    grad = models.scalar_attention_grad(params, x, y)
    _, history = models.train_scalar_attention(
      params,
      (x, y),
      num_steps=config.descent_steps,
      log_every=config.descent_every,
      eval_sets=sets,
      log_kernel=True,
    )
    along = float((params["a"] * grad < 0).mean())
    point = history._asdict()
    point |= {k: np.asarray(v) for k, v in point.pop("eval_risk").items()}
  return {k: np.asarray(v) for k, v in point.items()} | {"along": along}


# --- real series ---


def series_point(config: Config, spec: tuple[Any, ...], name: str) -> Point:
  """Errors of one forecaster on the test part of one series."""
  *_, horizon, patch_size = spec
  train, val, test = series_windows(spec)
  if name == "persistence":
    forecast = models.persistence(test[0], horizon)
  elif name == "N-Linear":
    w = models.nlinear_fit(*train, ridge=config.ridge)
    forecast = models.nlinear_predict(w, test[0])
  else:
    model = models.AttentionForecaster(
      horizon,
      patch_size=patch_size,
      num_layers=config.forecaster_layers,
      **_FORECASTERS[name],
    )
    params = fit_forecaster(config, model, train, val)
    # Step by step, as at the start: of one call compilation is the cost.
    forecast = model.apply(params, test[0])
  return forecast_errors(np.asarray(forecast), *map(np.asarray, test))


def series_windows(spec: tuple[Any, ...]) -> tuple[Data, Data, Data]:
  """Windows of one column to train, to validate and to test on."""
  name, column, history, horizon, _ = spec
  values = tasks.load_series(name).values[:, [column]]
  train, val, test = tasks.split_series(values)
  z = tasks.standardize(values, train)[0]

  def cut(first: int, stop: int) -> Data:
    x, y = tasks.windows(z[first:stop], history, horizon)
    return jnp.asarray(x[..., 0]), jnp.asarray(y[..., 0])

  # The past that the first window needs may be of the part before.
  return (
    cut(0, train.stop),
    cut(val.start - history, val.stop),
    cut(test.start - history, test.stop),
  )


def forecast_errors(
  forecast: np.ndarray, x: np.ndarray, y: np.ndarray
) -> Point:
  """Mean squares of all steps, of the next, and of it where a sign changes.

  Args:
    forecast: (n, H).
    x: (n, L), what was.
    y: (n, H), what followed. The sign changes where its first difference is of
      another one than the last of x.
  """
  squares = (forecast - y).astype(np.float64) ** 2
  changed = (x[:, -1] - x[:, -2]) * (y[:, 0] - x[:, -1]) < 0
  return {
    "all": squares.mean(),
    "next": squares[:, 0].mean(),
    "changed": squares[changed, 0].mean(),
    "share": changed.mean(),
  }


def fit_forecaster(config: Config, model: Any, train: Data, val: Data) -> Any:
  """Parameters that were best on the validation part."""
  num_steps, rate = config.forecaster_steps, config.forecaster_rate
  rng = jax.random.key(config.seed)
  return _fit(
    rng,
    model.init(rng, train[0][:1]),
    train,
    val,
    model=model,
    optimizer=_optimizer(rate, num_steps, config.forecaster_decay),
    num_steps=num_steps,
    checks=config.forecaster_checks,
    batch_size=config.forecaster_batch,
  )


# Series of one length share what is compiled.
@functools.partial(
  jax.jit,
  static_argnames=("model", "optimizer", "num_steps", "checks", "batch_size"),
)
def _fit(
  rng: jax.Array,
  params: Any,
  train: Data,
  val: Data,
  *,
  model: Any,
  optimizer: optax.GradientTransformation,
  num_steps: int,
  checks: int,
  batch_size: int,
) -> Any:
  def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.square(model.apply(params, x) - y).mean()

  def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
    params, state = carry
    x, y = train
    shape, key = (batch_size,), jax.random.fold_in(rng, i)
    rows = jax.random.randint(key, shape, 0, len(x))
    grads = jax.grad(loss)(params, x[rows], y[rows])
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  def check(carry: Any, steps: jax.Array) -> tuple[Any, None]:
    carry, best, least = carry
    carry, _ = lax.scan(step, carry, steps)
    error = loss(carry[0], *val)
    keep = functools.partial(jnp.where, error < least)
    return (carry, jax.tree.map(keep, carry[0], best), keep(error, least)), None

  start = (params, optimizer.init(params)), params, jnp.asarray(jnp.inf)
  steps = jnp.arange(num_steps).reshape(checks, -1)
  return lax.scan(check, start, steps)[0][1]


# --- checks ---


def _mean(points: Iterable[Point], key: str) -> float:
  return float(np.mean([point[key] for point in points]))


def _risk_checks(
  config: Config, risks: dict[str, list[Point]]
) -> list[harness.Check]:
  accepted, checks = config.accepted, []
  linear, remedy = risks[_LINEAR], risks[_REMEDY]
  for name in _BLIND:
    pairs = list(zip(risks[name], linear, strict=True))
    ratio = min(p["ood"] / q["ood"] for p, q in pairs)
    above = min((p["id"] - p["floor"]) / p["id error"] for p, _ in pairs)
    checks += [
      harness.Check(
        f"inconsistent risk, {name} / {_LINEAR}, least of draws",
        ratio,
        accepted.ratio,
      ),
      harness.Check(
        f"risk of {name} less the floor, in standard errors, least of draws",
        above,
        accepted.above_floor,
      ),
    ]
  worst = max(p["ood"] / p["oracle"] for p in remedy)
  checks.append(
    harness.Check(
      f"inconsistent risk, {_REMEDY} / 2 s^2, largest of draws",
      worst,
      high=accepted.remedy,
    )
  )
  checks += [
    harness.Check(f"{which} risk, {name}", _mean(points, key))
    for name, points in risks.items()
    for which, key in (("inconsistent", "ood"), ("whole", "id"))
  ]
  return [
    *checks,
    harness.Check(
      "risk of the task's own coefficients", _mean(linear, "oracle")
    ),
    harness.Check("permutation floor", _mean(linear, "floor")),
  ]


def _descent_checks(
  config: Config, descent: dict[tuple[str, int], list[Point]]
) -> list[harness.Check]:
  units = [points for (kind, _), points in descent.items() if kind == "unit"]
  checks = [
    harness.Check(
      "share of heads whose first step is along their sign",
      min(p["along"] for points in units for p in points),
      config.accepted.first_step,
    ),
    harness.Check(
      f"drift after {config.drift_step} steps, fewest heads / most",
      _drift(config, descent, min) / _drift(config, descent, max),
    ),
    harness.Check(
      "square root of most heads / fewest",
      np.sqrt(max(config.descent_widths) / min(config.descent_widths)),
    ),
  ]
  everything = [p for points in descent.values() for p in points]
  vanishing = [p["risk"][-1] < config.theorem_risk for p in everything]
  aligned = [p["alignment"][-1] >= config.theorem_aligned for p in everything]
  checks += [
    harness.Check(
      f"share of descents to a training risk below {config.theorem_risk:g}",
      float(np.mean(vanishing)),
    ),
    harness.Check(
      f"share of descents to {config.theorem_aligned:g} of heads aligned",
      float(np.mean(aligned)),
    ),
  ]
  labels = {
    "training risk": "risk",
    "inconsistent risk": "ood",
    "alignment": "alignment",
    "largest shift": "max_shift",
    "rank of the kernel": "kernel_rank",
  }
  for (kind, width), points in descent.items():
    for label, key in labels.items():
      value = float(np.mean([p[key][-1] for p in points]))
      name = f"descent, {label} at the end, {kind}, m={width}"
      checks.append(harness.Check(name, value))
  return checks


def _drift(
  config: Config,
  descent: dict[tuple[str, int], list[Point]],
  choose: Callable[[Iterable[int]], int],
) -> float:
  """Mean over draws of what heads drift along their signs."""
  at = config.drift_step // config.descent_every
  points = descent["unit", choose(config.descent_widths)]
  return float(np.mean([p["drift"][at] for p in points]))


def _sweep_checks(
  config: Config, sweeps: dict[str, dict[str, list[Point]]]
) -> list[harness.Check]:
  return [
    harness.Check(f"inconsistent risk, {name}, {what}={value:g}", point["ood"])
    for what, by_name in sweeps.items()
    for name, points in by_name.items()
    for value, point in zip(config[f"{what}s"], points, strict=True)
  ]


def _series_checks(
  series: dict[str, dict[str, Point]],
) -> list[harness.Check]:
  checks = []
  for title, by_name in series.items():
    share = by_name["persistence"]["share"]
    name = f"{title}: share of windows whose difference changes its sign"
    checks.append(harness.Check(name, share))
    labels = {
      "all": "all steps",
      "next": "next",
      "changed": "next, sign changes",
    }
    checks += [
      harness.Check(f"{title}: squared error, {label}, {name}", point[key])
      for name, point in by_name.items()
      for key, label in labels.items()
    ]
  return checks


# --- the figure ---


def _figure_data(
  config: Config,
  risks: dict[str, list[Point]],
  descent: dict[tuple[str, int], list[Point]],
  sweeps: dict[str, dict[str, list[Point]]],
  series: dict[str, dict[str, Point]],
) -> Point:
  data: Point = {
    f"risk, {name}, {key}": [p[key] for p in points]
    for name, points in risks.items()
    for key in ("id", "ood", "floor", "oracle")
  }
  for (kind, width), points in descent.items():
    for key in ("step", "risk", "id", "ood", "alignment", "drift"):
      name = f"descent, {kind}, m={width}, {key}"
      data[name] = np.stack([p[key] for p in points])
  for what, by_name in sweeps.items():
    data[what] = config[f"{what}s"]
    for name, points in by_name.items():
      for key in ("id", "ood", "floor", "oracle"):
        data[f"by {what}, {name}, {key}"] = [p[key] for p in points]
  for title, by_name in series.items():
    for name, point in by_name.items():
      data |= {f"{title}, {name}, {key}": x for key, x in point.items()}
  return data


def _draw(
  config: Config,
  risks: dict[str, list[Point]],
  descent: dict[tuple[str, int], list[Point]],
  sweeps: dict[str, dict[str, list[Point]]],
  series: dict[str, dict[str, Point]],
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(4, 2, figsize=(12.5, 18))
  _draw_risks(axes[0, 0], risks)
  _draw_descent(axes[0, 1], config, descent)
  _draw_alignment(axes[1, 0], config, descent)
  labels = {
    "gamma": "correlation of last and next value",
    "dim": "d, number of lags",
    "noise": "standard deviation of noise",
  }
  spots = (axes[1, 1], axes[2, 0], axes[2, 1])
  for ax, (what, label) in zip(spots, labels.items(), strict=True):
    _draw_sweep(ax, config[f"{what}s"], sweeps[what])
    # Where no curve is.
    loc = "lower right" if what == "noise" else "lower center"
    at = (1.0, 0.0) if what == "noise" else (0.5, 0.08)
    ax.legend(ncols=2, fontsize=8, loc=loc, bbox_to_anchor=at)
    ax.set(title=f"By {label}", xlabel=label, ylabel="risk")
    if what != "gamma":
      ax.set_xscale("log")
      ax.set_xticks(config[f"{what}s"], [f"{x:g}" for x in config[f"{what}s"]])
      ax.set_xticks([], minor=True)
  _draw_series(axes[3, 0], series, "all", "Real series: all steps")
  _draw_series(
    axes[3, 1], series, "changed", "Next step, where its sign changes"
  )
  handles, names = axes[3, 0].get_legend_handles_labels()
  figure.legend(handles, names, loc="outside lower center", ncols=6)
  return figure


def _draw_risks(ax: Axes, risks: dict[str, list[Point]]) -> None:
  y = np.arange(len(risks))[::-1]
  for shift, key, label in (
    (0.2, "ood", "sign changes"),
    (-0.2, "id", "all samples"),
  ):
    means = [_mean(points, key) for points in risks.values()]
    ax.barh(y + shift, means, 0.36, label=label)
    for at, points in zip(y + shift, risks.values(), strict=True):
      ax.plot([p[key] for p in points], [at] * len(points), "k.", ms=4)
  linear = risks[_LINEAR]
  lines = (("oracle", "--", "noise"), ("floor", ":", "floor, all samples"))
  for key, style, label in lines:
    at = _mean(linear, key)
    ax.axvline(at, color="#1b1f24", linestyle=style, lw=1.4, label=label)
  ax.set_xscale("log")
  ax.set_yticks(y, list(risks))
  ax.grid(visible=False, axis="y")
  ax.set(title="Risk of trained models", xlabel="mean squared error")
  ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=4)


def _draw_descent(
  ax: Axes, config: Config, descent: dict[tuple[str, int], list[Point]]
) -> None:
  for width, color in zip(config.descent_widths, harness.PALETTE):
    points = descent["unit", width]
    for key, style, label in (
      ("ood", "-", "sign changes"),
      ("risk", "--", "training"),
    ):
      curve = np.mean([p[key] for p in points], axis=0)
      name = f"{label}, m={width}"
      ax.plot(points[0]["step"], curve, style, color=color, label=name)
  ax.axhline(config.theorem_risk, color="#1b1f24", lw=1.4, linestyle=":")
  ax.set(
    title=f"Gradient descent on {config.descent_train} samples",
    xlabel="step, of 1 / largest eigenvalue",
    ylabel="mean squared error",
    ylim=(0, None),
  )
  ax.legend(ncols=2, loc="center right")


def _draw_alignment(
  ax: Axes, config: Config, descent: dict[tuple[str, int], list[Point]]
) -> None:
  for width, color in zip(config.descent_widths, harness.PALETTE):
    points = descent["unit", width]
    for i, point in enumerate(points):
      label = f"m={width}" if i == 0 else None
      values = point["alignment"]
      ax.plot(point["step"], values, color=color, alpha=0.8, label=label)
  ax.axhline(config.theorem_aligned, color="#1b1f24", lw=1.4, linestyle=":")
  ax.set(
    title="Heads that are aligned with their signs",
    xlabel="step, of 1 / largest eigenvalue",
    ylabel="share, each draw",
    ylim=(0.3, 1),
  )
  ax.legend()


def _draw_sweep(
  ax: Axes, values: tuple[float, ...], by_name: dict[str, list[Point]]
) -> None:
  for (name, points), color in zip(by_name.items(), harness.PALETTE):
    for key, style in (("ood", "o-"), ("id", "s--")):
      risks = [p[key] for p in points]
      label = f"{name}, " + ("sign changes" if key == "ood" else "all")
      ax.semilogy(values, risks, style, color=color, label=label)
  points = by_name[_LINEAR]
  for key, style, label in (
    ("floor", ":", "floor, all"),
    ("oracle", "-.", "task's own coefficients"),
  ):
    risks = [p[key] for p in points]
    ax.semilogy(values, risks, style, color="#1b1f24", label=label)


def _draw_series(
  ax: Axes, series: dict[str, dict[str, Point]], key: str, title: str
) -> None:
  names = [n for n in next(iter(series.values())) if n != "persistence"]
  for i, name in enumerate(names):
    ratios = [
      points[name][key] / points["persistence"][key]
      for points in series.values()
    ]
    at = np.arange(len(series)) + 0.13 * (i - (len(names) - 1) / 2)
    ax.bar(at, ratios, 0.12, color=harness.PALETTE[i], label=name)
  ax.axhline(1, color="#1b1f24", lw=1.2)
  ax.set_yscale("log")
  ax.set_xticks(range(len(series)), list(series), fontsize=9)
  ax.grid(visible=False, axis="x")
  ax.set(title=title, ylabel="squared error / that of persistence")


if __name__ == "__main__":
  harness.main(run, "asymmetric-tsf")
