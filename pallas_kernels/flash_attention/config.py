"""Block sizes of exact attention, for kernels and the XLA path alike."""

import dataclasses


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
    for field in dataclasses.fields(self):
      size = getattr(self, field.name)
      if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
          f"{field.name} must be a positive integer, got {size!r}"
        )
