"""Decoding, matching and scoring of recovered tokens."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.regression import tokens


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("batch", [(), (7,), (3, 5)])
def test_decoded_is_nearest(batch):
  x, vocab = _draw(*batch, 4), _draw(50, 4, seed=1)
  distances = np.linalg.norm(x[..., None, :] - vocab, axis=-1)
  ids, got = jax.jit(tokens.decode_tokens)(x, vocab)
  np.testing.assert_array_equal(ids, distances.argmin(-1))
  np.testing.assert_allclose(got, distances.min(-1), rtol=1e-14)
  assert ids.dtype == jnp.int32
  assert ids.shape == batch


def test_distances_keep_their_digits():
  # Entries far from the origin: |t|^2 - 2 t v + |v|^2 would be rounding only.
  vocab = 1e6 + _draw(20, 3)
  ids, distances = tokens.decode_tokens(vocab[4:6] + 1e-3, vocab)
  np.testing.assert_array_equal(ids, [4, 5])
  np.testing.assert_allclose(distances, 1e-3 * np.sqrt(3), rtol=1e-5)


def test_ids_keep_their_digits():
  vocab = (1000 + _draw(300, 8)).astype(np.float32)
  x = vocab + np.float32(0.1) * _draw(300, 8, seed=1).astype(np.float32)
  exact = np.asarray(x, float)[:, None] - np.asarray(vocab, float)[None]
  want = np.linalg.norm(exact, axis=-1).argmin(-1)
  np.testing.assert_array_equal(tokens.decode_tokens(x, vocab)[0], want)


def test_match_is_the_best_of_all_orders():
  estimate, truth = _draw(5, 2), _draw(5, 2, seed=1)

  def cost(order):
    return ((estimate[list(order)] - truth) ** 2).sum()

  best = min(itertools.permutations(range(5)), key=cost)
  np.testing.assert_array_equal(tokens.match_tokens(estimate, truth), best)


def test_match_undoes_a_permutation():
  truth = _draw(30, 3)
  order = np.random.default_rng(1).permutation(30)
  found = tokens.match_tokens(truth[order] + 1e-6, truth)
  np.testing.assert_array_equal(order[found], np.arange(30))


def test_metrics_by_their_definition():
  estimate, truth = _draw(6, 4), _draw(6, 4, seed=1)
  got = jax.jit(tokens.reconstruction_metrics)(estimate, truth)
  assert set(got) == {"rel_error", "mse", "psnr"}
  error = np.linalg.norm(estimate - truth)
  mse = error**2 / 24
  psnr = 10 * np.log10(np.ptp(truth) ** 2 / mse)
  want = {"rel_error": error / np.linalg.norm(truth), "mse": mse, "psnr": psnr}
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-13, err_msg=name)


def test_metrics_with_vocabulary_and_permutation():
  vocab = _draw(40, 8)
  truth = vocab[np.array([3, 1, 4, 5])]
  # One token of four is another word; the order is lost.
  estimate = vocab[np.array([5, 3, 9, 1])] + 1e-3
  plain = tokens.reconstruction_metrics(estimate, truth, vocab=vocab)
  assert plain["token_accuracy"] == 0
  matched = tokens.reconstruction_metrics(
    estimate, truth, vocab=vocab, permutation=True
  )
  assert matched["token_accuracy"] == 0.75
  assert matched["rel_error"] < plain["rel_error"]


def test_without_an_error():
  truth = _draw(4, 3)
  got = tokens.reconstruction_metrics(truth, truth)
  assert got["rel_error"] == got["mse"] == 0
  assert np.isinf(got["psnr"])


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: tokens.decode_tokens(np.ones((2, 3)), np.ones((5, 4))),
      "tokens must have shape (2, 4) = (..., d), got (2, 3)",
    ),
    (
      lambda: tokens.decode_tokens(np.float64(1.0), np.ones((5, 4))),
      "tokens must have shape (4,) = (..., d), got ()",
    ),
    (
      lambda: tokens.decode_tokens(np.ones(4), np.ones(4)),
      "vocab must have 2 dimensions, got shape (4,)",
    ),
    (
      lambda: tokens.decode_tokens(np.ones(4), np.ones((0, 4))),
      "vocab must not be empty, got shape (0, 4)",
    ),
    (
      lambda: tokens.decode_tokens(np.ones(4, int), np.ones((3, 4))),
      "tokens must have a floating dtype, got int64",
    ),
    (
      lambda: tokens.match_tokens(np.ones((2, 3)), np.ones((4, 3))),
      "estimate must have shape (4, 3) = that of truth, got (2, 3)",
    ),
    (
      lambda: tokens.match_tokens(np.full((2, 3), np.nan), np.ones((2, 3))),
      "estimate contains non-finite values",
    ),
    (
      lambda: jax.jit(tokens.match_tokens)(np.ones((2, 3)), np.ones((2, 3))),
      "match_tokens works on the host and cannot be traced",
    ),
    (
      lambda: tokens.reconstruction_metrics(np.ones(3), np.ones(3)),
      "truth must have 2 dimensions, got shape (3,)",
    ),
    (
      lambda: tokens.reconstruction_metrics(
        np.ones((1, 3)), np.ones((1, 3)), permutation=1
      ),
      "permutation must be one of False, True, got 1",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
