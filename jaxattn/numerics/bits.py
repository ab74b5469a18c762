"""Bits in words: 32 to a uint32, the first one highest.

Bit i of a row is bit ``31 - i % 32`` of word ``i // 32``; what is left of the
last word is 0. Words of equal length compare as the rows of bits do.
"""

import jax
import jax.numpy as jnp

from jaxattn import _checks

_WORD = 32


def pack_bits(bits: jax.Array, *, pad_words: int = 0) -> jax.Array:
  """Packs the last axis, 32 bits to a word.

  Args:
    bits: (..., n) of booleans or integers; whatever is not 0 is a 1.
    pad_words: words of zeros to append, for those who read beyond the end.

  Returns:
    (..., ceil(n / 32) + pad_words), uint32.

  Raises:
    ValueError: if ``bits`` has no axis or is neither boolean nor integer, or
      if ``pad_words`` is negative.

  Cost:
    O(n) time and memory a row.

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> print(pack_bits(jnp.array([1, 0, 0, 0] * 9)))
    [2290649224 2147483648]
  """
  bits = jnp.asarray(bits)
  if bits.dtype != jnp.bool_ and not jnp.issubdtype(bits.dtype, jnp.integer):
    raise ValueError(
      f"bits must have a boolean or integer dtype, got {bits.dtype}"
    )
  return _pack("bits", bits != 0, pad_words)


def unpack_bits(words: jax.Array, n: int, *, pad_words: int = 0) -> jax.Array:
  """Undoes :func:`pack_bits`.

  Args:
    words: (..., ceil(n / 32) + pad_words), uint32.
    n: number of bits in a row.
    pad_words: words at the end that hold none.

  Returns:
    (..., n), boolean.

  Raises:
    ValueError: if ``words`` is not uint32 or has not the words of n bits.

  Cost:
    O(n) time and memory a row.

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> print(unpack_bits(jnp.array([1 << 31], jnp.uint32), 3))
    [ True False False]
  """
  words = jnp.asarray(words)
  _checks.check_integer("n", n, 0, None)
  _checks.check_integer("pad_words", pad_words, 0, None)
  num_words = -(-n // _WORD) + pad_words
  if words.ndim < 1 or words.shape[-1] != num_words:
    raise ValueError(
      f"words must have shape (..., {num_words}) for n={n} and pad_words="
      f"{pad_words}, got {words.shape}"
    )
  if words.dtype != jnp.uint32:
    raise ValueError(f"words must have dtype uint32, got {words.dtype}")
  shifts = jnp.arange(_WORD - 1, -1, -1, dtype=jnp.uint32)
  words = words[..., : num_words - pad_words, None]
  bits = (words >> shifts.reshape((1,) * (words.ndim - 1) + (-1,))) & 1
  # The size is written out: without rows there is nothing to divide it by.
  size = _WORD * words.shape[-2]
  return bits.reshape(*words.shape[:-2], size)[..., :n] != 0


def pack_signs(signs: jax.Array, *, pad_words: int = 0) -> jax.Array:
  """Packs +1 as 1 and -1 as 0, in the layout of :func:`pack_bits`.

  Args:
    signs: (..., n) of real numbers; those below 0 are -1, others +1.
    pad_words: words of zeros to append.

  Returns:
    (..., ceil(n / 32) + pad_words), uint32: a 32nd of the bytes of float32.

  Raises:
    ValueError: if ``signs`` has no axis, is not of real numbers, or holds a
      concrete NaN (traced ones become -1), or if ``pad_words`` is negative.

  Cost:
    O(n) time and memory a row.

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> print(unpack_signs(pack_signs(jnp.array([-1.0, 1.0])), 2))
    [-1.  1.]
  """
  signs = jnp.asarray(signs)
  real = jnp.issubdtype(signs.dtype, jnp.floating)
  if not real and not jnp.issubdtype(signs.dtype, jnp.signedinteger):
    raise ValueError(f"signs must hold real numbers, got {signs.dtype}")
  if _checks.is_concrete(signs) and bool(jnp.isnan(signs).any()):
    raise ValueError("signs must not hold NaN, which has none")
  return _pack("signs", signs >= 0, pad_words)


def unpack_signs(
  words: jax.Array,
  n: int,
  *,
  pad_words: int = 0,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Undoes :func:`pack_signs`.

  Args:
    words: (..., ceil(n / 32) + pad_words), uint32.
    n: number of signs in a row.
    pad_words: words at the end that hold none.
    dtype: of the result.

  Returns:
    (..., n) of -1 and +1.

  Raises:
    ValueError: if ``words`` is not uint32 or has not the words of n signs.

  Cost:
    O(n) time and memory a row.

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> print(unpack_signs(jnp.array([1 << 31], jnp.uint32), 3))
    [ 1. -1. -1.]
  """
  bits = unpack_bits(words, n, pad_words=pad_words)
  return jnp.where(bits, 1, -1).astype(dtype)


def _pack(name: str, bits: jax.Array, pad_words: int) -> jax.Array:
  if bits.ndim < 1:
    raise ValueError(f"{name} must have at least one axis, got shape ()")
  _checks.check_integer("pad_words", pad_words, 0, None)
  missing = -bits.shape[-1] % _WORD + _WORD * pad_words
  bits = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, missing)])
  num_words = bits.shape[-1] // _WORD
  bits = bits.reshape(*bits.shape[:-1], num_words, _WORD).astype(jnp.uint32)
  shifts = jnp.arange(_WORD - 1, -1, -1, dtype=jnp.uint32)
  shifted = bits << shifts.reshape((1,) * (bits.ndim - 1) + (-1,))
  return shifted.sum(-1, dtype=jnp.uint32)
