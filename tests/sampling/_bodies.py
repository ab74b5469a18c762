"""Convex bodies of which moments are known, and how to hold chains to them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.sampling import Polytope, Spectrahedron


def simplex(d):
  """x >= 0, sum(x) <= 1."""
  a = np.concatenate([-np.eye(d), np.ones((1, d))])
  return Polytope(jnp.asarray(a), jnp.asarray(np.append(np.zeros(d), 1.0)))


def box(d, half=1.0):
  a = np.concatenate([np.eye(d), -np.eye(d)])
  return Polytope(jnp.asarray(a), jnp.full(2 * d, half))


def uniform_simplex(rng, num, d):
  draws = np.random.default_rng(rng).exponential(size=(num, d + 1))
  return jnp.asarray((draws / draws.sum(1, keepdims=True))[:, :d])


def random_polytope(n, d, seed=0):
  """A bounded one around 0."""
  rng = np.random.default_rng(seed)
  a = rng.normal(size=(n - 2, d))
  a = np.concatenate([a, -a.sum(0)[None], a.sum(0)[None]])
  b = np.abs(a).sum(1) * rng.uniform(0.2, 1.0, n)
  return Polytope(jnp.asarray(a), jnp.asarray(b))


def psd_cone(n):
  """X >= 0 of trace at most 1, as blocks X and 1 - tr X."""
  pairs = list(itertools.combinations_with_replacement(range(n), 2))
  mats = np.zeros((len(pairs), n + 1, n + 1))
  for mat, (i, j) in zip(mats, pairs, strict=True):
    mat[i, j] = mat[j, i] = 1
    mat[n, n] = -(i == j)
  const = np.zeros((n + 1, n + 1))
  const[n, n] = -1
  return Spectrahedron(jnp.asarray(mats), jnp.asarray(const))


def symmetric(x, n):
  """The matrices of points of the cone, (..., d) -> (..., n, n)."""
  rows, columns = np.triu_indices(n)
  out = np.zeros((*x.shape[:-1], n, n))
  out[..., rows, columns] = out[..., columns, rows] = x
  return out


def flat_symmetric(mat):
  return np.asarray(mat)[np.triu_indices(len(mat))]


def random_spectrahedron(n, d, seed=0):
  """Around 0: S(0) = I; bounded, for the traces of the A_i are 0."""
  rng = np.random.default_rng(seed)
  mats = rng.normal(size=(d, n, n))
  mats = mats + mats.swapaxes(1, 2)
  mats -= np.trace(mats, axis1=1, axis2=2)[:, None, None] / n * np.eye(n)
  return Spectrahedron(jnp.asarray(mats), -jnp.eye(n))


def assert_mean(values, want, num=4.0):
  """The mean of (chains, draws, ...) is the number, within standard errors.

  Chains are independent, draws are not: the error is that of the means of the
  chains.
  """
  means = np.asarray(values).mean(1)
  error = means.std(0, ddof=1) / len(means) ** 0.5
  excess = np.abs(means.mean(0) - want) / error
  assert (excess < num).all(), (means.mean(0), want, excess)


def keys(num, seed=0):
  return jax.random.split(jax.random.key(seed), num)


# --- exact draws ---


def uniform_box(seed, num, d):
  return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (num, d)))


def tilted_box(seed, num, slope):
  """Of the density exp(-slope x) in [-1, 1], a coordinate each."""
  u = np.random.default_rng(seed).uniform(size=(num, len(slope)))
  return jnp.asarray(-np.log(np.exp(slope) - u * 2 * np.sinh(slope)) / slope)


def elliptope_draws(seed, num, n):
  """Correlation matrices, by rejection: (num, n (n - 1) / 2)."""
  rng, rows, kept = np.random.default_rng(seed), np.triu_indices(n, 1), []
  while sum(map(len, kept)) < num:
    x = rng.uniform(-1, 1, (20_000, n * (n - 1) // 2))
    mats = np.zeros((len(x), n, n))
    mats[:, rows[0], rows[1]] = x
    mats = mats + mats.swapaxes(1, 2) + np.eye(n)
    kept.append(x[np.linalg.eigvalsh(mats)[:, 0] > 0])
  return jnp.asarray(np.concatenate(kept)[:num])


def psd_cone_draws(seed, num, n):
  """A Wishart matrix of n + 1 degrees has a uniform direction."""
  rng, d = np.random.default_rng(seed), n * (n + 1) // 2
  half = rng.normal(size=(num, n, n + 1))
  mats = half @ half.swapaxes(1, 2)
  size = rng.uniform(size=num) ** (1 / d)
  mats *= (size / np.trace(mats, axis1=1, axis2=2))[:, None, None]
  rows, columns = np.triu_indices(n)
  return jnp.asarray(mats[:, rows, columns])


def hidden_simplex(d, times):
  """The simplex as a spectrahedron of dense matrices, each facet repeated."""
  a, b = simplex(d)
  a, b = np.tile(a, (times, 1)), np.tile(b, times)
  rng = np.random.default_rng(0)
  turn = np.linalg.qr(rng.normal(size=(len(b), len(b))))[0]
  mats = np.stack([-(turn * column) @ turn.T for column in a.T])
  const = -(turn * b) @ turn.T
  return Spectrahedron(jnp.asarray(mats), jnp.asarray(const))
