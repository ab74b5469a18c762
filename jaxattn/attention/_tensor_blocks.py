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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _compat
from jaxattn.features import _chunks
from jaxattn.numerics._dtypes import accumulator
from jaxattn.softmax.exact import softmax_attention
from jaxattn.softmax.online import online_softmax_finalize, online_softmax_init
from pallas_kernels.tensor_attention.operands import (
  Gradients,
  Operands,
  Options,
)

# Paired queries of a block, all batch elements and heads together.
_MAX_PAIRED = 1 << 15
# Logits of a head that are still gone through one by one.
_MAX_LOGITS = 1 << 34


def forward(x: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
  """Output (B, T, N, Hv), log-sum-exp (B, T, N); JAX can differentiate both.

  Both of the accumulator's dtype, as kernels give them.
  """
  dtype = accumulator(x.query.dtype)
  hidden_by = None, *x[5:], *x[5:]
  floats = [
    _chunks.hide(y.astype(dtype), mask)
    for y, mask in zip(x[:5], hidden_by, strict=True)
  ]
  wide = _with_masks(floats, x)

  def block(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _attend_block(*pair, wide, options)

  longest = max(x.key1.shape[1], x.key2.shape[1])
  sizes = options.block_sizes
  chunk_size = None if sizes is None else sizes.block_q
  blocks = over_blocks(wide.query, longest, chunk_size, block)
  out, lse = (_join(y, x.query.shape[1]) for y in blocks)
  return out, lse


def _with_masks(floats: Sequence[jax.Array], x: Operands) -> Operands:
  return Operands(*floats, key_mask1=x.key_mask1, key_mask2=x.key_mask2)


def backward(
  x: Operands,
  options: Options,
  out: jax.Array,
  lse: jax.Array,
  out_bar: jax.Array,
) -> Gradients:
  """Cotangents of all but the masks, by going forward again."""
  del out, lse

  def attend(*floats: jax.Array) -> jax.Array:
    return forward(_with_masks(floats, x), options)[0]

  # Each device's own share, as kernels give it.
  axes = _compat.varying_axes(x, out_bar)
  _, vjp = jax.vjp(attend, *(_compat.cast_varying(y, axes) for y in x[:5]))
  return Gradients(*vjp(_compat.cast_varying(out_bar, axes)))


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


def _join(blocks: jax.Array, size: int) -> jax.Array:
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


def _attend_block(
  query: jax.Array, start: jax.Array, pairs: Operands, options: Options
) -> tuple[jax.Array, jax.Array]:
  """Output and log-sum-exp of the queries (B, c, N, H) from ``start`` on."""
  b, c, n, _ = query.shape
  is_causal, precision = options.is_causal, options.precision
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
  out, lse = online_softmax_finalize(state)
  return out[..., 0, :], lse[..., 0]


def _repeat_heads(x: jax.Array, num_heads: int) -> jax.Array:
  """(B, S, K, H) -> (B, S, N, H)."""
  return jnp.repeat(x, num_heads // x.shape[2], 2)
