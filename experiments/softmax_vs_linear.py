"""Softmax against linear attention: a fixed network, and trained models.

Five questions around arXiv 2310.11685:

1. Two data sets differ in the amplitude of one token. From which amplitude on
   does the paper's fixed network tell them apart, on top of softmax and of
   linear attention, in self- and in cross-attention?
2. How often does it err, by size of a token and by number of neurons?
3. Regression on one location, trained: linear attention against the closed form
   of the best that it can do.
4. Recall of many pairs with two trained layers. That softmax attention learns
   it is decided, and, where there are more pairs than the rank of linear
   attention's state, that linear attention does not. With fewer pairs its
   recall is only reported: how far it gets depends on how long it is trained.
5. Handwritten digits, pixel by pixel. Reported, not decided.

The gap of 1 is that of a fixed network: with other weights linear attention
separates these data sets too, which is computed and reported along with it. The
gap of 3 survives training.
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
import optax
from jax import lax
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import harness
from jaxattn import data
from jaxattn.attention import linear_attention, polynomial_attention

_KINDS = ("softmax", "linear")
_RECALL_KINDS = ("softmax", "linear (elu)")
_GREY = "#6b7480"
# The style's markers have a white edge, and a cross is nothing but edge.
_CROSS: dict[str, Any] = {
  "linestyle": "",
  "marker": "x",
  "markersize": 6,
  "markeredgecolor": "auto",
  "markeredgewidth": 1.6,
}
# Largest amplitude at which a transition is looked for.
_MOST = 1.6
_TEST_CHUNK = 4096

# A ConfigDict: what type a field has is known at run time only.
Config = Any


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  panels = {
    "success": _sweep(wd, "success", "n", config.lengths, success_point),
    "cross": _sweep(wd, "cross", "n", config.cross_lengths, cross_point),
    "by_b": _sweep(wd, "by_b", "b", config.bs, b_point),
    "by_dim": _sweep(wd, "by_dim", "d", config.dims, dim_point),
    "by_neurons": _sweep(wd, "by_neurons", "m", config.neurons, neurons_point),
    "regression": _train(
      wd, "regression", "L", config.regression_lengths, regression_point
    ),
    "recall": _train(wd, "recall", "pairs", config.pairs, recall_point),
  }
  digits = wd.point("digits", functools.partial(digits_point, wd.config, wd))
  other = wd.point("other_weights", functools.partial(other_weights, config))
  flat = {f"{k}/{n}": v for k, p in panels.items() for n, v in p.items()}
  harness.save_figure(wd, _draw(config, panels), flat | digits | other)
  return harness.finish(
    wd,
    claim=(
      "A fixed network on top of softmax self-attention tells two data sets "
      "apart that it cannot tell apart on top of linear attention; trained to "
      "find one location, linear attention stays at its closed-form error and "
      "softmax attention does not."
    ),
    source="arXiv:2310.11685, abstract (lower bound for linear attention)",
    paper="softmax: right with probability 1 - delta; linear: 0 on both sets",
    checks=[
      *_success_checks(config, panels["success"], panels["cross"]),
      *_transition_checks(config, panels),
      *_rate_checks(config, panels["by_dim"], panels["by_neurons"]),
      *_other_checks(config, other),
      *_regression_checks(config, panels["regression"]),
      *_reported(config, panels["recall"], digits),
    ],
  )


def _sweep(
  wd: harness.Workdir,
  name: str,
  letter: str,
  values: tuple[Any, ...],
  compute: Callable[..., dict[str, Any]],
) -> dict[str, np.ndarray]:
  """Points of all values, stacked: each array gets a first axis of them."""
  points = [
    wd.point(f"{name}/{letter}={v}", functools.partial(compute, wd.config, v))
    for v in harness.progress(values, name)
  ]
  return {key: np.stack([p[key] for p in points]) for key in points[0]}


def _train(
  wd: harness.Workdir,
  name: str,
  letter: str,
  values: tuple[Any, ...],
  compute: Callable[..., dict[str, Any]],
) -> dict[str, np.ndarray]:
  """The same for points that train, and keep their states in the workdir."""
  points = [
    wd.point(
      f"{name}/{letter}={v}", functools.partial(compute, wd.config, wd, v)
    )
    for v in values
  ]
  return {key: np.stack([p[key] for p in points]) for key in points[0]}


def _key(config: Config, *path: int) -> jax.Array:
  rng = jax.random.key(config.seed)
  return functools.reduce(jax.random.fold_in, path, rng)


# --- the fixed network ---


@functools.partial(
  jax.jit,
  static_argnames=("length", "dim", "num_neurons", "num_draws", "is_cross"),
)
def rates(
  rng: jax.Array,
  amplitude: jax.Array,
  b: jax.Array,
  *,
  length: int,
  dim: int,
  num_neurons: int,
  num_draws: int,
  is_cross: bool = False,
) -> jax.Array:
  """(2,) shares of draws with F > 0, on top of softmax and linear attention.

  A draw is a position and signs, the same for both and for all amplitudes. One
  F that is not finite makes the share NaN, which no range accepts.
  """
  from jaxattn.models import separation_network

  options = {"length": length, "dim": dim, "b": b}

  def draw(rng: jax.Array) -> jax.Array:
    where, sign = jax.random.split(rng)
    a, _ = data.separation_dataset(where, amplitude=amplitude, **options)
    query = None
    if is_cross:
      # Rows without a special one all ask the same: one of them is enough.
      query, _ = data.separation_dataset(where, amplitude=0.0, **options)
      query = query[:, :1]
    signs = jax.random.rademacher(sign, (num_neurons, dim), a.dtype)
    outputs = [
      separation_network(a, signs, b=b, attention=kind, query=query)[0]
      for kind in _KINDS
    ]
    f = jnp.stack(outputs)
    return jnp.where(jnp.isfinite(f), f > 0, jnp.nan)

  return lax.map(draw, jax.random.split(rng, num_draws)).mean(0)


def num_neurons(config: Config, length: int) -> int:
  """Neurons that miss with probability below delta."""
  return math.ceil(8 * math.log(length / config.delta))


def transition(rates_at: Callable[[float], Any], num_halvings: int) -> float:
  """Amplitude from which on half of the draws are told apart, by bisection."""
  low, high = 0.0, _MOST
  for _ in range(num_halvings):
    middle = (low + high) / 2
    half = float(rates_at(middle)[0]) >= 0.5
    low, high = (low, middle) if half else (middle, high)
  return (low + high) / 2


def _rates_at(
  config: Config, rng: jax.Array, length: int, **options: Any
) -> Callable[[float], np.ndarray]:
  sizes = {
    "dim": config.dim,
    "num_neurons": num_neurons(config, length),
    "num_draws": config.num_draws,
  }
  b = jnp.float32(options.pop("b", config.b))

  def at(amplitude: float) -> np.ndarray:
    a = jnp.float32(amplitude)
    return np.asarray(rates(rng, a, b, length=length, **(sizes | options)))

  return at


def success_point(config: Config, n: int) -> dict[str, Any]:
  """Rates of F > 0 by amplitude, the transition and its prediction."""
  from jaxattn import models

  at = _rates_at(config, _key(config, 0, n), n)
  grid = (*config.amplitudes, config.large, config.small)
  by_amplitude = np.stack([at(a) for a in grid])
  return {
    "rates": by_amplitude[:-2],
    "large": by_amplitude[-2],
    "small": by_amplitude[-1],
    "measured": transition(at, config.num_halvings),
    "predicted": models.separation_transition(n, config.b),
    "false_positive": models.separation_false_positive(
      config.dim, config.b, num_neurons(config, n)
    ),
  }


def cross_point(config: Config, n: int) -> dict[str, Any]:
  """The same for cross-attention."""
  from jaxattn import models

  at = _rates_at(config, _key(config, 1, n), n, is_cross=True)
  return {
    "large": at(config.cross_large),
    "small": at(config.small),
    "measured": transition(at, config.num_halvings),
    "predicted": models.separation_transition(n, config.b, query_amplitude=0.0),
    "false_positive": models.separation_false_positive(
      config.dim, config.b, num_neurons(config, n)
    ),
  }


def b_point(config: Config, b: float) -> dict[str, Any]:
  """The transition at another b, for large tokens."""
  from jaxattn import models

  n = config.b_length
  at = _rates_at(config, _key(config, 2), n, b=b, dim=config.b_dim)
  return {
    "measured": transition(at, config.num_halvings),
    "predicted": models.separation_transition(n, b),
  }


def dim_point(config: Config, dim: int) -> dict[str, Any]:
  """False positives on tokens without a special one."""
  from jaxattn import models

  options = {
    "dim": dim,
    "b": config.rate_b,
    "num_neurons": config.rate_neurons,
    "num_draws": config.rate_draws,
  }
  at = _rates_at(config, _key(config, 3, dim), config.rate_length, **options)
  predicted = models.separation_false_positive(
    dim, config.rate_b, config.rate_neurons
  )
  return {"rates": at(0.0), "predicted": predicted}


def neurons_point(config: Config, m: int) -> dict[str, Any]:
  """Misses of softmax attention on tokens with a special one."""
  options = {"num_neurons": m, "num_draws": config.rate_draws}
  at = _rates_at(config, _key(config, 4, m), config.rate_length, **options)
  return {"misses": 1 - at(config.large)[0], "bound": (7 / 8) ** m}


def other_weights(config: Config) -> dict[str, Any]:
  """Scores over L of the special row for X = e1 e1^T, linear attention."""
  from jaxattn.models import separation_network

  dim, length, b = config.dim, config.lengths[0], config.b
  scores = []
  for amplitude in (0.1, 0.7):
    a, _ = data.separation_dataset(
      _key(config, 5), length=length, dim=dim, amplitude=amplitude, b=b
    )
    x = jnp.zeros((dim, dim), a.dtype).at[0, 0].set(1)
    signs = jnp.ones((1, dim), a.dtype)
    f = separation_network(a, signs, b=b, attention="linear", x=x)[0]
    # One neuron, and all other rows are 0: add the threshold again.
    scores.append(float(f) / math.sqrt(math.log(length)) + 1.1 - b)
  return {"other_weights": np.array(scores)}


# --- trained models ---


def _adam(rate: float, num_steps: int) -> optax.GradientTransformation:
  warmup = min(100, num_steps // 4)
  return optax.adam(
    optax.warmup_cosine_decay_schedule(0.0, rate, warmup, num_steps)
  )


def regression_point(
  config: Config, wd: harness.Workdir, length: int
) -> dict[str, Any]:
  """(kinds,) share of the variance that is left, the closed form beside it."""
  kinds = [*_KINDS, "elu"] if length in config.kernel_lengths else [*_KINDS]
  rng = _key(config, 6, length)
  params = harness.train_loop(
    rng,
    functools.partial(regression_loss, config=config),
    regression_params(config, rng, tuple(kinds)),
    lambda step: regression_batch(config, rng, length, step),
    optimizer=_adam(config.regression_rate, config.regression_steps),
    num_steps=config.regression_steps,
    workdir=wd,
    name=f"regression-{length}",
    log_every=500,
  )
  errors = functools.partial(regression_errors, params, config, length)
  chosen = errors(jax.random.fold_in(rng, 1), config.num_test // 8)
  tested = errors(jax.random.fold_in(rng, 2), config.num_test)
  best = [tested[k][np.argmin(chosen[k])] for k in kinds]
  s2 = config.spike**2
  return {
    "error": np.array([*best, np.nan][:3]),
    "starts": np.stack([tested[k] for k in _KINDS]),
    "closed_form": (length - 1) / (s2 + length - 1),
    # With an offset beta in the score, coordinate 1 itself helps.
    "with_offset": (length - 1) / (s2 + length),
  }


def regression_params(
  config: Config, rng: jax.Array, kinds: tuple[str, ...]
) -> dict[str, Any]:
  """By kind; stacked over starting points, which are those of all kinds."""
  from jaxattn.models import PooledRegressor

  model = PooledRegressor(num_features=config.num_features)
  x = jnp.zeros((1, 2, config.regression_dim), jnp.float32)
  rngs = jax.random.split(rng, config.num_starts)
  params = jax.vmap(lambda rng: model.init(rng, x))(rngs)
  return {kind: jax.tree.map(jnp.copy, params) for kind in kinds}


def regression_batch(
  config: Config, rng: jax.Array, length: int, step: int
) -> tuple[jax.Array, jax.Array]:
  """Batch ``step``, of the training's own stream."""
  return data.single_location_batch(
    jax.random.fold_in(jax.random.fold_in(rng, 3), step),
    config.regression_batch,
    length,
    config.regression_dim,
    config.spike,
  )


def regression_loss(
  params: Any, batch: Any, rng: jax.Array, *, config: Config
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum over kinds and starting points, so that each is trained on its own."""
  del rng
  errors = {
    kind: _squared_errors(kind, params[kind], batch, config.num_features)
    for kind in params
  }
  total = sum(e.sum() for e in errors.values())
  return jnp.asarray(total), {kind: e.min() for kind, e in errors.items()}


def _squared_errors(
  kind: str, params: Any, batch: Any, num_features: int
) -> jax.Array:
  """(num_starts,) mean squared errors on one batch."""
  from jaxattn.models import PooledRegressor

  x, y = batch
  model = PooledRegressor(kind, num_features)

  def error(params: Any) -> jax.Array:
    return ((jnp.asarray(model.apply(params, x)) - y) ** 2).mean()

  return jax.vmap(error)(params)


def regression_errors(
  params: Any, config: Config, length: int, rng: jax.Array, num: int
) -> dict[str, np.ndarray]:
  """By kind (num_starts,): mean squared error over ``num`` fresh sequences."""
  size = min(num, _TEST_CHUNK)

  @jax.jit
  def errors(params: Any) -> Any:
    def one(rng: jax.Array) -> Any:
      batch = data.single_location_batch(
        rng, size, length, config.regression_dim, config.spike
      )
      return {
        kind: _squared_errors(kind, p, batch, config.num_features)
        for kind, p in params.items()
      }

    rngs = jax.random.split(rng, num // size)
    return jax.tree.map(lambda e: e.mean(0), lax.map(one, rngs))

  return jax.device_get(errors(params))


def recall_point(
  config: Config, wd: harness.Workdir, pairs: int
) -> dict[str, Any]:
  """(kinds,) share of values recalled, of fresh sequences."""
  accuracies = [
    _recall(config, wd, pairs, kind, f"recall-{pairs}-{kind.split()[0]}")
    for kind in _RECALL_KINDS
  ]
  return {"accuracy": np.array(accuracies)}


def recall_model(config: Config, kind: str) -> Any:
  """A causal model of two layers with learned positions."""
  from jaxattn.models import AttentionClassifier

  # Sequences are short: for a softmax the dense formula is the fastest.
  exact = jax.nn.dot_product_attention
  attention = exact if kind == "softmax" else linear_attention
  return AttentionClassifier(
    functools.partial(attention, is_causal=True),
    num_classes=config.vocab,
    num_heads=config.recall_heads,
    head_dim=config.recall_head_dim,
    pooling="none",
  )


def recall_rank(config: Config) -> int:
  """Keys that a layer's linear attention can tell apart: features of heads."""
  return config.recall_heads * config.recall_head_dim


def recall_inputs(config: Config, tokens: jax.Array) -> jax.Array:
  """One-hot vectors, of a size that makes the embedding N(0, 1)."""
  num_tokens = 2 * config.vocab
  return math.sqrt(num_tokens) * jax.nn.one_hot(tokens, num_tokens)


def recall_loss(
  params: Any, batch: Any, rng: jax.Array, *, model: Any, config: Config
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy where a value is asked for, and the share of right ones."""
  del rng
  tokens, targets, mask = batch
  logits = model.apply(params, recall_inputs(config, tokens))
  # Values are the upper half of the tokens; elsewhere anything will do.
  targets = jnp.maximum(targets - config.vocab, 0)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  right = logits.argmax(-1) == targets
  loss, accuracy = (jnp.mean(x, where=mask) for x in (losses, right))
  return loss, {"accuracy": accuracy}


def _recall(
  config: Config, wd: harness.Workdir, pairs: int, kind: str, name: str
) -> float:
  model, rng = recall_model(config, kind), _key(config, 7, pairs)
  tokens = jnp.zeros((1, 4 * pairs), jnp.int32)

  def batch(step: int, size: int = config.recall_batch) -> Any:
    key = jax.random.fold_in(rng, step)
    return data.recall_batch(key, size, pairs, config.vocab)

  loss_fn = functools.partial(recall_loss, model=model, config=config)
  params = harness.train_loop(
    rng,
    loss_fn,
    model.init(rng, recall_inputs(config, tokens)),
    batch,
    optimizer=_adam(config.recall_rate, config.recall_steps),
    num_steps=config.recall_steps,
    workdir=wd,
    name=name,
  )
  # Steps are counted from 0, so this batch was never trained on.
  _, metrics = loss_fn(params, batch(config.recall_steps, 2048), rng)
  return float(metrics["accuracy"])


def digit_models(seq_length: int) -> dict[str, Any]:
  """Classifiers that differ in attention alone, by its name."""
  from jaxattn.models import AttentionClassifier

  kinds = {
    "softmax": "softmax",
    "linear, elu": linear_attention,
    # Raw scores add up to anything: their mean, and no quotient.
    "linear, identity": functools.partial(
      linear_attention,
      feature_map="identity",
      normalize=False,
      scale=1 / seq_length,
    ),
    "polynomial of degree 2": functools.partial(
      polynomial_attention, degree=2, radius=2.0
    ),
  }
  return {
    name: AttentionClassifier(
      kind, num_classes=10, num_heads=2, head_dim=16, num_layers=2
    )
    for name, kind in kinds.items()
  }


def digits_point(config: Config, wd: harness.Workdir) -> dict[str, Any]:
  """By kind, (seeds,) share of test digits that are read right."""
  pixels, labels = data.load_digits()
  order = np.random.default_rng(config.seed).permutation(len(labels))
  x, y = pixels[order, :, None] / 16, labels[order]
  num = config.digits_test
  test, train = (x[:num], y[:num]), (x[num:], y[num:])
  return {
    name: _digits(config, wd, model, name, train, test)
    for name, model in digit_models(x.shape[1]).items()
  }


def _digits(
  config: Config,
  wd: harness.Workdir,
  model: Any,
  name: str,
  train: Any,
  test: Any,
) -> np.ndarray:
  x, y = train
  rngs = jax.random.split(_key(config, 8), config.digits_seeds)
  init = jax.vmap(functools.partial(model.init, x=x[:1]))

  def logits(params: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(model.apply, (0, None))(params, x)

  def loss_fn(params: Any, batch: Any, rng: jax.Array) -> Any:
    del rng
    images, labels = batch
    out = logits(params, images)
    labels = jnp.broadcast_to(labels, out.shape[:2])
    losses = optax.softmax_cross_entropy_with_integer_labels(out, labels)
    # A sum over seeds, so that each is trained on its own.
    return losses.mean(1).sum(), {"first": losses[0].mean()}

  def batch(step: int) -> Any:
    generator = np.random.default_rng((config.seed, step))
    rows = generator.integers(len(y), size=config.digits_batch)
    return x[rows], y[rows]

  params = harness.train_loop(
    _key(config, 8),
    loss_fn,
    init(rngs),
    batch,
    optimizer=_adam(config.digits_rate, config.digits_steps),
    num_steps=config.digits_steps,
    workdir=wd,
    name="digits-" + name.replace(", ", "-").replace(" ", "-"),
  )
  found = jax.jit(logits)(params, test[0]).argmax(-1)
  return np.asarray(found == test[1][None]).mean(1)


# --- checks ---


def _success_checks(
  config: Config, success: dict[str, np.ndarray], cross: dict[str, np.ndarray]
) -> list[harness.Check]:
  checks, accepted = [], config.accepted
  silent = (-1.0, accepted.false_positive_margin)
  for panel, lengths, prefix, at_large in (
    (success, config.lengths, "", config.large),
    (cross, config.cross_lengths, "cross-attention, ", config.cross_large),
  ):
    for i, n in enumerate(lengths):
      fires = dict(zip(_KINDS, panel["large"][i]))
      name = f"{prefix}softmax, F > 0 at a={at_large:g}, n={n}"
      checks.append(harness.Check(name, fires["softmax"], *accepted.success))
      usual = panel["false_positive"][i]
      for kind, a, share in (
        ("linear", at_large, fires["linear"]),
        *((k, config.small, s) for k, s in zip(_KINDS, panel["small"][i])),
      ):
        name = f"{prefix}{kind}, F > 0 at a={a:g}, minus false positives, n={n}"
        checks.append(harness.Check(name, share - usual, *silent))
  return checks


def _transition_checks(
  config: Config, panels: dict[str, dict[str, np.ndarray]]
) -> list[harness.Check]:
  success, checks = panels["success"], []
  for n, gap in zip(config.lengths, success["measured"] - success["predicted"]):
    label = f"transition minus prediction, n={n}"
    checks.append(harness.Check(label, gap, *config.accepted.transition))
  growth = np.diff(success["measured"]).min()
  label = "transition, least growth from one n to the next"
  checks.append(harness.Check(label, growth, 0.0, 1.0))
  for panel, letter, values in (
    ("by_b", "b", config.bs),
    ("cross", "cross-attention, n", config.cross_lengths),
  ):
    gaps = panels[panel]["measured"] - panels[panel]["predicted"]
    checks += [
      harness.Check(f"transition minus prediction, {letter}={v:g}", gap)
      for v, gap in zip(values, gaps)
    ]
  return checks


def _rate_checks(
  config: Config,
  by_dim: dict[str, np.ndarray],
  by_neurons: dict[str, np.ndarray],
) -> list[harness.Check]:
  def errors(rate: np.ndarray, p: np.ndarray) -> np.ndarray:
    # The second term stands for a rate of 0 or 1, where the first is 0.
    variance = p * (1 - p) / config.rate_draws + 1 / config.rate_draws**2
    return (rate - p) / np.sqrt(variance)

  most = config.accepted.standard_errors
  off = errors(by_dim["rates"], by_dim["predicted"][:, None])
  excess = errors(by_neurons["misses"], by_neurons["bound"])
  return [
    harness.Check(
      f"false positives, {kind}, farthest from the formula, standard errors",
      np.abs(off[:, i]).max(),
      0.0,
      most,
    )
    for i, kind in enumerate(_KINDS)
  ] + [
    harness.Check(
      "misses, most above (7/8)^m, standard errors", excess.max(), -100.0, most
    )
  ]


def _other_checks(
  config: Config, other: dict[str, np.ndarray]
) -> list[harness.Check]:
  eps = config.accepted.other_weights
  return [
    harness.Check(
      f"linear with weights e1 e1^T, score over L at a={a:g}",
      score,
      1 + a - eps,
      1 + a + eps,
    )
    for a, score in zip((0.1, 0.7), other["other_weights"])
  ]


def _regression_checks(
  config: Config, regression: dict[str, np.ndarray]
) -> list[harness.Check]:
  checks, accepted = [], config.accepted
  for i, length in enumerate(config.regression_lengths):
    softmax, linear, elu = regression["error"][i]
    closed, offset = (regression[k][i] for k in ("closed_form", "with_offset"))
    most = accepted.softmax_error
    most = most if length <= 32 else accepted.softmax_error_long
    starts = regression["starts"][i]
    near = (starts[0] < 2 * most).mean()
    checks += [
      harness.Check(f"softmax, error left, L={length}", softmax, 0.0, most),
      harness.Check(
        f"linear, error left minus closed form, L={length}",
        linear - closed,
        *accepted.linear_error,
      ),
      harness.Check(
        f"linear, the same with an offset in the closed form, L={length}",
        linear - offset,
      ),
      harness.Check(f"softmax, starts that get there, L={length}", near),
    ]
    if np.isfinite(elu):
      name = f"linear, elu of {config.num_features} features, error, L={length}"
      checks.append(harness.Check(name, elu))
  return checks


def _reported(
  config: Config, recall: dict[str, np.ndarray], digits: dict[str, np.ndarray]
) -> list[harness.Check]:
  learned = config.accepted.recall
  checks = []
  for pairs, (softmax, linear) in zip(config.pairs, recall["accuracy"]):
    # With fewer pairs than its state has room for, linear attention need not
    # fail, and nothing is decided.
    bounds = (0.0, learned[0]) if pairs > recall_rank(config) else ()
    checks += [
      harness.Check(f"recall, softmax, {pairs} pairs", softmax, *learned),
      harness.Check(f"recall, linear (elu), {pairs} pairs", linear, *bounds),
    ]
  for kind, right in digits.items():
    checks.append(
      harness.Check(f"digits, {kind}, right", float(np.mean(right)))
    )
    name = f"digits, {kind}, largest minus smallest of seeds"
    checks.append(harness.Check(name, float(np.ptp(right))))
  return checks


# --- figure ---


def _draw(config: Config, panels: dict[str, dict[str, np.ndarray]]) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(3, 2, figsize=(12.5, 14))
  _draw_success(axes[0, 0], config, panels["success"])
  _draw_transitions(axes[0, 1], config, panels)
  _draw_false_positives(axes[1, 0], config, panels["by_dim"])
  _draw_misses(axes[1, 1], config, panels["by_neurons"])
  _draw_regression(axes[2, 0], config, panels["regression"])
  _draw_recall(axes[2, 1], config, panels["recall"])
  return figure


def _draw_success(
  ax: Axes, config: Config, success: dict[str, np.ndarray]
) -> None:
  colors = itertools.cycle(harness.PALETTE)
  for i, (n, color) in enumerate(zip(config.lengths, colors)):
    rate = success["rates"][i]
    ax.plot(config.amplitudes, rate[:, 0], "o-", color=color, label=f"n = {n}")
    ax.plot(config.amplitudes, rate[:, 1], color=color, **_CROSS)
    ax.axvline(success["predicted"][i], color=color, linestyle=":", linewidth=1)
  ax.plot([], [], color=_GREY, label="linear, all n", **_CROSS)
  ax.plot([], [], ":", color=_GREY, label="predicted")
  ax.set(
    title="The fixed network fires: softmax, not linear",
    xlabel="amplitude a of the special token",
    ylabel="share of draws with F > 0",
  )
  ax.legend(loc="center right")


def _draw_transitions(
  ax: Axes, config: Config, panels: dict[str, dict[str, np.ndarray]]
) -> None:
  every = []
  for name, label in (
    ("success", f"n = {config.lengths[0]} to {config.lengths[-1]}"),
    ("by_b", f"b = {config.bs[0]:g} to {config.bs[-1]:g}, d = {config.b_dim}"),
    ("cross", "cross-attention"),
  ):
    points = panels[name]
    ax.plot(points["predicted"], points["measured"], "o", label=label)
    every += [*points["predicted"], *points["measured"]]
  low, high = min(every) - 0.03, max(every) + 0.03
  line = np.array([low, high])
  ax.plot(line, line, "--", color=_GREY, linewidth=1)
  below, above = config.accepted.transition
  ax.fill_between(line, line + below, line + above, color="#e3e7ec", zorder=0)
  ax.set(
    title="Amplitude at which half of the draws fire",
    xlabel="predicted",
    ylabel="measured",
    xlim=(low, high),
    ylim=(low, high),
  )
  ax.legend(loc="upper left")


def _draw_false_positives(
  ax: Axes, config: Config, by_dim: dict[str, np.ndarray]
) -> None:
  dims, predicted = np.array(config.dims), by_dim["predicted"]
  ax.plot(dims - 2, predicted, color=_GREY, label="formula")
  softmax, linear = by_dim["rates"].T
  ax.plot(dims - 2, softmax, "o", label="softmax", markersize=8)
  ax.plot(dims - 2, linear, color=harness.PALETTE[1], label="linear", **_CROSS)
  ax.set_xscale("log")
  ax.set_xticks(dims - 2, [str(d - 2) for d in config.dims])
  ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.set(
    title=f"False alarms without a special token, b = {config.rate_b:g}",
    xlabel="d - 2",
    ylabel="share of draws with F > 0",
    ylim=(-0.03, 1.05),
  )
  ax.legend()


def _draw_misses(
  ax: Axes, config: Config, by_neurons: dict[str, np.ndarray]
) -> None:
  m, misses = np.array(config.neurons), by_neurons["misses"]
  error = 2 * np.sqrt(misses * (1 - misses) / config.rate_draws)
  ax.plot(m, by_neurons["bound"], color=_GREY, label="bound $(7/8)^m$")
  ax.errorbar(m, misses, error, fmt="o", label="softmax")
  ax.set(
    title=f"Misses of the special token, a = {config.large:g}",
    xlabel="m, number of neurons",
    ylabel="share of draws with F = 0",
    ylim=(-0.03, 1.0),
  )
  ax.legend()


def _draw_regression(
  ax: Axes, config: Config, regression: dict[str, np.ndarray]
) -> None:
  lengths = np.array(config.regression_lengths)
  fine = np.geomspace(lengths[0], lengths[-1], 50)
  s2 = config.spike**2
  ax.plot(
    fine, (fine - 1) / (s2 + fine - 1), color=_GREY, label="linear, theory"
  )
  labels = ("softmax", "linear", "linear, elu features")
  for values, label in zip(regression["error"].T, labels):
    ax.plot(lengths, values, "o", label=f"{label}, trained")
  ax.set_xscale("log")
  ax.set_yscale("log")
  ax.set_xticks(lengths, [str(n) for n in lengths])
  ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.set(
    title=f"Regression on one of L locations, spike {config.spike:g}",
    xlabel="L, tokens",
    ylabel="share of the variance that is left",
  )
  ax.legend(loc="center left")


def _draw_recall(
  ax: Axes, config: Config, recall: dict[str, np.ndarray]
) -> None:
  for values, kind in zip(recall["accuracy"].T, _RECALL_KINDS):
    ax.plot(config.pairs, values, "o-", label=kind)
  pairs = np.array(config.pairs)
  ax.plot(pairs, 1 / pairs, ":", color=_GREY, label="guessing a listed one")
  rank = recall_rank(config)
  label = f"rank {rank} of the linear state"
  if pairs[0] <= rank <= pairs[-1]:
    ax.axvline(rank, color=_GREY, linestyle="--", linewidth=1, label=label)
  else:
    ax.plot([], [], " ", label=label)
  ax.set_xscale("log")
  ax.set_xticks(config.pairs, [str(p) for p in config.pairs])
  ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.set(
    title=f"Recall, {config.recall_steps} steps of training",
    xlabel="pairs in a sequence",
    ylabel="share of values recalled",
    ylim=(0, 1.03),
  )
  ax.legend()


if __name__ == "__main__":
  harness.main(run, "softmax-vs-linear")
