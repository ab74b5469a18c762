"""The split of all sums: nothing is lost, nothing twice, and it is random."""

import re

import jax
import numpy as np
import pytest

from jaxattn.data import modular_split


def _numbers(inputs, p):
  inputs = np.asarray(inputs)
  return inputs @ p ** np.arange(inputs.shape[1])[::-1]


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0, 1e-9])
def test_parts_are_all_inputs(share):
  p, k = 5, 3
  train, test = modular_split(jax.random.key(0), p, k, train_fraction=share)
  assert len(train[0]) == max(1, round(share * p**k))
  both = np.concatenate([_numbers(train[0], p), _numbers(test[0], p)])
  np.testing.assert_array_equal(np.sort(both), np.arange(p**k))
  for inputs, labels in (train, test):
    np.testing.assert_array_equal(labels, np.asarray(inputs).sum(1) % p)


def test_parts_are_random():
  # Each of 50 inputs is in the first half as often as not.
  draws = [
    _numbers(
      modular_split(jax.random.key(i), 7, 2, train_fraction=0.5)[0][0], 7
    )
    for i in range(60)
  ]
  often = np.bincount(np.concatenate(draws), minlength=49) / 60
  # Six standard errors.
  np.testing.assert_allclose(often, 24 / 49, rtol=0, atol=6 * 0.5 / 60**0.5)
  assert len({tuple(np.sort(d)) for d in draws}) == 60


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ((6, 2, 0.5), "modulus must be odd and >= 3, got 6"),
    ((5, 1, 0.5), "num_terms must be >= 2, got 1"),
    ((5, 2, 0.0), "train_fraction must be in (0, 1], got 0.0"),
    ((5, 2, 1.5), "train_fraction must be in (0, 1], got 1.5"),
    ((5, 2, "half"), "train_fraction must be a real scalar, got 'half'"),
  ],
)
def test_refused(args, message):
  *sizes, share = args
  with pytest.raises(ValueError, match=re.escape(message)):
    modular_split(jax.random.key(0), *sizes, train_fraction=share)
