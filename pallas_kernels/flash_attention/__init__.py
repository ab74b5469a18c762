"""Exact attention, tiled: block sizes, and a kernel the caller names."""

from pallas_kernels.flash_attention.api import (
  flash_attention as flash_attention,
)
from pallas_kernels.flash_attention.config import BlockSizes as BlockSizes

__all__ = ["BlockSizes", "flash_attention"]
