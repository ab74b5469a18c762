"""Polynomial attention: almost linear time for bounded logits, and its price.

Four questions about arXiv 2302.13214 and arXiv 2402.04497, on one head:

1. How do times grow with n: exact against polynomial attention, forward and
   with gradient, causal and not? From which n on does the polynomial win?
2. How large is the error of the output for entries in [-B, B], beside its
   bound? The largest B for which no more than n features are needed grows like
   sqrt(log n): beyond it there is nothing to gain.
3. How fast does the error of the gradient fall with the degree: for the true
   gradient of what the forward computes ("surrogate"), and for the exact
   formula with approximate weights ("closed form")?
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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import optimize

from experiments import harness
from jaxattn.attention import polynomial_attention, softmax_attention
from jaxattn.features import (
  attention_error_bound,
  feature_count,
  polynomial_coefficients,
  polynomial_error,
)
from jaxattn.scaling import fit_slope

# Whether causal, and whether with gradient.
_MODES = {
  "forward": (False, False),
  "forward and backward": (False, True),
  "causal forward": (True, False),
  "causal forward and backward": (True, True),
}
_MODES_OF_FIGURE = ("forward", "forward and backward")
_BACKWARDS = ("surrogate", "closed_form")
# Below this an error in float64 is one of rounding.
_ROUNDING = 1e-12
_TICKS = (10, 20, 50, 100, 200, 500, 1000, 2000)

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Sizes = tuple[int, int]


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  times = {mode: _times(wd, mode) for mode in _MODES}
  errors = _stack(wd, "error", config.bounds, error_point)
  limits = _stack(wd, "limit", config.eps, limit_point)
  gradients = wd.point("gradient", functools.partial(gradient_point, config))
  figure = _draw(config, times, errors, limits, gradients)
  harness.save_figure(
    wd, figure, _figure_data(config, times, errors, limits, gradients)
  )
  return harness.finish(
    wd,
    claim=(
      "With bounded entries, attention and its gradient are computed in time "
      "almost linear in n, to an error that is bounded beforehand; the bound "
      "on entries up to which this pays grows like sqrt(log n)."
    ),
    source="arXiv:2302.13214, theorem 1.1; arXiv:2402.04497, theorem 1.3",
    paper="n^(1+o(1)) time if entries are o(sqrt(log n)), no faster than n^2 "
    "otherwise (no numbers)",
    checks=[
      *_error_checks(config, errors),
      *_limit_checks(config, limits),
      *_gradient_checks(config, gradients),
    ],
    timed=[
      *_slope_checks(config, times),
      *_crossover_checks(config, times),
    ],
  )


def _stack(
  wd: harness.Workdir, name: str, values: tuple[Any, ...], compute: Any
) -> dict[str, np.ndarray]:
  """Points of all values, stacked along a first axis."""
  points = [
    wd.point(f"{name}/{value:g}", functools.partial(compute, wd.config, value))
    for value in harness.progress(values, name)
  ]
  return {key: np.stack([p[key] for p in points]) for key in points[0]}


# --- times ---


def _times(wd: harness.Workdir, mode: str) -> dict[str, np.ndarray]:
  """Seconds by contestant, "exact 8" or "8, 2", for the lengths of a mode."""
  config = wd.config
  sizes, lengths = _grid(config, mode)
  dims = sorted({dim for dim, _ in sizes})
  pairs = [(dim, n) for n in lengths for dim in dims]
  seconds: dict[str, list[float]] = {}
  for dim, n in harness.progress(pairs, f"times, {mode}"):
    degrees = tuple(
      g for d, g in sizes if d == dim and _is_timed(config, d, g, n)
    )
    if not degrees:
      continue
    point = wd.point(
      f"time/{mode.replace(' ', '_')}/dim={dim}/n={n}",
      functools.partial(time_point, config, mode, dim, degrees, n),
    )
    for name, value in point.items():
      degree = name.removeprefix("degree=")
      key = f"exact {dim}" if name == "exact" else f"{dim}, {degree}"
      seconds.setdefault(key, []).append(value)
  return {name: np.array(x) for name, x in seconds.items()}


def _is_timed(config: Config, dim: int, degree: int, n: int) -> bool:
  """Whether this length is short, or the features of all tokens are few."""
  most = config.long_features
  return n in config.lengths or feature_count(dim, degree) * n <= most


def _grid(config: Config, mode: str) -> tuple[tuple[Sizes, ...], list[int]]:
  """Sizes and lengths that a mode is timed at, the longest not for all."""
  sizes = config.causal_sizes if _MODES[mode][0] else config.sizes
  least = 0 if mode == "forward" else config.slope_from
  lengths = (*config.lengths, *config.long_lengths)
  return sizes, [n for n in lengths if n >= least]


def time_point(
  config: Config, mode: str, dim: int, degrees: tuple[int, ...], n: int
) -> dict[str, float]:
  """Least seconds of each contestant, run in turn."""
  is_causal, with_gradient = _MODES[mode]
  rng = jax.random.fold_in(jax.random.key(config.seed), dim)
  args = jax.random.uniform(rng, (4, 1, n, 1, dim), minval=-1.0, maxval=1.0)
  calls = {f"degree={g}": g for g in degrees}
  if n in config.lengths:
    calls = {"exact": None, **calls}
  runs = {
    name: functools.partial(timed_call(g, is_causal, with_gradient), *args)
    for name, g in calls.items()
  }
  return harness.least_seconds(
    runs, rounds=config.rounds, at_least=config.seconds_per_point
  )


def timed_call(
  degree: int | None, is_causal: bool, with_gradient: bool
) -> Callable[..., Any]:
  """Attention of (query, key, value, cotangent), exact without a degree."""
  attend = functools.partial(softmax_attention, is_causal=is_causal)
  if degree is not None:
    attend = functools.partial(
      polynomial_attention, degree=degree, radius=1.0, is_causal=is_causal
    )

  def forward(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
    del cotangent
    return attend(query, key, value)

  def backward(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
    out, vjp = jax.vjp(attend, query, key, value)
    return out, vjp(cotangent)

  return jax.jit(backward if with_gradient else forward)


def crossover(
  lengths: np.ndarray, exact: np.ndarray, ours: np.ndarray
) -> float:
  """The n from which on ours is faster, between points on log-log lines.

  The first or last length if that is faster, or slower, at all of them.
  """
  gain = np.log(exact / ours)
  slower = np.flatnonzero(gain <= 0)
  if not slower.size:
    return float(lengths[0])
  i = int(slower[-1])
  if i + 1 == len(lengths):
    return float(lengths[-1])
  share = gain[i] / (gain[i] - gain[i + 1])
  return float(lengths[i] * (lengths[i + 1] / lengths[i]) ** share)


# --- errors ---


def error_point(config: Config, bound: float) -> dict[str, Any]:
  """(degrees,) largest error, error bound, and their largest ratio."""
  n, dim = config.error_length, config.error_dim
  radius = bound**2
  with jax.enable_x64(True):
    rngs = jax.random.split(_key(config, int(1000 * bound)), 2)
    query, key = bound * _uniform(rngs[0], (2, 1, n, 1, dim))
    value = _uniform(rngs[1], (1, n, 1, dim))
    exact = softmax_attention(query, key, value, scale=1 / dim)
    rows = [
      _error_row(query, key, value, exact, degree, radius)
      for degree in config.degrees
    ]
  names = ("error", "bound", "used")
  return {k: np.array(v) for k, v in zip(names, zip(*rows, strict=True))}


def _error_row(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  exact: Any,
  degree: int,
  radius: float,
) -> tuple[float, float, float]:
  # Keys are not centered: the radius is the one known beforehand.
  out = polynomial_attention(
    query,
    key,
    value,
    degree=degree,
    radius=radius,
    scale=1 / query.shape[-1],
    center_keys=False,
  )
  eps = polynomial_error(polynomial_coefficients(degree, radius), radius)
  # (B, K, Hv), and one head: errors (B, T, 1, Hv) by query.
  bound = np.maximum(attention_error_bound(eps, value)[:, None], _ROUNDING)
  error = np.abs(np.asarray(out - exact))
  return float(error.max()), float(bound.max()), float((error / bound).max())


def limit_point(config: Config, eps: float) -> dict[str, Any]:
  """Where a further even degree fits: log2 n, and the largest B for it.

  With H = log2 n, degree g fits if C(H + g, g) <= n. The largest radius that it
  serves, B^2, is where its relative error is ``eps``.
  """
  steps: dict[int, int] = {}
  for log_n in range(*config.exponents):
    fits = [g for g in range(2, 40, 2) if feature_count(log_n, g) <= 2**log_n]
    if fits:
      steps.setdefault(max(fits), log_n)
  limits = [math.sqrt(_largest_radius(g, eps)) for g in steps]
  # As many entries for each eps: the degrees do not depend on it.
  return {"log_n": list(steps.values()), "degree": list(steps), "b": limits}


def _largest_radius(degree: int, eps: float) -> float:
  def excess(radius: float) -> float:
    coefficients = polynomial_coefficients(degree, radius)
    return math.log(polynomial_error(coefficients, radius) / eps)

  found = optimize.root_scalar(excess, bracket=(1e-2, 12.0), xtol=1e-6)
  return float(found.root)


def gradient_point(config: Config) -> dict[str, list[float]]:
  """Relative error of the gradient by degree, of each backward mode."""
  n, dim = config.gradient_length, config.gradient_dim
  with jax.enable_x64(True):
    rngs = jax.random.split(_key(config, 0), 2)
    arrays = _uniform(rngs[0], (3, 1, n, 1, dim))
    cotangent = jax.random.normal(rngs[1], (1, n, 1, dim))
    pull = functools.partial(_pullback, arrays=arrays, cotangent=cotangent)
    exact = pull(functools.partial(softmax_attention, scale=1 / dim))
    attend = functools.partial(
      polynomial_attention, radius=1.0, scale=1 / dim, center_keys=False
    )
    return {
      backward: [
        _relative(
          exact, pull(functools.partial(attend, degree=g, backward=backward))
        )
        for g in harness.progress(config.degrees, f"gradient, {backward}")
      ]
      for backward in _BACKWARDS
    }


def _pullback(
  attend: Callable[..., Any], *, arrays: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, ...]:
  call = jax.jit(lambda q, k, v, w: jax.vjp(attend, q, k, v)[1](w))
  return call(*arrays, cotangent)


def _relative(
  exact: tuple[jax.Array, ...], got: tuple[jax.Array, ...]
) -> float:
  """Largest error over the largest entry, of query, key or value."""
  return max(
    float(jnp.abs(e - g).max() / jnp.abs(e).max())
    for e, g in zip(exact, got, strict=True)
  )


def _uniform(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.random.uniform(rng, shape, minval=-1.0, maxval=1.0)


def _key(config: Config, n: int) -> jax.Array:
  return jax.random.fold_in(jax.random.key(config.seed), n)


# --- checks ---


def _slopes(
  config: Config,
  mode: str,
  times: dict[str, Any],
  exact: bool,
  most: float = math.inf,
) -> dict[str, float]:
  """Exponents of n from ``slope_from`` to ``most``, by contestant."""
  lengths = np.array(_grid(config, mode)[1])
  used = (lengths >= config.slope_from) & (lengths <= most)
  slopes = {}
  for name, seconds in times.items():
    if name.startswith("exact") == exact:
      # The longest are not timed for all.
      shown = used[: len(seconds)]
      x = lengths[: len(seconds)][shown]
      slopes[name] = fit_slope(x, seconds[shown]).slope
  return slopes


def _slope_checks(
  config: Config, times: dict[str, dict[str, np.ndarray]]
) -> list[harness.Check]:
  checks = []
  for mode in _MODES:
    for exact in (False, True):
      slopes = _slopes(config, mode, times[mode], exact).values()
      name = "exact" if exact else "polynomial"
      accepted = config.accepted["quadratic_slope" if exact else "linear_slope"]
      for which, extreme in (("least", min), ("greatest", max)):
        label = f"{which} slope of time, {name}, {mode}"
        checks.append(harness.Check(label, extreme(slopes), *accepted))
    if config.long_lengths:
      most = config.lengths[-1]
      slopes = _slopes(config, mode, times[mode], False, most).values()
      for which, extreme in (("least", min), ("greatest", max)):
        label = f"{which} slope of time, polynomial, {mode}, to n={most}"
        checks.append(harness.Check(label, extreme(slopes)))
  return checks


def _crossovers(
  config: Config, times: dict[str, dict[str, np.ndarray]]
) -> dict[Sizes, float]:
  lengths = np.array(config.lengths)
  forward = times["forward"]
  return {
    (d, g): crossover(
      lengths, forward[f"exact {d}"], forward[f"{d}, {g}"][: len(lengths)]
    )
    for d, g in config.sizes
  }


def _crossover_checks(
  config: Config, times: dict[str, dict[str, np.ndarray]]
) -> list[harness.Check]:
  checks = []
  for (d, g), n in _crossovers(config, times).items():
    label = f"polynomial wins from n, H={d}, degree {g}"
    checks.append(harness.Check(f"{label} (m={feature_count(d, g)})", n))
  for mode in _MODES_OF_FIGURE:
    for d, g in config.sizes:
      exact, ours = times[mode][f"exact {d}"], times[mode][f"{d}, {g}"]
      ratio = exact[-1] / ours[len(exact) - 1]
      label = f"exact / polynomial, {mode}, H={d}, degree {g}"
      checks.append(
        harness.Check(f"{label}, n={config.lengths[-1]}", float(ratio))
      )
  return checks


def _error_checks(
  config: Config, errors: dict[str, np.ndarray]
) -> list[harness.Check]:
  above = errors["bound"] > 100 * _ROUNDING
  used = errors["used"]
  return [
    harness.Check(
      "largest error over its bound",
      used.max(),
      *config.accepted.error_over_bound,
    ),
    harness.Check("median error over its bound", np.median(used[above])),
  ]


def _limit_checks(
  config: Config, limits: dict[str, np.ndarray]
) -> list[harness.Check]:
  checks = []
  for eps, log_n, b in zip(config.eps, limits["log_n"], limits["b"]):
    # A straight line, not through 0: degree and radius differ by a constant.
    r_squared = float(np.corrcoef(log_n, b**2)[0, 1] ** 2)
    checks += [
      harness.Check(
        f"square of the largest B against log n, R squared, error {eps:g}",
        r_squared,
        config.accepted.limit_r_squared,
      ),
      harness.Check(
        f"slope of the largest B in log n, relative error {eps:g}",
        fit_slope(log_n, b).slope,
      ),
    ]
  return checks


def _gradient_checks(
  config: Config, gradients: dict[str, np.ndarray]
) -> list[harness.Check]:
  surrogate, closed = (gradients[name] for name in _BACKWARDS)
  gains = {
    name: (gradients[name][:-1] / gradients[name][1:]).min()
    for name in _BACKWARDS
  }
  low = config.accepted.gradient_gain
  return [
    *(
      harness.Check(f"gradient, least gain by two degrees, {name}", gain, low)
      for name, gain in gains.items()
    ),
    harness.Check(
      "gradient error, surrogate of degree g+2 over closed form of g",
      (surrogate[1:] / closed[:-1]).max(),
      *config.accepted.surrogate_over_closed,
    ),
    harness.Check(
      "gradient error, surrogate over closed form, largest",
      (surrogate / closed).max(),
    ),
  ]


# --- figure ---


def _figure_data(
  config: Config, times: dict[str, dict[str, np.ndarray]], *panels: Any
) -> dict[str, Any]:
  data = {
    f"seconds, {mode}, {name}": seconds
    for mode, by_name in times.items()
    for name, seconds in by_name.items()
  }
  for name, panel in zip(("error", "limit", "gradient"), panels, strict=True):
    data |= {f"{name}, {key}": x for key, x in panel.items()}
  keys = ("lengths", "long_lengths", "bounds", "degrees", "eps")
  return data | {key: config[key] for key in keys}


def _draw(
  config: Config,
  times: dict[str, dict[str, np.ndarray]],
  errors: dict[str, np.ndarray],
  limits: dict[str, np.ndarray],
  gradients: dict[str, np.ndarray],
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(3, 2, figsize=(12.5, 14))
  _draw_times(axes[0, 0], config, times)
  _draw_gain(axes[0, 1], config, times)
  _draw_crossover(axes[1, 0], config, times)
  _draw_limits(axes[1, 1], config, limits)
  _draw_errors(axes[2, 0], config, errors)
  _draw_gradients(axes[2, 1], config, gradients)
  return figure


def _draw_times(
  ax: Axes, config: Config, times: dict[str, dict[str, np.ndarray]]
) -> None:
  dim, degree = config.shown
  for i, name in enumerate((f"exact {dim}", f"{dim}, {degree}")):
    for mode in _MODES_OF_FIGURE:
      slope = _slopes(config, mode, times[mode], exact=i == 0)[name]
      what = "polynomial" if i else "exact"
      seconds = times[mode][name]
      ax.loglog(
        _grid(config, mode)[1][: len(seconds)],
        1000 * seconds,
        "o-" if mode == "forward" else "s--",
        color=harness.PALETTE[i],
        label=f"{what}, {mode}: $n^{{{slope:.2f}}}$",
      )
  ax.set(
    title=f"Time: n instead of $n^2$ (H = {dim}, degree {degree})",
    xlabel="n, number of tokens",
    ylabel="milliseconds",
  )
  _powers_of_two(ax, (*config.lengths, *config.long_lengths))
  ax.legend()


def _draw_gain(
  ax: Axes, config: Config, times: dict[str, dict[str, np.ndarray]]
) -> None:
  lengths, seconds = config.lengths, times["forward"]
  gains = {
    (d, g): seconds[f"exact {d}"] / seconds[f"{d}, {g}"][: len(lengths)]
    for d, g in config.sizes
  }
  heights = _spread([gain[-1] for gain in gains.values()], 1.45)
  for ((d, g), gain), height, color in zip(
    gains.items(), heights, harness.PALETTE
  ):
    ax.loglog(lengths, gain, "o-", color=color)
    place = (1.12 * lengths[-1], height)
    ax.annotate(f"H={d}, g={g}", place, color=color, va="center")
  ax.axhline(1, color="#6b7480", linewidth=1, linestyle="--")
  ax.set(
    title="How many times faster than exact attention",
    xlabel="n, number of tokens",
    ylabel="exact / polynomial, forward",
    xlim=(lengths[0] / 1.3, lengths[-1] * 3.2),
  )
  _powers_of_two(ax, lengths)


def _draw_crossover(
  ax: Axes, config: Config, times: dict[str, dict[str, np.ndarray]]
) -> None:
  found = _crossovers(config, times)
  m = np.array([feature_count(*size) for size in found])
  n = np.array(list(found.values()))
  inside = (n > config.lengths[0]) & (n < config.lengths[-1])
  ends = np.array([m.min() / 1.6, m.max() * 1.6])
  for factor, style in ((1, ":"), (4, "--")):
    label = f"n = {factor} m" if factor > 1 else "n = m"
    ax.loglog(ends, factor * ends, style, color="#6b7480", label=label)
  for shown, marker, label in (
    (inside, "o", "crossover"),
    (n <= config.lengths[0], "v", "there or below"),
    (n >= config.lengths[-1], "^", "there or above"),
  ):
    if shown.any():
      ax.loglog(
        m[shown],
        n[shown],
        marker,
        color=harness.PALETTE[0],
        markersize=8,
        label=label,
      )
  # Of two with nearly as many features the upper one is named above, the other
  # one below.
  for j, (d, g) in enumerate(config.sizes):
    close = [k for k in range(len(m)) if 0.6 < m[k] / m[j] < 1.7]
    is_upper = j == max(close, key=lambda k: (n[k], m[k]))
    ax.annotate(
      f"H={d}, g={g}",
      (m[j], n[j]),
      xytext=(0, 10 if is_upper else -18),
      ha="center",
      textcoords="offset points",
    )
  ax.set(
    title="From which n on it pays",
    xlabel="m = C(H + g, g), number of features",
    ylabel="n where both take the same time",
  )
  _ticks(ax.set_xticks, [t for t in _TICKS if ends[0] < t < ends[1]])
  ax.legend(loc="lower right")


def _draw_errors(
  ax: Axes, config: Config, errors: dict[str, np.ndarray]
) -> None:
  labels = [f"degree {degree}" for degree in config.degrees]
  harness.plot_bounded_errors(
    ax, config.bounds, errors["error"], errors["bound"], labels
  )
  ax.set(
    xlabel="B, bound on the entries of query and key", ylim=(_ROUNDING, 10)
  )
  ax.legend(loc="lower right")


def _draw_limits(
  ax: Axes, config: Config, limits: dict[str, np.ndarray]
) -> None:
  for eps, log_n, b, color in zip(
    config.eps, limits["log_n"], limits["b"], harness.PALETTE
  ):
    fit = fit_slope(log_n, b)
    line = math.exp(fit.intercept) * log_n.astype(float) ** fit.slope
    ax.loglog(log_n, line, color=color, alpha=0.55)
    ax.loglog(
      log_n,
      b,
      "o",
      color=color,
      label=rf"error {eps:g}: $(\log\,n)^{{{fit.slope:.2f}}}$",
    )
  for x, y, degree in zip(
    limits["log_n"][0], limits["b"][0], limits["degree"][0]
  ):
    ax.annotate(
      f"g={degree}",
      (x, y),
      xytext=(0, 9),
      ha="center",
      textcoords="offset points",
    )
  ax.set(
    title="Largest B with no more features than tokens",
    xlabel="$\\log_2\\, n$ = H",
    ylabel="B",
  )
  _ticks(ax.set_xticks, limits["log_n"][0])
  _ticks(ax.set_yticks, (0.5, 1, 1.5, 2, 3))
  ax.legend(loc="lower right")


def _draw_gradients(
  ax: Axes, config: Config, gradients: dict[str, np.ndarray]
) -> None:
  for name, color in zip(_BACKWARDS, harness.PALETTE):
    label = name.replace("_", " ")
    ax.semilogy(config.degrees, gradients[name], "o-", color=color, label=label)
  ax.set(
    title="Error of the gradient, relative to its largest entry",
    xlabel="degree",
    ylabel="largest relative error",
    xticks=config.degrees,
  )
  ax.legend()


def _ticks(place: Callable[..., Any], values: Any) -> None:
  """Labels these values of a logarithmic axis, and no others."""
  place(values, [f"{x:g}" for x in values])
  place([], minor=True)


def _spread(values: list[float], ratio: float) -> list[float]:
  """The values, moved up to be ``ratio`` times the next smaller at least."""
  moved: dict[int, float] = {}
  least = 0.0
  for i in np.argsort(values):
    moved[int(i)] = max(values[i], least)
    least = moved[int(i)] * ratio
  return [moved[i] for i in range(len(values))]


def _powers_of_two(ax: Axes, lengths: tuple[int, ...]) -> None:
  labels = [f"$2^{{{n.bit_length() - 1}}}$" for n in lengths]
  ax.set_xticks(lengths, labels)
  ax.set_xticks([], minor=True)


if __name__ == "__main__":
  harness.main(run, "polynomial-attention")
