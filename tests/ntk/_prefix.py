"""Prefixes and contexts of the tests of prefix kernels."""

import numpy as np

D, V, M, L, N = 3, 2, 50, 5, 4
BIAS = 0.3


def prefix(m=M, *, key_std=1.0, value_std=1.0, seed=0):
  rng = np.random.default_rng(seed)
  key, value = rng.standard_normal((m, D)), rng.standard_normal((m, V))
  return key_std * key, value_std * value


def queries(n=N, *, low=0.5, high=1.2, seed=1, dim=D):
  """Random directions, norms between two bounds."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((n, dim))
  norms = rng.uniform(low, high, (n, 1))
  return norms * x / np.linalg.norm(x, axis=1, keepdims=True)


def context(n=N, seed=2):
  """Keys and values of each datum."""
  rng = np.random.default_rng(seed)
  return rng.standard_normal((n, L, D)), rng.standard_normal((n, L, V))
