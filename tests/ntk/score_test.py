"""Denoisers by a kernel and by a network: against one that is known."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import ntk


@functools.cache
def _pairs(n, seed):
  """Standard normal data, blurred: the denoiser is e^(-t/2) x."""
  rng = np.random.default_rng(seed)
  x0, z = rng.standard_normal((2, n, 1))
  t = rng.uniform(0.05, 3.0, n)
  a = np.exp(-t / 2)[:, None]
  return jnp.asarray(a * x0 + np.sqrt(1 - a**2) * z), jnp.asarray(t), x0


@functools.cache
def _fitted():
  return ntk.fit_score_kernel(*_pairs(200, 0), val=_pairs(200, 1))


def _error(denoise):
  x, t, _ = _pairs(500, 2)
  return float(jnp.square(denoise(x, t) - jnp.exp(-t / 2)[:, None] * x).mean())


def test_features_are_bounded():
  x = jnp.array([[0.0, 0.0], [1e6, 0.0]])
  features = ntk.score_features(x, jnp.array([0.0, 3.0]), t_max=3.0)
  np.testing.assert_allclose(features[0], [0, 0, 0, 1.5 / 2**0.5])
  np.testing.assert_allclose(features[1], [1.5, 0, 0, 0], atol=1e-5)
  one = ntk.score_features(x, 3.0, t_max=3.0)
  np.testing.assert_allclose(one[1], features[1])


def test_stopping_early_finds_the_denoiser_and_interpolation_does_not():
  fitted = _fitted()
  assert fitted.times.shape == fitted.val_errors.shape == (26,)
  assert 0 < fitted.time_index < 25
  x, t, x0 = _pairs(200, 1)
  # The error that chose is the one that a user measures.
  got = jnp.square(fitted.denoise(x, t) - x0).mean()
  want = fitted.val_errors[fitted.time_index]
  np.testing.assert_allclose(got, want, rtol=1e-8)
  early = _error(fitted.denoise)
  last = ntk.fit_score_kernel(
    *_pairs(200, 0), val=_pairs(200, 1), times=fitted.times[-1:]
  )
  # The variance of the denoiser is (1 - e^-3) / 3 or so, 0.32.
  assert early < 0.05
  assert early < 0.35 * _error(last.denoise)


def test_recursion_agrees_with_the_factor_in_the_long_run():
  fitted = _fitted()
  found = ntk.fit_score_kernel(
    *_pairs(200, 0), val=_pairs(200, 1), method="recursion"
  )
  np.testing.assert_allclose(
    found.times[:2] * fitted.times[0] ** -1, [1, 2], rtol=1e-3
  )
  again = ntk.fit_score_kernel(
    *_pairs(200, 0), val=_pairs(200, 1), times=found.times
  )
  # Steps at the rate 1 / lambda_max differ from flow in the first few only.
  np.testing.assert_allclose(
    found.val_errors[5:], again.val_errors[5:], rtol=0.02
  )


def test_recursion_of_few_steps_says_so():
  found = ntk.fit_score_kernel(
    *_pairs(200, 0), val=_pairs(200, 1), method="recursion", num_steps=9
  )
  np.testing.assert_allclose(found.times / found.times[0], [1, 2, 4, 8])
  assert found.time_index == 3


@pytest.mark.any_x64
def test_in_the_precision_that_users_have():
  pairs, val = (
    [jnp.asarray(z, "float32") for z in _pairs(200, seed)] for seed in (0, 1)
  )
  for options in ({}, {"method": "recursion", "num_steps": 64}):
    fitted = ntk.fit_score_kernel(*pairs, val=tuple(val), **options)
    assert fitted.coefficients.dtype == jnp.float32
    x, t, _ = [jnp.asarray(z, "float32") for z in _pairs(500, 2)]
    want = jnp.exp(-t / 2)[:, None] * x
    assert jnp.square(fitted.denoise(x, t) - want).mean() < 0.05


def test_a_wide_network_stops_where_the_kernel_does():
  fitted = _fitted()
  time = float(fitted.times[fitted.time_index])
  rate = float(0.5 * fitted.times[0])
  network = ntk.fit_score_network(
    jax.random.key(0),
    *_pairs(200, 0),
    width=4096,
    num_steps=round(time / rate),
    learning_rate=rate,
  )
  x, t, _ = _pairs(500, 2)
  want = fitted.denoise(x, t)
  gap = jnp.linalg.norm(network.denoise(x, t) - want) / jnp.linalg.norm(want)
  assert gap < 0.15


def test_refused():
  x, t, x0 = _pairs(200, 0)
  fit = functools.partial(ntk.fit_score_kernel, x, t, x0)
  val = (x, t, x0)
  for call, message in (
    (
      lambda: ntk.fit_score_kernel(x, t[:9], x0, val=val),
      "t must have shape (200,) = (n,), got (9,)",
    ),
    (
      lambda: ntk.fit_score_kernel(x, t, x0[:9], val=val),
      "x0 must have shape (200, 1) = that of x_t, got (9, 1)",
    ),
    (
      lambda: fit(val=(jnp.ones((3, 2)), t[:3], jnp.ones((3, 2)))),
      "val: x_t must have shape (*, 1) = (n, d), got (3, 2)",
    ),
    (
      lambda: fit(val=(x[:0], t[:0], x0[:0])),
      "val: x_t must not be empty, got shape (0, 1)",
    ),
    (lambda: fit(val=val, sigma=0.0), "sigma must be positive, got 0.0"),
    (
      lambda: fit(val=val, sigma=jnp.ones(2)),
      "sigma must be a real scalar, got",
    ),
    (
      lambda: fit(val=(x, 0 * t, x0)),
      "val: t must be positive, got",
    ),
    (lambda: fit(val=val, t_max=1.0), "t must be in [0, 1.0], got"),
    (
      lambda: ntk.fit_score_network(
        jax.random.key(0), x, -t, x0, width=8, num_steps=1, learning_rate=0.1
      ),
      "t must be positive, got",
    ),
    (
      lambda: fit(val=val, num_steps=8),
      "num_steps must be None with method='factor'",
    ),
    (
      lambda: fit(val=val, num_steps=0, method="recursion"),
      "num_steps must be >= 1, got 0",
    ),
    (lambda: fit(val=val, t_max=0.0), "t_max must be positive, got 0.0"),
    (
      lambda: fit(val=val, method="cg"),
      "method must be one of 'factor', 'recursion', got 'cg'",
    ),
    (
      lambda: fit(val=val, times=t, method="recursion"),
      "times must be None with method='recursion'",
    ),
    (
      lambda: fit(val=val, times=1.0),
      "times must have 1 dimensions, got shape ()",
    ),
    (
      lambda: ntk.fit_score_network(
        jax.random.key(0), x, t, x0, width=9, num_steps=1, learning_rate=0.1
      ),
      "width must be even when paired=True, got 9",
    ),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      call()
