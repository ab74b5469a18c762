"""One call of exact attention, cut into groups of heads and into tiles.

On a CPU a group is as many heads as fill one tile, and its tensors stay in
cache; elsewhere one group holds all heads. Within a group, arrays are

    query (P, G, T, H), key (P, S, H), value (P, S, Hv),

with P pairs of batch element and key head and G query heads for each of them.
A tile is ``block_q`` queries of each of the G heads on ``block_k`` keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.numerics._dtypes import accumulator
from jaxattn.numerics._sizes import largest_divisor
from jaxattn.softmax import _tiles
from pallas_kernels.flash_attention import BlockSizes

# Scores of a tile on a CPU that heads are put together to fill.
_CPU_TILE = 1024 * 1024


class Operands(NamedTuple):
  """Arrays of one call, batched and with grouped heads.

  Also holds what belongs to each of them: cotangents, partition specs.

  Attributes:
    query: (B, T, K, G, H).
    key: (B, S, K, H).
    value: (B, S, K, Hv).
    bias: None or (B|1, K|1, G|1, T|1, S|1).
    mask: None or boolean, as bias.
    query_lengths: None or (B,) integers.
    key_lengths: None or (B,) integers.
    offset: None or () integer, position of query 0 among the keys.
  """

  query: Any
  key: Any
  value: Any
  bias: Any = None
  mask: Any = None
  query_lengths: Any = None
  key_lengths: Any = None
  offset: Any = None


class Gradients(NamedTuple):
  """Cotangents of query, key, value and bias, in the operands' layout."""

  query: Any
  key: Any
  value: Any
  bias: Any


class Spec(NamedTuple):
  """Static facts of one call."""

  scale: float
  band: _tiles.Band
  block_sizes: BlockSizes | None
  precision: Any


class Plan(NamedTuple):
  """Static sizes of the loops of one pass.

  Attributes:
    batch: batch elements in a group.
    heads: key heads in a group.
    num_groups: number of groups.
    query_heads: G, query heads to a key head.
    queries: T, cut into blocks.
    keys: S, cut into blocks.
    diagonal: None, or S cut into the steps of a causal staircase: where it
      begins is then known before the run, and rows above a step are left out.
  """

  batch: int
  heads: int
  num_groups: tuple[int, int]
  query_heads: int
  queries: _tiles.Axis
  keys: _tiles.Axis
  diagonal: _tiles.Axis | None = None

  @property
  def pairs(self) -> int:
    """P, pairs of batch element and key head in a group."""
    return self.batch * self.heads

  @property
  def rows(self) -> int:
    """Rows of a tile: a block of queries of each head."""
    return self.query_heads * self.queries.block

  @property
  def tile(self) -> tuple[int, int, int, int, int]:
    """Sizes of a tile along (B, K, G, T, S)."""
    blocks = self.queries.block, self.keys.block
    return self.batch, self.heads, self.query_heads, *blocks


class Group(NamedTuple):
  """A group of heads of a call.

  Attributes:
    call: all operands.
    spec: static facts.
    plan: static sizes.
    batch: first batch element.
    head: first key head.
    query: (P, G, T, H).
    key: (P, S, H).
    value: (P, S, Hv).
  """

  call: Operands
  spec: Spec
  plan: Plan
  batch: Any
  head: Any
  query: jax.Array
  key: jax.Array
  value: jax.Array


def plan(x: Operands, spec: Spec, *, cpu: bool, backward: bool) -> Plan:
  """Chooses block sizes and the number of heads in a group."""
  b, t, k, g, _ = x.query.shape
  s = x.key.shape[1]
  blocks = spec.block_sizes or _block_sizes(t, s, spec.band, cpu)
  block_q = blocks.block_q_bwd if backward else blocks.block_q
  block_k = blocks.block_k_bwd if backward else blocks.block_k
  diagonal = None
  if spec.block_sizes is None:
    block_q = max(1, block_q // g)
    steps = cpu and not backward and min(t, s) >= 4096
    if steps and x.offset is None and spec.band == _tiles.Band(after=0):
      diagonal = _diagonal(t, s, 2 * block_q)
    if diagonal is not None:
      block_q *= 2
      block_k = min(block_k, block_q)
  queries = _tiles.Axis(t, min(t, block_q))
  keys = _tiles.Axis(s, min(s, block_k))
  pairs = b * k
  if cpu:
    pairs = max(1, _CPU_TILE // (g * queries.block * keys.block))
  heads = largest_divisor(k, pairs)
  batch = largest_divisor(b, pairs // k) if heads == k else 1
  groups = b // batch, k // heads
  return Plan(batch, heads, groups, g, queries, keys, diagonal)


def _diagonal(t: int, s: int, block_q: int) -> _tiles.Axis | None:
  """Steps of the causal staircase, eight to a block of queries, or None."""
  if t % block_q or block_q % 8 or t > s:
    return None
  return _tiles.Axis(s, block_q // 8)


def _block_sizes(t: int, s: int, band: _tiles.Band, cpu: bool) -> BlockSizes:
  """Default tiles of a platform, from the sizes of a call."""
  # Measured on two cores: each operation on a tile is a barrier for both, so
  # tiles are large, unless they would waste work on what a band hides.
  if cpu and not band.bounded:
    return BlockSizes(4096, 512, 4096, 512)
  local = band.before is not None and band.after is not None
  size = 1024 if cpu and not local and min(t, s) >= 4096 else 512
  return BlockSizes(size, size, size, size)


def over_groups(
  x: Operands,
  spec: Spec,
  plan: Plan,
  step: Callable[[Group, Any], Any],
  carry: Any,
  *,
  cpu: bool,
) -> Any:
  """Folds ``step(group, carry)`` over all groups of heads."""
  # A CPU multiplies in float32 anyway: widen once, not in every tile.
  dtype = accumulator(x.query.dtype) if cpu else x.query.dtype

  def group_at(n: Any) -> Group:
    batch = n // plan.num_groups[1] * plan.batch
    head = n % plan.num_groups[1] * plan.heads
    query = cut(x.query, batch, head, plan)
    key = cut(x.key[:, :, :, None], batch, head, plan)[:, 0]
    value = cut(x.value[:, :, :, None], batch, head, plan)[:, 0]
    arrays = (y.astype(dtype) for y in (query, key, value))
    return Group(x, spec, plan, batch, head, *arrays)

  num = plan.num_groups[0] * plan.num_groups[1]
  if num == 1:
    return step(group_at(0), carry)
  return _tiles.loop(0, num, lambda n, c: step(group_at(n), c), carry)


def cut(y: jax.Array, batch: Any, head: Any, plan: Plan) -> jax.Array:
  """(B, L, K, G, H) -> (P, G, L, H) of the group at ``batch``, ``head``."""
  sizes = (plan.batch, y.shape[1], plan.heads, *y.shape[3:])
  block = lax.dynamic_slice(y, _tiles.at(batch, 0, head, 0, 0), sizes)
  block = block.transpose(0, 2, 3, 1, 4)
  return block.reshape(plan.pairs, *block.shape[2:])


def put(total: jax.Array, part: jax.Array, group: Group) -> jax.Array:
  """Writes (P, G, L, H) of one group into (B, L, K, G, H)."""
  plan = group.plan
  part = part.reshape(plan.batch, plan.heads, *part.shape[1:])
  part = part.transpose(0, 3, 1, 2, 4)
  if part.shape == total.shape:
    return part
  start = _tiles.at(group.batch, 0, group.head, 0, 0)
  return lax.dynamic_update_slice(total, part, start)


def tile_rows(y: jax.Array, i: Any, plan: Plan) -> jax.Array:
  """Block ``i`` of (P, G, T, ...) as (P, rows, ...)."""
  start, block = plan.queries.start(i), plan.queries.block
  y = lax.dynamic_slice_in_dim(y, start, block, 2)
  return y.reshape(plan.pairs, plan.rows, *y.shape[3:])


def scaled_query(group: Group, i: Any) -> tuple[jax.Array, float]:
  """Block ``i`` of the queries, and the factor still due on its logits."""
  query, scale = tile_rows(group.query, i, group.plan), group.spec.scale
  if query.dtype == accumulator(query.dtype):
    return query * scale, 1.0
  # Scaling a 16-bit query would round it: scale the float32 logits instead.
  return query, scale


def key_value(
  group: Group, i: Any, j: Any, edge: bool
) -> tuple[jax.Array, jax.Array]:
  """Block ``j`` of keys and values, (P, block_k, ...)."""
  keys, band = group.plan.keys, group.spec.band
  key, value = (
    lax.dynamic_slice_in_dim(y, keys.start(j), keys.block, 1)
    for y in (group.key, group.value)
  )
  if not (edge and band.bounded):
    return key, value
  # Zero what no query of the block sees: 0 * NaN would spoil the products.
  queries = group.plan.queries.positions(i) + offset(group.call)
  seen = band.sees(queries[0], queries[-1], keys.positions(j))[:, None]
  return jnp.where(seen, key, 0), jnp.where(seen, value, 0)


def offset(x: Operands) -> jax.Array | int:
  """Position of query 0 among the keys."""
  return 0 if x.offset is None else x.offset


def tile_of(
  y: jax.Array, group: Group, i: Any, j: Any
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
  """Start and sizes of a tile in an array broadcast over (B, K, G, T, S)."""
  plan = group.plan
  start = (
    group.batch, group.head, 0, plan.queries.start(i), plan.keys.start(j)
  )  # fmt: skip
  start = (a if n > 1 else 0 for a, n in zip(start, y.shape, strict=True))
  sizes = (a if n > 1 else 1 for a, n in zip(plan.tile, y.shape, strict=True))
  return _tiles.at(*start), tuple(sizes)


def mask_logits(
  products: jax.Array,
  factor: float,
  group: Group,
  i: Any,
  j: Any,
  *,
  edge: bool,
  transposed: bool = False,
) -> jax.Array:
  """Logits of one tile from its products: scale, bias, and -inf where hidden.

  Args:
    products: (P, rows, block_k), or (P, block_k, rows) if transposed.
    factor: scale that the products still lack.
    group: where the tile is, with ``i`` and ``j``.
    i: block of queries.
    j: block of keys.
    edge: whether the tile may reach out of the band or repeat items.
    transposed: orientation; also hides queries that an earlier block owns.

  Returns:
    Logits, shaped as ``products``.
  """
  b, k, g, q, s = group.plan.tile
  logits = products.reshape((b, k, s, g, q) if transposed else (b, k, g, q, s))

  def oriented(y: jax.Array) -> jax.Array:
    return jnp.moveaxis(y, 4, 2) if transposed else y

  if factor != 1.0:
    logits *= factor
  bias = group.call.bias
  if bias is not None:
    bias = lax.dynamic_slice(bias, *tile_of(bias, group, i, j))
    logits += oriented(bias).astype(logits.dtype)
  for visible in _visible(group, i, j, edge, own_queries=transposed):
    logits = jnp.where(oriented(visible), logits, -jnp.inf)
  return logits.reshape(products.shape)


def _visible(
  group: Group, i: Any, j: Any, edge: bool, own_queries: bool
) -> list[jax.Array]:
  """Masks of one tile, each broadcastable to (B, K, G, T, S)."""
  x, plan = group.call, group.plan
  rows, cols = (None, None, None, slice(None), None), (None,) * 4
  query_at, key_at = (
    plan.queries.positions(i)[rows],
    plan.keys.positions(j)[cols],
  )
  masks = []
  if edge:
    if plan.keys.ragged:
      masks.append(plan.keys.owned(j)[cols])
    if plan.queries.ragged and own_queries:
      masks.append(plan.queries.owned(i)[rows])
    if group.spec.band.bounded:
      at = query_at + offset(x)
      masks.append(group.spec.band.sees(at, at, key_at))
  if x.mask is not None:
    masks.append(lax.dynamic_slice(x.mask, *tile_of(x.mask, group, i, j)))
  for lengths, at in ((x.query_lengths, query_at), (x.key_lengths, key_at)):
    if lengths is not None:
      part = lax.dynamic_slice_in_dim(lengths, group.batch, plan.batch)
      masks.append(at < part[:, None, None, None, None])
  return masks


def dot(a: jax.Array, b: jax.Array, spec: Spec, dtype: Any) -> jax.Array:
  """(P, m, h), (P, n, h) -> (P, m, n)."""
  return jnp.einsum(
    "pmh,pnh->pmn",
    a,
    b,
    precision=spec.precision,
    preferred_element_type=dtype,
  )


def matmul(a: jax.Array, b: jax.Array, spec: Spec, dtype: Any) -> jax.Array:
  """(P, m, n), (P, n, h) -> (P, m, h)."""
  return jnp.matmul(
    a, b, precision=spec.precision, preferred_element_type=dtype
  )
