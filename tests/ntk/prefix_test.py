"""The tied prefix model: closed forms against automatic differentiation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.ntk import (
  tied_prefix_jacobian,
  tied_prefix_ntk,
  tied_prefix_output,
)
from tests._recompile import no_recompilation

_D, _M, _N = 3, 50, 4


def _inputs(dtype="float64", m=_M):
  rng = np.random.default_rng(0)
  w, x1 = rng.standard_normal((m, _D)), rng.standard_normal((_N, _D))
  a, x2 = rng.choice([-1.0, 1.0], m), rng.standard_normal((_N + 1, _D))
  return [jnp.asarray(y, dtype) for y in (w, a, x1, x2)]


def _dense_output(w, a, x):
  return jax.nn.softmax(x @ w.T) @ (a[:, None] * w)


@jax.jit
def _dense_ntk(w, a, x1, x2):
  left, right = (jax.jacobian(_dense_output)(w, a, x) for x in (x1, x2))
  return len(w) * jnp.einsum("iamp,jbmp->iajb", left, right)


def test_output_and_jacobian():
  w, a, x, _ = _inputs()
  np.testing.assert_allclose(
    tied_prefix_output(w, a, x), _dense_output(w, a, x), rtol=0, atol=1e-14
  )
  want = jax.jit(jax.jacobian(_dense_output))(w, a, x)
  got = tied_prefix_jacobian(w, a, x)
  assert got.shape == (_N, _D, _M, _D)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 50, 100])
def test_kernel(chunk_size):
  w, a, x1, x2 = _inputs()
  got = tied_prefix_ntk(w, a, x1, x2, chunk_size=chunk_size)
  assert got.shape == (_N, _D, _N + 1, _D)
  np.testing.assert_allclose(got, _dense_ntk(w, a, x1, x2), rtol=0, atol=1e-12)
  own = tied_prefix_ntk(w, a, x1, chunk_size=chunk_size)
  np.testing.assert_allclose(own, _dense_ntk(w, a, x1, x1), rtol=0, atol=1e-12)


def test_kernel_is_symmetric_and_positive():
  w, a, x, _ = _inputs()
  kernel = np.asarray(tied_prefix_ntk(w, a, x)).reshape(_N * _D, _N * _D)
  np.testing.assert_allclose(kernel, kernel.T, rtol=0, atol=1e-12)
  eigenvalues = np.linalg.eigvalsh(kernel)
  assert eigenvalues[0] > -1e-9 * eigenvalues[-1]
  assert eigenvalues[-1] > 0


def test_signs_of_any_size():
  w, a, x1, x2 = _inputs()
  a = 1.5 * a
  np.testing.assert_allclose(
    tied_prefix_ntk(w, a, x1, x2),
    _dense_ntk(w, a, x1, x2),
    rtol=0,
    atol=1e-12,
  )


def test_order_of_columns_does_not_matter():
  w, a, x, _ = _inputs()
  order = np.random.default_rng(1).permutation(_M)
  for fn in (tied_prefix_output, tied_prefix_ntk):
    np.testing.assert_allclose(
      fn(w[order], a[order], x), fn(w, a, x), rtol=0, atol=1e-12
    )


def test_large_logits_in_float32():
  exact = tied_prefix_ntk(*(y * s for y, s in zip(_inputs(), (8, 1, 8, 8))))
  low = _inputs("float32")
  got = tied_prefix_ntk(*(y * s for y, s in zip(low, (8, 1, 8, 8))))
  assert got.dtype == jnp.float32
  # Logits near 200 are rounded by 1e-5.
  bound = 1e-3 * np.abs(exact).max()
  np.testing.assert_allclose(got, exact, rtol=0, atol=bound)


def test_chunks_of_16_bits_are_summed_in_32():
  w, a, x, _ = _inputs("bfloat16", m=2048)
  wide = tied_prefix_ntk(*(y.astype("float32") for y in (w, a, x)))
  got = tied_prefix_ntk(w, a, x, chunk_size=8)
  assert got.dtype == jnp.bfloat16
  gap = jnp.linalg.norm(got.astype("float32") - wide)
  assert gap < 4e-3 * jnp.linalg.norm(wide)


def test_works_under_jit_vmap_and_grad_and_compiles_once():
  w, a, x, _ = _inputs()
  batched = jax.vmap(tied_prefix_ntk, in_axes=(0, None, None))
  many = jnp.stack([w, 2 * w])
  np.testing.assert_allclose(
    jax.jit(batched)(many, a, x)[1],
    tied_prefix_ntk(2 * w, a, x),
    rtol=0,
    atol=1e-12,
  )
  step = 1e-6 * np.random.default_rng(2).standard_normal(w.shape)

  def energy(w):
    return jnp.square(tied_prefix_ntk(w, a, x)).sum()

  slope = (energy(w + step) - energy(w - step)) / 2
  predicted = jnp.vdot(jax.grad(energy)(w), step)
  np.testing.assert_allclose(slope, predicted, rtol=1e-5)
  tied_prefix_output(w, a, x)
  other = many[1]
  with no_recompilation():
    tied_prefix_ntk(other, a, x)
    tied_prefix_output(other, a, x)


@pytest.mark.parametrize(
  ("w", "a", "x", "message"),
  [
    ((12,), (12,), (4, 3), "w must have 2 dimensions, got shape (12,)"),
    ((12, 3), (11,), (4, 3), "a must have shape (12,) = (m,), got (11,)"),
    ((12, 3), (12,), (4, 2), "must have shape (*, 3) = (n, d), got (4, 2)"),
    ((0, 3), (0,), (4, 3), "w must not be empty, got shape (0, 3)"),
    ((12, 3), (12,), (0, 3), "must not be empty, got shape (0, 3)"),
  ],
)
def test_refused_shapes(w, a, x, message):
  for fn in (tied_prefix_output, tied_prefix_jacobian, tied_prefix_ntk):
    with pytest.raises(ValueError, match=re.escape(message)):
      fn(*map(jnp.ones, (w, a, x)))


def test_dtypes_promote():
  w, a, x, _ = _inputs()
  x = x.astype("float32")
  for fn in (tied_prefix_output, tied_prefix_jacobian, tied_prefix_ntk):
    got = fn(w, a, x)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, fn(w, a, x.astype("float64")))
    low = fn(*(y.astype("bfloat16") for y in (w, a, x)))
    assert low.dtype == jnp.bfloat16


def test_refused_second_queries_dtypes_and_chunks():
  w, a, x, _ = _inputs()
  with pytest.raises(ValueError, match=re.escape("x2 must have shape (*, 3)")):
    tied_prefix_ntk(w, a, x, jnp.ones((4, 2)))
  with pytest.raises(ValueError, match="w must have a floating dtype"):
    tied_prefix_output(w.astype(int), a, x)
  with pytest.raises(ValueError, match="a must have a floating dtype"):
    tied_prefix_ntk(w, a.astype(int), x)
  with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
    tied_prefix_ntk(w, a, x, chunk_size=0)
