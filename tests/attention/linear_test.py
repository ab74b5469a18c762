"""Linear attention: against the quadratic formula, for each feature map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import linear_attention
from jaxattn.features import favor_map, taylor_map
from tests._recompile import no_recompilation, quick_jit


def _inputs(t=300, s=330, *, n=4, kv=2, h=6, hv=5, dtype="float64", seed=0):
  rng = np.random.default_rng(seed)
  shapes = (2, t, n, h), (2, s, kv, h), (2, s, kv, hv)
  return [rng.standard_normal(x).astype(dtype) for x in shapes]


def _elu(x):
  return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


_KERNELS = {
  "elu": lambda q, k: _elu(q) @ _elu(k).mT,
  "relu": lambda q, k: jnp.maximum(q, 0) @ jnp.maximum(k, 0).mT,
  "identity": lambda q, k: q @ k.mT,
  "taylor": lambda q, k: 1 + q @ k.mT + (q @ k.mT) ** 2 / 2,
}


def _dense(query, key, value, kind, *, seen=True, normalize=True):
  groups = query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(x, groups, 2) for x in (key, value))
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  weights = jnp.where(seen, _KERNELS[kind](query, key), 0)
  if normalize:
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
  return jnp.swapaxes(weights @ value, 1, 2)


def _map(kind):
  return taylor_map(2) if kind == "taylor" else kind


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", sorted(_KERNELS))
def test_values_and_gradients(kind, is_causal):
  args = _inputs()
  # Raw scores sum to anything, so that quotients of them may be large.
  normalize = kind != "identity"
  weight = np.random.default_rng(1).standard_normal((2, 300, 4, 5))
  seen = np.tri(300, 330, dtype=bool)[None, None] if is_causal else True

  def linear(*args):
    out = linear_attention(
      *args, feature_map=_map(kind), is_causal=is_causal, normalize=normalize
    )
    return (out * weight).sum(), out

  def dense(*args):
    out = _dense(*args, kind, seen=seen, normalize=normalize)
    return (out * weight).sum(), out

  got = quick_jit(jax.grad(linear, (0, 1, 2), has_aux=True))(*args)
  want = quick_jit(jax.grad(dense, (0, 1, 2), has_aux=True))(*args)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10),
    got,
    want,
  )


@pytest.mark.parametrize("is_causal", [False, True])
def test_normalized_identity_is_the_attention_of_the_paper(is_causal):
  # With positive queries and keys the raw scores are weights.
  query, key, value = _inputs()
  query, key = np.abs(query), np.abs(key)
  seen = np.tri(300, 330, dtype=bool)[None, None] if is_causal else True
  got = linear_attention(
    query, key, value, feature_map="identity", is_causal=is_causal
  )
  want = _dense(query, key, value, "identity", seen=seen)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


def test_identity_on_one_key_returns_its_value():
  query, key, value = _inputs(s=1)
  out = linear_attention(query, key, value, feature_map="identity")
  # Whatever the sign of the one score.
  assert (np.einsum("btnh,bsh->btns", query, key[:, :, 0]) < 0).any()
  want = np.broadcast_to(np.repeat(value, 2, 2), out.shape)
  np.testing.assert_allclose(out, want, rtol=0, atol=1e-10)


def test_scale_is_shared_by_both_sides():
  query, key, value = _inputs()
  got = linear_attention(query, key, value, feature_map="elu", scale=0.3)
  root = np.sqrt(0.3)
  want = _dense(root * query, root * key, value, "elu")
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_small_sums_are_replaced_with_their_sign():
  query = np.ones((3, 1, 1))
  value = np.ones((1, 1, 1))
  for score, want in ((1e-8, 1e-8 / 0.1), (-1e-8, 1e-8 / 0.1), (-2.0, 1.0)):
    key = np.full((1, 1, 1), score)
    out = linear_attention(
      query, key, value, feature_map="identity", min_denominator=0.1
    )
    np.testing.assert_allclose(out, np.full((3, 1, 1), want), rtol=1e-12)


def test_small_positive_sums_are_replaced_too():
  """As documented: elu features of -8 have a product of exp(-16)."""
  query, value = np.full((1, 1, 1), -8.0), np.ones((1, 1, 1))
  out = linear_attention(query, query, value)
  np.testing.assert_allclose(out.item(), np.exp(-16) / 1e-6, rtol=1e-12)
  out = linear_attention(query, query, value, min_denominator=0.0)
  np.testing.assert_allclose(out, value, rtol=1e-12)


@pytest.mark.any_x64
@pytest.mark.parametrize("is_causal", [False, True])
def test_hidden_keys_are_never_read(is_causal):
  query, key, value = _inputs(t=40, s=40, dtype="float32")
  mask = np.ones((2, 40), bool)
  mask[:, 20:25] = False

  @quick_jit
  def gradients(query, key, value):
    call = functools.partial(
      linear_attention, key_mask=mask, is_causal=is_causal
    )
    out, vjp = jax.vjp(call, query, key, value)
    return out, *vjp(jnp.ones_like(out))

  want = gradients(query, key, value)
  key[:, 20:25], value[:, 20:25] = np.nan, np.nan
  for g, w in zip(gradients(query, key, value), want, strict=True):
    assert np.isfinite(g).all()
    np.testing.assert_array_equal(g, w)


@pytest.mark.any_x64
def test_random_features_approximate_the_softmax():
  query, key, value = _inputs(t=20, s=20, kv=4, hv=6, dtype="float32")
  phi = favor_map(jax.random.key(0), 6, 8192)
  got = linear_attention(
    0.5 * query, 0.5 * key, value, feature_map=phi, scale=6**-0.5
  )
  want = jax.nn.dot_product_attention(
    *map(jnp.asarray, (0.5 * query, 0.5 * key, value))
  )
  np.testing.assert_allclose(got, want, atol=0.03)


@pytest.mark.any_x64
@pytest.mark.parametrize("is_causal", [False, True])
def test_memory_is_linear_also_for_the_gradient(is_causal):
  def temporary(length):
    shapes = [jax.ShapeDtypeStruct((length, 1, 32), "float32")] * 3

    def loss(*args):
      return linear_attention(*args, is_causal=is_causal).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temporary(4096), temporary(16384)
  assert long < 4.5 * short
  assert long < 16384**2 * 4 / 16


@pytest.mark.any_x64
def test_compiles_once():
  args = _inputs(t=20, s=20, dtype="float32")
  jax.block_until_ready(linear_attention(*args, scale=0.5))
  with no_recompilation():
    linear_attention(*(a + 1 for a in args), scale=0.25)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"feature_map": "exp"},
      "feature_map must be one of 'elu', 'identity', 'r",
    ),
    ({"normalize": 1}, "normalize must be one of False, True, got 1"),
    ({"min_denominator": -1.0}, "min_denominator must be non-negative, got -1"),
    ({"scale": 0.0}, "scale must be positive, got 0.0"),
    ({"scale": np.ones(3)}, "scale must be a real scalar, got array"),
    ({"is_causal": 1}, "is_causal must be one of False, True, got 1"),
    ({"implementation": "fast"}, "implementation must be one of None, 'xla'"),
    ({"key_mask": np.ones((2, 9))}, "key_mask must be boolean"),
    ({"key_mask": np.ones((2, 4), bool)}, r"key_mask must have shape \(2, 9\)"),
    (
      {"feature_map": favor_map(jax.random.key(0), 5, 8)},
      r"x must have shape \(..., 5\), got \(2, 4, 4, 6\)",
    ),
  ],
)
def test_refused(options, message):
  with pytest.raises(ValueError, match=message):
    linear_attention(*_inputs(t=4, s=9), **options)
