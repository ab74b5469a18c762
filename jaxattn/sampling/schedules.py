r"""Paths from noise to data, and the grids of time on which they are followed.

A path mixes a data point y with Gaussian noise z,

.. math:: x_t = a_t\, y + b_t\, z, \qquad \lambda_t = \ln (a_t / b_t).

:func:`ou` is the Ornstein-Uhlenbeck process of diffusion models, with data at
t = 0; :func:`straight` is the path of flow matching, with data at t = 1. No
function of this room assumes either: all take ``schedule``.

Given the score :math:`s = \nabla \ln p_t`, the probability-flow ODE and the
stochastic processes with the same marginals are, in the time of the path,

.. math::

  \dot x = \frac{\dot a}{a} x - \tfrac12 g^2 s, \qquad
  dx = \Big( \frac{\dot a}{a} x - g^2 s \Big) dt + g\, d\bar B, \qquad
  \tfrac12 g^2 = b \dot b - b^2 \frac{\dot a}{a},

the second one run from noise to data. Source: arXiv 2011.13456 for the two
equations, arXiv 2210.02747 for the straight path; the exact steps of
``Schedule.transfer`` are derived here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from jaxattn import _checks

__all__ = ["Schedule", "ou", "path_sample", "straight", "time_grid"]

_KINDS = ("uniform", "quadratic", "log", "log_snr")

_Of = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Schedule:
  r"""A path, as functions of time; hashable, hence static under ``jit``.

  All functions are elementwise. Make your own as :func:`ou` does, in a function
  that returns the same object for the same arguments.

  Attributes:
    name: what is printed.
    data_time: the t of the data, where a = 1 and b is least.
    signal: a.
    noise: b.
    signal_rate: the derivative of a.
    variance_rate: :math:`b \dot b`, half of the derivative of b^2, which stays
      finite where b = 0.
    log_snr: :math:`\lambda = \ln (a / b)`.
    time_at: t of a given lambda.
    transfer: (t, s) -> (gain, weight, variance) of the exact step from t
      towards the data at s if the score stayed as it is: x' = gain x + weight
      score by the ODE, x' = gain x + 2 weight score + sqrt(variance) noise by
      the stochastic equation.
  """

  name: str
  data_time: float = dataclasses.field(repr=False)
  signal: _Of = dataclasses.field(repr=False)
  noise: _Of = dataclasses.field(repr=False)
  signal_rate: _Of = dataclasses.field(repr=False)
  variance_rate: _Of = dataclasses.field(repr=False)
  log_snr: _Of = dataclasses.field(repr=False)
  time_at: _Of = dataclasses.field(repr=False)
  transfer: Callable[
    [jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]
  ] = dataclasses.field(repr=False)


@functools.lru_cache(maxsize=64)
def ou(rate: float = 1.0) -> Schedule:
  r"""The Ornstein-Uhlenbeck path: data at t = 0, noise at infinity.

  .. math::

    dx = -r x\, dt + \sqrt{2 r}\, dB, \qquad a = e^{-r t}, \qquad
    b^2 = 1 - e^{-2 r t}

  In the words of discrete diffusion models :math:`a = \sqrt{\bar\alpha}`.

  Args:
    rate: r, positive: 1 in most theory, 1/2 in the source's
      variance-preserving process.

  Returns:
    A :class:`Schedule`; the same call gives the same object.

  Raises:
    ValueError: if ``rate`` is not positive.

  Cost:
    O(1) a time.

  Source:
    arXiv 2011.13456; the inverse of lambda is ln(1 + e^(-2 lambda)) / (2 r).

  Example:
    >>> from jaxattn.sampling import ou
    >>> ou()
    Schedule(name='ou(rate=1.0)')
    >>> print(f"{ou(0.5).signal(2.0):.4f}")
    0.3679
  """
  _checks.check_positive("rate", rate)

  def variance(t: jax.Array) -> jax.Array:
    return -jnp.expm1(-2 * rate * t)

  def transfer(
    t: jax.Array, s: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    h = rate * (t - s)
    return jnp.exp(h), jnp.expm1(h), jnp.expm1(2 * h)

  return Schedule(
    name=f"ou(rate={float(rate)})",
    data_time=0.0,
    signal=lambda t: jnp.exp(-rate * t),
    noise=lambda t: jnp.sqrt(variance(t)),
    signal_rate=lambda t: -rate * jnp.exp(-rate * t),
    variance_rate=lambda t: rate * jnp.exp(-2 * rate * t),
    log_snr=lambda t: -rate * t - jnp.log(variance(t)) / 2,
    # Not log1p(exp(.)): that overflows where there is hardly a signal.
    time_at=lambda lam: jnp.logaddexp(0.0, -2 * lam) / (2 * rate),
    transfer=transfer,
  )


@functools.lru_cache(maxsize=64)
def straight(sigma_min: float = 0.0) -> Schedule:
  r"""The straight path of flow matching: noise at t = 0, data at t = 1.

  .. math:: a = t, \qquad b = 1 - (1 - \sigma_{\min}) t

  Args:
    sigma_min: noise that is left at t = 1, in [0, 1).

  Returns:
    A :class:`Schedule`; the same call gives the same object. At t = 0 there is
    no signal: what divides by a, a step that is given the score, starts later.

  Raises:
    ValueError: if ``sigma_min`` is not in [0, 1).

  Cost:
    O(1) a time.

  Source:
    arXiv 2210.02747.

  Example:
    >>> from jaxattn.sampling import straight
    >>> print(straight().noise(0.25), straight(0.5).noise(1.0))
    0.75 0.5
  """
  _checks.check_range("sigma_min", sigma_min, 0, 1)
  if sigma_min == 1:
    raise ValueError("sigma_min must be below 1, got 1")
  slope = 1 - sigma_min

  def noise(t: jax.Array) -> jax.Array:
    # Exact at t = 1, where 1 - slope t would leave rounding.
    return (1 - t) + sigma_min * t

  def transfer(
    t: jax.Array, s: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    gain, step = s / t, (s - t) / t
    return (
      gain,
      step - slope * s * jnp.log1p(step),
      step * (gain * noise(t) + noise(s)),
    )

  return Schedule(
    name=f"straight(sigma_min={float(sigma_min)})",
    data_time=1.0,
    signal=lambda t: jnp.asarray(t),
    noise=noise,
    signal_rate=jnp.ones_like,
    variance_rate=lambda t: -slope * noise(t),
    log_snr=lambda t: jnp.log(t) - jnp.log(noise(t)),
    time_at=lambda lam: 1 / (jnp.exp(-lam) + slope),
    transfer=transfer,
  )


def path_sample(
  rng: jax.Array, y: jax.Array, t: jax.Array, *, schedule: Schedule
) -> tuple[jax.Array, jax.Array]:
  r"""A point of the path at time t, and the velocity it moves with.

  .. math:: x_t = a y + b z, \qquad u = \dot a y + \dot b z, \qquad
    z \sim N(0, I)

  u is what flow matching regresses on. For :func:`ou` it is infinite at t = 0.

  Args:
    rng: PRNG key.
    y: (..., d), the data.
    t: y.shape[:-1] times, or one, (). Where y has further axes that share one
      time, as (B, T, C), flatten or map over them.
    schedule: of the path.

  Returns:
    Both (..., d), in the dtype of ``y``.

  Raises:
    ValueError: if ``y`` is not floating, ``t`` has another shape, or a time is
      before 0 or, on :func:`straight`, after 1.
    checkify.JaxRuntimeError: for the last of these from ``err.throw()`` of a
      checkified caller, where times are traced.

  Cost:
    O(size of y).

  Source:
    arXiv 2210.02747.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import path_sample, straight
    >>> y = jnp.ones((2, 3))
    >>> x, u = path_sample(
    ...   jax.random.key(0), y, jnp.array([0.0, 1.0]), schedule=straight()
    ... )
    >>> print(bool(jnp.allclose(u[0], y[0] - x[0])), x[1])
    True [1. 1. 1.]
  """
  _checks.check_floating("y", y)
  t = jnp.asarray(t, y.dtype)
  if t.ndim:
    _checks.check_shape("t", t, y.shape[:-1], "y.shape[:-1]")
  check_times(t, schedule.data_time or math.inf)
  t = t[..., None] if t.ndim else t
  a, b = schedule.signal(t), schedule.noise(t)
  z = jax.random.normal(rng, y.shape, y.dtype)
  noise_rate = schedule.variance_rate(t) / b
  return a * y + b * z, schedule.signal_rate(t) * y + noise_rate * z


def check_times(t: jax.Array, high: float) -> None:
  """Raises unless times are in [0, high]."""
  _checks.check_range("t", t, 0, high)
  if not _checks.is_concrete(t):
    # Vanishes unless the caller is checkified.
    checkify.debug_check(
      ((t >= 0) & (t <= high)).all(),
      f"t must be in [0, {high}], got {{t}}",
      t=t,
    )


def time_grid(
  num_steps: int,
  *,
  kind: str = "uniform",
  t_min: float,
  t_max: float,
  schedule: Schedule,
) -> jax.Array:
  r"""Times from noise to data: falling for :func:`ou`, rising for straight.

  With r the distance in time from the data, ``"uniform"`` has equal steps in r,
  ``"quadratic"`` in :math:`\sqrt r`, ``"log"`` in :math:`\ln r` and
  ``"log_snr"`` in :math:`\lambda = \ln (a / b)`. Euler's method on the straight
  path is gradient descent with a constant step size on ``"log"``.

  Args:
    num_steps: N, at least 1.
    kind: "uniform", "quadratic", "log" or "log_snr".
    t_min: the least time.
    t_max: the largest one.
    schedule: of the path.

  Returns:
    (num_steps + 1,), of the default floating dtype.

  Raises:
    ValueError: if ``num_steps`` < 1, ``t_min`` is negative or not below
      ``t_max``, data lie strictly between, ``kind`` is unknown, or a grid of
      kind "log" or "log_snr" reaches a time where that logarithm is infinite.

  Cost:
    O(num_steps).

  Source:
    arXiv 2206.00927 for the grid in lambda.

  Example:
    >>> from jaxattn.sampling import ou, straight, time_grid
    >>> print(time_grid(2, t_min=0.0, t_max=5.0, schedule=ou()))
    [5.  2.5 0. ]
    >>> print(
    ...   time_grid(2, kind="log", t_min=0.0, t_max=0.75, schedule=straight())
    ... )
    [0.   0.5  0.75]
  """
  _checks.check_integer("num_steps", num_steps, 1, None)
  _checks.check_choice("kind", kind, _KINDS)
  _check_span(t_min, t_max, schedule)
  data = schedule.data_time
  first, last = sorted((t_min, t_max), key=lambda t: -abs(t - data))
  if kind == "log_snr":
    _check_log_snr(first, last, schedule)
    lam = schedule.log_snr(jnp.array([float(first), float(last)]))
    ts = schedule.time_at(jnp.linspace(lam[0], lam[1], num_steps + 1))
  else:
    _check_log(last, kind, data)
    ts = _by_distance(abs(first - data), abs(last - data), num_steps, kind)
    ts = data + ts if first > data else data - ts
  # A round trip through the logarithm must not move the ends.
  return ts.at[0].set(first).at[-1].set(last)


def _by_distance(
  first: float, last: float, num_steps: int, kind: str
) -> jax.Array:
  if kind == "uniform":
    return jnp.linspace(first, last, num_steps + 1)
  if kind == "quadratic":
    return jnp.linspace(first**0.5, last**0.5, num_steps + 1) ** 2
  return jnp.geomspace(first, last, num_steps + 1)


def _check_span(t_min: float, t_max: float, schedule: Schedule) -> None:
  if not t_min < t_max:
    raise ValueError(
      f"t_max must be above t_min, got t_max = {t_max} and t_min = {t_min}"
    )
  _checks.check_nonnegative("t_min", t_min)
  data = schedule.data_time
  if t_min < data < t_max:
    raise ValueError(
      f"times must not pass the data of {schedule.name} at t = {data}, got "
      f"t_min = {t_min} and t_max = {t_max}"
    )


def _check_log(last: float, kind: str, data: float) -> None:
  if kind == "log" and last == data:
    raise ValueError(
      f"a grid of kind 'log' must end before the data at t = {data}, got {last}"
    )


def _check_log_snr(first: float, last: float, schedule: Schedule) -> None:
  for t in (first, last):
    lam = schedule.log_snr(jnp.asarray(float(t)))
    if _checks.is_concrete(lam) and not jnp.isfinite(lam):
      raise ValueError(
        "a grid of kind 'log_snr' must keep away from times at which signal or "
        f"noise is 0, got t = {t} for {schedule.name}"
      )
