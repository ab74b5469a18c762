"""Exact attention for a small cache: products of tiles, one after another."""

from pallas_kernels.small_cache_attention.api import (
  small_cache_attention as small_cache_attention,
)

__all__ = ["small_cache_attention"]
