"""How many tokens the kernels of polynomial attention take at a time."""

import math
from typing import Any

from pallas_kernels._products import accumulator
from pallas_kernels._sizes import (
  GPU_BLOCKS,
  GPU_SHARED,
  TPU_LANES,
  TPU_VMEM,
  up,
)
from pallas_kernels.polynomial_attention.operands import Operands, Options

# On a TPU: tokens of a chunk, as lanes.
TPU_CHUNK = 256
_TPU_SUBLANES = 8

# On a GPU: chunks are of whole tiles of tokens.
GPU_TILE = 128
_GPU_MAX_HEAD = 128
_GPU_ALIGN = 1024
# Tokens of the smallest blocks.
_GPU_PAIRS = 64


def chunk_size(x: Operands, options: Options, *, exact: bool) -> int:
  """Tokens of a chunk.

  Args:
    x: the operands.
    options: static facts.
    exact: whether any size will do, as it does for an interpreter; else
      sequences are padded to whole tiles of the hardware.

  Returns:
    A size that is no larger than the longest (padded) sequence.
  """
  length = max(x.query.shape[3], x.key.shape[2])
  longest = length if exact else up(length, TPU_LANES)
  if options.chunk_size is not None:
    return min(options.chunk_size, longest)
  return min(_chunk_that_fits(x, options, TPU_CHUNK), longest)


def tpu_reason(x: Operands, options: Options) -> str | None:
  """Why a TPU cannot run this chunk size; None if it can."""
  size = options.chunk_size
  if size is not None and size % TPU_LANES:
    return (
      f"chunk_size must be a multiple of {TPU_LANES} on a TPU, got {size}: "
      f"use {up(size, TPU_LANES)}"
    )
  size = chunk_size(x, options, exact=False)
  fits = _chunk_that_fits(x, options, size)
  needed = _tpu_bytes(x, options, fits)
  if needed > TPU_VMEM:
    return (
      f"{len(options.weights)} features of head size {x.key.shape[1]} and "
      f"degree {options.degree} need {_mebibytes(needed)} MiB of a TPU's VMEM, "
      f"which has {TPU_VMEM >> 20}: use {_smaller(x, options)}"
    )
  if fits != size:
    return (
      f"chunk_size={size} needs {_mebibytes(_tpu_bytes(x, options, size))} MiB "
      f"of a TPU's VMEM, which has {TPU_VMEM >> 20}: use chunk_size={fits}"
    )
  return None


def gpu_chunk_size(x: Operands, options: Options) -> int:
  """Tokens of a chunk on a GPU; no more than the longest padded sequence.

  Each chunk has a state in global memory: with as many tokens as features,
  they take no more room than what the tokens carry, and pairs inside of chunks
  no more products than features.
  """
  size = options.chunk_size or up(len(options.weights), GPU_TILE)
  longest = max(x.query.shape[3], x.key.shape[2])
  return min(size, up(longest, GPU_TILE))


def gpu_reason(x: Operands, options: Options) -> str | None:
  """Why a GPU cannot run these sizes; None if it can."""
  size = options.chunk_size
  if size is not None and size % GPU_TILE:
    return (
      f"chunk_size must be a multiple of {GPU_TILE} on a GPU, got {size}: use "
      f"{up(size, GPU_TILE)}"
    )
  for name, length in (("query", x.query.shape[3]), ("key", x.key.shape[2])):
    if length > GPU_BLOCKS * _GPU_PAIRS:
      return (
        f"the GPU kernel takes up to {GPU_BLOCKS * _GPU_PAIRS} tokens, got "
        f"{length} in {name}"
      )
  query, value = x.key.shape[1], x.value.shape[1] - 1
  for name, size in (("query", query), ("value", value)):
    if size > _GPU_MAX_HEAD:
      return (
        f"the GPU kernel takes head sizes up to {_GPU_MAX_HEAD}, got {size} in "
        f"{name}"
      )
  needed = _gpu_bytes(query, value)
  if needed > GPU_SHARED:
    fits = [v for v in range(value) if _gpu_bytes(query, v) <= GPU_SHARED]
    return (
      f"head size {query} with {value} in value needs {-(-needed // 1024)} KiB "
      f"of a GPU's shared memory, which has {GPU_SHARED >> 10}: use at most "
      f"{fits[-1]} in value"
    )
  return None


def gpu_columns(size: int) -> int:
  """Columns of a matrix in shared memory: whole rows of 32 bytes."""
  return up(size, 16)


def gpu_slots(once: int, each: int) -> int:
  """How many of what passes by shared memory holds, of 2 at most.

  Args:
    once: bytes of all else.
    each: bytes of one of them.
  """
  return 2 if once + 2 * each <= GPU_SHARED - _GPU_ALIGN else 1


def gpu_bytes(sizes: list[int]) -> int:
  """Shared memory that buffers take."""
  return sum(up(size, _GPU_ALIGN) for size in sizes)


def _gpu_bytes(query: int, value: int) -> int:
  """Shared memory of the largest kernels, which hold one of what passes by."""
  tokens, columns = 4 * (query + 1) * GPU_TILE, gpu_columns(value + 1)
  # Tiles of 64 features or tokens, in two halves of bfloat16 or in float32.
  features, state = 4 * 64 * GPU_TILE, 2 * 64 * columns
  read = [tokens, features, *[2 * 64 * GPU_TILE] * 2, 4 * GPU_TILE * columns]
  pull = [tokens, tokens, features, *[2 * GPU_TILE * columns] * 2]
  local = 64 * (gpu_columns(query) + columns)
  # Barriers too.
  return _GPU_ALIGN + max(
    gpu_bytes([*read, state, state]),
    gpu_bytes([*pull, state, state]),
    gpu_bytes([2 * local] * 4 + [4 * local]),
  )


def _smaller(x: Operands, options: Options) -> str:
  dim = x.key.shape[1]
  for degree in range(options.degree - 1, -1, -1):
    weights = (0.0,) * math.comb(dim + degree, degree)
    fewer = options._replace(weights=weights, degree=degree)
    if _tpu_bytes(x, fewer, TPU_LANES) <= TPU_VMEM:
      return f"degree={degree}"
  return "smaller heads"


def _chunk_that_fits(x: Operands, options: Options, size: int) -> int:
  while size > TPU_LANES and _tpu_bytes(x, options, size) > TPU_VMEM:
    size = up(size // 2, TPU_LANES)
  return size


def _tpu_bytes(x: Operands, options: Options, chunk: int) -> int:
  """VMEM of the largest kernel; what the compiler takes is close."""
  features = up(len(options.weights), _TPU_SUBLANES)
  size, value_size = x.key.shape[1], x.value.shape[1]
  # Features, and backward their cotangents too.
  numbers = 2 * features * chunk
  # The state, what is added to it; weights, or a state that comes in and one
  # that leaves, two at a time.
  state = features * up(value_size, TPU_LANES)
  if options.is_causal:
    numbers += 2 * state + 2 * features * TPU_LANES
    # Logits inside of a chunk, weights, and cotangents of both.
    numbers += 4 * chunk * chunk
  else:
    numbers += 4 * state
  # Tokens come in and leave, two chunks at a time.
  rows = up(size, _TPU_SUBLANES) + up(value_size, _TPU_SUBLANES)
  numbers += 2 * 3 * rows * chunk
  item: Any = accumulator(x.query.dtype)
  return numbers * item(0).itemsize


def _mebibytes(size: int) -> int:
  return -(-size // 2**20)
