r"""Exact attention on a TPU: forward, and the gradients of all operands.

Forward, one block of queries after another: keys and values pass by, and the
online softmax of arXiv 2307.08691, algorithm 1, keeps (o, m, l) in scratch.
Backward in two passes, as there: with :math:`\delta_i = \bar o_i \cdot o_i -
\bar L_i` and :math:`\bar s_{ij} = p_{ij} (\bar o_i \cdot v_j - \delta_i)`,

* one block of keys after another, queries pass by: :math:`\bar k_j, \bar v_j`;
* one block of queries after another, keys pass by: :math:`\bar q_i`;
* one tile of a bias after another, all that share it pass by: its gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._compat import out_struct, pl, pltpu, varying_axes
from pallas_kernels._products import accumulator, tpu_reason
from pallas_kernels.flash_attention import _blocks, _tpu_arrays, config
from pallas_kernels.flash_attention._tpu_arrays import Specs
from pallas_kernels.flash_attention._tpu_kernels import (
  bias_kernel,
  forward_kernel,
  key_value_kernel,
  query_kernel,
  with_names,
)
from pallas_kernels.flash_attention.operands import (
  Gradients,
  Operands,
  Options,
)
from pallas_kernels.flash_attention.reference import visible


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
    (B, T, N, Hv) of the queries' dtype, and (B, T, N) of the accumulator's.

  Cost:
    4 T S H flops a head; moves Q and O once, and K and V once for each block
    of queries that sees them.
  """
  call = Call(x, options, backward=False, interpret=interpret)
  plan, h, hv = call.plan, x.query.shape[-1], x.value.shape[-1]
  specs = Specs(plan, _tpu_arrays.by_queries(plan))
  inputs = [
    (_tpu_arrays.rows_of(x.query, plan), specs.rows(h)),
    (_tpu_arrays.keys_of(x.key, plan), specs.keys(h)),
    (_tpu_arrays.keys_of(x.value, plan), specs.keys(hv)),
  ]
  b, k, rows = plan.batch, plan.heads, plan.num_q * plan.rows
  outputs = [
    ((b, k, rows, hv), x.query.dtype, specs.rows(hv)),
    ((b, k, 1, rows), call.dtype, specs.lanes()),
  ]
  scratch = [(hv, plan.rows), (1, plan.rows), (1, plan.rows)]
  grid = b, k, plan.num_q, plan.key_steps
  out, lse = call.run(
    "forward", forward_kernel, grid, specs, inputs, outputs, scratch
  )
  length = x.query.shape[1]
  lse = _tpu_arrays.from_rows(jnp.swapaxes(lse, 2, 3), plan, length)
  return _tpu_arrays.from_rows(out, plan, length), lse[..., 0]


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
  """Cotangents of query, key, value and bias.

  Args:
    x: the operands.
    options: static facts.
    out: (B, T, N, Hv), from the forward pass.
    lse: (B, T, N), from the forward pass.
    out_bar: cotangent of ``out``.
    lse_bar: cotangent of ``lse``.
    interpret: as in ``forward``.

  Returns:
    Each of its operand's shape and dtype; None for a bias that is None.

  Cost:
    14 T S H flops a head, and 6 T S H more for a bias; moves what the forward
    pass does, and queries with their cotangents once for each block of keys.
  """
  call = Call(x, options, backward=True, interpret=interpret)
  plan = call.plan
  dtype = call.dtype
  delta = (out_bar.astype(dtype) * out.astype(dtype)).sum(-1)
  delta -= lse_bar.astype(dtype)
  # A query that sees nothing has lse -inf; +inf makes its weights 0, not NaN.
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse.astype(dtype))
  arrays = (
    _tpu_arrays.rows_of(x.query, plan),
    _tpu_arrays.keys_of(x.key, plan),
    _tpu_arrays.keys_of(x.value, plan),
    _tpu_arrays.rows_of(out_bar.astype(x.query.dtype), plan),
    _tpu_arrays.lanes_of(lse, plan, np.inf),
    _tpu_arrays.lanes_of(delta, plan),
  )
  key_bar, value_bar = _key_value_bars(call, arrays)
  return Gradients(
    _query_bar(call, arrays),
    _tpu_arrays.from_keys(key_bar, x.key.shape[1]),
    _tpu_arrays.from_keys(value_bar, x.key.shape[1]),
    None if x.bias is None else _bias_bar(call, arrays),
  )


def _gradient_inputs(arrays: Any, specs: Specs) -> list[Any]:
  h, hv = arrays[0].shape[-1], arrays[2].shape[-1]
  lanes = specs.lanes()
  kinds = (
    specs.rows(h), specs.keys(h), specs.keys(hv), specs.rows(hv), lanes, lanes,
  )  # fmt: skip
  return list(zip(arrays, kinds, strict=True))


def _query_bar(call: "Call", arrays: Any) -> jax.Array:
  x, plan = call.x, call.plan
  specs = Specs(plan, _tpu_arrays.by_queries(plan))
  b, k, h = plan.batch, plan.heads, x.query.shape[-1]
  outputs = [((b, k, plan.num_q * plan.rows, h), x.query.dtype, specs.rows(h))]
  grid = b, k, plan.num_q, plan.key_steps
  inputs = _gradient_inputs(arrays, specs)
  scratch = [(h, plan.rows)]
  (bar,) = call.run(
    "query", query_kernel, grid, specs, inputs, outputs, scratch
  )
  return _tpu_arrays.from_rows(bar, plan, x.query.shape[1])


def _key_value_bars(call: "Call", arrays: Any) -> list[jax.Array]:
  x, plan = call.x, call.plan
  specs = Specs(plan, _tpu_arrays.by_keys(plan))
  sizes = x.key.shape[-1], x.value.shape[-1]
  length = plan.num_k * plan.block_k
  outputs = [
    ((plan.batch, plan.heads, length, h), x.key.dtype, specs.keys(h))
    for h in sizes
  ]
  scratch = [(plan.block_k, h) for h in sizes]
  grid = plan.batch, plan.heads, plan.num_k, plan.query_steps
  inputs = _gradient_inputs(arrays, specs)
  return call.run(
    "key_value", key_value_kernel, grid, specs, inputs, outputs, scratch
  )


def _bias_bar(call: "Call", arrays: Any) -> jax.Array:
  """Gradient of the bias; axes it is broadcast over are walked innermost."""
  x, plan = call.x, call.plan
  bias = _tpu_arrays.scores_of(x.bias, plan)
  sizes = plan.batch, plan.heads, plan.num_q, plan.num_k
  shared = [bias.shape[axis] == 1 for axis in (0, 1, 4, 3)]
  order = sorted(range(4), key=lambda axis: shared[axis])
  inner = tuple(order.index(axis) for axis in range(4) if shared[axis])

  def ids(*places: Any) -> tuple[Any, ...]:
    return tuple(places[order.index(axis)] for axis in range(4))

  def at(*places: Any) -> Any:
    b, k, i, j = ids(*places[:-1])
    # A tile without work repeats the one before it, and moves nothing.
    seen = _blocks.keys_seen(plan, places[-1], b, i)
    j = lax.max(j, lax.min(seen.low, np.int32(plan.num_k - 1)))
    return b, k, i, lax.min(j, lax.max(seen.high - 1, np.int32(0)))

  def whole(*places: Any) -> Any:
    return ids(*places[:-1])

  specs = Specs(plan, at)
  spec = Specs(plan, whole).scores(bias.shape)
  kernel = functools.partial(bias_kernel, ids=ids, inner=inner)
  (bar,) = call.run(
    "bias",
    kernel,
    tuple(sizes[axis] for axis in order),
    specs,
    _gradient_inputs(arrays, specs),
    [(bias.shape, call.dtype, spec)],
    [],
    parallel=4 - len(inner),
  )
  b, n, t, s = x.bias.shape
  bar = jnp.swapaxes(bar[..., :s, :t], 3, 4)
  return bar.reshape(b, n, t, s).astype(x.bias.dtype)


class Call:
  """One call, cut into blocks: what all of its kernels share."""

  def __init__(
    self,
    x: Operands,
    options: Options,
    *,
    backward: bool,
    interpret: Any,
    operation: str = "flash_attention",
  ):
    """Cuts the call of an operation whose scores are those of ``x``."""
    if interpret and varying_axes(x[-3:]):
      # JAX's interpreter cannot look up what varies inside a shard_map.
      x = x._replace(
        mask=visible(x, options),
        query_lengths=None,
        key_lengths=None,
        offset=None,
      )
      options = options._replace(before=None, after=None)
    sizes = config.tpu_block_sizes(x, options, exact=bool(interpret))
    self.x, self.options, self.interpret = x, options, interpret
    self.plan = _blocks.plan(x, options, sizes, backward=backward)
    self.dtype = accumulator(x.query.dtype)
    self.operation = operation

  def run(
    self,
    name: str,
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    specs: Specs,
    inputs: list[Any],
    outputs: list[Any],
    scratch: list[tuple[int, ...]],
    parallel: int = 3,
  ) -> Any:
    """Calls a kernel on ``inputs`` and what hides or shifts scores."""
    extras = self._extras(specs)
    arrays = [array for array, _ in (*inputs, *extras.values())]
    kernel = functools.partial(
      with_names, kernel, self.plan, self.options, tuple(extras), len(inputs),
      len(outputs),
    )  # fmt: skip
    bounds = _blocks.bounds(self.x)
    return pl.pallas_call(
      kernel,
      out_shape=[
        out_struct(shape, dtype, (bounds, arrays))
        for shape, dtype, _ in outputs
      ],
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=grid,
        in_specs=[spec for _, spec in (*inputs, *extras.values())],
        out_specs=[spec for _, _, spec in outputs],
        scratch_shapes=[pltpu.VMEM(shape, self.dtype) for shape in scratch],
      ),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel",) * parallel
        + ("arbitrary",) * (len(grid) - parallel)
      ),
      interpret=self.interpret,
      name=f"{self.operation}_{name}",
    )(bounds, *arrays)

  def _extras(self, specs: Specs) -> dict[str, Any]:
    x, plan, extras = self.x, self.plan, {}
    for name, array in (("bias", x.bias), ("mask", x.mask)):
      if array is not None:
        array = array.astype(jnp.int8) if name == "mask" else array
        array = _tpu_arrays.scores_of(array, plan)
        extras[name] = array, specs.scores(array.shape)
    if x.query_segments is not None:
      query = x.query_segments.astype(jnp.int32)[:, :, None]
      one_head = plan._replace(heads=1)
      query = _tpu_arrays.lanes_of(jnp.repeat(query, plan.group, 2), one_head)
      extras["query_segments"] = query[:, 0], specs.query_segments()
      key = x.key_segments.astype(jnp.int32)[:, :, None, None]
      key = _tpu_arrays.keys_of(key, plan)
      extras["key_segments"] = key[:, 0], specs.key_segments()
    return extras
