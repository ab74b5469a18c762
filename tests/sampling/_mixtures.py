"""Mixtures that several tests use."""

import jax.numpy as jnp
import numpy as np

from jaxattn.sampling import gmm_init


def random_mixture(k, d, *, seed=0, kind="full", spread=2.0):
  """Of random means and covariances of one of the kinds of `gmm_init`."""
  rng = np.random.default_rng(seed)
  root = rng.normal(size=(k, d, d))
  full = 0.15 * root @ root.swapaxes(1, 2) + 0.1 * np.eye(d)
  covariances = {
    "full": full,
    "shared": full[:1],
    "diagonal": rng.uniform(0.2, 1.5, (k, d)),
    "isotropic": rng.uniform(0.2, 1.5, k),
  }[kind]
  weights = rng.dirichlet(np.full(k, 3.0))
  means = spread * rng.normal(size=(k, d))
  return gmm_init(weights, jnp.asarray(means), covariances)


def line_mixture():
  """The two components in one dimension that exact laws are known for."""
  return gmm_init([0.3, 0.7], jnp.array([[-2.0], [1.5]]), [0.25, 0.49])


def covariances_of(gmm):
  """(k, d, d), written out."""
  k, d = gmm.means.shape
  values = np.broadcast_to(gmm.eigenvalues, (k, d))
  if gmm.eigenvectors is None:
    return values[:, :, None] * np.eye(d)
  u = np.broadcast_to(gmm.eigenvectors, (k, d, d))
  return np.einsum("kij,kj,klj->kil", u, values, u)
