"""What the pieces of exact attention take and return, on every platform."""

from typing import Any, NamedTuple

from pallas_kernels.flash_attention.config import BlockSizes


class Operands(NamedTuple):
  """Arrays of one call. G = N / K query heads share a key head.

  Attributes:
    query: (B, T, N, H).
    key: (B, S, K, H).
    value: (B, S, K, Hv).
    bias: None or floating (B|1, N|1, T|1, S|1), added to the logits.
    mask: None or boolean, as bias; True = attend.
    query_segments: None or (B, T) integers; a query sees keys of its segment.
    key_segments: None or (B, S) integers, together with the other.
    query_lengths: None or (B,) integers; later queries give 0.
    key_lengths: None or (B,) integers; later keys are hidden.
    offset: None or () integer, position of query 0 among the keys.
  """

  query: Any
  key: Any
  value: Any
  bias: Any = None
  mask: Any = None
  query_segments: Any = None
  key_segments: Any = None
  query_lengths: Any = None
  key_lengths: Any = None
  offset: Any = None


class Options(NamedTuple):
  """Static facts of one call.

  Attributes:
    scale: factor on the logits.
    before: None, or a query sees no key more than so far before it.
    after: None, or no key more than so far after it; 0 is a causal mask.
    block_sizes: None = those of the platform.
    precision: of the matrix products.
  """

  scale: float
  before: int | None = None
  after: int | None = None
  block_sizes: BlockSizes | None = None
  precision: Any = None


class Gradients(NamedTuple):
  """Cotangents of query, key, value and bias, shaped and typed as those."""

  query: Any
  key: Any
  value: Any
  bias: Any
