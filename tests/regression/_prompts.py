"""Prompts of a linear task, and models of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.models.icl import ICLRegressor
from jaxattn.regression.reweighted_icl import Prompt

MODES = ("embedding", "logit", "value")
MODEL = ICLRegressor(width=16)


def linear(params, prompt, query, w, mode):
  """Linear attention, F = (1 / m) sum_i w_i y_i <x_i, M x>: linear in w."""
  del mode
  m, d = prompt.x.shape
  shrink = params / (1 + (d + 1) / m)
  return query @ (prompt.x.T @ (w * prompt.y)) * shrink / m


def kernel(params, prompt, query, w, mode):
  """One layer of softmax attention; a weight is a multiplicity."""
  del mode
  logits = params * (query @ prompt.x.T) + jnp.log(w)[None]
  return jax.nn.softmax(logits, axis=-1) @ prompt.y


def column(*args):
  return linear(*args)[:, None]


def task(seed=0, m=16, num_val=16, d=3, dtype=float):
  rng = np.random.default_rng(seed)
  theta = rng.normal(size=d)
  x = rng.normal(size=(m + num_val, d))
  y = x @ theta
  y[: m // 3] = rng.normal(size=m // 3)
  x, y = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
  return Prompt(x[:m], y[:m]), Prompt(x[m:], y[m:])


@functools.cache
def network(dtype=jnp.float64):
  prompt, val = task()
  params = MODEL.init(jax.random.key(0), prompt, val.x)
  return jax.tree.map(lambda x: x.astype(dtype), params)


def jacobian(apply_fn, params, prompt, val, mode="embedding"):
  def predict(w):
    return apply_fn(params, prompt, val.x, w, mode)

  return jax.jacrev(predict)(jnp.ones_like(prompt.y))
