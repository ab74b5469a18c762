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
  split = _partial(wd, "split", config.split, split_point)
  attention = _partial(
    wd, "attention", config.attention, functools.partial(attention_point, wd)
  )
  grokking = _partial(wd, "grokking", _grokking_sizes(config), grokking_point)
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
        _largest(point["error"] for point in exact.values()),
        high=config.accepted.exact,
      ),
      *_trained_checks(config, runs, config.trained, config.accepted),
      *_trained_checks(config, runs, config.reported),
      *_sweep_checks(config, runs),
      *_split_checks(config, split),
      *_attention_checks(config, attention),
      *_grokking_checks(grokking),
    ],
  )


def _train_all(wd: harness.Workdir) -> Runs:
  """All trainings on all inputs; what two panels show is trained once."""
  config: Config = wd.config
  # What decides is trained from more seeds.
  sizes: Any = config.trained
  num: int = config.num_seeds
  seeds = dict.fromkeys(sizes, num)
  for size in config.reported:
    seeds.setdefault(size, config.reported_seeds)
  for k, p, steps in config.swept:
    widths = [(f, config.weight) for f in config.factors]
    widths += [(config.weight_factor, w) for w in config.weights]
    for factor, weight in widths:
      size = k, p, round(factor * paper_neurons(k, p)), weight, steps
      decides = _decides(config, k, factor, weight)
      most = num if decides else config.reported_seeds
      seeds[size] = max(most, seeds.get(size, 0))
  return {
    size: [
      wd.point(
        "trained/k={},p={},m={},weight={:g},steps={}".format(*size)
        + f"/seed={seed}",
        functools.partial(trained_point, config, *size, seed),
      )
      for seed in range(count)
    ]
    for size, count in harness.progress(list(seeds.items()), "training")
  }


def _partial(wd: harness.Workdir, name: str, sizes: Any, point: Any) -> Runs:
  """Trainings on a part of the inputs: by size, a point each seed."""
  config: Config = wd.config
  return {
    size: [
      wd.point(
        f"{name}/k={size[0]},p={size[1]}/seed={seed}",
        functools.partial(point, config, *size, seed),
      )
      for seed in range(config.partial_seeds)
    ]
    for size in harness.progress(sizes, name)
  }


def _decides(config: Config, k: int, factor: float, weight: float) -> bool:
  """Whether theory has neurons enough and the weight is small enough.

  With two terms, training needs more neurons than the construction.
  """
  least = config.deciding_factor if k == 2 else 1
  return factor >= least and weight <= config.weight


def _least(values: Any) -> float:
  """The least; NaN if any is: Python's depends on their order."""
  return float(np.min(list(values)))


def _largest(values: Any) -> float:
  return float(np.max(list(values)))


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
  seed: int,
) -> Point:
  """Accuracies by step of one training on a share of the inputs."""
  from jaxattn.models import train_poly_net

  rngs = jax.random.split(jax.random.key(seed), 3)
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


def attention_model(config: Config, p: int) -> Any:
  """The transformer of one layer of attention, and nothing else."""
  from jaxattn.models import ModularTransformer

  return ModularTransformer(
    modulus=p,
    dim=config.dim,
    num_heads=config.num_heads,
    head_dim=config.head_dim,
  )


def attention_point(
  wd: harness.Workdir, config: Config, k: int, p: int, seed: int
) -> Point:
  """Accuracies and shares of waves, at first and after training."""
  rngs = jax.random.split(jax.random.key(1 + seed), 3)
  train, test = data.modular_split(
    rngs[0], p, k, train_fraction=config.attention_fraction
  )
  model = attention_model(config, p)
  start = model.init(rngs[1], train[0][:1])
  batch = config.attention_batch

  def batches(step: int) -> Any:
    return batch_of(rngs[2], step, train, batch) if batch else train

  params = harness.train_loop(
    rngs[2],
    functools.partial(attention_loss, model.apply),
    start,
    batches,
    optimizer=optax.adamw(
      config.attention_rate, weight_decay=config.attention_decay
    ),
    num_steps=config.attention_steps,
    workdir=wd,
    name=f"attention-k={k},p={p},seed={seed}",
    log_every=500,
  )
  return {
    "train": float(accuracy(model.apply, params, *train)),
    "test": float(accuracy(model.apply, params, *test)),
    **_waves(start, "_before"),
    **_waves(params, ""),
  }


@functools.partial(jax.jit, static_argnums=3)
def batch_of(
  rng: jax.Array, step: int | jax.Array, train: Any, size: int
) -> Any:
  """Inputs of one step and their labels, drawn with replacement."""
  rng = jax.random.fold_in(rng, step)
  rows = jax.random.randint(rng, (size,), 0, len(train[1]))
  return train[0][rows], train[1][rows]


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


def grokking_point(config: Config, k: int, p: int, seed: int) -> Point:
  """Accuracies by step on half of the sums and on the others."""
  rngs = jax.random.split(jax.random.key(2 + seed), 3)
  train, test = data.modular_split(rngs[0], p, k, train_fraction=0.5)
  params = grokking_model(config, p).init(rngs[1], train[0][:1])
  history = grokking_run(rngs[2], params, train, test, config=config, p=p)
  step = config.grokking_every * (1 + np.arange(len(history[0])))
  return {"step": step, "train": history[0], "test": history[1]}


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
    batch = batch_of(rng, i, train, config.grokking_batch)
    grads = jax.grad(attention_loss, 1, has_aux=True)(apply, params, batch, rng)
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


def _trained_checks(
  config: Config, runs: Runs, sizes: Any, accepted: Any = None
) -> list[harness.Check]:
  """Of networks of these sizes; bounded if something is accepted."""
  checks = []
  for size in sizes:
    name, points = _label(*size[:3]), runs[size]
    if size[3] != config.weight:
      name += f", weight {size[3]:g}"
    bounds = (
      (accepted.margin, (accepted.power_share,), (accepted.coverage,))
      if accepted
      else ((), (), ())
    )
    shares = [point["power_share"].mean() for point in points]
    checks += [
      harness.Check(
        f"least margin / gamma*, {name}",
        _least(point["margin"] for point in points),
        *bounds[0],
      ),
      harness.Check(
        f"least share of power at one frequency, {name}",
        _least(shares),
        *bounds[1],
      ),
      harness.Check(
        f"least share of frequencies that occur, {name}",
        _least(point["coverage"] for point in points),
        *bounds[2],
      ),
      harness.Check(
        f"least alignment of phases, {name}",
        _least(point["alignment"] for point in points),
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
  """Points of all seeds by multiple of the paper's neurons."""
  k, p, steps = size
  m = paper_neurons(k, p)
  return {
    factor: runs[k, p, round(factor * m), config.weight, steps]
    for factor in config.factors
  }


def _weight_runs(config: Config, runs: Runs, size: Any) -> dict[float, Any]:
  """Points of all seeds by weight of the norm."""
  k, p, steps = size
  m = round(config.weight_factor * paper_neurons(k, p))
  return {weight: runs[k, p, m, weight, steps] for weight in config.weights}


def _sweep_checks(config: Config, runs: Runs) -> list[harness.Check]:
  everything = [point["margin"] for points in runs.values() for point in points]
  checks = [
    harness.Check(
      "largest margin / gamma* of any trained network",
      _largest(everything),
      high=config.accepted.margin[1],
    )
  ]
  for size in config.swept:
    k, p, _ = size
    for factor, points in _width_runs(config, runs, size).items():
      name = f"k={k}, p={p}, {factor:g} times the neurons"
      decides = _decides(config, k, factor, config.weight)
      checks += _point_checks(config, name, points, decides)
    for weight, points in _weight_runs(config, runs, size).items():
      name = f"k={k}, p={p}, weight {weight:g}"
      decides = _decides(config, k, config.weight_factor, weight)
      checks += _point_checks(config, name, points, decides)
  return checks


def _point_checks(
  config: Config, name: str, points: list[Point], decides: bool
) -> list[harness.Check]:
  """The margin of one place of a sweep; spectra too where that decides."""
  margins = _least(point["margin"] for point in points)
  if not decides:
    return [harness.Check(f"least margin / gamma*, {name}", margins)]
  return [
    harness.Check(
      f"least margin / gamma*, {name}", margins, config.accepted.margin[0]
    ),
    harness.Check(
      f"least share of power at one frequency, {name}",
      _least(point["power_share"].mean() for point in points),
    ),
    harness.Check(
      f"least share of frequencies that occur, {name}",
      _least(point["coverage"] for point in points),
    ),
  ]


def _split_checks(config: Config, split: Runs) -> list[harness.Check]:
  checks = []
  for size, points in split.items():
    where = f"trained on {100 * config.split_fraction:g} %, " + _label(
      *size[:3]
    )
    checks += [
      harness.Check(
        f"accuracy on the others, {where}",
        _least(point["test"][-1] for point in points),
        config.accepted.split_accuracy,
      ),
      harness.Check(
        f"margin / gamma*, {where}", _least(p["margin"] for p in points)
      ),
      harness.Check(
        f"share of frequencies, {where}", _least(p["coverage"] for p in points)
      ),
      *_step_checks(points, where),
    ]
  return checks


def first_step(point: Point, name: str) -> float:
  """The first step at which the accuracy is 0.99; infinite if none is."""
  reached = np.asarray(point[name]) >= _LEARNED
  return float(point["step"][reached.argmax()]) if reached.any() else np.inf


def _step_checks(points: list[Point], where: str) -> list[harness.Check]:
  """Who knows the others, and medians of first steps where most come there."""
  train, test = (
    np.array([first_step(point, name) for point in points])
    for name in ("train", "test")
  )
  at = f"at which accuracy is {_LEARNED:g}"
  first, last = np.median(train), np.median(test)
  steps = {
    f"step {at}, {where}": first,
    f"step {at} on the others, {where}": last,
    f"steps between them, {where}": last - first if first < np.inf else np.inf,
  }
  return [
    harness.Check(
      f"share of seeds of accuracy {_LEARNED:g} on the others, {where}",
      float(np.isfinite(test).mean()),
    ),
    *(harness.Check(k, float(x)) for k, x in steps.items() if np.isfinite(x)),
  ]


def _attention_checks(config: Config, attention: Runs) -> list[harness.Check]:
  accepted, checks = config.accepted, []
  for (k, p), points in attention.items():
    name = f"attention alone, k={k}, p={p}"

    def share(key: str, points: list[Point] = points) -> float:
      return _least(point[key].mean() for point in points)

    checks += [
      harness.Check(
        f"{name}, accuracy on the others",
        _least(point["test"] for point in points),
        accepted.attention_accuracy,
      ),
      harness.Check(
        f"{name}, share of power in 4 bins", share("top4"), accepted.top4
      ),
      harness.Check(
        f"{name}, share of power in 4 bins at first", share("top4_before")
      ),
      harness.Check(f"{name}, share of power in 2 bins", share("top2")),
      harness.Check(
        f"{name}, share of power in 2 bins at first", share("top2_before")
      ),
      harness.Check(
        f"{name}, heads alive", _least(len(point["top4"]) for point in points)
      ),
    ]
  return checks


def _grokking_checks(grokking: Runs) -> list[harness.Check]:
  checks = []
  for (k, p), points in grokking.items():
    where = f"two layers, k={k}, p={p}"
    gaps = [np.max(point["train"] - point["test"]) for point in points]
    checks += [
      harness.Check(f"largest gap of accuracies, {where}", _largest(gaps)),
      *_step_checks(points, where),
    ]
  return checks


# --- figure ---


def _figure_data(
  config: Config, runs: Runs, split: Runs, attention: Runs, grokking: Runs
) -> Point:
  shown = {
    "trained/{},{},{},{:g}".format(*size[:4]): [p["margin"] for p in points]
    for size, points in runs.items()
  }
  for size in config.trained:
    name, point = "{},{},{}".format(*size[:3]), runs[size][0]
    for key in ("power_share", "power_share_before", "frequency", "vectors"):
      shown[f"{key}/{name}"] = point[key]
  for what, found in (
    ("split", split),
    ("attention", attention),
    ("grokking", grokking),
  ):
    for size, points in found.items():
      for seed, point in enumerate(points):
        for key in point:
          shown[f"{what}/{size[0]},{size[1]}/{seed}/{key}"] = point[key]
  return shown


def _draw(config: Config, runs: Runs, attention: Runs) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(3, 2, figsize=(12.5, 14))
  _draw_widths(axes[0, 0], config, runs)
  _draw_weights(axes[0, 1], config, runs)
  _draw_shares(axes[1, 0], config, runs)
  _draw_frequencies(axes[1, 1], config, runs)
  _draw_neuron(axes[2, 0], config, runs)
  _draw_attention(axes[2, 1], config, attention[config.attention[0]][0])
  return figure


def _draw_ranges(
  ax: Axes, x: list[float], found: Any, color: str, label: str
) -> None:
  """Medians of margins, and a bar from the least to the largest."""
  values = [[point["margin"] for point in points] for points in found]
  middle = np.array([np.median(v) for v in values])
  ends = np.array([(np.min(v), np.max(v)) for v in values]).T
  spread = np.abs(ends - middle)
  ax.errorbar(x, middle, spread, fmt="o-", color=color, capsize=3, label=label)


def _draw_widths(ax: Axes, config: Config, runs: Runs) -> None:
  for size, color in zip(config.swept, harness.PALETTE):
    found = _width_runs(config, runs, size)
    label = f"k = {size[0]}, p = {size[1]}"
    _draw_ranges(ax, list(found), found.values(), color, label)
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
    found = _weight_runs(config, runs, size)
    label = f"k = {size[0]}, p = {size[1]}"
    best = margin.max_margin(size[1], size[0])
    shares = [weight / best for weight in found]
    _draw_ranges(ax, shares, found.values(), color, label)
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
