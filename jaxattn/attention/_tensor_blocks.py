r"""Exact attention to pairs of tokens, as ordinary attention of pairs.

A logit :math:`\sum_c q_{ic} k^1_{jc} k^2_{lc}` is the product of a *paired
query* :math:`q_i \circ k^1_j` and a key :math:`k^2_l`. Attention of paired
queries to the second keys gives an output :math:`o_{ij}` and a log-sum-exp
:math:`L_{ij}`, and then

.. math::

  o_i = \sum_j \frac{e^{L_{ij}}}{\sum_{j'} e^{L_{ij'}}}\, v^1_j \circ o_{ij} .

A block of queries at a time, so that there are never more than a block times S1
paired queries; the gradient makes them again.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.features import _chunks
from jaxattn.softmax.exact import softmax_attention
from jaxattn.softmax.online import online_softmax_finalize, online_softmax_init

# Paired queries of a block, all batch elements and heads together.
_MAX_PAIRED = 1 << 15
# Logits of a head that are still gone through one by one.
_MAX_LOGITS = 1 << 34


class Pairs(NamedTuple):
  """The two key sequences of a call, in the accumulation dtype.

  Attributes:
    key1: (B, S1, K, H), 0 where hidden.
    key2: (B, S2, K, H), 0 where hidden.
    value1: (B, S1, K, Hv), 0 where hidden.
    value2: (B, S2, K, Hv), 0 where hidden.
    key_mask1: None or boolean (B, S1).
    key_mask2: None or boolean (B, S2).
  """

  key1: jax.Array
  key2: jax.Array
  value1: jax.Array
  value2: jax.Array
  key_mask1: jax.Array | None
  key_mask2: jax.Array | None


def check_num_logits(arrays: Sequence[jax.Array], message: str) -> None:
  """Refuses what would take hours.

  Args:
    arrays: query and keys, (B, tokens, N, H) each.
    message: of the error, with a place for the number of logits.
  """
  num_logits = math.prod(x.shape[1] for x in arrays)
  if num_logits > _MAX_LOGITS:
    raise ValueError(message.format(num_logits))


def over_blocks(
  query: jax.Array, s: int, chunk_size: int | None, fn: Any
) -> Any:
  """Calls ``fn((block, position of its first query))`` for all queries.

  Args:
    query: (B, T, N, H).
    s: number of keys, of the longer sequence.
    chunk_size: queries of a block; None = chosen from sizes.
    fn: from (B, c, N, H) and an int32 to any arrays.

  Returns:
    What ``fn`` returns, stacked along a first axis; the last block is padded
    with zeros. ``fn`` runs again for the gradient.
  """
  b, t, n, h = query.shape
  if chunk_size is None:
    chunk_size = max(1, _MAX_PAIRED // (b * n * s))
  num = -(-t // chunk_size)
  # Even blocks, so that little is padded.
  size = -(-t // num)
  query = _chunks.fit(query, num * size, 1)
  blocks = jnp.moveaxis(query.reshape(b, num, size, n, h), 1, 0)
  starts = size * jnp.arange(num, dtype=jnp.int32)
  if num == 1:
    return jax.tree.map(lambda x: x[None], fn((blocks[0], starts[0])))
  return lax.map(jax.checkpoint(fn), (blocks, starts))


def join(blocks: jax.Array, size: int) -> jax.Array:
  """(num, B, c, ...) -> (B, size, ...)."""
  x = jnp.moveaxis(blocks, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :size]


def paired_queries(query: jax.Array, key1: jax.Array) -> jax.Array:
  """(B, c, N, H), (B, S1, K, H) -> (B * c, S1, N, H)."""
  key1 = _repeat_heads(key1, query.shape[2])
  paired = query[:, :, None] * key1[:, None]
  return paired.reshape(-1, *paired.shape[2:])


def for_each_query(x: jax.Array, num_queries: int) -> jax.Array:
  """(B, S, ...) -> (B * c, S, ...)."""
  return jnp.repeat(x, num_queries, 0)


def attend_block(
  query: jax.Array,
  start: jax.Array,
  pairs: Pairs,
  is_causal: bool,
  precision: Any,
) -> jax.Array:
  """Output (B, c, N, Hv) of the queries (B, c, N, H) from ``start`` on."""
  b, c, n, _ = query.shape
  last = start + jnp.arange(c, dtype=jnp.int32)
  mask = None
  if pairs.key_mask2 is not None:
    mask = for_each_query(pairs.key_mask2, c)[:, None, None]
  out, lse = softmax_attention(
    paired_queries(query, pairs.key1),
    for_each_query(pairs.key2, c),
    for_each_query(pairs.value2, c),
    mask=mask,
    scale=1.0,
    key_value_seq_lengths=jnp.tile(last + 1, b) if is_causal else None,
    return_residual=True,
    precision=precision,
  )
  # (B, c, S1, N, ...), one softmax over S1 for each query and head.
  out, lse = (x.reshape(b, c, *x.shape[1:]) for x in (out, lse))
  if pairs.key_mask1 is not None:
    lse = jnp.where(pairs.key_mask1[:, None, :, None], lse, -jnp.inf)
  if is_causal:
    position = jnp.arange(lse.shape[2], dtype=jnp.int32)
    seen = position[None] <= last[:, None]
    lse = jnp.where(seen[None, :, :, None], lse, -jnp.inf)
  value = _repeat_heads(pairs.value1, n)[:, None] * out
  state = online_softmax_init(
    jnp.moveaxis(lse, 3, 2)[..., None, :],
    jnp.moveaxis(value, 3, 2),
    precision=precision,
  )
  return online_softmax_finalize(state)[0][..., 0, :]


def _repeat_heads(x: jax.Array, num_heads: int) -> jax.Array:
  """(B, S, K, H) -> (B, S, N, H)."""
  return jnp.repeat(x, num_heads // x.shape[2], 2)
