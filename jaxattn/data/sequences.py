"""Sequences to search: one location, pairs to recall, triples to match."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn import _checks


def single_location_batch(
  rng: jax.Array,
  batch_size: int,
  length: int,
  dim: int,
  spike: float | jax.Array,
  *,
  dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
  r"""Regression on one location: only one token of a sequence matters.

  Tokens are N(0, I), but at one uniform position j coordinate 0 is ``spike``;
  the answer is coordinate 1 of that token. The best that linear attention with
  one query can do, :math:`\hat y = \gamma \sum_i x_{i0} x_{i1}`, leaves the
  share :math:`(n - 1) / (s^2 + n - 1)` of the variance, for a sequence of
  length n and a spike s; a softmax leaves almost nothing.

  Args:
    rng: PRNG key.
    batch_size: sequences to draw.
    length: tokens in a sequence.
    dim: size of a token, at least 2.
    spike: what marks the token that matters, positive; may be traced.
    dtype: of the numbers drawn.

  Returns:
    Sequences (batch_size, length, dim), and answers (batch_size,).

  Raises:
    ValueError: if a size is too small or the spike is not positive.

  Cost:
    O(batch_size length dim).

  Source:
    arXiv 2509.21936 for the task; the closed form is this project's.

  Example:
    >>> import jax
    >>> from jaxattn.data import single_location_batch
    >>> x, y = single_location_batch(jax.random.key(0), 3, 8, 5, 4.0)
    >>> x.shape, y.shape
    ((3, 8, 5), (3,))
  """
  _checks.check_integer("batch_size", batch_size, 1, None)
  _checks.check_integer("length", length, 1, None)
  _checks.check_integer("dim", dim, 2, None)
  _checks.check_scalar("spike", spike)
  _checks.check_positive("spike", spike)
  return _single_location(rng, spike, batch_size, length, dim, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _single_location(
  rng: jax.Array,
  spike: Any,
  batch_size: int,
  length: int,
  dim: int,
  dtype: Any,
) -> tuple[jax.Array, jax.Array]:
  where, what = jax.random.split(rng)
  x = jax.random.normal(what, (batch_size, length, dim), dtype)
  j = jax.random.randint(where, (batch_size,), 0, length, jnp.int32)
  row = jnp.arange(batch_size, dtype=jnp.int32)
  x = x.at[row, j, 0].set(jnp.asarray(spike, dtype))
  return x, x[row, j, 1]


def recall_batch(
  rng: jax.Array, batch_size: int, pairs: int, vocab: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Associative recall of many pairs: what value came with this key?

  A sequence lists ``pairs`` distinct keys, each followed by its value, and then
  the same pairs in another order: k1 v1 k2 v2 ... k2 v2 k1 v1 .... At each key
  of the second half its value is to be predicted, which no token but the one
  after its first occurrence tells. Keys are the tokens 0 to vocab - 1, values
  the tokens vocab to 2 vocab - 1, drawn with replacement.

  Args:
    rng: PRNG key.
    batch_size: sequences to draw.
    pairs: keys in a sequence, at most ``vocab``.
    vocab: keys that there are, and values.

  Returns:
    Tokens (batch_size, 4 pairs) int32; the token that comes next at each key of
    the second half, int32 of the same shape, 0 elsewhere; and a boolean array
    of the same shape that says where that is.

  Raises:
    ValueError: if a size is not positive, or there are fewer keys than pairs.

  Cost:
    O(batch_size (vocab log vocab + pairs)).

  Source:
    multi-query associative recall of arXiv 2312.04927, without gaps between
    queries.

  Example:
    >>> import jax
    >>> from jaxattn.data import recall_batch
    >>> tokens, targets, mask = recall_batch(jax.random.key(0), 3, 8, 32)
    >>> tokens.shape, int(mask[0].sum())
    ((3, 32), 8)
  """
  _checks.check_integer("batch_size", batch_size, 1, None)
  _checks.check_integer("vocab", vocab, 1, None)
  _checks.check_integer("pairs", pairs, 1, None)
  if pairs > vocab:
    raise ValueError(f"pairs must be at most vocab={vocab}, got {pairs}")
  return _recall(rng, batch_size, pairs, vocab)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _recall(
  rng: jax.Array, batch_size: int, pairs: int, vocab: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  rngs = jax.random.split(rng, 3)

  def permutations(rng: jax.Array, size: int) -> jax.Array:
    items = jnp.broadcast_to(
      jnp.arange(size, dtype=jnp.int32), (batch_size, size)
    )
    return jax.random.permutation(rng, items, axis=1, independent=True)

  keys = permutations(rngs[0], vocab)[:, :pairs]
  shape = (batch_size, pairs)
  values = jax.random.randint(rngs[1], shape, vocab, 2 * vocab, jnp.int32)
  order = permutations(rngs[2], pairs)
  first = jnp.stack((keys, values), -1)
  second = jnp.take_along_axis(first, order[..., None], 1)
  answers = jnp.stack((second[..., 1], jnp.zeros_like(order)), -1)
  asked = jnp.broadcast_to(jnp.array([True, False]), second.shape)
  nothing = jnp.zeros_like(first)
  tokens, targets, mask = (
    jnp.concatenate(halves, 1).reshape(batch_size, 4 * pairs)
    for halves in (
      (first, second),
      (nothing, answers),
      (nothing != 0, asked),
    )
  )
  return tokens, targets, mask


def match3_batch(
  rng: jax.Array, batch_size: int, length: int, modulus: int
) -> tuple[jax.Array, jax.Array]:
  r"""Match3: does a token complete a sum of three to a multiple of M?

  Tokens are uniform on 0 to M - 1. Token i is labeled True if there are
  positions j and l, which may be equal to each other and to i, with
  :math:`x_i + x_j + x_l \equiv 0 \pmod M`. One layer of attention to pairs of
  tokens can tell; of attention to single tokens it takes many heads or layers.

  Args:
    rng: PRNG key.
    batch_size: sequences to draw.
    length: tokens in a sequence.
    modulus: M, at least 2.

  Returns:
    Tokens (batch_size, length) int32, and labels, boolean of the same shape.

  Raises:
    ValueError: if a size is not positive or the modulus less than 2.

  Cost:
    O(batch_size (length^2 + M)).

  Source:
    the task of arXiv 2306.02896, with labels for all tokens.

  Example:
    >>> import jax
    >>> from jaxattn.data import match3_batch
    >>> tokens, labels = match3_batch(jax.random.key(0), 3, 8, 64)
    >>> tokens.shape, labels.shape
    ((3, 8), (3, 8))
  """
  _checks.check_integer("batch_size", batch_size, 1, None)
  _checks.check_integer("length", length, 1, None)
  _checks.check_integer("modulus", modulus, 2, 1 << 30)
  return _match3(rng, batch_size, length, modulus)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _match3(
  rng: jax.Array, batch_size: int, length: int, modulus: int
) -> tuple[jax.Array, jax.Array]:
  shape = (batch_size, length)
  tokens = jax.random.randint(rng, shape, 0, modulus, jnp.int32)
  pairs = (tokens[:, :, None] + tokens[:, None]) % modulus
  row = jnp.arange(batch_size, dtype=jnp.int32)[:, None]
  found = jnp.zeros((batch_size, modulus), bool)
  found = found.at[row, pairs.reshape(batch_size, -1)].set(True)
  return tokens, found[row, -tokens % modulus]
