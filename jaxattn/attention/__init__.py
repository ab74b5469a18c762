"""Attention functions: exact, sparse and, later, almost linear."""

from jaxattn.softmax.exact import softmax_attention as softmax_attention
from pallas_kernels.flash_attention import BlockSizes as BlockSizes

__all__ = [
  "BlockSizes",
  "softmax_attention",
]
