r"""Words that each schedule moves, phase by phase, in closed form.

Everything works on integers and on NumPy arrays of them alike, in O(1) for each
configuration. With N_q queries, N_k keys, head size d and tiles of b x b, a
product of (m, k) by (k, n) matrices by rank-1 updates moves

.. math::

  \mathrm{mm}(m, k, n) =
  k (\lceil n / b \rceil m + \lceil m / b \rceil n) + m n.

Source: arXiv 2410.09397 for the problem and its order, Dao et al., arXiv
2205.14135, for the schedules with a large cache; counts are derived here and
equal those of :mod:`jaxattn.iocomplexity.simulator` to the word.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# An integer, or an array of them.
Words = Any


class Sizes(NamedTuple):
  """One problem, or many: integers that broadcast against each other."""

  q: Words
  k: Words
  d: Words
  cache: Words


class Phase(NamedTuple):
  """Words read, words written, and the most that the cache holds."""

  reads: Words
  writes: Words
  peak: Words


class Algorithm(NamedTuple):
  """What is known of one schedule.

  Attributes:
    kind: of the problem that it solves.
    least: words of the smallest cache, by head size.
    blocks: the largest blocks that fit, by sizes.
    limits: the blocks that would hold everything, by sizes.
    needs: words that each block takes, by blocks and head size.
    phases: by sizes and blocks.
  """

  kind: str
  least: Callable[[Words], Words]
  blocks: Callable[[Sizes], tuple[Words, ...]]
  limits: Callable[[Sizes], tuple[Words, ...]]
  needs: Callable[[tuple[Words, ...], Words], tuple[Words, ...]]
  phases: Callable[[Sizes, tuple[Words, ...]], list[Phase]]


def ceil(x: Words, block: Words) -> Words:
  """Number of blocks."""
  return (x + block - 1) // block


# --- large cache: rows of one side stay, rows of the other stream past ---


def _fwd_large(s: Sizes, blocks: tuple[Words, ...]) -> list[Phase]:
  (block,) = blocks
  reads = s.q * s.d + 2 * s.k * s.d * ceil(s.q, block)
  return [
    Phase(reads, s.q * s.d + s.q, _fwd_large_needs(blocks, s.d)[0]),
  ]


def _fwd_large_needs(blocks: tuple[Words, ...], d: Words) -> tuple[Words, ...]:
  return (blocks[0] * (2 * d + 3) + 2 * d,)


def _fwd_fa1(s: Sizes, blocks: tuple[Words, ...]) -> list[Phase]:
  (block,) = blocks
  passes, row = ceil(s.k, block), s.d + 2
  reads = 2 * s.k * s.d + passes * s.q * s.d + (passes - 1) * s.q * row
  return [Phase(reads, passes * s.q * row, _fwd_fa1_needs(blocks, s.d)[0])]


def _fwd_fa1_needs(blocks: tuple[Words, ...], d: Words) -> tuple[Words, ...]:
  return (blocks[0] * (2 * d + 1) + 2 * d + 3,)


def _dots_large(s: Sizes) -> Phase:
  return Phase(2 * s.q * s.d, s.q, 2 * s.d + 1)


def _bwd_large(s: Sizes, blocks: tuple[Words, ...]) -> list[Phase]:
  (block,) = blocks
  passes = ceil(s.k, block)
  reads = 2 * s.k * s.d + passes * (2 * s.q * s.d + 2 * s.q)
  reads = reads + (passes - 1) * s.q * s.d
  writes = 2 * s.k * s.d + passes * s.q * s.d
  peak = _bwd_large_needs(blocks, s.d)[0]
  return [_dots_large(s), Phase(reads, writes, peak)]


def _bwd_large_needs(blocks: tuple[Words, ...], d: Words) -> tuple[Words, ...]:
  return (blocks[0] * (4 * d + 2) + 3 * d + 2,)


def _bwd_two_pass(s: Sizes, blocks: tuple[Words, ...]) -> list[Phase]:
  keys = 2 * s.k * s.d + ceil(s.k, blocks[0]) * (2 * s.q * s.d + 2 * s.q)
  peak, _ = _bwd_two_pass_needs(blocks, s.d)
  first = Phase(keys, 2 * s.k * s.d, peak)
  return [_dots_large(s), first, _query_pass(s, blocks[1])]


def _query_pass(s: Sizes, block: Words) -> Phase:
  reads = 2 * s.q * s.d + 2 * s.q + ceil(s.q, block) * 2 * s.k * s.d
  return Phase(reads, s.q * s.d, _query_pass_needs(block, s.d))


def _query_pass_needs(block: Words, d: Words) -> Words:
  return block * (3 * d + 4) + 2 * d


def _bwd_two_pass_needs(
  blocks: tuple[Words, ...], d: Words
) -> tuple[Words, ...]:
  first = blocks[0] * (4 * d + 2) + 2 * d + 2
  return first, _query_pass_needs(blocks[1], d)


def _train_large(s: Sizes, blocks: tuple[Words, ...]) -> list[Phase]:
  rows, block_q, block_t = blocks
  d = s.d
  _, forward, _ = _train_large_needs(blocks, d)
  attend = 2 * s.q * d + 2 * s.k * d * ceil(s.q, block_q)
  fits = d * d + 2 * d <= s.cache
  q, _, side = _sides(s, tile(s.cache))
  tiled = _product(side, q, side)
  last = (
    np.where(fits, streamed, tiles)
    for streamed, tiles in zip((2 * s.q * d, d * d, d * d + 2 * d), tiled)
  )
  return [
    _by_rows(s.q, d, rows),
    _by_rows(s.k, d, rows),
    Phase(attend, s.q * d + 2 * s.q, forward),
    _query_pass(s, block_t),
    Phase(*last),
  ]


def _by_rows(m: Words, d: Words, rows: Words) -> Phase:
  peak = 2 * np.minimum(rows, m) * d + d
  return Phase(m * d + ceil(m, rows) * d * d, m * d, peak)


def _train_large_needs(
  blocks: tuple[Words, ...], d: Words
) -> tuple[Words, ...]:
  rows, block_q, block_t = blocks
  return (
    2 * rows * d + d,
    _fwd_large_needs((block_q,), d)[0],
    _query_pass_needs(block_t, d),
  )


# --- small cache: products in tiles ---


def tile(cache: Words) -> Words:
  """The largest b with b^2 + 4 b words in the cache."""
  return np.sqrt(cache + 4.0).astype(np.int64) - 2


class Side(NamedTuple):
  """One side of a matrix: its size, how many tiles, and the first of them."""

  size: Words
  tiles: Words
  part: Words


def _sides(s: Sizes, b: Words) -> tuple[Side, Side, Side]:
  """Of queries, keys and head."""
  q, k, d = (Side(n, ceil(n, b), np.minimum(b, n)) for n in s[:3])
  return q, k, d


def _product(m: Side, k: Side, n: Side) -> Phase:
  """A product of (m, k) by (k, n), each tile a sum of rank-1 updates."""
  reads = k.size * (n.tiles * m.size + m.tiles * n.size)
  peak = m.part * n.part + m.part + n.part
  return Phase(reads, m.size * n.size, peak)


def _more(
  phase: Phase, *, reads: Words = 0, writes: Words = 0, peak: Words = 0
) -> Phase:
  return Phase(phase.reads + reads, phase.writes + writes, phase.peak + peak)


def _matmul(s: Sizes, blocks: tuple[Words, ...]) -> list[Phase]:
  q, k, d = _sides(s, blocks[0])
  return [_product(q, d, k)]


def _scores(q: Side, k: Side, d: Side) -> Phase:
  """Scores written as they are, and their log-sum-exp."""
  return _more(_product(q, d, k), writes=q.size, peak=2 * q.part)


def _read_out(q: Side, k: Side, d: Side) -> Phase:
  """Values weighted by exp(score - log-sum-exp)."""
  return _more(_product(q, k, d), reads=d.tiles * q.size, peak=q.part)


def _fwd_small(s: Sizes, blocks: tuple[Words, ...]) -> list[Phase]:
  sides = _sides(s, blocks[0])
  return [_scores(*sides), _read_out(*sides)]


def _bwd_small(s: Sizes, blocks: tuple[Words, ...]) -> list[Phase]:
  q, k, d = _sides(s, blocks[0])
  square, keys = _product(q, d, k), _product(k, q, d)
  rows = k.tiles * q.size
  return [
    Phase(2 * s.q * s.d, s.q, 3 * q.part),
    _more(square, reads=rows),
    keys,
    _more(square, reads=rows + s.q * s.k),
    _product(q, k, d),
    keys,
  ]


def _train_small(s: Sizes, blocks: tuple[Words, ...]) -> list[Phase]:
  q, k, d = _sides(s, blocks[0])
  scores = s.q * s.k
  return [
    _product(q, d, d),
    _scores(q, k, d),
    _product(k, d, d),
    _more(_read_out(q, k, d), reads=s.q * s.d),
    _more(_product(q, d, k), reads=scores + s.q, peak=2 * q.part),
    Phase(2 * scores, scores, 2 * q.part + 2 * k.part),
    _product(q, k, d),
    _product(d, q, d),
  ]


def _tile_needs(blocks: tuple[Words, ...], d: Words) -> tuple[Words, ...]:
  del d
  return (blocks[0] * blocks[0] + 4 * blocks[0],)


def _small(
  kind: str, phases: Callable[[Sizes, tuple[Words, ...]], list[Phase]]
) -> Algorithm:
  return Algorithm(
    kind,
    lambda d: 5 + 0 * d,
    lambda s: (tile(s.cache),),
    lambda s: (np.maximum(np.maximum(s.q, s.k), s.d),),
    _tile_needs,
    phases,
  )


ALGORITHMS: dict[str, Algorithm] = {
  "fwd_large": Algorithm(
    "forward",
    lambda d: 4 * d + 3,
    lambda s: ((s.cache - 2 * s.d) // (2 * s.d + 3),),
    lambda s: (s.q,),
    _fwd_large_needs,
    _fwd_large,
  ),
  "fwd_fa1": Algorithm(
    "forward",
    lambda d: 4 * d + 4,
    lambda s: ((s.cache - 2 * s.d - 3) // (2 * s.d + 1),),
    lambda s: (s.k,),
    _fwd_fa1_needs,
    _fwd_fa1,
  ),
  "fwd_small": _small("forward", _fwd_small),
  "matmul": _small("product", _matmul),
  "bwd_large": Algorithm(
    "backward",
    lambda d: 7 * d + 4,
    lambda s: ((s.cache - 3 * s.d - 2) // (4 * s.d + 2),),
    lambda s: (s.k,),
    _bwd_large_needs,
    _bwd_large,
  ),
  "bwd_two_pass": Algorithm(
    "backward",
    lambda d: 6 * d + 4,
    lambda s: (
      (s.cache - 2 * s.d - 2) // (4 * s.d + 2),
      (s.cache - 2 * s.d) // (3 * s.d + 4),
    ),
    lambda s: (s.k, s.q),
    _bwd_two_pass_needs,
    _bwd_two_pass,
  ),
  "bwd_small": _small("backward", _bwd_small),
  "train_small": _small("train", _train_small),
  "train_large": Algorithm(
    "train",
    lambda d: 5 * d + 4,
    lambda s: (
      s.cache // (4 * s.d),
      (s.cache - 2 * s.d) // (2 * s.d + 3),
      (s.cache - 2 * s.d) // (3 * s.d + 4),
    ),
    lambda s: (np.maximum(s.q, s.k), s.q, s.q),
    _train_large_needs,
    _train_large,
  ),
}
