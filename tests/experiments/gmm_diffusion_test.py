"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from experiments import _gaussian_chains as chains
from experiments import _score_matching, harness
from experiments import _worst_mixtures as worst_mixtures
from experiments import gmm_diffusion as experiment
from jaxattn.sampling import (
  Corrector,
  gmm_init,
  gmm_sample,
  gmm_score,
  gmm_score_jacobian,
  gmm_score_lipschitz_bound,
  gmm_second_moment,
  ou,
  sample_diffusion,
  time_grid,
)
from tests.experiments import smoke

_CONFIG = "configs/gmm_diffusion.py"


def test_total_variation_of_gaussians():
  q, v = 0.4, 0.25

  def gap(r, d):
    """Of the laws of the radius."""
    scaled = [stats.chi(d, scale=s**0.5).pdf(r) for s in (q, v)]
    return abs(scaled[0] - scaled[1]) / 2

  for d in (1, 2, 7):
    want = integrate.quad(gap, 0, 20, args=(d,), limit=400, epsabs=1e-10)[0]
    np.testing.assert_allclose(chains.total_variation(q, v, d), want, rtol=1e-6)
    np.testing.assert_allclose(chains.total_variation(v, q, d), want, rtol=1e-6)
  assert chains.total_variation(v, v, 3) == 0


_N, _BLOCKS, _T_MAX, _V = 6, 3, 2.0, 0.4


@pytest.mark.parametrize(
  ("method", "corrector", "variance"),
  [
    ("ddpm", None, chains.ddpm(_V, _T_MAX, _N)),
    ("ei", None, chains.ei(_V, _T_MAX, _N)),
    (
      "dpom",
      Corrector(0.1, num_steps=2, every=2),
      chains.dpom(_V, _T_MAX, _BLOCKS, 2, 0.1),
    ),
    (
      "dpum",
      Corrector(0.3, 2.5, num_steps=2, every=2),
      chains.dpum(_V, _T_MAX, _BLOCKS, 2, 0.3, 2.5),
    ),
  ],
)
def test_laws_of_chains_are_those_of_samplers(method, corrector, variance):
  gmm, n = gmm_init([1.0], jnp.zeros((1, 1)), [_V]), 100_000
  ts = time_grid(_N, t_min=0.0, t_max=_T_MAX, schedule=ou())
  z = jax.random.normal(jax.random.key(0), (n, 1))
  x = sample_diffusion(
    jax.random.key(1),
    functools.partial(gmm_score, gmm),
    z,
    ts,
    method=method,
    corrector=corrector,
  )
  if method == "ei":  # Draws nothing: the factor itself.
    np.testing.assert_allclose((x / z) ** 2, variance, rtol=1e-10)
  assert abs(float(jnp.var(x)) / variance - 1) < 4.5 * np.sqrt(2 / n)


def test_evaluations_are_read_between_those_that_ran():
  v, d = 0.25, 16
  laws = [(n, v * (1 + 1 / n)) for n in (10, 100, 1000)]
  tv = chains.total_variation(v * (1 + 1 / 50), v, d)
  found = experiment._needed(laws, v, d, tv)
  np.testing.assert_allclose(found, 50, rtol=0.02)
  assert np.isnan(experiment._needed(laws, v, d, 1e-9))


def test_steps_at_once_change_nothing():
  gmm, z = experiment.plane_mixture(0), jnp.ones((4, 2)) / 3
  run = functools.partial(
    experiment.sample,
    jax.random.key(0),
    gmm,
    z,
    method="heun",
    num_steps=5,
    span=(0.01, 5.0),
    batch=2,
  )
  np.testing.assert_allclose(run(at_once=2), run(), rtol=1e-12)


def test_ascent_finds_the_worst_mixture():
  """Two clusters at ends of a diameter, equally likely at the point."""
  radius, v, t = 2.0, 0.25, 0.1
  drawn = worst_mixtures.draw(0, 5, 4, radius, v)
  assert np.linalg.norm(drawn.means, axis=1).max() < radius
  worst, x = worst_mixtures.steepest(
    drawn, t, radius=radius, num_steps=500, rate=0.05
  )
  bound = worst_mixtures.slope_bound(t, radius, v)
  slope = np.linalg.eigvalsh(gmm_score_jacobian(worst, x, t))[-1]
  np.testing.assert_allclose(slope, bound, rtol=1e-3)
  assert slope <= bound * (1 + 1e-12)
  # The library's two ways to the bound.
  near = gmm_score_lipschitz_bound(worst, t, radius=np.exp(-t) * radius)
  np.testing.assert_allclose(near, bound, rtol=1e-12)
  found = gmm_score_lipschitz_bound(worst, t)
  np.testing.assert_allclose(found, bound, rtol=1e-3)
  everywhere = worst._replace(means=worst.means * 0 + radius / 2)
  moment = gmm_second_moment(everywhere, t)
  want = worst_mixtures.moment_bound(t, 4, radius, v)
  np.testing.assert_allclose(moment, want, rtol=1e-12)


def test_sampled_total_variation():
  """Of samples from the target, that of multinomial noise."""
  config = harness.load_config(f"{_CONFIG}:cpu")
  gmm = experiment.line_mixture(config)
  x = gmm_sample(jax.random.key(0), gmm, 100_000)
  cdf = stats.norm.cdf(experiment._BINS[:, None], [-2, 1.5], [0.5, 0.7])
  p = np.diff(cdf @ [0.3, 0.7])
  floor = np.sqrt(p / (2 * np.pi * len(x))).sum()
  # Bins of few samples have a smaller mean deviation than normal ones.
  np.testing.assert_allclose(experiment._binned_tv(config, x), floor, rtol=0.3)
  # A shift of everything beyond the other end.
  assert experiment._binned_tv(config, jnp.full((10, 1), 6.9)) > 0.99


def test_a_network_that_knows_nothing_predicts_the_point():
  """Its error at t is then known: that of -x / b^2 b."""
  rng = jax.random.key(0)
  params = _score_matching.init_network(rng, 3, 8, jnp.float64)
  params = jax.tree.map(jnp.zeros_like, params)
  x, t = jax.random.normal(rng, (5, 3)), 0.4
  found = _score_matching.network_score(params, x, jnp.array(t))
  np.testing.assert_allclose(found, -x, rtol=1e-6)
  gmm = gmm_init([1.0], jnp.zeros((1, 3)), [1.0])
  oracle, losses = _score_matching.errors(
    rng, params, gmm, jnp.array(t), num_samples=1000
  )
  # The score of N(0, I) is -x at all times.
  np.testing.assert_allclose([oracle, losses], 0, atol=1e-10)


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  k, d = config.cloud_components, max(config.cloud_dims)
  gmm = jax.eval_shape(
    gmm_init,
    jax.ShapeDtypeStruct((k,), jnp.float32),
    jax.ShapeDtypeStruct((k, d), jnp.float32),
    jax.ShapeDtypeStruct((k, d), jnp.float32),
  )
  z = jax.ShapeDtypeStruct((config.cloud_samples, d), jnp.float32)
  run = functools.partial(
    experiment.sample,
    method="dpm3",
    num_steps=config.cloud_evaluations[-1],
    span=config.cloud_span,
    batch=config.cloud_batch,
  )
  assert jax.eval_shape(run, jax.random.key(0), gmm, z).shape == z.shape


def test_smoke(tmp_path):
  verdict = smoke.run_twice("gmm_diffusion", tmp_path / "a", num_checks=27)
  # What needs neither many steps nor many samples holds at any size.
  accepted, measured = verdict.accepted, verdict.measured
  for name in measured:
    if any(word in name for word in ("least", "bound", "eigenvalue")):
      if name in accepted:
        low, high = accepted[name]
        assert (-np.inf if low is None else low) <= measured[name], name
        assert measured[name] <= (np.inf if high is None else high), name
