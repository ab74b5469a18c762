"""Cases and calls of polynomial attention, for the rungs of the ladder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.polynomial_attention import mosaic_tpu
from pallas_kernels.polynomial_attention.operands import (
  Operands,
  Options,
  multinomial_weights,
)
from pallas_kernels.polynomial_attention.reference import reference
from tests._recompile import quick_jit

# Name -> (P, G, T, S, H, Hv, degree), options. Chunks of 5 leave a remainder.
CASES = {
  "full, grouped": ((2, 2, 13, 17, 3, 5, 4), {}),
  "causal, polynomial": ((2, 1, 13, 13, 3, 2, 3), {"is_causal": True}),
  "causal, exact": (
    (1, 2, 13, 13, 4, 3, 2),
    {"is_causal": True, "radius": 0.5},
  ),
  "linear": ((1, 1, 7, 7, 2, 2, 1), {"is_causal": True}),
  "constant": ((1, 1, 7, 9, 2, 2, 0), {}),
}
CHUNK = 5


def options_of(dim, degree, chunk_size=CHUNK, **options):
  """Options of a polynomial that is positive near 0."""
  coefficients = tuple(0.6**j for j in range(degree + 1))
  weights = tuple(multinomial_weights(dim, coefficients))
  return Options(weights, degree, chunk_size=chunk_size, **options)


def case(name, dtype, chunk_size=CHUNK):
  """One of ``CASES``."""
  (p, g, t, s, h, hv, degree), options = CASES[name]
  x = operands((p, g, t, s, h, hv), dtype)
  return x, options_of(h, degree, chunk_size, **options)


def operands(sizes, dtype):
  """Some keys are hidden: the first ones, which a causal query alone sees."""
  p, g, t, s, h, hv = sizes
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(0.5 * rng.standard_normal(shape), dtype)

  seen = jnp.arange(s) > 1
  key = jnp.where(seen, normal(p, h, s), 0)
  value = jnp.where(seen, normal(p, hv + 1, s).at[:, -1].set(1), 0)
  return Operands(normal(p, h, g, t), key, value)


def structs(
  *, h=32, hv=40, g=2, t=1000, s=640, degree=2, dtype="float32", **options
):
  """Operands without numbers; no length is a multiple of a chunk."""
  s = t if options.get("is_causal") else s
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
  x = Operands(shape((2, h, g, t)), shape((2, h, s)), shape((2, hv + 1, s)))
  return x, options_of(h, degree, options.pop("chunk_size", None), **options)


def cotangent(x):
  p, _, g, t = x.query.shape
  rng = np.random.default_rng(1)
  bar = rng.standard_normal((p, x.value.shape[1] - 1, g, t))
  return jnp.asarray(bar, x.query.dtype)


def value_and_gradients(x, bar, options, interpret, backend=mosaic_tpu):
  out, denominator, total = backend.forward(x, options, interpret=interpret)
  sums_bar = mosaic_tpu.divide_bar(out, denominator, bar)
  bars = backend.backward(x, options, total, sums_bar, interpret=interpret)
  return out, *bars


def by_kernel(x, options, bar, *, interpret=True, backend=mosaic_tpu):
  """Output, and gradients of all operands."""
  run = functools.partial(
    value_and_gradients, options=options, interpret=interpret, backend=backend
  )
  return quick_jit(run)(x, bar)


def by_reference(x, options, bar):
  """The same from the dense formula, in float64."""
  x, bar = jax.tree.map(lambda y: y.astype(jnp.float64), (x, bar))

  def run(x, bar):
    out, vjp = jax.vjp(functools.partial(reference, options=options), x)
    return out, *vjp(bar)[0]

  return quick_jit(run)(x, bar)


def assert_close(got, want, tol):
  """Within ``tol`` of the largest number."""
  assert len(got) == len(want)
  for g, w in zip(got, want, strict=True):
    g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
    np.testing.assert_allclose(g, w, rtol=0, atol=tol * np.abs(w).max())
