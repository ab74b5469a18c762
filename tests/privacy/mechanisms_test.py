"""Calibration of Gaussian noise against tables, quadrature and simulation."""

import importlib
import importlib.util
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from jaxattn.privacy import dp_gradient, mechanisms

_TABLE = {0.5: 7.0318, 1.0: 3.7306, 2.0: 1.9938, 5.0: 0.8919, 10.0: 0.4999}
_NEEDS_ACCOUNTING = pytest.mark.skipif(
  importlib.util.find_spec("dp_accounting") is None,
  reason="dp-accounting is missing",
)


@pytest.mark.parametrize(("epsilon", "sigma"), _TABLE.items())
def test_published_values(epsilon, sigma):
  got = mechanisms.gaussian_sigma(epsilon, 1e-5)
  np.testing.assert_allclose(got, sigma, atol=1e-3)
  assert mechanisms.gaussian_sigma(epsilon, 1e-5, 3.0) == 3 * got


def test_another_delta():
  got = mechanisms.gaussian_sigma(0.1, 1e-3)
  np.testing.assert_allclose(got, 17.404, atol=1e-3)


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 4.0])
def test_delta_is_the_divergence(epsilon):
  """The excess of one density over e^epsilon times the other's, integrated."""
  delta = 1e-4
  sigma = mechanisms.gaussian_sigma(epsilon, delta)

  def excess(x):
    one, other = stats.norm.pdf(x, 1, sigma), stats.norm.pdf(x, 0, sigma)
    return max(one - math.exp(epsilon) * other, 0)

  # From where the densities differ by that factor.
  start = sigma**2 * epsilon + 0.5
  got, _ = integrate.quad(excess, start, start + 40 * sigma, limit=200)
  np.testing.assert_allclose(got, delta, rtol=1e-6)


def test_classical_noise_is_too_much_and_then_too_little():
  def ratio(epsilon):
    classical = math.sqrt(2 * math.log(1.25 / 1e-5)) / epsilon
    return classical / mechanisms.gaussian_sigma(epsilon, 1e-5)

  assert ratio(0.5) > 1.3
  assert ratio(10.0) < 1


@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.1])
@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0, 10.0, 100.0])
def test_inverse(epsilon, delta):
  for steps in (1, 7):
    sigma = mechanisms.gaussian_sigma(epsilon, delta, 2.0, num_steps=steps)
    back = mechanisms.gaussian_epsilon(sigma, delta, 2.0, num_steps=steps)
    np.testing.assert_allclose(back, epsilon, rtol=1e-6)


@pytest.mark.parametrize(
  ("epsilon", "delta"), [(1e-3, 0.999), (1e-6, 1e-9), (1e3, 0.9), (1e3, 1e-12)]
)
def test_extremes(epsilon, delta):
  sigma = mechanisms.gaussian_sigma(epsilon, delta)
  cost = mechanisms.gaussian_epsilon(sigma, delta)
  # At delta near 1 the noise hardly depends on epsilon.
  np.testing.assert_allclose(cost, epsilon, rtol=1e-7)


@_NEEDS_ACCOUNTING
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.1])
@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0, 10.0, 100.0])
def test_same_as_dp_accounting(epsilon, delta):
  accounting = importlib.import_module("dp_accounting")
  sigma = mechanisms.gaussian_sigma(epsilon, delta)
  peer = accounting.get_sigma_gaussian(epsilon, delta)
  np.testing.assert_allclose(sigma, peer, rtol=1e-9)
  peer = accounting.get_epsilon_gaussian(3.0, delta)
  got = mechanisms.gaussian_epsilon(3.0, delta)
  np.testing.assert_allclose(got, peer, rtol=1e-9, atol=1e-12)


def test_enough_noise_costs_nothing():
  assert mechanisms.gaussian_epsilon(1e6, 1e-3) == 0


def test_steps_compose_as_one_release():
  four = mechanisms.gaussian_epsilon(2.0, 1e-5, num_steps=4)
  assert four == mechanisms.gaussian_epsilon(1.0, 1e-5)
  # Below the bound by zero-concentrated privacy.
  for sigma, steps in ((2.0, 4), (1.0, 1), (10.0, 50)):
    rho = steps / (2 * sigma**2)
    bound = rho + 2 * math.sqrt(rho * math.log(1e5))
    got = mechanisms.gaussian_epsilon(sigma, 1e-5, num_steps=steps)
    assert 0.5 * bound < got < bound


def test_no_release_tells_more_than_promised():
  """A threshold test, the strongest there is, on two neighbours.

  The private gradient is the release: one example, of norm above the clip, in
  the batch or not. Bounds are those of Clopper and Pearson, of 95 percent.
  """
  epsilon, delta, num = 1.0, 1e-2, 200_000
  sigma = mechanisms.gaussian_sigma(epsilon, delta)

  @jax.jit
  def release(rngs, grads):
    def one(rng):
      private = dp_gradient(rng, clip=0.5, noise_multiplier=sigma)
      return private.update(grads, private.init(grads))[0][0]

    return jax.vmap(one)(rngs)

  rngs = jax.random.split(jax.random.key(0), (2, num))
  pair = jnp.array([[3.0], [0.1]])
  moved = np.asarray(release(rngs[0], pair))
  base = np.asarray(release(rngs[1], pair.at[0].set(0)))
  # Where the densities differ by a factor of e^epsilon.
  threshold = 0.05 + 0.5 * (sigma**2 * epsilon + 0.5) / 2

  def share(draws):
    hits = int((draws > threshold).sum())
    return stats.binomtest(hits, num).proportion_ci(0.9, "exact")

  proven = math.log((share(moved).low - delta) / share(base).high)
  assert 0.8 * epsilon < proven <= epsilon


# --- sampling of records ---


def _renyi_epsilon(sigma, rate, steps, delta):
  """The bound by Rényi divergences at integer orders."""
  best = math.inf
  for order in range(2, 129):
    k = np.arange(order + 1)
    terms = [math.log(math.comb(order, j)) for j in k]
    terms += (order - k) * math.log1p(-rate) + k * math.log(rate)
    terms += (k * k - k) / (2 * sigma**2)
    top = terms.max()
    renyi = (top + math.log(np.exp(terms - top).sum())) / (order - 1)
    best = min(best, steps * renyi - math.log(delta) / (order - 1))
  return best


@_NEEDS_ACCOUNTING
def test_sampling_saves_noise():
  case = {"num_steps": 500, "sample_rate": 0.02}
  got = mechanisms.gaussian_epsilon(1.0, 1e-5, **case)
  bound = _renyi_epsilon(1.0, 0.02, 500, 1e-5)
  assert 0.7 * bound < got <= bound
  assert got < mechanisms.gaussian_epsilon(1.0, 1e-5, num_steps=500) / 3
  sigma = mechanisms.gaussian_sigma(2.0, 1e-5, 3.0, **case)
  back = mechanisms.gaussian_epsilon(sigma, 1e-5, 3.0, **case)
  np.testing.assert_allclose(back, 2.0, rtol=1e-4)
  assert back <= 2.0


@_NEEDS_ACCOUNTING
@pytest.mark.parametrize(("rate", "steps"), [(0.9, 1), (0.99, 100)])
def test_sampling_never_costs_more_than_none(rate, steps):
  case = {"num_steps": steps, "sample_rate": rate}
  sigma = mechanisms.gaussian_sigma(1.0, 1e-5, **case)
  assert sigma <= mechanisms.gaussian_sigma(1.0, 1e-5, num_steps=steps)
  assert mechanisms.gaussian_epsilon(sigma, 1e-5, **case) <= 1


def test_sampling_names_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "dp_accounting", None)
  for call in (mechanisms.gaussian_sigma, mechanisms.gaussian_epsilon):
    with pytest.raises(ImportError, match=r"jaxattn\[privacy\]"):
      call(1.0, 1e-5, sample_rate=0.1)


@pytest.mark.parametrize(
  ("args", "options", "message"),
  [
    ((-1.0, 1e-5), {}, "epsilon must be positive, got -1.0"),
    ((math.inf, 1e-5), {}, "epsilon must be finite, got inf"),
    ((1.0, 0.0), {}, "delta must be in (0.0, 1.0), got 0.0"),
    ((1.0, 1.0), {}, "delta must be in (0.0, 1.0), got 1.0"),
    ((1.0, 1e-5, 0.0), {}, "sensitivity must be positive, got 0.0"),
    ((1.0, 1e-5, math.inf), {}, "sensitivity must be finite, got inf"),
    ((1.0, 1e-5), {"num_steps": 0}, "num_steps must be >= 1, got 0"),
    ((1.0, 1e-5), {"sample_rate": 0.0}, "sample_rate must be positive"),
    ((1.0, 1e-5), {"sample_rate": 1.5}, "sample_rate must be in [0.0, 1.0]"),
  ],
)
def test_refusals(args, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    mechanisms.gaussian_sigma(*args, **options)
  message = message.replace("epsilon", "sigma")
  with pytest.raises(ValueError, match=re.escape(message)):
    mechanisms.gaussian_epsilon(*args, **options)
