"""The reference block and what is drawn for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.models.leakage import LeakageBlock

LABEL = 2


def arrays(n=8, d=16, vocab=64, mlp=32, num_classes=5, seed=0):
  """Embedding table and parameters, drawn in a fixed order."""
  rng = np.random.default_rng(seed)
  scales = {"embed": 0.5, "pos": 0.2, "b_1": 0.1, "b_c": 0.1}
  shapes = {
    "embed": (vocab, d),
    "pos": (n, d),
    "w_q": (d, d),
    "w_k": (d, d),
    "w_v": (d, d),
    "w_o": (d, d),
    "w_1": (d, mlp),
    "b_1": (mlp,),
    "w_2": (mlp, d),
    "w_c": (d, num_classes),
    "b_c": (num_classes,),
  }
  drawn = {
    name: jnp.asarray(
      rng.normal(size=shape) * scales.get(name, shape[0] ** -0.5)
    )
    for name, shape in shapes.items()
  }
  return drawn.pop("embed"), drawn


def without_mlp(params):
  return {k: x for k, x in params.items() if k not in ("w_1", "b_1", "w_2")}


def token_ids(n=8, vocab=64, seed=5):
  return np.random.default_rng(seed).integers(vocab, size=n)


@functools.lru_cache(maxsize=1)
def reference():
  """Table, parameters, ids, block and the gradient that leaks."""
  embed, params = arrays()
  ids, block = token_ids(), LeakageBlock()
  leaked = jax.jit(jax.grad(block.loss))(params, embed[ids], LABEL)
  return embed, params, ids, block, leaked


def relative_error(found, truth):
  return float(jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth))
