"""Cases and calls of exact attention, for the rungs of the ladder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import BlockSizes, mosaic_tpu
from pallas_kernels.flash_attention.operands import Operands, Options
from pallas_kernels.flash_attention.reference import reference
from tests._recompile import quick_jit

# Blocks that leave a remainder in every length below, forward and backward.
BLOCKS = BlockSizes(6, 5, 7, 4)
# Name -> (B, T, S, N, K, H, Hv), what hides or shifts, options.
CASES = {
  "plain": ((2, 16, 20, 2, 2, 8, 6), {}, {}),
  "causal, grouped": ((1, 20, 20, 4, 2, 8, 8), {}, {"after": 0}),
  "window, mask, bias": (
    (2, 13, 17, 4, 2, 8, 8),
    {"mask": (2, 4, 13, 17), "bias": (1, 4, 13, 17)},
    {"before": 3, "after": 2},
  ),
  "lengths, offset": (
    (2, 13, 21, 2, 1, 8, 8),
    {"lengths": True, "offset": 4, "bias": (2, 1, 1, 21)},
    {"before": 6, "after": 0},
  ),
  "segments": (
    (2, 12, 13, 2, 1, 4, 4),
    {"segments": True, "mask": (1, 1, 12, 1), "bias": (1, 2, 12, 1)},
    {},
  ),
}


def operands(sizes, extras, dtype, seed=0):
  b, t, s, n, k, h, hv = sizes
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  def segments(length):
    return jnp.asarray(np.sort(rng.integers(0, 3, (b, length)), 1))

  x = Operands(normal(b, t, n, h), normal(b, s, k, h), normal(b, s, k, hv))
  if "bias" in extras:
    x = x._replace(bias=normal(*extras["bias"]))
  if "mask" in extras:
    x = x._replace(mask=jnp.asarray(rng.random(extras["mask"]) < 0.5))
  if "segments" in extras:
    x = x._replace(query_segments=segments(t), key_segments=segments(s))
  if "lengths" in extras:
    x = x._replace(
      query_lengths=jnp.arange(b) + t - b, key_lengths=s - 4 * jnp.arange(b)
    )
  if "offset" in extras:
    x = x._replace(offset=jnp.int32(extras["offset"]))
  return x


def structs(*, h=64, hv=80, dtype="bfloat16", everything=False):
  """Operands without numbers; no length is a multiple of a block."""
  b, t, s, n, k = 1, 1000, 640, 4, 2
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
  ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  x = Operands(shape((b, t, n, h)), shape((b, s, k, h)), shape((b, s, k, hv)))
  if everything:
    x = x._replace(
      bias=shape((1, n, t, s)),
      mask=jax.ShapeDtypeStruct((b, 1, 1, s), jnp.bool_),
      query_segments=ints((b, t)),
      key_segments=ints((b, s)),
      query_lengths=ints((b,)),
      key_lengths=ints((b,)),
      offset=ints(()),
    )
  return x


def case(name, dtype, block_sizes=BLOCKS):
  sizes, extras, options = CASES[name]
  options = Options(0.4, block_sizes=block_sizes, **options)
  return operands(sizes, extras, dtype), options


def cotangents(x):
  b, t, n, _ = x.query.shape
  rng = np.random.default_rng(1)
  out = jnp.asarray(rng.standard_normal((b, t, n, x.value.shape[-1])))
  lse = jnp.asarray(rng.standard_normal((b, t, n)))
  wide = jnp.promote_types(x.query.dtype, jnp.float32)
  return out.astype(x.query.dtype), lse.astype(wide)


def by_kernel(x, options, bars, *, backend=mosaic_tpu, interpret=True):
  """Output, log-sum-exp, and gradients of the operands that have one."""

  def run(x, bars):
    out, lse = backend.forward(x, options, interpret=interpret)
    gradients = backend.backward(
      x, options, out, lse, *bars, interpret=interpret
    )
    return out, lse, *(y for y in gradients if y is not None)

  return quick_jit(run)(x, bars)


def by_reference(x, options, bars):
  """The same from the dense formula, in float64."""

  def wide(y):
    is_float = y is not None and jnp.issubdtype(y.dtype, jnp.floating)
    return y.astype(jnp.float64) if is_float else y

  x, bars = Operands(*map(wide, x)), tuple(map(wide, bars))

  def run(x, bars):
    def dense(*floats):
      return reference(Operands(*floats, *x[4:]), options)

    result, vjp = jax.vjp(dense, *x[:4])
    return *result, *(y for y in vjp(bars) if y is not None)

  return quick_jit(run)(x, bars)


def assert_close(got, want, tol):
  """Within ``tol`` of the largest number; and -inf where that is expected."""
  assert len(got) == len(want)
  for g, w in zip(got, want, strict=True):
    g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
    assert np.array_equal(np.isneginf(g), np.isneginf(w))
    bound = tol * np.abs(w, where=np.isfinite(w), out=np.zeros_like(w)).max()
    np.testing.assert_allclose(g, w, rtol=0, atol=bound)
