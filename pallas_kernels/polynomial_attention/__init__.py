"""Attention with a polynomial kernel in linear time: a kernel to be named."""

from pallas_kernels.polynomial_attention.api import (
  polynomial_attention as polynomial_attention,
)

__all__ = ["polynomial_attention"]
