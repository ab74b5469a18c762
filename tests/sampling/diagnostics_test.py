"""Effective sample sizes and R-hat: known chains, and blackjax."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax import diagnostics as peer

from jaxattn.sampling import effective_sample_size, potential_scale_reduction
from tests._recompile import no_recompilation


def _ar1(rho, num_chains, num, seed=0):
  """A stationary chain for each of the coefficients, (chains, num, ...)."""
  rho = np.asarray(rho, float)
  noise = np.random.default_rng(seed).normal(size=(num_chains, num, *rho.shape))
  x = np.zeros_like(noise)
  x[:, 0] = noise[:, 0]
  for t in range(1, num):
    x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * noise[:, t]
  return jnp.asarray(x)


def test_ar1():
  """(1 - rho) / (1 + rho) of the draws count: .0526 for .9."""
  x = _ar1([0.9, 0.0], 64, 4000)
  share = effective_sample_size(x) / (64 * 4000)
  np.testing.assert_allclose(share[0], 0.1 / 1.9, rtol=0.08)
  np.testing.assert_allclose(share[1], 1, rtol=0.05)
  assert (potential_scale_reduction(x) < 1.01).all()


def test_as_blackjax():
  x = _ar1([0.9, 0.3, 0.0], 8, 1000)
  with jax.numpy_rank_promotion("allow"):
    ess, rhat = peer.ess_bulk(x), peer.rhat(x)
  # They may add one more term to the sum, where it is positive.
  np.testing.assert_allclose(effective_sample_size(x), ess, rtol=0.02)
  np.testing.assert_allclose(potential_scale_reduction(x), rhat, rtol=1e-9)


def test_antithetic_chains_count_more():
  x = _ar1(-0.5, 16, 2000)
  share = effective_sample_size(x) / (16 * 2000)
  np.testing.assert_allclose(share, 3, rtol=0.1)
  # But not without bound.
  flips = jnp.tile(jnp.array([1.0, -1.0]), 500)[None]
  size = effective_sample_size(jnp.tile(flips, (4, 1)))
  np.testing.assert_allclose(size, 4000 * np.log10(4000), rtol=1e-9)


def test_chains_that_disagree():
  x = _ar1([0.0, 0.0, 0.0], 2, 2000)
  x = x.at[1, :, 0].add(3.0)
  # Equal means, other widths: only the distances to the median tell.
  x = x.at[1, :, 1].multiply(10.0)
  rhat = potential_scale_reduction(x)
  assert rhat[0] > 1.5
  assert rhat[1] > 1.2
  assert rhat[2] < 1.01
  assert effective_sample_size(x)[0] < 10
  # A drift of all chains shows between their halves.
  drift = x[..., 2] + jnp.linspace(0, 6, 2000)[None]
  assert potential_scale_reduction(drift) > 1.5


def test_chains_that_do_not_move():
  still = jnp.full((4, 10), 0.3)
  assert effective_sample_size(still) == 40
  assert potential_scale_reduction(still) == 1
  apart = still + jnp.arange(4.0)[:, None]
  assert potential_scale_reduction(apart) == jnp.inf
  # A number that is missing makes the answer one that is missing.
  x = _ar1([0.0, 0.0], 4, 100).at[1, 5, 0].set(jnp.nan)
  for answer in (effective_sample_size(x), potential_scale_reduction(x)):
    assert jnp.isnan(answer[0])
    assert jnp.isfinite(answer[1])


def test_axes_ranks_and_odd_lengths():
  x = _ar1([0.5, 0.0], 4, 101)
  for fn in (effective_sample_size, potential_scale_reduction):
    want = fn(x)
    np.testing.assert_allclose(fn(jnp.moveaxis(x, 0, 1), 1, 0), want)
    np.testing.assert_allclose(fn(jnp.moveaxis(x, 1, -1), 0, -1), want)
    # Ranks: a monotone map of the draws changes nothing, but the median.
    if fn is effective_sample_size:
      np.testing.assert_allclose(fn(jnp.exp(3 * x)), want)
    np.testing.assert_allclose(fn(x[:, :50]), fn(x[:, :50, :]))


@pytest.mark.any_x64
def test_dtype_stays():
  x = jnp.asarray(_ar1([0.5, 0.0], 4, 200), jnp.float32)
  for fn in (effective_sample_size, potential_scale_reduction):
    assert fn(x).dtype == jnp.float32


def test_no_recompilation():
  x, y = _ar1(0.5, 4, 60), _ar1(0.5, 4, 60, 1)
  for fn in (effective_sample_size, potential_scale_reduction):
    fn(x)
    with no_recompilation():
      fn(y)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ((jnp.ones((4, 10), int),), "x must have a floating dtype, got int64"),
    ((jnp.ones((4, 3)),), "x must hold at least 4 draws a chain, got 3"),
    ((jnp.ones((4, 10)), 2, 1), "chain_axis must be in [-2, 1], got 2"),
    ((jnp.ones((4, 10)), 0, -3), "sample_axis must be in [-2, 1], got -3"),
    ((jnp.ones((4, 10)), 1, -1), "chain_axis and sample_axis must differ"),
  ],
)
def test_refused_inputs(args, message):
  for fn in (effective_sample_size, potential_scale_reduction):
    with pytest.raises(ValueError, match=re.escape(message)):
      fn(*args)
