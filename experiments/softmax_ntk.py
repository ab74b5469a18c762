"""Two-layer softmax networks, their kernels, and a score that they learn.

Five questions about arXiv 2405.03251, a paper without experiments:

1. How does training come near to that of the limit kernel as the width grows,
   how far do weights move, how much does the kernel change?
2. What does the softmax do to the conditioning of the kernel, against the
   exponential without a normalizer and against ReLU?
3. How does the kernel react to perturbed weights, and does the bound hold?
4. A denoiser of a mixture whose score is known: error by pairs, against
   interpolation, at finite width, and samples drawn with it.
5. The same kernel on images of digits.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.linalg import hadamard

from experiments import harness
from jaxattn import ntk
from jaxattn.data import load_digits
from jaxattn.ntk import softmax
from jaxattn.sampling import (
  GMM,
  energy_distance,
  gmm_denoise,
  gmm_init,
  gmm_sample,
  ou,
  path_sample,
  sample_diffusion,
  score_from_denoiser,
  time_grid,
)
from jaxattn.scaling import fit_slope

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Point = dict[str, Any]
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]

_SCHEDULE = ou(0.5)
_LAZY = ("fn_gap", "move_rms", "kernel_change")
_MORE_LAZY = ("kernel_limit_gap", "move_max", "alignment")


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  lazy = sweep_lazy(wd)
  limits = wd.point("limits", functools.partial(limits_point, config))
  moves = wd.point("moves", functools.partial(moves_point, config))
  score = _stacked(
    [
      wd.point(f"score/n={n}", functools.partial(score_point, config, n))
      for n in harness.progress(config.num_pairs, "pairs")
    ]
  )
  networks = _stacked(
    [
      wd.point(f"network/m={m}", functools.partial(network_point, config, m))
      for m in harness.progress(config.network_widths, "networks")
    ]
  )
  more = wd.point("more", functools.partial(more_point, config))
  digits = wd.point("digits", functools.partial(digits_point, config))
  harness.use_style()
  figure = _draw(config, lazy, limits, moves, score, more, digits)
  harness.save_figure(
    wd,
    figure,
    {
      f"{part}, {name}": values
      for part, point in (
        ("lazy", lazy),
        ("limits", limits),
        ("moves", moves),
        ("score", score),
        ("networks", networks),
        ("more", more),
        ("digits", digits),
      )
      for name, values in point.items()
    },
  )
  return harness.finish(
    wd,
    claim=(
      "Normalized by a softmax, a two-layer network has a tangent kernel that "
      "hardly reacts to moving weights: of enough width it trains like its "
      "kernel, at a linear rate, and learns the score of a diffusion."
    ),
    source="arXiv:2405.03251, abstract",
    paper=(
      "width m = Omega(lambda^-2 n^(2+o(1)) exp(O(d))) is enough (no numbers, "
      "no experiments)"
    ),
    checks=[
      *_lazy_checks(config, lazy),
      *_limit_checks(config, limits),
      *_move_checks(config, moves),
      *_score_checks(config, score, more),
      *_network_checks(config, networks),
      harness.Check("accuracy on digits", digits["accuracy"]),
    ],
  )


def _stacked(points: list[Point]) -> Point:
  return {name: np.stack([p[name] for p in points]) for name in points[0]}


# --- training against the limit ---


def unit_vectors(seed: int, n: int, dim: int) -> jax.Array:
  """(n, dim) random unit vectors."""
  x = np.random.default_rng(seed).standard_normal((n, dim))
  return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def sweep_lazy(wd: harness.Workdir) -> Point:
  """Metrics (widths, seeds) of networks."""
  config: Config = wd.config
  with jax.enable_x64(True):
    return harness.sweep_widths(
      wd,
      "lazy",
      jax.random.key(config.seed),
      functools.partial(lazy_metrics, config),
      config.widths,
      config.num_seeds,
      args=lazy_prediction(config),
    )


def lazy_data(config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Inputs, inputs of a test, and targets."""
  n = config.lazy_data
  x = unit_vectors(config.seed, n, config.dim)
  x_test = unit_vectors(config.seed + 1, config.num_test, config.dim)
  rng = np.random.default_rng(config.seed + 2)
  return x, x_test, jnp.asarray(rng.standard_normal((n, config.num_outputs)))


def lazy_prediction(config: Config) -> tuple[jax.Array, jax.Array]:
  """The rate, and the outputs that the limit kernel predicts at it."""
  x, x_test, y = lazy_data(config)
  factor = ntk.kernel_factor(ntk.limit_kernel(x))
  rate = 1 / factor.eigenvalues[-1]
  k_test = ntk.limit_kernel(x_test, x)
  return rate, ntk.descent_test(factor, k_test, y, rate, config.num_steps)


def lazy_metrics(
  config: Config,
  rng: jax.Array,
  width: int,
  rate: jax.Array,
  predicted: jax.Array,
) -> Point:
  """Trains one network, and compares it with the limit kernel."""
  x, x_test, y = lazy_data(config)
  params = softmax.init(
    rng, width, config.dim, config.num_outputs, dtype="float64"
  )
  trained, _ = ntk.train_two_layer(
    params, x, y, learning_rate=rate, num_steps=config.num_steps
  )
  kernel = functools.partial(softmax.ntk, chunk_size=config.kernel_chunk)
  metrics = ntk.lazy_metrics(
    kernel(params, x),
    kernel(trained, x),
    params.hidden,
    trained.hidden,
    kernel_limit=ntk.limit_kernel(x),
    outputs=softmax.apply(trained, x_test),
    outputs_predicted=predicted,
    targets=y,
  )
  return {name: getattr(metrics, name) for name in (*_LAZY, *_MORE_LAZY)}


def _lazy_checks(config: Config, lazy: Point) -> list[harness.Check]:
  accepted = {
    "fn_gap": config.accepted.fn_slope,
    "move_rms": config.accepted.move_slope,
    "kernel_change": config.accepted.kernel_slope,
  }
  labels = {
    "fn_gap": "slope of the distance from the limit's outputs",
    "move_rms": "slope of what weights move",
    "kernel_change": "slope of the change of the kernel",
  }
  medians = {name: np.median(values, axis=1) for name, values in lazy.items()}
  widest = config.widths[-1]
  change = lazy["kernel_change"][-1]
  return [
    *(
      harness.Check(
        labels[name],
        fit_slope(config.widths, medians[name]).slope,
        *accepted[name],
      )
      for name in _LAZY
    ),
    harness.Check(
      f"slope of the change of the kernel from m={config.widths[1]}",
      fit_slope(config.widths[1:], medians["kernel_change"][1:]).slope,
    ),
    harness.Check(
      f"change of the kernel, most over median, m={widest}",
      change.max() / np.median(change),
    ),
    *(
      harness.Check(f"{label}, m={widest}, median", medians[name][-1])
      for name, label in zip(
        _MORE_LAZY,
        (
          "distance of the kernel from its limit",
          "most that a neuron moves",
          "alignment of the kernel with the targets",
        ),
      )
    ),
  ]


# --- conditioning ---


def limits_point(config: Config) -> Point:
  """Condition numbers and steps (draws,) by activation."""
  found: dict[str, list[float]] = {}
  with jax.enable_x64(True):
    for draw in range(config.num_draws):
      rng = np.random.default_rng(1000 + config.seed + draw)
      low, high = config.norms
      norms = rng.uniform(low, high, config.num_data)
      x = unit_vectors(2000 + config.seed + draw, config.num_data, config.dim)
      y = rng.standard_normal(config.num_data)
      for activation in softmax.ACTIVATIONS:
        kernel = ntk.limit_kernel(
          x * jnp.asarray(norms)[:, None], activation=activation
        )
        values, vectors = np.linalg.eigh(kernel)
        condition = values[-1] / values[0]
        steps = steps_until(values, vectors.T @ y, config.target_loss)
        found.setdefault(f"condition_{activation}", []).append(condition)
        found.setdefault(f"steps_{activation}", []).append(steps)
  return {name: np.array(values) for name, values in found.items()}


def steps_until(values: np.ndarray, modes: np.ndarray, target: float) -> float:
  """Steps of descent at 1 / lambda_max until the loss is below the target.

  Infinite if modes that do not shrink hold more than the target.
  """
  factors = 1 - values / values[-1]
  if (modes[factors >= 1] ** 2).sum() / 2 > target:
    return float("inf")

  def loss(t: float) -> float:
    return float(((modes * factors**t) ** 2).sum() / 2)

  high = 1
  while loss(high) > target:
    high *= 2
  low = high // 2
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if loss(middle) > target else (low, middle)
  return float(high)


def _limit_checks(config: Config, limits: Point) -> list[harness.Check]:
  checks = []
  for what in ("condition", "steps"):
    ours, plain = limits[f"{what}_softmax"], limits[f"{what}_exp"]
    label = {"condition": "condition number", "steps": "number of steps"}[what]
    checks += [
      harness.Check(
        f"draws in which the {label} of softmax is not above that of exp",
        np.mean(ours <= plain),
        config.accepted.not_worse,
      ),
      harness.Check(
        f"{label}, exp over softmax, median", np.median(plain / ours)
      ),
      harness.Check(
        f"{label}, ReLU over softmax, median",
        np.median(limits[f"{what}_relu"] / ours),
      ),
    ]
  return checks


# --- perturbations ---


def moves_point(config: Config) -> Point:
  """Relative changes (activations, kinds, radii), and shares of the bound."""
  with jax.enable_x64(True):
    x = unit_vectors(config.seed, config.num_data, config.dim)
    rngs = jax.random.split(jax.random.key(config.seed), config.num_directions)
    params = softmax.init(
      rngs[0], config.perturbed_width, config.dim, 1, dtype="float64"
    )
    radii = jnp.array(config.radii)
    profile = functools.partial(
      ntk.perturbation_profile, kinds=("random", "outward")
    )
    changes = jnp.stack([profile(rng, params, x, radii) for rng in rngs])
    change = jnp.sqrt(jnp.square(changes).mean(0))
    size = jnp.linalg.norm(softmax.ntk(params, x))
    bounds = jnp.stack(
      [ntk.perturbation_bound(params, x, radius) for radius in radii]
    )
    worst = changes[:, 0].max((0, 1)) * size / bounds
    common = ntk.perturbation_profile(
      rngs[0],
      params,
      x,
      radii[-1:],
      kinds=("common",),
      activations=("softmax", "exp"),
    )
    adversarial = adversarial_shares(config)
  return {
    "change": np.asarray(change),
    "of_bound": np.asarray(worst),
    "common": np.asarray(common[:, 0, 0]),
    "adversarial": np.asarray(adversarial),
  }


def adversarial_shares(config: Config) -> jax.Array:
  """Shares (radii,) of the bound that ascent on the change comes to."""
  x = unit_vectors(config.seed, config.adversarial_data, config.dim)
  rngs = jax.random.split(jax.random.key(config.seed + 1))
  params = softmax.init(
    rngs[0], config.adversarial_width, config.dim, 1, dtype="float64"
  )
  radii = jnp.array(config.adversarial_radii)
  change = ntk.perturbation_profile(
    rngs[1],
    params,
    x,
    radii,
    kinds=("adversarial",),
    activations=("softmax",),
  )[0, 0]
  size = jnp.linalg.norm(softmax.ntk(params, x))
  bounds = [ntk.perturbation_bound(params, x, radius) for radius in radii]
  return change * size / jnp.stack(bounds)


def _small(config: Config) -> np.ndarray:
  return np.array(config.radii) <= 0.1


def _move_checks(config: Config, moves: Point) -> list[harness.Check]:
  accepted, small = config.accepted, _small(config)
  small = small if small.sum() >= 3 else np.ones_like(small)
  radii = np.array(config.radii)[small]
  slopes = {
    name: fit_slope(radii, moves["change"][i, 0][small]).slope
    for i, name in enumerate(softmax.ACTIVATIONS)
  }
  bounds = {
    "softmax": accepted.lipschitz_slope,
    "exp": (-np.inf, np.inf),
    "relu": (-np.inf, accepted.relu_slope),
  }
  random, outward = moves["change"][:, :, -1].T
  far = f"by {config.radii[-1]:g}"
  return [
    *(
      harness.Check(
        f"slope of the kernel's change in the radius, {name}",
        slope,
        *bounds[name],
      )
      for name, slope in slopes.items()
    ),
    harness.Check(
      "largest share of the bound",
      max(moves["of_bound"].max(), moves["adversarial"].max()),
      high=accepted.bound,
    ),
    *(
      harness.Check(f"share of the bound, adversarial, by {radius:g}", share)
      for radius, share in zip(config.adversarial_radii, moves["adversarial"])
    ),
    harness.Check(
      f"change {far} outward, softmax over exp", outward[0] / outward[1]
    ),
    harness.Check(
      f"change {far} at random, softmax over ReLU", random[0] / random[2]
    ),
    *(
      harness.Check(f"change {far} of all weights alike, {name}", value)
      for name, value in zip(("softmax", "exp"), moves["common"])
    ),
  ]


# --- a score ---


def mixture(config: Config) -> GMM:
  """Modes at vectors of signs: in the plane all four."""
  rows = hadamard(config.mixture_dim).astype(float)
  means = jnp.asarray(np.concatenate((rows, -rows[::-1])))
  k = len(means)
  variance = config.mixture_std**2
  return gmm_init(jnp.full(k, 1 / k), means, jnp.full(k, variance))


def pairs(
  config: Config, rng: jax.Array, n: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Blurred data, their times, and the data."""
  rngs = jax.random.split(rng, 3)
  x0 = gmm_sample(rngs[0], mixture(config), n, schedule=_SCHEDULE)
  t = jax.random.uniform(
    rngs[1], (n,), minval=config.t_min, maxval=config.t_max
  )
  x_t, _ = path_sample(rngs[2], x0, t, schedule=_SCHEDULE)
  return x_t, t, x0


def oracle(config: Config, x: jax.Array, t: jax.Array) -> jax.Array:
  """The denoiser that there is to learn, of (n, d) points at times (n,)."""
  gmm = mixture(config)

  def one(x: jax.Array, t: jax.Array) -> jax.Array:
    return gmm_denoise(gmm, x[None], t, schedule=_SCHEDULE)[0]

  return jax.vmap(one)(x, t)


def denoiser_error(config: Config, denoise: Denoiser) -> float:
  """Mean squared distance from the oracle."""
  rng = jax.random.key(10_000 + config.seed)
  x, t, _ = pairs(config, rng, config.num_oracle)
  gap = denoise(x, t) - oracle(config, x, t)
  return float(jnp.square(gap).mean())


def sample_distance(config: Config, denoise: Denoiser) -> tuple[float, Any]:
  """Energy distance of samples from fresh data, and the samples."""
  rngs = jax.random.split(jax.random.key(20_000 + config.seed), 2)
  noise = jax.random.normal(rngs[0], (config.num_samples, config.mixture_dim))
  fresh = gmm_sample(rngs[1], mixture(config), config.num_samples)
  times = time_grid(
    config.sampler_steps,
    kind="log",
    t_min=config.t_min,
    t_max=config.t_max,
    schedule=_SCHEDULE,
  )

  def score(x: jax.Array, t: jax.Array) -> jax.Array:
    return score_from_denoiser(x, t, denoise(x, t), schedule=_SCHEDULE)

  x = sample_diffusion(
    rngs[0], score, noise, times, method="heun", schedule=_SCHEDULE
  )
  return float(energy_distance(x, fresh)), np.asarray(x)


def fitted(
  config: Config, n: int, seed: int, **options: Any
) -> ntk.ScoreKernel:
  """A denoiser by n pairs."""
  rngs = jax.random.split(jax.random.key(config.seed + 100 * seed), 2)
  return ntk.fit_score_kernel(
    *pairs(config, rngs[0], n),
    val=pairs(config, rngs[1], config.num_val),
    t_max=config.t_max,
    **options,
  )


def score_point(config: Config, n: int) -> Point:
  """Errors (seeds,) of denoisers by n pairs; of the first what it draws."""
  with jax.enable_x64(True):
    fits = [fitted(config, n, seed) for seed in range(config.pair_seeds)]
    errors = [denoiser_error(config, fit.denoise) for fit in fits]
    last = fitted(config, n, 0, times=fits[0].times[-1:])
    distance, samples = sample_distance(config, fits[0].denoise)
    return {
      "error": np.array(errors),
      "interpolating": denoiser_error(config, last.denoise),
      "distance": distance,
      "samples": samples,
    }


def more_point(config: Config) -> Point:
  """Interpolation to the end, samples of the exact denoiser, its variance."""
  with jax.enable_x64(True):
    n = config.interpolated_pairs
    forever = 1e6 * fitted(config, n, 0).times[-1:]
    interpolating = fitted(config, n, 0, times=forever)
    exact, _ = sample_distance(config, functools.partial(exact_denoise, config))
    x, t, _ = oracle_pairs(config)
    return {
      "forever": denoiser_error(config, interpolating.denoise),
      "distance_oracle": exact,
      "variance": float(oracle(config, x, t).var(0).mean()),
    }


def oracle_pairs(config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Pairs on which networks and the exact denoiser are compared."""
  rng = jax.random.key(30_000 + config.seed)
  return pairs(config, rng, config.num_oracle)


def exact_denoise(config: Config, x: jax.Array, t: jax.Array) -> jax.Array:
  """The oracle at one time."""
  return gmm_denoise(mixture(config), x, t, schedule=_SCHEDULE)


def network_point(config: Config, width: int) -> Point:
  """Networks (seeds,) of one width beside the kernel on the same pairs."""
  with jax.enable_x64(True):
    kernel = fitted(config, config.network_pairs, 0)
    x, t, _ = oracle_pairs(config)
    want, exact = kernel.denoise(x, t), oracle(config, x, t)
    found: dict[str, list[float]] = {}
    for seed in range(config.network_seeds):
      rng = jax.random.key(config.seed + 1 + seed)
      network, ratio = trained_network(config, rng, kernel, width)
      out = network.denoise(x, t)
      errors = [jnp.square(f - exact).mean() for f in (out, want)]
      gap = jnp.linalg.norm(out - want) / jnp.linalg.norm(want)
      fell = (jnp.diff(network.history.losses) < 0).all()
      for name, value in (
        ("gap", gap),
        ("error", errors[0] / errors[1]),
        ("fell", fell),
        ("largest", ratio),
      ):
        found.setdefault(name, []).append(float(value))
  return {name: np.array(values) for name, values in found.items()}


def trained_network(
  config: Config, rng: jax.Array, kernel: ntk.ScoreKernel, width: int
) -> tuple[ntk.ScoreNetwork, float]:
  """A network at the kernel's stopping time, and how much steeper it is.

  The largest eigenvalue of its own kernel may be several times that of the
  limit, and the rate must be stable for both.
  """
  data = pairs(
    config,
    jax.random.split(jax.random.key(config.seed), 2)[0],
    config.network_pairs,
  )
  dim, num_outputs = kernel.centers.shape[1], config.mixture_dim
  start = softmax.init(rng, width, dim, num_outputs, dtype="float64")
  size = config.network_pairs * num_outputs
  matrix = softmax.ntk(start, kernel.centers).reshape(size, size)
  limit = 1 / float(kernel.times[0])
  largest = float(jnp.linalg.eigvalsh(matrix)[-1])
  rate = 0.5 / max(largest, limit)
  time = float(kernel.times[kernel.time_index])
  network = ntk.fit_score_network(
    rng,
    *data,
    width=width,
    num_steps=max(1, round(time / rate)),
    learning_rate=rate,
    t_max=config.t_max,
  )
  return network, largest / limit


def _score_checks(
  config: Config, score: Point, more: Point
) -> list[harness.Check]:
  accepted = config.accepted
  at = config.num_pairs.index(config.interpolated_pairs)
  stopped = score["error"][at, 0]
  errors = np.exp(np.log(score["error"]).mean(1))
  return [
    harness.Check(
      "slope of the denoiser's error in pairs",
      fit_slope(config.num_pairs, errors).slope,
      *accepted.score_slope,
    ),
    harness.Check(
      f"error of the denoiser, n={config.num_pairs[-1]}", errors[-1]
    ),
    harness.Check("variance of the denoiser", more["variance"]),
    harness.Check(
      f"error over that of interpolation, n={config.interpolated_pairs}",
      stopped / score["interpolating"][at],
      high=accepted.over_interpolation,
    ),
    harness.Check(
      f"the same, 10^6 times as long, n={config.interpolated_pairs}",
      stopped / more["forever"],
    ),
    *(
      harness.Check(f"error of interpolation, n={n}", error)
      for n, error in zip(config.num_pairs, score["interpolating"])
    ),
    *(
      harness.Check(f"energy distance of samples, n={n}", distance)
      for n, distance in zip(config.num_pairs, score["distance"])
    ),
    harness.Check(
      "energy distance with the exact denoiser", more["distance_oracle"]
    ),
  ]


def _network_checks(config: Config, networks: Point) -> list[harness.Check]:
  gaps = np.median(networks["gap"], axis=1)
  decides = config.network_width
  at = config.network_widths.index(decides)
  return [
    *(
      harness.Check(
        f"network of width {m} off the kernel's outputs",
        gap,
        high=config.accepted.network_gap if m == decides else np.inf,
      )
      for m, gap in zip(config.network_widths, gaps)
    ),
    harness.Check(
      f"error of the network over the kernel's, m={decides}",
      np.median(networks["error"][at]),
    ),
    harness.Check(
      f"largest eigenvalue over the limit's, m={decides}, most",
      networks["largest"][at].max(),
    ),
    harness.Check(
      "networks whose losses fell in every step", networks["fell"].mean()
    ),
  ]


# --- digits ---


def digits_point(config: Config) -> Point:
  """Accuracies on validation by stopping time, and on the test at the best."""
  pixels, labels = load_digits()
  order = np.random.default_rng(config.seed).permutation(len(pixels))
  pixels, labels = pixels[order], labels[order]
  cuts = np.cumsum((config.digits_train, config.digits_val))
  with jax.enable_x64(True):
    x = jnp.asarray(pixels, jnp.float64)
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    train, val, test = jnp.split(x, cuts)
    targets = jax.nn.one_hot(labels[: cuts[0]], 10, dtype=x.dtype) - 0.1
    factor = ntk.kernel_factor(ntk.limit_kernel(train))
    times = jnp.logspace(0, 6, 25) / factor.eigenvalues[-1]

    def accuracy(data: jax.Array, expected: np.ndarray) -> np.ndarray:
      kernel = ntk.limit_kernel(data, train)
      out = ntk.flow_test(factor, kernel, targets, times)
      return np.asarray((out.argmax(2) == expected[None]).mean(1))

    by_time = accuracy(val, labels[cuts[0] : cuts[1]])
    best = int(by_time.argmax())
    tested = accuracy(test, labels[cuts[1] :])
  return {
    "by_time": by_time,
    "times": np.asarray(times * factor.eigenvalues[-1]),
    "accuracy": tested[best],
  }


# --- figure ---


def _draw(
  config: Config,
  lazy: Point,
  limits: Point,
  moves: Point,
  score: Point,
  more: Point,
  digits: Point,
) -> Figure:
  figure, axes = plt.subplots(2, 3, figsize=(16.5, 9.6))
  _draw_lazy(axes[0, 0], config, lazy)
  _draw_limits(axes[0, 1], limits)
  _draw_moves(axes[0, 2], config, moves)
  _draw_score(axes[1, 0], config, score, more)
  _draw_samples(axes[1, 1], config, score)
  _draw_digits(axes[1, 2], digits)
  return figure


def _draw_lazy(ax: Axes, config: Config, lazy: Point) -> None:
  labels = {
    "fn_gap": "outputs off the limit's",
    "move_rms": "weights moved",
    "kernel_change": "kernel changed",
  }
  for (name, label), color in zip(labels.items(), harness.PALETTE):
    medians = np.median(lazy[name], axis=1)
    harness.plot_loglog(ax, config.widths, medians, label=label)
    ends = lazy[name].min(1), lazy[name].max(1)
    ax.fill_between(config.widths, *ends, color=color, alpha=0.2, lw=0)
  low, high = ax.get_ylim()
  ax.set(
    title="Wider networks train like their limit",
    xlabel="m, neurons",
    ylabel="median over seeds, least and most",
    ylim=(low, high * 30),
  )
  ax.legend(loc="upper right")


def _draw_limits(ax: Axes, limits: Point) -> None:
  ours = limits["condition_softmax"]
  for other, color in zip(("exp", "relu"), harness.PALETTE[1:]):
    theirs = limits[f"condition_{other}"]
    ax.loglog(ours, theirs, "o", color=color, label=other)
  ends = [ours.min() / 2, ours.max() * 2]
  ax.loglog(ends, ends, "--", color="black", lw=1, label="equal")
  ax.set(
    title="Condition of limit kernels, unequal norms",
    xlabel="softmax",
    ylabel="another activation",
  )
  ax.legend()


def _draw_moves(ax: Axes, config: Config, moves: Point) -> None:
  for i, (name, color) in enumerate(zip(softmax.ACTIVATIONS, harness.PALETTE)):
    for kind, style in ((0, "o-"), (1, "s--")):
      label = f"{name}, {('random', 'outward')[kind]}"
      change = moves["change"][i, kind]
      ax.loglog(config.radii, change, style, color=color, label=label)
  ax.set(
    title="Kernels of perturbed weights",
    xlabel="distance that each weight moves",
    ylabel="relative change of the kernel",
  )
  ax.legend()


def _draw_score(ax: Axes, config: Config, score: Point, more: Point) -> None:
  errors = np.exp(np.log(score["error"]).mean(1))
  harness.plot_loglog(ax, config.num_pairs, errors, label="stopped in time")
  ax.loglog(
    config.num_pairs,
    score["interpolating"],
    "s--",
    color=harness.PALETTE[1],
    label="interpolating",
  )
  ax.axhline(more["variance"], color="black", lw=1, ls="--", label="a constant")
  ax.set(
    title="Error of a learned denoiser",
    xlabel="pairs",
    ylabel="mean squared distance from the exact one",
  )
  ax.set_ylim(top=3 * more["variance"])
  ax.legend(loc="upper right")


def _draw_samples(ax: Axes, config: Config, score: Point) -> None:
  x = score["samples"][config.num_pairs.index(config.interpolated_pairs)]
  ax.plot(x[:, 0], x[:, 1], ".", markersize=3, alpha=0.5)
  ax.set(
    title=f"Samples with it, {config.interpolated_pairs} pairs",
    xlabel="first coordinate",
    ylabel="second coordinate",
    xlim=(-2.2, 2.2),
    ylim=(-2.2, 2.2),
  )
  ax.set_aspect("equal")


def _draw_digits(ax: Axes, digits: Point) -> None:
  ax.semilogx(digits["times"], 100 * digits["by_time"], "o-")
  ax.set(
    title="Digits, by stopping time",
    xlabel="time times $\\lambda_{max}$",
    ylabel="accuracy on validation images, %",
  )


if __name__ == "__main__":
  harness.main(run, "softmax-ntk")
