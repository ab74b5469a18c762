"""The gradient in X of half the square of softmax(A1 X A2') A3 Y - E.

With f the softmax, h = A3 Y, G = f h - E and q = G h', it is A1' p A2 with
p = f * (q - r), where r holds the sums of the rows of f * q. These are the
inner products of f h and G, so that p is the dS of attention with queries A1 X,
keys A2 and values h.
"""

import numpy as np

from jaxattn.iocomplexity import _backward, _forward, _tiles
from jaxattn.iocomplexity._cache import Cache
from jaxattn.iocomplexity._formulas import tile as tile_side
from jaxattn.iocomplexity._tiles import Mask

Arrays = dict[str, np.ndarray]


def train_small(
  cache: Cache, x: Arrays, blocks: tuple[int, ...], mask: Mask
) -> Arrays:
  """Everything in tiles of products."""
  del mask
  (b,) = blocks
  queries = _tiles.product(cache, x["a1"], x["x"], b)
  scores, lse = _tiles.scores_and_lse(cache, queries, x["a2"], b)
  values = _tiles.product(cache, x["a3"], x["y"], b)
  error = _tiles.read_out(cache, scores, lse, values, b, target=x["target"])
  p = np.empty(scores.shape)
  for rows in _tiles.blocks(len(scores), b):
    _row_of_gradients(cache, scores, lse, values, error, p, rows, b)
  t = _tiles.product(cache, p, x["a2"], b)
  return {"x_grad": _tiles.product(cache, x["a1"].T, t, b)}


def _row_of_gradients(
  cache: Cache,
  scores: np.ndarray,
  lse: np.ndarray,
  values: np.ndarray,
  error: np.ndarray,
  p: np.ndarray,
  rows: slice,
  b: int,
) -> None:
  """A row of tiles of f * q with sums, then all of them once more."""
  shift = cache.load(lse, rows)
  total = cache.alloc(shift.shape)
  everything = _tiles.blocks(scores.shape[1], b)
  for columns in everything:
    tile = _tiles.accumulate(cache, error, values.T, rows, columns)
    for i, row in enumerate(range(len(scores))[rows]):
      line = cache.load(scores, (row, columns))
      cache.use(line, shift, tile, total, to=(tile, total))
      tile[i] *= np.exp(line - shift[i])
      total[i] += tile[i].sum()
      cache.free(line)
    cache.store(p, (rows, columns), tile)
    cache.free(tile)
  for columns in everything:
    for i, row in enumerate(range(len(scores))[rows]):
      weighted = cache.load(p, (row, columns))
      line = cache.load(scores, (row, columns))
      cache.use(weighted, line, shift, total, to=(weighted,))
      weighted -= np.exp(line - shift[i]) * total[i]
      cache.store(p, (row, columns), weighted)
      cache.free(weighted, line)
  cache.free(shift, total)


def train_large(
  cache: Cache, x: Arrays, blocks: tuple[int, ...], mask: Mask
) -> Arrays:
  """Rows of queries in the cache, forward, and again for their gradients."""
  del mask
  rows, block_q, block_t = blocks
  queries = _by_rows(cache, x["a1"], x["x"], rows)
  values = _by_rows(cache, x["a3"], x["y"], rows)
  keys, n = x["a2"], len(queries)
  error, lse, dots = np.empty(queries.shape), np.empty(n), np.empty(n)
  for part in _tiles.blocks(n, block_q):
    q, o, most, total = _forward.attend(cache, queries, keys, values, part)
    cache.free(q)
    target = cache.load(x["target"], part)
    # Sums of exponentials are done with: their place takes the inner products.
    cache.use(o, target, to=(total, o))
    total[:] = (o * (o - target)).sum(1)
    o -= target
    for array, block in ((error, o), (lse, most), (dots, total)):
      cache.store(array, part, block)
    cache.free(o, target, most, total)
  sides = (queries, keys, values, error, lse, dots)
  t = _backward.query_pass(cache, *sides, block_t)
  d = queries.shape[1]
  if d * d + 2 * d <= cache.cache_words:
    return {"x_grad": _streamed(cache, x["a1"], t)}
  b = int(tile_side(np.int64(cache.cache_words)))
  return {"x_grad": _tiles.product(cache, x["a1"].T, t, b)}


def _by_rows(
  cache: Cache, left: np.ndarray, right: np.ndarray, block: int
) -> np.ndarray:
  """A product: rows of the left factor and of the result stay."""
  out = np.empty((len(left), right.shape[1]))
  for rows in _tiles.blocks(len(left), block):
    a = cache.load(left, rows)
    c = cache.alloc((len(a), right.shape[1]))
    for k in range(len(right)):
      row = cache.load(right, slice(k, k + 1))
      cache.use(a, row, c, to=(c,))
      c += a[:, k : k + 1] * row
      cache.free(row)
    cache.store(out, rows, c)
    cache.free(a, c)
  return out


def _streamed(cache: Cache, left: np.ndarray, right: np.ndarray) -> np.ndarray:
  """A product left' @ right with all of the result in the cache."""
  out = np.empty((left.shape[1], right.shape[1]))
  c = cache.alloc(out.shape)
  for i in range(len(left)):
    a, b = cache.load(left, i), cache.load(right, i)
    cache.use(a, b, c, to=(c,))
    c += a[:, None] * b
    cache.free(a, b)
  cache.store(out, slice(None), c)
  cache.free(c)
  return out
