"""Mixtures of one covariance whose means lie in a ball: drawn, and the worst.

Of k components N(mean, v I) with means within R of the origin the score at time
t has a slope of at most max(1 / V, a^2 R^2 / V^2 - 1 / V), V = a^2 v + b^2,
whatever k is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxattn.sampling import GMM, gmm_init, gmm_score_jacobian


def draw(seed: int, k: int, d: int, radius: float, variance: float) -> GMM:
  """Means anywhere in the ball, and weights, drawn anew for each k."""
  rng = np.random.default_rng([seed, k])
  means = rng.normal(size=(k, d))
  means /= np.linalg.norm(means, axis=1, keepdims=True)
  means *= radius * rng.uniform(size=(k, 1)) ** (1 / d)
  weights = rng.dirichlet(np.full(k, 3.0))
  return gmm_init(weights, jnp.asarray(means), np.full(k, variance))


def steepest(
  gmm: GMM, t: float, *, radius: float, num_steps: int, rate: float
) -> tuple[GMM, jax.Array]:
  """The mixture and the point (d,) that ascent of the slope ends at.

  Free are the point, the means within the ball, and the weights. The slope is
  that along a direction, which is free, too: where eigenvalues are equal their
  maximum has no gradient.
  """
  optimizer = optax.adam(rate)

  def mixture(free: Any) -> GMM:
    norms = jnp.linalg.norm(free["means"], axis=1, keepdims=True)
    means = free["means"] * jnp.minimum(1, radius / norms)
    log_weights = jax.nn.log_softmax(free["logits"])
    return gmm._replace(means=means, log_weights=log_weights)

  def fall(free: Any) -> jax.Array:
    u = free["u"] / jnp.linalg.norm(free["u"])
    return -u @ gmm_score_jacobian(mixture(free), free["x"], t) @ u

  def step(carry: Any, _: None) -> tuple[Any, None]:
    free, state = carry
    updates, state = optimizer.update(jax.grad(fall)(free), state)
    return (optax.apply_updates(free, updates), state), None

  x, u = jax.random.normal(jax.random.key(0), (2, gmm.means.shape[1]))
  free = {"means": gmm.means, "logits": gmm.log_weights, "x": x / 10, "u": u}
  climb = jax.jit(lambda carry: lax.scan(step, carry, length=num_steps)[0][0])
  free = climb((free, optimizer.init(free)))
  return mixture(free), free["x"]


def slope_bound(t: float, radius: float, variance: float) -> float:
  """On the slope of the score, of any such mixture."""
  a, v = np.exp(-t), _variance(t, variance)
  return max(1 / v, (a * radius / v) ** 2 - 1 / v)


def moment_bound(t: float, d: int, radius: float, variance: float) -> float:
  """On the second moment."""
  return (np.exp(-t) * radius) ** 2 + d * _variance(t, variance)


def _variance(t: float, v: float) -> float:
  return np.exp(-2 * t) * v - np.expm1(-2 * t)
