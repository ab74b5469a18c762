"""Cases and calls of tensor attention, for the rungs of the ladder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tensor_attention import TensorBlockSizes, mosaic_tpu
from pallas_kernels.tensor_attention.operands import Operands, Options
from pallas_kernels.tensor_attention.reference import reference
from tests._recompile import quick_jit

# Blocks that leave a remainder in every length below, and slabs of both kinds.
BLOCKS = TensorBlockSizes(5, 3, 4, 3, 4, 5, 6)
# Name -> (B, T, S1, S2, N, K, H, Hv), whether keys are masked, causal.
CASES = {
  "plain": ((2, 8, 7, 9, 2, 2, 6, 5), False, False),
  "causal, grouped": ((1, 11, 11, 11, 4, 2, 6, 6), False, True),
  "masks": ((2, 7, 8, 6, 2, 1, 4, 5), True, False),
  "causal, masks": ((2, 9, 9, 9, 2, 1, 4, 4), True, True),
}


def case(name, dtype, block_sizes=BLOCKS):
  """Operands and options; of masks, the first hides all that few see."""
  (b, t, s1, s2, n, k, h, hv), masked, is_causal = CASES[name]
  rng = np.random.default_rng(0)

  def normal(*shape, dtype=dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  wide = jnp.promote_types(dtype, jnp.float32)
  x = Operands(
    normal(b, t, n, h),
    0.4 * normal(b, s1, k, h, dtype=wide),
    normal(b, s2, k, h),
    normal(b, s1, k, hv, dtype=wide),
    normal(b, s2, k, hv),
  )
  if masked:
    seen1, seen2 = (rng.random((b, s)) < 0.6 for s in (s1, s2))
    # No query of the last batch element sees a pair; causal, no early one of
    # the first does.
    seen2[-1], seen1[0, :2] = False, False
    seen1[0, 2], seen2[0, 2] = True, True
    x = x._replace(key_mask1=jnp.asarray(seen1), key_mask2=jnp.asarray(seen2))
  return x, Options(is_causal, block_sizes)


def structs(dtype="bfloat16", *, length=640, masked=True, h=64, hv=80):
  """Operands without numbers; no length is a multiple of a block."""
  b, n, k = 1, 4, 2
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
  wide = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  seen = jax.ShapeDtypeStruct((b, length), jnp.bool_) if masked else None
  return Operands(
    shape((b, length, n, h)),
    wide((b, length, k, h)),
    shape((b, length, k, h)),
    wide((b, length, k, hv)),
    shape((b, length, k, hv)),
    seen,
    seen,
  )


def cotangent(x):
  b, t, n, _ = x.query.shape
  rng = np.random.default_rng(1)
  out = jnp.asarray(rng.standard_normal((b, t, n, x.value1.shape[-1])))
  return out.astype(x.query.dtype).astype(x.key1.dtype)


def both_passes(x, out_bar, options, *, interpret=True):
  """Output, log-sum-exp, and all gradients."""
  out, lse = mosaic_tpu.forward(x, options, interpret=interpret)
  gradients = mosaic_tpu.backward(
    x, options, out, lse, out_bar, interpret=interpret
  )
  return out, lse, *gradients


@functools.cache
def _compiled(options, interpret):
  run = functools.partial(both_passes, options=options, interpret=interpret)
  return quick_jit(run)


def by_kernel(x, options, out_bar, *, interpret=True):
  """Output, log-sum-exp, and all gradients."""
  return _compiled(options, interpret)(x, out_bar)


def by_reference(x, options, out_bar):
  """The same from the dense formula, in float64."""
  masks = x[5:]
  floats, out_bar = jax.tree.map(
    lambda y: y.astype(jnp.float64), (x[:5], out_bar)
  )

  def run(floats, out_bar):
    def dense(*floats):
      return reference(Operands(*floats, *masks), options)

    (out, lse), vjp = jax.vjp(dense, *floats)
    return out, lse, *vjp((out_bar, jnp.zeros_like(lse)))

  return quick_jit(run)(floats, out_bar)
