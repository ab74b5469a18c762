"""Sequences with one location that matters, and pairs to recall."""

import jax
import numpy as np
import pytest

from jaxattn.data import (
  match3_batch,
  recall_batch,
  single_location_batch,
)


@pytest.mark.any_x64
def test_single_location():
  x, y = single_location_batch(jax.random.key(0), 4000, 16, 3, 4.0)
  assert x.dtype == y.dtype == "float32"
  x = np.asarray(x)
  marked = x[..., 0] == 4.0
  np.testing.assert_array_equal(marked.sum(1), 1)
  np.testing.assert_array_equal(x[marked][:, 1], y)
  # Six standard deviations: of the counts, the mean and the variance.
  counts = marked.sum(0)
  assert np.abs(counts - 250).max() < 6 * np.sqrt(4000 / 16)
  others = x[~marked]
  assert np.abs(others.mean(0)).max() < 6 / np.sqrt(len(others))
  assert np.abs(others.var(0) - 1).max() < 6 * np.sqrt(2 / len(others))


def test_closed_form_of_the_best_linear_answer():
  # Least squares over gamma in y ~ gamma sum_i x_i0 x_i1.
  for length in (8, 32):
    x, y = single_location_batch(
      jax.random.key(length), 200_000, length, 2, 4.0, dtype="float64"
    )
    z = (x[..., 0] * x[..., 1]).sum(1)
    gamma = (z @ y) / (z @ z)
    error = ((y - gamma * z) ** 2).mean() / (y**2).mean()
    assert abs(error - (length - 1) / (16 + length - 1)) < 0.006


@pytest.mark.any_x64
@pytest.mark.parametrize(("pairs", "vocab"), [(8, 32), (1, 1), (5, 5)])
def test_recall(pairs, vocab):
  tokens, targets, mask = map(
    np.asarray, recall_batch(jax.random.key(0), 50, pairs, vocab)
  )
  assert tokens.dtype == targets.dtype == np.int32
  assert tokens.shape == targets.shape == mask.shape == (50, 4 * pairs)
  assert not mask[:, : 2 * pairs].any()
  np.testing.assert_array_equal(mask[:, 2 * pairs :: 2], True)
  np.testing.assert_array_equal(mask[:, 2 * pairs + 1 :: 2], False)
  assert not targets[~mask].any()
  for row, target, where in zip(tokens, targets, mask, strict=True):
    keys, values = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]
    assert len(set(keys)) == pairs
    assert (keys < vocab).all()
    assert ((vocab <= values) & (values < 2 * vocab)).all()
    value_of = dict(zip(keys, values, strict=True))
    asked = row[where]
    assert sorted(asked) == sorted(keys)
    assert target[where].tolist() == [value_of[key] for key in asked]
    # The answer is the token that comes next.
    np.testing.assert_array_equal(np.append(row[1:], 0)[where], target[where])


def test_orders_and_keys_differ_between_sequences():
  tokens, _, mask = recall_batch(jax.random.key(0), 200, 4, 16)
  tokens = np.asarray(tokens)
  keys, asked = tokens[:, :8:2], tokens[np.asarray(mask)].reshape(200, 4)
  assert len({tuple(row) for row in keys}) > 150
  place = (asked[:, :1] == keys).argmax(1)
  assert np.bincount(place, minlength=4).min() > 20


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ({"length": 0}, "length must be >= 1, got 0"),
    ({"dim": 1}, "dim must be >= 2, got 1"),
    ({"spike": 0.0}, "spike must be positive, got 0.0"),
    ({"spike": -1.0}, "spike must be positive, got -1.0"),
    ({"spike": "high"}, "spike must be a real scalar, got 'high'"),
  ],
)
def test_refused_single_location(options, message):
  good = {"batch_size": 2, "length": 8, "dim": 3, "spike": 4.0}
  with pytest.raises(ValueError, match=message):
    single_location_batch(jax.random.key(0), **(good | options))


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((2, 9, 8), "pairs must be at most vocab=8, got 9"),
    ((2, 0, 8), "pairs must be >= 1, got 0"),
    ((0, 4, 8), "batch_size must be >= 1, got 0"),
    ((2, 4, 0), "vocab must be >= 1, got 0"),
  ],
)
def test_refused_recall(sizes, message):
  with pytest.raises(ValueError, match=message):
    recall_batch(jax.random.key(0), *sizes)


@pytest.mark.any_x64
@pytest.mark.parametrize(("length", "modulus"), [(6, 19), (1, 3), (5, 2)])
def test_match3(length, modulus):
  tokens, labels = map(
    np.asarray, match3_batch(jax.random.key(0), 400, length, modulus)
  )
  assert tokens.dtype == np.int32
  assert labels.dtype == np.bool_
  assert set(np.unique(tokens)) == set(range(modulus))
  sums = tokens[:, :, None, None] + tokens[:, None, :, None]
  sums = sums + tokens[:, None, None]
  np.testing.assert_array_equal(labels, (sums % modulus == 0).any((2, 3)))
  if modulus == 19:
    # Share of tokens that match; six standard deviations of 400 sequences.
    assert abs(labels.mean() - 0.69) < 6 * 0.5 / np.sqrt(400)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((2, 4, 1), r"modulus must be in \[2, 1073741824\], got 1"),
    ((2, 0, 4), "length must be >= 1, got 0"),
    ((0, 4, 4), "batch_size must be >= 1, got 0"),
  ],
)
def test_refused_match3(sizes, message):
  with pytest.raises(ValueError, match=message):
    match3_batch(jax.random.key(0), *sizes)
