"""Exact attention, tiled: so far its block sizes."""

from pallas_kernels.flash_attention.config import BlockSizes

__all__ = ["BlockSizes"]
