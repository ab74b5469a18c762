"""Block sizes of tensor attention, as plain numbers."""

import dataclasses
from typing import TYPE_CHECKING

from pallas_kernels._sizes import TPU_LANES, TPU_VMEM, check_positive, up

if TYPE_CHECKING:
  from pallas_kernels.tensor_attention.operands import Operands, Options


@dataclasses.dataclass(frozen=True)
class TensorBlockSizes:
  """Tile sizes of tensor attention: speed and memory, never the result.

  Sizes larger than the sequence are cut to it; a last block that sticks out is
  handled inside. With grouped heads a tile holds ``block_q`` queries of every
  head in the group. A tile is one first key on a block of queries and a block
  of second keys; first keys are gone through one after another.

  Attributes:
    block_q: queries in a tile of the forward pass.
    block_k1: first keys that stay while a block of second keys does.
    block_k2: second keys in a tile of the forward pass.
    block_q_bwd: queries in a tile of the backward pass.
    block_k1_bwd: first keys whose gradients a call of the backward kernel sums
      up.
    block_k2_bwd: second keys in a tile of the backward pass.
    slab_q_bwd: queries whose gradients a call of the backward kernel sums up, a
      multiple of ``block_q_bwd``.

  Raises:
    ValueError: if a size is not a positive integer, or ``slab_q_bwd`` not a
      multiple.

  Example:
    >>> TensorBlockSizes(block_q=1024).block_k2
    512
  """

  block_q: int = 512
  block_k1: int = 256
  block_k2: int = 512
  block_q_bwd: int = 512
  block_k1_bwd: int = 512
  block_k2_bwd: int = 512
  slab_q_bwd: int = 2048

  def __post_init__(self):
    """Refuses sizes that are no positive integers, and slabs that are cut."""
    check_positive(self)
    if self.slab_q_bwd % self.block_q_bwd:
      raise ValueError(
        f"slab_q_bwd must be a multiple of block_q_bwd={self.block_q_bwd}, "
        f"got {self.slab_q_bwd}"
      )


# benchmarks/KERNELS.md holds the figures that these come from.
TPU = TensorBlockSizes()
# Of queries, as lanes; of second keys, as rows of any dtype; of first ones.
_TPU_MULTIPLES = {"q": TPU_LANES, "k1": 8, "k2": 16}


def tpu_block_sizes(
  x: "Operands", options: "Options", *, exact: bool
) -> TensorBlockSizes:
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
  lengths = {
    "q": x.query.shape[1], "k1": x.key1.shape[1], "k2": x.key2.shape[1],
  }  # fmt: skip
  group = x.query.shape[2] // x.key1.shape[2]
  chosen = dataclasses.asdict(sizes or TPU)
  for end in ("", "_bwd"):
    for axis, length in lengths.items():
      name, multiple = f"block_{axis}{end}", _TPU_MULTIPLES[axis]
      if sizes is None:
        shared = group if axis == "q" else 1
        size = up(-(-chosen[name] // shared), multiple)
        # As many blocks, but of one size: less of the last one is padding.
        size = -(-length // -(-length // size))
        chosen[name] = size if exact else up(size, multiple)
      longest = length if exact else up(length, multiple)
      chosen[name] = min(chosen[name], longest)
  block, slab = chosen["block_q_bwd"], chosen["slab_q_bwd"]
  if sizes is None:
    slab = -(-slab // group)
  # Whole blocks, and no more than there are queries.
  chosen["slab_q_bwd"] = min(
    max(slab // block, 1) * block, up(lengths["q"], block)
  )
  result = TensorBlockSizes(**chosen)
  return _that_fit(x, result) if sizes is None else result


def tpu_reason(x: "Operands", options: "Options") -> str | None:
  """Why a TPU cannot run these block sizes; None if it can."""
  asked = options.block_sizes or TPU
  for end in ("", "_bwd"):
    for axis, multiple in _TPU_MULTIPLES.items():
      name = f"block_{axis}{end}"
      size = getattr(asked, name)
      if size % multiple:
        return (
          f"{name} must be a multiple of {multiple} on a TPU, got {size}: use "
          f"{up(size, multiple)}"
        )
  sizes = tpu_block_sizes(x, options, exact=False)
  fits = _that_fit(x, sizes)
  if max(_tpu_bytes(x, fits)) > TPU_VMEM:
    return (
      f"tiles of {x.query.shape[2]} heads on {x.key1.shape[2]} with head sizes "
      f"{x.query.shape[3]} and {x.value1.shape[3]} do not fit into the "
      f"{TPU_VMEM >> 20} MiB of a TPU's VMEM with any block sizes: use "
      "smaller heads, or fewer queries to a key head"
    )
  if fits != sizes:
    changes = ", ".join(
      f"{name}={size}"
      for name, size in dataclasses.asdict(fits).items()
      if size != getattr(sizes, name)
    )
    needed = -(-max(_tpu_bytes(x, sizes)) // 2**20)
    return (
      f"{sizes} needs {needed} MiB of a TPU's VMEM, which has "
      f"{TPU_VMEM >> 20}: use {changes}"
    )
  return None


def _that_fit(x: "Operands", sizes: TensorBlockSizes) -> TensorBlockSizes:
  """``sizes``, halved until they fit, those first that cost least."""
  chosen = dataclasses.asdict(sizes)
  for i, end in enumerate(("", "_bwd")):
    while _tpu_bytes(x, TensorBlockSizes(**chosen))[i] > TPU_VMEM:
      block = chosen[f"block_q{end}"]
      if end and chosen["slab_q_bwd"] > block:
        half = chosen["slab_q_bwd"] // block // 2 * block
        chosen["slab_q_bwd"] = max(half, block)
        continue
      for axis, least in (("k1", 64), ("k2", TPU_LANES), ("q", TPU_LANES)):
        name = f"block_{axis}{end}"
        if chosen[name] > least:
          chosen[name] = up(chosen[name] // 2, least)
          break
      else:
        break
      chosen["slab_q_bwd"] = up(chosen["slab_q_bwd"], chosen["block_q_bwd"])
  return TensorBlockSizes(**chosen)


def _tpu_bytes(x: "Operands", sizes: TensorBlockSizes) -> tuple[int, int]:
  """VMEM of each pass; what the compiler takes is close."""
  group = x.query.shape[2] // x.key1.shape[2]
  item = x.query.dtype.itemsize
  head, value = (up(y.shape[3], TPU_LANES) for y in (x.query, x.value1))
  both = head + value
  rows, block = group * sizes.block_q, sizes.block_k2
  # Logits; a pair of keys and one of values; blocks that come in, two at a
  # time; what is summed up, and leaves. Positions are a column of lanes each.
  forward = 4 * rows * block + (4 + item) * block * both
  forward += 2 * item * (rows * head + block * both)
  forward += 2 * 4 * (sizes.block_k1 * both)
  forward += 2 * 4 * TPU_LANES * (sizes.block_k1 + block)
  forward += (4 + 4 + 2 * item) * rows * value
  rows, block = group * sizes.block_q_bwd, sizes.block_k2_bwd
  # Weights and cotangents of logits, a pair and its cotangent; queries and
  # their cotangents come in; three gradients stay.
  backward = 4 * 2 * rows * block + (4 + 4 + item) * block * both
  backward += 2 * item * (rows + block) * both
  backward += 2 * 4 * TPU_LANES * (sizes.block_k1_bwd + block)
  backward += 2 * 2 * 4 * sizes.block_k1_bwd * both
  backward += 2 * 4 * block * both
  queries = group * sizes.slab_q_bwd
  backward += 2 * 4 * queries * up(x.query.shape[3], 8)
  return forward, backward
