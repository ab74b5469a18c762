"""ReLU attention, tiled: a kernel the caller names."""

from pallas_kernels.flash_attention.config import BlockSizes as BlockSizes
from pallas_kernels.relu_attention.api import relu_attention as relu_attention

__all__ = ["BlockSizes", "relu_attention"]
