"""What the pieces of NTK-Attention take and return, on every platform."""

from typing import Any, NamedTuple

from pallas_kernels.flash_attention import operands as flash
from pallas_kernels.flash_attention.config import BlockSizes


class Operands(NamedTuple):
  """Arrays of one call. G = N / K query heads share a key head.

  Attributes:
    query: (B, T, N, H).
    key: (B, S, K, H).
    value: (B, S, K, Hv).
    query_features: (B, T, N, r), of the accumulator's dtype, as ``z``, ``k``.
    z: (K|N, r, Hv), of the prefix.
    k: (K|N, r), of the prefix.
    bias: None or floating (B|1, N|1, T|1, S|1), added to the logits.
    mask: None or boolean, as bias; True = attend. Not about the prefix.
  """

  query: Any
  key: Any
  value: Any
  query_features: Any
  z: Any
  k: Any
  bias: Any = None
  mask: Any = None


class Options(NamedTuple):
  """Static facts of one call.

  Attributes:
    scale: factor on the logits.
    is_causal: query t sees keys 0 to t.
    block_sizes: None = those of the platform.
    block_features: features in a tile; None = those of the platform.
    precision: of the matrix products.
  """

  scale: float
  is_causal: bool = False
  block_sizes: BlockSizes | None = None
  block_features: int | None = None
  precision: Any = None


class Total(NamedTuple):
  """Sum of all weights of a query, which features can make negative.

  Source: this project.

  Attributes:
    log: (B, T, N) logarithm of its size, -inf where it is 0.
    sign: (B, T, N) 1, -1 or 0.
  """

  log: Any
  sign: Any


class Gradients(NamedTuple):
  """Cotangents of all but the mask, shaped and typed as those."""

  query: Any
  key: Any
  value: Any
  query_features: Any
  z: Any
  k: Any
  bias: Any


def as_flash(
  x: Operands, options: Options
) -> tuple[flash.Operands, flash.Options]:
  """Exact attention to the keys alone."""
  operands = flash.Operands(x.query, x.key, x.value, x.bias, x.mask)
  return operands, flash_options(options)


def flash_options(options: Options) -> flash.Options:
  """Those of exact attention to the keys alone."""
  return flash.Options(
    options.scale,
    after=0 if options.is_causal else None,
    block_sizes=options.block_sizes,
    precision=options.precision,
  )
