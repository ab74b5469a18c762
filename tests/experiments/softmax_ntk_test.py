"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments import softmax_ntk as experiment
from jaxattn import ntk
from jaxattn.sampling import gmm_logpdf, score_from_denoiser
from tests.experiments import smoke

_CONFIG = "configs/softmax_ntk.py"


def test_steps_until_a_loss_is_reached():
  values, modes = np.array([0.5, 1.0, 2.0]), np.array([1.0, -2.0, 3.0])
  steps = int(experiment.steps_until(values, modes, 1e-3))

  def loss(t):
    return ((modes * (1 - values / 2) ** t) ** 2).sum() / 2

  assert loss(steps) <= 1e-3 < loss(steps - 1)
  # Of a singular kernel one mode stays, and others do not.
  singular = np.array([0.0, 1.0, 2.0])
  assert experiment.steps_until(singular, modes, 1e-3) == np.inf
  assert experiment.steps_until(singular, modes * [0, 1, 1], 1e-3) < 20


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


def test_modes_of_mixtures():
  config = harness.load_config(f"{_CONFIG}:cpu")
  means = experiment.mixture(config).means
  np.testing.assert_array_equal(means, [[1, 1], [1, -1], [-1, 1], [-1, -1]])
  means = experiment.mixture(harness.load_config(f"{_CONFIG}:full")).means
  assert means.shape == (32, 16)
  assert len(np.unique(means, axis=0)) == 32
  np.testing.assert_array_equal(abs(means), 1)


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  n, dim = max(config.num_pairs), config.mixture_dim
  with jax.enable_x64(True):
    found = jax.eval_shape(
      functools.partial(experiment.lazy_metrics, config, width=2**18),
      jax.random.key(0),
      rate=jax.ShapeDtypeStruct((), jnp.float64),
      predicted=jax.ShapeDtypeStruct(
        (config.num_test, config.num_outputs), jnp.float64
      ),
    )
    assert {value.shape for value in found.values()} == {()}
    pairs, val = (
      tuple(
        jax.ShapeDtypeStruct(shape, jnp.float64)
        for shape in ((k, dim), (k,), (k, dim))
      )
      for k in (n, config.num_val)
    )
    fitted = jax.eval_shape(ntk.fit_score_kernel, *pairs, val=val)
  assert max(config.widths) == 2**18
  assert fitted.coefficients.shape == (n, dim) == (4096, 16)


def test_smoke(tmp_path):
  verdict = smoke.run_twice("softmax_ntk", tmp_path / "a", num_checks=11)
  # What is exact holds at any size.
  measured = verdict.measured
  assert measured["largest share of the bound"] < 1
