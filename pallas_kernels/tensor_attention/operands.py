"""What the pieces of tensor attention take and return, on every platform."""

from typing import Any, NamedTuple

from pallas_kernels.tensor_attention.config import TensorBlockSizes


class Operands(NamedTuple):
  """Arrays of one call. G = N / K query heads share a key head.

  First keys and values multiply second ones, and are as wide as sums are, so
  that a pair is rounded once.

  Attributes:
    query: (B, T, N, H).
    key1: (B, S1, K, H) of the accumulator's dtype, times the scale.
    key2: (B, S2, K, H) of the dtype of the queries.
    value1: (B, S1, K, Hv) of the accumulator's dtype.
    value2: (B, S2, K, Hv) of the dtype of the queries.
    key_mask1: None or boolean (B, S1); True = attend.
    key_mask2: None or boolean (B, S2); True = attend.
  """

  query: Any
  key1: Any
  key2: Any
  value1: Any
  value2: Any
  key_mask1: Any = None
  key_mask2: Any = None


class Options(NamedTuple):
  """Static facts of one call.

  Attributes:
    is_causal: query t sees the pairs of keys 0 to t; T = S1 = S2.
    block_sizes: None = those of the platform.
    precision: of the matrix products.
  """

  is_causal: bool = False
  block_sizes: TensorBlockSizes | None = None
  precision: Any = None


class Gradients(NamedTuple):
  """Cotangents of all but the masks, shaped and typed as those."""

  query: Any
  key1: Any
  key2: Any
  value1: Any
  value2: Any
