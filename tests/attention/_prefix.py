"""Inputs and oracle of the tests of prefixes."""

import re

import numpy as np
import pytest

from jaxattn.attention import prefix_state_init, prefix_state_update
from jaxattn.features import feature_count
from tests._dense import dense_attention


def uniform(radius, *shapes, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.uniform(-radius, radius, shape) for shape in shapes]


def normal(*shapes, seed=1):
  rng = np.random.default_rng(seed)
  return [rng.standard_normal(shape) for shape in shapes]


def prefix_call(radius=0.25, *, t=32, s=32, m=512, n=1, kv=1, h=8):
  """Query, key, value, prefix key and prefix value without a batch."""
  query, key, prefix_key = uniform(radius, (t, n, h), (s, kv, h), (m, kv, h))
  value, prefix_value = uniform(1.0, (s, kv, h), (m, kv, h), seed=1)
  return query, key, value, prefix_key, prefix_value


def dense_formula(
  query, key, value, prefix_key, prefix_value, *, seen=True, **options
):
  """Attention to prefix and context; ``seen`` (..., T, S) is of the context."""
  m, s = len(prefix_key), len(key)
  seen = np.broadcast_to(seen, (*np.shape(seen)[:-1], s))
  always = np.ones((*seen.shape[:-1], m), bool)
  return dense_attention(
    query,
    np.concatenate((prefix_key, key)),
    np.concatenate((prefix_value, value)),
    seen=np.concatenate((always, seen), -1),
    **options,
  )[0]


def state_of(
  prefix_key, prefix_value, feature_map, dtype="float64", scale=None
):
  """Sums over the prefix as they come from the library."""
  r = _num_features(feature_map, prefix_key.shape[-1])
  kv, hv = prefix_value.shape[1:]
  empty = prefix_state_init(kv, r, hv, dtype=dtype)
  options = {"feature_map": feature_map, "scale": scale}
  return prefix_state_update(empty, prefix_key, prefix_value, **options)


def _num_features(feature_map, dim):
  if feature_map == "elu":
    return dim
  if feature_map.kind == "favor":
    return len(feature_map.arrays)
  return feature_count(dim, *feature_map.degrees)


def refuse(message, fn, *args, **options):
  with pytest.raises(ValueError, match=re.escape(message)):
    fn(*args, **options)
