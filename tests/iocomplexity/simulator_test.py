"""Simulated schedules: true attention, and words as counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxattn.iocomplexity import (
  Cache,
  io_count,
  minimum_cache,
  replay,
  simulate,
)

_FORWARD = ("fwd_large", "fwd_fa1", "fwd_small")
_BACKWARD = ("bwd_large", "bwd_two_pass", "bwd_small")
_TRAIN = ("train_small", "train_large")
_ALL = (*_FORWARD, "matmul", *_BACKWARD, *_TRAIN)
_MASKED = ("fwd_large", "fwd_small", "bwd_large", "bwd_small")
# Sizes, and caches in words.
_CASES = (
  ((48, 40, 8), (24, 40, 64, 100, 200, 400, 1000)),
  ((64, 64, 16), (48, 80, 150, 256, 600, 1500)),
)
_WORDS = {
  "fwd_large": (47168, 24640, 10304),
  "fwd_small": (35008, 28864, 18560),
  "bwd_small": (93120, 78528, 51648),
  "bwd_large": (275520, 98112, 38976),
  "bwd_two_pass": (214208, 90048, 41152),
}


def _dense(query, key, value, mask=None):
  """Weights, outputs and log-sum-exps, where all is in memory."""
  scores = query @ key.T
  if mask is not None:
    scores = np.where(mask, scores, -np.inf)
  lse = special.logsumexp(scores, axis=1)
  weights = np.exp(scores - np.where(np.isfinite(lse), lse, 0.0)[:, None])
  return weights, weights @ value, lse


def _score_gradients(weights, bars):
  """Of the softmax, from gradients of its weights."""
  product = weights * bars
  return product - weights * product.sum(1, keepdims=True)


def _problem(algorithm, nq, nk, d, mask=None):
  """Inputs, and the outputs that are wanted."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.standard_normal(shape) / d**0.25

  if algorithm == "matmul":
    x = {"left": draw(nq, d), "right": draw(d, nk)}
    return x, {"product": x["left"] @ x["right"]}
  if algorithm in _TRAIN:
    x = {
      "a1": draw(nq, d), "a2": draw(nk, d), "a3": draw(nk, d),
      "x": draw(d, d), "y": draw(d, d), "target": draw(nq, d),
    }  # fmt: skip
    values = x["a3"] @ x["y"]
    weights, out, _ = _dense(x["a1"] @ x["x"], x["a2"], values)
    bars = _score_gradients(weights, (out - x["target"]) @ values.T)
    return x, {"x_grad": x["a1"].T @ bars @ x["a2"]}
  x = {"query": draw(nq, d), "key": draw(nk, d), "value": draw(nk, d)}
  weights, out, lse = _dense(*x.values(), mask)
  if algorithm in _FORWARD:
    return x, {"out": out, "lse": lse}
  out_grad = draw(nq, d)
  bars = _score_gradients(weights, out_grad @ x["value"].T)
  return x | {"out": out, "lse": lse, "out_grad": out_grad}, {
    "query_grad": bars @ x["key"],
    "key_grad": bars.T @ x["query"],
    "value_grad": weights.T @ out_grad,
  }


def _check(got, wanted):
  if "sum" in got:
    got = {"out": got["out"], "lse": got["max"] + np.log(got["sum"])}
  assert got.keys() == wanted.keys()
  for name, x in wanted.items():
    scale = max(1.0, np.abs(x[np.isfinite(x)]).max())
    np.testing.assert_allclose(got[name], x, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("algorithm", _ALL)
@pytest.mark.parametrize("case", _CASES, ids=["ragged", "even"])
def test_count_is_what_the_program_moves(algorithm, case):
  (nq, nk, d), caches = case
  arrays, wanted = _problem(algorithm, nq, nk, d)
  sizes = dict(num_queries=nq, num_keys=nk, head_dim=d)
  least, runs = minimum_cache(algorithm, head_dim=d), 0
  for cache in caches:
    if cache < least:
      with pytest.raises(ValueError, match=f"needs at least {least} words"):
        simulate(algorithm, arrays, cache_words=cache)
      continue
    outputs, count = simulate(algorithm, arrays, cache_words=cache)
    assert count == io_count(algorithm, cache_words=cache, **sizes)
    assert count.peak <= cache
    _check(outputs, wanted)
    runs += 1
    if nq == 64 and algorithm in _WORDS and cache in (150, 256, 600):
      place = (150, 256, 600).index(cache)
      assert count.total == _WORDS[algorithm][place]
  assert runs >= 4


@pytest.mark.parametrize("algorithm", _ALL)
@pytest.mark.parametrize("shape", [(1, 9, 4), (9, 1, 4), (7, 5, 1), (1, 1, 1)])
def test_smallest_sides(algorithm, shape):
  arrays, wanted = _problem(algorithm, *shape)
  sizes = dict(zip(("num_queries", "num_keys", "head_dim"), shape))
  for cache in (minimum_cache(algorithm, head_dim=shape[2]), 60, 10_000):
    outputs, count = simulate(algorithm, arrays, cache_words=cache)
    assert count == io_count(algorithm, cache_words=cache, **sizes)
    _check(outputs, wanted)


@pytest.mark.parametrize("algorithm", _ALL)
def test_blocks_that_are_asked_for(algorithm):
  arrays, wanted = _problem(algorithm, 20, 16, 4)
  sizes = dict(num_queries=20, num_keys=16, head_dim=4, cache_words=400)
  free = io_count(algorithm, **sizes)
  blocks = tuple(max(1, b // 3) for b in free.blocks)
  for block_size in (2, blocks):
    outputs, count = simulate(
      algorithm, arrays, cache_words=400, block_size=block_size
    )
    assert count == io_count(algorithm, block_size=block_size, **sizes)
    assert count.total > free.total
    _check(outputs, wanted)


def test_gradients_are_those_of_autodiff():
  x, wanted = _problem("bwd_small", 9, 7, 3)
  matrices, wanted_x = _problem("train_small", 9, 7, 3)

  def attend(query, key, value):
    # Not jax.nn's attention, whose softmax is float32.
    return jax.nn.softmax(query @ key.T) @ value

  def inner(query, key, value):
    return (attend(query, key, value) * x["out_grad"]).sum()

  def loss(matrix):
    m = matrices
    out = attend(m["a1"] @ matrix, jnp.array(m["a2"]), m["a3"] @ m["y"])
    return ((out - m["target"]) ** 2).sum() / 2

  @jax.jit
  def gradients(query, key, value, matrix):
    bars = jax.grad(inner, argnums=(0, 1, 2))(query, key, value)
    return *bars, jax.grad(loss)(matrix)

  got = gradients(x["query"], x["key"], x["value"], matrices["x"])
  for a, b in zip(got, [*wanted.values(), *wanted_x.values()], strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_scores_of_any_size():
  arrays, _ = _problem("fwd_small", 8, 8, 4)
  arrays["query"] = arrays["query"] * 1e4
  _, wanted, _ = _dense(**arrays)
  for algorithm in _FORWARD:
    outputs, _ = simulate(algorithm, arrays, cache_words=60)
    np.testing.assert_allclose(outputs["out"], wanted, atol=1e-10)


# --- masks ---


@pytest.mark.parametrize("algorithm", _MASKED)
@pytest.mark.parametrize("cache", [35, 90, 300])
def test_masked_attention(algorithm, cache):
  nq, nk = 17, 13
  mask = np.random.default_rng(1).random((nq, nk)) < 0.15
  mask[3] = False
  mask[:, 5] = False
  arrays, wanted = _problem(algorithm, nq, nk, 4, mask)
  dense = io_count(
    algorithm, num_queries=nq, num_keys=nk, head_dim=4, cache_words=cache
  )
  outputs, count = simulate(algorithm, arrays, cache_words=cache, mask=mask)
  _check(outputs, wanted)
  assert count.total <= dense.total
  assert count.peak <= cache
  everything = np.ones_like(mask)
  _, count = simulate(algorithm, arrays, cache_words=cache, mask=everything)
  assert count == dense


@pytest.mark.parametrize(
  ("algorithm", "linear"),
  [
    # Words that do not grow like n^2, of n queries and as many keys of size d:
    # what is left if the number of visits by tiles goes to zero.
    ("fwd_large", lambda n, d, b: 2 * n * d + n),
    ("fwd_small", lambda n, d, b: 2 * n + n * d),
    ("bwd_large", lambda n, d, b: 5 * n * d + n),
    ("bwd_small", lambda n, d, b: 5 * n * d + n),
  ],
)
@pytest.mark.parametrize("parts", [2, 4])
def test_block_diagonal_masks_divide_what_is_quadratic(
  algorithm, linear, parts
):
  # Tiles of 4, and blocks of keys or queries that divide a part.
  n, d = 32, 4
  mask = np.kron(np.eye(parts), np.ones((n // parts, n // parts))) > 0
  arrays, wanted = _problem(algorithm, n, n, d, mask)
  cache = {"fwd_large": 8 + 8 * 11, "bwd_large": 14 + 4 * 18}.get(algorithm, 32)
  dense = io_count(
    algorithm, num_queries=n, num_keys=n, head_dim=d, cache_words=cache
  )
  outputs, count = simulate(algorithm, arrays, cache_words=cache, mask=mask)
  _check(outputs, wanted)
  rest = linear(n, d, dense.blocks[0])
  assert (dense.total - rest) % parts == 0
  assert count.total - rest == (dense.total - rest) // parts


@pytest.mark.parametrize("algorithm", _MASKED)
def test_what_is_skipped_is_not_looked_at(algorithm):
  mask = np.ones((12, 12), bool)
  mask[:, 8:] = False
  arrays, wanted = _problem(algorithm, 12, 12, 4, mask)
  for name in ("key", "value"):
    arrays[name][8:] = np.nan
  # Tiles of 4 keys, and of one query or key where rows stay in the cache.
  cache = {"fwd_large": 100, "bwd_large": 14 + 4 * 18}.get(algorithm, 32)
  outputs, _ = simulate(algorithm, arrays, cache_words=cache, mask=mask)
  _check(outputs, wanted)


# --- other policies ---


@pytest.mark.parametrize("algorithm", _ALL)
def test_foresight_never_moves_more(algorithm):
  d = 3
  arrays, _ = _problem(algorithm, 9, 7, d)
  for cache in (minimum_cache(algorithm, head_dim=d), 45):
    outputs, count = simulate(algorithm, arrays, cache_words=cache, trace=True)
    trace = outputs["trace"]
    best = replay(trace, cache_words=cache)
    recent = replay(trace, cache_words=cache, policy="lru")
    assert best.total <= count.total
    assert best.reads <= recent.reads
    assert max(best.peak, recent.peak) <= cache
    # With room for everything only inputs and outputs move, under any policy.
    inputs = sum(x.size for n, x in arrays.items())
    if algorithm in _BACKWARD:
      inputs = sum(x.size for x in arrays.values())
    for policy in ("belady", "lru"):
      count = replay(trace, cache_words=10**6, policy=policy)
      assert (count.reads, count.writes) == (inputs, trace.outputs.size)


def test_replays_by_hand():
  cache, x = Cache(3, trace=True), np.arange(3.0)
  a, b, c = (cache.load(x, i) for i in range(3))
  for block in (a, b, c, a, b, c):
    cache.use(block)
  trace = cache.trace([np.empty(1)])
  # a b c a b c with room for two words: by foresight c takes the place of b, b
  # that of a; least recent use finds nothing again.
  assert replay(trace, cache_words=2).reads == 4
  assert replay(trace, cache_words=2, policy="lru").reads == 6


def test_replay_refuses():
  cache = Cache(3, trace=True)
  cache.use(cache.load(np.ones(2), slice(None)))
  trace = cache.trace([np.ones(1)])
  with pytest.raises(ValueError, match=r"cache_words must be .*got 0"):
    replay(trace, cache_words=0)
  with pytest.raises(ValueError, match="policy must be one of 'belady', 'lru'"):
    replay(trace, cache_words=3, policy="fifo")


# --- the cache ---


def test_cache_holds_no_more_than_it_has():
  cache, x = Cache(5), np.arange(6.0)
  block = cache.load(x, slice(0, 3))
  message = "the cache has 5 words, 3 of them taken: no room for 3 more"
  with pytest.raises(ValueError, match=message):
    cache.load(x, slice(3, 6))
  with pytest.raises(ValueError, match=message):
    cache.alloc((3,))
  assert (cache.reads, cache.occupied, cache.peak) == (3, 3, 3)
  block += 1
  np.testing.assert_array_equal(x, np.arange(6.0))
  cache.store(x, slice(3, 6), block)
  np.testing.assert_array_equal(x, [0, 1, 2, 1, 2, 3])
  message = r"block of shape \(3,\) does not fit a place of shape \(2,\)"
  with pytest.raises(ValueError, match=message):
    cache.store(x, slice(0, 2), block)
  cache.free(block)
  message = r"the cache does not hold this block of shape \(3,\)"
  with pytest.raises(ValueError, match=message):
    cache.free(block)
  with pytest.raises(ValueError, match=message):
    cache.store(x, slice(0, 3), block)
  with pytest.raises(ValueError, match="keeps no trace: it needs trace=True"):
    cache.trace([x])
  with pytest.raises(ValueError, match=r"cache_words must be .*got 0"):
    Cache(0)


# --- what is refused ---


def _run(algorithm="fwd_large", changes=None, **options):
  arrays, _ = _problem(algorithm, 6, 5, 2)
  options = {"cache_words": 100, **options}
  return simulate(algorithm, {**arrays, **(changes or {})}, **options)


def test_simulate_refuses():
  with pytest.raises(ValueError, match="algorithm must be one of"):
    simulate("flash", {}, cache_words=10)
  message = "fwd_large takes the arrays query, key, value, got none"
  with pytest.raises(ValueError, match=message):
    simulate("fwd_large", {}, cache_words=10)
  with pytest.raises(ValueError, match="got query, key, value, bias"):
    _run(changes={"bias": np.ones((6, 5))})
  message = r"value must have shape \(5, 2\), got \(5, 3\)"
  with pytest.raises(ValueError, match=message):
    _run(changes={"value": np.ones((5, 3))})
  with pytest.raises(ValueError, match="key must have 2 dimensions"):
    _run(changes={"key": np.ones(5)})
  empty = {"query": (0, 2), "key": (5, 2), "value": (5, 2)}
  with pytest.raises(ValueError, match="query must not be empty"):
    _run(changes={name: np.ones(shape) for name, shape in empty.items()})
  with pytest.raises(ValueError, match="fwd_large needs at least 11 words"):
    _run(cache_words=10)
  with pytest.raises(ValueError, match=r"cache_words must be .*got \[9\]"):
    _run(cache_words=[9])
  with pytest.raises(ValueError, match="block 6 needs 46 words, cache has 30"):
    _run(cache_words=30, block_size=6)
  with pytest.raises(ValueError, match=r"block_size must be .*got 1\.5"):
    _run(block_size=1.5)
  message = "mask is taken by fwd_large, fwd_small.*got algorithm 'fwd_fa1'"
  with pytest.raises(ValueError, match=message):
    _run("fwd_fa1", mask=np.ones((6, 5), bool))
  with pytest.raises(ValueError, match="mask must be boolean"):
    _run(mask=np.ones((6, 5)))
  message = r"mask must have shape \(6, 5\) = \(N_q, N_k\), got \(5, 6\)"
  with pytest.raises(ValueError, match=message):
    _run(mask=np.ones((5, 6), bool))
