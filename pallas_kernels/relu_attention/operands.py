"""What the pieces of ReLU attention take and return, on every platform."""

from typing import Any, NamedTuple

from pallas_kernels.flash_attention import operands as flash
from pallas_kernels.flash_attention.config import BlockSizes


class Operands(NamedTuple):
  """Arrays of one call. G = N / K query heads share a key head.

  Attributes:
    query: (B, T, N, H).
    key: (B, S, K, H).
    value: (B, S, K, Hv).
    threshold: (B, T, N), of the accumulator's dtype, as ``scale``.
    scale: () factor on the scores.
    mask: None or boolean (B|1, N|1, T|1, S|1); True = attend.
  """

  query: Any
  key: Any
  value: Any
  threshold: Any
  scale: Any
  mask: Any = None


class Options(NamedTuple):
  """Static facts of one call.

  Attributes:
    alpha: power of the weights.
    is_causal: query t sees keys 0 to t.
    block_sizes: None = those of the platform.
    precision: of the matrix products.
  """

  alpha: int = 1
  is_causal: bool = False
  block_sizes: BlockSizes | None = None
  precision: Any = None


class Gradients(NamedTuple):
  """Cotangents of all but the mask, shaped and typed as those."""

  query: Any
  key: Any
  value: Any
  threshold: Any
  scale: Any


def as_flash(
  x: Operands, options: Options
) -> tuple[flash.Operands, flash.Options]:
  """Exact attention with the same scores: it is cut into the same tiles."""
  after = 0 if options.is_causal else None
  return (
    flash.Operands(x.query, x.key, x.value, mask=x.mask),
    flash.Options(
      1.0,
      after=after,
      block_sizes=options.block_sizes,
      precision=options.precision,
    ),
  )
