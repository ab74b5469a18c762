"""Cases and calls of ReLU attention, for the rungs of the ladder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import BlockSizes
from pallas_kernels.relu_attention import mosaic_tpu
from pallas_kernels.relu_attention.operands import Operands, Options
from pallas_kernels.relu_attention.reference import reference
from tests._recompile import quick_jit
from tests.pallas_kernels import _flash

# Blocks that leave a remainder in every length below, forward and backward.
BLOCKS = BlockSizes(6, 5, 7, 4)
# Name -> (B, T, S, N, K, H, Hv), threshold, shape of the mask, options.
CASES = {
  "plain": ((2, 16, 20, 2, 2, 8, 6), 0.0, None, Options(1)),
  "causal, grouped": ((1, 20, 20, 4, 2, 8, 8), -0.5, None, Options(2, True)),
  # So far up that most queries have no key that passes.
  "few pass, mask": ((2, 13, 17, 4, 2, 8, 8), 2.2, (2, 4, 13, 17), Options(3)),
}


def operands(sizes, threshold, mask, dtype):
  x = _flash.operands(sizes, {"mask": mask} if mask else {}, dtype)
  noise = np.random.default_rng(2).standard_normal(x.query.shape[:3]) / 10
  wide = jnp.promote_types(dtype, jnp.float32)
  threshold = jnp.asarray(threshold + noise, wide)
  return Operands(*x[:3], threshold, jnp.asarray(0.4, wide), x.mask)


def case(name, dtype, block_sizes=BLOCKS):
  sizes, threshold, mask, options = CASES[name]
  x = operands(sizes, threshold, mask, dtype)
  return x, options._replace(block_sizes=block_sizes)


def structs(dtype="bfloat16", **sizes):
  """Operands without numbers; no length is a multiple of a block."""
  x = _flash.structs(dtype=dtype, **sizes)
  wide = jax.ShapeDtypeStruct(x.query.shape[:3], jnp.float32)
  mask = jax.ShapeDtypeStruct((1, 1, 1, x.key.shape[1]), jnp.bool_)
  return Operands(*x[:3], wide, jax.ShapeDtypeStruct((), jnp.float32), mask)


cotangents = _flash.cotangents
by_kernel = functools.partial(_flash.by_kernel, backend=mosaic_tpu)


def by_reference(x, options, bars):
  """Output, norm and all gradients of the dense formula, in float64."""
  mask = x.mask
  *floats, bars = jax.tree.map(lambda y: y.astype(jnp.float64), (*x[:5], bars))

  def run(floats, bars):
    result, vjp = jax.vjp(
      lambda *floats: reference(Operands(*floats, mask), options), *floats
    )
    return *result, *vjp(bars)

  return quick_jit(run)(floats, bars)
