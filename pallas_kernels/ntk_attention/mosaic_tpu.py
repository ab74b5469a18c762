r"""NTK-Attention on a TPU: forward, and the gradients of all operands.

Forward is that of exact attention, but the sums (o, l) do not begin with
nothing: the prefix comes first, in blocks of features, and makes

.. math:: a = Z^\top \phi, \quad d = k^\top \phi, \quad
  m = \log \max(|d|, \max_c |a_c|), \quad o = e^{-m} a, \quad l = e^{-m} d,

the state of an online softmax; every later rescaling is the one that blocks of
keys do anyway. So the prefix needs no sums of its own, and no merge.

Backward is that of exact attention too. Weights are :math:`p_{ij} = e^{s_{ij}}
/ D_i` with a sum :math:`D_i` over keys and prefix that has a sign; kernels take
:math:`\log |D_i|` for the log-sum-exp, and the sign goes into the cotangents,
in which all is linear. What is left are products of features and states, with

.. math:: \bar a_i = \bar o_i / D_i, \quad
  \bar d_i = (\bar L_i - \bar o_i \cdot o_i) / D_i,

for XLA: nothing in them is longer than the queries.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._compat import pl
from pallas_kernels.flash_attention import _tpu_arrays
from pallas_kernels.flash_attention import mosaic_tpu as flash
from pallas_kernels.flash_attention._blocks import ZERO
from pallas_kernels.flash_attention._tpu_arrays import Specs
from pallas_kernels.ntk_attention import config
from pallas_kernels.ntk_attention._tpu_kernels import forward_kernel
from pallas_kernels.ntk_attention.gradients import backward_by
from pallas_kernels.ntk_attention.operands import (
  Gradients,
  Operands,
  Options,
  Total,
  as_flash,
)


def supports(x: Operands, options: Options) -> str | None:
  """Why these operands cannot use the kernels; None if they can."""
  return flash.supports(*as_flash(x, options)) or config.tpu_reason(x, options)


def forward(
  x: Operands, options: Options, *, interpret: Any = False
) -> tuple[jax.Array, Total]:
  """Output and the sum of all weights.

  Args:
    x: the operands.
    options: static facts; block sizes of None are those of ``config``.
    interpret: True, or ``pltpu.InterpretParams``, to run anywhere.

  Returns:
    (B, T, N, Hv) of the queries' dtype, and twice (B, T, N) of the
    accumulator's.

  Cost:
    4 T S H + 2 T r Hv flops a head; moves Q, O and features once, and K, V and
    the state once for each block of queries.
  """
  sizes, block = config.tpu_blocks(x, options, exact=bool(interpret))
  options = options._replace(block_sizes=sizes)
  call = flash.Call(
    *as_flash(x, options),
    backward=False,
    interpret=interpret,
    operation="ntk_attention",
  )
  plan, h, hv = call.plan, x.query.shape[-1], x.value.shape[-1]
  steps = -(-x.z.shape[1] // block)
  specs = _after(steps, call)
  # A read of the state, then the keys.
  inputs = [
    (_tpu_arrays.rows_of(x.query, plan), specs.rows(h)),
    (_tpu_arrays.keys_of(x.key, plan), specs.keys(h)),
    (_tpu_arrays.keys_of(x.value, plan), specs.keys(hv)),
    *_prefix(x, call, block),
  ]
  b, k, rows = plan.batch, plan.heads, plan.num_q * plan.rows
  lanes = (b, k, 1, rows), call.dtype, specs.lanes()
  out, *total = call.run(
    "forward",
    functools.partial(forward_kernel, feature_steps=steps),
    (b, k, plan.num_q, steps + plan.key_steps),
    specs,
    inputs,
    [((b, k, rows, hv), x.query.dtype, specs.rows(hv)), lanes, lanes],
    [(hv, plan.rows), (1, plan.rows), (1, plan.rows)],
  )
  length = x.query.shape[1]
  total = (
    _tpu_arrays.from_rows(jnp.swapaxes(y, 2, 3), plan, length) for y in total
  )
  return (
    _tpu_arrays.from_rows(out, plan, length),
    Total(*(y[..., 0] for y in total)),
  )


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
  """Cotangents of all operands but the mask.

  Args:
    x: the operands.
    options: static facts.
    out: (B, T, N, Hv), from the forward pass.
    total: from the forward pass.
    out_bar: cotangent of ``out``.
    total_bar: cotangent of ``total``; a sign has none.
    interpret: as in ``forward``.

  Returns:
    Each of its operand's shape and dtype; None for a bias that is None.

  Cost:
    That of exact attention, and 4 T r Hv flops a head.
  """
  attend = functools.partial(flash.backward, interpret=interpret)
  return backward_by(attend, x, options, out, total, out_bar, total_bar)


def _after(steps: int, call: flash.Call) -> Specs:
  """Keys pass by a block of queries, once ``steps`` are over."""
  by_queries = _tpu_arrays.by_queries(call.plan)

  def at(b: Any, k: Any, i: Any, step: Any, bounds: Any) -> Any:
    return by_queries(b, k, i, lax.max(step - np.int32(steps), ZERO), bounds)

  return Specs(call.plan, at)


def _prefix(x: Operands, call: flash.Call, block: int) -> list[Any]:
  """Features (B, K, R, r) and state (K, G|1, Hv + 1, r), in blocks of r."""
  plan, num = call.plan, x.z.shape[1]
  pad = -num % block
  last = np.int32((num + pad) // block - 1)
  features = _tpu_arrays.rows_of(x.query_features, plan)
  state = jnp.concatenate((x.z, x.k[..., None]), -1)
  state = jnp.swapaxes(state, 1, 2)
  state = state.reshape(plan.heads, -1, *state.shape[1:])
  features, state = (
    jnp.pad(y.astype(call.dtype), ((0, 0),) * 3 + ((0, pad),))
    for y in (features, state)
  )

  def features_at(b: Any, k: Any, i: Any, step: Any, bounds: Any) -> Any:
    del bounds
    return b, k, i, lax.min(step, last)

  def state_at(b: Any, k: Any, i: Any, step: Any, bounds: Any) -> Any:
    del b, i, bounds
    return k, ZERO, ZERO, lax.min(step, last)

  return [
    (features, pl.BlockSpec((None, None, plan.rows, block), features_at)),
    (state, pl.BlockSpec((None, *state.shape[1:3], block), state_at)),
  ]
