"""Moments of a stream against attention to all of it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxattn.attention import (
  moment_decay,
  moment_downdate,
  moment_init,
  moment_merge,
  moment_query,
  moment_update,
  polynomial_attention,
  state_bytes,
  streaming,
)
from jaxattn.features import polynomial_coefficients, polynomial_error
from jaxattn.scaling import fit_slope
from tests._dense import dense_attention
from tests._jaxpr import array_sizes
from tests._recompile import no_recompilation

B, T, S, N, K, H, HV = 2, 5, 200, 4, 2, 3, 2
DEGREE, RADIUS = 4, 2.0
exact = functools.partial(
  polynomial_attention, degree=DEGREE, radius=RADIUS, center_keys=False
)


def inputs(seed=0, length=S):
  rng = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, length, K, H), (B, length, K, HV)
  return [jnp.asarray(rng.uniform(-1, 1, shape)) for shape in shapes]


def empty():
  return moment_init(B, K, H, HV, degree=DEGREE, dtype=jnp.float64)


def filled(seed=0, length=S):
  return moment_update(empty(), *inputs(seed, length)[1:])


def assert_same_sums(a, b, atol=1e-12):
  for x, y in zip(
    (a.moments - a.compensation, a.count),
    (b.moments - b.compensation, b.count),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, rtol=0, atol=atol)


# --- what it computes ---


@pytest.mark.parametrize("size", [1, 7, 256])
def test_any_chunking_is_attention_to_the_whole(size):
  query, key, value = inputs()
  state = empty()
  for start in range(0, S, size):
    chunk = slice(start, start + size)
    state = moment_update(state, key[:, chunk], value[:, chunk])
  got = moment_query(state, query, radius=RADIUS)
  np.testing.assert_allclose(got, exact(query, key, value), rtol=0, atol=1e-12)
  assert state.count.tolist() == [S, S]


def test_every_prefix_is_a_row_of_causal_attention():
  _, key, value = inputs()
  query = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (B, S, N, H)))

  def step(state, token):
    q, k, v = token
    state = moment_update(state, k[:, None], v[:, None])
    return state, moment_query(state, q[:, None], radius=RADIUS)[:, 0]

  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (query, key, value))
  rows = jnp.moveaxis(lax.scan(step, empty(), tokens)[1], 0, 1)
  want = exact(query, key, value, is_causal=True, local="polynomial")
  np.testing.assert_allclose(rows, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("coefficients", ["minimax", "taylor"])
def test_dense_oracle_with_scale_and_mask(coefficients):
  query, key, value = inputs()
  seen = np.random.default_rng(2).random((B, S)) < 0.5
  seen[0] = False
  key = key.at[0].set(jnp.nan)  # hidden, all of it
  state = moment_update(empty(), key, value, key_mask=jnp.asarray(seen))
  got = moment_query(
    state, query, radius=RADIUS, coefficients=coefficients, scale=0.3
  )
  polynomial = polynomial_coefficients(DEGREE, RADIUS, kind=coefficients)
  k, v = (jnp.repeat(x, N // K, 2) for x in (key, value))
  logits = 0.3 * jnp.einsum("btnh,bsnh->bnts", query, k)
  weights = np.polynomial.polynomial.polyval(np.asarray(logits), polynomial)
  weights = np.where(seen[:, None, None], weights, 0)
  total = weights.sum(-1, keepdims=True)
  want = np.einsum(
    "bnts,bsnv->btnv", weights / np.where(total == 0, 1, total), v
  )
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  assert (got[0] == 0).all()
  assert state.count.tolist() == [0, int(seen[1].sum())]


def test_one_token_returns_its_value():
  query, _, value = inputs(length=1)
  got = moment_query(filled(length=1), query, radius=RADIUS)
  want = jnp.broadcast_to(jnp.repeat(value, N // K, 2), got.shape)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


# --- adding, taking away, forgetting ---


def test_merged_shards_are_the_stream():
  (_, *a), (_, *b) = inputs(0, 50), inputs(1, 70)
  whole = (jnp.concatenate(pair, 1) for pair in zip(a, b, strict=True))
  merged = moment_merge(filled(0, 50), filled(1, 70))
  assert_same_sums(merged, moment_update(empty(), *whole))
  norms = [np.linalg.norm(key, axis=-1).max(1) for key, _ in (a, b)]
  np.testing.assert_allclose(merged.max_norm, np.maximum(*norms))


def test_downdate_restores():
  pair = inputs(1, 70)[1:]
  before = filled()
  after = moment_downdate(moment_update(before, *pair), *pair)
  assert_same_sums(after, before)


def test_decay_is_forgetting():
  state = filled()
  same = moment_decay(state, 1.0)
  for x, y in zip(jax.tree.leaves(same), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(x, y)
  query, key, value = inputs(length=9)
  state = empty()
  for j in range(9):
    one = slice(j, j + 1)
    state = moment_decay(state, 0.7)
    state = moment_update(state, key[:, one], value[:, one])
  ages = (8 - np.arange(9)) * math.log(0.7)
  bias = jnp.asarray(ages)[None, None, None]
  want = dense_attention(query, key, value, bias, seen=True, scale=None)[0]
  got = moment_query(state, query, radius=RADIUS)
  eps = polynomial_error(polynomial_coefficients(DEGREE, RADIUS), RADIUS)
  assert abs(got - want).max() < eps  # values are within 1 of 0


def test_what_decayed_to_nothing_gives_0():
  """Where a batch element gets no more tokens while the others do."""
  query, key, value = (x.astype(jnp.float32) for x in inputs(length=9))
  state = moment_init(B, K, H, HV, degree=DEGREE)
  state = moment_update(state, key, value)
  hidden = jnp.array([[False], [True]])

  def step(_, state):
    state = moment_decay(state, 0.5)
    return moment_update(state, key[:, :1], value[:, :1], key_mask=hidden)

  state = jax.jit(lambda s: lax.fori_loop(0, 400, step, s))(state)
  got = moment_query(state, query, radius=RADIUS)
  assert (got[0] == 0).all()
  want = jnp.repeat(value[1, 0], N // K, 0)[None]
  np.testing.assert_allclose(
    got[1], jnp.broadcast_to(want, got[1].shape), rtol=0, atol=1e-6
  )


def test_counts_stay_at_their_largest():
  query, key, value = inputs(length=10)
  most = (1 << 31) - 1
  state = dataclasses.replace(filled(), count=jnp.full(B, most - 4, jnp.int32))
  assert moment_update(state, key[:, :4], value[:, :4]).count[0] == most
  full = moment_update(state, key, value)
  merged = moment_merge(state, state)
  less = moment_downdate(full, key, value)
  for after in (full, merged, less):
    assert after.count.tolist() == [most, most]
  # As many tokens as a count can hold are not none.
  assert (moment_query(full, query, radius=RADIUS) != 0).all()
  # Tokens to take away may come first.
  owed = moment_downdate(empty(), key, value)
  assert moment_merge(owed, filled()).count.tolist() == [S - 10] * B


def test_a_window_keeps_its_digits():
  window, num = 256, 1 << 14
  pairs = jax.random.uniform(jax.random.key(1), (num, 2), jnp.float32)
  ring = jnp.zeros((window, 2), jnp.float32)
  init = moment_init(1, 1, 1, 1, degree=2)

  def step(carry, pair):
    state, ring, i = carry
    slot = i % window
    old, new = (x.reshape(2, 1, 1, 1, 1) for x in (ring[slot], pair))
    # An empty slot holds no token.
    state = moment_downdate(state, *old, key_mask=(i >= window)[None, None])
    return moment_update(state, *new), ring.at[slot].set(pair), i + 1

  state, ring, _ = jax.jit(
    lambda: lax.fori_loop(
      0, num, lambda i, c: step(c, pairs[i]), (init, ring, jnp.int32(0))
    )
  )()
  assert state.count.tolist() == [window]
  key, value = np.asarray(ring, np.float64).T
  powers = np.stack([np.ones(window), key, key * key])
  want = powers @ np.stack([value, np.ones(window)], 1)
  assert abs(state.moments[0, 0] / want - 1).max() < 1e-5


def test_radius_used_bounds_the_logits():
  query, key, _ = inputs()
  info = moment_query(
    filled(), query, radius=RADIUS, scale=-0.5, return_info=True
  )[1]
  logits = 0.5 * jnp.einsum(
    "btnh,bsnh->btns", query, jnp.repeat(key, N // K, 2)
  )
  assert (abs(logits).max(-1) <= info.radius_used * (1 + 1e-12)).all()
  norms = np.linalg.norm(query, axis=-1), np.linalg.norm(key, axis=-1).max(1)
  want = 0.5 * norms[0] * norms[1].repeat(N // K, 1)[:, None]
  np.testing.assert_allclose(info.radius_used, want)


# --- error, digits, memory ---


def test_error_falls_with_the_stream_and_keeps_its_bound():
  eps = polynomial_error(polynomial_coefficients(4, 2.0), 2.0)
  assert abs(eps / 0.0145 - 1) < 0.02
  lengths = [1000, 4000, 16_000, 64_000]
  # Eight streams, one for each element of the batch.
  rng = np.random.default_rng(0)
  sizes = (8, 32, 1, 4), (8, lengths[-1], 1, 4), (8, lengths[-1], 1, 1)
  query, key, value = (rng.uniform(-1, 1, size) for size in sizes)
  logits = np.einsum("bth,bsh->bts", query[:, :, 0], key[:, :, 0]) / 2
  weights = np.exp(logits)
  sums = np.cumsum(weights * value[:, None, :, 0, 0], 2), np.cumsum(weights, 2)
  state, errors = moment_init(8, 1, 4, 1, degree=4, dtype=jnp.float64), []
  for start in range(0, lengths[-1], 1000):
    chunk = slice(start, start + 1000)
    state = moment_update(state, key[:, chunk], value[:, chunk])
    if start + 1000 in lengths:
      got = moment_query(state, query, radius=2.0, scale=0.5)[..., 0, 0]
      exact_rows = sums[0][..., start + 999] / sums[1][..., start + 999]
      errors.append(abs(got - exact_rows).max(1))
  errors = np.array(errors)
  # Values are within 1 of 0: their range is at most 2.
  assert errors.max() <= 2 * math.tanh(math.atanh(eps) / 2)
  slope = fit_slope(np.array(lengths), errors.mean(1)).slope
  assert -0.75 < slope < -0.25


def test_float32_keeps_its_digits_over_single_tokens():
  num = 1 << 18
  rng = jax.random.key(0)

  def draw(i):
    return jax.random.uniform(jax.random.fold_in(rng, i), (2,), jnp.float32)

  def step(state, i):
    key, value = draw(i).reshape(2, 1, 1, 1, 1)
    return moment_update(state, key, value)

  state = moment_init(1, 1, 1, 1, degree=2)
  state = streaming.stream(step, state, range(num))
  key, value = np.asarray(jax.vmap(draw)(jnp.arange(num)), np.float64).T
  powers = np.stack([np.ones(num), key, key * key])
  want = powers @ np.stack([value, np.ones(num)], 1)
  drift = abs(state.moments[0, 0] / want - 1).max()
  assert drift <= 1e-7
  plain = abs(np.cumsum(value.astype(np.float32))[-1] / value.sum() - 1)
  assert plain > 1e-6


def test_state_has_one_size_and_features_exist_for_one_chunk():
  chunk, m = 64, 35

  def step(state, i):
    x = jnp.full((1, chunk, 1, 3), 1.0) / (i + 1)
    return moment_update(state, x, x)

  def pass_over(state, num):
    return streaming.stream(step, state, range(num))

  state = moment_init(1, 1, 3, 3, degree=4)
  runs = [
    functools.partial(pass_over, num=num // chunk)
    for num in (10_000, 1_000_000)
  ]
  # Any length is the same program.
  short, long = (array_sizes(run, state) for run in runs)
  assert short == long
  assert max(long) <= chunk * m
  after = [state_bytes(jax.eval_shape(run, state)) for run in runs]
  assert after == [state_bytes(state)] * 2
  assert state_bytes(state) == 4 * (2 * m * 4 + 1 + 1)


def test_stream_of_an_iterator_is_that_of_arrays():
  _, key, value = inputs()
  key, value = (
    jnp.moveaxis(x.reshape(B, 8, -1, *x.shape[2:]), 1, 0) for x in (key, value)
  )

  def step(state, pair):
    return moment_update(state, *pair)

  a = streaming.stream(step, empty(), (key, value))
  b = streaming.stream(step, empty(), zip(key, value, strict=True))
  assert_same_sums(a, b)
  assert_same_sums(a, filled())

  def numbered(state, i):
    return step(state, (key[i // 3], value[i // 3]))

  backwards = range(21, -1, -3)
  assert_same_sums(a, streaming.stream(numbered, empty(), backwards))


def test_second_calls_do_not_compile():
  def run(seed):
    query, key, value = inputs(seed)
    state = moment_update(empty(), key, value)
    state = moment_downdate(state, key[:, :9], value[:, :9])
    moment_query(state, query, radius=RADIUS, scale=0.1 * seed)
    return moment_decay(moment_merge(state, state), 0.5)

  run(1)
  with no_recompilation():
    run(2)


def test_dtypes():
  query, key, value = (x.astype(jnp.bfloat16) for x in inputs())
  state = moment_init(B, K, H, HV, degree=DEGREE)
  with jax.numpy_dtype_promotion("strict"):
    state = moment_update(state, key, value)
    out = moment_query(state, query, radius=RADIUS)
    merged = moment_decay(moment_merge(state, state), 0.5)
  assert out.dtype == jnp.bfloat16
  assert {merged.moments.dtype, merged.max_norm.dtype} == {jnp.dtype("float32")}
  wide = (x.astype(jnp.float64) for x in (query, key, value))
  assert abs(out - exact(*wide)).max() < 0.01


def test_gradients_are_those_of_attention():
  query, key, value = inputs(length=20)
  # Where norms have no gradient.
  arrays = query.at[0, 0].set(0), key.at[0, 3].set(0), value

  def of_state(query, key, value):
    chunks = tuple(
      jnp.moveaxis(x.reshape(B, 4, 5, *x.shape[2:]), 1, 0) for x in (key, value)
    )
    state = streaming.stream(
      lambda state, pair: moment_update(state, *pair), empty(), chunks
    )
    out, info = moment_query(state, query, radius=RADIUS, return_info=True)
    return (out**2).sum() + 0 * info.radius_used.sum()

  def of_all(*arrays):
    return (exact(*arrays) ** 2).sum()

  got, want = (jax.grad(fn, (0, 1, 2))(*arrays) for fn in (of_state, of_all))
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


# --- what is refused ---


def test_no_tokens_are_refused_outside_of_jit_and_give_0_inside():
  query = inputs()[0]
  with pytest.raises(ValueError, match="state must hold tokens"):
    moment_query(empty(), query, radius=RADIUS)
  inside = jax.jit(functools.partial(moment_query, radius=RADIUS))
  assert (inside(empty(), query) == 0).all()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"degree": 3}, "degree must be even, got 3"),
    ({"degree": -2}, "degree must be >= 0"),
    ({"degree": 40, "dim": 40}, "feature dimension .* too large"),
    ({"dim": 0}, "dim must be >= 1, got 0"),
    ({"batch_size": 1.0}, "batch_size must be an integer"),
    ({"dtype": jnp.bfloat16}, "dtype must be float32 or float64, got bfloat16"),
  ],
)
def test_init_refuses(change, message):
  options = {
    "batch_size": 1,
    "num_kv_heads": 1,
    "dim": 2,
    "value_dim": 2,
    "degree": 2,
  } | change
  sizes = [options.pop(n) for n in list(options)[:4]]
  with pytest.raises(ValueError, match=message):
    moment_init(*sizes, **options)


def test_a_dtype_that_would_be_narrowed_is_refused():
  with (
    jax.enable_x64(False),
    pytest.raises(ValueError, match="float32 unless jax_enable_x64 is set"),
  ):
    moment_init(1, 1, 2, 2, degree=2, dtype=jnp.float64)


def test_updates_refuse():
  _, key, value = inputs()
  cases = [
    (key[0], value[0], None, "key must have 4 dimensions"),
    (key[..., :2], value, None, "key has heads of size 2, .* 15 features of"),
    (
      key[:1],
      value[:1],
      None,
      r"state.moments must have shape \(1, 2, \*",
    ),
    (key, value[:, :-1], None, "value must have shape"),
    (key, value[..., :1], None, r"state.moments must have shape \(2, 2, \*, 2"),
    (key, value, jnp.ones((B, S)), "key_mask must be boolean"),
  ]
  for k, v, mask, message in cases:
    for change in (moment_update, moment_downdate):
      with pytest.raises(ValueError, match=message):
        change(empty(), k, v, key_mask=mask)


def test_queries_merges_and_decays_refuse():
  query, state = inputs()[0], filled()
  ask = functools.partial(moment_query, state, radius=RADIUS)
  other = moment_init(B, K, DEGREE, HV, degree=H + 1, dtype=jnp.float64)
  cases = [
    (lambda: ask(query[0]), "query must have 4 dimensions"),
    (lambda: ask(query[..., :2]), "query has heads of size 2"),
    (
      lambda: ask(query[:, :, :3]),
      "the 2 heads of the state must divide",
    ),
    (lambda: ask(query[:, :0]), "query must not be empty"),
    (lambda: ask(query[:1]), r"query must have shape \(2, \*, \*, \*\)"),
    (lambda: ask(query, radius=0.0), "radius must be"),
    (
      lambda: ask(query, coefficients="gaussian"),
      "coefficients must be one of",
    ),
    (lambda: ask(query, scale="a"), "scale must be a real scalar"),
    (lambda: ask(query, return_info=1), "return_info must be one of"),
    (
      lambda: moment_decay(state, 0.0),
      r"decay must be in \(0, 1\], got 0.0",
    ),
    (
      lambda: moment_decay(state, 1.5),
      r"decay must be in \(0, 1\], got 1.5",
    ),
    (lambda: moment_merge(state, other), "b.moments must have shape"),
    (
      lambda: moment_merge(state, dataclasses.replace(state, degree=2)),
      "states to merge must have one degree, got 4 and 2",
    ),
    (
      lambda: moment_merge(state, jax.tree.map(jnp.float32, state)),
      "all arrays must have one dtype",
    ),
    (lambda: state_bytes((state, 3)), "state must hold arrays only, got 3"),
    (
      lambda: streaming.stream(moment_merge, state, (query, query[0])),
      "chunks must be a range, an iterator, or arrays with one leading",
    ),
    (
      lambda: streaming.stream(moment_merge, state, 3),
      "chunks must be a range",
    ),
  ]
  for call, message in cases:
    with pytest.raises(ValueError, match=message):
      call()
