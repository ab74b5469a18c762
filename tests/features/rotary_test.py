"""Rotary embedding: against complex rotations, and relative at any length."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.features import rope, rope_angles
from tests._recompile import no_recompilation

_OFFSETS = (0, 1000, 10**5, 10**6, 10**9)


def _normal(*shape, dtype="float32", seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def _rotated(x, positions, base=10000.0):
  """Interleaved pairs as complex numbers, in float64."""
  h = x.shape[-1]
  theta = base ** (-np.arange(0, h, 2) / h)
  turn = np.exp(1j * np.asarray(positions)[..., None, None] * theta)
  z = (x[..., ::2] + 1j * x[..., 1::2]) * turn
  return np.stack((z.real, z.imag), -1).reshape(x.shape)


# --- the rotation ---


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_is_the_complex_rotation(base):
  x = _normal(2, 7, 3, 8, dtype="float64")
  positions = np.array([0, 1, 2, -3, 50, 1000, 77])
  got = rope(x, positions, base=base)
  np.testing.assert_allclose(got, _rotated(x, positions, base), atol=1e-12)
  by_row = np.stack((positions, positions + 5))
  got = rope(x, by_row, base=base)
  np.testing.assert_allclose(got, _rotated(x, by_row, base), atol=1e-12)


def test_halves_are_the_same_rotation_of_other_pairs():
  x = _normal(5, 2, 8, dtype="float64")
  order = np.arange(8).reshape(2, 4).T.ravel()
  got = np.asarray(rope(x, np.arange(5), interleaved=False))
  want = rope(x[..., order], np.arange(5))
  np.testing.assert_array_equal(got[..., order], want)


def test_rotations_compose_and_keep_norms():
  x = _normal(6, 2, 16, dtype="float64")
  zero, t, s = np.zeros(6, int), np.arange(6) * 1000, np.arange(6)[::-1] + 7
  np.testing.assert_array_equal(rope(x, zero), x)
  twice = rope(rope(x, t), s)
  np.testing.assert_allclose(twice, rope(x, t + s), atol=1e-12)
  np.testing.assert_allclose(rope(rope(x, t), -t), x, atol=1e-12)
  norms = np.linalg.norm(x, axis=-1)
  np.testing.assert_allclose(np.linalg.norm(twice, axis=-1), norms, rtol=1e-12)


# --- relative positions at any context length ---


def _check_scores(dtype, limit):
  query, key = _normal(2, 1, 1, 64, dtype=dtype)
  query, key = query / np.linalg.norm(query), key / np.linalg.norm(key)

  def score(t, s):
    q, k = rope(query, np.array([t])), rope(key, np.array([s]))
    return float((q * k).sum())

  for gap in (-5, 0, 37, 4000):
    want = score(0, gap)
    got = [score(offset, offset + gap) for offset in _OFFSETS]
    np.testing.assert_allclose(got, want, rtol=0, atol=limit)


@pytest.mark.any_x64
def test_scores_depend_on_the_difference_only():
  _check_scores("float32", 5e-7)


def test_scores_depend_on_the_difference_only_float64():
  _check_scores("float64", 1e-13)


@pytest.mark.any_x64
def test_angles_are_exact_at_any_position():
  positions = np.array([0, 1, 129, -1, 10**6, -(10**6), 2**31 - 1, -(2**31)])
  got = np.asarray(rope_angles(positions, 8, base=100.0), np.longdouble)
  # Whole turns by exact arithmetic: 100^(-h/4), as float64 has it, times t.
  theta = [int(100.0 ** (-h / 4) * 2**60) for h in range(4)]
  turn = 7244019458077122842  # 2 pi 2^60, rounded
  want = np.array([[int(t) * w % turn for w in theta] for t in positions])
  gap = (got - want / np.longdouble(2**60)) / (2 * np.pi)
  limit = 1e-9 if jnp.result_type(float) == jnp.float64 else 1e-7
  assert np.abs(gap - np.round(gap)).max() < limit
  assert (np.abs(got) <= np.float32(np.pi)).all()


# --- what a caller relies on ---


@pytest.mark.any_x64
def test_gradient_dtype_and_compilation():
  x = jnp.asarray(_normal(5, 2, 8))
  weight = _normal(5, 2, 8, seed=1)
  positions = jnp.arange(5)
  gradient = jax.jit(jax.grad(lambda x: (rope(x, positions) * weight).sum()))(x)
  # The transpose of a rotation is the rotation back.
  np.testing.assert_allclose(gradient, rope(weight, -positions), atol=1e-6)
  half = rope(x.astype(jnp.bfloat16), positions)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    half.astype(jnp.float32), rope(x, positions), atol=0.03
  )
  batched = jax.vmap(rope)(x[None], positions[None])
  np.testing.assert_allclose(batched[0], rope(x, positions), atol=1e-6)
  with no_recompilation():
    rope(x, positions)
    rope_angles(positions, 8)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: rope(np.zeros((3, 2, 5)), np.arange(3)),
      "head_dim must be even, got 5",
    ),
    (lambda: rope(np.zeros((3, 4)), np.arange(3)), "x must have 3 or 4"),
    (
      lambda: rope(np.zeros((3, 2, 4), int), np.arange(3)),
      "x must have a floating dtype, got int",
    ),
    (
      lambda: rope(np.zeros((2, 3, 2, 4)), np.arange(4)),
      "positions must have shape (3,) = (T,), got (4,)",
    ),
    (
      lambda: rope(np.zeros((2, 3, 2, 4)), np.zeros((3, 3), int)),
      "positions must have shape (2, 3) = (B, T), got (3, 3)",
    ),
    (
      lambda: rope(np.zeros((3, 2, 4)), np.arange(3.0)),
      "positions must be integers, got float",
    ),
    (
      lambda: rope(np.zeros((3, 2, 4)), np.arange(3), interleaved=None),
      "interleaved must be one of False, True, got None",
    ),
    (lambda: rope_angles(np.arange(3), 0), "head_dim must be >= 2, got 0"),
    (
      lambda: rope_angles(np.arange(3), 4, base=1.0),
      "base must be a static finite number > 1, got 1.0",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
