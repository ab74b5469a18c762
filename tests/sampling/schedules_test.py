"""Paths: their identities, exact steps, and grids of time."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxattn.sampling import Schedule, ou, path_sample, straight, time_grid

_PATHS = (ou(), ou(0.5), straight(), straight(0.1))
_ids = pytest.mark.parametrize("path", _PATHS, ids=lambda p: p.name)
_SPAN = {"ou": (0.01, 4.0), "straight": (0.05, 0.95)}


def _times(path, num=7):
  low, high = _SPAN[path.name.split("(")[0]]
  return jnp.linspace(low, high, num)


# --- paths ---


@_ids
def test_rates_are_derivatives(path):
  ts = _times(path)

  @jax.jit
  def found(ts):
    rates = jax.vmap(jax.grad(path.signal))(ts)
    half = jax.vmap(jax.grad(lambda t: path.noise(t) ** 2 / 2))(ts)
    return rates, half, path.signal_rate(ts), path.variance_rate(ts)

  rates, half, signal_rate, variance_rate = found(ts)
  np.testing.assert_allclose(signal_rate, rates, rtol=1e-13)
  np.testing.assert_allclose(variance_rate, half, rtol=1e-12)


@_ids
def test_log_snr_and_its_inverse(path):
  ts = _times(path)
  lam = path.log_snr(ts)
  want = jnp.log(path.signal(ts) / path.noise(ts))
  np.testing.assert_allclose(lam, want, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(path.time_at(lam), ts, rtol=1e-12)


def test_log_snr_near_the_data_in_float32():
  t = jnp.float32(1e-6)
  # b^2 = 2 t - 2 t^2: 1 - e^(-2 t) itself would be 1.01 times as much.
  np.testing.assert_allclose(
    ou().log_snr(t), -1e-6 - np.log(2e-6 - 2e-12) / 2, rtol=1e-6
  )
  np.testing.assert_allclose(ou().time_at(ou().log_snr(t)), t, rtol=2e-5)
  # And far from them, where e^(-2 lambda) is no number any more.
  np.testing.assert_allclose(ou().time_at(jnp.float32(-60.0)), 60, rtol=1e-6)


def test_rate_is_a_unit_of_time():
  t = jnp.linspace(0.1, 3.0, 5)
  slow, plain = ou(0.5), ou()
  for name in ("signal", "noise", "log_snr"):
    got = getattr(slow, name)(2 * t)
    np.testing.assert_allclose(got, getattr(plain, name)(t), rtol=1e-14)
  np.testing.assert_allclose(
    slow.signal(t) ** 2 + slow.noise(t) ** 2, 1.0, rtol=1e-14
  )


@_ids
def test_exact_steps_against_quadrature(path):
  """Both equations with the score held, by quadrature of their integrals."""
  low, high = _times(path)[1], _times(path)[-2]
  t, s = (low, high) if path.data_time else (high, low)
  drift = lambda r: float(path.signal_rate(r) / path.signal(r))  # noqa: E731

  def spread(r):  # g^2 / 2 in the time of the path
    return float(path.variance_rate(r) - path.noise(r) ** 2 * drift(r))

  def grown(r):
    return float(path.signal(s) / path.signal(r))

  gain, weight, variance = path.transfer(t, s)
  quad = functools.partial(integrate.quad, epsabs=1e-12, epsrel=1e-12)
  np.testing.assert_allclose(gain, grown(t), rtol=1e-12)
  want = quad(lambda r: -grown(r) * spread(r), t, s)[0]
  np.testing.assert_allclose(weight, want, rtol=1e-9)
  want = quad(lambda r: -2 * grown(r) ** 2 * spread(r), t, s)[0]
  np.testing.assert_allclose(variance, want, rtol=1e-9)


def test_exact_steps_of_ou():
  h = 0.3
  got = ou().transfer(jnp.array(1.3), jnp.array(1.0))
  want = np.exp(h), np.expm1(h), np.expm1(2 * h)
  np.testing.assert_allclose(got, want, rtol=1e-14)


def test_same_call_gives_the_same_object():
  assert ou() is ou()
  assert ou(0.5) is ou(0.5)
  assert ou(0.5) != ou()
  assert straight(0.1) is straight(0.1)
  assert isinstance(hash(ou()), int)
  assert repr(straight()) == "Schedule(name='straight(sigma_min=0.0)')"
  assert isinstance(straight(), Schedule)


# --- samples ---


@_ids
def test_velocity_is_the_derivative_of_the_path(path):
  y = jax.random.normal(jax.random.key(0), (7, 3))
  rng = jax.random.key(1)

  @jax.jit
  def found(ts):
    at = lambda t: path_sample(rng, y, t, schedule=path)  # noqa: E731
    (_, velocity), (derivative, _) = jax.jvp(at, (ts,), (jnp.ones_like(ts),))
    return velocity, derivative

  velocity, derivative = found(_times(path))
  np.testing.assert_allclose(velocity, derivative, rtol=1e-11, atol=1e-12)


def test_straight_paths_between_noise_and_data():
  y = jax.random.normal(jax.random.key(0), (4, 3))
  sample = functools.partial(path_sample, jax.random.key(1), y)
  start, velocity = sample(0.0, schedule=straight())
  end, _ = sample(jnp.ones(4), schedule=straight())
  np.testing.assert_allclose(end, y, rtol=1e-14)
  np.testing.assert_allclose(velocity, y - start, rtol=1e-12, atol=1e-14)
  rest, velocity = sample(1.0, schedule=straight(0.1))
  np.testing.assert_allclose(rest, y + 0.1 * start, rtol=1e-12, atol=1e-14)
  np.testing.assert_allclose(velocity, y - 0.9 * start, rtol=1e-12, atol=1e-14)


def test_moments_of_a_path():
  n, t = 100_000, 0.7
  y = jnp.full((n, 1), 2.0)
  x, _ = path_sample(jax.random.key(0), y, t, schedule=ou(0.5))
  sd = np.sqrt(-np.expm1(-t))
  assert abs(x.mean() - 2 * np.exp(-t / 2)) < 5 * sd / np.sqrt(n)
  assert abs(x.std() / sd - 1) < 5 / np.sqrt(2 * n)


def test_dtype_of_samples():
  y = jnp.ones((2, 3), jnp.bfloat16)
  found = path_sample(
    jax.random.key(0), y, jnp.full(2, 0.5), schedule=straight()
  )
  assert all(x.dtype == jnp.bfloat16 for x in found)


# --- grids ---


@pytest.mark.parametrize("path", [ou(), straight()], ids=lambda p: p.name)
@pytest.mark.parametrize("kind", ["uniform", "quadratic", "log", "log_snr"])
def test_grids(path, kind):
  low, high = _SPAN[path.name.split("(")[0]]
  ts = time_grid(40, kind=kind, t_min=low, t_max=high, schedule=path)
  assert ts.shape == (41,)
  far = np.abs(np.asarray(ts) - path.data_time)
  assert (np.diff(far) < 0).all()
  assert {float(ts[0]), float(ts[-1])} == {low, high}
  even = {
    "uniform": far,
    "quadratic": np.sqrt(far),
    "log": np.log(far),
    "log_snr": path.log_snr(ts),
  }[kind]
  np.testing.assert_allclose(np.diff(even), np.diff(even).mean(), rtol=1e-9)


def test_log_grid_is_a_constant_share_of_what_is_left():
  ts = time_grid(10, kind="log", t_min=0.0, t_max=0.9, schedule=straight())
  share = np.diff(ts) / (1 - ts[:-1])
  np.testing.assert_allclose(share, 1 - 0.1**0.1, rtol=1e-12)


def test_grids_may_reach_the_data():
  for kind in ("uniform", "quadratic"):
    ts = time_grid(3, kind=kind, t_min=0.0, t_max=1.0, schedule=straight())
    assert (ts[0], ts[-1]) == (0, 1)
    assert time_grid(3, kind=kind, t_min=0, t_max=5, schedule=ou())[-1] == 0


def test_a_grid_under_jit():
  make = functools.partial(time_grid, 5, t_min=0.01, t_max=3.0, schedule=ou())
  got = jax.jit(lambda: make(kind="log_snr"))()
  np.testing.assert_allclose(got, make(kind="log_snr"), rtol=1e-12)


# --- refusals ---


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
    ({"kind": "cosine"}, "kind must be one of 'uniform', 'quadratic', 'log'"),
    (
      {"t_min": 5.0},
      "t_max must be above t_min, got t_max = 5.0 and t_min = 5.0",
    ),
    ({"t_min": -1.0}, "t_min must be non-negative, got -1.0"),
    (
      {"t_max": 2.0, "schedule": straight()},
      "times must not pass the data of straight(sigma_min=0.0) at t = 1.0",
    ),
    (
      {"kind": "log_snr"},
      "must keep away from times at which signal or noise is 0, got t = 0.0",
    ),
    (
      {"kind": "log_snr", "t_max": 0.5, "schedule": straight()},
      "must keep away from times at which signal or noise is 0, got t = 0.0",
    ),
    ({"kind": "log"}, "must end before the data at t = 0.0, got 0.0"),
  ],
)
def test_refused_grids(options, message):
  call = {"num_steps": 4, "t_min": 0.0, "t_max": 5.0, "schedule": ou()}
  call |= options
  with pytest.raises(ValueError, match=re.escape(message)):
    time_grid(call.pop("num_steps"), **call)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: ou(0.0), "rate must be positive, got 0.0"),
    (lambda: straight(-0.1), "sigma_min must be in [0, 1], got -0.1"),
    (lambda: straight(1.0), "sigma_min must be below 1, got 1"),
    (
      lambda: path_sample(
        jax.random.key(0), jnp.ones((4, 2)), 1.5, schedule=straight()
      ),
      "t must be in [0, 1.0], got 1.5",
    ),
    (
      lambda: path_sample(
        jax.random.key(0), jnp.ones((4, 2)), -0.5, schedule=ou()
      ),
      "t must be in [0, inf], got -0.5",
    ),
    (
      lambda: path_sample(
        jax.random.key(0), jnp.ones((4, 2)), jnp.ones(3), schedule=ou()
      ),
      "t must have shape (4,) = y.shape[:-1], got (3,)",
    ),
    (
      lambda: path_sample(
        jax.random.key(0), jnp.ones(2, int), 0.5, schedule=ou()
      ),
      "y must have a floating dtype, got int64",
    ),
  ],
)
def test_refused_arguments(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
