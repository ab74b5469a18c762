"""The exact law of a one-dimensional solver, on a grid."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.sampling import _steps, schedules, solvers
from jaxattn.sampling._mixture import GMM
from jaxattn.sampling._steps import Corrector, VectorField
from jaxattn.sampling.mixture_diffusion import gmm_logpdf, gmm_score

# Of the exact one-dimensional measures: points of the grid, its least half-
# width, and how many standard deviations it spans.
_POINTS, _HALF_WIDTH, _DEVIATIONS = 1401, 7.0, 7.0


class TVKL(NamedTuple):
  """What :func:`tv_kl_1d` measures.

  Attributes:
    tv: (), the total variation, in [0, 1].
    kl: (), the KL divergence of the target from what the solver makes.
    is_monotone: (), boolean: False where the steps of an ODE are so long that
      its map folds; then the other two are NaN.
  """

  tv: jax.Array
  kl: jax.Array
  is_monotone: jax.Array


@functools.partial(jax.jit, static_argnames="score_fn")
def ddpm_law(gmm: GMM, ts: jax.Array, *, score_fn: VectorField | None) -> TVKL:
  x, score = _grid(gmm), _on_grid(gmm, score_fn)

  def step(q: jax.Array, inputs: tuple[Any, ...]) -> tuple[jax.Array, None]:
    t, gain, weight, variance = inputs
    mean = gain * x + 2 * weight * score(x, t)
    return _kernel(x, mean, variance) @ q, None

  exact = schedules.ou().transfer(ts[:-1], ts[1:])
  q, _ = lax.scan(step, _normal_density(x), (ts[:-1], *exact))
  return _compare_on_grid(gmm, x, q, ts[-1])


@functools.partial(jax.jit, static_argnames="score_fn")
def dpom_law(
  gmm: GMM,
  ts: jax.Array,
  corrector: Corrector,
  *,
  score_fn: VectorField | None,
) -> TVKL:
  x, score = _grid(gmm), _on_grid(gmm, score_fn)
  h = jnp.asarray(corrector.step_size, x.dtype)

  def block(q: jax.Array, times: jax.Array) -> tuple[jax.Array, None]:
    def correct(x: jax.Array) -> jax.Array:
      return x + h * score(x, times[-1])

    # The predictor draws nothing: it is part of the first step that does.
    ends = _steps.exponential(score, x, times, schedules.ou())
    q = _kernel(x, correct(ends), 2 * h) @ q
    again = _kernel(x, correct(x), 2 * h)
    q = lax.fori_loop(1, corrector.num_steps, lambda _, q: again @ q, q)
    return q, None

  times = _steps.grouped(ts, corrector.every)
  q, _ = lax.scan(block, _normal_density(x), times)
  return _compare_on_grid(gmm, x, q, ts[-1])


@functools.partial(jax.jit, static_argnames=("method", "score_fn"))
def ode_law(
  gmm: GMM, ts: jax.Array, *, method: str, score_fn: VectorField | None
) -> TVKL:
  z = _grid(gmm)

  def ends(z: jax.Array) -> jax.Array:
    # The methods of the ODE draw nothing, and no point knows of the others.
    return solvers.sample_diffusion(
      jax.random.key(0), _on_grid(gmm, score_fn), z, ts, method=method
    )

  x, slope = jax.jvp(ends, (z,), (jnp.ones_like(z),))
  monotone = (slope > 0).all()
  log_q = jnp.log(_normal_density(z)) - jnp.log(slope)
  log_p = gmm_logpdf(gmm, x[:, None], ts[-1])
  return _compare(log_p, log_q, slope * (z[1] - z[0]), monotone)


def _on_grid(gmm: GMM, score_fn: VectorField | None) -> VectorField:
  """The score of (n,) points on the line, exact unless another is given."""

  def score(x: jax.Array, t: jax.Array) -> jax.Array:
    if score_fn is None:
      return gmm_score(gmm, x[:, None], t)[:, 0]
    return score_fn(x[:, None], t)[:, 0]

  return score


def _kernel(x: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
  """Carries densities on the grid by a Gaussian step from each point."""
  power = (x[:, None] - mean[None]) ** 2 / (-2 * variance)
  return jnp.exp(power) * ((x[1] - x[0]) / jnp.sqrt(2 * math.pi * variance))


def _compare_on_grid(
  gmm: GMM, x: jax.Array, q: jax.Array, t: jax.Array
) -> TVKL:
  log_p = gmm_logpdf(gmm, x[:, None], t)
  log_q = jnp.log(jnp.maximum(q, jnp.finfo(q.dtype).tiny))
  width = jnp.full_like(x, x[1] - x[0])
  return _compare(log_p, log_q, width, jnp.array(True))


def _compare(
  log_p: jax.Array, log_q: jax.Array, width: jax.Array, monotone: jax.Array
) -> TVKL:
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  tv = (jnp.abs(p - q) * width).sum() / 2
  kl = (p * (log_p - log_q) * width).sum()
  nan = jnp.full_like(tv, jnp.nan)
  return TVKL(
    jnp.where(monotone, tv, nan), jnp.where(monotone, kl, nan), monotone
  )


def check_resolved(
  gmm: GMM, ts: jax.Array, method: str, corrector: Corrector | None
) -> None:
  # Under jit times are traced even where the mixture is not.
  if not (_checks.is_concrete(gmm.means) and _checks.is_concrete(ts)):
    return
  spacing = jnp.diff(_grid(gmm)[:2])[0]
  b2 = schedules.ou().noise(ts[-1]) ** 2
  found = {"component": jnp.exp(-2 * ts[-1]) * gmm.eigenvalues.min() + b2}
  if method == "ddpm":
    found["step"] = schedules.ou().transfer(ts[:-1], ts[1:])[2].min()
  if corrector is not None and _checks.is_concrete(corrector.step_size):
    found["step"] = 2 * jnp.asarray(corrector.step_size)
  for what, variance in found.items():
    if variance < (2 * spacing) ** 2:
      raise ValueError(
        f"the grid of {_POINTS} points, {spacing:.3g} apart, does not resolve "
        f"a {what} of standard deviation {jnp.sqrt(variance):.3g}"
      )


def _grid(gmm: GMM) -> jax.Array:
  """Points that hold the mass of the mixture and of the noise."""
  sd = jnp.sqrt(jnp.broadcast_to(gmm.eigenvalues, gmm.means.shape))
  half = (jnp.abs(gmm.means) + _DEVIATIONS * sd).max()
  half = jnp.maximum(half, _HALF_WIDTH)
  return half * jnp.linspace(-1, 1, _POINTS, dtype=gmm.means.dtype)


def _normal_density(x: jax.Array) -> jax.Array:
  return jnp.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
