r"""Tiles of attention for a small cache.

A product of tiles keeps b x b sums, and two strips that it is a sum of outer
products of. The words it moves depend on b alone, and are fewest for the
largest one with :math:`b^2 + 4 b \le M` (arXiv 2410.09397), M words of cache.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from pallas_kernels.small_cache_attention.operands import Operands, Options

# Rows and columns of a tile, unless asked for otherwise.
BLOCK_SIZE = 512
_LANES = 128
_VMEM = 16 * 2**20


def depth(block_size: int) -> int:
  """Terms that are added to a tile at a time: a strip is so wide."""
  return math.gcd(block_size, _LANES)


def tpu_reason(x: "Operands", options: "Options") -> str | None:
  """Why a TPU cannot run these tiles; None if it can."""
  size = options.block_size
  if size % _LANES:
    return (
      f"block_size must be a multiple of {_LANES} on a TPU, got {size}: use "
      f"{-(-size // _LANES) * _LANES}"
    )
  item = x.query.dtype.itemsize
  fits = size
  while _tpu_bytes(fits, item) > _VMEM:
    fits -= _LANES
  if fits == size:
    return None
  return (
    f"block_size={size} needs {_tpu_bytes(size, item) >> 20} MiB of a TPU's "
    f"VMEM, which has {_VMEM >> 20}: use block_size={fits}"
  )


def _tpu_bytes(block_size: int, item: int) -> int:
  """VMEM of the largest kernel, which takes tiles in and out."""
  # Sums and what they become are wide; blocks come and go two at a time.
  tile = 2 * 4 + max(2 * 4, 4 * item)
  return block_size * (tile * block_size + 4 * item * depth(block_size))
