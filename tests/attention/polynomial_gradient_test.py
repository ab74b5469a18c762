"""Gradients of polynomial attention, in both modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import polynomial_attention, softmax_attention
from jaxattn.features import (
  polynomial_coefficients,
  polynomial_error,
)
from tests._dense import value_and_vjp, visible
from tests.attention._polynomial import (
  centered,
  inputs,
  mean,
  uniform,
  weights_of,
)


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "chunk_size": 20}])
def test_surrogate_is_the_gradient_of_the_formula(options):
  n = 70
  query, key, value = inputs(n, 4, heads=(4, 2), value_dim=3)
  cotangent = jnp.asarray(uniform(1, n, 4, 3, seed=5))
  polynomial = polynomial_coefficients(4, 2.0)
  causal = options.get("is_causal", False)
  seen = visible(n, n, is_causal=causal)[None, None]

  def dense(query, key, value):
    key = key if causal else centered(key)
    return mean(weights_of(query, key, polynomial, seen), value)

  call = functools.partial(
    polynomial_attention, degree=4, radius=2.0, local="polynomial", **options
  )
  args = cotangent, query, key, value
  got = jax.jit(functools.partial(value_and_vjp, call))(*args)
  want = jax.jit(functools.partial(value_and_vjp, dense))(*args)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, atol=1e-11)


def _exact_formula(polynomial, seen, cotangent, query, key, value):
  """Gradients of attention, by the formula for exp, with other weights."""
  weights = weights_of(query, key, polynomial, seen)

  def attend(query, key, value):
    logits = weights_of(query, key, [0.0, 1.0])
    # The weights above, but that their derivative is themselves.
    growth = jnp.exp(logits - jax.lax.stop_gradient(logits))
    return mean(weights * growth, value)

  return jax.vjp(attend, query, key, value)[1](cotangent)


@pytest.mark.parametrize("chunk_size", [20, 64])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_closed_form_is_the_exact_formula_with_these_weights(
  is_causal, heads, chunk_size
):
  n = 70
  query, key, value = inputs(n, 4, heads=heads, value_dim=3)
  cotangent = jnp.asarray(uniform(1, n, heads[0], 3, seed=5))
  # The first key is seen: each query has one.
  key_mask = jnp.asarray(uniform(1, n, seed=6) > -0.5).at[0, 0].set(True)
  seen = visible(n, n, is_causal=is_causal)[None, None]
  seen = seen & key_mask[:, None, None]
  polynomial = polynomial_coefficients(2, 2.0)
  call = functools.partial(
    polynomial_attention,
    degree=2,
    radius=2.0,
    is_causal=is_causal,
    key_mask=key_mask,
    local="polynomial",
    center_keys=False,
    backward="closed_form",
    chunk_size=chunk_size,
  )
  args = cotangent, query, key, value
  _, got = jax.jit(functools.partial(value_and_vjp, call))(*args)
  want = jax.jit(functools.partial(_exact_formula, polynomial, seen))(*args)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, atol=1e-13)


def test_gradient_errors_against_exact_attention():
  """Closed form errs by eps of its degree, surrogate by that of one less."""
  n = 600
  query, key, value = inputs(n, 4)
  cotangent = jnp.asarray(uniform(1, n, 1, 4, seed=5))
  args = cotangent, query, key, value
  _, exact = value_and_vjp(softmax_attention, *args)
  scale, radius = 0.5, 2.0
  errors = {}
  for degree in (2, 4, 6):
    eps = polynomial_error(polynomial_coefficients(degree, radius), radius)
    for backward in ("surrogate", "closed_form"):
      call = functools.partial(
        polynomial_attention,
        degree=degree,
        radius=radius,
        backward=backward,
        center_keys=False,
      )
      _, got = jax.jit(functools.partial(value_and_vjp, call))(*args)
      errors[backward, degree] = [
        float(jnp.abs(g - w).max()) for g, w in zip(got, exact)
      ]
    norms = jnp.abs(cotangent).sum(-1)
    size = 5 * eps * scale * jnp.abs(value).max()
    bounds = (
      size * jnp.abs(key).max() * norms.max(),
      # A key and a value answer to all queries.
      size * jnp.abs(query).max() * norms.sum(),
      5 * eps * norms.sum(),
    )
    for error, bound in zip(errors["closed_form", degree], bounds, strict=True):
      assert error <= bound
  for degree in (2, 4, 6):
    assert errors["closed_form", degree][0] < errors["surrogate", degree][0]
  for degree in (4, 6):
    lower = errors["closed_form", degree - 2][0]
    assert errors["surrogate", degree][0] < lower


def test_second_derivatives():
  query, key, value = inputs(12, 3)
  polynomial = polynomial_coefficients(2, 1.0)

  def loss(attend, x):
    return (attend(x, key, value) ** 2).sum()

  def dense(x, key, value):
    return mean(weights_of(x, centered(key), polynomial), value)

  call = functools.partial(polynomial_attention, degree=2, radius=1.0)
  got, want = (
    jax.jit(jax.hessian(functools.partial(loss, f), argnums=0))(query)
    if f is dense
    else jax.jit(jax.jacrev(jax.grad(functools.partial(loss, f))))(query)
    for f in (call, dense)
  )
  np.testing.assert_allclose(got, want, atol=1e-11)


def test_scale_may_be_traced_and_has_a_gradient():
  args = inputs(40, 4)

  def loss(scale):
    out = polynomial_attention(*args, degree=6, radius=2.0, scale=scale)
    return (out**2).sum()

  def exact(scale):
    return (softmax_attention(*args, scale=scale) ** 2).sum()

  got, want = jax.jit(jax.grad(loss))(0.4), jax.grad(exact)(0.4)
  np.testing.assert_allclose(got, want, rtol=1e-3)
