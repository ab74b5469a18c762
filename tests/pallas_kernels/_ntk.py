"""Cases and calls of NTK-Attention, for the rungs of the ladder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import BlockSizes
from pallas_kernels.ntk_attention import Total, mosaic_tpu
from pallas_kernels.ntk_attention.operands import Operands, Options
from pallas_kernels.ntk_attention.reference import reference
from tests._recompile import quick_jit
from tests.pallas_kernels import _flash

# Blocks that leave a remainder in every length below, forward and backward.
BLOCKS = BlockSizes(6, 5, 7, 4)
# Name -> (B, T, S, N, K, H, Hv), r, heads of the state, of the scores, causal.
CASES = {
  "plain": ((2, 16, 20, 2, 2, 8, 6), 8, 2, {}, False),
  "causal, grouped": ((1, 20, 20, 4, 2, 8, 8), 7, 2, {}, True),
  # Some queries see no key, and some no prefix; some sums are negative.
  "signs, mask, bias": (
    (2, 13, 17, 4, 2, 8, 8),
    5,
    4,
    {"mask": (2, 4, 13, 17), "bias": (1, 4, 13, 17)},
    False,
  ),
}
BLOCK_FEATURES = 3


def operands(sizes, num_features, heads, extras, dtype):
  x = _flash.operands(sizes, extras, dtype)
  rng = np.random.default_rng(2)
  wide = jnp.promote_types(dtype, jnp.float32)
  features, z, k = (
    rng.standard_normal(shape)
    for shape in (
      (*x.query.shape[:3], num_features),
      (heads, num_features, sizes[-1]),
      (heads, num_features),
    )
  )
  if extras:
    # Sums of one sign for query 0 to 4, of the other one for 6 and up.
    slope = np.sign(5 - np.arange(sizes[1]))[:, None, None]
    features, k = 9 * np.abs(features) * slope, np.abs(k)
    x = x._replace(mask=x.mask.at[:, :, 2:8].set(False))
  else:
    features, k = np.abs(features), np.abs(k)
  prefix = (jnp.asarray(y, wide) for y in (features, z, k))
  return Operands(*x[:3], *prefix, bias=x.bias, mask=x.mask)


def case(name, dtype, block_sizes=BLOCKS):
  *sizes, is_causal = CASES[name]
  options = Options(0.4, is_causal, block_sizes, BLOCK_FEATURES)
  return operands(*sizes, dtype), options


def structs(dtype="bfloat16", num_features=200, heads=2, **options):
  """Operands without numbers; no length is a multiple of a block."""
  x = _flash.structs(dtype=dtype, **options)
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  return Operands(
    *x[:3],
    shape((*x.query.shape[:3], num_features)),
    shape((heads, num_features, x.value.shape[-1])),
    shape((heads, num_features)),
    x.bias,
    x.mask,
  )


def cotangents(x):
  out, log = _flash.cotangents(x)
  return out, Total(log, jnp.zeros_like(log))


def by_kernel(x, options, bars, *, backend=mosaic_tpu, interpret=True):
  """Output, total, and gradients of the operands that have one."""

  def run(x, bars):
    out, total = backend.forward(x, options, interpret=interpret)
    gradients = backend.backward(
      x, options, out, total, *bars, interpret=interpret
    )
    return out, *total, *(y for y in gradients if y is not None)

  return quick_jit(run)(x, bars)


def by_reference(x, options, bars):
  """The same from the dense formula, in float64."""
  mask = x.mask
  floats, bars = jax.tree.map(lambda y: y.astype(jnp.float64), (x[:7], bars))

  def run(floats, bars):
    result, vjp = jax.vjp(
      lambda *floats: reference(Operands(*floats, mask), options), *floats
    )
    out, total = result
    return out, *total, *(y for y in vjp(bars) if y is not None)

  return quick_jit(run)(floats, bars)
