"""Which tiles a band visits: none too few, none too many, each of them once."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.softmax import _tiles

_BANDS = [
  _tiles.Band(None, 0),
  _tiles.Band(0, None),
  _tiles.Band(3, 2),
  _tiles.Band(0, 0),
  _tiles.Band(9, 0),
  _tiles.Band(50, 50),
]


@pytest.mark.parametrize("band", _BANDS)
@pytest.mark.parametrize("size", [(20, 5), (23, 4), (3, 3), (7, 1)])
def test_visits_exactly_the_tiles_that_hold_a_visible_pair(band, size):
  axis = _tiles.Axis(*size)
  # Queries may also lie before and after all keys.
  first = np.arange(-12, 30)
  last = first + 5
  got = _tiles.visit(axis, jnp.asarray(first), jnp.asarray(last), band)
  low, inner_low, inner_high, high = (np.broadcast_to(x, 42) for x in got)

  query = first[:, None, None] + np.arange(6)[:, None]
  # A last block that sticks out counts as if there were keys in all of it.
  gap = np.arange(axis.num_blocks * axis.block) - query
  seen = np.ones_like(gap, bool)
  seen &= True if band.before is None else gap >= -band.before
  seen &= True if band.after is None else gap <= band.after
  for j in range(axis.num_blocks):
    block = seen[:, :, j * axis.block : (j + 1) * axis.block]
    visited = (low <= j) & (j < high)
    np.testing.assert_array_equal(visited, block.any((1, 2)))
    inner = (inner_low <= j) & (j < inner_high)
    whole = (j + 1) * axis.block <= axis.size
    np.testing.assert_array_equal(inner, block.all((1, 2)) & whole)


def test_walk_takes_every_block_once_and_says_which_are_at_the_edge():
  for v in (_tiles.Visit(2, 3, 5, 7), _tiles.Visit(1, 4, 4, 4)):
    for cast in (int, jnp.int32):

      def step(i, counts, edge):
        return counts.at[int(edge), i].add(1)

      counts = _tiles.walk(
        _tiles.Visit(*map(cast, v)), step, jnp.zeros((2, 8), int)
      )
      inner, edge = np.zeros(8, int), np.zeros(8, int)
      inner[v.inner_low : v.inner_high] = 1
      edge[v.low : v.high] = 1
      np.testing.assert_array_equal(counts, [inner, edge - inner])


@pytest.mark.parametrize("size", [(20, 5), (23, 4), (3, 3)])
def test_blocks_cover_an_axis_and_own_each_item_once(size):
  axis = _tiles.Axis(*size)
  positions, owned = (
    np.stack([fn(i) for i in range(axis.num_blocks)])
    for fn in (axis.positions, axis.owned)
  )
  assert sorted(positions[owned]) == list(range(axis.size))
  assert positions.max() == axis.size - 1
