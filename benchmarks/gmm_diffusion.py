"""What does an eigenbasis save in scores of mixtures, and do solvers cost more?

Float32, 256 points at one time. The peer of a score is its definition: reverse
mode on the logsumexp of `jax.scipy.stats.multivariate_normal.logpdf`, which
factorizes each covariance at each time. That of a solver is diffrax's Euler
method with the same score on the same grid.
"""

import functools
from typing import Any

import diffrax  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from jax.scipy.stats import multivariate_normal

from benchmarks import _race
from jaxattn.sampling import (
  GMM,
  gmm_init,
  gmm_score,
  ou,
  sample_diffusion,
  time_grid,
)

_SCORE_BAR, _NEVER_SLOWER, _DIAGONAL_BAR = 4.0, 1.0, 10.0
# At most 1.05 times the seconds.
_SOLVER_BAR = 1 / 1.05
_POINTS, _TIME = 256, 0.3
# Calls in one measurement: one of them is shorter than a timer's noise.
_CALLS = 50


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = [
    score(8, 8, "full", _NEVER_SLOWER),
    score(16, 32, "full", _NEVER_SLOWER),
    score(64, 32, "full", _SCORE_BAR),
    score(16, 128, "full", _SCORE_BAR),
    score(64, 32, "diagonal", _DIAGONAL_BAR),
    score(16, 128, "diagonal", _DIAGONAL_BAR),
    score(64, 32, "isotropic", _DIAGONAL_BAR),
    score(16, 128, "isotropic", _DIAGONAL_BAR),
    solver(16, 32, 100, _SOLVER_BAR),
  ]
  _race.publish("gmm_diffusion", "Diffusion of Gaussian mixtures", rows)


def score(
  k: int, d: int, kind: str, bar: float, rounds: int = 9, calls: int = _CALLS
) -> _race.Row:
  """Ours against reverse mode on the density."""
  gmm, matrices = mixture(k, d, kind)
  x = jax.random.normal(jax.random.key(0), (_POINTS, d))
  ours = functools.partial(jax.jit(gmm_score), gmm)
  peer = functools.partial(
    jax.jit(plain_score), gmm.log_weights, gmm.means, matrices
  )
  contestants = {
    name: functools.partial(_repeated, call, x, calls)
    for name, call in {"ours": ours, "peer": peer}.items()
  }
  return _race.ratio(
    f"score, {kind} covariances, k = {k}, d = {d}: autodiff / ours",
    _race.race(contestants, rounds=rounds),
    "ours",
    "peer",
    bar,
  )


def solver(
  k: int, d: int, num_steps: int, bar: float, rounds: int = 9
) -> _race.Row:
  """Euler's method on the probability flow, the same score for both."""
  gmm, _ = mixture(k, d, "full")
  z = jax.random.normal(jax.random.key(0), (_POINTS, d))
  ts = time_grid(num_steps, t_min=0.0, t_max=5.0, schedule=ou())
  contestants = {
    "ours": functools.partial(jax.jit(our_euler), gmm, z, ts),
    "diffrax": functools.partial(jax.jit(diffrax_euler), gmm, z, ts),
  }
  return _race.ratio(
    f"Euler's method, {num_steps} steps, k = {k}, d = {d}: diffrax / ours",
    _race.race(contestants, rounds=rounds),
    "ours",
    "diffrax",
    bar,
  )


def mixture(k: int, d: int, kind: str) -> tuple[GMM, jax.Array]:
  """A mixture, and its covariances as matrices (k, d, d)."""
  rng = np.random.default_rng(0)
  means = jnp.asarray(2 * rng.normal(size=(k, d)), jnp.float32)
  root = rng.normal(size=(k, d, d))
  variances = rng.uniform(0.2, 1.5, (k, d if kind == "diagonal" else 1))
  matrices = variances[:, :, None] * np.eye(d)
  covariances: Any = variances if kind == "diagonal" else variances[:, 0]
  if kind == "full":
    covariances = matrices = root @ root.swapaxes(1, 2) / d + 0.1 * np.eye(d)
  gmm = gmm_init(np.full(k, 1 / k), means, covariances)
  return gmm, jnp.asarray(matrices, jnp.float32)


def plain_score(
  log_weights: jax.Array,
  means: jax.Array,
  matrices: jax.Array,
  x: jax.Array,
  t: float,
) -> jax.Array:
  """By reverse mode; (points, d)."""
  a, b2 = jnp.exp(-t), -jnp.expm1(-2 * t)
  at_t = a**2 * matrices + b2 * jnp.eye(x.shape[1])

  def logpdf(x: jax.Array) -> jax.Array:
    each = jax.vmap(multivariate_normal.logpdf, (None, 0, 0))
    return jax.nn.logsumexp(log_weights + each(x, a * means, at_t))

  return jax.vmap(jax.grad(logpdf))(x)


def our_euler(gmm: GMM, z: jax.Array, ts: jax.Array) -> jax.Array:
  """By `sample_diffusion`."""
  score = lambda x, t: gmm_score(gmm, x, t)  # noqa: E731
  return sample_diffusion(jax.random.key(0), score, z, ts, method="euler")


def diffrax_euler(gmm: GMM, z: jax.Array, ts: jax.Array) -> jax.Array:
  """By diffrax, on the same grid."""
  term = diffrax.ODETerm(lambda t, x, args: -x - gmm_score(gmm, x, t))
  found = diffrax.diffeqsolve(
    term,
    diffrax.Euler(),
    ts[0],
    ts[-1],
    None,
    z,
    stepsize_controller=diffrax.StepTo(ts),
    max_steps=len(ts),
  )
  assert found.ys is not None
  return found.ys[0]


def _repeated(call: Any, x: jax.Array, times: int) -> jax.Array:
  for _ in range(times):
    found = jax.block_until_ready(call(x, _TIME))
  return found


if __name__ == "__main__":
  app.run(main)
