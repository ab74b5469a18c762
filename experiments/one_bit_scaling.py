"""Networks of signs against their twins of full precision.

Four questions about arXiv 2411.01663:

1. How do the gap to the twin and both errors change with the width, on digits?
2. Are errors power laws of size, of data and of compute, and of which exponent?
3. Which kernel predicts how outputs move in training?
4. The same on targets that are functions: sines, a logarithm, an exponential, a
   polynomial.

Tier full also times a layer of packed signs.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import special

from experiments import harness
from jaxattn.data import load_digits
from jaxattn.ntk import descent_recursion, mlp_ntk, one_bit
from jaxattn.ntk.one_bit.table import largest_eigenvalue
from jaxattn.numerics import pack_signs
from jaxattn.scaling import (
  JointPowerLaw,
  PowerLaw,
  fit_joint_power_law,
  fit_power_law,
  fit_slope,
  lower_envelope,
  sweep,
)

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Arrays = dict[str, np.ndarray]
Data = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

# Exponents of language models, arXiv 2001.08361: printed beside, not expected.
_KAPLAN = {"size": 0.076, "data": 0.095, "compute": 0.050}
_TARGETS = ("sines", "logarithm", "exponential", "polynomial")


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  check_dims(config)
  wd = harness.open_workdir(workdir, config)
  data = digits(config)
  twins = _twins_by_width(wd, "digits", data, config.widths, config.num_steps)
  source = config.table_source
  table = _table(wd, data if source == "digits" else synthetic(config, source))
  path = wd.point("path", functools.partial(path_point, config))
  targets = {
    name: _twins_by_width(
      wd,
      f"targets/{name}",
      synthetic(config, name),
      config.synthetic_widths,
      config.synthetic_steps,
    )
    for name in _TARGETS
  }
  limit = wd.point("limit", functools.partial(limit_point, config, data))
  packed = wd.point("packed", functools.partial(packed_point, config))
  laws = power_laws(config, twins, table)
  figure = _draw(config, twins, limit, laws, path, targets, packed)
  harness.save_figure(
    wd,
    figure,
    _figure_data(config, twins, limit, table, path, targets, packed),
  )
  return harness.finish(
    wd,
    claim=(
      "A network of two layers whose hidden weights are signs, trained with "
      "straight-through gradients, comes near to its twin of full precision "
      "as the width grows, and its error is a power law of its size; c K_sec "
      "predicts how its outputs move, the straight-through kernel does not."
    ),
    source="arXiv:2411.01663, abstract",
    paper="the difference vanishes and the loss falls with size (no numbers)",
    checks=_checks(config, twins, limit, table, laws, path, targets),
  )


def check_dims(config: Config) -> None:
  """Raises UsageError where inputs are too short for kernels of signs."""
  for name in ("path_dim", "synthetic_dim"):
    if config[name] < 8:
      raise harness.UsageError(
        "sign kernels are meaningless for dim < 8, got "
        f"config.{name}={config[name]}"
      )


# --- data ---


def digits(config: Config) -> Data:
  """Centered images of norm 1, +1 for even digits; shuffled, cut in two."""
  pixels, labels = load_digits()
  order = np.random.default_rng(config.seed).permutation(len(pixels))
  x = pixels[order] - pixels[order][: config.num_train].mean(0)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  y = np.where(labels[order] % 2 == 0, 1.0, -1.0).astype(np.float32)
  return _cut(x, y, config.num_train, config.num_test)


def synthetic(config: Config, name: str) -> Data:
  """Random inputs of norm 1 and a function of them, standardized."""
  rng = np.random.default_rng([config.seed, _TARGETS.index(name)])
  d, (num_train, num_test) = config.synthetic_dim, config.synthetic_data
  x = rng.normal(size=(num_train + num_test, d))
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  u = rng.normal(size=d)
  y = {
    "sines": np.sin(np.pi * d**0.5 * x / 2).sum(1),
    "logarithm": np.log1p(np.abs(x @ u)),
    "exponential": np.exp(x @ u),
    "polynomial": (x @ u) ** 3 - 2 * (x @ u) ** 2 + x @ u,
  }[name]
  y = (y - y.mean()) / y.std()
  return _cut(x.astype(np.float32), y.astype(np.float32), num_train, num_test)


def _cut(x: Any, y: Any, n: int, num_test: int) -> Data:
  end = n + num_test
  x, y = jnp.asarray(x), jnp.asarray(y)
  return x[:n], y[:n], x[n:end], y[n:end]


def full_kernel(x1: jax.Array, x2: jax.Array | None = None) -> jax.Array:
  """The kernel of full precision and infinite width."""
  dim = float(x1.shape[1])
  return mlp_ntk(x1, x2, depth=1, weight_scale=dim, trainable="hidden")[1]


# --- twins ---


@functools.cache
def twins(num_steps: int, window: int) -> Callable[..., dict[str, jax.Array]]:
  """What a sweep calls: one start, trained both ways; the same each time."""

  def train(
    rng: jax.Array,
    width: int,
    x: jax.Array,
    y: jax.Array,
    x_test: jax.Array,
    y_test: jax.Array,
    rate: jax.Array,
  ) -> dict[str, jax.Array]:
    params = one_bit.init(rng, width, x.shape[1])
    c = one_bit.effective_rate().astype(x.dtype)
    logs, found = {}, {}
    for name, quantized in (("full", False), ("signs", True)):
      _, log = logs[name] = one_bit.train_one_bit(
        params,
        x,
        y,
        learning_rate=rate / c if quantized else rate,
        num_steps=num_steps,
        quantized=quantized,
        window=window,
        x_eval=x_test,
      )
      found[f"train, {name}"] = 2 * log.loss[-1] / len(x)
      found[f"train, {name}, averaged"] = 2 * log.loss_avg[-1] / len(x)
      found[f"test, {name}"] = jnp.square(log.f_eval[0] - y_test).mean()
      average = jnp.square(log.f_eval_avg[0] - y_test).mean()
      found[f"test, {name}, averaged"] = average
    pair = logs["signs"][1], logs["full"][1]
    for name, averaged in (("gap", False), ("gap, averaged", True)):
      gap = one_bit.generalization_difference(*pair, averaged=averaged)
      found[name] = gap[0]
    before, after = params.latent >= 0, logs["signs"][0].latent >= 0
    return found | {"flipped": (before != after).mean()}

  return train


def _twins_by_width(
  wd: harness.Workdir,
  name: str,
  data: Data,
  widths: tuple[int, ...],
  num_steps: int,
) -> Arrays:
  """(widths, seeds) of each number, a point of the store for each width."""
  config: Config = wd.config
  return harness.sweep_widths(
    wd,
    name,
    jax.random.key(config.seed),
    twins(num_steps, config.window),
    widths,
    config.num_seeds,
    args=(*data, learning_rate(config, data)),
  )


def learning_rate(config: Config, data: Data) -> jax.Array:
  """Of full precision.

  By power iteration, as data of tier full are too many for a decomposition.
  """
  return config.rate_fraction / largest_eigenvalue(data[0])


def limit_point(config: Config, data: Data) -> dict[str, Any]:
  """Errors of the kernel of full precision after as many steps."""
  x, y, x_test, y_test = data
  rate = learning_rate(config, data)
  error, alpha = descent_recursion(full_kernel(x), y, rate, config.num_steps)
  f_test = full_kernel(x_test, x) @ alpha
  return {
    "train": float(jnp.square(error).mean()),
    "test": float(jnp.square(f_test - y_test).mean()),
  }


# --- power laws ---


def _table(wd: harness.Workdir, data: Data) -> Arrays:
  """Errors (seeds, widths, data, steps) of signs, a point for each width."""
  config: Config = wd.config

  def point(width: int) -> dict[str, Any]:
    table = one_bit.scaling_table(
      jax.random.key(config.seed + 1),
      data,
      (width,),
      config.table_data,
      config.table_steps,
      num_seeds=config.table_seeds,
      learning_rate_fraction=config.rate_fraction,
      window=config.window,
    )
    return table._asdict()

  points = [
    wd.point(f"table/m={m}", functools.partial(point, m))
    for m in harness.progress(config.table_widths, "table")
  ]
  axis = {"sizes": 0, "compute": 0}
  return {
    key: np.concatenate([p[key] for p in points], axis.get(key, 1))
    for key in points[0]
  }


Law = tuple[np.ndarray, np.ndarray, PowerLaw]


def power_laws(config: Config, found: Arrays, table: Arrays) -> dict[str, Law]:
  """Sizes, losses (seeds, sizes) and fits, by what varies.

  Compute is left out where a single run is on its envelope.
  """
  sizes = np.array(config.widths) * (digits(config)[0].shape[1] + 1.0)
  test = table["test_avg"]
  curves = {
    "size": (sizes, found["train, signs"].T),
    "size, averaged": (sizes, found["train, signs, averaged"].T),
    "data": (np.array(config.table_data, float), test[:, -1, :, -1]),
    "compute": lower_envelope(
      table["compute"].ravel(), test.reshape(len(test), -1)
    ),
  }
  return {
    # The floor of a curve that is not averaged is that of flips back and
    # forth. An envelope may have two points.
    name: (
      x,
      losses,
      fit_power_law(x, losses, irreducible=name != "size" and x.size > 3),
    )
    for name, (x, losses) in curves.items()
    if x.size > 1
  }


# --- which kernel predicts training ---


def path_point(config: Config) -> dict[str, Any]:
  """Mean outputs by step, and those of one run, beside three predictions."""
  rngs = jax.random.split(jax.random.key(config.seed + 2), 3)
  shape = config.path_data, config.path_dim
  x = jax.random.normal(rngs[0], shape, jnp.float32)
  x /= jnp.linalg.norm(x, axis=1, keepdims=True)
  y = jax.random.rademacher(rngs[1], shape[:1], x.dtype)
  ste, secant = one_bit.ste_kernel(x).kernel, one_bit.secant_kernel(x).kernel
  rate = config.path_fraction / jnp.linalg.eigvalsh(ste)[-1]
  c = one_bit.effective_rate().astype(x.dtype)
  f = sweep(
    rngs[2],
    _path_fn(config.path_steps, config.window),
    (config.path_width,),
    config.path_seeds,
    args=(x, y, rate),
  ).values[0]
  steps = jnp.arange(config.path_steps + 1)
  predicted = {
    name: y[None] - descent_recursion(kernel, y, rate, steps)[0]
    for name, kernel in (
      ("K_ste", ste),
      ("c K_ste", c * ste),
      ("c K_sec", c * secant),
    )
  }
  return {"y": y, "mean": f.mean(0), "one run": f[0], **predicted}


@functools.cache
def _path_fn(num_steps: int, window: int) -> Callable[..., jax.Array]:
  def outputs(
    rng: jax.Array, width: int, x: jax.Array, y: jax.Array, rate: jax.Array
  ) -> jax.Array:
    params = one_bit.init(rng, width, x.shape[1])
    return one_bit.train_one_bit(
      params,
      x,
      y,
      learning_rate=rate,
      num_steps=num_steps,
      window=min(window, num_steps),
    )[1].f

  return outputs


def coefficient(path: Arrays, name: str, step: int) -> float:
  """Of mean outputs on a prediction, by least squares."""
  f, predicted = path["mean"][step], path[name][step]
  return float((f * predicted).sum() / (predicted**2).sum())


# --- packed signs ---


def packed_point(config: Config) -> Arrays:
  """Least seconds of one layer, by inputs at a time: where it is asked for.

  Signs that are packed against a product with the same in bfloat16.
  """
  m, d = config.packed_shape
  rngs = jax.random.split(jax.random.key(config.seed))
  params = one_bit.init(rngs[0], m, d, paired=False)
  words = pack_signs(params.latent)
  q, a = (
    z.astype(jnp.bfloat16) for z in (jnp.sign(params.latent), params.output)
  )
  plain = jax.jit(lambda x: jax.nn.relu(x @ q.T) @ a)
  found = []
  for n in config.packed_batches:
    x = jax.random.normal(rngs[1], (n, d), params.latent.dtype)
    low = x.astype(jnp.bfloat16)
    contestants = {
      "packed": functools.partial(
        one_bit.packed_apply, x, words, params.output
      ),
      "bfloat16": functools.partial(plain, low),
    }
    found.append(harness.least_seconds(contestants, rounds=9))
  names = ("packed", "bfloat16")
  return {name: np.array([f[name] for f in found]) for name in names}


# --- checks ---


def _checks(
  config: Config,
  found: Arrays,
  limit: dict[str, Any],
  table: Arrays,
  laws: dict[str, Law],
  path: Arrays,
  targets: dict[str, Arrays],
) -> list[harness.Check]:
  accepted = config.accepted
  gap = fit_slope(config.widths, found["gap"].mean(1))
  averaged = fit_slope(config.widths, found["gap, averaged"].mean(1))
  last = {name: values[-1].mean() for name, values in found.items()}
  fit = laws["size"][2]
  n = np.broadcast_to(table["sizes"][:, None], table["test_avg"].shape[1:3])
  d = np.broadcast_to(np.array(config.table_data, float)[None], n.shape)
  joint = fit_joint_power_law(
    n.ravel(),
    d.ravel(),
    table["test_avg"][..., -1].reshape(config.table_seeds, n.size),
  )
  return [
    harness.Check("slope of the gap in m", gap.slope, *accepted.gap_slope),
    harness.Check("its R^2", gap.r_squared, accepted.gap_r_squared),
    harness.Check("slope of the gap of averages", averaged.slope),
    harness.Check(
      "error on test data at the largest width, signs averaged / full",
      last["test, signs, averaged"] / last["test, full"],
      *accepted.test_ratio,
    ),
    harness.Check(
      "the same without averaging", last["test, signs"] / last["test, full"]
    ),
    *(
      harness.Check(f"{name}, m={m}", found[key][i].mean())
      for key, name in (
        ("gap", "gap"),
        ("gap, averaged", "gap of averages"),
        ("test, full", "error on test data, full"),
        ("test, signs", "error on test data, signs"),
        ("test, signs, averaged", "error on test data, signs averaged"),
      )
      for i, m in ((0, config.widths[0]), (-1, config.widths[-1]))
    ),
    harness.Check("error on test data, kernel limit", limit["test"]),
    harness.Check("error on training data, kernel limit", limit["train"]),
    *(
      harness.Check(
        f"{name}: error on test data at the largest width, signs / full",
        values["test, signs"][-1].mean() / values["test, full"][-1].mean(),
      )
      for name, values in targets.items()
    ),
    *_law_checks(laws),
    harness.Check(
      "exponent of the error on training data in N, lower end of its interval",
      fit.exponent_interval[0],
      accepted.exponent_low,
    ),
    harness.Check(
      "p-value, of the error on training data in N",
      fit.lack_of_fit,
      accepted.lack_of_fit,
    ),
    *_joint_checks(joint),
    *(
      harness.Check(
        f"mean outputs after {t} steps / those that {name} predicts",
        coefficient(path, name, t),
        *bounds,
      )
      for name, t, bounds in (
        ("K_ste", 1, (-np.inf, accepted.ste_first)),
        ("K_ste", 10, ()),
        ("c K_sec", 1, ()),
        ("c K_sec", 5, accepted.secant),
        ("c K_sec", 10, accepted.secant),
      )
    ),
  ]


def _law_checks(laws: dict[str, Law]) -> list[harness.Check]:
  """What was fitted, but for what decides: of the error by size."""
  what = {
    "size": "training data in N",
    "size, averaged": "training data in N, averaged",
    "data": "test data in D",
    "compute": "test data in C",
  }
  checks: list[harness.Check] = []
  for name, (x, _, fit) in laws.items():
    kaplan = _KAPLAN[name.split(",")[0]]
    end = ", not a power law" if fit.is_power_law is False else ""
    of = f"of the error on {what[name]}"
    checks += [
      harness.Check(
        f"exponent {of} (language models: {kaplan}){end}", fit.exponent
      ),
      harness.Check(f"limit {of}", fit.limit),
    ]
    if name != "size":
      checks += _interval_checks(f"exponent {of}", fit.exponent_interval)
      if np.isfinite(fit.lack_of_fit):
        checks.append(harness.Check(f"p-value, {of}", fit.lack_of_fit))
    if name == "compute":
      checks.append(harness.Check("runs on the envelope of C", x.size))
  return checks


def _joint_checks(joint: JointPowerLaw) -> list[harness.Check]:
  """Exponents of the joint fit, where the data determine them."""
  checks = [harness.Check("p-value of the joint fit", joint.lack_of_fit)]
  end = ", not a power law" if joint.is_power_law is False else ""
  for name, value, interval in (
    ("N, with D", joint.n_exponent, joint.n_interval),
    ("D, with N", joint.d_exponent, joint.d_interval),
  ):
    text = f"exponent of the error on test data in {name}"
    known = value > 0 and bool(np.all(np.isfinite(interval)))
    checks.append(harness.Check(f"{text}: is determined", float(known)))
    if known:
      checks.append(harness.Check(f"{text}{end}", value))
      checks += _interval_checks(text, interval)
  return checks


def _interval_checks(
  name: str, interval: tuple[float, float]
) -> list[harness.Check]:
  """Both ends, unless the fit does not bound it."""
  if not np.all(np.isfinite(interval)):
    return []
  return [
    harness.Check(f"{name}, {end} end of its interval", value)
    for end, value in zip(("lower", "upper"), interval, strict=True)
  ]


# --- figure ---


def _figure_data(
  config: Config,
  found: Arrays,
  limit: dict[str, Any],
  table: Arrays,
  path: Arrays,
  targets: dict[str, Arrays],
  packed: Arrays,
) -> dict[str, Any]:
  data: dict[str, Any] = {f"digits, {key}": x for key, x in found.items()}
  data |= {f"digits, {key}, kernel limit": x for key, x in limit.items()}
  data |= {f"table, {key}": x for key, x in table.items()}
  data |= {f"path, {key}": x for key, x in path.items()}
  data |= {f"layer in seconds, {key}": x for key, x in packed.items()}
  data |= {
    f"{name}, {key}": x
    for name, numbers in targets.items()
    for key, x in numbers.items()
  }
  keys = ("widths", "table_widths", "table_data", "table_steps")
  return data | {key: config[key] for key in keys}


def _draw(
  config: Config,
  found: Arrays,
  limit: dict[str, Any],
  laws: dict[str, Law],
  path: Arrays,
  targets: dict[str, Arrays],
  packed: Arrays,
) -> Figure:
  harness.use_style()
  num_rows = 5 if config.packed_batches else 4
  size = 12.5, 4.6 * num_rows
  figure, axes = plt.subplots(num_rows, 2, figsize=size)
  _draw_gap(axes[0, 0], config, found)
  _draw_errors(axes[0, 1], config, found, limit)
  labels = {
    "size": ("N, number of weights", "on training data"),
    "data": ("D, number of data", "on test data, averaged"),
    "compute": ("C, flops of training", "on test data, averaged"),
  }
  panels = (axes[1, 0], axes[1, 1], axes[2, 0])
  for ax, (name, label) in zip(panels, labels.items(), strict=True):
    if name in laws:
      _draw_law(ax, name, *laws[name], *label)
    else:
      ax.set(title=f"{label[0]}: one run is best")
  _draw_path(axes[2, 1], config, path)
  _draw_targets(axes[3], config, targets)
  if config.packed_batches:
    _draw_packed(axes[4, 0], config, packed)
    axes[4, 1].set_axis_off()
  return figure


def _draw_packed(ax: Axes, config: Config, packed: Arrays) -> None:
  for name, seconds in packed.items():
    rate = np.array(config.packed_batches) / seconds
    ax.loglog(config.packed_batches, rate, "o-", label=name)
  m, d = config.packed_shape
  ax.set(
    title=f"Packed signs, m = {m}, d = {d}",
    xlabel="inputs at a time",
    ylabel="inputs a second",
  )
  ax.legend()


def _draw_gap(ax: Axes, config: Config, found: Arrays) -> None:
  for name, label in (
    ("gap", "last outputs"),
    ("gap, averaged", f"mean of {config.window} steps"),
  ):
    harness.plot_loglog(ax, config.widths, found[name].mean(1), label=label)
  ax.set(
    title="Signs against full precision, held-out digits",
    xlabel="m, width",
    ylabel="root mean square difference of outputs",
  )
  ax.legend()


def _draw_errors(
  ax: Axes, config: Config, found: Arrays, limit: dict[str, Any]
) -> None:
  for part, style in (("test", "o-"), ("train", "s--")):
    for kind, color in zip(
      ("full", "signs", "signs, averaged"), harness.PALETTE
    ):
      values = found[f"{part}, {kind}"]
      label = f"{part}, {kind}"
      _draw_seeds(ax, config.widths, values, style, color, label)
  for part, style in (("test", ":"), ("train", "-.")):
    label = f"{part}, kernel limit"
    ax.axhline(limit[part], color="0.4", ls=style, label=label)
  ax.set(
    title="Errors by width", xlabel="m, width", ylabel="mean squared error"
  )
  _legend_below(ax, 5)


def _draw_law(
  ax: Axes,
  name: str,
  x: np.ndarray,
  losses: np.ndarray,
  fit: PowerLaw,
  label: str,
  what: str,
) -> None:
  log_means = np.log(losses).mean(0)
  ax.loglog(x, losses.T, ".", color="0.75", ms=5)
  ax.loglog(x, np.exp(log_means), "o", color=harness.PALETTE[0])
  grid = np.geomspace(x.min(), x.max(), 100)
  falling = fit.scale * grid**-fit.exponent
  total = fit.limit + falling
  low, high = fit.exponent_interval
  text = f"exponent {fit.exponent:.3f} [{low:.3f}, {high:.3f}]"
  ax.loglog(grid, total, color=harness.PALETTE[0], label=text)
  share = falling / total
  slopes = np.stack([1 - share, share, -share * np.log(grid)], 1)
  variance = np.einsum("ni,ij,nj->n", slopes, fit.covariance, slopes)
  if np.all(np.isfinite(variance)):
    quantile = special.stdtrit(fit.degrees, 0.975)
    half = quantile * np.sqrt(np.maximum(variance, 0))
    band = total * np.exp(-half), total * np.exp(half)
    ax.fill_between(grid, *band, color=harness.PALETTE[0], alpha=0.15)
  p = fit.lack_of_fit
  verdict = ", not a power law" if fit.is_power_law is False else ""
  ax.set(
    title=f"L({label[0]}): p = {p:.2g}{verdict}",
    xlabel=label,
    ylabel=f"mean squared error {what}",
  )
  ax.plot([], [], " ", label=f"language models: {_KAPLAN[name]}")
  ax.legend()


def _draw_path(ax: Axes, config: Config, path: Arrays) -> None:
  """Outputs along the targets: 0 at the start, 1 where they are met."""
  y = path["y"]

  def along(name: str) -> np.ndarray:
    return path[name] @ y / (y @ y)

  ax.plot(along("one run"), color="0.75", label="one run")
  ax.plot(along("mean"), "o", label=f"mean of {config.path_seeds} runs")
  for name, label in (
    ("K_ste", "straight-through kernel"),
    ("c K_ste", "the same, times c"),
    ("c K_sec", "secant kernel, times c"),
  ):
    ax.plot(along(name), label=label)
  ax.set(
    title=f"Training of signs, m = {config.path_width}",
    xlabel="step",
    ylabel="outputs along targets",
  )
  ax.legend(loc="lower right")


def _draw_targets(
  axes: Any, config: Config, targets: dict[str, Arrays]
) -> None:
  for ax, part in zip(axes, ("train", "test"), strict=True):
    for (name, found), color in zip(targets.items(), harness.PALETTE):
      for kind, style in (
        ("signs", "^:"),
        ("signs, averaged", "o-"),
        ("full", "s--"),
      ):
        values, label = found[f"{part}, {kind}"], f"{name}, {kind}"
        _draw_seeds(ax, config.synthetic_widths, values, style, color, label)
    ax.set(
      title=f"Functions of {config.synthetic_dim} variables, {part} data",
      xlabel="m, width",
      ylabel="mean squared error / variance",
    )
  _legend_below(axes[0], 40)


def _draw_seeds(
  ax: Axes,
  widths: tuple[int, ...],
  values: np.ndarray,
  style: str,
  color: str,
  label: str,
) -> None:
  """The mean of (widths, seeds), between the least and the largest."""
  ax.loglog(widths, values.mean(1), style, color=color, label=label)
  ends = values.min(1), values.max(1)
  ax.fill_between(widths, *ends, color=color, alpha=0.12, lw=0)


def _legend_below(ax: Axes, factor: float) -> None:
  """A legend in two columns, under the curves: the axis goes on below them."""
  ax.set_ylim(bottom=ax.get_ylim()[0] / factor)
  ax.legend(ncols=2, fontsize=8, loc="lower left")


if __name__ == "__main__":
  harness.main(run, "one-bit-scaling")
