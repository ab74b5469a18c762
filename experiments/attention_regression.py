"""Regression with one head of attention, both of its weights unknown.

Four questions about arXiv 2309.07418:

1. How fast do methods converge near a planted head: Newton's for both unknowns,
   with the best values for each X, in turn, with a sampled Hessian; and Adam
   and L-BFGS? Claimed: steps grow like log(1 / epsilon).
2. How does the time of a step grow with the number of tokens n and with d?
3. How many random starts find the planted head? The guarantee is a local one.
4. Real data: which next row of pixels follows the rows of a digit so far?
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import _regression, harness
from jaxattn import newton
from jaxattn.data import load_digits
from jaxattn.regression import attention
from jaxattn.scaling import fit_slope

_FIRST_ORDER = ("Adam", "L-BFGS")
_NAMES = {
  "joint": "Newton, X and Y",
  "varpro": "Newton, best Y",
  "greedy": "in turn",
  "sketched": "Newton, sampled",
}
_GREY = "#6b7480"
_SOLVER = newton.NewtonConfig(mu0=0.1)
# A head counts as found if its loss is that close to the planted one's.
_FOUND = 1.01
_ROW = 8
# Distances to a minimum below this are rounding.
_ROUNDING = 1e-12

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Data = attention.AttentionRegressionData


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  curves = {
    method: _point(wd, f"curve/{method}", curve_point, method)
    for method in harness.progress((*config.methods, *_FIRST_ORDER), "curves")
  }
  seconds = _point(wd, "seconds", seconds_point)
  rates = _stack(wd, "rate/head", range(config.rate_seeds), rate_point)
  lengths = _stack(wd, "cost/n", config.cost_lengths, length_cost_point)
  dims = _stack(wd, "cost/d", config.cost_dims, dim_cost_point)
  starts = _stack(wd, "starts/ratio", config.ratios, starts_point)
  digits = _point(wd, "digits", digits_point)
  digits_seconds = _point(wd, "digits_seconds", digits_seconds_point)
  panels = {
    "seconds": seconds,
    "rate": rates,
    "length": lengths,
    "dim": dims,
    "starts": starts,
    "digits": digits,
    "digits_seconds": digits_seconds,
  }
  figure = _draw(config, curves, panels)
  harness.save_figure(wd, figure, _figure_data(config, curves, panels))
  return harness.finish(
    wd,
    claim=(
      "The loss of a whole attention layer, in X = Q K^T and Y = V together, "
      "is driven to a local minimum in log(1/epsilon) iterations of an "
      "approximate Newton method, each in matrix multiplication time."
    ),
    source="arXiv:2309.07418, abstract",
    paper="(T_mat(n,n,d) + T_mat(n,d,d) + d^(2 omega)) log(1/epsilon) time, "
    "up to logarithms (no numbers)",
    checks=[
      *_rate_checks(config, rates),
      *_curve_checks(curves),
      *_start_checks(config, starts),
      *_digit_checks(digits),
    ],
    timed=[
      *_cost_checks(config, lengths, dims),
      *_digit_timed(config, digits, digits_seconds),
    ],
  )


def _point(
  wd: harness.Workdir, name: str, compute: Callable[..., Any], *args: Any
) -> dict[str, Any]:
  return wd.point(name, functools.partial(_in_dtype, compute, wd.config, *args))


def _in_dtype(compute: Callable[..., Any], config: Config, *args: Any) -> Any:
  with jax.enable_x64(config.dtype == "float64"):
    return compute(config, *args)


def _stack(
  wd: harness.Workdir, name: str, values: Any, compute: Callable[..., Any]
) -> dict[str, np.ndarray]:
  """Points of all values, stacked along a first axis."""
  points = [
    _point(wd, f"{name}={value}", compute, value)
    for value in harness.progress(tuple(values), name)
  ]
  return {key: np.stack([p[key] for p in points]) for key in points[0]}


# --- planted heads ---


def planted(
  config: Config, seed: int, n: int, d: int
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
  """Arguments of a fit, the planted X, and a start near it."""
  rng = np.random.default_rng((config.seed, seed))
  a1, a2, a3 = rng.normal(size=(3, n, d))
  x, y = rng.normal(size=(d, d)) / 2, rng.normal(size=(d, d))
  with jax.enable_x64(True):
    b = np.asarray(jax.jit(attention.predict)(x, y, a1, a2, a3))
  b = b + config.noise * rng.normal(size=(n, d))
  start = x + config.distance * rng.normal(size=(d, d))
  arrays = dict(zip(("a1", "a2", "a3", "b"), (a1, a2, a3, b), strict=True))
  arrays = {k: v.astype(config.dtype) for k, v in arrays.items()}
  arrays |= {"ridge_x": config.ridge, "ridge_y": config.ridge}
  return arrays, x.astype(config.dtype), start.astype(config.dtype)


def _fit(
  config: Config, arrays: dict[str, Any], method: str, x0: Any, seed: int = 0
) -> attention.AttentionFit:
  """A fit by one of Newton's methods."""
  solver = config.linear_solver if method != "sketched" else "cholesky"
  tol = 1e-13 if config.dtype == "float64" else 1e-6
  return attention.fit_attention(
    jax.random.key(seed),
    **arrays,
    method=method,
    x0=x0,
    config=newton.NewtonConfig(
      max_steps=config.max_steps, mu0=0.1, rtol=tol, linear_solver=solver
    ),
  )


def _logged(result: newton.NewtonResult, name: str) -> np.ndarray:
  """Losses or norms of gradients, at the start and after each step."""
  steps = int(result.num_steps)
  rest = np.asarray(getattr(result.log, name)[:steps])
  return np.append(rest, np.asarray(getattr(result, name)))


def curve_point(config: Config, method: str) -> dict[str, np.ndarray]:
  """Norm of the gradient, and loss, at the start and after each step."""
  arrays, _, start = planted(config, 0, config.length, config.dim)
  if method in _FIRST_ORDER:
    data = attention.prepare(**arrays)
    x0 = _with_values(start, data)
    norms, losses = _first_order(config, method)(x0, data)
    return {"grad_norm": np.asarray(norms), "loss": np.asarray(losses)}
  result = _fit(config, arrays, method, start).result
  return {name: _logged(result, name) for name in ("grad_norm", "loss")}


@jax.jit
def _with_values(x: jax.Array, data: Data) -> jax.Array:
  """X and the best Y for it, flat: where the fits start too."""
  y = attention.optimal_values(x, data)
  return jnp.concatenate([x.reshape(-1), y.reshape(-1)])


def _first_order(config: Config, method: str) -> Callable[..., Any]:
  return _descent(method, config.step_size, config.first_order_steps)


@functools.cache
def _descent(
  method: str, step_size: float, num_steps: int
) -> Callable[..., Any]:
  """(x0, data) -> norms of gradients and losses by step."""
  adam = method == "Adam"
  optimizer: Any = optax.adam(step_size) if adam else optax.lbfgs()

  @jax.jit
  def run(x0: jax.Array, data: Data) -> Any:
    value_fn = functools.partial(_loss, data=data)

    def step(carry: Any, _: Any) -> Any:
      x, state = carry
      value, grad = attention.value_and_grad(x, data)
      update, state = optimizer.update(
        grad, state, x, value=value, grad=grad, value_fn=value_fn
      )
      return (x + update, state), (jnp.linalg.norm(grad), value)

    start = x0, optimizer.init(x0)
    return jax.lax.scan(step, start, length=num_steps)[1]

  return run


def _loss(x: jax.Array, data: Data) -> jax.Array:
  return attention.loss(x, data)


def seconds_point(config: Config) -> dict[str, float]:
  """Seconds of a whole run of each method."""
  arrays, _, start = planted(config, 0, config.length, config.dim)
  data = attention.prepare(**arrays)
  x0 = _with_values(start, data)
  calls: dict[str, Callable[[], Any]] = {
    method: functools.partial(_fit, config, arrays, method, start)
    for method in config.methods
  }
  calls |= {
    method: functools.partial(_first_order(config, method), x0, data)
    for method in _FIRST_ORDER
  }
  return harness.least_seconds(calls, rounds=1)


def rate_point(config: Config, seed: int) -> dict[str, Any]:
  """Steps of the sampled method by decade, and the order of the joint one."""
  size = config.rate_length, config.rate_dim
  arrays, _, start = planted(config, seed, *size)
  joint = _fit(config, arrays, "joint", start).result
  sampled = _fit(config, arrays, "sketched", start, seed).result
  norms = _logged(sampled, "grad_norm")
  return {
    "steps": steps_to(norms, config.decades)[config.first_decade - 1 :],
    "order": order(_pure_errors(config, arrays, joint.x, seed)),
    "joint_steps": int(joint.num_steps),
  }


def _pure_errors(
  config: Config, arrays: dict[str, Any], best: jax.Array, seed: int
) -> np.ndarray:
  """Distances to a minimum, from a point near it, without damping."""
  direction = jax.random.normal(jax.random.key(seed), best.shape, best.dtype)
  x = best + config.near * direction / jnp.linalg.norm(direction)
  path = _regression.pure_path(
    attention.problem(), x, attention.prepare(**arrays), num_steps=6
  )
  points = np.asarray(path)
  # The last is the better minimum: damped steps end where losses are equal.
  return np.linalg.norm(points - points[-1], axis=1)


def steps_to(norms: np.ndarray, decades: int) -> np.ndarray:
  """(decades,) steps, with fractions, until the gradient fell by 10, 100, ...

  NaN where it never did.
  """
  logs = np.log10(norms / norms[0])
  found = np.full(decades, np.nan)
  for i in range(decades):
    below = np.flatnonzero(logs <= -(i + 1))
    if below.size:
      k = int(below[0])
      gap = logs[k - 1] - logs[k]
      found[i] = k - 1 + (logs[k - 1] + i + 1) / gap
  return found


def order(errors: np.ndarray) -> float:
  """Of convergence, from the last three that rounding leaves alone."""
  triples = zip(errors, errors[1:], errors[2:])
  usable = [e for e in triples if e[0] > e[1] > e[2] > _ROUNDING]
  if not usable:
    return math.nan
  e1, e2, e3 = usable[-1]
  return math.log(e3 / e2) / math.log(e2 / e1)


# --- costs ---


def length_cost_point(config: Config, n: int) -> dict[str, float]:
  """Seconds of a step for n tokens."""
  return _cost(config, n, config.cost_dim)


def dim_cost_point(config: Config, d: int) -> dict[str, float]:
  """Seconds of a step for d dimensions."""
  return _cost(config, config.cost_length, d)


@jax.jit
def _init(x0: jax.Array, data: Data) -> newton.NewtonState:
  return newton.init(attention.problem(), x0, data, config=_SOLVER)


def _cost(config: Config, n: int, d: int) -> dict[str, float]:
  """Of a step with the Hessian as a matrix, and of a product with it."""
  arrays, _, start = planted(config, 0, n, d)
  data = attention.prepare(**arrays)
  x0 = _with_values(start, data)
  state = _init(x0, data)
  step = functools.partial(
    newton.step, attention.problem(), state, data, config=_SOLVER
  )
  product = functools.partial(jax.jit(attention.hvp), x0, x0, data)
  return harness.least_seconds(
    {"step": step, "product": product}, rounds=config.rounds, at_least=0.3
  )


# --- starts ---


def starts_point(config: Config, ratio: int) -> dict[str, Any]:
  """(heads,) shares of random starts at the planted head, and stationary."""
  d = config.start_dim
  found, stationary = [], []
  for seed in range(config.heads):
    arrays, x, _ = planted(config, seed, ratio * d, d)
    solver = newton.NewtonConfig(max_steps=config.start_steps, mu0=0.1)
    fit = functools.partial(attention.fit_attention, **arrays, config=solver)
    best = float(fit(jax.random.key(0), x0=x).result.loss)
    runs = fit(jax.random.key(seed), num_starts=config.num_starts)
    size = np.linalg.norm(arrays["b"])
    found.append(float((runs.all_losses <= _FOUND * best).mean()))
    small = runs.all_grad_norms <= config.stationary * size
    stationary.append(float(small.mean()))
  return {"found": np.array(found), "stationary": np.array(stationary)}


# --- digits ---


def digits_data(config: Config) -> tuple[dict[str, Any], ...]:
  """Arguments of fits for two sets of images, and the last one's current rows.

  Tokens are rows of pixels beside their place in the image; each sees those of
  its image up to itself, and predicts the next.
  """
  pixels, _ = load_digits()
  picked = np.random.default_rng(config.seed).permutation(len(pixels))
  images = pixels[picked[: 2 * config.images]].reshape(-1, _ROW, _ROW) / 16
  return tuple(_tokens(config, part) for part in np.split(images, 2))


def _tokens(config: Config, images: np.ndarray) -> dict[str, Any]:
  num, steps = len(images), _ROW - 1
  place = np.broadcast_to(np.eye(steps)[None], (num, steps, steps))
  a = np.concatenate([images[:, :-1], place], 2).reshape(num * steps, -1)
  a = a.astype(config.dtype)
  same = np.kron(np.eye(num), np.ones((steps, steps)))
  return {
    "a1": a,
    "a2": a,
    "a3": a,
    "b": images[:, 1:].reshape(-1, _ROW).astype(config.dtype),
    "is_causal": True,
    "mask": same > 0,
    "ridge_x": config.digits_ridge,
    "ridge_y": config.digits_ridge,
  }


def _digits_start(config: Config) -> jax.Array:
  """X of the start, of both methods."""
  shape = 2 * (2 * _ROW - 1,)
  x = np.random.default_rng(config.seed).normal(size=shape) / 2
  return jnp.asarray(x, config.dtype)


def _digits_fit(config: Config, arrays: dict[str, Any]) -> Any:
  tol = 1e-8 if config.dtype == "float64" else 1e-4
  solver = newton.NewtonConfig(max_steps=config.digits_steps, mu0=0.1, rtol=tol)
  return attention.fit_attention(
    jax.random.key(config.seed),
    **arrays,
    x0=_digits_start(config),
    config=solver,
  )


@functools.cache
def _adam(step_size: float, num_steps: int) -> Callable[..., Any]:
  """(x0, data, test) -> the end, and errors on test data after each step.

  Without test data nothing but the steps: that is what is timed.
  """
  optimizer = optax.adam(step_size)

  @jax.jit
  def run(x0: jax.Array, data: Data, test: Data | None = None) -> Any:
    def step(carry: Any, _: Any) -> Any:
      x, state = carry
      grad = attention.value_and_grad(x, data)[1]
      update, state = optimizer.update(grad, state)
      x = x + update
      return (x, state), None if test is None else _error(x, test)

    start = x0, optimizer.init(x0)
    (x, _), errors = jax.lax.scan(step, start, length=num_steps)
    return x, errors

  return run


@jax.jit
def _error(x: jax.Array, data: Data) -> jax.Array:
  """Root of the mean squared error of a pixel."""
  plain = data._replace(
    ridge_x=jnp.zeros_like(data.ridge_x), ridge_y=jnp.zeros_like(data.ridge_y)
  )
  return jnp.sqrt(2 * attention.loss(x, plain) / data.b.size)


def _digits_adam(config: Config) -> Callable[..., Any]:
  return _adam(config.step_size, config.digits_first_order_steps)


def digits_point(config: Config) -> dict[str, Any]:
  """Errors on images that were not fitted."""
  train, test = digits_data(config)
  fit = _digits_fit(config, train)
  data, held_out = attention.prepare(**train), attention.prepare(**test)
  x = jnp.concatenate([fit.x.ravel(), fit.y.ravel()])
  now = test["a1"][:, :_ROW]
  mean = train["b"].reshape(-1, _ROW - 1, _ROW).mean(0)
  guess = np.tile(mean, (config.images, 1))
  start = _with_values(_digits_start(config), data)
  _, adam = _digits_adam(config)(start, data, held_out)
  return {
    "newton": float(_error(x, held_out)),
    "newton_train": float(_error(x, data)),
    "steps": int(fit.result.num_steps),
    "adam": np.asarray(adam),
    "current row": float(np.sqrt(((now - test["b"]) ** 2).mean())),
    "mean row": float(np.sqrt(((guess - test["b"]) ** 2).mean())),
  }


def digits_seconds_point(config: Config) -> dict[str, float]:
  """Seconds of both fits."""
  train, _ = digits_data(config)
  data = attention.prepare(**train)
  start = _with_values(_digits_start(config), data)
  calls = {
    "newton": functools.partial(_digits_fit, config, train),
    "adam": functools.partial(_digits_adam(config), start, data),
  }
  return harness.least_seconds(calls, rounds=config.rounds)


def equal_seconds(
  config: Config, digits: dict[str, Any], seconds: dict[str, Any]
) -> int:
  """Steps of Adam in the time of Newton's method; as many as there are."""
  share = float(seconds["newton"]) / float(seconds["adam"])
  steps = round(share * config.digits_first_order_steps)
  return min(max(steps, 1), len(digits["adam"]))


# --- checks ---


def _decades(config: Config) -> np.ndarray:
  return np.arange(config.first_decade, config.decades + 1)


def _rate_checks(
  config: Config, rates: dict[str, np.ndarray]
) -> list[harness.Check]:
  steps = rates["steps"].mean(0)
  decades = _decades(config)
  r_squared = float(np.corrcoef(decades, steps)[0, 1] ** 2)
  orders = rates["order"]
  return [
    harness.Check(
      "sampled: R^2 of steps against log(1/epsilon)",
      r_squared,
      config.accepted.linearity,
      1.0,
    ),
    harness.Check(
      "sampled: steps for each factor of 10",
      float(np.polyfit(decades, steps, 1)[0]),
    ),
    harness.Check(
      "joint: median order of convergence",
      float(np.median(orders)),
      *config.accepted.order,
    ),
    harness.Check("joint: most steps", float(rates["joint_steps"].max())),
  ]


def _curve_checks(curves: dict[str, Any]) -> list[harness.Check]:
  return [
    harness.Check(
      f"{_NAMES.get(method, method)}: loss at the end", float(curve["loss"][-1])
    )
    for method, curve in curves.items()
  ]


def _start_checks(
  config: Config, starts: dict[str, np.ndarray]
) -> list[harness.Check]:
  shares = starts["found"].mean(1)
  return [
    harness.Check(
      "random starts that end at a stationary point, most rows",
      float(starts["stationary"][-1].mean()),
      config.accepted.stationary,
      1.0,
    ),
    *(
      harness.Check(f"random starts at the planted head, n = {r} d", share)
      for r, share in zip(config.ratios, shares)
    ),
  ]


def _digit_checks(digits: dict[str, Any]) -> list[harness.Check]:
  return [
    harness.Check("digits: error of the fitted head", float(digits["newton"])),
    harness.Check("digits: least error of Adam", float(digits["adam"].min())),
    harness.Check("digits: the row before", float(digits["current row"])),
    harness.Check("digits: the mean row", float(digits["mean row"])),
  ]


def _length_slope(
  config: Config, lengths: dict[str, np.ndarray], least: int = 0
) -> float:
  n = np.array(config.cost_lengths)
  kept = n >= least
  return fit_slope(n[kept], lengths["step"][kept]).slope


def _cost_checks(
  config: Config, lengths: dict[str, np.ndarray], dims: dict[str, np.ndarray]
) -> list[harness.Check]:
  d = np.log(config.cost_dims)
  last = {
    key: float(np.log(x[-1] / x[-2]) / (d[-1] - d[-2]))
    for key, x in dims.items()
  }
  return [
    harness.Check(
      "slope of the time of a step in n",
      _length_slope(config, lengths),
      *config.accepted.length_slope,
    ),
    harness.Check(
      f"slope of the time of a step in n, from {config.slope_from} on",
      _length_slope(config, lengths, config.slope_from),
    ),
    harness.Check("last slope of the time of a step in d", last["step"]),
    harness.Check("last slope of a product in d", last["product"]),
  ]


def _digit_timed(
  config: Config, digits: dict[str, Any], seconds: dict[str, Any]
) -> list[harness.Check]:
  steps = equal_seconds(config, digits, seconds)
  return [
    harness.Check(
      "digits: error of Adam in the same time",
      float(digits["adam"][steps - 1]),
    ),
    harness.Check("digits: steps of Adam in the same time", float(steps)),
  ]


# --- figure ---


def _figure_data(
  config: Config, curves: dict[str, Any], panels: dict[str, Any]
) -> dict[str, Any]:
  data = {
    f"{method}, {key}": x
    for method, curve in curves.items()
    for key, x in curve.items()
  }
  for name, panel in panels.items():
    data |= {f"{name}, {key}": x for key, x in panel.items()}
  keys = ("cost_lengths", "cost_dims", "ratios")
  return data | {key: config[key] for key in keys}


def _draw(
  config: Config, curves: dict[str, Any], panels: dict[str, Any]
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(3, 2, figsize=(12.5, 14))
  _draw_curves(axes[0, 0], curves, None)
  _draw_curves(axes[0, 1], curves, panels["seconds"])
  _draw_rates(axes[1, 0], config, panels["rate"])
  _draw_costs(axes[1, 1], config, panels["length"], panels["dim"])
  _draw_starts(axes[2, 0], config, panels["starts"])
  _draw_digits(axes[2, 1], panels["digits"], panels["digits_seconds"])
  return figure


def _draw_curves(
  ax: Axes, curves: dict[str, Any], seconds: dict[str, Any] | None
) -> None:
  for (method, curve), color in zip(curves.items(), harness.PALETTE):
    norms = curve["grad_norm"]
    # From the first step on: 0 has no place on a logarithmic axis.
    steps = np.arange(1, len(norms))
    scale = 1 if seconds is None else float(seconds[method]) / len(steps)
    ax.loglog(
      scale * steps,
      norms[1:],
      "--" if method in _FIRST_ORDER else "-",
      color=color,
      # Not all end in one minimum: the guarantee is a local one.
      label=f"{_NAMES.get(method, method)}: to loss {curve['loss'][-1]:.4g}",
    )
  by_time = seconds is not None
  ax.set(
    title="The same by time" if by_time else "Convergence near a planted head",
    xlabel="seconds" if by_time else "step",
    ylabel="norm of the gradient",
  )
  if not by_time:
    ax.legend(loc="lower left")


def _draw_rates(ax: Axes, config: Config, rates: dict[str, Any]) -> None:
  decades = _decades(config)
  for steps in rates["steps"]:
    ax.plot(decades, steps, "-", color=harness.PALETTE[3], alpha=0.35)
  mean = rates["steps"].mean(0)
  slope, offset = np.polyfit(decades, mean, 1)
  ax.plot(decades, mean, "o", color=harness.PALETTE[3], label="mean of heads")
  ax.plot(
    decades,
    offset + slope * decades,
    "--",
    color=_GREY,
    label=f"{slope:.2f} steps for each factor of 10",
  )
  ax.set(
    title="Sampled Newton: steps grow like log(1/ε)",
    xlabel="$\\log_{10}(1/\\varepsilon)$",
    ylabel="steps",
    ylim=(0, None),
  )
  ax.legend(loc="upper left")


def _draw_costs(
  ax: Axes, config: Config, lengths: dict[str, Any], dims: dict[str, Any]
) -> None:
  slope = _length_slope(config, lengths)
  base_n, base_d = config.cost_lengths[0], config.cost_dims[0]
  for values, base, panel, color, name in (
    (config.cost_lengths, base_n, lengths, harness.PALETTE[0], "n"),
    (config.cost_dims, base_d, dims, harness.PALETTE[1], "d"),
  ):
    times = np.array(values) / base
    for key, style in (("step", "o-"), ("product", "s--")):
      what = "step" if key == "step" else "product with H"
      power = f": $n^{{{slope:.2f}}}$" if key == "step" and name == "n" else ""
      ax.loglog(
        times,
        1000 * panel[key],
        style,
        color=color,
        label=f"{what}, by {name}{power}",
      )
  ticks = sorted({round(2**i) for i in range(5)})
  ax.set_xticks(ticks, [str(t) for t in ticks])
  ax.set_xticks([], minor=True)
  ax.set(
    title="Time of a Newton step",
    xlabel=f"n / {base_n} (d = {config.cost_dim}), or d / {base_d} "
    f"(n = {config.cost_length})",
    ylabel="milliseconds",
  )
  ax.legend(loc="upper left")


def _draw_starts(ax: Axes, config: Config, starts: dict[str, Any]) -> None:
  places = np.arange(len(config.ratios))
  share = 100 * starts["found"].mean(1)
  ax.bar(places, share, color=harness.PALETTE[0], width=0.6)
  for x, y in zip(places, share):
    ax.annotate(
      f"{y:.0f} %",
      (x, y),
      xytext=(0, 4),
      ha="center",
      textcoords="offset points",
    )
  ax.set_xticks(places, [str(r) for r in config.ratios])
  ax.set(
    title="Random starts that find the planted head",
    xlabel="n / d, rows for each dimension",
    ylabel="percent of starts",
    ylim=(0, max(10.0, 1.25 * float(share.max()))),
  )


def _draw_digits(
  ax: Axes, digits: dict[str, Any], seconds: dict[str, Any]
) -> None:
  adam = digits["adam"]
  steps = np.arange(1, len(adam) + 1)
  times = float(seconds["adam"]) / len(adam) * steps
  ax.semilogx(times, adam, color=harness.PALETTE[4], label="Adam")
  ax.plot(
    [float(seconds["newton"])],
    [float(digits["newton"])],
    "o",
    markersize=9,
    color=harness.PALETTE[0],
    label="Newton",
  )
  for name, style in (("current row", ":"), ("mean row", "--")):
    ax.axhline(float(digits[name]), color=_GREY, linestyle=style, label=name)
  ax.set(
    title="Next row of pixels, images not fitted",
    xlabel="seconds",
    ylabel="root mean squared error",
  )
  ax.legend()


if __name__ == "__main__":
  harness.main(run, "attention-regression")
