"""Dikin walks: what barriers, sketches and the soft threshold are worth.

Six questions about arXiv 2410.05700, of chains that start from exact draws
wherever there are any:

1. Facets are written down again and again; the body stays. How do mixing times
   grow, by barrier? Of one coordinate's facets with step sizes tuned, and of
   all of them with step sizes kept.
2. In a spectrahedron, does a step size of the order 1 / sqrt(d) do?
3. What do sketches of the Hessian cost in acceptance, with fresh coins and with
   common ones? Is the law still exact?
4. What is the soft threshold worth for a density that is narrow in its body?
5. Does a long thin body need rounding?
6. Metabolic networks and doubly stochastic matrices, against hit and run.
"""

import functools
import os
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import _convex_bodies, harness
from jaxattn.data import birkhoff_polytope, load_flux_polytope
from jaxattn.sampling import (
  LeverageSample,
  Polytope,
  SamplingAlgorithm,
  Spectrahedron,
  TensorSRHT,
  barrier_hessian,
  chebyshev_center,
  coordinate_hit_and_run,
  dikin_walk,
  effective_sample_size,
  hit_and_run,
  potential_scale_reduction,
  round_polytope,
  sample_chains,
)

_COINS = ("fresh", "common")
_BIRKHOFF, _ROUNDED = "birkhoff", "rounded hit and run"
_THRESHOLDS = ("none", "smoothness", "lipschitz")
_BARRIERS: dict[str, dict[str, Any]] = {
  "log": {"kind": "log"},
  "vaidya": {"kind": "vaidya"},
  "lee_sidford": {"kind": "lee_sidford"},
  "lee_sidford_16": {"kind": "lee_sidford", "num_iters": 16},
}
_LABELS = {
  "log": "log",
  "vaidya": "Vaidya",
  "lee_sidford": "Lee-Sidford, 4 iterations",
  "lee_sidford_16": "Lee-Sidford, 16 iterations",
}
# Of one coordinate, uniform in [-1, 1].
_CUBE = 1 / 3

# A ConfigDict: what type a field has is known at run time only.
Config = Any


class SizedState(NamedTuple):
  """Of :func:`sized`: the position ends with the step size."""

  position: jax.Array
  logdensity: jax.Array
  inner: Any


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  facets = _by_kind(wd, "facets", facets_point, config.kinds, config.repeats)
  everywhere = _by_kind(
    wd, "everywhere", everywhere_point, config.kinds_all, config.repeats_all
  )
  cone = _sweep(wd, "cone", cone_point, config.cone_sizes)
  sketches = _sweep(wd, "sketch", sketch_point, config.sketched)
  soft = _sweep(wd, "threshold", threshold_point, _THRESHOLDS)
  thin = _sweep(wd, "aspect", aspect_point, config.aspects)
  bodies = {name: _body(wd, name) for name in config.bodies}
  found = facets, everywhere, cone, sketches, soft, thin, bodies
  harness.save_figure(wd, _draw(config, *found), _figure_data(config, *found))
  return harness.finish(
    wd,
    claim=(
      "One Metropolis walk with the metric of a barrier and a soft threshold "
      "draws from log-concave densities on convex bodies, exactly even if the "
      "Hessian is sketched: with the barrier of Lee and Sidford the steps that "
      "it takes do not grow with the number of constraints, as they do with "
      "the logarithmic one."
    ),
    source="arXiv:2410.05700, theorems 1.1 to 1.3",
    paper=(
      "n d + d L^2 R^2 steps with the logarithmic barrier, d^2 + d L^2 R^2 "
      "with that of Lee and Sidford (no numbers)"
    ),
    checks=[
      *_facet_checks(config, facets, everywhere),
      *_cone_checks(config, cone),
      *_sketch_checks(config, sketches),
      *_threshold_checks(config, soft),
      *_aspect_checks(config, thin),
      *_body_checks(config, bodies),
    ],
    timed=_speed_checks(bodies),
  )


def _sweep(
  wd: harness.Workdir, what: str, point: Any, values: Iterable[Any]
) -> dict[Any, dict[str, Any]]:
  return {
    value: wd.point(
      f"{what}/{value}", functools.partial(point, wd.config, value)
    )
    for value in harness.progress(list(values), what)
  }


def _by_kind(
  wd: harness.Workdir,
  what: str,
  point: Any,
  kinds: Iterable[str],
  repeats: tuple[int, ...],
) -> dict[str, list[dict[str, Any]]]:
  return {
    kind: [
      wd.point(
        f"{what}/{kind}/k={k}", functools.partial(point, wd.config, kind, i)
      )
      for i, k in enumerate(harness.progress(repeats, f"{what}, {kind}"))
    ]
    for kind in kinds
  }


def _body(wd: harness.Workdir, name: str) -> dict[str, dict[str, Any]]:
  config: Config = wd.config
  load = functools.partial(load_body, name)
  body = wd.point(f"bodies/{name}/body", load)
  return {
    walk: wd.point(
      f"bodies/{name}/{walk.replace(' ', '_')}",
      functools.partial(body_point, config, body, walk),
    )
    for walk in harness.progress(config.walks, name)
  }


# --- chains ---


def sized(walk: SamplingAlgorithm) -> SamplingAlgorithm:
  """The walk in which each chain has its own step size, its last coordinate."""

  def init(position: jax.Array, rng: jax.Array | None = None) -> SizedState:
    state = walk.init(position[:-1], rng)
    return SizedState(position, state.logdensity, state)

  def step(rng: jax.Array, state: SizedState) -> tuple[SizedState, Any]:
    inner, info = walk.step(rng, state.inner, state.position[-1])
    position = jnp.append(inner.position, state.position[-1])
    return SizedState(position, inner.logdensity, inner), info

  return SamplingAlgorithm(init, step)


def autocorrelation_time(draws: Any, thin: int, variance: float) -> np.ndarray:
  """Steps for one independent draw, by coordinate; means are known to be 0.

  With known moments chains need not be long: estimates of effective sample
  sizes that take moments from the chains are too small where many of them are
  short. Autocorrelations are summed up to five times what they sum to; if
  chains end before twice that, over half of their length, which is too little.
  """
  x = np.asarray(draws)
  num = x.shape[1]
  spectrum = np.fft.rfft(x, 2 * num, axis=1)
  sums = np.fft.irfft(np.abs(spectrum) ** 2, 2 * num, axis=1)[:, :num].mean(0)
  lags = np.arange(num)[:, None]
  correlation = sums / (num - lags) / variance
  times = 2 * np.cumsum(correlation, 0) - correlation[:1]
  last = num // 2
  enough = lags[:last] >= 2.5 * times[:last]
  window = np.where(enough.any(0), enough.argmax(0), last)
  return thin * np.take_along_axis(times, window[None], 0)[0]


def per_thousand(draws: Any, thin: int, variance: float) -> float:
  """Independent draws in 1000 steps, of the worst coordinate."""
  return float(1000 / autocorrelation_time(draws, thin, variance).max())


# --- facets ---


def facets_point(config: Config, kind: str, i: int) -> dict[str, Any]:
  """Steps for a draw if one pair of facets is repeated, at the best size."""
  num, half, thin = config.chains, config.facet_steps[kind][i] // 2, config.thin
  d, sizes = config.dim, np.asarray(config.step_sizes)
  with jax.enable_x64(True):
    body = _convex_bodies.repeated_box(d, config.repeats[i], everywhere=False)
    walk = sized(dikin_walk(None, body, **_BARRIERS[kind]))

    def draw(seed: int, starts: jax.Array) -> tuple[jax.Array, Any]:
      key = jax.random.key(seed)
      draws, infos, _ = sample_chains(key, walk, starts, half, thin=thin)
      return draws, infos.acceptance_rate.mean()

    def start(seed: int, sizes: np.ndarray) -> jax.Array:
      x = _convex_bodies.box_draws(seed, num, d)
      return jnp.column_stack([x, jnp.asarray(sizes)])

    seed, each = config.seed, num // len(sizes)
    pilot, _ = draw(seed, start(seed, np.repeat(sizes, each)))
    times = [
      autocorrelation_time(draws, thin, _CUBE).max()
      for draws in jnp.split(pilot[..., :d], len(sizes))
    ]
    best = sizes[int(np.argmin(times))]
    # Other coins than those that chose it.
    first, _ = draw(seed + 1, start(seed + 1, np.full(num, best)))
    second, rate = draw(seed + 2, first[:, -1])
    draws = jnp.concatenate([first, second], 1)[..., :d]
    return {
      "times": autocorrelation_time(draws, thin, _CUBE),
      "step_size": best,
      "acceptance": float(rate),
      "pilot": np.array(times),
    }


def everywhere_point(config: Config, kind: str, i: int) -> dict[str, Any]:
  """Steps for a draw if all facets are repeated, at one step size."""
  d, thin = config.dim, config.thin
  with jax.enable_x64(True):
    k = config.repeats_all[i]
    body = _convex_bodies.repeated_box(d, k, everywhere=True)
    draws, infos, _ = sample_chains(
      jax.random.key(config.seed),
      dikin_walk(None, body, step_size=config.all_step_size, **_BARRIERS[kind]),
      _convex_bodies.box_draws(config.seed, config.chains, d),
      config.all_steps[kind][i],
      thin=thin,
    )
    return {
      "times": autocorrelation_time(draws, thin, _CUBE),
      "acceptance": float(infos.acceptance_rate.mean()),
    }


# --- spectrahedra ---


def cone_point(config: Config, n: int) -> dict[str, float]:
  """Acceptance with alpha = 1 / (4 d) and with 1 / (2 n d)."""
  num, d = config.cone_chains, n * (n + 1) // 2
  sizes = np.repeat([0.25**0.5, (0.5 / n) ** 0.5], num)
  with jax.enable_x64(True):
    walk = sized(dikin_walk(None, _convex_bodies.bounded_trace(n)))
    starts = _convex_bodies.bounded_trace_draws(config.seed, 2 * num, n)
    starts = jnp.column_stack([starts, jnp.asarray(sizes)])
    key = jax.random.key(config.seed)
    draws, infos, _ = sample_chains(key, walk, starts, config.cone_steps)
    rates = infos.acceptance_rate.mean(1)
    traces = draws[num:, :, _diagonal(n)].sum(-1)
    return {
      "by_d": float(rates[:num].mean()),
      "by_nd": float(rates[num:].mean()),
      "excess": _z_score(traces, d / (d + 1)),
    }


def _diagonal(n: int) -> np.ndarray:
  rows, columns = np.triu_indices(n)
  return np.flatnonzero(rows == columns)


def _z_score(values: jax.Array, want: Any) -> float:
  """The largest distance of means from numbers, in standard errors.

  Chains, the first axis, are independent; draws of one are not.
  """
  means = np.asarray(values.mean(1))
  error = means.std(0, ddof=1) / len(means) ** 0.5
  return float(np.abs((means.mean(0) - want) / error).max())


# --- sketches ---


def sketch_body(config: Config, which: str) -> Polytope | Spectrahedron:
  """One of the two bodies whose Hessians are sketched."""
  n, d = config.sketch_sizes[which]
  make = getattr(_convex_bodies, f"random_{which}")
  return make(n, d, config.seed)


def sketch_point(config: Config, which: str) -> dict[str, Any]:
  """Acceptance by rows and coins, and how far E |x|^2 is from the exact walk's.

  All start from the same points, where the exact walk ended.
  """
  with jax.enable_x64(True):
    body = sketch_body(config, which)
    kind = LeverageSample if which == "polytope" else TensorSRHT
    starts = jnp.zeros((config.chains, config.sketch_sizes[which][1]))

    def measure(seed: int, walk: SamplingAlgorithm) -> tuple[float, jax.Array]:
      key = jax.random.key(seed)
      draws, infos, _ = sample_chains(key, walk, starts, config.sketch_steps)
      return float(infos.acceptance_rate.mean()), draws

    exact = dikin_walk(None, body)
    for seed in range(config.sketch_burn_in):
      starts = measure(seed, exact)[1][:, -1]
    rate, draws = measure(config.sketch_burn_in, exact)
    squares = (draws**2).sum(-1)
    rates, excess = [], []
    for i, (num, coins) in enumerate(_settings(config, which)):
      walk = dikin_walk(None, body, sketch=kind(num), coins=coins)
      sketched, draws = measure(config.sketch_burn_in + 1 + i, walk)
      rates.append(sketched)
      excess.append(_z_score((draws**2).sum(-1) - squares, 0.0))
  return {
    "exact": rate,
    "rates": np.reshape(rates, (-1, len(_COINS))),
    "excess": max(excess),
  }


def _settings(config: Config, which: str) -> list[tuple[int, str]]:
  return [(num, c) for num in config.sketch_rows[which] for c in _COINS]


# --- the soft threshold ---


def threshold_point(config: Config, which: str) -> dict[str, Any]:
  """A narrow normal density in a cube: acceptance and draws by step size."""
  d, sigma, num = config.soft_dim, config.sigma, config.soft_chains
  sizes, beta, thin = config.soft_step_sizes, config.sigma**-2, config.thin
  options: dict[str, Any] = {
    "none": {},
    "smoothness": {"smoothness": beta},
    # Of the density on the cube.
    "lipschitz": {"lipschitz": beta * d**0.5},
  }[which]
  with jax.enable_x64(True):
    body = _convex_bodies.repeated_box(d, 1, everywhere=True)
    walk = sized(dikin_walk(lambda x: -beta * (x @ x) / 2, body, **options))
    # The walls are many standard deviations away: these are exact draws.
    normal = np.random.default_rng(config.seed).normal(
      size=(num * len(sizes), d)
    )
    starts = np.column_stack([sigma * normal, np.repeat(sizes, num)])
    draws, infos, _ = sample_chains(
      jax.random.key(config.seed),
      walk,
      jnp.asarray(starts),
      config.soft_steps,
      thin=thin,
    )
    return {
      "acceptance": np.asarray(
        infos.acceptance_rate.reshape(len(sizes), -1).mean(1)
      ),
      "per_thousand": np.array(
        [
          per_thousand(x, thin, sigma**2)
          for x in jnp.split(draws[..., :d], len(sizes))
        ]
      ),
    }


# --- bodies ---


def aspect_point(config: Config, aspect: float) -> dict[str, float]:
  """Draws in 1000 steps in a rotated box that is as long."""
  d, thin = config.aspect_dim, config.thin
  with jax.enable_x64(True):
    body, to_cube = _convex_bodies.rotated_box(d, aspect, config.seed)
    cube = _convex_bodies.box_draws(config.seed, config.chains, d)
    starts = jnp.linalg.solve(to_cube, cube.T).T
    found = {}
    for name, walk in (
      ("Dikin", dikin_walk(None, body)),
      ("hit and run", hit_and_run(None, body)),
    ):
      draws, _, _ = sample_chains(
        jax.random.key(config.seed),
        walk,
        starts,
        config.aspect_steps,
        thin=thin,
      )
      found[name] = per_thousand(draws @ to_cube.T, thin, _CUBE)
  return found


def load_body(name: str) -> dict[str, Any]:
  """A polytope a y <= b, and the affine map to what is looked at.

  ``birkhoff5``: doubly stochastic 5 x 5 matrices, and their entries; another
  name: of a network, the fluxes in coordinates with an interior.
  """
  with jax.enable_x64(True):
    if name.startswith(_BIRKHOFF):
      body, (matrix, offset) = birkhoff_polytope(int(name[len(_BIRKHOFF) :]))
    else:
      body, _ = load_flux_polytope(name)
      d = body.a.shape[1]
      matrix, offset = np.eye(d), np.zeros(d)
    a, b = np.asarray(body.a), np.asarray(body.b)
  return {"a": a, "b": b, "matrix": matrix, "offset": offset}


def body_point(
  config: Config, body: dict[str, Any], which: str
) -> dict[str, Any]:
  """R-hat by the steps taken; draws by steps and by seconds.

  All chains start from one point, and as many steps as are looked at go before.
  ``excess``: distance of means from the offset of the map, in standard errors,
  which for doubly stochastic matrices is their mean. ``outside``: of draws of
  the Dikin walk in single precision, the share not strictly inside.
  """
  a, b, matrix, offset = (body[k] for k in ("a", "b", "matrix", "offset"))
  center, _ = chebyshev_center(a, b)
  with jax.enable_x64(True):
    if which == _ROUNDED:
      a, b, (inner, shift) = round_polytope(a, b)
      center = np.linalg.solve(inner, center - shift)
      matrix, offset = matrix @ inner, offset + matrix @ shift
    walk = _walk(which, Polytope(jnp.asarray(a), jnp.asarray(b)))
    starts = np.tile(center, (config.body_chains, 1))
    cold = _body_draws(config, walk, config.seed, jnp.asarray(starts))
    begin = time.perf_counter()
    warm = _body_draws(config, walk, config.seed + 1, cold[:, -1])
    seconds = time.perf_counter() - begin
    draws = jnp.asarray(np.asarray(warm) @ matrix.T + offset)
    size = float(effective_sample_size(draws).min())
    lengths = [int(share * draws.shape[1]) for share in config.body_shares]
    r_hat = [
      float(potential_scale_reduction(draws[:, :num]).max()) for num in lengths
    ]
    outside = _outside(config, a, b, center) if which == "Dikin" else 0.0
  thousands = config.body_chains * config.body_steps / 1000
  return {
    "outside": outside,
    "r_hat": np.array(r_hat),
    "excess": _z_score(draws, body["offset"]),
    "per_thousand": size / thousands,
    "per_second": size / seconds,
  }


def _walk(which: str, body: Polytope) -> SamplingAlgorithm:
  if which == "Dikin":
    return dikin_walk(None, body)
  return (hit_and_run if which == "hit and run" else coordinate_hit_and_run)(
    None, body
  )


def _outside(
  config: Config, a: np.ndarray, b: np.ndarray, center: np.ndarray
) -> float:
  """Slacks are taken in double precision; draws that are no number count."""
  body = Polytope(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
  starts = np.tile(center, (config.body_chains, 1))
  draws, _, _ = sample_chains(
    jax.random.key(config.seed),
    dikin_walk(None, body),
    jnp.asarray(starts, jnp.float32),
    config.single_steps,
  )
  return float(1 - (np.asarray(draws, np.float64) @ a.T < b).all(-1).mean())


def _body_draws(
  config: Config, walk: SamplingAlgorithm, seed: int, starts: jax.Array
) -> jax.Array:
  draws, _, _ = sample_chains(
    jax.random.key(seed),
    walk,
    starts,
    config.body_steps,
    thin=config.body_thin,
    num_warmup=config.body_warmup,
  )
  return jax.block_until_ready(draws)


# --- checks ---


def _worst(points: list[dict[str, Any]]) -> np.ndarray:
  return np.array([point["times"].max() for point in points])


def _mean(points: list[dict[str, Any]]) -> np.ndarray:
  """Where coordinates are alike."""
  return np.array([point["times"].mean() for point in points])


def _slope(repeats: Iterable[int], times: np.ndarray, over: Any) -> float:
  """Exponent of steps in repeats, over these repeats only."""
  kept = np.isin(list(repeats), list(over))
  log_k, log_times = np.log(np.array(list(repeats))[kept]), np.log(times[kept])
  return float(np.polyfit(log_k, log_times, 1)[0])


def _facet_checks(
  config: Config, facets: dict[str, Any], everywhere: dict[str, Any]
) -> list[harness.Check]:
  checks, accepted = [], config.accepted
  ranges = {
    "log": (accepted.log_slope, np.inf),
    "lee_sidford": (-np.inf, accepted.lee_sidford_slope),
  }
  for kind in config.kinds:
    slope = _slope(config.repeats, _worst(facets[kind]), config.slope_over)
    name = f"exponent of steps in copies of a facet, {_LABELS[kind]}"
    checks.append(harness.Check(name, slope, *ranges.get(kind, ())))
  for kind in config.kinds_all:
    times, repeats = _mean(everywhere[kind]), config.repeats_all
    name = f"exponent in copies of all facets, {_LABELS[kind]}"
    slope = _slope(repeats, times, repeats)
    checks.append(harness.Check(name, slope, *accepted.all_slope[kind]))
  checks += [
    harness.Check(
      f"steps for a draw, {k} copies of a facet, {_LABELS[kind]}", steps
    )
    for kind in config.kinds
    for k, steps in zip(config.repeats, _worst(facets[kind]), strict=True)
  ]
  return checks


def _cone_checks(
  config: Config, cone: dict[int, dict[str, Any]]
) -> list[harness.Check]:
  n, accepted = max(cone), config.accepted
  body = f"positive {n} x {n} matrices"
  return [
    harness.Check(
      f"acceptance, {body}, alpha = 1 / (4 d)",
      cone[n]["by_d"],
      high=accepted.by_d,
    ),
    harness.Check(
      f"acceptance, {body}, alpha = 1 / (2 n d)",
      cone[n]["by_nd"],
      accepted.by_nd,
    ),
    harness.Check(
      "mean trace, largest distance in standard errors",
      max(point["excess"] for point in cone.values()),
      high=accepted.standard_errors,
    ),
  ]


def _sketch_checks(
  config: Config, sketches: dict[str, dict[str, Any]]
) -> list[harness.Check]:
  checks, accepted = [], config.accepted
  for which, found in sketches.items():
    fresh, common = found["rates"].T
    most = max(config.sketch_rows[which])
    checks += [
      harness.Check(
        f"acceptance, {which}, common coins less fresh ones, at least",
        (common - fresh).min(),
        accepted.common_gain,
      ),
      harness.Check(
        f"acceptance, {which}, exact less {most} rows with common coins",
        found["exact"] - common[-1],
        high=accepted.sketch_loss,
      ),
      harness.Check(
        f"mean of |x|^2, {which}, sketched less exact, in standard errors",
        found["excess"],
        high=accepted.standard_errors,
      ),
      harness.Check(f"acceptance, {which}, exact", found["exact"]),
    ]
  return checks


def _threshold_checks(
  config: Config, soft: dict[str, dict[str, Any]]
) -> list[harness.Check]:
  one = config.soft_step_sizes.index(1.0)
  at_one = {name: point["per_thousand"][one] for name, point in soft.items()}
  best = {name: point["per_thousand"].max() for name, point in soft.items()}
  accepted = config.accepted
  return [
    harness.Check(
      "draws a step, threshold by smoothness over none, step size 1",
      at_one["smoothness"] / at_one["none"],
      accepted.soft_gain,
    ),
    harness.Check(
      "draws a step, threshold by smoothness over Lipschitz, step size 1",
      at_one["smoothness"] / at_one["lipschitz"],
      accepted.smoothness_gain,
    ),
    harness.Check(
      "draws a step, threshold by smoothness over none, each at its best",
      best["smoothness"] / best["none"],
    ),
    *(
      harness.Check(
        f"acceptance, threshold: {name}, step size 1", point["acceptance"][one]
      )
      for name, point in soft.items()
    ),
  ]


def _aspect_checks(
  config: Config, thin: dict[float, dict[str, float]]
) -> list[harness.Check]:
  least, most = min(thin), max(thin)
  ratio = {name: thin[most][name] / thin[least][name] for name in thin[least]}
  return [
    harness.Check(
      f"draws a step, {most:g} times as long over {least:g}, Dikin",
      ratio["Dikin"],
      *config.accepted.aspect,
    ),
    harness.Check("the same, hit and run", ratio["hit and run"]),
  ]


def _body_checks(
  config: Config, bodies: dict[str, dict[str, Any]]
) -> list[harness.Check]:
  checks, accepted = [], config.accepted
  for name, found in bodies.items():
    ranges = {"Dikin": (-np.inf, accepted.mixed)}
    is_network = not name.startswith(_BIRKHOFF)
    if is_network:
      ranges["hit and run"] = (accepted.not_mixed, np.inf)
    for walk, point in found.items():
      r_hat, what = point["r_hat"][-1], f"{name}, {walk}"
      checks += [
        harness.Check(f"R-hat, {what}", r_hat, *ranges.get(walk, ())),
        harness.Check(f"draws in 1000 steps, {what}", point["per_thousand"]),
      ]
    checks.append(
      harness.Check(
        f"draws in single precision outside, {name}",
        found["Dikin"]["outside"],
        high=0.0,
      )
    )
    if not is_network:
      checks.append(
        harness.Check(
          f"means, {name}, Dikin, in standard errors",
          found["Dikin"]["excess"],
          high=accepted.standard_errors,
        )
      )
  return checks


def _speed_checks(bodies: dict[str, dict[str, Any]]) -> list[harness.Check]:
  return [
    harness.Check(f"draws a second, {name}, {walk}", point["per_second"])
    for name, found in bodies.items()
    for walk, point in found.items()
  ]


# --- figure ---


def _figure_data(
  config: Config,
  facets: dict[str, Any],
  everywhere: dict[str, Any],
  cone: dict[int, Any],
  sketches: dict[str, Any],
  soft: dict[str, Any],
  thin: dict[float, Any],
  bodies: dict[str, Any],
) -> dict[str, Any]:
  data = {f"steps, {kind}": _worst(facets[kind]) for kind in config.kinds}
  data |= {
    f"steps, all, {kind}": _mean(everywhere[kind]) for kind in config.kinds_all
  }
  data |= {
    f"cone, {key}": [point[key] for point in cone.values()]
    for key in ("by_d", "by_nd")
  }
  for which, found in sketches.items():
    data |= {
      f"{which}, exact": found["exact"],
      f"{which}, sketched": found["rates"],
      f"{which}, rows": config.sketch_rows[which],
    }
  data |= {
    f"threshold, {name}, {key}": value
    for name, point in soft.items()
    for key, value in point.items()
  }
  data |= {
    f"aspect, {name}": [point[name] for point in thin.values()]
    for name in ("Dikin", "hit and run")
  }
  data |= {
    f"r_hat, {name}, {walk}": point["r_hat"]
    for name, found in bodies.items()
    for walk, point in found.items()
  }
  keys = (
    "repeats",
    "repeats_all",
    "cone_sizes",
    "soft_step_sizes",
    "aspects",
    "body_shares",
  )
  return data | {key: config[key] for key in keys}


def _draw(
  config: Config,
  facets: dict[str, Any],
  everywhere: dict[str, Any],
  cone: dict[int, Any],
  sketches: dict[str, Any],
  soft: dict[str, Any],
  thin: dict[float, Any],
  bodies: dict[str, Any],
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(3, 3, figsize=(16, 13.5))
  _draw_ellipses(axes[0, 0], config)
  _draw_facets(axes[0, 1], config, facets)
  _draw_everywhere(axes[0, 2], config, everywhere)
  _draw_cone(axes[1, 0], cone)
  for ax, which in zip(axes[1, 1:], config.sketched):
    _draw_sketch(ax, config, which, sketches[which])
  _draw_threshold(axes[2, 0], config, soft)
  _draw_aspect(axes[2, 1], config, thin)
  _draw_bodies(axes[2, 2], config, bodies)
  return figure


def _draw_ellipses(ax: Axes, config: Config) -> None:
  """Where a metric is at most 1: in a hexagon with one side written often."""
  angles = np.pi / 6 + np.pi / 3 * np.arange(6)
  sides = np.column_stack([np.cos(angles), np.sin(angles)])
  corners = np.column_stack([np.cos(angles - np.pi / 6)] * 2)
  corners[:, 1] = np.sin(angles - np.pi / 6)
  corners *= 2 / 3**0.5
  ax.fill(*corners.T, fill=False, edgecolor=harness.PALETTE[5])
  ax.plot(*corners[1:3].T, color=harness.PALETTE[5], lw=6, alpha=0.5)
  times = config.shown_repeats
  a = jnp.asarray(np.repeat(sides, [1, times, 1, 1, 1, 1], axis=0))
  turn = np.linspace(0, 2 * np.pi, 100)
  circle = np.column_stack([np.cos(turn), np.sin(turn)])
  points = (0.0, 0.55), (0.0, -0.45)
  ways = (
    ("log", jnp.asarray(sides), "log, once", "-"),
    ("log", a, f"log, {times} times", "--"),
    ("lee_sidford_16", a, f"Lee-Sidford, {times} times", "-"),
  )
  for (kind, rows, label, style), color in zip(ways, harness.PALETTE):
    body = Polytope(rows, jnp.ones(len(rows)))
    for i, point in enumerate(points):
      hessian = np.asarray(
        barrier_hessian(body, jnp.array(point), **_BARRIERS[kind])
      )
      edge = circle @ np.linalg.inv(np.linalg.cholesky(hessian))
      ax.plot(
        *(edge + point).T,
        style,
        color=color,
        label=None if i else label,
      )
  ax.set(
    title="Dikin ellipsoids, the side on top written often",
    aspect="equal",
    xlim=(-1.8, 1.8),
    ylim=(-1.1, 1.75),
  )
  ax.axis("off")
  ax.legend(loc="upper center")


def _draw_facets(ax: Axes, config: Config, facets: dict[str, Any]) -> None:
  lengths = 2 * config.dim + 2 * (np.array(config.repeats) - 1)
  first, last = min(config.slope_over), max(config.slope_over)
  for kind in config.kinds:
    times = _worst(facets[kind])
    slope = _slope(config.repeats, times, config.slope_over)
    label = f"{_LABELS[kind]}: {slope:.2f}"
    ax.loglog(lengths, times, "o-", label=label)
  ax.set(
    title=f"One pair of facets repeated (cube, d = {config.dim})",
    xlabel="n, number of constraints",
    ylabel="steps for a draw, best step size",
  )
  _label_x(ax, lengths)
  ax.legend(title=f"slope in copies, {first} to {last}", loc="upper left")


def _draw_everywhere(
  ax: Axes, config: Config, everywhere: dict[str, Any]
) -> None:
  repeats = config.repeats_all
  for kind in config.kinds_all:
    times = _mean(everywhere[kind])
    label = f"{_LABELS[kind]}: slope {_slope(repeats, times, repeats):.2f}"
    ax.loglog(2 * config.dim * np.array(repeats), times, "o-", label=label)
  ax.set(
    title=f"All facets repeated (cube, d = {config.dim})",
    xlabel="n, number of constraints",
    ylabel=f"steps for a draw, step size {config.all_step_size:g}",
  )
  _label_x(ax, 2 * config.dim * np.array(repeats))
  ax.legend()


def _draw_cone(ax: Axes, cone: dict[int, Any]) -> None:
  for key, label in (
    ("by_d", r"$\alpha = 1 / (4 d)$"),
    ("by_nd", r"$\alpha = 1 / (2 n d)$"),
  ):
    ax.plot(list(cone), [p[key] for p in cone.values()], "o-", label=label)
  ax.set(
    title="Positive matrices of trace at most 1",
    xlabel="n, rows of a matrix; d = n (n + 1) / 2",
    ylabel="acceptance rate",
    ylim=(0, 1),
  )
  ax.legend()


def _draw_sketch(
  ax: Axes, config: Config, which: str, found: dict[str, Any]
) -> None:
  n, d = config.sketch_sizes[which]
  for coins, rates, style in zip(
    _COINS, found["rates"].T, ("o-", "s-"), strict=True
  ):
    label = f"{coins} coins"
    ax.semilogx(config.sketch_rows[which], rates, style, label=label)
  _label_x(ax, config.sketch_rows[which])
  ax.axhline(found["exact"], color=harness.PALETTE[2], ls="--", label="exact")
  ax.set(
    title=f"Sketched Hessian, {which} (n = {n}, d = {d})",
    xlabel="rows of the sketch",
    ylabel="acceptance rate",
    ylim=(0, 1),
  )
  ax.legend(loc="lower right")


def _draw_threshold(ax: Axes, config: Config, soft: dict[str, Any]) -> None:
  labels = ("0", r"$d \beta$", r"$d L^2$")
  for point, label in zip(soft.values(), labels, strict=True):
    sizes, found = config.soft_step_sizes, point["per_thousand"]
    ax.loglog(sizes, found, "o-", label=rf"$\eta^{{-1}}$ = {label}")
  ax.set(
    title=f"Normal, sd {config.sigma:g}, in a cube, d = {config.soft_dim}",
    xlabel="step size r",
    ylabel="draws in 1000 steps",
  )
  _label_x(ax, config.soft_step_sizes)
  ax.legend()


def _draw_aspect(ax: Axes, config: Config, thin: dict[float, Any]) -> None:
  for name, style in (("Dikin", "o-"), ("hit and run", "s-")):
    ax.loglog(list(thin), [p[name] for p in thin.values()], style, label=name)
  ax.set(
    title=f"Rotated boxes, d = {config.aspect_dim}",
    xlabel="longest edge over shortest",
    ylabel="draws in 1000 steps",
  )
  ax.legend()


def _draw_bodies(ax: Axes, config: Config, bodies: dict[str, Any]) -> None:
  steps = np.array(config.body_shares) * config.body_steps
  for name, style in zip(config.shown_bodies, ("o-", "s--")):
    for walk, color in zip(config.walks, harness.PALETTE):
      r_hat = bodies[name][walk]["r_hat"]
      label = f"{walk}, {name}"
      ax.loglog(steps, r_hat - 1, style, color=color, label=label)
  ax.set(
    title="Fluxes of a metabolic network",
    xlabel=f"steps of a chain, after {config.body_steps} that are dropped",
    ylabel="R-hat less 1, worst coordinate",
  )
  _label_x(ax, steps)
  ax.legend()


def _label_x(ax: Axes, values: Any) -> None:
  """Labels what was measured, and nothing else."""
  ax.xaxis.set_major_locator(ticker.FixedLocator(list(values)))
  ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
  ax.xaxis.set_minor_locator(ticker.NullLocator())


if __name__ == "__main__":
  harness.main(run, "dikin-walk")
