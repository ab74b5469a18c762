"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments import softmax_ntk as experiment
from jaxattn.sampling import gmm_logpdf, score_from_denoiser
from tests.experiments import smoke

_CONFIG = "configs/softmax_ntk.py"


def test_steps_until_a_loss_is_reached():
  values, modes = np.array([0.5, 1.0, 2.0]), np.array([1.0, -2.0, 3.0])
  steps = int(experiment.steps_until(values, modes, 1e-3))

  def loss(t):
    return ((modes * (1 - values / 2) ** t) ** 2).sum() / 2

  assert loss(steps) <= 1e-3 < loss(steps - 1)


def test_score_of_the_oracle():
  config = harness.load_config(f"{_CONFIG}:smoke")
  x, t, _ = experiment.pairs(config, jax.random.key(0), 9)
  gmm = experiment.mixture(config)
  logpdf = functools.partial(gmm_logpdf, gmm, schedule=experiment._SCHEDULE)
  want = jax.vmap(jax.grad(lambda x, t: logpdf(x[None], t)[0]))(x, t)
  denoised = experiment.oracle(config, x, t)
  score = functools.partial(score_from_denoiser, schedule=experiment._SCHEDULE)
  got = jax.vmap(score)(x, t, denoised)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * abs(want).max())
  signal = np.exp(-np.asarray(t)[:, None] / 2)
  identity = (signal * denoised - x) / (1 - signal**2)
  np.testing.assert_allclose(got, identity, rtol=0, atol=1e-12)


def test_the_sampler_with_the_oracle_draws_the_data():
  config = harness.load_config(f"{_CONFIG}:cpu")
  exact = functools.partial(experiment.exact_denoise, config)
  distance, samples = experiment.sample_distance(config, exact)
  assert samples.shape == (2000, 2)
  assert distance < 0.01


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  width = max(config.widths)
  with jax.enable_x64(True):
    factor = jax.eval_shape(
      lambda rng: experiment.softmax.init(
        rng, width, config.dim, config.num_outputs
      ),
      jax.random.key(0),
    )
    kernel = jax.eval_shape(
      experiment.softmax.ntk,
      factor,
      jax.ShapeDtypeStruct((config.num_data, config.dim), jnp.float32),
    )
  assert kernel.shape == (config.num_data, config.num_outputs) * 2


def test_smoke(tmp_path):
  verdict = smoke.run_twice("softmax_ntk", tmp_path / "a", num_checks=11)
  # What is exact holds at any size.
  measured = verdict.measured
  assert measured["largest share of the bound"] < 1
