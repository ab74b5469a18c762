"""Polynomial attention by random features: its formula, its error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxattn.attention import polynomial_attention, softmax_attention
from jaxattn.features import (
  apply_feature_map,
  polynomial_coefficients,
  sketched_map,
)
from tests._dense import dense_attention, visible
from tests.attention._polynomial import inputs, mean, uniform, weights_of


def test_sketched_weights_sum_to_what_the_radius_promises():
  """Where many estimates of weights are far off, outputs stay bounded."""
  rng = np.random.default_rng(0)
  query, key = map(jnp.asarray, rng.standard_normal((2, 1, 512, 1, 64)))
  value = jnp.asarray(uniform(1, 512, 1, 64))
  sketch = {"sketch_dim": 256, "rng": jax.random.key(0)}
  for options in ({}, {"is_causal": True}):
    out = polynomial_attention(
      query, key, value, degree=4, radius=4.0, **sketch, **options
    )
    exact = softmax_attention(query, key, value, **options)
    error = jnp.sqrt(((out - exact) ** 2).mean())
    assert error < 0.25
    assert jnp.abs(out).max() < 3


@pytest.mark.parametrize("local", ["exact", "polynomial"])
def test_causal_sketch_is_that_of_its_kernel(local):
  n, chunk = 65, 16
  query, key, value = inputs(n, 4, heads=(4, 2), value_dim=3)
  polynomial = polynomial_coefficients(2, 2.0)
  rng = jax.random.key(3)
  phi = sketched_map(rng, 4, polynomial, 512)
  # Scaled by a power of two, which no bit depends on.
  phi_query, phi_key = (apply_feature_map(phi, x) for x in (query / 2, key))
  weights = weights_of(phi_query, phi_key, [0.0, 1.0], scale=1.0)
  if local == "exact":
    # 65 tokens in 5 chunks of 13.
    block = np.arange(n) // 13
    exact = jnp.exp(weights_of(query, key, [0.0, 1.0]))
    weights = jnp.where((block[:, None] == block)[None, None], exact, weights)
  seen = visible(n, n, is_causal=True)[None, None]
  weights = jnp.where(seen, weights, 0)
  # Few as they are, the sums keep what the radius promises.
  got = polynomial_attention(
    query,
    key,
    value,
    degree=2,
    radius=2.0,
    is_causal=True,
    local=local,
    sketch_dim=512,
    rng=rng,
    chunk_size=chunk,
  )
  np.testing.assert_allclose(got, mean(weights, value), atol=1e-10)


def test_gradient_of_a_sketch_is_that_of_its_output():
  query, key, value = inputs(24, 3, heads=(2, 1))
  for options in ({}, {"is_causal": True}):
    call = functools.partial(
      polynomial_attention,
      degree=4,
      radius=1.0,
      sketch_dim=8,
      rng=jax.random.key(0),
      chunk_size=8,
      **options,
    )
    check_grads(jax.jit(call), (query, key, value), 1, modes=["rev"])


def test_sketch_is_unbiased_and_gets_better():
  query, key, value = inputs(100, 6, 0.8)
  call = functools.partial(polynomial_attention, degree=2, radius=1.0)
  exact = call(query, key, value)
  errors = []
  for size in (64, 1024):
    many = jax.jit(
      jax.vmap(lambda r, m=size: call(query, key, value, sketch_dim=m, rng=r))
    )(jax.random.split(jax.random.key(0), 20))
    errors.append(float(jnp.sqrt(((many - exact[None]) ** 2).mean())))
    assert jnp.abs(many.mean(0) - exact).max() < 6 * errors[-1] / 20**0.5
  # A quarter for 16 times the features.
  assert errors[1] < 0.4 * errors[0]
  causal = call(
    query,
    key,
    value,
    sketch_dim=4096,
    rng=jax.random.key(1),
    is_causal=True,
    local="polynomial",
  )
  exact = dense_attention(
    query, key, value, seen=visible(100, 100, is_causal=True)[None, None]
  )[0]
  assert jnp.sqrt(((causal - exact) ** 2).mean()) < 0.05
