"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import attention_sparsity as experiment
from experiments import harness
from jaxattn.attention import gaussian_budget
from jaxattn.scaling import fit_slope
from tests.experiments import smoke

_CONFIG = "configs/attention_sparsity.py"


def _descending_rows(rows, n):
  z = np.random.default_rng(0).standard_normal((rows, n), np.float32)
  return -np.sort(-z, axis=-1)


def _half_mass(logits):
  """Half-mass budgets of descending rows, with a fraction of the last key."""
  weights = np.exp((logits - logits[:, :1]).astype(np.float64))
  mass = np.cumsum(weights, -1)
  half = mass[:, -1] / 2
  rank = np.arange(logits.shape[1] + 1)
  return [
    np.interp(h, np.insert(m, 0, 0.0), rank)
    for h, m in zip(half, mass, strict=True)
  ]


def test_half_mass_budgets_by_sorting():
  n, sigma = 1000, np.array([1.0, 3.0, 6.0])
  rng = jax.random.key(3)
  budgets, largest, squares = experiment.half_mass_rows(rng, sigma, n, 7, 500)
  z = [jax.random.normal(key, (n,)) for key in jax.random.split(rng, 7)]
  z = -np.sort(-np.stack(z), -1)
  for i, s in enumerate(sigma):
    np.testing.assert_allclose(budgets[:, i], _half_mass(s * z), rtol=1e-4)
    p = np.asarray(jax.nn.softmax(s * z, -1))
    np.testing.assert_allclose(largest[:, i], p[:, 0], rtol=1e-5)
    np.testing.assert_allclose(squares[:, i], 1 / (p**2).sum(-1), rtol=1e-5)


def test_budget_that_does_not_fit_its_list_is_nan():
  sigma = jnp.array([0.1, 20.0])
  budgets, *_ = experiment.half_mass_rows(jax.random.key(0), sigma, 500, 4, 20)
  assert np.isnan(budgets[:, 0]).all()
  assert np.isfinite(budgets[:, 1]).all()


def test_finite_size_budget():
  # Where the sum has no heavy tail both predictions are the same.
  for n in (2**12, 2**18):
    np.testing.assert_allclose(
      experiment.finite_size_budget(n, 0.3),
      gaussian_budget(0.3 * math.sqrt(math.log(n)), n, 0.5),
      rtol=0.01,
    )
  # Where it has one, only the prediction for finite rows holds.
  n, s = 2**11, 1.0
  rows = _half_mass(s * math.sqrt(math.log(n)) * _descending_rows(2000, n))
  error = np.std(rows) / math.sqrt(2000)
  predicted = experiment.finite_size_budget(n, s)
  assert abs(np.mean(rows) - predicted) < 0.05 * predicted + 3 * error
  assert gaussian_budget(s * math.sqrt(math.log(n)), n, 0.5) < 0.6 * predicted


@pytest.mark.slow
def test_slopes_of_half_mass_budgets():
  """n = 2^12 to 2^18, 64 rows; 0.03 around the finite-size prediction."""
  lengths = 2 ** np.arange(12, 19)
  rows = {int(n): _descending_rows(64, n) for n in lengths}
  for s in (0.5, 0.8, 1.0, 1.2, 1.6):
    budgets = [
      np.mean(_half_mass(s * math.sqrt(math.log(n)) * z))
      for n, z in rows.items()
    ]
    slope = fit_slope(lengths, budgets).slope
    if s == 1.6:
      assert slope < 0.1
      continue
    predicted = [experiment.finite_size_budget(n, s) for n in rows]
    assert abs(slope - fit_slope(lengths, predicted).slope) < 0.03
    if s < 1:
      # The normalizer concentrates: its relative variance is n^(s^2 - 1).
      plain = [
        gaussian_budget(s * math.sqrt(math.log(n)), n, 0.5) for n in rows
      ]
      assert abs(slope - fit_slope(lengths, plain).slope) < 0.03


@pytest.mark.slow
def test_power_of_n_beats_fixed_and_logarithmic_budgets():
  """Spread 1.2 sqrt(log n), 200, 200 and 60 rows."""
  tails = {"n^0.8": [], "64": [], "4 log n": []}
  for n, num_rows in ((2**10, 200), (2**13, 200), (2**16, 60)):
    logits = 1.2 * math.sqrt(math.log(n)) * _descending_rows(num_rows, n)
    weights = np.exp((logits - logits[:, :1]).astype(np.float64))
    mass = np.cumsum(weights, -1) / weights.sum(-1, keepdims=True)
    ks = (math.ceil(n**0.8), 64, math.ceil(4 * math.log(n)))
    for name, k in zip(tails, ks, strict=True):
      tails[name].append(1 - mass[:, k - 1].mean())
  published = {
    "n^0.8": (0.0099, 0.0059, 0.0038),
    "64": (0.080, 0.170, 0.247),
    "4 log n": (0.166, 0.226, 0.314),
  }
  for name, tail in tails.items():
    np.testing.assert_allclose(tail, published[name], rtol=0.15)
  assert tails["n^0.8"][0] / tails["n^0.8"][-1] > 2
  assert np.all(np.diff(tails["64"]) > 0)
  assert np.all(np.diff(tails["4 log n"]) > 0)


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  n, spreads = max(config.lengths), len(config.spreads)
  rng = jax.random.key(0)
  rows = functools.partial(
    experiment.half_mass_rows, n=n, num_rows=64, most=n // 4
  )
  budgets, *_ = jax.eval_shape(rows, rng, jnp.ones(spreads))
  assert budgets.shape == (64, spreads)

  n, batch = max(config.attention_lengths), len(config.attention_spreads)
  shape = (batch, config.num_queries, config.num_heads, 32)
  make = functools.partial(experiment.gaussian_attention, n=n, shape=shape)
  args = jax.eval_shape(make, rng, jnp.ones(batch))
  error = functools.partial(experiment.topk_error, k=n // 4)
  relative, used = jax.eval_shape(error, *args)
  assert relative.shape == (batch,)
  assert used.shape == ()


def test_smoke(tmp_path):
  pytest.importorskip("flax", reason="the model panel needs flax")
  smoke.run_twice("attention_sparsity", tmp_path, num_checks=13)
