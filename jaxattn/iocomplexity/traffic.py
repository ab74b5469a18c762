"""Words that the pipeline of a Pallas kernel moves."""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxattn import _checks


def blockspec_traffic(
  grid: Sequence[int], specs: Sequence[Any]
) -> tuple[int, ...]:
  """Counts the words that each operand of a Pallas kernel moves.

  The grid is walked with its last axis fastest. A block of an input is fetched
  when its index is not that of the step before, a block of an output is written
  when its index is about to change and at the end: words are runs of one index
  times the size of a block. What ``pl.when`` skips is moved all the same; an
  index map that repeats an index (of the last block that a causal row needs,
  say) moves nothing.

  Args:
    grid: steps along each axis.
    specs: one for each operand, inputs and outputs alike: anything with a
      ``block_shape`` and an ``index_map``, as ``pallas.BlockSpec``. A size of
      None in a block counts as 1; blocks must divide the array, or the part
      that sticks out is counted, too.

  Returns:
    Words of each operand.

  Raises:
    ValueError: if the grid or a block has a size that is no positive integer,
      if a spec has no block shape or no index map, or if the map does not take
      as many arguments as the grid has axes and return an index for each axis
      of the block.

  Cost:
    One call of each index map a step of the grid, in Python.

  Source:
    arXiv 2410.09397 for the words; the rule is that of Pallas' pipelines.

  Example:
    >>> from jax.experimental import pallas as pl
    >>> query = pl.BlockSpec((16, 8), lambda i, j: (i, 0))
    >>> key = pl.BlockSpec((8, 8), lambda i, j: (j, 0))
    >>> blockspec_traffic((4, 12), [query, key])
    (512, 3072)
  """
  grid = tuple(grid)
  for size in grid:
    _checks.check_integer("grid", size, 1, None)
  return tuple(
    _runs(grid, _index_map(i, spec, len(grid)), len(spec.block_shape))
    * _words(i, spec.block_shape)
    for i, spec in enumerate(_with_shapes(specs))
  )


def _with_shapes(specs: Sequence[Any]) -> Sequence[Any]:
  for i, spec in enumerate(specs):
    for name in ("block_shape", "index_map"):
      if getattr(spec, name, None) is None:
        raise ValueError(f"specs[{i}] must have a {name}, got {spec!r}")
  return specs


def _words(i: int, block_shape: Sequence[Any]) -> int:
  sizes = [1 if size is None else size for size in block_shape]
  for size in sizes:
    _checks.check_integer(f"specs[{i}].block_shape", size, 1, None)
  return math.prod(sizes)


def _index_map(i: int, spec: Any, rank: int) -> Callable[..., Any]:
  try:
    inspect.signature(spec.index_map).bind(*range(rank))
  except TypeError:
    raise ValueError(
      f"the index_map of specs[{i}] must take {rank} arguments, one for each "
      f"axis of the grid, got {inspect.signature(spec.index_map)}"
    ) from None
  return spec.index_map


def _runs(
  grid: tuple[int, ...], index_map: Callable[..., Any], rank: int
) -> int:
  """How often the index is another one than in the step before."""
  runs, before = 0, None
  for step in itertools.product(*map(range, grid)):
    index = index_map(*step)
    index = index if isinstance(index, tuple) else (index,)
    if len(index) != rank:
      raise ValueError(
        f"an index_map must return {rank} indices, one for each axis of the "
        f"block, got {index!r}"
      )
    index = tuple(int(x) for x in index)
    runs, before = runs + (index != before), index
  return runs
