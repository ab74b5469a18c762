r"""How smooth the score of a Gaussian mixture is, and what solvers promise.

The second moment and, where all covariances are equal or within a radius, the
Lipschitz constant of the score are bounded independently of the number of
components, at every time; with them, so are the errors of solvers. Source:
arXiv 2405.16418 for the claims; all formulas are derived here.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator
from jaxattn.sampling import _mixture, schedules
from jaxattn.sampling._mixture import GMM
from jaxattn.sampling.schedules import Schedule
from jaxattn.sampling.solvers import VectorField

__all__ = [
  "ddpm_kl_bound",
  "dpom_steps",
  "dpum_steps",
  "gmm_init_kl_bound",
  "gmm_score_lipschitz_bound",
  "gmm_second_moment",
  "perturbed_score",
  "score_from_denoiser",
]

_jit = functools.partial(jax.jit, static_argnames="schedule")


@_jit
def gmm_second_moment(
  gmm: GMM, t: float | jax.Array, *, schedule: Schedule = schedules.ou()
) -> jax.Array:
  r"""The second moment at time t, exactly.

  .. math:: E \|x_t\|^2 = a^2 \sum_i w_i (\|\mu_i\|^2 + \operatorname{tr}
    \Sigma_i) + b^2 d

  On the path of :func:`ou` it is at most the larger of d and the largest
  :math:`\|\mu_i\|^2 + \operatorname{tr} \Sigma_i`, however many components
  there are.

  Args:
    gmm: of :func:`gmm_init`.
    t: (), the time.
    schedule: of the path.

  Returns:
    ().

  Raises:
    ValueError: if ``t`` is no scalar.

  Cost:
    O(k d).

  Source:
    arXiv 2405.16418 for the claim; the equality is elementary.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gmm_init, gmm_second_moment
    >>> gmm = gmm_init([1.0], jnp.array([[3.0, 0.0]]), [2.0])
    >>> print(gmm_second_moment(gmm, 0.0))
    13.0
  """
  dtype = gmm.means.dtype
  gmm = _widened(gmm)
  t = _mixture.check_time(t, gmm.means.dtype)
  a, b = schedule.signal(t), schedule.noise(t)
  d = gmm.means.shape[1]
  trace = jnp.broadcast_to(gmm.eigenvalues, gmm.means.shape).sum(1)
  each = (gmm.means**2).sum(1) + trace
  found = a**2 * (jnp.exp(gmm.log_weights) @ each) + b**2 * d
  return found.astype(dtype)


def gmm_score_lipschitz_bound(
  gmm: GMM,
  t: float | jax.Array,
  *,
  radius: float | jax.Array | None = None,
  schedule: Schedule = schedules.ou(),
) -> jax.Array:
  r"""A bound on the Lipschitz constant of the score, for any number of terms.

  .. math:: L_t = \max \Big( \frac{1}{\lambda_{\min}},\;
    \frac{\rho^2}{\lambda_{\min}^2} - \frac{1}{\lambda_{\max}} \Big)

  with the extreme variances at t. Within a ``radius``, where
  :math:`\|x - a \mu_i\| \le \rho` for all i, this holds for every mixture. If
  all covariances are equal it holds everywhere with :math:`\rho = a D / 2`, D
  the largest distance of two means, and is attained by two components. For
  different covariances the score has no global Lipschitz constant.

  Args:
    gmm: of :func:`gmm_init`.
    t: (), the time.
    radius: rho, positive; None = everywhere.
    schedule: of the path.

  Returns:
    (); infinity if there is no radius and covariances are not all the same
    numbers.

  Raises:
    ValueError: if ``radius`` is not positive or ``t`` no scalar.

  Cost:
    O(k d) with a radius; O(k^2 d + k d^2) without.

  Source:
    arXiv 2405.16418 for the claim; bound, equality and the counterexample are
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gmm_init, gmm_score_lipschitz_bound
    >>> means = jnp.array([[2.0, 0.0], [-2.0, 0.0]])
    >>> gmm = gmm_init([0.5, 0.5], means, [1.0, 1.0])
    >>> print(gmm_score_lipschitz_bound(gmm, 0.0))
    3.0
    >>> wider = gmm_init([0.5, 0.5], means, [1.0, 2.0])
    >>> print(gmm_score_lipschitz_bound(wider, 0.0))
    inf
  """
  if radius is not None:
    _checks.check_scalar("radius", radius)
    _checks.check_positive("radius", radius)
  return _lipschitz_bound(gmm, t, radius, schedule=schedule)


@_jit
def gmm_init_kl_bound(
  gmm: GMM, t_max: float | jax.Array, *, schedule: Schedule = schedules.ou()
) -> jax.Array:
  r"""A bound on what it costs to start from pure noise.

  .. math:: \mathrm{KL}(p_T \,\|\, N(0, I)) \le \tfrac12 \sum_i w_i \Big(
    a_T^2 \|\mu_i\|^2 + \sum_j (v_{ij} - 1 - \ln v_{ij}) \Big)

  by convexity; an equality for one component. It decays like
  :math:`e^{-2 T}` on the path of :func:`ou`.

  Args:
    gmm: of :func:`gmm_init`.
    t_max: (), T, where the sampler starts.
    schedule: of the path.

  Returns:
    ().

  Raises:
    ValueError: if ``t_max`` is no scalar.

  Cost:
    O(k d).

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gmm_init, gmm_init_kl_bound
    >>> gmm = gmm_init([1.0], jnp.array([[2.0]]), [1.0])
    >>> print(gmm_init_kl_bound(gmm, 1.0).round(4))
    0.2707
  """
  dtype = gmm.means.dtype
  gmm = _widened(gmm)
  v, a, _ = _mixture.variances(gmm, t_max, schedule, gmm.means.dtype)
  term = (v - 1) - jnp.log1p(v - 1)
  each = (a * gmm.means) ** 2 + jnp.broadcast_to(term, gmm.means.shape)
  bound = jnp.exp(gmm.log_weights) @ each.sum(1) / 2
  return bound.astype(dtype)


def score_from_denoiser(
  x: jax.Array,
  t: float | jax.Array,
  denoised: jax.Array,
  *,
  schedule: Schedule,
) -> jax.Array:
  r"""The score that belongs to a denoiser: :math:`s = (a\, D - x) / b^2`.

  Args:
    x: (..., d), floating.
    t: (), the time; not that of the data, where b = 0.
    denoised: D, the mean of the data point given x, as ``x``.
    schedule: of the path.

  Returns:
    (..., d), in the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(d) a point.

  Source:
    Tweedie's formula.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import score_from_denoiser, straight
    >>> x, mean = jnp.array([2.0]), jnp.array([1.0])
    >>> print(score_from_denoiser(x, 0.5, mean, schedule=straight()))
    [-6.]
  """
  _checks.check_floating("x", x)
  _checks.check_shape("denoised", denoised, x.shape, "x.shape")
  t = _mixture.check_time(t, accumulator(x.dtype))
  a, b = schedule.signal(t), schedule.noise(t)
  return ((a * denoised - x) / b**2).astype(x.dtype)


def perturbed_score(
  rng: jax.Array, score_fn: VectorField, score_error: float | jax.Array
) -> VectorField:
  r"""A score with an error of known size.

  .. math:: \hat s(x, t) = s(x, t) + \varepsilon_0 \big( u \cos(w^\top x +
    \varphi) + u' \sin(w^\top x + \varphi) \big), \qquad w \sim N(0, I)

  with orthonormal u and u': a smooth field of Fourier features whose norm is
  :math:`\varepsilon_0` at every x, so that its mean square under every
  :math:`p_t` is exactly :math:`\varepsilon_0^2`. In one dimension only a
  constant field is smooth and of that norm: it is :math:`\pm \varepsilon_0`.

  Args:
    rng: PRNG key; the same key gives the same field.
    score_fn: (x, t) -> (..., d), hashable.
    score_error: epsilon_0, at least 0.

  Returns:
    A function of (x, t), x (..., d).

  Raises:
    ValueError: if ``score_error`` is negative or no scalar.

  Cost:
    O(d) a point beside that of ``score_fn``.

  Source:
    the error assumed by arXiv 2211.01916.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import perturbed_score
    >>> worse = perturbed_score(jax.random.key(0), lambda x, t: -x, 0.25)
    >>> print(jnp.linalg.norm(worse(jnp.ones(3), 1.0) + 1).round(4))
    0.25
  """
  _checks.check_scalar("score_error", score_error)
  _checks.check_nonnegative("score_error", score_error)

  def perturbed(x: jax.Array, t: jax.Array) -> jax.Array:
    size = jnp.asarray(score_error, x.dtype)
    return score_fn(x, t) + size * _unit_field(rng, x)

  return perturbed


def ddpm_kl_bound(
  *,
  lipschitz: float | jax.Array,
  dim: int,
  t_max: float | jax.Array,
  num_steps: int,
  score_error: float | jax.Array,
  second_moment: float | jax.Array,
) -> jax.Array:
  r"""The bound on the KL divergence of "ddpm", of paths and so of samples.

  .. math:: \tfrac12 \big( a^2 m - d\, (a^2 + \ln(1 - a^2)) \big)
    + T \varepsilon_0^2 + d\, T^2 L^2 / N, \qquad a = e^{-T}

  for :func:`ou` with rate 1 and equal steps; the total variation is at most the
  root of half of it. The first term bounds the cost of starting from noise by
  the second moment m alone. Constants: the theory has the last term up to a
  constant; 1 suffices where it can be computed, for one Gaussian.

  Args:
    lipschitz: L, of the score at all times.
    dim: d.
    t_max: T, positive.
    num_steps: N.
    score_error: epsilon_0, root of the mean square.
    second_moment: m = E ||x||^2 of the data.

  Returns:
    ().

  Raises:
    ValueError: if a size is not positive, or an error or moment is negative.

  Cost:
    O(1).

  Source:
    arXiv 2211.01916, theorem 2, recalled; the first term is derived here.

  Example:
    >>> from jaxattn.sampling import ddpm_kl_bound
    >>> bound = ddpm_kl_bound(
    ...   lipschitz=2.0, dim=3, t_max=5.0, num_steps=1000, score_error=0.0,
    ...   second_moment=3.0,
    ... )
    >>> print(bound.round(4))
    0.3001
  """
  _checks.check_integer("dim", dim, 1, None)
  _checks.check_integer("num_steps", num_steps, 1, None)
  for name, value in (("lipschitz", lipschitz), ("t_max", t_max)):
    _checks.check_positive(name, value)
  for name, value in (
    ("score_error", score_error),
    ("second_moment", second_moment),
  ):
    _checks.check_nonnegative(name, value)
  t_max = jnp.asarray(t_max, float)
  a2 = jnp.exp(-2 * t_max)
  start = (a2 * second_moment - dim * (a2 + jnp.log1p(-a2))) / 2
  steps = dim * (t_max * lipschitz) ** 2 / num_steps
  return start + t_max * jnp.asarray(score_error) ** 2 + steps


def dpom_steps(lipschitz: float, dim: int, eps: float) -> int:
  r"""The order of steps of "dpom": :math:`L^3 d / \varepsilon^2`.

  Args:
    lipschitz: L, of the score, positive.
    dim: d.
    eps: total variation asked for, in (0, 1).

  Returns:
    The rate rounded up, without the constants and logarithms that the theory
    leaves open: compare sizes with it, do not run as many.

  Raises:
    ValueError: if an argument is out of range.

  Cost:
    O(1).

  Source:
    arXiv 2305.11798.

  Example:
    >>> from jaxattn.sampling import dpom_steps
    >>> dpom_steps(1.0, 16, 0.25)
    256
  """
  _check_rate(lipschitz, dim, eps)
  return math.ceil(lipschitz**3 * dim / eps**2)


def dpum_steps(lipschitz: float, dim: int, eps: float) -> int:
  r"""The order of steps of "dpum": :math:`L^2 \sqrt d / \varepsilon`.

  Args:
    lipschitz: L, of the score, positive.
    dim: d.
    eps: total variation asked for, in (0, 1).

  Returns:
    The rate rounded up, as in :func:`dpom_steps`.

  Raises:
    ValueError: if an argument is out of range.

  Cost:
    O(1).

  Source:
    arXiv 2305.11798.

  Example:
    >>> from jaxattn.sampling import dpum_steps
    >>> dpum_steps(1.0, 16, 0.25)
    16
  """
  _check_rate(lipschitz, dim, eps)
  return math.ceil(lipschitz**2 * math.sqrt(dim) / eps)


@_jit
def _lipschitz_bound(
  gmm: GMM,
  t: float | jax.Array,
  radius: float | jax.Array | None,
  *,
  schedule: Schedule,
) -> jax.Array:
  dtype = gmm.means.dtype
  gmm = _widened(gmm)
  v, a, _ = _mixture.variances(gmm, t, schedule, gmm.means.dtype)
  least, most = v.min(), v.max()
  rho = a * _diameter(gmm.means) / 2 if radius is None else radius
  bound = jnp.maximum(1 / least, rho**2 / least**2 - 1 / most)
  if radius is None:
    bound = jnp.where(_is_shared(gmm), bound, jnp.inf)
  return bound.astype(dtype)


def _check_rate(lipschitz: float, dim: int, eps: float) -> None:
  _checks.check_positive("lipschitz", lipschitz)
  _checks.check_integer("dim", dim, 1, None)
  _checks.check_range("eps", eps, 0, 1, closed=False)


def _widened(gmm: GMM) -> GMM:
  """The mixture in the dtype that its 16-bit numbers are computed in."""
  wide = accumulator(gmm.means.dtype)
  return jax.tree.map(lambda x: x.astype(wide), gmm)


def _is_shared(gmm: GMM) -> jax.Array:
  """Whether all covariances are the same numbers."""
  shared = (gmm.eigenvalues == gmm.eigenvalues[:1]).all()
  if gmm.eigenvectors is None:
    return shared
  return shared & (gmm.eigenvectors == gmm.eigenvectors[:1]).all()


def _diameter(means: jax.Array) -> jax.Array:
  """The largest distance of two rows; not by products, which cancel."""

  def farthest(mean: jax.Array) -> jax.Array:
    return ((means - mean[None]) ** 2).sum(1).max()

  return jnp.sqrt(lax.map(farthest, means).max())


def _unit_field(rng: jax.Array, x: jax.Array) -> jax.Array:
  """A smooth field of norm 1; (..., d)."""
  d = x.shape[-1]
  rng_u, rng_w, rng_phase = jax.random.split(rng, 3)
  if d == 1:
    return jnp.broadcast_to(
      jax.random.rademacher(rng_u, (1,), x.dtype), x.shape
    )
  u, _ = jnp.linalg.qr(jax.random.normal(rng_u, (d, 2), x.dtype))
  angle = x @ jax.random.normal(rng_w, (d,), x.dtype)
  angle = angle + 2 * math.pi * jax.random.uniform(rng_phase, (), x.dtype)
  return jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1) @ u.T
