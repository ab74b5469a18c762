"""NTK-Attention: what a long prefix learns, and what stands in for it.

Three parts, ``config.parts``, on arXiv 2406.14036:

* ``training``: gradient descent on the m columns of a prefix. The longer the
  prefix, the less each column and the tangent kernel move, and the closer the
  loss follows the prediction of a fixed kernel.
* ``approximation``: outputs of attention to a state against attention to the
  prefix that it was made of, by length of the prefix and by feature map. The
  absolute error falls with the length for a trivial reason, since random values
  average out; relative errors are shown, beside that of dropping the prefix.
* ``tuning``: an encoder trained on the digits 0 to 4 is frozen and adapted to
  5 to 9 by its last layer, LoRA, a prefix, or a state.
"""

import functools
import itertools
import math
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

from experiments import _ntk_tuning as tuning
from experiments import harness
from jaxattn.attention import (
  PrefixState,
  fit_prefix_state,
  ntk_attention,
  prefix_attention,
  prefix_state_init,
  prefix_state_update,
  softmax_attention,
)
from jaxattn.features import (
  FeatureMap,
  attention_error_bound,
  favor_map,
  feature_count,
  taylor_map,
)
from jaxattn.ntk import linearized_loss, tied_prefix_ntk, tied_prefix_output
from jaxattn.scaling import fit_slope

_MANY_COLORS = "#6b7480", *harness.PALETTE, "#1b1f24"
_PARTS = ("training", "approximation", "tuning")

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Point = dict[str, Any]


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  harness.check_parts(config, _PARTS)
  wd = harness.open_workdir(workdir, config)
  harness.use_style()
  training = _draw_losses, _draw_changes, _draw_rates
  errors = [functools.partial(_draw_errors, dim) for dim in config.head_dims]
  checks, values, panels = [], {}, []
  for part, compute, check, draw in (
    ("training", _training, _training_checks, training),
    ("approximation", _approximation, _approximation_checks, errors),
    ("tuning", _tuning, _tuning_checks, [_draw_tuning]),
  ):
    if part in config.parts:
      values |= compute(wd)
      checks += check(config, values)
      panels += draw
  harness.save_figure(wd, _draw(panels, config, values), values)
  return harness.finish(
    wd,
    claim=(
      "Training an ever longer prefix becomes kernel regression, and one state "
      "of fixed size stands in for a prefix of any length, also when trained."
    ),
    source="arXiv:2406.14036, abstract",
    paper=(
      "a long prefix converges in the NTK regime; NTK-Attention does as well "
      "as prefixes and LoRA or better"
    ),
    checks=checks,
  )


# --- training of a prefix ---


def _training(wd: harness.Workdir) -> Point:
  config: Config = wd.config
  points = [
    wd.point(f"training/m={m}", functools.partial(training_point, config, m))
    for m in harness.progress(config.columns, "columns")
  ]
  values = {name: np.stack([p[name] for p in points]) for name in points[0]}
  return values | wd.point("rates", functools.partial(rates_point, config))


def training_point(config: Config, m: int) -> Point:
  """What each seed did, with paired and with random signs."""
  # Data depend on the seed alone: losses of all lengths can be compared.
  rng = jax.random.key(config.seed)
  paired = np.repeat([True, False], config.num_seeds)
  seeds = np.tile(np.arange(config.num_seeds), 2)
  results = _runs(
    config, rng, m, config.num_steps, seeds, paired, np.ones(len(seeds))
  )
  return {
    f"{name}_{key}": value[paired == (name == "paired")]
    for key, value in results.items()
    for name in ("paired", "random")
  }


def rates_point(config: Config) -> Point:
  """By rate: share of seeds whose loss never rises, losses of the first."""
  rng = jax.random.key(config.seed)
  num = config.num_seeds
  rates = np.repeat(config.rates, num)
  seeds = np.tile(np.arange(num), len(config.rates))
  args = config.rate_columns, config.rate_steps, seeds, seeds >= 0, rates
  losses = _runs(config, rng, *args)["losses"]
  losses = losses.reshape(len(config.rates), num, -1)
  falls = (np.diff(losses) <= 0).all(-1).mean(-1)
  return {"falls": falls, "rate_losses": losses[:, 0]}


def _runs(
  config: Config,
  rng: jax.Array,
  length: int,
  num_steps: int,
  seeds: np.ndarray,
  paired: np.ndarray,
  rates: np.ndarray,
) -> Point:
  # Losses are compared to 1e-5 of themselves, f is a sum of m canceling terms.
  with jax.enable_x64(True):

    def run(x: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
      seed, paired, rate = x
      return train_tied_prefix(
        jax.random.fold_in(rng, seed),
        paired,
        rate,
        length=length,
        num_data=config.num_data,
        dim=config.dim,
        num_steps=num_steps,
      )

    return jax.device_get(lax.map(run, (seeds, paired, rates)))


@functools.partial(
  jax.jit, static_argnames=("length", "num_data", "dim", "num_steps")
)
def train_tied_prefix(
  rng: jax.Array,
  paired: bool | jax.Array,
  rate: float | jax.Array,
  *,
  length: int,
  num_data: int,
  dim: int,
  num_steps: int,
) -> dict[str, jax.Array]:
  """Gradient descent on the columns of a tied prefix, f = length * output.

  Args:
    rng: key of the prefix and of the data, unit inputs and unit targets.
    paired: columns come in pairs of opposite signs, so that f starts at 0;
      otherwise signs are random, and targets are relative to the start.
    rate: step size, in units of 1 / lambda_max of the first kernel of f.
    length: m, number of columns; even.
    num_data: n.
    dim: d.
    num_steps: steps to take.

  Returns:
    "losses" and "predicted" (num_steps + 1,), "moved" and "kernel_change" ().
  """
  rng_w, rng_a, rng_x, rng_y = jax.random.split(rng, 4)
  w = jax.random.normal(rng_w, (length, dim))
  a = jax.random.rademacher(rng_a, (length,), w.dtype)
  half = length // 2
  w = jnp.where(paired, jnp.tile(w[:half], (2, 1)), w)
  a = jnp.where(paired, jnp.where(jnp.arange(length) < half, 1.0, -1.0), a)
  x, y = (_unit(jax.random.normal(r, (num_data, dim))) for r in (rng_x, rng_y))
  y = y + length * tied_prefix_output(w, a, x)
  kernel = tied_prefix_ntk(w, a, x)
  eigenvalues = jnp.linalg.eigvalsh(kernel.reshape(num_data * dim, -1))
  step_size = rate / (length * eigenvalues[-1])

  def loss(w: jax.Array) -> jax.Array:
    error = length * tied_prefix_output(w, a, x) - y
    return jnp.square(error).sum() / 2

  def step(w: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
    value, gradient = jax.value_and_grad(loss)(w)
    return w - step_size * gradient, value

  last, losses = lax.scan(step, w, length=num_steps)
  residual = y - length * tied_prefix_output(w, a, x)
  change = tied_prefix_ntk(last, a, x) - kernel
  predicted = linearized_loss(kernel, residual, length * step_size, num_steps)
  return {
    "losses": jnp.append(losses, loss(last)),
    "predicted": predicted,
    "moved": jnp.linalg.norm(last - w),
    "smallest": eigenvalues[0],
    "kernel_change": jnp.linalg.norm(change) / jnp.linalg.norm(kernel),
  }


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def geometric_mean(x: np.ndarray) -> np.ndarray:
  """Over seeds, the second axis."""
  return np.exp(np.log(x).mean(1))


def _training_checks(config: Config, values: Point) -> list[harness.Check]:
  fitted = np.array(config.columns) >= config.fit_from
  columns = np.array(config.columns)[fitted]
  slopes = {
    name: fit_slope(columns, geometric_mean(values[name])[fitted]).slope
    for name in ("paired_moved", "paired_kernel_change", "random_kernel_change")
  }
  ratio = values["random_kernel_change"] / values["paired_kernel_change"]
  last = np.log(values["paired_losses"] / values["paired_predicted"])[..., -1]
  accepted = config.accepted
  return [
    harness.Check(
      "slope of |W_T - W_0| in m", slopes["paired_moved"], *accepted.move_slope
    ),
    harness.Check(
      "slope of |H_T - H_0| / |H_0| in m",
      slopes["paired_kernel_change"],
      *accepted.kernel_slope,
    ),
    harness.Check("the same with random signs", slopes["random_kernel_change"]),
    harness.Check(
      "kernel change, random over paired signs, largest m",
      geometric_mean(ratio)[-1],
      *accepted.kernel_ratio,
    ),
    *(
      harness.Check(f"smallest eigenvalue of the kernel, m={m}", smallest)
      for m, smallest in zip(
        config.columns,
        geometric_mean(values["paired_smallest"]),
        strict=True,
      )
    ),
    harness.Check(
      "log of loss over prediction, largest m",
      np.abs(last[-1]).max(),
      *accepted.log_loss_gap,
    ),
    *(
      harness.Check(
        f"share of seeds whose loss never rises, rate {rate:g}",
        share,
        *((1.0, 1.0) if rate < 2 else (0.0, 0.0)),
      )
      for rate, share in zip(config.rates, values["falls"], strict=True)
    ),
  ]


# --- a state against its prefix ---


def _approximation(wd: harness.Workdir) -> Point:
  config: Config = wd.config
  values = {}
  for head_dim in config.head_dims:
    point = wd.point(
      f"approximation/H={head_dim}",
      functools.partial(approximation_point, config, head_dim),
    )
    values |= {f"{name}_{head_dim}": v for name, v in point.items()}
  return values


def approximation_point(config: Config, head_dim: int) -> Point:
  """Errors (lengths,) of each map, and of what bounds them."""
  with jax.enable_x64(True):
    return _approximation_point(config, head_dim)


def _approximation_point(config: Config, head_dim: int) -> Point:
  rng = jax.random.fold_in(jax.random.key(config.seed), head_dim)
  rngs = jax.random.split(rng, 4)
  lengths = config.num_queries, config.num_fit_queries, config.num_keys
  parts = np.cumsum((*lengths, max(config.lengths)))[:-1]
  shape = sum(lengths) + max(config.lengths), 1, head_dim
  points = jax.random.uniform(
    rngs[0], shape, minval=-config.radius, maxval=config.radius
  )
  query, fit_query, key, prefix_key = jnp.split(points, parts)
  values = jax.random.uniform(rngs[1], shape, minval=-1.0, maxval=1.0)
  *_, value, prefix_value = jnp.split(values, parts)
  maps: dict[str, str | FeatureMap] = {
    f"taylor_{g}": taylor_map(g) for g in _degrees(config, head_dim)
  }
  maps |= {
    "elu": "elu",
    "favor": favor_map(rngs[2], head_dim, config.favor_features),
  }
  states = {
    name: prefix_state_init(
      1, _num_features(name, head_dim, config), head_dim, dtype=query.dtype
    )
    for name in maps
  }
  rows: dict[str, list[Any]] = {}
  before = 0
  for m in harness.progress(config.lengths, f"prefixes, H = {head_dim}"):
    prefix = prefix_key[:m], prefix_value[:m]
    exact = prefix_attention(query, key, value, *prefix)
    dropped: Any = softmax_attention(query, key, value)
    outs = {"drop": dropped}
    for name, feature_map in maps.items():
      # Only the tokens that are new since the last length.
      new = (x[before:m] for x in prefix)
      states[name] = prefix_state_update(
        states[name], *new, feature_map=feature_map
      )
      outs[name] = ntk_attention(
        query,
        key,
        value,
        states[name],
        feature_map=feature_map,
        allow_odd=True,
      )
    fitted = _fit_elu(fit_query, key, value, *prefix)
    outs["elu_fitted"] = ntk_attention(query, key, value, fitted)
    for name, out in outs.items():
      error = jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)
      rows.setdefault(name, []).append(float(error))
    for degree in _degrees(config, head_dim):
      worst = jnp.abs(outs[f"taylor_{degree}"] - exact).max()
      epsilon = kernel_error(query, prefix[0], degree)
      largest = jnp.maximum(jnp.abs(value).max(), jnp.abs(prefix[1]).max())
      bound = 2 * epsilon / (1 - epsilon) * largest
      bound = jnp.where(epsilon < 1, bound, jnp.nan)
      values_all = jnp.concatenate((value, prefix[1]))
      tight = attention_error_bound(jnp.minimum(epsilon, 1), values_all)
      error = jnp.abs(outs[f"taylor_{degree}"] - exact).max(0)
      relative = rows[f"taylor_{degree}"][-1]
      for name, used in (
        ("used", worst / bound),
        ("relative_used", relative / bound),
        ("tight_used", (error / tight).max()),
      ):
        rows.setdefault(f"{name}_{degree}", []).append(float(used))
    before = m
  return {name: np.array(row) for name, row in rows.items()}


def _degrees(config: Config, head_dim: int) -> tuple[int, ...]:
  return config.degrees[config.head_dims.index(head_dim)]


def _num_features(name: str, head_dim: int, config: Config) -> int:
  if name.startswith("taylor"):
    return feature_count(head_dim, int(name.split("_")[1]))
  return config.favor_features if name == "favor" else head_dim


@functools.partial(jax.jit, static_argnames="degree")
def kernel_error(
  query: jax.Array, prefix_key: jax.Array, degree: int
) -> jax.Array:
  """Largest relative error of the Taylor polynomial over all logits."""
  s = jnp.einsum("tnh,mnh->tm", query, prefix_key) / query.shape[-1] ** 0.5
  terms = (s**j / math.factorial(j) for j in range(degree + 1))
  return jnp.abs(sum(terms) * jnp.exp(-s) - 1).max()


def _fit_elu(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  prefix_key: jax.Array,
  prefix_value: jax.Array,
) -> PrefixState:
  prefix = prefix_key, prefix_value
  target = prefix_attention(query, key, value, *prefix)
  _, log_mass = softmax_attention(query, *prefix, return_residual=True)
  return fit_prefix_state(query, key, value, target, log_mass=log_mass)


def _approximation_checks(config: Config, values: Point) -> list[harness.Check]:
  checks = []
  for head_dim, degrees in zip(config.head_dims, config.degrees):
    for name, label in (
      ("used", "largest error over its bound"),
      ("tight_used", "the same over the tight bound"),
      # The bound is one on the absolute error; the paper's figure is relative.
      ("relative_used", "largest relative error over that bound"),
    ):
      used = np.stack([values[f"{name}_{g}_{head_dim}"] for g in degrees])
      label = f"{label}, H={head_dim}"
      checks.append(harness.Check(label, used.max(), *config.accepted.bound))
    errors = np.stack([values[f"taylor_{g}_{head_dim}"] for g in degrees])
    checks.append(
      harness.Check(
        f"greatest growth of the error from one degree to the next, "
        f"H={head_dim}",
        (errors[1:] / errors[:-1]).max(),
        *config.accepted.growth,
      )
    )
    for name in (f"taylor_{degrees[-1]}", "elu", "elu_fitted", "favor", "drop"):
      error = values[f"{name}_{head_dim}"][-1]
      label = f"relative error at m={config.lengths[-1]}, H={head_dim}, {name}"
      checks.append(harness.Check(label, error))
  return checks


# --- fine-tuning ---


def _tuning(wd: harness.Workdir) -> Point:
  config = wd.config
  base = wd.point("tuning/base", functools.partial(tuning.base_point, config))
  values = {"base_accuracy": base.pop("accuracy")}
  base = {name: jnp.asarray(x) for name, x in base.items()}
  for name in harness.progress(tuning.methods(config), "methods"):
    point = wd.point(
      f"tuning/{name}",
      functools.partial(tuning.tuning_point, config, name, base),
    )
    values |= {f"{name}_{key}": value for key, value in point.items()}
  return values


def _tuning_checks(config: Config, values: Point) -> list[harness.Check]:
  points = {
    name: 100 * values[f"{name}_accuracy"].mean()
    for name in tuning.methods(config)
  }
  short = f"prefix_{config.prefix_lengths[0]}"
  # Images that the test does not see decide how a state should start.
  start = max(
    ("state", "state_empty"), key=lambda n: values[f"{n}_held_out"].mean()
  )
  checks = [
    harness.Check(f"accuracy of {name}, points", value)
    for name, value in points.items()
  ]
  checks += [
    harness.Check(f"rate of {name}", values[f"{name}_rate"]) for name in points
  ]
  checks += [
    harness.Check(
      f"parameters of {name} beside the last layer",
      values[f"{name}_num_params"],
    )
    for name in points
  ]
  return [
    harness.Check(
      "accuracy of the encoder on 0-4, points", 100 * values["base_accuracy"]
    ),
    *checks,
    harness.Check(
      f"state minus {short}, points of accuracy",
      points[start] - points[short],
      *config.accepted.over_prefix,
    ),
    harness.Check(
      "state minus head alone, points of accuracy",
      points[start] - points["head"],
      *config.accepted.over_head,
    ),
  ]


# --- figure ---


def _draw(
  panels: list[Callable[[Axes, Config, Point], None]],
  config: Config,
  values: Point,
) -> Figure:
  columns = min(3, len(panels))
  rows = -(-len(panels) // columns)
  size = 5.6 * columns, 4.7 * rows
  figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
  for ax, panel in zip(axes.flat, panels):
    panel(ax, config, values)
  for ax in axes.flat[len(panels) :]:
    ax.remove()
  return figure


def _draw_losses(ax: Axes, config: Config, values: Point) -> None:
  colors = itertools.cycle(harness.PALETTE)
  for i, color in zip(range(len(config.columns)), colors):
    label = f"m = {config.columns[i]}"
    ax.semilogy(values["paired_losses"][i, 0], color=color, label=label)
    ax.semilogy(values["paired_predicted"][i, 0], "--", color="black", lw=1)
  ax.set(
    title="A fixed kernel predicts the training",
    xlabel="step of gradient descent",
    ylabel="loss, first seed",
  )
  _legend_below(ax, "columns of the prefix; dashed: prediction")


def _draw_changes(ax: Axes, config: Config, values: Point) -> None:
  fitted = np.array(config.columns) >= config.fit_from
  columns = np.array(config.columns)
  for name, label in (
    ("paired_moved", "columns, |W - W0|"),
    ("random_kernel_change", "kernel, random signs"),
    ("paired_kernel_change", "kernel, paired signs"),
  ):
    change = geometric_mean(values[name])
    fit = fit_slope(columns[fitted], change[fitted])
    (dots,) = ax.loglog(
      columns, change, "o", label=f"{label}: slope {fit.slope:.2f}"
    )
    ends = columns[fitted][[0, -1]]
    line = np.exp(fit.intercept) * ends**fit.slope
    ax.loglog(ends, line, color=dots.get_color(), alpha=0.55)
  bottom, top = ax.get_ylim()
  ax.set(
    title="Longer prefixes move less",
    xlabel="m, columns of the prefix",
    ylabel="change by training, mean over seeds",
    ylim=(bottom, top * 20),
  )
  _powers_of_two(ax, config.columns)
  ax.legend(loc="upper right")


def _draw_rates(ax: Axes, config: Config, values: Point) -> None:
  for rate, losses, color in zip(
    config.rates, values["rate_losses"], harness.PALETTE
  ):
    ax.semilogy(losses, color=color, label=f"{rate:g}")
  ax.set(
    title="Above 2 / $\\lambda_{max}$ the loss rises first",
    xlabel="step of gradient descent",
    ylabel=f"loss, first seed, m = {config.rate_columns}",
  )
  ax.legend(title="rate times $\\lambda_{max}$")


def _draw_errors(
  head_dim: int, ax: Axes, config: Config, values: Point
) -> None:
  degrees = _degrees(config, head_dim)
  names = {f"taylor_{g}": f"Taylor, degree {g}" for g in degrees}
  names = {
    "drop": "no prefix at all",
    "elu": "elu, summed",
    "elu_fitted": "elu, fitted",
    "favor": f"{config.favor_features} random features",
  } | names
  styles = ["--", ":", ":", "-."] + ["-"] * len(degrees)
  for (name, label), style, color in zip(names.items(), styles, _MANY_COLORS):
    error = values[f"{name}_{head_dim}"]
    ax.loglog(config.lengths, error, style, color=color, label=label)
  features = ", ".join(str(feature_count(head_dim, g)) for g in degrees)
  ax.set(
    title=f"Error of a state, heads of {head_dim}",
    xlabel="m, length of the prefix",
    ylabel="relative error of the output",
  )
  _powers_of_two(ax, config.lengths)
  _legend_below(ax, f"Taylor features: {features}")


def _draw_tuning(ax: Axes, config: Config, values: Point) -> None:
  labels = {
    "head": "last layer alone",
    "lora": f"LoRA, rank {config.lora_rank}",
    **{f"prefix_{m}": f"prefix of {m}" for m in config.prefix_lengths},
    "state": "state",
    "state_empty": "state, at first empty",
    "state_low_rank": f"state, rank {config.state_rank}",
  }
  for (name, label), color in zip(labels.items(), _MANY_COLORS):
    points = 100 * values[f"{name}_accuracy"]
    size = values[f"{name}_num_params"]
    ax.plot([size] * len(points), points, "o", color=color, label=label)
    bar = {"marker": "_", "markersize": 26, "markeredgewidth": 2}
    ax.plot(size, points.mean(), color=color, markeredgecolor=color, **bar)
  # Linear below, so that the method that adds nothing has a place.
  ax.set_xscale("symlog", linthresh=500)
  ax.set(
    title="Digits 5 to 9, encoder of 0 to 4 frozen",
    xlabel="trained parameters beside the last layer",
    ylabel="accuracy on test images, %",
  )
  ax.set_xticks([0, 1000, 10_000], ["0", "$10^3$", "$10^4$"])
  _legend_below(ax, "dot: a run, bar: mean")


def _legend_below(ax: Axes, title: str) -> None:
  anchor = (0.5, -0.16)
  ax.legend(title=title, loc="upper center", bbox_to_anchor=anchor, ncols=2)


def _powers_of_two(ax: Axes, values: tuple[int, ...]) -> None:
  labels = [f"$2^{{{n.bit_length() - 1}}}$" for n in values]
  ax.set_xticks(values, labels)
  ax.xaxis.set_minor_locator(ticker.NullLocator())


if __name__ == "__main__":
  harness.main(run, "ntk-attention")
