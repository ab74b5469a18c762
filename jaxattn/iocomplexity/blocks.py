"""Block sizes of attention kernels, from what a cache holds."""

import numpy as np

from jaxattn import _checks
from pallas_kernels.flash_attention import BlockSizes

# Rows of queries and of keys in the smallest tile of scores.
_TILES = {"exact": (1, 1), "tpu": (8, 128), "gpu": (16, 16)}


def block_sizes(cache_words: int, head_dim: int, *, kind: str) -> BlockSizes:
  r"""Blocks with which flash attention moves the fewest words.

  Forward, :math:`B_q` queries with their outputs stay while blocks of
  :math:`B_k` keys stream past, and

  .. math:: 2 B_q d + 2 B_q + 2 B_k d + B_q B_k \le M.

  Only :math:`B_q` changes the words, so :math:`B_k` is one tile. Backward, in
  two passes that share their blocks,

  .. math::

    4 B_k d + 2 B_q d + 2 B_q + 2 B_q B_k &\le M, \\
    3 B_q d + 2 B_q + 2 B_k d + 2 B_q B_k &\le M,

  and the words are least where :math:`1 / B_q + 1 / B_k` is. What a kernel
  keeps beside its blocks, copies for double buffering and padding, is not
  counted: give the words that are left for the blocks.

  Args:
    cache_words: M, in elements.
    head_dim: size d.
    kind: tiles that blocks are multiples of: "tpu" (8 queries, 128 keys), "gpu"
      (16 and 16) or "exact" (1 and 1), for interpreters.

  Returns:
    The :class:`BlockSizes`.

  Raises:
    ValueError: if there is no such kind, if a size is no positive integer, or
      if not even one tile fits.

  Source:
    arXiv 2205.14135 and 2410.09397.

  Example:
    >>> block_sizes(65536, 64, kind="gpu").block_q
    432
  """
  _checks.check_choice("kind", kind, tuple(_TILES))
  _checks.check_integer("cache_words", cache_words, 1, None)
  _checks.check_integer("head_dim", head_dim, 1, None)
  d, (tile_q, tile_k) = head_dim, _TILES[kind]
  least = max(
    2 * tile_q * (d + 1) + 2 * tile_k * d + tile_q * tile_k,
    4 * tile_k * d + 2 * tile_q * (d + 1) + 2 * tile_q * tile_k,
    3 * tile_q * d + 2 * tile_q + 2 * tile_k * d + 2 * tile_q * tile_k,
  )
  if cache_words < least:
    raise ValueError(
      f"cache_words must be at least {least} for head_dim {d} and kind "
      f"{kind!r}, got {cache_words}"
    )
  block_q = (cache_words - 2 * tile_k * d) // (2 * d + 2 + tile_k)
  block_q_bwd, block_k_bwd = _backward(cache_words, d, tile_q, tile_k)
  return BlockSizes(
    block_q=int(block_q // tile_q * tile_q),
    block_k=tile_k,
    block_q_bwd=block_q_bwd,
    block_k_bwd=block_k_bwd,
  )


def _backward(
  cache_words: int, d: int, tile_q: int, tile_k: int
) -> tuple[int, int]:
  block_k = np.arange(tile_k, cache_words // (4 * d) + 1, tile_k)
  block_q = np.minimum(
    (cache_words - 4 * block_k * d) // (2 * d + 2 + 2 * block_k),
    (cache_words - 2 * block_k * d) // (3 * d + 2 + 2 * block_k),
  )
  block_q = block_q // tile_q * tile_q
  fits = block_q >= tile_q
  block_q, block_k = block_q[fits], block_k[fits]
  best = np.argmin(1 / block_q + 1 / block_k)
  return int(block_q[best]), int(block_k[best])
