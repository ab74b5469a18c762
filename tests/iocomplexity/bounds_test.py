"""Lower bounds, and the least that any schedule of a small graph moves."""

import math

import numpy as np
import pytest

from jaxattn.iocomplexity import (
  compulsory_words,
  io_lower_bound,
  minimum_cache,
  pebble_optimum,
  simulate,
)

_SIZES = {"num_queries": 512, "num_keys": 512, "head_dim": 16}


@pytest.mark.parametrize("cache", [64, 256, 4096])
def test_bounds_are_the_papers(cache):
  n, d = 512, 16
  forward = io_lower_bound("forward", cache_words=cache, **_SIZES)
  root = math.sqrt(cache)
  assert forward == min(n**2 * d**2 / cache, n**2 * d / root)
  for kind in ("backward", "train"):
    bound = io_lower_bound(kind, cache_words=cache, **_SIZES)
    large = (n**2 * d**2 + n * d**3) / cache
    assert bound == min(large, (n**2 * d + n * d**2) / root)
  # Dense inputs are a limit of sparse ones.
  sparse = io_lower_bound(
    "forward", cache_words=cache, nnz_inputs=n * d, nnz_scores=n**2, **_SIZES
  )
  assert sparse == forward
  few = io_lower_bound(
    "backward", cache_words=cache, nnz_inputs=100, nnz_scores=64, **_SIZES
  )
  assert few == min(100**2 / cache, 800 / root)


def test_the_two_bounds_meet_at_d_squared():
  n, d = 512, 16
  below, above = (
    io_lower_bound("forward", cache_words=c, **_SIZES)
    for c in (d**2 - 1, d**2 + 1)
  )
  assert below == n**2 * d / math.sqrt(d**2 - 1)
  assert above == n**2 * d**2 / (d**2 + 1)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"kind": "both"}, "kind must be one of 'forward', 'backward', 'train'"),
    ({"num_keys": 0}, "num_keys must be >= 1, got 0"),
    ({"cache_words": 0.5}, r"cache_words must be an integer .*got 0\.5"),
    ({"nnz_inputs": 5}, "must be given together, got 5 and None"),
    ({"nnz_inputs": 9000, "nnz_scores": 5}, r"nnz_inputs must be in \[1, 8192"),
    ({"nnz_inputs": 9, "nnz_scores": 2**20}, r"nnz_scores must be in \[1, 262"),
    (
      {"kind": "train", "nnz_inputs": 9, "nnz_scores": 9},
      'no bound with nonzeros for kind "train"',
    ),
  ],
)
def test_bound_refuses(changes, message):
  with pytest.raises(ValueError, match=message):
    io_lower_bound(
      **{"kind": "forward", "cache_words": 64, **_SIZES, **changes}
    )


def test_compulsory_words_are_inputs_and_outputs():
  # 3 queries, 5 keys, size 2.
  sizes = {"num_queries": 3, "num_keys": 5, "head_dim": 2}
  q, k, x = 6, 10, 4
  assert compulsory_words("forward", **sizes) == 2 * q + 2 * k + 3
  assert compulsory_words("backward", **sizes) == 4 * q + 4 * k + 3
  assert compulsory_words("train", **sizes) == 2 * q + 2 * k + 3 * x
  with pytest.raises(ValueError, match="kind must be one of"):
    compulsory_words("product", **sizes)
  with pytest.raises(ValueError, match="head_dim must be"):
    compulsory_words("forward", **{**sizes, "head_dim": 0})


# --- pebbles ---

# (2, 1) by (1, 2).
_PRODUCT = {
  "a1": (), "a2": (), "b1": (), "b2": (),
  "c11": ("a1", "b1"), "c12": ("a1", "b2"),
  "c21": ("a2", "b1"), "c22": ("a2", "b2"),
}  # fmt: skip
# One query, two keys, head size 1.
_ATTENTION = {
  "q": (), "k1": (), "k2": (), "v1": (), "v2": (),
  "s1": ("q", "k1"), "s2": ("q", "k2"),
  "lse": ("s1", "s2"), "out": ("s1", "s2", "v1", "v2"),
}  # fmt: skip


def test_no_schedule_beats_the_optimum():
  ones = np.ones((2, 1))
  _, count = simulate("matmul", {"left": ones, "right": ones.T}, cache_words=5)
  assert 8 <= pebble_optimum(_PRODUCT, 5) <= count.total == 12
  arrays = {"query": ones[:1], "key": ones, "value": ones}
  sizes = {"num_queries": 1, "num_keys": 2, "head_dim": 1}
  compulsory = compulsory_words("forward", **sizes)
  for algorithm in ("fwd_large", "fwd_small"):
    cache = minimum_cache(algorithm, head_dim=1)
    _, count = simulate(algorithm, arrays, cache_words=cache)
    optimum = pebble_optimum(_ATTENTION, cache)
    assert compulsory <= optimum <= count.total
    assert optimum == compulsory


def test_optimum_by_hand():
  # A chain keeps one word; with two red pebbles nothing is read again.
  chain = {0: (), 1: (0,), 2: (1,), 3: (2,)}
  assert pebble_optimum(chain, 2) == 2
  # With three, one factor of a product comes twice; and less room never helps.
  costs = [pebble_optimum(_PRODUCT, m) for m in (3, 4, 5, 8)]
  assert costs == [9, 8, 8, 8]
  # A sum of three in three steps, whose first is wanted twice.
  shared = {
    "x": (), "y": (), "z": (),
    "xy": ("x", "y"), "xyz": ("xy", "z"), "xz": ("x", "z"),
  }  # fmt: skip
  # Three inputs, two outputs: with three pebbles the input x is read again, or
  # z is.
  assert pebble_optimum(shared, 4) == 5
  assert pebble_optimum(shared, 3) == 6


@pytest.mark.parametrize(
  ("dag", "cache", "message"),
  [
    ({}, 3, "dag must have 1 to 12 vertices, got 0"),
    (dict.fromkeys(range(13), ()), 3, "1 to 12 vertices, got 13"),
    ({"a": ("b",)}, 3, "predecessor 'b' of 'a' is no vertex of dag"),
    ({"a": ("b",), "b": ("a",)}, 3, "dag must have no cycle"),
    (_PRODUCT, 2, "at least 3, a vertex with its predecessors, got 2"),
    (_PRODUCT, 0, "cache_words must be"),
  ],
)
def test_pebbles_refuse(dag, cache, message):
  with pytest.raises(ValueError, match=message):
    pebble_optimum(dag, cache)
