"""The experiment's own mathematics, its sizes, and the claims it decides."""

import jax
import numpy as np
import pytest
from scipy import special

from experiments import attention_io as experiment
from experiments import harness
from tests.experiments import smoke

_CONFIG = "configs/attention_io.py"


def test_wanted_outputs_are_attention():
  mask = experiment.make_mask("causal", 6, 1)
  for hidden in (None, mask):
    arrays, wanted = experiment.problem(0, "fwd", 6, 3, hidden)
    scores = arrays["query"] @ arrays["key"].T
    if hidden is not None:
      scores[~hidden] = -np.inf
    weights = special.softmax(scores, axis=1)
    out = weights @ arrays["value"]
    np.testing.assert_allclose(wanted["out"], out, rtol=0, atol=1e-14)
    lse = special.logsumexp(scores, axis=1)
    np.testing.assert_allclose(wanted["lse"], lse, rtol=0, atol=1e-14)
    # A gradient that has a short formula.
    arrays, wanted = experiment.problem(0, "bwd", 6, 3, hidden)
    value_grad = weights.T @ arrays["out_grad"]
    np.testing.assert_allclose(
      wanted["value_grad"], value_grad, rtol=0, atol=1e-14
    )
  # An error in any output is seen.
  off = {name: x + (name == "key_grad") for name, x in wanted.items()}
  assert experiment.max_error(wanted, wanted) == 0
  assert experiment.max_error(off, wanted) > 0.1


def test_masks():
  causal = experiment.make_mask("causal", 4, 2)
  np.testing.assert_array_equal(causal, np.tri(4, dtype=bool))
  block = experiment.make_mask("block", 4, 2)
  np.testing.assert_array_equal(block, np.kron(np.eye(2), np.ones((2, 2))) > 0)
  with pytest.raises(harness.UsageError, match="'causal' or 'block', got 'no"):
    experiment.make_mask("none", 4, 2)


def test_grids_of_kernels():
  forward, keys, queries = experiment.flash_traffic(64, 96, 8, 16, 8)
  assert forward == (512, 3072, 3072, 512, 64)
  # k, v, dk, dv once; 12 blocks of keys see q, do, lse and D.
  assert keys == (768,) * 4 + (12 * 512,) * 2 + (12 * 64,) * 2
  assert queries == (512,) * 3 + (64,) * 2 + (4 * 768,) * 2
  causal, *_ = experiment.flash_traffic(64, 64, 8, 16, 8, is_causal=True)
  # 2, 4, 6 and 8 blocks of keys.
  assert causal[1:3] == (20 * 64,) * 2


def test_counts_are_missing_only_where_they_do_not_fit():
  config = harness.load_config(f"{_CONFIG}:cpu")
  point = experiment.count_point(config, 64)
  shape = len(config.lengths), len(config.caches)
  for algorithm in config.algorithms:
    words = point[f"{algorithm}_reads"] + point[f"{algorithm}_writes"]
    assert words.shape == shape
    missing = np.isnan(words)
    assert missing.any() == ("small" not in algorithm)
    np.testing.assert_array_equal(missing, np.sort(missing)[:, ::-1])
    kind = {"fwd": "forward", "bwd": "backward"}.get(algorithm[:3], "train")
    # No schedule is below the bound but where everything fits.
    above = words >= point[f"{kind}_bound"]
    assert above[~missing].all()


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  x = experiment.timed_shape(config, max(config.timed_lengths))
  for block in config.timed_blocks:
    out = jax.eval_shape(experiment.timed_call(block), x, x, x)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)


def test_lengths_that_take_too_long_are_refused(tmp_path):
  config = harness.load_config(f"{_CONFIG}:smoke")
  with config.unlocked():
    config.simulate_max_n = 8
  message = "simulated_lengths must be at most simulate_max_n = 8, got"
  with pytest.raises(harness.UsageError, match=message):
    experiment.run(config, tmp_path)


def test_smoke(tmp_path):
  with jax.enable_x64(False):
    verdict = smoke.run_twice("attention_io", tmp_path, num_checks=17)
  # What does not depend on small sizes.
  for name, (_, high) in verdict.accepted.items():
    if "words" in name or "error" in name:
      if "slope" not in name:
        assert verdict.measured[name] <= high, name
