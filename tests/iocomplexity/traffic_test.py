"""Words that the grids of Pallas kernels move, beside the formulas."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxattn.iocomplexity import blockspec_traffic, io_count


def _flash(nq, nk, d, block_q, block_k, key_map=lambda i, j: (j, 0)):
  """Grid and operands of a forward kernel: q, k, v, out, lse."""
  rows = pl.BlockSpec((block_q, d), lambda i, j: (i, 0))
  keys = pl.BlockSpec((block_k, d), key_map)
  lse = pl.BlockSpec((block_q,), lambda i, j: (i,))
  return (nq // block_q, nk // block_k), [rows, keys, keys, rows, lse]


def test_words_of_each_operand():
  words = blockspec_traffic(*_flash(64, 96, 8, 16, 8))
  assert words == (512, 3072, 3072, 512, 64)


def _divisors(n):
  return [b for b in range(1, n + 1) if n % b == 0]


def test_traffic_is_the_formula():
  rng, singles = np.random.default_rng(0), 0
  for nq, nk, d in ((48, 60, 4), (32, 24, 8), (20, 36, 5)):
    for _ in range(4):
      block_q, block_k = (int(rng.choice(_divisors(n))) for n in (nq, nk))
      words = sum(blockspec_traffic(*_flash(nq, nk, d, block_q, block_k)))
      count = io_count(
        "fwd_large",
        num_queries=nq,
        num_keys=nk,
        head_dim=d,
        cache_words=10**6,
        block_size=block_q,
      )
      # A single block of keys never changes its index: it comes once.
      again = 2 * nk * d * (nq // block_q - 1) if block_k == nk else 0
      singles += again > 0
      assert words == count.total - again
  assert singles
  words = blockspec_traffic(*_flash(64, 8, 4, 16, 8))
  assert words == (256, 32, 32, 256, 64)


@pytest.mark.parametrize(("block_q", "block_k"), [(3, 5), (4, 4), (12, 2)])
def test_two_backward_passes_are_the_formula(block_q, block_k):
  nq, nk, d = 24, 40, 4

  def spec(rows, axis):
    shape = (rows, d) if d else (rows,)
    return pl.BlockSpec(shape, lambda *step: (step[axis], 0))

  def vector(rows, axis):
    return pl.BlockSpec((rows,), lambda *step: (step[axis],))

  # Keys outside: k, v, dk, dv stay; q, do, lse, D stream.
  keys = blockspec_traffic(
    (nk // block_k, nq // block_q),
    [spec(block_k, 0)] * 4 + [spec(block_q, 1)] * 2 + [vector(block_q, 1)] * 2,
  )
  # Queries outside: q, do, dq, lse, D stay; k, v stream.
  queries = blockspec_traffic(
    (nq // block_q, nk // block_k),
    [spec(block_q, 0)] * 3 + [vector(block_q, 0)] * 2 + [spec(block_k, 1)] * 2,
  )
  count = io_count(
    "bwd_two_pass",
    num_queries=nq,
    num_keys=nk,
    head_dim=d,
    cache_words=10**6,
    block_size=(block_k, block_q),
  )
  dots = 2 * nq * d + nq
  assert sum(keys) + sum(queries) + dots == count.total


@pytest.mark.parametrize("block", [8, 16])
def test_causal_rows_repeat_an_index(block):
  n, d = 128, 4
  clamped = _flash(n, n, d, block, block, lambda i, j: (jnp.minimum(i, j), 0))
  full = blockspec_traffic(*_flash(n, n, d, block, block))
  half = blockspec_traffic(*clamped)
  rows = n // block
  # Of rows x rows blocks, those up to the diagonal; the first of a row is the
  # one before only in the second row.
  assert half[1] == (rows * (rows + 1) // 2 - 1) * block * d
  assert abs(half[1] - full[1] / 2) <= rows * block * d
  assert (half[0], half[3:]) == (full[0], full[3:])


def test_squeezed_axes_count_one():
  spec = pl.BlockSpec((None, 4, 8), lambda b, i: (b, i, 0))
  assert blockspec_traffic((3, 5), [spec]) == (3 * 5 * 32,)
  one = pl.BlockSpec((4,), lambda i: i)
  assert blockspec_traffic((5,), [one]) == (20,)


_SPEC = pl.BlockSpec((4, 8), lambda i, j: (i, j))


@pytest.mark.parametrize(
  ("grid", "spec", "message"),
  [
    ((2, 0), _SPEC, "grid must be >= 1, got 0"),
    ((2.5, 1), _SPEC, r"grid must be an integer .*got 2\.5"),
    (
      (2,),
      _SPEC,
      r"index_map of specs\[0\] must take 1 arguments, one for each axis of "
      r"the grid, got \(i, j\)",
    ),
    ((2, 2, 2), _SPEC, "must take 3 arguments"),
    (
      (2, 2),
      pl.BlockSpec((4, 8), lambda i, j: (i,)),
      r"must return 2 indices, one for each axis of the block, got \(0,\)",
    ),
    ((2,), pl.BlockSpec((0,), lambda i: i), r"specs\[0\].block_shape must be"),
    ((2,), pl.BlockSpec(), r"specs\[0\] must have a block_shape, got"),
    (
      (2,),
      types.SimpleNamespace(block_shape=(2,), index_map=None),
      r"specs\[0\] must have a index_map",
    ),
  ],
)
def test_traffic_refuses(grid, spec, message):
  with pytest.raises(ValueError, match=message):
    blockspec_traffic(grid, [spec])
