"""Tensor attention written for reading: every weight of every pair at once."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.features import polynomial_coefficients


def uniform(seed, *shapes, bound=1.0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.uniform(-bound, bound, s)) for s in shapes]


def one_head(seed, n, d, bound=1.0):
  """Query, two keys on [-bound, bound], two values on [-1, 1]."""
  shape = (1, n, 1, d)
  arrays = uniform(seed, shape, shape, shape, bound=bound)
  return arrays + uniform(seed + 1, shape, shape)


def polynomial(degree, radius):
  coefs = polynomial_coefficients(degree, radius)
  return lambda s: jnp.polyval(jnp.asarray(coefs[::-1]), s)


def dense(query, keys, values, *, kernel=jnp.exp, is_causal=False, scale=None):
  """One head without a batch: (T, H), of (S, H), of (S, Hv) -> (T, Hv)."""
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  letters = "jklm"[: len(keys)]
  pairs = ",".join(f"{x}c" for x in letters)
  logits = jnp.einsum(f"ic,{pairs}->i{letters}", scale * query, *keys)
  weights = kernel(logits)
  if is_causal:
    position = np.indices(logits.shape)
    seen = (position[1:] <= position[0]).all(0)
    weights = jnp.where(seen, weights, 0)
  axes = tuple(range(1, weights.ndim))
  weights = weights / weights.sum(axes, keepdims=True)
  return jnp.einsum(f"i{letters},{pairs}->ic", weights, *values)


def dense_pair(*arrays, **options):
  """The same for two key sequences, in the public layout with one head."""
  q, k1, k2, v1, v2 = (x[0, :, 0] for x in arrays)
  return dense(q, (k1, k2), (v1, v2), **options)[None, :, None]


def relative(got, want):
  """Largest error over the largest entry, of any array."""
  return max(
    float(jnp.abs(g - w).max() / jnp.abs(w).max())
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  )
