"""Two layers, softmax inside ReLU: Newton's method with sampled rows.

Five questions about arXiv 2311.15390:

1. How does the error fall, in the norm of the Hessian, with exact steps and
   with sampled ones: of the data's term alone, as here, or of the regularizer
   with it, as in the source?
2. How many sampled steps does an error of eps take?
3. How do seconds of a step grow with the rows of a sparse first layer, and with
   the entries of a row?
4. The theory is local. How many random starts reach the best loss? Reported.
5. Real patients, of whom only means of groups are known. Reported.
"""

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import _regression, harness
from jaxattn import newton
from jaxattn.data import tables
from jaxattn.regression import two_layer
from jaxattn.scaling import fit_slope

_TARGETS = ("data", "all")
_TIMED = ("exact", "sampled")
_MU0 = 1.0
# Of losses: closer to the best than this is there.
_REACHED = 1.01

# A ConfigDict: what type a field has is known at run time only.
Config = Any


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  curves = {
    w: wd.point(f"curves/w={w:g}", functools.partial(curves_point, config, w))
    for w in harness.progress(config.weights, "weights")
  }
  starts = wd.point("starts", functools.partial(starts_point, config))
  groups = {
    num: wd.point(f"groups/{num}", functools.partial(groups_point, config, num))
    for num in harness.progress(config.num_groups, "groups")
  }
  by_length = _times(
    wd,
    [(n, config.entries, config.density) for n in config.timed_lengths],
    "by_n",
  )
  by_entries = _times(
    wd,
    [
      (config.length_of_entries, k, k / config.timed_dim)
      for k in config.timed_entries
    ],
    "by_entries",
  )
  figure = _draw(config, curves, by_length, by_entries, starts, groups)
  harness.save_figure(
    wd,
    figure,
    _figure_data(config, curves, by_length, by_entries, starts, groups),
  )
  return harness.finish(
    wd,
    claim=(
      "From a suitable start, Newton steps with a sampled Hessian reach an "
      "error of eps in O(log 1/eps) steps, whose time is linear in the rows of "
      "a sparse first layer and at most linear in the entries of a row."
    ),
    source="arXiv:2311.15390, abstract",
    paper="O(log 1/eps) steps of nearly nnz + d^omega time (no numbers)",
    checks=[
      *_curve_checks(config, curves),
      *_start_checks(config, starts),
      *_group_checks(groups),
    ],
    timed=_time_checks(config, by_length, by_entries),
  )


def _times(
  wd: harness.Workdir, sizes: list[tuple[int, int, float]], name: str
) -> dict[str, np.ndarray]:
  """Seconds of an exact and of a sampled step, by size."""
  points = [
    wd.point(
      f"seconds/{name}/n={n},k={k}",
      functools.partial(seconds_point, wd.config, n, k, density),
    )
    for n, k, density in harness.progress(sizes, f"seconds, {name}")
  ]
  return {key: np.array([p[key] for p in points]) for key in _TIMED}


# --- points ---


def planted(
  config: Config, n: int, weight: float
) -> tuple[two_layer.TwoLayerData, jax.Array]:
  """Targets that some x fits but for noise, and that x."""
  rng = np.random.default_rng(config.seed)
  a1 = jnp.asarray(rng.normal(size=(n, config.dim)))
  a2 = jnp.asarray(rng.normal(size=(config.num_units, n)))
  x = jnp.asarray(rng.normal(size=config.dim))
  noise = config.noise * rng.normal(size=config.num_units)
  return _planted(a1, a2, x, noise, weight), x


@jax.jit
def _planted(
  a1: jax.Array | newton.Design,
  a2: jax.Array,
  x: jax.Array,
  noise: jax.Array,
  w: jax.Array,
) -> two_layer.TwoLayerData:
  b = two_layer.predict(x, a1, a2) + noise
  return two_layer.prepare(a1, a2, b, w=w)


def curves_point(config: Config, weight: float) -> dict[str, Any]:
  """Errors by step, of exact steps and of each way to sample."""
  with jax.enable_x64(True):
    data, x = planted(config, config.length, weight)
    problem = two_layer.problem()
    minimum = _regression.find_minimum(problem, x, data, mu0=_MU0)
    side = np.random.default_rng(config.seed).normal(size=config.dim)
    side *= config.start_distance / np.linalg.norm(side)
    start = minimum.x + jnp.asarray(side)
    path = _regression.pure_path(problem, start, data, num_steps=6)
    rngs = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    found = {
      "exact": minimum.error(path),
      "margin": two_layer.kink_margin(minimum.x, data),
    }
    for target in _TARGETS:
      sampled = two_layer.problem(sketch_target=target)
      h = two_layer.curvature(start, data, sketch_target=target)
      prob = _regression.leverage_probabilities(h)
      for rows in config.rows_per_dim:
        paths = _regression.sampled_paths(
          sampled,
          start,
          data,
          prob,
          rngs,
          num_rows=rows * config.dim,
          num_steps=config.sampled_steps,
        )
        found[f"{target} {rows}"] = minimum.error(paths)
  return found


def seconds_point(
  config: Config, n: int, entries: int, density: float
) -> dict[str, float]:
  """Seconds of one step of a sparse problem."""
  with jax.enable_x64(True):
    data, x = sparse_problem(config, n, entries, density)
    return _regression.step_seconds(
      two_layer.problem(),
      x,
      data,
      timed_configs(config),
      rounds=config.rounds,
      at_least=config.seconds_per_point,
    )


def sparse_problem(
  config: Config, n: int, entries: int, density: float
) -> tuple[two_layer.TwoLayerData, jax.Array]:
  """A first layer of a few entries a row, and the x that it is planted with."""
  rng = np.random.default_rng(config.seed)
  shape, d = (n, entries), config.timed_dim
  values = rng.normal(size=shape)
  # As many columns hold a number as the density says.
  values *= rng.random(shape) < density * d / entries
  a1 = newton.Design(
    jnp.asarray(rng.integers(0, d, shape)), jnp.asarray(values), d
  )
  a2 = jnp.asarray(rng.standard_normal((config.timed_units, n)))
  x = jnp.asarray(rng.normal(size=d))
  noise = config.noise * rng.normal(size=config.timed_units)
  return _planted(a1, a2, x, noise, config.counted_weight), x


def timed_configs(config: Config) -> dict[str, newton.NewtonConfig]:
  """Of an exact and of a sampled step."""
  num_rows = config.timed_rows_per_dim * config.timed_dim
  sampled = newton.NewtonConfig(sketch="leverage", num_rows=num_rows, mu0=_MU0)
  return dict(zip(_TIMED, (newton.NewtonConfig(mu0=_MU0), sampled)))


def starts_point(config: Config) -> dict[str, Any]:
  """(scatters, starts) losses at the end, from around 0 and the planted x."""
  with jax.enable_x64(True):
    data, x = planted(config, config.starts_length, config.starts_weight)
    options = newton.NewtonConfig(mu0=_MU0, max_steps=config.starts_steps)

    @jax.jit
    @jax.vmap
    def end(x0: jax.Array) -> jax.Array:
      problem = two_layer.problem()
      return newton.minimize(problem, x0, data, config=options).loss

    rng = jax.random.key(config.seed)
    side = jax.random.normal(rng, (config.num_starts, len(x)), x.dtype)
    return {
      name: np.stack([end(center[None] + s * side) for s in config.scatter])
      for name, center in (("zero", jnp.zeros_like(x)), ("planted", x))
    }


def groups_point(config: Config, num_groups: int) -> dict[str, Any]:
  """(groupings,) errors on groups that were not fitted, over those of x = 0.

  Of real labels, and of targets planted with the x that half of the groups'
  labels led to.
  """
  with jax.enable_x64(True):
    a1, ill = patients()
    profile = jnp.asarray(ill / ill.sum())
    options = newton.NewtonConfig(mu0=_MU0, max_steps=200)
    half = num_groups // 2

    def fit(a2: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
      data = two_layer.prepare(a1, a2[:half], b[:half], w=config.group_weight)
      x0 = jnp.zeros(a1.shape[1], a1.dtype)
      found = newton.minimize(two_layer.problem(), x0, data, config=options)
      out = two_layer.predict(found.x, a1, a2[half:])
      error = jnp.linalg.norm(out - b[half:]) / jnp.linalg.norm(b[half:])
      return found.x, error, found.reason == 1

    @jax.jit
    @jax.vmap
    def both(a2: jax.Array) -> tuple[jax.Array, ...]:
      x, real, converged = fit(a2, jnp.maximum(a2 @ profile, 0))
      _, planted, again = fit(a2, two_layer.predict(x, a1, a2))
      return real, planted, converged, again

    real, planted, *converged = both(
      jnp.stack(
        [
          group_means(seed, len(ill), num_groups)
          for seed in range(config.num_groupings)
        ]
      )
    )
    return {
      "real": real,
      "planted": planted,
      "converged": np.mean(converged),
    }


def patients() -> tuple[jax.Array, np.ndarray]:
  """Standardized features, (569, 30), and who is ill."""
  features, labels = tables.load_breast_cancer()
  features = (features - features.mean(0)) / features.std(0)
  return jnp.asarray(features.astype(np.float64)), labels == 0


def group_means(seed: int, n: int, num_groups: int) -> jax.Array:
  """(groups, n): the mean of n f over a group, less 1, its mean over all."""
  group = np.random.default_rng(seed).permutation(n) % num_groups
  member = group[None] == np.arange(num_groups)[:, None]
  return jnp.asarray(n * member / member.sum(1, keepdims=True) - 1)


# --- checks ---


def _curve_checks(
  config: Config, curves: dict[float, dict[str, Any]]
) -> list[harness.Check]:
  accepted, checks = config.accepted, []
  counted = curves[config.counted_weight]
  order = _regression.order(counted["exact"])
  name = f"order of convergence, exact steps, w={config.counted_weight:g}"
  checks.append(harness.Check(name, order, *accepted.order))
  tens = _decades(config)
  most = max(config.rows_per_dim)
  for rows in config.rows_per_dim:
    steps = _regression.steps_to(counted[f"data {rows}"], 10.0**-tens)
    slope, r_squared = _regression.line(tens, steps)
    decides = rows == most
    name = f"steps a decade, m={rows}d, w={config.counted_weight:g}"
    high = accepted.steps_a_decade if decides else math.inf
    checks.append(harness.Check(name, slope, high=high))
    name = f"steps against log(1/eps), R squared, m={rows}d"
    low = accepted.r_squared if decides else -math.inf
    checks.append(harness.Check(name, r_squared, low))
  for w, point in curves.items():
    for rows in config.rows_per_dim:
      data, everything = (
        _regression.factor_per_step(point[f"{target} {rows}"])
        for target in _TARGETS
      )
      where = f"w={w:g}, m={rows}d"
      checks.append(harness.Check(f"factor of a step, {where}", data))
      name = f"the same over that of sampling everything, {where}"
      high = accepted.data_over_all
      checks.append(harness.Check(name, data / everything, high=high))
    name = f"distance from the minimum to a kink, w={w:g}"
    checks.append(harness.Check(name, point["margin"]))
  return checks


def _decades(config: Config) -> np.ndarray:
  low, high = config.decades
  return np.arange(low, high + 1)


def reached(starts: dict[str, Any]) -> dict[str, np.ndarray]:
  """(scatters,) shares of starts that end at the best loss of all."""
  best = min(losses.min() for losses in starts.values())
  return {
    name: (losses <= _REACHED * best).mean(1) for name, losses in starts.items()
  }


def best_of(losses: np.ndarray) -> np.ndarray:
  """Mean of the least of k losses drawn without replacement, k = 1, 2, ..."""
  ordered, n = np.sort(losses), len(losses)
  return np.array(
    [
      sum(
        math.comb(n - 1 - i, k - 1) / math.comb(n, k) * ordered[i]
        for i in range(n - k + 1)
      )
      for k in range(1, n + 1)
    ]
  )


def _start_checks(
  config: Config, starts: dict[str, Any]
) -> list[harness.Check]:
  names = {"zero": "0", "planted": "the planted x"}
  checks = [
    harness.Check(
      f"starts at the best loss, N(0, {s:g}^2) around {names[name]}", share
    )
    for name, shares in reached(starts).items()
    for s, share in zip(config.scatter, shares)
  ]
  widest = starts["zero"][-1]
  best = min(losses.min() for losses in starts.values())
  label = f"best of {config.num_starts} wide starts, over the best loss"
  return [*checks, harness.Check(label, widest.min() / best)]


def _group_checks(groups: dict[int, dict[str, Any]]) -> list[harness.Check]:
  converged = np.mean([point["converged"] for point in groups.values()])
  return [
    harness.Check("share of fits to groups that converge", float(converged)),
    *(
      harness.Check(
        f"error on groups not fitted over that of x = 0, {name}, {num} groups",
        np.median(point[name]),
      )
      for num, point in groups.items()
      for name in ("real", "planted")
    ),
  ]


def _time_checks(
  config: Config,
  by_length: dict[str, np.ndarray],
  by_entries: dict[str, np.ndarray],
) -> list[harness.Check]:
  bounds = config.accepted.entries_slope
  checks = []
  for x, seconds, label, accepted in (
    (config.timed_lengths, by_length, "n", bounds),
    # What n alone costs makes this slope small; it must not be large.
    (config.timed_entries, by_entries, "entries a row", (-math.inf, bounds[1])),
  ):
    slopes = {name: fit_slope(x, seconds[name]).slope for name in _TIMED}
    label = f"slope of seconds by {label}"
    checks += [
      harness.Check(f"{label}, sampled step", slopes["sampled"], *accepted),
      harness.Check(f"{label}, exact step", slopes["exact"]),
    ]
  name = f"exact / sampled step, n={config.timed_lengths[-1]}"
  ratio = by_length["exact"][-1] / by_length["sampled"][-1]
  return [*checks, harness.Check(name, ratio)]


# --- figure ---


def _figure_data(
  config: Config,
  curves: dict[float, dict[str, Any]],
  by_length: dict[str, np.ndarray],
  by_entries: dict[str, np.ndarray],
  starts: dict[str, Any],
  groups: dict[int, dict[str, Any]],
) -> dict[str, Any]:
  data = {
    f"error, w={w:g}, {name}": x
    for w, point in curves.items()
    for name, x in point.items()
  }
  data |= {f"seconds by n, {name}": x for name, x in by_length.items()}
  data |= {f"seconds by entries, {name}": x for name, x in by_entries.items()}
  data |= {f"losses, {name}": x for name, x in starts.items()}
  data |= {
    f"groups, {num}, {name}": x
    for num, point in groups.items()
    for name, x in point.items()
  }
  keys = ("timed_lengths", "timed_entries", "scatter")
  return data | {key: config[key] for key in keys}


def _draw(
  config: Config,
  curves: dict[float, dict[str, Any]],
  by_length: dict[str, np.ndarray],
  by_entries: dict[str, np.ndarray],
  starts: dict[str, Any],
  groups: dict[int, dict[str, Any]],
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(3, 3, figsize=(17.5, 14.7))
  for ax, w in zip(axes[0], config.weights):
    _draw_curves(ax, config, w, curves[w])
  counted = curves[config.counted_weight]
  _regression.draw_steps(
    axes[1, 0],
    {f"m = {rows} d": counted[f"data {rows}"] for rows in config.rows_per_dim},
    _decades(config),
  )
  for ax, x, seconds, title, label in (
    (
      axes[1, 1],
      config.timed_lengths,
      by_length,
      "Time of a step by rows",
      f"rows of the first layer, density {config.density:g}",
    ),
    (
      axes[1, 2],
      config.timed_entries,
      by_entries,
      "Time of a step by entries a row",
      f"entries a row of {config.timed_dim}, n = {config.length_of_entries}",
    ),
  ):
    for name in _TIMED:
      harness.plot_loglog(ax, x, 1000 * seconds[name], label=f"{name} step")
    ax.set(title=title, xlabel=label, ylabel="milliseconds")
    ax.legend()
  _draw_starts(axes[2, 0], config, starts)
  _draw_groups(axes[2, 1], groups)
  axes[2, 2].set_axis_off()
  return figure


def _draw_curves(
  ax: Axes, config: Config, weight: float, point: dict[str, Any]
) -> None:
  _regression.draw_errors(ax, point["exact"], "exact", "k", "o-")
  names = {"data": "data term", "all": "everything"}
  for color, target in zip(harness.PALETTE, _TARGETS):
    for rows, style in zip(config.rows_per_dim, ("--", "-")):
      label = f"sampling {names[target]}, m = {rows} d"
      errors = point[f"{target} {rows}"]
      _regression.draw_errors(ax, errors, label, color, style)
  ax.set(
    title=f"Error by step, w = {weight:g}",
    xlabel="steps",
    ylabel="error in the norm of the Hessian",
    ylim=(1e-14, 10),
  )
  ax.legend(loc="upper right")


def _draw_starts(ax: Axes, config: Config, starts: dict[str, Any]) -> None:
  best = min(losses.min() for losses in starts.values())
  for s, losses in zip(config.scatter, starts["zero"]):
    if s == 0:
      continue
    count = np.arange(1, 1 + len(losses))
    label = f"$N(0, {s:g}^2)$"
    ax.loglog(count, best_of(losses) / best, "o-", label=label, markersize=4)
  ax.axhline(1, color="0.6", linewidth=1)
  ax.set(
    title="Several starts: the least loss of k",
    xlabel="k, random starts",
    ylabel="mean of the least loss, over the best",
  )
  ax.legend()


def _draw_groups(ax: Axes, groups: dict[int, dict[str, Any]]) -> None:
  num = list(groups)
  for name in ("real", "planted"):
    low, middle, high = np.quantile(
      [point[name] for point in groups.values()], (0.25, 0.5, 0.75), axis=1
    )
    (drawn,) = ax.semilogx(num, middle, "o-", label=f"{name} targets")
    ax.fill_between(num, low, high, color=drawn.get_color(), alpha=0.15)
  ax.axhline(1, color="0.6", linewidth=1)
  ax.set(
    title="Patients known by groups: error on other groups",
    xlabel="groups of 569 patients, half of them fitted",
    ylabel="error, over that of x = 0",
    ylim=(0, 1.1),
  )
  ax.set_xticks(num, [str(n) for n in num])
  ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.legend(loc="lower left")


if __name__ == "__main__":
  harness.main(run, "two-layer-regression")
