"""A cache of M words in front of NumPy arrays, which counts what crosses."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxattn import _checks


class Trace(NamedTuple):
  """Words that a computation touched, in order.

  Attributes:
    address: (n,) integers; a word that goes to slow memory has one address,
      wherever it is.
    is_write: (n,) booleans; False where the word is read.
    outputs: addresses of the words that must end in slow memory, sorted.
  """

  address: np.ndarray
  is_write: np.ndarray
  outputs: np.ndarray


class Cache:
  """A fast memory of M words, explicitly managed.

  Slow memory is NumPy arrays. What is loaded or allocated occupies the cache
  until it is freed. Moving a word costs one, in either direction; arithmetic on
  what the cache holds is free.

  Args:
    cache_words: M.
    trace: whether to keep a :class:`Trace` of what :meth:`use` is told.

  Attributes:
    cache_words: M.
    reads: words loaded so far.
    writes: words stored so far.
    occupied: words that the cache holds now.
    peak: the most that it held.

  Raises:
    ValueError: if M is no positive integer; at once when more than M words
      would be held, or what is not held is stored or freed.

  Example:
    >>> import numpy as np
    >>> cache, x, y = Cache(8), np.arange(12.0), np.empty(3)
    >>> block = cache.load(x, slice(0, 6))
    >>> total = cache.alloc((2,))
    >>> total += block.reshape(2, 3).sum(1)
    >>> cache.free(block)
    >>> cache.store(y, slice(0, 2), total)
    >>> cache.reads, cache.writes, cache.occupied, cache.peak
    (6, 2, 2, 8)
  """

  def __init__(self, cache_words: int, *, trace: bool = False) -> None:
    """Begins with an empty cache."""
    _checks.check_integer("cache_words", cache_words, 1, None)
    self.cache_words = cache_words
    self.reads = self.writes = self.occupied = self.peak = 0
    self._held: dict[int, np.ndarray] = {}
    self._tracer = _Tracer() if trace else None

  def load(self, array: np.ndarray, index: Any) -> np.ndarray:
    """Copies ``array[index]`` from slow memory into the cache.

    Args:
      array: an array in slow memory.
      index: integers and slices.

    Returns:
      The copy, which may be changed in place.
    """
    source = _view(array, index)
    block = np.array(source, ndmin=1)
    self._hold(block)
    self.reads += block.size
    if self._tracer is not None:
      self._tracer.load(block, source)
    return block

  def alloc(self, shape: tuple[int, ...]) -> np.ndarray:
    """Takes zeros into the cache, which costs space and no words.

    Args:
      shape: of the array.

    Returns:
      The zeros.
    """
    block = np.zeros(shape)
    self._hold(block)
    if self._tracer is not None:
      self._tracer.alloc(block)
    return block

  def store(self, array: np.ndarray, index: Any, block: np.ndarray) -> None:
    """Copies a block of the cache to ``array[index]`` in slow memory.

    Args:
      array: an array in slow memory.
      index: integers and slices.
      block: what :meth:`load` or :meth:`alloc` returned; it stays.
    """
    self._check_held(block)
    target = _view(array, index)
    if target.size != block.size:
      raise ValueError(
        f"block of shape {block.shape} does not fit a place of shape "
        f"{target.shape}"
      )
    target[...] = block
    self.writes += block.size
    if self._tracer is not None:
      self._tracer.store(block, target)

  def free(self, *blocks: np.ndarray) -> None:
    """Forgets blocks of the cache.

    Args:
      *blocks: what :meth:`load` or :meth:`alloc` returned.
    """
    for block in blocks:
      self._check_held(block)
      del self._held[id(block)]
      self.occupied -= block.size

  def use(self, *reads: np.ndarray, to: Sequence[np.ndarray] = ()) -> None:
    """Tells the trace that blocks are read, then others written.

    Args:
      *reads: blocks of the cache.
      to: blocks of the cache; one that is updated is in ``reads``, too.
    """
    if self._tracer is not None:
      for block in reads:
        self._tracer.touch(block, is_write=False)
      for block in to:
        self._tracer.touch(block, is_write=True)

  def trace(self, outputs: Sequence[np.ndarray]) -> Trace:
    """Returns what was touched so far.

    Args:
      outputs: arrays in slow memory that the computation was for.

    Returns:
      The :class:`Trace`.
    """
    if self._tracer is None:
      raise ValueError("this cache keeps no trace: it needs trace=True")
    return self._tracer.finish(outputs)

  def _hold(self, block: np.ndarray) -> None:
    occupied = self.occupied + block.size
    if occupied > self.cache_words:
      raise ValueError(
        f"the cache has {self.cache_words} words, {self.occupied} of them "
        f"taken: no room for {block.size} more"
      )
    self._held[id(block)] = block
    self.occupied = occupied
    self.peak = max(self.peak, occupied)

  def _check_held(self, block: np.ndarray) -> None:
    if self._held.get(id(block)) is not block:
      raise ValueError(
        f"the cache does not hold this block of shape {np.shape(block)}"
      )


class _Tracer:
  """Addresses of blocks, and which of them were touched."""

  def __init__(self) -> None:
    self._address: dict[int, np.ndarray] = {}
    # Of words that were computed in the cache: below 0, until they are stored.
    self._next = -1
    self._renamed: dict[int, int] = {}
    self._touched: list[np.ndarray] = []
    self._is_write: list[bool] = []

  def load(self, block: np.ndarray, source: np.ndarray) -> None:
    self._address[id(block)] = _addresses(source)

  def alloc(self, block: np.ndarray) -> None:
    address = self._next - np.arange(block.size)
    self._next -= block.size
    self._address[id(block)] = address
    self.touch(block, is_write=True)

  def store(self, block: np.ndarray, target: np.ndarray) -> None:
    old, new = self._address[id(block)], _addresses(target)
    self._renamed |= {
      a: b for a, b in zip(old.tolist(), new.tolist()) if a != b
    }

  def touch(self, block: np.ndarray, *, is_write: bool) -> None:
    self._touched.append(self._address[id(block)])
    self._is_write.append(is_write)

  def finish(self, outputs: Sequence[np.ndarray]) -> Trace:
    lengths = [len(x) for x in self._touched]
    address = [
      self._renamed.get(a, a) for x in self._touched for a in x.tolist()
    ]
    places = [_addresses(x) for x in outputs]
    return Trace(
      np.array(address, np.int64),
      np.repeat(np.array(self._is_write, bool), lengths),
      np.unique(np.concatenate(places)),
    )


def _view(array: np.ndarray, index: Any) -> np.ndarray:
  """A view, also where integers pick a single word."""
  index = index if isinstance(index, tuple) else (index,)
  return array[(*index, ...)]


def _addresses(view: np.ndarray) -> np.ndarray:
  """Where the words of an array lie, whatever it is a view of."""
  start = view.__array_interface__["data"][0]
  offsets = np.zeros(view.shape, np.int64)
  for axis, (size, stride) in enumerate(zip(view.shape, view.strides)):
    shape = (1,) * axis + (size,) + (1,) * (view.ndim - axis - 1)
    offsets = offsets + (np.arange(size) * stride).reshape(shape)
  return ((start + offsets) // view.itemsize).ravel()
