"""Tensor sketches: against their definitions, and in mean and variance."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.sketch import (
  poly_sketch_apply,
  poly_sketch_init,
  tensor,
  tensor_sketch_apply,
  tensor_sketch_init,
)
from tests._recompile import no_recompilation, quick_jit


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def _key(seed=0):
  return jax.random.key(seed)


# --- TensorSketch ---


@pytest.mark.parametrize("size", [1, 15, 16])
def test_is_the_count_sketch_of_the_tensor_product(size):
  # One size takes matrix products, the next a transform: see the test below.
  x, y, z = _normal(3, 8)
  sketch = tensor_sketch_init(_key(), 8, size, 3)
  bucket, sign = np.asarray(sketch.bucket), np.asarray(sketch.sign)
  want = np.zeros(size)
  for i, j, k in itertools.product(range(8), repeat=3):
    place = (bucket[0, i] + bucket[1, j] + bucket[2, k]) % size
    sign_of = int(sign[0, i]) * int(sign[1, j]) * int(sign[2, k])
    want[place] += sign_of * x[i] * y[j] * z[k]
  got = tensor_sketch_apply(sketch, x, y, z)
  np.testing.assert_allclose(got, want, atol=1e-12)
  power = tensor_sketch_apply(sketch, x)
  np.testing.assert_allclose(power, tensor_sketch_apply(sketch, x, x, x))


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("size", [16, 33])
def test_both_paths_agree(size, degree):
  x = _normal(5, 40)
  sketch = tensor_sketch_init(_key(), 40, size, degree)
  by_matmul, by_fft = (
    tensor._tensor_sketch(sketch, (jnp.asarray(x),), path)
    for path in (True, False)
  )
  np.testing.assert_allclose(by_matmul, by_fft, atol=1e-11)


@pytest.mark.any_x64
def test_paths_agree_in_float32_for_many_buckets():
  x = jnp.asarray(_normal(3, 64), jnp.float32)
  x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  sketch = tensor_sketch_init(_key(), 64, 8192, 4)
  by_matmul, by_fft = (
    tensor._tensor_sketch(sketch, (x,), path) for path in (True, False)
  )
  np.testing.assert_allclose(by_matmul, by_fft, rtol=0, atol=1e-6)


def test_the_path_follows_the_sizes():
  def uses_fft_of(dim, size):
    sketch = tensor_sketch_init(_key(), dim, size, 2)
    x = jax.ShapeDtypeStruct((3, dim), jnp.float32)
    text = str(jax.make_jaxpr(tensor_sketch_apply)(sketch, x))
    return "segment_sum" in text or "scatter" in text

  assert not uses_fft_of(64, 16)
  assert uses_fft_of(65, 16)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_mean_and_variance(degree):
  n, m, draws = 32, 16, 40000
  x, y = _normal(2, n)
  x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
  y = (x + y) / np.linalg.norm(x + y)
  moments = _moments(tensor_sketch_init, tensor_sketch_apply, n, m, degree)
  mean, variance = moments(jax.random.split(_key(), draws), x, y)
  want = (x @ y) ** degree
  assert abs(mean - want) < 4 * math.sqrt(variance / draws)
  assert variance <= (3**degree - 1) / m
  if degree == 1:
    # The variance of a CountSketch is known.
    exact = (1 + (x @ y) ** 2 - 2 * (x**2 * y**2).sum()) / m
    np.testing.assert_allclose(variance, exact, rtol=0.03)


def _moments(init, apply, n, m, degree, **options):
  """Mean and variance of <S x, S y> over sketches drawn from keys."""

  def one(rng, x, y):
    sketch = init(rng, n, m, degree, **options)
    return apply(sketch, x) @ apply(sketch, y)

  @quick_jit
  def moments(rngs, x, y):
    estimates = jax.lax.map(lambda rng: one(rng, x, y), rngs, batch_size=1000)
    return estimates.mean(), estimates.var()

  return moments


# --- PolySketch ---


def _dense_poly(matrices, x, power):
  """The recursion as it is written down; consumes ``matrices``."""
  if power == 1:
    return x
  left = _dense_poly(matrices, x, math.ceil(power / 2))
  right = _dense_poly(matrices, x, power // 2)
  g1, g2 = map(np.asarray, matrices.pop(0))
  return (left @ g1) * (right @ g2) / math.sqrt(g1.shape[1])


@pytest.mark.parametrize("degree", [2, 3, 4, 5, 8])
def test_poly_sketch_is_its_recursion(degree):
  x = _normal(6, 10)
  sketch = poly_sketch_init(_key(), 10, 12, degree)
  assert len(sketch.projections) == degree - 1
  want = _dense_poly(list(sketch.projections), x, degree)
  np.testing.assert_allclose(poly_sketch_apply(sketch, x), want, rtol=1e-10)


def test_nonnegative_sketch_is_the_square_of_half_the_power():
  x, y = _normal(2, 6, 10)
  sketch = poly_sketch_init(_key(), 10, 25, 6, nonnegative=True)
  assert [g.shape for g, _ in sketch.projections] == [(10, 5), (5, 5)]
  half = [_dense_poly(list(sketch.projections), z, 3) for z in (x, y)]
  got = [np.asarray(poly_sketch_apply(sketch, z)) for z in (x, y)]
  assert got[0].shape == (6, 25)
  gram = got[0] @ got[1].T
  np.testing.assert_allclose(gram, (half[0] @ half[1].T) ** 2, rtol=1e-9)
  assert (gram >= 0).all()


def _errors(x, m, degree, draws, **options):
  """Rms error of the estimates for all pairs of rows of x."""
  pairs = ~np.eye(len(x), dtype=bool)
  want = (x @ x.T) ** degree

  @quick_jit
  def mean_square(rngs):
    def one(rng):
      sketch = poly_sketch_init(rng, x.shape[1], m, degree, **options)
      features = poly_sketch_apply(sketch, x)
      return ((features @ features.T - want) ** 2).mean(where=pairs)

    return jax.lax.map(one, rngs).mean()

  return math.sqrt(mean_square(jax.random.split(_key(), draws)))


@pytest.mark.parametrize(
  ("degree", "m", "draws"),
  [(2, 256, 200), (2, 1024, 100), (4, 256, 100), (4, 1024, 10)],
)
def test_rms_error_is_that_of_the_paper(degree, m, draws):
  # Orthogonal vectors, where it is |x|^p |y|^p / sqrt(m): 1.00 to 1.03 of that.
  rms = _errors(np.eye(16), m, degree, draws) * math.sqrt(m)
  # This estimate of it is off by some 2 %.
  assert 0.97 < rms < 1.06


def test_nonnegative_error_is_about_three_times_larger():
  rms = _errors(np.eye(16), 256, 4, 200, nonnegative=True) * 16
  assert 2.5 < rms < 3.8


def test_error_at_a_size_that_the_guide_names():
  x = _normal(64, 64)
  x /= np.linalg.norm(x, axis=-1, keepdims=True)
  values = ((x @ x.T) ** 2)[~np.eye(64, dtype=bool)]
  np.testing.assert_allclose(np.sqrt((values**2).mean()), 0.027, rtol=0.03)
  np.testing.assert_allclose(_errors(x, 256, 2, 50), 0.063, rtol=0.05)


# --- what a caller relies on ---

_PAIRS = {
  "tensor": (tensor_sketch_init, tensor_sketch_apply),
  "poly": (poly_sketch_init, poly_sketch_apply),
}


@pytest.mark.any_x64
@pytest.mark.parametrize("name", _PAIRS)
def test_batches_dtypes_gradient_and_compilation(name):
  init, apply = _PAIRS[name]
  x = jnp.asarray(_normal(2, 3, 10), jnp.float32)
  sketch = init(_key(), 10, 16, 2)
  out = apply(sketch, x)
  assert out.shape == (2, 3, 16)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(apply(sketch, x[1, 2]), out[1, 2], atol=1e-5)
  np.testing.assert_allclose(
    jax.vmap(apply, (None, 0))(sketch, x), out, atol=1e-5
  )
  assert apply(sketch, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  # Homogeneous of degree 2.
  slope = jax.jit(jax.grad(lambda x: apply(sketch, x).sum()))(x)
  np.testing.assert_allclose((slope * x).sum(), 2 * out.sum(), rtol=1e-4)
  with no_recompilation():
    apply(sketch, x)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: tensor_sketch_init(_key(), 0, 4, 2), "dim must be >= 1, got 0"),
    (
      lambda: tensor_sketch_init(_key(), 4, 0, 2),
      "sketch_dim must be >= 1, got 0",
    ),
    (lambda: tensor_sketch_init(_key(), 4, 4, 0), "degree must be >= 1, got 0"),
    (lambda: poly_sketch_init(_key(), 4, 4, 1), "degree must be >= 2, got 1"),
    (
      lambda: poly_sketch_init(_key(), 4, 5, 4, nonnegative=True),
      "sketch_dim must be a square if nonnegative, got 5",
    ),
    (
      lambda: poly_sketch_init(_key(), 4, 4, 2, nonnegative=True),
      "degree must be even and >= 4 if nonnegative, got 2",
    ),
    (
      lambda: poly_sketch_init(_key(), 4, 4, 5, nonnegative=True),
      "degree must be even and >= 4 if nonnegative, got 5",
    ),
    (
      lambda: poly_sketch_init(_key(), 4, 4, 4, nonnegative=1),
      "nonnegative must be one of False, True, got 1",
    ),
    (
      lambda: _apply_tensor(np.zeros(4), np.zeros(4)),
      "xs must be 1 or 3 vectors (degree of the sketch), got 2",
    ),
    (
      lambda: _apply_tensor(np.zeros(5)),
      "x must have shape (..., 4), got (5,)",
    ),
    (lambda: _apply_tensor(1.0), "x must have shape (..., 4), got ()"),
    (
      lambda: _apply_tensor(np.zeros(4, int)),
      "x must have a floating dtype, got int",
    ),
    (
      lambda: _apply_tensor(*(np.zeros((n, 4)) for n in (2, 2, 3))),
      "xs must have one shape and dtype, got (3, 4)",
    ),
    (
      lambda: poly_sketch_apply(poly_sketch_init(_key(), 4, 4, 2), np.ones(3)),
      "x must have shape (..., 4), got (3,)",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


def _apply_tensor(*xs):
  return tensor_sketch_apply(tensor_sketch_init(_key(), 4, 8, 3), *xs)
