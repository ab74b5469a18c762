"""Prefixes: shapes, scales, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.softmax import Prefix, prefix_init

pytestmark = pytest.mark.any_x64


def test_entries_are_independent_gaussians_of_the_scale_asked_for():
  prefix = prefix_init(
    jax.random.key(0), 500, 4, 10, value_dim=5, key_std=0.5, value_std=2.0
  )
  assert isinstance(prefix, Prefix)
  assert prefix.key.shape == (500, 4, 10)
  assert prefix.value.shape == (500, 4, 5)
  for x, std in zip(prefix, (0.5, 2.0), strict=True):
    # The standard error of a standard deviation is std / sqrt(2 n).
    assert abs(np.std(x) / std - 1) < 5 / np.sqrt(2 * x.size)
    assert abs(np.mean(x)) < 5 * std / np.sqrt(x.size)
  key, value = (np.asarray(x)[:, :, :5].ravel() for x in prefix)
  assert abs(np.corrcoef(key, value)[0, 1]) < 5 / np.sqrt(key.size)


def test_dtype_and_defaults():
  prefix = prefix_init(jax.random.key(0), 2, 1, 3, dtype=jnp.bfloat16)
  assert {x.dtype for x in prefix} == {jnp.dtype("bfloat16")}
  assert {x.shape for x in prefix} == {(2, 1, 3)}
  assert prefix_init(jax.random.key(0), 2, 1, 3).key.dtype == jnp.float32


def test_values_without_spread_are_zero():
  prefix = prefix_init(jax.random.key(0), 2, 1, 3, value_std=0.0)
  assert not prefix.value.any()
  assert prefix.key.all()


@pytest.mark.parametrize(
  ("sizes", "options", "message"),
  [
    ((0, 1, 3), {}, "length must be >= 1, got 0"),
    ((2, 0, 3), {}, "num_kv_heads must be >= 1, got 0"),
    ((2, 1, 0), {}, "head_dim must be >= 1, got 0"),
    ((2, 1, 3), {"value_dim": 0}, "value_dim must be >= 1, got 0"),
    ((2.0, 1, 3), {}, "length must be an integer >= 1, got 2.0"),
    ((2, 1, 3), {"key_std": -1.0}, "key_std must be non-negative, got -1.0"),
    ((2, 1, 3), {"value_std": -1.0}, "value_std must be non-negative, got"),
    ((2, 1, 3), {"dtype": jnp.int32}, "dtype must be floating, got int32"),
  ],
)
def test_refused(sizes, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    prefix_init(jax.random.key(0), *sizes, **options)
