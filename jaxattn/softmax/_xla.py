"""Tiled exact attention in plain JAX: the forward pass and its gradient.

The work is cut into groups of heads, and a group into tiles. On a CPU a group
is as many heads as fill one tile, and its tensors stay in cache; elsewhere one
group holds all heads. Within a group, arrays are

    query (P, G, T, H), key (P, S, H), value (P, S, Hv),

with P pairs of batch element and key head and G query heads for each of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _compat
from jaxattn.softmax import _tiles
from jaxattn.softmax import online
from pallas_kernels.flash_attention import BlockSizes

# Scores of a tile on a CPU: 2 MiB in float32, what two cores keep in L2.
_CPU_TILE = 1024 * 512
_CPU_BLOCKS = BlockSizes(1024, 512, 2048, 256)
_ACCELERATOR_BLOCKS = BlockSizes(512, 512, 512, 512)


class Operands(NamedTuple):
  """Arrays of one call, in the layout of the public function, batched.

  Attributes:
    query: (B, T, K, G, H).
    key: (B, S, K, H).
    value: (B, S, K, Hv).
    bias: None or (B|1, K|1, G|1, T|1, S|1).
    mask: None or boolean, as bias.
    query_lengths: None or (B,) integers.
    key_lengths: None or (B,) integers.
    offset: () integer, position of query 0 among the keys.
  """

  query: jax.Array
  key: jax.Array
  value: jax.Array
  bias: jax.Array | None
  mask: jax.Array | None
  query_lengths: jax.Array | None
  key_lengths: jax.Array | None
  offset: jax.Array | None = None


class Spec(NamedTuple):
  """Static facts of one call."""

  scale: float
  band: _tiles.Band
  block_sizes: BlockSizes | None
  precision: Any


class _Group(NamedTuple):
  """One group of heads, cut out of the operands."""

  batch: Any
  head: Any
  query: jax.Array
  key: jax.Array
  value: jax.Array


class _Plan(NamedTuple):
  """Static sizes of the loops of one pass."""

  batch: int
  heads: int
  queries: _tiles.Axis
  keys: _tiles.Axis
  sizes: tuple[int, ...]

  @property
  def pairs(self) -> int:
    return self.batch * self.heads

  @property
  def tile(self) -> tuple[int, ...]:
    g = self.sizes[3]
    return self.batch, self.heads, g, self.queries.block, self.keys.block


def accumulator(dtype: Any) -> Any:
  """Dtype of sums: float32 for 16-bit inputs."""
  return jnp.promote_types(dtype, jnp.float32)


def forward(
  x: Operands, *, spec: Spec, cpu: bool
) -> tuple[jax.Array, jax.Array]:
  """Output (B, T, K, G, Hv) and log-sum-exp (B, T, K, G)."""
  plan = _plan(x, spec, cpu, backward=False)
  b, t, k, g = plan.sizes[:4]
  dtype, axes = accumulator(x.query.dtype), _compat.varying_axes(x)
  out = _compat.full_varying((b, t, k, g, x.value.shape[-1]), 0, dtype, axes)
  lse = _compat.full_varying((b, t, k, g), 0, dtype, axes)

  def step(group: _Group, carry: Any) -> Any:
    part, part_lse = _group_forward(x, group, plan, spec)
    out, lse = carry
    return (
      _put(out, part, group, plan),
      _put(lse[..., None], part_lse[..., None], group, plan)[..., 0],
    )

  out, lse = _over_groups(x, plan, cpu, step, (out, lse))
  return out.astype(x.query.dtype), lse


def _group_forward(
  x: Operands, group: _Group, plan: _Plan, spec: Spec
) -> tuple[jax.Array, jax.Array]:
  p, g, t, _ = group.query.shape
  rows, hv = g * plan.queries.block, group.value.shape[-1]
  dtype = accumulator(x.query.dtype)
  axes = _compat.varying_axes(x)
  full = functools.partial(_compat.full_varying, dtype=dtype, axes=axes)

  def query_block(i: Any, carry: Any) -> Any:
    query, after = _scaled_query(group.query, plan.queries, i, spec)

    def key_block(
      j: Any, state: online.OnlineSoftmax, edge: bool
    ) -> online.OnlineSoftmax:
      key, value = _key_value(x, group, plan, spec, i, j, edge)
      logits = _dot(query, key, spec, dtype)
      logits = _logits(logits, x, group, plan, spec, i, j, edge, after)
      return online.online_softmax_update(
        state, logits, value, precision=spec.precision
      )

    start = online.OnlineSoftmax(
      full((p, rows, hv), 0), full((p, rows), 0), full((p, rows), -jnp.inf)
    )
    state = _tiles.walk(_visit_keys(x, plan, spec, i), key_block, start)
    out, lse = online.online_softmax_finalize(state)
    at = _tiles.at(0, 0, plan.queries.start(i), 0)
    shape = (p, g, plan.queries.block)
    return (
      lax.dynamic_update_slice(carry[0], out.reshape(*shape, hv), at),
      lax.dynamic_update_slice(carry[1], lse.reshape(shape), at[:3]),
    )

  start = full((p, g, t, hv), 0), full((p, g, t), 0)
  return _tiles.loop(0, plan.queries.num_blocks, query_block, start)


class Gradients(NamedTuple):
  """Cotangents of query, key, value and bias, in the operands' layout."""

  query: jax.Array
  key: jax.Array
  value: jax.Array
  bias: jax.Array | None


def backward(
  x: Operands,
  out: jax.Array,
  lse: jax.Array,
  out_bar: jax.Array,
  lse_bar: jax.Array,
  *,
  spec: Spec,
  cpu: bool,
) -> Gradients:
  """Cotangents of the differentiable operands, by recomputing the weights."""
  plan = _plan(x, spec, cpu, backward=True)
  dtype = accumulator(x.query.dtype)
  axes = _compat.varying_axes(x, out_bar, lse_bar)

  def zeros(like: jax.Array | None) -> jax.Array | None:
    if like is None:
      return None
    return _compat.full_varying(like.shape, 0, dtype, axes)

  def step(group: _Group, total: Gradients) -> Gradients:
    def cut(y: jax.Array) -> jax.Array:
      return _cut_queries(y, group.batch, group.head, plan)

    delta = (cut(out_bar).astype(dtype) * cut(out).astype(dtype)).sum(-1)
    delta -= cut(lse_bar[..., None])[..., 0]
    part = _group_backward(
      x, group, plan, spec,
      cut(out_bar).astype(group.value.dtype),
      _safe_lse(cut(lse[..., None])[..., 0]), delta, total.bias, axes,
    )  # fmt: skip
    return Gradients(
      _put(total.query, part.query, group, plan),
      _put(total.key, part.key[:, None], group, plan),
      _put(total.value, part.value[:, None], group, plan),
      part.bias,
    )

  start = Gradients(*map(zeros, (x.query, x.key[:, :, :, None],
                                 x.value[:, :, :, None], x.bias)))
  total = _over_groups(x, plan, cpu, step, start)
  total = total._replace(key=total.key[:, :, :, 0], value=total.value[:, :, :, 0])
  return Gradients(
    *(
      None if like is None else y.astype(like.dtype)
      for y, like in zip(total, x[:4], strict=True)
    )
  )


def dense_backward(
  x: Operands,
  out: jax.Array,
  lse: jax.Array,
  out_bar: jax.Array,
  lse_bar: jax.Array,
  *,
  spec: Spec,
) -> Gradients:
  """The formula of :func:`backward` on whole (T, S) arrays.

  Differentiable to any order; takes O(T S) memory.
  """
  b, t, k, g, _ = x.query.shape
  plan = _Plan(
    b, k, _tiles.Axis(t, t), _tiles.Axis(x.key.shape[1], x.key.shape[1]),
    (b, t, k, g, x.key.shape[1]),
  )  # fmt: skip
  group = _Group(0, 0, x.query, x.key, x.value)
  dtype = accumulator(x.query.dtype)
  wide = functools.partial(jax.tree.map, lambda y: y.astype(dtype))
  query, key, value, out, out_bar = wide((*x[:3], out, out_bar))
  einsum = functools.partial(jnp.einsum, precision=spec.precision)
  logits = einsum("btkgh,bskh->bkgts", query, key)
  logits = _logits(logits, x, group, plan, spec, 0, 0, True, spec.scale)
  by_query = functools.partial(jnp.einsum, "btkg->bkgt")
  weights = jnp.exp(logits - by_query(_safe_lse(lse))[..., None])
  delta = by_query((out_bar * out).sum(-1) - lse_bar)[..., None]
  score_bar = einsum("btkgh,bskh->bkgts", out_bar, value) - delta
  score_bar *= weights
  bias_bar = None
  if x.bias is not None:
    reduce = tuple(d for d in range(5) if x.bias.shape[d] == 1)
    bias_bar = score_bar.sum(reduce, keepdims=True).astype(x.bias.dtype)
  query_bar = einsum("bkgts,bskh->btkgh", score_bar, key) * spec.scale
  key_bar = einsum("bkgts,btkgh->bskh", score_bar, query) * spec.scale
  value_bar = einsum("bkgts,btkgh->bskh", weights, out_bar)
  return Gradients(
    query_bar.astype(x.query.dtype),
    key_bar.astype(x.key.dtype),
    value_bar.astype(x.value.dtype),
    bias_bar,
  )


def _group_backward(
  x: Operands,
  group: _Group,
  plan: _Plan,
  spec: Spec,
  out_bar: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  bias_bar: jax.Array | None,
  axes: frozenset[str],
) -> Gradients:
  # Scores are kept transposed, (keys, queries): then four of the five products
  # are plain ones, and the fifth gives the transposed query gradient from the
  # keys transposed once.
  p, g, t, h = group.query.shape
  rows, keys = g * plan.queries.block, plan.keys
  hv = group.value.shape[-1]
  dtype = accumulator(x.query.dtype)
  full = functools.partial(_compat.full_varying, dtype=dtype, axes=axes)
  key_t = jnp.swapaxes(group.key, 1, 2)

  def flat(y: jax.Array, i: Any) -> jax.Array:
    block = lax.dynamic_slice_in_dim(
      y, plan.queries.start(i), plan.queries.block, 2
    )
    return block.reshape(p, rows, *y.shape[3:])

  def key_block(j: Any, carry: Any) -> Any:
    def query_block(i: Any, carry: Any, edge: bool) -> Any:
      query_bar, key_bar, value_bar, bias_bar = carry
      query, after = _scaled_query(group.query, plan.queries, i, spec)
      key, value = _key_value(x, group, plan, spec, i, j, edge)
      o_bar = flat(out_bar, i)
      logits = _dot(key, query, spec, dtype)
      logits = _logits(
        logits, x, group, plan, spec, i, j, edge, after, transposed=True
      )
      weights = jnp.exp(logits - flat(lse, i)[:, None])
      value_bar += _matmul(weights.astype(o_bar.dtype), o_bar, spec, dtype)
      score_bar = _dot(value, o_bar, spec, dtype) - flat(delta, i)[:, None]
      score_bar *= weights
      if bias_bar is not None:
        bias_bar = _add_bias_bar(bias_bar, score_bar, group, plan, i, j)
      score_bar = score_bar.astype(query.dtype)
      key_bar += _matmul(score_bar, query, spec, dtype) * after
      part = _matmul(_key_t(key_t, key, keys, j, edge), score_bar, spec, dtype)
      query_bar = _add_query_bar(query_bar, part, g, plan.queries, i)
      return query_bar, key_bar, value_bar, bias_bar

    query_bar, key_bar, value_bar, bias_bar = carry
    start = (
      query_bar,
      full((p, keys.block, h), 0),
      full((p, keys.block, hv), 0),
      bias_bar,
    )
    v = _visit_queries(x, plan, spec, j)
    query_bar, key_part, value_part, bias_bar = _tiles.walk(
      v, query_block, start
    )
    return (
      query_bar,
      _add_at(key_bar, key_part, keys, j),
      _add_at(value_bar, value_part, keys, j),
      bias_bar,
    )

  start = (
    full((p, h, g, t), 0),
    full((p, keys.size, h), 0),
    full((p, keys.size, hv), 0),
    bias_bar,
  )
  query_bar, key_bar, value_bar, bias_bar = _tiles.loop(
    0, keys.num_blocks, key_block, start
  )
  query_bar = jnp.moveaxis(query_bar, 1, 3) * spec.scale
  return Gradients(query_bar, key_bar, value_bar, bias_bar)


def _key_t(
  key_t: jax.Array, key: jax.Array, axis: _tiles.Axis, j: Any, edge: bool
) -> jax.Array:
  # At an edge, hidden keys were zeroed: take those, not the stored ones.
  if edge:
    return jnp.swapaxes(key, 1, 2)
  return lax.dynamic_slice_in_dim(key_t, axis.start(j), axis.block, 2)


def _add_query_bar(
  total: jax.Array, part: jax.Array, g: int, axis: _tiles.Axis, i: Any
) -> jax.Array:
  p, h = part.shape[:2]
  part = part.reshape(p, h, g, axis.block)
  at = _tiles.at(0, 0, 0, axis.start(i))
  return lax.dynamic_update_slice(
    total, lax.dynamic_slice(total, at, part.shape) + part, at
  )


def _add_at(
  total: jax.Array, part: jax.Array, axis: _tiles.Axis, j: Any
) -> jax.Array:
  if axis.ragged:
    old = lax.dynamic_slice_in_dim(total, axis.start(j), axis.block, 1)
    part += old
  return lax.dynamic_update_slice_in_dim(total, part, axis.start(j), 1)


def _add_bias_bar(
  total: jax.Array, score_bar: jax.Array, group: _Group, plan: _Plan,
  i: Any, j: Any,
) -> jax.Array:  # fmt: skip
  b, k, g, q, s = plan.tile
  part = jnp.moveaxis(score_bar.reshape(b, k, s, g, q), 2, 4)
  at, sizes = _tile_of(total, group, plan, i, j)
  reduce = tuple(d for d in range(5) if total.shape[d] == 1)
  part = part.sum(reduce, keepdims=True)
  return lax.dynamic_update_slice(
    total, lax.dynamic_slice(total, at, sizes) + part, at
  )


def _plan(x: Operands, spec: Spec, cpu: bool, backward: bool) -> _Plan:
  b, t, k, g, _ = x.query.shape
  s = x.key.shape[1]
  blocks = spec.block_sizes or (_CPU_BLOCKS if cpu else _ACCELERATOR_BLOCKS)
  block_q = blocks.block_q_bwd if backward else blocks.block_q
  block_k = blocks.block_k_bwd if backward else blocks.block_k
  if spec.block_sizes is None:
    block_q = max(1, block_q // g)
  queries = _tiles.Axis(t, min(t, block_q))
  keys = _tiles.Axis(s, min(s, block_k))
  pairs = b * k
  if cpu:
    pairs = max(1, _CPU_TILE // (g * queries.block * keys.block))
  if pairs < k:
    heads = _largest_divisor(k, pairs)
    return _Plan(1, heads, queries, keys, (b, t, k, g, s))
  batch = _largest_divisor(b, pairs // k)
  return _Plan(batch, k, queries, keys, (b, t, k, g, s))


def _largest_divisor(n: int, at_most: int) -> int:
  return max(d for d in range(1, min(n, at_most) + 1) if n % d == 0)


def _over_groups(
  x: Operands, plan: _Plan, cpu: bool, step: Any, carry: Any
) -> Any:
  b, _, k, _, _ = plan.sizes
  per_row = k // plan.heads

  def group_at(n: Any) -> _Group:
    batch, head = n // per_row * plan.batch, n % per_row * plan.heads
    group = _Group(
      batch,
      head,
      _cut_queries(x.query, batch, head, plan),
      _cut_queries(x.key[:, :, :, None], batch, head, plan)[:, 0],
      _cut_queries(x.value[:, :, :, None], batch, head, plan)[:, 0],
    )
    if not cpu:
      return group
    # A CPU multiplies in float32 anyway: widen once, not in every tile.
    wide = accumulator(x.query.dtype)
    return group._replace(
      query=group.query.astype(wide),
      key=group.key.astype(wide),
      value=group.value.astype(wide),
    )

  num = (b // plan.batch) * per_row
  if num == 1:
    return step(group_at(0), carry)
  return _tiles.loop(0, num, lambda n, c: step(group_at(n), c), carry)


def _cut_queries(y: jax.Array, batch: Any, head: Any, plan: _Plan) -> jax.Array:
  """(B, L, K, G, H) -> (P, G, L, H) of one group."""
  sizes = (plan.batch, y.shape[1], plan.heads, *y.shape[3:])
  block = lax.dynamic_slice(y, _tiles.at(batch, 0, head, 0, 0), sizes)
  block = block.transpose(0, 2, 3, 1, 4)
  return block.reshape(plan.pairs, *block.shape[2:])


def _put(
  total: jax.Array, part: jax.Array, group: _Group, plan: _Plan
) -> jax.Array:
  """Writes (P, G, L, H) of one group into (B, L, K, G, H)."""
  part = part.reshape(plan.batch, plan.heads, *part.shape[1:])
  part = part.transpose(0, 3, 1, 2, 4)
  if part.shape == total.shape:
    return part
  at = _tiles.at(group.batch, 0, group.head, 0, 0)
  return lax.dynamic_update_slice(total, part, at)


def _scaled_query(
  query: jax.Array, axis: _tiles.Axis, i: Any, spec: Spec
) -> tuple[jax.Array, float]:
  """Block ``i`` as (P, rows, H), and the factor still due on its logits."""
  p, g, _, h = query.shape
  block = lax.dynamic_slice_in_dim(query, axis.start(i), axis.block, 2)
  block = block.reshape(p, g * axis.block, h)
  if query.dtype == accumulator(query.dtype):
    return block * spec.scale, 1.0
  # Scaling a 16-bit query would round it: scale the float32 logits instead.
  return block, spec.scale


def _key_value(
  x: Operands, group: _Group, plan: _Plan, spec: Spec, i: Any, j: Any,
  edge: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  start, block = plan.keys.start(j), plan.keys.block
  key = lax.dynamic_slice_in_dim(group.key, start, block, 1)
  value = lax.dynamic_slice_in_dim(group.value, start, block, 1)
  if not (edge and spec.band.bounded):
    return key, value
  # Zero what no query of the block sees: 0 * NaN would spoil the products.
  queries = plan.queries.positions(i) + _offset(x)
  seen = _in_band(spec.band, queries[0], plan.keys.positions(j), queries[-1])
  return (
    jnp.where(seen[:, None], key, 0),
    jnp.where(seen[:, None], value, 0),
  )


def _in_band(
  band: _tiles.Band, first: Any, keys: jax.Array, last: Any
) -> jax.Array:
  seen = jnp.bool_(True)
  if band.before is not None:
    seen = seen & (keys >= first - band.before)
  if band.after is not None:
    seen = seen & (keys <= last + band.after)
  return seen


def _offset(x: Operands) -> jax.Array | int:
  return 0 if x.offset is None else x.offset


def _visit_keys(x: Operands, plan: _Plan, spec: Spec, i: Any) -> _tiles.Visit:
  first = plan.queries.start(i) + _offset(x)
  last = first + plan.queries.block - 1
  return _tiles.visit(plan.keys, first, last, spec.band)


def _visit_queries(
  x: Operands, plan: _Plan, spec: Spec, j: Any
) -> _tiles.Visit:
  first = plan.keys.start(j) - _offset(x)
  last = first + plan.keys.block - 1
  v = _tiles.visit(plan.queries, first, last, spec.band.flip())
  if not plan.keys.ragged:
    return v
  # The last key block repeats keys of the one before it: mask all of it.
  inner_high = jnp.where(
    j == plan.keys.num_blocks - 1, v.inner_low, v.inner_high
  )
  return v._replace(inner_high=inner_high)


def _tile_of(
  y: jax.Array, group: _Group, plan: _Plan, i: Any, j: Any
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
  """Start and sizes of a tile in an array broadcast over (B, K, G, T, S)."""
  at = (group.batch, group.head, 0, plan.queries.start(i), plan.keys.start(j))
  at = (a if n > 1 else 0 for a, n in zip(at, y.shape, strict=True))
  sizes = tuple(
    size if n > 1 else 1 for size, n in zip(plan.tile, y.shape, strict=True)
  )
  return _tiles.at(*at), sizes


def _logits(
  logits: jax.Array,
  x: Operands,
  group: _Group,
  plan: _Plan,
  spec: Spec,
  i: Any,
  j: Any,
  edge: bool,
  factor: float,
  transposed: bool = False,
) -> jax.Array:
  """Adds scale, bias and mask to the products of one tile."""
  b, k, g, q, s = plan.tile
  shape = logits.shape
  tile = (b, k, s, g, q) if transposed else (b, k, g, q, s)

  def oriented(y: jax.Array) -> jax.Array:
    return jnp.moveaxis(y, 4, 2) if transposed else y

  logits = logits.reshape(tile)
  if factor != 1.0:
    logits *= factor
  if x.bias is not None:
    bias = lax.dynamic_slice(x.bias, *_tile_of(x.bias, group, plan, i, j))
    logits += oriented(bias).astype(logits.dtype)
  for visible in _visible(x, group, plan, spec, i, j, edge, transposed):
    logits = jnp.where(oriented(visible), logits, -jnp.inf)
  return logits.reshape(shape)


def _visible(
  x: Operands, group: _Group, plan: _Plan, spec: Spec, i: Any, j: Any,
  edge: bool, transposed: bool,
) -> list[jax.Array]:  # fmt: skip
  """Masks of one tile, each broadcastable to (B, K, G, T, S)."""
  masks = []
  rows = plan.queries.positions(i)[None, None, None, :, None]
  cols = plan.keys.positions(j)[None, None, None, None, :]
  if edge:
    masks.append(plan.keys.owned(j)[None, None, None, None, :])
    if transposed:  # forward rows are recomputed, backward ones must not count
      masks.append(plan.queries.owned(i)[None, None, None, :, None])
    if spec.band.bounded:
      at = rows + _offset(x)
      masks.append(_in_band(spec.band, at, cols, at))
  if x.mask is not None:
    masks.append(
      lax.dynamic_slice(x.mask, *_tile_of(x.mask, group, plan, i, j))
    )
  for lengths, positions in ((x.query_lengths, rows), (x.key_lengths, cols)):
    if lengths is not None:
      part = lax.dynamic_slice_in_dim(lengths, group.batch, plan.batch)
      masks.append(positions < part[:, None, None, None, None])
  return masks


def _safe_lse(lse: jax.Array) -> jax.Array:
  # A query that sees nothing has lse -inf; +inf makes its weights 0, not NaN.
  return jnp.where(jnp.isneginf(lse), jnp.inf, lse)


def _dot(a: jax.Array, b: jax.Array, spec: Spec, dtype: Any) -> jax.Array:
  """(P, m, h), (P, n, h) -> (P, m, n)."""
  return jnp.einsum(
    "pmh,pnh->pmn", a, b,
    precision=spec.precision, preferred_element_type=dtype,
  )  # fmt: skip


def _matmul(a: jax.Array, b: jax.Array, spec: Spec, dtype: Any) -> jax.Array:
  return jnp.matmul(
    a, b, precision=spec.precision, preferred_element_type=dtype
  )
