"""Argument validation: what passes, and the wording of what does not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import _checks

pytestmark = pytest.mark.any_x64


def _refused(message):
  return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_choice():
  _checks.check_choice("kind", "a", ("a", None, 1))
  _checks.check_choice("kind", None, ("a", None, 1))
  with _refused("kind must be one of 'a', None, 1, got 'b'"):
    _checks.check_choice("kind", "b", ("a", None, 1))
  # True == 1, and an array equals nothing in a single answer.
  with _refused("kind must be one of 0, 1, got True"):
    _checks.check_choice("kind", True, (0, 1))
  with _refused("kind must be one of 'a', got array([1, 2])"):
    _checks.check_choice("kind", np.array([1, 2]), ("a",))


def test_rank():
  _checks.check_rank("x", np.ones((2, 3)), 2)
  _checks.check_rank("x", 1.0, (0, 1))
  with _refused("x must have 1 dimensions, got shape (2, 3)"):
    _checks.check_rank("x", np.ones((2, 3)), 1)
  with _refused("x must have 3 or 4 dimensions, got shape ()"):
    _checks.check_rank("x", 1.0, (3, 4))


def test_shape():
  _checks.check_shape("x", np.ones((2, 3)), (2, None))
  _checks.check_shape("x", 1.0, ())
  with _refused("x must have shape (2, *), got (3, 3)"):
    _checks.check_shape("x", np.ones((3, 3)), (2, None))
  with _refused("x must have shape (4,) = (B,), got (2, 3)"):
    _checks.check_shape("x", np.ones((2, 3)), (4,), "(B,)")
  with _refused("x must have shape (), got (1,)"):
    _checks.check_shape("x", np.ones(1), ())


@pytest.mark.parametrize(
  ("check", "good", "bad", "message"),
  [
    (_checks.check_positive, 0.5, 0, "x must be positive, got 0"),
    (_checks.check_positive, [1, 2], [1, 0], "x must be positive, got [1, 0]"),
    (_checks.check_positive, 1, np.nan, "x must be positive, got nan"),
    (_checks.check_nonnegative, 0, -1, "x must be non-negative, got -1"),
    (_checks.check_nonnegative, 0, np.nan, "x must be non-negative, got nan"),
  ],
)
def test_signs(check, good, bad, message):
  check("x", good)
  with _refused(message):
    check("x", bad)


def test_range():
  for value in (0, 0.5, 1, [0, 1]):
    _checks.check_range("x", value, 0, 1)
  _checks.check_range("x", 0.5, 0, 1, closed=False)
  with _refused("x must be in [0, 1], got 1.5"):
    _checks.check_range("x", 1.5, 0, 1)
  with _refused("x must be in [0, 1], got nan"):
    _checks.check_range("x", np.nan, 0, 1)
  for value in (0, 1):
    with _refused(f"x must be in (0, 1), got {value}"):
      _checks.check_range("x", value, 0, 1, closed=False)


def test_integer():
  for value in (1, 5, np.int32(3)):
    _checks.check_integer("k", value, 1, 5)
  _checks.check_integer("k", 10**9, 1, None)
  for value in (0, 6):
    with _refused(f"k must be in [1, 5], got {value}"):
      _checks.check_integer("k", value, 1, 5)
  with _refused("k must be >= 1, got 0"):
    _checks.check_integer("k", 0, 1, None)
  for value in (2.0, "2", True, None):
    with _refused(f"k must be an integer in [1, 5], got {value!r}"):
      _checks.check_integer("k", value, 1, 5)


def test_scalar():
  for value in (1, 0.5, np.float32(2), np.array(3), jnp.array(1.5)):
    _checks.check_scalar("scale", value)
  for value in ("1", 1j, None, np.ones(1), jnp.array(1j)):
    with _refused(f"scale must be a real scalar, got {value!r}"):
      _checks.check_scalar("scale", value)


def test_dtypes():
  for dtype in ("bfloat16", "float16", "float32"):
    _checks.check_floating("x", jnp.ones(2, dtype))
  for dtype in ("int32", "bool", "complex64"):
    with _refused(f"x must have a floating dtype, got {dtype}"):
      _checks.check_floating("x", jnp.ones(2, dtype))
  _checks.check_boolean("mask", jnp.ones(2, bool))
  with _refused(
    "mask must be boolean (True = attend), got dtype float32; an additive mask "
    "is a bias"
  ):
    _checks.check_boolean("mask", jnp.ones(2, "float32"))


def test_values_are_not_looked_at_while_tracing():
  @jax.jit
  def run(x):
    assert not _checks.is_concrete(x)
    _checks.check_positive("x", x)
    _checks.check_nonnegative("x", x)
    _checks.check_range("x", x, 0, 1)
    _checks.check_scalar("x", x)
    return x

  assert _checks.is_concrete(jnp.ones(2))
  assert run(jnp.array(-3.0)) == -3


def _attention(query, key, value, **arrays):
  return _checks.check_attention(
    *(jnp.ones(x) for x in (query, key, value)), **arrays
  )


def test_attention_sizes():
  sizes = _attention((2, 3, 4, 5), (2, 6, 2, 5), (2, 6, 2, 7))
  assert sizes == _checks.AttentionShapes((2,), 3, 6, 4, 2, 5, 7)
  sizes = _attention((3, 4, 5), (6, 4, 5), (6, 4, 5))
  assert sizes == _checks.AttentionShapes((), 3, 6, 4, 4, 5, 5)


def test_attention_masks_and_bias():
  shapes = (2, 3, 4, 5), (2, 6, 2, 5), (2, 6, 2, 5)
  for shape in ((2, 4, 3, 6), (1, 1, 1, 1), (2, 1, 1, 6), (4, 3, 6), (6,)):
    _attention(*shapes, mask=jnp.ones(shape, bool), bias=jnp.ones(shape))
  _attention(*shapes, key_mask=jnp.ones((2, 6), bool))
  _attention(*(x[1:] for x in shapes), key_mask=jnp.ones(6, bool))
  with _refused(
    "bias must be broadcastable to (B, N, T, S) = (2, 4, 3, 6), got "
    "shape (2, 3, 6)"
  ):
    _attention(*shapes, bias=jnp.ones((2, 3, 6)))
  with _refused("bias must have a floating dtype, got bool"):
    _attention(*shapes, bias=jnp.ones((2, 4, 3, 6), bool))
  with _refused("key_mask must have shape (2, 6) = (B, S), got (6,)"):
    _attention(*shapes, key_mask=jnp.ones(6, bool))
  with _refused("key_mask must have shape (6,) = (S,), got (2, 6)"):
    _attention(*(x[1:] for x in shapes), key_mask=jnp.ones((2, 6), bool))
  with _refused(
    "mask must be broadcastable to (N, T, S) = (4, 3, 6), got shape "
    "(2, 4, 3, 6)"
  ):
    _attention(*(x[1:] for x in shapes), mask=jnp.ones((2, 4, 3, 6), bool))
