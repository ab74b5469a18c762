r"""Attention for a small cache on a TPU: forward, and all gradients.

Where even a few rows of queries and keys do not fit into the cache, scores go
through slow memory, and every phase is one product of matrices in tiles, with
what else there is to do on a tile fused to its ends (arXiv 2410.09397):

* :math:`S = \text{scale} \cdot Q K^\top`, with :math:`L = \log \sum_j e^{S}` as
  tiles pass by;
* :math:`O = e^{S - L} V`, the exponential as strips of S come in.

Backward, with :math:`D = \sum_c \bar O \circ O`:

* :math:`P = e^{\text{scale} \cdot Q K^\top - L}`;
* :math:`\bar V = P^\top \bar O`;
* :math:`\bar S = P \circ (\bar O V^\top - D)`;
* :math:`\bar Q = \text{scale} \cdot \bar S K`;
* :math:`\bar K = \text{scale} \cdot \bar S^\top Q`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._compat import out_struct, pl, pltpu
from pallas_kernels._products import (
  FIRST,
  LAST,
  MIDDLE,
  accumulator,
  dot,
  tpu_reason,
)
from pallas_kernels.small_cache_attention import _tpu_plan, config
from pallas_kernels.small_cache_attention._tpu_plan import Grid, Plan, Specs
from pallas_kernels.small_cache_attention.operands import (
  Gradients,
  Operands,
  Options,
)


def supports(x: Operands, options: Options) -> str | None:
  """Why these operands cannot use the kernels; None if they can."""
  dtypes = jnp.float32, jnp.bfloat16
  reason = tpu_reason(x.query.dtype, dtypes, None)
  return reason or config.tpu_reason(x, options)


def forward(
  x: Operands, options: Options, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
  """Output and log-sum-exp.

  Args:
    x: the operands.
    options: static facts.
    interpret: True, or ``pltpu.InterpretParams``, to run anywhere.

  Returns:
    (B, T, N, Hv) of the queries' dtype, and (B, T, N) of the accumulator's.

  Cost:
    2 T S (H + Hv) flops a head, and T S scores in slow memory; moves about
    4 T S H / b words with tiles of b x b, and 2 T S more.
  """
  call = _Call(x, options, interpret)
  plan = call.plan
  query = _tpu_plan.rows_of(x.query, plan)
  key, value = (_tpu_plan.keys_of(y, plan) for y in (x.key, x.value))
  wide = accumulator(x.query.dtype)
  heads, keys, rows = len(query), plan.padded_keys, plan.rows
  h, hv = x.query.shape[-1], x.value.shape[-1]

  grid = _tpu_plan.scores_by_rows(plan, h)
  specs = Specs(plan, grid, h)
  logits, lse = call.run(
    "scores",
    functools.partial(_scores_kernel, plan),
    grid,
    [(key, specs.key_strip()), (query, specs.row_strip())],
    [
      ((heads, keys, rows), wide, specs.scores()),
      ((heads, 1, rows), wide, specs.lanes()),
    ],
    [(plan.block_k, plan.block_q), (1, plan.block_q), (1, plan.block_q)],
  )
  grid = _tpu_plan.sums_over_keys(plan, hv)
  specs = Specs(plan, grid, hv)
  out = call.product(
    "values",
    grid,
    [
      (logits, specs.scores_of_rows()),
      (value, specs.terms()),
      (lse, specs.lanes()),
    ],
    ((heads, rows, value.shape[-1]), x.query.dtype, specs.row_tile()),
    FIRST,
    before=_weights,
  )
  lse = _tpu_plan.from_lanes(lse, plan)
  return _tpu_plan.from_rows(out, plan, hv), lse


def backward(
  x: Operands,
  options: Options,
  out: jax.Array,
  lse: jax.Array,
  out_bar: jax.Array,
  *,
  interpret: Any = False,
) -> Gradients:
  """Cotangents of query, key and value.

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
    2 T S (3 H + 2 Hv) flops a head, and T S weights and their cotangents in
    slow memory; moves about 10 T S H / b words, and 4 T S more.
  """
  call = _Call(x, options, interpret)
  plan = call.plan
  narrow, wide = x.query.dtype, accumulator(x.query.dtype)
  delta = (out_bar.astype(wide) * out.astype(wide)).sum(-1)
  # Rows that only fill a tile: lse +inf makes their weights 0.
  lse = _tpu_plan.lanes_of(lse.astype(wide), plan, np.inf)
  delta = _tpu_plan.lanes_of(delta, plan)
  query, bar = (
    _tpu_plan.rows_of(y, plan) for y in (x.query, out_bar.astype(narrow))
  )
  key, value = (_tpu_plan.keys_of(y, plan) for y in (x.key, x.value))
  h, hv = x.query.shape[-1], x.value.shape[-1]
  shape = len(query), plan.padded_keys, plan.rows

  def scores(
    name: str, size: int, keys: Any, rows: Any, more: Any, after: Any
  ) -> jax.Array:
    grid = _tpu_plan.scores_by_keys(plan, size)
    specs = Specs(plan, grid, size)
    more = [(y, getattr(specs, kind)()) for y, kind in more]
    inputs = [(keys, specs.key_strip()), (rows, specs.row_strip()), *more]
    after = functools.partial(after, plan)
    output = shape, narrow, specs.scores()
    return call.product(name, grid, inputs, output, LAST, after=after)

  def key_sums(name: str, size: int, scores: Any, rows: Any, after: Any) -> Any:
    grid = _tpu_plan.sums_over_rows(plan, size)
    specs = Specs(plan, grid, size)
    inputs = [(scores, specs.scores_of_keys()), (rows, specs.terms())]
    output = (*shape[:2], rows.shape[-1]), narrow, specs.key_tile()
    sums = call.product(name, grid, inputs, output, MIDDLE, after=after)
    return _tpu_plan.from_keys(sums, plan, size)

  weights = scores("weights", h, key, query, [(lse, "lanes")], _exp_scores)
  value_bar = key_sums("value", hv, weights, bar, None)
  more = [(delta, "lanes"), (weights, "scores")]
  scores_bar = scores("scores_bar", hv, value, bar, more, _softmax_bar)
  grid = _tpu_plan.sums_over_keys(plan, h)
  specs = Specs(plan, grid, h)
  scaled = functools.partial(_scaled, plan)
  query_bar = call.product(
    "query",
    grid,
    [(scores_bar, specs.scores_of_rows()), (key, specs.terms())],
    (query.shape, narrow, specs.row_tile()),
    FIRST,
    after=scaled,
  )
  return Gradients(
    _tpu_plan.from_rows(query_bar, plan, h),
    key_sums("key", h, scores_bar, query, scaled),
    value_bar,
  )


# --- what is fused to the ends of a product ---


def _weights(logits: jax.Array, lse: jax.Array) -> jax.Array:
  return jnp.exp(logits - lse)


def _exp_scores(
  plan: Plan, total: jax.Array, i: Any, j: Any, lse: jax.Array
) -> jax.Array:
  return jnp.exp(_logits(plan, total, i, j) - lse)


def _softmax_bar(
  plan: Plan,
  total: jax.Array,
  i: Any,
  j: Any,
  delta: jax.Array,
  weights: jax.Array,
) -> jax.Array:
  del plan, i, j
  return weights.astype(total.dtype) * (total - delta)


def _scaled(plan: Plan, total: jax.Array, i: Any, j: Any) -> jax.Array:
  del i, j
  return total * plan.scale


def _logits(plan: Plan, total: jax.Array, i: Any, j: Any) -> jax.Array:
  """(block_k, block_q), -inf where hidden."""
  logits = total * plan.scale
  if not plan.edges:
    return logits
  at = lax.broadcasted_iota(jnp.int32, (plan.block_k, 1), 0)
  at += j * np.int32(plan.block_k)
  seen = at < np.int32(plan.keys)
  if plan.is_causal:
    first = plan.last_key(i) - np.int32(plan.block_q - 1)
    rows = lax.broadcasted_iota(jnp.int32, (1, plan.block_q), 1)
    seen &= at <= first + rows
  return jnp.where(seen, logits, -jnp.inf)


# --- kernels ---


def _dot(a: jax.Array, b: jax.Array, contract: Any) -> jax.Array:
  wide = a.dtype != jnp.bfloat16
  return dot(a, b, contract, lax.Precision.HIGHEST if wide else None)


def _scores_kernel(plan: Plan, grid: Grid, refs: Any) -> None:
  key_ref, query_ref, logits_ref, lse_ref, acc_ref, top_ref, total_ref = refs
  ids = [pl.program_id(axis) for axis in range(4)]
  i, j, k = ids[1:]
  holds = grid.holds(*ids)

  @pl.when((j == 0) & (k == 0))
  def _():
    top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)

  def term() -> jax.Array:
    return _dot(key_ref[...], query_ref[...], LAST)

  _add_up(acc_ref, term, k, holds)

  @pl.when(holds & (k == grid.steps[3] - 1))
  def _():
    logits = _logits(plan, acc_ref[...], i, j)
    logits_ref[...] = logits
    before = top_ref[...]
    # Key 0 is seen by all, so that the first tile leaves a finite maximum.
    top = jnp.maximum(before, logits.max(0, keepdims=True))
    weights = jnp.exp(logits - top).sum(0, keepdims=True)
    top_ref[...] = top
    total_ref[...] = jnp.exp(before - top) * total_ref[...] + weights

  @pl.when((j == grid.steps[2] - 1) & (k == grid.steps[3] - 1))
  def _():
    lse_ref[...] = top_ref[...] + jnp.log(total_ref[...])


def _product_kernel(
  contract: Any, before: Any, after: Any, grid: Grid, refs: Any
) -> None:
  a_ref, b_ref, *more, out_ref, acc_ref = refs
  ids = [pl.program_id(axis) for axis in range(4)]
  k, holds = ids[3], grid.holds(*ids)

  def term() -> jax.Array:
    a, b = a_ref[...], b_ref[...]
    if before is not None:
      a = before(a, *(ref[...] for ref in more)).astype(b.dtype)
    return _dot(a, b, contract)

  _add_up(acc_ref, term, k, holds)

  @pl.when(k == grid.steps[3] - 1)
  def _():
    total = acc_ref[...]
    if after is not None:
      i, j, *_ = grid.at(*ids)
      total = after(total, i, j, *(ref[...] for ref in more))
    out_ref[...] = total.astype(out_ref.dtype)


def _add_up(
  acc_ref: Any, term: Callable[[], jax.Array], k: Any, holds: Any
) -> None:
  @pl.when(k == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  @pl.when(holds)
  def _():
    acc_ref[...] += term()


class _Call:
  """One call, cut into tiles: what all of its kernels share."""

  def __init__(self, x: Operands, options: Options, interpret: Any):
    self.plan, self.interpret = _tpu_plan.plan(x, options), interpret

  def product(
    self,
    name: str,
    grid: Grid,
    inputs: list[Any],
    output: Any,
    contract: Any,
    before: Callable[..., jax.Array] | None = None,
    after: Callable[..., jax.Array] | None = None,
  ) -> jax.Array:
    """A product of the first two of ``inputs``; the others are for its ends."""
    kernel = functools.partial(_product_kernel, contract, before, after)
    tile = tuple(n for n in output[2].block_shape if n is not None)
    (product,) = self.run(name, kernel, grid, inputs, [output], [tile])
    return product

  def run(
    self,
    name: str,
    kernel: Callable[..., None],
    grid: Grid,
    inputs: list[Any],
    outputs: list[Any],
    scratch: list[tuple[int, ...]],
  ) -> list[jax.Array]:
    """Calls a kernel with its grid and a list of its references."""
    arrays = [array for array, _ in inputs]
    dtype = accumulator(arrays[0].dtype)
    return pl.pallas_call(
      lambda *refs: kernel(grid, refs),
      out_shape=[
        out_struct(shape, dtype, arrays) for shape, dtype, _ in outputs
      ],
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=0,
        grid=grid.steps,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, _, spec in outputs],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape in scratch],
      ),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel",) * grid.parallel
        + ("arbitrary",) * (4 - grid.parallel)
      ),
      interpret=self.interpret,
      name=f"small_cache_attention_{name}",
    )(*arrays)
