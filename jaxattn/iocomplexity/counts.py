r"""How many words an attention schedule moves between a cache and slow memory.

The cache holds M words, slow memory any number; inputs begin in slow memory,
outputs end there; arithmetic is free. With n queries and keys of size d,

================ ============================= =================================
schedule         what stays in the cache       words
================ ============================= =================================
``fwd_large``    queries and outputs           4 n^2 d^2 / M
``fwd_fa1``      keys and values               6 n^2 d^2 / M
``fwd_small``    a tile of a product           4 n^2 d / sqrt(M) + n^2
``matmul``       a tile of the product         2 n^2 d / sqrt(M) + n^2
``bwd_large``    keys, values, their gradients 16 n^2 d^2 / M
``bwd_two_pass`` one side, then the other      14 n^2 d^2 / M
``bwd_small``    a tile of a product           10 n^2 d / sqrt(M) + 3 n^2
``train_small``  a tile of a product           (8 n d + 6 d^2) n/sqrt(M) + 6 n^2
``train_large``  queries, then queries again   (10 n^2 d^2 + 8 n d^3) / M
================ ============================= =================================

to leading order; :func:`io_count` has every word. The problem of ``train_*`` is
that of arXiv 2410.09397, the gradient in X of half the square of
:math:`\mathrm{softmax}(A_1 X A_2^\top) A_3 Y - E`.
"""

from typing import Any, NamedTuple

import numpy as np

from jaxattn import _checks
from jaxattn.iocomplexity._formulas import ALGORITHMS, Sizes

# Counts are 64-bit integers; none is above 2^5 times this many.
_MOST_PRODUCTS = 2.0**57


class IOCount(NamedTuple):
  """Words that a schedule moves; integers, or arrays of them.

  Attributes:
    reads: words brought into the cache.
    writes: words brought back to slow memory.
    blocks: sizes of the blocks: rows that stay in the cache, pass by pass, or
      the side of the tile of a product.
    peak: most words that the cache holds at a time.
  """

  reads: Any
  writes: Any
  blocks: tuple[Any, ...]
  peak: Any

  @property
  def total(self) -> Any:
    """Words moved in either direction."""
    return self.reads + self.writes


def io_count(
  algorithm: str,
  *,
  num_queries: Any,
  num_keys: Any,
  head_dim: Any,
  cache_words: Any,
  block_size: Any = None,
) -> IOCount:
  r"""Counts the words that one schedule moves, exactly.

  For example, with :math:`B = \lfloor (M - 2d) / (2d + 3) \rfloor` queries at a
  time, ``fwd_large`` moves

  .. math:: 2 N_q d + N_q + 2 N_k d \lceil N_q / B \rceil

  words: queries, outputs and log-sum-exps once, keys and values once for each
  block of queries. ``matmul`` is the product of (num_queries, head_dim) by
  (head_dim, num_keys).

  Args:
    algorithm: one of the schedules in the module's table.
    num_queries: number of queries N_q; this and all other sizes are integers,
      or arrays of integers that broadcast against each other.
    num_keys: number of keys N_k.
    head_dim: size d of queries, keys and values.
    cache_words: M.
    block_size: smaller blocks than the largest that fit: one size for all
      blocks of the schedule, or a tuple with one for each, in the order of
      ``IOCount.blocks``.

  Returns:
    An :class:`IOCount`; arrays if any size is one.

  Raises:
    ValueError: if there is no such algorithm, if a size is no positive integer,
      if the cache is too small for the schedule or for the block, or if the
      words do not fit 64 bits.

  Cost:
    O(1) a configuration.

  Source:
    arXiv 2410.09397 and 2205.14135.

  Example:
    >>> count = io_count(
    ...   "fwd_large", num_queries=4096, num_keys=4096, head_dim=64,
    ...   cache_words=65536,
    ... )
    >>> count.total, count.blocks
    (5246976, (499,))
  """
  _checks.check_choice("algorithm", algorithm, tuple(ALGORITHMS))
  sizes, shape = _sizes(num_queries, num_keys, head_dim, cache_words)
  entry = ALGORITHMS[algorithm]
  _check_cache(algorithm, sizes)
  if block_size is None:
    blocks = entry.blocks(sizes)
  else:
    blocks = _given_blocks(block_size, len(entry.limits(sizes)))
    shape = np.broadcast_shapes(shape, *(np.shape(b) for b in blocks))
  limits = entry.limits(sizes)
  blocks = tuple(np.minimum(b, most) for b, most in zip(blocks, limits))
  if block_size is not None:
    _check_blocks(entry.needs(blocks, sizes.d), blocks, sizes)
  phases = entry.phases(sizes, blocks)
  reads, writes, peak = phases[0]
  for phase in phases[1:]:
    reads, writes = reads + phase.reads, writes + phase.writes
    peak = np.maximum(peak, phase.peak)
  reads, writes, peak, *blocks = (
    _result(x, shape) for x in (reads, writes, peak, *blocks)
  )
  return IOCount(reads, writes, tuple(blocks), peak)


def minimum_cache(algorithm: str, *, head_dim: Any) -> Any:
  """Words of the smallest cache in which a schedule runs.

  Those with a large cache hold a few rows of d words; tiles of one word do with
  5 words, at any d.

  Args:
    algorithm: as in :func:`io_count`.
    head_dim: size d, an integer or an array of integers.

  Returns:
    The number of words.

  Raises:
    ValueError: if there is no such algorithm, or d is no positive integer.

  Source:
    arXiv 2410.09397.

  Example:
    >>> minimum_cache("fwd_large", head_dim=64)
    259
  """
  _checks.check_choice("algorithm", algorithm, tuple(ALGORITHMS))
  dim = _integers("head_dim", head_dim)
  return _result(ALGORITHMS[algorithm].least(dim), dim.shape)


def best_algorithm(
  kind: str,
  *,
  num_queries: int,
  num_keys: int,
  head_dim: int,
  cache_words: int,
) -> tuple[str, IOCount]:
  """The schedule that moves the fewest words.

  Args:
    kind: "forward", "backward" (gradients in queries, keys and values) or
      "train" (the gradient in X of the module's problem).
    num_queries: number of queries.
    num_keys: number of keys.
    head_dim: size d.
    cache_words: M.

  Returns:
    Its name and its :class:`IOCount`.

  Raises:
    ValueError: if there is no such kind, if a size is no positive integer, or
      if the cache has less than 5 words.

  Source:
    arXiv 2410.09397, abstract: the best of a large and a small cache's.

  Example:
    >>> sizes = dict(num_queries=4096, num_keys=4096, head_dim=64)
    >>> best_algorithm("forward", cache_words=1024, **sizes)[0]
    'fwd_small'
    >>> best_algorithm("forward", cache_words=65536, **sizes)[0]
    'fwd_large'
  """
  _checks.check_choice("kind", kind, ("forward", "backward", "train"))
  sizes = {
    "num_queries": num_queries,
    "num_keys": num_keys,
    "head_dim": head_dim,
    "cache_words": cache_words,
  }
  for name, size in sizes.items():
    _checks.check_integer(name, size, 1, None)
  small = [n for n in ALGORITHMS if n.endswith("_small")]
  found = {
    name: io_count(name, **sizes)
    for name, entry in ALGORITHMS.items()
    if entry.kind == kind
    and (name in small or entry.least(head_dim) <= cache_words)
  }
  best = min(found, key=lambda name: found[name].total)
  return best, found[best]


def crossover(
  kind: str, *, num_queries: int, num_keys: int, head_dim: int
) -> int:
  """The least cache from which on rows in it beat tiles of products.

  Compares ``fwd_large`` with ``fwd_small``, or ``bwd_large`` with
  ``bwd_small``. Both counts fall as the cache grows, the first only where one
  more row fits: it is enough to look at the largest cache for each number of
  rows. (Somewhat smaller caches may favor rows, too, until a tile is as wide as
  a head.)

  Args:
    kind: "forward" or "backward".
    num_queries: number of queries.
    num_keys: number of keys.
    head_dim: size d.

  Returns:
    The least M, in words, from which on the first moves no more words than the
    second: of the order of d^2 if there are many more queries and keys.

  Raises:
    ValueError: if there is no such kind or a size is no positive integer.

  Cost:
    O(n), one vectorized count for each number of rows.

  Source:
    arXiv 2410.09397, abstract: the crossover at M of the order of d^2.

  Example:
    >>> n = 2**17
    >>> words = crossover("forward", num_queries=n, num_keys=n, head_dim=64)
    >>> round(words / 64**2, 2)
    0.64
  """
  _checks.check_choice("kind", kind, ("forward", "backward"))
  sizes = {
    "num_queries": num_queries,
    "num_keys": num_keys,
    "head_dim": head_dim,
  }
  for name, size in sizes.items():
    _checks.check_integer(name, size, 1, None)
  prefix = {"forward": "fwd", "backward": "bwd"}[kind]
  entry = ALGORITHMS[f"{prefix}_large"]
  most = num_queries if kind == "forward" else num_keys
  (cache,) = entry.needs((np.arange(1, most + 2),), head_dim)
  large, small = (
    io_count(f"{prefix}_{size}", cache_words=cache[1:] - 1, **sizes).total
    for size in ("large", "small")
  )
  worse = np.flatnonzero(large > small)
  return int(cache[worse[-1] + 1 if worse.size else 0])


def _sizes(*values: Any) -> tuple[Sizes, tuple[int, ...]]:
  names = ("num_queries", "num_keys", "head_dim", "cache_words")
  sizes = Sizes(*(_integers(n, x) for n, x in zip(names, values)))
  dim = sizes.d.astype(float)
  products = (sizes.q + dim) * (sizes.k + dim) * dim
  if np.any(products > _MOST_PRODUCTS):
    raise ValueError(
      "num_queries, num_keys and head_dim must have a product of at most 2^57, "
      f"so that counts fit 64 bits, got {np.max(products):.3g}"
    )
  return sizes, np.broadcast_shapes(*(x.shape for x in sizes))


def _integers(name: str, value: Any) -> np.ndarray:
  array = np.asarray(value)
  if array.dtype.kind not in "iu" or not np.all(array >= 1):
    raise ValueError(
      f"{name} must be a positive integer, or an array of them, got {value!r}"
    )
  return array.astype(np.int64)


def _given_blocks(block_size: Any, count: int) -> tuple[np.ndarray, ...]:
  blocks = block_size if isinstance(block_size, tuple) else (block_size,)
  if len(blocks) == 1:
    blocks *= count
  if len(blocks) != count:
    raise ValueError(
      f"block_size must be one size or a tuple of {count}, got {block_size!r}"
    )
  return tuple(_integers("block_size", b) for b in blocks)


def _check_cache(algorithm: str, sizes: Sizes) -> None:
  least = ALGORITHMS[algorithm].least(sizes.d)
  if np.any(sizes.cache < least):
    least, dim, cache = np.broadcast_arrays(least, sizes.d, sizes.cache)
    i = np.flatnonzero(cache < least)[0]
    raise ValueError(
      f"{algorithm} needs at least {least.flat[i]} words for head_dim "
      f"{dim.flat[i]}, got {cache.flat[i]}"
    )


def _check_blocks(
  needs: tuple[Any, ...], blocks: tuple[Any, ...], sizes: Sizes
) -> None:
  for block, words in zip(blocks, needs):
    if np.any(words > sizes.cache):
      block, words, cache = np.broadcast_arrays(block, words, sizes.cache)
      i = np.flatnonzero(words > cache)[0]
      raise ValueError(
        f"block {block.flat[i]} needs {words.flat[i]} words, cache has "
        f"{cache.flat[i]}"
      )


def _result(x: Any, shape: tuple[int, ...]) -> Any:
  return int(x) if shape == () else np.broadcast_to(x, shape)
