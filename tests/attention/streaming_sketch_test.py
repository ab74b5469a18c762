"""Three sketches of three streams, against attention itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxattn.attention import (
  polynomial_attention,
  state_bytes,
  streaming,
  three_sketch_decode,
  three_sketch_finalize,
  three_sketch_init,
  three_sketch_merge,
  three_sketch_update_key,
  three_sketch_update_query,
  three_sketch_update_value,
)
from jaxattn.features import attention_error_bound as error_bound
from jaxattn.features import (
  monomial_features,
  monomial_weights,
  polynomial_coefficients,
  polynomial_error,
)
from jaxattn.sketch import count_sketch
from tests._jaxpr import array_sizes
from tests._recompile import no_recompilation

H, HV, K, RADIUS = 4, 3, 16, 2.0
CHUNK = 1024


def empty(seed=0, **options):
  sizes = {"dim": H, "value_dim": HV, "degree": 4, "k": K, "eps1": 0.5}
  sizes |= {"eps2": 0.05, "dtype": jnp.float64} | options
  return three_sketch_init(jax.random.key(seed), **sizes)


@functools.partial(jax.jit, static_argnames="chunk_size")
def closed(state, key, value, chunk_size=CHUNK):
  """Finalized, value by value and then key by key."""
  starts = jnp.arange(0, len(key), chunk_size)
  for update, x in (
    (three_sketch_update_value, value),
    (three_sketch_update_key, key),
  ):
    chunks = x.reshape(len(starts), chunk_size, -1)
    state, _ = lax.scan(
      lambda s, c, update=update: (update(s, *c), None), state, (starts, chunks)
    )
  return three_sketch_finalize(state)


@jax.jit
def asked(state, query):
  starts = jnp.arange(0, len(query), CHUNK)

  def step(state, chunk):
    return three_sketch_update_query(state, *chunk, radius=RADIUS), None

  chunks = starts, query.reshape(len(starts), CHUNK, -1)
  return lax.scan(step, state, chunks)[0]


@functools.cache
def instance():
  """Keys, values, and queries of which 16 are not 0.

  Of accuracy only: sketches as fine as these pay for longer streams.
  """
  rng = np.random.default_rng(0)
  key = rng.uniform(-1, 1, (4096, H))
  # Values that go with keys: outputs of queries differ by more than noise.
  value = 0.8 * key[:, :HV] + 0.2 * rng.uniform(-1, 1, (4096, HV))
  query = np.zeros((8192, H))
  special = np.sort(rng.choice(8192, K, replace=False))
  query[special] = rng.choice([-1.0, 1.0], (K, H))
  return *map(jnp.asarray, (query, key, value)), special


def softmax_rows(query, key, value):
  weights = np.exp(np.asarray(query) @ np.asarray(key).T / 2)
  weights /= weights.sum(1, keepdims=True)
  return weights, weights @ np.asarray(value)


@functools.cache
def decoded(kind, dtype=jnp.float64):
  query, key, value, _ = instance()
  state = closed(empty(query_sketch=kind, eps2=0.02, dtype=dtype), key, value)
  state = asked(state, query)
  assert state.query_table.dtype == dtype
  norms = (np.linalg.norm(x, axis=1).max() for x in (query, key))
  np.testing.assert_allclose(state.radius_used, np.prod([*norms]) / 2, 1e-6)
  return three_sketch_decode(state, num_queries=len(query), k=K)


def test_finds_the_queries_that_are_unlike_the_rest():
  query, key, value, special = instance()
  indices, values, baseline = decoded("output")
  np.testing.assert_allclose(baseline, value.mean(0), rtol=0, atol=1e-12)
  weights, want = softmax_rows(query[special], key, value)
  eps = polynomial_error(polynomial_coefficients(4, RADIUS), RADIUS)
  of_polynomial = error_bound(eps, value[:, None])[0]
  # Of a product of two sketches with s = 2 / eps2^2 buckets.
  spread = np.sqrt((weights**2).sum(1).max() * (value**2).sum(0)) * 0.02
  bound = of_polynomial + 3 * spread
  for column in range(HV):
    assert sorted(indices[column].tolist()) == special.tolist()
    found = np.zeros(8192)
    found[indices[column]] = values[column]
    error = found[special] + baseline[column] - want[:, column]
    assert abs(error).max() < bound[column]
    # All other outputs are the mean: the best 16 entries leave no tail.
    found[special] -= want[:, column] - baseline[column]
    promise = (2 + 0.5) * np.sqrt(K) * bound[column]
    assert np.linalg.norm(found) <= promise
  # The bound decides something: they are farther from the mean than that.
  assert (np.abs(want - baseline[None]).mean(0) > bound).all()


def test_float32_finds_them_too():
  got, want = decoded("output", jnp.float32), decoded("output")
  np.testing.assert_array_equal(np.sort(got[0], 1), np.sort(want[0], 1))
  sizes = (np.sort(x[1].astype(float), 1) for x in (got, want))
  np.testing.assert_allclose(*sizes, rtol=0, atol=1e-4)


def test_features_and_outputs_decode_to_the_same():
  for got, want in zip(decoded("features"), decoded("output"), strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_error_does_not_fall_with_the_stream_but_with_the_sketch():
  rng = np.random.default_rng(1)
  query = jnp.asarray(rng.uniform(-1, 1, (32, H))) / 2

  def error(length, eps2):
    """Of the product of centered features and values, by token."""
    key, value = (jnp.asarray(rng.uniform(-1, 1, (length, n))) for n in (H, HV))
    full = monomial_features(key, 2)
    phi, centered = (x - x.mean(0)[None] for x in (full, value))
    weights = jnp.asarray(monomial_weights(H, (1, 1, 0.5)))
    weights = monomial_features(query, 2) * weights[None]

    def one(seeds):
      state = dataclasses.replace(empty(eps2=eps2, degree=2), seeds=seeds)
      state = three_sketch_update_value(state, 0, value)
      state = three_sketch_update_key(state, 0, key)
      raw = state.key_sketch[:, :-1].T @ state.value_sketch
      got = three_sketch_finalize(state).product
      return (
        got - phi.T @ centered,
        weights @ (got - phi.T @ centered),
        (weights @ (raw - full.T @ value)),
      )

    seeds = jax.random.bits(jax.random.key(2), (16, 10, 2), jnp.uint32)
    return [
      np.sqrt((x**2).mean()) / length for x in jax.jit(jax.vmap(one))(seeds)
    ]

  (short, *_), (long, *outputs), (wide, *_) = (
    error(250, 0.2),
    error(4000, 0.2),
    error(4000, 0.1),
  )
  assert 0.6 < long / short < 1.6
  assert 1.4 < long / wide < 2.8
  # What centering is for: outputs of the sketches alone are worse.
  assert outputs[0] < 0.6 * outputs[1]


def test_with_a_bucket_for_each_token_nothing_is_lost(monkeypatch):
  def identity(seeds, indices, sketch_dim):
    del sketch_dim
    shape = len(seeds), len(indices)
    bucket = jnp.broadcast_to(indices.astype(jnp.int32)[None], shape)
    return bucket, jnp.ones(shape, jnp.int32)

  monkeypatch.setattr(count_sketch, "_hashes", identity)
  rng = np.random.default_rng(2)
  # Sizes that no program of another test has, with its hashes.
  query, key, value = (
    jnp.asarray(rng.uniform(-1, 1, (34, n))) for n in (H, H, HV)
  )
  # 247 buckets for 34 tokens, 40 for as many queries.
  state = empty(eps2=0.09, k=5)
  for start in (0, 17):
    part = slice(start, start + 17)
    state = three_sketch_update_key(state, start, key[part])
    state = three_sketch_update_value(state, start, value[part])
  state = three_sketch_finalize(state)
  state = three_sketch_update_query(state, 0, query, radius=RADIUS, scale=0.3)
  # More than there are: all of them.
  indices, values, baseline = three_sketch_decode(state, num_queries=34, k=99)
  want = polynomial_attention(
    query[:, None],
    key[:, None],
    value[:, None],
    degree=4,
    radius=RADIUS,
    scale=0.3,
    center_keys=False,
  )[:, 0]
  for column in range(HV):
    got = np.zeros(34)
    got[indices[column]] = values[column]
    np.testing.assert_allclose(
      got + baseline[column], want[:, column], rtol=0, atol=1e-12
    )


def test_merged_parts_are_the_streams():
  _, key, value, _ = instance()
  query, key, value = instance()[0][:200], key[:100], value[:100]

  def part(start):
    rows = slice(start, start + 50)
    state = three_sketch_update_value(empty(), start, value[rows])
    return three_sketch_update_key(state, start, key[rows])

  def answers(state, start):
    rows = slice(start, start + 100)
    return three_sketch_update_query(state, start, query[rows], radius=RADIUS)

  whole = three_sketch_update_value(empty(), 0, value)
  whole = three_sketch_finalize(three_sketch_update_key(whole, 0, key))
  state = three_sketch_finalize(three_sketch_merge(part(0), part(50)))
  state = three_sketch_merge(answers(state, 0), answers(state, 100))
  whole = three_sketch_update_query(whole, 0, query, radius=RADIUS)
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


def test_states_have_one_size_and_nothing_is_as_long_as_the_stream():
  state = empty()
  m, width = 70, int(state.query_table.shape[1])

  def pass_over(state, num):
    def step(state, i):
      x = jnp.full((64, H), 1.0) / (i + 1)
      state = three_sketch_update_value(state, 64 * i, x[:, :HV])
      return three_sketch_update_key(state, 64 * i, x)

    state = streaming.stream(step, state, range(num))
    state = three_sketch_finalize(state)

    def ask(state, i):
      x = jnp.full((64, H), 1.0) / (i + 1)
      return three_sketch_update_query(state, 64 * i, x, radius=RADIUS)

    return streaming.stream(ask, state, range(num))

  shapes = [
    jax.eval_shape(functools.partial(pass_over, num=num), state)
    for num in (150, 15_000)
  ]
  assert state_bytes(shapes[0]) == state_bytes(shapes[1])
  short, long = (
    array_sizes(functools.partial(pass_over, num=num), state)
    for num in (150, 15_000)
  )
  # Any length is the same program.
  assert short == long
  assert max(long) <= max(800 * (m + 1), 64 * 9 * max(m, 4), 9 * width * HV)


def test_few_tokens():
  query = jnp.asarray(np.random.default_rng(4).uniform(-1, 1, (9, H)))

  @jax.jit
  def answers(state):
    state = three_sketch_finalize(state)
    state = three_sketch_update_query(state, 0, query, radius=RADIUS)
    return three_sketch_decode(state, num_queries=9, k=9)

  nothing = answers(empty())
  assert all(jnp.isfinite(x).all() for x in nothing)
  value = jnp.array([[1.0, -2.0, 3.0]])
  state = three_sketch_update_value(empty(), 0, value)
  state = three_sketch_update_key(state, 0, query[:1])
  _, values, mean = answers(state)
  np.testing.assert_allclose(mean, value[0], rtol=0, atol=1e-12)
  np.testing.assert_allclose(values, 0, rtol=0, atol=1e-12)


def test_counts_stay_at_their_largest_and_means_are_right():
  """Of more tokens than int32 counts, the first of which are replaced."""
  most, more = (1 << 31) - 1, 1e10
  state = three_sketch_update_key(empty(), 0, jnp.zeros((10, H)))
  state = three_sketch_update_value(state, 0, jnp.ones((10, HV)))
  count = jnp.int32(most - 4)
  state = dataclasses.replace(
    state,
    num_keys=count,
    num_values=count,
    feature_sum=state.feature_sum.at[0].set(more),
    value_sum=jnp.full(HV, more / 2),
  )
  state = three_sketch_update_key(state, 0, jnp.zeros((10, H)))
  state = three_sketch_update_value(state, 0, jnp.ones((10, HV)))
  assert (state.num_keys, state.num_values) == (most, most)
  state = three_sketch_finalize(three_sketch_merge(state, state))
  _, _, mean = three_sketch_decode(state, num_queries=1, k=1)
  np.testing.assert_allclose(mean, 0.5, rtol=1e-8)


def test_sums_of_single_tokens_keep_their_digits():
  num = 1 << 14
  pairs = jax.random.uniform(jax.random.key(5), (num, 1, 2), jnp.float32)
  state = three_sketch_init(
    jax.random.key(0), dim=1, value_dim=1, degree=2, k=1, eps1=0.5, eps2=0.9
  )

  def step(state, i):
    state = three_sketch_update_value(state, i, pairs[i, :, :1])
    return three_sketch_update_key(state, i, pairs[i, :, 1:])

  state = streaming.stream(step, state, range(num))
  value, key = np.asarray(pairs[:, 0], np.float64).T
  want = np.array([num, key.sum(), (key * key).sum()])
  assert abs(state.feature_sum / want - 1).max() < 1e-7
  assert abs(state.value_sum / value.sum() - 1).max() < 1e-7
  # Two halves lose no more.
  twice = three_sketch_merge(state, state)
  assert abs(twice.feature_sum / (2 * want) - 1).max() < 1e-7


def test_half_precision_in():
  query, key, value = (x[:20].astype(jnp.bfloat16) for x in instance()[:3])
  with jax.numpy_dtype_promotion("strict"):
    state = three_sketch_update_value(empty(dtype=jnp.float32), 0, value)
    state = three_sketch_update_key(state, 0, key)
    state = three_sketch_finalize(three_sketch_merge(state, state))
    state = three_sketch_update_query(state, 0, query, radius=RADIUS)
    _, values, mean = three_sketch_decode(state, num_queries=20, k=2)
  assert {values.dtype, mean.dtype} == {jnp.dtype("float32")}
  want = np.asarray(value, np.float64).mean(0)
  np.testing.assert_allclose(mean, want, rtol=0, atol=1e-6)


def test_second_calls_do_not_compile():
  _, key, value, _ = instance()

  def run(start):
    state = three_sketch_update_value(empty(), start, value[:50])
    state = three_sketch_update_key(state, start, key[:50])
    state = three_sketch_finalize(state)
    state = three_sketch_update_query(state, start, key[:9], radius=RADIUS)
    return three_sketch_decode(state, num_queries=500, k=3)

  run(0)
  with no_recompilation():
    run(100)


def test_refused():
  _, key, value, _ = instance()
  key, value = key[:20], value[:20]
  init, state = functools.partial(empty), empty()
  full = three_sketch_update_value(state, 0, value)
  full = three_sketch_update_key(full, 0, key)
  final = three_sketch_finalize(full)
  ask = functools.partial(three_sketch_update_query, final, radius=RADIUS)
  other = three_sketch_finalize(three_sketch_merge(full, full))
  cases = [
    (lambda: init(eps1=1.0), r"eps1 must be in \(0.0, 1.0\), got 1.0"),
    (lambda: init(eps2=0.0), r"eps2 must be in \(0.0, 1.0\), got 0.0"),
    (lambda: init(k=0), "k must be >= 1, got 0"),
    (lambda: init(depth=0), "depth must be >= 1"),
    (lambda: init(degree=3), "degree must be even, got 3"),
    (lambda: init(dim=0), "dim must be >= 1"),
    (lambda: init(query_sketch="keys"), "query_sketch must be one of"),
    (lambda: init(dtype=jnp.float16), "dtype must be float32 or float64"),
    (
      lambda: three_sketch_update_key(final, 20, key),
      "three_sketch_update_key called after three_sketch_finalize",
    ),
    (
      lambda: three_sketch_update_value(final, 20, value),
      "three_sketch_update_value called after three_sketch_finalize",
    ),
    (
      lambda: three_sketch_finalize(final),
      "three_sketch_finalize called after three_sketch_finalize",
    ),
    (
      lambda: three_sketch_update_query(full, 0, key, radius=RADIUS),
      "three_sketch_update_query called before three_sketch_finalize",
    ),
    (
      lambda: three_sketch_decode(full, num_queries=20, k=1),
      "three_sketch_decode called before three_sketch_finalize",
    ),
    (lambda: three_sketch_finalize(state), "got 0 keys and 0 values"),
    (
      lambda: three_sketch_finalize(three_sketch_update_key(full, 20, key)),
      "got 40 keys and 20 values",
    ),
    (lambda: three_sketch_update_key(full, -1, key), "start must be in"),
    (lambda: three_sketch_update_value(full, -1, value), "start must be in"),
    (lambda: ask(-1, key), "start must be in"),
    (lambda: ask(1.5, key), "start must be an integer"),
    (lambda: ask(0, key[0]), "query must have 2 dimensions"),
    (lambda: ask(0, key[:, :2]), "query has vectors of size 2, .* 15 features"),
    (lambda: ask(0, key[:0]), "query must not be empty"),
    (lambda: ask(0, key > 0), "query must have a floating dtype"),
    (lambda: ask(0, key, radius=-1.0), "radius must be"),
    (lambda: ask(0, key, scale="a"), "scale must be a real scalar"),
    (
      lambda: three_sketch_update_key(full, 0, value),
      "key has vectors",
    ),
    (lambda: three_sketch_update_value(full, 0, key), "value must have shape"),
    (
      lambda: three_sketch_decode(final, num_queries=0, k=1),
      "size must be in",
    ),
    (lambda: three_sketch_decode(final, num_queries=9, k=0), "k must be >= 1"),
    (
      lambda: three_sketch_decode(final, num_queries=9999, k=999),
      "k must be at most .* = 576 with refine=True, got 999",
    ),
    (lambda: three_sketch_merge(full, final), "must have one finalized"),
    (
      lambda: three_sketch_merge(state, empty(degree=2)),
      "have one degree",
    ),
    (lambda: three_sketch_merge(state, empty(seed=1)), "have the same seeds"),
    (lambda: three_sketch_merge(final, other), "have the same feature_sum"),
    (
      lambda: three_sketch_merge(state, empty(eps2=0.1)),
      "b.value_sketch must have shape",
    ),
    (
      lambda: three_sketch_merge(state, empty(dtype=jnp.float32)),
      "b.value_sketch must be of float64 as a, got float32",
    ),
  ]
  for call, message in cases:
    with pytest.raises(ValueError, match=message):
      call()
