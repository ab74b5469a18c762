"""Addition modulo p by Fourier circuits: exact networks, trained ones, heads.

Five questions about arXiv 2402.09469:

1. Do the networks in closed form have the largest margin on all inputs?
2. Trained on cross-entropy and a small weight of the norm, how near does a
   network come to that margin, and do its neurons have one frequency each, all
   of them together every frequency? By number of neurons, weight and seed.
3. Does a network that saw half of the sums know the others?
4. Does attention alone, without positions or a network, learn to add, and are
   the matrices by which it asks sums of few waves?
5. How long after the training data does a transformer of two layers learn the
   others, by number of terms? Reported, not decided, at tier ``full``.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import lax
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import harness
from jaxattn import data
from jaxattn.ntk import margin

_DESIGNS = ("lattice", "grid3", "paper")
_GREY = "#6b7480"
_LEARNED = 0.99
# Heads below this share of the largest norm are dead.
_ACTIVE = 0.05

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Point = dict[str, Any]
# By k, p, neurons, weight: a point each seed.
Runs = dict[tuple[Any, ...], list[Point]]


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  exact = {
    (k, p): wd.point(f"exact/k={k},p={p}", functools.partial(exact_point, k, p))
    for k, p in harness.progress(config.exact, "exact networks")
  }
  runs = _train_all(wd)
  split = {
    size: wd.point(
      f"split/k={size[0]},p={size[1]}",
      functools.partial(split_point, config, *size),
    )
    for size in harness.progress(config.split, "half of the sums")
  }
  attention = wd.point(
    "attention", functools.partial(attention_point, config, wd)
  )
  grokking = {
    size: wd.point(
      f"grokking/k={size[0]},p={size[1]}",
      functools.partial(grokking_point, config, *size),
    )
    for size in harness.progress(_grokking_sizes(config), "grokking")
  }
  figure = _draw(config, runs, attention)
  harness.save_figure(
    wd, figure, _figure_data(config, runs, split, attention, grokking)
  )
  return harness.finish(
    wd,
    claim=(
      "Networks of one hidden layer that add k numbers modulo p have a largest "
      "margin in closed form, attained by neurons of one Fourier frequency "
      "each; trained networks come to it, use every frequency, and attention "
      "is sums of few waves."
    ),
    source="arXiv:2402.09469, theorem 4.1 and section 6",
    paper="margin 2 k! / ((2k+2)^((k+1)/2) (p-1) p^((k-1)/2)), one frequency "
    "a neuron",
    checks=[
      harness.Check(
        "exact networks, largest error of margin / gamma*",
        max(point["error"] for point in exact.values()),
        high=config.accepted.exact,
      ),
      *_trained_checks(config, runs),
      *_sweep_checks(config, runs),
      *_split_checks(config, split),
      *_attention_checks(config, attention),
      *_grokking_checks(grokking),
    ],
  )


def _train_all(wd: harness.Workdir) -> Runs:
  """All trainings on all inputs; what two panels show is trained once."""
  config: Config = wd.config
  sizes = list(config.trained)
  for k, p, steps in config.swept:
    m = paper_neurons(k, p)
    widths = [(round(f * m), config.weight) for f in config.factors]
    widths += [(round(config.weight_factor * m), w) for w in config.weights]
    sizes += [(k, p, width, weight, steps) for width, weight in widths]
  return {
    size: [
      wd.point(
        "trained/k={},p={},m={},weight={:g},steps={}".format(*size)
        + f"/seed={seed}",
        functools.partial(trained_point, config, *size, seed),
      )
      for seed in range(config.num_seeds)
    ]
    for size in harness.progress(dict.fromkeys(sizes), "training")
  }


# --- networks ---


def paper_neurons(k: int, p: int) -> int:
  """Neurons of the paper's construction."""
  return 4 ** (k - 1) * (p - 1)


def exact_point(k: int, p: int) -> Point:
  """Largest relative error of the margins of all designs, on all inputs."""
  with jax.enable_x64(True):
    best, errors, neurons = margin.max_margin(p, k), [], {}
    for kind in _DESIGNS:
      net = margin.fourier_network(p, k, kind=kind, dtype=jnp.float64)
      found = margin.evaluate_margin(net)
      errors += [abs(float(g) / best - 1) for g in found[:2]]
      neurons[kind] = len(net.outer)
  return {"error": max(errors), **neurons}


def trained_point(
  config: Config,
  k: int,
  p: int,
  m: int,
  weight: float,
  num_steps: int,
  seed: int,
) -> Point:
  """Margin over the largest and spectra of one training on all inputs."""
  # Models bring flax, which takes a second to import.
  from jaxattn.models import train_poly_net

  inputs = margin.modular_inputs(p, k)
  start = margin.init(jax.random.key(seed), m, p, k)
  params, history = train_poly_net(
    start,
    inputs,
    margin.modular_labels(inputs, p),
    num_steps=num_steps,
    learning_rate=config.learning_rate,
    reg_weight=weight,
  )
  before = margin.fourier_report(start).power_share.mean(1)
  return {
    **network_statistics(params),
    "power_share_before": before,
    "loss": history.loss[-1],
    **_strongest(params),
  }


def network_statistics(params: margin.PolyNet) -> Point:
  """Margin over the largest; spectra of neurons that are alive."""
  _, k, p = params.inner.shape
  report = margin.fourier_report(params)
  found = margin.evaluate_margin(margin.normalize(params))
  active = np.asarray(report.active)
  return {
    "margin": float(found.minimum) / margin.max_margin(p, k),
    "accuracy": float(found.accuracy),
    "power_share": np.asarray(report.power_share)[active].mean(1),
    "alignment": float(np.asarray(report.alignment)[active].mean()),
    "frequency": np.asarray(report.frequency)[active],
    "coverage": int(report.coverage) / ((p - 1) // 2),
    "active": int(active.sum()),
  }


def _strongest(params: margin.PolyNet) -> Point:
  """The vectors of the neuron of largest norm."""
  inner, outer = (np.asarray(x) for x in params)
  top = (inner**2).sum((1, 2)).argmax()
  return {"vectors": np.concatenate([inner[top], outer[top][None]])}


def split_point(
  config: Config,
  k: int,
  p: int,
  m: int,
  weight: float,
  num_steps: int,
  batch_size: int,
) -> Point:
  """Accuracies by step of one training on a share of the inputs."""
  from jaxattn.models import train_poly_net

  rngs = jax.random.split(jax.random.key(0), 3)
  train, test = data.modular_split(
    rngs[0], p, k, train_fraction=config.split_fraction
  )
  params, history = train_poly_net(
    margin.init(rngs[1], m, p, k),
    *train,
    num_steps=num_steps,
    learning_rate=config.learning_rate,
    reg_weight=weight,
    batch_size=batch_size or None,
    rng=rngs[2] if batch_size else None,
    log_every=config.split_every,
    eval_sets={"test": test},
  )
  found = network_statistics(params)
  return {
    "step": history.step,
    "train": history.accuracy,
    "test": history.eval_accuracy["test"],
    "margin": found["margin"],
    "coverage": found["coverage"],
  }


# --- attention ---


def attention_model(config: Config) -> Any:
  """The transformer of one layer of attention, and nothing else."""
  from jaxattn.models import ModularTransformer

  return ModularTransformer(
    modulus=config.attention_modulus,
    dim=config.dim,
    num_heads=config.num_heads,
    head_dim=config.head_dim,
  )


def attention_point(config: Config, wd: harness.Workdir) -> Point:
  """Accuracies and shares of waves, at first and after training."""
  rngs = jax.random.split(jax.random.key(1), 3)
  train, test = data.modular_split(
    rngs[0],
    config.attention_modulus,
    config.attention_terms,
    train_fraction=config.attention_fraction,
  )
  model = attention_model(config)
  start = model.init(rngs[1], train[0][:1])
  params = harness.train_loop(
    rngs[2],
    functools.partial(attention_loss, model.apply),
    start,
    lambda step: train,
    optimizer=optax.adamw(
      config.attention_rate, weight_decay=config.attention_decay
    ),
    num_steps=config.attention_steps,
    workdir=wd,
    name="attention",
    log_every=500,
  )
  return {
    "train": float(accuracy(model.apply, params, *train)),
    "test": float(accuracy(model.apply, params, *test)),
    **_waves(start, "_before"),
    **_waves(params, ""),
  }


def attention_loss(
  apply: Any, params: Any, batch: Any, rng: jax.Array
) -> tuple[jax.Array, Point]:
  """Mean cross-entropy."""
  del rng
  inputs, labels = batch
  losses = optax.softmax_cross_entropy_with_integer_labels(
    apply(params, inputs), labels
  )
  return losses.mean(), {}


def accuracy(
  apply: Any, params: Any, inputs: jax.Array, labels: jax.Array
) -> jax.Array:
  """Share of sums that are right, a thousand at a time."""

  def right(sample: Any) -> jax.Array:
    return apply(params, sample[0][None])[0].argmax() == sample[1]

  return lax.map(right, (inputs, labels), batch_size=1024).mean()


def _waves(params: Any, when: str) -> Point:
  """Shares of the strongest bins, of heads that are alive."""
  from jaxattn.models import attention_matrices, fourier2d_share

  matrices = attention_matrices(params)
  norms = np.linalg.norm(np.asarray(matrices), axis=(1, 2))
  alive = norms > _ACTIVE * norms.max()
  shares = {
    f"top{n}{when}": np.asarray(fourier2d_share(matrices, num_bins=n))[alive]
    for n in (2, 4)
  }
  return {f"matrix{when}": np.asarray(matrices)[norms.argmax()], **shares}


# --- two layers ---


def _grokking_sizes(config: Config) -> list[tuple[int, int]]:
  return [size for size in config.grokking if size]


def grokking_model(config: Config, p: int) -> Any:
  """Two layers of a transformer, without positions."""
  from jaxattn.models import Transformer, TransformerConfig

  return Transformer(
    TransformerConfig(
      num_layers=2,
      dim=config.grokking_dim,
      num_heads=config.grokking_heads,
      head_dim=config.grokking_dim // config.grokking_heads,
      vocab_size=p,
      attention="dot_product",
      is_causal=False,
      positions=None,
      qk_norm=None,
    )
  )


def grokking_point(config: Config, k: int, p: int) -> Point:
  """Accuracies by step on half of the sums and on the others."""
  rngs = jax.random.split(jax.random.key(2), 3)
  train, test = data.modular_split(rngs[0], p, k, train_fraction=0.5)
  params = grokking_model(config, p).init(rngs[1], train[0][:1])
  history = grokking_run(rngs[2], params, train, test, config=config, p=p)
  return dict(zip(("train", "test"), history, strict=True))


def grokking_run(
  rng: jax.Array, params: Any, train: Any, test: Any, *, config: Config, p: int
) -> tuple[jax.Array, jax.Array]:
  """The same from parameters on; two (num_logs,)."""
  model = grokking_model(config, p)
  optimizer = optax.adamw(
    config.grokking_rate, weight_decay=config.grokking_decay
  )

  def apply(params: Any, inputs: jax.Array) -> jax.Array:
    # What a transformer returns depends on its options.
    out: Any = model.apply(params, inputs)
    return out.mean(1)

  def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
    params, state = carry
    key = jax.random.fold_in(rng, i)
    shape = (config.grokking_batch,)
    rows = jax.random.randint(key, shape, 0, len(train[1]))
    batch = train[0][rows], train[1][rows]
    grads = jax.grad(attention_loss, 1, has_aux=True)(apply, params, batch, key)
    updates, state = optimizer.update(grads[0], state, params)
    return (optax.apply_updates(params, updates), state), None

  def chunk(carry: Any, first: jax.Array) -> tuple[Any, Any]:
    carry, _ = lax.scan(step, carry, first + jnp.arange(config.grokking_every))
    return carry, tuple(accuracy(apply, carry[0], *x) for x in (train, test))

  @jax.jit
  def whole(params: Any) -> tuple[jax.Array, jax.Array]:
    starts = jnp.arange(0, config.grokking_steps, config.grokking_every)
    return lax.scan(chunk, (params, optimizer.init(params)), starts)[1]

  return whole(params)


# --- checks ---


def _label(k: int, p: int, m: int) -> str:
  return f"k={k}, p={p}, {m} neurons"


def _trained_checks(config: Config, runs: Runs) -> list[harness.Check]:
  accepted, checks = config.accepted, []
  for size in config.trained:
    name, points = _label(*size[:3]), runs[size]
    shares = [float(point["power_share"].mean()) for point in points]
    checks += [
      harness.Check(
        f"least margin / gamma*, {name}",
        min(point["margin"] for point in points),
        *accepted.margin,
      ),
      harness.Check(
        f"least share of power at one frequency, {name}",
        min(shares),
        accepted.power_share,
      ),
      harness.Check(
        f"least share of frequencies that occur, {name}",
        min(point["coverage"] for point in points),
        accepted.coverage,
      ),
      harness.Check(
        f"least alignment of phases, {name}",
        min(point["alignment"] for point in points),
      ),
      harness.Check(
        f"neurons that are alive, {name}",
        float(np.mean([point["active"] for point in points])),
      ),
      harness.Check(
        f"share of power at one frequency at first, {name}",
        float(np.mean([point["power_share_before"] for point in points])),
      ),
    ]
  return checks


def _width_runs(config: Config, runs: Runs, size: Any) -> dict[float, Any]:
  """Margins of all seeds by multiple of the paper's neurons."""
  k, p, steps = size
  m = paper_neurons(k, p)
  return {
    factor: [
      point["margin"]
      for point in runs[k, p, round(factor * m), config.weight, steps]
    ]
    for factor in config.factors
  }


def _weight_runs(config: Config, runs: Runs, size: Any) -> dict[float, Any]:
  """Margins of all seeds by weight over the largest margin."""
  k, p, steps = size
  m = round(config.weight_factor * paper_neurons(k, p))
  return {
    weight / margin.max_margin(p, k): [
      point["margin"] for point in runs[k, p, m, weight, steps]
    ]
    for weight in config.weights
  }


def _sweep_checks(config: Config, runs: Runs) -> list[harness.Check]:
  everything = [point["margin"] for points in runs.values() for point in points]
  checks = [
    harness.Check(
      "largest margin / gamma* of any trained network",
      max(everything),
      high=config.accepted.margin[1],
    )
  ]
  for size in config.swept:
    k, p, _ = size
    checks += [
      harness.Check(
        f"least margin / gamma*, k={k}, p={p}, {factor:g} times the neurons",
        min(values),
      )
      for factor, values in _width_runs(config, runs, size).items()
    ]
    checks += [
      harness.Check(
        f"least margin / gamma*, k={k}, p={p}, weight {weight:g}", min(values)
      )
      for weight, values in zip(
        config.weights, _weight_runs(config, runs, size).values()
      )
    ]
  return checks


def _split_checks(config: Config, split: Any) -> list[harness.Check]:
  checks = []
  for size, point in split.items():
    where = f"trained on {100 * config.split_fraction:g} %, {_label(*size[:3])}"
    checks += [
      harness.Check(
        f"accuracy on the others, {where}",
        float(point["test"][-1]),
        config.accepted.split_accuracy,
      ),
      harness.Check(f"margin / gamma*, {where}", point["margin"]),
      harness.Check(f"share of frequencies, {where}", point["coverage"]),
    ]
  return checks


def _attention_checks(config: Config, point: Point) -> list[harness.Check]:
  accepted = config.accepted
  return [
    harness.Check(
      "attention alone, accuracy on the others",
      point["test"],
      accepted.attention_accuracy,
    ),
    harness.Check(
      "attention alone, share of power in 4 bins",
      float(point["top4"].mean()),
      accepted.top4,
    ),
    harness.Check(
      "attention alone, share of power in 4 bins at first",
      float(point["top4_before"].mean()),
    ),
    harness.Check(
      "attention alone, share of power in 2 bins", float(point["top2"].mean())
    ),
    harness.Check(
      "attention alone, share of power in 2 bins at first",
      float(point["top2_before"].mean()),
    ),
    harness.Check("attention alone, heads alive", len(point["top4"])),
  ]


def _grokking_checks(grokking: Any) -> list[harness.Check]:
  """The gap is of accuracies: that of steps need not exist."""
  return [
    harness.Check(
      f"two layers, largest gap of accuracies, k={k}, p={p}",
      float((point["train"] - point["test"]).max()),
    )
    for (k, p), point in grokking.items()
  ] + [
    harness.Check(
      f"two layers, share of the run with {name} below {_LEARNED:g}, k={k}, "
      f"p={p}",
      float((point[name] < _LEARNED).mean()),
    )
    for (k, p), point in grokking.items()
    for name in ("train", "test")
  ]


# --- figure ---


def _figure_data(
  config: Config, runs: Runs, split: Any, attention: Point, grokking: Any
) -> Point:
  shown = {
    "trained/{},{},{},{:g}".format(*size[:4]): [p["margin"] for p in points]
    for size, points in runs.items()
  }
  for size in config.trained:
    name, point = "{},{},{}".format(*size[:3]), runs[size][0]
    for key in ("power_share", "power_share_before", "frequency", "vectors"):
      shown[f"{key}/{name}"] = point[key]
  for what, points in (("split", split), ("grokking", grokking)):
    for size, point in points.items():
      for key in point:
        shown[f"{what}/{size[0]},{size[1]}/{key}"] = point[key]
  return shown | {f"attention/{key}": x for key, x in attention.items()}


def _draw(config: Config, runs: Runs, attention: Point) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(3, 2, figsize=(12.5, 14))
  _draw_widths(axes[0, 0], config, runs)
  _draw_weights(axes[0, 1], config, runs)
  _draw_shares(axes[1, 0], config, runs)
  _draw_frequencies(axes[1, 1], config, runs)
  _draw_neuron(axes[2, 0], config, runs)
  _draw_attention(axes[2, 1], config, attention)
  return figure


def _draw_ranges(ax: Axes, x: Any, values: Any, color: str, label: str) -> None:
  """Medians, and a bar from the least to the largest."""
  values = np.array(list(values))
  middle = np.median(values, axis=1)
  spread = np.stack([middle - values.min(1), values.max(1) - middle])
  ax.errorbar(
    list(x), middle, spread, fmt="o-", color=color, capsize=3, label=label
  )


def _draw_widths(ax: Axes, config: Config, runs: Runs) -> None:
  for size, color in zip(config.swept, harness.PALETTE):
    values = _width_runs(config, runs, size)
    label = f"k = {size[0]}, p = {size[1]}"
    _draw_ranges(ax, values.keys(), values.values(), color, label)
  ax.axhline(1, color=_GREY, linestyle=":", linewidth=1)
  ax.set_xscale("log", base=2)
  ax.set_xticks(config.factors, [f"{f:g}" for f in config.factors])
  ax.set(
    title=f"Trained margin, weight {config.weight:g}",
    xlabel="neurons over those of the paper's construction",
    ylabel="margin / largest margin",
  )
  ax.legend(loc="lower right")


def _draw_weights(ax: Axes, config: Config, runs: Runs) -> None:
  for size, color in zip(config.swept, harness.PALETTE):
    values = _weight_runs(config, runs, size)
    label = f"k = {size[0]}, p = {size[1]}"
    _draw_ranges(ax, values.keys(), values.values(), color, label)
  ax.axhline(1, color=_GREY, linestyle=":", linewidth=1)
  ax.set_xscale("log")
  ax.xaxis.set_minor_formatter(ticker.NullFormatter())
  ax.set(
    title=f"Trained margin, {config.weight_factor:g} times the paper's neurons",
    xlabel="weight of the norm / largest margin",
    ylabel="margin / largest margin",
  )
  ax.legend()


def _draw_shares(ax: Axes, config: Config, runs: Runs) -> None:
  size = config.trained[-1]
  points = runs[size]
  bins = np.linspace(0, 1, 41).tolist()
  for key, label, color in (
    ("power_share_before", "at first", _GREY),
    ("power_share", "trained", harness.PALETTE[0]),
  ):
    values = np.concatenate([point[key] for point in points])
    ax.hist(values, bins, color=color, alpha=0.85, label=label)
  ax.set_yscale("log")
  ax.set(
    title=f"Neurons are waves ({_label(*size[:3])})",
    xlabel="share of a neuron's power at one frequency",
    ylabel="neurons",
  )
  ax.legend(loc="upper center")


def _draw_frequencies(ax: Axes, config: Config, runs: Runs) -> None:
  size = config.trained[0]
  points = runs[size]
  top = (size[1] - 1) // 2
  counts = np.stack(
    [np.bincount(point["frequency"], minlength=top + 1)[1:] for point in points]
  )
  places = np.arange(1, top + 1)
  for i, (row, color) in enumerate(zip(counts, harness.PALETTE)):
    shift = (i - (len(counts) - 1) / 2) * 0.26
    ax.bar(places + shift, row, 0.24, color=color, label=f"seed {i}")
  ax.set_xticks(places)
  ax.set(
    title=f"Every frequency occurs ({_label(*size[:3])})",
    xlabel="frequency",
    ylabel="neurons",
    ylim=(0, 1.25 * counts.max()),
  )
  ax.legend(loc="upper right", ncols=len(counts))


def _draw_neuron(ax: Axes, config: Config, runs: Runs) -> None:
  """The vectors of one neuron, and the waves that its spectrum says."""
  k, p = size = config.trained[0][:2]
  vectors = runs[config.trained[0]][0]["vectors"]
  fine = np.linspace(0, p - 1, 400)
  names = [*(f"$u_{j + 1}$" for j in range(k)), "$w$"]
  for vector, name, color in zip(vectors, names, harness.PALETTE):
    spectrum = np.fft.rfft(vector)
    top = 1 + np.abs(spectrum[1:]).argmax()
    wave = 2 / p * np.abs(spectrum[top])
    wave = wave * np.cos(2 * np.pi * top * fine / p + np.angle(spectrum[top]))
    ax.plot(fine, wave, color=color, linewidth=1, alpha=0.7)
    ax.plot(vector, "o", color=color, label=f"{name}, frequency {top}")
  low, high = ax.get_ylim()
  ax.set(
    title=f"One trained neuron and its cosines, k = {size[0]}, p = {size[1]}",
    xlabel="number",
    ylabel="parameter",
    ylim=(low, high + 0.25 * (high - low)),
  )
  ax.legend(loc="upper right", ncols=k + 1)


def _draw_attention(ax: Axes, config: Config, point: Point) -> None:
  matrix = point["matrix"]
  size = np.abs(matrix).max()
  image = ax.imshow(matrix, cmap="RdBu_r", vmin=-size, vmax=size)
  ax.figure.colorbar(image, ax=ax, shrink=0.85)
  ax.grid(visible=False)
  ax.set(
    title=f"What the strongest of {config.num_heads} heads asks",
    xlabel="query",
    ylabel="key",
  )


if __name__ == "__main__":
  harness.main(run, "modular-addition")
