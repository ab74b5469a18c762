"""The largest logit against dense formulas, and the checked promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxattn.attention import logit_radius
from tests import _dense

_B, _T, _S, _N, _K, _H = 2, 13, 17, 4, 2, 5


def _arrays():
  rngs = jax.random.split(jax.random.key(0), 3)
  query = jax.random.normal(rngs[0], (_B, _T, _N, _H))
  key = jax.random.normal(rngs[1], (_B, _S, _K, _H))
  mask = jax.random.bernoulli(rngs[2], 0.3, (_B, _N, _T, _S))
  return query, key, mask


def _brute_force(query, key, seen=True, scale=None):
  query, key = _dense.float64(query, key)
  scale = _H**-0.5 if scale is None else scale
  key = np.repeat(key, query.shape[2] // key.shape[2], 2)
  logits = scale * np.einsum("btnh,bsnh->bnts", query, key)
  return np.abs(np.where(seen, logits, 0)).max()


def test_radius_is_that_of_all_logits():
  query, key, mask = _arrays()
  mask = np.asarray(mask)
  causal = _dense.visible(_T, _S, is_causal=True)
  cases = [
    ({}, {}),
    ({"scale": -0.7}, {"scale": -0.7}),
    ({"mask": mask}, {"seen": mask}),
    ({"mask": mask[:1, :1]}, {"seen": mask[:1, :1]}),
    ({"mask": mask, "is_causal": True}, {"seen": mask & causal}),
    ({"is_causal": True}, {"seen": causal}),
  ]

  @jax.jit
  def radii(query, key):
    return [
      [
        logit_radius(query, key, chunk_size=size, **call)
        for size in (None, 4, 100)
      ]
      for call, _ in cases
    ]

  for got, (_, oracle) in zip(radii(query, key), cases, strict=True):
    want = _brute_force(query, key, **oracle)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_radius_is_that_of_shifted_keys():
  query, key, _ = _arrays()
  key += 3.0
  key_mask = jnp.asarray(np.arange(_B * _S).reshape(_B, _S) % 3 > 0)
  shift = jnp.full((_K, _H), 2.5)
  masked = {"key_mask": key_mask}
  seen = np.asarray(key_mask)[:, None, None]
  weight = seen[:, 0, 0, :, None, None]
  mean = np.mean(key, 1, keepdims=True, where=weight)
  poisoned = jnp.where(weight, key, jnp.nan)
  cases = [
    ({"center_keys": True}, key, key - key.mean(1, keepdims=True), True),
    ({"center_keys": True, **masked}, poisoned, key - mean, seen),
    ({"key_shift": shift, **masked}, poisoned, key - shift[None, None], seen),
    (
      {"key_shift": shift, "is_causal": True},
      key,
      key - shift[None, None],
      None,
    ),
    (masked, poisoned, key, seen),
  ]
  for options, given, shifted, where in cases:
    where = _dense.visible(_T, _S, is_causal=True) if where is None else where
    got = jax.jit(functools.partial(logit_radius, **options))(query, given)
    np.testing.assert_allclose(
      got, _brute_force(query, shifted, where), rtol=1e-12
    )


def test_traced_scale_and_no_batch():
  query, key, _ = _arrays()

  @jax.jit
  def radii(scale):
    whole = logit_radius(query, key, scale=scale)
    single = [logit_radius(query[i], key[i], scale=scale) for i in range(_B)]
    return whole, single

  whole, single = radii(0.3)
  np.testing.assert_allclose(whole, _brute_force(query, key, scale=0.3))
  np.testing.assert_allclose(whole, max(single))


def test_nothing_attends():
  query, key, mask = _arrays()
  assert logit_radius(query, key, mask=jnp.zeros_like(mask)) == 0


def test_nan_is_seen_and_hidden_nan_is_not():
  query, key, _ = _arrays()
  key = key.at[:, 3].set(jnp.nan)
  seen = (jnp.arange(_S) != 3)[None, None, None]
  assert jnp.isnan(logit_radius(query, key))
  assert jnp.isfinite(logit_radius(query, key, mask=seen))


def test_no_gradient_and_16_bits_in_float32():
  query, key, _ = _arrays()
  grads = jax.grad(logit_radius, argnums=(0, 1))(query, key)
  assert not any(g.any() for g in grads)
  half = [x.astype(jnp.bfloat16) for x in (query, key)]
  radius = logit_radius(*half)
  assert radius.dtype == jnp.float32
  np.testing.assert_allclose(radius, _brute_force(*half), rtol=1e-6)


def test_broken_promise_raises_under_checkify():
  query, key, _ = _arrays()
  radius = float(logit_radius(query, key))

  def promised(query, radius):
    return logit_radius(query, key, radius=radius)

  checked = jax.jit(checkify.checkify(promised))
  error, got = checked(query, radius * 1.001)
  error.throw()
  np.testing.assert_allclose(got, radius)
  error, _ = checked(query, radius * 0.999)
  with pytest.raises(checkify.JaxRuntimeError, match="beyond the promised rad"):
    error.throw()
  error, _ = checked(query.at[0].set(jnp.nan), radius * 2)
  with pytest.raises(checkify.JaxRuntimeError, match="the logits reach nan"):
    error.throw()
  # Without checkify it is no error, in a loop and under a gradient too.
  np.testing.assert_allclose(jax.jit(promised)(query, 0.1), radius)


def test_memory_does_not_grow_with_the_number_of_pairs():
  size = 4096
  x = jax.ShapeDtypeStruct((1, size, 1, 8), jnp.float32)
  compiled = jax.jit(logit_radius).lower(x, x).compile()
  stats = compiled.memory_analysis()
  assert stats.temp_size_in_bytes < 4 * size**2 / 20


def test_no_recompilation():
  query, key, _ = _arrays()
  fn = jax.jit(functools.partial(logit_radius, radius=2.0))
  fn(query, key)
  fn(query + 1, key)
  assert fn._cache_size() == 1


@pytest.mark.parametrize(
  ("call", "message"),
  [
    ({"radius": 0.0}, r"radius must be positive, got 0\.0"),
    ({"radius": "2"}, "radius must be a real scalar, got '2'"),
    ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
    ({"scale": np.ones(2)}, "scale must be a real scalar"),
    ({"center_keys": None}, "center_keys must be one of False, True, got None"),
    (
      {"center_keys": True, "is_causal": True},
      "center_keys must not be True with is_causal=True",
    ),
    ({"key_shift": np.ones(_H)}, r"key_shift must have shape \(2, 5\) = \(K,"),
    ({"key_mask": np.ones((_B, _S))}, "key_mask must be boolean"),
    ({"is_causal": 1}, "is_causal must be one of False, True, got 1"),
    ({"mask": np.ones((3, 1, 1, _S), bool)}, "mask must be broadcastable"),
    ({"mask": np.ones((1, 1, 1, _S))}, "mask must be boolean"),
  ],
)
def test_bad_input_is_refused_by_message(call, message):
  query, key, _ = _arrays()
  with pytest.raises(ValueError, match=message):
    logit_radius(query, key, **call)


def test_bad_layout_is_refused():
  query, key, _ = _arrays()
  with pytest.raises(ValueError, match=r"key must have shape \(2, \*, \*, 5\)"):
    logit_radius(query, key[..., :3])
