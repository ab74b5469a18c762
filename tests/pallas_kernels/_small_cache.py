"""Cases and calls of attention for a small cache, for the ladder."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.small_cache_attention import mosaic_tpu
from pallas_kernels.small_cache_attention.operands import Operands, Options
from pallas_kernels.small_cache_attention.reference import reference
from tests._recompile import quick_jit

# Name -> (B, T, S, N, K, H, Hv), options. Tiles of odd sizes take one term at
# a time, those of 4 four.
CASES = {
  "plain": ((2, 9, 12, 2, 2, 7, 6), Options(False, 5)),
  "causal, grouped": ((1, 14, 14, 4, 2, 8, 6), Options(True, 4)),
  "causal, more queries": ((1, 13, 6, 2, 1, 4, 4), Options(True, 4)),
  "causal, more keys": ((1, 5, 18, 2, 1, 4, 9), Options(True, 6)),
}


def case(name, dtype):
  (b, t, s, n, k, h, hv), options = CASES[name]
  rng = np.random.default_rng(0)
  shapes = (b, t, n, h), (b, s, k, h), (b, s, k, hv), (b, t, n, hv)
  *x, bar = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
  return Operands(*x), options, bar


def by_kernel(x, options, bar, *, interpret=True):
  """Output, log-sum-exp and gradients."""

  def run(x, bar):
    out, lse = mosaic_tpu.forward(x, options, interpret=interpret)
    gradients = mosaic_tpu.backward(
      x, options, out, lse, bar, interpret=interpret
    )
    return out, lse, *gradients

  return quick_jit(run)(x, bar)


def by_reference(x, options, bar):
  """The same from the dense formula, in float64."""

  def run(x, bar):
    (out, lse), vjp = jax.vjp(lambda x: reference(x, options), x)
    (gradients,) = vjp((out * 0 + bar, lse * 0))
    return out, lse, *gradients

  wide = jax.tree.map(lambda y: y.astype(jnp.float64), (x, bar))
  return quick_jit(run)(*wide)
