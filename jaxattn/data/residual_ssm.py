r"""A state-space task in which the next value may differ in sign from the last.

:math:`u_1 \ldots u_d` are independent N(0, 1), the lags of a latent series, and
:math:`u_{d+1} = \sum_k c_k u_k` is what comes next. Observed is
:math:`x_k = u_k + s\,\xi_k`, asked for :math:`y = u_{d+1} + s\,\xi_{d+1}`, with
independent :math:`\xi \sim N(0, 1)`. A sample is *sign-inconsistent* if
:math:`u_d u_{d+1} < 0`. With :math:`\theta = \arccos(c_d / \|c\|)`, the angle
between :math:`u_d` and :math:`u_{d+1}`, that happens with probability
:math:`\theta / \pi`.

The source writes the lags as orthonormal features of one Gaussian, which is the
same. Its own properties of the coefficients contradict each other: a unit next
feature cannot be :math:`\frac{d-1}{d} P_d + \frac{1}{d(d-1)} \sum_{k<d} P_k`,
whose norm is below 1. ``kind="unit"`` keeps the norm, and a sum of coefficients
of 1, without which no residual linear predictor is exact; ``kind="paper"``
keeps the formula.

Source: arXiv 2412.06061; the closed forms are derived here.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import _checks

__all__ = [
  "ResidualSSM",
  "conditional_moments",
  "inconsistency_probability",
  "permutation_floor",
  "residual_linear_risk",
  "residual_ssm",
  "sample_residual_ssm",
  "sample_sign_inconsistent",
]

_KINDS = ("unit", "paper")
_DEFAULT_GAMMA = 0.5
# Of the least gamma, in float32 too.
_ROUNDING = 1e-6


class ResidualSSM(NamedTuple):
  """One task.

  Attributes:
    coef: (d,), c, of the oldest lag first; d at least 2.
    noise: (), s, the standard deviation of the noise, at least 0.
  """

  coef: jax.Array
  noise: jax.Array


def residual_ssm(
  rng: jax.Array,
  dim: int,
  *,
  gamma: float | jax.Array | None = None,
  noise: float | jax.Array = 0.1,
  kind: str = "unit",
) -> ResidualSSM:
  r"""Draws the coefficients of a task.

  * ``"unit"``: :math:`\|c\| = 1`, :math:`\sum_k c_k = 1` and :math:`c_d =
    \gamma`, and else random: uniform on the sphere that is left.
  * ``"paper"``: :math:`c_d = (d - 1)/d` and :math:`c_k = 1/(d (d - 1))`.
    Nothing is drawn. Samples whose sign changes are rare there, and tiny.

  Args:
    rng: PRNG key.
    dim: d, number of lags: at least 3, and for ``"paper"`` at least 2.
    gamma: of ``"unit"``, in (-1, 1), and not too negative: the sum of 1 asks
      for (1 - gamma) / (1 + gamma) <= d - 1, and where that cannot be checked,
      as it is traced, coefficients are NaN. None = 1/2.
    noise: s, at least 0.
    kind: one of the above.

  Returns:
    A :class:`ResidualSSM`.

  Raises:
    ValueError: if a size, ``gamma`` or ``noise`` is out of range, the kind is
      unknown, or ``gamma`` is given to ``"paper"``, which has its own.

  Cost:
    O(d).

  Source:
    arXiv 2412.06061, section 3; ``"unit"`` is derived here.

  Example:
    >>> import jax
    >>> from jaxattn.data import residual_ssm
    >>> c = residual_ssm(jax.random.key(0), 8).coef
    >>> print(c[-1], c.sum().round(4), (c @ c).round(4))
    0.5 1.0 1.0
  """
  _checks.check_choice("kind", kind, _KINDS)
  _check_dim(dim, kind)
  _checks.check_scalar("noise", noise)
  _checks.check_nonnegative("noise", noise)
  dtype = jnp.result_type(float)
  if kind == "paper":
    if gamma is not None:
      raise ValueError(
        f"gamma must be None for kind='paper', which sets it, got {gamma}"
      )
    coef = jnp.full(dim, 1 / (dim * (dim - 1)), dtype)
    coef = coef.at[-1].set((dim - 1) / dim)
    return ResidualSSM(coef, jnp.asarray(noise, dtype))
  gamma = _DEFAULT_GAMMA if gamma is None else gamma
  _check_gamma(gamma, dim)
  coef = _unit_coefficients(rng, jnp.asarray(gamma, dtype), dim)
  return ResidualSSM(coef, jnp.asarray(noise, dtype))


def sample_residual_ssm(
  rng: jax.Array, ssm: ResidualSSM, num_samples: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws independent samples.

  Args:
    rng: PRNG key.
    ssm: the task.
    num_samples: n.

  Returns:
    x (n, d), what is seen; y (n,), what comes next; and u (n, d + 1), both
    without noise.

  Raises:
    ValueError: if the task's shapes or noise, or ``num_samples``, do not fit.

  Cost:
    O(n d).

  Source:
    arXiv 2412.06061, section 3.

  Example:
    >>> import jax
    >>> from jaxattn.data import residual_ssm, sample_residual_ssm
    >>> ssm = residual_ssm(jax.random.key(0), 8, noise=0.0)
    >>> x, y, u = sample_residual_ssm(jax.random.key(1), ssm, 100)
    >>> x.shape, y.shape, bool((u[:, :-1] == x).all())
    ((100, 8), (100,), True)
  """
  _check_ssm(ssm)
  _checks.check_integer("num_samples", num_samples, 1, None)
  return _sample(rng, ssm, num_samples)


def sample_sign_inconsistent(
  rng: jax.Array, ssm: ResidualSSM, num_samples: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  r"""Draws samples given that the sign changes, without rejecting any.

  In the plane of :math:`u_d` and :math:`u_{d+1}` a Gaussian has a uniform angle
  and a length :math:`\varrho` from :math:`\chi_2`. Signs differ in two opposite
  wedges of angle :math:`\theta`: with U uniform on (0, 1) and a fair sign,

  .. math:: u_d = \mp \varrho \sin(\theta U), \qquad
    u_{d+1} = \pm \|c\| \varrho \sin(\theta (1 - U)),

  and what is orthogonal to both stays Gaussian.

  Args:
    rng: PRNG key.
    ssm: the task.
    num_samples: n.

  Returns:
    As :func:`sample_residual_ssm`. Each u_d u_{d+1} is negative; noise on top
    of it may hide that in x and y.

  Raises:
    ValueError: if the task's shapes or noise, or ``num_samples``, do not fit,
      or the task has weight on its last lag only.

  Cost:
    O(n d).

  Source:
    derived here; the law is that of arXiv 2412.06061, section 5.

  Example:
    >>> import jax
    >>> from jaxattn.data import residual_ssm, sample_sign_inconsistent
    >>> ssm = residual_ssm(jax.random.key(0), 8)
    >>> _, _, u = sample_sign_inconsistent(jax.random.key(1), ssm, 1000)
    >>> bool((u[:, -2] * u[:, -1] < 0).all())
    True
  """
  _check_ssm(ssm)
  _checks.check_integer("num_samples", num_samples, 1, None)
  coef = ssm.coef
  if _checks.is_concrete(coef) and not np.any(np.asarray(coef[:-1])):
    raise ValueError(
      "ssm.coef must have weight on a lag before the last, got "
      f"{np.asarray(coef)}"
    )
  return _sample_inconsistent(rng, ssm, num_samples)


def inconsistency_probability(ssm: ResidualSSM) -> jax.Array:
  r"""Share of sign-inconsistent samples, :math:`\theta / \pi`.

  Args:
    ssm: the task.

  Returns:
    ().

  Raises:
    ValueError: if the task's shapes or noise do not fit.

  Cost:
    O(d).

  Source:
    derived here (the law of the angle of two Gaussians).

  Example:
    >>> import jax
    >>> from jaxattn.data import inconsistency_probability, residual_ssm
    >>> ssm = residual_ssm(jax.random.key(0), 8, gamma=0.5)
    >>> print(inconsistency_probability(ssm).round(4))
    0.3333
  """
  _check_ssm(ssm)
  return _angle(ssm.coef) / jnp.pi


def conditional_moments(ssm: ResidualSSM) -> tuple[jax.Array, jax.Array]:
  r"""Second moments given that the sign changes.

  .. math:: E[u_d^2] = 1 - \frac{\sin\theta \cos\theta}{\theta}, \qquad
    E[u_d u_{d+1}] = \|c\| \big( \cos\theta - \frac{\sin\theta}{\theta} \big)

  Args:
    ssm: the task.

  Returns:
    Both, each (). :math:`E[u_{d+1}^2]` is the first times :math:`\|c\|^2`.

  Raises:
    ValueError: if the task's shapes or noise do not fit.

  Cost:
    O(d).

  Source:
    derived here, from the form that :func:`sample_sign_inconsistent` draws.

  Example:
    >>> import jax
    >>> from jaxattn.data import conditional_moments, residual_ssm
    >>> ssm = residual_ssm(jax.random.key(0), 8, gamma=0.5)
    >>> print(*(m.round(4) for m in conditional_moments(ssm)))
    0.5865 -0.327
  """
  _check_ssm(ssm)
  theta = _angle(ssm.coef)
  sin, cos = jnp.sin(theta), jnp.cos(theta)
  size = jnp.linalg.norm(ssm.coef)
  return 1 - sin * cos / theta, size * (cos - sin / theta)


def residual_linear_risk(
  ssm: ResidualSSM, v: jax.Array | None = None
) -> jax.Array:
  r"""Mean squared error of a residual linear predictor.

  .. math:: \hat y = \langle v, x_{<d} - x_d \rangle + x_d: \qquad
    \|v - c_{<d}\|^2 + \Big( c_d - 1 + \sum_k v_k \Big)^2
    + s^2 \Big( 1 + \|v\|^2 + \big( 1 - \sum_k v_k \big)^2 \Big)

  Where coefficients sum to 1, :math:`v = c_{<d}` leaves noise alone:
  :math:`s^2 (1 + \|c\|^2)`, whatever the law of u, so on sign-inconsistent
  samples too. The best v for a given s is shrunk a little and does better by
  :math:`O(s^4)`.

  Args:
    ssm: the task.
    v: (d - 1,); None = the task's own, c without its last entry.

  Returns:
    (), on samples of :func:`sample_residual_ssm`.

  Raises:
    ValueError: if shapes or the noise do not fit.

  Cost:
    O(d).

  Source:
    derived here; arXiv 2412.06061, proposition J.2, has O(s^2).

  Example:
    >>> import jax
    >>> from jaxattn.data import residual_linear_risk, residual_ssm
    >>> ssm = residual_ssm(jax.random.key(0), 8, noise=0.1)
    >>> print(residual_linear_risk(ssm).round(4))
    0.02
  """
  _check_ssm(ssm)
  coef, noise = ssm
  past = coef[:-1]
  v = past if v is None else jnp.asarray(v)
  _checks.check_shape("v", v, past.shape, "(d - 1,)")
  _checks.check_floating("v", v)
  last = 1 - v.sum()
  bias = ((v - past) ** 2).sum() + (coef[-1] - last) ** 2
  return bias + noise**2 * (1 + v @ v + last**2)


def permutation_floor(ssm: ResidualSSM) -> jax.Array:
  r"""What no predictor that ignores the order of past lags gets below.

  .. math:: \sum_{k < d} (c_k - \bar c)^2, \qquad
    \bar c = \frac{1}{d - 1} \sum_{k<d} c_k

  A function of :math:`x_d` and of the *set* of the other lags cannot know which
  of them has which coefficient: the variance of y over all their orders is lost
  in any case, and noise comes on top. Attention without positions is such a
  function.

  Args:
    ssm: the task.

  Returns:
    (), a mean squared error on samples of :func:`sample_residual_ssm`.

  Raises:
    ValueError: if the task's shapes or noise do not fit.

  Cost:
    O(d).

  Source:
    derived here; in place of proposition J.1 of arXiv 2412.06061, which has no
    proof.

  Example:
    >>> import jax
    >>> from jaxattn.data import permutation_floor, residual_ssm
    >>> ssm = residual_ssm(jax.random.key(0), 8, gamma=0.5)
    >>> print(permutation_floor(ssm).round(4))
    0.7143
  """
  _check_ssm(ssm)
  past = ssm.coef[:-1]
  return ((past - past.mean()) ** 2).sum()


def _check_dim(dim: int, kind: str) -> None:
  least = 3 if kind == "unit" else 2
  if isinstance(dim, (int, np.integer)) and dim < least:
    raise ValueError(f"dim must be >= {least} for kind={kind!r}, got {dim}")
  _checks.check_integer("dim", dim, least, None)


def _check_gamma(gamma: float | jax.Array, dim: int) -> None:
  _checks.check_scalar("gamma", gamma)
  _checks.check_range("gamma", gamma, -1, 1, closed=False)
  if not _checks.is_concrete(gamma):
    return
  squared = (1 - float(gamma)) / (1 + float(gamma))
  # The least gamma itself may round to either side.
  if squared > (dim - 1) * (1 + _ROUNDING):
    raise ValueError(
      f"gamma too negative for dim={dim}: (1 - gamma) / (1 + gamma) must be at "
      f"most dim - 1, got gamma={gamma}"
    )


def _check_ssm(ssm: ResidualSSM) -> None:
  _checks.check_rank("ssm.coef", ssm.coef, 1)
  _checks.check_floating("ssm.coef", ssm.coef)
  if len(ssm.coef) < 2:
    raise ValueError(f"ssm.coef must have 2 entries or more, got {ssm.coef}")
  _checks.check_scalar("ssm.noise", ssm.noise)
  _checks.check_nonnegative("ssm.noise", ssm.noise)


@functools.partial(jax.jit, static_argnames="dim")
def _unit_coefficients(rng: jax.Array, gamma: jax.Array, dim: int) -> jax.Array:
  num = dim - 1
  # Along the ones: what makes the sum 1. Across: a direction at random.
  squared = (1 - gamma) / (1 + gamma)
  left = 1 - squared / num
  # At the least gamma there is nothing left, but for rounding.
  left = jnp.where(left < -_ROUNDING, jnp.nan, jnp.maximum(left, 0))
  across = jax.random.normal(rng, (num,), gamma.dtype)
  across -= across.mean()
  across *= jnp.sqrt(left) / jnp.linalg.norm(across)
  past = jnp.sqrt(1 - gamma**2) * (jnp.sqrt(squared) / num + across)
  return jnp.append(past, gamma)


def _angle(coef: jax.Array) -> jax.Array:
  # Not arccos, which has no digits near 1.
  return jnp.arctan2(jnp.linalg.norm(coef[:-1]), coef[-1])


@functools.partial(jax.jit, static_argnames="num_samples")
def _sample(
  rng: jax.Array, ssm: ResidualSSM, num_samples: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  rng_u, rng_noise = jax.random.split(rng)
  coef = ssm.coef
  u = jax.random.normal(rng_u, (num_samples, len(coef)), coef.dtype)
  return _observe(rng_noise, u, u @ coef, ssm.noise)


@functools.partial(jax.jit, static_argnames="num_samples")
def _sample_inconsistent(
  rng: jax.Array, ssm: ResidualSSM, num_samples: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  rng_u, rng_angle, rng_side, rng_size, rng_noise = jax.random.split(rng, 5)
  coef, n = ssm.coef, num_samples
  size = jnp.linalg.norm(coef[:-1])
  direction = coef[:-1] / size
  # Never 0, where neither sign is one.
  tiny = jnp.finfo(coef.dtype).tiny
  share = jax.random.uniform(rng_angle, (n,), coef.dtype, minval=tiny)
  side = jax.random.rademacher(rng_side, (n,), coef.dtype)
  length = side * jnp.sqrt(
    2 * jax.random.exponential(rng_size, (n,), coef.dtype)
  )
  theta = _angle(coef)
  past = jax.random.normal(rng_u, (n, len(coef) - 1), coef.dtype)
  along = length * jnp.cos(theta * share) - past @ direction
  past += along[:, None] * direction[None]
  last = -length * jnp.sin(theta * share)
  following = jnp.hypot(size, coef[-1]) * length
  following *= jnp.sin(theta * (1 - share))
  u = jnp.concatenate([past, last[:, None]], 1)
  return _observe(rng_noise, u, following, ssm.noise)


def _observe(
  rng: jax.Array, u: jax.Array, following: jax.Array, noise: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  u = jnp.concatenate([u, following[:, None]], 1)
  seen = u + noise * jax.random.normal(rng, u.shape, u.dtype)
  return seen[:, :-1], seen[:, -1], u
