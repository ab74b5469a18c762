"""ReLU attention on an NVIDIA GPU of compute capability 9: all gradients.

The algorithms are those of ``mosaic_tpu``, and blocks pass by as those of exact
attention.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._batching import fold_batch
from pallas_kernels.flash_attention import mosaic_gpu as flash
from pallas_kernels.flash_attention._gpu_kernels import SLOTS
from pallas_kernels.relu_attention._gpu_kernels import (
  forward_kernel,
  key_value_kernel,
  query_kernel,
)
from pallas_kernels.relu_attention._norms import inverse_and_delta
from pallas_kernels.relu_attention.operands import (
  Gradients,
  Operands,
  Options,
  as_flash,
)


def supports(x: Operands, options: Options) -> str | None:
  """Why these operands cannot use the kernels; None if they can."""
  return flash.supports(*as_flash(x, options))


def forward(
  x: Operands, options: Options, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
  """Output and norm.

  Args:
    x: the operands, without a mask.
    options: static facts; block sizes of None are those of exact attention.
    interpret: ``gpu_interpreter()`` of ``_compat``, to run anywhere.

  Returns:
    (B, T, N, Hv) of the queries' dtype, and (B, T, N) in float32.

  Cost:
    4 T S H flops a head; moves Q and O once, and K and V once for each block
    of queries that sees them.
  """
  run = functools.partial(_forward, options, interpret)
  return fold_batch(run)(_with_scales(x))


def backward(
  x: Operands,
  options: Options,
  out: jax.Array,
  norm: jax.Array,
  out_bar: jax.Array,
  norm_bar: jax.Array,
  *,
  interpret: Any = False,
) -> Gradients:
  """Cotangents of all operands.

  Args:
    x: the operands, without a mask.
    options: static facts.
    out: (B, T, N, Hv), from the forward pass.
    norm: (B, T, N), from the forward pass.
    out_bar: cotangent of ``out``.
    norm_bar: cotangent of ``norm``.
    interpret: as in ``forward``.

  Returns:
    Each of its operand's shape and dtype.

  Cost:
    14 T S H flops a head; moves what the forward pass does, and queries with
    their cotangents once for each block of keys.
  """
  run = functools.partial(_backward, options, interpret)
  bars = fold_batch(run)(_with_scales(x), out, norm, out_bar, norm_bar)
  return bars._replace(scale=bars.scale.sum())


def _with_scales(x: Operands) -> Operands:
  """Operands that all begin with their batch."""
  return x._replace(scale=jnp.broadcast_to(x.scale, x.query.shape[:1]))


def _forward(
  options: Options, interpret: Any, x: Operands
) -> tuple[jax.Array, jax.Array]:
  call = _call(x, options, backward=False, interpret=interpret)
  plan, query, value = call.plan, call.query, call.value
  b, t, n, h = query.shape
  q, k, hv, dtype = plan.block_q, plan.block_k, value.shape[-1], query.dtype
  out, norm = call.run(
    functools.partial(forward_kernel, alpha=options.alpha),
    (plan.num_q, n, b),
    [query, call.key, value, call.per_query(x.threshold, 0), x.scale],
    [((b, t, n, hv), dtype), ((b, n, t), jnp.float32)],
    [
      ((q, h), dtype), ((q,), jnp.float32), ((SLOTS, k, h), dtype),
      ((SLOTS, k, hv), dtype), ((q, hv), dtype), ((q,), jnp.float32),
    ],
    [1, 1, SLOTS, SLOTS],
  )  # fmt: skip
  t, hv = x.query.shape[1], x.value.shape[3]
  return out[:, :t, :, :hv], jnp.swapaxes(norm, 1, 2)[:, :t]


def _backward(
  options: Options,
  interpret: Any,
  x: Operands,
  out: jax.Array,
  norm: jax.Array,
  out_bar: jax.Array,
  norm_bar: jax.Array,
) -> Gradients:
  call = _call(x, options, backward=True, interpret=interpret)
  inverse, delta = inverse_and_delta(
    options.alpha, out, norm.astype(jnp.float32), out_bar, norm_bar
  )
  inputs = [
    call.query, call.key, call.value,
    call.pad(out_bar.astype(x.query.dtype), call.query.shape[1]),
    # Queries that are added have inverses and cotangents of 0: they add 0.
    call.per_query(x.threshold, 0), call.per_query(inverse, 0),
    call.per_query(delta, 0), x.scale,
  ]  # fmt: skip
  query_bar, total, product = _query_bars(call, options, inputs)
  key_bar, value_bar = _key_value_bars(call, options, inputs)
  (_, t, _, h), (_, s, _, hv) = x.query.shape, x.value.shape
  return Gradients(
    query_bar[:, :t, :, :h],
    key_bar[:, :s, :, :h],
    value_bar[:, :s, :, :hv],
    -jnp.swapaxes(total, 1, 2)[:, :t],
    product.sum((1, 2)),
  )


def _query_bars(
  call: flash.Call, options: Options, inputs: list[jax.Array]
) -> list[jax.Array]:
  """Cotangents of queries; the sums that make threshold's and scale's."""
  plan, (query, _, value, *_) = call.plan, inputs
  b, t, n, h = query.shape
  q, k, hv, dtype = plan.block_q, plan.block_k, value.shape[-1], query.dtype
  lane = (q,), jnp.float32
  return call.run(
    functools.partial(query_kernel, alpha=options.alpha),
    (plan.num_q, n, b),
    inputs,
    [(query.shape, dtype), *[((b, n, t), jnp.float32)] * 2],
    [
      ((q, h), dtype), ((q, hv), dtype), *[lane] * 3, ((SLOTS, k, h), dtype),
      ((SLOTS, k, hv), dtype), *[lane] * 2,
    ],
    [*[1] * 5, SLOTS, SLOTS],
  )  # fmt: skip


def _key_value_bars(
  call: flash.Call, options: Options, inputs: list[jax.Array]
) -> list[jax.Array]:
  plan, (query, key, value, *_) = call.plan, inputs
  b, _, n, h = key.shape
  q, k, hv, dtype = plan.block_q, plan.block_k, value.shape[-1], query.dtype
  return call.run(
    functools.partial(key_value_kernel, alpha=options.alpha),
    (plan.num_k, n, b),
    inputs,
    [(key.shape, dtype), (value.shape, dtype)],
    [
      ((k, h), dtype), ((k, hv), dtype), ((SLOTS, q, h), dtype),
      ((SLOTS, q, hv), dtype), *[((SLOTS, q), jnp.float32)] * 3,
    ],
    [1, 1, *[SLOTS] * 5],
  )  # fmt: skip


def _call(
  x: Operands, options: Options, *, backward: bool, interpret: Any
) -> flash.Call:
  return flash.Call(
    *as_flash(x, options), backward=backward, interpret=interpret
  )
