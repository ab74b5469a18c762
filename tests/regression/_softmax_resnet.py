"""The planted instance of softmax regression with a skip."""

import math

import jax.numpy as jnp
import numpy as np

from jaxattn.regression import softmax_resnet


def planted(n, d, residual_scale=1.0, noise=0.05, seed=1, **options):
  """The planted instance of the specification's tests."""
  rng = np.random.default_rng(seed)
  a, planted = rng.normal(size=(n, d)) / math.sqrt(d), rng.normal(size=d)
  b = softmax_resnet.predict(planted, a, residual_scale=residual_scale)
  b = b * (1 + noise * rng.normal(size=n))
  data = softmax_resnet.prepare(a, b, residual_scale=residual_scale, **options)
  return data, jnp.asarray(planted)
