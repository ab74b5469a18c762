"""How far a sampled Hessian is off, and how fast steps converge."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import newton
from jaxattn.numerics import spectral_bounds
from jaxattn.sketch import leverage_scores


def leverage(h):
  """Probabilities of centered, weighted rows: leverage, one tenth uniform."""
  rows = h.design if h.center is None else h.design - h.center[None]
  score = leverage_scores(jnp.sqrt(jnp.abs(h.weight))[:, None] * rows)
  return 0.9 * score / score.sum() + 0.1 / len(score)


@functools.partial(jax.jit, static_argnames=("num_rows", "num_draws"))
def median_error(h, exact, *, num_rows, prob=None, num_draws=20):
  """Median of the largest relative error of a sampled Hessian."""
  prob = leverage(h) if prob is None else prob

  def error(rng):
    sampled = newton.curvature_sample(rng, h, prob, num_rows)
    low, high = spectral_bounds(exact, newton.curvature_dense(sampled))
    return jnp.maximum(high - 1, 1 - low)

  rngs = jax.random.split(jax.random.key(num_rows), num_draws)
  return jnp.median(jax.lax.map(error, rngs))


def norm_in(matrix, x):
  return float(jnp.sqrt(x @ matrix @ x))


def minimum(problem, data, d, mu0=1e-2, x0=None):
  """The minimum that Newton's method finds, from 0 if not told, to rounding."""
  config = newton.NewtonConfig(mu0=mu0, rtol=1e-14, max_steps=100)
  x0 = jnp.zeros(d) if x0 is None else x0
  return newton.minimize(problem, x0, data, config=config).x


def errors_of_pure_steps(problem, x, best, data, num_steps=4):
  config = newton.NewtonConfig(pure=True, max_steps=1, rtol=0.0)
  errors = [float(jnp.linalg.norm(x - best))]
  for _ in range(num_steps):
    x = newton.minimize(problem, x, data, config=config).x
    errors.append(float(jnp.linalg.norm(x - best)))
  return errors


def order(errors):
  """Of convergence, over the last three errors that are not rounding."""
  triples = zip(errors, errors[1:], errors[2:])
  e1, e2, e3 = [e for e in triples if e[0] < 3e-2 and e[2] > 1e-14][-1]
  return math.log(e3 / e2) / math.log(e2 / e1)


def near(best, distance, seed=0):
  """A point at a distance in a random direction."""
  direction = np.random.default_rng(seed).normal(size=best.shape)
  return best + distance * direction / np.linalg.norm(direction)
