"""Block sizes: plain validated numbers."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from jaxattn.attention import BlockSizes, softmax_attention
from pallas_kernels import flash_attention
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
