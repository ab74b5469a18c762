"""Products in tiles, which every schedule with a small cache is made of."""

from collections.abc import Callable, Iterable

import numpy as np

from jaxattn.iocomplexity._cache import Cache

Mask = np.ndarray | None


def blocks(size: int, block: int) -> list[slice]:
  """Slices of ``block`` that cover ``size``; the last may be shorter."""
  return [slice(i, min(i + block, size)) for i in range(0, size, block)]


def length(part: slice) -> int:
  """Number of indices of a slice from :func:`blocks`."""
  return part.stop - part.start


def is_empty(mask: Mask, *index: slice) -> bool:
  """Whether a mask hides a whole tile."""
  return mask is not None and not mask[index].any()


def steps(mask: Mask, rows: slice, size: int, b: int) -> Iterable[int]:
  """Inner indices of a product whose left factor is hidden by tiles."""
  if mask is None:
    return range(size)
  seen = np.asarray(mask[rows].any(0))
  return [
    k for part in blocks(size, b) if seen[part].any() for k in range(size)[part]
  ]


def accumulate(
  cache: Cache,
  left: np.ndarray,
  right: np.ndarray,
  rows: slice,
  columns: slice,
  inner: Iterable[int] | None = None,
  weigh: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
  """One tile of left @ right by rank-1 updates; it stays in the cache.

  ``weigh`` changes a column of the left factor in place before it is used.
  """
  tile = cache.alloc((length(rows), length(columns)))
  for k in range(left.shape[1]) if inner is None else inner:
    column = cache.load(left, (rows, k))
    row = cache.load(right, (k, columns))
    if weigh is not None:
      weigh(column)
    cache.use(column, row, tile, to=(tile,))
    tile += column[:, None] * row
    cache.free(column, row)
  return tile


def product(
  cache: Cache,
  left: np.ndarray,
  right: np.ndarray,
  b: int,
  mask: Mask = None,
) -> np.ndarray:
  """Left @ right; with a mask, the left factor's empty tiles are skipped."""
  (m, inner), n = left.shape, right.shape[1]
  out = np.empty((m, n))
  for rows in blocks(m, b):
    kept = steps(mask, rows, inner, b)
    for columns in blocks(n, b):
      tile = accumulate(cache, left, right, rows, columns, kept)
      cache.store(out, (rows, columns), tile)
      cache.free(tile)
  return out


def scores_and_lse(
  cache: Cache, query: np.ndarray, key: np.ndarray, b: int, mask: Mask = None
) -> tuple[np.ndarray, np.ndarray]:
  """Scores as they are, and the log-sum-exp of each query, both stored.

  Raw scores with their log-sum-exp, and not exp(score), so that nothing
  overflows.
  """
  nq, nk = len(query), len(key)
  scores, lse = np.empty((nq, nk)), np.empty(nq)
  for rows in blocks(nq, b):
    most, total = running(cache, length(rows))
    for columns in blocks(nk, b):
      if is_empty(mask, rows, columns):
        continue
      tile = accumulate(cache, query, key.T, rows, columns)
      hide(tile, mask, rows, columns)
      cache.use(tile, most, total, to=(most, total))
      high = np.maximum(most, tile.max(1))
      total *= np.exp(most - finite(high))
      total += np.exp(tile - finite(high)[:, None]).sum(1)
      most[:] = high
      cache.store(scores, (rows, columns), tile)
      cache.free(tile)
    log_sum(cache, most, total)
    cache.store(lse, rows, most)
    cache.free(most, total)
  return scores, lse


def read_out(
  cache: Cache,
  scores: np.ndarray,
  lse: np.ndarray,
  value: np.ndarray,
  b: int,
  mask: Mask = None,
  target: np.ndarray | None = None,
) -> np.ndarray:
  """exp(scores - lse) @ value, less a target."""
  (nq, nk), d = scores.shape, value.shape[1]
  out = np.empty((nq, d))
  for rows in blocks(nq, b):
    kept = steps(mask, rows, nk, b)
    for columns in blocks(d, b):
      shift = cache.load(lse, rows)

      def weigh(column: np.ndarray, shift: np.ndarray = shift) -> None:
        cache.use(column, shift, to=(column,))
        column[:] = np.exp(column - finite(shift))

      tile = accumulate(cache, scores, value, rows, columns, kept, weigh)
      cache.free(shift)
      if target is not None:
        for i, row in enumerate(range(nq)[rows]):
          line = cache.load(target, (row, columns))
          cache.use(line, tile, to=(tile,))
          tile[i] -= line
          cache.free(line)
      cache.store(out, (rows, columns), tile)
      cache.free(tile)
  return out


def running(cache: Cache, rows: int) -> tuple[np.ndarray, np.ndarray]:
  """Running maxima and sums of exponentials, before the first score."""
  most, total = cache.alloc((rows,)), cache.alloc((rows,))
  most[:] = -np.inf
  return most, total


def log_sum(cache: Cache, most: np.ndarray, total: np.ndarray) -> None:
  """Turns running maxima into log-sum-exps; -inf where all is hidden."""
  cache.use(most, total, to=(most,))
  seen = total > 0
  most += np.log(np.where(seen, total, 1.0))


def finite(x: np.ndarray) -> np.ndarray:
  """Shifts by -inf, of rows without a key, become 0: exp(-inf - 0) is 0."""
  return np.where(np.isfinite(x), x, 0.0)


def hide(tile: np.ndarray, mask: Mask, rows: slice, columns: slice) -> None:
  """Scores of hidden pairs become -inf."""
  if mask is not None:
    tile[~mask[rows, columns]] = -np.inf
