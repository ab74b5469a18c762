"""Forward schedules, on real arrays, through a counting cache."""

import numpy as np

from jaxattn.iocomplexity import _tiles
from jaxattn.iocomplexity._cache import Cache
from jaxattn.iocomplexity._tiles import Mask

Arrays = dict[str, np.ndarray]


def fwd_large(
  cache: Cache, x: Arrays, blocks: tuple[int, ...], mask: Mask
) -> Arrays:
  """Queries with outputs and running sums stay; keys and values stream."""
  query, key, value = x["query"], x["key"], x["value"]
  out, lse = np.empty(query.shape), np.empty(len(query))
  for rows in _tiles.blocks(len(query), blocks[0]):
    q, o, most, total = attend(cache, query, key, value, rows, mask)
    cache.store(out, rows, o)
    cache.store(lse, rows, most)
    cache.free(q, o, most, total)
  return {"out": out, "lse": lse}


def attend(
  cache: Cache,
  query: np.ndarray,
  key: np.ndarray,
  value: np.ndarray,
  rows: slice,
  mask: Mask = None,
) -> tuple[np.ndarray, ...]:
  """One block of queries, with outputs, log-sum-exps and sums, in the cache."""
  q = cache.load(query, rows)
  o = cache.alloc(q.shape)
  most, total = _tiles.running(cache, len(q))
  for j in range(len(key)):
    column = slice(j, j + 1)
    if _tiles.is_empty(mask, rows, column):
      continue
    k, v = cache.load(key, column), cache.load(value, column)
    s = cache.alloc((len(q), 1))
    cache.use(q, k, to=(s,))
    s += q @ k.T
    _tiles.hide(s, mask, rows, column)
    _fold(cache, s, v, o, most, total)
    cache.free(k, v, s)
  cache.use(o, total, to=(o,))
  o /= np.where(total > 0, total, 1.0)[:, None]
  _tiles.log_sum(cache, most, total)
  return q, o, most, total


def fwd_fa1(
  cache: Cache, x: Arrays, blocks: tuple[int, ...], mask: Mask
) -> Arrays:
  """Keys and values stay; each output is read and written for each block."""
  del mask
  query, key, value = x["query"], x["key"], x["value"]
  out = np.empty(query.shape)
  most, total = np.empty(len(query)), np.empty(len(query))
  for columns in _tiles.blocks(len(key), blocks[0]):
    k, v = cache.load(key, columns), cache.load(value, columns)
    for i in range(len(query)):
      row = slice(i, i + 1)
      q = cache.load(query, row)
      if columns.start == 0:
        o = cache.alloc(q.shape)
        m, w = _tiles.running(cache, 1)
      else:
        o, m, w = (cache.load(y, row) for y in (out, most, total))
      s, before = cache.alloc((1, len(k))), cache.alloc((1,))
      cache.use(q, k, to=(s,))
      s += q @ k.T
      # Outputs are kept normalized: what they were before has this weight.
      cache.use(w, to=(before,))
      before += w
      cache.use(o, before, to=(o,))
      o *= before[:, None]
      _fold(cache, s, v, o, m, w)
      cache.use(o, w, to=(o,))
      o /= w[:, None]
      for target, block in ((out, o), (most, m), (total, w)):
        cache.store(target, row, block)
      cache.free(q, o, m, w, s, before)
    cache.free(k, v)
  return {"out": out, "max": most, "sum": total}


def fwd_small(
  cache: Cache, x: Arrays, blocks: tuple[int, ...], mask: Mask
) -> Arrays:
  """Scores are written to slow memory and read again, both in tiles."""
  (b,) = blocks
  scores, lse = _tiles.scores_and_lse(cache, x["query"], x["key"], b, mask)
  out = _tiles.read_out(cache, scores, lse, x["value"], b, mask)
  return {"out": out, "lse": lse}


def matmul(
  cache: Cache, x: Arrays, blocks: tuple[int, ...], mask: Mask
) -> Arrays:
  """A product of two matrices, tile by tile."""
  del mask
  return {"product": _tiles.product(cache, x["left"], x["right"], blocks[0])}


def _fold(
  cache: Cache,
  s: np.ndarray,
  v: np.ndarray,
  o: np.ndarray,
  most: np.ndarray,
  total: np.ndarray,
) -> None:
  """Folds scores and values into sums that are scaled by exp(-maximum)."""
  cache.use(s, v, o, most, total, to=(s, o, most, total))
  high = np.maximum(most, s.max(1))
  shrink = np.exp(most - _tiles.finite(high))
  s[:] = np.exp(s - _tiles.finite(high)[:, None])
  total *= shrink
  total += s.sum(1)
  o *= shrink[:, None]
  o += s @ v
  most[:] = high
