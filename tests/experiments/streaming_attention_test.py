"""The experiment's own mathematics, its sizes, and the claims it decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _streams, harness
from experiments import streaming_attention as experiment
from jaxattn.attention import (
  moment_init,
  three_sketch_decode,
  three_sketch_finalize,
  three_sketch_init,
  three_sketch_update_key,
  three_sketch_update_query,
  three_sketch_update_value,
)
from tests.experiments import smoke

_CONFIG = "configs/streaming_attention.py"


def test_keys_of_real_streams_promise_their_radius():
  rows = np.random.default_rng(0).standard_normal((500, 20)) @ np.diag(
    np.arange(20) + 1.0
  )
  components = _streams.principal(rows)
  # The largest variances, in order, of what is centered and uncorrelated.
  covariance = components.T @ components / 500
  want = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[: -8 - 1 : -1]
  np.testing.assert_allclose(covariance, np.diag(want), atol=1e-8)
  key = _streams.stream_keys(components, 4, 2.0)
  np.testing.assert_allclose((key**2).sum(1).max(), 2.0)
  assert abs(key @ key.T).max() <= 2.0 + 1e-12


def test_chunks_are_the_rows():
  rows = np.random.default_rng(0).standard_normal((5000, 2))
  parts = [part[mask] for part, mask in _streams.chunks(rows)]
  assert len(parts) == 2
  np.testing.assert_array_equal(np.concatenate(parts), rows)


def test_peak_sees_what_was_taken():
  def run(num):
    return _streams.peak_bytes(lambda: float(np.ones(num).sum()))[0]

  assert run(1 << 24) - run(1) > 1 << 26


def test_image_errors_are_specified_for_all_that_is_run():
  config = harness.load_config(f"{_CONFIG}:cpu")
  asked = {(g, r) for _, g in config.image_models for r in config.radii}
  assert asked <= set(experiment._IMAGE_ERRORS)
  # 8 k buckets are those of eps = 1/2, and one of the lists has 2^22 tokens.
  assert 8 in config.widths_by_k
  assert max(config.long_lengths) >= 1 << 22


@pytest.mark.parametrize("tier", harness.TIERS)
def test_streams_are_whole_chunks(tier):
  config = harness.load_config(f"{_CONFIG}:{tier}")
  for name, size in (
    ("lengths", config.chunk_size),
    ("sweep_length", config.chunk_size),
    ("long_lengths", config.long_chunk_size),
    ("num_keys", config.end_chunk_size),
  ):
    assert not np.any(np.array(config[name]) % size), name
  assert config.raced_context in config.contexts


def test_sketched_moments_answer_as_the_state_does():
  """With as many buckets as are needed for all queries to be found."""
  rng = np.random.default_rng(0)
  key, value, query = (
    jnp.asarray(rng.uniform(-1, 1, (50, n))) for n in (4, 3, 4)
  )
  state = three_sketch_init(
    jax.random.key(0), dim=4, value_dim=3, degree=4, k=50, eps1=0.5, eps2=0.1,
    dtype=jnp.float64,
  )  # fmt: skip
  state = three_sketch_update_value(state, 0, value + 1)
  state = three_sketch_update_key(state, 0, key)
  raw = experiment._answers(experiment.uncentered_moments(state), query)
  state = three_sketch_finalize(state)
  got = experiment._answers(experiment.sketched_moments(state), query)
  state = three_sketch_update_query(state, 0, query, radius=2.0)
  indices, values, mean = three_sketch_decode(state, num_queries=50, k=50)
  order = np.argsort(indices, 1)
  want = np.take_along_axis(np.asarray(values), order, 1).T + mean[None]
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
  # Of values away from 0 the sketches alone know less.
  exact = jax.nn.softmax(query @ key.T / 2, -1) @ (value + 1)
  assert abs(got - exact).max() < 0.5 * abs(raw - exact).max()


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  query = jax.ShapeDtypeStruct((config.num_queries, 8), jnp.float32)
  exact = jax.eval_shape(lambda q: experiment._nothing_seen(q, 8), query)
  with jax.enable_x64(False):
    state = moment_init(1, 1, 8, 8, degree=2)
    walk = experiment.long_pass(config, max(config.long_lengths))
    after, _ = jax.eval_shape(walk, (state, exact), query)
  assert after.moments.shape == state.moments.shape


def test_smoke(tmp_path):
  verdict = smoke.run_twice(
    "streaming_attention", tmp_path / "a", num_checks=32
  )
  # What does not depend on the clock or on few tokens holds at any size.
  accepted, measured = verdict.accepted, verdict.measured
  for name in measured:
    if "over its bound" in name or name.startswith(("tokens", "state", "prog")):
      low, high = accepted.get(name, (None, None))
      assert (-np.inf if low is None else low) <= measured[name], name
      assert measured[name] <= (np.inf if high is None else high), name
