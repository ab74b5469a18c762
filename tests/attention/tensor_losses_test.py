"""The loss of tensor attention, its radius, and Match3 by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxattn.attention import (
  tensor_attention,
  tensor_attention_loss,
  tensor_attention_loss_gradient,
  tensor_logit_radius,
)
from jaxattn.data import match3_batch
from jaxattn.sketch import khatri_rao
from tests._jaxpr import array_sizes
from tests._recompile import quick_jit
from tests.attention._tensor import relative, uniform


def _arrays(seed, lengths, d, v):
  """Arrays of a loss for lengths n, s1, s2."""
  n, s1, s2 = lengths
  shapes = [(x, d) for x in (n, s1, s2, s1, s2)] + [(d, v)] * 2 + [(n, v)]
  return uniform(seed, *shapes)


def _dense(x, a1, a2, a3, a4, a5, y1, y2, e, scale):
  f = jax.nn.softmax(scale * a1 @ x @ jnp.kron(a2, a3).T, -1)
  h = jnp.kron(a4, a5) @ khatri_rao(y1, y2)
  return ((f @ h - e) ** 2).sum() / 2


def test_loss_and_gradient_are_the_dense_ones():
  d = 3
  arrays = _arrays(0, (8, 7, 5), d, 2)
  (x,) = uniform(9, (d, d * d))
  want, grad = quick_jit(jax.value_and_grad(_dense))(x, *arrays, 1 / d)
  np.testing.assert_allclose(
    tensor_attention_loss(x, *arrays), want, rtol=1e-14
  )
  got = tensor_attention_loss_gradient(x, *arrays)
  np.testing.assert_allclose(got, grad, rtol=0, atol=1e-15)
  got = tensor_attention_loss_gradient(x, *arrays, scale=0.7)
  grad = quick_jit(jax.grad(_dense))(x, *arrays, 0.7)
  np.testing.assert_allclose(got, grad, rtol=0, atol=1e-14)


def test_closed_form_needs_the_factor():
  d = 3
  arrays = _arrays(0, (8, 8, 8), d, 2)
  (x,) = uniform(9, (d, d * d))
  a1, a2, a3, a4, a5, y1, y2, e = arrays
  f = jax.nn.softmax(a1 @ x @ jnp.kron(a2, a3).T / d, -1)
  h = khatri_rao(a4 @ y1, a5 @ y2)
  fq = f * ((f @ h - e) @ h.T)
  closed = a1.T @ (fq - fq.sum(1, keepdims=True) * f) @ jnp.kron(a2, a3)
  got = tensor_attention_loss_gradient(x, *arrays)
  assert relative(closed / d, got) < 1e-12
  assert relative(closed, got) > d - 1.01


def test_linear_time_gradient():
  d = 3
  arrays = _arrays(0, (14, 14, 14), d, 3)
  factors = tuple(uniform(1, *[(d, d)] * 3))
  x = factors[0] @ khatri_rao(*factors[1:]).T
  exact = quick_jit(jax.grad(_dense))(x, *arrays, 1 / d)
  got = tensor_attention_loss_gradient(factors, *arrays)
  assert relative(got, exact) < 1e-12
  loss = tensor_attention_loss(factors, *arrays)
  np.testing.assert_allclose(loss, _dense(x, *arrays, 1 / d), rtol=1e-13)
  heads = [(a @ f)[:, None] for a, f in zip(arrays[:3], factors, strict=True)]
  radius = float(tensor_logit_radius(*heads, scale=1 / d))
  logits = arrays[0] @ x @ jnp.kron(*arrays[1:3]).T / d
  np.testing.assert_allclose(radius, abs(logits).max(), rtol=1e-12)
  errors = [
    relative(
      tensor_attention_loss_gradient(
        factors, *arrays, degree=degree, radius=radius
      ),
      exact,
    )
    for degree in (2, 4, 6, 8)
  ]
  # About (R / 0.75)^(g + 1) of what the four are at R = 0.75.
  reference = np.array([8e-3, 1e-4, 5e-7, 1.5e-9])
  powers = np.array([3, 5, 7, 9])
  ratio = errors / (reference * (radius / 0.75) ** powers)
  assert ratio.max() < 6
  assert ratio.min() > 1 / 6


def test_linear_time_gradient_of_other_lengths():
  d = 3
  arrays = _arrays(0, (8, 7, 5), d, 2)
  factors = tuple(uniform(1, *[(d, 2)] * 3))
  exact = tensor_attention_loss_gradient(factors, *arrays)
  fast = tensor_attention_loss_gradient(factors, *arrays, degree=8, radius=0.5)
  assert relative(fast, exact) < 1e-8


def test_memory_of_the_linear_time_gradient():
  n, d, m = 4096, 4, 15
  x = (jax.ShapeDtypeStruct((d, d), jnp.float32),) * 3
  tall, small = (jax.ShapeDtypeStruct((a, d), jnp.float32) for a in (n, d))
  gradient = functools.partial(
    tensor_attention_loss_gradient, degree=2, radius=1.0
  )
  arrays = *[tall] * 5, small, small, tall
  assert max(array_sizes(gradient, x, *arrays)) < n * m


def test_radius_of_what_is_seen():
  q, k1, k2 = uniform(0, (2, 5, 4, 3), (2, 6, 2, 3), (2, 7, 2, 3))
  seen1, seen2 = np.arange(6) < 4, np.arange(7) > 2
  masks = [jnp.broadcast_to(x, (2, len(x))) for x in (seen1, seen2)]
  k1 = k1.at[:, ~seen1].set(jnp.nan)
  repeated = (jnp.repeat(k, 2, 2) for k in (k1[:, seen1], k2[:, seen2]))
  logits = 0.3 * jnp.einsum("btnh,bsnh,bunh->bntsu", q, *repeated)
  for chunk_size in (None, 2):
    got = tensor_logit_radius(
      q, k1, k2, scale=0.3, key_mask1=masks[0], key_mask2=masks[1],
      chunk_size=chunk_size,
    )  # fmt: skip
    np.testing.assert_allclose(got, abs(logits).max(), rtol=1e-14)
  checked = checkify.checkify(
    lambda q: tensor_logit_radius(q, k2, k2, radius=0.01)
  )
  with pytest.raises(checkify.JaxRuntimeError, match="beyond the promised"):
    checked(q)[0].throw()
  with pytest.raises(ValueError, match=r"radius must be positive, got 0\.0"):
    tensor_logit_radius(q, k2, k2, radius=0.0)


def _match3_by_hand(tokens, modulus):
  """Query, keys and values whose attention tells Match3 apart."""
  batch, n = tokens.shape
  theta = 2 * np.pi * np.asarray(tokens) / modulus
  c, s = np.cos(theta), np.sin(theta)
  one, zero = np.ones_like(c), np.zeros_like(c)
  gap = 1 - np.cos(2 * np.pi / modulus)
  beta, tau = 2 * np.log(4 * n**2) / gap, 1 - gap / 2
  query = beta * np.stack((c, -c, -s, -s, one), -1)
  key1, key2 = (
    np.stack((c, s, c, s, zero), -1),
    np.stack((c, s, s, c, zero), -1),
  )
  null = np.broadcast_to([0, 0, 0, 0, tau**0.5], (batch, 1, 5))
  key1, key2 = (np.concatenate((k, null), 1) for k in (key1, key2))
  value = np.concatenate((one, zero[:, :1]), 1)[..., None]
  return beta, [x[:, :, None] for x in (query, key1, key2, value, value)]


def test_match3_by_hand():
  tokens, labels = match3_batch(jax.random.key(0), 200, 16, 64)
  beta, arrays = _match3_by_hand(tokens, 64)
  out = tensor_attention(*arrays, scale=1.0)[..., 0, 0]
  np.testing.assert_array_equal(out > 0.5, labels)
  # Logits this large are out of reach of any polynomial.
  assert round(beta) == 2879
  assert jnp.abs(out - 0.5).min() > 0.47


def test_refused_losses():
  arrays = _arrays(0, (4, 4, 4), 3, 2)
  (x,) = uniform(1, (3, 9))
  factors = tuple(uniform(1, *[(3, 2)] * 3))
  loss, gradient = tensor_attention_loss, tensor_attention_loss_gradient
  for fn, x0, options, message in (
    (loss, x[:, :8], {}, "x must have shape (3, 9) = d, d * d, got (3, 8)"),
    (loss, factors[:2], {}, "x must be an array or three factors, got 2"),
    (loss, (*factors[:2], x), {}, "x[2] must have shape (3, 2) = d, h, got"),
    (loss, x, {"scale": "a"}, "scale must be a real scalar, got 'a'"),
    (gradient, x, {"degree": 2}, "degree and radius must come together, got"),
    (gradient, x, {"degree": 2, "radius": 1.0}, "degree needs x as factors"),
    (gradient, factors, {"degree": 3, "radius": 1.0},
     "degree must be even, got 3: weights of an odd degree change sign"),
    (gradient, factors, {"degree": -2, "radius": 1.0}, "degree must be >= 0"),
    (gradient, factors, {"degree": 2, "radius": -1.0}, "radius must be posi"),
    (gradient, factors, {"degree": 2, "radius": np.inf},
     "radius must be positive and finite, got inf"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
      fn(x0, *arrays, **options)
  for i, bad, message in (
    (1, (4, 2), "a2 must have shape (*, 3) = columns of a1, got (4, 2)"),
    (3, (5, 3), "a4 must have shape (4, 3) = rows of a2, got (5, 3)"),
    (4, (5, 3), "a5 must have shape (4, 3) = rows of a3, got (5, 3)"),
    (6, (3, 1), "y2 must have shape (3, 2) = shape of y1, got (3, 1)"),
    (7, (4, 3), "e must have shape (4, 2) = rows a1, cols y1, got (4, 3)"),
  ):
    changed = [jnp.ones(bad) if i == j else y for j, y in enumerate(arrays)]
    with pytest.raises(ValueError, match=re.escape(message)):
      loss(x, *changed)
