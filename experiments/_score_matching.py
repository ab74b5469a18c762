"""A mixture fitted to images of digits, and a network that learns its score.

Denoising score matching gives a loss from which nobody can tell how wrong a
network is: what is left of it at the best is unknown. With the exact score of a
mixture it is known.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxattn.data import load_digits
from jaxattn.sampling import (
  GMM,
  gmm_init,
  gmm_sample,
  gmm_score,
  ou,
  path_sample,
)

Params = dict[str, jax.Array]


def digits_mixture(
  dim: int, num_components: int, seed: int
) -> tuple[GMM, np.ndarray]:
  """A mixture of full covariances, and the (1797, dim) points it was fitted to.

  Pixels in their first principal axes, in units of one standard deviation of
  all coordinates together.
  """
  # An extra of this package, so not imported with it.
  from sklearn import mixture

  pixels = np.asarray(load_digits()[0], float)
  centered = pixels - pixels.mean(0)
  _, _, axes = np.linalg.svd(centered, full_matrices=False)
  points = centered @ axes[:dim].T
  points = points / points.std()
  fitted = mixture.GaussianMixture(
    num_components, reg_covar=1e-2, random_state=seed
  ).fit(points)
  gmm = gmm_init(
    fitted.weights_,
    jnp.asarray(fitted.means_, jnp.float32),
    jnp.asarray(fitted.covariances_, jnp.float32),
  )
  return gmm, points


def network_score(params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
  """(..., d): what is predicted of the noise, over minus its size."""
  return -predict_noise(params, x, t) / ou().noise(t)


def predict_noise(params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
  """(..., d) of x (..., d) and t (...), or one t."""
  t = jnp.broadcast_to(t, x.shape[:-1])[..., None]
  waves = ou().log_snr(t) * jnp.expand_dims(params["waves"], range(x.ndim - 1))
  h = jnp.concatenate([x, jnp.sin(waves), jnp.cos(waves)], -1)
  for i in range(3):
    h = h @ params[f"w{i}"] + jnp.expand_dims(
      params[f"b{i}"], range(x.ndim - 1)
    )
    h = jax.nn.silu(h) if i < 2 else h
  # Far from data noise is x itself.
  return ou().noise(t) * x + h


def init_network(rng: jax.Array, dim: int, width: int, dtype: Any) -> Params:
  """Weights of two hidden layers."""
  waves = 2.0 ** jnp.arange(-2, 2, dtype=dtype)
  sizes = (dim + 2 * len(waves), width, width, dim)
  params = {"waves": waves}
  for i, key in enumerate(jax.random.split(rng, 3)):
    w = jax.random.normal(key, sizes[i : i + 2], dtype) / sizes[i] ** 0.5
    # The last one small: prediction begins with what is known.
    params |= {
      f"w{i}": w * (0.01 if i == 2 else 1),
      f"b{i}": jnp.zeros(w.shape[1], dtype),
    }
  return params


@functools.partial(
  jax.jit, static_argnames=("width", "num_steps", "batch_size", "span")
)
def train(
  rng: jax.Array,
  gmm: GMM,
  *,
  width: int,
  num_steps: int,
  batch_size: int,
  learning_rate: float,
  span: tuple[float, float],
) -> tuple[Params, jax.Array]:
  """Weights, and (num_steps,) losses; data are fresh draws of the mixture."""
  rng_init, rng_steps = jax.random.split(rng)
  dim, dtype = gmm.means.shape[1], gmm.means.dtype
  params = init_network(rng_init, dim, width, dtype)
  schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
  optimizer = optax.adam(schedule)
  fixed = {"waves": params.pop("waves")}

  def step(carry: Any, rng: jax.Array) -> tuple[Any, jax.Array]:
    params, state = carry

    def loss(params: Params) -> jax.Array:
      rng_t, rng_x = jax.random.split(rng)
      t = _times(rng_t, batch_size, span)
      x, z = noisy(rng_x, gmm, t)
      gap = predict_noise(params | fixed, x, t) - z
      return (gap**2).sum(-1).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  carry = params, optimizer.init(params)
  (params, _), losses = lax.scan(
    step, carry, jax.random.split(rng_steps, num_steps)
  )
  return params | fixed, losses


@functools.partial(jax.jit, static_argnames="num_samples")
def errors(
  rng: jax.Array, params: Params, gmm: GMM, t: jax.Array, *, num_samples: int
) -> tuple[jax.Array, jax.Array]:
  """Mean squared error of the score at t: by the oracle, and by two losses.

  The second is the loss of the network less that of the exact score, over the
  variance of the noise: the same in the mean.
  """
  x, z = noisy(rng, gmm, jnp.full(num_samples, t))
  b = ou().noise(t)
  best = -b * gmm_score(gmm, x, t)
  found = predict_noise(params, x, t)
  oracle = ((found - best) ** 2).sum(-1).mean() / b**2
  losses = [((y - z) ** 2).sum(-1) for y in (found, best)]
  return oracle, (losses[0] - losses[1]).mean() / b**2


def noisy(
  rng: jax.Array, gmm: GMM, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Points of the path at times (n,), and the noise in them."""
  rng_y, rng_z = jax.random.split(rng)
  y = gmm_sample(rng_y, gmm, len(t))
  x, _ = path_sample(rng_z, y, t, schedule=ou())
  a, b = ou().signal(t)[:, None], ou().noise(t)[:, None]
  return x, (x - a * y) / b


def _times(rng: jax.Array, n: int, span: tuple[float, float]) -> jax.Array:
  """Uniform in the logarithm of the signal-to-noise ratio."""
  ends = ou().log_snr(jnp.array(span))
  return ou().time_at(
    jax.random.uniform(rng, (n,), minval=ends[1], maxval=ends[0])
  )
