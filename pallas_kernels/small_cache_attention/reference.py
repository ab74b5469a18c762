"""The dense formula that attention for a small cache must equal."""

import math

import jax

from pallas_kernels.flash_attention import operands as flash
from pallas_kernels.flash_attention import reference as dense
from pallas_kernels.small_cache_attention.operands import Operands, Options


def reference(x: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
  """Output (B, T, N, Hv) and log-sum-exp (B, T, N), all logits at once."""
  scale = 1 / math.sqrt(x.query.shape[-1])
  after = 0 if options.is_causal else None
  return dense.reference(flash.Operands(*x), flash.Options(scale, after=after))
