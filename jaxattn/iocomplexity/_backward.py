"""Backward schedules: gradients in queries, keys and values.

All use dS = P * (dO V' - D) with P = exp(S - L), where D holds the inner
products of outputs and their gradients.
"""

import numpy as np

from jaxattn.iocomplexity import _tiles
from jaxattn.iocomplexity._cache import Cache
from jaxattn.iocomplexity._tiles import Mask

Arrays = dict[str, np.ndarray]


def bwd_large(
  cache: Cache, x: Arrays, blocks: tuple[int, ...], mask: Mask
) -> Arrays:
  """Keys, values and their gradients stay; those of queries come and go."""
  dots = _dots_by_row(cache, x["out"], x["out_grad"])
  bars = [np.empty(x[name].shape) for name in ("query", "key", "value")]
  visited = np.zeros(len(x["query"]), bool)
  for columns in _tiles.blocks(len(x["key"]), blocks[0]):
    k, v, k_bar, v_bar = _load_keys(cache, x, columns)
    for i in range(len(x["query"])):
      row = slice(i, i + 1)
      if _tiles.is_empty(mask, row, columns):
        continue
      stream = [cache.load(x[n], row) for n in ("query", "out_grad", "lse")]
      q, o_bar, lse = stream
      dot = cache.load(dots, row)
      if visited[i]:
        q_bar = cache.load(bars[0], row)
      else:
        q_bar = cache.alloc(q.shape)
      p, s_bar = _weights(cache, q, o_bar, lse, dot, k, v, mask, row, columns)
      _add(cache, v_bar, p.T, o_bar)
      _add(cache, k_bar, s_bar.T, q)
      _add(cache, q_bar, s_bar, k)
      cache.store(bars[0], row, q_bar)
      visited[i] = True
      cache.free(*stream, dot, q_bar, p, s_bar)
    cache.store(bars[1], columns, k_bar)
    cache.store(bars[2], columns, v_bar)
    cache.free(k, v, k_bar, v_bar)
  for i in np.flatnonzero(~visited):
    zeros = cache.alloc(bars[0][i].shape)
    cache.store(bars[0], i, zeros)
    cache.free(zeros)
  return _named(bars)


def bwd_two_pass(
  cache: Cache, x: Arrays, blocks: tuple[int, ...], mask: Mask
) -> Arrays:
  """Gradients of keys and values, then those of queries: nothing comes back."""
  del mask
  dots = _dots_by_row(cache, x["out"], x["out_grad"])
  bars = [np.empty(x[name].shape) for name in ("query", "key", "value")]
  for columns in _tiles.blocks(len(x["key"]), blocks[0]):
    k, v, k_bar, v_bar = _load_keys(cache, x, columns)
    for i in range(len(x["query"])):
      row = slice(i, i + 1)
      stream = [cache.load(x[n], row) for n in ("query", "out_grad", "lse")]
      q, o_bar, lse = stream
      dot = cache.load(dots, row)
      p, s_bar = _weights(cache, q, o_bar, lse, dot, k, v)
      _add(cache, v_bar, p.T, o_bar)
      _add(cache, k_bar, s_bar.T, q)
      cache.free(*stream, dot, p, s_bar)
    cache.store(bars[1], columns, k_bar)
    cache.store(bars[2], columns, v_bar)
    cache.free(k, v, k_bar, v_bar)
  sides = (x["query"], x["key"], x["value"], x["out_grad"], x["lse"], dots)
  bars[0] = query_pass(cache, *sides, blocks[1])
  return _named(bars)


def query_pass(
  cache: Cache,
  query: np.ndarray,
  key: np.ndarray,
  value: np.ndarray,
  out_grad: np.ndarray,
  lse: np.ndarray,
  dots: np.ndarray,
  block: int,
) -> np.ndarray:
  """Gradients of queries: they stay, keys and values stream past them."""
  query_bar = np.empty(query.shape)
  for rows in _tiles.blocks(len(query), block):
    stay = [cache.load(y, rows) for y in (query, out_grad, lse, dots)]
    q, o_bar, shift, dot = stay
    q_bar = cache.alloc(q.shape)
    for j in range(len(key)):
      column = slice(j, j + 1)
      k, v = cache.load(key, column), cache.load(value, column)
      p, s_bar = _weights(cache, q, o_bar, shift, dot, k, v)
      _add(cache, q_bar, s_bar, k)
      cache.free(k, v, p, s_bar)
    cache.store(query_bar, rows, q_bar)
    cache.free(*stay, q_bar)
  return query_bar


def bwd_small(
  cache: Cache, x: Arrays, blocks: tuple[int, ...], mask: Mask
) -> Arrays:
  """Four products in tiles, with P and dS in slow memory between them."""
  (b,) = blocks
  nq, nk = len(x["query"]), len(x["key"])
  dots = _dots_by_column(cache, x["out"], x["out_grad"], b)
  p, s_bar = np.empty((nq, nk)), np.empty((nq, nk))
  for rows in _tiles.blocks(nq, b):
    for columns in _tiles.blocks(nk, b):
      if not _tiles.is_empty(mask, rows, columns):
        tile = _tiles.accumulate(cache, x["query"], x["key"].T, rows, columns)
        _tiles.hide(tile, mask, rows, columns)
        lse = cache.load(x["lse"], rows)
        cache.use(tile, lse, to=(tile,))
        tile[:] = np.exp(tile - _tiles.finite(lse)[:, None])
        cache.free(lse)
        cache.store(p, (rows, columns), tile)
        cache.free(tile)
  transposed = None if mask is None else mask.T
  v_bar = _tiles.product(cache, p.T, x["out_grad"], b, transposed)
  for rows in _tiles.blocks(nq, b):
    for columns in _tiles.blocks(nk, b):
      if not _tiles.is_empty(mask, rows, columns):
        _score_gradients(cache, x, dots, p, s_bar, rows, columns)
  q_bar = _tiles.product(cache, s_bar, x["key"], b, mask)
  k_bar = _tiles.product(cache, s_bar.T, x["query"], b, transposed)
  return _named([q_bar, k_bar, v_bar])


def _score_gradients(
  cache: Cache,
  x: Arrays,
  dots: np.ndarray,
  p: np.ndarray,
  s_bar: np.ndarray,
  rows: slice,
  columns: slice,
) -> None:
  """One tile of P * (dO V' - D); P comes row by row."""
  values = x["value"].T
  tile = _tiles.accumulate(cache, x["out_grad"], values, rows, columns)
  dot = cache.load(dots, rows)
  for i, row in enumerate(range(len(p))[rows]):
    line = cache.load(p, (row, columns))
    cache.use(tile, dot, line, to=(tile,))
    tile[i] = line * (tile[i] - dot[i])
    cache.free(line)
  cache.free(dot)
  cache.store(s_bar, (rows, columns), tile)
  cache.free(tile)


def _dots_by_row(
  cache: Cache, out: np.ndarray, out_grad: np.ndarray
) -> np.ndarray:
  dots = np.empty(len(out))
  for i in range(len(out)):
    o, o_bar, dot = (
      cache.load(out, i), cache.load(out_grad, i), cache.alloc((1,))
    )  # fmt: skip
    cache.use(o, o_bar, to=(dot,))
    dot += o @ o_bar
    cache.store(dots, slice(i, i + 1), dot)
    cache.free(o, o_bar, dot)
  return dots


def _dots_by_column(
  cache: Cache, out: np.ndarray, out_grad: np.ndarray, b: int
) -> np.ndarray:
  """The same where not even two rows fit."""
  dots = np.empty(len(out))
  for rows in _tiles.blocks(len(out), b):
    dot = cache.alloc((_tiles.length(rows),))
    for k in range(out.shape[1]):
      o, o_bar = cache.load(out, (rows, k)), cache.load(out_grad, (rows, k))
      cache.use(o, o_bar, dot, to=(dot,))
      dot += o * o_bar
      cache.free(o, o_bar)
    cache.store(dots, rows, dot)
    cache.free(dot)
  return dots


def _load_keys(
  cache: Cache, x: Arrays, columns: slice
) -> tuple[np.ndarray, ...]:
  """Keys and values, and zeros for their gradients."""
  k, v = cache.load(x["key"], columns), cache.load(x["value"], columns)
  k_bar, v_bar = cache.alloc(k.shape), cache.alloc(v.shape)
  return k, v, k_bar, v_bar


def _weights(
  cache: Cache,
  q: np.ndarray,
  o_bar: np.ndarray,
  lse: np.ndarray,
  dot: np.ndarray,
  k: np.ndarray,
  v: np.ndarray,
  mask: Mask = None,
  rows: slice = slice(None),
  columns: slice = slice(None),
) -> tuple[np.ndarray, np.ndarray]:
  """P and dS of the blocks in the cache."""
  p, s_bar = cache.alloc((len(q), len(k))), cache.alloc((len(q), len(k)))
  cache.use(q, k, lse, to=(p,))
  p += q @ k.T
  _tiles.hide(p, mask, rows, columns)
  p[:] = np.exp(p - _tiles.finite(lse)[:, None])
  cache.use(o_bar, v, p, dot, to=(s_bar,))
  s_bar += p * (o_bar @ v.T - dot[:, None])
  return p, s_bar


def _add(
  cache: Cache, total: np.ndarray, left: np.ndarray, right: np.ndarray
) -> None:
  # A transposed block is a view, which the cache knows by what it is a view of.
  block = left if left.base is None else left.base
  cache.use(block, right, total, to=(total,))
  total += left @ right


def _named(bars: list[np.ndarray]) -> Arrays:
  names = ("query_grad", "key_grad", "value_grad")
  return dict(zip(names, bars, strict=True))
