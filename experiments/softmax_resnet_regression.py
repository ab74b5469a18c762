"""Softmax regression with a skip: Newton's method, exact and with sampled rows.

Six questions about arXiv 2309.13482:

1. How does the error fall, in the norm of the Hessian: exact steps, steps with
   m sampled rows, L-BFGS, Adam? How many sampled steps for an error of eps?
2. How large is the error of a Hessian from m rows, beside the law of random
   matrices?
3. How do seconds of a step grow with n and d?
4. What of the theory holds away from its assumptions: is the Hessian positive
   semidefinite, and how far from the minimum may one start? Reported.
5. Mean handwritten digits as profiles over pixels, from a few cosines.
6. Do fits to many targets at once converge in float32? Reported.
"""

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import _regression, harness
from jaxattn import newton
from jaxattn.data import load_digits
from jaxattn.regression import softmax_resnet
from jaxattn.scaling import fit_slope

_KINDS = ("leverage", "uniform")
_TIMED = ("exact", "sampled")
_SIDE = 8
# Of pixels: below this share of their mean one is as good as 0.
_WALL = 1e-2
# Of alpha: the domain's edge, and how near to it counts as on it.
_ALPHA_MIN, _EDGE = 1e-2, 1.05
_TOO_HEAVY = 1.0

# A ConfigDict: what type a field has is known at run time only.
Config = Any


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  curves = wd.point("curves", functools.partial(curves_point, config))
  sketch = wd.point("sketch", functools.partial(sketch_point, config))
  theory = wd.point("theory", functools.partial(theory_point, config))
  digits = {
    (k, rho): wd.point(
      f"digits/K={k},rho={rho:g}",
      functools.partial(digits_point, config, k, rho),
    )
    for k in config.frequencies
    for rho in config.residual_scales
  }
  targets = wd.point("targets", functools.partial(targets_point, config))
  by_length = _times(
    wd, [(n, config.dim_of_lengths) for n in config.lengths], "by_n"
  )
  by_dim = _times(wd, [(config.length_of_dims, d) for d in config.dims], "by_d")
  figure = _draw(config, curves, sketch, by_length, by_dim, digits)
  harness.save_figure(
    wd, figure, _figure_data(config, curves, sketch, by_length, by_dim, digits)
  )
  return harness.finish(
    wd,
    claim=(
      "The Hessian of softmax regression with a skip is diagonal plus rank two "
      "between the features, so that Newton steps with sampled rows reach an "
      "error of eps in O(log 1/eps) steps, each almost linear in the size of "
      "the data."
    ),
    source="arXiv:2309.13482, abstract",
    paper="an efficient approximate Newton method (no numbers)",
    checks=[
      *_curve_checks(config, curves),
      *_sketch_checks(config, sketch),
      *_theory_checks(config, theory),
      *_digit_checks(config, digits),
      *_target_checks(targets),
    ],
    timed=_time_checks(config, by_length, by_dim),
  )


def _times(
  wd: harness.Workdir, sizes: list[tuple[int, int]], name: str
) -> dict[str, np.ndarray]:
  """Seconds of an exact and of a sampled step, by size."""
  points = [
    wd.point(
      f"seconds/{name}/n={n},d={d}",
      functools.partial(seconds_point, wd.config, n, d),
    )
    for n, d in harness.progress(sizes, f"seconds, {name}")
  ]
  return {key: np.array([p[key] for p in points]) for key in _TIMED}


# --- points ---


def planted(
  config: Config, n: int, d: int, *, condition: float, weight: float
) -> tuple[softmax_resnet.SoftmaxResnetData, jax.Array]:
  """A target that some x fits but for noise, and that x.

  Columns of the features shrink to 1 / condition while entries of x grow: the
  logits are those of features of one size.
  """
  rng = np.random.default_rng(config.seed)
  size = np.geomspace(1, 1 / condition, d)
  a = rng.normal(size=(n, d)) * (size / math.sqrt(d))
  x = rng.normal(size=d) / size
  noise = 1 + config.noise * rng.normal(size=n)
  return _planted(a, x, noise, weight / n), jnp.asarray(x)


@jax.jit
def _planted(
  a: jax.Array, x: jax.Array, noise: jax.Array, w: jax.Array
) -> softmax_resnet.SoftmaxResnetData:
  return softmax_resnet.prepare(a, softmax_resnet.predict(x, a) * noise, w=w)


def curves_point(config: Config) -> dict[str, Any]:
  """Errors of each method by step, over that of x = 0."""
  n, d = config.length, config.dim
  with jax.enable_x64(True):
    data, _ = planted(
      config, n, d, condition=config.condition, weight=config.weight
    )
    problem, x0 = softmax_resnet.problem(), jnp.zeros(d)
    minimum = _regression.find_minimum(problem, x0, data, mu0=1e-2)
    path = _regression.newton_path(
      problem, x0, data, mu0=1e-2, num_steps=config.exact_steps
    )
    first = minimum.error(x0)
    start = int(np.argmax(minimum.error(path) <= config.near * first))
    rest = _regression.pure_path(problem, path[start], data, num_steps=4)
    found = {"exact": minimum.error(np.concatenate([path[:start], rest]))}
    found |= _sampled_errors(config, problem, path[start], data, minimum)
    args = problem, x0, data
    options = {"scale": float(n), "num_steps": config.lbfgs_steps}
    lbfgs = _regression.first_order_path(optax.lbfgs(), *args, **options)
    options["num_steps"] = config.adam_steps
    adam = _regression.best_adam_path(
      config.adam_rates, minimum, *args, **options
    )
    found |= {"L-BFGS": minimum.error(lbfgs), "Adam": minimum.error(adam)}
  return {"start": start, **{k: e / first for k, e in found.items()}}


def _sampled_errors(
  config: Config,
  problem: newton.Problem,
  x: jax.Array,
  data: softmax_resnet.SoftmaxResnetData,
  minimum: _regression.Minimum,
) -> dict[str, np.ndarray]:
  """(seeds, steps + 1) errors from x on, by kind of sampling and rows."""
  h = softmax_resnet.curvature(x, data)
  prob = {
    "leverage": _regression.leverage_probabilities(h),
    "uniform": jnp.full_like(h.weight, 1 / len(h.weight)),
  }
  rngs = jax.random.split(jax.random.key(config.seed), config.num_seeds)
  return {
    f"{kind} {rows}": minimum.error(
      _regression.sampled_paths(
        problem,
        x,
        data,
        prob[kind],
        rngs,
        num_rows=rows * config.dim,
        num_steps=config.sampled_steps,
      )
    )
    for kind in _KINDS
    for rows in harness.progress(config.rows_per_dim, f"rows, {kind}")
  }


def sketch_point(config: Config) -> dict[str, Any]:
  """(rows, draws) errors of sampled Hessians at the planted x."""
  with jax.enable_x64(True):
    data, x = planted(
      config, config.length, config.dim, condition=1.0, weight=config.weight
    )
    h = softmax_resnet.curvature(x, data)
    prob = _regression.leverage_probabilities(h)
    errors = [
      _regression.sketch_errors(
        h,
        prob,
        jax.random.split(jax.random.key(rows), config.sketch_draws),
        num_rows=rows * config.dim,
      )
      for rows in harness.progress(config.sketch_rows_per_dim, "sketches")
    ]
  return {"error": np.stack(errors)}


def seconds_point(config: Config, n: int, d: int) -> dict[str, float]:
  """Seconds of one step near the minimum."""
  with jax.enable_x64(True):
    data, x = planted(config, n, d, condition=1.0, weight=config.weight)
    return _regression.step_seconds(
      softmax_resnet.problem(),
      x,
      data,
      timed_configs(config, d),
      rounds=config.rounds,
      at_least=config.seconds_per_point,
    )


def timed_configs(config: Config, d: int) -> dict[str, newton.NewtonConfig]:
  """Of an exact and of a sampled step."""
  num_rows = config.timed_rows_per_dim * d
  sampled = newton.NewtonConfig(sketch="leverage", num_rows=num_rows)
  return dict(zip(_TIMED, (newton.NewtonConfig(), sampled)))


def theory_point(config: Config) -> dict[str, float]:
  """What the assumptions of the theory cost, and how much more is true."""
  n, d = config.theory_length, config.theory_dim
  problem = softmax_resnet.problem()
  with jax.enable_x64(True):
    x0 = jnp.zeros(d)
    data, _ = planted(config, n, d, condition=1.0, weight=config.weight)
    best = _regression.find_minimum(problem, x0, data, mu0=1e-2).x
    rng = jax.random.key(config.seed)
    promised = newton.local_certificate(
      rng, problem, best, data, radius=config.start_distance
    )
    heavy, _ = planted(config, n, d, condition=1.0, weight=_TOO_HEAVY * n)
    heavy_x = _regression.find_minimum(problem, x0, heavy, mu0=1e-2).x
    distance = distances_after_a_step(config, problem, best, data)
    return {
      "certified": float(promised.radius),
      "contracting": float((distance < config.start_distance).mean()),
      "size": float(jnp.linalg.norm(best)),
      "heavy_size": float(jnp.linalg.norm(heavy_x)),
      "indefinite": indefinite_share(config),
    }


def distances_after_a_step(
  config: Config, problem: newton.Problem, best: jax.Array, data: Any
) -> np.ndarray:
  """(starts,) distances one pure step after those of random directions."""
  rng = jax.random.key(config.seed + 1)
  side = jax.random.normal(rng, (config.num_starts, len(best)), best.dtype)
  side /= jnp.linalg.norm(side, axis=1, keepdims=True)
  ends = [
    _regression.pure_path(problem, x, data, num_steps=1)[-1]
    for x in best[None] + config.start_distance * side
  ]
  return np.linalg.norm(np.array(ends) - np.asarray(best), axis=1)


def indefinite_share(config: Config) -> float:
  """Share of random points with a Hessian that is not semidefinite.

  Without a regularizer, for a target that is 1 at one place, in the domain.
  """
  n, d = config.random_length, config.random_dim
  inside = softmax_resnet.problem().in_domain
  assert inside is not None

  def least(rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    rng_a, rng_x = jax.random.split(rng)
    a = jax.random.normal(rng_a, (n, d), jnp.float64)
    data = softmax_resnet.prepare(a, jnp.eye(n)[0])
    x = jax.random.normal(rng_x, (d,), jnp.float64)
    matrix = newton.curvature_dense(softmax_resnet.curvature(x, data))
    return jnp.linalg.eigvalsh(matrix)[0], inside(x, data)

  rngs = jax.random.split(jax.random.key(config.seed), config.num_random)
  found, is_inside = jax.jit(jax.vmap(least))(rngs)
  return float((found[is_inside] < 0).mean())


def targets_point(config: Config) -> dict[str, Any]:
  """Fits to several targets over the same items; (targets,) of each number."""
  run = jax.jit(functools.partial(fit_targets, config))
  return run(jax.random.key(config.seed))


def fit_targets(config: Config, rng: jax.Array) -> dict[str, jax.Array]:
  """All on the device and in float32: the features are large."""
  n, d, num = config.targets_length, config.targets_dim, config.num_targets
  draw = functools.partial(jax.random.normal, dtype=jnp.float32)
  rng_a, rng_x, rng_noise = jax.random.split(rng, 3)
  a = draw(rng_a, (n, d)) / math.sqrt(d)
  options = newton.NewtonConfig(rtol=config.targets_rtol)

  def fit(x: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
    b = softmax_resnet.predict(x, a) * (1 + config.noise * noise)
    data = softmax_resnet.prepare(a, b, w=config.weight / n)
    found = newton.minimize(
      softmax_resnet.problem(), jnp.zeros_like(x), data, config=options
    )
    off = jnp.linalg.norm(found.x - x) / jnp.linalg.norm(x)
    return {"off": off, "steps": found.num_steps, "reason": found.reason}

  return jax.vmap(fit)(draw(rng_x, (num, d)), draw(rng_noise, (num, n)))


# --- digits ---


def mean_digits() -> np.ndarray:
  """(10, 64) mean images of the classes, each summing to 1."""
  pixels, labels = load_digits()
  pixels = pixels.astype(np.float64)
  means = np.stack([pixels[labels == c].mean(0) for c in range(10)])
  return means / means.sum(1, keepdims=True)


def cosines(num: int, *, with_constant: bool) -> np.ndarray:
  """(64, num^2 - 1) products of cosines over the image, of unit length.

  The constant one is left out: a softmax does not see it.
  """
  at = (np.arange(_SIDE) + 0.5) * np.pi / _SIDE
  waves = np.cos(np.outer(at, np.arange(num)))
  table = np.einsum("xi,yj->xyij", waves, waves).reshape(_SIDE**2, num**2)
  table /= np.linalg.norm(table, axis=0, keepdims=True)
  return table if with_constant else table[:, 1:]


def digits_point(
  config: Config, num: int, residual_scale: float
) -> dict[str, Any]:
  """Fits of all ten classes at once, free and with positive profiles."""
  with jax.enable_x64(True):
    a = jnp.asarray(cosines(num, with_constant=residual_scale > 0))
    targets = jnp.asarray(mean_digits())
    weight = config.digit_weight / _SIDE
    options = newton.NewtonConfig(max_steps=config.digit_steps)

    def fit(b: jax.Array, *, positive: bool) -> tuple[Any, ...]:
      data = softmax_resnet.prepare(
        a, b, w=weight, residual_scale=residual_scale
      )
      found = newton.minimize(
        softmax_resnet.problem(alpha_min=_ALPHA_MIN, positive=positive),
        jnp.zeros(a.shape[1], a.dtype),
        data,
        config=options,
      )
      of_x = {"a": a, "residual_scale": residual_scale}
      f = softmax_resnet.predict(found.x, **of_x)
      _, log_alpha = softmax_resnet.log_alpha(found.x, **of_x)
      return found, f, jnp.exp(log_alpha) / len(b)

    run = jax.vmap(functools.partial(fit, positive=False))
    found, f, alpha = run(targets)
    converged = found.reason == 1
    result = {
      "steps": found.num_steps,
      "converged": converged.sum(),
      "at_edge": (~converged & (alpha <= _EDGE * _ALPHA_MIN)).sum(),
      "variation": jnp.abs(f - targets).sum(1) / 2,
      "fit": f,
      "target": targets,
    }
    if residual_scale:
      found, f, _ = jax.vmap(functools.partial(fit, positive=True))(targets)
      on_wall = f.min(1) * f.shape[1] < _WALL
      result["on_wall"] = (on_wall & (found.reason != 1)).sum()
    return result


# --- checks ---


def _curve_checks(
  config: Config, curves: dict[str, Any]
) -> list[harness.Check]:
  accepted = config.accepted
  checks = [
    harness.Check(
      "order of convergence, exact steps",
      _regression.order(curves["exact"]),
      *accepted.order,
    )
  ]
  tens = _decades(config)
  for rows in config.rows_per_dim:
    errors = curves[f"leverage {rows}"]
    factor = _regression.factor_per_step(errors)
    ratio = factor * math.sqrt(rows)
    name = f"factor of a step over sqrt(d/m), m={rows}d"
    checks.append(harness.Check(name, ratio, *accepted.factor))
    steps = _regression.steps_to(errors, 10.0**-tens)
    slope, r_squared = _regression.line(tens, steps)
    name = f"steps against log(1/eps), R squared, m={rows}d"
    checks.append(harness.Check(name, r_squared, accepted.r_squared))
    checks.append(harness.Check(f"steps a decade, m={rows}d", slope))
    factor = _regression.factor_per_step(curves[f"uniform {rows}"])
    name = f"factor of a step, uniform rows, m={rows}d"
    checks.append(harness.Check(name, factor))
  for name in ("L-BFGS", "Adam"):
    errors = curves[name]
    label = f"error of {name} after {len(errors) - 1} steps"
    checks.append(harness.Check(label, errors[-1]))
  return checks


def _decades(config: Config) -> np.ndarray:
  return np.arange(1, config.decades + 1)


def _sketch_checks(
  config: Config, sketch: dict[str, Any]
) -> list[harness.Check]:
  rows, accepted = np.array(config.sketch_rows_per_dim), config.accepted
  medians = np.median(sketch["error"], axis=1)
  ratio = medians / _regression.sketch_law(rows)
  return [
    harness.Check(
      "sketch error over its law, least", ratio.min(), *accepted.law
    ),
    harness.Check(
      "sketch error over its law, greatest", ratio.max(), *accepted.law
    ),
    harness.Check(
      "slope of the sketch error in m",
      fit_slope(rows, medians).slope,
      *accepted.law_slope,
    ),
  ]


def _theory_checks(
  config: Config, theory: dict[str, float]
) -> list[harness.Check]:
  n, r = config.theory_length, config.start_distance
  return [
    harness.Check(
      "share of random Hessians that are indefinite, no regularizer",
      theory["indefinite"],
      config.accepted.indefinite,
    ),
    harness.Check("certified radius of convergence", theory["certified"]),
    harness.Check(
      f"share of starts at distance {r:g} that a pure step brings nearer",
      theory["contracting"],
    ),
    harness.Check(f"size of x, w = {config.weight:g}/n", theory["size"]),
    harness.Check(
      f"size of x, w = {_TOO_HEAVY:g}, n={n}", theory["heavy_size"]
    ),
  ]


def _digit_checks(
  config: Config, digits: dict[tuple[int, float], dict[str, Any]]
) -> list[harness.Check]:
  checks = []
  for (k, rho), point in digits.items():
    low = config.accepted.digits_converged if rho == 0 else -math.inf
    where = f"K={k}, rho={rho:g}"
    checks += [
      harness.Check(f"digits that converge, {where}", point["converged"], low),
      harness.Check(
        f"digits that end where alpha = {_ALPHA_MIN:g} n, {where}",
        point["at_edge"],
      ),
      harness.Check(
        f"mean total variation of digits, {where}", point["variation"].mean()
      ),
      harness.Check(f"most steps of a digit, {where}", point["steps"].max()),
    ]
    if "on_wall" in point:
      name = f"positive profiles that end on the wall, {where}"
      checks.append(harness.Check(name, point["on_wall"]))
  return checks


def _target_checks(targets: dict[str, Any]) -> list[harness.Check]:
  where = f"{len(targets['off'])} targets at once in float32"
  return [
    harness.Check(
      f"share that converge, {where}", (targets["reason"] == 1).mean()
    ),
    harness.Check(f"most steps, {where}", targets["steps"].max()),
    harness.Check(
      f"median distance to the planted x over its size, {where}",
      np.median(targets["off"]),
    ),
  ]


def _time_checks(
  config: Config, by_length: dict[str, Any], by_dim: dict[str, Any]
) -> list[harness.Check]:
  accepted = config.accepted
  bounds = {
    "sampled": (-math.inf, accepted.sampled_slope),
    "exact": (accepted.exact_slope, math.inf),
  }
  checks = []
  for name in _TIMED:
    slope = fit_slope(config.dims, by_dim[name]).slope
    label = f"slope of seconds by d, {name} step"
    checks.append(harness.Check(label, slope, *bounds[name]))
    slope = fit_slope(config.lengths, by_length[name]).slope
    checks.append(harness.Check(f"slope of seconds by n, {name} step", slope))
  for d, exact, sampled in zip(config.dims, by_dim["exact"], by_dim["sampled"]):
    name = f"exact / sampled step, n={config.length_of_dims}, d={d}"
    checks.append(harness.Check(name, exact / sampled))
  return checks


# --- figure ---


def _figure_data(
  config: Config,
  curves: dict[str, Any],
  sketch: dict[str, Any],
  by_length: dict[str, Any],
  by_dim: dict[str, Any],
  digits: dict[tuple[int, float], dict[str, Any]],
) -> dict[str, Any]:
  data = {f"error, {name}": x for name, x in curves.items()}
  data["sketch error"] = sketch["error"]
  for name in _TIMED:
    data[f"seconds by n, {name}"] = by_length[name]
    data[f"seconds by d, {name}"] = by_dim[name]
  for (k, rho), point in digits.items():
    data |= {f"digits {k} {rho:g}, {key}": x for key, x in point.items()}
  keys = ("rows_per_dim", "sketch_rows_per_dim", "lengths", "dims")
  return data | {key: config[key] for key in keys}


def _draw(
  config: Config,
  curves: dict[str, Any],
  sketch: dict[str, Any],
  by_length: dict[str, Any],
  by_dim: dict[str, Any],
  digits: dict[tuple[int, float], dict[str, Any]],
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(2, 3, figsize=(17.5, 9.8))
  _draw_curves(axes[0, 0], config, curves)
  _regression.draw_steps(
    axes[0, 1],
    {
      f"m = {rows} d": curves[f"leverage {rows}"]
      for rows in config.rows_per_dim
    },
    _decades(config),
  )
  _regression.draw_law(axes[0, 2], config.sketch_rows_per_dim, sketch["error"])
  for ax, x, seconds, label in (
    (axes[1, 0], config.lengths, by_length, f"n, d = {config.dim_of_lengths}"),
    (axes[1, 1], config.dims, by_dim, f"d, n = {config.length_of_dims}"),
  ):
    for name in _TIMED:
      harness.plot_loglog(ax, x, 1000 * seconds[name], label=f"{name} step")
    ax.set(
      title=f"Time of a step by {label[0]}",
      xlabel=label,
      ylabel="milliseconds",
    )
    ax.legend()
  _draw_digits(axes[1, 2], config, digits)
  return figure


def _draw_curves(ax: Axes, config: Config, curves: dict[str, Any]) -> None:
  # On a logarithmic axis the start is at 1.
  draw = functools.partial(_regression.draw_errors, ax)
  draw(curves["exact"], "exact", "k", "o-", first=1)
  for color, rows in zip(harness.PALETTE, config.rows_per_dim):
    for kind, style in zip(_KINDS, ("-", ":")):
      label = f"{kind}, m = {rows} d"
      errors = curves[f"{kind} {rows}"]
      draw(errors, label, color, style, first=1 + curves["start"])
  for color, name in zip(harness.PALETTE[3:], ("L-BFGS", "Adam")):
    draw(curves[name], name, color, "--", first=1)
  ax.set(
    title="Error by step",
    xlabel="steps + 1",
    ylabel="error in the norm of the Hessian",
    xscale="log",
    # Room for the legend.
    xlim=(0.06, 800),
    ylim=(1e-13, 30),
  )
  ax.set_xticks([1, 10, 100], ["1", "10", "100"])
  ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.legend(loc="lower left")


def _draw_digits(
  ax: Axes,
  config: Config,
  digits: dict[tuple[int, float], dict[str, Any]],
) -> None:
  """Rows of images: the means, then the fits."""
  first = next(iter(digits.values()))
  rows = {"mean": first["target"]}
  for (k, rho), point in digits.items():
    rows[rf"$K = {k}$, $\rho = {rho:g}$"] = point["fit"]
  gap = np.full((_SIDE, 1), np.nan)
  strips = []
  for images in rows.values():
    cells = [
      np.hstack([x.reshape(_SIDE, _SIDE) / x.max(), gap]) for x in images
    ]
    strip = np.hstack(cells)
    strips += [strip, np.full((1, strip.shape[1]), np.nan)]
  ax.imshow(np.vstack(strips), cmap="gray_r", vmin=0, vmax=1)
  ax.set_yticks([_SIDE / 2 + i * (_SIDE + 1) - 0.5 for i in range(len(rows))])
  ax.set_yticklabels(rows)
  ax.set_xticks([_SIDE / 2 + i * (_SIDE + 1) - 0.5 for i in range(10)])
  ax.set_xticklabels([str(c) for c in range(10)])
  ax.grid(visible=False)
  ax.tick_params(length=0)
  for side in ax.spines.values():
    side.set_visible(False)
  ax.set_title("Mean digits from $K^2 - 1$ cosines")


if __name__ == "__main__":
  harness.main(run, "softmax-resnet-regression")
