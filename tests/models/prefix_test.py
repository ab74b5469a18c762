"""The trainable prefix: where it starts, what it can become, what it learns."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn.attention import (
  PrefixState,
  ntk_attention,
  prefix_state_init,
  prefix_state_update,
  softmax_attention,
)
from jaxattn.features import apply_feature_map, taylor_map
from jaxattn.models import AttentionClassifier, NTKAttention
from tests._recompile import quick_jit

_B, _T, _N, _K, _H = 2, 6, 4, 2, 8


def _inputs():
  rng = np.random.default_rng(0)
  shapes = (_B, _T, _N, _H), (_B, _T, _K, _H), (_B, _T, _K, 5)
  return [jnp.asarray(rng.standard_normal(x), jnp.float32) for x in shapes]


def _state():
  rng = np.random.default_rng(1)
  key, value = (
    rng.standard_normal((30, _K, _H)),
    rng.standard_normal((30, _K, 5)),
  )
  return prefix_state_update(prefix_state_init(_K, _H, 5), key, value)


@pytest.mark.parametrize("positivity", ["softplus", "abs"])
@pytest.mark.parametrize("rank", [None, 2])
def test_untrained_it_changes_almost_nothing(positivity, rank):
  module = NTKAttention(positivity=positivity, rank=rank, is_causal=True)
  out, params = module.init_with_output(jax.random.key(0), *_inputs())
  want, lse = softmax_attention(
    *_inputs(), is_causal=True, return_residual=True
  )
  # All that is left of the prefix is its share of the denominator.
  features = apply_feature_map("elu", _inputs()[0], scale=_H**-0.5).sum(-1)
  mass = 4.54e-5 * features * np.exp(-lse)
  assert mass.max() < 2e-3
  want = want / (1 + mass[..., None])
  np.testing.assert_allclose(out, want, rtol=3e-5, atol=1e-6)
  shapes = jax.tree.map(jnp.shape, params["params"])
  if rank is None:
    assert shapes == {"z": (_N, _H, 5), "k": (_N, _H)}
  else:
    z = {"z_left": (_N, _H, 2), "z_right": (_N, 2, 5)}
    assert shapes == {"k": (_N, _H)} | z


def test_first_order_features_are_allowed_by_name():
  query, key, value = _inputs()
  module = NTKAttention(feature_map=taylor_map(1))
  with pytest.raises(ValueError, match="even unless allow_odd=True, got 1"):
    module.init(jax.random.key(0), query, key, value)
  module = module.clone(allow_odd=True)
  out, _ = module.init_with_output(jax.random.key(0), query, key, value)
  want = softmax_attention(query, key, value)
  np.testing.assert_allclose(out, want, atol=1e-2)


@pytest.mark.parametrize("positivity", ["softplus", "abs"])
def test_starts_from_a_real_prefix(positivity):
  state, mask = _state(), np.random.default_rng(0).random((_T, _T)) < 0.5
  module = NTKAttention(positivity=positivity, num_kv_heads=_K, scale=0.3)
  params = module.params_from_state(state)
  got = module.apply({"params": params}, *_inputs(), mask=mask)
  want = ntk_attention(*_inputs(), state, mask=mask, scale=0.3)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_traced_states_are_taken_at_their_word():
  state, module = _state(), NTKAttention()
  got = jax.jit(module.params_from_state)(state)
  want = module.params_from_state(state)
  jax.tree.map(np.testing.assert_allclose, got, want)


def test_taylor_states_have_entries_of_either_sign():
  taylor = taylor_map(2)
  key, value = np.random.default_rng(1).standard_normal((2, 30, _K, _H))
  state = prefix_state_init(_K, 45, 5)
  state = prefix_state_update(state, key, value[..., :5], feature_map=taylor)
  module = NTKAttention(feature_map=taylor, num_kv_heads=_K)
  with pytest.raises(ValueError, match="with positivity='softplus', got -"):
    module.params_from_state(state)
  module = module.clone(positivity="none")
  params = module.params_from_state(state)
  got = module.apply({"params": params}, *_inputs())
  want = ntk_attention(*_inputs(), state, feature_map=taylor)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_directions_that_a_state_lacks_can_be_trained(num_tokens):
  """Factors that both vanish would never move."""
  key, value = np.random.default_rng(1).standard_normal((2, 1, _K, _H))
  state = prefix_state_init(_K, _H, 5)
  if num_tokens:
    state = prefix_state_update(state, key, value[..., :5])
  state = state._replace(k=state.k + 1)
  module = NTKAttention(num_kv_heads=_K, rank=3)
  params = module.params_from_state(state)
  np.testing.assert_allclose(
    params["z_left"] @ params["z_right"], state.z, rtol=0, atol=1e-5
  )

  def loss(params):
    return (module.apply({"params": params}, *_inputs()) ** 2).sum()

  slope = jax.grad(loss)(params)["z_right"]
  assert jnp.linalg.norm(slope, axis=-1).min() > 1e-2


def test_rank_keeps_the_nearest_matrix():
  state = _state()
  full = NTKAttention(num_kv_heads=_K, rank=5).params_from_state(state)
  np.testing.assert_allclose(
    full["z_left"] @ full["z_right"], state.z, rtol=0, atol=1e-4
  )
  low = NTKAttention(num_kv_heads=_K, rank=2).params_from_state(state)
  gap = np.linalg.norm(low["z_left"] @ low["z_right"] - state.z, axis=(1, 2))
  sizes = np.linalg.svd(np.asarray(state.z), compute_uv=False)
  np.testing.assert_allclose(
    gap, np.sqrt((sizes[:, 2:] ** 2).sum(-1)), rtol=1e-4
  )
  init = NTKAttention(num_kv_heads=_K, rank=2).init(
    jax.random.key(0), *_inputs()
  )
  assert jax.tree.map(jnp.shape, low) == jax.tree.map(
    jnp.shape, dict(init["params"])
  )


@pytest.mark.parametrize("rank", [None, 2])
def test_learns_a_prefix(rank):
  query, key, value = _inputs()
  module = NTKAttention(num_kv_heads=_K, rank=rank)
  target = ntk_attention(query, key, value, _state())
  optimizer = optax.adam(0.1)

  def loss(params):
    out = module.apply(params, query, key, value)
    return jnp.square(out - target).mean()

  @quick_jit
  def train(params):
    def step(carry, _):
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params)
      updates, state = optimizer.update(grads, state)
      return (optax.apply_updates(params, updates), state), value

    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, length=150)[1]

  losses = train(module.init(jax.random.key(0), query, key, value))
  assert losses[-1] < 0.1 * losses[0]


def test_replaces_the_attention_of_a_classifier():
  x = jax.random.normal(jax.random.key(0), (_B, _T, 3))
  base = AttentionClassifier(num_heads=2, head_dim=4, num_layers=2)
  params = base.init(jax.random.key(1), x)
  module = NTKAttention()
  heads = [jnp.ones((1, _T, 2, 4), x.dtype)] * 3
  own = module.init(jax.random.key(2), *heads)
  layers = tuple(lambda *qkv: module.apply(own, *qkv) for _ in range(2))
  tuned = AttentionClassifier(
    attention=layers, num_heads=2, head_dim=4, num_layers=2
  )
  np.testing.assert_allclose(
    tuned.apply(params, x), base.apply(params, x), rtol=0, atol=1e-3
  )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"positivity": "exp"}, "positivity must be one of 'softplus', 'abs', "),
    ({"rank": 0}, "rank must be in [1, 5], got 0"),
    ({"rank": 6}, "rank must be in [1, 5], got 6"),
    ({"num_kv_heads": 0}, "num_kv_heads must be >= 1, got 0"),
    ({"num_kv_heads": 3}, "state.z has 3 heads, query has 4 and key has 2"),
    ({"feature_map": "foo"}, "feature_map must be one of 'elu', 'identity',"),
    ({"feature_map": taylor_map(1)}, "degree must be even unless allow_odd="),
    ({"scale": -1.0}, "scale must be positive, got -1.0"),
  ],
)
def test_refused_fields(fields, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    NTKAttention(**fields).init(jax.random.key(0), *_inputs())


def test_refused_state_and_shapes():
  state = PrefixState(jnp.ones((2, 3, 4)), jnp.array([[1.0, 0.0, 1.0]] * 2))
  with pytest.raises(ValueError, match=re.escape("state.k must be positive")):
    NTKAttention().params_from_state(state)
  with pytest.raises(ValueError, match=r"rank must be in \[1, 3\], got 4"):
    NTKAttention(rank=4).params_from_state(state)
  message = "state has 2 heads, num_kv_heads is 4"
  with pytest.raises(ValueError, match=message):
    NTKAttention(num_kv_heads=4).params_from_state(state)
  query, key, value = _inputs()
  with pytest.raises(ValueError, match="key must have shape"):
    NTKAttention().init(jax.random.key(0), query, key[:1], value)
