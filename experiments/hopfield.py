"""Modern Hopfield retrieval: when low rank pays, and what a memory holds.

Four parts, ``config.parts``, on arXiv 2402.04520 and 2008.02217:

* ``phase``: the rank of the retrieval matrix of M random queries and patterns,
  by the size of their entries in units of sqrt(log M), the number of Taylor
  features that a promised error needs, and seconds of dense and low-rank
  retrieval on the easy side. That the hard side is hard is shown by rank, not
  proved.
* ``digits``: handwritten digits are stored and asked for with pixels missing
  or with noise, at many temperatures; then where features of low degree are
  good for anything.
* ``capacity``: how many random patterns on a sphere keep a weight of one half
  for themselves, by dimension. A pattern that does not has failed; the first
  power of two with more than 1 % of failures counts.
* ``bags``: is there a 3 among these digits? Pooling by a memory, by a mean, by
  attention of one layer.
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
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import _hopfield_bags as bags
from experiments import harness
from jaxattn import data
from jaxattn.attention import (
  capacity_lower_bound,
  hopfield_plan,
  hopfield_retrieve,
  hopfield_store,
  hopfield_update,
  retrieval_error_bound,
)
from jaxattn.features import taylor_error_bound
from jaxattn.scaling import fit_slope

_PARTS = ("phase", "digits", "capacity", "bags")
_QUERIES = ("masked", "noisy")
# That exist at a time.
_LOGITS = 1 << 24

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Point = dict[str, Any]


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  harness.check_parts(config, _PARTS)
  wd = harness.open_workdir(workdir, config)
  harness.use_style()
  checks, timed, values, panels = [], [], {}, []
  for part, compute, check, draw in (
    ("phase", _phase, _phase_checks, (_draw_ranks, _draw_plans, _draw_time)),
    (
      "digits",
      _digits,
      _digit_checks,
      (
        *(functools.partial(_draw_accuracy, kind) for kind in _QUERIES),
        *(functools.partial(_draw_examples, kind) for kind in _QUERIES),
        _draw_digit_features,
      ),
    ),
    ("capacity", _capacity, _capacity_checks, (_draw_capacity,)),
    ("bags", _bags, _bag_checks, (_draw_bags,)),
  ):
    if part in config.parts:
      values |= compute(wd)
      checks += check(config, values)
      panels += draw
  if "phase" in config.parts:
    timed = _time_checks(config, values)
  harness.save_figure(wd, _draw(panels, config, values), values)
  return harness.finish(
    wd,
    claim=(
      "Retrieval from M patterns takes almost linear time by low rank if "
      "entries stay below a multiple of sqrt(log M), and not above; a memory "
      "holds exponentially many patterns."
    ),
    source="arXiv:2402.04520, abstract and theorem 4.1",
    paper="a transition at entries of order sqrt(log M) (no numbers)",
    checks=checks,
    timed=timed,
  )


# --- phase ---


def _phase(wd: harness.Workdir) -> Point:
  config: Config = wd.config
  values: Point = {}
  for d in config.dims:
    rows = [
      wd.point(f"rank/d={d},M={m}", functools.partial(rank_point, config, d, m))
      for m in harness.progress(config.lengths, f"ranks, d = {d}")
    ]
    values |= {
      f"{name}_{d}": np.stack([r[name] for r in rows]) for name in rows[0]
    }
    values[f"table_{d}"] = wd.point(
      f"table/d={d}", functools.partial(table_point, config, d)
    )["rank"]
  seconds = [
    wd.point(f"seconds/M={m}", functools.partial(seconds_point, config, m))
    for m in harness.progress(config.timed_lengths, "seconds")
  ]
  names = ("dense", "lowrank", "error", "bound")
  return values | {
    f"seconds_{name}": np.array([s[name] for s in seconds]) for name in names
  }


def instance(m: int, d: int, bound: float, seed: int) -> tuple[Any, Any]:
  """(M, d) queries and patterns of entries uniform in [-bound, bound]."""
  rng = np.random.default_rng((seed, m, d))
  return rng.uniform(-bound, bound, (m, d)), rng.uniform(-bound, bound, (m, d))


def numerical_rank(x: np.ndarray, patterns: np.ndarray, tol: float) -> int:
  """Singular values of softmax(x patterns' / d) above tol times the largest."""
  logits = x @ patterns.T / x.shape[1]
  weights = np.exp(logits - logits.max(1, keepdims=True))
  weights /= weights.sum(1, keepdims=True)
  # Squares of singular values: tol^2 is far above their rounding.
  squares = np.linalg.eigvalsh(weights @ weights.T)
  return int((squares > tol**2 * squares[-1]).sum())


def largest_logit(x: np.ndarray, patterns: np.ndarray) -> float:
  """What a plan is told, for beta = 1 / d."""
  centered = patterns - patterns.mean(0)
  return float(np.abs(x @ centered.T).max() / x.shape[1])


def rank_point(config: Config, d: int, m: int) -> Point:
  """By share: rank, largest logit, and what a plan asks for."""
  ranks, radii, degrees, features = [], [], [], []
  for share in config.shares:
    x, patterns = instance(m, d, share * math.sqrt(math.log(m)), config.seed)
    ranks.append(numerical_rank(x, patterns, config.rank_tol))
    radii.append(largest_logit(x, patterns))
    plan = hopfield_plan(radii[-1], d, m, m, eps=config.eps)
    degrees.append(math.inf if plan.degree is None else plan.degree)
    features.append(math.inf if plan.rank is None else plan.rank)
  return {
    "rank": np.array(ranks),
    "radius": np.array(radii),
    "degree": np.array(degrees, float),
    "features": np.array(features, float),
  }


def table_point(config: Config, d: int) -> Point:
  """Ranks by bound on the entries."""
  m = config.table_length
  ranks = [
    numerical_rank(*instance(m, d, bound, config.seed), config.rank_tol)
    for bound in config.table_bounds
  ]
  return {"rank": np.array(ranks)}


def crossing(config: Config, ranks: np.ndarray) -> float:
  """B / sqrt(log M) at which the rank passes M / 4; NaN if it does not."""
  m = config.table_length
  share = ranks / m
  if not share[0] < 0.25 < share[-1]:
    return math.nan
  i = int(np.argmax(share >= 0.25))
  bound = np.interp(
    0.25, share[i - 1 : i + 1], config.table_bounds[i - 1 : i + 1]
  )
  return float(bound) / math.sqrt(math.log(m))


def seconds_point(config: Config, m: int) -> Point:
  """Seconds of both ways, and how far they are apart."""
  d = config.timed_dim
  bound = config.timed_share * math.sqrt(math.log(m))
  x, patterns = instance(m, d, bound, config.seed)
  radius = largest_logit(x, patterns)
  x, patterns = (jnp.asarray(y, jnp.float32) for y in (x, patterns))
  dense, lowrank = timed_calls(config)
  error = jnp.abs(dense(x, patterns) - lowrank(x, patterns)).max()
  kernel = taylor_error_bound(radius, config.timed_degree)
  seconds = harness.least_seconds(
    {
      "dense": functools.partial(dense, x, patterns),
      "lowrank": functools.partial(lowrank, x, patterns),
    },
    rounds=config.rounds,
    at_least=config.seconds_per_point,
  )
  largest = float(jnp.abs(patterns).max())
  bound = 2 * kernel / (1 - kernel) * largest
  # Beside what float32 can tell, of sums with a term for each feature.
  bound += 64 * float(jnp.finfo(jnp.float32).eps) * largest
  return seconds | {"error": float(error), "bound": bound}


def timed_calls(config: Config) -> tuple[Callable[..., Any], ...]:
  """One dense update, and one low-rank, storing included, compiled."""
  beta = 1 / config.timed_dim

  @jax.jit
  def dense(x: jax.Array, patterns: jax.Array) -> jax.Array:
    return hopfield_update(x, patterns, beta)

  @jax.jit
  def lowrank(x: jax.Array, patterns: jax.Array) -> jax.Array:
    state = hopfield_store(patterns, beta, degree=config.timed_degree)
    return hopfield_retrieve(
      x, None, beta, max_steps=1, method="lowrank", state=state
    )

  return dense, lowrank


def _phase_checks(config: Config, values: Point) -> list[harness.Check]:
  accepted, d = config.accepted, max(config.dims)
  easy, hard = (config.shares.index(s) for s in (0.25, 1.2))
  fraction = values[f"rank_{d}"] / np.array(config.lengths)[:, None]
  checks = [
    harness.Check(
      f"rank / M from one M to the next, at most, B = 0.25 sqrt(log M), d={d}",
      (fraction[1:, easy] / fraction[:-1, easy]).max(),
      *accepted.rank_fall,
    ),
    harness.Check(
      f"rank / M, least of all M, B = 1.2 sqrt(log M), d={d}",
      fraction[:, hard].min(),
      accepted.hard_rank,
    ),
  ]
  for d, wanted in zip(config.dims, accepted.table_ranks, strict=True):
    for bound, rank, want in zip(
      config.table_bounds, values[f"table_{d}"], wanted, strict=True
    ):
      name = f"rank, M={config.table_length}, d={d}, B={bound:g}"
      checks.append(harness.Check(name, rank))
      checks.append(
        harness.Check(f"{name}, over {want}", rank / want, *accepted.table)
      )
    where = f"M={config.lengths[-1]}, d={d}"
    largest = values[f"rank_{d}"][-1, hard] / config.lengths[-1]
    name = f"rank / M, B = 1.2 sqrt(log M), {where}"
    checks.append(harness.Check(name, largest))
    degree = values[f"degree_{d}"][-1, easy]
    name = (
      f"degree of a promise of {config.eps:g}, B = 0.25 sqrt(log M), {where}"
    )
    checks.append(harness.Check(name, degree))
  for d, accept in zip(config.dims, accepted.crossings, strict=True):
    name = (
      f"B / sqrt(log M) where rank / M is 1/4, M={config.table_length}, d={d}"
    )
    checks.append(
      harness.Check(name, crossing(config, values[f"table_{d}"]), *accept)
    )
  used = values["seconds_error"] / values["seconds_bound"]
  name = "largest error of low rank over its bound, where it is timed"
  return [*checks, harness.Check(name, used.max(), *accepted.bound)]


def _time_checks(config: Config, values: Point) -> list[harness.Check]:
  accepted = config.accepted
  slopes = {
    name: fit_slope(config.timed_lengths, values[f"seconds_{name}"]).slope
    for name in ("dense", "lowrank")
  }
  ratio = values["seconds_dense"] / values["seconds_lowrank"]
  return [
    harness.Check(
      "slope of seconds in M, dense", slopes["dense"], *accepted.dense_slope
    ),
    harness.Check(
      "slope of seconds in M, low rank",
      slopes["lowrank"],
      *accepted.lowrank_slope,
    ),
    *(
      harness.Check(f"seconds, dense over low rank, M={m}", r)
      for m, r in zip(config.timed_lengths, ratio, strict=True)
    ),
  ]


# --- digits ---


def _digits(wd: harness.Workdir) -> Point:
  config: Config = wd.config
  rows = [
    wd.point(f"digits/M={m}", functools.partial(digits_point, config, m))
    for m in harness.progress(config.memories, "memories of digits")
  ]
  values = {
    f"digits_{name}": np.stack([r[name] for r in rows]) for name in rows[0]
  }
  examples = wd.point("examples", functools.partial(examples_point, config))
  low = wd.point("digits/lowrank", functools.partial(features_point, config))
  return values | examples | {f"low_{name}": x for name, x in low.items()}


def digits_of(config: Config, num: int) -> tuple[jax.Array, dict[str, Any]]:
  """(M, 64) patterns, centered and of norm 1, and queries of both kinds."""
  pixels, _ = data.load_digits()
  rng = np.random.default_rng(config.seed)
  pixels = rng.permutation(pixels - pixels.mean(0))[:num]
  patterns = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
  seen = rng.random(patterns.shape) >= config.masked
  noise = rng.standard_normal(patterns.shape) / math.sqrt(patterns.shape[1])
  queries = {
    "masked": np.where(seen, patterns, 0),
    "noisy": patterns + config.noise * noise,
  }
  return jnp.asarray(patterns), {
    kind: jnp.asarray(x, patterns.dtype) for kind, x in queries.items()
  }


def digits_point(config: Config, num: int) -> Point:
  """(kinds, betas) shares of queries; (kinds,) those of nearest neighbors."""
  patterns, queries = digits_of(config, num)
  mu = jnp.arange(num)

  @jax.jit
  def measure(x: jax.Array, beta: jax.Array) -> dict[str, jax.Array]:
    found, info = hopfield_retrieve(
      x,
      patterns,
      beta,
      max_steps=config.max_steps,
      tol=config.tol,
      return_info=True,
    )
    distance = jnp.linalg.norm(found - patterns, axis=1)
    nearest = jnp.argmax(found @ patterns.T, 1) == mu
    error = jnp.linalg.norm(
      hopfield_update(x, patterns, beta) - patterns, axis=1
    )
    bound = retrieval_error_bound(x, patterns, mu, beta).weight
    # What float32 can tell of vectors of norm 1.
    over = error - bound > 1e-5
    return {
      "retrieved": (distance <= config.within).mean(),
      "nearest": nearest.mean(),
      "over_bound": over.mean(),
      "steps": info.num_steps.mean(),
    }

  rows = [[measure(queries[k], b) for b in config.betas] for k in _QUERIES]
  stacked = {
    name: np.array([[float(cell[name]) for cell in row] for row in rows])
    for name in rows[0][0]
  }
  # All that any retrieval by inner products could find.
  best = [
    float((jnp.argmax(queries[k] @ patterns.T, 1) == mu).mean())
    for k in _QUERIES
  ]
  return stacked | {"neighbor": np.array(best)}


def examples_point(config: Config) -> Point:
  """Some queries and what comes back: few and many stored, coldest."""
  values: Point = {}
  for kind, num in _examples(config):
    patterns, queries = digits_of(config, num)
    x = queries[kind][:6]
    found = hopfield_retrieve(
      x, patterns, config.betas[-1], max_steps=config.max_steps
    )
    for name, y in (("stored", patterns), ("query", x), ("found", found)):
      values[f"example_{kind}_{name}"] = np.asarray(y[:6])
  return values


def _examples(config: Config) -> list[tuple[str, int]]:
  return list(zip(_QUERIES, (config.memories[0], config.memories[-1])))


def features_point(config: Config) -> Point:
  """By largest logit: error of features over its bound; largest own weight."""
  num, degree = config.digit_memories, config.digit_degree
  with jax.enable_x64(True):
    patterns, queries = digits_of(config, num)
    patterns, x = (y.astype(jnp.float64) for y in (patterns, queries["masked"]))
    centered = patterns - patterns.mean(0)[None]
    largest = float(jnp.abs(x @ centered.T).max())
    beta_of = [radius / largest for radius in config.digit_radii]

    @jax.jit
    def measure(beta: jax.Array) -> tuple[jax.Array, ...]:
      state = hopfield_store(patterns, beta, degree=degree)
      low = hopfield_retrieve(
        x, None, beta, max_steps=1, method="lowrank", state=state
      )
      dense = hopfield_update(x, patterns, beta)
      weight = retrieval_error_bound(x, patterns, jnp.arange(num), beta).weight
      norm = jnp.linalg.norm(patterns, axis=1).max()
      retrieved = [
        (jnp.linalg.norm(y - patterns, axis=1) <= config.within).mean()
        for y in (low, dense)
      ]
      error = jnp.abs(low - dense).max()
      return error, 1 - (weight / (2 * norm)).min(), *retrieved

    rows = np.array([[float(y) for y in measure(b)] for b in beta_of])
    entry = float(jnp.abs(patterns).max())
  kernel = [taylor_error_bound(r, degree) for r in config.digit_radii]
  plans = [
    hopfield_plan(r, x.shape[1], num, num, eps=config.eps)
    for r in config.digit_radii
  ]
  # With an error of 1 or more nothing is promised.
  bound = [2 * e / (1 - e) * entry if e < 1 else math.inf for e in kernel]
  return {
    "error": rows[:, 0],
    "bound": np.array(bound),
    "weight": rows[:, 1],
    "retrieved": rows[:, 2],
    "retrieved_dense": rows[:, 3],
    "rank": np.array([p.rank or math.inf for p in plans], float),
  }


def _digit_checks(config: Config, values: Point) -> list[harness.Check]:
  accepted = config.accepted
  few, many = config.memories[0], config.memories[-1]
  checks = [
    harness.Check(
      "share of queries beyond the bound of one update",
      values["digits_over_bound"].max(),
      high=0.0,
    )
  ]
  beta = config.betas[-1]
  for i, kind in enumerate(_QUERIES):
    for row, num in ((0, few), (-1, many)):
      where = f"{kind}, M={num}, beta={beta:g}"
      low = accepted.retrieved if num == few else -math.inf
      retrieved = values["digits_retrieved"][row, i, -1]
      checks += [
        harness.Check(f"retrieved, {where}", retrieved, low),
        harness.Check(
          f"nearest is right, {where}", values["digits_nearest"][row, i, -1]
        ),
        harness.Check(
          f"nearest to the query is right, {kind}, M={num}",
          values["digits_neighbor"][row, i],
        ),
      ]
  bounded = np.isfinite(values["low_bound"])
  used = values["low_error"][bounded] / values["low_bound"][bounded]
  checks.append(
    harness.Check(
      "largest error of low rank on digits over its bound, where it has one",
      used.max(),
      *accepted.bound,
    )
  )
  name = "largest of these logits for which the error has a bound"
  radii = np.array(config.digit_radii)
  checks.append(harness.Check(name, radii[bounded].max()))
  for i, radius in enumerate(config.digit_radii):
    where = f"digits, logits up to {radius:g}"
    checks += [
      harness.Check(
        f"retrieved by one low-rank update, {where}", values["low_retrieved"][i]
      ),
      harness.Check(
        f"retrieved by one dense update, {where}",
        values["low_retrieved_dense"][i],
      ),
      harness.Check(f"features planned, {where}", values["low_rank"][i]),
      harness.Check(f"error of low rank, {where}", values["low_error"][i]),
      harness.Check(f"largest own weight, {where}", values["low_weight"][i]),
    ]
  return checks


# --- capacity ---


def _capacity(wd: harness.Workdir) -> Point:
  config: Config = wd.config
  values: Point = {}
  for d in config.capacity_dims:
    point = wd.point(
      f"capacity/d={d}", functools.partial(capacity_point, config, d)
    )
    values |= {f"capacity_{name}_{d}": x for name, x in point.items()}
  for scale, d in config.promised:
    point = wd.point(
      f"promised/K={scale:g},d={d}",
      functools.partial(promised_point, config, scale, d),
    )
    where = f"{scale:g}_{d}"
    values |= {f"theorem_{name}_{where}": x for name, x in point.items()}
  fixed = wd.point("fixed", functools.partial(fixed_point, config))
  return values | {f"fixed_{name}": x for name, x in fixed.items()}


def capacity_point(config: Config, d: int) -> Point:
  """Shares of patterns that fail, by their number, until most of them do."""
  nums, shares = [], []
  num = 2
  while num <= config.capacity_max and (not shares or shares[-1] < 0.5):
    nums.append(num)
    shares.append(failures(config, d, num))
    num *= 2
  first = next(
    (n for n, s in zip(nums, shares) if s > config.failures), math.inf
  )
  promised = capacity_lower_bound(1.0, 1.0, d, config.delta)
  return {
    "nums": np.array(nums),
    "shares": np.array(shares),
    "first": first,
    "promised": float(promised.ok),
  }


def promised_point(config: Config, norm_scale: float, d: int) -> Point:
  """What the theorem promises, and how many patterns keep their weight."""
  promised = capacity_lower_bound(1.0, norm_scale, d, config.delta)
  kept, num = 1, 2
  while num <= config.promised_max:
    if failures(config, d, num, norm_scale) > config.failures:
      break
    kept, num = num, 2 * num
  number = float(promised.n) if promised.ok else math.nan
  return {"promised": number, "kept": kept}


def failures(
  config: Config, d: int, num: int, norm_scale: float = 1.0
) -> float:
  """Share of patterns whose own weight is below a half."""
  radius = norm_scale * math.sqrt(d - 1)
  rng = np.random.default_rng((config.seed, d, num))
  asked, failed = 0, 0
  while asked < config.capacity_samples:
    patterns = sphere(rng, num, d, radius).astype(np.float32)
    few = patterns[: max(1, _LOGITS // num)][: config.capacity_samples - asked]
    # Relative to its own, so that a sum of 2 is a weight of a half.
    logits = few @ patterns.T - np.float32(radius**2)
    failed += int((np.exp(logits).sum(1) > 2).sum())
    asked += len(few)
  return failed / asked


def sphere(
  rng: np.random.Generator, num: int, d: int, radius: float
) -> np.ndarray:
  """(num, d) points uniform on a sphere."""
  x = rng.standard_normal((num, d))
  return radius * x / np.linalg.norm(x, axis=1, keepdims=True)


def fixed_point(config: Config) -> Point:
  """How far 8 patterns, K=3 and d=20, are from being fixed points."""
  with jax.enable_x64(True):
    radius = 3 * math.sqrt(19)
    rng, worst = np.random.default_rng(config.seed), 0.0
    for _ in range(50):
      patterns = jnp.asarray(sphere(rng, 8, 20, radius))
      moved = hopfield_update(patterns, patterns, 1.0) - patterns
      worst = max(worst, float(jnp.abs(moved).max()) / radius)
    constants = {
      name: capacity_lower_bound(*args)
      for name, args in {
        "high": (1.0, 3.0, 20, 0.001),
        "low": (1.0, 1.0, 75, 0.001),
      }.items()
    }
    return {"moved": worst} | {
      f"{name}_{field}": float(getattr(bound, field))
      for name, bound in constants.items()
      for field in ("c", "n")
    }


def _capacity_checks(config: Config, values: Point) -> list[harness.Check]:
  accepted, dims = config.accepted, config.capacity_dims
  firsts = [values[f"capacity_first_{d}"] for d in dims]
  share = f"{100 * config.failures:g} %"
  checks = [
    harness.Check(f"first number with over {share} of failures, d={d}", first)
    for d, first in zip(dims, firsts, strict=True)
  ]
  checks += [
    harness.Check(f"that number over {want}, d={d}", first / want, low, high)
    for d, first, (want, low, high) in zip(
      dims, firsts, accepted.capacity_firsts, strict=True
    )
  ]
  checks += [
    harness.Check(
      f"its growth from d={low} to d={high}", after / before,
      accepted.capacity_growth,
    )
    for low, high, before, after in zip(dims, dims[1:], firsts, firsts[1:])
  ]  # fmt: skip
  checks.append(
    harness.Check(
      "dimensions of these for which the theorem promises any number",
      sum(values[f"capacity_promised_{d}"] for d in dims),
    )
  )
  for scale, d in config.promised:
    where = f"K={scale:g}, d={d}"
    kept, number = (
      values[f"theorem_{name}_{scale:g}_{d}"] for name in ("kept", "promised")
    )
    checks += [
      harness.Check(
        f"patterns, tried up to {config.promised_max}, with at most {share} of "
        f"failures, {where}",
        kept,
      ),
      harness.Check(
        f"that number, or more, over the theorem's, {where}",
        kept / number,
        accepted.over_theorem,
      ),
    ]
  return [
    *checks,
    harness.Check(
      "largest move of 8 patterns, K=3, d=20, over their norm",
      values["fixed_moved"],
      high=accepted.fixed,
    ),
    harness.Check("c, beta=1, K=3, d=20, p=0.001", values["fixed_high_c"]),
    harness.Check("N, beta=1, K=3, d=20, p=0.001", values["fixed_high_n"]),
    harness.Check("c, beta=1, K=1, d=75, p=0.001", values["fixed_low_c"]),
    harness.Check("N, beta=1, K=1, d=75, p=0.001", values["fixed_low_n"]),
  ]


# --- bags ---


def _bags(wd: harness.Workdir) -> Point:
  values: Point = {}
  for pooling in harness.progress(bags.POOLINGS, "poolings"):
    point = wd.point(
      f"bags/{pooling}", functools.partial(bags.bags_point, wd.config, pooling)
    )
    values |= {f"bags_{pooling}_{name}": x for name, x in point.items()}
  return values


def _bag_checks(config: Config, values: Point) -> list[harness.Check]:
  points = {
    pooling: 100 * float(values[f"bags_{pooling}_accuracy"].mean())
    for pooling in bags.POOLINGS
  }
  return [
    *(
      harness.Check(f"accuracy on bags, {pooling}, points", value)
      for pooling, value in points.items()
    ),
    *(
      harness.Check(
        f"parameters, {pooling}", values[f"bags_{pooling}_num_params"]
      )
      for pooling in bags.POOLINGS
    ),
    harness.Check(
      "hopfield minus mean, points of accuracy",
      points["hopfield"] - points["mean"],
      config.accepted.over_mean,
    ),
    harness.Check(
      "hopfield minus attention, points of accuracy",
      points["hopfield"] - points["attention"],
    ),
    harness.Check(
      "hopfield minus a mean of as many parameters, points of accuracy",
      points["hopfield"] - points["wide-mean"],
    ),
    harness.Check(
      "hopfield of three steps minus one of one, points of accuracy",
      points["three-steps"] - points["hopfield"],
    ),
  ]


# --- figure ---


def _draw(
  panels: list[Callable[[Axes, Config, Point], None]],
  config: Config,
  values: Point,
) -> Figure:
  rows = -(-len(panels) // 2)
  size = 12.5, 4.7 * rows
  figure, axes = plt.subplots(rows, 2, figsize=size, squeeze=False)
  for ax, panel in zip(axes.flat, panels):
    panel(ax, config, values)
  for ax in axes.flat[len(panels) :]:
    ax.remove()
  return figure


def _draw_ranks(ax: Axes, config: Config, values: Point) -> None:
  styles = ["--", "-"]
  for d, style in zip(config.dims, styles):
    for i, (m, color) in enumerate(zip(config.lengths, harness.PALETTE)):
      ax.plot(
        config.shares,
        values[f"rank_{d}"][i] / m,
        style,
        marker="o",
        color=color,
        label=f"M = {m}, d = {d}",
      )
  ax.axhline(0.25, color="black", lw=1, ls=":")
  ax.set(
    title="The retrieval matrix fills up with rank",
    xlabel=r"largest entry over $\sqrt{\log M}$",
    ylabel="rank / M",
    ylim=(0, None),
  )
  ax.legend(loc="upper left", ncols=len(config.dims))


def _draw_plans(ax: Axes, config: Config, values: Point) -> None:
  m = config.lengths[-1]
  for d, color in zip(config.dims, harness.PALETTE):
    ranks, features = values[f"rank_{d}"][-1], values[f"features_{d}"][-1]
    ax.semilogy(
      config.shares, ranks / m, "o-", color=color, label=f"rank, d = {d}"
    )
    ax.semilogy(
      config.shares,
      features / m,
      "s--",
      color=color,
      label=f"Taylor features, d = {d}",
    )
  ax.axhline(1, color="black", lw=1, ls=":")
  ax.set(
    title=f"What a promise of {config.eps:g} costs, M = {m}",
    xlabel=r"largest entry over $\sqrt{\log M}$",
    ylabel="number / M",
  )
  ax.legend(loc="upper left")


def _draw_time(ax: Axes, config: Config, values: Point) -> None:
  for name, label in (("dense", "dense"), ("lowrank", "low rank")):
    seconds = values[f"seconds_{name}"]
    harness.plot_loglog(ax, config.timed_lengths, 1000 * seconds, label=label)
  ax.set(
    title=f"Time of one update, d = {config.timed_dim}, "
    f"degree {config.timed_degree}",
    xlabel="M, patterns and queries",
    ylabel="milliseconds",
  )
  ax.legend(loc="upper left")


def _draw_accuracy(kind: str, ax: Axes, config: Config, values: Point) -> None:
  shares = 100 * values["digits_retrieved"][:, _QUERIES.index(kind)]
  ax.imshow(
    shares, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=130
  )
  for (i, j), share in np.ndenumerate(shares):
    color = "white" if share > 70 else "black"
    ax.text(j, i, f"{share:.0f}", ha="center", va="center", color=color)
  ax.set_xticks(range(len(config.betas)), [f"{b:g}" for b in config.betas])
  ax.set_yticks(range(len(config.memories)), [str(m) for m in config.memories])
  ax.grid(False)
  ax.set(
    title={
      "masked": f"Digits with {100 * config.masked:.0f} % of pixels gone",
      "noisy": f"Digits with noise of norm {config.noise:g}",
    }[kind]
    + ": % retrieved",
    xlabel=r"inverse temperature $\beta$",
    ylabel="patterns stored",
  )


def _draw_examples(kind: str, ax: Axes, config: Config, values: Point) -> None:
  rows = ("query", "found", "stored")
  images = [values[f"example_{kind}_{row}"] for row in rows]
  largest = np.abs(images).max()
  gap, columns = 1, len(images[0])
  canvas = np.full((3 * 9 - gap, columns * 9 - gap), np.nan)
  for i, row in enumerate(images):
    for j, image in enumerate(row):
      canvas[9 * i : 9 * i + 8, 9 * j : 9 * j + 8] = image.reshape(8, 8)
  ax.imshow(canvas, cmap="RdGy", vmin=-largest, vmax=largest, aspect="equal")
  ax.set_yticks([4 + 9 * i for i in range(3)], rows)
  ax.set_xticks([])
  ax.grid(False)
  ax.spines[:].set_visible(False)
  ax.set(
    title=f"{kind}, M = {dict(_examples(config))[kind]}, "
    rf"$\beta$ = {config.betas[-1]:g}: pixels less their mean"
  )


def _draw_digit_features(ax: Axes, config: Config, values: Point) -> None:
  num, degree = config.digit_memories, config.digit_degree
  radii = np.array(config.digit_radii)
  promised = np.isfinite(values["low_bound"])
  ax.loglog(radii, values["low_error"], "o-", label=f"error, degree {degree}")
  ax.loglog(
    radii[promised], values["low_bound"][promised], "s--", label="its bound"
  )
  ax.loglog(radii, values["low_weight"], "^-", label="largest own weight")
  few = np.exp(2 * radii)
  ax.loglog(
    radii, few / (few + num - 1), ":", color="black", label="most it could be"
  )
  ax.xaxis.set_major_locator(ticker.FixedLocator(list(radii)))
  ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
  ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.set(
    title=f"Where features are good, no digit stands out (M = {num})",
    xlabel="largest logit",
    ylabel="error; weight",
  )
  ax.legend(loc="lower right")


def _draw_capacity(ax: Axes, config: Config, values: Point) -> None:
  for d, color in zip(config.capacity_dims, harness.PALETTE):
    shares = 100 * values[f"capacity_shares_{d}"]
    nums = values[f"capacity_nums_{d}"]
    ax.loglog(
      nums, np.maximum(shares, 0.01), "o-", color=color, label=f"d = {d}"
    )
  ax.axhline(100 * config.failures, color="black", lw=1, ls=":")
  ax.set(
    title="Capacity grows exponentially in d",
    xlabel="patterns on the sphere",
    ylabel="% of them that fail (0.01: none)",
    # Room for the legend above the curves.
    ylim=(None, 1000),
  )
  ax.legend(loc="upper center", ncols=len(config.capacity_dims))


def _draw_bags(ax: Axes, config: Config, values: Point) -> None:
  for i, (pooling, color) in enumerate(zip(bags.POOLINGS, harness.PALETTE)):
    points = 100 * values[f"bags_{pooling}_accuracy"]
    ax.bar(i, points.mean(), color=color, alpha=0.55, width=0.6)
    ax.plot([i] * len(points), points, "o", color=color)
    ax.text(i, 52, f"{points.mean():.1f}", ha="center", color="black")
  low, high = config.bag_sizes
  ax.set_xticks(range(len(bags.POOLINGS)), bags.POOLINGS)
  ax.grid(False, axis="x")
  ax.set(
    title=f"Is there a {config.digit} among {low} to {high} digits?",
    ylabel="accuracy on unseen digits, %",
    ylim=(50, 101),
  )


if __name__ == "__main__":
  harness.main(run, "hopfield")
