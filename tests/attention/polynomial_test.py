"""Polynomial attention: its dense formula, its error bound, its refusals."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import polynomial_attention, softmax_attention
from jaxattn.features import (
  attention_error_bound,
  feature_count,
  polynomial_coefficients,
  polynomial_error,
)
from tests._dense import value_and_vjp, visible
from tests._jaxpr import array_sizes
from tests._recompile import no_recompilation
from tests.attention._polynomial import (
  centered,
  inputs,
  mean,
  weights_of,
)

# --- values ---


@pytest.mark.parametrize("degree", [2, 4, 6, 8])
def test_error_is_within_the_bound(degree):
  for bound in (0.5, 1.0, 1.5, 2.0):
    query, key, value = inputs(400, 4, bound)
    logits = jnp.einsum("btnh,bsnh->bnts", query, centered(key)) / 2
    radius = float(jnp.abs(logits).max())
    polynomial = polynomial_coefficients(degree, radius)
    got = polynomial_attention(query, key, value, degree=degree, radius=radius)
    dense = mean(weights_of(query, centered(key), polynomial), value)
    np.testing.assert_allclose(got, dense, atol=1e-12)
    error = jnp.abs(got - softmax_attention(query, key, value))[0, :, 0]
    eps = polynomial_error(polynomial, radius)
    # Without an error below 1 nothing is promised.
    if eps < 1:
      assert (error.max(0) <= attention_error_bound(eps, value)[0, 0]).all()


def test_taylor_of_degree_two_is_its_formula():
  query, key, value = inputs(60, 4, heads=(4, 2), value_dim=3)
  got = polynomial_attention(
    query,
    key,
    value,
    degree=2,
    radius=2.0,
    coefficients="taylor",
    center_keys=False,
  )
  want = mean(weights_of(query, key, [1.0, 1.0, 0.5]), value)
  np.testing.assert_allclose(got, want, atol=1e-13)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
def test_causal_equals_the_masked_formula(heads):
  n, chunk = 257, 64
  query, key, value = inputs(n, 4, heads=heads, value_dim=3)
  polynomial = polynomial_coefficients(4, 2.0)
  call = functools.partial(
    polynomial_attention, degree=4, radius=2.0, is_causal=True, chunk_size=chunk
  )
  seen = visible(n, n, is_causal=True)[None, None]
  weights = weights_of(query, key, polynomial, seen)
  got = call(query, key, value, local="polynomial")
  np.testing.assert_allclose(got, mean(weights, value), atol=1e-12)
  # 257 tokens in 5 chunks of 52; inside them exp.
  same = np.arange(n) // 52
  same = same[:, None] == same[None]
  exact = jnp.where(seen, jnp.exp(weights_of(query, key, [0.0, 1.0])), 0)
  mixed = jnp.where(same[None, None], exact, weights)
  got = call(query, key, value)
  np.testing.assert_allclose(got, mean(mixed, value), atol=1e-12)


@pytest.mark.parametrize("local", ["exact", "polynomial"])
def test_the_future_changes_no_bit_of_the_past(local):
  query, key, value = inputs(257, 4)
  call = functools.partial(
    polynomial_attention,
    degree=2,
    radius=2.0,
    is_causal=True,
    local=local,
    chunk_size=64,
  )
  now = 100
  later = (jnp.arange(257) > now)[None, :, None, None]
  changed = [jnp.where(later, 3 * x + 1, x) for x in (key, value)]
  before, after = call(query, key, value), call(query, *changed)
  np.testing.assert_array_equal(before[:, : now + 1], after[:, : now + 1])
  assert (before[:, now + 1 :] != after[:, now + 1 :]).any()


def test_degenerate_cases():
  query, key, value = inputs(50, 4, heads=(2, 1))
  call = functools.partial(polynomial_attention, degree=4, radius=1.0)
  mean = jnp.broadcast_to(value.mean(1, keepdims=True), (1, 50, 2, 4))
  np.testing.assert_allclose(call(0 * query, key, value), mean, atol=1e-15)
  one = call(query, key[:, :1], value[:, :1])
  np.testing.assert_allclose(
    one, jnp.broadcast_to(value[:, :1], one.shape), atol=1e-14
  )
  mask = (jnp.arange(50) == 7)[None]
  alone = call(query, key, value, key_mask=mask)
  np.testing.assert_allclose(
    alone, jnp.broadcast_to(value[:, 7:8], alone.shape), atol=1e-14
  )
  sketch = {"sketch_dim": 32, "rng": jax.random.key(0)}
  for options in (
    {},
    {"coefficients": "taylor"},
    {"coefficients": "gaussian", "sigma": 0.3},
    {"is_causal": True},
    {"is_causal": True, "local": "polynomial"},
    sketch,
    {"is_causal": True, **sketch},
  ):
    constant = call(query, key, jnp.full_like(value, 3.5), **options)
    np.testing.assert_allclose(constant, 3.5, atol=1e-12)
  order = np.random.default_rng(1).permutation(50)
  plain = call(query, key, value)
  np.testing.assert_allclose(
    call(query, key[:, order], value[:, order]), plain, atol=1e-14
  )
  np.testing.assert_allclose(
    call(query[:, order], key, value), plain[:, order], atol=1e-14
  )
  hidden = call(query, key, value, key_mask=jnp.zeros((1, 50), bool))
  assert not hidden.any()


def test_hidden_keys_may_be_nan():
  query, key, value = inputs(60, 4)
  mask = (jnp.arange(60) < 40)[None]
  poisoned = [x.at[:, 40:].set(jnp.nan) for x in (key, value)]
  for options in ({}, {"is_causal": True}, {"backward": "closed_form"}):
    call = functools.partial(
      polynomial_attention, degree=2, radius=2.0, key_mask=mask, **options
    )
    run = jax.jit(functools.partial(value_and_vjp, call, query))
    clean = run(query, key, value)
    for g, w in zip(
      jax.tree.leaves(run(query, *poisoned)), jax.tree.leaves(clean)
    ):
      np.testing.assert_array_equal(g, w)
      assert np.isfinite(w).all()


def test_shifts_of_the_keys():
  query, key, value = inputs(64, 4)
  key += 3.0
  call = functools.partial(polynomial_attention, degree=4, radius=1.5)
  exact = softmax_attention(query, key, value)

  def error(**options):
    return float(jnp.abs(call(query, key, value, **options) - exact).max())

  assert error() < 1e-3 < error(center_keys=False)
  shift = jnp.full((1, 4), 3.0)
  assert error(key_shift=shift) < 1e-3
  causal = call(query, key, value, is_causal=True, key_shift=shift)
  exact = softmax_attention(query, key, value, is_causal=True)
  assert jnp.abs(causal - exact).max() < 1e-3


def test_only_the_logits_count():
  """Not how their size is shared between queries and keys."""
  query, key, value = (x.astype(jnp.float32) for x in inputs(300, 8))
  cotangent = value[:, ::-1]
  for options in ({}, {"is_causal": True}):
    call = functools.partial(
      polynomial_attention, degree=8, radius=3.0, **options
    )
    run = jax.jit(functools.partial(value_and_vjp, call, cotangent))
    out, grads = run(query, key, value)
    # By a power of two, so that nothing is rounded.
    large = 2.0**20
    got, got_grads = run(large * query, key / large, value)
    np.testing.assert_array_equal(got, out)
    for g, w, s in zip(got_grads, grads, (1 / large, large, 1), strict=True):
      np.testing.assert_array_equal(g, s * w)


def test_one_huge_query_spoils_no_other():
  query, key, value = (x.astype(jnp.float32) for x in inputs(64, 4))
  call = functools.partial(polynomial_attention, degree=4, radius=2.0)
  got = call(query.at[:, 5].set(1e30), key, value)
  others = np.arange(64) != 5
  np.testing.assert_allclose(
    got[:, others], call(query, key, value)[:, others], rtol=1e-5, atol=1e-6
  )


def test_logits_beyond_the_radius_give_weights_of_the_polynomial():
  query, key, value = inputs(100, 4, 4.0)
  weights = weights_of(query, key, [0.0, 1.0])
  assert jnp.abs(weights).max() > 5
  seen = visible(100, 100, is_causal=True)[None, None]
  polynomial = weights_of(query, key, polynomial_coefficients(2, 3.0), seen)
  # All tokens are one chunk.
  exact = jnp.where(seen & (jnp.abs(weights) <= 3), jnp.exp(weights), 0)
  mixed = jnp.where(exact > 0, exact, polynomial)
  call = functools.partial(
    polynomial_attention, degree=2, radius=3.0, is_causal=True, chunk_size=100
  )
  np.testing.assert_allclose(
    call(query, key, value), mean(mixed, value), atol=1e-12
  )
  # Far beyond, where exp overflows, in float32.
  single = [x.astype(jnp.float32) for x in (20 * query, 20 * key, value)]
  out, grads = value_and_vjp(call, single[2], *single)
  assert jnp.abs(out).max() <= 4
  assert all(jnp.isfinite(g).all() for g in grads)


def test_gaussian_coefficients_are_better_on_average():
  rng = np.random.default_rng(0)
  query, key, value = map(
    jnp.asarray, rng.standard_normal((3, 1, 1000, 1, 8)) * [[[[[0.65]]]]]
  )
  exact = softmax_attention(query, key, value)
  errors = {}
  for kind, sigma in (("minimax", None), ("taylor", None), ("gaussian", 0.42)):
    out = polynomial_attention(
      query, key, value, degree=2, radius=2.0, coefficients=kind, sigma=sigma
    )
    errors[kind] = float(jnp.sqrt(((out - exact) ** 2).mean()))
  assert errors["gaussian"] < errors["taylor"] < errors["minimax"]
  assert 1.4 < errors["minimax"] / errors["gaussian"] < 9


def test_float32_is_close_to_float64():
  double = inputs(2000, 4)
  for degree in (4, 6, 8):
    call = functools.partial(polynomial_attention, degree=degree, radius=2.0)
    single = call(*(x.astype(jnp.float32) for x in double))
    assert jnp.abs(single - call(*double)).max() < 1e-6


# --- memory ---


@pytest.mark.parametrize("backward", ["surrogate", "closed_form", "sketch"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("dim", "degree"), [(8, 2), (8, 4), (64, 2)])
def test_no_array_of_all_features_or_logits(dim, degree, is_causal, backward):
  n, num_features = 8192, feature_count(dim, degree)
  options = {"backward": backward}
  if backward == "sketch":
    options = {"sketch_dim": 256, "rng": jax.random.key(0)}
    num_features = 1 + dim + (degree - 1) * 256
  call = functools.partial(
    polynomial_attention,
    degree=degree,
    radius=2.0,
    is_causal=is_causal,
    **options,
  )
  x = jax.ShapeDtypeStruct((1, n, 1, dim), jnp.float32)
  largest = max(array_sizes(functools.partial(value_and_vjp, call), *[x] * 4))
  # All inputs are there, so the walk went inside; features are not.
  assert n * dim <= largest < n * num_features


# --- refused ---


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"degree": -2}, "degree must be >= 0, got -2"),
    ({"degree": 3}, "degree must be even unless allow_odd=True, got 3"),
    ({"degree": 2.0}, "degree must be an integer >= 0, got 2.0"),
    ({"degree": 14}, "feature dimension C(24+14,14)="),
    ({"radius": 0.0}, "radius must be positive and finite, got 0.0"),
    ({"radius": -1.0}, "radius must be positive and finite, got -1.0"),
    (
      {"coefficients": "chebyshev"},
      "coefficients must be one of 'minimax', 'taylor', 'gaussian'",
    ),
    ({"coefficients": "gaussian"}, "sigma is required"),
    ({"coefficients": "gaussian", "sigma": 1.0}, "sigma must be in (0, 0.5]"),
    ({"sigma": 0.3}, "sigma is for"),
    ({"center_keys": True, "is_causal": True}, "center_keys must not be True"),
    ({"center_keys": 1}, "center_keys must be one of None, False, True, got 1"),
    (
      {"center_keys": True, "key_shift": np.zeros((2, 24))},
      "center_keys must not be True with a key_shift",
    ),
    ({"key_shift": np.zeros(24)}, "key_shift must have shape (2, 24) = (K, H)"),
    ({"local": "dense"}, "local must be one of 'exact', 'polynomial'"),
    ({"backward": "dense"}, "backward must be one of 'surrogate', 'closed_for"),
    ({"sketch_dim": 8}, "rng is required when sketch_dim=8"),
    ({"rng": np.zeros(2)}, "rng must be None without sketch_dim"),
    (
      {
        "sketch_dim": 8,
        "rng": np.zeros(2, np.uint32),
        "backward": "closed_form",
      },
      "backward must be 'surrogate' with a sketch, got 'closed_form'",
    ),
    ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
  ],
)
def test_refused(options, message):
  query, key = jnp.zeros((1, 8, 4, 24)), jnp.zeros((1, 8, 2, 24))
  options = {"degree": 2, "radius": 1.0} | options
  with pytest.raises(ValueError, match=re.escape(message)):
    polynomial_attention(query, key, key, **options)


def test_arbitrary_masks_have_no_place():
  query = jnp.zeros((1, 8, 2, 4))
  why = "linear-time attention cannot take an arbitrary mask or bias; use key"
  for name in ("mask", "bias"):
    message = rf"{name} must be None, got shape \(8, 8\): {why}"
    options = {"degree": 2, "radius": 1.0, name: jnp.ones((8, 8))}
    with pytest.raises(ValueError, match=message):
      polynomial_attention(query, query, query, **options)


def test_second_call_does_not_recompile():
  query, key, value = inputs(30, 4)
  call = functools.partial(polynomial_attention, degree=2, radius=1.0)
  call(query, key, value)
  other = 2 * query
  with no_recompilation():
    call(other, key, value)
