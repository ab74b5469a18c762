"""The least number of words that any schedule of a small graph can move."""

import heapq
from collections.abc import Hashable, Iterator, Mapping, Sequence

from jaxattn import _checks

_MOST_VERTICES = 12
_State = tuple[int, int]


def pebble_optimum(
  dag: Mapping[Hashable, Sequence[Hashable]], cache_words: int
) -> int:
  """Plays the red-blue pebble game on a small graph to the end.

  Inputs begin with a blue pebble (slow memory); every vertex without successors
  must end with one. At most M vertices are red (in the cache) at a time. A red
  pebble on a blue vertex costs 1, and so does a blue one on a red vertex; a
  vertex whose predecessors are all red becomes red for nothing, as often as one
  likes; red pebbles are removed for nothing.

  Args:
    dag: predecessors of each vertex; inputs have none. At most 12 vertices.
    cache_words: M, red pebbles.

  Returns:
    The least cost.

  Raises:
    ValueError: if there are more vertices or none, if a predecessor is no
      vertex, if there is a cycle, or if M is too small for some vertex and its
      predecessors.

  Cost:
    Exponential: Dijkstra's algorithm over sets of red and blue vertices.

  Source:
    Hong and Kung (1981), the game; arXiv 2410.09397, its use.

  Example:
    >>> product = {
    ...   "a1": (), "a2": (), "b1": (), "b2": (),
    ...   "c11": ("a1", "b1"), "c12": ("a1", "b2"),
    ...   "c21": ("a2", "b1"), "c22": ("a2", "b2"),
    ... }
    >>> pebble_optimum(product, 4), pebble_optimum(product, 3)
    (8, 9)
  """
  _checks.check_integer("cache_words", cache_words, 1, None)
  before = _predecessors(dag)
  size = max(p.bit_count() + 1 for p in before)
  if size > cache_words:
    raise ValueError(
      f"cache_words must be at least {size}, a vertex with its predecessors, "
      f"got {cache_words}"
    )
  everything = (1 << len(before)) - 1
  inputs = sum(1 << v for v, p in enumerate(before) if not p)
  inner = 0
  for p in before:
    inner |= p
  outputs = everything & ~inner
  start: _State = (0, inputs)
  best: dict[_State, int] = {start: 0}
  queue: list[tuple[int, _State]] = [(0, start)]
  while queue:
    cost, state = heapq.heappop(queue)
    if best[state] < cost:
      continue
    if state[1] & outputs == outputs:
      return cost
    for price, after in _moves(state, before, cache_words):
      if cost + price < best.get(after, cost + price + 1):
        best[after] = cost + price
        heapq.heappush(queue, (cost + price, after))
  raise AssertionError("with enough red pebbles every vertex can be computed")


def _predecessors(dag: Mapping[Hashable, Sequence[Hashable]]) -> list[int]:
  """Sets of predecessors, as bits."""
  if not 1 <= len(dag) <= _MOST_VERTICES:
    raise ValueError(
      f"dag must have 1 to {_MOST_VERTICES} vertices, got {len(dag)}"
    )
  place = {vertex: i for i, vertex in enumerate(dag)}
  for vertex, parents in dag.items():
    for parent in parents:
      if parent not in place:
        raise ValueError(
          f"predecessor {parent!r} of {vertex!r} is no vertex of dag"
        )
  before = [sum({1 << place[p] for p in ps}) for ps in dag.values()]
  done = 0
  for _ in before:
    done |= sum(1 << v for v, p in enumerate(before) if p & ~done == 0)
  if done != (1 << len(before)) - 1:
    raise ValueError("dag must have no cycle")
  return before


def _moves(
  state: _State, before: list[int], cache_words: int
) -> Iterator[tuple[int, _State]]:
  """Costs and states after; a pebble is removed only to make room."""
  red, blue = state
  for v, parents in enumerate(before):
    bit = 1 << v
    if red & bit:
      if not blue & bit:
        yield 1, (red, blue | bit)
      continue
    prices = []
    if parents and parents & ~red == 0:
      prices.append((0, red & ~parents))
    if blue & bit:
      prices.append((1, red))
    for price, removable in prices:
      if red.bit_count() < cache_words:
        yield price, (red | bit, blue)
      else:
        for u in range(len(before)):
          if removable >> u & 1:
            yield price, (red & ~(1 << u) | bit, blue)
