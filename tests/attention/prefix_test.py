"""Prefixes and their states: against dense formulas, bounds, and limits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import (
  NTKAttentionInfo,
  PrefixState,
  fit_prefix_state,
  ntk_attention,
  prefix_attention,
  prefix_state_downdate,
  prefix_state_init,
  prefix_state_update,
  softmax_attention,
)
from jaxattn.features import (
  favor_map,
  feature_count,
  taylor_error_bound,
  taylor_map,
)
from tests._recompile import no_recompilation, quick_jit
from tests.attention._prefix import (
  dense_formula,
  normal,
  prefix_call,
  refuse,
  state_of,
)


def _error(call, feature_map):
  """Largest difference between the state and the prefix."""
  query, key, value, *prefix = call
  out = ntk_attention(
    query,
    key,
    value,
    state_of(*prefix, feature_map),
    feature_map=feature_map,
    allow_odd=True,
  )
  return np.abs(out - dense_formula(*call)).max()


def _kernel_ratio(query, prefix_key, degree):
  """Largest |phi(q) . phi(k) / exp(s) - 1| over all pairs."""
  s = np.einsum("tnh,mnh->tmn", query, prefix_key) / math.sqrt(query.shape[-1])
  taylor = sum(s**j / math.factorial(j) for j in range(degree + 1))
  return np.abs(taylor / np.exp(s) - 1).max()


# --- how far a state is from its prefix ---


@pytest.mark.parametrize(
  ("degree", "ratio", "error"),
  [
    (1, 4.2e-3, 2.3e-5),
    (2, 1.3e-4, 5.9e-7),
    (3, 2.8e-6, 1.2e-8),
    (4, 5.1e-8, 1.4e-10),
  ],
)
def test_error_stays_below_its_bound(degree, ratio, error):
  call = prefix_call()
  epsilon = _kernel_ratio(call[0], call[3], degree)
  assert ratio / 5 < epsilon < 5 * ratio
  largest = max(np.abs(call[2]).max(), np.abs(call[4]).max())
  measured = _error(call, taylor_map(degree))
  assert measured <= 2 * epsilon / (1 - epsilon) * largest
  assert error / 5 < measured < 5 * error


@pytest.mark.parametrize(
  ("degree", "bound"), [(1, 2.2e-2), (2, 1.3e-3), (3, 5.8e-5), (4, 2.1e-6)]
)
def test_bound_known_beforehand(degree, bound):
  query, _, _, prefix_key, _ = prefix_call()
  radius = 8 * 0.25**2 / math.sqrt(8)
  known = taylor_error_bound(radius, degree)
  np.testing.assert_allclose(known, bound, rtol=0.05)
  assert _kernel_ratio(query, prefix_key, degree) <= known


def test_elu_does_not_approximate_a_given_prefix():
  query, key, value, *prefix = call = prefix_call(radius=0.5)
  exact = dense_formula(*call)
  elu, taylor = _error(call, "elu"), _error(call, taylor_map(1))
  dropped = np.abs(softmax_attention(query, key, value) - exact).max()
  np.testing.assert_allclose([elu, dropped], [1.7e-2, 0.25], rtol=0.3)
  assert 3.7e-4 / 2 < taylor < 3.7e-4 * 2
  assert elu > 5 * taylor
  # No factor on the state mends it.
  z, k = state_of(*prefix, "elu")
  scaled = jax.vmap(
    lambda c: ntk_attention(query, key, value, PrefixState(c * z, c * k))
  )(jnp.geomspace(0.5, 2.0, 41))
  best = np.abs(scaled - exact[None]).max((1, 2, 3)).min()
  assert 5 * taylor < best < elu


def test_positive_random_features_are_unbiased():
  call = prefix_call(m=64)
  errors = [
    _error(call, favor_map(jax.random.key(0), 8, r)) for r in (64, 1024, 16384)
  ]
  assert errors[0] > 2 * errors[1] > 4 * errors[2]


# --- the state as a data structure ---


def test_states_add_up_and_tokens_can_be_taken_away():
  _, _, _, key, value = prefix_call(radius=2.0, kv=2)
  taylor = taylor_map(2)
  options = {"feature_map": taylor, "scale": 0.7}
  build = functools.partial(state_of, feature_map=taylor, scale=0.7)
  first, second = build(key[:200], value[:200]), build(key[200:], value[200:])
  both = build(key, value)
  order = np.random.default_rng(0).permutation(len(key))
  one_by_one = functools.reduce(
    lambda state, i: prefix_state_update(
      state, key[i : i + 1], value[i : i + 1], **options
    ),
    range(500, 512),
    build(key[:500], value[:500]),
  )
  cases = (
    (PrefixState(*map(jnp.add, first, second)), 1e-12),
    (build(key[order], value[order]), 1e-12),
    (one_by_one, 1e-12),
    (
      prefix_state_downdate(
        prefix_state_update(both, key, value, **options), key, value, **options
      ),
      1e-10,
    ),
  )
  for got, tol in cases:
    for x, want in zip(got, both, strict=True):
      np.testing.assert_allclose(x, want, rtol=0, atol=tol)
  left = prefix_state_downdate(both, key[:200], value[:200], **options)
  np.testing.assert_allclose(left.z, second.z, rtol=0, atol=1e-10)


def test_sums_are_kept_in_the_dtype_of_the_state():
  _, _, _, key, value = prefix_call(m=100)
  low = [x.astype(jnp.bfloat16) for x in (key, value)]
  state = prefix_state_update(prefix_state_init(1, 8, 8), *low)
  assert {x.dtype for x in state} == {jnp.dtype("float32")}
  exact = state_of(*(np.asarray(x, np.float64) for x in low), "elu")
  np.testing.assert_allclose(state.z, exact.z, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("radius", [3.0, 40.0])
def test_empty_state_is_no_prefix(radius):
  query, key, value, *_ = prefix_call(radius=radius, n=4, kv=2)
  state = prefix_state_init(2, 8, 8, dtype="float64")
  mask = np.random.default_rng(0).random((4, 32, 32)) < 0.5
  mask[:, 3] = False
  got = ntk_attention(query, key, value, state, mask=mask)
  want = softmax_attention(query, key, value, mask=mask)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  assert not got[3].any()


@pytest.mark.parametrize("batch", [(), (3,)])
def test_without_a_context_the_state_is_all(batch):
  query, _, _, key, value = prefix_call(radius=1.0, n=4, kv=2)
  query = np.broadcast_to(query, (*batch, *query.shape))
  z, k = state = state_of(key, value, "elu")
  x = query * 8**-0.25
  phi = np.where(x > 0, x + 1, np.exp(x)).reshape(*batch, 32, 2, 2, 8)
  want = np.einsum("...kgr,krh->...kgh", phi, z)
  want /= np.einsum("...kgr,kr->...kg", phi, k)[..., None]
  want = want.reshape(query.shape)
  np.testing.assert_allclose(
    ntk_attention(query, None, None, state), want, rtol=0, atol=1e-13
  )
  # The same, if there is one that nothing of can be seen.
  context = np.ones((*batch, 5, 2, 8))
  hidden = np.zeros((1, 1, 1), bool)
  got = ntk_attention(query, context, context, state, mask=hidden)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
  # Or of no tokens.
  none = context[..., :0, :, :]
  for options in ({}, {"mask": np.zeros((4, 32, 0), bool), "is_causal": True}):
    got = ntk_attention(query, none, none, state, **options)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_nothing_at_all_to_see():
  """An empty state and no context: 0, with no gradient."""
  query = jnp.ones((5, 2, 4))
  empty = prefix_state_init(2, 4, 3)

  def total(z):
    out, info = ntk_attention(
      query, None, None, empty._replace(z=z), return_info=True
    )
    return out.sum(), info

  (out, info), slope = jax.value_and_grad(total, has_aux=True)(empty.z)
  assert out == 0
  for x in (slope, *info):
    np.testing.assert_array_equal(x, 0)


def test_a_state_for_each_query_head():
  query, key, value, *prefix = prefix_call(n=4, kv=2)
  shared = state_of(*prefix, taylor_map(2))
  own = PrefixState(*(jnp.repeat(x, 2, axis=0) for x in shared))
  call = functools.partial(
    ntk_attention, query, key, value, feature_map=taylor_map(2)
  )
  np.testing.assert_allclose(call(own), call(shared), rtol=0, atol=1e-14)
  changed = own._replace(z=own.z.at[1].add(1.0))
  moved = np.abs(call(changed) - call(shared)).max((0, 2))
  np.testing.assert_array_equal(moved > 1e-12, [False, True, False, False])


def test_nothing_is_as_long_as_the_prefix():
  m, query, key, value, *prefix = 1013, *prefix_call(m=1013)
  state = state_of(*prefix, "elu", "float32")
  args = (*(jnp.float32(x) for x in (query, key, value)), state)

  def loss(*args):
    return ntk_attention(*args).sum()

  program = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 3)))(*args)
  sizes = {int(n) for n in re.findall(r"\d+", str(program))}
  assert not any(n % m == 0 for n in sizes if n)


def test_many_features_are_visited_in_tiles():
  t, h, n = 400, 64, 8
  query, key, value, *prefix = prefix_call(0.1, t=t, s=3, m=20, n=n, kv=n, h=h)
  taylor = taylor_map(2)
  state = state_of(*prefix, taylor, "float32")
  args = [jnp.float32(x) for x in (query, key, value)]

  def loss(query, state):
    out = ntk_attention(query, *args[1:], state, feature_map=taylor)
    return (out * out).sum(), out

  grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  analysis = grad.lower(args[0], state).compile().memory_analysis()
  # All features of all queries would be 27 MB, times what their gradient needs.
  assert analysis.temp_size_in_bytes < 4 * 4 * t * n * feature_count(h, 2)
  (dq, dstate), out = grad(args[0], state)
  parts = [grad(args[0][i : i + 100], state) for i in range(0, t, 100)]
  np.testing.assert_allclose(
    out, np.concatenate([p[1] for p in parts]), rtol=0, atol=1e-5
  )
  np.testing.assert_allclose(
    dq, np.concatenate([p[0][0] for p in parts]), rtol=0, atol=1e-4
  )
  total = sum(p[0][1].z for p in parts)
  np.testing.assert_allclose(dstate.z, total, rtol=1e-4, atol=1e-3)


# --- large logits ---


@pytest.mark.parametrize("visible", ["all", "low"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("feature_map", ["elu", taylor_map(2)])
def test_logits_of_300_in_float32(feature_map, sign, visible):
  """Queries and keys are multiples of 1/4, so that logits are exact."""
  rng = np.random.default_rng(0)
  key, prefix_key = rng.integers(1, 5, (2, 32, 1, 16)) / 4
  key[::2] *= -1
  value, prefix_value = rng.uniform(-1, 1, (2, 32, 1, 16))
  query = sign * rng.integers(240, 256, (32, 1, 16)) / 2
  logits = np.einsum("tnh,snh->ts", query, key) / 4
  assert logits.max() > 300
  assert logits.min() < -300
  # The largest logits hidden: they must not be what sums are relative to.
  mask = logits < 0 if visible == "low" else np.ones_like(logits, bool)

  def run(dtype):
    args = [jnp.asarray(x, dtype) for x in (query, key, value)]
    prefix = (jnp.asarray(x, dtype) for x in (prefix_key, prefix_value))
    state = state_of(*prefix, feature_map, dtype)
    return ntk_attention(*args, state, feature_map=feature_map, mask=mask[None])

  got, want = run("float32"), run("float64")
  assert jnp.isfinite(got).all()
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert np.abs(want).max() > 0.1


# --- masks and gradients ---


def test_masks_are_about_the_context_alone():
  query, key, value, *prefix = call = prefix_call(t=12, s=12, m=40, h=3, n=2)
  taylor = taylor_map(12)
  state = state_of(*prefix, taylor)
  attend = functools.partial(ntk_attention, query, key, value, state)
  lower = np.tri(12, dtype=bool)
  mask = np.random.default_rng(0).random((2, 12, 12)) < 0.5
  mask[:, 4] = False
  for options, seen in (
    ({"is_causal": True}, lower),
    ({"mask": mask}, mask),
    ({"mask": mask, "is_causal": True}, mask & lower),
  ):
    got = attend(feature_map=taylor, **options)
    want = dense_formula(*call, seen=seen)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    exact = prefix_attention(*call, **options)
    np.testing.assert_allclose(exact, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("feature_map", ["elu", taylor_map(2)])
def test_gradient_of_the_state(feature_map):
  query, key, value, *prefix = prefix_call(1.0, t=6, s=5, m=30, h=3, kv=2, n=4)
  state = state_of(*prefix, feature_map)
  weights, *direction = normal(query.shape, state.z.shape, state.k.shape)

  def loss(step):
    moved = PrefixState(
      state.z + step * direction[0], state.k + step * direction[1]
    )
    out = ntk_attention(query, key, value, moved, feature_map=feature_map)
    return (out * weights).sum()

  size = 1e-5
  value_at = quick_jit(loss)
  slope = (value_at(size) - value_at(-size)) / (2 * size)
  np.testing.assert_allclose(quick_jit(jax.grad(loss))(0.0), slope, rtol=1e-6)


def test_gradient_flows_through_a_prefix_into_its_state():
  query, key, value, *prefix = prefix_call(0.25, t=6, s=5, m=30, h=3)
  taylor = taylor_map(12)

  def through_state(key_value):
    state = state_of(*key_value, taylor)
    return ntk_attention(query, key, value, state, feature_map=taylor)

  def exact(key_value):
    return prefix_attention(query, key, value, *key_value)

  cotangent = normal(query.shape)[0]
  (got,), (want,) = (
    jax.jit(lambda x, fn=fn: jax.vjp(fn, x)[1](cotangent))(tuple(prefix))
    for fn in (through_state, exact)
  )
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=1e-12)


def test_vmap_over_a_batch_is_a_loop():
  calls = [prefix_call(1.0, t=6, s=5, m=30, h=3)[:3] for _ in range(3)]
  calls = [[x + i for x in call] for i, call in enumerate(calls)]
  *_, key, value = prefix_call(1.0, m=30, h=3)
  states = [state_of((1 + i) * key, value, "elu") for i in range(3)]
  stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
  got = jax.vmap(ntk_attention)(*stack(*calls), stack(*states))
  for out, call, state in zip(got, calls, states, strict=True):
    np.testing.assert_allclose(
      out, ntk_attention(*call, state), rtol=0, atol=1e-13
    )


# --- what is reported ---


def test_info_tells_the_share_of_the_prefix():
  call = query, key, value, *prefix = prefix_call(1.0, m=64)
  taylor = taylor_map(6)
  out, info = ntk_attention(
    query,
    key,
    value,
    state_of(*prefix, taylor),
    feature_map=taylor,
    return_info=True,
  )
  assert isinstance(info, NTKAttentionInfo)
  # How large values are says nothing about weights.
  _, same = ntk_attention(
    query,
    key,
    1e3 * value,
    state_of(prefix[0], 1e3 * prefix[1], taylor),
    feature_map=taylor,
    return_info=True,
  )
  for x, y in zip(info, same, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-12)
  np.testing.assert_allclose(out, dense_formula(*call), rtol=0, atol=1e-3)
  logits = np.einsum("tnh,mnh->tnm", query, np.concatenate((call[3], key)))
  weights = np.exp(logits / math.sqrt(8))
  share = weights[..., :64].sum(-1) / weights.sum(-1)
  np.testing.assert_allclose(info.prefix_mass, share, rtol=1e-3)
  parts = weights[..., :64].sum(-1), weights[..., 64:].sum(-1)
  total = weights.sum(-1) / np.maximum(*parts)
  np.testing.assert_allclose(info.denominator, total, rtol=1e-3)


def test_info_shows_where_odd_features_break_down():
  key = np.ones((50, 1, 4))
  query = np.linspace(-4, 4, 9)[:, None, None] * np.ones((1, 1, 4))
  for degree, first_good in ((1, -1), (3, -1.6)):
    taylor = taylor_map(degree)
    state = state_of(key, key, taylor)
    call = functools.partial(ntk_attention, query, None, None, state)
    _, info = call(feature_map=taylor, allow_odd=True, return_info=True)
    logits = 2 * np.linspace(-4, 4, 9)
    np.testing.assert_array_equal(
      info.denominator[:, 0] > 0, logits > first_good
    )


# --- compiling and refusing ---


def test_second_calls_do_not_compile():
  query, key, value, *prefix = prefix_call()
  state, taylor = state_of(*prefix, taylor_map(2)), taylor_map(2)
  target = ntk_attention(query, key, value, state, feature_map=taylor)

  def run(query, state, scale):
    options = {"feature_map": taylor_map(2), "scale": scale}
    ntk_attention(query, key, value, state, **options)
    fit_prefix_state(query, key, value, target, **options)
    prefix_attention(query, key, value, *prefix, prefix_bias=scale)
    prefix_state_update(state, *prefix, **options)
    prefix_state_downdate(state, *prefix, **options)

  run(query, state, 0.5)
  moved = PrefixState(np.array(state.z) + 1, np.array(state.k) + 1)
  moved = jax.tree.map(jnp.asarray, moved)
  with no_recompilation():
    run(query + 1, moved, 0.25)


_Q, _K = (5, 4, 8), (6, 2, 8)


@pytest.mark.parametrize(
  ("state", "options", "message"),
  [
    (((4, 8, 8), (3, 8)), {}, "state.k must have shape (4, 8) = that of"),
    (((8, 8), (8,)), {}, "state.z must have 3 dimensions, got shape (8, 8)"),
    (((3, 8, 8), (3, 8)), {}, "state.z has 3 heads, query has 4 and key has 2"),
    (
      ((2, 7, 8), (2, 7)),
      {},
      "state.z has 7 features, feature_map has 8 for heads of size 8",
    ),
    (((2, 8, 4), (2, 8)), {}, "value dim of state (4) != value dim (8)"),
    (
      ((2, 9, 8), (2, 9)),
      {"feature_map": taylor_map(1)},
      "degree must be even unless allow_odd=True, got 1",
    ),
    (
      ((2, 8, 8), (2, 8)),
      {"feature_map": "foo"},
      "feature_map must be one of 'elu', 'identity', 'relu' or a FeatureMap, "
      "got 'foo'",
    ),
    (((2, 8, 8), (2, 8)), {"scale": 0.0}, "scale must be positive, got 0.0"),
    (((2, 8, 8), (2, 8)), {"scale": -1.0}, "scale must be positive, got -1.0"),
    (
      ((2, 8, 8), (2, 8)),
      {"return_info": 1},
      "return_info must be one of False, True, got 1",
    ),
  ],
)
def test_refused_states(state, options, message):
  query, key, value = map(jnp.ones, (_Q, _K, _K))
  state = PrefixState(*map(jnp.ones, state))
  refuse(message, ntk_attention, query, key, value, state, **options)


def test_refused_state_dtype_and_half_a_context():
  query, key, value = map(jnp.ones, (_Q, _K, _K))
  state = prefix_state_init(2, 8, 8)
  whole = PrefixState(state.z.astype(int), state.k)
  message = "state.z must have a floating dtype, got int"
  refuse(message, ntk_attention, query, key, value, whole)
  message = "value must not be set without a context, got (6, 2, 8)"
  refuse(message, ntk_attention, query, None, value, state)
  hidden = jnp.zeros((1, 1, 1), bool)
  for options, message in (
    ({"mask": hidden}, "mask must not be set without a context, got (1, 1, 1)"),
    ({"is_causal": True}, "is_causal must not be set without a context"),
    ({"block_sizes": 128}, "block_sizes must not be set without a context"),
  ):
    refuse(message, ntk_attention, query, None, None, state, **options)
  message = "mask must be broadcastable to (N, T, S) = (4, 5, 1)"
  wide = jnp.zeros((1, 1, 3), bool)
  refuse(message, ntk_attention, query, key[:0], key[:0], state, mask=wide)
  message = "state.z has 3 heads, query has 4"
  state = prefix_state_init(3, 8, 8)
  refuse(message, ntk_attention, query, None, None, state)
  message = "query must not be empty, got shape (0, 4, 8)"
  refuse(message, ntk_attention, query[:0], None, None, state)


def test_refused_updates():
  state, key = prefix_state_init(2, 8, 8), jnp.ones(_K)
  for update in (prefix_state_update, prefix_state_downdate):
    refuse("state.z has 2 heads, key has 1", update, state, *[key[:, :1]] * 2)
    message = "key must have 3 dimensions, got shape (1, 6, 2, 8)"
    refuse(message, update, state, key[None], key[None])
    message = "value must have shape (6, 2, *) = (S, K, Hv), got (5, 2, 8)"
    refuse(message, update, state, key, key[:5])
    message = "value dim of state (8) != value dim (3)"
    refuse(message, update, state, key, key[..., :3])
    refuse("scale must be positive", update, state, key, key, scale=-1.0)
    message = "state.z has 8 features, feature_map has 9 for heads of size 8"
    refuse(message, update, state, key, key, feature_map=taylor_map(1))
  for sizes, name in (
    ((0, 8, 8), "num_heads"),
    ((2, 0, 8), "num_features"),
    ((2, 8, 0), "value_dim"),
  ):
    refuse(f"{name} must be >= 1, got 0", prefix_state_init, *sizes)
  for dtype in ("int32", "bfloat16"):
    message = f"dtype must be float32 or float64, got {dtype}"
    refuse(message, prefix_state_init, 2, 8, 8, dtype=dtype)
  low = PrefixState(*(x.astype("bfloat16") for x in state))
  message = "dtype of state.z must be float32 or float64, got bfloat16"
  refuse(message, prefix_state_update, low, key, key)


def test_refused_prefixes():
  query, key = jnp.ones(_Q), jnp.ones(_K)
  call = functools.partial(prefix_attention, query, key, key)
  good = jnp.ones((3, 2, 8))
  for bad, message in (
    ((3, 4, 8), "prefix_key must have shape (*, 2, 8) = (m, K, H), got (3, 4"),
    ((3, 2, 7), "prefix_key must have shape (*, 2, 8) = (m, K, H), got (3, 2"),
    ((0, 2, 8), "prefix_key must not be empty, got shape (0, 2, 8)"),
  ):
    refuse(message, call, jnp.ones(bad), good)
  message = "prefix_value must have shape (3, 2, 8) = (m, K, Hv), got (4, 2, 8)"
  refuse(message, call, good, jnp.ones((4, 2, 8)))
  message = "prefix_key must have a floating dtype, got int"
  refuse(message, call, good.astype(int), good)
  message = "prefix_bias must be in (-inf, inf), got inf"
  refuse(message, call, good, good, prefix_bias=math.inf)
  message = "prefix_bias must be a real scalar, got 'x'"
  refuse(message, call, good, good, prefix_bias="x")
  message = "count_normalized must be one of False, True, got 1"
  refuse(message, call, good, good, count_normalized=1)
