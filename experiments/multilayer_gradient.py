"""Gradients of a multi-layer transformer in almost linear time.

Four questions of arXiv 2408.13233:

1. The table of its public demonstration: one head of degree 2, error and
   speed-up by n = 10 2^d; here against true softmax, and with its gradient.
2. Seconds of a training step, by length and by depth, and how many times those
   of exact attention are.
3. The error of a whole model's gradient against exact attention, by degree, by
   depth and layer by layer, beside the error of the polynomial itself on the
   logits of that model.
4. Training on English text: the loss with exact and with polynomial attention,
   at several bounds on the logits, and how much of the bound is used.
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
import optax
from jax import lax
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import harness
from jaxattn.attention import polynomial_attention, softmax_attention
from jaxattn.features import polynomial_coefficients, polynomial_error
from jaxattn.scaling import fit_slope

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Array = np.ndarray

_FIRST_DIM = 4  # Of the published table.
_SHORT = 5120  # The longest n of the table that gets many seeds.
_KINDS = ("taylor", "gaussian")
_EXACT = {
  "softmax/1": "exact, 1 layer",
  "matrix/1": "exact with the whole matrix, 1 layer",
}


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  text = functools.partial(text_point, wd)
  text = _each(wd, "text", _text_names(config), text)
  table = _each(wd, "table", config.table_dims, table_point)
  errors = _each(wd, "error", config.error_depths, error_point)
  times = _each(wd, "table_seconds", config.table_dims, table_seconds_point)
  steps = _each(wd, "step_seconds", config.lengths, step_seconds_point)
  lengths = config.matrix_lengths
  matrix = _each(wd, "matrix_seconds", lengths, matrix_seconds_point)
  panels = {
    "table": table,
    "times": times,
    "steps": steps,
    "matrix": matrix,
    "errors": errors,
    "text": text,
  }
  data = {
    f"{panel}/{name}/{key}": value
    for panel, points in panels.items()
    for name, point in points.items()
    for key, value in point.items()
  }
  harness.save_figure(wd, _draw(config, **panels), data)
  checks = [
    *_table_checks(config, table),
    *_error_checks(config, errors),
    *_text_checks(config, text),
  ]
  return harness.finish(
    wd,
    claim=(
      "Gradients of a multi-layer transformer under any loss, with residuals, "
      "causal mask and many heads, take almost linear time, with an error as "
      "small as the polynomial's."
    ),
    source="arXiv:2408.13233, theorem 1.5; table of its public demonstration",
    paper=(
      "error 4.7 % to 0.8 %, speed-up 26 at n = 5120 and 79 at n = 40960 over "
      "dense attention, degree 2"
    ),
    checks=checks,
    timed=[
      *_speedup_checks(config, times),
      *_step_checks(config, steps, matrix),
    ],
  )


def _each(
  wd: harness.Workdir, panel: str, names: tuple[Any, ...], compute: Any
) -> dict[Any, dict[str, Any]]:
  """Points of one panel by name."""
  return {
    name: wd.point(
      f"{panel}/{name}", functools.partial(compute, wd.config, name)
    )
    for name in harness.progress(names, panel)
  }


def _key(config: Config, *words: int) -> jax.Array:
  key = jax.random.key(config.seed)
  for word in words:
    key = jax.random.fold_in(key, word)
  return key


# --- the published table ---


def table_point(config: Config, d: int) -> dict[str, Any]:
  """(kinds,) errors of one head and of its gradient, mean over seeds.

  As the published table has them, and relative to the exact one.
  """
  num_seeds = config.table_seeds[10 * 2**d > _SHORT]
  results = [table_errors(_key(config, d, i), d) for i in range(num_seeds)]
  (forward, gradient), (plain_forward, plain_gradient) = np.mean(results, 0)
  return {
    "forward": forward,
    "gradient": gradient,
    "relative_forward": plain_forward,
    "relative_gradient": plain_gradient,
  }


@functools.partial(jax.jit, static_argnums=1)
def table_errors(rng: jax.Array, d: int) -> jax.Array:
  """Errors of the output and of the gradient, (2, 2, kinds).

  First |x - y| / |x + y| of both, then |x - y| / |x|.
  """
  query, key, value, g = table_inputs(rng, d)

  def output_and_gradient(attend: Callable[..., Any]) -> Any:
    out, vjp = jax.vjp(attend, query, key, value)
    return out, vjp(g)

  exact = output_and_gradient(functools.partial(softmax_attention, scale=1.0))
  fast = [output_and_gradient(table_attention(d, kind)) for kind in _KINDS]
  errors = [[_errors(exact[i], f[i]) for f in fast] for i in (0, 1)]
  return jnp.moveaxis(jnp.array(errors), -1, 0)


def table_inputs(rng: jax.Array, d: int) -> list[jax.Array]:
  """Query, key, value and a gradient in the output: one head, n = 10 2^d."""
  scales = (d**-0.5, d**-0.5, 1.0, 1.0)
  rngs = jax.random.split(rng, 4)
  shape = (1, 10 * 2**d, 1, d)
  return [
    s * jax.random.normal(r, shape) for s, r in zip(scales, rngs, strict=True)
  ]


def table_attention(d: int, kind: str) -> Callable[..., jax.Array]:
  """Degree 2, logits unscaled: their spread is 1 / sqrt(d)."""
  return functools.partial(
    polynomial_attention,
    degree=2,
    radius=1.0,  # Neither kind depends on it.
    coefficients=kind,
    sigma=d**-0.5 if kind == "gaussian" else None,
    scale=1.0,
    center_keys=False,
  )


def _errors(x: Any, y: Any) -> tuple[jax.Array, jax.Array]:
  norm = optax.tree.norm
  difference = norm(jax.tree.map(jnp.subtract, x, y))
  return difference / norm(jax.tree.map(jnp.add, x, y)), difference / norm(x)


def table_seconds_point(config: Config, d: int) -> dict[str, Any]:
  """Seconds of the forward pass: polynomial, exact tiled, exact dense."""
  *args, _ = table_inputs(_key(config, d), d)
  contestants = {
    "polynomial": table_attention(d, "taylor"),
    "tiled": functools.partial(softmax_attention, scale=1.0),
    "dense": functools.partial(dense_attention, rows=config.dense_rows),
  }
  runs = {
    name: functools.partial(jax.jit(fn), *args)
    for name, fn in contestants.items()
  }
  rounds = config.table_repeats[10 * 2**d > _SHORT]
  return harness.least_seconds(runs, rounds=rounds)


def dense_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, *, rows: int
) -> jax.Array:
  """Softmax attention with its whole matrix, ``rows`` queries at a time."""
  attend = functools.partial(jax.nn.dot_product_attention, scale=1.0)
  b, t, n, h = query.shape
  if t <= rows:
    return attend(query, key, value)
  rows = math.gcd(rows, t)
  tiles = jnp.moveaxis(query.reshape(b, t // rows, rows, n, h), 1, 0)
  out = lax.map(lambda q: attend(q, key, value), tiles)
  return jnp.moveaxis(out, 0, 1).reshape(query.shape)


# --- seconds of a step ---


def _step_length(config: Config) -> int:
  """The length at which all depths are timed, and not only the extremes."""
  # Where the bar was set, if it is among them.
  return 8192 if 8192 in config.lengths else config.lengths[-2]


def step_seconds_point(config: Config, n: int) -> dict[str, Any]:
  """Seconds of the gradient of a model's loss in all its parameters."""
  ends = (config.depths[0], config.depths[-1])
  is_full = n == _step_length(config)
  models = {
    f"{attention}/{depth}": step_model(config, attention, depth)
    for attention, depths in (
      ("polynomial", config.depths if is_full else ends),
      ("softmax", ends if is_full else (1,)),
    )
    for depth in depths
  }
  return _step_seconds(config, models, n)


def matrix_seconds_point(config: Config, n: int) -> dict[str, Any]:
  """The same for exact attention that holds its whole matrix."""
  # Not beside the others: the memory it takes slows down what runs after it.
  models = {"matrix/1": step_model(config, "dot_product", 1)}
  return _step_seconds(config, models, n)


def _step_seconds(
  config: Config, models: dict[str, Any], n: int
) -> dict[str, float]:
  contestants = {}
  for name, model in models.items():
    params, (x, _) = random_model([config.seed], model, n)
    params = jax.tree.map(jnp.asarray, params)
    contestants[name] = functools.partial(jax.jit(step(model)), params, x)
  return harness.least_seconds(contestants, rounds=config.repeats)


def step_model(config: Config, attention: str, num_layers: int) -> Any:
  """A causal model whose queries and keys have length 1."""
  from jaxattn.models import TransformerConfig

  model = TransformerConfig(
    num_layers=num_layers,
    dim=config.step_dim,
    num_heads=config.step_heads,
    head_dim=config.step_dim // config.step_heads,
    remat=False,
  )
  if attention != "polynomial":
    return model._replace(attention=attention)
  return with_polynomial(model, config.step_degree, 1.0)


def step(model_config: Any) -> Callable[..., Any]:
  """The gradient of a loss in all parameters."""
  from jaxattn.models import Transformer

  def loss(params: Any, x: jax.Array) -> jax.Array:
    out = Transformer(model_config).apply(params, x)
    return (out**2).sum()  # pyright: ignore[reportOperatorIssue]

  return jax.grad(loss)


def random_model(
  seed: list[int], model_config: Any, length: int
) -> tuple[Any, tuple[jax.Array, jax.Array]]:
  """Parameters, and inputs and targets: (1, length, dim) normal vectors each.

  Weights are N(0, 1 / dim), those of queries and keys 0.7 of that.
  """
  from jaxattn.models import Transformer

  # On the host: compiling so many draws would take longer than the gradient.
  rng = np.random.default_rng(seed)
  dim = model_config.dim
  batch = rng.standard_normal((2, 1, length, dim), np.float32)
  init = Transformer(model_config).init
  shapes = jax.eval_shape(init, jax.random.key(0), batch[0])

  def draw(path: Any, shape: Any) -> np.ndarray:
    name = jax.tree_util.keystr(path)
    if "norm" in name:
      return np.ones(shape.shape, np.float32)
    scale = (0.7 if "query" in name or "key" in name else 1) / math.sqrt(dim)
    return np.float32(scale) * rng.standard_normal(shape.shape, np.float32)

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  return params, (jnp.asarray(batch[0]), jnp.asarray(batch[1]))


def with_polynomial(
  model_config: Any, degree: int, radius: float, **options: Any
) -> Any:
  """The same model with polynomial attention."""
  options = {"degree": degree, "radius": radius, **options}
  return model_config._replace(
    attention="polynomial", attention_options=tuple(options.items())
  )


# --- error of a model's gradient ---


def error_point(config: Config, num_layers: int) -> dict[str, Any]:
  """(degrees,) errors of weights and input, and (degrees, layers) of layers.

  Each with a first axis of seeds; the radius is the largest logit of a seed.
  """
  model = error_model(num_layers)
  seeds = [
    _seed_errors(
      config,
      model,
      *random_model([config.seed, num_layers, i], model, config.error_length),
    )
    for i in range(config.error_seeds)
  ]
  return {key: np.array([s[key] for s in seeds]) for key in seeds[0]}


def _seed_errors(
  config: Config, model: Any, params: Any, batch: Any
) -> dict[str, Any]:
  from jaxattn.models import gradient_error

  radius = float(gradient_error(params, batch, model).logit_radius.max())
  found, eps = [], []
  for degree in config.degrees:
    # By default neighbors are attended to exactly, which flatters a short text.
    low = with_polynomial(model, degree, radius, local="polynomial")
    found.append(gradient_error(params, batch, low))
    coefficients = polynomial_coefficients(degree, radius)
    eps.append(polynomial_error(coefficients, radius))
  return {
    "weights": [e.weights for e in found],
    "inputs": [e.inputs for e in found],
    "layers": [e.relative for e in found],
    "eps": eps,
    "radius": radius,
  }


def error_model(num_layers: int) -> Any:
  """A causal model of four heads, whose logits nothing bounds."""
  from jaxattn.models import TransformerConfig

  return TransformerConfig(
    num_layers=num_layers,
    dim=16,
    num_heads=4,
    head_dim=4,
    qk_norm=None,
    positions=None,
  )


# --- text ---


def _text_names(config: Config) -> tuple[str, ...]:
  attentions = ("exact", *(f"degree={g}" for g in config.text_degrees))
  return tuple(f"{a},R={r:g}" for r in config.radii for a in attentions)


def text_point(
  wd: harness.Workdir, config: Config, name: str
) -> dict[str, Any]:
  """Bits a character, of each logged step and then on held-out text.

  Also the largest logit of each logged step.
  """
  from jaxattn.data import byte_batches, load_text
  from jaxattn.models import Transformer

  model = Transformer(text_model(config, name))
  text = load_text()
  cut = len(text) * 9 // 10
  sizes = {"batch_size": config.batch_size, "length": config.text_length}
  ids = byte_batches(_key(config, 0), text[:cut], **sizes)
  sizes["batch_size"] = config.held_out
  held_out = byte_batches(_key(config, 1), text[cut:], **sizes)(0)
  rng = _key(config, 2)
  loss_fn = functools.partial(text_loss, model)
  log_every = max(1, config.num_steps // 30)

  def batches(step: int) -> tuple[Any, Any]:
    done = step + 1
    return ids(step), np.bool_(
      done % log_every == 0 or done == config.num_steps
    )

  params = harness.train_loop(
    rng,
    loss_fn,
    jax.jit(model.init)(rng, ids(0)[:, :-1]),
    batches,
    optimizer=optax.adam(config.learning_rate),
    num_steps=config.num_steps,
    workdir=wd,
    name=name,
    log_every=log_every,
  )
  rows = harness.read_metrics(wd.path / "metrics.jsonl")
  rows = [row for row in rows if row["series"] == name]
  bits = [
    jax.jit(loss_fn)(params, (batch, False), rng)[1]["bits"]
    for batch in np.split(held_out, config.held_out // config.batch_size)
  ]
  return {
    "step": [row["step"] for row in rows],
    "bits": [row["bits"] for row in rows],
    "logit_radius": [row["logit_radius"] for row in rows],
    "held_out": np.mean(bits),
  }


def text_model(config: Config, name: str) -> Any:
  """The model called "exact,R=1", or "degree=4,R=1": the same, but for one."""
  from jaxattn.models import TransformerConfig

  attention, _, radius = name.partition(",R=")
  model_config = TransformerConfig(
    num_layers=config.text_layers,
    dim=config.text_dim,
    num_heads=config.text_heads,
    head_dim=config.text_dim // config.text_heads,
    vocab_size=128,
    qk_norm=math.sqrt(float(radius)),
    remat=config.tier == "full",
  )
  if attention == "exact":
    return model_config
  degree = int(attention.partition("=")[2])
  return with_polynomial(
    model_config, degree, float(radius), local="polynomial"
  )


def text_loss(
  model: Any, params: Any, batch: tuple[Any, Any], rng: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean cross-entropy of the next character, and the same in bits.

  ``batch`` is characters, and whether the largest logit is to be found as well:
  that takes quadratic time.
  """
  del rng
  ids, is_logged = batch
  logits = model.apply(params, ids[:, :-1])
  loss = optax.softmax_cross_entropy_with_integer_labels(
    logits, ids[:, 1:]
  ).mean()

  def radius(params: Any) -> jax.Array:
    _, stats = model.apply(params, ids[:, :-1], return_stats=True)
    return stats.logit_radius.max()

  largest = lax.cond(
    is_logged, radius, lambda _: jnp.zeros_like(loss), lax.stop_gradient(params)
  )
  return loss, {"bits": loss / math.log(2), "logit_radius": largest}


# --- checks ---


def _table_checks(
  config: Config, table: dict[int, dict[str, Any]]
) -> list[harness.Check]:
  checks = []
  for d, point in table.items():
    published = config.table_error[d - _FIRST_DIM] / 100
    ratio = point["forward"][0] / published
    name = f"error over published, Taylor, d={d}"
    checks.append(harness.Check(name, ratio, *config.accepted.table_ratio))
  for d in (min(table), max(table)):
    checks += [
      harness.Check(f"relative error of {what}, {kind}, d={d}", error)
      for what in ("forward", "gradient")
      for kind, error in zip(_KINDS, table[d][f"relative_{what}"])
    ]
  return checks


def _speedup_checks(
  config: Config, times: dict[int, dict[str, Any]]
) -> list[harness.Check]:
  accepted = config.accepted
  n = np.array([10 * 2**d for d in times])
  dense, tiled = _speedups(times)
  slope = fit_slope(n, dense).slope
  checks = [
    harness.Check("speed-up over dense, slope", slope, *accepted.speedup_slope)
  ]
  bounds = {
    5120: (accepted.speedup_5120, accepted.speedup_tiled_5120),
    40960: (accepted.speedup_40960, -math.inf),
  }
  for length, *ratios in zip(n, dense, tiled):
    lows = bounds.get(int(length), ())
    for peer, ratio, low in zip(("dense", "tiled"), ratios, lows):
      name = f"speed-up over {peer}, n={length}"
      checks.append(harness.Check(name, ratio, low))
  return checks


def _speedups(times: dict[int, dict[str, Any]]) -> tuple[Array, Array]:
  ours = np.array([t["polynomial"] for t in times.values()])
  dense = np.array([t["dense"] for t in times.values()])
  tiled = np.array([t["tiled"] for t in times.values()])
  return dense / ours, tiled / ours


def _step_checks(
  config: Config,
  steps: dict[int, dict[str, Any]],
  matrix: dict[int, dict[str, Any]],
) -> list[harness.Check]:
  accepted, n = config.accepted, _step_length(config)
  checks = []
  for depth in (config.depths[0], config.depths[-1]):
    slope = fit_slope(config.lengths, _seconds(steps, f"polynomial/{depth}"))
    name = f"slope of seconds by length, degree 2, {_layers(depth)}"
    checks.append(harness.Check(name, slope.slope, high=accepted.slope))
  by_depth = [steps[n][f"polynomial/{depth}"] for depth in config.depths]
  r_squared = np.corrcoef(config.depths, by_depth)[0, 1] ** 2
  checks.append(
    harness.Check(
      "seconds by depth, R squared", r_squared, accepted.depth_r_squared
    )
  )
  for points, peer, low in (
    (steps, "softmax/1", accepted.exact_slope),
    (matrix, "matrix/1", -math.inf),
  ):
    slope = fit_slope(np.array(list(points)), _seconds(points, peer)).slope
    name = f"slope of seconds by length, {_EXACT[peer]}"
    checks.append(harness.Check(name, slope, low))
  # A whole model has many layers: what decides is the least of these.
  low = accepted.step_speedup_8192 if n == 8192 else -math.inf
  for depth in (config.depths[0], config.depths[-1]):
    ratio = steps[n][f"softmax/{depth}"] / steps[n][f"polynomial/{depth}"]
    name = f"speed-up of a step, {_layers(depth)}, n={n}"
    checks.append(harness.Check(name, ratio, low))
  n = max(matrix)
  if n not in steps:
    return checks
  ratio = matrix[n]["matrix/1"] / steps[n]["polynomial/1"]
  name = f"speed-up of a step over the whole matrix, 1 layer, n={n}"
  return [*checks, harness.Check(name, ratio)]


def _seconds(steps: dict[int, dict[str, Any]], name: str) -> Array:
  return np.array([point[name] for point in steps.values()])


def _layers(depth: int) -> str:
  return f"{depth} layer" + "s" * (depth > 1)


def _error_checks(
  config: Config, errors: dict[int, dict[str, Any]]
) -> list[harness.Check]:
  high = config.accepted.error_over_eps
  checks, mean_ratio = [], {}
  for depth, point in errors.items():
    for what in ("weights", "inputs"):
      # Of all seeds and degrees the largest decides.
      ratio = np.divide(point[what], point["eps"])
      name = f"gradient error of {what} over eps, {_layers(depth)}"
      checks.append(harness.Check(name, ratio.max(), high=high))
      mean_ratio[what, depth] = np.exp(np.log(ratio).mean())
  if not {4, 8} <= set(errors):
    return checks
  growth = mean_ratio["weights", 8] / mean_ratio["weights", 4]
  name = "growth of error over eps from 4 to 8 layers"
  return [*checks, harness.Check(name, growth, high=config.accepted.growth)]


def _text_checks(
  config: Config, text: dict[str, dict[str, Any]]
) -> list[harness.Check]:
  checks = []
  for r in config.radii:
    exact = text[f"exact,R={r:g}"]["held_out"]
    checks.append(harness.Check(f"bits a character, exact, R={r:g}", exact))
    for g in config.text_degrees:
      gap = text[f"degree={g},R={r:g}"]["held_out"] - exact
      decides = g == 4 and r == 1
      bounds = config.accepted.gap if decides else ()
      name = f"bits a character above exact, degree {g}, R={r:g}"
      checks.append(harness.Check(name, gap, *bounds))
    names = [name for name in text if name.endswith(f",R={r:g}")]
    used = max(np.max(text[name]["logit_radius"]) for name in names) / r
    checks.append(
      harness.Check(f"largest logit in training over R, R={r:g}", used)
    )
  return checks


# --- figure ---


def _draw(
  config: Config,
  *,
  table: dict[int, dict[str, Any]],
  times: dict[int, dict[str, Any]],
  steps: dict[int, dict[str, Any]],
  matrix: dict[int, dict[str, Any]],
  errors: dict[int, dict[str, Any]],
  text: dict[str, dict[str, Any]],
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(2, 3, figsize=(17.5, 9.8))
  _draw_table(axes[0, 0], config, table)
  _draw_speedups(axes[0, 1], config, times)
  _draw_steps(axes[0, 2], config, steps, matrix)
  _draw_errors(axes[1, 0], config, errors)
  _draw_layers(axes[1, 1], config, errors)
  _draw_text(axes[1, 2], config, text)
  return figure


def _draw_table(
  ax: Axes, config: Config, table: dict[int, dict[str, Any]]
) -> None:
  n = [10 * 2**d for d in table]
  published = np.array(config.table_error[: len(n)]) / 100
  for what, style, name in (
    ("gradient", "s--", "gradient"),
    ("forward", "o-", "output"),
  ):
    for i, (kind, color) in enumerate(zip(_KINDS, harness.PALETTE)):
      error = [point[what][i] for point in table.values()]
      label = f"{kind.title()}, {name}"
      ax.loglog(n, error, style, color=color, label=label)
  # Above the lines, which pass through some of them.
  ax.loglog(
    n, published, "k*", markersize=11, zorder=4, label="published, output"
  )
  ax.set(
    title="One head of degree 2: the gradient is harder",
    xlabel="n, sequence length (d = 4 to 12)",
    ylabel="error |x - y| / |x + y|",
    ylim=(min(published) / 3, 0.25),
  )
  _label_lengths(ax, n)
  ax.legend(loc="lower left")


def _draw_speedups(
  ax: Axes, config: Config, times: dict[int, dict[str, Any]]
) -> None:
  n = [10 * 2**d for d in times]
  theirs = np.divide(config.table_dense, config.table_theirs)[: len(n)]
  dense, tiled = _speedups(times)
  ax.loglog(n, theirs, "k*", markersize=11, label="published, over dense")
  ax.loglog(n, dense, "o-", label="ours, over dense")
  ax.loglog(n, tiled, "s-", label="ours, over exact in tiles")
  ax.axhline(1, color="0.6", linewidth=1)
  ax.set(
    title="One head: speed-up of the forward pass",
    xlabel="n, sequence length (d = 4 to 12)",
    ylabel="times faster",
  )
  _label_lengths(ax, n)
  ax.legend()


def _draw_steps(
  ax: Axes,
  config: Config,
  steps: dict[int, dict[str, Any]],
  matrix: dict[int, dict[str, Any]],
) -> None:
  rows = dict(_EXACT)
  for depth in (config.depths[0], config.depths[-1]):
    label = f"degree {config.step_degree}, {_layers(depth)}"
    rows[f"polynomial/{depth}"] = label
  for name, label in rows.items():
    points = matrix if name == "matrix/1" else steps
    seconds = _seconds(points, name)
    harness.plot_loglog(ax, np.array(list(points)), seconds, label=label)
  ax.set(
    title="Seconds of a gradient: linear in the length",
    xlabel="sequence length",
    ylabel="seconds",
  )
  ax.legend(loc="upper left", fontsize=8.5)
  ax.set_ylim(top=ax.get_ylim()[1] * 6)


def _draw_errors(
  ax: Axes, config: Config, errors: dict[int, dict[str, Any]]
) -> None:
  depths = list(errors)
  for j, (degree, color) in enumerate(zip(config.degrees, harness.PALETTE)):
    weights, inputs, eps = (
      [_middle(point[name])[j] for point in errors.values()]
      for name in ("weights", "inputs", "eps")
    )
    ax.semilogy(depths, weights, "o-", color=color)
    ax.semilogy(depths, inputs, "s-", color=color, alpha=0.6)
    ax.semilogy(depths, eps, ":", color=color)
    ax.annotate(
      f"degree {degree}",
      (depths[-1], weights[-1]),
      xytext=(8, 0),
      textcoords="offset points",
      color=color,
      va="center",
    )
  for style, label in (
    ("o-", "gradient of weights"),
    ("s-", "gradient of the input"),
    (":", r"$\varepsilon$ of the polynomial"),
  ):
    ax.plot([], [], style, color="0.35", label=label)
  ax.set(
    title=r"Whole models stay below $\varepsilon$ at every depth",
    xlabel="layers",
    ylabel="relative error of the gradient",
    xticks=depths,
    xlim=(0, depths[-1] * 1.28),
  )
  ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, -0.3))


def _middle(x: Any) -> Array:
  """Geometric mean over seeds, the first axis."""
  return np.exp(np.log(x).mean(0))


def _draw_layers(
  ax: Axes, config: Config, errors: dict[int, dict[str, Any]]
) -> None:
  depth = max(errors)
  layers = np.arange(1, depth + 1)
  for j, degree in enumerate(config.degrees):
    by_layer = _middle(errors[depth]["layers"])[j]
    ax.semilogy(layers, by_layer, "o-", label=f"degree {degree}")
  ax.set(
    title=f"The same, layer by layer ({depth} layers)",
    xlabel="layer, 1 = the first",
    ylabel="relative error of the layer's gradient",
  )
  ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, -0.3))


def _draw_text(
  ax: Axes, config: Config, text: dict[str, dict[str, Any]]
) -> None:
  styles = ("-", "--", ":", "-.")
  for r, color in zip(config.radii, harness.PALETTE):
    names = [n for n in text if n.endswith(f"R={r:g}")]
    for name, style in zip(names, styles):
      point = text[name]
      label = name.partition(",")[0].replace("=", " ") + f", R = {r:g}"
      ax.plot(
        point["step"],
        point["bits"],
        style,
        color=color,
        label=f"{label}: {point['held_out']:.4f}",
      )
  ax.set(
    title="Training on text: one curve for each R",
    xlabel="step",
    ylabel="bits a character, training",
  )
  ax.legend(title="after training, on held-out text", fontsize=8.5)


def _label_lengths(ax: Axes, n: list[int]) -> None:
  ax.xaxis.set_major_locator(ticker.FixedLocator(n[::2]))
  ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
  ax.xaxis.set_minor_locator(ticker.NullLocator())


if __name__ == "__main__":
  harness.main(run, "multilayer-gradient")
