r"""Polynomial attention on an NVIDIA GPU of capability 9, and its gradients.

As ``mosaic_tpu``, but chunks are no loop: each has a state of its own, summed
up by as many warp groups as there are blocks of features, and XLA adds those of
the chunks before, or behind. So all tiles of tokens are worked on at once, and
no number of features is too large for shared memory.

Matrices are multiplied as sums of two numbers of bfloat16, see
``_gpu_kernels``: more exact than what "default" means on a GPU, which is
TensorFloat-32, and less so than "highest".
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._batching import fold_batch
from pallas_kernels._compat import grid_name, plgpu, vary_with
from pallas_kernels._products import precision_of
from pallas_kernels._sizes import up
from pallas_kernels.polynomial_attention import _gpu_kernels, config
from pallas_kernels.polynomial_attention._gpu_kernels import (
  FEATURES,
  PAIRS,
  TOKENS,
  Buffers,
  Split,
  Tile,
)
from pallas_kernels.polynomial_attention.operands import (
  Gradients,
  Operands,
  Options,
  products,
)


def supports(x: Operands, options: Options) -> str | None:
  """Why these operands cannot use the kernels; None if they can."""
  if x.query.dtype != jnp.float32:
    return f"the GPU kernel takes float32, got {x.query.dtype}"
  default, high = lax.Precision.DEFAULT, lax.Precision.HIGH
  if precision_of(options.precision) not in (None, default, high):
    return (
      "the GPU kernel multiplies with precision None, 'default' or 'high', got "
      f"{options.precision!r}"
    )
  return config.gpu_reason(x, options)


def forward(
  x: Operands, options: Options, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Output, and what the backward pass needs.

  Args:
    x: the operands.
    options: static facts.
    interpret: ``gpu_interpreter()`` of ``_compat``, to run anywhere.

  Returns:
    Output (P, Hv, G, T); denominators (P, 1, G, T), 1 where nothing is seen;
    and, unless causal, the unweighted state (P, m, Hv + 1).

  Cost:
    6 (T G + S) m (Hv + 1) flops a pair, and at most 6 T G c (H + Hv + 1) more
    in causal calls with chunks of c; moves operands and output once or twice,
    and a state for each chunk.
  """
  return fold_batch(functools.partial(_forward, options, interpret))(x)


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
      last, that of the denominator.
    interpret: as in ``forward``.

  Returns:
    Each of its operand's shape and dtype.

  Cost:
    About three times that of ``forward``.
  """
  run = functools.partial(_backward, options, interpret)
  return fold_batch(run)(x, total, sums_bar)


def _forward(options: Options, interpret: Any, x: Operands) -> Any:
  call = _Call(x, options, interpret)
  query, key, value = call.query, call.key, call.value
  if options.is_causal:
    total, sums = None, call.local_forward(query, key, value)
    if call.chunks > 1:
      before = call.before(call.moments(key, value))
      sums += call.read(query, before, empty=0)
  else:
    total = call.moments(key, value).sum(1)
    sums = call.read(query, call.shared(total))
    total = total[:, : len(options.weights), : x.value.shape[1]]
  sums = call.tokens_last(sums, x.query.shape[3])
  size = x.value.shape[1] - 1
  out, denominator = sums[:, :size], sums[:, size : size + 1]
  # Nothing seen: no weights, and 0 for an output.
  safe = jnp.where(denominator == 0, 1, denominator)
  return out / safe, safe, total


def _backward(
  options: Options,
  interpret: Any,
  x: Operands,
  total: jax.Array | None,
  sums_bar: jax.Array,
) -> Gradients:
  call = _Call(x, options, interpret)
  query, key, value = call.query, call.key, call.value
  bar = call.carried(sums_bar)
  if options.is_causal:
    query_bar = call.local_query(query, bar, key, value)
    key_bar, value_bar = call.local_key_value(key, value, query, bar)
    if call.chunks > 1:
      before = call.before(call.moments(key, value))
      query_bar += call.pull(query, bar, before, empty=0)
      behind, last = call.behind(call.moments(query, bar)), call.chunks - 1
      key_bar += call.pull(key, value, behind, empty=last)
      value_bar += call.read(key, behind, empty=last)
  else:
    assert total is not None
    query_bar = call.pull(query, bar, call.shared(total))
    state_bar = call.shared(call.moments(query, bar).sum(1))
    key_bar = call.pull(key, value, state_bar)
    value_bar = call.read(key, state_bar)
  (_, h, _, t), (_, v, s) = x.query.shape, x.value.shape
  return Gradients(
    call.tokens_last(query_bar, t)[:, :h],
    call.tokens_last(key_bar, s)[:, :h, 0],
    call.tokens_last(value_bar, s)[:, :v, 0],
  )


def _split(x: jax.Array) -> Split:
  """Outside of kernels, where XLA drops what two conversions would do."""
  head = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
  return Split(head.astype(jnp.bfloat16), (x - head).astype(jnp.bfloat16))


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
  """With zeros, which add nothing."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = 0, size - x.shape[axis]
  return jnp.pad(x, widths)


def _table(dim: int, degree: int) -> np.ndarray:
  """Variables (m, degree) that monomials are products of; ``dim`` is a one."""
  ones = [dim] * degree
  rows = [ones]
  if degree:
    rows += [[variable, *ones[1:]] for variable in range(dim)]
  for variable, before, _, size in products(dim, degree):
    for factors in rows[before : before + size]:
      rows.append([variable, *factors[:-1]])
  return np.asarray(rows, np.int32).reshape(len(rows), degree)


class _Tokens(NamedTuple):
  """Queries or keys, for features and for pairs.

  Attributes:
    rows: (P, G, H + 1, T), a row of ones last.
    parts: (P, G, T, D).
  """

  rows: jax.Array
  parts: Split


_Shapes = list[tuple[tuple[int, ...], Any]]


class _Call:
  """One call, cut into tiles: what all of its kernels share."""

  def __init__(self, x: Operands, options: Options, interpret: Any):
    self.options, self.interpret = options, interpret
    self.pairs, self.dim, _, length = x.query.shape
    self.chunk = config.gpu_chunk_size(x, options)
    self.chunks = -(-up(length, TOKENS) // self.chunk)
    self.width = config.gpu_columns(x.value.shape[1])
    table = _table(self.dim, options.degree)
    # What is padded is a one, with weight 0.
    num, degree = table.shape
    padding = (0, -num % FEATURES), (0, int(degree == 0))
    self.table = np.pad(table, padding, constant_values=self.dim)
    self.query, self.key = (
      self._tokens(x.query),
      self._tokens(x.key[:, :, None]),
    )
    self.value = self.carried(x.value[:, :, None])

  def _tokens(self, x: jax.Array) -> _Tokens:
    """Of (P, H, G, T)."""
    x = _padded(x.swapaxes(1, 2), 3, up(x.shape[3], TOKENS))
    rows = jnp.concatenate([x, jnp.ones_like(x[:, :, :1])], 2)
    x = _padded(x.swapaxes(2, 3), 3, config.gpu_columns(self.dim))
    return _Tokens(rows, _split(x))

  def carried(self, x: jax.Array) -> Split:
    """(P, v, G, T) as (P, G, T, N)."""
    x = _padded(x.transpose(0, 2, 3, 1), 3, self.width)
    return _split(_padded(x, 2, up(x.shape[2], TOKENS)))

  def tokens_last(self, x: jax.Array, length: int) -> jax.Array:
    """(P, G, T, v) -> (P, v, G, T), without what was padded."""
    return x.transpose(0, 3, 1, 2)[..., :length]

  def shared(self, total: jax.Array) -> Split:
    """One state for all tokens, weighted."""
    for axis, size in enumerate(self._state, 1):
      total = _padded(total, axis, size)
    return self._weighted(total[:, None])

  def before(self, states: jax.Array) -> Split:
    """Of each chunk, the weighted state of all before it."""
    sums = jnp.cumsum(states[:, :-1], 1)
    return self._weighted(jnp.pad(sums, ((0, 0), (1, 0), (0, 0), (0, 0))))

  def behind(self, states: jax.Array) -> Split:
    """Of each chunk, the weighted state of all behind it."""
    sums = jnp.cumsum(states[:, :0:-1], 1)[:, ::-1]
    return self._weighted(jnp.pad(sums, ((0, 0), (0, 1), (0, 0), (0, 0))))

  @property
  def _state(self) -> tuple[int, int]:
    return self.table.shape[0], self.width

  def _weighted(self, states: jax.Array) -> Split:
    weights = np.zeros((self.table.shape[0], 1), np.float32)
    weights[: len(self.options.weights), 0] = self.options.weights
    return _split(states * weights[None, None])

  def moments(self, tokens: _Tokens, carried: Split) -> jax.Array:
    """States (P, chunks, m, N), unweighted."""
    heads, size, length = tokens.rows.shape[1:]
    chunks = -(-length // self.chunk)
    shape, features = (TOKENS, self.width), (FEATURES, TOKENS)
    return self._run(
      _gpu_kernels.moments,
      {"block": self._state[0] // FEATURES, "chunk": chunks},
      [self.table, tokens.rows, *carried],
      [(chunks, *self._state)],
      streamed=[((size, TOKENS), jnp.float32), *[(shape, jnp.bfloat16)] * 2],
      work=[(features, jnp.float32), ((FEATURES, self.width), jnp.float32)],
      length=length, heads=heads,
    )[0]  # fmt: skip

  def read(
    self, tokens: _Tokens, states: Split, *, empty: int = -1
  ) -> jax.Array:
    """What tokens find in the state of their chunk: (P, G, T, N)."""
    heads, size, length = tokens.rows.shape[1:]
    block, features = (FEATURES, self.width), (FEATURES, TOKENS)
    return self._run(
      _gpu_kernels.read,
      {"tile": length // TOKENS, "head": heads},
      [self.table, tokens.rows, *states],
      [(heads, length, self.width)],
      fetched=[((size, TOKENS), jnp.float32)],
      streamed=[(block, jnp.bfloat16)] * 2,
      work=[
        (features, jnp.float32), *[(features, jnp.bfloat16)] * 2,
        ((TOKENS, self.width), jnp.float32),
      ],
      length=length, empty=empty, shared=states.head.shape[1] == 1,
    )[0]  # fmt: skip

  def pull(
    self, tokens: _Tokens, carried: Split, states: Split, *, empty: int = -1
  ) -> jax.Array:
    """Cotangents (P, G, T, H + 1) of tokens, from those of what they find."""
    heads, size, length = tokens.rows.shape[1:]
    rows, shape = (size, TOKENS), (TOKENS, self.width)
    (bar,) = self._run(
      _gpu_kernels.pull,
      {"tile": length // TOKENS, "head": heads},
      [self.table, tokens.rows, *carried, *states],
      [(heads, size, length)],
      fetched=[(rows, jnp.float32), *[(shape, jnp.bfloat16)] * 2],
      streamed=[((FEATURES, self.width), jnp.bfloat16)] * 2,
      work=[((FEATURES, TOKENS), jnp.float32), (rows, jnp.float32)],
      length=length, empty=empty, shared=states.head.shape[1] == 1,
    )  # fmt: skip
    bar = bar[:, :, : self.dim].swapaxes(2, 3)
    return _padded(bar, 3, config.gpu_columns(self.dim))

  def local_forward(
    self, query: _Tokens, key: _Tokens, value: Split
  ) -> jax.Array:
    """Sums (P, G, T, N) over the keys of a query's own chunk."""
    return self._local(
      _gpu_kernels.local_forward, [query.parts], [key.parts, value], [value]
    )[0]

  def local_query(
    self, query: _Tokens, bar: Split, key: _Tokens, value: Split
  ) -> jax.Array:
    """Cotangents (P, G, T, D) by the keys of a query's own chunk."""
    return self._local(
      _gpu_kernels.local_query, [query.parts, bar], [key.parts, value],
      [query.parts],
    )[0]  # fmt: skip

  def local_key_value(
    self, key: _Tokens, value: Split, query: _Tokens, bar: Split
  ) -> list[jax.Array]:
    """Cotangents (P, 1, T, D), (P, 1, T, N) by the queries of a chunk."""
    own = [key.parts, value]
    return self._local(
      _gpu_kernels.local_key_value, own, [query.parts, bar], own
    )

  def _local(
    self,
    kernel: Callable[..., None],
    own: list[Split],
    others: list[Split],
    like: list[Split],
  ) -> list[jax.Array]:
    """Outputs have the heads of ``own`` and the widths of ``like``."""
    heads, length, _ = own[0].head.shape[1:]

    def tiles(splits: list[Split]) -> _Shapes:
      arrays = [x for s in splits for x in s]
      return [((PAIRS, x.shape[3]), x.dtype) for x in arrays]

    widths = [s.head.shape[3] for s in like]
    return self._run(
      kernel,
      {"tile": length // PAIRS, "head": heads},
      [x for s in own + others for x in s],
      [(heads, length, width) for width in widths],
      fetched=tiles(own),
      streamed=tiles(others),
      work=[((PAIRS, width), jnp.float32) for width in widths],
      length=length, size=PAIRS, heads=others[0].head.shape[1],
    )  # fmt: skip

  def _run(
    self,
    kernel: Callable[..., None],
    grid: dict[str, int],
    inputs: list[Any],
    outputs: list[tuple[int, ...]],
    *,
    fetched: _Shapes = [],  # noqa: B006
    streamed: _Shapes,
    work: _Shapes,
    length: int,
    size: int = TOKENS,
    heads: int = 1,
    empty: int = -1,
    shared: bool = False,
  ) -> list[jax.Array]:
    """Calls a kernel for tiles of ``size`` tokens.

    The outputs are float32, and begin with P, which is left out here.
    """
    tile = Tile(
      num_features=len(self.options.weights),
      coefficients=self.options.coefficients(self.dim),
      radius=self.options.radius if self.options.is_causal else None,
      tiles=self.chunk // size,
      num_tiles=length // size,
      heads=heads,
      empty=empty,
      shared=shared,
      interpret=bool(self.interpret),
    )
    slots = config.gpu_slots(*map(_bytes, (fetched + work, streamed)))
    ends = len(inputs), len(inputs) + len(outputs)

    def body(*refs: Any) -> None:
      parts = refs[: ends[0]], refs[ends[0] : ends[1]]
      kernel(tile, *parts, Buffers(*refs[ends[1] :]))

    body.__name__ = f"polynomial_attention_{kernel.__name__}"
    results = plgpu.kernel(
      body,
      out_type=[
        jax.ShapeDtypeStruct((self.pairs, *shape), jnp.float32)
        for shape in outputs
      ],
      scratch_types=[
        [plgpu.SMEM(shape, dtype) for shape, dtype in fetched],
        [plgpu.SMEM((slots, *shape), dtype) for shape, dtype in streamed],
        [plgpu.SMEM(shape, dtype) for shape, dtype in work],
        [plgpu.Barrier(num_barriers=1) for _ in fetched],
        [plgpu.Barrier(num_barriers=slots) for _ in streamed],
      ],
      compiler_params=plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup
      ),
      interpret=self.interpret,
      grid=(*grid.values(), self.pairs),
      grid_names=tuple(map(grid_name, (*grid, "pair"))),
    )(*inputs)
    return [vary_with(y, inputs) for y in results]


def _bytes(buffers: _Shapes) -> int:
  sizes = [math.prod(s) * jnp.dtype(dtype).itemsize for s, dtype in buffers]
  return config.gpu_bytes(sizes)
