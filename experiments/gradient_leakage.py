"""Gradient leakage of transformers: when it works, and what noise it survives.

Three questions about arXiv 2311.13624:

1. Of which blocks does the gradient give the input away? Pooling, residual
   connection, network, length and what of the gradient is seen are varied; the
   attack is to succeed exactly where the Jacobian of the gradient in the input
   has full rank.
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

# Pooling, residual connection, network, and the gradients that are seen: all,
# all but that in positions, or those of attention alone.
CELLS = (
  *itertools.product(
    ("mean", "cls"), (True, False), (True, False), ("all", "no pos")
  ),
  *itertools.product(("mean",), (True, False), (True,), ("attention",)),
)
_GATES = ("residual", "pool", "see_pos", "see_rest")
_DIGIT_BLOCK = LeakageBlock(mlp=16, num_classes=10)
_ATTENTION = ("query", "key", "value")
# What is shown of privacy: from here on it means something.
_MEANINGFUL = 10.0
# The one axis of noise multipliers.
_SIGMAS = (5e-8, 300)

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
  for name, compute in (("minilm", minilm_point), ("stack", stack_point)):
    if config[name]:
      point[name] = wd.point(name, functools.partial(compute, config))
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
      *_stack_checks(config, point),
      *_defence_checks(config, point["defence"]),
      *_picture_checks(config, point),
      *_descent_checks(config, point["descent"]),
    ],
  )


# --- blocks of every kind ---


def gated_loss(params: dict[str, Any], x: jax.Array, y: Any) -> jax.Array:
  """A block of :class:`LeakageBlock` whose architecture is data.

  ``residual`` is 1 or 0, ``pool`` the weights of tokens; a network of zeros is
  none, and has no gradient. Of positions and of what follows attention there is
  a gradient if ``see_pos`` and ``see_rest`` are 1. One program then serves all.
  """
  gates = {"pos": "see_pos"}
  gates |= dict.fromkeys(("w_1", "b_1", "w_2", "w_c", "b_c"), "see_rest")
  params = params | {k: _gated(params[k], params[g]) for k, g in gates.items()}
  o = _layer(x + params["pos"], params, params["residual"])
  log_p = nn.log_softmax(params["pool"] @ o @ params["w_c"] + params["b_c"])
  return -log_p[y]


def stacked_loss(params: dict[str, Any], x: jax.Array, y: Any) -> jax.Array:
  """Mean loss of a batch (B, n, d) under blocks on top of each other.

  What a block has is stacked under ``layers``; labels are (B,).
  """

  def one(x: jax.Array, y: jax.Array) -> jax.Array:
    def up(z: jax.Array, layer: Any) -> tuple[jax.Array, None]:
      return _layer(z, layer), None

    o, _ = jax.lax.scan(up, x + params["pos"], params["layers"])
    return -nn.log_softmax(o.mean(0) @ params["w_c"] + params["b_c"])[y]

  return jax.vmap(one)(x, y).mean()


def _layer(
  z: jax.Array, params: dict[str, jax.Array], residual: float | jax.Array = 1.0
) -> jax.Array:
  q, k, v = (z @ params[name] for name in ("w_q", "w_k", "w_v"))
  weights = nn.softmax(q @ k.T / q.shape[1] ** 0.5)
  o = weights @ v @ params["w_o"] + residual * z
  hidden = nn.gelu(o @ params["w_1"] + params["b_1"][None])
  return o + hidden @ params["w_2"]


def _gated(x: jax.Array, gate: jax.Array) -> jax.Array:
  """The same value; without a gradient if the gate is 0."""
  return gate * x + (1 - gate) * jax.lax.stop_gradient(x)


def gated_params(
  params: dict[str, jax.Array],
  pooling: str,
  residual: bool,
  mlp: bool,
  seen: str = "all",
) -> dict[str, jax.Array]:
  """Parameters of a :class:`LeakageBlock` for :func:`gated_loss`."""
  n = len(params["pos"])
  first = jnp.arange(n) == 0
  pool = jnp.full(n, 1 / n) if pooling == "mean" else 1.0 * first
  network = {k: mlp * params[k] for k in ("w_1", "b_1", "w_2")}
  gates = {
    "residual": jnp.asarray(1.0 * residual),
    "pool": pool,
    "see_pos": jnp.asarray(1.0 * (seen == "all")),
    "see_rest": jnp.asarray(1.0 * (seen != "attention")),
  }
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
  """Rank and success, for each of the cells; rank -1 = not computed."""
  with jax.enable_x64(True):
    rng = np.random.default_rng([config.seed, n])
    sizes = n, config.dim, config.mlp, config.num_classes
    embed = jnp.asarray(0.5 * rng.normal(size=(config.vocab, config.dim)))
    base = draw_block(rng, *sizes)
    ids = rng.integers(config.vocab, size=(len(CELLS), n))
    kinds = [gated_params(base, *kind) for kind in CELLS]
    params = jax.tree.map(lambda *x: jnp.stack(x), *kinds)
    keys = jax.random.split(jax.random.key(config.seed), len(kinds))
    call = jax.jit(functools.partial(_attack_cells, config))
    (ranks, conditions), found = call(keys, params, embed[ids])
    # What leaves the gradient in positions out is the same in any order of
    # tokens at their positions.
    shifts = [base["pos"] * (cell[3] != "all") for cell in CELLS]
    errors = [
      tokens.reconstruction_metrics(
        e + shift, embed[i] + shift, permutation=cell[3] != "all"
      )["rel_error"]
      for e, i, shift, cell in zip(
        found.embeddings, ids, shifts, CELLS, strict=True
      )
    ]
    losses = found.losses.min(1)
  return {
    "length": np.full(len(kinds), n),
    "unknowns": np.full(len(kinds), n * config.dim),
    "rank": ranks,
    "condition": conditions,
    "loss": losses,
    "error": np.array(errors),
  }


def _attack_cells(
  config: Config, keys: jax.Array, params: Any, x: jax.Array
) -> tuple[Any, Any]:
  """Report and attack of several blocks, one after the other."""
  seen = {k: k not in _GATES for k in params}
  unknowns = x[0].size
  options = gradient_leakage.AttackConfig(
    max_steps=config.max_steps, init_scale=0.5
  )

  def one(args: Any) -> tuple[Any, Any]:
    key, params, x = args
    leaked = jax.grad(gated_loss)(params, x, 1)
    rank, condition = jnp.array(-1), jnp.array(jnp.nan)
    if unknowns <= config.report_unknowns:
      report = gradient_leakage.leak_report(
        gated_loss, params, x, 1, mask_leaves=seen
      )
      rank, condition = report.rank, report.condition
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
    return (rank, condition), found._replace(log=jnp.zeros(()))

  return jax.lax.map(one, (keys, params, x))


def stack_point(config: Config) -> Points:
  """The attack on a batch under several layers; labels differ and are known.

  So the order of examples is determined, and that of tokens by positions.
  """
  c = config.stack
  with jax.enable_x64(True):
    rng = np.random.default_rng([config.seed, 1])
    sizes = c.length, c.dim, c.mlp, c.batch
    blocks = [draw_block(rng, *sizes) for _ in range(c.num_layers)]
    outer = {k: blocks[0][k] for k in ("pos", "w_c", "b_c")}
    inner = [{k: x for k, x in b.items() if k not in outer} for b in blocks]
    params = outer | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *inner)}
    x = jnp.asarray(0.5 * rng.normal(size=(c.batch, c.length, c.dim)))
    y = jnp.arange(c.batch)
    found = gradient_leakage.attack(
      jax.random.key(config.seed),
      stacked_loss,
      params,
      jax.jit(jax.grad(stacked_loss))(params, x, y),
      shape=x.shape,
      y=y,
      num_starts=c.num_starts,
      config=gradient_leakage.AttackConfig(
        max_steps=c.max_steps, init_scale=0.5
      ),
    )
    error = jnp.linalg.norm(found.embeddings - x) / jnp.linalg.norm(x)
    loss = found.losses.min()
  return {"error": error, "loss": loss}


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

  def one(level: Any, target: Any) -> jax.Array:
    (index, sigma), (key, x, y) = level, target
    key, noise_key = jax.random.split(jax.random.fold_in(key, index))
    leaked = jax.grad(block.loss)(params, x, y)
    private = dp_gradient(
      noise_key, clip=optax.tree.norm(leaked), noise_multiplier=sigma
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

  def all_targets(level: Any) -> jax.Array:
    return jax.lax.map(functools.partial(one, level), targets)

  return jax.lax.map(all_targets, (jnp.arange(len(sigmas)), sigmas))


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
  """Descents under noise of a block on digits, and of a simple function.

  Of each run the mean squared gradient, the bound on it, the largest curvature
  on the way and the last loss; ``start`` is the first squared gradient of the
  block. The simple one is f = sum log(1 + x^2) / 2, whose smoothness is 1.
  """
  x, y = _digits(config.descent_seed)
  x, y = _standardized(x)[: config.descent_size], y[: config.descent_size]
  params = _DIGIT_BLOCK.init(jax.random.key(config.descent_seed), x[0])
  start, unravel = flatten_util.ravel_pytree(params["params"])

  def loss(flat: jax.Array) -> jax.Array:
    each = jax.vmap(_DIGIT_BLOCK.loss, (None, 0, 0))
    return each(unravel(flat), x, y).mean()

  def simple(x: jax.Array) -> jax.Array:
    return jnp.log1p(x**2).sum() / 2

  first = jax.jit(jax.grad(loss))(start)
  runs = [(std, 1.0, config.simple_steps) for std in config.simple_stds]
  block = _descents(config, loss, start, config.descents)
  plain = _descents(config, simple, jnp.full(50, 3.0, jnp.float32), runs)
  named = {f"simple {k}": v for k, v in plain.items()}
  return {"start": float(first @ first)} | block | named


def _standardized(x: jax.Array) -> jax.Array:
  """Each pixel with mean 0 and variance 1, unless it is always the same."""
  std = x.std(0)
  return (x - x.mean(0)[None]) / jnp.where(std > 0, std, 1)[None]


def _descents(
  config: Config, loss: Any, start: jax.Array, runs: Any
) -> dict[str, np.ndarray]:
  """By run; a case is noise, smoothness and several numbers of steps."""
  average = jax.jit(
    functools.partial(_descend, loss), static_argnames="num_probes"
  )
  gap = float(jax.jit(loss)(start))
  cases = [(s, smooth, num) for s, smooth, steps in runs for num in steps]
  rows = []
  for std, smoothness, num in harness.progress(cases, "descents"):
    bound, step_size = perturbed_sgd_bound(
      f_gap=gap,
      smoothness=smoothness,
      dim=start.size,
      noise_std=std,
      num_steps=num,
    )
    key = jax.random.key(config.descent_seed)
    found = average(
      key, start, step_size, std, num, num_probes=config.descent_probes
    )
    rows.append((std, smoothness, num, bound, *map(float, found)))
  names = (
    *("std", "smoothness", "steps", "bound"),
    *("average", "curvature", "loss"),
  )
  return dict(zip(names, np.array(rows).T, strict=True))


def _descend(
  loss: Any,
  rng: jax.Array,
  start: jax.Array,
  step_size: float,
  noise_std: float,
  num_steps: int,
  *,
  num_probes: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Mean squared gradient of a run, its largest curvature, and the last loss.

  Curvatures are found by the power method at so many points of the run, the
  last of which is its end.
  """

  def step(t: jax.Array, carry: Any) -> Any:
    x, total = carry
    grad = jax.grad(loss)(x)
    noise = jax.random.normal(jax.random.fold_in(rng, t), x.shape, x.dtype)
    x = x - step_size * (grad + noise_std * noise)
    return x, total + grad @ grad

  def stretch(carry: Any, i: jax.Array) -> tuple[Any, jax.Array]:
    x, total, v = carry
    low, high = (num_steps * j // num_probes for j in (i, i + 1))
    x, total = jax.lax.fori_loop(low, high, step, (x, total))

    def power(v: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
      hv = jax.jvp(jax.grad(loss), (x,), (v,))[1]
      size = jnp.linalg.norm(hv)
      return hv / size, size

    v, sizes = jax.lax.scan(power, v, length=20)
    return (x, total, v), sizes[-1]

  v = jax.random.normal(rng, start.shape, start.dtype)
  carry = start, jnp.zeros((), start.dtype), v / jnp.linalg.norm(v)
  (x, total, _), curvatures = jax.lax.scan(
    stretch, carry, jnp.arange(num_probes)
  )
  return total / num_steps, curvatures.max(), loss(x)


# --- checks ---


def _attack_checks(
  config: Config, table: dict[str, np.ndarray]
) -> list[harness.Check]:
  known = table["rank"] >= 0
  full = table["rank"] == table["unknowns"]
  recovered = table["error"] <= config.recovered
  whole = np.tile([c[3] == "all" for c in CELLS], len(config.lengths))
  agrees = full == recovered
  missed = known & full & ~recovered
  return [
    harness.Check(
      "share of blocks recovered if and only if of full rank",
      agrees[known].mean(),
      *config.accepted.agreement,
    ),
    harness.Check(
      "the same, of a gradient seen whole", agrees[known & whole].mean()
    ),
    harness.Check(
      "least condition of full rank that was missed",
      np.min(table["condition"], where=missed, initial=math.inf),
    ),
    harness.Check("share of blocks of full rank", full[known].mean()),
    harness.Check(
      "largest loss of an attack that failed",
      np.max(table["loss"], where=~recovered, initial=0.0),
    ),
  ]


def _stack_checks(
  config: Config, point: dict[str, Points]
) -> list[harness.Check]:
  if "stack" not in point:
    return []
  c = config.stack
  name = f"error of {c.batch} sequences under {c.num_layers} layers"
  return [
    harness.Check(name, point["stack"]["error"], 0.0, config.recovered),
  ]


def _defence_checks(config: Config, point: Points) -> list[harness.Check]:
  sigmas = np.array(config.defence.sigmas)
  accuracy = point["accuracy"].mean(1)
  private = sigmas >= gaussian_sigma(_MEANINGFUL, config.delta)
  excess = accuracy[private].max() - 1 / config.vocab
  chosen = config.accepted
  least = _stopping_sigma(config, point)
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


def _stopping_sigma(config: Config, point: Points) -> float:
  """The least noise multiplier that was tried and leaves half of the tokens."""
  sigmas = np.array(config.defence.sigmas)
  stops = sigmas[(point["accuracy"].mean(1) <= 0.5) & (sigmas > 0)]
  return float(stops.min()) if stops.size else math.nan


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


def _slopes(point: Points, kind: str = "") -> dict[float, tuple[float, float]]:
  """Slopes in T by noise, over all T and over those that decide.

  These are the T at which the bound is no larger than the first squared
  gradient of the block: before, it says nothing. There have to be three.
  """
  out = {}
  for std in np.unique(point[f"{kind}std"]):
    of_std = point[f"{kind}std"] == std
    deciding = of_std & (kind != "" or point["bound"] <= point["start"])
    steps, means = point[f"{kind}steps"], point[f"{kind}average"]
    if std:
      out[float(std)] = tuple(
        float(fit_slope(steps[at], means[at]).slope)
        if at.sum() >= 3
        else math.nan
        for at in (of_std, deciding)
      )
  return out


def _descent_checks(config: Config, point: Points) -> list[harness.Check]:
  accepted = config.accepted
  ratio = max(
    (point[f"{kind}average"] / point[f"{kind}bound"]).max()
    for kind in ("", "simple ")
  )
  curvature = (point["curvature"] / point["smoothness"]).max()
  checks = [
    harness.Check("squared gradient over its bound", ratio, 0.0, 1.0),
    harness.Check(
      "largest curvature of a run over the smoothness", curvature, 0.0, 1.0
    ),
    harness.Check("first squared gradient, block", point["start"]),
  ]
  for std, (slope, _) in _slopes(point, "simple ").items():
    name = f"slope in T, simple function, noise {std:g}"
    checks.append(harness.Check(name, slope, *accepted.slope))
  for std, (slope, deciding) in _slopes(point).items():
    at = point["std"] == std
    name = f"slope in T, block, noise {std:g}"
    if std in config.deciding_stds:
      checks.append(harness.Check(name, deciding, *accepted.slope))
    else:
      checks.append(harness.Check(f"{name}, bound above the start", slope))
    least = point["bound"][at].min() / point["start"]
    checks += [
      harness.Check(f"least bound over the start, noise {std:g}", least),
      harness.Check(f"last loss, noise {std:g}", point["loss"][at][-1]),
    ]
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
  _draw_descent(figure.add_subplot(grid[1, 1]), point["descent"])
  _draw_digits(figure.add_subfigure(grid[2, 0]), config, point["digits"])
  words = figure.add_subplot(grid[2, 1])
  _draw_words(words, config, point.get("minilm"))
  return figure


def _draw_attack(
  ax: Axes, config: Config, table: dict[str, np.ndarray]
) -> None:
  share = table["rank"] / table["unknowns"]
  error = np.maximum(table["error"], 1e-17)
  kinds = np.tile([f"{c[0]}, {c[3]}" for c in CELLS], len(config.lengths))
  markers = dict(zip(("all", "no pos", "attention"), "osD", strict=True))
  for kind in dict.fromkeys(kinds):
    pooling, seen = kind.split(", ")
    shown = (kinds == kind) & (share >= 0)
    ax.semilogy(
      share[shown],
      error[shown],
      markers[seen],
      color=harness.PALETTE[pooling == "cls"],
      alpha=0.7,
      markersize=7,
      label=f"pooling: {pooling}; seen: {seen}",
    )
  ax.axhline(config.recovered, color="#6b7480", linestyle="--", linewidth=1)
  ax.set(
    title="What is recovered, by the rank of the gradient",
    xlabel="rank of the gradient in the input, over unknowns",
    ylabel="relative error of the attack",
    ylim=(1e-17, 30),
  )
  ax.legend(loc="lower left", fontsize=8.5)


def _draw_defence(ax: Axes, config: Config, point: dict[str, Points]) -> None:
  curves = [("block, Gauss-Newton", config.defence.sigmas)]
  values = [point["defence"]["accuracy"].mean(1)]
  if config.minilm:
    curves.append(("MiniLM, span of its gradient", config.minilm_sigmas))
    values.append(point["minilm"]["accuracy"])
  for (label, sigmas), accuracy, color in zip(curves, values, harness.PALETTE):
    ax.plot(np.maximum(sigmas, 1e-7), accuracy, "o-", color=color, label=label)
  ax.set_xscale("log")
  marks = {
    rf"$\varepsilon$ = {e:g}": gaussian_sigma(e, config.delta)
    for e in (1.0, _MEANINGFUL)
  }
  marks["half of the tokens"] = _stopping_sigma(config, point["defence"])
  for label, sigma in marks.items():
    ax.axvline(sigma, color="#6b7480", linestyle="--", linewidth=1)
    ax.annotate(
      label,
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
    xlim=_SIGMAS,
  )
  ax.legend(loc="lower left")


def _draw_training(ax: Axes, config: Config, point: Points) -> None:
  at = np.maximum(config.train_sigmas, 1e-7)
  ax.semilogx(at, point["accuracy"], "o-", color=harness.PALETTE[0])
  ax.axhline(0.1, color="#6b7480", linestyle=":", linewidth=1)
  ax.set(
    title=f"A model trained so: digits, {config.train_size} examples a step",
    xlabel=rf"noise multiplier $\sigma$ of each of {config.train_steps} steps "
    "(leftmost: none)",
    ylabel="accuracy on digits held out",
    xlim=_SIGMAS,
    ylim=(0, 1.55),
    yticks=np.linspace(0, 1, 6),
  )
  for i, (loss, epsilon) in enumerate(
    zip(point["loss"], point["epsilon"], strict=True)
  ):
    size = r"$\infty$" if math.isinf(epsilon) else f"{epsilon:.2g}"
    ax.annotate(
      rf"loss {loss:.2g}, $\varepsilon$ {size}",
      (at[i], 0.98),
      ha="center",
      va="bottom",
      rotation=90,
      fontsize=8,
    )


def _draw_descent(ax: Axes, point: Points) -> None:
  for kind, style in (("simple ", "o"), ("", "s")):
    name = "block on digits" if not kind else "simple function"
    for (std, (slope, deciding)), color in zip(
      _slopes(point, kind).items(), harness.PALETTE[3 * (not kind) :]
    ):
      at = point[f"{kind}std"] == std
      steps = point[f"{kind}steps"][at]
      shown = deciding if math.isfinite(deciding) else slope
      label = f"{name}, s = {std:g}: $T^{{{shown:.2f}}}$"
      mean, bound = (point[f"{kind}{x}"][at] for x in ("average", "bound"))
      ax.loglog(steps, mean, f"{style}-", color=color, label=label)
      ax.loglog(steps, bound, ":", color=color, alpha=0.8)
  ax.axhline(point["start"], color="#6b7480", linestyle="--", linewidth=1)
  ax.set(
    title="Descent under noise (dotted: bounds; dashed: first, block)",
    xlabel="T, number of steps",
    ylabel=r"mean of $\|\nabla f\|^2$ over a run",
  )
  low, high = ax.get_ylim()
  ax.set_ylim(low / 30, high)
  ax.legend(loc="lower left", ncols=2, fontsize=8.5)


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
