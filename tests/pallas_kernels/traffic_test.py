"""The grids of kernels move the words that are counted for their schedules."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.iocomplexity import blockspec_traffic, io_count
from pallas_kernels._compat import pl
from pallas_kernels.flash_attention import BlockSizes, flash_attention
from pallas_kernels.ntk_attention import ntk_attention
from pallas_kernels.polynomial_attention import polynomial_attention
from pallas_kernels.polynomial_attention.operands import multinomial_weights
from pallas_kernels.relu_attention import relu_attention
from pallas_kernels.small_cache_attention import small_cache_attention


@pytest.fixture
def words(monkeypatch):
  """Words of each operand, by kernel, that attention of one head moves."""
  specs, call = {}, pl.pallas_call

  def spy(*args, name, **options):
    specs[name] = options.get("grid_spec") or pl.GridSpec(
      options["grid"], options["in_specs"], options["out_specs"]
    )
    return call(*args, name=name, **options)

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
  scalars = (steer,) * getattr(grid_spec, "num_scalar_prefetch", 0)

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


def test_half_of_the_keys_of_a_causal_mask_come(words):
  n, d, block = 64, 8, 16

  def attend(is_causal):
    return lambda *x: flash_attention(
      *x,
      block_sizes=BlockSizes(*[block] * 4),
      is_causal=is_causal,
      implementation="interpret",
    )

  full, half = (words(attend(c), n, n, d) for c in (False, True))
  rows = n // block
  # Keys that pass by queries, and queries that pass by keys. What one row ends
  # with, or the next begins with, may be the same block.
  for name, operand in (("forward", 1), ("query", 1), ("key_value", 0)):
    blocks = [x[name][operand] // (block * d) for x in (full, half)]
    assert blocks == [rows**2, rows * (rows + 1) // 2 - 1]


def test_relu_attention(words):
  def attend(*x):
    return relu_attention(
      *x, block_sizes=BlockSizes(16, 8, 32, 24), implementation="interpret"
    )

  nq, nk, _ = sizes = 64, 96, 8
  moved = words(attend, *sizes)
  # Flash attention's, with norms for log-sum-exps; and of each query that comes
  # a scale and a threshold. Cotangents of those leave with the queries'.
  forward = sum(moved.pop("forward"))
  assert forward == _count("fwd_large", *sizes, 16) + 2 * nq
  dots = 2 * nq * 8 + nq
  backward = sum(map(sum, moved.values()))
  more = 2 * nq * (nk // 24) + 4 * nq
  assert backward + dots == _count("bwd_two_pass", *sizes, (24, 32)) + more


def test_ntk_attention(words):
  nq, _, d = sizes = 64, 96, 8
  r = 6

  def attend(*x):
    features, z = jnp.ones((1, nq, 1, r)), jnp.ones((1, r, d))
    return ntk_attention(
      *x, features, z, z[..., 0], block_sizes=BlockSizes(16, 8, 32, 24),
      block_features=3, implementation="interpret",
    )  # fmt: skip

  moved = words(attend, *sizes)
  # Flash attention's; the sign of a sum; features once, and the state for each
  # block of queries.
  forward = sum(moved.pop("forward"))
  more = nq + nq * r + nq // 16 * r * (d + 1)
  assert forward == _count("fwd_large", *sizes, 16) + more
  dots = 2 * nq * d + nq
  backward = sum(map(sum, moved.values()))
  assert backward + dots == _count("bwd_two_pass", *sizes, (24, 32))


@pytest.mark.parametrize("is_causal", [False, True])
def test_polynomial_attention_moves_each_token_once_a_pass(words, is_causal):
  n, d = 40, 3

  def attend(*x):
    return polynomial_attention(
      *x, degree=2, weights=multinomial_weights(d, (1.0, 1.0, 0.5)),
      is_causal=is_causal, local="polynomial", chunk_size=8,
      implementation="interpret",
    )  # fmt: skip

  token, carried, features = n * d, n * (d + 1), 10
  state, both = features * (d + 1), (token, carried)
  if is_causal:
    inputs = features, token, *both
    wanted = {
      "causal_forward": (*inputs, token, n),
      "causal_query": (*inputs, carried, token),
      "causal_key_value": (*inputs, carried, *both),
    }
  else:
    wanted = {
      "moments": (*both, state),
      "read": (state, token, token, n),
      "full_query": (state, *both, token, state),
      "full_key_value": (state, *both, *both),
    }
  assert words(attend, n, n, d) == wanted


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
