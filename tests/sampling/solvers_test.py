"""Solvers: orders, closed-form maps, exact chains, refusals."""

import builtins
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from jaxattn.sampling import (
  Corrector,
  _steps,
  gmm_init,
  gmm_score,
  gmm_velocity,
  integrate,
  ou,
  sample_diffusion,
  sample_flow,
  straight,
  time_grid,
)
from tests._recompile import no_recompilation
from tests.sampling._mixtures import random_mixture

_KEY = jax.random.key(0)


def _gaussian(d=4, seed=0):
  """One component, its mean and covariance, and the root of the latter."""
  gmm = random_mixture(1, d, seed=seed)
  u, root = gmm.eigenvectors[0], jnp.sqrt(gmm.eigenvalues[0])
  return gmm, (u * root[None]) @ u.T


def _rms(x):
  return float(jnp.sqrt((x**2).sum(-1).mean()))


# --- closed-form maps ---


def test_flow_map_of_a_gaussian():
  """Of the ODE from T to 0: an affine map."""
  gmm, _ = _gaussian()
  t = 3.0
  z = jax.random.normal(_KEY, (4,))
  v = jnp.exp(-2 * t) * gmm.eigenvalues[0] - jnp.expm1(-2 * t)
  u = gmm.eigenvectors[0]
  off = u.T @ (z - jnp.exp(-t) * gmm.means[0])
  want = gmm.means[0] + u @ (jnp.sqrt(gmm.eigenvalues[0] / v) * off)
  score = functools.partial(gmm_score, gmm)
  got = sample_diffusion(
    _KEY, score, z, jnp.array([t, 0.0]), method="tsit5", tol=1e-13
  )
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
  ("method", "low", "high"),
  [("euler", -1.1, -0.9), ("midpoint", -9, -2), ("heun", -2.2, -1.8),
   ("rk4", -4.2, -3.8)],
)  # fmt: skip
def test_orders_on_the_straight_path(method, low, high):
  """Against the exact map m + root z of a Gaussian."""
  gmm, root = _gaussian()
  z = jax.random.normal(_KEY, (200, 4))
  want = gmm.means + z @ root
  velocity = functools.partial(gmm_velocity, gmm, schedule=straight())
  sizes, errors = (32, 128), []
  for n in sizes:
    ts = jnp.linspace(0.0, 1.0, n + 1)
    errors.append(_rms(integrate(velocity, z, ts, method=method) - want))
  slope = np.log(errors[1] / errors[0]) / np.log(sizes[1] / sizes[0])
  assert low <= slope <= high
  if method == "rk4":
    assert errors[-1] < 1e-9


def test_adaptive_steps_on_the_straight_path():
  gmm, root = _gaussian()
  z = jax.random.normal(_KEY, (50, 4))
  velocity = functools.partial(gmm_velocity, gmm, schedule=straight())
  ends = jnp.array([0.0, 1.0])
  errors = []
  for tol in (1e-3, 1e-10):
    x = integrate(velocity, z, ends, method="tsit5", tol=tol)
    errors.append(_rms(x - (gmm.means + z @ root)))
  assert errors[0] < 0.05
  assert errors[1] < 1e-8


@pytest.mark.parametrize("n", [1, 3, 7, 50])
def test_a_point_is_reached_in_any_number_of_euler_steps(n):
  point = jnp.array([1.0, -2.0])
  to_point = lambda x, t: (point - x) / (1 - t)  # noqa: E731
  ts = jnp.linspace(0.0, 1.0, n + 1)
  x = integrate(to_point, jnp.array([5.0, 3.0]), ts, method="euler")
  np.testing.assert_allclose(x, point, rtol=0, atol=1e-14)


def test_euler_contracts_geometrically_on_the_log_grid():
  n, t_max = 12, 0.99
  point, start = jnp.array([1.0, -2.0]), jnp.array([5.0, 3.0])
  to_point = lambda x, t: (point - x) / (1 - t)  # noqa: E731
  ts = time_grid(n, kind="log", t_min=0.0, t_max=t_max, schedule=straight())
  share = 1 - 0.01 ** (1 / n)
  for k in (1, 5, n):
    x = integrate(to_point, start, ts[: k + 1], method="euler")
    want = point + (1 - share) ** k * (start - point)
    np.testing.assert_allclose(x, want, rtol=0, atol=1e-12)


def test_steps_of_order_one_are_exact_for_what_they_hold():
  """`ei` where the score does not change, `dpm1` where the noise does not."""
  ts = time_grid(3, t_min=0.2, t_max=2.0, schedule=ou())
  x, c = jnp.array([0.3, -1.0]), jnp.array([0.7, 0.1])
  h = 1.8
  got = sample_diffusion(_KEY, lambda x, t: c, x, ts, method="ei")
  np.testing.assert_allclose(got, np.exp(h) * x + np.expm1(h) * c, rtol=1e-12)
  path = ou()
  noise = lambda x, t: -c / path.noise(t)  # noqa: E731
  a, b = path.signal(ts), path.noise(ts)
  want = a[-1] * ((x - b[0] * c) / a[0]) + b[-1] * c
  for method in ("dpm1", "dpm2", "dpm3"):
    got = sample_diffusion(_KEY, noise, x, ts, method=method)
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_extrapolated_steps_are_exact_for_a_point():
  point = jnp.array([1.0, -2.0])
  path = ou()

  def score(x, t):
    return (path.signal(t) * point - x) / path.noise(t) ** 2

  ts = time_grid(4, kind="log_snr", t_min=0.01, t_max=3.0, schedule=path)
  x = jnp.array([0.3, -1.0])
  got = sample_diffusion(_KEY, score, x, ts, method="dpmpp2m")
  a, b = path.signal(ts), path.noise(ts)
  want = a[-1] * point + b[-1] / b[0] * (x - a[0] * point)
  np.testing.assert_allclose(got, want, rtol=1e-11)


# --- orders ---

_ORDERS = {
  "euler": (1, 0.1), "ei": (1, 0.1), "dpm1": (1, 0.1), "heun": (2, 0.15),
  "dpm2": (2, 0.15), "dpmpp2m": (2, 0.15), "dpm3": (3, 0.15),
}  # fmt: skip


def _end(method, n, path=None, t_min=0.01, t_max=5.0):
  path = path or ou()
  # Means that are not far apart: where they are, long steps carry a few points
  # from one component to another, which is no matter of order.
  gmm = random_mixture(4, 2, spread=1.5)
  z = jax.random.normal(_KEY, (200, 2))
  ts = time_grid(n, kind="log_snr", t_min=t_min, t_max=t_max, schedule=path)
  score = lambda x, t: gmm_score(gmm, x, t, schedule=path)  # noqa: E731
  return sample_diffusion(_KEY, score, z, ts, method=method, schedule=path)


@pytest.fixture(scope="module")
def reference():
  return _end("dpm3", 4096)


@pytest.mark.parametrize("method", _ORDERS)
def test_orders_on_a_mixture(method, reference):
  order, room = _ORDERS[method]
  errors = [_rms(_end(method, n) - reference) for n in (256, 512)]
  assert abs(np.log2(errors[0] / errors[1]) - order) <= room


def test_a_high_order_pays_with_few_steps(reference):
  assert _rms(_end("dpm3", 64) - reference) < 1e-4
  assert _rms(_end("ei", 64) - reference) > 4e-2


def test_methods_agree_on_the_straight_path():
  """What is derived for any schedule, on one that is not ou."""
  end = functools.partial(_end, path=straight(), t_min=0.02, t_max=0.99)
  want = end("rk4", 400)
  for method, room in (("ei", 0.1), ("dpm2", 5e-3), ("dpmpp2m", 5e-3)):
    assert _rms(end(method, 400) - want) < room, method


# --- stochastic steps ---


@pytest.mark.parametrize("path", [ou(), straight()], ids=lambda p: p.name)
def test_law_of_ddpm_on_a_gaussian(path):
  """Mean and variance of the chain, which is linear, step by step."""
  mean, var = 1.5, 0.4
  gmm = gmm_init([1.0], jnp.array([[mean]]), [var])
  t_min, t_max = (0.1, 3.0) if path is ou() else (0.05, 0.9)
  ts = time_grid(12, t_min=t_min, t_max=t_max, schedule=path)
  m, q = 0.0, 1.0
  for t, s in itertools.pairwise(ts):
    gain, weight, variance = (float(z) for z in path.transfer(t, s))
    a, b = float(path.signal(t)), float(path.noise(t))
    v = a**2 * var + b**2
    slope = gain - 2 * weight / v
    m, q = slope * m + 2 * weight * a * mean / v, slope**2 * q + variance
  n = 100_000
  z = jax.random.normal(_KEY, (n, 1))
  score = lambda x, t: gmm_score(gmm, x, t, schedule=path)  # noqa: E731
  x = np.asarray(
    sample_diffusion(jax.random.key(1), score, z, ts, schedule=path)
  )
  assert abs(x.mean() - m) < 4.5 * np.sqrt(q / n)
  assert abs(x.var() / q - 1) < 4.5 * np.sqrt(2 / n)


@pytest.mark.parametrize("u", [1e-3, 0.3, 0.99, 1.01, 2.0])
@pytest.mark.parametrize("friction", [0.5, 2.0])
def test_langevin_moments_against_a_matrix_exponential(u, friction):
  """Van Loan's: the exponential of one matrix gives mean and covariance."""
  h = u / friction
  keep, drift, pull, chol = _steps._langevin_moments(
    jnp.array(h), jnp.array(friction)
  )
  # State (v, x): dv = (s - friction v) dt + sqrt(2 friction) dB, dx = v dt.
  a = np.array([[-friction, 0.0], [1.0, 0.0]])
  q = np.diag([2 * friction, 0.0])
  big = linalg.expm(np.block([[-a, q], [np.zeros((2, 2)), a.T]]) * h)
  step = linalg.expm(a * h)
  cov = step @ big[:2, 2:]
  np.testing.assert_allclose(step, [[keep, 0], [drift, 1]], atol=1e-14)
  got = np.asarray(chol @ chol.T)
  size = np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
  # The blocks grow like e^(2 u), and lose digits of variances of order h^3.
  room = 1e-13 / min(1, u**2)
  np.testing.assert_allclose(got / size, cov / size, rtol=0, atol=room)
  forced = linalg.expm(
    np.block([[a, np.array([[1.0], [0]])], [np.zeros((1, 3))]]) * h
  )[:2, 2]
  np.testing.assert_allclose([drift, pull], forced, rtol=1e-10)


def _stationary(h, friction=2.0):
  """Var x of the chain of underdamped steps on N(0, 1), by its own equation."""
  keep, drift, pull, chol = map(
    np.asarray, _steps._langevin_moments(jnp.array(h), jnp.array(friction))
  )
  step = np.array([[keep, -drift], [drift, 1 - pull]])
  return linalg.solve_discrete_lyapunov(step, chol @ chol.T)[1, 1]


def test_stationary_law_of_underdamped_steps():
  sizes = (0.02, 0.1, 0.3)
  found = np.array([_stationary(h) for h in sizes])
  np.testing.assert_allclose(found, [1.00502, 1.02562, 1.08045], atol=5e-6)
  slope = np.log((found[1] - 1) / (found[0] - 1)) / np.log(5)
  assert abs(slope - 1) < 0.05
  # Sampled: many short chains, long enough to forget their start.
  n, h = 20_000, 0.3
  corrector = Corrector(step_size=h, friction=2.0, num_steps=80)
  x = _steps._underdamped(
    jax.random.key(3), lambda x: -x, jnp.zeros(n), corrector
  )
  assert abs(float(jnp.var(x)) / found[2] - 1) < 4 * np.sqrt(2 / n)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpom", "dpum"])
def test_correctors_repair_what_the_predictor_leaves(method):
  """Against `ei` on the same grid; exact moments of the target."""
  gmm = gmm_init([0.5, 0.5], jnp.array([[1.0], [-1.0]]), [0.3, 0.3])
  ts = time_grid(4, t_min=0.0, t_max=4.0, schedule=ou())
  friction = 2.0 if method == "dpum" else None
  corrector = Corrector(0.03, friction, num_steps=80, every=2)
  z = jax.random.normal(_KEY, (20_000, 1))
  run = functools.partial(
    sample_diffusion, jax.random.key(1), functools.partial(gmm_score, gmm)
  )
  left = abs(float(run(z, ts, method="ei").var()) - 1.3)
  mended = run(z, ts, method=method, corrector=corrector)
  assert left > 0.08
  # Of the mended one the noise of its samples alone is about 0.01.
  assert abs(float(mended.var()) - 1.3) < 0.5 * left


# --- flows ---


def test_samples_of_a_flow():
  gmm = random_mixture(3, 2, kind="diagonal")

  def velocity(x, t, cond):
    """Of the mixture moved by cond: the path of y + cond is moved by t cond."""
    assert x.shape == (5, 2)
    assert t.shape == ()
    return gmm_velocity(gmm, x - t * cond, t, schedule=straight()) + cond

  cond = jnp.arange(10.0).reshape(5, 2)
  x = sample_flow(_KEY, velocity, cond, (2000, 5, 2), num_steps=40)
  off = np.asarray(x - cond[None]).reshape(-1, 2)
  weights, means = np.exp(gmm.log_weights), np.asarray(gmm.means)
  var = weights @ np.asarray(gmm.eigenvalues + means**2)
  var = var - (weights @ means) ** 2
  error = np.sqrt(var / len(off))
  assert (abs(off.mean(0) - weights @ means) < 4.5 * error).all()
  assert (abs(off.var(0) / var - 1) < 0.05).all()


@pytest.mark.parametrize(
  ("method", "grid"),
  [("euler", "log"), ("midpoint", "quadratic"), ("tsit5", "uniform")],
)
def test_options_of_a_flow(method, grid):
  point = jnp.array([1.0, -2.0])
  # Not divided by 1 - t: the last stage of an adaptive step is at t = 1.
  field = lambda x, t, cond: cond - x  # noqa: E731
  x = sample_flow(_KEY, field, point, (3, 2), method=method, grid=grid)
  z = jax.random.normal(_KEY, (3, 2))
  want = point[None] + np.exp(-1.0) * (z - point[None])
  np.testing.assert_allclose(x, want, atol=0.1 if grid == "log" else 5e-3)


# --- dtypes, compilation ---


@pytest.mark.any_x64
@pytest.mark.parametrize("method", ["ddpm", "ei", "heun", "dpm3", "dpmpp2m"])
def test_dtype_of_a_state(method):
  ts = time_grid(4, t_min=0.1, t_max=2.0, schedule=ou())
  x = jnp.ones((3,), jnp.bfloat16)
  seen = []

  def score(x, t):
    seen.append((x.dtype, t.dtype))
    return -x

  got = sample_diffusion(_KEY, score, x, ts, method=method)
  assert got.dtype == jnp.bfloat16
  assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"))}


def test_a_second_call_does_not_compile():
  score = lambda x, t: -x  # noqa: E731
  ts = time_grid(4, t_min=0.1, t_max=2.0, schedule=ou())
  inputs = [jnp.ones(3), jnp.zeros(3)]
  for method in ("ddpm", "dpm2", "rk4"):
    run = functools.partial(sample_diffusion, _KEY, score, method=method)
    run(inputs[0], ts)
    with no_recompilation():
      run(inputs[1], ts)


def test_vector_fields_may_close_over_what_is_traced():
  ts = jnp.linspace(0.0, 1.0, 5)

  def end(rate):
    return integrate(lambda x, t: rate * x, jnp.ones(()), ts, method="rk4")

  rates = jnp.array([-1.0, 0.5])
  got = jax.jit(jax.vmap(jax.grad(end)))(rates)
  np.testing.assert_allclose(got, np.exp(rates), rtol=1e-3)


def test_adaptive_steps_that_run_out_are_nan():
  field = lambda x, t: x**2  # noqa: E731
  ends = jnp.array([0.0, 2.0])  # x = 1 / (1 - t) has no value at 1.
  assert jnp.isnan(integrate(field, jnp.ones(()), ends, method="tsit5"))


# --- refusals ---


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"method": "leapfrog"}, "method must be one of 'ddpm', 'ei', 'euler'"),
    ({"ts": jnp.ones((2, 2))}, "ts must have 1 dimensions, got shape (2, 2)"),
    ({"ts": jnp.ones(1)}, "ts must hold at least 2 times, got 1"),
    ({"ts": jnp.array([2, 1])}, "ts must have a floating dtype"),
    ({"ts": jnp.array([2.0, 1.0, 1.5])}, "ts must be strictly rising or"),
    (
      {"ts": jnp.array([0.0, 1.0])},
      "ts must run towards the data of ou(rate=1.0) at t = 0.0, got 0.0 to 1.0",
    ),
    (
      {"ts": jnp.array([0.0, 1.0]), "schedule": straight()},
      "ts must start where there is some signal, got 0.0 for straight(",
    ),
    (
      {"ts": jnp.array([2.0, 0.0]), "method": "dpm2"},
      "method 'dpm2' needs a finite log-SNR at each time",
    ),
    (
      {"ts": jnp.array([2.0, 1.0, 0.5]), "method": "tsit5"},
      "ts must have shape (2,) = the ends: tsit5 chooses its own steps",
    ),
    ({"tol": 1e-3}, "tol must be None for 'ddpm', got 0.001"),
    ({"method": "tsit5", "tol": 0.0}, "tol must be positive, got 0.0"),
    ({"x": jnp.ones(2, int)}, "x must have a floating dtype"),
    ({"method": "dpom"}, "corrector must be a Corrector for 'dpom', got None"),
    ({"corrector": Corrector(0.1)}, "corrector must be None for 'ddpm'"),
    (
      {"method": "dpum", "corrector": Corrector(0.1)},
      "corrector.friction must be given for 'dpum' and None for 'dpom', got "
      "None for 'dpum'",
    ),
    (
      {"method": "dpom", "corrector": Corrector(0.1, every=2)},
      "corrector.every must divide the 1 steps of ts, got 2",
    ),
    (
      {"method": "dpom", "corrector": Corrector(-0.1)},
      "corrector.step_size must be positive, got -0.1",
    ),
    (
      {"method": "dpom", "corrector": Corrector(0.1, num_steps=0)},
      "corrector.num_steps must be >= 1, got 0",
    ),
  ],
)
def test_refused_samplers(options, message):
  call = {"x": jnp.ones(2), "ts": jnp.array([2.0, 1.0])} | options
  with pytest.raises(ValueError, match=re.escape(message)):
    sample_diffusion(_KEY, lambda x, t: -x, call.pop("x"), **call)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"method": "ddpm"}, "method must be one of 'euler', 'heun', 'midpoint'"),
    ({"grid": "log_snr"}, "grid must be one of 'uniform', 'quadratic', 'log'"),
    ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
    (
      {"method": "tsit5", "num_steps": 5},
      "'tsit5' chooses its own steps: num_steps must be None and grid "
      "'uniform', got 5 and 'uniform'",
    ),
    ({"shape": ()}, "shape must have the number of samples first, got ()"),
  ],
)
def test_refused_flows(options, message):
  shape = options.pop("shape", (3, 2))
  with pytest.raises(ValueError, match=re.escape(message)):
    sample_flow(_KEY, lambda x, t, cond: x, None, shape, **options)


def test_without_diffrax_the_extra_is_named(monkeypatch):
  plain = builtins.__import__

  def missing(name, *args, **kwargs):
    if name == "diffrax":
      raise ModuleNotFoundError(name)
    return plain(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", missing)
  with pytest.raises(ImportError, match=re.escape("'jaxattn[ode]'")):
    integrate(
      lambda x, t: x, jnp.ones(()), jnp.array([0.0, 1.0]), method="tsit5"
    )
