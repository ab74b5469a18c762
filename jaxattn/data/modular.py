"""Sums modulo p, split at random into those to train on and the others."""

import jax

from jaxattn import _checks
from jaxattn.ntk import modular_inputs, modular_labels

__all__ = ["modular_split"]

Data = tuple[jax.Array, jax.Array]


def modular_split(
  rng: jax.Array,
  modulus: int,
  num_terms: int,
  *,
  train_fraction: float,
) -> tuple[Data, Data]:
  """All inputs of addition modulo p, in random order, in two parts.

  Args:
    rng: PRNG key.
    modulus: p, odd.
    num_terms: k, at least 2.
    train_fraction: share of the p^k inputs to train on, in (0, 1]; rounded to
      a number of inputs, at least 1.

  Returns:
    (inputs, labels) to train on and (inputs, labels) of all others: (n, k) and
    (n,) of int32. Together they are all inputs, once each.

  Raises:
    ValueError: if the modulus is even or below 3, k below 2, p^k above 2^28 or
      the share out of range.

  Cost:
    O(p^k (k + log p^k)).

  Source:
    arXiv 2402.09469, section 5.

  Example:
    >>> import jax
    >>> from jaxattn.data import modular_split
    >>> train, test = modular_split(
    ...   jax.random.key(0), 5, 3, train_fraction=0.8
    ... )
    >>> train[0].shape, test[1].shape
    ((100, 3), (25,))
  """
  inputs = modular_inputs(modulus, num_terms)
  _checks.check_scalar("train_fraction", train_fraction)
  if not 0 < train_fraction <= 1:
    raise ValueError(f"train_fraction must be in (0, 1], got {train_fraction}")
  inputs = jax.random.permutation(rng, inputs)
  labels = modular_labels(inputs, modulus)
  count = max(1, round(float(train_fraction) * len(inputs)))
  return (inputs[:count], labels[:count]), (inputs[count:], labels[count:])
