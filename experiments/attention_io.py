"""Words that attention moves between a cache and slow memory.

Four parts, on arXiv 2410.09397 (backward) and 2402.07443 (forward):

* every schedule is counted, by length, head size and words of the cache, beside
  the lower bounds: exponents, the distance from the bound, and the cache at
  which rows in the cache begin to beat tiles of products;
* every schedule is run on real arrays through a cache that counts: its words
  must be the counted ones, and what it returns true attention;
* the grids of flash kernels are walked: words of their blocks are those of the
  schedule, and a causal grid that repeats indices moves half of the keys;
* where ``config.timed_lengths`` names some, attention is timed by block size.
"""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments import harness
from jaxattn.attention import softmax_attention
from jaxattn.iocomplexity import (
  best_algorithm,
  blockspec_traffic,
  crossover,
  io_count,
  io_lower_bound,
  minimum_cache,
  simulate,
)
from jaxattn.scaling import fit_slope
from jaxattn.softmax import BlockSizes

_KINDS = {"fwd": "forward", "bwd": "backward", "train": "train"}
_FIELDS = ("reads", "writes", "peak")

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Point = dict[str, Any]


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  if max(config.simulated_lengths) > config.simulate_max_n:
    raise harness.UsageError(
      f"simulated_lengths must be at most simulate_max_n = "
      f"{config.simulate_max_n}, got {config.simulated_lengths}"
    )
  wd = harness.open_workdir(workdir, config)
  harness.use_style()
  values = (
    _counts(wd) | _simulated(wd) | _masked(wd) | _traffic(wd) | _times(wd)
  )
  checks = [
    *_slope_checks(config),
    *_ratio_checks(config),
    *_crossover_checks(config),
    *_flash_checks(config),
    *_simulated_checks(config, values),
    *_traffic_checks(config, values),
  ]
  harness.save_figure(wd, _draw(config, values), values)
  return harness.finish(
    wd,
    claim=(
      "With a cache of M words, attention moves of the order of min{n^2 d^2 / "
      "M, n^2 d / sqrt(M)} words, forward and backward: FlashAttention's order "
      "is best from M = Omega(d^2) on, tiles of products below."
    ),
    source="arXiv:2410.09397, abstract; forward: arXiv:2402.07443",
    paper="both bounds and the crossover at d^2, up to constants (no numbers)",
    checks=checks,
    timed=_time_checks(config, values),
  )


# --- counts ---


def _counts(wd: harness.Workdir) -> Point:
  config: Config = wd.config
  values: Point = {}
  for d in harness.progress(config.dims, "head sizes"):
    point = wd.point(f"count/d={d}", functools.partial(count_point, config, d))
    values |= {f"{name}_{d}": x for name, x in point.items()}
  return values


def count_point(config: Config, d: int) -> Point:
  """Words (lengths, caches) of each schedule, NaN where it does not fit."""
  lengths, caches = np.array(config.lengths), np.array(config.caches)
  found: Point = {}
  for algorithm in config.algorithms:
    fits = caches >= minimum_cache(algorithm, head_dim=d)
    count = io_count(
      algorithm,
      num_queries=lengths[:, None],
      num_keys=lengths[:, None],
      head_dim=d,
      cache_words=caches[None, fits],
    )
    fields = {name: getattr(count, name) for name in _FIELDS}
    fields |= {f"block{i}": block for i, block in enumerate(count.blocks)}
    for name, x in fields.items():
      table = np.full((lengths.size, caches.size), np.nan)
      table[:, fits] = x
      found[f"{algorithm}_{name}"] = table
  for kind in _KINDS.values():
    found[f"{kind}_bound"] = np.array(
      [
        [io_lower_bound(kind, cache_words=m, **square(n, d)) for m in caches]
        for n in config.lengths
      ]
    )
  return found


def square(n: int, d: int) -> dict[str, int]:
  """The arguments of a problem with n queries and n keys."""
  return {"num_queries": int(n), "num_keys": int(n), "head_dim": int(d)}


def totals(values: Point, algorithm: str, d: int) -> np.ndarray:
  """Words (lengths, caches) moved either way."""
  return values[f"{algorithm}_reads_{d}"] + values[f"{algorithm}_writes_{d}"]


def _slope_checks(config: Config) -> list[harness.Check]:
  n, d = max(config.lengths), config.slope_dim
  checks = []
  for size, shares, accepted in (
    ("small", config.small_shares, config.accepted.small_slope),
    ("large", config.large_shares, config.accepted.large_slope),
  ):
    low, high = (share * d**2 for share in shares)
    caches = np.geomspace(low, high, config.slope_points).astype(int)
    for prefix in ("fwd", "bwd"):
      words = io_count(f"{prefix}_{size}", cache_words=caches, **square(n, d))
      checks.append(
        harness.Check(
          f"slope of words in M, {prefix}_{size}, d={d}",
          float(fit_slope(caches, words.total).slope),
          *accepted,
        )
      )
  return checks


def ratios(config: Config, kind: str) -> np.ndarray:
  """Words of the best schedule over the bound, by cache."""
  sizes = square(config.ratio_length, config.ratio_dim)
  return np.array(
    [
      best_algorithm(kind, cache_words=m, **sizes)[1].total
      / io_lower_bound(kind, cache_words=m, **sizes)
      for m in config.ratio_caches
    ]
  )


def _ratio_checks(config: Config) -> list[harness.Check]:
  checks = []
  for kind, accepted in (
    ("forward", config.accepted.forward_ratio),
    ("backward", config.accepted.backward_ratio),
  ):
    found = ratios(config, kind)
    checks += [
      harness.Check(f"best over bound, {kind}, least", found.min(), *accepted),
      harness.Check(f"best over bound, {kind}, most", found.max(), *accepted),
    ]
  return checks


def _crossover_checks(config: Config) -> list[harness.Check]:
  n = max(config.lengths)
  return [
    harness.Check(
      f"crossover over d^2, {kind}, d={d}",
      crossover(kind, **square(n, d)) / d**2,
      *config.accepted[f"{kind}_crossover"],
    )
    for kind in ("forward", "backward")
    for d in config.crossover_dims
  ]


def _flash_checks(config: Config) -> list[harness.Check]:
  """FlashAttention's order over the bound, where the cache is large."""
  n, d = config.ratio_length, config.ratio_dim
  checks = []
  for kind, order, accepted in (
    ("forward", ("fwd_large",), config.accepted.forward_ratio),
    ("backward", ("bwd_large", "bwd_two_pass"), config.accepted.backward_ratio),
  ):
    found = [
      min(io_count(a, cache_words=m, **square(n, d)).total for a in order)
      / io_lower_bound(kind, cache_words=m, **square(n, d))
      for m in config.ratio_caches
      if m >= d**2
    ]
    checks.append(
      harness.Check(
        f"FlashAttention's order over bound, {kind}, M >= d^2, most",
        max(found),
        high=accepted[1],
      )
    )
  return checks


# --- simulation ---


def _simulated(wd: harness.Workdir) -> Point:
  config: Config = wd.config
  cases = [
    (prefix, n, d)
    for prefix in _KINDS
    for n in config.simulated_lengths
    for d in config.dims
  ]
  rows: list[Point] = [
    wd.point(
      f"simulate/{prefix}/n={n},d={d}",
      functools.partial(simulate_point, config, prefix, n, d),
    )
    for prefix, n, d in harness.progress(cases, "simulations")
  ]
  return {
    f"simulated_{name}": np.concatenate([row[name] for row in rows])
    for name in ("words", "counted", "peak", "cache", "error")
  }


def simulate_point(config: Config, prefix: str, n: int, d: int) -> Point:
  """Words, peaks and errors of the schedules of a problem, by cache."""
  arrays, wanted = problem(config.seed, prefix, n, d)
  rows: dict[str, list[float]] = {}
  for algorithm in config.algorithms:
    if not algorithm.startswith(prefix):
      continue
    least = minimum_cache(algorithm, head_dim=d)
    for m in config.simulated_caches:
      if m < least:
        continue
      outputs, count = simulate(algorithm, arrays, cache_words=m)
      expected = io_count(algorithm, cache_words=m, **square(n, d))
      row = {
        "words": count.total,
        "counted": expected.total,
        "peak": count.peak,
        "cache": m,
        "error": max_error(outputs, wanted),
      }
      for name, x in row.items():
        rows.setdefault(name, []).append(x)
  return {name: np.array(x) for name, x in rows.items()}


def problem(
  seed: int, prefix: str, n: int, d: int, mask: np.ndarray | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Inputs of schedules, and outputs by dense attention and autodiff."""
  rng = np.random.default_rng((seed, n, d))
  rows = [rng.standard_normal((n, d)) / d**0.25 for _ in range(4)]
  matrices = [rng.standard_normal((d, d)) / d**0.5 for _ in range(2)]
  query, key, value, target = rows

  def attend(query: Any, key: Any, value: Any) -> Any:
    scores = query @ key.T
    if mask is not None:
      scores = jnp.where(mask, scores, -jnp.inf)
    return jax.nn.softmax(scores) @ value, jax.nn.logsumexp(scores, axis=1)

  @jax.jit
  def loss_gradient(x: Any) -> Any:
    def loss(x: Any) -> Any:
      out, _ = attend(query @ x, jnp.asarray(key), value @ matrices[1])
      return jnp.square(out - target).sum() / 2

    return jax.grad(loss)(x)

  @jax.jit
  def forward_and_gradients(*rows: Any) -> Any:
    (out, lse), pullback = jax.vjp(attend, *rows)
    return out, lse, *pullback((jnp.asarray(target), jnp.zeros_like(lse)))

  with jax.enable_x64(True):
    if prefix == "train":
      names = ("a1", "a2", "a3", "target", "x", "y")
      wanted = np.asarray(loss_gradient(matrices[0]))
      return dict(zip(names, [*rows, *matrices])), {"x_grad": wanted}
    found = forward_and_gradients(query, key, value)
    out, lse, *grads = (np.asarray(x) for x in found)
  arrays: dict[str, Any] = {"query": query, "key": key, "value": value}
  forward: dict[str, Any] = {"out": out, "lse": lse}
  if prefix == "fwd":
    return arrays, forward
  names = [f"{name}_grad" for name in arrays]
  return arrays | forward | {"out_grad": target}, dict(zip(names, grads))


def max_error(
  outputs: dict[str, np.ndarray], wanted: dict[str, np.ndarray]
) -> float:
  """The largest error of any output, over the largest entry if above 1."""
  return max(
    float(np.abs(outputs[name] - x).max() / max(1.0, np.abs(x).max()))
    for name, x in wanted.items()
    if name in outputs
  )


def _masked(wd: harness.Workdir) -> Point:
  config: Config = wd.config
  values: Point = {}
  for kind in config.masks:
    point = wd.point(
      f"masked/{kind}", functools.partial(masked_point, config, kind)
    )
    values |= {f"masked_{kind}_{name}": x for name, x in point.items()}
  return values


_MASKED = ("fwd_large", "fwd_small", "bwd_large", "bwd_small")


def masked_point(config: Config, kind: str) -> Point:
  """Words with a mask over words without, by schedule; the largest error."""
  n, d, m = max(config.simulated_lengths), min(config.dims), config.masked_cache
  mask = make_mask(kind, n, config.mask_parts)
  share, error = [], []
  problems = {x: problem(config.seed, x, n, d, mask) for x in ("fwd", "bwd")}
  for algorithm in _MASKED:
    arrays, wanted = problems[algorithm.partition("_")[0]]
    outputs, count = simulate(algorithm, arrays, cache_words=m, mask=mask)
    dense = io_count(algorithm, cache_words=m, **square(n, d))
    share.append(count.total / dense.total)
    error.append(max_error(outputs, wanted))
  return {"share": np.array(share), "error": np.array(error)}


def make_mask(kind: str, n: int, parts: int) -> np.ndarray:
  """(n, n), True = attend."""
  i, j = np.indices((n, n))
  if kind == "causal":
    return j <= i
  if kind == "block":
    return i * parts // n == j * parts // n
  raise harness.UsageError(f"masks must be 'causal' or 'block', got {kind!r}")


def _simulated_checks(config: Config, values: Point) -> list[harness.Check]:
  masked = [values[f"masked_{kind}_error"] for kind in config.masks]
  error = np.concatenate([values["simulated_error"], *masked]).max()
  differ = values["simulated_words"] != values["simulated_counted"]
  over = values["simulated_peak"] > values["simulated_cache"]
  return [
    harness.Check("simulated runs", differ.size),
    harness.Check("of them with other words than counted", differ.sum(), 0, 0),
    harness.Check("of them with more words than the cache", over.sum(), 0, 0),
    harness.Check("largest error", error, high=config.accepted.error),
    *(
      harness.Check(f"words with a {kind} mask over all, {algorithm}", share)
      for kind in config.masks
      for algorithm, share in zip(_MASKED, values[f"masked_{kind}_share"])
    ),
  ]


# --- grids of kernels ---


def _traffic(wd: harness.Workdir) -> Point:
  point = wd.point("traffic", functools.partial(traffic_point, wd.config))
  return {f"traffic_{name}": x for name, x in point.items()}


def traffic_point(config: Config) -> Point:
  """Words of flash grids and of the schedules that they are, by blocks."""
  nq, nk, d = config.traffic_shape
  sizes = {"num_queries": nq, "num_keys": nk, "head_dim": d}
  rows: dict[str, list[float]] = {}
  for block_q, block_k in config.traffic_blocks:
    forward = io_count(
      "fwd_large", cache_words=2**40, block_size=block_q, **sizes
    )
    backward = io_count(
      "bwd_two_pass", cache_words=2**40, block_size=(block_k, block_q), **sizes
    )
    # A single block that streams past never changes its index: it comes once.
    once_k = 2 * nk * d * (nq // block_q - 1) if block_k == nk else 0
    once_q = 2 * nq * (d + 1) * (nk // block_k - 1) if block_q == nq else 0
    grids = flash_traffic(nq, nk, d, block_q, block_k)
    causal = flash_traffic(nq, nq, d, block_q, block_q, is_causal=True)
    full = flash_traffic(nq, nq, d, block_q, block_q)
    row = {
      "forward": sum(grids[0]),
      "forward_count": forward.total - once_k,
      # Inner products of outputs and their gradients are no part of the grids.
      "backward": sum(grids[1]) + sum(grids[2]) + 2 * nq * d + nq,
      "backward_count": backward.total - once_k - once_q,
      "causal_share": causal[0][1] / full[0][1],
    }
    for name, x in row.items():
      rows.setdefault(name, []).append(x)
  return {name: np.array(x) for name, x in rows.items()}


def flash_traffic(
  nq: int,
  nk: int,
  d: int,
  block_q: int,
  block_k: int,
  *,
  is_causal: bool = False,
) -> tuple[tuple[int, ...], ...]:
  """Words of each operand: forward, dK and dV, dQ."""

  def spec(rows: int, index: Callable[..., int], cols: int = d) -> Any:
    return SimpleNamespace(
      block_shape=(rows, cols), index_map=lambda a, b: (index(a, b), 0)
    )

  def last(i: int, j: int) -> int:
    # The last block of keys that row i sees, from there on.
    return min(j, ((i + 1) * block_q - 1) // block_k) if is_causal else j

  stay = functools.partial(spec, block_q, lambda i, j: i)
  stream = spec(block_k, last)
  keys = spec(block_k, lambda j, i: j)
  queries = functools.partial(spec, block_q, lambda j, i: i)
  by_rows, by_columns = (
    (nq // block_q, nk // block_k),
    (
      nk // block_k,
      nq // block_q,
    ),
  )
  return (
    blockspec_traffic(by_rows, [stay(), stream, stream, stay(), stay(cols=1)]),
    blockspec_traffic(
      by_columns,
      [*[keys] * 4, queries(), queries(), queries(cols=1), queries(cols=1)],
    ),
    blockspec_traffic(
      by_rows,
      [*[stay()] * 3, stay(cols=1), stay(cols=1), stream, stream],
    ),
  )


def _traffic_checks(config: Config, values: Point) -> list[harness.Check]:
  checks = [
    harness.Check(
      f"words of {name} grids off the count, most",
      np.abs(values[f"traffic_{name}"] - values[f"traffic_{name}_count"]).max(),
      0,
      0,
    )
    for name in ("forward", "backward")
  ]
  for (block, _), share in zip(
    config.traffic_blocks, values["traffic_causal_share"]
  ):
    name = f"keys of a causal grid over all, blocks of {block}"
    if all(name != check.name for check in checks):
      checks.append(harness.Check(name, share))
  return checks


# --- time ---


def _times(wd: harness.Workdir) -> Point:
  config: Config = wd.config
  rows: list[Point] = [
    wd.point(f"times/T={n}", functools.partial(times_point, config, n))
    for n in harness.progress(config.timed_lengths, "times")
  ]
  return {
    f"times_{name}": np.stack([row[name] for row in rows])
    for name in ("seconds", "words")
    if rows
  }


def times_point(config: Config, length: int) -> Point:
  """Seconds of attention and predicted words, by block size."""
  rngs = jax.random.split(jax.random.key(config.seed), 3)
  spec = timed_shape(config, length)
  arrays = [jax.random.normal(rng, spec.shape, spec.dtype) for rng in rngs]
  calls = {
    str(block): functools.partial(timed_call(block), *arrays)
    for block in config.timed_blocks
  }
  seconds = harness.least_seconds(
    calls, rounds=config.rounds, at_least=config.seconds_per_point
  )
  words = [
    config.timed_heads
    * io_count(
      "fwd_large",
      cache_words=2**40,
      block_size=block,
      **square(length, config.timed_dim),
    ).total
    for block in config.timed_blocks
  ]
  return {"seconds": np.array(list(seconds.values())), "words": words}


def timed_shape(config: Config, length: int) -> jax.ShapeDtypeStruct:
  """Of queries, keys and values."""
  shape = (1, length, config.timed_heads, config.timed_dim)
  return jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype))


def timed_call(block: int) -> Callable[..., jax.Array]:
  """Attention with blocks of one size, compiled."""
  sizes = BlockSizes(block, block, block, block)

  @jax.jit
  def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return softmax_attention(query, key, value, block_sizes=sizes)

  return attend


def _time_checks(config: Config, values: Point) -> list[harness.Check]:
  return [
    harness.Check(
      f"milliseconds, T={n}, blocks of {block}",
      1000 * values["times_seconds"][i, j],
    )
    for i, n in enumerate(config.timed_lengths)
    for j, block in enumerate(config.timed_blocks)
  ]


# --- figure ---


def _draw(config: Config, values: Point) -> Any:
  panels = [
    functools.partial(_draw_words, prefix="fwd"),
    functools.partial(_draw_words, prefix="bwd"),
    functools.partial(_draw_words, prefix="train"),
    _draw_ratios,
    _draw_crossovers,
    _draw_times if config.timed_lengths else _draw_simulated,
  ]
  figure, axes = plt.subplots(2, 3, figsize=(17, 9.4))
  for ax, panel in zip(axes.flat, panels, strict=True):
    panel(ax, config, values)
  return figure


_NAMES = {
  "fwd_large": "queries stay (FlashAttention-2)",
  "fwd_fa1": "keys stay (FlashAttention-1)",
  "fwd_small": "tiles of products",
  "bwd_large": "keys stay, one pass",
  "bwd_two_pass": "two passes",
  "bwd_small": "tiles of products",
  "train_large": "queries stay",
  "train_small": "tiles of products",
}


def _draw_words(
  ax: Axes, config: Config, values: Point, *, prefix: str
) -> None:
  d, n = config.dims[len(config.dims) // 2], config.lengths[-1]
  for algorithm in config.algorithms:
    if algorithm.startswith(prefix):
      words = totals(values, algorithm, d)[-1]
      ax.loglog(config.caches, words, "o-", label=_NAMES[algorithm])
  kind = _KINDS[prefix]
  ax.loglog(
    config.caches,
    values[f"{kind}_bound_{d}"][-1],
    "--",
    color="black",
    label="lower bound, constant 1",
  )
  ax.axvline(d**2, color="black", lw=1, ls=":")
  ax.set(
    title={"forward": "Forward", "backward": "Backward"}.get(
      kind, "Gradient in X"
    )
    + f", n = {n}, d = {d} (dotted: $d^2$)",
    xlabel="M, words of the cache",
    ylabel="words moved",
  )
  ax.legend(loc="lower left")


def _draw_ratios(ax: Axes, config: Config, values: Point) -> None:
  del values
  for kind in ("forward", "backward"):
    ax.semilogx(
      config.ratio_caches, ratios(config, kind), "o-", base=2, label=kind
    )
  ax.axvline(config.ratio_dim**2, color="black", lw=1, ls=":")
  ax.set(
    title="Best schedule over the bound, "
    f"n = {config.ratio_length}, d = {config.ratio_dim}",
    xlabel="M, words of the cache",
    ylabel="words over the bound",
    ylim=(0, None),
  )
  ax.legend(loc="center right")


def _draw_crossovers(ax: Axes, config: Config, values: Point) -> None:
  del values
  n = config.lengths[-1]
  for kind in ("forward", "backward"):
    shares = [crossover(kind, **square(n, d)) / d**2 for d in config.dims]
    ax.semilogx(config.dims, shares, "o-", base=2, label=kind)
  ax.axhline(1, color="black", lw=1, ls=":")
  ax.set(
    title=f"Rows in the cache win from order $d^2$ on, n = {n}",
    xlabel="d",
    ylabel="crossover M over $d^2$",
    ylim=(0, None),
  )
  ax.legend(loc="lower right")


def _draw_simulated(ax: Axes, config: Config, values: Point) -> None:
  del config
  counted, words = values["simulated_counted"], values["simulated_words"]
  ax.loglog(counted, words, "o", alpha=0.6, label=f"{words.size} runs")
  ends = np.array([counted.min(), counted.max()])
  ax.loglog(ends, ends, color="black", lw=1, label="equal")
  ax.set(
    title="Simulated schedules move what was counted",
    xlabel="words counted",
    ylabel="words moved by the program",
  )
  ax.legend(loc="upper left")


def _draw_times(ax: Axes, config: Config, values: Point) -> None:
  for n, words, seconds in zip(
    config.timed_lengths, values["times_words"], values["times_seconds"]
  ):
    ax.loglog(words, 1000 * seconds, "o-", label=f"T = {n}")
  ax.set(
    title="Time of attention by block size",
    xlabel="words that its blocks would move",
    ylabel="milliseconds",
  )
  ax.legend(loc="upper left")


if __name__ == "__main__":
  harness.main(run, "attention-io")
