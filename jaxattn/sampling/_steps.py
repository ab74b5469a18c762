"""The steps of solvers: each carries a state along a grid of times."""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.sampling.schedules import Schedule

# Steps of an adaptive method before it gives up.
_MAX_STEPS = 4096
# Below this friction times step size Langevin's moments come from quadrature.
_SMALL = 1.0
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)

VectorField = Callable[[jax.Array, jax.Array], jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["step_size", "friction"],
  meta_fields=["num_steps", "every"],
)
@dataclasses.dataclass(frozen=True)
class Corrector:
  r"""The Langevin steps of methods "dpom" and "dpum".

  Attributes:
    step_size: h of a step; at most about 1 over the Lipschitz constant of the
      score (dpom), or over its root (dpum).
    friction: of "dpum", about twice the root of that constant; None for "dpom".
    num_steps: in each block, all at one time; static.
    every: steps of the predictor before each block; static.
  """

  step_size: float | jax.Array
  friction: float | jax.Array | None = None
  num_steps: int = 1
  every: int = 1


# --- vector fields ---


def _euler(v: VectorField, x: jax.Array, t: jax.Array, s: jax.Array) -> Any:
  return x + (s - t) * v(x, t)


def _heun(v: VectorField, x: jax.Array, t: jax.Array, s: jax.Array) -> Any:
  first = v(x, t)
  return x + (s - t) / 2 * (first + v(x + (s - t) * first, s))


def _midpoint(v: VectorField, x: jax.Array, t: jax.Array, s: jax.Array) -> Any:
  half = (s - t) / 2
  return x + (s - t) * v(x + half * v(x, t), t + half)


def _rk4(v: VectorField, x: jax.Array, t: jax.Array, s: jax.Array) -> Any:
  h, middle = s - t, (t + s) / 2
  k1 = v(x, t)
  k2 = v(x + h / 2 * k1, middle)
  k3 = v(x + h / 2 * k2, middle)
  k4 = v(x + h * k3, s)
  return x + h / 6 * (k1 + 2 * (k2 + k3) + k4)


ODE_STEPS = {
  "euler": _euler,
  "heun": _heun,
  "midpoint": _midpoint,
  "rk4": _rk4,
}


def tsit5(
  v: VectorField, x: jax.Array, ts: jax.Array, tol: float | jax.Array
) -> jax.Array:
  diffrax = _diffrax()
  found = diffrax.diffeqsolve(
    diffrax.ODETerm(lambda t, x, args: v(x, t)),
    diffrax.Tsit5(),
    ts[0],
    ts[1],
    None,
    x,
    stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
    max_steps=_MAX_STEPS,
    # An outcome is a value: nothing is raised out of a compiled program.
    throw=False,
  )
  solved = found.result == diffrax.RESULTS.successful
  return jnp.where(solved, found.ys[0], jnp.nan)


def _diffrax() -> types.ModuleType:
  # An extra of this package, so not imported with it.
  try:
    import diffrax
  except ModuleNotFoundError as error:
    raise ImportError(
      "method 'tsit5' needs diffrax: pip install 'jaxattn[ode]'"
    ) from error
  return diffrax


# --- scores ---


def probability_flow(score_fn: VectorField, schedule: Schedule) -> VectorField:
  def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
    drift = schedule.signal_rate(t) / schedule.signal(t)
    spread = schedule.variance_rate(t) - schedule.noise(t) ** 2 * drift
    return drift * x - spread * score_fn(x, t)

  return velocity


def ddpm(
  rng: jax.Array,
  score_fn: VectorField,
  x: jax.Array,
  ts: jax.Array,
  schedule: Schedule,
) -> jax.Array:
  def body(x: jax.Array, step: tuple[Any, ...]) -> tuple[jax.Array, None]:
    rng, t, gain, weight, variance = step
    noise = jax.random.normal(rng, x.shape, x.dtype)
    x = gain * x + 2 * weight * score_fn(x, t) + jnp.sqrt(variance) * noise
    return x, None

  rngs = jax.random.split(rng, len(ts) - 1)
  exact = schedule.transfer(ts[:-1], ts[1:])
  return lax.scan(body, x, (rngs, ts[:-1], *exact))[0]


def exponential(
  score_fn: VectorField, x: jax.Array, ts: jax.Array, schedule: Schedule
) -> jax.Array:
  def body(x: jax.Array, step: tuple[Any, ...]) -> tuple[jax.Array, None]:
    t, gain, weight = step
    return gain * x + weight * score_fn(x, t), None

  gain, weight, _ = schedule.transfer(ts[:-1], ts[1:])
  return lax.scan(body, x, (ts[:-1], gain, weight))[0]


def corrected(
  rng: jax.Array,
  score_fn: VectorField,
  x: jax.Array,
  ts: jax.Array,
  corrector: Corrector,
  schedule: Schedule,
) -> jax.Array:
  """Predictor steps in groups, a block of Langevin steps after each."""
  block = _overdamped if corrector.friction is None else _underdamped

  def body(x: jax.Array, group: tuple[Any, ...]) -> tuple[jax.Array, None]:
    rng, times = group
    x = exponential(score_fn, x, times, schedule)
    return block(rng, lambda x: score_fn(x, times[-1]), x, corrector), None

  times = grouped(ts, corrector.every)
  return lax.scan(body, x, (jax.random.split(rng, len(times)), times))[0]


def grouped(ts: jax.Array, every: int) -> jax.Array:
  """(groups, every + 1): each begins where the one before ends."""
  starts = ts[:-1].reshape(-1, every)
  ends = jnp.concatenate([starts[1:, :1], ts[None, -1:]])
  return jnp.concatenate([starts, ends], axis=1)


def _overdamped(
  rng: jax.Array,
  score: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  corrector: Corrector,
) -> jax.Array:
  h = jnp.asarray(corrector.step_size, x.dtype)

  def body(x: jax.Array, rng: jax.Array) -> tuple[jax.Array, None]:
    noise = jax.random.normal(rng, x.shape, x.dtype)
    return x + h * score(x) + jnp.sqrt(2 * h) * noise, None

  return lax.scan(body, x, jax.random.split(rng, corrector.num_steps))[0]


def _underdamped(
  rng: jax.Array,
  score: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  corrector: Corrector,
) -> jax.Array:
  h, friction = (
    jnp.asarray(z, x.dtype) for z in (corrector.step_size, corrector.friction)
  )
  keep, drift, pull, chol = _langevin_moments(h, friction)

  def body(
    state: tuple[jax.Array, jax.Array], rng: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    x, v = state
    noise = jax.random.normal(rng, (2, *x.shape), x.dtype)
    s = score(x)
    x = x + drift * v + pull * s + chol[1, 0] * noise[0] + chol[1, 1] * noise[1]
    return (x, keep * v + drift * s + chol[0, 0] * noise[0]), None

  rng, rng_v = jax.random.split(rng)
  # A fresh velocity: none of the predictor's error is carried in it.
  v = jax.random.normal(rng_v, x.shape, x.dtype)
  rngs = jax.random.split(rng, corrector.num_steps)
  return lax.scan(body, (x, v), rngs)[0][0]


def _langevin_moments(
  h: jax.Array, friction: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Of the exact step of underdamped Langevin under a constant force.

  Returns e, A and (h - A) / friction: v' = e v + A s and x' = x + A v +
  (h - A) / friction s, and the (2, 2) Cholesky factor of the noise of (v, x).
  """
  u = friction * h
  lost, lost_twice = -jnp.expm1(-u), -jnp.expm1(-2 * u)
  # Integrals of 1 - e^-r and its square up to u: the closed forms cancel.
  at = jnp.asarray((_NODES + 1) / 2, u.dtype) * u
  weights = jnp.asarray(_WEIGHTS / 2, u.dtype)
  rest = -jnp.expm1(-at)
  first = jnp.where(u < _SMALL, u * (weights @ rest), u - lost)
  second = jnp.where(
    u < _SMALL, u * (weights @ rest**2), u - 2 * lost + lost_twice / 2
  )
  var_x, cov = 2 * second / friction**2, lost**2 / friction
  sd_v = jnp.sqrt(lost_twice)
  corner = jnp.sqrt(var_x - cov**2 / lost_twice)
  chol = jnp.array([[sd_v, jnp.zeros_like(u)], [cov / sd_v, corner]])
  return 1 - lost, lost / friction, first / friction**2, chol


# --- steps in the log-SNR ---


def dpm(
  step: Any,
  score_fn: VectorField,
  x: jax.Array,
  ts: jax.Array,
  schedule: Schedule,
) -> jax.Array:
  def noise(x: jax.Array, t: jax.Array) -> jax.Array:
    return -schedule.noise(t) * score_fn(x, t)

  def body(
    x: jax.Array, pair: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    return step(noise, x, *pair, schedule), None

  return lax.scan(body, x, (ts[:-1], ts[1:]))[0]


def _dpm1(
  noise: VectorField, x: jax.Array, t: jax.Array, s: jax.Array, path: Schedule
) -> jax.Array:
  return _dpm_move(noise(x, t), x, t, s, path)


def _dpm2(
  noise: VectorField, x: jax.Array, t: jax.Array, s: jax.Array, path: Schedule
) -> jax.Array:
  middle = path.time_at((path.log_snr(t) + path.log_snr(s)) / 2)
  half = _dpm_move(noise(x, t), x, t, middle, path)
  return _dpm_move(noise(half, middle), x, t, s, path)


def _dpm3(
  noise: VectorField, x: jax.Array, t: jax.Array, s: jax.Array, path: Schedule
) -> jax.Array:
  lam = path.log_snr(t)
  eta = path.log_snr(s) - lam
  t1, t2 = path.time_at(lam + eta / 3), path.time_at(lam + 2 * eta / 3)
  eps = noise(x, t)
  first = noise(_dpm_move(eps, x, t, t1, path), t1) - eps
  # The slope of eps in lambda, from thirds: weights 2 and 3/2.
  second = _dpm_move(eps, x, t, t2, path)
  second = second - 2 * path.noise(t2) * _phi(2 * eta / 3) * first
  second = noise(second, t2) - eps
  x = _dpm_move(eps, x, t, s, path)
  return x - 1.5 * path.noise(s) * _phi(eta) * second


DPM_STEPS = {"dpm1": _dpm1, "dpm2": _dpm2, "dpm3": _dpm3}


def _dpm_move(
  eps: jax.Array, x: jax.Array, t: jax.Array, s: jax.Array, path: Schedule
) -> jax.Array:
  """The exact step for a constant prediction of the noise."""
  eta = path.log_snr(s) - path.log_snr(t)
  gain = path.signal(s) / path.signal(t)
  return gain * x - path.noise(s) * jnp.expm1(eta) * eps


def _phi(eta: jax.Array) -> jax.Array:
  return jnp.expm1(eta) / eta - 1


def dpmpp2m(
  score_fn: VectorField, x: jax.Array, ts: jax.Array, schedule: Schedule
) -> jax.Array:
  a, b = schedule.signal(ts), schedule.noise(ts)
  eta = jnp.diff(schedule.log_snr(ts))
  # 1 / (2 rho), where rho is the step before over this one; 0 at the first.
  share = jnp.concatenate([jnp.zeros_like(eta[:1]), eta[1:] / eta[:-1] / 2])

  def body(
    state: tuple[jax.Array, jax.Array], step: tuple[Any, ...]
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    x, before = state
    t, a, b, gain, weight, share = step
    denoised = (x + b**2 * score_fn(x, t)) / a
    extrapolated = (1 + share) * denoised - share * before
    return (gain * x + weight * extrapolated, denoised), None

  steps = (ts[:-1], a[:-1], b[:-1], b[1:] / b[:-1], -a[1:] * jnp.expm1(-eta))
  return lax.scan(body, (x, jnp.zeros_like(x)), (*steps, share))[0][0]
