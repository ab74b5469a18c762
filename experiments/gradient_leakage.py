"""Gradient leakage of transformers: when it works, and what noise it survives.

Three questions about arXiv 2311.13624:

1. Of which blocks does the gradient give the input away? Pooling, residual
   connection, network and length are varied; the attack is to succeed exactly
   where the Jacobian of the gradient in the input has full rank.
2. How much noise stops it, what privacy is that, and what is left of a model
   that is trained so?
3. Does descent with perturbed gradients keep the rate T^(-1/2)?

Shown on digits as pictures, and on MiniLM: the words of a sentence are read off
the gradient of its first layer.
"""

import functools
import itertools
import math
import os
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import flatten_util
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import harness
from jaxattn.data import load_digits
from jaxattn.models import load_minilm, minilm_apply, minilm_tokenize
from jaxattn.models.leakage import LeakageBlock
from jaxattn.privacy import (
  dp_gradient,
  gaussian_epsilon,
  gaussian_sigma,
  perturbed_sgd_bound,
)
from jaxattn.regression import gradient_leakage, tokens
from jaxattn.scaling import fit_slope

# Pooling, residual connection, network.
ARCHITECTURES = tuple(
  itertools.product(("mean", "cls"), (True, False), (True, False))
)
_DIGIT_BLOCK = LeakageBlock(mlp=16, num_classes=10)
_ATTENTION = ("query", "key", "value")
# What is shown of privacy: from here on it means something.
_MEANINGFUL = 10.0

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Points = dict[str, Any]


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  cells = [
    wd.point(f"attack/n={n}", functools.partial(attack_point, config, n))
    for n in harness.progress(config.lengths, "lengths")
  ]
  point = {
    name: wd.point(name, functools.partial(compute, config))
    for name, compute in (
      ("defence", defence_point),
      ("training", training_point),
      ("digits", digits_point),
      ("descent", descent_point),
    )
  }
  if config.minilm:
    point["minilm"] = wd.point(
      "minilm", functools.partial(minilm_point, config)
    )
  table = {key: np.concatenate([c[key] for c in cells]) for key in cells[0]}
  figure = _draw(config, table, point)
  data = {f"{name}, {k}": x for name, p in point.items() for k, x in p.items()}
  harness.save_figure(wd, figure, table | data)
  return harness.finish(
    wd,
    claim=(
      "The gradient of a transformer determines its private input under rank "
      "conditions that can be checked; noise of any meaningful differential "
      "privacy defeats the attack, and descent under such noise keeps its rate."
    ),
    source="arXiv:2311.13624",
    paper="conditions of the attack, a defence by noise, and convergence under "
    "perturbed gradients (no numbers available)",
    checks=[
      *_attack_checks(config, table),
      *_defence_checks(config, point["defence"]),
      *_picture_checks(config, point),
      *_descent_checks(config, point["descent"]),
    ],
  )


# --- blocks of every kind ---


def gated_loss(params: dict[str, Any], x: jax.Array, y: Any) -> jax.Array:
  """A block of :class:`LeakageBlock` whose architecture is data.

  ``residual`` is 1 or 0, ``pool`` the weights of tokens; a network of zeros is
  none, and has no gradient. One program then serves all eight blocks.
  """
  z = x + params["pos"]
  q, k, v = (z @ params[name] for name in ("w_q", "w_k", "w_v"))
  weights = nn.softmax(q @ k.T / q.shape[1] ** 0.5)
  o = weights @ v @ params["w_o"] + params["residual"] * z
  hidden = nn.gelu(o @ params["w_1"] + params["b_1"][None])
  o = o + hidden @ params["w_2"]
  log_p = nn.log_softmax(params["pool"] @ o @ params["w_c"] + params["b_c"])
  return -log_p[y]


def gated_params(
  params: dict[str, jax.Array], pooling: str, residual: bool, mlp: bool
) -> dict[str, jax.Array]:
  """Parameters of a :class:`LeakageBlock` for :func:`gated_loss`."""
  n = len(params["pos"])
  first = jnp.arange(n) == 0
  pool = jnp.full(n, 1 / n) if pooling == "mean" else 1.0 * first
  network = {k: mlp * params[k] for k in ("w_1", "b_1", "w_2")}
  gates = {"residual": jnp.asarray(1.0 * residual), "pool": pool}
  return params | network | gates


def draw_block(
  rng: np.random.Generator, n: int, dim: int, mlp: int, classes: int
) -> dict[str, jax.Array]:
  """Random parameters of a block, about as they are initialized."""
  shapes = {
    "pos": (n, dim),
    **dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), (dim, dim)),
    "w_1": (dim, mlp),
    "b_1": (mlp,),
    "w_2": (mlp, dim),
    "w_c": (dim, classes),
    "b_c": (classes,),
  }
  scales = {"pos": 0.2, "b_1": 0.1, "b_c": 0.1}
  return {
    k: jnp.asarray(rng.normal(size=s) * scales.get(k, s[0] ** -0.5))
    for k, s in shapes.items()
  }


def attack_point(config: Config, n: int) -> Points:
  """Rank and success, for each of the architectures."""
  with jax.enable_x64(True):
    rng = np.random.default_rng([config.seed, n])
    sizes = n, config.dim, config.mlp, config.num_classes
    embed = jnp.asarray(0.5 * rng.normal(size=(config.vocab, config.dim)))
    base = draw_block(rng, *sizes)
    ids = rng.integers(config.vocab, size=(len(ARCHITECTURES), n))
    kinds = [gated_params(base, *kind) for kind in ARCHITECTURES]
    params = jax.tree.map(lambda *x: jnp.stack(x), *kinds)
    keys = jax.random.split(jax.random.key(config.seed), len(kinds))
    call = jax.jit(functools.partial(_attack_cells, config))
    report, found = call(keys, params, embed[ids])
    metrics = [
      tokens.reconstruction_metrics(e, embed[i], vocab=embed)
      for e, i in zip(found.embeddings, ids, strict=True)
    ]
    errors, accuracies = (
      np.array([m[k] for m in metrics]) for k in ("rel_error", "token_accuracy")
    )
    losses = found.losses.min(1)
  return {
    "length": np.full(len(kinds), n),
    "unknowns": report.unknowns,
    "rank": report.rank,
    "condition": report.condition,
    "loss": losses,
    "error": errors,
    "accuracy": accuracies,
  }


def _attack_cells(
  config: Config, keys: jax.Array, params: Any, x: jax.Array
) -> tuple[Any, Any]:
  """Report and attack of several blocks, one after the other."""
  seen = {k: k not in ("residual", "pool") for k in params}
  options = gradient_leakage.AttackConfig(
    max_steps=config.max_steps, init_scale=0.5
  )

  def one(args: Any) -> tuple[Any, Any]:
    key, params, x = args
    leaked = jax.grad(gated_loss)(params, x, 1)
    report = gradient_leakage.leak_report(
      gated_loss, params, x, 1, mask_leaves=seen
    )
    found = gradient_leakage.attack(
      key,
      gated_loss,
      params,
      leaked,
      shape=x.shape,
      y=1,
      num_starts=config.num_starts,
      mask_leaves=seen,
      config=options,
    )
    return report, found._replace(log=jnp.zeros(()))

  return jax.lax.map(one, (keys, params, x))


# --- noise ---


def defence_point(config: Config) -> Points:
  """(sigmas, targets) accuracy and error of the attack on noisy gradients."""
  c = config.defence
  with jax.enable_x64(True):
    rng = np.random.default_rng([config.seed, 0])
    embed = jnp.asarray(0.5 * rng.normal(size=(config.vocab, c.dim)))
    params = draw_block(rng, c.length, c.dim, c.mlp, c.num_classes)
    ids = rng.integers(config.vocab, size=(c.num_targets, c.length))
    labels = rng.integers(c.num_classes, size=c.num_targets)
    block = LeakageBlock(mlp=c.mlp, num_classes=c.num_classes)
    found = noisy_attacks(
      jax.random.split(jax.random.key(config.seed), c.num_targets),
      params,
      embed[ids],
      jnp.asarray(labels),
      jnp.asarray(c.sigmas),
      block=block,
      num_starts=c.num_starts,
      max_steps=c.max_steps,
    )
    decoded, _ = tokens.decode_tokens(found, embed)
    gap = found - embed[ids][None]
    error = (
      jnp.linalg.norm(gap, axis=(2, 3))
      / jnp.linalg.norm(embed[ids], axis=(1, 2))[None]
    )
  return {
    "accuracy": (np.asarray(decoded) == ids[None]).mean(2),
    "error": error,
    "num_params": sum(x.size for x in params.values()),
  }


@functools.partial(
  jax.jit, static_argnames=("block", "num_starts", "max_steps")
)
def noisy_attacks(
  keys: jax.Array,
  params: Any,
  x: jax.Array,
  labels: jax.Array,
  sigmas: jax.Array,
  *,
  block: LeakageBlock,
  num_starts: int,
  max_steps: int,
) -> jax.Array:
  """(sigmas, targets, n, d) reconstructions of (targets, n, d) inputs.

  The clip is the norm of each gradient itself: the best for the attacker, who
  would not know how much was clipped.
  """
  config = gradient_leakage.AttackConfig(max_steps=max_steps, init_scale=0.5)

  def one(args: Any) -> jax.Array:
    sigma, (key, x, y) = args
    leaked = jax.grad(block.loss)(params, x, y)
    private = dp_gradient(
      key, clip=optax.tree.norm(leaked), noise_multiplier=sigma
    )
    batch = jax.tree.map(lambda g: g[None], leaked)
    noisy, _ = private.update(batch, private.init(params))
    return gradient_leakage.attack(
      key,
      block.loss,
      params,
      noisy,
      shape=x.shape,
      num_starts=num_starts,
      config=config,
    ).embeddings

  targets = keys, x, labels

  def all_targets(sigma: jax.Array) -> jax.Array:
    return jax.lax.map(lambda t: one((sigma, t)), targets)

  return jax.lax.map(all_targets, sigmas)


def training_point(config: Config) -> Points:
  """Loss and accuracy on digits held out, after training with noise."""
  x, y = _digits(config.seed)
  train = slice(0, config.train_size)
  params = _DIGIT_BLOCK.init(jax.random.key(config.seed), x[0])["params"]
  call = jax.jit(functools.partial(_train, config))
  ends = [
    call(params, x[train], y[train], jnp.float32(sigma))
    for sigma in harness.progress(config.train_sigmas, "training")
  ]
  held = slice(config.train_size, None)
  score = jax.jit(jax.vmap(_scores, (None, 0, 0)))
  losses, right = zip(*(score(p, x[held], y[held]) for p in ends), strict=True)
  return {
    "loss": [float(v.mean()) for v in losses],
    "accuracy": [float(v.mean()) for v in right],
    "epsilon": [
      gaussian_epsilon(s, config.delta, num_steps=config.train_steps)
      if s
      else math.inf
      for s in config.train_sigmas
    ],
  }


def _train(
  config: Config, params: Any, x: jax.Array, y: jax.Array, sigma: jax.Array
) -> Any:
  optimizer = optax.chain(
    dp_gradient(
      jax.random.key(config.seed), clip=config.clip, noise_multiplier=sigma
    ),
    optax.sgd(config.train_rate, momentum=0.9),
  )
  grads = jax.vmap(jax.grad(_DIGIT_BLOCK.loss), (None, 0, 0))

  def step(carry: Any, _: None) -> tuple[Any, None]:
    params, state = carry
    updates, state = optimizer.update(grads(params, x, y), state, params)
    return (optax.apply_updates(params, updates), state), None

  carry = params, optimizer.init(params)
  (params, _), _ = jax.lax.scan(step, carry, length=config.train_steps)
  return params


def _scores(
  params: Any, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
  logits = cast(jax.Array, _DIGIT_BLOCK.apply({"params": params}, x))
  return -nn.log_softmax(logits)[y], logits.argmax() == y


def _digits(seed: int) -> tuple[jax.Array, jax.Array]:
  """Shuffled images (N, 8, 8) in [0, 1], and labels."""
  pixels, labels = load_digits()
  order = np.random.default_rng(seed).permutation(len(pixels))
  images = pixels[order].reshape(-1, 8, 8) / np.float32(16)
  return jnp.asarray(images), jnp.asarray(labels[order])


# --- pictures and words ---


def digits_point(config: Config) -> Points:
  """(sigmas, digits, 8, 8) reconstructions, and the images."""
  with jax.enable_x64(True):
    images, labels = _digits(config.seed)
    first = [int(np.argmax(labels == digit)) for digit in config.digits]
    x = images[np.array(first)].astype(jnp.float64)
    rng = np.random.default_rng([config.seed, 1])
    params = draw_block(rng, 8, 8, _DIGIT_BLOCK.mlp, 10)
    found = noisy_attacks(
      jax.random.split(jax.random.key(config.seed), len(x)),
      params,
      x,
      jnp.asarray(config.digits),
      jnp.asarray(config.digit_sigmas),
      block=_DIGIT_BLOCK,
      num_starts=config.digit_starts,
      max_steps=config.max_steps,
    )
    gap = jnp.linalg.norm(found - x[None], axis=(2, 3))
    error = gap / jnp.linalg.norm(x, axis=(1, 2))[None]
  return {"image": x, "found": found, "error": error}


def minilm_point(config: Config) -> Points:
  """Words read off a noisy gradient of MiniLM, by noise multiplier."""
  params = load_minilm()
  length = len(config.sentence.split()) + 8
  ids, mask = minilm_tokenize([config.sentence], length)
  ids, mask = ids[:, : mask.sum()], mask[:, : mask.sum()]
  head = jax.random.normal(jax.random.key(config.seed), (384, 2))
  first = {k: params["layer_0"][k]["kernel"] for k in _ATTENTION}

  def loss(kernels: dict[str, jax.Array]) -> jax.Array:
    layer = params["layer_0"] | {
      k: params["layer_0"][k] | {"kernel": w} for k, w in kernels.items()
    }
    out = minilm_apply(params | {"layer_0": layer}, ids, mask)
    return -nn.log_softmax(out.embedding[0] @ head)[1]

  leaked = jax.jit(jax.grad(loss))(first)
  pos = params["position"]["embedding"][: ids.shape[1]]
  pos = pos + params["token_type"]["embedding"][:1]
  norm = functools.partial(_layer_norm, params["norm"])
  call = jax.jit(
    functools.partial(
      gradient_leakage.span_attack, w_keys=_ATTENTION, token_fn=norm
    )
  )
  size, batch = optax.tree.norm(leaked), jax.tree.map(lambda g: g[None], leaked)
  accuracy, ranks, words = [], [], []
  for i, sigma in enumerate(config.minilm_sigmas):
    private = dp_gradient(
      jax.random.key(i), clip=float(size), noise_multiplier=sigma
    )
    noisy, _ = private.update(batch, private.init(leaked))
    found = call(noisy, params["word"]["embedding"], pos)
    accuracy.append(float((np.asarray(found.ids) == ids[0]).mean()))
    ranks.append(int(found.rank))
    words.append(np.asarray(found.ids))
  return {"accuracy": accuracy, "rank": ranks, "ids": words, "true": ids[0]}


def _layer_norm(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  x = x - x.mean(-1, keepdims=True)
  x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-12)
  return x * params["scale"][None] + params["bias"][None]


# --- descent under noise ---


def descent_point(config: Config) -> Points:
  """(stds, steps) mean squared gradient along runs, and the bound on it.

  Of a block on digits, with its largest curvature at the end of each run, and
  ``simple``: of f = sum log(1 + x^2) / 2, whose smoothness is known to be 1.
  """
  x, y = _digits(config.seed)
  x, y = x[: config.descent_size], y[: config.descent_size]
  params = _DIGIT_BLOCK.init(jax.random.key(config.seed), x[0])["params"]
  start, unravel = flatten_util.ravel_pytree(params)

  def loss(flat: jax.Array) -> jax.Array:
    each = jax.vmap(_DIGIT_BLOCK.loss, (None, 0, 0))
    return each(unravel(flat), x, y).mean()

  def simple(x: jax.Array) -> jax.Array:
    return jnp.log1p(x**2).sum() / 2

  block = _descents(config, loss, start, config.smoothness)
  plain = _descents(config, simple, jnp.full(50, 3.0, jnp.float32), 1.0)
  return block | {f"simple {k}": v for k, v in plain.items()}


def _descents(
  config: Config, loss: Any, start: jax.Array, smoothness: float
) -> Points:
  average = jax.jit(functools.partial(_descend, loss))
  gap = float(jax.jit(loss)(start))
  rows = []
  for std, num in itertools.product(config.noise_stds, config.descent_steps):
    bound, step_size = perturbed_sgd_bound(
      f_gap=gap,
      smoothness=smoothness,
      dim=start.size,
      noise_std=std,
      num_steps=num,
    )
    key = jax.random.key(config.seed)
    rows.append((*average(key, start, step_size, std, num), bound))
  shape = len(config.noise_stds), len(config.descent_steps)
  names = ("average", "sharpness", "bound")
  return {
    name: np.reshape([float(v) for v in row], shape)
    for name, row in zip(names, zip(*rows, strict=True), strict=True)
  }


def _descend(
  loss: Any,
  rng: jax.Array,
  start: jax.Array,
  step_size: float,
  noise_std: float,
  num_steps: int,
) -> tuple[jax.Array, jax.Array]:
  """Mean squared gradient of a run, and the largest curvature at its end."""

  def step(t: jax.Array, carry: Any) -> Any:
    x, total = carry
    grad = jax.grad(loss)(x)
    noise = jax.random.normal(jax.random.fold_in(rng, t), x.shape, x.dtype)
    x = x - step_size * (grad + noise_std * noise)
    return x, total + grad @ grad

  carry = start, jnp.zeros((), start.dtype)
  x, total = jax.lax.fori_loop(0, num_steps, step, carry)

  def power(v: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
    hv = jax.jvp(jax.grad(loss), (x,), (v,))[1]
    size = jnp.linalg.norm(hv)
    return hv / size, size

  v = jax.random.normal(rng, x.shape, x.dtype)
  v = v / jnp.linalg.norm(v)
  return total / num_steps, jax.lax.scan(power, v, length=30)[1][-1]


# --- checks ---


def _attack_checks(
  config: Config, table: dict[str, np.ndarray]
) -> list[harness.Check]:
  full = table["rank"] == table["unknowns"]
  recovered = table["error"] <= config.recovered
  agreement = (full == recovered).mean()
  return [
    harness.Check(
      "share of blocks recovered if and only if of full rank",
      agreement,
      *config.accepted.agreement,
    ),
    harness.Check("share of blocks of full rank", full.mean()),
    harness.Check(
      "largest loss of an attack that failed",
      np.max(table["loss"], where=~recovered, initial=0.0),
    ),
  ]


def _defence_checks(config: Config, point: Points) -> list[harness.Check]:
  sigmas = np.array(config.defence.sigmas)
  accuracy = point["accuracy"].mean(1)
  private = sigmas >= gaussian_sigma(_MEANINGFUL, config.delta)
  excess = accuracy[private].max() - 1 / config.vocab
  chosen = config.accepted
  stops = sigmas[(accuracy <= 0.5) & (sigmas > 0)]
  least = float(stops.min()) if stops.size else math.nan
  return [
    harness.Check(
      "token accuracy above chance at epsilon 10",
      excess,
      -math.inf,
      chosen.excess_accuracy,
    ),
    harness.Check(
      "largest rise of accuracy with noise",
      np.diff(accuracy).max(),
      -math.inf,
      chosen.rise,
    ),
    harness.Check("token accuracy without noise", accuracy[0], 0.95),
    harness.Check("least noise multiplier that halves accuracy", least),
    harness.Check(
      "log10 of epsilon there",
      math.log10(gaussian_epsilon(least, config.delta))
      if math.isfinite(least)
      else math.nan,
    ),
  ]


def _picture_checks(
  config: Config, point: dict[str, Points]
) -> list[harness.Check]:
  errors = point["digits"]["error"]
  clean, private = config.accepted.digit_error
  checks = [
    harness.Check("largest error of a digit", errors[0].max(), 0.0, clean),
    harness.Check(
      "least error of a digit at epsilon 10", errors[-1].min(), private
    ),
  ]
  if config.minilm:
    accuracy = point["minilm"]["accuracy"]
    clean, private = config.accepted.minilm_accuracy
    checks += [
      harness.Check("words of MiniLM read off", accuracy[0], clean),
      harness.Check("the same at epsilon 10", accuracy[-1], -math.inf, private),
    ]
  return checks


def _slopes(config: Config, averages: np.ndarray) -> dict[float, float]:
  """Of the mean squared gradient in T, for each noise but none."""
  return {
    std: float(fit_slope(config.descent_steps, row).slope)
    for std, row in zip(config.noise_stds, averages, strict=True)
    if std
  }


def _descent_checks(config: Config, point: Points) -> list[harness.Check]:
  ratio = max(
    (point[f"{kind}average"] / point[f"{kind}bound"]).max()
    for kind in ("", "simple ")
  )
  checks = [
    harness.Check("squared gradient over its bound", ratio, 0.0, 1.0),
    harness.Check(
      "largest curvature over the smoothness",
      point["sharpness"].max() / config.smoothness,
      0.0,
      1.0,
    ),
  ]
  for std, slope in _slopes(config, point["simple average"]).items():
    name = f"slope in T, simple function, noise {std:g}"
    checks.append(harness.Check(name, slope, *config.accepted.slope))
  for std, slope in _slopes(config, point["average"]).items():
    name = f"slope in T, block, noise {std:g}"
    checks.append(harness.Check(name, slope, *config.accepted.slope))
  return checks


# --- figure ---


def _draw(
  config: Config, table: dict[str, np.ndarray], point: dict[str, Points]
) -> Figure:
  harness.use_style()
  figure = plt.figure(figsize=(13, 13.5))
  grid = figure.add_gridspec(3, 2, height_ratios=(1, 1, 1.05))
  _draw_attack(figure.add_subplot(grid[0, 0]), config, table)
  _draw_defence(figure.add_subplot(grid[0, 1]), config, point)
  _draw_training(figure.add_subplot(grid[1, 0]), config, point["training"])
  _draw_descent(figure.add_subplot(grid[1, 1]), config, point["descent"])
  _draw_digits(figure.add_subfigure(grid[2, 0]), config, point["digits"])
  words = figure.add_subplot(grid[2, 1])
  _draw_words(words, config, point.get("minilm"))
  return figure


def _draw_attack(
  ax: Axes, config: Config, table: dict[str, np.ndarray]
) -> None:
  share = table["rank"] / table["unknowns"]
  error = np.maximum(table["error"], 1e-17)
  kinds = np.tile([k[0] for k in ARCHITECTURES], len(config.lengths))
  for kind, color, marker in zip(("mean", "cls"), harness.PALETTE, "os"):
    shown = kinds == kind
    ax.semilogy(
      share[shown],
      error[shown],
      marker,
      color=color,
      alpha=0.75,
      markersize=8,
      label=f"pooling: {kind}",
    )
  ax.axhline(config.recovered, color="#6b7480", linestyle="--", linewidth=1)
  ax.set(
    title="What is recovered, by the rank of the gradient",
    xlabel="rank of the gradient in the input, over unknowns",
    ylabel="relative error of the attack",
    ylim=(1e-17, 30),
  )
  ax.legend(loc="lower left")


def _draw_defence(ax: Axes, config: Config, point: dict[str, Points]) -> None:
  curves = [("block, Gauss-Newton", config.defence.sigmas)]
  values = [point["defence"]["accuracy"].mean(1)]
  if config.minilm:
    curves.append(("MiniLM, span of its gradient", config.minilm_sigmas))
    values.append(point["minilm"]["accuracy"])
  for (label, sigmas), accuracy, color in zip(curves, values, harness.PALETTE):
    ax.plot(np.maximum(sigmas, 1e-7), accuracy, "o-", color=color, label=label)
  ax.set_xscale("log")
  for epsilon in (1.0, _MEANINGFUL):
    sigma = gaussian_sigma(epsilon, config.delta)
    ax.axvline(sigma, color="#6b7480", linestyle="--", linewidth=1)
    ax.annotate(
      rf"$\varepsilon$ = {epsilon:g}",
      (sigma, 1.03),
      rotation=90,
      ha="right",
      va="top",
      color="#6b7480",
    )
  ax.set(
    title="The attack under noise, and what privacy asks for",
    xlabel=r"noise multiplier $\sigma$ of one release (leftmost: none)",
    ylabel="share of tokens recovered",
    ylim=(-0.03, 1.05),
    xlim=(5e-8, 8),
  )
  ax.legend(loc="lower left")


def _draw_training(ax: Axes, config: Config, point: Points) -> None:
  at = np.arange(len(config.train_sigmas))
  ax.plot(at, point["accuracy"], "o-", color=harness.PALETTE[0])
  ax.axhline(0.1, color="#6b7480", linestyle=":", linewidth=1)
  labels = [
    f"{s:g}\n" + (r"$\infty$" if math.isinf(e) else f"{e:.3g}")
    for s, e in zip(config.train_sigmas, point["epsilon"], strict=True)
  ]
  ax.set_xticks(at, labels)
  ax.set(
    title=f"A model trained so: digits, {config.train_size} examples a step",
    xlabel=r"noise multiplier $\sigma$, and $\varepsilon$ of all "
    f"{config.train_steps} steps",
    ylabel="accuracy on digits held out",
    xlim=(-0.5, len(at) - 0.5),
    ylim=(0, 1),
  )
  for i, loss in enumerate(point["loss"]):
    ax.annotate(
      f"loss {loss:.2g}",
      (i, point["accuracy"][i]),
      xytext=(0, 9),
      textcoords="offset points",
      ha="center",
      fontsize=9,
    )


def _draw_descent(ax: Axes, config: Config, point: Points) -> None:
  steps = config.descent_steps
  for kind, style in (("simple ", "o-"), ("", "s--")):
    name = "simple function" if kind else "block on digits"
    slopes = _slopes(config, point[f"{kind}average"])
    rows = zip(config.noise_stds, point[f"{kind}average"], strict=True)
    for (std, row), color in zip(
      [(s, r) for s, r in rows if s], harness.PALETTE
    ):
      label = f"{name}, s = {std:g}: $T^{{{slopes[std]:.2f}}}$"
      ax.loglog(steps, row, style, color=color, label=label)
  for row, color in zip(point["simple bound"][1:], harness.PALETTE):
    ax.loglog(steps, row, ":", color=color, alpha=0.8)
  ax.set(
    title="Descent under noise (dotted: bound, simple function)",
    xlabel="T, number of steps",
    ylabel=r"mean of $\|\nabla f\|^2$ over a run",
  )
  ax.set_xticks(steps, [f"{t:g}" for t in steps])
  ax.set_xticks([], minor=True)
  low, high = ax.get_ylim()
  ax.set_ylim(low, high * 30)
  ax.legend(loc="upper right", ncols=2, fontsize=8.5)


def _draw_digits(figure: Any, config: Config, point: Points) -> None:
  rows = [point["image"], *point["found"]]
  names = ["original"]
  for sigma, errors in zip(config.digit_sigmas, point["error"], strict=True):
    noise = "no noise"
    if sigma:
      epsilon = gaussian_epsilon(sigma, config.delta)
      noise = rf"$\sigma$ = {sigma:g}, $\varepsilon$ = {epsilon:.3g}"
    names.append(f"{noise}\nerror {np.median(errors):.1g}")
  axes = figure.subplots(len(rows), len(config.digits), squeeze=False)
  figure.suptitle("Digits from their gradients", weight="bold", fontsize=12)
  for row, (name, images) in enumerate(zip(names, rows, strict=True)):
    for ax, image in zip(axes[row], images, strict=True):
      ax.imshow(image, cmap="gray_r", vmin=0, vmax=1)
      ax.set(xticks=[], yticks=[])
      ax.grid(visible=False)
      for side in ax.spines.values():
        side.set_visible(True)
    axes[row, 0].set_ylabel(
      name, rotation=0, ha="right", va="center", fontsize=9.5
    )


def _draw_words(ax: Axes, config: Config, point: Points | None) -> None:
  ax.axis("off")
  ax.set_title("A sentence from the gradient of MiniLM's first layer")
  if point is None:
    ax.text(0, 0.9, "left out of this tier", va="top")
    return
  words = ["[CLS]", *config.sentence.split(), "[SEP]"]
  if len(words) != len(point["true"]):
    raise ValueError("sentence must be of words that are one piece each")
  rows = [("input", point["true"])]
  for sigma, ids in zip(config.minilm_sigmas, point["ids"], strict=True):
    rows.append((f"noise {sigma:g}" if sigma else "no noise", ids))
  step = 0.95 / len(rows)
  for i, (name, ids) in enumerate(rows):
    height = 0.97 - i * step
    right = np.asarray(ids) == point["true"]
    shown = [w if r else "–" for w, r in zip(words, right, strict=True)]
    ax.text(0, height, name, va="top", weight="bold", fontsize=9.5)
    ax.text(0.2, height, " ".join(shown), va="top", fontsize=8.5)


if __name__ == "__main__":
  harness.main(run, "gradient-leakage")
