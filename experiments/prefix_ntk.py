"""Prefixes in the kernel regime: finite against infinite length.

Five questions about arXiv 2406.14036, on prefixes of m trained keys and values:

1. Images of digits, no context: how near does a trained prefix come to kernel
   regression with the limit kernel, in accuracy, outputs and loss?
2. Random data with contexts: how much do kernels change, by the scale gamma of
   the output gamma (o - o_0)? At gamma = m, how near is training to the
   prediction of the kernel at the start, and to that of the limit?
3. Rows of an image as tokens, each of which sees those before it: how near are
   kernel and training to the limit when each datum has a context of its own?
4. How well do states of fixed size stand in for the prefixes trained there?
5. A frozen causal layer of several heads, with weights and tokens drawn at
   random: how near is a prefix of each head to its limit?
"""

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import harness
from jaxattn.attention import (
  PrefixState,
  ntk_attention,
  prefix_attention,
  prefix_state_init,
  prefix_state_update,
  softmax_attention,
)
from jaxattn.data import load_digits
from jaxattn.features import feature_count, taylor_map
from jaxattn.ntk import (
  KernelFactor,
  PrefixContext,
  PrefixHistory,
  descent_test,
  descent_train,
  kernel_factor,
  prefix_limit_kernel,
  prefix_ntk,
  prefix_output,
  required_length,
  train_prefix,
)
from jaxattn.scaling import Slope, fit_slope
from jaxattn.softmax import Prefix, prefix_init

# Scales of the output, as powers of the length.
SCALES = {"1": 0.0, r"\sqrt{m}": 0.5, "m": 1.0}

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Point = dict[str, Any]
Arrays = dict[str, np.ndarray]


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  digits = sweep_digits(wd)
  kernel = wd.point("digits/kernel", functools.partial(kernel_point, config))
  scales = sweep_scales(wd)
  rows = sweep_rows(wd)
  layer = sweep_layer(wd)
  values = {
    **{f"digits, {name}": x for name, x in (digits | kernel).items()},
    **{f"scales, {name}": x for name, x in scales.items()},
    **{f"rows, {name}": x for name, x in rows.items()},
    **{f"layer, {name}": x for name, x in layer.items()},
  }
  figure = _draw(config, digits | kernel, scales, rows, layer)
  harness.save_figure(wd, figure, values)
  return harness.finish(
    wd,
    claim=(
      "Training an ever longer prefix of one attention head becomes regression "
      "with a fixed kernel, in closed form, also where queries see a context: "
      "the loss falls as that kernel says."
    ),
    source="arXiv:2406.14036, abstract",
    paper="an ultra-long prefix is trained as its tangent kernel (no numbers)",
    checks=[
      *_digits_checks(config, digits | kernel),
      *_scale_checks(config, scales),
      *_rows_checks(config, rows),
      *_layer_checks(config, layer),
    ],
  )


# --- digits ---


@functools.cache
def digits(num_train: int) -> tuple[np.ndarray, ...]:
  """Centered images of unit norm, shuffled: x, y, x_test, labels_test.

  In float64, whatever the mode: ``jnp.asarray`` brings them to that of JAX.
  """
  pixels, labels = load_digits()
  order = np.random.default_rng(0).permutation(len(pixels))
  pixels, labels = pixels[order].astype(float), labels[order]
  pixels -= pixels[:num_train].mean(0)
  x = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
  y = np.eye(10)[labels] - 0.1
  return x[:num_train], y[:num_train], x[num_train:], labels[num_train:]


@functools.cache
def digits_kernel(num_train: int) -> tuple[KernelFactor, jax.Array]:
  """The limit kernel of the training images, and with the others."""
  x, _, x_test, _ = map(jnp.asarray, digits(num_train))
  return kernel_factor(prefix_limit_kernel(x)), prefix_limit_kernel(x_test, x)


def sweep_digits(wd: harness.Workdir) -> Arrays:
  """What each seed came to, beside the prediction of the limit kernel."""
  config: Config = wd.config
  x, y, x_test, labels = digits(config.num_train)

  def one(rng: jax.Array, length: int) -> Any:
    prefix, history = train_prefix(
      rng,
      *(jnp.float32(z) for z in (x, y)),
      length=length,
      learning_rate_fraction=config.learning_rate_fraction,
      num_steps=config.num_steps,
      x_eval=jnp.float32(x_test),
    )
    few = jnp.float32(x_test[: config.num_kernel])
    first, last = (_kernel(p, few) for p in (history.initial, prefix))
    limit = prefix_limit_kernel(few)[:, None, :, None]
    limit *= jnp.eye(10, dtype=limit.dtype)[None, :, None]
    return {
      "loss": history.loss,
      "learning_rate": history.learning_rate,
      "output": history.output_eval,
      "change": distance(last, first),
      "gap": distance(first, limit),
    }

  def then(m: int, found: Arrays) -> Point:
    outputs = found.pop("output")
    with jax.enable_x64(True):
      factor, k_test = digits_kernel(config.num_train)
      moved, losses = [], []
      for rate in m * found["learning_rate"].astype(float):
        args = jnp.asarray(y), float(rate)
        moved.append(descent_test(factor, k_test, *args, config.num_steps))
        losses.append(_predicted_loss(factor, *args, config.num_steps))
    predictions, losses = map(np.asarray, (moved, losses))
    return found | {
      "predicted": losses,
      "accuracy": (outputs.argmax(-1) == labels).mean(-1),
      "predicted_accuracy": (predictions.argmax(-1) == labels).mean(-1),
      "distance": np.array(list(map(distance, outputs, predictions))),
    }

  # Seeds in turn: side by side they outgrow the cache.
  return harness.sweep_widths(
    wd,
    "digits",
    jax.random.key(config.seed),
    one,
    config.lengths,
    config.num_seeds,
    memory_limit=1,
    then=then,
  )


def kernel_point(config: Config) -> Point:
  """What the limit kernel alone says: accuracies, and errors of its samples."""
  _, y, x_test, labels = digits(config.num_train)
  with jax.enable_x64(True):
    factor, k_test = digits_kernel(config.num_train)
    rate = config.learning_rate_fraction / float(factor.eigenvalues[-1])
    # The second is as good as the end of training.
    for_steps = config.num_steps, 10**9
    outputs = descent_test(factor, k_test, jnp.asarray(y), rate, for_steps)
    accuracy = (np.asarray(outputs).argmax(-1) == labels).mean(-1)
    few = x_test[: config.num_kernel]
    kernel = np.asarray(prefix_limit_kernel(jnp.asarray(few)))
    sampling = sampling_error(few, kernel)
  return {
    "kernel_accuracy": accuracy[0],
    "kernel_accuracy_at_last": accuracy[1],
    "sampling": sampling,
  }


def _kernel(
  prefix: Prefix,
  x: jax.Array,
  context: PrefixContext | None = None,
  prefix_bias: float = 0.0,
) -> jax.Array:
  key, value = prefix.key[:, 0], prefix.value[:, 0]
  return prefix_ntk(key, value, x, None, context, prefix_bias=prefix_bias)


def _predicted_loss(
  factor: KernelFactor, y: jax.Array, rate: float, num_steps: int
) -> np.ndarray:
  moved = descent_train(factor, y, rate, jnp.arange(num_steps + 1))
  rest = (y[None] - moved).reshape(num_steps + 1, -1)
  return np.asarray(jnp.square(rest).sum(1) / 2)


def distance(a: Any, b: Any) -> Any:
  """Relative to the second, as one vector."""
  return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())


def sampling_error(x: np.ndarray, kernel: np.ndarray) -> float:
  """Relative error that m = 1 sample of a kernel would have, keys of std 1.

  That of the mean over m columns of s s' is this over sqrt(m); fluctuations of
  the normalizer, which take some of it away, are left out.
  """
  squares = np.square(x[:, None] + x[None]).sum(-1)
  errors = kernel * np.sqrt(np.expm1(squares))
  return float(np.linalg.norm(errors) / np.linalg.norm(kernel))


# --- scales ---


def sweep_scales(wd: harness.Workdir) -> Arrays:
  """How lazy each seed was, at each scale, on random data with contexts."""
  config: Config = wd.config
  with jax.enable_x64(True):
    return harness.sweep_widths(
      wd,
      "scales",
      jax.random.key(config.seed),
      functools.partial(train_at_scales, config),
      config.scale_lengths,
      config.scale_seeds,
      memory_limit=1,
    )


def train_at_scales(
  config: Config, rng: jax.Array, length: int
) -> dict[str, jax.Array]:
  """What :func:`train_at_scale` finds at each of ``SCALES``."""
  gammas = jnp.array([length**power for power in SCALES.values()])
  # At scale 1 the kernel grows by a factor of order m, and with it what steps
  # must be divided by.
  fractions = 0.5 * jnp.array([1 / length, 1.0, 1.0])

  def one(scale: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
    return train_at_scale(config, rng, length, *scale)

  return jax.lax.map(one, (gammas, fractions))


def train_at_scale(
  config: Config,
  rng: jax.Array,
  length: int,
  gamma: jax.Array,
  fraction: jax.Array,
) -> dict[str, jax.Array]:
  """Changes of the kernel, and distances from two predictions of it."""
  n, d, v = config.num_data, config.dim, config.value_dim
  # Data of one seed: prefixes of all lengths and seeds can be compared.
  rngs = jax.random.split(jax.random.key(config.data_seed), 4)
  x = _unit(jax.random.normal(rngs[0], (n, d)))
  y = jax.random.normal(rngs[1], (n, v))
  pairs = (
    jax.random.normal(rngs[2], (n, config.context_length, d)),
    jax.random.normal(rngs[3], (n, config.context_length, v)),
  )
  prefix, history = train_prefix(
    rng,
    x,
    y,
    pairs,
    length=length,
    output_scale=gamma,
    learning_rate_fraction=fraction,
    num_steps=config.scale_steps,
    record=True,
  )
  heads = ((p.key[:, 0], p.value[:, 0]) for p in (history.initial, prefix))
  first, last = (prefix_ntk(*p, x, None, pairs) for p in heads)
  limit = prefix_limit_kernel(x, None, pairs)
  rate = history.learning_rate * gamma**2 / length
  return {
    "change": distance(last, first),
    "gap": distance(first, limit),
    "loss": history.loss,
    "own": _furthest(history, first, y, rate),
    "limit": _furthest(history, limit, y, rate),
  }


def _furthest(
  history: PrefixHistory, kernel: jax.Array, y: jax.Array, rate: jax.Array
) -> jax.Array:
  """Largest distance of any step from descent with a kernel, relative to y."""
  assert history.outputs is not None
  steps = jnp.arange(len(history.outputs))
  path = descent_train(kernel_factor(kernel), y, rate, steps)
  gaps = jnp.linalg.norm(history.outputs - path, axis=(1, 2))
  return gaps.max() / jnp.linalg.norm(y)


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# --- rows of images, with context ---


def rows(num_images: int) -> tuple[jax.Array, jax.Array]:
  """Rows of images to train on and to test with, of norms up to 1.

  Returns:
    Rows that are seen, all but the last, and what follows each of them; both
    (2, images, 7, 8).
  """
  images = digits(2 * num_images)[0].reshape(2, num_images, 8, 8)
  images = jnp.asarray(images / np.linalg.norm(images, axis=-1).max())
  return images[:, :, :-1], images[:, :, 1:]


def causal_context(
  query: jax.Array, key: jax.Array, value: jax.Array
) -> PrefixContext:
  """What positions of sequences (b, t, d) see of themselves and those before.

  One causal pass for all of them.
  """
  output, log_mass = softmax_attention(
    *(z[:, :, None] for z in (query, key, value)),
    scale=1.0,
    is_causal=True,
    return_residual=True,
  )
  return PrefixContext(output.reshape(-1, value.shape[-1]), log_mass.ravel())


@functools.cache
def rows_kernel(num_images: int) -> tuple[KernelFactor, jax.Array]:
  """The limit kernel of the training rows, and with the others."""
  x, _ = rows(num_images)
  (own, own_context), (other, other_context) = map(_flat, x)
  kernel = prefix_limit_kernel(own, None, own_context)
  return kernel_factor(kernel), prefix_limit_kernel(
    other, own, other_context, own_context
  )


def _flat(x: jax.Array) -> tuple[jax.Array, PrefixContext]:
  return x.reshape(-1, x.shape[-1]), causal_context(x, x, x)


def sweep_rows(wd: harness.Workdir) -> Arrays:
  """Prefixes that predict the next row, beside their limit and their states."""
  with jax.enable_x64(True):
    return _sweep_rows(wd)


def _sweep_rows(wd: harness.Workdir) -> Arrays:
  config: Config = wd.config
  x, y = rows(config.num_images)
  (own, own_context), (other, other_context) = map(_flat, x)
  target, wanted = (z.reshape(-1, z.shape[-1]) for z in y)
  few, few_context = _flat(x[1, : max(1, config.num_kernel // 7)])
  limit = prefix_limit_kernel(few, None, few_context)

  def one(rng: jax.Array, length: int) -> Any:
    prefix, history = train_prefix(
      rng,
      own,
      target,
      own_context,
      length=length,
      learning_rate_fraction=config.row_fraction,
      num_steps=config.row_steps,
      x_eval=other,
      context_eval=other_context,
    )
    first = _kernel(history.initial, few, few_context)
    return {
      "loss": history.loss,
      "learning_rate": history.learning_rate,
      "output": history.output_eval,
      "gap": distance(first, limit),
      **state_errors(config.degrees, history.initial, prefix, x[1]),
    }

  def then(m: int, found: Arrays) -> Point:
    outputs = found.pop("output")
    factor, k_test = rows_kernel(config.num_images)
    predictions = [
      descent_test(factor, k_test, target, float(m * rate), config.row_steps)
      for rate in found["learning_rate"]
    ]
    explained = [1 - distance(z, wanted) ** 2 for z in (*outputs, *predictions)]
    explained = np.array(explained).reshape(2, -1)
    return found | {
      "explained": explained[0],
      "predicted_explained": explained[1],
      "distance": np.array(list(map(distance, outputs, predictions))),
      "sampling": np.full(
        config.num_seeds, sampling_error(np.asarray(few), block_norms(limit))
      ),
    }

  return harness.sweep_widths(
    wd,
    "rows",
    jax.random.key(config.seed),
    one,
    config.row_lengths,
    config.num_seeds,
    memory_limit=1,
    then=then,
  )


def block_norms(kernel: jax.Array) -> np.ndarray:
  """(n, n) norms of the blocks of (n, v, n, v)."""
  return np.linalg.norm(np.asarray(kernel), axis=(1, 3))


def state_errors(
  degrees: tuple[int, ...], initial: Prefix, prefix: Prefix, x: jax.Array
) -> dict[str, jax.Array]:
  """Errors of states in place of a prefix: its output, and what it learned.

  Args:
    degrees: of Taylor features.
    initial: prefix before training.
    prefix: after it.
    x: (b, t, d) sequences.

  Returns:
    "output, NAME" and "learned, NAME" of each kind of state, and of dropping
    the prefix; of the last only the output.
  """
  heads = x[:, :, None]
  seen = {"scale": 1.0, "is_causal": True}
  attend = functools.partial(prefix_attention, heads, heads, heads, **seen)
  exact = [attend(*p, count_normalized=True) for p in (initial, prefix)]
  dropped = softmax_attention(heads, heads, heads, **seen)
  errors = {"output, none": distance(dropped, exact[1])}
  maps = {f"taylor {g}": taylor_map(g) for g in degrees} | {"elu": "elu"}
  for name, feature_map in maps.items():
    found = []
    for p in (initial, prefix):
      length, _, dim = p.key.shape
      size = dim
      if not isinstance(feature_map, str):
        size = feature_count(dim, *feature_map.degrees)
      empty = prefix_state_init(1, size, dim, dtype=x.dtype)
      state = prefix_state_update(empty, *p, feature_map=feature_map, scale=1.0)
      # The count is part of the sums.
      state = PrefixState(*(z / length for z in state))
      found.append(
        ntk_attention(
          heads, heads, heads, state, feature_map=feature_map, **seen
        )
      )
    errors[f"output, {name}"] = distance(found[1], exact[1])
    errors[f"learned, {name}"] = distance(
      found[1] - found[0], exact[1] - exact[0]
    )
  return errors


# --- a layer of several heads ---


def layer(config: Config) -> np.ndarray:
  """Queries, keys and values of a causal layer that nobody trained.

  Tokens are normal, weights of such a size that entries of keys and values are
  like those of a prefix, and queries of norm 1, as in layers that normalize
  them: beyond it, kernels of prefixes scatter too much.

  Returns:
    (heads, 3, 2, sequences, tokens, head size): a half to train on, one to
    test with.
  """
  heads, sequences, tokens, dim = config.layer_shape
  rng = np.random.default_rng(config.data_seed)
  x = rng.standard_normal((2, sequences, tokens, heads * dim))
  w = rng.standard_normal((3, heads * dim, heads, dim)) / (heads * dim) ** 0.5
  found = np.einsum("psti,kihd->hkpstd", x, w)
  found[:, 0] /= np.linalg.norm(found[:, 0], axis=-1, keepdims=True)
  return found.astype(np.float32)


def sweep_layer(wd: harness.Workdir) -> Arrays:
  """(lengths, seeds, heads) of each number."""
  config: Config = wd.config
  heads = layer(config)
  rngs = jax.random.split(jax.random.key(config.seed), len(heads))
  found = [sweep_head(wd, i, *both) for i, both in enumerate(zip(rngs, heads))]
  return {name: np.stack([f[name] for f in found], 2) for name in found[0]}


def sweep_head(
  wd: harness.Workdir, i: int, rng: jax.Array, head: np.ndarray
) -> Arrays:
  """One head: kernel and outputs at the start, and what a prefix learns.

  Of all outputs of a head only the first, as many as the limit kernel of all
  positions has room for. It learns how one short prefix differs from another.
  """
  config: Config = wd.config
  # As much weight as half of a sequence has.
  bias = math.log(head.shape[-2] / 2)
  options: dict[str, Any] = {"prefix_bias": bias}
  (x, context), (other, other_context) = (
    _head_data(half, config.layer_outputs) for half in np.swapaxes(head, 0, 1)
  )
  y = _differences(rng, x, context, bias)
  few = np.linspace(0, len(x) - 1, min(config.num_kernel, len(x))).astype(int)
  few_context = PrefixContext(*(z[few] for z in context))
  limit = prefix_limit_kernel(x[few], None, few_context, **options)
  log_prefix = bias + jnp.square(x).sum(-1) / 2
  share = jax.nn.sigmoid(context.log_mass - log_prefix)

  def one(rng: jax.Array, length: int) -> Any:
    _, history = train_prefix(
      rng,
      x,
      y,
      context,
      length=length,
      learning_rate_fraction=config.row_fraction,
      num_steps=config.layer_steps,
      x_eval=other,
      context_eval=other_context,
      **options,
    )
    heads = history.initial.key[:, 0], history.initial.value[:, 0]
    start = prefix_output(*heads, x, context, **options)
    return {
      "gap": distance(
        _kernel(history.initial, x[few], few_context, bias), limit
      ),
      "start": distance(start, share[:, None] * context.output),
      "learning_rate": history.learning_rate,
      "output": history.output_eval,
    }

  def then(m: int, found: Arrays) -> Point:
    outputs, rates = found.pop("output"), found.pop("learning_rate")
    with jax.enable_x64(True):
      given = (x, other, context, other_context, y)
      x1, x2, context1, context2, target = jax.tree.map(jnp.float64, given)
      factor = kernel_factor(prefix_limit_kernel(x1, None, context1, **options))
      k_test = prefix_limit_kernel(x2, x1, context2, context1, **options)
      predictions = [
        descent_test(factor, k_test, target, float(m * r), config.layer_steps)
        for r in rates
      ]
    distances = map(distance, outputs, map(np.asarray, predictions))
    sampling = sampling_error(np.asarray(x)[few], block_norms(limit))
    return found | {
      "distance": np.array(list(distances)),
      "sampling": np.full(config.num_seeds, sampling),
    }

  return harness.sweep_widths(
    wd,
    f"layer/head={i}",
    rng,
    one,
    config.layer_lengths,
    config.num_seeds,
    memory_limit=1,
    then=then,
  )


def _head_data(
  head: np.ndarray, num_outputs: int
) -> tuple[jax.Array, PrefixContext]:
  """Queries of all positions, and what each of them sees."""
  query, key, value = map(jnp.asarray, head)
  context = causal_context(query, key, value[..., :num_outputs])
  return query.reshape(-1, query.shape[-1]), context


def _differences(
  rng: jax.Array, x: jax.Array, context: PrefixContext, bias: float
) -> jax.Array:
  """What one prefix of 16 says and another does not; standard deviation 1."""
  size = context.output.shape[1]
  one, other = (
    prefix_output(p.key[:, 0], p.value[:, 0], x, context, prefix_bias=bias)
    for p in (
      prefix_init(r, 16, 1, x.shape[1], value_dim=size)
      for r in jax.random.split(jax.random.fold_in(rng, 0))
    )
  )
  return (one - other) / (one - other).std()


# --- checks ---


def medians(x: np.ndarray) -> np.ndarray:
  """Over seeds: weights are log-normal."""
  return np.median(x, axis=1)


def _slope(lengths: Any, values: np.ndarray, start: int = 0) -> Slope:
  kept = np.array(lengths) >= start
  return fit_slope(np.array(lengths)[kept], medians(values)[kept])


def _digits_checks(config: Config, digits: Point) -> list[harness.Check]:
  accepted, lengths = config.accepted, config.lengths
  accuracy = dict(zip(lengths, 100 * digits["accuracy"].mean(1), strict=True))
  kernel = 100 * digits["kernel_accuracy"]
  distances = dict(zip(lengths, medians(digits["distance"]), strict=True))
  loss, predicted = (digits[name][-1] for name in ("loss", "predicted"))
  excess = np.median((loss - predicted) / loss[:, :1], 0)
  ratio = np.median(loss / predicted, 0)
  kept = np.array(lengths) >= config.fit_from
  need = required_length(
    np.array(lengths)[kept], medians(digits["gap"])[kept], config.gap
  )
  return [
    harness.Check(
      "slope in m of the distance from the limit kernel's outputs",
      _slope(lengths, digits["distance"], config.fit_from).slope,
      *accepted.distance_slope,
    ),
    harness.Check(
      f"points by which the kernel is more accurate, m={config.accuracy_at}",
      kernel - accuracy[config.accuracy_at],
      *accepted.accuracy,
    ),
    harness.Check(
      f"loss over the kernel's, less 1, most of any step, m={lengths[-1]}",
      np.abs(ratio - 1).max(),
      *accepted.loss,
    ),
    harness.Check(
      f"loss minus the kernel's, over that at the start, most of any step, "
      f"m={lengths[-1]}",
      np.abs(excess).max(),
    ),
    harness.Check(
      f"loss over the kernel's at the end, m={lengths[-1]}", ratio[-1]
    ),
    harness.Check("accuracy of the kernel, %", kernel),
    harness.Check(
      "accuracy of the kernel, trained to the end, %",
      100 * digits["kernel_accuracy_at_last"],
    ),
    *(harness.Check(f"accuracy, m={m}, %", a) for m, a in accuracy.items()),
    *(harness.Check(f"distance, m={m}", x) for m, x in distances.items()),
    *_gap_checks("digits", lengths, digits["gap"], digits["sampling"]),
    harness.Check(f"length for a gap of {config.gap:g}", need.length),
    harness.Check("the same, least of its interval", need.interval[0]),
    harness.Check("the same, most of its interval", need.interval[1]),
    harness.Check(
      f"length for a gap of {config.gap:g} by the error of sampling",
      (digits["sampling"] / config.gap) ** 2,
    ),
  ]


def _gap_checks(
  what: str, lengths: Any, gaps: np.ndarray, sampling: float
) -> list[harness.Check]:
  """Of kernels at the start from the limit, beside what sampling predicts."""
  return [
    check
    for m, gap in zip(lengths, medians(gaps), strict=True)
    for check in (
      harness.Check(f"{what}: gap between kernels, m={m}", gap),
      harness.Check(
        f"{what}: error of sampling, m={m}", sampling / math.sqrt(m)
      ),
    )
  ]


def _scale_checks(config: Config, scales: Point) -> list[harness.Check]:
  """Of arrays (lengths, seeds, scales, ...)."""
  accepted, lengths, at = config.accepted, config.scale_lengths, -2
  lazy = {name: x[:, :, -1] for name, x in scales.items()}
  changes = medians(scales["change"])[at]
  ratio = medians(scales["change"][:, :, -1] / scales["change"][:, :, -2])
  return [
    *(
      harness.Check(
        f"slope in m of {what}", _slope(lengths, lazy[name]).slope, *interval
      )
      for what, name, interval in (
        ("the change of the kernel", "change", accepted.change_slope),
        ("the distance from its own kernel", "own", accepted.own_slope),
        ("the distance from the limit kernel", "limit", accepted.limit_slope),
      )
    ),
    harness.Check(
      f"change of the kernel, scale m over sqrt(m), m={lengths[at]}",
      ratio[at],
      *accepted.change_ratio,
    ),
    harness.Check(
      "largest loss at the end, scale m",
      medians(lazy["loss"][..., -1]).max(),
      high=accepted.final_loss,
    ),
    *(
      harness.Check(f"change of the kernel, scale {name}, m={lengths[at]}", x)
      for name, x in zip(("1", "sqrt(m)", "m"), changes, strict=True)
    ),
  ]


def _rows_checks(config: Config, rows: Point) -> list[harness.Check]:
  lengths, last = config.row_lengths, config.row_lengths[-1]
  errors = {
    name: np.median(x[-1])
    for name, x in rows.items()
    if name.startswith(("output, ", "learned, "))
  }
  return [
    harness.Check(
      "slope in m of the gap between kernels, with contexts",
      _slope(lengths, rows["gap"], config.fit_from).slope,
      *config.accepted.gap_slope,
    ),
    harness.Check(
      "slope in m of the distance from the kernel's outputs, with contexts",
      _slope(lengths, rows["distance"], config.fit_from).slope,
      *config.accepted.distance_slope,
    ),
    *_gap_checks("rows", lengths, rows["gap"], rows["sampling"][0, 0]),
    harness.Check(
      f"variance of the next row explained, m={last}",
      np.median(rows["explained"][-1]),
    ),
    harness.Check(
      "the same, by the kernel", np.median(rows["predicted_explained"][-1])
    ),
    *(
      harness.Check(f"error of a state, m={last}: {name}", error)
      for name, error in errors.items()
    ),
  ]


def _layer_checks(config: Config, layer: Point) -> list[harness.Check]:
  """Of arrays (lengths, seeds, heads): for each head, and over all of them."""
  lengths, last = config.layer_lengths, config.layer_lengths[-1]
  found = {name: medians(x) for name, x in layer.items()}
  names = {
    "gap": "gap of the kernel at the start",
    "start": "outputs at the start from their limit",
    "distance": "outputs from the kernel's",
  }
  return [
    *(
      harness.Check(
        f"layer, slope in m: {what}",
        fit_slope(lengths, np.median(found[name], 1)).slope,
      )
      for name, what in names.items()
    ),
    *(
      harness.Check(f"layer, m={last}, head {i}: {what}", x)
      for name, what in names.items()
      for i, x in enumerate(found[name][-1])
    ),
    harness.Check(
      f"layer, m={last}: error of sampling",
      np.median(found["sampling"][-1]) / math.sqrt(last),
    ),
  ]


# --- figure ---


def _draw(
  config: Config, digits: Point, scales: Point, rows: Point, layer: Point
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(4, 2, figsize=(12.5, 18.5))
  _draw_accuracy(axes[0, 0], config, digits)
  _draw_distance(axes[0, 1], config, digits)
  _draw_loss(axes[1, 0], config, digits)
  _draw_scales(axes[1, 1], config, scales)
  _draw_rows(axes[2, 0], config, rows)
  _draw_states(axes[2, 1], config, rows)
  _draw_layer(axes[3], config, layer)
  return figure


def _draw_accuracy(ax: Axes, config: Config, digits: Point) -> None:
  accuracy = 100 * digits["accuracy"]
  ax.fill_between(
    config.lengths, accuracy.min(1), accuracy.max(1), alpha=0.2, linewidth=0
  )
  ax.semilogx(config.lengths, accuracy.mean(1), "o-", label="trained prefix")
  ax.axhline(
    100 * digits["kernel_accuracy"],
    color=harness.PALETTE[1],
    label="limit kernel, as many steps",
  )
  ax.axhline(
    100 * digits["kernel_accuracy_at_last"],
    color=harness.PALETTE[1],
    linestyle=":",
    label="limit kernel, trained to the end",
  )
  _label_lengths(ax, config.lengths)
  ax.set(title="Digits, no context", ylabel="% of test images")
  ax.legend()


def _draw_distance(ax: Axes, config: Config, digits: Point) -> None:
  for name, label in (
    ("distance", "test outputs"),
    ("gap", "kernel at the start"),
    ("change", "its change in training"),
  ):
    harness.plot_loglog(ax, config.lengths, medians(digits[name]), label=label)
  _draw_sampling(ax, config.lengths, digits["sampling"])
  _label_lengths(ax, config.lengths)
  ax.set(title="Distances from the limit kernel", ylabel="relative distance")
  ax.legend(fontsize=8.5)


def _draw_sampling(ax: Axes, lengths: Any, sampling: float) -> None:
  lengths = np.array(lengths, float)
  ax.loglog(
    lengths,
    sampling / np.sqrt(lengths),
    ":",
    color="#1b1f24",
    label="error of sampling",
  )


def _draw_loss(ax: Axes, config: Config, digits: Point) -> None:
  steps = 1 + np.arange(digits["loss"].shape[-1])
  shown = range(0, len(config.lengths), 2), [len(config.lengths) - 1]
  for i, color in zip(sorted({i for r in shown for i in r}), harness.PALETTE):
    loss = np.median(digits["loss"][i], 0)
    ax.loglog(steps, loss, color=color, label=f"m = {config.lengths[i]}")
  ax.loglog(
    steps,
    np.median(digits["predicted"][-1], 0),
    "--",
    color="#1b1f24",
    label="limit kernel",
  )
  ax.set(title="Digits: loss", xlabel="1 + steps", ylabel="loss")
  ax.legend()


def _draw_scales(ax: Axes, config: Config, scales: Point) -> None:
  for i, name in enumerate(SCALES):
    harness.plot_loglog(
      ax,
      config.scale_lengths,
      medians(scales["change"][:, :, i]),
      label=rf"$\gamma = {name}$",
    )
  ax.set(
    title="Random data: change of the kernel",
    xlabel="m, length of the prefix",
    ylabel="relative change",
  )
  ax.legend()


def _draw_rows(ax: Axes, config: Config, rows: Point) -> None:
  for name, label in (
    ("distance", "test outputs"),
    ("gap", "kernel at the start"),
  ):
    lengths = config.row_lengths
    harness.plot_loglog(ax, lengths, medians(rows[name]), label=label)
  _draw_sampling(ax, config.row_lengths, rows["sampling"][0, 0])
  ax.set(
    title="Rows, causal contexts: from the limit",
    xlabel="m, length of the prefix",
    ylabel="relative distance",
  )
  ax.legend()


def _draw_states(ax: Axes, config: Config, rows: Point) -> None:
  names = [name for name in rows if name.startswith("output, ")]
  for name, color in zip(names, harness.PALETTE):
    kind = name.removeprefix("output, ")
    label = "no prefix" if kind == "none" else f"{kind}, output"
    ax.loglog(
      config.row_lengths, medians(rows[name]), "o-", color=color, label=label
    )
    if f"learned, {kind}" in rows:
      ax.loglog(
        config.row_lengths,
        medians(rows[f"learned, {kind}"]),
        "s--",
        color=color,
        label=f"{kind}, what it learned",
      )
  _label_lengths(ax, config.row_lengths)
  ax.set(title="States in place of these prefixes", ylabel="relative error")
  # Room for the legend.
  ax.set_ylim(bottom=ax.get_ylim()[0] / 30)
  ax.legend(fontsize=8.5, ncols=2, loc="lower left")


def _draw_layer(axes: Any, config: Config, layer: Point) -> None:
  """Medians over seeds: dots over heads too, a pale line for each head."""
  lengths = config.layer_lengths
  for ax, parts in zip(
    axes,
    ({"gap": "kernel at the start"}, {"distance": "trained", "start": "start"}),
    strict=True,
  ):
    for (name, label), color in zip(parts.items(), harness.PALETTE):
      found = medians(layer[name])
      ax.loglog(lengths, found, color=color, alpha=0.3, lw=1)
      ax.set_prop_cycle(color=[color])
      harness.plot_loglog(ax, lengths, np.median(found, 1), label=label)
    ax.set(xlabel="m, length of the prefix", ylabel="relative distance")
  _draw_sampling(axes[0], lengths, np.median(layer["sampling"]))
  num_heads = config.layer_shape[0]
  axes[0].set_title(f"A causal layer of {num_heads} heads: kernels")
  axes[1].set_title("The same: outputs from their limit")
  for ax in axes:
    ax.legend()


def _label_lengths(ax: Axes, lengths: Any) -> None:
  ax.set_xticks(list(lengths), [str(m) for m in lengths])
  ax.minorticks_off()
  ax.set_xlabel("m, length of the prefix")


if __name__ == "__main__":
  harness.main(run, "prefix-ntk")
