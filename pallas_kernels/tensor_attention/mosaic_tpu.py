r"""Tensor attention on a TPU: forward, and the gradients of all operands.

Scores of a block of queries and one first key are those of exact attention to
the keys :math:`k^1_j \circ k^2_l`. A product of matrices needs the queries and
a block of *paired* keys; keys are paired in VMEM, one first key at a time, by
multiplying a block of second keys by a row. That costs a number in block_q of
the arithmetic, moves nothing, and a block that has come in is used for as many
tiles as there are first keys beside it: per word moved, a matrix unit gets
block_1 times the work of exact attention. Pairing the queries instead would be
as cheap forward; backward it would take six products a tile, since the gradient
of a pair is that of both its factors, and would not come out by itself.

Forward, one block of queries after another: blocks of first keys pass by, with
each of them those of second keys, and the online softmax of exact attention
keeps (o, m, l) in scratch. Backward, with :math:`\delta_i = \bar o_i \cdot
o_i`, weights :math:`p_{ijl}` and :math:`\bar s_{ijl} = p_{ijl} (\bar o_i \cdot
(v^1_j \circ v^2_l) - \delta_i)`, takes one pass and five products a tile, the
fewest there are:

.. math::

  \bar q_i = \sum_{j, l} \bar s_{ijl}\, k^1_j \circ k^2_l, \quad
  u_{jl} = \sum_i \bar s_{ijl} q_i, \quad
  \bar k^1_j = \sum_l k^2_l \circ u_{jl}, \quad
  \bar k^2_l = \sum_j k^1_j \circ u_{jl},

and values alike. One block of second keys after another, all queries pass by.
Three gradients are sums over two of the three axes that no order of the tiles
makes consecutive, so those of queries and of first keys stay in VMEM all the
while; where they do not fit, the kernel is called for a slab of each after
another. Three passes, each for what it can sum up, would take eleven products.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._compat import out_struct, pl, pltpu, vary_with
from pallas_kernels._products import accumulator, precision_of, tpu_reason
from pallas_kernels.flash_attention import _blocks, _tpu_arrays
from pallas_kernels.tensor_attention import config
from pallas_kernels.tensor_attention._tpu_kernels import (
  ZERO,
  Plan,
  backward_kernel,
  forward_kernel,
)
from pallas_kernels.tensor_attention.operands import (
  Gradients,
  Operands,
  Options,
)

# Behind all queries.
_NEVER = np.iinfo(np.int32).max

Arrays = tuple[jax.Array, ...]


def supports(x: Operands, options: Options) -> str | None:
  """Why these operands cannot use the kernels; None if they can."""
  dtypes = jnp.float32, jnp.bfloat16
  reason = tpu_reason(x.query.dtype, dtypes, options.precision)
  return reason or config.tpu_reason(x, options)


def forward(
  x: Operands, options: Options, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
  """Output and log-sum-exp.

  Args:
    x: the operands.
    options: static facts; block sizes of None are those of ``config``.
    interpret: True, or ``pltpu.InterpretParams``, to run anywhere.

  Returns:
    (B, T, N, Hv) and (B, T, N) of the accumulator's dtype: a gradient is a
    difference from what the output says, which rounding would spoil.

  Cost:
    2 T S1 S2 (H + Hv) flops a head; moves Q and O once, and K2 and V2 once for
    each block of queries and of first keys that sees them.
  """
  call = _Call(x, options, backward=False, interpret=interpret)
  plan, hv = call.plan, x.value1.shape[-1]
  specs = _Specs(plan, _by_queries)
  rows = plan.num_q * plan.rows
  out, lse = call.run(
    "forward",
    forward_kernel,
    (plan.num_q, plan.num_1, plan.num_2),
    np.zeros(2, np.int32),
    [
      (call.rows(x.query), specs.rows(x.query.shape[-1])),
      *call.with_specs(specs, call.firsts, call.seconds),
    ],
    [
      ((rows, hv), call.dtype, specs.rows(hv)),
      ((1, rows), call.dtype, specs.lanes()),
    ],
    [(hv, plan.rows), (1, plan.rows), (1, plan.rows)],
  )
  return call.from_rows(out), call.from_rows(jnp.swapaxes(lse, 2, 3))[..., 0]


def backward(
  x: Operands,
  options: Options,
  out: jax.Array,
  lse: jax.Array,
  out_bar: jax.Array,
  *,
  interpret: Any = False,
) -> Gradients:
  """Cotangents of all operands but the masks.

  Args:
    x: the operands.
    options: static facts.
    out: (B, T, N, Hv), from the forward pass.
    lse: (B, T, N), from the forward pass.
    out_bar: cotangent of ``out``.
    interpret: as in ``forward``.

  Returns:
    Each of its operand's shape and dtype.

  Cost:
    T S1 S2 (6 H + 4 Hv) flops a head; moves all operands once for each slab of
    queries and of first keys, and queries for each block of second keys too.
  """
  call = _Call(x, options, backward=True, interpret=interpret)
  plan, dtype = call.plan, call.dtype
  delta = (out_bar.astype(dtype) * out).sum(-1)
  # A query that sees nothing has lse -inf; +inf makes its weights 0, not NaN.
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse.astype(dtype))
  queries = (
    *_slabs(2, call.num_slabs, call.rows(x.query)),
    *_slabs(2, call.num_slabs, call.rows(out_bar.astype(x.query.dtype))),
    *_slabs(3, call.num_slabs, call.lanes(lse, np.inf), call.lanes(delta)),
  )
  key1, value1, since1 = call.firsts
  firsts = (
    *_slabs(2, call.num_firsts, key1, value1),
    *_slabs(1, call.num_firsts, since1),
  )
  starts = call.num_slabs, plan.num_q * plan.block_q
  starts1 = call.num_firsts, plan.block_1

  def of_queries(sums: Any, slab: Any) -> Any:
    (ones, twos), (start, queries) = sums, slab

    def of_firsts(sums: Any, slab: Any) -> Any:
      start1, firsts = slab
      both = jnp.stack([start, start1])
      query, ones, twos = call.gradients(both, queries, firsts)
      return jax.tree.map(jnp.add, sums, (query, twos)), ones

    (query, twos), more = lax.scan(
      of_firsts,
      (call.zeros(call.query_bar), twos),
      (_every(*starts1), firsts),
    )
    return (jax.tree.map(jnp.add, ones, more), twos), query

  ones, twos = (
    tuple(call.zeros(y.shape) for y in pair)
    for pair in (firsts[:2], call.seconds[:2])
  )
  (ones, twos), query = lax.scan(
    of_queries, (ones, twos), (_every(*starts), queries)
  )
  # (slabs, B, K, blocks, H, rows).
  query = jnp.moveaxis(jnp.swapaxes(query, 4, 5), 0, 2)
  query = query.reshape(*query.shape[:2], -1, query.shape[-1])
  key1, value1 = (
    jnp.moveaxis(y, 0, 2).reshape(*y.shape[1:3], -1, y.shape[4]) for y in ones
  )
  bars = Gradients(
    call.from_rows(query),
    _tpu_arrays.from_keys(key1, x.key1.shape[1]),
    _tpu_arrays.from_keys(twos[0], x.key2.shape[1]),
    _tpu_arrays.from_keys(value1, x.value1.shape[1]),
    _tpu_arrays.from_keys(twos[1], x.value2.shape[1]),
  )
  return Gradients(*(y.astype(z.dtype) for y, z in zip(bars, x)))


def _slabs(axis: int, num: int, *arrays: jax.Array) -> Arrays:
  """Cuts an axis into ``num`` parts, along a new first one."""

  def cut(y: jax.Array) -> jax.Array:
    y = y.reshape(*y.shape[:axis], num, -1, *y.shape[axis + 1 :])
    return jnp.moveaxis(y, axis, 0)

  return tuple(map(cut, arrays))


def _every(num: int, step: int) -> jax.Array:
  return step * jnp.arange(num, dtype=jnp.int32)


def _by_queries(plan: Plan, *ids: Any) -> Any:
  """Grid (B, K, num_q, num_1, num_2): pairs of blocks of keys pass by."""
  b, k, i, a, c, starts = ids
  one = plan.num_first(starts, i) - 1
  two = plan.num_second(starts, i) - 1
  # Steps past the end stay, and move nothing.
  c = jnp.where(a <= one, lax.min(c, two), two)
  return b, k, i, lax.min(a, one), c


def _by_seconds(plan: Plan, *ids: Any) -> Any:
  """Grid (B, K, num_2, num_q): queries pass by a block of second keys."""
  b, k, c, step, starts = ids
  i = plan.lowest_query(starts, c) + step
  return b, k, lax.min(i, np.int32(plan.num_q - 1)), ZERO, c


class _Specs:
  """Block specs of a pass."""

  def __init__(self, plan: Plan, at: Callable[..., Any]):
    """``at(plan, *grid ids, starts)`` gives (b, k, i, a, c)."""
    self.plan, self.at = plan, at

  def _spec(self, shape: Any, index: Callable[..., Any]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *ids: index(*self.at(self.plan, *ids)))

  def rows(self, size: int) -> pl.BlockSpec:
    """Of (B, K, R, size)."""
    shape = None, None, self.plan.rows, size
    return self._spec(shape, lambda b, k, i, a, c: (b, k, i, ZERO))

  def lanes(self) -> pl.BlockSpec:
    """Of (B, K, 1, R)."""
    shape = None, None, 1, self.plan.rows
    return self._spec(shape, lambda b, k, i, a, c: (b, k, ZERO, i))

  def first(self, size: int) -> pl.BlockSpec:
    """Of (B, K, S1, size)."""
    shape = None, None, self.plan.block_1, size
    return self._spec(shape, lambda b, k, i, a, c: (b, k, a, ZERO))

  def second(self, size: int) -> pl.BlockSpec:
    """Of (B, K, S2, size)."""
    shape = None, None, self.plan.block_2, size
    return self._spec(shape, lambda b, k, i, a, c: (b, k, c, ZERO))

  def since(self) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """Of (B, S1, 1) and (B, S2, 1)."""
    one, two = (None, self.plan.block_1, 1), (None, self.plan.block_2, 1)
    return (
      self._spec(one, lambda b, k, i, a, c: (b, a, ZERO)),
      self._spec(two, lambda b, k, i, a, c: (b, c, ZERO)),
    )

  def queries(self, size: int) -> pl.BlockSpec:
    """Of (B, K, num_q, size, rows), all blocks at once."""
    shape = None, None, self.plan.num_q, size, self.plan.rows
    return self._spec(shape, lambda b, k, i, a, c: (b, k, ZERO, ZERO, ZERO))


class _Call:
  """One call, cut into blocks."""

  def __init__(
    self, x: Operands, options: Options, *, backward: bool, interpret: Any
  ):
    sizes = config.tpu_block_sizes(x, options, exact=bool(interpret))
    self.x, self.interpret = x, interpret
    self.dtype = accumulator(x.query.dtype)
    (b, t, n, _), (s1, k), s2 = (
      x.query.shape,
      x.key1.shape[1:3],
      x.key2.shape[1],
    )
    end = "_bwd" if backward else ""
    block_q, block_1, block_2 = (
      getattr(sizes, f"block_{axis}{end}") for axis in ("q", "k1", "k2")
    )
    num_q, num_1, num_2 = -(-t // block_q), -(-s1 // block_1), -(-s2 // block_2)
    self.num_slabs = self.num_firsts = 1
    if backward:
      self.num_slabs = -(-num_q // (sizes.slab_q_bwd // block_q))
      # Even ones, so that little is padded.
      num_q = -(-num_q // self.num_slabs)
      self.num_firsts, num_1 = num_1, 1
    self.plan = Plan(
      n // k, block_q, block_1, block_2, num_q, num_1, num_2, t, s1, s2,
      options.is_causal, x.key_mask1 is not None or x.key_mask2 is not None,
      precision_of(options.precision),
    )  # fmt: skip
    self.batch = b, k
    # How exact attention lays out queries and second keys.
    self.layout = _blocks.Plan(
      b, k, n // k, self.num_slabs * num_q, num_2, block_q, block_2, None, None,
      False, False,
    )  # fmt: skip
    firsts = self.layout._replace(
      num_k=num_1 * self.num_firsts, block_k=block_1
    )
    self.firsts = self._keys(x.key1, x.value1, x.key_mask1, firsts)
    self.seconds = self._keys(x.key2, x.value2, x.key_mask2, self.layout)

  @property
  def query_bar(self) -> tuple[int, ...]:
    """Shape of the gradient of a slab of queries."""
    plan = self.plan
    return *self.batch, plan.num_q, self.x.query.shape[-1], plan.rows

  def rows(self, y: jax.Array) -> jax.Array:
    """(B, T, N, H) -> (B, K, R, H)."""
    return _tpu_arrays.rows_of(y, self.layout)

  def lanes(self, y: jax.Array, fill: float = 0) -> jax.Array:
    """(B, T, N) -> (B, K, 1, R)."""
    return _tpu_arrays.lanes_of(y, self.layout, fill)

  def from_rows(self, y: jax.Array) -> jax.Array:
    """(B, K, R, H) -> (B, T, N, H)."""
    return _tpu_arrays.from_rows(y, self.layout, self.x.query.shape[1])

  def zeros(self, shape: tuple[int, ...]) -> jax.Array:
    """Where a sum starts."""
    return vary_with(jnp.zeros(shape, self.dtype), self.x)

  def _keys(
    self, key: jax.Array, value: jax.Array, mask: Any, layout: _blocks.Plan
  ) -> Arrays:
    """Keys, values, and the first position that sees them, (B, S, 1)."""
    b, s = key.shape[:2]
    at = np.arange(s) if self.plan.is_causal else np.zeros(s)
    since = jnp.broadcast_to(at.astype(np.int32), (b, s))
    if mask is not None:
      since = jnp.where(mask, since, _NEVER)
      # 0 * NaN is NaN.
      seen = mask[:, :, None, None]
      key, value = (jnp.where(seen, y, 0) for y in (key, value))
    size = layout.num_k * layout.block_k
    since = jnp.pad(since, ((0, 0), (0, size - s)), constant_values=_NEVER)
    keys, values = (_tpu_arrays.keys_of(y, layout) for y in (key, value))
    return keys, values, since[..., None]

  def with_specs(self, specs: _Specs, firsts: Arrays, seconds: Arrays) -> Any:
    """Keys and values, as the kernels take them."""
    h, hv = self.x.query.shape[-1], self.x.value1.shape[-1]
    kinds = (
      specs.first(h), specs.second(h), specs.first(hv), specs.second(hv),
      *specs.since(),
    )  # fmt: skip
    arrays = (y for pair in zip(firsts, seconds) for y in pair)
    return list(zip(arrays, kinds, strict=True))

  def gradients(
    self, starts: jax.Array, queries: Arrays, firsts: Arrays
  ) -> tuple[jax.Array, Arrays, Arrays]:
    """Shares of a slab of queries and one of first keys in all gradients.

    Args:
      starts: (2,) positions of the first query and of the first first key.
      queries: queries, their cotangents, log-sum-exp and delta.
      firsts: first keys, values, and who sees them.

    Returns:
      Gradients of queries, of first and of second keys and values.
    """
    plan, specs = self.plan, _Specs(self.plan, _by_seconds)
    query, bar, lse, delta = queries
    h, hv = query.shape[-1], bar.shape[-1]
    ones = [((plan.block_1, y), self.dtype, specs.first(y)) for y in (h, hv)]
    length = plan.num_2 * plan.block_2
    twos = [((length, y), self.dtype, specs.second(y)) for y in (h, hv)]
    query_bar, key1, key2, value1, value2 = self.run(
      "backward",
      backward_kernel,
      (plan.num_2, plan.num_q),
      starts,
      [
        (query, specs.rows(h)),
        *self.with_specs(specs, firsts, self.seconds),
        (bar, specs.rows(hv)),
        (lse, specs.lanes()),
        (delta, specs.lanes()),
      ],
      [
        (self.query_bar[2:], self.dtype, specs.queries(h)),
        ones[0], twos[0], ones[1], twos[1],
      ],
      [],
      parallel=0,
    )  # fmt: skip
    return query_bar, (key1, value1), (key2, value2)

  def run(
    self,
    name: str,
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    starts: Any,
    inputs: list[Any],
    outputs: list[Any],
    scratch: list[tuple[int, ...]],
    parallel: int = 1,
  ) -> Any:
    """Calls a kernel for each key head; ``parallel`` axes of ``grid`` are."""
    arrays = [array for array, _ in inputs]
    semantics = ("parallel",) * (2 + parallel)
    return pl.pallas_call(
      functools.partial(kernel, self.plan),
      out_shape=[
        out_struct((*self.batch, *shape), dtype, arrays)
        for shape, dtype, _ in outputs
      ],
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(*self.batch, *grid),
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, _, spec in outputs],
        scratch_shapes=[pltpu.VMEM(shape, self.dtype) for shape in scratch],
      ),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=semantics + ("arbitrary",) * (len(grid) - parallel)
      ),
      interpret=self.interpret,
      name=f"tensor_attention_{name}",
    )(jnp.asarray(starts), *arrays)
