r"""Solvers that carry noise to data, of fixed steps and adaptive.

:func:`integrate` follows any vector field. :func:`sample_flow` follows a
conditional velocity from noise at t = 0 to data at t = 1.
:func:`sample_diffusion` is given the score :math:`s = \nabla \ln p_t` of a
:class:`Schedule`. With the step :math:`t \to t'`, h = t - t' > 0 and
:math:`\eta = \lambda' - \lambda`, its methods for :func:`ou` are

========== ====================================================== ======
method     step                                                   scores
========== ====================================================== ======
"ddpm"     x' = e^h x + 2 (e^h - 1) s + sqrt(e^(2h) - 1) noise    1
"ei"       x' = e^h x + (e^h - 1) s                               1
"euler"    of the ODE x' = -x - s, as the next three              1
"heun"     trapezoidal, explicit                                  2
"midpoint"                                                        2
"rk4"                                                             4
"tsit5"    adaptive, of order 5                                   varies
"dpm1"     x' = (a'/a) x - b' (e^eta - 1) eps, eps = -b s         1
"dpm2"     the same with eps at the middle in lambda              2
"dpm3"     of order 3, with eps at thirds in lambda               3
"dpmpp2m"  of order 2, extrapolating the denoised point           1
"dpom"     "ei", then steps of overdamped Langevin at t'          1 + m
"dpum"     "ei", then steps of underdamped Langevin at t'         1 + m
========== ====================================================== ======

and the same with the exact step of another schedule. "ddpm" is the
exponential-integrator discretization of the reverse equation, not the ancestral
sampler of a discrete chain. Source: arXiv 2211.01916 (ddpm), arXiv 2206.00927
and 2211.01095 (dpm), arXiv 2305.11798 (dpom, dpum).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator
from jaxattn.sampling import _steps, schedules
from jaxattn.sampling._steps import Corrector, VectorField
from jaxattn.sampling.schedules import Schedule

__all__ = ["Corrector", "integrate", "sample_diffusion", "sample_flow"]

_ODE = ("euler", "heun", "midpoint", "rk4", "tsit5")
_CORRECTED = ("dpom", "dpum")
_IN_LOG_SNR = ("dpm1", "dpm2", "dpm3", "dpmpp2m")
_METHODS = ("ddpm", "ei", *_ODE, *_IN_LOG_SNR, *_CORRECTED)
_GRIDS = ("uniform", "quadratic", "log")
# Where a grid that is uniform in the logarithm of 1 - t ends.
_LOG_END = 1 - 1e-3
# Of an adaptive method, its default.
_TOL = 1e-3


def integrate(
  vector_field: VectorField,
  x0: jax.Array,
  ts: jax.Array,
  *,
  method: str = "heun",
  tol: float | None = None,
) -> jax.Array:
  r"""Follows dx/dt = v(x, t) from ``ts[0]`` to ``ts[-1]``.

  Args:
    vector_field: (x, t) -> (...), hashable: pass the same function again, and
      nothing is compiled again. What it closes over may be traced.
    x0: (...), floating.
    ts: (N + 1,) times, rising or falling; for "tsit5", which chooses its own
      steps, the two ends, (2,).
    method: "euler", "heun", "midpoint", "rk4" or "tsit5".
    tol: of "tsit5" only, relative and absolute; None = 1e-3.

  Returns:
    (...) at ``ts[-1]``, in the dtype of ``x0``; 16-bit states are carried in
    float32. NaN where "tsit5" needs more than 4096 steps.

  Raises:
    ValueError: if shapes or dtypes do not fit, ``method`` is unknown, times are
      neither rising nor falling, or ``tol`` is given to a method of fixed
      steps.
    ImportError: for "tsit5" if diffrax is missing, naming the extra.

  Cost:
    N times 1, 2, 2 and 4 evaluations; memory of a few states.

  Source:
    the classical methods; "tsit5" is diffrax's.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import integrate
    >>> ts = jnp.linspace(0.0, 1.0, 11)
    >>> x = integrate(lambda x, t: -x, jnp.ones(2), ts, method="rk4")
    >>> print(bool(jnp.allclose(x, jnp.exp(-1.0), rtol=1e-5)))
    True
  """
  _checks.check_choice("method", method, _ODE)
  ts = _check_times(ts, method, tol)
  x0 = jnp.asarray(x0)
  _checks.check_floating("x0", x0)
  tol = _TOL if tol is None else tol
  return _integrate(vector_field, x0, ts, tol, method=method)


def sample_flow(
  rng: jax.Array,
  velocity_fn: Callable[[jax.Array, jax.Array, Any], jax.Array],
  cond: Any,
  shape: tuple[int, ...],
  *,
  method: str = "heun",
  num_steps: int | None = None,
  grid: str = "uniform",
) -> jax.Array:
  r"""Samples of a conditional flow, from noise at t = 0 to data at t = 1.

  Args:
    rng: PRNG key.
    velocity_fn: (x, t, cond) -> the shape of x, which is that of one sample,
      ``shape[1:]``; t is (). Hashable; it is mapped over samples.
    cond: what samples share, any pytree, as a batch of histories.
    shape: of the result, samples first: (S, ...).
    method: as in :func:`integrate`.
    num_steps: None = 20; of "tsit5", which chooses its own, None.
    grid: "uniform", "quadratic" or "log" as in :func:`time_grid`; the last ends
      at t = 0.999, because 1 - t is never 0 on it.

  Returns:
    ``shape``, of the default floating dtype.

  Raises:
    ValueError: if ``shape`` is empty, ``num_steps`` < 1, or a name is unknown.
    ImportError: for "tsit5" if diffrax is missing, naming the extra.

  Cost:
    As :func:`integrate`, for all samples at once.

  Source:
    arXiv 2210.02747.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import sample_flow
    >>> def to_point(x, t, cond):
    ...   return (cond - x) / (1 - t)
    >>> x = sample_flow(
    ...   jax.random.key(0), to_point, jnp.ones(3), (5, 3), method="euler"
    ... )
    >>> x.shape, bool(jnp.allclose(x, 1, atol=1e-5))
    ((5, 3), True)
  """
  _checks.check_choice("method", method, _ODE)
  _checks.check_choice("grid", grid, _GRIDS)
  if not shape:
    raise ValueError("shape must have the number of samples first, got ()")
  ts = _flow_times(method, num_steps, grid)
  return _sample_flow(rng, velocity_fn, cond, ts, shape=shape, method=method)


def sample_diffusion(
  rng: jax.Array,
  score_fn: VectorField,
  x: jax.Array,
  ts: jax.Array,
  *,
  method: str = "ddpm",
  schedule: Schedule = schedules.ou(),
  corrector: Corrector | None = None,
  tol: float | None = None,
) -> jax.Array:
  r"""Carries noise to data by a score; the methods stand above in a table.

  .. math:: x' = \text{gain}\, x + w\, \text{weight}\, s(x, t) + \text{noise}

  Args:
    rng: PRNG key; methods of the ODE draw nothing from it.
    score_fn: (x, t) -> the shape of x, hashable; t is ().
    x: (...), what is drawn at ``ts[0]``: one sample, or any number of them if
      ``score_fn`` takes as many.
    ts: (N + 1,) from noise to data, of :func:`time_grid`; of "tsit5" the two
      ends, (2,).
    method: of the table.
    schedule: of the path.
    corrector: of "dpom" and "dpum".
    tol: of "tsit5", as in :func:`integrate`.

  Returns:
    (...) at ``ts[-1]``, in the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit, ``method`` is unknown, times do
      not run towards the data or start where there is no signal, a method in
      lambda is to reach a time at which lambda is infinite, or ``corrector``
      and ``tol`` do not fit the method.
    ImportError: for "tsit5" if diffrax is missing, naming the extra.

  Cost:
    N times the scores of the table; memory of a few states.

  Source:
    as in the table.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import ou, sample_diffusion, time_grid
    >>> def score(x, t):  # Of N(3, 0.04), at each t of N(3 a, 0.04 a^2 + b^2).
    ...   a = jnp.exp(-t)
    ...   return (3 * a - x) / (0.04 * a**2 - jnp.expm1(-2 * t))
    >>> ts = time_grid(400, t_min=0.0, t_max=6.0, schedule=ou())
    >>> z = jax.random.normal(jax.random.key(0), (2000,))
    >>> x = sample_diffusion(jax.random.key(1), score, z, ts, method="heun")
    >>> print(f"{x.mean():.1f} {x.std():.1f}")
    3.0 0.2
  """
  _checks.check_choice("method", method, _METHODS)
  ts = _check_times(ts, method, tol)
  check_direction(ts, method, schedule)
  corrector = check_corrector(corrector, method, len(ts) - 1)
  x = jnp.asarray(x)
  _checks.check_floating("x", x)
  tol = _TOL if tol is None else tol
  return _sample(
    rng, score_fn, x, ts, corrector, tol, method=method, schedule=schedule
  )


# --- what is refused ---


def _check_times(ts: jax.Array, method: str, tol: float | None) -> jax.Array:
  ts = jnp.asarray(ts)
  _checks.check_rank("ts", ts, 1)
  _checks.check_floating("ts", ts)
  if len(ts) < 2:
    raise ValueError(f"ts must hold at least 2 times, got {len(ts)}")
  if method == "tsit5":
    _checks.check_shape("ts", ts, (2,), "the ends: tsit5 chooses its own steps")
  elif tol is not None:
    raise ValueError(f"tol must be None for {method!r}, got {tol}")
  _checks.check_positive("tol", _TOL if tol is None else tol)
  if _checks.is_concrete(ts):
    steps = np.diff(np.asarray(ts))
    if not (np.all(steps > 0) or np.all(steps < 0)):
      raise ValueError(f"ts must be strictly rising or falling, got {ts}")
  return ts


def check_direction(ts: jax.Array, method: str, schedule: Schedule) -> None:
  """Raises unless times run to the data, from where there is some signal."""
  if not _checks.is_concrete(ts):
    return
  far = np.abs(np.asarray(ts) - schedule.data_time)
  if far[-1] > far[0]:
    raise ValueError(
      f"ts must run towards the data of {schedule.name} at t = "
      f"{schedule.data_time}, got {ts[0]} to {ts[-1]}"
    )
  if not schedule.signal(ts[0]) > 0:
    raise ValueError(
      f"ts must start where there is some signal, got {ts[0]} for "
      f"{schedule.name}"
    )
  ends = schedule.log_snr(ts[jnp.array([0, -1])])
  if method in _IN_LOG_SNR and not np.all(np.isfinite(ends)):
    raise ValueError(
      f"method {method!r} needs a finite log-SNR at each time, got "
      f"{ends[0]} at {ts[0]} and {ends[1]} at {ts[-1]}"
    )


def check_corrector(
  corrector: Corrector | None, method: str, num_steps: int
) -> Corrector | None:
  """Raises unless there is a corrector where, and as, the method needs one."""
  if (corrector is None) == (method in _CORRECTED):
    expected = "a Corrector" if method in _CORRECTED else "None"
    raise ValueError(
      f"corrector must be {expected} for {method!r}, got {corrector}"
    )
  if corrector is None:
    return None
  _checks.check_positive("corrector.step_size", corrector.step_size)
  if (corrector.friction is None) != (method == "dpom"):
    raise ValueError(
      "corrector.friction must be given for 'dpum' and None for 'dpom', got "
      f"{corrector.friction} for {method!r}"
    )
  if corrector.friction is not None:
    _checks.check_positive("corrector.friction", corrector.friction)
  _checks.check_integer("corrector.num_steps", corrector.num_steps, 1, None)
  _checks.check_integer("corrector.every", corrector.every, 1, None)
  if num_steps % corrector.every:
    raise ValueError(
      f"corrector.every must divide the {num_steps} steps of ts, got "
      f"{corrector.every}"
    )
  return corrector


def _flow_times(method: str, num_steps: int | None, grid: str) -> jax.Array:
  if method == "tsit5":
    if num_steps is not None or grid != "uniform":
      raise ValueError(
        "'tsit5' chooses its own steps: num_steps must be None and grid "
        f"'uniform', got {num_steps} and {grid!r}"
      )
    return jnp.array([0.0, 1.0])
  num_steps = 20 if num_steps is None else num_steps
  return schedules.time_grid(
    num_steps,
    kind=grid,
    t_min=0.0,
    t_max=_LOG_END if grid == "log" else 1.0,
    schedule=schedules.straight(),
  )


# --- vector fields ---


@functools.partial(jax.jit, static_argnames=("vector_field", "method"))
def _integrate(
  vector_field: VectorField,
  x0: jax.Array,
  ts: jax.Array,
  tol: float | jax.Array,
  *,
  method: str,
) -> jax.Array:
  wide = accumulator(x0.dtype)
  x, ts = x0.astype(wide), ts.astype(wide)
  if method == "tsit5":
    return _steps.tsit5(vector_field, x, ts, tol).astype(x0.dtype)
  step = _steps.ODE_STEPS[method]

  def body(
    x: jax.Array, pair: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    return step(vector_field, x, *pair).astype(wide), None

  return lax.scan(body, x, (ts[:-1], ts[1:]))[0].astype(x0.dtype)


@functools.partial(jax.jit, static_argnames=("velocity_fn", "shape", "method"))
def _sample_flow(
  rng: jax.Array,
  velocity_fn: Callable[[jax.Array, jax.Array, Any], jax.Array],
  cond: Any,
  ts: jax.Array,
  *,
  shape: tuple[int, ...],
  method: str,
) -> jax.Array:
  z = jax.random.normal(rng, shape, ts.dtype)
  one = jax.vmap(velocity_fn, in_axes=(0, None, None))
  return _integrate(lambda x, t: one(x, t, cond), z, ts, _TOL, method=method)


# --- scores ---


@functools.partial(jax.jit, static_argnames=("score_fn", "method", "schedule"))
def _sample(
  rng: jax.Array,
  score_fn: VectorField,
  x: jax.Array,
  ts: jax.Array,
  corrector: Corrector | None,
  tol: float | jax.Array,
  *,
  method: str,
  schedule: Schedule,
) -> jax.Array:
  dtype, wide = x.dtype, accumulator(x.dtype)
  x, ts = x.astype(wide), ts.astype(wide)
  if method in _ODE:
    flow = _steps.probability_flow(score_fn, schedule)
    return _integrate(flow, x, ts, tol, method=method).astype(dtype)
  if corrector is not None:
    x = _steps.corrected(rng, score_fn, x, ts, corrector, schedule)
  elif method == "ddpm":
    x = _steps.ddpm(rng, score_fn, x, ts, schedule)
  elif method == "ei":
    x = _steps.exponential(score_fn, x, ts, schedule)
  elif method == "dpmpp2m":
    x = _steps.dpmpp2m(score_fn, x, ts, schedule)
  else:
    x = _steps.dpm(_steps.DPM_STEPS[method], score_fn, x, ts, schedule)
  return x.astype(dtype)
