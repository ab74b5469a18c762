"""Polynomial attention on a GPU: what one warp group does with one tile.

Features exist for 64 monomials of 128 tokens at a time. They are made row by
row, a thread a token, and read from shared memory as an operand of products.

A number of products is two of bfloat16, its head and what is left of it; of
four products of those the smallest is left out, so that about 16 bits stay.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._compat import (
  block_ids,
  gpu_load,
  gpu_store,
  pl,
  plgpu,
)
from pallas_kernels._products import LAST, dot
from pallas_kernels.flash_attention._gpu_kernels import fetch_once, store

# Tokens that a warp group makes features of, and features that it makes.
TOKENS, FEATURES = 128, 64
# Tokens of either side in a tile of pairs.
PAIRS = 64
# Rows that are visited between two jumps.
_UNROLL = 4


class Split(NamedTuple):
  """A matrix as the sum of two, in bfloat16."""

  head: Any
  rest: Any

  def at(self, slot: Any) -> "Split":
    """Of references to slots, those to one."""
    return Split(self.head.at[slot], self.rest.at[slot])


def split(x: jax.Array) -> Split:
  """In registers."""
  head = x.astype(jnp.bfloat16)
  return Split(head, (x - head.astype(x.dtype)).astype(jnp.bfloat16))


class Buffers(NamedTuple):
  """Shared memory of a kernel, and barriers of what is copied there.

  Attributes:
    fetched: what a warp group copies once.
    streamed: what passes by, as slots.
    work: all else.
    once: barriers of ``fetched``.
    each: barriers of ``streamed``.
  """

  fetched: Any
  streamed: Any
  work: Any
  once: Any
  each: Any


class Tile(NamedTuple):
  """Static facts of a kernel.

  Attributes:
    num_features: m.
    coefficients: of the polynomial.
    radius: as in ``Options``.
    tiles: of how many a chunk is.
    num_tiles: of how many a sequence of what passes by is.
    heads: of what passes by.
    empty: chunk whose state is zero, or -1.
    shared: whether all chunks read one state.
    interpret: whether no GPU is there.
  """

  num_features: int
  coefficients: tuple[float, ...]
  radius: float | None
  tiles: int
  num_tiles: int
  heads: int
  empty: int
  shared: bool
  interpret: bool

  def multiply(
    self, total: jax.Array, a: Split, b: Split, *, flip_a: bool = False,
    flip_b: bool = False,
  ) -> jax.Array:  # fmt: skip
    """``total`` + a b; b and what is flipped lie in shared memory."""
    terms = (a.rest, b.head), (a.head, b.rest), (a.head, b.head)
    if self.interpret:  # knows no transposed operand, and none in registers
      for x, y in terms:
        x, y = x[...], y[...]
        x, y = x.T if flip_a else x, y if flip_b else y.T
        total += dot(x, y, LAST)
      return total

    def run(acc: Any) -> None:
      for x, y in terms:
        x = x.transpose((1, 0)) if flip_a else x
        plgpu.wgmma(acc, x, y.transpose((1, 0)) if flip_b else y)

    start: Any = plgpu.WGMMAAccumulatorRef.init(total)
    return pl.run_state(run)(start)

  def weights(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
    """Of the pairs in a chunk."""
    return self._local(self.coefficients, logits, seen)

  def slopes(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
    """Derivatives of the weights."""
    slopes = [j * c for j, c in enumerate(self.coefficients)]
    return self._local(slopes[1:], logits, seen)

  def _local(
    self, coefficients: Any, logits: jax.Array, seen: jax.Array
  ) -> jax.Array:
    y = _polynomial(coefficients, logits)
    if self.radius is not None:
      # Beyond the radius exp would outgrow the weights of all other chunks.
      inside = jnp.abs(logits) <= self.radius
      exact = jnp.exp(jnp.where(inside, logits, 0.0))
      y = jnp.where(inside, exact, y)
    return jnp.where(seen, y, 0.0)

  def clear(self, rows: Any) -> None:
    """As rows that no feature is written to are multiplied too."""
    rows[...] = jnp.zeros((FEATURES, TOKENS), jnp.float32)

  def untiled(self, *refs: Any) -> None:
    """Makes these lie in shared memory row by row.

    For what is read both by rows and as a matrix, the compiler may search for
    a layout in vain.
    """
    take: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    if not self.interpret:
      for ref in refs:
        take(lambda _, ref: None)(ref)

  def features(self, table: Any, block: Any, tokens: Any, rows: Any) -> None:
    """Writes monomials (64, tokens) of a block, of tokens (H + 1, tokens)."""

    def write(row: Any, feature: Any) -> None:
      factors = _factors(table, feature, tokens)
      rows[row] = functools.reduce(jnp.multiply, factors)

    plgpu.commit_smem()  # All warps have read what is overwritten now.
    self.over_rows(block, write)
    plgpu.commit_smem()

  def over_rows(self, block: Any, visit: Any) -> None:
    """Calls ``visit(row, feature)``, for some that are padded, too."""
    first = block * np.int32(FEATURES)
    num = lax.min(np.int32(self.num_features) - first, np.int32(FEATURES))

    def body(i: Any, _: None) -> None:
      for j in range(_UNROLL):
        row = i * np.int32(_UNROLL) + np.int32(j)
        visit(row, first + row)

    high = lax.div(num + np.int32(_UNROLL - 1), np.int32(_UNROLL))
    lax.fori_loop(np.int32(0), high, body, None)

  def load(self, rows: Any) -> jax.Array:
    """What was written row by row, as an operand of products."""
    return rows[...] if self.interpret else gpu_load(rows)

  def write(self, rows: Any, x: jax.Array) -> None:
    """What will be read row by row, a result of products."""
    if self.interpret:
      rows[...] = x
    else:
      gpu_store(rows, x)


def _stream(
  high: Any, sources: Any, buffers: Buffers, step: Any, carry: Any
) -> Any:
  """Folds ``step(i, slot, carry)`` for i up to ``high``; copies run ahead.

  ``sources`` tell for an i what is copied to the slots of ``buffers``; a slot
  is copied to anew as soon as it has been worked on.
  """
  copies = list(zip(sources, buffers.streamed, buffers.each, strict=True))
  size = buffers.streamed[0].shape[0]

  def fetch(i: Any) -> None:
    slot = lax.rem(i, np.int32(size))
    for source, slots, barriers in copies:
      plgpu.copy_gmem_to_smem(source(i), slots.at[slot], barriers.at[slot])

  for ahead in map(np.int32, range(size)):
    # Not a plain number, of which it might be known that it is none of an i's.
    i = lax.min(ahead, high - np.int32(1))
    pl.when(ahead < high)(functools.partial(fetch, i))

  def body(i: Any, carry: Any) -> Any:
    slot = lax.rem(i, np.int32(size))
    for _, _, barriers in copies:
      plgpu.barrier_wait(barriers.at[slot])
    carry = step(i, slot, carry)
    later = i + np.int32(size)

    @pl.when(later < high)
    def _():
      plgpu.commit_smem()  # All warps have read what is overwritten now.
      fetch(later)

    return carry

  return lax.fori_loop(np.int32(0), high, body, carry)


def _factors(table: Any, feature: Any, tokens: Any) -> list[jax.Array]:
  return [tokens[table[feature, i]] for i in range(table.shape[1])]


def moments(tile: Tile, inputs: Any, outputs: Any, buffers: Buffers) -> None:
  """The state of the tokens of a chunk, for a block of features."""
  (table, token_ref, *carried_refs), (out_ref,) = inputs, outputs
  tokens, *carried = buffers.streamed
  rows, out = buffers.work
  tile.untiled(tokens, rows)
  tile.clear(rows)
  p, chunk, block = block_ids("pair", "chunk", "block")
  low = chunk * np.int32(tile.tiles)
  each = lax.min(np.int32(tile.tiles), np.int32(tile.num_tiles) - low)

  def place(step: Any) -> Any:
    g, i = lax.div(step, each), low + lax.rem(step, each)
    return g, pl.ds(i * np.int32(TOKENS), TOKENS)

  def token_source(step: Any) -> Any:
    g, at = place(step)
    return token_ref.at[p, g, :, at]

  def carried_source(ref: Any) -> Any:
    def source(step: Any) -> Any:
      g, at = place(step)
      return ref.at[p, g, at]

    return source

  def add(_: Any, slot: Any, total: jax.Array) -> jax.Array:
    tile.features(table, block, tokens.at[slot], rows)
    features = split(tile.load(rows))
    return tile.multiply(total, features, Split(*carried).at(slot))

  sources = token_source, *map(carried_source, carried_refs)
  start = jnp.zeros(out.shape, jnp.float32)
  high = each * np.int32(tile.heads)
  out[...] = _stream(high, sources, buffers, add, start)
  at = pl.ds(block * np.int32(FEATURES), FEATURES)
  store((out, out_ref.at[p, chunk, at]))


def _from_state(
  tile: Tile, state_refs: Any, buffers: Buffers, step: Any, carry: Any
) -> Any:
  """Folds ``step(block, state, carry)`` over the blocks of a tile's state."""
  p, i = block_ids("pair", "tile")
  chunk = lax.div(i, np.int32(tile.tiles))
  blocks = np.int32(state_refs[0].shape[2] // FEATURES)
  high = lax.select(chunk == np.int32(tile.empty), np.int32(0), blocks)
  at = np.int32(0) if tile.shared else chunk

  def source(ref: Any) -> Any:
    size = np.int32(FEATURES)
    return lambda block: ref.at[p, at, pl.ds(block * size, FEATURES)]

  def add(block: Any, slot: Any, carry: Any) -> Any:
    return step(block, Split(*buffers.streamed).at(slot), carry)

  return _stream(high, map(source, state_refs), buffers, add, carry)


def _place(size: int) -> tuple[Any, Any, Any]:
  """Pair, head and tokens of a tile of ``size``."""
  p, g, i = block_ids("pair", "head", "tile")
  return p, g, pl.ds(i * np.int32(size), size)


def _fetch(sources: Any, buffers: Buffers) -> None:
  barriers = [barrier.at[0] for barrier in buffers.once]
  fetch_once(list(zip(sources, buffers.fetched, barriers, strict=True)))


def read(tile: Tile, inputs: Any, outputs: Any, buffers: Buffers) -> None:
  """What the features of tokens find in a state: (tokens, carried)."""
  (table, token_ref, *state_refs), (out_ref,) = inputs, outputs
  (tokens,) = buffers.fetched
  rows, heads, rests, out = buffers.work
  tile.untiled(tokens, rows)
  tile.clear(rows)
  p, g, at = _place(TOKENS)
  _fetch([token_ref.at[p, g, :, at]], buffers)

  def add(block: Any, state: Split, total: jax.Array) -> jax.Array:
    tile.features(table, block, tokens, rows)
    for half in range(2):  # as all at once takes too many registers
      at = pl.ds(half * (TOKENS // 2), TOKENS // 2)
      heads[:, at], rests[:, at] = split(tile.load(rows.at[:, at]))
    plgpu.commit_smem()
    return tile.multiply(total, Split(heads, rests), state, flip_a=True)

  start = jnp.zeros(out.shape, jnp.float32)
  out[...] = _from_state(tile, state_refs, buffers, add, start)
  store((out, out_ref.at[p, g, at]))


def pull(tile: Tile, inputs: Any, outputs: Any, buffers: Buffers) -> None:
  """Cotangents of tokens (H + 1, tokens), given those of what they find."""
  (table, token_ref, head_ref, rest_ref, *state_refs), (out_ref,) = (
    inputs, outputs,
  )  # fmt: skip
  tokens, heads, rests = buffers.fetched
  rows, out = buffers.work
  tile.untiled(tokens, rows, out)
  p, g, at = _place(TOKENS)
  sources = token_ref.at[p, g, :, at], head_ref.at[p, g, at]
  _fetch([*sources, rest_ref.at[p, g, at]], buffers)

  def clear(i: Any, _: None) -> None:
    out[i] = jnp.zeros((TOKENS,), jnp.float32)

  lax.fori_loop(np.int32(0), np.int32(out.shape[0]), clear, None)

  def add(block: Any, state: Split, _: None) -> None:
    start = jnp.zeros((FEATURES, TOKENS), jnp.float32)
    bars = tile.multiply(start, state, Split(heads, rests), flip_b=True)
    plgpu.commit_smem()  # All warps have read what is overwritten now.
    tile.write(rows, bars)
    plgpu.commit_smem()

    def add_row(row: Any, feature: Any) -> None:
      factors = _factors(table, feature, tokens)
      bar = rows[row]
      for i in range(len(factors)):
        others = factors[:i] + factors[i + 1 :]
        out[table[feature, i]] += functools.reduce(jnp.multiply, others, bar)

    tile.over_rows(block, add_row)

  _from_state(tile, state_refs, buffers, add, None)
  store((out, out_ref.at[p, g, :, at]))


def _meet(
  tile: Tile, own: Split, refs: Any, buffers: Buffers, add: Any, start: Any, *,
  keys: bool,
) -> Any:  # fmt: skip
  """Folds the tiles of a chunk that one of its queries, or ``keys``, meets.

  ``own`` are its tokens; ``add(carry, logits, seen, tokens, carried)``.
  """
  p, i = block_ids("pair", "tile")
  first = lax.div(i, np.int32(tile.tiles)) * np.int32(tile.tiles)
  last = lax.min(first + np.int32(tile.tiles), np.int32(tile.num_tiles))
  low, high = (i, last) if keys else (first, i + np.int32(1))
  each = high - low

  def place(step: Any) -> Any:
    return lax.div(step, each), low + lax.rem(step, each)

  def source(ref: Any) -> Any:
    def at(step: Any) -> Any:
      g, j = place(step)
      return ref.at[p, g, pl.ds(j * np.int32(PAIRS), PAIRS)]

    return at

  def step(step: Any, slot: Any, carry: Any) -> Any:
    _, j = place(step)
    shape = PAIRS, PAIRS
    before = lax.broadcasted_iota(jnp.int32, shape, int(not keys))
    after = lax.broadcasted_iota(jnp.int32, shape, int(keys))
    apart = i - j if keys else j - i
    seen = before + apart * np.int32(PAIRS) <= after
    tokens, carried = (s.at(slot) for s in _splits(buffers.streamed))
    logits = jnp.zeros(shape, jnp.float32)
    logits = tile.multiply(logits, own, tokens, flip_b=True)
    return add(carry, logits, seen, tokens, carried)

  high = each * np.int32(tile.heads)
  return _stream(high, map(source, refs), buffers, step, start)


def _splits(refs: Any) -> list[Split]:
  return [Split(*refs[i : i + 2]) for i in range(0, len(refs), 2)]


def _own(inputs: Any, buffers: Buffers) -> tuple[list[Split], Any]:
  """A tile of what this warp group works on, and references of the others."""
  p, g, at = _place(PAIRS)
  num = len(buffers.fetched)
  _fetch([ref.at[p, g, at] for ref in inputs[:num]], buffers)
  return _splits(buffers.fetched), inputs[num:]


def _leave(results: Any, outputs: Any, buffers: Buffers) -> None:
  p, g, at = _place(PAIRS)
  for out, result in zip(buffers.work, results, strict=True):
    out[...] = result
  targets = [ref.at[p, g, at] for ref in outputs]
  store(*zip(buffers.work, targets, strict=True))


def _zeros(buffers: Buffers) -> list[jax.Array]:
  return [jnp.zeros(out.shape, jnp.float32) for out in buffers.work]


def local_forward(
  tile: Tile, inputs: Any, outputs: Any, buffers: Buffers
) -> None:
  """Sums of a tile of queries, over the keys of their chunk."""
  (query,), others = _own(inputs, buffers)

  def add(
    totals: Any, logits: Any, seen: Any, _: Split, value: Split
  ) -> list[jax.Array]:
    weights = split(tile.weights(logits, seen))
    return [tile.multiply(totals[0], weights, value)]

  start = _zeros(buffers)
  results = _meet(tile, query, others, buffers, add, start, keys=False)
  _leave(results, outputs, buffers)


def local_query(
  tile: Tile, inputs: Any, outputs: Any, buffers: Buffers
) -> None:
  """Cotangents of a tile of queries, by the keys of their chunk."""
  (query, bar), others = _own(inputs, buffers)

  def add(
    totals: Any, logits: Any, seen: Any, key: Split, value: Split
  ) -> list[jax.Array]:
    both = jnp.zeros(logits.shape, jnp.float32)
    both = tile.multiply(both, bar, value, flip_b=True)
    both *= tile.slopes(logits, seen)
    return [tile.multiply(totals[0], split(both), key)]

  start = _zeros(buffers)
  results = _meet(tile, query, others, buffers, add, start, keys=False)
  _leave(results, outputs, buffers)


def local_key_value(
  tile: Tile, inputs: Any, outputs: Any, buffers: Buffers
) -> None:
  """Cotangents of a tile of keys and of what they carry."""
  (key, value), others = _own(inputs, buffers)

  def add(
    totals: Any, logits: Any, seen: Any, query: Split, bar: Split
  ) -> list[jax.Array]:
    key_bar, value_bar = totals
    weights = split(tile.weights(logits, seen))
    value_bar = tile.multiply(value_bar, weights, bar)
    both = jnp.zeros(logits.shape, jnp.float32)
    both = tile.multiply(both, value, bar, flip_b=True)
    both *= tile.slopes(logits, seen)
    return [tile.multiply(key_bar, split(both), query), value_bar]

  start = _zeros(buffers)
  results = _meet(tile, key, others, buffers, add, start, keys=True)
  _leave(results, outputs, buffers)


def _polynomial(coefficients: Any, x: jax.Array) -> jax.Array:
  if not coefficients:
    return jnp.zeros_like(x)
  total = jnp.full_like(x, coefficients[-1])
  for c in coefficients[-2::-1]:
    total = total * x + c
  return total
