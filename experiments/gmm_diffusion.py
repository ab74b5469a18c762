"""Diffusion of Gaussian mixtures: smooth scores, and what solvers make of them.

Five questions about arXiv 2405.16418, a paper without experiments, all asked of
mixtures whose score is known exactly:

1. Which order has each solver, in end points, in exact laws on a line, and in
   clouds of samples? Do bounds hold? Do correctors pay on a line?
2. Do the Lipschitz constant of the score and the second moment depend on the
   number of components, in any mixture and in the worst that a search finds?
   And what if covariances differ?
3. How do evaluations that reach a given total variation grow with dimension?
4. How does the divergence grow with an error of the score?
5. Digits: samplers with the exact score of a mixture fitted to them, and the
   error of a network that was trained to predict it.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments import _gaussian_chains as chains
from experiments import _score_matching, harness
from experiments import _worst_mixtures as worst_mixtures
from jaxattn.sampling import (
  GMM,
  Corrector,
  ddpm_kl_bound,
  energy_distance,
  gmm_init,
  gmm_init_kl_bound,
  gmm_sample,
  gmm_score,
  gmm_score_jacobian,
  gmm_score_lipschitz_bound,
  gmm_second_moment,
  ou,
  sample_diffusion,
  sliced_w2,
  time_grid,
  tv_kl_1d,
)
from jaxattn.scaling import fit_slope

_ORDERS = {
  "euler": 1, "ei": 1, "dpm1": 1, "heun": 2, "dpm2": 2, "dpmpp2m": 2, "dpm3": 3,
}  # fmt: skip
# Evaluations of the score in a step; of correctors, one for each step of the
# predictor.
_EVALUATIONS = {"heun": 2, "dpm2": 2, "dpm3": 3, "dpom": 2, "dpum": 2}
_CHAINS = ("ei", "ddpm", "dpom", "dpum")
# Of curves beyond those that colors tell apart.
_LINES = ("o-", "s--")
# What the histogram of a sampled law counts in.
_BINS = np.linspace(-7, 7, 121)

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Points = dict[Any, Any]


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  ends = wd.point("ends", functools.partial(ends_point, config))["x"]
  found = {
    "orders": {
      method: wd.point(
        f"orders/{method}", functools.partial(order_point, config, method, ends)
      )["error"]
      for method in harness.progress(config.order_methods, "orders")
    },
    "laws": {
      method: wd.point(
        f"laws/{method}", functools.partial(law_point, config, method)
      )
      for method in harness.progress(
        (*config.line_methods, *config.long_methods), "laws"
      )
    },
    "correctors": {
      blocks: wd.point(
        f"correctors/blocks={blocks}",
        functools.partial(corrector_point, config, blocks),
      )
      for blocks in harness.progress(config.line_blocks, "correctors")
    },
    "smooth": {
      k: wd.point(f"smooth/k={k}", functools.partial(smooth_point, config, k))
      for k in harness.progress(config.components, "smoothness")
    },
    "clouds": {
      (method, d): wd.point(
        f"clouds/{method},d={d}",
        functools.partial(cloud_point, config, method, d),
      )
      for d in config.cloud_dims
      for method in harness.progress(config.cloud_methods, f"clouds, d={d}")
    },
  }
  for name, compute in (
    ("paths", path_point), ("crossing", crossing_point),
    ("dimension", dimension_point), ("errors", error_point),
    ("digits", digits_point),
  ):  # fmt: skip
    found[name] = wd.point(name, functools.partial(compute, config))
  harness.save_figure(wd, _draw(config, found), _figure_data(found))
  return harness.finish(
    wd,
    claim=(
      "If data are a mixture of k Gaussians, then so is each law of their "
      "diffusion, with a second moment and a Lipschitz constant of the score "
      "that are bounded independently of k: solvers of the reverse equations "
      "come with concrete guarantees in total variation and KL divergence."
    ),
    source="arXiv:2405.16418, abstract",
    paper="bounds without k for each law, guarantees for solvers (no numbers)",
    checks=[
      *_order_checks(config, found["orders"]),
      *_law_checks(config, found["laws"]),
      *_corrector_checks(config, found["laws"]["ei"], found["correctors"]),
      *_path_checks(config, found["paths"]),
      *_smooth_checks(config, found["smooth"], found["crossing"]),
      *_dimension_checks(config, found["dimension"]),
      *_error_checks(config, found["errors"]),
      *_cloud_checks(config, found["clouds"]),
      *_digits_checks(config, found["digits"]),
    ],
  )


# --- mixtures ---


def line_mixture(config: Config) -> GMM:
  """On a line, in the default dtype."""
  means = jnp.array(config.line_means)[:, None]
  return gmm_init(config.line_weights, means, config.line_variances)


def plane_mixture(seed: int) -> GMM:
  """Four components of different covariances in the plane."""
  rng = np.random.default_rng(seed)
  root = rng.normal(size=(4, 2, 2))
  covariances = 0.15 * root @ root.swapaxes(1, 2) + 0.1 * np.eye(2)
  weights = rng.dirichlet(np.full(4, 3.0))
  means = 1.5 * rng.normal(size=(4, 2))
  return gmm_init(weights, jnp.asarray(means), covariances)


def cloud_mixture(k: int, d: int, seed: int) -> GMM:
  """Components with diagonal covariances, in float32."""
  rng = np.random.default_rng(seed)
  weights = rng.dirichlet(np.full(k, 3.0))
  means = jnp.asarray(1.5 * rng.normal(size=(k, d)), jnp.float32)
  return gmm_init(weights, means, rng.uniform(0.2, 1.0, (k, d)))


# --- solvers ---


def sample(
  rng: jax.Array,
  gmm: GMM,
  z: jax.Array,
  *,
  method: str,
  num_steps: int,
  span: tuple[float, float],
  batch: int,
  at_once: int | None = None,
  corrector: Corrector | None = None,
) -> jax.Array:
  """Carries noise (n, d) to the mixture, so many points at a time.

  Where a step knows nothing of those before it ``at_once`` of them are compiled
  and called again.
  """
  ts = time_grid(
    num_steps, kind="log_snr", t_min=span[0], t_max=span[1], schedule=ou()
  ).astype(z.dtype)
  forgets = method != "dpmpp2m" and corrector is None
  size = at_once if forgets and at_once is not None else num_steps
  for i in range(0, num_steps, size):
    some, key = ts[i : i + size + 1], jax.random.fold_in(rng, i)
    z = _carry(key, gmm, z, some, corrector, method=method, batch=batch)
  return z


@functools.partial(jax.jit, static_argnames=("method", "batch"))
def _carry(
  rng: jax.Array,
  gmm: GMM,
  z: jax.Array,
  ts: jax.Array,
  corrector: Corrector | None,
  *,
  method: str,
  batch: int,
) -> jax.Array:
  def some(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    rng, z = inputs
    score = lambda x, t: gmm_score(gmm, x, t)  # noqa: E731
    return sample_diffusion(
      rng, score, z, ts, method=method, corrector=corrector
    )

  chunks = z.reshape(-1, batch, z.shape[1])
  rngs = jax.random.split(rng, len(chunks))
  return lax.map(some, (rngs, chunks)).reshape(z.shape)


def corrector_of(method: str, lipschitz: float, steps: int) -> Corrector | None:
  """As many steps in a block as of the predictor before it.

  A block lasts 1 / L, or 1 / sqrt(L) of the underdamped one.
  """
  if method == "dpom":
    size = 1 / (lipschitz * steps)
    return Corrector(size, num_steps=steps, every=steps)
  if method == "dpum":
    root = lipschitz**0.5
    size = 1 / (root * steps)
    return Corrector(size, 2 * root, num_steps=steps, every=steps)
  return None


def ends_point(config: Config) -> Points:
  """(points, 2) ends of the most exact method, with many steps."""
  with jax.enable_x64(True):
    return {"x": np.array(_end(config, "dpm3", config.order_reference))}


def order_point(config: Config, method: str, want: np.ndarray) -> Points:
  """Errors of end points by number of steps."""
  with jax.enable_x64(True):
    ends = [_end(config, method, n) for n in config.order_steps]
  errors = [
    np.sqrt(((x - want) ** 2).sum(1).mean()) for x in map(np.array, ends)
  ]
  return {"error": np.array(errors)}


def _end(config: Config, method: str, num_steps: int) -> jax.Array:
  rng, n = jax.random.key(config.seed), config.order_points
  return sample(
    rng,
    plane_mixture(config.seed),
    jax.random.normal(rng, (n, 2)),
    method=method,
    num_steps=num_steps,
    span=config.order_span,
    batch=n,
    at_once=config.order_steps[0],
  )


def law_point(config: Config, method: str) -> Points:
  """Exact total variation and divergence by number of steps."""
  steps, t_min, t_max = config.long_steps, *config.long_span
  if method in config.line_methods:
    t_min, t_max = 0.0, config.t_max
    steps = config.ei_steps if method == "ei" else config.line_steps
  with jax.enable_x64(True):
    laws = [
      tv_kl_1d(
        line_mixture(config), method=method, num_steps=n, t_min=t_min,
        t_max=t_max,
      )
      for n in steps
    ]  # fmt: skip
    tv, kl = (np.array([law[i] for law in laws]) for i in (0, 1))
  return {"tv": tv, "kl": kl, "steps": np.array(steps)}


def corrector_point(config: Config, blocks: int) -> Points:
  """Total variations of "dpom", exactly by steps, and of both, sampled."""
  lipschitz, n = 1 / min(config.line_variances), config.line_samples
  with jax.enable_x64(True):
    gmm = line_mixture(config)
    laws = {
      m: tv_kl_1d(
        gmm,
        method="dpom",
        num_steps=blocks * m,
        t_max=config.t_max,
        corrector=corrector_of("dpom", lipschitz, m),
      ).tv
      for m in {*config.line_multiples, _multiple(config, blocks)}
    }
    draws = gmm_sample(jax.random.key(config.seed + 1), gmm, n)
    sampled = {
      method: _binned_tv(config, _line_samples(config, method, blocks))
      for method in ("dpom", "dpum")
    }
  return {
    "steps": blocks * np.array(config.line_multiples),
    "tv": np.array([laws[m] for m in config.line_multiples]),
    "dpom": float(laws[_multiple(config, blocks)]),
    "floor": _binned_tv(config, draws),
  } | {f"{method}, sampled": tv for method, tv in sampled.items()}


def _multiple(config: Config, blocks: int) -> int:
  """Steps in a block with the evaluations at which methods are compared."""
  return config.line_evaluations // (2 * blocks)


def _line_samples(config: Config, method: str, blocks: int) -> jax.Array:
  rngs = jax.random.split(jax.random.key(config.seed))
  m, gmm = _multiple(config, blocks), line_mixture(config)
  lipschitz = 1 / min(config.line_variances)
  ts = time_grid(blocks * m, t_min=0.0, t_max=config.t_max, schedule=ou())
  return sample_diffusion(
    rngs[0],
    functools.partial(gmm_score, gmm),
    jax.random.normal(rngs[1], (config.line_samples, 1)),
    ts,
    method=method,
    corrector=corrector_of(method, lipschitz, m),
  )


def _binned_tv(config: Config, x: jax.Array) -> float:
  """Total variation of samples from the mixture on the line, by a histogram."""
  means, spread = np.array(config.line_means), np.sqrt(config.line_variances)
  inside = stats.norm.cdf(_BINS[:, None], means, spread)
  want = np.diff(inside @ np.array(config.line_weights))
  found = np.histogram(np.asarray(x), _BINS)[0] / len(x)
  return float(np.abs(found - want).sum() / 2)


def path_point(config: Config) -> Points:
  """(variances, steps) divergences of paths on N(0, v), and their bounds."""
  kl, bound = (
    np.array(
      [[of(v, n) for n in config.path_steps] for v in config.path_variances]
    )
    for of in (
      functools.partial(_path_kl, config), functools.partial(_bound, config)
    )
  )  # fmt: skip
  return {"kl": kl, "bound": bound}


def _path_kl(config: Config, v: float, num_steps: int) -> float:
  start = 0.5 * (np.exp(-2 * config.t_max) * (v - 1))
  start -= 0.5 * np.log1p(np.exp(-2 * config.t_max) * (v - 1))
  return chains.path_kl(v, config.t_max, num_steps) + start


def _bound(config: Config, v: float, num_steps: int) -> float:
  return float(
    ddpm_kl_bound(
      lipschitz=max(1 / v, 1.0),
      dim=1,
      t_max=config.t_max,
      num_steps=num_steps,
      score_error=0.0,
      second_moment=v,
    )
  )


# --- smoothness ---


def smooth_point(config: Config, k: int) -> Points:
  """Slopes and bounds of k drawn components, and of the worst k."""
  t, n = config.smooth_time, config.smooth_points
  with jax.enable_x64(True):
    ball = {"radius": config.smooth_radius, "variance": config.smooth_variance}
    gmm = worst_mixtures.draw(config.seed, k, config.smooth_dim, **ball)
    draws = gmm_sample(jax.random.key(config.seed), gmm, n, t)
    # And between the first mean and the others.
    middle = jnp.exp(-t) * (gmm.means[:1] + gmm.means) / 2
    worst, x = worst_mixtures.steepest(
      gmm,
      t,
      radius=config.smooth_radius,
      num_steps=config.ascent_steps,
      rate=config.ascent_rate,
    )
    slopes = jax.jit(_slopes)
    found = {
      "slope": slopes(gmm, jnp.concatenate([draws, middle]), t).max(),
      "bound": gmm_score_lipschitz_bound(gmm, t),
      "worst slope": slopes(worst, x[None], t)[0],
      "worst bound": gmm_score_lipschitz_bound(worst, t),
      "moment": gmm_second_moment(gmm, t),
      "sampled moment": (draws**2).sum(1).mean(),
    }
    return {name: float(x) for name, x in found.items()}


def crossing_point(config: Config) -> Points:
  """Largest eigenvalues at (q, q), and over bounds within a radius."""
  t = config.smooth_time
  with jax.enable_x64(True):
    gmm = gmm_init([0.5, 0.5], jnp.zeros((2, 2)), [[1.0, 4.0], [4.0, 1.0]])
    x = jnp.array(config.distances)[:, None] * jnp.ones((1, 2))
    values = jnp.linalg.eigvalsh(gmm_score_jacobian(gmm, x, t))[:, -1]
    several = plane_mixture(config.seed)
    rng = jax.random.key(config.seed)
    x = 3 * jax.random.normal(rng, (config.smooth_points, 2))
    off = x[:, None] - jnp.exp(-t) * several.means[None]
    bounds = jax.jit(
      jax.vmap(lambda r: gmm_score_lipschitz_bound(several, t, radius=r))
    )(jnp.linalg.norm(off, axis=-1).max(1))
    share = (jax.jit(_slopes)(several, x, t) / bounds).max()
    return {"top": np.array(values), "share": float(share)}


def _slopes(gmm: GMM, x: jax.Array, t: float) -> jax.Array:
  """The norm of the Jacobian of the score at each point."""
  values = jnp.linalg.eigvalsh(gmm_score_jacobian(gmm, x, t))
  return jnp.abs(values).max(1)


# --- dimension ---


def dimension_point(config: Config) -> Points:
  """(chains, dimensions) evaluations that reach a total variation."""
  v, t_max = config.chain_variance, config.chain_t_max
  lipschitz = 1 / v
  # The predictor goes 1 / L between blocks.
  blocks = round(t_max * lipschitz)
  laws: dict[str, list[tuple[int, float]]] = {name: [] for name in _CHAINS}
  for m in config.chain_multiples:
    n = blocks * m
    laws["ei"].append((n, chains.ei(v, t_max, n)))
    laws["ddpm"].append((n, chains.ddpm(v, t_max, n)))
    # Blocks of the corrector last 1 / L, and 1 / sqrt(L).
    q = chains.dpom(v, t_max, blocks, m, 1 / (lipschitz * m))
    laws["dpom"].append((2 * n, q))
    root = lipschitz**0.5
    q = chains.dpum(v, t_max, blocks, m, 1 / (root * m), 2 * root)
    laws["dpum"].append((2 * n, q))
  needed = [
    [_needed(law, v, d, config.chain_tv) for d in config.dims]
    for law in laws.values()
  ]
  return {"evaluations": np.array(needed)}


def _needed(
  laws: list[tuple[int, float]], v: float, d: int, tv: float
) -> float:
  """Evaluations at which a total variation is reached; NaN if it is not."""
  nfe = np.log([n for n, _ in laws])
  found = np.log([chains.total_variation(q, v, d) for _, q in laws])
  # From the last that is too large, in logarithms.
  above = np.flatnonzero(found > np.log(tv))
  if not above.size or above[-1] + 1 == len(found):
    return np.nan
  i = above[-1]
  share = (found[i] - np.log(tv)) / (found[i] - found[i + 1])
  return float(np.exp(nfe[i] + share * (nfe[i + 1] - nfe[i])))


# --- errors of the score ---


def error_point(config: Config) -> Points:
  """Divergence of "ddpm" by the error of the score: of both signs, the mean."""
  with jax.enable_x64(True):
    gmm = line_mixture(config)

    # In one dimension a smooth error of one size is a constant.
    def kl(off: jax.Array) -> jax.Array:
      return tv_kl_1d(
        gmm,
        method="ddpm",
        num_steps=config.error_steps,
        t_max=config.t_max,
        score_fn=lambda x, t: gmm_score(gmm, x, t) + off,
      ).kl

    sizes = jnp.array([0.0, *config.score_errors])
    found = jax.jit(functools.partial(lax.map, kl))(
      jnp.concatenate([sizes, -sizes])
    )
    start = gmm_init_kl_bound(gmm, config.t_max)
  kls = np.array(found).reshape(2, -1).mean(0)
  return {"exact": kls[0], "kl": kls[1:], "start": float(start)}


# --- clouds ---


def cloud_point(config: Config, method: str, d: int) -> Points:
  """Distances to fresh draws by number of evaluations; and of two draws."""
  gmm = cloud_mixture(config.cloud_components, d, config.seed)
  rngs = jax.random.split(jax.random.key(config.seed), 5)
  rng_x, rng_y, rng_z, rng_w, rng_solver = rngs
  t_min, n = config.cloud_span[0], config.cloud_samples
  x, y = (gmm_sample(rng, gmm, n, t_min) for rng in (rng_x, rng_y))
  z = jax.random.normal(rng_z, x.shape, x.dtype)
  w2 = functools.partial(
    sliced_w2, rng_w, y, num_projections=config.num_projections
  )
  near = functools.partial(energy_distance, y[: config.cloud_pairs])
  # Of the narrowest component where the solver ends.
  lipschitz = np.exp(-2 * t_min) * float(gmm.eigenvalues.min())
  lipschitz = 1 / (lipschitz - np.expm1(-2 * t_min))

  steps = [
    nfe // _EVALUATIONS.get(method, 1) for nfe in config.cloud_evaluations
  ]

  def made(num_steps: int) -> jax.Array:
    return sample(
      rng_solver,
      gmm,
      z,
      method=method,
      num_steps=num_steps,
      span=config.cloud_span,
      batch=config.cloud_batch,
      at_once=steps[0],
      corrector=corrector_of(
        method, lipschitz, num_steps // config.cloud_blocks
      ),
    )

  found = [made(n) for n in steps]
  return {
    "w2": np.array([w2(x) for x in found]),
    "floor": float(w2(x)),
    "energy": np.array([near(x[: config.cloud_pairs]) for x in found]),
    "energy_floor": float(near(x[: config.cloud_pairs])),
  }


# --- digits ---


def digits_point(config: Config) -> Points:
  """Errors of a network by time, and distances of what is sampled by it."""
  gmm, points = _score_matching.digits_mixture(
    config.digits_dim, config.digits_components, config.seed
  )
  rngs = jax.random.split(jax.random.key(config.seed), 7)
  params, _ = _score_matching.train(
    rngs[0],
    gmm,
    width=config.network_width,
    num_steps=config.train_steps,
    batch_size=config.batch_size,
    learning_rate=config.learning_rate,
    span=config.network_span,
  )
  pairs = [
    _score_matching.errors(
      rngs[1], params, gmm, jnp.array(t), num_samples=config.error_samples
    )
    for t in config.network_times
  ]
  return {
    "oracle": np.array([p[0] for p in pairs]),
    "losses": np.array([p[1] for p in pairs]),
    **_digits_distances(config, gmm, params, points, rngs[2:]),
  }


def _digits_distances(
  config: Config,
  gmm: GMM,
  params: _score_matching.Params,
  points: np.ndarray,
  rngs: jax.Array,
) -> Points:
  """Sliced W2 to draws of the mixture, at the time where the solver ends."""
  span, n = config.network_span, config.digits_samples
  x, y = (gmm_sample(rng, gmm, n, span[0]) for rng in rngs[:2])
  z = jax.random.normal(rngs[2], x.shape, x.dtype)
  w2 = functools.partial(
    sliced_w2, rngs[3], y, num_projections=config.num_projections
  )
  ts = time_grid(
    config.digits_steps,
    kind="log_snr",
    t_min=span[0],
    t_max=span[1],
    schedule=ou(),
  )
  scores = {
    "exact": lambda x, t: gmm_score(gmm, x, t),
    "network": functools.partial(_score_matching.network_score, params),
  }
  made = {
    f"{name}, {method}": w2(
      sample_diffusion(rngs[4], score, z, ts, method=method)
    )
    for name, score in scores.items()
    for method in ("ddpm", "dpmpp2m")
  }
  made |= {"floor": w2(x), "data": w2(jnp.asarray(points, x.dtype))}
  return {f"w2, {name}": float(value) for name, value in made.items()}


# --- checks ---


def _rate(steps: Any, values: Any) -> float:
  return float(fit_slope(steps, values).slope)


def _order_checks(config: Config, orders: Points) -> list[harness.Check]:
  steps = config.order_steps[-2:]
  doubled = np.log2(steps[1] / steps[0])
  return [
    harness.Check(
      f"order of {method} in the plane, N={steps[0]} to {steps[1]}",
      np.log2(errors[-2] / errors[-1]) / doubled,
      *config.accepted[f"order_{_ORDERS[method]}"],
    )
    for method, errors in orders.items()
  ]


def _law_checks(config: Config, laws: Points) -> list[harness.Check]:
  ddpm, accepted = laws["ddpm"], config.accepted
  ranges = {
    1: accepted.tv_slope,
    2: accepted.tv_slope_2,
    3: accepted.tv_slope_3,
  }
  return [
    harness.Check(
      f"slope of the total variation of {method} on a line",
      _rate(law["steps"], law["tv"]),
      *ranges[_ORDERS.get(method, 1)],
    )
    for method, law in laws.items()
  ] + [
    harness.Check(
      f"slope of the divergence of ddpm on a line, N >= {ddpm['steps'][-3]}",
      _rate(ddpm["steps"][-3:], ddpm["kl"][-3:]),
      *accepted.kl_slope,
    )
  ]


def _corrector_checks(
  config: Config, ei: Points, correctors: Points
) -> list[harness.Check]:
  nfe = config.line_evaluations
  checks = [
    harness.Check(f"total variation on a line, {n} evaluations, ei", tv)
    for n, tv in zip(ei["steps"], ei["tv"])
    if n in (nfe // 3, 2 * nfe // 3, nfe)
  ]
  for blocks, point in correctors.items():
    how = f"{blocks} blocks"
    gap = abs(point["dpom, sampled"] - point["dpom"])
    checks += [
      harness.Check(
        f"slope of the total variation of dpom on a line, {how}",
        _rate(point["steps"], point["tv"]),
        *config.accepted.tv_slope,
      ),
      harness.Check(
        "sampled less exact total variation of dpom over that of draws, " + how,
        gap / point["floor"],
        high=config.accepted.sampled,
      ),
      *(
        harness.Check(
          f"total variation on a line, {nfe} evaluations, {how}, {name}",
          point[name],
        )
        for name in ("dpom", "dpom, sampled", "dpum, sampled")
      ),
    ]
  floor = max(point["floor"] for point in correctors.values())
  return [
    *checks, harness.Check("total variation of as many draws, binned", floor)
  ]  # fmt: skip


def _path_checks(config: Config, paths: Points) -> list[harness.Check]:
  return [
    *(
      harness.Check(
        f"slope of the divergence of paths, v={v:g}",
        _rate(config.path_steps, kl),
        *config.accepted.path_slope,
      )
      for v, kl in zip(config.path_variances, paths["kl"])
    ),
    harness.Check(
      "divergence of paths over its bound",
      (paths["kl"] / paths["bound"]).max(),
      high=1.0,
    ),
  ]


def _smooth_checks(
  config: Config, smooth: Points, crossing: Points
) -> list[harness.Check]:
  every = {
    key: np.array([p[key] for p in smooth.values()])
    for key in next(iter(smooth.values()))
  }
  several = np.array(config.components) > 1
  worst = every["worst bound"][several]
  first, *rest = config.components
  span = f"k={rest[0]} to {rest[-1]}"
  slope_bound, moment_bound = _radius_bounds(config)
  found = np.maximum(every["slope"], every["worst slope"])
  i, j = (config.distances.index(q) for q in (10.0, 100.0))
  high = 1 + 1e-9
  return [
    harness.Check(
      f"largest over least Lipschitz bound of the worst mixtures, {span}",
      worst.max() / worst.min(),
      high=config.accepted.flat,
    ),
    # The worst mixtures attain it.
    *(
      harness.Check(
        f"slope of the score over its bound, {which} mixtures, largest of k",
        (every[slope] / every[bound]).max(),
        high=high,
      )
      for which, slope, bound in (
        ("drawn", "slope", "bound"),
        ("worst", "worst slope", "worst bound"),
      )
    ),
    harness.Check(
      "slope of the score over the bound by the radius, largest of k",
      (found / slope_bound).max(),
      high=high,
    ),
    harness.Check(
      "second moment of draws over its bound by the radius, largest of k",
      (every["sampled moment"] / moment_bound).max(),
      high=1.0,
    ),
    harness.Check(
      f"worst slope found over the bound by the radius, least, {span}",
      (every["worst slope"][several] / slope_bound).min(),
    ),
    harness.Check(
      f"worst slope found over the bound by the radius, k={first}",
      every["worst slope"][0] / slope_bound,
    ),
    harness.Check(
      f"largest over least second moment of drawn mixtures, {span}",
      every["moment"][several].max() / every["moment"][several].min(),
    ),
    harness.Check(
      "slope of the score over its bound within a radius, other covariances",
      crossing["share"],
      high=1.0,
    ),
    harness.Check(
      "eigenvalue at distance 100 over that at 10, crossing covariances",
      crossing["top"][j] / crossing["top"][i],
      *config.accepted.crossing,
    ),
  ]


def _radius_bounds(config: Config) -> tuple[float, float]:
  t, ball = config.smooth_time, (config.smooth_radius, config.smooth_variance)
  return (
    worst_mixtures.slope_bound(t, *ball),
    worst_mixtures.moment_bound(t, config.smooth_dim, *ball),
  )


def _dimension_checks(config: Config, found: Points) -> list[harness.Check]:
  return [
    harness.Check(
      f"exponent of evaluations in d, {name}",
      _rate(config.dims, needed),
      high=config.accepted.exponent,
    )
    for name, needed in zip(_CHAINS, found["evaluations"])
  ] + [
    harness.Check(
      f"evaluations of {name} over those of ei, d={config.dims[-1]}",
      needed[-1] / found["evaluations"][0][-1],
    )
    for name, needed in zip(_CHAINS[1:], found["evaluations"][1:])
  ]


def _error_checks(config: Config, errors: Points) -> list[harness.Check]:
  squares = np.square(config.score_errors)
  return [
    harness.Check(
      "slope of the divergence in the squared error of the score",
      _rate(squares, errors["kl"] - errors["exact"]),
      *config.accepted.error_slope,
    ),
    harness.Check(
      "divergence over that of an exact score and T times the squared error",
      (errors["kl"] / (errors["exact"] + config.t_max * squares)).max(),
      high=1.0,
    ),
  ]


def _cloud_checks(config: Config, clouds: Points) -> list[harness.Check]:
  nfe = config.cloud_evaluations[-1]
  return [
    harness.Check(
      f"sliced W2 of {method} over that of draws, {nfe} evaluations, d={d}",
      point["w2"][-1] / point["floor"],
      high=config.accepted.cloud if method == "dpmpp2m" else np.inf,
    )
    for (method, d), point in clouds.items()
  ] + [
    harness.Check(
      f"energy distance of {method}, {nfe} evaluations, d={d}",
      point["energy"][-1],
    )
    for (method, d), point in clouds.items()
  ]


def _digits_checks(config: Config, digits: Points) -> list[harness.Check]:
  floor = digits["w2, floor"]
  named = {
    key: value / floor
    for key, value in digits.items()
    if key.startswith("w2") and key != "w2, floor"
  }
  decided = {"w2, exact, dpmpp2m": config.accepted.cloud}
  return [
    harness.Check(
      "error of the network by losses over that by the oracle",
      digits["losses"].sum() / digits["oracle"].sum(),
      *config.accepted.losses,
    ),
    *(
      harness.Check(f"squared error of the network, t={t:g}", error)
      for t, error in zip(config.network_times, digits["oracle"])
    ),
    *(
      harness.Check(
        f"digits, sliced {key}, over that of draws".replace("w2, ", "W2 of "),
        ratio,
        high=decided.get(key, np.inf),
      )
      for key, ratio in named.items()
    ),
  ]


# --- figure ---


def _figure_data(found: Points) -> Points:
  """All points, flat."""
  flat = {}
  for panel, points in found.items():
    for key, value in points.items():
      if isinstance(value, dict):
        name = key if isinstance(key, str) else str(key).strip("()")
        flat |= {f"{panel}, {name}, {part}": x for part, x in value.items()}
      else:
        flat[f"{panel}, {key}"] = value
  return flat


def _draw(config: Config, found: Points) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(3, 3, figsize=(18, 14.5))
  draw: tuple[tuple[Callable[..., None], tuple[str, ...]], ...] = (
    (_draw_orders, ("orders",)), (_draw_laws, ("laws", "correctors")),
    (_draw_paths, ("laws", "paths")), (_draw_smooth, ("smooth",)),
    (_draw_crossing, ("crossing",)), (_draw_dimension, ("dimension",)),
    (_draw_errors, ("errors",)), (_draw_clouds, ("clouds",)),
    (_draw_digits, ("digits",)),
  )  # fmt: skip
  for ax, (panel, names) in zip(axes.ravel(), draw):
    panel(ax, config, *(found[name] for name in names))
    ax.legend()
  return figure


def _draw_orders(ax: Axes, config: Config, orders: Points) -> None:
  colors: dict[int, str] = dict(enumerate(harness.PALETTE, 1))
  marks = dict(zip(orders, "os^os^o"))
  for method, errors in orders.items():
    order = _ORDERS[method]
    ax.loglog(
      config.order_steps,
      errors,
      f"{marks[method]}-",
      color=colors[order],
      label=f"{method}, order {order}",
    )
  ax.set(
    title="End points in the plane: three orders",
    xlabel="N, steps",
    ylabel="root mean square error",
  )


def _draw_laws(
  ax: Axes, config: Config, laws: Points, correctors: Points
) -> None:
  curves = {
    f"{method}, order {_ORDERS.get(method, 1)}": (points["steps"], points)
    for method, points in laws.items()
  }
  for blocks, points in correctors.items():
    # In evaluations, of which each step takes two.
    curves[f"dpom, {blocks} blocks"] = (2 * points["steps"], points)
  for i, (name, (steps, points)) in enumerate(curves.items()):
    style = _LINES[i // len(harness.PALETTE)]
    color = harness.PALETTE[i % len(harness.PALETTE)]
    ax.loglog(steps, points["tv"], style, color=color, label=name)
  # Room for the legend.
  ax.set_ylim(bottom=ax.get_ylim()[0] / 100)
  ax.set(
    title="Exact total variation on a line",
    xlabel="N, steps; of dpom, evaluations",
    ylabel="total variation",
  )


def _draw_paths(ax: Axes, config: Config, laws: Points, paths: Points) -> None:
  ddpm = laws["ddpm"]
  harness.plot_loglog(
    ax, ddpm["steps"], ddpm["kl"], label="of samples, two components"
  )
  for i, v in enumerate(config.path_variances):
    color = harness.PALETTE[i + 1]
    steps = config.path_steps
    ax.loglog(steps, paths["kl"][i], "s-", color=color,
              label=f"of paths, N(0, {v:g})")  # fmt: skip
    ax.loglog(steps, paths["bound"][i], ":", color=color,
              label=f"its bound, N(0, {v:g})")  # fmt: skip
  # Room for the legend.
  ax.set_ylim(top=300 * ax.get_ylim()[1])
  ax.set(
    title="KL divergence of ddpm: samples, paths, bounds",
    xlabel="N, steps",
    ylabel="KL divergence",
  )


def _draw_smooth(ax: Axes, config: Config, smooth: Points) -> None:
  rows = (
    ("worst bound", "bound, worst mixtures", 0, "o-"),
    ("worst slope", "slope found, worst mixtures", 1, "s--"),
    ("bound", "bound, drawn mixtures", 0, "o:"),
    ("slope", "slope found, drawn mixtures", 1, "s:"),
    ("moment", "second moment, drawn mixtures", 2, "^:"),
  )
  for key, label, i, style in rows:
    values = [p[key] for p in smooth.values()]
    ax.semilogx(
      config.components, values, style, base=2, color=harness.PALETTE[i],
      label=label,
    )  # fmt: skip
  ax.set(
    title="Equal covariances: no dependence on k",
    xlabel="k, components",
    ylabel="score slope, second moment",
    ylim=(0, 1.6 * _radius_bounds(config)[0]),
  )


def _draw_crossing(ax: Axes, config: Config, crossing: Points) -> None:
  q, top = np.array(config.distances), crossing["top"]
  ax.loglog(
    q[top > 0], top[top > 0], "o-", label="largest eigenvalue at (q, q)"
  )
  ax.loglog(q, q**2 / 4, "--", label="$q^2 / 4$")
  ax.set(
    title="Different covariances: no Lipschitz constant",
    xlabel="q, distance from the means",
    ylabel="slope of the score",
  )


def _draw_dimension(ax: Axes, config: Config, found: Points) -> None:
  for name, needed in zip(_CHAINS, found["evaluations"]):
    harness.plot_loglog(ax, config.dims, needed, label=name)
  ax.set(
    title=f"Evaluations for a total variation of {config.chain_tv:g}",
    xlabel="d, dimension",
    ylabel="evaluations of the score",
  )


def _draw_errors(ax: Axes, config: Config, errors: Points) -> None:
  squares = np.square(config.score_errors)
  harness.plot_loglog(
    ax, squares, errors["kl"] - errors["exact"], label="more divergence"
  )
  ax.loglog(
    squares, config.t_max * squares, "--", label="T times squared error"
  )
  ax.set(
    title="An error of the score on a line",
    xlabel="squared error of the score",
    ylabel="KL divergence",
  )


def _draw_clouds(ax: Axes, config: Config, clouds: Points) -> None:
  d = config.cloud_dims[-1]
  for i, method in enumerate(config.cloud_methods):
    color = harness.PALETTE[i % len(harness.PALETTE)]
    style = _LINES[i // len(harness.PALETTE)]
    w2 = clouds[method, d]["w2"]
    ax.loglog(config.cloud_evaluations, w2, style, color=color, label=method)
  floor = clouds[config.cloud_methods[0], d]["floor"]
  ax.axhline(floor, color="0.4", linestyle=":", label="two draws")
  ax.set(
    title=f"Samples of {config.cloud_components} components, d = {d}",
    xlabel="evaluations of the score",
    ylabel="sliced $W_2$",
  )


def _draw_digits(ax: Axes, config: Config, digits: Points) -> None:
  ax.loglog(config.network_times, digits["oracle"], "o-", label="by the oracle")
  ax.loglog(
    config.network_times, digits["losses"], "s--", label="by two losses"
  )
  ax.set(
    title="Digits: error of a trained score",
    xlabel="t",
    ylabel="mean squared error of the score",
  )


if __name__ == "__main__":
  harness.main(run, "gmm-diffusion")
