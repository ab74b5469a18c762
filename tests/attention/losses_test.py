"""The attention loss and its gradient against autodiff of the dense formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import (
  attention_loss,
  attention_loss_gradient,
  logit_radius,
)
from tests._recompile import no_recompilation

_N, _D = 24, 3


def _arrays(n=_N, d=_D, fill=jax.random.normal):
  rngs = jax.random.split(jax.random.key(0), 6)
  shapes = [(d, d), (n, d), (n, d), (n, d), (d, d), (n, d)]
  return [fill(rng, shape) for rng, shape in zip(rngs, shapes, strict=True)]


def _dense(x, a1, a2, a3, y, e, scale):
  f = jax.nn.softmax(scale * a1 @ x @ a2.T)
  return ((f @ a3 @ y - e) ** 2).sum() / 2


@pytest.mark.parametrize("scale", [None, 0.6])
def test_loss_and_gradient_are_those_of_the_dense_formula(scale):
  arrays = _arrays()
  dense = functools.partial(_dense, scale=scale or 1 / _D)
  want, want_dx = jax.jit(jax.value_and_grad(dense))(*arrays)
  got = attention_loss(*arrays, scale=scale)
  dx = attention_loss_gradient(*arrays, scale=scale)
  np.testing.assert_allclose(got, want, rtol=1e-14)
  np.testing.assert_allclose(dx, want_dx, atol=1e-14)
  # The factor on the logits is a factor of the gradient, too.
  assert np.abs(dx / (scale or 1 / _D) - want_dx).max() > 0.1


def test_sizes_that_differ():
  rngs = jax.random.split(jax.random.key(1), 6)
  shapes = [(3, 4), (7, 3), (9, 4), (9, 5), (5, 2), (7, 2)]
  arrays = list(map(jax.random.normal, rngs, shapes))
  want = jax.grad(functools.partial(_dense, scale=1 / 3))(*arrays)
  got = attention_loss_gradient(*arrays)
  np.testing.assert_allclose(got, want, atol=1e-14)


def test_gradient_of_the_loss_function_is_the_closed_form():
  arrays = _arrays()
  got = jax.jit(jax.grad(attention_loss))(*arrays)
  want = attention_loss_gradient(*arrays)
  np.testing.assert_allclose(got, want, atol=1e-14)


def test_low_rank_gradient_converges_with_the_degree():
  """n = 2000, d = 3, entries in (-1, 1)."""
  fill = functools.partial(jax.random.uniform, minval=-1.0, maxval=1.0)
  arrays = _arrays(2000, 3, fill)
  x, a1, a2, *_ = arrays
  radius = float(jnp.abs(a1 @ x @ a2.T).max() / 3)
  exact = attention_loss_gradient(*arrays)
  errors = [
    float(jnp.abs(fast - exact).max() / jnp.abs(exact).max())
    for degree in (2, 4, 6)
    for fast in [attention_loss_gradient(*arrays, degree=degree, radius=radius)]
  ]
  # Measured elsewhere on such data: 1.9e-3, 1.2e-4, 1.4e-6 beside 0.036.
  assert errors[0] < 0.06
  assert errors[0] > 10 * errors[1] > 100 * errors[2]
  assert errors[1] < 1.2e-4 / 0.036
  assert errors[2] < 1.4e-6 / 0.036


def test_radius_may_be_measured_and_scale_traced():
  arrays = _arrays()
  x, a1, a2, *_ = arrays
  radius = logit_radius((a1 @ x)[:, None], a2[:, None], scale=0.1)
  want = attention_loss_gradient(*arrays, scale=0.1)

  @jax.jit
  def traced(scale):
    fast = attention_loss_gradient(
      *arrays, scale=scale, degree=8, radius=radius
    )
    return attention_loss_gradient(*arrays, scale=scale), fast

  exact, fast = traced(0.1)
  np.testing.assert_allclose(exact, want, atol=1e-14)
  assert jnp.abs(fast - want).max() < 1e-3 * jnp.abs(want).max()
  slope = jax.grad(lambda s: attention_loss(*arrays, scale=s))(0.1)
  dense = jax.grad(lambda s: _dense(*arrays, s))(0.1)
  np.testing.assert_allclose(slope, dense, rtol=1e-12)
  attention_loss(*arrays, scale=0.2)
  with no_recompilation():
    attention_loss(*arrays, scale=0.3)


def test_what_the_polynomial_depends_on_must_be_static():
  def fast(radius):
    return attention_loss_gradient(*_arrays(), degree=2, radius=radius)

  with pytest.raises(ValueError, match="radius must be a static number"):
    jax.jit(fast)(1.0)
  with pytest.raises(ValueError, match="degree must be an integer"):
    attention_loss_gradient(*_arrays(), degree=2.0, radius=1.0)


def test_dtype_and_no_recompilation():
  arrays = [a.astype(jnp.float32) for a in _arrays()]
  for fn in (
    attention_loss,
    attention_loss_gradient,
    functools.partial(attention_loss_gradient, degree=2, radius=1.0),
  ):
    jitted = jax.jit(fn)
    assert jitted(*arrays).dtype == jnp.float32
    jitted(*(2 * a for a in arrays))
    assert jitted._cache_size() == 1


def test_vmap():
  arrays = _arrays()
  batch = [jnp.stack((a, 2 * a)) for a in arrays]
  got = jax.jit(jax.vmap(attention_loss_gradient))(*batch)
  want = [attention_loss_gradient(*(s * a for a in arrays)) for s in (1, 2)]
  np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize(
  ("name", "array", "message"),
  [
    (
      "x",
      np.ones((3, 4)),
      r"x must have shape \(3, 3\) = columns of a1",
    ),
    ("x", np.ones(3), "x must have 2 dimensions"),
    ("a1", np.ones((24, 3), int), "a1 must have a floating dtype"),
    ("y", np.ones((3, 3), np.float32), "one dtype, got y of float32 and x of"),
    ("a3", np.ones((23, 3)), r"a3 must have shape \(24, \*\) = rows of a2"),
    ("y", np.ones((4, 3)), r"y must have shape \(3, \*\) = columns of a3"),
    ("e", np.ones((24, 2)), r"e must have shape \(24, 3\) = rows a1, cols"),
    ("scale", np.ones(2), "scale must be a real scalar"),
  ],
)
def test_bad_input_is_refused_by_message(name, array, message):
  call = dict(zip(("x", "a1", "a2", "a3", "y", "e"), _arrays(), strict=True))
  call[name] = array
  for fn in (attention_loss, attention_loss_gradient):
    with pytest.raises(ValueError, match=message):
      fn(**call)


def test_half_an_approximation_is_refused():
  for half in ({"degree": 2}, {"radius": 1.0}):
    with pytest.raises(ValueError, match="degree and radius must come togeth"):
      attention_loss_gradient(*_arrays(), **half)
