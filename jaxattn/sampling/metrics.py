r"""How far samples are from data: scores of forecasts, distances of clouds.

Forecasts are judged by proper scores: with samples X, X' of a forecast and the
outcome y,

.. math::

  \mathrm{CRPS} = E|X - y| - \tfrac12 E|X - X'|, \qquad
  \mathrm{ES} = E\|X - y\| - \tfrac12 E\|X - X'\|,

the second mean over pairs of different samples, which makes both unbiased in
their number. Clouds are compared by their energy distance or sliced Wasserstein
distance, Gaussians by their W2 distance in closed form, and one-dimensional
solvers exactly, without samples: :func:`tv_kl_1d`. Source: Gneiting and
Raftery, JASA 2007, for the scores.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator
from jaxattn.sampling import _laws, schedules, solvers
from jaxattn.sampling._laws import TVKL
from jaxattn.sampling._mixture import GMM
from jaxattn.sampling._steps import Corrector, VectorField

__all__ = [
  "TVKL",
  "crps",
  "energy_distance",
  "energy_score",
  "gaussian_w2",
  "memorization_ratio",
  "pinball",
  "pit_histogram",
  "sliced_w2",
  "tv_kl_1d",
]

_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Rows of a matrix of distances that exist at a time.
_ROWS = 256
_EXACT_METHODS = (
  "ddpm", "ei", "euler", "heun", "midpoint", "rk4", "dpm1", "dpm2", "dpm3",
  "dpmpp2m", "dpom",
)  # fmt: skip


# --- forecasts ---


@jax.jit
def crps(samples: jax.Array, y: jax.Array) -> jax.Array:
  r"""The continuous ranked probability score, fair in the number of samples.

  .. math:: \frac1S \sum_i |X_i - y| - \frac1{S (S - 1)} \sum_{i < j}
    |X_i - X_j|

  Args:
    samples: (S, ...), floating, S at least 2.
    y: (...), what happened.

  Returns:
    (...), in the dtype of ``samples``: 0 for samples that all equal y, and
    negative for some y, as an unbiased estimate must be.

  Raises:
    ValueError: if shapes or dtypes do not fit or S < 2.

  Cost:
    O(S log S) an outcome.

  Source:
    Gneiting and Raftery, JASA 2007.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import crps
    >>> print(crps(jnp.array([0.0, 2.0]), jnp.array(1.0)))
    0.0
    >>> print(crps(jnp.array([0.0, 0.0]), jnp.array(1.0)))
    1.0
  """
  samples, y, dtype = _forecast(samples, y, least=2)
  # Sorted offsets: their sum of distances in pairs needs no pairs.
  off = jnp.sort(samples - y[None], axis=0)
  s = len(off)
  rank = jnp.arange(1, s + 1, dtype=off.dtype) * 2 - (s + 1)
  pairs = jnp.tensordot(rank / (s * (s - 1)), off, axes=1)
  return (jnp.abs(off).mean(0) - pairs).astype(dtype)


@jax.jit
def energy_score(samples: jax.Array, y: jax.Array) -> jax.Array:
  r"""The energy score, the CRPS of vectors, fair in the number of samples.

  .. math:: \frac1S \sum_i \|X_i - y\| - \frac1{S (S - 1)} \sum_{i < j}
    \|X_i - X_j\|

  Args:
    samples: (S, ..., d), floating, S at least 2; flatten what is one vector.
    y: (..., d), what happened.

  Returns:
    (...), in the dtype of ``samples``.

  Raises:
    ValueError: if shapes or dtypes do not fit or S < 2.

  Cost:
    O(S^2 d) an outcome; memory of a few copies of the samples.

  Source:
    Gneiting and Raftery, JASA 2007.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import energy_score
    >>> print(energy_score(jnp.zeros((2, 2)), jnp.array([3.0, 4.0])))
    5.0
  """
  samples, y, dtype = _forecast(samples, y, least=2)
  if not y.ndim:
    raise ValueError("y must have 1 or more dimensions, got shape ()")
  s = len(samples)
  pairs = lax.map(lambda one: _norm(samples - one[None]).sum(0), samples)
  near = _norm(samples - y[None]).mean(0)
  return (near - pairs.sum(0) / (2 * s * (s - 1))).astype(dtype)


@jax.jit
def pinball(samples: jax.Array, y: jax.Array) -> jax.Array:
  r"""The pinball losses of the nine deciles of a forecast.

  .. math:: \max\big( \tau (y - q_\tau),\, (\tau - 1)(y - q_\tau) \big), \qquad
    \tau = 0.1, \dots, 0.9

  with :math:`q_\tau` the linearly interpolated quantile of the samples.

  Args:
    samples: (S, ...), floating.
    y: (...), what happened.

  Returns:
    (9, ...), in the dtype of ``samples``.

  Raises:
    ValueError: if shapes or dtypes do not fit or there are no samples.

  Cost:
    O(S log S) an outcome.

  Source:
    Koenker and Bassett, Econometrica 1978.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import pinball
    >>> print(pinball(jnp.zeros(3), jnp.array(1.0))[4])
    0.5
  """
  samples, y, dtype = _forecast(samples, y, least=1)
  levels = jnp.asarray(_LEVELS, samples.dtype)
  gap = y[None] - jnp.quantile(samples, levels, axis=0)
  levels = jnp.expand_dims(levels, range(1, gap.ndim))
  return jnp.maximum(levels * gap, (levels - 1) * gap).astype(dtype)


@functools.partial(jax.jit, static_argnames="num_bins")
def pit_histogram(
  samples: jax.Array, y: jax.Array, *, num_bins: int = 10
) -> jax.Array:
  r"""The shares of outcomes by their rank among the samples.

  The probability integral transform of an outcome of rank r among S samples,
  (r + 1/2) / (S + 1), is uniform for a calibrated forecast: the shares are then
  equal up to noise, if ``num_bins`` divides S + 1.

  Args:
    samples: (S, ...), floating.
    y: (...), what happened; a tie counts one half.
    num_bins: of equal width.

  Returns:
    (num_bins,), summing to 1, in the dtype of ``samples``.

  Raises:
    ValueError: if shapes or dtypes do not fit, there are no samples, or
      ``num_bins`` < 1.

  Cost:
    O(S) an outcome.

  Source:
    Dawid, JRSS A 1984.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import pit_histogram
    >>> samples = jnp.tile(jnp.arange(3.0)[:, None], (1, 2))
    >>> print(pit_histogram(samples, jnp.array([-1.0, 9.0]), num_bins=4))
    [0.5 0.  0.  0.5]
  """
  _checks.check_integer("num_bins", num_bins, 1, None)
  samples, y, dtype = _forecast(samples, y, least=1)
  below = (samples < y[None]).sum(0) + (samples == y[None]).sum(0) / 2
  pit = (below + 0.5) / (len(samples) + 1)
  at = jnp.clip((pit * num_bins).astype(int), 0, num_bins - 1)
  count = jnp.zeros(num_bins, samples.dtype).at[at.ravel()].add(1)
  return (count / y.size).astype(dtype)


@jax.jit
def memorization_ratio(samples: jax.Array, train: jax.Array) -> jax.Array:
  r"""How near samples are to data that a model was trained on.

  .. math:: \frac{\operatorname{mean}_i \min_j \|x_i - y_j\|}
    {\operatorname{mean}_i \min_{j \ne i} \|y_i - y_j\|}

  0 for copies, about 1 for new draws of the same distribution.

  Args:
    samples: (n, d), floating.
    train: (m, d), floating, m at least 2 and not all equal.

  Returns:
    (), in the dtype of ``samples``.

  Raises:
    ValueError: if shapes or dtypes do not fit or m < 2.

  Cost:
    O((n + m) m d) time, O(m d + n) memory.

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import memorization_ratio
    >>> train = jnp.array([[0.0], [1.0], [2.0]])
    >>> print(memorization_ratio(train[:2], train))
    0.0
    >>> print(memorization_ratio(train + 0.5, train))
    0.5
  """
  _check_cloud("samples", samples, 1)
  _check_cloud("train", train, 2)
  _checks.check_shape("train", train, (None, samples.shape[1]), "(m, d)")
  wide = accumulator(samples.dtype)
  x, y = samples.astype(wide), train.astype(wide)
  nearest = lax.map(lambda one: _norm(y - one[None]).min(), x)

  def other(i: jax.Array) -> jax.Array:
    return _norm(y - y[i][None]).at[i].set(jnp.inf).min()

  between = lax.map(other, jnp.arange(len(y)))
  return (nearest.mean() / between.mean()).astype(samples.dtype)


# --- clouds ---


@jax.jit
def energy_distance(x: jax.Array, y: jax.Array) -> jax.Array:
  r"""The energy distance of two clouds of points.

  .. math:: 2 E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\| \ge 0

  with means over all pairs of the clouds: 0 for the same clouds, up to the root
  of rounding over n, and of the order of 1/n + 1/m for two draws from one
  distribution. In one dimension it is
  the square of what scipy returns.

  Args:
    x: (n, d), floating.
    y: (m, d), floating.

  Returns:
    (), in the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O((n + m)^2 d) time, in products of matrices; O(n + m) rows of memory.

  Source:
    Szekely and Rizzo, 2013.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import energy_distance
    >>> print(energy_distance(jnp.zeros((2, 1)), jnp.ones((3, 1))))
    2.0
  """
  _check_cloud("x", x, 1)
  _check_cloud("y", y, 1)
  _checks.check_shape("y", y, (None, x.shape[1]), "(m, d)")
  wide = accumulator(x.dtype)
  both = jnp.concatenate([x.astype(wide), y.astype(wide)])
  # Products of matrices cancel less around the common mean.
  both = both - both.mean(0, keepdims=True)
  n, total = len(x), len(both)
  one = jnp.where(jnp.arange(total) < n, 1 / n, -1 / (total - n))
  one = one.astype(wide)
  return -_signed_distances(both, one).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="num_projections")
def sliced_w2(
  rng: jax.Array, x: jax.Array, y: jax.Array, *, num_projections: int = 128
) -> jax.Array:
  r"""The sliced Wasserstein distance of two clouds of points.

  .. math:: \Big( E_\theta W_2^2(\theta^\top X, \theta^\top Y) \Big)^{1/2},
    \qquad \theta \text{ uniform on the sphere}

  each one-dimensional distance exactly, from the sorted projections.

  Args:
    rng: PRNG key, for the directions.
    x: (n, d), floating.
    y: (m, d), floating; m need not be n.
    num_projections: how many directions.

  Returns:
    (), in the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit or ``num_projections`` < 1.

  Cost:
    O((n + m)(d + log(n + m))) a direction; memory of one direction.

  Source:
    Bonneel et al., JMIV 2015.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import sliced_w2
    >>> x = jnp.array([[0.0], [1.0]])
    >>> print(sliced_w2(jax.random.key(0), x, x[::-1] + 3))
    3.0
  """
  _check_cloud("x", x, 1)
  _check_cloud("y", y, 1)
  _checks.check_shape("y", y, (None, x.shape[1]), "(m, d)")
  _checks.check_integer("num_projections", num_projections, 1, None)
  wide = accumulator(x.dtype)
  x_wide, y_wide = x.astype(wide), y.astype(wide)
  theta = jax.random.normal(rng, (num_projections, x.shape[1]), wide)
  theta = theta / _norm(theta)[:, None]
  i, j, weights = _coupling(len(x), len(y))

  def one(direction: jax.Array) -> jax.Array:
    gap = jnp.sort(x_wide @ direction)[i] - jnp.sort(y_wide @ direction)[j]
    return jnp.asarray(weights, wide) @ gap**2

  return jnp.sqrt(lax.map(one, theta).mean()).astype(x.dtype)


@jax.jit
def gaussian_w2(
  m1: jax.Array, c1: jax.Array, m2: jax.Array, c2: jax.Array
) -> jax.Array:
  r"""The W2 distance of two Gaussians.

  .. math:: W_2^2 = \|m_1 - m_2\|^2 + \operatorname{tr} \big( C_1 + C_2
    - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2} \big)

  Args:
    m1: (d,), floating.
    c1: (d, d), positive semidefinite.
    m2: (d,).
    c2: (d, d), positive semidefinite.

  Returns:
    (), W2 itself, in the dtype of ``m1``; of equal Gaussians about the root of
    rounding, because traces cancel.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(d^3).

  Source:
    Dowson and Landau, 1982.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gaussian_w2
    >>> zero, one = jnp.zeros(1), jnp.ones((1, 1))
    >>> print(gaussian_w2(zero + 3, one, zero, 25 * one))
    5.0
  """
  _checks.check_floating("m1", m1)
  _checks.check_rank("m1", m1, 1)
  d = len(m1)
  _checks.check_shape("m2", m2, (d,), "(d,)")
  for name, c in (("c1", c1), ("c2", c2)):
    _checks.check_shape(name, c, (d, d), "(d, d)")
  wide = accumulator(m1.dtype)
  gap = (m1 - m2).astype(wide)
  root = _root(c1.astype(wide))
  cross = jnp.linalg.eigvalsh(root @ c2.astype(wide) @ root)
  traces = jnp.trace(c1) + jnp.trace(c2)
  squared = gap @ gap + traces - 2 * jnp.sqrt(jnp.maximum(cross, 0)).sum()
  return jnp.sqrt(jnp.maximum(squared, 0)).astype(m1.dtype)


# --- exact measures in one dimension ---


def tv_kl_1d(
  gmm: GMM,
  *,
  method: str,
  num_steps: int,
  t_max: float,
  t_min: float = 0.0,
  score_fn: VectorField | None = None,
  corrector: Corrector | None = None,
) -> TVKL:
  r"""Total variation and KL divergence of a solver's law, without samples.

  The solver starts from N(0, 1) at ``t_max`` and takes equal steps on the path
  of :func:`jaxattn.sampling.ou`; its law is compared with the mixture at
  ``t_min``. The law of "ddpm" is carried on a grid of 1401
  points by one Gaussian kernel a step, that of "dpom" by one a step of its
  corrector; a method of the ODE is a map F of z, and its law has the density
  :math:`\varphi(z) / F'(z)` at F(z). With "dpum" positions alone are no Markov
  chain, as velocities last from step to step: sample it.

  Args:
    gmm: of :func:`jaxattn.sampling.gmm_init`, with d = 1.
    method: "ddpm", "dpom", or a method of the ODE with fixed steps.
    num_steps: N; of "dpom", of its predictor.
    t_max: T, where the solver starts.
    t_min: where it ends; methods in the log-SNR need it positive.
    score_fn: (x (n, 1), t) -> (n, 1), hashable; None = the exact score of the
      mixture.
    corrector: of "dpom".

  Returns:
    A :class:`TVKL`.

  Raises:
    ValueError: if d is not 1, ``method`` is unknown or has no exact law here,
      the times or ``corrector`` do not fit, or a component at ``t_min`` or the
      noise of a step is narrower than two spacings of the grid.

  Cost:
    O(1401^2) a step for "ddpm" and "dpom", O(1401 k) scores for the others.

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gmm_init, tv_kl_1d
    >>> gmm = gmm_init([1.0], jnp.zeros((1, 1)), [0.5])
    >>> found = tv_kl_1d(gmm, method="heun", num_steps=100, t_max=5.0)
    >>> print(found.tv < 1e-3, found.is_monotone)
    True True
  """
  d = gmm.means.shape[1]
  if d != 1:
    raise ValueError(f"gmm must be of dimension d = 1, got d = {d}")
  _checks.check_choice("method", method, _EXACT_METHODS)
  ts = schedules.time_grid(
    num_steps, t_min=t_min, t_max=t_max, schedule=schedules.ou()
  ).astype(gmm.means.dtype)
  # Under jit the solver itself cannot look at the times.
  solvers.check_direction(ts, method, schedules.ou())
  corrector = solvers.check_corrector(corrector, method, num_steps)
  _laws.check_resolved(gmm, ts, method, corrector)
  if method == "ddpm":
    return _laws.ddpm_law(gmm, ts, score_fn=score_fn)
  if corrector is not None:
    return _laws.dpom_law(gmm, ts, corrector, score_fn=score_fn)
  return _laws.ode_law(gmm, ts, method=method, score_fn=score_fn)


# --- inside ---


def _forecast(
  samples: jax.Array, y: jax.Array, *, least: int
) -> tuple[jax.Array, jax.Array, Any]:
  _checks.check_floating("samples", samples)
  _checks.check_floating("y", y)
  _checks.check_rank("samples", samples, y.ndim + 1)
  _checks.check_shape("samples", samples, (None, *y.shape), "(S, ...)")
  if len(samples) < least:
    raise ValueError(f"samples must hold {least} or more, got {len(samples)}")
  wide = accumulator(samples.dtype)
  return samples.astype(wide), y.astype(wide), samples.dtype


def _check_cloud(name: str, x: jax.Array, least: int) -> None:
  _checks.check_rank(name, x, 2)
  _checks.check_floating(name, x)
  if len(x) < least or not x.shape[1]:
    raise ValueError(
      f"{name} must hold {least} or more points, got shape {x.shape}"
    )


def _norm(x: jax.Array) -> jax.Array:
  return jnp.sqrt((x**2).sum(-1))


def _signed_distances(x: jax.Array, sign: jax.Array) -> jax.Array:
  """Sum of sign_i sign_j ||x_i - x_j|| over pairs, by blocks of rows."""
  squares = (x**2).sum(1)

  def row(inputs: tuple[jax.Array, ...]) -> jax.Array:
    i, point, square = inputs
    gap = jnp.maximum(square + squares - 2 * (x @ point), 0)
    # A point is at no distance from itself; the products say otherwise.
    return jnp.sqrt(gap).at[i].set(0) @ sign

  indices = jnp.arange(len(x))
  return lax.map(row, (indices, x, squares), batch_size=_ROWS) @ sign


def _coupling(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The monotone coupling of two uniform laws on n and m sorted points."""
  # In units of 1 / (n m), hence exact.
  ends = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
  starts, weights = ends[:-1], np.diff(ends) / (n * m)
  return starts // m, starts // n, weights


def _root(c: jax.Array) -> jax.Array:
  values, vectors = jnp.linalg.eigh(c)
  return (vectors * jnp.sqrt(jnp.maximum(values, 0))[None]) @ vectors.T
