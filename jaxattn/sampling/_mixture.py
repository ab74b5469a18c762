"""What functions of a Gaussian mixture share: its checks and its eigenbasis."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator
from jaxattn.sampling.schedules import Schedule

# How far a sum of weights may be from 1, and of what size negative eigenvalues
# of a covariance may be, over the largest: both are rounding.
_SUM_ROOM, _PSD_ROOM = 1e-5, 1e-6
# Samples whose matrices are gathered at a time.
_BATCH = 64


class GMM(NamedTuple):
  """A Gaussian mixture, its covariances as eigenpairs.

  Attributes:
    log_weights: (k,).
    means: (k, d).
    eigenvalues: (k, d), of the covariances; (k, 1) if they are multiples of I;
      a first axis of 1 if all components share one.
    eigenvectors: (k, d, d), in columns; (1, d, d) if shared; None = the axes.
  """

  log_weights: jax.Array
  means: jax.Array
  eigenvalues: jax.Array
  eigenvectors: jax.Array | None


class Parts(NamedTuple):
  """What all functions of x share."""

  logits: jax.Array  # (..., k), log of weight times density.
  z: jax.Array  # (..., k, d), offsets in the eigenbases over sqrt(v).
  v: jax.Array  # (k, 1 or d), variances at t.
  a: jax.Array  # signal
  b: jax.Array  # noise
  # Of one basis for all components:
  x: jax.Array | None  # (..., d), in that basis.
  means: jax.Array  # (k, d), a times the means, in the eigenbases.
  # Of a basis for each:
  whitener: jax.Array | None  # (d, k d), eigenvectors over sqrt(v).


def check_weights(weights: jax.Array, means: jax.Array) -> None:
  if means.size == 0:
    raise ValueError(f"means must not be empty, got shape {means.shape}")
  _checks.check_shape("weights", weights, means.shape[:1], "(k,)")
  _checks.check_nonnegative("weights", weights)
  if not _checks.is_concrete(weights):
    return
  total = np.asarray(weights, np.float64).sum()
  room = max(_SUM_ROOM, float(jnp.finfo(weights.dtype).eps))
  if not abs(total - 1) <= room:
    raise ValueError(f"weights must sum to 1, got a sum of {total}")


def check_finite(name: str, x: jax.Array) -> None:
  """Raises unless all entries of a concrete array are finite."""
  if not _checks.is_concrete(x):
    return
  bad = int((~np.isfinite(np.asarray(x, np.float64))).sum())
  if bad:
    raise ValueError(f"{name} must be finite, got {bad} entries that are not")


def check_covariances(covariances: jax.Array, means: jax.Array) -> None:
  """Raises unless they are of one of the four kinds, matrices symmetric."""
  k, d = means.shape
  if covariances.shape not in ((k,), (k, d), (d, d), (1, d, d), (k, d, d)):
    raise ValueError(
      "covariances must have shape (k,), (k, d), (k, d, d) or (d, d), got "
      f"{covariances.shape} with means of shape {means.shape}"
    )
  if _is_matrices(covariances, means):
    check_symmetric(covariances)


@jax.jit
def decompose(
  weights: jax.Array, means: jax.Array, covariances: jax.Array
) -> GMM:
  """The mixture, negative eigenvalues as they come."""
  # What rounding left of a sum of 1 would be a factor of all densities.
  wide = accumulator(means.dtype)
  log_weights = jnp.log(weights / weights.astype(wide).sum())
  log_weights = log_weights.astype(means.dtype)
  if not _is_matrices(covariances, means):
    values = covariances.reshape(len(means), -1)
    return GMM(log_weights, means, values, None)
  d = means.shape[1]
  matrices = covariances.reshape(-1, d, d)
  values, vectors = jnp.linalg.eigh(matrices.astype(wide))
  values, vectors = values.astype(means.dtype), vectors.astype(means.dtype)
  return GMM(log_weights, means, values, vectors)


def _is_matrices(covariances: jax.Array, means: jax.Array) -> bool:
  return covariances.shape not in (means.shape[:1], means.shape)


def check_semidefinite(
  eigenvalues: jax.Array, name: str = "covariances"
) -> None:
  if not _checks.is_concrete(eigenvalues):
    return
  values = np.asarray(eigenvalues)
  least = values.min()
  if not least >= -_PSD_ROOM * np.abs(values).max():
    raise ValueError(
      f"{name} must be positive semidefinite, got a least eigenvalue of {least}"
    )


def check_symmetric(covariances: jax.Array, name: str = "covariances") -> None:
  if not _checks.is_concrete(covariances):
    return
  matrices = np.asarray(covariances, np.float64)
  gap = np.abs(matrices - matrices.swapaxes(-1, -2)).max()
  if gap > _PSD_ROOM * np.abs(matrices).max():
    raise ValueError(f"{name} must be symmetric, got entries {gap} apart")


def check_time(t: float | jax.Array, dtype: Any) -> jax.Array:
  _checks.check_scalar("t", t)
  return jnp.asarray(t, dtype)


def variances(
  gmm: GMM, t: float | jax.Array, schedule: Schedule, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The variances v, and a and b."""
  t = check_time(t, dtype)
  a, b = schedule.signal(t), schedule.noise(t)
  return a**2 * gmm.eigenvalues.astype(dtype) + b**2, a, b


def parts(
  gmm: GMM, x: jax.Array, t: float | jax.Array, schedule: Schedule
) -> Parts:
  _checks.check_floating("x", x)
  k, d = gmm.means.shape
  _checks.check_shape("x", x, (*x.shape[:-1], d), "(..., d)")
  wide = accumulator(x.dtype)
  v, a, b = variances(gmm, t, schedule, wide)
  v = jnp.broadcast_to(v, (k, v.shape[1]))
  x, means, u = x.astype(wide), a * gmm.means.astype(wide), gmm.eigenvectors
  whitener = None
  if u is None or len(u) == 1:
    if u is not None:
      x, means = x @ u[0].astype(wide), means @ u[0].astype(wide)
    z = x[..., None, :] - like(means, x[..., None])
    z = z / like(jnp.sqrt(v), z)
  else:
    u = u.astype(wide)
    means = jnp.einsum("kij,ki->kj", u, means)
    # Scaled before the products: they are the only passes over all offsets.
    whitener = jnp.moveaxis(u / jnp.sqrt(v)[:, None], 0, 1).reshape(d, k * d)
    z = (x @ whitener).reshape(*x.shape[:-1], k, d)
    z = z - like(means / jnp.sqrt(v), z)
  logdet = jnp.log(jnp.broadcast_to(v, (k, d))).sum(1)
  squares = jnp.einsum("...kd,...kd->...k", z, z)
  weights = like(gmm.log_weights - logdet / 2, squares)
  own = x if whitener is None else None
  return Parts(weights - squares / 2, z, v, a, b, own, means, whitener)


def like(parameter: jax.Array, x: jax.Array) -> jax.Array:
  """A parameter of the components, to be combined with the array x."""
  axes = range(x.ndim - parameter.ndim)
  return jnp.expand_dims(parameter, axes).astype(x.dtype)


def mean(
  gmm: GMM, parts: Parts, r: jax.Array, share: jax.Array | None = None
) -> jax.Array:
  """The mean of U (share z / v) over components, z not scaled: (..., d).

  Args:
    gmm: the mixture.
    parts: of x.
    r: (..., k).
    share: (k or 1, 1 or d); None = 1.
  """
  if parts.x is None:
    z = r[..., None] * parts.z
    z = z if share is None else z * like(share, z)
    z = z.reshape(*z.shape[:-2], -1)
    return jnp.einsum("...m,im->...i", z, parts.whitener)
  # As good as the sum of offsets: x itself is known to rounding only.
  pull = (1 if share is None else share) / parts.v
  mean = parts.x * (r @ pull) - r @ (pull * parts.means)
  u = gmm.eigenvectors
  return mean if u is None else mean @ u[0].astype(r.dtype).T


def component_scores(gmm: GMM, parts: Parts) -> jax.Array:
  """The score of each component, (..., k, d)."""
  g = -parts.z / like(jnp.sqrt(parts.v), parts.z)
  if gmm.eigenvectors is None:
    return g
  u = gmm.eigenvectors.astype(g.dtype)
  u = jnp.broadcast_to(u, (g.shape[-2], *u.shape[1:]))
  return jnp.einsum("kij,...kj->...ki", u, g)


def mean_of_means(gmm: GMM, r: jax.Array) -> jax.Array:
  return r @ gmm.means.astype(r.dtype)


def pick(v: jax.Array, i: jax.Array) -> jax.Array:
  return v if len(v) == 1 else v[i]


def turn(u: jax.Array, i: jax.Array, z: jax.Array) -> jax.Array:
  """U_i z for each sample, (n, d)."""
  if len(u) == 1:
    return z @ u[0].T
  # In batches: a matrix for each sample is too much memory.
  return lax.map(lambda pair: u[pair[0]] @ pair[1], (i, z), batch_size=_BATCH)
