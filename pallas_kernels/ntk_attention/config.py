"""Block sizes of NTK-Attention: those of exact attention, and of features."""

import dataclasses

from pallas_kernels._sizes import GPU_SHARED, TPU_LANES, up
from pallas_kernels.flash_attention import config as flash
from pallas_kernels.flash_attention.config import BlockSizes
from pallas_kernels.ntk_attention.operands import Operands, Options, as_flash

_TPU_FEATURES = 512


def tpu_blocks(
  x: Operands, options: Options, *, exact: bool
) -> tuple[BlockSizes, int]:
  """Block sizes of one call on a TPU.

  Args:
    x: the operands.
    options: static facts.
    exact: whether any size will do, as it does for an interpreter; else there
      are whole tiles of the hardware.

  Returns:
    Block sizes of exact attention, and how many features are in a block.
  """
  call = as_flash(x, options)
  sizes = flash.tpu_block_sizes(*call, exact=exact)
  num = x.z.shape[1]
  if exact:
    return sizes, min(num, options.block_features or num)
  num = up(num, TPU_LANES)
  if options.block_sizes is None:
    sizes = _that_fit(x, options, sizes)
  if options.block_features is not None:
    return sizes, min(num, options.block_features)
  most = flash.tpu_bytes_left(call[0], sizes) // _tpu_bytes(x, sizes, 1)
  most = max(most // TPU_LANES, 1) * TPU_LANES
  return sizes, min(num, most, _TPU_FEATURES)


def tpu_reason(x: Operands, options: Options) -> str | None:
  """Why a TPU cannot run these block sizes; None if it can."""
  call = as_flash(x, options)
  if reason := flash.tpu_reason(*call):
    return reason
  asked = options.block_features or TPU_LANES
  if asked % TPU_LANES:
    return (
      f"block_features must be a multiple of {TPU_LANES} on a TPU, got {asked}"
      f": use {up(asked, TPU_LANES)}"
    )
  sizes, features = tpu_blocks(x, options, exact=False)
  if _fits(x, options, sizes, features):
    return None
  change = _that_fit(x, options, sizes)
  if not _fits(x, options, change, TPU_LANES):
    advice = "fewer heads of query to one of key"
    for block_q in range(TPU_LANES, sizes.block_q, TPU_LANES):
      fewer = dataclasses.replace(change, block_q=block_q)
      if _fits(x, options, fewer, TPU_LANES):
        advice = f"block_q={block_q}"
  elif change == sizes:
    advice = f"block_features={TPU_LANES}"
  else:
    advice = f"block_k={change.block_k}"
  return (
    f"block_q={sizes.block_q} with block_k={sizes.block_k} leaves "
    f"{max(flash.tpu_bytes_left(call[0], sizes), 0) >> 10} KiB of a TPU's VMEM "
    f"to features, and {features} of them take "
    f"{_tpu_bytes(x, sizes, features) >> 10}: use {advice}"
  )


def gpu_reason(x: Operands, options: Options) -> str | None:
  """Why a GPU cannot run these block sizes; None if it can."""
  call = as_flash(x, options)
  if reason := flash.gpu_reason(*call):
    return reason
  sizes = flash.gpu_block_sizes(call[1])
  h, hv = (up(y.shape[3], flash.GPU_HEAD) for y in (x.query, x.value))
  # Two blocks of keys and values at a time, in 16 bits; sums in 32.
  needed = 4 * sizes.block_k * (h + hv)
  needed += sizes.block_q * (2 * (h + hv) + 4 * hv + 8)
  if needed > GPU_SHARED:
    return (
      f"block_q={sizes.block_q} with block_k={sizes.block_k} needs "
      f"{needed >> 10} KiB of a GPU's shared memory, which has "
      f"{GPU_SHARED >> 10}: use block_k=64"
    )
  return None


def _that_fit(x: Operands, options: Options, sizes: BlockSizes) -> BlockSizes:
  """Fewer keys in a block, where so many leave no room for features."""
  while sizes.block_k > TPU_LANES and (not _fits(x, options, sizes, TPU_LANES)):
    block_k = up(sizes.block_k // 2, TPU_LANES)
    sizes = dataclasses.replace(sizes, block_k=block_k)
  return sizes


def _fits(
  x: Operands, options: Options, sizes: BlockSizes, features: int
) -> bool:
  left = flash.tpu_bytes_left(as_flash(x, options)[0], sizes)
  return _tpu_bytes(x, sizes, features) <= left


def _tpu_bytes(x: Operands, sizes: BlockSizes, features: int) -> int:
  """VMEM of blocks of features and of states, two of each at a time."""
  n, kv = x.query.shape[2], x.key.shape[2]
  states = x.z.shape[0] // kv * up(x.z.shape[2] + 1, 8)
  return 2 * 4 * features * (sizes.block_q * (n // kv) + states)
