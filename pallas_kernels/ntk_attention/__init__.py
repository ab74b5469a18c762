"""Attention to keys and to the state of a prefix: a kernel to be named."""

from pallas_kernels.flash_attention.config import BlockSizes as BlockSizes
from pallas_kernels.ntk_attention.api import ntk_attention as ntk_attention
from pallas_kernels.ntk_attention.operands import Total as Total

__all__ = ["BlockSizes", "Total", "ntk_attention"]
