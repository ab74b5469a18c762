"""Tensor attention: almost linear time, its price, and what it can learn.

Three questions about arXiv 2310.04064 and arXiv 2405.16411, on one head or one
layer:

1. How do times grow with n: exact attention to all pairs of tokens, the
   polynomial one, its gradient, and the gradient of the training loss? How many
   times faster is that, and how far off?
2. Is the error below its bound, and the gradient's near the polynomial's
   relative error? How large may entries be, for attention to one token, to
   pairs and to triples? Logits are at most sqrt(H) B^(k + 1), so that a degree
   which serves logits up to R serves B = (R / sqrt(H))^(1 / (k + 1)). No larger
   B serves all inputs, if one input errs by as much at hardly more: keys
   aligned with a query, whose logits are R and the next place below where the
   polynomial is off by as much in the other direction.
3. Does one layer of attention to pairs learn Match3, whether a token and two
   others sum to a multiple of M? Does one of ordinary attention? Does one whose
   logits are bounded, as the polynomial asks, and the polynomial itself? One
   without a null token?
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import optimize

from experiments import harness
from jaxattn import data
from jaxattn.attention import (
  polynomial_order_attention,
  polynomial_tensor_attention,
  softmax_attention,
  tensor_attention,
  tensor_attention_loss_gradient,
  tensor_logit_radius,
)
from jaxattn.features import (
  attention_error_bound,
  polynomial_coefficients,
  polynomial_error,
)
from jaxattn.models import TensorAttention
from jaxattn.scaling import fit_slope

# Below this an error in float64 is one of rounding.
_ROUNDING = 1e-13
# Radii of logits between which a largest entry is looked for.
_RADII = (0.1, 11.9)
# Promise about the logits of inputs that are timed; of those without an exact
# result to compare with it is not looked at, and does not change the time.
_TIMED_RADIUS = 1.5

# A ConfigDict: what type a field has is known at run time only.
Config = Any


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  times = _points(wd, "time", config.sizes, time_point)
  losses = _points(wd, "loss", config.loss_lengths, loss_point)
  errors = _points(wd, "error", config.bounds, error_point)
  limits = _points(wd, "limit", config.orders, limit_point)
  learned = _learned(wd)
  figure = _draw(config, times, losses, errors, limits, learned)
  arrays = {"time": times, "loss": losses, "error": errors, "limit": limits}
  shown = {
    f"{name}_{key}".replace(", ", "_"): value
    for name, group in arrays.items()
    for key, value in group.items()
  }
  harness.save_figure(wd, figure, shown | learned)
  return harness.finish(
    wd,
    claim=(
      "Attention to pairs of tokens and its gradient are computed in time "
      "almost linear in n for bounded entries, with an error that is bounded "
      "beforehand; one layer of it learns what ordinary attention does not."
    ),
    source="arXiv:2310.04064, abstract; arXiv:2405.16411, abstract",
    paper="n^(1+o(1)) instead of n^3 time if entries are o((log n)^(1/3)) "
    "(no numbers, no experiments)",
    checks=[
      *_error_checks(config, times, errors),
      *_limit_checks(config, limits),
      *_learning_checks(config, learned),
    ],
    timed=[
      *_slope_checks(config, times, losses),
      *_factor_checks(config, times),
    ],
  )


def _points(
  wd: harness.Workdir, name: str, values: tuple[Any, ...], compute: Any
) -> dict[str, np.ndarray]:
  """Points of all values, stacked along a first axis."""
  points = [
    wd.point(
      f"{name}/{str(value).strip('()').replace(', ', '-')}",
      functools.partial(compute, wd.config, value),
    )
    for value in harness.progress(values, name)
  ]
  return {key: np.stack([p[key] for p in points]) for key in points[0]}


def _key(config: Config, *path: int) -> jax.Array:
  rng = jax.random.key(config.seed)
  return functools.reduce(jax.random.fold_in, path, rng)


# --- times ---


def time_point(config: Config, size: tuple[int, int]) -> dict[str, Any]:
  """Seconds of a size (H, degree), exact and polynomial, and the error."""
  dim, degree = size
  found: dict[str, list[float]] = {
    name: [] for name in ("exact", "short", "polynomial", "gradient", "error")
  }
  for n in config.exact_lengths:
    arrays = _inputs(config, n, dim)
    ours, exact = timed_call(degree), timed_call(None)
    seconds = _seconds(config, {"exact": exact, "short": ours}, arrays)
    for name, value in seconds.items():
      found[name].append(value)
    error = jnp.abs(ours(*arrays) - exact(*arrays)).max()
    found["error"].append(float(error))
  longest = _inputs(config, config.exact_lengths[-1], dim)
  radius = float(tensor_logit_radius(*longest[:3]))
  for n in config.lengths:
    calls = {
      "polynomial": timed_call(degree),
      "gradient": timed_call(degree, with_gradient=True),
    }
    for name, value in _seconds(config, calls, _inputs(config, n, dim)).items():
      found[name].append(value)
  return found | {"radius": radius}


def loss_point(config: Config, n: int) -> dict[str, Any]:
  """Seconds of the gradient of the training loss, of the size shown."""
  dim, degree = config.shown
  tall = jax.random.uniform(_key(config, 4), (6, n, dim), minval=-1.0)
  small = jax.random.uniform(_key(config, 5), (5, dim, dim), minval=-1.0)
  factors, weights = tuple(small[:3]), small[3:]
  call = functools.partial(
    timed_loss_gradient(degree), factors, *tall[:5], *weights, tall[5]
  )
  seconds = harness.least_seconds(
    {"loss": call}, rounds=config.rounds, at_least=config.seconds_per_point
  )
  return {"seconds": seconds["loss"]}


def timed_loss_gradient(degree: int) -> Callable[..., jax.Array]:
  """The gradient of the training loss in linear time."""
  return functools.partial(
    tensor_attention_loss_gradient, degree=degree, radius=_TIMED_RADIUS
  )


def _inputs(config: Config, n: int, dim: int) -> jax.Array:
  rng = _key(config, 1, dim)
  return jax.random.uniform(rng, (5, 1, n, 1, dim), minval=-1.0, maxval=1.0)


def _seconds(
  config: Config, calls: dict[str, Any], arrays: jax.Array
) -> dict[str, float]:
  return harness.least_seconds(
    {name: functools.partial(call, *arrays) for name, call in calls.items()},
    rounds=config.rounds,
    at_least=config.seconds_per_point,
    in_turn=False,
  )


def timed_call(
  degree: int | None, *, with_gradient: bool = False
) -> Callable[..., Any]:
  """Tensor attention of five arrays, exact without a degree."""
  attend = tensor_attention
  if degree is not None:
    attend = functools.partial(
      polynomial_tensor_attention, degree=degree, radius=_TIMED_RADIUS
    )

  def backward(*arrays: jax.Array) -> Any:
    out, vjp = jax.vjp(attend, *arrays)
    return out, vjp(out)

  return jax.jit(backward if with_gradient else attend)


# --- errors ---


def error_point(config: Config, bound: float) -> dict[str, Any]:
  """By degree: error and its bound, and the gradient's error over eps."""
  n, dim = config.error_length, config.error_dim
  rows: list[tuple[float, ...]] = []
  with jax.enable_x64(True):
    rng = _key(config, 2, round(1000 * bound))
    x = jax.random.uniform(rng, (6, 1, n, 1, dim), minval=-1.0, maxval=1.0)
    arrays, cotangent = [*(bound * x[:3]), x[3], x[4]], x[5]
    radius = float(tensor_logit_radius(*arrays[:3]))
    exact, exact_grads = _pull(tensor_attention, arrays, cotangent)
    pairs = arrays[3][:, :, None] * arrays[4][:, None]
    pairs = pairs.reshape(1, -1, 1, dim)
    for degree in config.degrees:
      eps = polynomial_error(polynomial_coefficients(degree, radius), radius)
      attend = functools.partial(
        polynomial_tensor_attention, degree=degree, radius=radius
      )
      out, grads = _pull(attend, arrays, cotangent)
      limit = jnp.maximum(attention_error_bound(eps, pairs)[:, None], _ROUNDING)
      error = jnp.abs(out - exact)
      used = float((error / limit).max())
      relative = _relative(grads, exact_grads)
      rows.append((float(error.max()), float(limit.max()), used, relative, eps))
  names = ("error", "bound", "used", "gradient", "eps")
  table = dict(zip(names, zip(*rows, strict=True), strict=True))
  return {k: np.array(v) for k, v in table.items()} | {"radius": radius}


def _pull(attend: Any, arrays: Any, cotangent: jax.Array) -> Any:
  def both(*arrays: jax.Array) -> Any:
    out, vjp = jax.vjp(attend, *arrays)
    return out, vjp(cotangent)

  return jax.jit(both)(*arrays)


def _relative(got: Any, want: Any) -> float:
  return max(
    float(jnp.abs(g - w).max() / jnp.abs(w).max())
    for g, w in zip(got, want, strict=True)
  )


def limit_point(config: Config, order: int) -> dict[str, Any]:
  """By degree: largest B of an error, aligned and drawn, and of the law."""
  radii = [largest_radius(degree, config.eps) for degree in config.degrees]
  aligned, drawn = (
    [_largest_entry(config, draw, order, g) for g in config.degrees]
    for draw in (aligned_inputs, uniform_inputs)
  )
  # The library's own error there, beside that of all tuples one by one.
  errors = [
    _order_error(config, aligned_inputs, order, degree, bound, fast=True)
    for degree, bound in zip(config.degrees, aligned, strict=True)
  ]
  return {
    "law": [_entries(config, radius, order) for radius in radii],
    "radius": radii,
    "b": aligned,
    "uniform": drawn,
    "error": errors,
  }


def largest_radius(degree: int, eps: float) -> float:
  """R for which outputs of values on [-1, 1] are off by ``eps`` at most."""

  def excess(radius: float) -> float:
    found = polynomial_error(polynomial_coefficients(degree, radius), radius)
    return math.log(2 * math.tanh(math.atanh(found) / 2) / eps)

  return float(optimize.root_scalar(excess, bracket=(1e-2, 6.0)).root)


def _entries(config: Config, radius: float, order: int) -> float:
  return (radius / math.sqrt(config.error_dim)) ** (1 / (order + 1))


def _largest_entry(config: Config, draw: Any, order: int, degree: int) -> float:
  def excess(bound: float) -> float:
    error = _order_error(config, draw, order, degree, bound)
    return math.log(error / config.eps)

  bracket = [_entries(config, radius, order) for radius in _RADII]
  found = optimize.root_scalar(excess, bracket=bracket, xtol=1e-6)
  return float(found.root)


def uniform_inputs(
  config: Config, order: int, degree: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Query (n, H), keys and values (order, n, H), all uniform on [-1, 1]."""
  del degree
  shape = (2 * order + 1, config.order_length, config.error_dim)
  x = np.random.default_rng(config.seed).uniform(-1, 1, shape)
  return x[0], x[1 : order + 1], x[order + 1 :]


def aligned_inputs(
  config: Config, order: int, degree: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Entries that make the most of an error, and logits as large as they can be.

  The first query is aligned with all keys: its logits are the largest ones
  possible, or a little less, where the error of a polynomial has its last
  extremum but one. Values tell these two apart.
  """
  query, keys, values = uniform_inputs(config, order, degree)
  query, keys, values = np.sign(query), np.ones_like(keys), np.ones_like(values)
  query[0] = 1
  half = len(query) // 2
  # Extrema of a Chebyshev polynomial; those of this one are close.
  keys[0, half:] = math.cos(math.pi / (degree + 1))
  values[0, half:] = -1
  return query, keys, values


def _order_error(
  config: Config,
  draw: Any,
  order: int,
  degree: int,
  bound: float,
  *,
  fast: bool = False,
) -> float:
  """Largest error for entries on [-B, B] and the radius known beforehand."""
  query, keys, values = draw(config, order, degree)
  query, keys, (n, dim) = bound * query, bound * keys, query.shape
  radius = math.sqrt(dim) * bound ** (order + 1)
  letters = "jkl"[:order]
  tuples = ",".join(f"{a}c" for a in letters)
  logits = np.einsum(f"ic,{tuples}->i{letters}", query, *keys) / math.sqrt(dim)

  def attend(weights: np.ndarray) -> np.ndarray:
    total = weights.reshape(n, -1).sum(1)
    sums = np.einsum(f"i{letters},{tuples}->ic", weights, *values)
    return sums / total[:, None]

  exact = attend(np.exp(logits))
  if not fast:
    coefs = polynomial_coefficients(degree, radius)
    out = attend(np.polynomial.polynomial.polyval(logits, coefs))
    return float(np.abs(out - exact).max())
  with jax.enable_x64(True):
    out = polynomial_order_attention(
      jnp.asarray(query)[:, None],
      tuple(jnp.asarray(k)[:, None] for k in keys),
      tuple(jnp.asarray(v)[:, None] for v in values),
      degree=degree,
      radius=radius,
    )
  return float(np.abs(np.asarray(out)[:, 0] - exact).max())


# --- Match3 ---


class MatrixAttention(nn.Module):
  """Ordinary attention with a null token, of the sizes of TensorAttention."""

  num_heads: int
  head_dim: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, T, D) to the same."""
    heads = self.num_heads, self.head_dim
    query, key, value = (
      nn.DenseGeneral(heads, name=name)(x) for name in ("query", "key", "value")
    )

    def with_null(name: str, y: jax.Array) -> jax.Array:
      start = nn.initializers.normal(self.head_dim**-0.5)
      null = self.param(f"null_{name}", start, heads).astype(y.dtype)
      null = jnp.broadcast_to(null[None, None], (len(y), 1, *heads))
      return jnp.concatenate((y, null), 1)

    y = softmax_attention(
      query, with_null("key", key), with_null("value", value)
    )
    return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(y)


class Match3(nn.Module):
  """One layer with a skip, a network of one hidden layer, a logit a token."""

  attention: nn.Module
  mlp: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, T, D) to (B, T)."""
    x = x + self.attention(x)
    return nn.Dense(1)(nn.gelu(nn.Dense(self.mlp)(x)))[..., 0]


def match3_model(config: Config, kind: str) -> Match3:
  """The model of a kind of attention."""
  heads = {"num_heads": config.num_heads, "head_dim": config.head_dim}
  if kind == "matrix":
    return Match3(MatrixAttention(**heads), config.mlp)
  fields = {
    "tensor": {},
    "bounded": {"radius": config.radius},
    "polynomial": {"radius": config.radius, "degree": config.degree},
    "no null token": {"null_token": False},
  }
  return Match3(TensorAttention(**heads, **fields[kind]), config.mlp)


def match3_inputs(config: Config, tokens: jax.Array, modulus: int) -> jax.Array:
  """Cosine and sine of harmonics of a token's angle, filled up with ones."""
  harmonics = jnp.arange(1, config.harmonics + 1, dtype=jnp.int32)
  # Of integers mod M: angles of large ones would lose digits.
  steps = tokens[..., None] * harmonics[None, None] % modulus
  angles = 2 * math.pi / modulus * steps.astype(jnp.float32)
  waves = jnp.concatenate((jnp.cos(angles), jnp.sin(angles)), -1)
  ones = jnp.ones((*tokens.shape, config.dim - waves.shape[-1]))
  return jnp.concatenate((waves, ones), -1)


def match3_loss(
  params: Any, batch: Any, rng: jax.Array, *, model: Match3
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy of the labels of all tokens, and the share of right ones."""
  del rng
  x, labels = batch
  logits: Any = model.apply(params, x)
  losses = optax.sigmoid_binary_cross_entropy(logits, labels.astype(x.dtype))
  return losses.mean(), {"accuracy": ((logits > 0) == labels).mean()}


def match3_point(
  config: Config,
  wd: harness.Workdir,
  task: tuple[int, int],
  kind: str,
  seed: int,
) -> dict[str, float]:
  """Share of tokens of fresh sequences that are told right, once trained."""
  modulus, length = task
  rng, model = _key(config, 3, modulus, seed), match3_model(config, kind)

  @functools.partial(jax.jit, static_argnums=1)
  def batch(step: Any, size: int) -> Any:
    key = jax.random.fold_in(rng, step)
    tokens, labels = data.match3_batch(key, size, length, modulus)
    return match3_inputs(config, tokens, modulus), labels

  test = batch(config.num_steps, config.test_size)
  loss_fn = functools.partial(match3_loss, model=model)
  decay = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
  params = harness.train_loop(
    rng,
    loss_fn,
    model.init(rng, test[0][:1]),
    lambda step: batch(step, config.batch_size),
    optimizer=optax.adam(decay),
    num_steps=config.num_steps,
    workdir=wd,
    name=_name(task, kind, seed),
  )
  # Steps are counted from 0, so this batch was never trained on.
  accuracy = jax.jit(loss_fn)(params, test, rng)[1]["accuracy"]
  share = float(test[1].mean())
  return {"accuracy": float(accuracy), "base": max(share, 1 - share)}


def _name(task: tuple[int, int], kind: str, seed: int) -> str:
  return f"match3/modulus={task[0]}/{kind.replace(' ', '_')}/seed={seed}"


def _learned(wd: harness.Workdir) -> dict[str, np.ndarray]:
  """By "M=19 kind": (seeds,) accuracies; and of guessing, as kind "base"."""
  config: Config = wd.config
  found: dict[str, np.ndarray] = {}
  for task, seeds in zip(config.tasks, config.num_seeds, strict=True):
    for kind, num_seeds in zip(config.kinds, seeds, strict=True):
      if not num_seeds:
        continue
      points = [
        wd.point(
          _name(task, kind, seed),
          functools.partial(match3_point, config, wd, task, kind, seed),
        )
        for seed in range(num_seeds)
      ]
      found[f"M={task[0]} {kind}"] = np.array([p["accuracy"] for p in points])
      found.setdefault(
        f"M={task[0]} base", np.array([p["base"] for p in points])
      )
  return found


# --- checks ---


def _slopes(
  lengths: tuple[int, ...], seconds: np.ndarray, least: float, most: float
) -> list[float]:
  """Exponents of n, of lengths from ``least`` to ``most``, by row."""
  n = np.array(lengths)
  used = (n >= least) & (n <= most)
  return [fit_slope(n[used], s[used]).slope for s in seconds]


def _slope_checks(
  config: Config, times: dict[str, np.ndarray], losses: dict[str, np.ndarray]
) -> list[harness.Check]:
  exact = _slopes(
    config.exact_lengths, times["exact"], config.exact_from, math.inf
  )
  checks = [
    harness.Check(
      "least slope of time, exact", min(exact), config.accepted.exact_slope
    )
  ]
  least, most = config.slope_lengths
  accepted = config.accepted.linear_slope
  for label, name in (("polynomial", "polynomial"), ("with gradient",) * 2):
    seconds = times[name.removeprefix("with ")]
    slopes = _slopes(config.lengths, seconds, least, most)
    label = f"slope of time, {label}"
    checks += [
      harness.Check(f"least {label}", min(slopes), *accepted),
      harness.Check(f"greatest {label}", max(slopes), *accepted),
    ]
    if config.lengths[-1] > most:
      longer = _slopes(config.lengths, seconds, least, math.inf)
      n = config.lengths[-1]
      checks.append(harness.Check(f"greatest {label}, to n={n}", max(longer)))
  seconds = losses["seconds"][None]
  (slope,) = _slopes(config.loss_lengths, seconds, 0, math.inf)
  label = "slope of time, gradient of the training loss"
  return [*checks, harness.Check(label, slope, *accepted)]


def _factor_checks(
  config: Config, times: dict[str, np.ndarray]
) -> list[harness.Check]:
  shown = config.sizes.index(config.shown)
  factors = times["exact"] / times["short"]
  shortest = config.exact_lengths[0]
  checks = [
    harness.Check(
      f"exact / polynomial, n={shortest}, least of all sizes",
      float(factors[:, 0].min()),
      config.accepted.shortest_factor,
    )
  ]
  for n, least in zip(
    config.factor_lengths, config.accepted.factors, strict=True
  ):
    value = float(factors[shown, config.exact_lengths.index(n)])
    checks.append(harness.Check(f"exact / polynomial, n={n}", value, least))
  most = config.slope_lengths[1]
  at = config.lengths.index(most)
  ratios = times["gradient"] / times["polynomial"]
  dim, degree = config.shown
  return [
    *checks,
    harness.Check(
      f"with gradient / forward, H={dim}, degree {degree}, n={most}",
      float(ratios[shown, at]),
      -math.inf,
      config.accepted.gradient_ratio,
    ),
    harness.Check(
      "with gradient / forward, greatest of all sizes and lengths",
      float(ratios.max()),
    ),
    harness.Check(
      f"milliseconds, polynomial, H={dim}, degree {degree}, n={most}",
      1000 * float(times["polynomial"][shown, at]),
    ),
  ]


def _error_checks(
  config: Config, times: dict[str, np.ndarray], errors: dict[str, np.ndarray]
) -> list[harness.Check]:
  n = config.exact_lengths[-1]
  return [
    harness.Check(
      "largest error over its bound",
      float(errors["used"].max()),
      *config.accepted.error_over_bound,
    ),
    harness.Check(
      "largest error of a gradient over eps",
      float((errors["gradient"] / errors["eps"]).max()),
      *config.accepted.gradient_over_eps,
    ),
    harness.Check(
      f"largest error of what is timed, n={n}",
      float(times["error"][:, -1].max()),
      *config.accepted.timed_error,
    ),
    harness.Check(
      f"largest logit of what is timed, n={n}",
      float(times["radius"].max()),
      0.0,
      _TIMED_RADIUS,
    ),
  ]


def _limit_checks(
  config: Config, limits: dict[str, np.ndarray]
) -> list[harness.Check]:
  ratio = limits["b"] / limits["law"]
  accepted = config.accepted
  # Of B as a power of R, by number of key sequences, over 1 / (k + 1).
  exponents = [
    (k + 1) * float(np.polyfit(np.log(radius), np.log(b), 1)[0])
    for k, radius, b in zip(
      config.orders, limits["radius"], limits["b"], strict=True
    )
  ]
  first, last = config.orders[0], config.orders[-1]
  checks = [
    harness.Check(
      "least of largest entries over their law",
      float(ratio.min()),
      *accepted.entries_over_law,
    ),
    harness.Check(
      "greatest of largest entries over their law",
      float(ratio.max()),
      *accepted.entries_over_law,
    ),
    harness.Check(
      f"error of the library at these entries over {config.eps:g}, off 1 by",
      float(np.abs(limits["error"] / config.eps - 1).max()),
      0.0,
      accepted.error_at_limit,
    ),
    harness.Check(
      "least exponent of largest entries over its law",
      min(exponents),
      *accepted.exponent_over_law,
    ),
    harness.Check(
      "greatest exponent of largest entries over its law",
      max(exponents),
      *accepted.exponent_over_law,
    ),
  ]
  for i, degree in enumerate(config.degrees):
    # Smaller entries for a higher order only where R > sqrt(H).
    is_last = i == len(config.degrees) - 1
    checks.append(
      harness.Check(
        f"largest entry, {last} key sequences over {first}, degree {degree}",
        float(limits["b"][-1, i] / limits["b"][0, i]),
        -math.inf,
        accepted.higher_order if is_last else math.inf,
      )
    )
  return checks + [
    harness.Check(
      f"largest entry, {k} key sequences, degree {config.degrees[-1]}, {name}",
      float(limits[key][i, -1]),
    )
    for name, key in (("aligned", "b"), ("uniform", "uniform"))
    for i, k in enumerate(config.orders)
  ]


def _learning_checks(
  config: Config, learned: dict[str, np.ndarray]
) -> list[harness.Check]:
  first = f"M={config.tasks[0][0]}"
  checks = [
    harness.Check(
      f"least accuracy on Match3, tensor attention, {first}",
      float(learned[f"{first} tensor"].min()),
      config.accepted.tensor_accuracy,
    ),
    harness.Check(
      f"greatest accuracy on Match3, matrix attention, {first}",
      float(learned[f"{first} matrix"].max()),
      -math.inf,
      config.accepted.matrix_accuracy,
    ),
  ]
  return checks + [
    harness.Check(f"mean accuracy on Match3, {name}", float(x.mean()))
    for name, x in learned.items()
  ]


# --- figure ---


def _draw(
  config: Config,
  times: dict[str, np.ndarray],
  losses: dict[str, np.ndarray],
  errors: dict[str, np.ndarray],
  limits: dict[str, np.ndarray],
  learned: dict[str, np.ndarray],
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(2, 2, figsize=(12.5, 9.5))
  _draw_times(axes[0, 0], config, times, losses)
  _draw_errors(axes[0, 1], config, errors)
  _draw_limits(axes[1, 0], config, limits)
  _draw_learned(axes[1, 1], config, learned)
  return figure


def _draw_times(
  ax: Axes,
  config: Config,
  times: dict[str, np.ndarray],
  losses: dict[str, np.ndarray],
) -> None:
  i = config.sizes.index(config.shown)
  exact = (config.exact_from, math.inf)
  seconds = {name: times[name][i] for name in ("exact", "polynomial")}
  seconds |= {"with gradient": times["gradient"][i], "loss": losses["seconds"]}
  parts = (
    ("exact", "exact", config.exact_lengths, exact),
    ("polynomial", "polynomial", config.lengths, config.slope_lengths),
    ("with gradient", "with gradient", config.lengths, config.slope_lengths),
    ("gradient of the loss", "loss", config.loss_lengths, (0, math.inf)),
  )
  for (label, name, lengths, ends), color in zip(
    parts, harness.PALETTE, strict=False
  ):
    (slope,) = _slopes(lengths, seconds[name][None], *ends)
    x, y = list(lengths), list(seconds[name])
    if name == "polynomial":
      x, y = [*config.exact_lengths, *x], [*times["short"][i], *y]
    ax.loglog(
      x,
      1000 * np.array(y),
      "o-",
      color=color,
      label=f"{label}: $n^{{{slope:.2f}}}$",
    )
  dim, degree = config.shown
  ax.set(
    title=f"Time: n instead of $n^3$ (H = {dim}, degree {degree})",
    xlabel="n, number of tokens",
    ylabel="milliseconds",
    # Room for the legend.
    ylim=(100 * min(map(np.min, seconds.values())), None),
  )
  ax.legend(loc="lower right")


def _cross(color: str) -> dict[str, Any]:
  return {
    "marker": "x",
    "linestyle": "",
    "markeredgecolor": color,
    "markeredgewidth": 1.5,
  }


def _draw_errors(
  ax: Axes, config: Config, errors: dict[str, np.ndarray]
) -> None:
  labels = [f"degree {degree}" for degree in config.degrees]
  harness.plot_bounded_errors(
    ax, config.bounds, errors["error"], errors["bound"], labels
  )
  ax.set(title="Error of outputs stays below its bound (dashed)")
  for i, color in zip(range(len(labels)), harness.PALETTE, strict=False):
    ax.semilogy(config.bounds, errors["gradient"][:, i], **_cross(color))
  ax.plot([], [], **_cross("#6b7480"), label="gradient, relative")
  ax.set(
    xlabel="B, bound on the entries of query and keys", xticks=config.bounds
  )
  ax.legend(loc="lower right")


def _draw_limits(
  ax: Axes, config: Config, limits: dict[str, np.ndarray]
) -> None:
  for i, (degree, color) in enumerate(
    zip(config.degrees, harness.PALETTE, strict=False)
  ):
    ax.plot(config.orders, limits["law"][:, i], "--", color=color)
    label = f"degree {degree}"
    ax.plot(config.orders, limits["b"][:, i], "o", color=color, label=label)
    ax.plot(config.orders, limits["uniform"][:, i], **_cross(color))
  ax.plot([], [], **_cross("#6b7480"), label="uniform entries")
  ax.axhline(1, color="#6b7480", linewidth=1, linestyle=":")
  ax.set(
    title=f"Largest B for an error of {config.eps:g}, and its law (dashed)",
    xlabel="k, number of key sequences",
    ylabel="B",
    xticks=config.orders,
    ylim=(0, None),
  )
  ax.legend(loc="lower right")


def _draw_learned(
  ax: Axes, config: Config, learned: dict[str, np.ndarray]
) -> None:
  colors = {"base": "#6b7480"}
  colors |= dict(zip(config.kinds, harness.PALETTE, strict=False))
  unnamed = set(colors)
  for j, (modulus, _) in enumerate(config.tasks):
    kinds = [kind for kind in colors if f"M={modulus} {kind}" in learned]
    for i, kind in enumerate(kinds):
      values = learned[f"M={modulus} {kind}"]
      x = j + (i - (len(kinds) - 1) / 2) * 0.14
      label = {"base": "always the same answer"}.get(kind, kind)
      ax.bar(
        x,
        values.mean(),
        0.12,
        color=colors[kind],
        alpha=0.75,
        label=label if kind in unnamed else None,
      )
      unnamed.discard(kind)
      ax.plot([x] * len(values), values, "o", color=colors[kind], markersize=4)
  names = [f"M = {m}, {n} tokens" for m, n in config.tasks]
  ax.set_xticks(range(len(names)), names)
  ax.set(
    title="Match3: one layer, share of tokens told right",
    ylabel="accuracy",
    ylim=(0.5, 1.2),
  )
  ax.legend(loc="upper center", ncols=2)


if __name__ == "__main__":
  harness.main(run, "tensor-attention")
