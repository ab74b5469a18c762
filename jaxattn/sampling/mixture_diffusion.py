r"""Diffusion of a Gaussian mixture, in closed form: the oracle of samplers.

If data are a mixture of :math:`N(\mu_i, \Sigma_i)` with weights w, then on each
path :math:`x_t = a y + b z` so is :math:`p_t`, with means :math:`a \mu_i` and
covariances :math:`a^2 \Sigma_i + b^2 I`. With
:math:`\Sigma_i = U_i \operatorname{diag}(\lambda_i) U_i^\top`,

.. math::

  v_{ij} = a^2 \lambda_{ij} + b^2, \qquad z_i = U_i^\top (x - a \mu_i), \qquad
  r = \operatorname{softmax}_i \big( \ln w_i - \tfrac12 \textstyle\sum_j
    z_{ij}^2 / v_{ij} - \tfrac12 \sum_j \ln v_{ij} \big), \\
  s = \nabla \ln p_t = \sum_i r_i g_i, \qquad g_i = -U_i (z_i / v_i), \qquad
  \nabla^2 \ln p_t = -\sum_i r_i \Sigma_i(t)^{-1} + \operatorname{Cov}_r(g).

Eigenvectors do not change with t: nothing is factorized after
:func:`gmm_init`. The Lipschitz constant of the score is bounded independently
of the number of components where all share one covariance, or within a radius;
for different covariances there is no global one. Source: arXiv 2405.16418 for
the claims; all formulas are derived here.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator
from jaxattn.sampling import _mixture, schedules
from jaxattn.sampling._mixture import GMM
from jaxattn.sampling.schedules import Schedule

__all__ = [
  "GMM",
  "gmm_denoise",
  "gmm_init",
  "gmm_logpdf",
  "gmm_responsibilities",
  "gmm_sample",
  "gmm_score",
  "gmm_score_jacobian",
  "gmm_velocity",
]

_jit = functools.partial(jax.jit, static_argnames="schedule")


def gmm_init(weights: Any, means: Any, covariances: Any) -> GMM:
  r"""A mixture from its weights, means and covariances.

  Args:
    weights: (k,), at least 0, summing to 1 up to rounding or 1e-5, which is
      divided out.
    means: (k, d), floating.
    covariances: positive semidefinite: (k,) variances of multiples of I, (k, d)
      diagonals, (k, d, d) matrices, or one matrix (d, d) or (1, d, d) that all
      share. A square array is read as diagonals where k = d.

  Returns:
    A :class:`GMM` in the dtype of ``means``.

  Raises:
    ValueError: if shapes or dtypes do not fit, numbers are not finite, weights
      are negative or do not sum to 1, or a covariance is not symmetric or not
      positive semidefinite.

  Cost:
    O(k d^3) for matrices, once; O(k d) otherwise.

  Source:
    arXiv 2405.16418.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gmm_init
    >>> gmm = gmm_init([0.5, 0.5], jnp.array([[1.0, 0.0], [-1.0, 0.0]]), [1, 4])
    >>> gmm.eigenvalues.shape, gmm.eigenvectors
    ((2, 1), None)
  """
  means = jnp.asarray(means)
  _checks.check_rank("means", means, 2)
  _checks.check_floating("means", means)
  weights = jnp.asarray(weights, means.dtype)
  covariances = jnp.asarray(covariances, means.dtype)
  _mixture.check_weights(weights, means)
  for name, x in (("means", means), ("covariances", covariances)):
    _mixture.check_finite(name, x)
  _mixture.check_covariances(covariances, means)
  gmm = _mixture.decompose(weights, means, covariances)
  _mixture.check_semidefinite(gmm.eigenvalues)
  # What rounding left below 0 would be a NaN at t = 0.
  return gmm._replace(eigenvalues=jnp.maximum(gmm.eigenvalues, 0))


@_jit
def gmm_logpdf(
  gmm: GMM,
  x: jax.Array,
  t: float | jax.Array = 0.0,
  *,
  schedule: Schedule = schedules.ou(),
) -> jax.Array:
  r"""The log-density of the mixture at time t.

  .. math:: \ln p_t(x) = \operatorname{logsumexp}_i (\text{logits}_i)
    - \tfrac d2 \ln 2 \pi

  Args:
    gmm: of :func:`gmm_init`.
    x: (..., d), floating.
    t: (), the time.
    schedule: of the path; by default data are at t = 0.

  Returns:
    (...), in the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(k d^2) a point; O(k d) for diagonal covariances.

  Source:
    derived here; log-space throughout.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gmm_init, gmm_logpdf
    >>> gmm = gmm_init([1.0], jnp.zeros((1, 2)), [1.0])
    >>> print(f"{gmm_logpdf(gmm, jnp.zeros(2)):.4f}")
    -1.8379
  """
  parts = _mixture.parts(gmm, x, t, schedule)
  total = jax.nn.logsumexp(parts.logits, axis=-1)
  return (total - x.shape[-1] / 2 * math.log(2 * math.pi)).astype(x.dtype)


@_jit
def gmm_responsibilities(
  gmm: GMM,
  x: jax.Array,
  t: float | jax.Array = 0.0,
  *,
  schedule: Schedule = schedules.ou(),
) -> jax.Array:
  r"""The probability of each component, given x at time t.

  For equal isotropic covariances these are the weights of softmax attention of
  the query x to the means.

  Args:
    gmm: of :func:`gmm_init`.
    x: (..., d), floating.
    t: (), the time.
    schedule: of the path.

  Returns:
    (..., k), r of the module's docstring.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    As :func:`gmm_logpdf`.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gmm_init, gmm_responsibilities
    >>> gmm = gmm_init([0.5, 0.5], jnp.array([[1.0], [-1.0]]), [1.0, 1.0])
    >>> print(gmm_responsibilities(gmm, jnp.zeros(1)))
    [0.5 0.5]
  """
  parts = _mixture.parts(gmm, x, t, schedule)
  return jax.nn.softmax(parts.logits, axis=-1).astype(x.dtype)


@_jit
def gmm_score(
  gmm: GMM,
  x: jax.Array,
  t: float | jax.Array = 0.0,
  *,
  schedule: Schedule = schedules.ou(),
) -> jax.Array:
  r"""The score :math:`\nabla \ln p_t(x) = -\sum_i r_i U_i (z_i / v_i)`.

  Args:
    gmm: of :func:`gmm_init`.
    x: (..., d), floating.
    t: (), the time.
    schedule: of the path.

  Returns:
    (..., d), in the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    Two products with all eigenvectors at once, O(k d^2) a point; O(k d) for
    diagonal covariances.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gmm_init, gmm_score
    >>> gmm = gmm_init([1.0], jnp.array([[1.0, 0.0]]), [2.0])
    >>> print(gmm_score(gmm, jnp.array([3.0, 1.0])))
    [-1.  -0.5]
  """
  parts = _mixture.parts(gmm, x, t, schedule)
  r = jax.nn.softmax(parts.logits, axis=-1)
  return -_mixture.mean(gmm, parts, r).astype(x.dtype)


@_jit
def gmm_score_jacobian(
  gmm: GMM,
  x: jax.Array,
  t: float | jax.Array = 0.0,
  *,
  schedule: Schedule = schedules.ou(),
) -> jax.Array:
  r"""The Jacobian of the score, the Hessian of the log-density.

  .. math:: \nabla^2 \ln p_t = -\sum_i r_i \Sigma_i(t)^{-1}
    + \sum_i r_i (g_i - s)(g_i - s)^\top

  Args:
    gmm: of :func:`gmm_init`.
    x: (..., d), floating.
    t: (), the time.
    schedule: of the path.

  Returns:
    (..., d, d), in the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(k d^3) once and O(k d^2) a point.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gmm_init, gmm_score_jacobian
    >>> gmm = gmm_init([1.0], jnp.zeros((1, 2)), jnp.array([[2.0, 4.0]]))
    >>> print(gmm_score_jacobian(gmm, jnp.ones(2)))
    [[-0.5   0.  ]
     [ 0.   -0.25]]
  """
  parts = _mixture.parts(gmm, x, t, schedule)
  r = jax.nn.softmax(parts.logits, axis=-1)
  d = x.shape[-1]
  g = _mixture.component_scores(gmm, parts)
  # Centered, so that equal means have a covariance of exactly 0.
  g = g - jnp.einsum("...k,...kd->...d", r, g)[..., None, :]
  spread = jnp.einsum("...k,...ki,...kj->...ij", r, g, g)
  inverse = jnp.broadcast_to(1 / parts.v, gmm.means.shape)
  if gmm.eigenvectors is None:
    diagonal = jnp.einsum("...k,kj->...j", r, inverse)
    mean = diagonal[..., None] * _mixture.like(jnp.eye(d), spread)
  else:
    u = jnp.broadcast_to(gmm.eigenvectors, (len(inverse), d, d))
    u = u.astype(r.dtype)
    matrices = jnp.einsum("kij,kj,klj->kil", u, inverse, u)
    mean = jnp.einsum("...k,kil->...il", r, matrices)
  return (spread - mean).astype(x.dtype)


@_jit
def gmm_denoise(
  gmm: GMM,
  x: jax.Array,
  t: float | jax.Array = 0.0,
  *,
  schedule: Schedule = schedules.ou(),
) -> jax.Array:
  r"""The denoiser: the mean of the data point, given x at time t.

  .. math:: E[y \mid x_t = x] = \sum_i r_i \big( \mu_i
    + a\, U_i (\lambda_i z_i / v_i) \big) = (x + b^2 s) / a

  The first form is used: it is finite where a = 0.

  Args:
    gmm: of :func:`gmm_init`.
    x: (..., d), floating.
    t: (), the time.
    schedule: of the path.

  Returns:
    (..., d), in the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    As :func:`gmm_score`.

  Source:
    derived here; the second form is Tweedie's.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gmm_denoise, gmm_init
    >>> gmm = gmm_init([1.0], jnp.array([[1.0, 0.0]]), [0.0])
    >>> print(gmm_denoise(gmm, jnp.array([3.0, 1.0]), 0.5))
    [1. 0.]
  """
  parts = _mixture.parts(gmm, x, t, schedule)
  r = jax.nn.softmax(parts.logits, axis=-1)
  share = parts.a * gmm.eigenvalues.astype(r.dtype)
  inner = _mixture.mean(gmm, parts, r, share)
  return (_mixture.mean_of_means(gmm, r) + inner).astype(x.dtype)


@_jit
def gmm_velocity(
  gmm: GMM,
  x: jax.Array,
  t: float | jax.Array = 0.0,
  *,
  schedule: Schedule = schedules.ou(),
) -> jax.Array:
  r"""The velocity of the probability flow, in the time of the path.

  .. math:: v = E[\dot a y + \dot b z \mid x_t = x]
    = \dot a\, E[y \mid x] - b \dot b\, s

  It is the minimizer of the flow-matching loss. For :func:`ou` it is
  -rate (x + s); data are generated by following it backwards.

  Args:
    gmm: of :func:`gmm_init`.
    x: (..., d), floating.
    t: (), the time.
    schedule: of the path.

  Returns:
    (..., d), in the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    As :func:`gmm_score`.

  Source:
    derived here; arXiv 2210.02747 for the loss.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gmm_init, gmm_velocity, straight
    >>> gmm = gmm_init([1.0], jnp.array([[1.0, 0.0]]), [0.0])
    >>> x = jnp.array([3.0, 1.0])
    >>> print(gmm_velocity(gmm, x, 0.5, schedule=straight()))
    [-4. -2.]
  """
  parts = _mixture.parts(gmm, x, t, schedule)
  r = jax.nn.softmax(parts.logits, axis=-1)
  t = jnp.asarray(t, r.dtype)
  # Both means in one product with the eigenvectors.
  share = schedule.signal_rate(t) * parts.a * gmm.eigenvalues.astype(r.dtype)
  moved = _mixture.mean(gmm, parts, r, share + schedule.variance_rate(t))
  means = _mixture.mean_of_means(gmm, r)
  return (schedule.signal_rate(t) * means + moved).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("num_samples", "schedule"))
def gmm_sample(
  rng: jax.Array,
  gmm: GMM,
  num_samples: int,
  t: float | jax.Array = 0.0,
  *,
  schedule: Schedule = schedules.ou(),
) -> jax.Array:
  r"""Samples of the mixture at time t.

  .. math:: x = a \mu_i + U_i \big( \sqrt{v_i} \circ z \big), \qquad i \sim w

  Args:
    rng: PRNG key.
    gmm: of :func:`gmm_init`.
    num_samples: n.
    t: (), the time.
    schedule: of the path.

  Returns:
    (n, d), in the dtype of the mixture.

  Raises:
    ValueError: if ``num_samples`` < 1 or ``t`` is no scalar.

  Cost:
    O(n d^2) for matrices, O(n d) otherwise; memory of the samples.

  Source:
    derived here.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gmm_init, gmm_sample
    >>> gmm = gmm_init([0.5, 0.5], jnp.array([[1.0], [-1.0]]), [0.0, 0.0])
    >>> bool((jnp.abs(gmm_sample(jax.random.key(0), gmm, 4)) == 1).all())
    True
  """
  _checks.check_integer("num_samples", num_samples, 1, None)
  dtype = accumulator(gmm.means.dtype)
  v, a, _ = _mixture.variances(gmm, t, schedule, dtype)
  rng_i, rng_z = jax.random.split(rng)
  shape = (num_samples,)
  logits = gmm.log_weights.astype(dtype)
  i = jax.random.categorical(rng_i, logits, shape=shape)
  z = jax.random.normal(rng_z, (num_samples, gmm.means.shape[1]), dtype)
  z = z * jnp.sqrt(_mixture.pick(v, i))
  if gmm.eigenvectors is not None:
    z = _mixture.turn(gmm.eigenvectors.astype(dtype), i, z)
  return (a * gmm.means.astype(dtype)[i] + z).astype(gmm.means.dtype)
