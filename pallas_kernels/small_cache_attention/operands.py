"""What the pieces of attention for a small cache take and return."""

from typing import Any, NamedTuple

from pallas_kernels.small_cache_attention import config


class Operands(NamedTuple):
  """Arrays of one call. G = N / K query heads share a key head.

  Attributes:
    query: (B, T, N, H).
    key: (B, S, K, H).
    value: (B, S, K, Hv).
  """

  query: Any
  key: Any
  value: Any


class Options(NamedTuple):
  """Static facts of one call.

  Attributes:
    is_causal: query t sees keys 0 to t.
    block_size: rows and columns of a tile.
  """

  is_causal: bool = False
  block_size: int = config.BLOCK_SIZE


class Gradients(NamedTuple):
  """Cotangents of query, key and value, shaped and typed as those."""

  query: Any
  key: Any
  value: Any
