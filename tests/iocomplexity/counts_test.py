"""Closed-form counts: their numbers, rates, crossovers and limits."""

import itertools

import numpy as np
import pytest

from jaxattn.iocomplexity import (
  best_algorithm,
  block_sizes,
  compulsory_words,
  crossover,
  io_count,
  io_lower_bound,
  minimum_cache,
)
from jaxattn.scaling import fit_slope

_SCHEDULES = {
  "forward": ("fwd_large", "fwd_fa1", "fwd_small"),
  "backward": ("bwd_large", "bwd_two_pass", "bwd_small"),
  "train": ("train_small", "train_large"),
  "product": ("matmul",),
}
_ALL = tuple(itertools.chain(*_SCHEDULES.values()))


def _total(algorithm, n, d, cache, **options):
  return io_count(
    algorithm,
    num_queries=n,
    num_keys=n,
    head_dim=d,
    cache_words=cache,
    **options,
  ).total


@pytest.mark.parametrize(
  ("algorithm", "words"),
  [
    ("fwd_small", (331374592, 175128576, 103297024, 59777024, 47194112)),
    ("fwd_large", (None, 358617088, 72355840, 18354176, 5246976)),
    ("bwd_small", (843362304, 455159808, 275804160, 162803712, 133312512)),
    ("bwd_large", (None, 1444859904, 290869248, 72118272, 19279872)),
    ("bwd_two_pass", (None, 1266610176, 255750144, 63729664, 18239488)),
  ],
)
def test_reference_table(algorithm, words):
  got = [
    _total(algorithm, 4096, 64, cache)
    if cache >= minimum_cache(algorithm, head_dim=64)
    else None
    for cache in (256, 1024, 4096, 16384, 65536)
  ]
  assert tuple(got) == words


@pytest.mark.parametrize(
  ("n", "d", "cache", "words"),
  [(20, 6, 40, 9636), (33, 7, 60, 22978), (24, 8, 120, 10312)],
)
def test_words_of_the_papers_problem(n, d, cache, words):
  assert _total("train_small", n, d, cache) == words


@pytest.mark.parametrize(
  ("algorithm", "leading"),
  [
    ("fwd_large", lambda n, d, m: 4 * n**2 * d**2 / m),
    ("fwd_fa1", lambda n, d, m: 6 * n**2 * d**2 / m),
    ("bwd_large", lambda n, d, m: 16 * n**2 * d**2 / m),
    ("bwd_two_pass", lambda n, d, m: 14 * n**2 * d**2 / m),
    ("train_large", lambda n, d, m: (10 * n**2 * d**2 + 8 * n * d**3) / m),
    ("fwd_small", lambda n, d, m: 4 * n**2 * d / m**0.5 + n**2),
    ("matmul", lambda n, d, m: 2 * n**2 * d / m**0.5 + n**2),
    ("bwd_small", lambda n, d, m: 10 * n**2 * d / m**0.5 + 3 * n**2),
    (
      "train_small",
      lambda n, d, m: (8 * n**2 * d + 6 * n * d**2) / m**0.5 + 6 * n**2,
    ),
  ],
)
def test_leading_orders(algorithm, leading):
  # Far on its own side of d^2, where tiles divide a head: they are 2^10 wide.
  is_small = "small" in algorithm or algorithm == "matmul"
  n, d, cache = (2**22, 2**7, 2**16)
  if is_small:
    n, d, cache = (2**18, 2**12, 2**20 + 2**12)
  ratio = _total(algorithm, n, d, cache) / leading(n, d, cache)
  assert 1 < ratio < 1.03


def test_forward_words_of_one_tiling():
  count = io_count(
    "fwd_large", num_queries=64, num_keys=96, head_dim=8, cache_words=10_000,
    block_size=16,
  )  # fmt: skip
  assert (count.total, count.blocks) == (7232, (16,))


@pytest.mark.parametrize(
  ("algorithm", "shares", "low", "high"),
  [
    ("fwd_small", (1 / 45, 1 / 8), -0.56, -0.48),
    ("bwd_small", (1 / 45, 1 / 8), -0.56, -0.48),
    ("fwd_large", (2, 32), -1.02, -0.98),
    ("bwd_large", (2, 32), -1.02, -0.98),
  ],
)
def test_exponents(algorithm, shares, low, high):
  d = 128
  cache = np.geomspace(*(d**2 * s for s in shares), 24).astype(int)
  slope = float(fit_slope(cache, _total(algorithm, 2**17, d, cache)).slope)
  assert low <= slope <= high


@pytest.mark.parametrize(
  ("kind", "low", "high"), [("forward", 4, 6), ("backward", 12, 16)]
)
def test_best_is_within_a_constant_of_the_bound(kind, low, high):
  for power in range(8, 16):
    sizes = dict(
      num_queries=4096, num_keys=4096, head_dim=64, cache_words=2**power
    )
    _, count = best_algorithm(kind, **sizes)
    assert low <= count.total / io_lower_bound(kind, **sizes) <= high


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
  ("kind", "low", "high"), [("forward", 0.5, 0.8), ("backward", 0.9, 1.6)]
)
def test_crossovers_are_of_the_order_of_d_squared(kind, low, high, d):
  n = 2**17
  words = crossover(kind, num_queries=n, num_keys=n, head_dim=d)
  assert low <= words / d**2 <= high


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("shape", [(90, 70, 8), (7, 200, 5), (1, 1, 3)])
def test_crossover_by_trying_every_cache(kind, shape):
  nq, nk, d = shape
  sizes = dict(num_queries=nq, num_keys=nk, head_dim=d)
  large, _, small = _SCHEDULES[kind]
  least = minimum_cache(large, head_dim=d)
  cache = np.arange(least, 6000)
  worse = (
    io_count(large, cache_words=cache, **sizes).total
    > io_count(small, cache_words=cache, **sizes).total
  )
  want = cache[np.flatnonzero(worse)[-1] + 1] if worse.any() else least
  assert crossover(kind, **sizes) == want


@pytest.mark.parametrize(
  ("kind", "algorithm", "extra"),
  [
    # Backward, outputs are read, and their gradients twice, for D, which is
    # written and read.
    ("forward", "fwd_large", 0),
    ("backward", "bwd_large", 30 * 4 + 2 * 30),
  ],
)
def test_a_cache_for_everything_leaves_what_must_be_moved(
  kind, algorithm, extra
):
  sizes = dict(num_queries=30, num_keys=50, head_dim=4)
  words = io_count(algorithm, cache_words=10**6, **sizes).total
  assert words == compulsory_words(kind, **sizes) + extra


def test_decoding_reads_the_keys_and_values_once():
  d, keys = 16, 1000
  sizes = dict(num_queries=1, num_keys=keys, head_dim=d)
  for cache in (4 * d + 3, 500, 10**6):
    words = io_count("fwd_large", cache_words=cache, **sizes).total
    assert words == 2 * d + 1 + 2 * keys * d


def test_outputs_that_come_back_pay_with_two_blocks_against_three_alone():
  n = np.array([64, 256, 4096])[:, None, None]
  d = np.array([1, 5, 8, 64, 128])[None, :, None]
  cache = np.geomspace(600, 10**6, 200).astype(int)[None, None]
  sizes = dict(num_queries=n, num_keys=n, head_dim=d, cache_words=cache)
  first, second = (io_count(f"fwd_{x}", **sizes) for x in ("fa1", "large"))
  keys, queries = (-(-n // count.blocks[0]) for count in (first, second))
  apart = (keys > 1) & (queries > 1)
  assert apart.sum() > 300
  # One more block of queries costs 2 n d words; with T blocks of both, outputs
  # cost n (d (T - 1) + 4 T - 3) more. FlashAttention-1 holds a few keys more.
  pays = (keys == 2) & (queries == 3) & (d > 5)
  assert pays.sum() > 5
  np.testing.assert_array_equal(
    (first.total < second.total) & apart, np.broadcast_to(pays, apart.shape)
  )


@pytest.mark.parametrize("algorithm", _ALL)
def test_arrays_are_counted_as_their_elements(algorithm):
  rng = np.random.default_rng(0)
  nq, nk = rng.integers(1, 200, (2, 20, 1))
  d, cache = rng.integers(1, 20, 5), rng.integers(150, 3000, (20, 5))
  got = io_count(
    algorithm, num_queries=nq, num_keys=nk, head_dim=d, cache_words=cache
  )
  for i, j in np.ndindex(20, 5):
    want = io_count(
      algorithm,
      num_queries=int(nq[i, 0]),
      num_keys=int(nk[i, 0]),
      head_dim=int(d[j]),
      cache_words=int(cache[i, j]),
    )
    assert (got.reads[i, j], got.writes[i, j]) == want[:2]
    assert tuple(b[i, j] for b in got.blocks) == want.blocks
    assert got.peak[i, j] == want.peak <= cache[i, j]


@pytest.mark.parametrize("algorithm", _ALL)
def test_one_word_less_than_the_least_is_refused(algorithm):
  for d in (1, 6, 64):
    least = minimum_cache(algorithm, head_dim=d)
    assert _total(algorithm, 100, d, least) > 0
    message = f"{algorithm} needs at least {least} words for head_dim {d}, got "
    with pytest.raises(ValueError, match=f"{message}{least - 1}$"):
      _total(algorithm, 100, d, least - 1)
  message = "64 words|head_dim 64, got 4$"
  with pytest.raises(ValueError, match=message):
    _total(algorithm, 100, np.array([1, 64]), np.array([5000, 4]))


@pytest.mark.parametrize("kind", ["forward", "backward", "train"])
def test_best_is_the_least_of_those_that_fit(kind):
  sizes = dict(num_queries=300, num_keys=200, head_dim=8)
  names = set()
  for cache in (5, 40, 100, 1000, 10**5):
    name, count = best_algorithm(kind, cache_words=cache, **sizes)
    totals = {
      other: io_count(other, cache_words=cache, **sizes).total
      for other in _SCHEDULES[kind]
      if minimum_cache(other, head_dim=8) <= cache
    }
    assert count.total == totals[name] == min(totals.values())
    names.add(name)
  assert len(names) > 1
  assert not isinstance(count.total, np.ndarray)


# --- block sizes ---


@pytest.mark.parametrize(("cache", "d"), [(800, 8), (5000, 16), (20000, 64)])
def test_exact_blocks_are_the_best_that_fit(cache, d):
  blocks = block_sizes(cache, d, kind="exact")
  count = io_count(
    "fwd_large", num_queries=10**5, num_keys=10, head_dim=d, cache_words=cache
  )
  assert ((blocks.block_q,), blocks.block_k) == (count.blocks, 1)
  # Backward, by trying all pairs.
  q, k = np.mgrid[1:400, 1:400]
  first = 4 * k * d + 2 * q * d + 2 * q + 2 * q * k
  second = 3 * q * d + 2 * q + 2 * k * d + 2 * q * k
  fits = np.maximum(first, second) <= cache
  best = (1 / q + 1 / k)[fits].min()
  got = blocks.block_q_bwd, blocks.block_k_bwd
  assert fits[got[0] - 1, got[1] - 1]
  np.testing.assert_allclose(1 / got[0] + 1 / got[1], best, rtol=1e-12)


@pytest.mark.parametrize(
  ("kind", "tile_q", "tile_k"), [("tpu", 8, 128), ("gpu", 16, 16)]
)
def test_blocks_are_tiles_that_fit(kind, tile_q, tile_k):
  d = 64
  for cache in (58_000, 120_000, 4_000_000):
    b = block_sizes(cache, d, kind=kind)
    assert b.block_q % tile_q == b.block_q_bwd % tile_q == 0
    assert b.block_k % tile_k == b.block_k_bwd % tile_k == 0
    words = 2 * b.block_q * (d + 1) + b.block_k * (2 * d + b.block_q)
    assert words <= cache
    q, k = b.block_q_bwd, b.block_k_bwd
    assert 4 * k * d + 2 * q * d + 2 * q + 2 * q * k <= cache
    assert 3 * q * d + 2 * q + 2 * k * d + 2 * q * k <= cache


# --- what is refused ---


def _count(**changes):
  sizes = dict(
    algorithm="fwd_large", num_queries=8, num_keys=8, head_dim=4,
    cache_words=100,
  )  # fmt: skip
  return io_count(**{**sizes, **changes})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"algorithm": "flash"}, "algorithm must be one of .*, got 'flash'"),
    ({"num_queries": 0}, "num_queries must be a positive integer.*got 0"),
    ({"num_keys": -1}, "num_keys must be a positive integer.*got -1"),
    ({"head_dim": 4.0}, r"head_dim must be a positive integer.*got 4\.0"),
    ({"cache_words": True}, "cache_words must be a positive .*got True"),
    ({"num_queries": 2**30, "num_keys": 2**30}, "at most 2.57.*got 4.61e"),
    ({"block_size": 9}, "block 8 needs 96 words, cache has 90"),
    ({"block_size": (2, 2)}, r"one size or a tuple of 1, got \(2, 2\)"),
    ({"block_size": 0}, "block_size must be a positive integer"),
  ],
)
def test_count_refuses(changes, message):
  if changes == {"block_size": 9}:
    changes = {**changes, "cache_words": 90}
  with pytest.raises(ValueError, match=message):
    _count(**changes)


def test_two_pass_takes_a_block_for_each_pass():
  both = _count(algorithm="bwd_two_pass", block_size=2).total
  assert both == _count(algorithm="bwd_two_pass", block_size=(2, 2)).total
  assert both < _count(algorithm="bwd_two_pass", block_size=(2, 1)).total
  message = "block 8 needs 136 words, cache has 100"
  with pytest.raises(ValueError, match=message):
    _count(algorithm="bwd_two_pass", block_size=(2, 8))


def test_others_refuse():
  sizes = dict(num_queries=8, num_keys=8, head_dim=4)
  with pytest.raises(ValueError, match=r"kind must be one of .*got 'product'"):
    best_algorithm("product", cache_words=100, **sizes)
  with pytest.raises(ValueError, match="fwd_small needs at least 5 words"):
    best_algorithm("forward", cache_words=4, **sizes)
  with pytest.raises(ValueError, match="cache_words must be >= 1, got 0"):
    best_algorithm("forward", cache_words=0, **sizes)
  with pytest.raises(ValueError, match=r"kind must be one of .*got 'train'"):
    crossover("train", **sizes)
  with pytest.raises(ValueError, match="head_dim must be >= 1, got 0"):
    crossover("forward", **{**sizes, "head_dim": 0})
  with pytest.raises(ValueError, match="algorithm must be one of"):
    minimum_cache("flash", head_dim=4)
  with pytest.raises(ValueError, match="head_dim must be a positive integer"):
    minimum_cache("fwd_large", head_dim=0)
  message = "at least 35856 for head_dim 64 and kind 'tpu', got 1000"
  with pytest.raises(ValueError, match=message):
    block_sizes(1000, 64, kind="tpu")
  with pytest.raises(ValueError, match=r"kind must be one of .*got 'cpu'"):
    block_sizes(1000, 64, kind="cpu")
