"""Input recovery from attention: what leaks, from what, and how exactly.

Questions about arXiv 2310.12462, on one layer whose weights are known:

1. How often does the approximate Newton method find the tokens, from the
   attention weights of one head or two, from the output, or from both, and how
   far may it start? What does a ridge that goes to 0 add, with Gauss-Newton
   steps? How fast does the method converge in the end?
2. In how many directions can tokens not be known at all?
3. How many words of a vocabulary are read off, under noise and rounding?
4. The same of images, and of a real pretrained encoder.

A loss of zero is counted apart from recovery: with the weights of one head it
is reached by tokens that are not the true ones.
"""

import functools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import harness
from jaxattn import newton
from jaxattn.data import load_digits, load_text
from jaxattn.models import load_minilm, minilm_apply, minilm_tokenize
from jaxattn.regression import attention_inversion, tokens

_MODELS = ("both", "output", "weights, 2 heads", "weights")
_ATTACKS = ("closed form", "refined", "weights alone")
_HEAD_DIM = 32
_DTYPES = ("float32", "float16")

# A ConfigDict: what type a field has is known at run time only.
Config = Any
# Of NumPy or of JAX.
Array = Any
Points = dict[str, dict[str, Any]]
# Of starts: radius about the truth, or None for starts about 0, and ridges.
Kinds = tuple[tuple[float | None, tuple[float, ...]], ...]


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)

  def sweep(name: str, compute: Any, cases: dict[str, tuple]) -> Points:
    return {
      key: wd.point(
        f"{name}/{key}", functools.partial(compute, wd.config, *case)
      )
      for key, case in harness.progress(list(cases.items()), name)
    }

  sizes = {f"n={n},d={d}": (n, d) for n, d in config.sizes}
  near = tuple((radius, ()) for radius in config.radii)
  recovery = sweep(
    "recovery",
    recovery_point,
    {
      f"{_key(model)}/{size}": (
        *(model, *sizes[size], config.weight_scale),
        *((*near, (None, ())), config.side_tasks),
      )
      for i, size in enumerate(sizes)
      for model in _MODELS
      if model == "both" or i < config.side_sizes
    },
  )
  # What decides: more tasks, random starts, ridges.
  ridged = (None, tuple(config.ridges))
  random = sweep(
    "random",
    recovery_point,
    {
      size: ("both", *pair, config.weight_scale, (ridged,), config.num_tasks)
      for size, pair in sizes.items()
    },
  )
  # The other scale of W, where it is another.
  scaled = sweep(
    "scaled",
    recovery_point,
    {
      size: ("both", n, d, 2 / d, (ridged, (None, ())), config.side_tasks)
      for size, (n, d) in sizes.items()
      if 2 / d != config.weight_scale
    },
  )
  nullity = sweep(
    "nullity", nullity_point, {f"d={d}": (d,) for d in config.dims}
  )
  words = sweep(
    "words",
    words_point,
    {f"noise={x:g}": (x,) for x in config.noises}
    | {dtype: (dtype,) for dtype in _DTYPES},
  )
  order = wd.point("order", functools.partial(order_point, config))
  digits = wd.point("digits", functools.partial(digits_point, config))
  minilm = wd.point("minilm", functools.partial(minilm_point, config))
  found = (recovery, random, nullity, words, order, digits, minilm)
  figure_data = _figure_data(*found, scaled)
  harness.save_figure(wd, _draw(config, *found), figure_data)
  return harness.finish(
    wd,
    claim=(
      "Given a layer's weights, the tokens that went into it are recovered "
      "from its attention weights and outputs by a second-order method, with "
      "quadratic convergence."
    ),
    source="arXiv:2310.12462, abstract",
    paper="tokens are recovered from attention weights (no numbers, no "
    "experiments)",
    checks=[
      *_recovery_checks(config, recovery, random),
      *_random_checks(config, recovery, random, scaled),
      *_other_checks(config, nullity, order, digits),
      *_word_checks(config, words, minilm),
    ],
  )


# --- tasks ---


def _draw_layer(
  rng: np.random.Generator,
  n: int,
  d: int,
  heads: int = 1,
  scale: float | None = None,
) -> tuple[Array, Array, Array]:
  """Tokens, W and V of heads; without a scale of W logits are of size 2."""
  truth = rng.normal(size=(n, d))
  w = rng.normal(size=(heads, d, d)) * (2 / d if scale is None else scale)
  return truth, w, rng.normal(size=(heads, d, d))


def observe(model: str, truth: Array, w: Array, v: Array) -> Any:
  """What one of the models of observation leaves of a layer."""
  if not model.endswith("heads"):
    w, v = w[:1], v[:1]
  weights, output = attention_inversion.predict(truth, w, v)
  if model.startswith("weights"):
    return attention_inversion.prepare(w, weights=weights)
  if model == "output":
    return attention_inversion.prepare(w, v, output=output)
  return attention_inversion.prepare(w, v, weights=weights, output=output)


def recovery_error(model: str, found: Any, truth: Array) -> Array:
  """Relative errors of estimates (..., n, d), up to what no one can know."""
  found = np.asarray(found)
  signs = (1, -1) if model.startswith("weights") else (1,)
  gaps = [np.linalg.norm(found - s * truth, axis=(-2, -1)) for s in signs]
  return np.min(gaps, axis=0) / np.linalg.norm(truth)


# --- recovery ---


def _key(model: str) -> str:
  return model.replace(", ", "_").replace(" ", "_")


def recovery_point(
  config: Config,
  model: str,
  n: int,
  d: int,
  scale: float,
  kinds: Kinds,
  num_tasks: int,
) -> dict[str, Array]:
  """By task and kind of start: shares recovered, of zero loss, by the best."""
  rows = []
  with jax.enable_x64(True):
    for task in range(num_tasks):
      rng = np.random.default_rng((config.seed, task, n, d))
      truth, w, v = _draw_layer(rng, n, d, heads=2, scale=scale)
      data = observe(model, truth, w, v)
      rows.append(_recovery_row(config, model, truth, data, task, kinds))
      if model == "both":
        closed = attention_inversion.invert_closed_form(
          data.w, data.v, data.weights, data.output
        )
        rows[-1]["closed"] = recovery_error(model, closed, truth)
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _recovery_row(
  config: Config,
  model: str,
  truth: Array,
  data: Any,
  task: int,
  kinds: Kinds,
) -> dict[str, Any]:
  shares = []
  for i, (radius, ridges) in enumerate(kinds):
    found = attention_inversion.invert_attention(
      jax.random.fold_in(jax.random.key(config.seed), 100 * task + i),
      data,
      len(truth),
      num_starts=config.num_starts,
      init_scale=radius or 1.0,
      x0=jnp.asarray(truth if radius else np.zeros_like(truth)),
      ridges=ridges,
    )
    right = recovery_error(model, found.all_tokens, truth) < config.recovered
    zero = np.asarray(found.all_losses) < config.zero_loss
    best = right[np.argmin(found.all_losses)]
    shares.append((right.mean(), zero.mean(), float(best)))
  names = ("recovered", "zero_loss", "best")
  return dict(zip(names, np.array(shares).T, strict=True))


def order_point(config: Config) -> dict[str, Array]:
  """Relative errors by step from close starts, and orders of convergence."""
  n, d = config.sizes[0]
  with jax.enable_x64(True):
    rng = np.random.default_rng((config.seed, 0, n, d))
    truth, w, v = _draw_layer(rng, n, d, heads=2, scale=config.weight_scale)
    data = observe("both", truth, w, v)
    target = jnp.asarray(truth).reshape(-1)
    starts = target[None] + 0.1 * rng.normal(size=(config.num_starts, n * d))
    errors = np.asarray(_error_curves(starts, target, data, config.order_steps))
  return {"errors": errors, "orders": np.array([_order(e) for e in errors])}


@functools.partial(jax.jit, static_argnums=3)
def _error_curves(
  starts: jax.Array, target: jax.Array, data: Any, num_steps: int
) -> jax.Array:
  problem = attention_inversion.problem()

  def body(state: Any, _: None) -> tuple[Any, jax.Array]:
    error = jnp.linalg.norm(state.x - target) / jnp.linalg.norm(target)
    return newton.step(problem, state, data)[0], error

  def curve(start: jax.Array) -> jax.Array:
    state = newton.init(problem, start, data)
    return jax.lax.scan(body, state, length=num_steps)[1]

  return jax.vmap(curve)(starts)


def _order(errors: Array) -> float:
  """Of the last three errors between the first basin and rounding."""
  inside = np.log(errors[(errors < 3e-2) & (errors > 1e-14)])[-3:]
  if len(inside) < 3:
    return float("nan")
  first, second = np.diff(inside)
  return float(second / first)


# --- what can be known ---


def nullity_point(config: Config, d: int) -> dict[str, int]:
  """Directions that cannot be known, by model of observation."""
  with jax.enable_x64(True):
    rng = np.random.default_rng((config.seed, d))
    truth, w, v = _draw_layer(rng, 3 * d, d, heads=2)
    symmetric = (w + w.swapaxes(1, 2)) / 2
    cases = {model: observe(model, truth, w, v) for model in _MODELS}
    cases["weights, symmetric"] = observe("weights", truth, symmetric, v)
    return {
      name: int(attention_inversion.identifiability_report(truth, data)[1])
      for name, data in cases.items()
    }


def _expected_nullity(d: int) -> dict[str, int]:
  expected = dict.fromkeys(_MODELS, 0)
  return expected | {"weights": d // 2, "weights, symmetric": d * (d - 1) // 2}


# --- words ---


def words_point(config: Config, noise: float | str) -> dict[str, float]:
  """Share of words read off, by attack, with noise or rounded to a dtype."""
  rows = []
  with jax.enable_x64(True):
    for task in range(config.word_tasks):
      rng = np.random.default_rng((config.seed, 7, task))
      vocab = rng.normal(size=(config.vocabulary, config.word_dim))
      positions = sinusoids(config.num_words, config.word_dim)
      ids = rng.integers(config.vocabulary, size=config.num_words)
      _, w, v = _draw_layer(rng, config.num_words, config.word_dim)
      seen = attention_inversion.predict(vocab[ids] + positions, w[0], v[0])
      weights, output = _disturb(rng, seen, noise)
      layer = (w[0], v[0], weights, output)
      closed = attention_inversion.invert_closed_form(*layer)
      first = _decode(closed, vocab, positions)
      refined = _refine(config, *layer, vocab[first] + positions)
      guesses = (
        first,
        _decode(refined, vocab, positions),
        words_from_weights(weights, w[0], vocab, positions),
      )
      rows.append([(guess == ids).mean() for guess in guesses])
  means = np.mean(rows, axis=0)
  return {name: float(x) for name, x in zip(_ATTACKS, means, strict=True)}


def sinusoids(length: int, dim: int) -> Array:
  """The usual encoding of positions, (length, dim)."""
  rates = 10000.0 ** (-np.arange(0, dim, 2) / dim)
  angles = np.arange(length)[:, None] * rates
  return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(length, dim)


def _disturb(
  rng: np.random.Generator, seen: Any, noise: float | str
) -> tuple[Array, Array]:
  """Weights and output with noise, or rounded; weights stay stochastic."""
  weights, output = map(np.asarray, seen)
  if isinstance(noise, str):
    weights, output = (
      x.astype(noise).astype(np.float64) for x in (weights, output)
    )
    floor = float(np.finfo(noise).smallest_subnormal)
  else:
    weights = weights + noise * rng.normal(size=weights.shape)
    output = output + noise * rng.normal(size=output.shape)
    floor = noise / 10
  weights = np.maximum(weights, max(floor, 1e-300))
  return weights / weights.sum(1, keepdims=True), output


def _decode(found: Any, vocab: Array, positions: Array) -> Array:
  return np.asarray(tokens.decode_tokens(found - positions, vocab)[0])


def _refine(
  config: Config, w: Array, v: Array, weights: Array, output: Array, x0: Array
) -> Array:
  """Tokens by the Newton method from about what the closed form decoded."""
  return attention_inversion.invert_attention(
    jax.random.key(config.seed),
    attention_inversion.prepare(w, v, weights=weights, output=output),
    len(weights),
    num_starts=config.word_starts,
    init_scale=0.1,
    x0=jnp.asarray(x0),
    # With noise the exact Hessian is indefinite up to the end.
    config=newton.NewtonConfig(
      max_steps=config.word_steps, rtol=1e-9, curvature="gauss_newton"
    ),
  ).tokens


def words_from_weights(
  weights: Array, w: Array, vocab: Array, positions: Array
) -> Array:
  """Reads words off the weights of one head, without any output.

  Tokens are known up to G with G W G^T = W. In the eigenvectors of inv(W) W^T
  that multiplies coordinates by numbers whose product is 1 within a pair, so
  that products within pairs are known: they give a first guess at each word,
  and all first guesses together the numbers.
  """
  q, gram = attention_inversion.invert_subspace(weights, w)
  try:
    change = attention_inversion.congruence_solve(gram, w)
  except ValueError:
    # Noise has left nothing to solve for: a guess like any other.
    return np.zeros(len(weights), int)
  roots, vectors = np.linalg.eig(np.linalg.solve(w, w.T))
  pair = np.abs(roots[:, None] * roots[None] - 1).argmin(1)
  left = np.linalg.inv(vectors).T
  seen = np.asarray(q) @ change @ left
  every = (vocab[None] + positions[:, None]) @ left
  found, known = (_real(x * x[..., pair]) for x in (seen, every))
  # Products of conjugates are real: what is left of their imaginary parts is
  # rounding, and must not count as much as the others.
  scale = known.std((0, 1))
  scale = np.maximum(scale, 1e-6 * scale.max())
  ids = _nearest(found / scale, known / scale)
  ratios = seen / np.take_along_axis(every, ids[:, None, None], 1)[:, 0]
  factors = np.median(ratios.real, 0) + 1j * np.median(ratios.imag, 0)
  return _decode((seen / factors @ vectors.T).real, vocab, positions)


def _real(x: Array) -> Array:
  return np.concatenate([x.real, x.imag], -1)


def _nearest(found: Array, known: Array) -> Array:
  """(n,) ids of (n, p) among (n, V, p)."""
  decode = jax.vmap(lambda x, y: tokens.decode_tokens(x, y)[0])
  return np.asarray(decode(found, known))


# --- images ---


def digits_point(config: Config) -> dict[str, Array]:
  """Images and their reconstructions, (digits, 8, 8), and relative errors."""
  pixels, labels = load_digits()
  images = pixels.reshape(-1, 8, 8).astype(np.float64)
  mean, scale = images.mean(0), images.std()
  shown = images[[int(np.argmax(labels == x)) for x in config.labels]]
  truth = (shown - mean) / scale
  out: dict[str, Array] = {"truth": shown}
  with jax.enable_x64(True):
    for model in _MODELS:
      found = np.stack(
        [_digit(config, model, i, x) for i, x in enumerate(truth)]
      )
      out[f"{model}: image"] = found * scale + mean
      pairs = zip(found, truth, strict=True)
      out[f"{model}: error"] = np.array(
        [recovery_error(model, x, y) for x, y in pairs]
      )
  return out


def _digit(config: Config, model: str, task: int, image: Array) -> Array:
  """One image from starts about the mean image, which is 0 here."""
  rng = np.random.default_rng((config.seed, 9, task))
  _, w, v = _draw_layer(rng, 8, 8, heads=2)
  found = attention_inversion.invert_attention(
    jax.random.fold_in(jax.random.key(config.seed), task),
    observe(model, image, w, v),
    8,
    num_starts=config.num_starts,
    init_scale=config.digit_spread,
    x0=jnp.zeros((8, 8)),
  )
  estimate = np.asarray(found.tokens)
  # A negative is told from an image at a glance.
  is_negative = model.startswith("weights") and (estimate * image).sum() < 0
  return -estimate if is_negative else estimate


# --- a pretrained encoder ---


def sentences(config: Config) -> list[str]:
  """Plain sentences of Python's documentation, without repetition."""
  found = re.findall(r"[A-Z][a-z]+(?:\s+[a-z]+){7,13}\.", load_text())
  distinct = dict.fromkeys(" ".join(x.split()) for x in found)
  return list(distinct)[: config.num_sentences]


def minilm_point(config: Config) -> dict[str, Any]:
  """Share of word pieces read off the first layer of MiniLM.

  Known are its weights; observed are attention weights and outputs, of all
  heads or of one, in single precision or rounded to 16 bits. Biases of queries
  and keys do not matter: the closed form does not look at them.
  """
  params = load_minilm()
  ids, mask = minilm_tokenize(sentences(config), config.sentence_length)
  streams = minilm_apply(
    params, ids, mask, capture=("query", "key", "attention")
  ).captured
  query, key, output = (
    np.asarray(streams[x][0]) for x in ("query", "key", "attention")
  )
  logits = np.einsum("bihc,bjhc->bhij", query, key) / np.sqrt(_HEAD_DIM)
  logits = np.where(mask[:, None, None], logits, -np.inf)
  weights = np.asarray(jax.nn.softmax(logits))
  layer = params["layer_0"]
  with jax.enable_x64(True):
    values = {
      dtype: _minilm_values(weights, output, mask, layer, dtype)
      for dtype in _DTYPES
    }
  # Both precisions at once: embedding the vocabulary is what takes time.
  found, of_heads = (np.concatenate(x) for x in zip(*values.values()))
  hits = []
  for at in harness.progress(range(ids.shape[1]), "positions of MiniLM"):
    guesses = _minilm_decode(params, at, found[:, at], of_heads[:, at])
    right = np.asarray(guesses).reshape(-1, len(values), len(ids))
    hits.append((right == ids[None, None, :, at])[..., mask[:, at]])
  shares = dict(zip(values, np.concatenate(hits, -1).mean(-1).T, strict=True))
  out: dict[str, Any] = {"num_pieces": int(mask.sum())}
  for dtype, x in shares.items():
    out[f"{dtype}, all heads"] = float(x[0])
    out[f"{dtype}, each head"] = x[1:]
  return out


def _minilm_values(
  weights: Array, output: Array, mask: Array, layer: Any, dtype: str
) -> tuple[Array, Array]:
  """Tokens from all heads, (B, T, 384), and values of each, (B, T, 12, 32)."""
  kernel, bias = (np.asarray(layer["value"][x]) for x in ("kernel", "bias"))
  v: Array = kernel.swapaxes(0, 1).astype(np.float64)
  tokens_of = np.zeros((*mask.shape, kernel.shape[0]))
  values_of = np.zeros(output.shape)
  for b, n in enumerate(mask.sum(1)):
    s, o = weights[b, :, :n, :n], output[b, :n].swapaxes(0, 1)
    s, o = (x.astype(dtype).astype(np.float64) for x in (s, o))
    o = o - bias[:, None]
    # Queries and keys are not needed: an identity in their place.
    w = jnp.broadcast_to(jnp.eye(v.shape[1]), (len(v), *[v.shape[1]] * 2))
    tokens_of[b, :n] = attention_inversion.invert_closed_form(w, v, s, o)
    values_of[b, :n] = np.linalg.solve(s, o).swapaxes(0, 1)
  return tokens_of, values_of


@jax.jit
def _minilm_decode(
  params: Any, at: jax.Array, found: jax.Array, values: jax.Array
) -> jax.Array:
  """(1 + heads, B) word pieces nearest to tokens, or to values of a head."""
  norm = params["norm"]
  x = params["word"]["embedding"] + params["position"]["embedding"][at][None]
  x += params["token_type"]["embedding"][:1]
  x -= x.mean(1, keepdims=True)
  x /= jnp.sqrt((x**2).mean(1, keepdims=True))
  x = x * norm["scale"][None] + norm["bias"][None]
  kernel = params["layer_0"]["value"]["kernel"]
  every = jnp.einsum("vd,dhc->hvc", x, kernel)
  of_heads = jax.vmap(lambda y, z: tokens.decode_tokens(y, z)[0])(
    values.astype(x.dtype).swapaxes(0, 1), every
  )
  whole, _ = tokens.decode_tokens(found.astype(x.dtype), x)
  return jnp.concatenate([whole[None], of_heads])


# --- checks ---


def _shares(points: Points, model: str, key: str) -> Array:
  """(sizes, radii) means over tasks."""
  name = _key(model)
  return np.stack(
    [p[key].mean(0) for k, p in points.items() if k.split("/")[0] == name]
  )


def _recovery_checks(
  config: Config, points: Points, random: Points
) -> list[harness.Check]:
  accepted = config.accepted
  closed = np.stack([p["closed"] for p in random.values()])
  shares = np.stack([p["recovered"][:, 0] for p in random.values()])
  far = f"starts at {config.radii[-1]:g}"
  # Starts still nearer to the truth may lie beside it by chance.
  weights = _shares(points, "weights", "recovered")[:, -2:]
  checks = [
    harness.Check(
      "recovered, both, random starts",
      shares.mean(),
      accepted.both_from_random,
    ),
    harness.Check(
      "recovered by the closed form",
      (closed < config.recovered).mean(),
      accepted.closed_form,
    ),
    harness.Check(
      f"recovered, weights of one head, random or {far}",
      weights.max(),
      high=accepted.weights_recovered,
    ),
    harness.Check(
      f"zero loss, weights of one head, {far}",
      _shares(points, "weights", "zero_loss")[:, -2].mean(),
    ),
  ]
  for model in ("output", "weights, 2 heads"):
    means = _shares(points, model, "recovered").mean(0)
    for at, label in ((0, f"starts at {config.radii[0]:g}"), (-1, "random")):
      checks.append(harness.Check(f"recovered, {model}, {label}", means[at]))
  return checks


def _random_checks(
  config: Config, points: Points, random: Points, scaled: Points
) -> list[harness.Check]:
  """Random starts by method, size and scale of W: none of this decides."""
  checks = [
    harness.Check(
      "recovered, both, random starts, the one of least loss",
      float(np.mean([p["best"] for p in random.values()])),
    ),
    harness.Check(
      "recovered, both, random starts, plain Newton",
      _shares(points, "both", "recovered")[:, -1].mean(),
    ),
  ]
  scale = f"W of {config.weight_scale:g}"
  for size, point in random.items():
    plain = points[f"both/{size}"]["recovered"][:, -1]
    found = {
      scale: point["recovered"][:, 0],
      f"{scale}, plain Newton": plain,
    }
    if size in scaled:
      both = scaled[size]["recovered"]
      found |= {"W of 2/d": both[:, 0], "W of 2/d, plain Newton": both[:, 1]}
    checks += [
      harness.Check(f"recovered, both, random starts, {size}, {name}", x.mean())
      for name, x in found.items()
    ]
  return checks


def _other_checks(
  config: Config, nullity: Points, order: Any, digits: Any
) -> list[harness.Check]:
  agrees = [
    nullity[f"d={d}"][name] == expected
    for d in config.dims
    for name, expected in _expected_nullity(d).items()
  ]
  orders = order["orders"][np.isfinite(order["orders"])]
  median = float(np.median(orders)) if len(orders) else float("nan")
  return [
    harness.Check(
      "share of nullities as derived",
      float(np.mean(agrees)),
      config.accepted.nullity_agrees,
    ),
    harness.Check(
      "order of convergence, median", median, *config.accepted.order
    ),
    *(
      harness.Check(
        f"relative error of digits, {model}, median",
        float(np.median(digits[f"{model}: error"])),
      )
      for model in _MODELS
    ),
  ]


def _word_checks(
  config: Config, words: Points, minilm: Any
) -> list[harness.Check]:
  levels = {f"noise={config.noises[0]:g}", "noise=0.001", *_DTYPES}
  checks = [
    harness.Check(f"words, {attack}, {level}", words[level][attack])
    for level in words
    if level in levels
    for attack in _ATTACKS
  ]
  for dtype in _DTYPES:
    heads = minilm[f"{dtype}, each head"]
    checks += [
      harness.Check(
        f"MiniLM, all heads, {dtype}", minilm[f"{dtype}, all heads"]
      ),
      harness.Check(f"MiniLM, one head, mean, {dtype}", heads.mean()),
      harness.Check(f"MiniLM, one head, worst, {dtype}", heads.min()),
    ]
  return checks


# --- figure ---


def _figure_data(
  recovery: Points,
  random: Points,
  nullity: Points,
  words: Points,
  order: Any,
  digits: Any,
  minilm: Any,
  scaled: Points,
) -> dict[str, Any]:
  data: dict[str, Any] = {}
  for name, points in (
    ("recovery", recovery),
    ("random", random),
    ("scaled", scaled),
    ("nullity", nullity),
    ("words", words),
  ):
    for key, point in points.items():
      data |= {f"{name}/{key}/{k}": x for k, x in point.items()}
  for name, point in (("order", order), ("digits", digits), ("minilm", minilm)):
    data |= {f"{name}/{k}": x for k, x in point.items()}
  return data


def _draw(
  config: Config,
  recovery: Points,
  random: Points,
  nullity: Points,
  words: Points,
  order: Any,
  digits: Any,
  minilm: Any,
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(3, 2, figsize=(12.5, 14))
  _draw_recovery(axes[0, 0], config, recovery, random)
  _draw_nullity(axes[0, 1], config, nullity)
  _draw_order(axes[1, 0], order)
  _draw_words(axes[1, 1], config, words)
  _draw_digits(axes[2, 0], digits)
  _draw_minilm(axes[2, 1], minilm)
  return figure


def _draw_recovery(
  ax: Axes, config: Config, points: Points, random: Points
) -> None:
  x = np.arange(len(config.radii) + 1)
  small = config.sizes[0][1]
  of_small = np.array([d == small for _, d in config.sizes])
  for model, color in zip(_MODELS, harness.PALETTE, strict=False):
    shares = _shares(points, model, "recovered")
    near = of_small[: len(shares)]
    ax.plot(x, shares[near].mean(0), "o-", color=color, label=model)
    if not near.all():
      ax.plot(x, shares[~near].mean(0), ":", color=color, linewidth=1.4)
  with_ridges = np.array([p["recovered"][:, 0].mean() for p in random.values()])
  color = harness.PALETTE[0]
  for chosen, face in ((of_small, color), (~of_small, "white")):
    if chosen.any():
      ax.plot(
        len(x),
        with_ridges[chosen].mean(),
        "D",
        color=color,
        markersize=8,
        markerfacecolor=face,
        # The house style draws white edges.
        markeredgecolor=color,
      )
  zero = _shares(points, "weights", "zero_loss")
  zero = zero[of_small[: len(zero)]].mean(0)
  color = harness.PALETTE[len(_MODELS) - 1]
  ax.plot(x, zero, "--", color=color, label="weights: loss is 0")
  others = " and ".join(
    str(d) for d in sorted({d for _, d in config.sizes} - {small})
  )
  dotted = f" (dotted, hollow: {others})" if others else ""
  ax.set(
    title=f"Tokens recovered, d = {small}{dotted}",
    xlabel="distance of the starts",
    ylabel="share of starts",
    ylim=(-0.04, 1.35),
  )
  names = [*(f"{r:g}" for r in config.radii), "random", "random,\nridges"]
  ax.set_xticks(np.arange(len(names)), names)
  ax.legend(ncols=2, loc="upper right")


def _draw_nullity(ax: Axes, config: Config, points: Points) -> None:
  dims = np.array(config.dims)
  lines = {
    "weights, symmetric": dims * (dims - 1) // 2,
    "weights": dims // 2,
    "weights, 2 heads": 0 * dims,
    "both": 0 * dims,
  }
  names = ("symmetric W: d(d-1)/2", "one head: floor(d/2)", "two heads: 0")
  labels = (*names, "with output: 0")
  marks = zip(harness.PALETTE, ("o", "s", "^", "x"), labels, strict=False)
  for (name, line), (color, mark, label) in zip(
    lines.items(), marks, strict=False
  ):
    ax.plot(dims, line, color=color, alpha=0.55)
    seen = [points[f"d={d}"][name] for d in config.dims]
    # The house style draws white edges, which is all that a cross has.
    edge = color if mark == "x" else "white"
    ax.plot(
      dims,
      seen,
      mark,
      color=color,
      label=label,
      markersize=7,
      markeredgecolor=edge,
    )
  ax.set(
    title="Directions that cannot be known",
    xlabel="d, dimension of a token",
    ylabel="nullity of the Jacobian",
    xticks=dims,
  )
  ax.legend(loc="upper left")


def _draw_order(ax: Axes, order: Any) -> None:
  for errors in order["errors"][:12]:
    ax.semilogy(errors, color=harness.PALETTE[0], alpha=0.45, linewidth=1.2)
  orders = order["orders"][np.isfinite(order["orders"])]
  median = np.median(orders) if len(orders) else np.nan
  ax.set(
    title=f"Convergence from starts at 0.1: order {median:.2f}",
    xlabel="step",
    ylabel="relative error of the tokens",
    ylim=(1e-16, 1),
  )


def _draw_words(ax: Axes, config: Config, points: Points) -> None:
  x = np.arange(len(points))
  for i, attack in enumerate(_ATTACKS):
    y = [point[attack] for point in points.values()]
    color = harness.PALETTE[i]
    last = len(config.noises)
    ax.plot(x[:last], y[:last], "o-", color=color, label=attack)
    ax.plot(x[last:], y[last:], "D", color=color, alpha=0.75)
  levels = [
    "none" if noise == 0 else f"$10^{{{np.log10(noise):.0f}}}$"
    for noise in config.noises
  ]
  ax.set(
    title=f"Words read off, of {config.vocabulary}",
    xlabel="noise on what is observed",
    ylabel="share of words",
    ylim=(-0.04, 1.3),
  )
  ax.set_xticks(x, [*levels, *_DTYPES])
  ax.legend(ncols=3, loc="upper center")


def _draw_digits(ax: Axes, digits: Any) -> None:
  rows = ("truth", *(f"{model}: image" for model in _MODELS))
  images = np.stack([digits[row] for row in rows])
  padded = np.pad(
    np.clip(images, 0, 16),
    ((0, 0), (0, 0), (0, 1), (0, 1)),
    constant_values=np.nan,
  )
  mosaic = padded.transpose(0, 2, 1, 3).reshape(9 * len(rows), -1)
  ax.imshow(mosaic[:-1, :-1], cmap="gray_r", vmin=0, vmax=16)
  ax.set_title("Digits and their reconstructions")
  ax.set_yticks(9 * np.arange(len(rows)) + 3.5, ["original", *_MODELS])
  ax.set_xticks([])
  ax.tick_params(length=0)
  ax.grid(visible=False)
  ax.spines[:].set_visible(False)


def _draw_minilm(ax: Axes, minilm: Any) -> None:
  for i, dtype in enumerate(_DTYPES):
    heads = minilm[f"{dtype}, each head"]
    x = np.arange(len(heads) + 1) + 0.4 * i - 0.2
    y = [minilm[f"{dtype}, all heads"], *heads]
    ax.bar(x, y, width=0.38, color=harness.PALETTE[i], label=dtype)
  ax.set_xticks(
    np.arange(len(heads) + 1), ["all", *map(str, range(1, len(heads) + 1))]
  )
  ax.set(
    title=f"MiniLM, layer 1: {minilm['num_pieces']} word pieces of 30522",
    xlabel="head, or all of them",
    ylabel="share read off",
    ylim=(0, 1.25),
  )
  ax.grid(visible=False, axis="x")
  ax.legend(ncols=2, loc="upper right")


if __name__ == "__main__":
  harness.main(run, "attention-inversion")
