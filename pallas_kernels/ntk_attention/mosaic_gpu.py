"""NTK-Attention on an NVIDIA GPU of compute capability 9: all gradients.

As on a TPU the online softmax begins with the prefix, and backward is that of
exact attention. But tensor cores take 16 bits, which sums over a long prefix do
not fit into: XLA multiplies features and state in float32, and the kernel reads
the sums, which are smaller than the features that they come from.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._batching import fold_batch
from pallas_kernels._products import precision_of
from pallas_kernels.flash_attention import mosaic_gpu as flash
from pallas_kernels.flash_attention import operands as flash_operands
from pallas_kernels.flash_attention._gpu_kernels import SLOTS
from pallas_kernels.ntk_attention import config
from pallas_kernels.ntk_attention._gpu_kernels import forward_kernel
from pallas_kernels.ntk_attention.gradients import backward_by
from pallas_kernels.ntk_attention.operands import (
  Gradients,
  Operands,
  Options,
  Total,
  as_flash,
  flash_options,
)


def supports(x: Operands, options: Options) -> str | None:
  """Why these operands cannot use the kernels; None if they can."""
  return flash.supports(*as_flash(x, options)) or config.gpu_reason(x, options)


def forward(
  x: Operands, options: Options, *, interpret: Any = False
) -> tuple[jax.Array, Total]:
  """Output and the sum of all weights.

  Args:
    x: the operands, without bias and mask.
    options: static facts; block sizes of None are those of exact attention.
    interpret: ``gpu_interpreter()`` of ``_compat``, to run anywhere.

  Returns:
    (B, T, N, Hv) of the queries' dtype, and twice (B, T, N) in float32.

  Cost:
    4 T S H + 2 T r Hv flops a head; moves Q, O, features and their sums once,
    and K and V once for each block of queries that sees them.
  """
  states = jnp.concatenate((x.z, x.k[..., None]), -1)
  b, t, n, r = x.query_features.shape
  by_state = b, t, states.shape[0], n // states.shape[0], r
  sums = jnp.einsum(
    "btkgr,krv->btkgv",
    x.query_features.reshape(by_state),
    states,
    precision=precision_of(options.precision),
  ).reshape(b, t, n, -1)
  keys, _ = as_flash(x, options)
  acc, total = sums[..., :-1], sums[..., -1]
  return forward_from(keys, options, acc, total, interpret=interpret)


def forward_from(
  x: flash_operands.Operands,
  options: Options,
  acc: jax.Array,
  total: jax.Array,
  *,
  interpret: Any = False,
) -> tuple[jax.Array, Total]:
  """As ``forward``, given what the prefix adds.

  Args:
    x: operands of exact attention to the keys alone.
    options: static facts.
    acc: (B, T, N, Hv) in float32, to the numerators.
    total: (B, T, N) in float32, to the denominators.
    interpret: as in ``forward``.

  Returns:
    As ``forward``.
  """
  run = functools.partial(_forward, flash_options(options), interpret)
  return fold_batch(run)(x, acc, total)


def backward(
  x: Operands,
  options: Options,
  out: jax.Array,
  total: Total,
  out_bar: jax.Array,
  total_bar: Total,
  *,
  interpret: Any = False,
) -> Gradients:
  """Cotangents of all operands.

  Args:
    x: the operands, without bias and mask.
    options: static facts.
    out: (B, T, N, Hv), from the forward pass.
    total: from the forward pass.
    out_bar: cotangent of ``out``.
    total_bar: cotangent of ``total``; a sign has none.
    interpret: as in ``forward``.

  Returns:
    Each of its operand's shape and dtype; None for the bias.

  Cost:
    That of exact attention, and 4 T r Hv flops a head.
  """
  attend = functools.partial(flash.backward, interpret=interpret)
  return backward_by(attend, x, options, out, total, out_bar, total_bar)


def _forward(
  options: flash_operands.Options,
  interpret: Any,
  x: flash_operands.Operands,
  acc: jax.Array,
  total: jax.Array,
) -> tuple[jax.Array, Total]:
  call = flash.Call(x, options, backward=False, interpret=interpret)
  plan, query, key, value = call.plan, call.query, call.key, call.value
  (b, length, n, h), hv, dtype = query.shape, value.shape[-1], query.dtype
  q, k = plan.block_q, plan.block_k
  acc, top, total = _relative(acc, total)
  lane, lanes = ((q,), jnp.float32), ((b, n, length), jnp.float32)
  inputs = [
    query, call.pad(acc, length), call.per_query(top, -np.inf),
    call.per_query(total, 0), key, value,
  ]  # fmt: skip
  out, log, sign = call.run(
    forward_kernel,
    (plan.num_q, n, b),
    inputs,
    [((b, length, n, hv), dtype), lanes, lanes],
    [
      ((q, h), dtype), ((q, hv), jnp.float32), lane, lane,
      ((SLOTS, k, h), dtype), ((SLOTS, k, hv), dtype), ((q, hv), dtype),
    ],
    [1, 1, 1, 1, SLOTS, SLOTS],
  )  # fmt: skip
  t, hv = x.query.shape[1], x.value.shape[3]
  log, sign = (jnp.swapaxes(y, 1, 2)[:, :t] for y in (log, sign))
  return out[:, :t, :, :hv], Total(log, sign)


def _relative(acc: jax.Array, total: jax.Array) -> tuple[jax.Array, ...]:
  """(o, m, l) of an online softmax; the largest of o and l is 1."""
  size = jnp.maximum(jnp.abs(acc).max(-1), jnp.abs(total))
  none = size < jnp.finfo(size.dtype).tiny
  safe = jnp.where(none, 1, size)
  shrink = jnp.where(none, 0, 1 / safe)
  top = jnp.where(none, -jnp.inf, jnp.log(safe))
  return acc * shrink[..., None], top, total * shrink
