"""Products with the Jacobian of a softmax, against autodiff."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.softmax.jacobian import (
  softmax_jacobian_matvec,
  softmax_jacobian_matvec_jvp,
)


def _arrays(num, shape=(3, 5, 7)):
  return jnp.asarray(np.random.default_rng(0).normal(size=(num, *shape)))


def test_pushes_changes_of_logits_forward_and_gradients_back():
  logits, t = _arrays(2)
  probs, want = jax.jvp(jax.nn.softmax, (logits,), (t,))
  got = softmax_jacobian_matvec(probs, t)
  np.testing.assert_allclose(got, want, atol=1e-15)
  (back,) = jax.vjp(jax.nn.softmax, logits)[1](t)
  np.testing.assert_allclose(got, back, atol=1e-15)


def test_is_the_dense_product_and_its_own_adjoint():
  logits, t, u = _arrays(3, (4, 6))
  probs = jax.nn.softmax(logits)
  got = softmax_jacobian_matvec(probs, t)
  for row, s, x in zip(got, np.asarray(probs), np.asarray(t)):
    dense = np.diag(s) - np.outer(s, s)
    np.testing.assert_allclose(row, dense @ x, atol=1e-15)
  other = softmax_jacobian_matvec(probs, u)
  np.testing.assert_allclose((u * got).sum(), (t * other).sum(), rtol=1e-13)
  np.testing.assert_allclose(got.sum(-1), 0, atol=1e-15)


def test_tangent():
  logits, logits_dot, t, t_dot = _arrays(4)
  probs, probs_dot = jax.jvp(jax.nn.softmax, (logits,), (logits_dot,))
  got = softmax_jacobian_matvec_jvp(probs, probs_dot, t, t_dot)
  _, want = jax.jvp(softmax_jacobian_matvec, (probs, t), (probs_dot, t_dot))
  np.testing.assert_allclose(got, want, atol=1e-14)
  # Of the whole map from logits: its second derivative.
  _, second = jax.jvp(
    lambda x, y: jax.vjp(jax.nn.softmax, x)[1](y)[0],
    (logits, t),
    (logits_dot, t_dot),
  )
  np.testing.assert_allclose(got, second, atol=1e-14)


def test_masked_keys_have_no_influence():
  logits, logits_dot, t, t_dot = _arrays(4, (4, 6))
  hidden = jnp.arange(6) >= 4
  shape = logits.shape
  probs = jax.nn.softmax(
    jnp.where(jnp.broadcast_to(hidden, shape), -jnp.inf, logits)
  )
  probs_dot = softmax_jacobian_matvec(probs, logits_dot)
  got = softmax_jacobian_matvec_jvp(probs, probs_dot, t, t_dot)
  assert not probs_dot[:, 4:].any()
  assert not got[:, 4:].any()
  cut = [x[:, :4] for x in (probs, probs_dot, t, t_dot)]
  np.testing.assert_allclose(
    got[:, :4], softmax_jacobian_matvec_jvp(*cut), atol=1e-15
  )


def test_dtype_is_kept():
  for dtype in ("float32", "bfloat16"):
    x = jnp.ones((2, 3), dtype)
    assert softmax_jacobian_matvec(x, x).dtype == dtype
    assert softmax_jacobian_matvec_jvp(x, x, x, x).dtype == dtype


@pytest.mark.parametrize(
  ("shapes", "message"),
  [
    ([(2, 3), (3,)], "t must have shape (2, 3) = shape of probs, got (3,)"),
    ([(2, 0), (2, 0)], "probs must not be empty, got shape (2, 0)"),
    ([(), ()], "probs must not be empty, got shape ()"),
  ],
)
def test_refused_shapes(shapes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    softmax_jacobian_matvec(*map(jnp.zeros, shapes))


def test_refused_tangents():
  x = jnp.ones((2, 3))
  message = "t_dot must have shape (2, 3) = shape of probs, got (2,)"
  with pytest.raises(ValueError, match=re.escape(message)):
    softmax_jacobian_matvec_jvp(x, x, x, jnp.ones(2))
