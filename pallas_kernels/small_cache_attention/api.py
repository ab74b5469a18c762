"""Attention for a small cache, by an implementation that the caller names."""

import jax

from pallas_kernels._calls import differentiable
from pallas_kernels._checks import check_heads, check_implementation
from pallas_kernels.small_cache_attention import config, mosaic_tpu
from pallas_kernels.small_cache_attention.operands import (
  Gradients,
  Operands,
  Options,
)
from pallas_kernels.small_cache_attention.reference import reference

_KERNELS = {"mosaic_tpu": mosaic_tpu}
_IMPLEMENTATIONS = ("reference", *_KERNELS, "interpret")

_attend = differentiable(reference, _KERNELS, Gradients._fields, outputs=1)


def small_cache_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  block_size: int | None = None,
  is_causal: bool = False,
  implementation: str,
) -> jax.Array:
  r"""Exact attention as products of tiles, for a cache of less than H^2 words.

  .. math:: O = \operatorname{softmax}(Q K^\top / \sqrt{H})\, V

  Where the cache cannot hold a few rows of queries and keys, no schedule of
  flash attention's kind moves the fewest words; this one does, up to a factor.
  Two products of matrices forward, five backward, with scores in slow memory
  and all else that is done to a tile fused to the ends of the products. Caches
  of today hold far more than H^2 words: there ``flash_attention`` is the one to
  call.

  Args:
    query: (B, T, N, H); floating.
    key: (B, S, K, H). K divides N: each key head serves N / K query heads.
    value: (B, S, K, Hv).
    block_size: b, rows and columns of a tile; None = 512. A cache of M words
      holds one with :math:`b^2 + 4 b \le M`.
    is_causal: query t sees keys 0 to t.
    implementation: "mosaic_tpu", "interpret" (the same, anywhere), or
      "reference" (the dense formula).

  Returns:
    (B, T, N, Hv) of the dtype of ``query``.

  Raises:
    ValueError: if shapes, dtypes or options do not fit.
    NotImplementedError: if the kernel cannot take these operands.

  Cost:
    4 T S H flops a head forward, 10 T S H backward; moves about 4 T S H / b and
    10 T S H / b words; O(T S) memory.

  Source:
    arXiv 2410.09397; forward, arXiv 2402.07443.

  Example:
    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
    >>> small_cache_attention(
    ...   q, k, v, block_size=32, implementation="interpret"
    ... ).shape
    (1, 64, 2, 16)
  """
  check_implementation(implementation, _IMPLEMENTATIONS)
  x = Operands(query, key, value)
  for name, y in zip(x._fields, x, strict=True):
    if 0 in y.shape:
      raise ValueError(f"{name} must hold numbers, got shape {y.shape}")
  check_heads(query, key, value)
  size = config.BLOCK_SIZE if block_size is None else block_size
  if isinstance(size, bool) or not isinstance(size, int) or size < 1:
    raise ValueError(f"block_size must be a positive integer, got {size!r}")
  options = Options(bool(is_causal), size)
  return _attend(implementation, options, x)[0]
