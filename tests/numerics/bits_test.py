"""Packed bits: round trips, the layout, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.numerics import pack_bits, pack_signs, unpack_bits, unpack_signs


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64])
def test_round_trip(n):
  rng = np.random.default_rng(n)
  bits = rng.integers(0, 2, (2, 3, n)).astype(bool)
  words = pack_bits(bits)
  assert words.dtype == jnp.uint32
  assert words.shape == (2, 3, -(-n // 32))
  np.testing.assert_array_equal(unpack_bits(words, n), bits)
  # NumPy packs bytes, first bit highest.
  padded = np.pad(bits, [(0, 0), (0, 0), (0, -n % 32)])
  want = np.packbits(padded, axis=-1).view(">u4").astype(np.uint32)
  np.testing.assert_array_equal(words, want)
  signs = np.where(bits, 1.0, -1.0)
  packed = pack_signs(signs, pad_words=2)
  np.testing.assert_array_equal(packed[..., :-2], words)
  assert (packed[..., -2:] == 0).all()
  got = unpack_signs(packed, n, pad_words=2, dtype=jnp.float64)
  np.testing.assert_array_equal(got, signs)
  assert got.dtype == jnp.float64
  assert unpack_signs(words, n, dtype=jnp.int8).dtype == jnp.int8


def test_zero_is_a_plus():
  assert pack_signs(jnp.array([0.0, -0.0, -1.0]))[0] == 0b110 << 29


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: pack_bits(jnp.ones(3)), "bits must have a boolean or integer"),
    (lambda: pack_bits(jnp.array(True)), "bits must have at least one axis"),
    (
      lambda: pack_bits(jnp.array([1]), pad_words=-1),
      "pad_words must be >= 0, got -1",
    ),
    (lambda: pack_signs(jnp.array([True])), "signs must hold real numbers"),
    (lambda: pack_signs(jnp.array(1.0)), "signs must have at least one axis"),
    (
      lambda: unpack_signs(jnp.zeros((5, 2), jnp.uint32), 65),
      r"words must have shape \(\.\.\., 3\) for n=65 and pad_words=0, got \(5,",
    ),
    (
      lambda: unpack_bits(jnp.zeros((2,), jnp.uint32), 32),
      r"shape \(\.\.\., 1\) for n=32 and pad_words=0, got \(2,\)",
    ),
    (lambda: unpack_bits(jnp.zeros(1, jnp.int32), 3), "dtype uint32, got int3"),
    (lambda: unpack_bits(jnp.zeros(1, jnp.uint32), -1), "n must be >= 0"),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
