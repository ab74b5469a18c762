r"""ReLU attention on a TPU: forward, and the gradients of all operands.

Forward, one block of queries after another: keys and values pass by, and sums
of weights are kept relative to a power of two just above the largest excess so
far, as an online softmax keeps them relative to the largest exponential. With
:math:`u_{ij} = e_{ij} / n_i`, :math:`\delta_i = \bar o_i \cdot o_i - \bar n_i
n_i / \alpha` and

.. math::

  \bar e_{ij} = \frac{\alpha}{n_i} u_{ij}^{\alpha - 1}
  (\bar o_i \cdot v_j - \delta_i),

backward takes two passes: one block of keys after another, queries pass by;
and one block of queries after another, keys pass by.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import _tpu_arrays
from pallas_kernels.flash_attention import mosaic_tpu as flash
from pallas_kernels.flash_attention._tpu_arrays import Specs
from pallas_kernels.relu_attention._norms import inverse_and_delta
from pallas_kernels.relu_attention._tpu_kernels import (
  forward_kernel,
  key_value_kernel,
  query_kernel,
)
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
    x: the operands.
    options: static facts; block sizes of None are those of exact attention.
    interpret: True, or ``pltpu.InterpretParams``, to run anywhere.

  Returns:
    (B, T, N, Hv) of the queries' dtype, and (B, T, N) of the accumulator's.

  Cost:
    4 T S H flops a head; moves Q and O once, and K and V once for each block
    of queries that sees them.
  """
  call = _call(x, options, backward=False, interpret=interpret)
  plan, hv = call.plan, x.value.shape[-1]
  specs = Specs(plan, _tpu_arrays.by_queries(plan))
  lanes = specs.lanes()
  kinds = (*_kinds(x, specs), lanes, lanes)
  arrays = (*_arrays(x, call), *_lanes(x, call))
  b, k, rows = plan.batch, plan.heads, plan.num_q * plan.rows
  out, norm = call.run(
    "forward",
    functools.partial(forward_kernel, alpha=options.alpha),
    (b, k, plan.num_q, plan.key_steps),
    specs,
    list(zip(arrays, kinds, strict=True)),
    [
      ((b, k, rows, hv), x.query.dtype, specs.rows(hv)),
      ((b, k, 1, rows), call.dtype, lanes),
    ],
    [(hv, plan.rows), (1, plan.rows), (1, plan.rows)],
  )
  length = x.query.shape[1]
  return _tpu_arrays.from_rows(out, plan, length), _from_lanes(norm, call)


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
  """Cotangents of all operands but the mask.

  Args:
    x: the operands.
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
  call = _call(x, options, backward=True, interpret=interpret)
  plan = call.plan
  inverse, delta = inverse_and_delta(
    options.alpha, out, norm.astype(call.dtype), out_bar, norm_bar
  )
  arrays = (
    *_arrays(x, call),
    _tpu_arrays.rows_of(out_bar.astype(x.query.dtype), plan),
    *_lanes(x, call),
    _tpu_arrays.lanes_of(inverse, plan),
    _tpu_arrays.lanes_of(delta, plan),
  )
  query_bar, threshold_bar, scale_bar = _query_bars(call, x, options, arrays)
  key_bar, value_bar = _key_value_bars(call, x, options, arrays)
  length = x.key.shape[1]
  return Gradients(
    _tpu_arrays.from_rows(query_bar, plan, x.query.shape[1]),
    _tpu_arrays.from_keys(key_bar, length),
    _tpu_arrays.from_keys(value_bar, length),
    _from_lanes(threshold_bar, call),
    scale_bar.sum(),
  )


def _query_bars(
  call: flash.Call, x: Operands, options: Options, arrays: Any
) -> list[jax.Array]:
  plan, h = call.plan, x.query.shape[-1]
  specs = Specs(plan, _tpu_arrays.by_queries(plan))
  b, k, rows = plan.batch, plan.heads, plan.num_q * plan.rows
  lanes = (b, k, 1, rows), call.dtype, specs.lanes()
  return call.run(
    "query",
    functools.partial(query_kernel, alpha=options.alpha),
    (b, k, plan.num_q, plan.key_steps),
    specs,
    _gradient_inputs(x, specs, arrays),
    [((b, k, rows, h), x.query.dtype, specs.rows(h)), lanes, lanes],
    [(h, plan.rows), (1, plan.rows), (1, plan.rows)],
  )


def _key_value_bars(
  call: flash.Call, x: Operands, options: Options, arrays: Any
) -> list[jax.Array]:
  plan = call.plan
  specs = Specs(plan, _tpu_arrays.by_keys(plan))
  sizes = x.key.shape[-1], x.value.shape[-1]
  b, k, length = plan.batch, plan.heads, plan.num_k * plan.block_k
  return call.run(
    "key_value",
    functools.partial(key_value_kernel, alpha=options.alpha),
    (b, k, plan.num_k, plan.query_steps),
    specs,
    _gradient_inputs(x, specs, arrays),
    [((b, k, length, h), x.key.dtype, specs.keys(h)) for h in sizes],
    [(plan.block_k, h) for h in sizes],
  )


def _call(
  x: Operands, options: Options, *, backward: bool, interpret: Any
) -> flash.Call:
  return flash.Call(
    *as_flash(x, options),
    backward=backward,
    interpret=interpret,
    operation="relu_attention",
  )


def _arrays(x: Operands, call: flash.Call) -> tuple[jax.Array, ...]:
  plan = call.plan
  return (
    _tpu_arrays.rows_of(x.query, plan),
    _tpu_arrays.keys_of(x.key, plan),
    _tpu_arrays.keys_of(x.value, plan),
  )


def _kinds(x: Operands, specs: Specs) -> tuple[Any, ...]:
  h, hv = x.query.shape[-1], x.value.shape[-1]
  return specs.rows(h), specs.keys(h), specs.keys(hv)


def _lanes(x: Operands, call: flash.Call) -> tuple[jax.Array, ...]:
  """Scale and threshold, a number a query each."""
  numbers = jnp.broadcast_to(x.scale, x.query.shape[:3]), x.threshold
  return tuple(
    _tpu_arrays.lanes_of(y.astype(call.dtype), call.plan) for y in numbers
  )


def _gradient_inputs(x: Operands, specs: Specs, arrays: Any) -> list[Any]:
  lanes = (specs.lanes(),) * 4
  kinds = *_kinds(x, specs), specs.rows(x.value.shape[-1]), *lanes
  return list(zip(arrays, kinds, strict=True))


def _from_lanes(y: jax.Array, call: flash.Call) -> jax.Array:
  """(B, K, 1, R) -> (B, T, N)."""
  length = call.x.query.shape[1]
  y = _tpu_arrays.from_rows(jnp.swapaxes(y, 2, 3), call.plan, length)
  return y[..., 0]
