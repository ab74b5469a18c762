"""Exact attention to pairs of tokens, tiled: a kernel the caller names."""

from pallas_kernels.tensor_attention.api import (
  tensor_attention as tensor_attention,
)
from pallas_kernels.tensor_attention.config import (
  TensorBlockSizes as TensorBlockSizes,
)

__all__ = ["TensorBlockSizes", "tensor_attention"]
