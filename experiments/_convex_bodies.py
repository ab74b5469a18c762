"""Bodies to sample from, and exact draws from some of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.sampling import Polytope, Spectrahedron


def repeated_box(d: int, times: int, *, everywhere: bool) -> Polytope:
  """The cube [-1, 1]^d with facets written down several times.

  Of the first coordinate only, or ``everywhere``: the points stay the same.
  """
  eye = np.eye(d)
  counts = np.full(d, times if everywhere else 1)
  counts[0] = times
  half = np.repeat(eye, counts, axis=0)
  a = np.concatenate([half, -half])
  return Polytope(jnp.asarray(a), jnp.ones(len(a)))


def box_draws(seed: int, num: int, d: int) -> jax.Array:
  """Uniform ones, (num, d)."""
  return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (num, d)))


def rotated_box(d: int, aspect: float, seed: int) -> tuple[Polytope, jax.Array]:
  """A box with edges from 1 to ``aspect`` long, and the map to a cube.

  The map is Q: coordinates of Q x are uniform in [-1, 1].
  """
  turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
  to_cube = turn / np.geomspace(1, aspect, d)[:, None]
  a = np.concatenate([to_cube, -to_cube])
  return Polytope(jnp.asarray(a), jnp.ones(2 * d)), jnp.asarray(to_cube)


def random_polytope(n: int, d: int, seed: int) -> Polytope:
  """Normal rows, and the unit distance from 0."""
  a = np.random.default_rng(seed).normal(size=(n, d))
  a /= np.linalg.norm(a, axis=1, keepdims=True)
  return Polytope(jnp.asarray(a), jnp.ones(n))


def random_spectrahedron(n: int, d: int, seed: int) -> Spectrahedron:
  """I + sum_i x_i A_i, bounded because traces are 0."""
  mats = np.random.default_rng(seed).normal(size=(d, n, n))
  mats = mats + mats.swapaxes(1, 2)
  mats -= np.trace(mats, axis1=1, axis2=2)[:, None, None] / n * np.eye(n)
  mats /= np.linalg.norm(mats, ord=2, axis=(1, 2))[:, None, None]
  return Spectrahedron(jnp.asarray(mats), -jnp.eye(n))


def bounded_trace(n: int) -> Spectrahedron:
  """Positive matrices of trace at most 1: the blocks X and 1 - tr X.

  Coordinates are the entries on and above the diagonal, row by row.
  """
  pairs = list(itertools.combinations_with_replacement(range(n), 2))
  mats = np.zeros((len(pairs), n + 1, n + 1))
  for mat, (i, j) in zip(mats, pairs, strict=True):
    mat[i, j] = mat[j, i] = 1
    mat[n, n] = -float(i == j)
  const = np.zeros((n + 1, n + 1))
  const[n, n] = -1
  return Spectrahedron(jnp.asarray(mats), jnp.asarray(const))


def bounded_trace_draws(seed: int, num: int, n: int) -> jax.Array:
  """Uniform ones: the direction of a Wishart matrix of n + 1 degrees."""
  rng, d = np.random.default_rng(seed), n * (n + 1) // 2
  half = rng.normal(size=(num, n, n + 1))
  mats = half @ half.swapaxes(1, 2)
  trace = rng.uniform(size=num) ** (1 / d)
  mats *= (trace / np.trace(mats, axis1=1, axis2=2))[:, None, None]
  rows, columns = np.triu_indices(n)
  return jnp.asarray(mats[:, rows, columns])
