"""Exact attention on an NVIDIA GPU of compute capability 9: all gradients.

The algorithms are those of ``mosaic_tpu``; a block of queries (or, for the
gradients of keys and values, of keys) is one warp group's, and what passes by
is copied into one of two slots of shared memory while the other is worked on.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._batching import fold_batch
from pallas_kernels._compat import grid_name, plgpu, vary_with
from pallas_kernels.flash_attention import _blocks, config
from pallas_kernels.flash_attention._gpu_kernels import (
  SLOTS,
  Tile,
  forward_kernel,
  key_value_kernel,
  query_kernel,
)
from pallas_kernels.flash_attention.operands import (
  Gradients,
  Operands,
  Options,
)


def supports(x: Operands, options: Options) -> str | None:
  """Why these operands cannot use the kernels; None if they can."""
  if x.query.dtype not in (jnp.float16, jnp.bfloat16):
    return f"the GPU kernel takes float16 or bfloat16, got {x.query.dtype}"
  for name in ("bias", "mask", "query_segments"):
    if getattr(x, name) is not None:
      return f"the GPU kernel takes no {name}"
  if options.precision is not None:
    return f"the GPU kernel takes no precision, got {options.precision!r}"
  return config.gpu_reason(x, options)


def forward(
  x: Operands, options: Options, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
  """Output and log-sum-exp.

  Args:
    x: the operands, without bias, mask and segments.
    options: static facts; block sizes of None are those of ``config``.
    interpret: ``gpu_interpreter()`` of ``_compat``, to run anywhere.

  Returns:
    (B, T, N, Hv) of the queries' dtype, and (B, T, N) in float32.

  Cost:
    4 T S H flops a head; moves Q and O once, and K and V once for each block
    of queries that sees them.
  """
  run = functools.partial(_forward, options, interpret)
  return fold_batch(run)(_with_places(x))


def backward(
  x: Operands,
  options: Options,
  out: jax.Array,
  lse: jax.Array,
  out_bar: jax.Array,
  lse_bar: jax.Array,
  *,
  interpret: Any = False,
) -> Gradients:
  """Cotangents of query, key and value.

  Args:
    x: the operands, without bias, mask and segments.
    options: static facts.
    out: (B, T, N, Hv), from the forward pass.
    lse: (B, T, N), from the forward pass.
    out_bar: cotangent of ``out``.
    lse_bar: cotangent of ``lse``.
    interpret: as in ``forward``.

  Returns:
    Each of its operand's shape and dtype; None for the bias.

  Cost:
    14 T S H flops a head; moves what the forward pass does, and queries with
    their cotangents once for each block of keys.
  """
  run = functools.partial(_backward, options, interpret)
  return fold_batch(run)(_with_places(x), out, lse, out_bar, lse_bar)


def _with_places(x: Operands) -> Operands:
  """Operands that all begin with their batch."""
  if x.offset is None:
    return x
  return x._replace(offset=jnp.broadcast_to(x.offset, x.query.shape[:1]))


def _forward(
  options: Options, interpret: Any, x: Operands
) -> tuple[jax.Array, jax.Array]:
  call = Call(x, options, backward=False, interpret=interpret)
  plan, query, key, value = call.plan, call.query, call.key, call.value
  b, t, n, h = query.shape
  hv = value.shape[-1]
  q, k = plan.block_q, plan.block_k
  out, lse = call.run(
    forward_kernel,
    (plan.num_q, n, b),
    [query, key, value],
    [((b, t, n, hv), query.dtype), ((b, n, t), jnp.float32)],
    [
      ((q, h), query.dtype), ((SLOTS, k, h), query.dtype),
      ((SLOTS, k, hv), query.dtype), ((q, hv), query.dtype),
      ((q,), jnp.float32),
    ],
    [1, SLOTS, SLOTS],
  )  # fmt: skip
  t, _, hv = x.query.shape[1:3] + x.value.shape[3:]
  return out[:, :t, :, :hv], jnp.swapaxes(lse, 1, 2)[:, :t]


def _backward(
  options: Options,
  interpret: Any,
  x: Operands,
  out: jax.Array,
  lse: jax.Array,
  out_bar: jax.Array,
  lse_bar: jax.Array,
) -> Gradients:
  call = Call(x, options, backward=True, interpret=interpret)
  delta = (out_bar.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
  delta -= lse_bar
  # A query that sees nothing has lse -inf; +inf makes its weights 0, not NaN.
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
  inputs = [
    call.query, call.key, call.value,
    call.pad(out_bar.astype(x.query.dtype), call.query.shape[1]),
    call.per_query(lse, np.inf), call.per_query(delta, 0),
  ]  # fmt: skip
  query_bar = _query_bar(call, inputs)
  key_bar, value_bar = _key_value_bars(call, inputs)
  (_, t, _, h), (_, s, _, hv) = x.query.shape, x.value.shape
  return Gradients(
    query_bar[:, :t, :, :h], key_bar[:, :s, :, :h], value_bar[:, :s, :, :hv],
    None,
  )  # fmt: skip


def _query_bar(call: "Call", inputs: list[jax.Array]) -> jax.Array:
  plan, (query, _, value, *_) = call.plan, inputs
  b, t, n, h = query.shape
  q, k, hv, dtype = plan.block_q, plan.block_k, value.shape[-1], query.dtype
  (bar,) = call.run(
    query_kernel,
    (plan.num_q, n, b),
    inputs,
    [((b, t, n, h), dtype)],
    [
      ((q, h), dtype), ((q, hv), dtype), ((q,), jnp.float32),
      ((q,), jnp.float32), ((SLOTS, k, h), dtype), ((SLOTS, k, hv), dtype),
    ],
    [1, 1, 1, 1, SLOTS, SLOTS],
  )  # fmt: skip
  return bar


def _key_value_bars(call: "Call", inputs: list[jax.Array]) -> list[jax.Array]:
  plan, (query, key, value, *_) = call.plan, inputs
  b, _, n, h = key.shape
  q, k, hv, dtype = plan.block_q, plan.block_k, value.shape[-1], query.dtype
  return call.run(
    key_value_kernel,
    (plan.num_k, n, b),
    inputs,
    [(key.shape, dtype), (value.shape, dtype)],
    [
      ((k, h), dtype), ((k, hv), dtype), ((SLOTS, q, h), dtype),
      ((SLOTS, q, hv), dtype), ((SLOTS, q), jnp.float32),
      ((SLOTS, q), jnp.float32),
    ],
    [1, 1, *[SLOTS] * 4],
  )  # fmt: skip


class Call:
  """One call, cut into blocks: what all of its kernels share."""

  def __init__(
    self, x: Operands, options: Options, *, backward: bool, interpret: Any
  ):
    """Cuts the call of an operation whose scores are those of ``x``."""
    sizes = config.gpu_block_sizes(options)
    self.options, self.interpret = options, interpret
    self.plan = plan = _blocks.plan(x, options, sizes, backward=backward)
    self.bounds = _blocks.bounds(x)
    self.query = self.pad(x.query, plan.num_q * plan.block_q)
    self.key = self.pad(x.key, plan.num_k * plan.block_k)
    self.value = self.pad(x.value, plan.num_k * plan.block_k)

  def pad(self, x: jax.Array, length: int) -> jax.Array:
    """Whole blocks, and heads of whole rows of shared memory."""
    head = -x.shape[3] % config.GPU_HEAD
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, head)))

  def per_query(self, x: jax.Array, fill: float) -> jax.Array:
    """(B, T, N) -> (B, N, T), padded."""
    widths = (0, 0), (0, self.query.shape[1] - x.shape[1]), (0, 0)
    return jnp.swapaxes(jnp.pad(x, widths, constant_values=fill), 1, 2)

  def run(
    self,
    kernel: Any,
    grid: tuple[int, ...],
    inputs: list[jax.Array],
    outputs: list[Any],
    buffers: list[Any],
    barriers: list[int],
  ) -> Any:
    """Calls a kernel on ``inputs``."""
    tile = Tile(self.plan, self.options.scale, bool(self.interpret))
    results = plgpu.kernel(
      functools.partial(kernel, tile),
      out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
      scratch_types=[
        [plgpu.SMEM(shape, dtype) for shape, dtype in buffers],
        [plgpu.Barrier(num_barriers=num) for num in barriers],
      ],
      compiler_params=plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup
      ),
      interpret=self.interpret,
      grid=grid,
      grid_names=tuple(map(grid_name, ("block", "head", "batch"))),
    )(self.bounds, *inputs)
    return [vary_with(y, (self.bounds, inputs)) for y in results]
