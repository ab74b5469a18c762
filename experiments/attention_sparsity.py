"""Gaussian attention sparsity: how many keys a softmax row needs.

Four questions of arXiv 2404.02690, each a panel of the figure:

1. Rows of n Gaussian logits of spread s sqrt(log n): the number of keys that
   hold half the mass grows like n^C, C = max(0, 1 - s^2/2).
2. Top-k attention on Gaussian queries and keys: with k = n^C, C > 1 - s^2/2,
   its error falls as n grows; with a fixed k, or O(log n), it rises.
3. The number of weights above t/n follows the closed form.
4. Rows of a pretrained encoder on English text, against the closed form at each
   row's own spread. Real rows are not Gaussian: this is reported, not decided.
"""

import functools
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import special

from experiments import harness
from jaxattn.attention import (
  gaussian_budget,
  gaussian_count_above,
  gaussian_exponent,
  gaussian_topk_mass,
  softmax_attention,
  sparsity_profile,
  topk_attention,
)
from jaxattn.scaling import fit_slope

_BUDGETS = {
  "16": lambda n: 16,
  "4 log n": lambda n: math.ceil(4 * math.log(n)),
  "n^0.5": lambda n: math.ceil(n**0.5),
  "n^0.7": lambda n: math.ceil(n**0.7),
  "n^0.8": lambda n: math.ceil(n**0.8),
  "n/4": lambda n: n // 4,
  "64": lambda n: 64,
}
_TAIL_BUDGETS = ("n^0.8", "64", "4 log n")
_HEAD_DIM = 32

# A ConfigDict: what type a field has is known at run time only.
Config = Any


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  half = _sweep(wd, "half_mass", config.lengths, half_mass_point)
  frozen = _sweep(wd, "frozen", config.lengths, frozen_point)
  half = {k: np.concatenate((half[k], frozen[k]), 1) for k in half}
  tails = _sweep(wd, "tail", config.tail_lengths, tail_point)
  errors = _sweep(wd, "error", config.attention_lengths, error_point)
  counts = wd.point("counts", functools.partial(counts_point, config))
  real = wd.point("minilm", functools.partial(minilm_point, config))
  panels = (half, errors, counts, real)
  data = {k: v for panel in (*panels, tails) for k, v in panel.items()}
  axes = {k: config[k] for k in ("lengths", "attention_lengths", "levels")}
  harness.save_figure(wd, _draw(config, *panels), data | axes)
  checks = [
    *_half_mass_checks(config, half),
    *_tail_checks(config, tails),
    *_error_checks(config, errors),
    *_real_checks(config, real),
  ]
  return harness.finish(
    wd,
    claim=(
      "A top-k budget n^C, with C set by how the spread of the logits grows, "
      "makes attention's error fall with n; a budget of O(log n) does not."
    ),
    source="arXiv:2404.02690, abstract and section 1",
    paper="n^C entries are enough for some C in (0, 1); o(log n) are not",
    checks=checks,
  )


def _sweep(
  wd: harness.Workdir, name: str, lengths: tuple[int, ...], compute: Any
) -> dict[str, np.ndarray]:
  """Points of all lengths, stacked: each array gets a first axis of lengths."""
  points = [
    wd.point(f"{name}/n={n}", functools.partial(compute, wd.config, n))
    for n in harness.progress(lengths, name)
  ]
  return {key: np.stack([p[key] for p in points]) for key in points[0]}


# --- points ---


def half_mass_point(config: Config, n: int) -> dict[str, Any]:
  """Half-mass budgets, largest weights and participation, by spread."""
  num_rows = min(config.max_rows, config.logits_per_length // n)
  return _half_mass_point(_key(config, n), config.spreads, n, num_rows)


def frozen_point(config: Config, n: int) -> dict[str, Any]:
  """The same where a few logits hold the mass, so that rows differ the most."""
  rng = jax.random.fold_in(_key(config, n), 1)
  return _half_mass_point(rng, config.frozen_spreads, n, config.frozen_rows)


def _half_mass_point(
  rng: jax.Array, spreads: tuple[float, ...], n: int, num_rows: int
) -> dict[str, Any]:
  sigma = jnp.array(spreads) * math.sqrt(math.log(n))
  predicted = [finite_size_budget(n, s) for s in spreads]
  most = min(n, 2 * math.ceil(max(predicted)) + 64)
  args = (rng, sigma, n, num_rows, most)
  budget, largest, participation = half_mass_rows(*args)
  return {
    "half_mass": budget.mean(0),
    "half_mass_error": budget.std(0) / math.sqrt(num_rows),
    "largest_weight": largest.mean(0),
    # Its mean would be that of a few rare rows.
    "participation": jnp.exp(jnp.log(participation).mean(0)),
    "predicted": predicted,
    "plain": gaussian_budget(sigma, n, 0.5),
  }


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def half_mass_rows(
  rng: jax.Array, sigma: jax.Array, n: int, num_rows: int, most: int
) -> tuple[jax.Array, ...]:
  """(num_rows, len(sigma)) budgets, largest weights p and 1 / sum p^2.

  A budget says how many of the largest weights add to 1/2, with a fraction of
  the last one; NaN if it is above ``most``.
  """

  def row(rng: jax.Array) -> tuple[jax.Array, ...]:
    z = jax.random.normal(rng, (n,))
    largest, _ = lax.top_k(z, most)
    return lax.map(functools.partial(_half_mass, z, largest), sigma)

  return lax.map(row, jax.random.split(rng, num_rows))


def _half_mass(
  z: jax.Array, largest: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, ...]:
  # Not largest[0]: a slice of the list makes XLA sort the whole row.
  top = z.max()
  total, squares = (jnp.exp(p * sigma * (z - top)).sum() for p in (1, 2))
  weights = jnp.exp(sigma * (largest - top))
  mass = jnp.cumsum(weights)
  whole = (mass < total / 2).sum()
  # NaN beyond the end of the list.
  last = functools.partial(jnp.take, indices=whole, mode="fill")
  budget = whole + 1 - (last(mass) - total / 2) / last(weights)
  return budget, 1 / total, total**2 / squares


def finite_size_budget(n: int, s: float, num_nodes: int = 32) -> float:
  """Half-mass budget of a row of n logits of spread s sqrt(log n), predicted.

  ``gaussian_budget`` counts on logits beyond the largest that a row has. Here
  the tail probability of the largest is x / n with x exponential, and those of
  the next are (x + 1) / n, (x + 2) / n, ...: a midpoint rule averages over x.
  """
  sigma = s * math.sqrt(math.log(n))
  num_ranks = min(n - 1, 4 * int(gaussian_budget(sigma, n, 0.5)) + 4096)
  x = -np.log1p(-(np.arange(num_nodes) + 0.5) / num_nodes)
  rank = x[:, None] + np.arange(num_ranks)
  z = -special.ndtri(np.minimum(rank / n, 1 - 1e-12))
  # The sum over all that come after, in closed form.
  rest = special.log_ndtr(z[:, -1] - sigma) + math.log(n) + sigma**2 / 2
  mass = np.cumsum(np.exp(sigma * (z - z[:, :1])), -1)
  half = (mass[:, -1] + np.exp(rest - sigma * z[:, 0])) / 2
  budgets = [
    np.interp(h, np.insert(m, 0, 0.0), np.arange(num_ranks + 1))
    for h, m in zip(half, mass, strict=True)
  ]
  return float(np.mean(budgets))


def tail_point(config: Config, n: int) -> dict[str, Any]:
  """Mean tail mass of each budget at the one spread of this panel."""
  sigma = config.tail_spread * math.sqrt(math.log(n))
  num_rows = dict(zip(config.tail_lengths, config.tail_rows, strict=True))[n]
  ks = tuple(_BUDGETS[name](n) for name in _TAIL_BUDGETS)
  return {"tail": tail_masses(_key(config, n), sigma, n, num_rows, ks)}


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def tail_masses(
  rng: jax.Array, sigma: float, n: int, num_rows: int, ks: tuple[int, ...]
) -> jax.Array:
  """(len(ks),) mean mass outside the k largest of n Gaussian logits."""

  def row(rng: jax.Array) -> jax.Array:
    logits = sigma * jax.random.normal(rng, (n,))
    largest, _ = lax.top_k(logits, max(ks))
    kept = jnp.cumsum(jnp.exp(largest - jax.nn.logsumexp(logits)))
    return 1 - kept[jnp.array(ks) - 1]

  return lax.map(row, jax.random.split(rng, num_rows)).mean(0)


def error_point(config: Config, n: int) -> dict[str, Any]:
  """(spreads, budgets) relative error, and how far the certificate is used."""
  growth = np.array(config.attention_spreads)
  sigma = np.where(growth > 0, growth * math.sqrt(math.log(n)), 1.0)
  shape = (len(growth), config.num_queries, config.num_heads, _HEAD_DIM)
  args = gaussian_attention(_key(config, n), jnp.asarray(sigma), n, shape)
  results = [
    topk_error(*args, min(n, _BUDGETS[name](n))) for name in config.budgets
  ]
  errors, used = map(np.stack, zip(*results, strict=True))
  return {"error": errors.T, "certificate_used": used.max()}


@functools.partial(jax.jit, static_argnums=(2, 3))
def gaussian_attention(
  rng: jax.Array, sigma: jax.Array, n: int, shape: tuple[int, ...]
) -> tuple[Any, ...]:
  """Query, key, value and exact output; logits have spread sigma (B,)."""
  batch, _, heads, dim = shape
  rngs = jax.random.split(rng, 3)
  query = jax.random.normal(rngs[0], shape)
  norm = jnp.linalg.norm(query, axis=-1, keepdims=True)
  query *= sigma.reshape(batch, 1, 1, 1) * math.sqrt(dim) / norm
  key, value = jax.random.normal(rngs[1], (2, batch, n, heads, dim))
  return query, key, value, softmax_attention(query, key, value)


@functools.partial(jax.jit, static_argnums=4)
def topk_error(
  query: jax.Array, key: jax.Array, value: jax.Array, exact: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
  """(B,) mean relative error, and the largest ratio of error to bound."""
  out, info = topk_attention(query, key, value, k=k, return_info=True)
  error = jnp.linalg.norm(exact - out, axis=-1)
  relative = (error / jnp.linalg.norm(exact, axis=-1)).mean((1, 2))
  # Bounds as small as float32 rounding say nothing.
  used = jnp.abs(exact - out).max(-1) / jnp.maximum(info.bound, 1e-4)
  return relative, used.max()


def counts_point(config: Config) -> dict[str, Any]:
  """(sigmas, levels) mean share of weights above t / n."""
  n, sigma = config.level_length, jnp.array(config.sigmas)
  shape = (len(config.sigmas), config.num_queries, config.num_heads, _HEAD_DIM)
  query, key, *_ = gaussian_attention(_key(config, n + 1), sigma, n, shape)
  profile = sparsity_profile(query, key, t=config.levels, k=(1,))
  return {"share_above": profile.count_above.mean((1, 2)) / n}


def minilm_point(config: Config) -> dict[str, Any]:
  """(layers, heads) mean top-k mass, measured and predicted row by row."""
  # Needed here only: a trace of the other panels wants no flax.
  from jaxattn import data, models

  text, size = data.load_text(), 8 * config.num_tokens
  texts = [text[i * size : (i + 1) * size] for i in range(config.num_texts)]
  ids, mask = models.minilm_tokenize(texts, config.num_tokens)
  out = models.minilm_apply(
    models.load_minilm(), ids, mask, capture=("query", "key")
  )
  query, key = out.captured["query"], out.captured["key"]
  layers, _, tokens, heads, dim = query.shape
  profile = sparsity_profile(
    query.reshape(-1, tokens, heads, dim),
    key.reshape(-1, tokens, heads, dim),
    k=(config.top,),
    mask=jnp.asarray(np.tile(mask, (layers, 1))[:, None, None]),
  )
  predicted = gaussian_topk_mass(profile.std, tokens, config.top)
  by_head = [
    x.reshape(layers, -1, heads, tokens).mean((1, 3))
    for x in (profile.topk_mass[..., 0], predicted, profile.std, profile.skew)
  ]
  names = ("measured_mass", "predicted_mass", "std", "skew")
  return dict(zip(names, by_head, strict=True))


def _key(config: Config, n: int) -> jax.Array:
  return jax.random.fold_in(jax.random.key(config.seed), n)


# --- checks ---


def _half_mass_checks(
  config: Config, half: dict[str, np.ndarray]
) -> list[harness.Check]:
  checks = []
  for i, s in enumerate((*config.spreads, *config.frozen_spreads)):
    slope, predicted, plain, participation = (
      fit_slope(config.lengths, half[name][:, i]).slope
      for name in ("half_mass", "predicted", "plain", "participation")
    )
    name, frozen = f"slope of k_1/2, s={s:g}", i >= len(config.spreads)
    error, name_of_error = slope - predicted, f"{name}, minus predicted"
    high = config.accepted.frozen_slope if frozen else math.inf
    checks += [
      harness.Check(name, slope, high=high),
      harness.Check(name_of_error, error, *config.accepted.slope_error),
    ]
    if not frozen:
      plain_name = f"{name}, minus that of n Q(sigma)"
      checks.append(harness.Check(plain_name, slope - plain))
    if s <= math.sqrt(0.5):
      label = f"slope of 1/sum p^2, s={s:g} (limit {1 - s**2:g})"
      checks.append(harness.Check(label, participation))
  return checks


def _tail_checks(
  config: Config, tails: dict[str, np.ndarray]
) -> list[harness.Check]:
  checks = []
  for name, tail in zip(_TAIL_BUDGETS, tails["tail"].T):
    if name == "n^0.8":
      label, value = "first over last n", tail[0] / tail[-1]
      accepted = config.accepted.tail_ratio
    else:
      label, value = "least growth", (tail[1:] / tail[:-1]).min()
      accepted = config.accepted.rising
    label = f"tail mass, {label}, k={name}, s={config.tail_spread:g}"
    checks.append(harness.Check(label, value, *accepted))
  return checks


def _error_checks(
  config: Config, errors: dict[str, np.ndarray]
) -> list[harness.Check]:
  checks = []
  accepted = config.accepted
  growth = errors["error"][1:] / errors["error"][:-1]
  for i, s in enumerate(config.attention_spreads):
    if s < 1:
      continue
    for j, name in enumerate(config.budgets):
      if name == "n^0.8":
        step, extreme, bounds = "greatest", np.max, accepted.falling
      elif name in ("16", "4 log n"):
        step, extreme, bounds = "least", np.min, accepted.rising
      else:
        continue
      label = f"error, {step} growth, k={name}, s={s:g}"
      checks.append(harness.Check(label, extreme(growth[:, i, j]), *bounds))
  used = errors["certificate_used"].max()
  name = "largest error over its certificate"
  return [*checks, harness.Check(name, used, *accepted.certificate)]


def _real_checks(
  config: Config, real: dict[str, np.ndarray]
) -> list[harness.Check]:
  measured, predicted = real["measured_mass"], real["predicted_mass"]
  top = config.top
  by_layer = [
    harness.Check(f"MiniLM layer {i}, mass of the top {top}", mass)
    for i, mass in enumerate(measured.mean(1))
  ]
  return [
    *by_layer,
    harness.Check(
      "MiniLM, measured minus Gaussian mass, mean over heads",
      (measured - predicted).mean(),
    ),
    harness.Check(
      "MiniLM, measured minus Gaussian mass, largest over heads",
      np.abs(measured - predicted).max(),
    ),
  ]


# --- figure ---


def _draw(
  config: Config,
  half: dict[str, np.ndarray],
  errors: dict[str, np.ndarray],
  counts: dict[str, np.ndarray],
  real: dict[str, np.ndarray],
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(2, 2, figsize=(12.5, 9.5))
  _draw_half_mass(axes[0, 0], config, half)
  _draw_errors(axes[0, 1], config, errors)
  _draw_counts(axes[1, 0], config, counts)
  _draw_real(axes[1, 1], config, real)
  return figure


def _draw_half_mass(
  ax: Axes, config: Config, half: dict[str, np.ndarray]
) -> None:
  spreads = *config.spreads, *config.frozen_spreads
  for i, (s, color) in enumerate(zip(spreads, harness.PALETTE)):
    exponent = float(gaussian_exponent(s))
    ax.loglog(config.lengths, half["predicted"][:, i], color=color)
    ax.errorbar(
      config.lengths,
      half["half_mass"][:, i],
      2 * half["half_mass_error"][:, i],
      fmt="o",
      color=color,
      label=f"s = {s:g}   (C = {exponent:.3g})",
    )
  ax.set(
    title="Keys that hold half the mass grow like $n^C$",
    xlabel="n, number of keys",
    ylabel="k, keys for half the mass",
  )
  _powers_of_two(ax, config.lengths)
  ax.legend(title=r"spread $\sigma = s\,\sqrt{\log n}$, line: theory")


def _draw_errors(
  ax: Axes, config: Config, errors: dict[str, np.ndarray]
) -> None:
  lengths, i = config.attention_lengths, config.attention_spreads.index(1.0)
  for j, (name, color) in enumerate(zip(config.budgets, harness.PALETTE)):
    error = errors["error"][:, i, j]
    ax.loglog(lengths, error, "o-", color=color)
    # "n^0.8" as mathematics.
    label = re.sub(r"\^(.+)", r"^{\1}", name).replace("log n", r"\,\log\,n")
    ax.annotate(
      f"$k = {label}$",
      (lengths[-1], error[-1]),
      xytext=(8, 0),
      textcoords="offset points",
      color=color,
      va="center",
    )
  ax.set(
    title="$n^{0.8}$ keys get better with n, $O(\\log\\,n)$ keys worse",
    xlabel="n, number of keys",
    ylabel="relative error of top-k attention, s = 1",
    xlim=(lengths[0] / 1.3, lengths[-1] * (lengths[-1] / lengths[0]) ** 0.25),
  )
  _powers_of_two(ax, lengths)


def _draw_counts(
  ax: Axes, config: Config, counts: dict[str, np.ndarray]
) -> None:
  n, t = config.level_length, np.array(config.levels)
  for i, (sigma, color) in enumerate(zip(config.sigmas, harness.PALETTE)):
    theory = np.asarray(gaussian_count_above(sigma, n, t)) / n
    ax.loglog(t, theory, color=color)
    share = np.where(
      counts["share_above"][i] > 0, counts["share_above"][i], np.nan
    )
    ax.loglog(t, share, "o", color=color, label=rf"$\sigma$ = {sigma:g}")
  ax.set(
    title=f"Share of weights above t/n (n = {n})",
    xlabel="t, in units of the mean weight",
    ylabel="share of the keys",
    ylim=(1e-6, 2),
  )
  ax.legend(title="line: theory")


def _draw_real(ax: Axes, config: Config, real: dict[str, np.ndarray]) -> None:
  ax.plot([0, 1], [0, 1], color="#6b7480", linewidth=1, linestyle="--")
  for layer, color in enumerate(harness.PALETTE):
    ax.plot(
      real["predicted_mass"][layer],
      real["measured_mass"][layer],
      "o",
      color=color,
      label=f"layer {layer}",
    )
  ax.set(
    title=f"Real heads (MiniLM): mass of the top {config.top} of "
    f"{config.num_tokens} keys",
    xlabel="Gaussian prediction at the rows' own spread",
    ylabel="measured, mean of a head",
    xlim=(0, 1),
    ylim=(0, 1),
  )
  ax.legend(loc="lower right", ncols=2)


def _powers_of_two(ax: Axes, lengths: tuple[int, ...]) -> None:
  labels = [f"$2^{{{n.bit_length() - 1}}}$" for n in lengths]
  ax.set_xticks(lengths, labels)
  ax.xaxis.set_minor_locator(ticker.NullLocator())


if __name__ == "__main__":
  harness.main(run, "attention-sparsity")
