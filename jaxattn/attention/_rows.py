"""Rows of logits, block by block: what statistics and selection fold over.

A call of (B, T, N, H) queries on (B, S, K, H) keys is held with the axes
(B, K, G, T, ...), G = N / K query heads to a key head. Keys are visited in
blocks and, inside a block, queries in tiles: no more logits exist at a time
than one tile holds, and a tile stays in cache.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator

# Axis of the queries in (B, K, G, T, ...).
_T = 3
# Logits of one head in a tile: 256 KiB of float32, a share of a core's cache.
_TILE_LOGITS = 1 << 16


class Rows(NamedTuple):
  """One attention call as rows of logits, one row a query.

  Attributes:
    query: (B, K, G, T, H).
    key: (B, S, K, H).
    mask: boolean, each axis of (B, K, G, T, S) or 1 long; or None.
    scale: scalar factor on the logits.
    is_causal: query t sees keys 0 to t.
    precision: of the matrix product.
  """

  query: jax.Array
  key: jax.Array
  mask: jax.Array | None
  scale: jax.Array
  is_causal: bool
  precision: lax.PrecisionLike


def rows(
  query: jax.Array,
  key: jax.Array,
  mask: jax.Array | None,
  *,
  scale: Any,
  is_causal: bool,
  precision: lax.PrecisionLike = None,
) -> Rows:
  """Brings a batched, validated call into the layout of :class:`Rows`."""
  b, t, n, h = query.shape
  kv = key.shape[2]
  if scale is None:
    scale = 1 / math.sqrt(h)
  if mask is not None:
    head = (kv, n // kv) if mask.shape[1] > 1 else (1, 1)
    mask = mask.reshape(mask.shape[0], *head, *mask.shape[2:])
  query = jnp.moveaxis(query.reshape(b, t, kv, n // kv, h), 1, _T)
  scale = jnp.asarray(scale, accumulator(query.dtype))
  return Rows(query, key, mask, scale, is_causal, precision)


def from_rows(x: jax.Array) -> jax.Array:
  """(B, K, G, T, ...) to (B, T, N, ...)."""
  x = jnp.moveaxis(x, _T, 1)
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def check_options(scale: Any, is_causal: bool, chunk_size: int | None) -> None:
  """Raises unless the options of a call, None where it may be, make sense."""
  if scale is not None:
    _checks.check_scalar("scale", scale)
  _checks.check_choice("is_causal", is_causal, (False, True))
  if chunk_size is not None:
    _checks.check_integer("chunk_size", chunk_size, 1, None)


def fold_logits(
  call: Rows,
  chunk_size: int,
  first: Callable[..., Any],
  update: Callable[..., Any],
  *operands: jax.Array,
) -> Any:
  """Folds functions of logits over the blocks of keys, in order.

  The first block is the ragged one, so that a loop carry starts from data (as
  varying axes under ``shard_map`` require) and keys are never padded. Hidden
  logits are -inf. Nothing here is meant to be differentiated.

  Args:
    call: the rows.
    chunk_size: keys in a block.
    first: ``first(logits, start, *operands) -> state`` on the first block.
    update: ``update(state, logits, start, *operands) -> state``.
    *operands: (B, K, G, T, ...) arrays that the functions also need.

  Returns:
    The last state: a pytree of arrays (B, K, G, T, ...). The functions see
    tiles of all these along T.
  """
  t, s = call.query.shape[_T], call.key.shape[1]
  chunk_size = min(chunk_size, s)
  head = s % chunk_size or chunk_size
  num_tiles = count_tiles(t, _TILE_LOGITS // chunk_size)
  position = jnp.arange(t, dtype=jnp.int32).reshape(1, 1, 1, t, 1)
  tiles = [tile(x, num_tiles) for x in (call.query, position, *operands)]

  def visit(fn: Callable[..., Any], start: Any, size: int, *state: Any) -> Any:
    key = lax.dynamic_slice_in_dim(call.key, start, size, 1)
    # Into the layout that the product wants, once for all tiles.
    key = jnp.einsum("bskh->bksh" if t == 1 else "bskh->bkhs", key)
    mask = mask_tiles(call.mask, start, size, num_tiles)

    def one_tile(x: Any) -> Any:
      state, mask, query, position, *operands = x
      logits = _logits(call, query, key)
      # -0.0 ranks below 0.0 in a selection, but they are tied.
      logits = jnp.where(logits == 0, 0, logits)
      seen = visible(call.is_causal, mask, position, start, size)
      if seen is not None:
        logits = jnp.where(seen, logits, -jnp.inf)
      return fn(*state, logits, start, *operands)

    return lax.map(one_tile, (state, mask, *tiles))

  def step(state: Any, start: jax.Array) -> tuple[Any, None]:
    return visit(update, start, chunk_size, state), None

  state = visit(first, 0, head)
  if head < s:
    starts = jnp.arange(head, s, chunk_size, dtype=jnp.int32)
    state, _ = lax.scan(step, state, starts)
  return jax.tree.map(lambda x: untile(x, t), state)


def count_tiles(length: int, rows: int) -> int:
  """Tiles of at most ``rows`` queries; unpadded if that takes few more."""
  fewest = -(-length // max(1, rows))
  without_padding = (m for m in range(fewest, 2 * fewest) if length % m == 0)
  return next(without_padding, fewest)


def top_of_block(
  logits: jax.Array, k: int, *, unused: int
) -> tuple[jax.Array, jax.Array]:
  """The k largest of the last axis and where they are.

  A block of fewer than k fills the list up with -inf at index ``unused``.
  """
  values, indices = lax.top_k(logits, min(k, logits.shape[-1]))
  pad = [(0, 0)] * (logits.ndim - 1) + [(0, k - values.shape[-1])]
  values = jnp.pad(values, pad, constant_values=-jnp.inf)
  return values, jnp.pad(indices, pad, constant_values=unused)


def tile(x: jax.Array, num_tiles: int) -> jax.Array:
  """(B, K, G, T, ...) to (num_tiles, B, K, G, rows, ...), padded with zeros.

  Tiles are strided, so that a T sharded over devices leaves each of them work
  in every tile.
  """
  size = -(-x.shape[_T] // num_tiles)
  pad = [(0, 0)] * x.ndim
  pad[_T] = (0, size * num_tiles - x.shape[_T])
  x = jnp.pad(x, pad) if pad[_T][1] else x
  x = x.reshape(*x.shape[:_T], size, num_tiles, *x.shape[_T + 1 :])
  return jnp.moveaxis(x, _T + 1, 0)


def untile(x: jax.Array, length: int) -> jax.Array:
  """Undoes :func:`tile`, for ``length`` queries."""
  x = jnp.moveaxis(x, 0, _T + 1)
  x = x.reshape(*x.shape[:_T], -1, *x.shape[_T + 2 :])
  return lax.slice_in_dim(x, 0, length, axis=_T)


def _logits(call: Rows, query: jax.Array, key: jax.Array) -> jax.Array:
  operands, spec = (query, key), "bkgth,bkhs->bkgts"
  if call.query.shape[_T] == 1:
    # A matrix times a vector needs no copy of the keys, if they come first.
    operands, spec = (key, query), "bksh,bkgth->bkgts"
  return call.scale * jnp.einsum(
    spec,
    *operands,
    precision=call.precision,
    preferred_element_type=accumulator(query.dtype),
  )


def mask_tiles(
  mask: jax.Array | None, start: Any, size: int, num_tiles: int
) -> jax.Array | None:
  if mask is None:
    return None
  if mask.shape[-1] > 1:
    mask = lax.dynamic_slice_in_dim(mask, start, size, mask.ndim - 1)
  if mask.shape[_T] > 1:
    return tile(mask, num_tiles)
  return jnp.broadcast_to(mask[None], (num_tiles, *mask.shape))


def visible(
  is_causal: bool,
  mask: jax.Array | None,
  position: jax.Array,
  start: Any,
  size: int,
) -> jax.Array | None:
  if not is_causal:
    return mask
  key_position = start + lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, size), 4)
  causal = key_position <= position
  return causal if mask is None else causal & mask
