r"""Polynomial attention on a TPU: forward, and the gradients of all operands.

With monomials :math:`\phi`, weights w and :math:`S = \sum_j \phi(k_j) v_j^\top`
for values with a row of ones, sums are :math:`s_i = (w \circ S)^\top
\phi(q_i)`, an output is the quotient of all but the last and the last one.
Features are made in VMEM, for a chunk of tokens at a time, and never leave it.

Causal, in one pass: S of the chunks before is kept in scratch, and the pairs
inside a chunk are taken one by one. Backward in two passes, one for queries in
the same order, and one for keys and values from the last chunk to the first.
Else S is summed up first, and read then; backward the other way around.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._compat import out_struct, pl, pltpu
from pallas_kernels._products import precision_of, tpu_reason
from pallas_kernels.polynomial_attention import _tpu_kernels, config
from pallas_kernels.polynomial_attention.operands import (
  Gradients,
  Operands,
  Options,
)

# A plain 0 would be 64 bits wide under x64, and Mosaic refuses to compile it.
_ZERO = np.int32(0)


def supports(x: Operands, options: Options) -> str | None:
  """Why these operands cannot use the kernels; None if they can."""
  reason = tpu_reason(x.query.dtype, (jnp.float32,), options.precision)
  return reason or config.tpu_reason(x, options)


def forward(
  x: Operands, options: Options, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Output, and what the backward pass needs.

  Args:
    x: the operands.
    options: static facts.
    interpret: True, or ``pltpu.InterpretParams``, to run anywhere.

  Returns:
    Output (P, Hv, G, T); denominators (P, 1, G, T), 1 where nothing is seen;
    and, unless causal, the unweighted state (P, m, Hv + 1).

  Cost:
    2 (T G + S) m (Hv + 1) flops a pair, and 2 T G c (H + Hv + 1) more in causal
    calls; moves each operand and the output once.
  """
  call = _Call(x, options, interpret)
  query, key, value = call.arrays
  outputs = [call.heads(x.value.shape[1] - 1), call.heads(1)]
  if options.is_causal:
    inputs = [call.weights(), query, key, value]
    kernel = _tpu_kernels.causal_forward
    out, denominator = call.run(
      kernel, call.by_head(), inputs, outputs, [call.state, call.features]
    )
    total = None
  else:
    (total,) = call.run(
      _tpu_kernels.moments, call.once(key), [key, value], [call.total()],
      [call.features],
    )  # fmt: skip
    out, denominator = call.run(
      _tpu_kernels.read, call.by_head(), [call.weighted(total), query], outputs,
      [call.features],
    )  # fmt: skip
  length = x.query.shape[3]
  return _from_heads(out, length), _from_heads(denominator, length), total


def backward(
  x: Operands,
  options: Options,
  total: jax.Array | None,
  sums_bar: jax.Array,
  *,
  interpret: Any = False,
) -> Gradients:
  """Cotangents of query, key and value.

  Args:
    x: the operands.
    options: static facts.
    total: the state, from the forward pass.
    sums_bar: (P, Hv + 1, G, T), cotangent of the sums: that of the output and,
      last, that of the denominator; see ``divide_bar``.
    interpret: as in ``forward``.

  Returns:
    Each of its operand's shape and dtype.

  Cost:
    About 6 (T G + S) m (Hv + 1) flops a pair, and 8 T G c (H + Hv + 1) more in
    causal calls; moves each operand twice.
  """
  call = _Call(x, options, interpret)
  query, key, value = call.arrays
  bar = call.place(jnp.swapaxes(sums_bar, 1, 2))
  h, v = x.key.shape[1], x.value.shape[1]
  key_outputs = [call.tokens(h), call.tokens(v)]
  work = [call.features, call.features]
  if options.is_causal:
    inputs = [call.weights(), query, key, value, bar]
    (query_bar,) = call.run(
      _tpu_kernels.causal_query, call.by_head(), inputs, [call.heads(h)],
      [call.state, *work],
    )  # fmt: skip
    key_bar, value_bar = call.run(
      _tpu_kernels.causal_key_value, call.by_head(reverse=True), inputs,
      key_outputs, [call.state, *work],
    )  # fmt: skip
  else:
    query_bar, state_bar = call.run(
      _tpu_kernels.full_query, call.by_head(),
      [call.weighted(total), query, bar], [call.heads(h), call.total()], work,
    )  # fmt: skip
    key_bar, value_bar = call.run(
      _tpu_kernels.full_key_value, call.once(key),
      [call.weighted(state_bar), key, value], key_outputs, work,
    )  # fmt: skip
  s = x.key.shape[2]
  return Gradients(
    _from_heads(query_bar, x.query.shape[3]),
    key_bar[:, 0, :, :s],
    value_bar[:, 0, :, :s],
  )


def divide_bar(
  out: jax.Array, denominator: jax.Array, out_bar: jax.Array
) -> jax.Array:
  """Cotangent of the sums (P, Hv + 1, G, T), from that of the output."""
  last = -(out_bar * out).sum(1, keepdims=True)
  return jnp.concatenate([out_bar, last], 1) / denominator


def _from_heads(x: jax.Array, length: int) -> jax.Array:
  """(P, G, v, T) -> (P, v, G, T), without what was padded."""
  return jnp.swapaxes(x, 1, 2)[..., :length]


class _Array(NamedTuple):
  """An input or output of a kernel.

  Attributes:
    shape: of the whole.
    block: of what a step takes.
    kind: "heads" (P, G, d, T), "tokens" (P, 1, d, S), "state" (P, m, v) or
      "all".
    value: None for an output.
  """

  shape: tuple[int, ...]
  block: tuple[int | None, ...]
  kind: str
  value: Any = None


class _Grid(NamedTuple):
  """Sizes (P, chunks, heads), and whether chunks go from the last."""

  sizes: tuple[int, int, int]
  reverse: bool = False

  def spec(self, array: _Array) -> pl.BlockSpec:
    """Which block of an array a step takes."""
    last = np.int32(self.sizes[1] - 1)

    def index(p: Any, i: Any, g: Any) -> Any:
      i = last - i if self.reverse else i
      return {
        "heads": (p, g, _ZERO, i),
        "tokens": (p, _ZERO, _ZERO, i),
        "state": (p, _ZERO, _ZERO),
        "all": (_ZERO, _ZERO),
      }[array.kind]

    return pl.BlockSpec(array.block, index)


class _Call:
  """One call, cut into chunks: what all of its kernels share."""

  def __init__(self, x: Operands, options: Options, interpret: Any):
    self.options, self.interpret = options, interpret
    self.dtype = x.query.dtype
    self.chunk = config.chunk_size(x, options, exact=bool(interpret))
    self.pairs, _, self.group, length = x.query.shape
    self.lengths = self._padded(length), self._padded(x.key.shape[2])
    num_features, self.width = len(options.weights), x.value.shape[1]
    self.state = num_features, self.width
    self.features = num_features, self.chunk
    self.tile = _tpu_kernels.Tile(
      options.coefficients(x.key.shape[1]),
      options.radius if options.is_causal else None,
      precision_of(options.precision),
    )
    self.arrays = (
      self.place(jnp.swapaxes(x.query, 1, 2)),
      self.place(x.key[:, None], "tokens"),
      self.place(x.value[:, None], "tokens"),
    )

  def _padded(self, length: int) -> int:
    return -(-length // self.chunk) * self.chunk

  def place(self, x: jax.Array, kind: str = "heads") -> _Array:
    """An input (P, G|1, d, length), padded with zeros, which add nothing."""
    pad = self._padded(x.shape[3]) - x.shape[3]
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, pad),))
    return _Array(x.shape, self._block(x.shape[2]), kind, x)

  def heads(self, size: int) -> _Array:
    """An output for each query."""
    shape = self.pairs, self.group, size, self.lengths[0]
    return _Array(shape, self._block(size), "heads")

  def tokens(self, size: int) -> _Array:
    """An output for each key."""
    shape = self.pairs, 1, size, self.lengths[1]
    return _Array(shape, self._block(size), "tokens")

  def _block(self, size: int) -> tuple[int | None, ...]:
    return None, None, size, self.chunk

  def total(self, value: Any = None) -> _Array:
    """A state as output, or as input."""
    shape = self.pairs, *self.state
    return _Array(shape, (None, *self.state), "state", value)

  def weighted(self, total: Any) -> _Array:
    """A state as input, times the weights of the features."""
    return self.total(total * self._column()[None])

  def weights(self) -> _Array:
    """The weights of the features as input."""
    column = self._column()
    return _Array(column.shape, column.shape, "all", column)

  def _column(self) -> jax.Array:
    return jnp.asarray(np.asarray(self.options.weights)[:, None], self.dtype)

  def by_head(self, *, reverse: bool = False) -> _Grid:
    """All heads of a chunk of queries, then the next chunk."""
    chunks = self.lengths[0] // self.chunk
    return _Grid((self.pairs, chunks, self.group), reverse)

  def once(self, keys: _Array) -> _Grid:
    """Chunk by chunk of the keys."""
    return _Grid((self.pairs, keys.shape[3] // self.chunk, 1))

  def run(
    self,
    kernel: Callable[..., None],
    grid: _Grid,
    inputs: list[_Array],
    outputs: list[_Array],
    scratch: list[tuple[int, ...]],
  ) -> Any:
    """Calls a kernel."""
    arrays = [x.value for x in inputs]
    ends = len(inputs), len(inputs) + len(outputs)

    def body(*refs: Any) -> None:
      parts = refs[: ends[0]], refs[ends[0] : ends[1]], refs[ends[1] :]
      kernel(self.tile, *parts)

    return pl.pallas_call(
      body,
      out_shape=[out_struct(x.shape, self.dtype, arrays) for x in outputs],
      grid=grid.sizes,
      in_specs=[grid.spec(x) for x in inputs],
      out_specs=[grid.spec(x) for x in outputs],
      scratch_shapes=[pltpu.VMEM(shape, self.dtype) for shape in scratch],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary")
      ),
      interpret=self.interpret,
      name=f"polynomial_attention_{kernel.__name__}",
    )(*arrays)
