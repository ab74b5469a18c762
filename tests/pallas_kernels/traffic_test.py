"""The grids of kernels move the words that are counted for their schedules."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.iocomplexity import blockspec_traffic, io_count
from pallas_kernels._compat import pl
from pallas_kernels.flash_attention import BlockSizes, flash_attention
from pallas_kernels.small_cache_attention import small_cache_attention


@pytest.fixture
def words(monkeypatch):
  """Words of each operand, by kernel, that attention of one head moves."""
  specs, call = {}, pl.pallas_call

  def spy(*args, grid_spec, name, **options):
    specs[name] = grid_spec
    return call(*args, grid_spec=grid_spec, name=name, **options)

  def moved(attend, nq, nk, d):
    shapes = (1, nq, 1, d), (1, nk, 1, d), (1, nk, 1, d)
    x = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    gradient = jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2))
    monkeypatch.setattr(pl, "pallas_call", spy)
    jax.eval_shape(gradient, *x)
    # What steers a grid: position of query 0, how many queries and keys.
    steer = np.array([[0], [nq], [nk]], np.int32)
    return {
      name.split("_attention_")[1]: _words(spec, steer)
      for name, spec in specs.items()
    }

  return moved


def _words(grid_spec, steer):
  scalars = (steer,) * grid_spec.num_scalar_prefetch

  def numbers(spec):
    def index_map(*ids):
      return spec.index_map(*map(np.int32, ids), *scalars)

    return types.SimpleNamespace(
      block_shape=spec.block_shape, index_map=index_map
    )

  specs = *grid_spec.in_specs, *grid_spec.out_specs
  return blockspec_traffic(grid_spec.grid, [numbers(spec) for spec in specs])


def _count(algorithm, nq, nk, d, block):
  return io_count(
    algorithm,
    num_queries=nq,
    num_keys=nk,
    head_dim=d,
    cache_words=2**12,
    block_size=block,
  ).total


def test_flash_attention(words):
  def attend(*x):
    return flash_attention(
      *x, block_sizes=BlockSizes(16, 8, 32, 24), implementation="interpret"
    )

  sizes = 64, 96, 8
  moved = words(attend, *sizes)
  forward = moved.pop("forward")
  assert forward == (512, 3072, 3072, 512, 64)
  assert sum(forward) == _count("fwd_large", *sizes, 16) == 7232
  # What a query's cotangent and output come to is summed outside of kernels.
  dots = 2 * 64 * 8 + 64
  backward = sum(map(sum, moved.values()))
  assert backward + dots == _count("bwd_two_pass", *sizes, (24, 32))


@pytest.mark.parametrize(
  ("nq", "nk", "d", "block"), [(10, 15, 10, 5), (12, 8, 4, 2), (8, 24, 16, 4)]
)
def test_small_cache_attention(words, nq, nk, d, block):
  def attend(*x):
    return small_cache_attention(
      *x, block_size=block, implementation="interpret"
    )

  moved = words(attend, nq, nk, d)
  forward = sum(moved.pop("scores")) + sum(moved.pop("values"))
  assert forward == _count("fwd_small", nq, nk, d, block)
  dots = 2 * nq * d + nq
  backward = sum(map(sum, moved.values()))
  assert backward + dots == _count("bwd_small", nq, nk, d, block)


def test_half_of_the_tiles_of_a_causal_mask_come(words):
  n, d, block = 32, 8, 4

  def attend(is_causal):
    return lambda *x: small_cache_attention(
      *x, block_size=block, is_causal=is_causal, implementation="interpret"
    )

  full, half = (words(attend(c), n, n, d) for c in (False, True))
  rows = n // block
  scores = {"scores": 2, "weights": 3, "scores_bar": 3, "values": 0}
  for name, operand in (scores | {"query": 0, "value": 0, "key": 0}).items():
    tile = block**2
    passes = full[name][operand] // (tile * rows**2)
    tiles = half[name][operand] // tile
    # Up to the diagonal. The last keys need one strip only, and for the next
    # columns that is the same one again.
    again = passes - 1 if name in ("value", "key") else 0
    assert tiles == passes * rows * (rows + 1) // 2 - again
