"""Block sizes of exact attention, for kernels and the XLA path alike."""

import dataclasses
from typing import TYPE_CHECKING

from pallas_kernels._sizes import (
  GPU_BLOCKS,
  TPU_LANES,
  TPU_VMEM,
  check_positive,
  up,
)

if TYPE_CHECKING:
  from pallas_kernels.flash_attention.operands import Operands, Options


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Tile sizes of exact attention: speed and memory, never the result.

  Sizes larger than the sequence are cut to it; a last block that sticks out is
  handled inside. With grouped-query attention a tile holds ``block_q`` queries
  of every head in the group.

  Attributes:
    block_q: queries in a tile of the forward pass.
    block_k: keys in a tile of the forward pass.
    block_q_bwd: queries in a tile of the backward pass.
    block_k_bwd: keys in a tile of the backward pass.

  Raises:
    ValueError: if a size is not a positive integer.

  Example:
    >>> BlockSizes(block_q=1024).block_k
    512
  """

  block_q: int = 512
  block_k: int = 512
  block_q_bwd: int = 512
  block_k_bwd: int = 512

  def __post_init__(self):
    """Refuses sizes that are no positive integers."""
    check_positive(self)


# On a TPU: rows of a tile (queries of all heads of a group) and keys. Backward,
# the largest powers of two that VMEM holds; forward, so many queries that
# copies of keys are hidden behind products. benchmarks/KERNELS.md has figures.
TPU = BlockSizes(1024, 1024, 1024, 1024)


# On a GPU: a warp group multiplies 64 rows at a time.
_GPU_ROWS = 64
GPU = BlockSizes(_GPU_ROWS, _GPU_ROWS, _GPU_ROWS, _GPU_ROWS)
GPU_HEAD = 64
_GPU_MAX_HEAD = 128


def gpu_block_sizes(options: "Options") -> BlockSizes:
  """Block sizes of one call on a GPU; sequences are padded to them."""
  return options.block_sizes or GPU


def gpu_reason(x: "Operands", options: "Options") -> str | None:
  """Why a GPU cannot run these sizes; None if it can."""
  for name, y in (("query", x.query), ("value", x.value)):
    if y.shape[3] > _GPU_MAX_HEAD:
      return (
        f"the GPU kernel takes head sizes up to {_GPU_MAX_HEAD}, got "
        f"{y.shape[3]} in {name}"
      )
    if y.shape[1] > GPU_BLOCKS * _GPU_ROWS:
      return (
        f"the GPU kernel takes up to {GPU_BLOCKS * _GPU_ROWS} tokens, got "
        f"{y.shape[1]} in {name}"
      )
    if y.shape[2] > GPU_BLOCKS:
      return (
        f"the GPU kernel takes up to {GPU_BLOCKS} heads, got {y.shape[2]} in "
        f"{name}"
      )
  sizes = gpu_block_sizes(options)
  for field in dataclasses.fields(BlockSizes):
    size = getattr(sizes, field.name)
    if size not in (64, 128):
      return f"{field.name} must be 64 or 128 on a GPU, got {size}"
  return None


def tpu_block_sizes(
  x: "Operands", options: "Options", *, exact: bool
) -> BlockSizes:
  """Block sizes of one call on a TPU.

  Args:
    x: the operands.
    options: static facts.
    exact: whether any size will do, as it does for an interpreter; else
      sequences are padded to whole tiles of the hardware.

  Returns:
    Block sizes that are no larger than the (padded) sequences.
  """
  sizes = options.block_sizes
  group = x.query.shape[2] // x.key.shape[2]
  chosen = {}
  for name in ("block_q", "block_q_bwd", "block_k", "block_k_bwd"):
    queries = name.startswith("block_q")
    length = x.query.shape[1] if queries else x.key.shape[1]
    if sizes is None:
      size = getattr(TPU, name)
      size = up(-(-size // group), TPU_LANES) if queries else size
      # As many blocks, but of one size: less of the last one is padding.
      size = -(-length // -(-length // size))
      chosen[name] = size if exact else up(size, TPU_LANES)
    else:
      size = getattr(sizes, name)
      chosen[name] = min(size, length if exact else up(length, TPU_LANES))
  if sizes is None:
    for end in ("", "_bwd"):
      block_q, block_k = chosen[f"block_q{end}"], chosen[f"block_k{end}"]
      chosen[f"block_k{end}"] = _block_k_that_fits(x, block_q, block_k, end)
  return BlockSizes(**chosen)


def tpu_reason(x: "Operands", options: "Options") -> str | None:
  """Why a TPU cannot run these block sizes; None if it can."""
  for field in dataclasses.fields(BlockSizes):
    size = getattr(options.block_sizes or TPU, field.name)
    if size % TPU_LANES:
      return (
        f"{field.name} must be a multiple of {TPU_LANES} on a TPU, got {size}"
        f": use {up(size, TPU_LANES)}"
      )
  sizes = tpu_block_sizes(x, options, exact=False)
  for end in ("", "_bwd"):
    block_q, block_k = (
      getattr(sizes, f"block_{axis}{end}") for axis in ("q", "k")
    )
    fits = _block_k_that_fits(x, block_q, block_k, end)
    if _tpu_bytes(x, block_q, fits, end) > TPU_VMEM:
      return (
        f"block_q{end}={block_q} queries of {x.query.shape[2]} heads on "
        f"{x.key.shape[2]} with head sizes {x.query.shape[3]} and "
        f"{x.value.shape[3]} do not fit into the {TPU_VMEM >> 20} MiB of a "
        f"TPU's VMEM with any block_k{end}: use {_smaller(x, block_q, end)}"
      )
    if fits != block_k:
      return (
        f"block_q{end}={block_q} with block_k{end}={block_k} needs "
        f"{_tpu_bytes(x, block_q, block_k, end) >> 20} MiB of a TPU's VMEM, "
        f"which has {TPU_VMEM >> 20}: use block_k{end}={fits}"
      )
  return None


def _smaller(x: "Operands", block_q: int, end: str) -> str:
  for size in range(up(block_q, TPU_LANES) - TPU_LANES, 0, -TPU_LANES):
    if _tpu_bytes(x, size, TPU_LANES, end) <= TPU_VMEM:
      return f"block_q{end}={size}"
  return "smaller heads, or fewer heads of query to one of key"


def tpu_bytes_left(x: "Operands", sizes: BlockSizes) -> int:
  """VMEM that the forward pass leaves to what an operation adds to it."""
  return TPU_VMEM - _tpu_bytes(x, sizes.block_q, sizes.block_k, "")


def _block_k_that_fits(
  x: "Operands", block_q: int, block_k: int, end: str
) -> int:
  while block_k > TPU_LANES and (
    _tpu_bytes(x, block_q, block_k, end) > TPU_VMEM
  ):
    block_k = up(block_k // 2, TPU_LANES)
  return block_k


def _tpu_bytes(x: "Operands", block_q: int, block_k: int, end: str) -> int:
  """VMEM of the largest kernel of a pass; what the compiler takes is close."""
  rows = block_q * (x.query.shape[2] // x.key.shape[2])
  size, value_size = (up(y.shape[3], TPU_LANES) for y in (x.query, x.value))
  sizes = size + value_size
  item = x.query.dtype.itemsize
  # Scores, and backward their cotangents too, in float32; and what is added to
  # them or hides them, at its full width.
  wide = 2 if end else 1
  wide += (x.bias is not None) + (x.mask is not None)
  # Blocks of both axes come in, two at a time; one kind is summed up, and
  # leaves.
  blocks = 2 * item * sizes * (rows + block_k)
  summed = max(sizes * block_k, size * rows) if end else value_size * rows
  summed *= 4 + 2 * item
  return 4 * wide * rows * block_k + blocks + summed
