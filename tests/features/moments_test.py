"""Moments of features, and attention by them, against dense formulas."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.features import (
  feature_moments,
  moment_attention,
  monomial_features,
)
from tests._dense import value_and_vjp, visible
from tests._jaxpr import array_sizes
from tests._recompile import no_recompilation

_B, _T, _S, _N, _K, _R, _HV = 2, 37, 53, 4, 2, 5, 3


def _positive(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).uniform(0.1, 1, shape))


def _inputs(s=_S):
  return (
    _positive(_B, _T, _N, _R),
    _positive(_B, s, _K, _R, seed=1),
    _positive(_B, s, _K, _HV, seed=2) - 0.5,
  )


def _dense(query, key, value, seen=True, normalize=True, least=0.0):
  key, value = (jnp.repeat(x, _N // _K, 2) for x in (key, value))
  weights = jnp.einsum("btnr,bsnr->bnts", query, key)
  weights = jnp.where(seen, weights, 0)
  out = jnp.einsum("bnts,bsnv->btnv", weights, value)
  if not normalize:
    return out
  total = weights.sum(-1).transpose(0, 2, 1)[..., None]
  total = jnp.where(
    jnp.abs(total) < least, jnp.where(total < 0, -least, least), total
  )
  return out / jnp.where(total == 0, 1, total)


def test_moments():
  _, key, value = _inputs()
  mask = jnp.asarray(np.random.default_rng(3).random((_B, _S)) < 0.6)
  phi = functools.partial(monomial_features, degree=2)
  extended = jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)
  want = jnp.einsum(
    "bskr,bskv->bkrv", phi(key) * mask[..., None, None], extended
  )
  poisoned = (
    jnp.where(mask[..., None, None], x, jnp.nan) for x in (key, value)
  )
  got = feature_moments(phi, *poisoned, key_mask=mask, chunk_size=10)
  np.testing.assert_allclose(got, want, atol=1e-13)
  # Unbatched, and of 16 bits, summed in float32.
  alone = feature_moments(phi, key[0], value[0], key_mask=mask[0])
  np.testing.assert_allclose(alone, want[0], atol=1e-13)
  short = [x.astype(jnp.bfloat16) for x in (key, value)]
  assert feature_moments(phi, *short).dtype == jnp.float32


def test_gradient_of_moments_reaches_what_the_features_close_over():
  _, key, value = _inputs()

  def loss(w, key, value, chunk_size):
    s = feature_moments(
      lambda k: jnp.tanh(k @ w), key, value, chunk_size=chunk_size
    )
    return (s**2).sum()

  args = _positive(_R, 6, seed=5), key, value
  got, want = (
    jax.jit(jax.grad(functools.partial(loss, chunk_size=c), (0, 1, 2)))(*args)
    for c in (10, 1000)
  )
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-11)
  assert all(np.abs(g).max() > 0 for g in got)


@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.parametrize("s", [_S, 20])
@pytest.mark.parametrize(
  "options", [{}, {"is_causal": True}, {"normalize": False}]
)
def test_values_and_gradients(options, s, chunk_size):
  arrays = _inputs(s)
  mask = jnp.asarray(np.random.default_rng(3).random((_B, s)) < 0.6)
  mask = mask.at[0].set(False)
  seen = visible(_T, s, is_causal=options.get("is_causal", False))
  seen = seen[None, None] & np.asarray(mask)[:, None, None]
  cotangent = _positive(_B, _T, _N, _HV, seed=4)
  call = functools.partial(
    moment_attention, key_mask=mask, chunk_size=chunk_size, **options
  )
  dense = functools.partial(
    _dense, seen=seen, normalize=options.get("normalize", True)
  )
  got = jax.jit(functools.partial(value_and_vjp, call))(cotangent, *arrays)
  want = jax.jit(functools.partial(value_and_vjp, dense))(cotangent, *arrays)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, atol=1e-12)
  assert not np.asarray(got[0])[0].any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_least_denominator_keeps_the_sign(is_causal):
  query, key, value = _inputs()
  # Weights of both signs: sums on both sides of 0.
  query = query - 0.55
  seen = visible(_T, _S, is_causal=is_causal)[None, None]
  cotangent = _positive(_B, _T, _N, _HV, seed=4)
  least = 3.0
  dense = functools.partial(_dense, seen=seen, least=least)
  call = functools.partial(
    moment_attention, is_causal=is_causal, min_denominator=least
  )
  got = jax.jit(functools.partial(value_and_vjp, call))(
    cotangent, query, key, value
  )
  want = jax.jit(functools.partial(value_and_vjp, dense))(
    cotangent, query, key, value
  )
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, atol=1e-11)
  sums = _dense(query, key, jnp.ones_like(value), seen, normalize=False)
  assert (sums < -least).any()
  assert (jnp.abs(sums) < least).any()
  assert (sums > least).any()


def test_memory_is_linear():
  n = 4096
  x = jax.ShapeDtypeStruct((1, n, 1, 16), jnp.float32)
  for is_causal in (False, True):
    call = functools.partial(moment_attention, is_causal=is_causal)
    call = functools.partial(value_and_vjp, call)
    assert max(array_sizes(call, *[x] * 4)) < n * n / 8


def test_second_call_does_not_recompile():
  query, key, value = _inputs()
  moment_attention(query, key, value)
  feature_moments(jax.nn.relu, key, value, chunk_size=10)
  other = 2 * key
  with no_recompilation():
    moment_attention(query, other, value)
    feature_moments(jax.nn.relu, other, value, chunk_size=10)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"is_causal": 1}, "is_causal must be one of False, True, got 1"),
    ({"normalize": None}, "normalize must be one of False, True, got None"),
    ({"min_denominator": -1.0}, "min_denominator must be non-negative"),
    ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
    ({"key_mask": jnp.ones((2, 3), bool)}, "key_mask must have shape (2, 53)"),
  ],
)
def test_refused(options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    moment_attention(*_inputs(), **options)


def test_refused_by_moments():
  _, key, value = _inputs()
  for call, message in (
    (lambda: feature_moments(jnp.abs, key, value, chunk_size=0), "chunk_size"),
    (
      lambda: feature_moments(jnp.abs, key, value[:, 1:]),
      "value must have shape",
    ),
    (
      lambda: feature_moments(jnp.abs, key[0, 0], value),
      "must have 3 or 4 dim",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      call()
