"""Block sizes: plain validated numbers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import _kernel_words as words
from jaxattn.attention import BlockSizes, softmax_attention
from jaxattn.iocomplexity import block_sizes
from pallas_kernels import flash_attention
from pallas_kernels.flash_attention.config import (
  GPU,
  TPU,
  tpu_block_sizes,
  tpu_reason,
)
from pallas_kernels.flash_attention.operands import Operands, Options
from pallas_kernels.small_cache_attention.config import BLOCK_SIZE
from tests._recompile import no_recompilation


def test_one_class_everywhere():
  assert BlockSizes is flash_attention.BlockSizes


@pytest.mark.parametrize(
  "field", [field.name for field in dataclasses.fields(BlockSizes)]
)
@pytest.mark.parametrize("size", [0, -128, 1.5, "128", None, True])
def test_refuses_what_is_no_positive_integer(field, size):
  message = f"{field} must be a positive integer, got {size!r}"
  with pytest.raises(ValueError, match=re.escape(message)):
    BlockSizes(**{field: size})


def test_is_frozen_and_compares_by_value():
  sizes = BlockSizes(block_q=8)
  with pytest.raises(dataclasses.FrozenInstanceError):
    sizes.block_q = 16  # pyright: ignore[reportAttributeAccessIssue]
  assert sizes == BlockSizes(block_q=8) != BlockSizes(block_q=16)
  assert hash(sizes) == hash(BlockSizes(block_q=8))


def test_may_be_a_static_argument():
  @jax.jit
  def attend(x):
    return softmax_attention(x, x, x, block_sizes=BlockSizes(4, 4, 4, 4))

  @jax.jit(static_argnames="sizes")
  def attend_with(x, sizes):
    return softmax_attention(x, x, x, block_sizes=sizes)

  x = jnp.ones((1, 8, 1, 4))
  first = attend_with(x, BlockSizes(4, 4, 4, 4))
  assert jnp.array_equal(first, attend(x))
  with no_recompilation():
    attend_with(x, BlockSizes(4, 4, 4, 4))


@pytest.mark.parametrize(
  ("length", "size"), [(100, 128), (1100, 640), (2500, 896), (4096, 1024)]
)
def test_default_blocks_cut_a_sequence_evenly(length, size):
  shape = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
  x = Operands(shape, shape, shape)
  sizes = tpu_block_sizes(x, Options(1.0), exact=False)
  assert sizes == BlockSizes(size, size, size, size)


@pytest.mark.parametrize(
  ("heads", "options", "advice"),
  [
    (
      (2, 2),
      Options(1.0, block_sizes=BlockSizes(block_q=8192)),
      "block_q=6400",
    ),
    (
      (128, 1),
      Options(1.0),
      "smaller heads, or fewer heads of query to one of",
    ),
  ],
)
def test_blocks_that_do_not_fit_come_with_a_size_that_does(
  heads, options, advice
):
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  query, key = (shape((1, 16384, n, 128)) for n in heads)
  x = Operands(query, key, key)
  reason = tpu_reason(x, options)
  assert "of a TPU's VMEM with any block_k: use " + advice in str(reason)
  if "=" in advice:
    sizes = BlockSizes(int(advice.split("=")[1]), 128, 128, 128)
    assert tpu_reason(x, options._replace(block_sizes=sizes)) is None


# --- defaults are those of the formulas ---


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_blocks_of_a_tpu_fill_its_memory(head_dim):
  best = block_sizes(words.VMEM_WORDS, head_dim, kind="tpu")
  backward = words.powers_of_two(best.block_q_bwd, best.block_k_bwd)
  assert (TPU.block_q_bwd, TPU.block_k_bwd) == backward
  assert TPU.block_q < best.block_q


def test_copies_to_a_tpu_hide_behind_products_and_with_half_they_would_not():
  needed = max(words.BALANCE[name] for name in ("v5e", "v6e"))
  enough = (
    size
    for size in (2**i for i in range(7, 14))
    if words.flops_a_byte("forward", size, size) > needed
  )
  assert TPU.block_q == next(enough)
  backward = words.flops_a_byte("backward", TPU.block_q_bwd, TPU.block_k_bwd)
  assert backward > needed


def test_blocks_of_a_gpu_fill_its_shared_memory():
  # Of the largest head that the kernels take.
  best = block_sizes(words.SHARED_WORDS, 128, kind="gpu")
  assert (GPU.block_q_bwd, GPU.block_k_bwd) == (
    best.block_q_bwd,
    best.block_k_bwd,
  )
  assert GPU.block_q < best.block_q


def test_tile_of_a_small_cache_fills_vmem():
  block = words.small_cache_block(words.SMALL_CACHE_WORDS)
  assert (BLOCK_SIZE,) == words.powers_of_two(block)
