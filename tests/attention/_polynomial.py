"""Dense formulas of polynomial attention, and inputs for them."""

import functools

import jax.numpy as jnp
import numpy as np


def uniform(*shape, low=-1.0, high=1.0, seed=0):
  return np.random.default_rng(seed).uniform(low, high, shape)


def inputs(n, dim, bound=1.0, heads=(1, 1), value_dim=None):
  shapes = [(1, n, h, dim) for h in (heads[0], *heads[1:] * 2)]
  arrays = [uniform(*x, seed=i) * bound for i, x in enumerate(shapes)]
  if value_dim is not None:
    arrays[2] = uniform(1, n, heads[1], value_dim, seed=9)
  return list(map(jnp.asarray, arrays))


def weights_of(query, key, polynomial, seen=True, scale=None):
  """(B, N, T, S) values of the polynomial, 0 where hidden."""
  key = jnp.repeat(key, query.shape[2] // key.shape[2], 2)
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  logits = scale * jnp.einsum("btnh,bsnh->bnts", query, key)
  powers = [c * logits**j for j, c in enumerate(polynomial)]
  return jnp.where(seen, functools.reduce(jnp.add, powers), 0)


def mean(weights, value):
  value = jnp.repeat(value, weights.shape[1] // value.shape[2], 2)
  weights = weights / weights.sum(-1, keepdims=True)
  return jnp.einsum("bnts,bsnh->btnh", weights, value)


def centered(key):
  return key - key.mean(1, keepdims=True)
