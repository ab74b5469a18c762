r"""Flow matching for forecasts: losses, a polynomial regularizer, oracles.

A flow carries noise z to data y along :math:`x_t = t y + (1 - t) z`, see
:func:`jaxattn.sampling.straight`. A velocity v is trained by

.. math::

  \mathcal L = E \| v(x_t, t, c) - u \|^2, \qquad u = y - z, \qquad
  v^* = E[u \mid x_t, c] = \frac{D - x_t}{1 - t}, \qquad
  \mathcal L(v) = \mathcal L(v^*) + E \| v - v^* \|^2,

with t uniform and D = E[y | x_t, c] the denoiser: the second term is the
excess, what a perfect model has none of. For a Gaussian, and for finitely many
data, v* and the least loss are known here exactly.

The regularizer asks that the end point which the model itself expects,
:math:`\hat y = x_t + (1 - t) v`, be a polynomial in time up to a degree K:

.. math:: R = E \sum_k \omega_k \langle q_k, \hat y \rangle^2

over an orthonormal basis of polynomials q. With N the projection onto all
degrees above K and :math:`\omega` 0 up to K and 1 beyond, the pointwise
minimizer of :math:`\mathcal L + \lambda R` is v* up to degree K and

.. math:: N v = \frac{N v^* - \lambda (1 - t) N x}{1 + \lambda (1 - t)^2}

beyond: with :math:`\lambda` it loses variance that data have. Source: arXiv
2503.14076 for the regularizer and its claim, arXiv 2210.02747 for the loss; the
formulas are derived here.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import _checks
from jaxattn.attention import softmax_attention
from jaxattn.numerics._dtypes import accumulator
from jaxattn.sampling import _mixture, schedules
from jaxattn.sampling.schedules import Schedule, path_sample

__all__ = [
  "CFMInfo",
  "FlowLossInfo",
  "GDView",
  "cfm_loss",
  "empirical_velocity",
  "flow_loss",
  "gaussian_cfm_floor",
  "gaussian_velocity",
  "gd_view",
  "polynomial_basis",
  "polynomial_regularizer",
]

_T_SAMPLERS = ("uniform", "antithetic", "logit_normal")
_KINDS = ("hard", "smooth")
# Nearer to t = 1 the velocity towards a point is that of here.
_NEAREST = 1e-4

Velocity = Callable[[jax.Array, jax.Array, Any], jax.Array]


class CFMInfo(NamedTuple):
  """What :func:`cfm_loss` saw.

  Attributes:
    t: (B,) times.
    squares: (B,) squared errors, summed over coordinates.
    per_dim: () the loss over the number of coordinates.
  """

  t: jax.Array
  squares: jax.Array
  per_dim: jax.Array


class FlowLossInfo(NamedTuple):
  """The parts of :func:`flow_loss`, all ().

  Attributes:
    cfm: the loss of flow matching.
    regularizer: R, not yet weighted.
    per_dim: ``cfm`` over the number of coordinates.
  """

  cfm: jax.Array
  regularizer: jax.Array
  per_dim: jax.Array


class GDView(NamedTuple):
  """A step of Euler's method as one of gradient descent.

  Attributes:
    x_next: (..., d) the point after it.
    gd_step_size: () or (...), the step size of gradient descent.
    objective: (...) what descends, at the point before.
  """

  x_next: jax.Array
  gd_step_size: jax.Array
  objective: jax.Array


# --- losses ---


def cfm_loss(
  rng: jax.Array,
  velocity_fn: Velocity,
  y: jax.Array,
  cond: Any,
  *,
  schedule: Schedule = schedules.straight(),
  t_sampler: str = "uniform",
) -> tuple[jax.Array, CFMInfo]:
  r"""The loss of conditional flow matching, one time and noise for each row.

  .. math:: \frac1B \sum_b \| v(x_b, t_b, c) - u_b \|^2

  summed, not averaged, over coordinates: only so is it to be compared with
  :func:`gaussian_cfm_floor`, and only for uniform times.

  Args:
    rng: PRNG key.
    velocity_fn: (x, t, cond) -> the shape of x, which is that of ``y``; t is
      (B,).
    y: (B, ...), floating: the data, as (B, T, C).
    cond: what the velocity depends on beside, any pytree, passed on as it is.
    schedule: a path with data at t = 1, as :func:`straight`.
    t_sampler: "uniform"; "antithetic", uniform in pairs t and 1 - t, with less
      variance; or "logit_normal", the logistic function of N(0, 1), which
      weights the middle. Do not reweight the last one to compare with uniform
      times: the weights have infinite variance. Evaluate with "uniform".

  Returns:
    The loss, (), and a :class:`CFMInfo`, in float32 or wider.

  Raises:
    ValueError: if shapes or dtypes do not fit, ``y`` is not finite somewhere,
      data of the schedule are not at t = 1, or ``t_sampler`` is unknown.

  Cost:
    One evaluation of the velocity on B rows.

  Source:
    arXiv 2210.02747; arXiv 2403.03206 for logit-normal times.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import cfm_loss
    >>> to_zero = lambda x, t, cond: -x / (1 - t[:, None])
    >>> loss, _ = cfm_loss(jax.random.key(0), to_zero, jnp.zeros((8, 3)), None)
    >>> bool(loss < 1e-6)
    True
  """
  parts = _match(rng, velocity_fn, y, cond, schedule, t_sampler)
  return parts.loss, parts.info


def flow_loss(
  rng: jax.Array,
  params: Any,
  batch: tuple[Any, jax.Array],
  *,
  apply_fn: Callable[..., jax.Array],
  reg_weight: float | jax.Array = 0.0,
  degree: int = 3,
  kind: str = "hard",
  schedule: Schedule = schedules.straight(),
  t_sampler: str = "uniform",
) -> tuple[jax.Array, FlowLossInfo]:
  r"""The loss of a forecaster, :math:`\mathcal L + \lambda R`.

  Args:
    rng: PRNG key.
    params: of the model.
    batch: (history, future): any pytree, and (B, T, C), floating.
    apply_fn: (params, x, t, history) -> (B, T, C), the model.
    reg_weight: lambda, at least 0.
    degree: K, up to which nothing is penalized; below T.
    kind: "hard", with weight 1 on all degrees k above K, or "smooth", with
      ((k - K) / (T - 1 - K))^2.
    schedule: as in :func:`cfm_loss`.
    t_sampler: as in :func:`cfm_loss`.

  Returns:
    The loss, (), and a :class:`FlowLossInfo`.

  Raises:
    ValueError: if shapes or dtypes do not fit, ``reg_weight`` is negative,
      ``degree`` is not in [0, T - 1], or a name is unknown.

  Cost:
    One evaluation of the model, and O(B T^2 C).

  Source:
    arXiv 2503.14076 (the idea); the form is this project's.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import flow_loss
    >>> apply_fn = lambda params, x, t, history: params * x
    >>> batch = jnp.zeros((4, 6, 1)), jnp.ones((4, 5, 1))
    >>> loss, info = flow_loss(
    ...   jax.random.key(0), 0.5, batch, apply_fn=apply_fn, reg_weight=2.0
    ... )
    >>> bool(jnp.isclose(loss, info.cfm + 2 * info.regularizer))
    True
  """
  cond, y = batch
  y = jnp.asarray(y)
  _checks.check_rank("future", y, 3)
  _checks.check_scalar("reg_weight", reg_weight)
  _checks.check_nonnegative("reg_weight", reg_weight)
  weights = _degree_weights(y.shape[1], degree, kind)
  velocity = functools.partial(apply_fn, params)
  parts = _match(rng, velocity, y, cond, schedule, t_sampler)
  basis = polynomial_basis(y.shape[1], y.shape[1] - 1)
  wide = parts.loss.dtype
  penalty = polynomial_regularizer(
    parts.x,
    parts.info.t,
    parts.v,
    basis.astype(wide),
    jnp.asarray(weights, wide),
  )
  info = FlowLossInfo(parts.loss, penalty, parts.info.per_dim)
  if _checks.is_concrete(reg_weight) and reg_weight == 0:
    return parts.loss, info
  return parts.loss + jnp.asarray(reg_weight, wide) * penalty, info


def polynomial_basis(length: int, degree: int) -> jax.Array:
  r"""Polynomials orthonormal on equally spaced points of [-1, 1].

  The Gram polynomials q_0 to q_K, of positive leading coefficients: column k is
  what is left of :math:`\tau q_{k-1}` beside the columns before, normalized.
  Orthogonalizing twice keeps this exact at any degree, where the powers of
  :math:`\tau` run out of digits beyond 12.

  Args:
    length: T, the number of points.
    degree: K, in [0, T - 1].

  Returns:
    (T, K + 1), of the default floating dtype, computed in float64.

  Raises:
    ValueError: if ``length`` < 1 or ``degree`` is not in [0, length - 1].

  Cost:
    O(T K^2) on the host, once for each pair of arguments.

  Source:
    Gram, 1883; the orthogonalization is Arnoldi's.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import polynomial_basis
    >>> q = polynomial_basis(24, 3)
    >>> q.shape, bool(abs(q.T @ q - jnp.eye(4)).max() < 1e-6)
    ((24, 4), True)
  """
  _checks.check_integer("length", length, 1, None)
  _checks.check_integer("degree", degree, 0, length - 1)
  return jnp.asarray(_basis(length)[:, : degree + 1])


def polynomial_regularizer(
  x_t: jax.Array,
  t: jax.Array,
  v: jax.Array,
  basis: jax.Array,
  weights: jax.Array,
) -> jax.Array:
  r"""How far end points are from polynomials in time.

  .. math:: R = \frac1B \sum_b \sum_{k, c} \omega_k
    \langle q_k, \hat y_{b, :, c} \rangle^2, \qquad
    \hat y = x_t + (1 - t) v

  Args:
    x_t: (B, T, C), floating, points of the path.
    t: (B,), their times, in [0, 1].
    v: (B, T, C), the model's velocities there.
    basis: (T, K), orthonormal columns, as of :func:`polynomial_basis`.
    weights: (K,), omega, at least 0.

  Returns:
    (), in float32 or wider.

  Raises:
    ValueError: if shapes or dtypes do not fit, a weight is negative or a time
      is not in [0, 1].
    checkify.JaxRuntimeError: for the last of these from ``err.throw()`` of a
      checkified caller, where times are traced.

  Cost:
    O(B T K C).

  Source:
    arXiv 2503.14076 (the idea); the form is this project's.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import polynomial_basis, polynomial_regularizer
    >>> line = jnp.arange(5.0).reshape(1, 5, 1)
    >>> basis, t = polynomial_basis(5, 2), jnp.ones(1)
    >>> weights = jnp.array([0.0, 0.0, 1.0])  # of the degrees 0, 1 and 2
    >>> r = polynomial_regularizer(line, t, line, basis, weights)
    >>> print(bool(r < 1e-9))
    True
  """
  x_t, t, v = jnp.asarray(x_t), jnp.asarray(t), jnp.asarray(v)
  _checks.check_rank("x_t", x_t, 3)
  _checks.check_floating("x_t", x_t)
  _checks.check_shape("v", v, x_t.shape, "that of x_t")
  _checks.check_floating("v", v)
  _checks.check_shape("t", t, x_t.shape[:1], "(B,)")
  schedules.check_times(t, 1.0)
  _checks.check_shape("basis", basis, (x_t.shape[1], None), "(T, K)")
  _checks.check_shape("weights", weights, basis.shape[1:], "(K,)")
  _checks.check_nonnegative("weights", weights)
  wide = accumulator(x_t.dtype)
  left = (1 - t.astype(wide))[:, None, None]
  end = x_t.astype(wide) + left * v.astype(wide)
  shares = jnp.einsum("btc,tk->bkc", end, basis.astype(wide))
  total = ((shares**2).sum((0, 2)) * weights.astype(wide)).sum()
  return total / len(x_t)


# --- oracles ---


def gaussian_velocity(
  x: jax.Array, t: float | jax.Array, mean: jax.Array, cov: jax.Array
) -> jax.Array:
  r"""The best velocity if data are N(m, Sigma), given the condition.

  .. math:: v^* = m + (t \Sigma - (1 - t) I)
    (t^2 \Sigma + (1 - t)^2 I)^{-1} (x - t m)

  Following it carries z exactly to :math:`m + \Sigma^{1/2} z`. Where Sigma is 0
  this is the velocity towards a point, with 1 - t no less than 1e-4.

  Args:
    x: (..., d), floating.
    t: (), or the leading shape of x; in [0, 1].
    mean: (d,), or the shape of ``x``: one for each condition.
    cov: (d, d), positive semidefinite, or (d,), its diagonal.

  Returns:
    (..., d), in the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit, ``cov`` is not symmetric or not
      positive semidefinite, or a time is not in [0, 1].
    checkify.JaxRuntimeError: for the last of these from ``err.throw()`` of a
      checkified caller, where times are traced.

  Cost:
    O(d^3) a call, O(d^2) a point; O(d) for a diagonal. For many calls, rotate
    into the eigenbasis once, or take :func:`gmm_velocity`, which has.

  Source:
    derived here; arXiv 2210.02747 for the path.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gaussian_velocity
    >>> x, mean = jnp.array([3.0, 1.0]), jnp.array([1.0, 0.0])
    >>> print(gaussian_velocity(x, 0.5, mean, jnp.zeros(2)))
    [-4. -2.]
    >>> print(gaussian_velocity(x, 0.5, mean, jnp.eye(2)))
    [1. 0.]
  """
  x, t, mean = jnp.asarray(x), jnp.asarray(t), jnp.asarray(mean)
  cov = jnp.asarray(cov)
  _check_points(x, t)
  _checks.check_floating("mean", mean)
  if mean.shape != x.shape:
    _checks.check_shape("mean", mean, x.shape[-1:], "(d,), or that of x")
  _check_covariance(cov, x.shape[-1])
  return _gaussian_velocity(x, t, mean, cov)


def gaussian_cfm_floor(cov: jax.Array) -> jax.Array:
  r"""The least loss of flow matching if data are Gaussian.

  .. math:: \mathcal L(v^*) = \frac\pi2 \operatorname{tr} \Sigma^{1/2}

  It holds for uniform times on :func:`straight`, without ``sigma_min``, summed
  over coordinates: per eigenvalue the conditional variance of u is
  :math:`\lambda / (t^2 \lambda + (1 - t)^2)`, and its integral
  :math:`\frac\pi2 \sqrt\lambda`.

  Args:
    cov: (d, d), positive semidefinite, or (d,), its diagonal.

  Returns:
    (), in the dtype of ``cov``.

  Raises:
    ValueError: if the shape or dtype does not fit, or ``cov`` is not symmetric
      or not positive semidefinite.

  Cost:
    O(d^3); O(d) for a diagonal.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gaussian_cfm_floor
    >>> print(f"{gaussian_cfm_floor(jnp.array([1.0, 4.0])):.4f}")
    4.7124
  """
  cov = jnp.asarray(cov)
  _checks.check_rank("cov", cov, (1, 2))
  _check_covariance(cov, cov.shape[0])
  values, _ = _eigen(cov)
  return (math.pi / 2 * jnp.sqrt(values).sum()).astype(cov.dtype)


def empirical_velocity(
  x: jax.Array,
  t: float | jax.Array,
  data: jax.Array,
  *,
  log_weights: jax.Array | None = None,
) -> jax.Array:
  r"""The best velocity if data are a finite set: one call of attention.

  .. math:: v^* = \sum_i \omega_i \frac{y_i - x}{1 - t}, \qquad \omega =
    \operatorname{softmax}_i \Big( \ln w_i - \frac{\|x - t y_i\|^2}
    {2 (1 - t)^2} \Big)

  Following it ends on the data: this is what a model that memorizes learns.
  1 - t is no less than 1e-4.

  Args:
    x: (..., d), floating.
    t: (), or the leading shape of x; in [0, 1].
    data: (n, d), floating.
    log_weights: (n,), up to a constant; -inf leaves one out. None = all equal.

  Returns:
    (..., d), in the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit, or a time is not in [0, 1].
    checkify.JaxRuntimeError: for the last of these from ``err.throw()`` of a
      checkified caller, where times are traced.

  Cost:
    O(n d) a point; memory of a tile of weights.

  Source:
    derived here; arXiv 2210.02747 for the path.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import empirical_velocity
    >>> data = jnp.array([[1.0], [-1.0]])
    >>> print(empirical_velocity(jnp.zeros(1), 0.5, data))
    [0.]
    >>> print(empirical_velocity(jnp.zeros(1), 0.5, data[:1]))
    [2.]
  """
  x, t, data = jnp.asarray(x), jnp.asarray(t), jnp.asarray(data)
  _check_points(x, t)
  _checks.check_floating("data", data)
  _checks.check_shape("data", data, (None, x.shape[-1]), "(n, d)")
  if not len(data):
    raise ValueError("data must hold a point, got none")
  if log_weights is not None:
    log_weights = jnp.asarray(log_weights)
    _checks.check_shape("log_weights", log_weights, data.shape[:1], "(n,)")
  return _empirical_velocity(x, t, data, log_weights)


def gd_view(
  x: jax.Array,
  t: float | jax.Array,
  step_size: float | jax.Array,
  denoised: jax.Array,
) -> GDView:
  r"""Euler's step on the straight path, seen as gradient descent.

  .. math:: x + h v = x - \zeta \nabla J(x), \qquad \zeta = \frac{h}{1 - t},
    \qquad J(x) = \tfrac12 \| x - D \|^2

  with the target D held fixed: it moves from step to step. On N equal steps
  zeta is 1/(N - k), and the last one jumps onto D; on a grid of kind "log" of
  :func:`time_grid` zeta is constant.

  Args:
    x: (..., d), floating.
    t: (), or the leading shape of x; in [0, 1).
    step_size: h, () or the leading shape of x.
    denoised: D, the shape of ``x``: E[y | x], as :func:`gmm_denoise` has it.

  Returns:
    A :class:`GDView`, in the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit, or a time is not in [0, 1).

  Cost:
    O(size of x).

  Source:
    arXiv 2503.14076 (the claim); derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import gd_view
    >>> view = gd_view(jnp.zeros(1), 0.5, 0.25, jnp.ones(1))
    >>> print(view.x_next, view.gd_step_size, view.objective)
    [0.5] 0.5 0.5
  """
  x, t = jnp.asarray(x), jnp.asarray(t)
  step_size, denoised = jnp.asarray(step_size), jnp.asarray(denoised)
  _check_points(x, t)
  if _checks.is_concrete(t) and np.any(np.asarray(t) == 1):
    raise ValueError(f"t must be below 1, got {t}")
  if step_size.ndim:
    _checks.check_shape("step_size", step_size, x.shape[:-1], "x.shape[:-1]")
  _checks.check_shape("denoised", denoised, x.shape, "that of x")
  size = step_size.astype(x.dtype) / (1 - t.astype(x.dtype))
  gap = denoised.astype(x.dtype) - x
  x_next = x + jnp.expand_dims(size, range(size.ndim, x.ndim)) * gap
  return GDView(x_next, size, (gap**2).sum(-1) / 2)


# --- inside ---


class _Matched(NamedTuple):
  """A loss, and where it was taken."""

  loss: jax.Array
  info: CFMInfo
  x: jax.Array
  v: jax.Array


def _match(
  rng: jax.Array,
  velocity_fn: Velocity,
  y: jax.Array,
  cond: Any,
  schedule: Schedule,
  t_sampler: str,
) -> _Matched:
  y = jnp.asarray(y)
  _checks.check_floating("y", y)
  if y.ndim < 2 or not y.size:
    raise ValueError(f"y must be (B, ...) and not empty, got shape {y.shape}")
  _mixture.check_finite("y", y)
  _checks.check_choice("t_sampler", t_sampler, _T_SAMPLERS)
  if schedule.data_time != 1:
    raise ValueError(
      f"schedule must have its data at t = 1, got {schedule.name} with data at "
      f"t = {schedule.data_time}"
    )
  wide = accumulator(y.dtype)
  rng_t, rng_z = jax.random.split(rng)
  t = _draw_times(rng_t, len(y), t_sampler, wide)
  rows = y.astype(wide).reshape(len(y), -1)
  x, u = path_sample(rng_z, rows, t, schedule=schedule)
  x = x.reshape(y.shape).astype(y.dtype)
  v = velocity_fn(x, t, cond)
  _checks.check_shape("the velocity", v, y.shape, "that of y")
  squares = ((v.astype(wide).reshape(u.shape) - u) ** 2).sum(1)
  loss = squares.mean()
  return _Matched(loss, CFMInfo(t, squares, loss / rows.shape[1]), x, v)


def _draw_times(
  rng: jax.Array, num: int, sampler: str, dtype: Any
) -> jax.Array:
  if sampler == "uniform":
    return jax.random.uniform(rng, (num,), dtype)
  if sampler == "logit_normal":
    return jax.nn.sigmoid(jax.random.normal(rng, (num,), dtype))
  half = jax.random.uniform(rng, ((num + 1) // 2,), dtype)
  return jnp.concatenate([half, 1 - half])[:num]


def _degree_weights(length: int, degree: int, kind: str) -> np.ndarray:
  """(T,) weights of the degrees 0 to T - 1."""
  _checks.check_choice("kind", kind, _KINDS)
  _checks.check_integer("degree", degree, 0, length - 1)
  above = np.maximum(np.arange(length) - degree, 0)
  if kind == "hard":
    return (above > 0).astype(float)
  return (above / max(length - 1 - degree, 1)) ** 2


@functools.lru_cache(maxsize=64)
def _basis(length: int) -> np.ndarray:
  """(T, T), all degrees, in float64."""
  tau = np.linspace(-1, 1, length)
  basis = np.full((length, length), length**-0.5)
  for k in range(1, length):
    before, q = basis[:, :k], tau * basis[:, k - 1]
    for _ in range(2):
      q = q - before @ (before.T @ q)
    basis[:, k] = q / np.linalg.norm(q)
  return basis


def _check_points(x: jax.Array, t: jax.Array) -> None:
  _checks.check_floating("x", x)
  if not x.ndim:
    raise ValueError("x must have 1 or more dimensions, got shape ()")
  if t.ndim:
    _checks.check_shape("t", t, x.shape[:-1], "x.shape[:-1]")
  schedules.check_times(t, 1.0)


def _check_covariance(cov: jax.Array, d: int) -> None:
  _checks.check_floating("cov", cov)
  if cov.shape not in ((d,), (d, d)):
    raise ValueError(
      f"cov must have shape ({d}, {d}) or ({d},), got {cov.shape}"
    )
  if cov.ndim == 2:
    _mixture.check_symmetric(cov, "cov")
  if _checks.is_concrete(cov):
    values = cov if cov.ndim == 1 else jnp.linalg.eigvalsh(_widened(cov))
    _mixture.check_semidefinite(values, "cov")


def _widened(x: jax.Array) -> jax.Array:
  return x.astype(accumulator(x.dtype))


def _eigen(cov: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """Eigenvalues, at least 0, and eigenvectors; None = the axes."""
  cov = _widened(cov)
  if cov.ndim == 1:
    return jnp.maximum(cov, 0), None
  values, vectors = jnp.linalg.eigh(cov)
  return jnp.maximum(values, 0), vectors


@jax.jit
def _gaussian_velocity(
  x: jax.Array, t: jax.Array, mean: jax.Array, cov: jax.Array
) -> jax.Array:
  dtype, wide = x.dtype, accumulator(x.dtype)
  values, vectors = _eigen(cov.astype(wide))
  values = jnp.expand_dims(values, range(x.ndim - 1))
  t = jnp.expand_dims(t.astype(wide), range(t.ndim, x.ndim))
  mean = jnp.expand_dims(mean.astype(wide), range(x.ndim - mean.ndim))
  x, left = x.astype(wide), 1 - t
  if vectors is not None:
    x, mean = x @ vectors, mean @ vectors
  point = values == 0
  variance = jnp.where(point, 1, t**2 * values + left**2)
  gain = (t * values - left) / variance
  velocity = mean + gain * (x - t * mean)
  to_point = (mean - x) / jnp.maximum(left, _NEAREST)
  velocity = jnp.where(point, to_point, velocity)
  if vectors is not None:
    velocity = velocity @ vectors.T
  return velocity.astype(dtype)


@jax.jit
def _empirical_velocity(
  x: jax.Array,
  t: jax.Array,
  data: jax.Array,
  log_weights: jax.Array | None,
) -> jax.Array:
  wide = accumulator(x.dtype)
  data = data.astype(wide)
  # Around their mean, squares of the data cancel less.
  center = data.mean(0)
  keys = data - center[None]
  rows = x.astype(wide).reshape(-1, x.shape[-1])
  t = jnp.broadcast_to(t.astype(wide), x.shape[:-1]).reshape(-1, 1)
  left = jnp.maximum(1 - t, _NEAREST)
  offsets = rows - t * center[None]
  # The logits, up to what all data share, as one product.
  query = jnp.concatenate([offsets, -t / 2], axis=1) * (t / left**2)
  key = jnp.concatenate([keys, (keys**2).sum(1, keepdims=True)], axis=1)
  bias = None if log_weights is None else log_weights.astype(wide)[None]
  mean = softmax_attention(
    query[:, None], key[:, None], keys[:, None], bias, scale=1.0
  )[:, 0]
  velocity = (mean + center[None] - rows) / left
  return velocity.reshape(x.shape).astype(x.dtype)
