"""Random parameters and inputs for tests of the transformer."""

import functools

import jax
import jax.numpy as jnp

from jaxattn.models import Transformer, TransformerConfig

B, T, D = 2, 11, 8
CONFIG = TransformerConfig(
  num_layers=3, dim=D, num_heads=2, head_dim=4, mlp_ratio=2.0
)


def polynomial(config, degree, radius, **options):
  options = {"degree": degree, "radius": radius, **options}
  return config._replace(
    attention="polynomial", attention_options=tuple(options.items())
  )


@functools.partial(jax.jit, static_argnums=0)
def random_params(config, ids=None, seed=0):
  """Random parameters of float64; norms away from 1."""
  ids = jnp.ones((1, 4, config.dim)) if ids is None else ids
  params = Transformer(config).init(jax.random.key(seed), ids)
  leaves, treedef = jax.tree.flatten(params)
  rngs = jax.random.split(jax.random.key(seed + 1), len(leaves))
  new = [
    jnp.float64(x) + 0.2 * jax.random.normal(rng, x.shape)
    for rng, x in zip(rngs, leaves, strict=True)
  ]
  return jax.tree.unflatten(treedef, new)


def vectors(*shape):
  return jax.random.normal(jax.random.key(7), shape or (B, T, D))
