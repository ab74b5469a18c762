"""Limits of long prefixes: against prefixes that are long."""

import functools
import re

import jax
import numpy as np
import pytest

from jaxattn.ntk import (
  PrefixContext,
  prefix_limit_kernel,
  prefix_ntk,
  prefix_output,
  required_length,
  tied_prefix_init,
  tied_prefix_limit_kernel,
  tied_prefix_ntk,
  tied_prefix_output,
)
from jaxattn.scaling import fit_slope
from tests.ntk._prefix import BIAS, D, N, V, context, prefix, queries

_STD, _VALUE_STD = 0.6, 0.9
_LIMIT = functools.partial(
  prefix_limit_kernel, key_std=_STD, value_std=_VALUE_STD
)


def _gap(kernel, limit):
  return np.linalg.norm(kernel - limit) / np.linalg.norm(limit)


def _wide(factor, size=V):
  return np.einsum("ij,lk->iljk", factor, np.eye(size))


def test_untied_kernel_tends_to_its_limit():
  x, pairs = queries(), context()
  limit = _LIMIT(x, None, pairs, prefix_bias=BIAS)
  lengths, gaps, outputs = [2**10, 2**12, 2**14], [], []
  for m in lengths:
    # Medians: weights are log-normal.
    rows = []
    for seed in range(5):
      keys = prefix(m, key_std=_STD, value_std=_VALUE_STD, seed=seed)
      kernel = prefix_ntk(*keys, x, None, pairs, prefix_bias=BIAS)
      rows.append(_gap(kernel, limit))
    gaps.append(np.median(rows))
    outputs.append(prefix_output(*keys, x, pairs, prefix_bias=BIAS))
  assert gaps[1] < 0.04
  assert -0.65 < fit_slope(lengths, gaps).slope < -0.35
  # Outputs tend to what the context alone would give, times its share.
  logits = np.einsum("nd,nld->nl", x, pairs[0])
  own = np.exp(BIAS + _STD**2 * (x**2).sum(1) / 2)
  total = own + np.exp(logits).sum(1)
  rest = np.einsum("nl,nlv->nv", np.exp(logits), pairs[1]) / total[:, None]
  np.testing.assert_allclose(outputs[-1], rest, rtol=0, atol=0.02)


def test_tied_kernel_tends_to_its_limit():
  x = queries()
  limit = tied_prefix_limit_kernel(x, sigma=_STD)
  assert limit.shape == (N, D, N, D)
  lengths, gaps = [2**10, 2**12, 2**14], []
  for m in lengths:
    rows = []
    for seed in range(5):
      w, a = tied_prefix_init(
        jax.random.key(seed), m, D, sigma=_STD, dtype="float64"
      )
      rows.append(_gap(tied_prefix_ntk(w, a, x), limit))
    gaps.append(np.median(rows))
  assert gaps[-1] < 0.03
  assert -0.65 < fit_slope(lengths, gaps).slope < -0.3
  np.testing.assert_allclose(tied_prefix_output(w, a, x), 0, atol=1e-15)
  # Outputs of the first data come first: no symmetry hides a swap here.
  other = queries(N + 1, seed=3)
  block = tied_prefix_limit_kernel(x, other, sigma=_STD)
  assert _gap(tied_prefix_ntk(w, a, x, other), block) < 0.03
  assert _gap(np.swapaxes(block, 1, 3), block) > 0.1
  both = tied_prefix_limit_kernel(np.concatenate((x, other)), sigma=_STD)
  np.testing.assert_allclose(block, both[:N, :, N:], rtol=0, atol=1e-15)


def test_columns_come_in_pairs_or_alone():
  w, a = tied_prefix_init(jax.random.key(0), 2000, D, sigma=_STD)
  np.testing.assert_array_equal(w[:1000], w[1000:])
  np.testing.assert_array_equal(a[:1000], -a[1000:])
  assert abs(np.std(w) / _STD - 1) < 5 / np.sqrt(2 * 1000 * D)
  w, a = tied_prefix_init(jax.random.key(0), 2001, D, paired=False)
  assert w.shape == (2001, D)
  assert (w[:1000] != w[1000:2000]).all()
  assert set(np.unique(a)) == {-1, 1}
  assert abs(np.mean(a)) < 5 / np.sqrt(2001)


def test_without_context_the_kernel_is_one_factor():
  x, other = queries(), queries(N + 1, seed=3)
  gram = x @ other.T
  weight = np.exp(_STD**2 * gram)
  for train, want in (
    (("key", "value"), weight * (1 + _VALUE_STD**2 * gram)),
    (("key",), weight * _VALUE_STD**2 * gram),
    (("value",), weight),
  ):
    got = _LIMIT(x, other, train=train)
    np.testing.assert_allclose(got, want, rtol=1e-13)
    # A context of no weight is none, and a bias has nothing to compete with.
    far = _LIMIT(
      x, other, context(), context(N + 1), train=train, prefix_bias=60.0
    )
    np.testing.assert_allclose(far, _wide(want), rtol=0, atol=1e-12)
  same = _LIMIT(x, other, prefix_bias=BIAS, count_normalized=False)
  np.testing.assert_allclose(same, _LIMIT(x, other), rtol=1e-15)


def test_parts_add_up_and_blocks_are_those_of_all_data():
  x, pairs = queries(), context()
  both = _LIMIT(x, None, pairs)
  parts = sum(_LIMIT(x, None, pairs, train=(n,)) for n in ("key", "value"))
  np.testing.assert_allclose(parts, both, rtol=0, atol=1e-15)
  first, last = ([y[part] for y in pairs] for part in (slice(1), slice(1, N)))
  block = _LIMIT(x[:1], x[1:], tuple(first), tuple(last))
  np.testing.assert_allclose(block, both[:1, :, 1:], rtol=0, atol=1e-15)


def test_degenerate_kernels():
  x, pairs = queries(), context()
  # All values are equal: moving keys changes nothing.
  key, _ = prefix()
  equal = np.zeros((len(key), V))
  for kernel in (
    prefix_ntk(key, equal, x, train=("key",)),
    _LIMIT(x, value_std=0.0, train=("key",)),
  ):
    np.testing.assert_array_equal(kernel, 0)
  # A query of 0 weighs all keys alike, and does not move them.
  none = np.zeros_like(x)
  share = 1 / (1 + pairs[0].shape[1])
  want = _wide(np.full((N, N), share**2))
  np.testing.assert_allclose(_LIMIT(none, None, pairs), want, rtol=1e-14)
  np.testing.assert_allclose(
    prefix_ntk(*prefix(), none, None, pairs), want, rtol=0, atol=1e-14
  )
  # A bias far below switches the prefix off.
  far = _LIMIT(x, None, pairs, prefix_bias=-30.0)
  assert np.abs(far).max() < 1e-6


def test_weights_out_of_range_make_a_kernel_that_is_not():
  # exp(100) is no number in float32, half of it twice is 1.
  x = np.full((1, 4), 5.0, np.float32)
  far = PrefixContext(np.zeros((1, V), np.float32), np.float32([100.0]))
  kernel = prefix_limit_kernel(x, None, far, train=("value",))
  np.testing.assert_allclose(
    kernel[0, :, 0], np.eye(V, dtype=np.float32), rtol=1e-5
  )


def test_kernel_is_strictly_positive_for_distinct_data():
  x = queries(12, low=1.0, high=1.0, dim=6, seed=9)
  rng = np.random.default_rng(0)
  pairs = rng.standard_normal((12, 4, 6)), rng.standard_normal((12, 4, V))
  limit = prefix_limit_kernel(x, None, pairs)
  eigenvalues = np.linalg.eigvalsh(np.reshape(limit, (12 * V, -1)))
  assert eigenvalues[0] > 1e-3 * eigenvalues[-1]
  # Of two data that are one, a difference is not seen.
  twice = np.tile(x, (2, 1)), tuple(np.tile(y, (2, 1, 1)) for y in pairs)
  limit = prefix_limit_kernel(twice[0], None, twice[1])
  eigenvalues = np.linalg.eigvalsh(np.reshape(limit, (24 * V, -1)))
  assert abs(eigenvalues[0]) < 1e-12 * eigenvalues[-1]


def test_required_length():
  lengths = np.array([64, 256, 1024, 4096])
  exact = required_length(lengths, 3 / np.sqrt(lengths), 0.1)
  assert exact.length == 901
  assert exact.interval == (901, 901)
  np.testing.assert_allclose(exact.slope, -0.5)
  # Noise of 5 %: the interval holds the truth in 95 of 100 draws.
  rng = np.random.default_rng(0)
  held = 0
  for _ in range(200):
    noise = np.exp(0.05 * rng.standard_normal(4))
    low, high = required_length(lengths, 3 / np.sqrt(lengths) * noise, 0.1)[1]
    held += low <= 901 <= high
  # 190 expected, standard deviation 3.
  assert 175 < held


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda x: prefix_limit_kernel(x, None, context(), count_normalized=False),
      "prefix_limit_kernel: without normalization the context vanishes as "
      "length grows; pass context=None or count_normalized=True",
    ),
    (
      lambda x: prefix_limit_kernel(x, key_std=-1.0),
      "key_std must be non-negative, got -1.0",
    ),
    (
      lambda x: prefix_limit_kernel(x, value_std=np.ones(2)),
      "value_std must be a real scalar",
    ),
    (
      lambda x: prefix_limit_kernel(x, train=()),
      "train must be one of ('key', 'value'), ('key',), ('value',), got ()",
    ),
    (
      lambda x: prefix_limit_kernel(x, prefix_bias=np.nan),
      "prefix_bias must be in (-inf, inf), got nan",
    ),
    (
      lambda x: prefix_limit_kernel(x, x, context(), _other_values()),
      "context2 must have values of size 2, as the prefix has, got 3",
    ),
    (
      lambda x: prefix_limit_kernel(x, x[:, :2]),
      "x2 must have shape (*, 3) = (n, d), got (4, 2)",
    ),
    (
      lambda x: tied_prefix_limit_kernel(x, x[:, :2]),
      "x2 must have shape (*, 3) = (n, d), got (4, 2)",
    ),
    (
      lambda x: tied_prefix_limit_kernel(x, sigma=-1.0),
      "sigma must be non-negative, got -1.0",
    ),
    (
      lambda x: tied_prefix_init(jax.random.key(0), 5, 2),
      "length must be even for paired columns, got 5",
    ),
    (
      lambda x: tied_prefix_init(jax.random.key(0), 0, 2),
      "length must be >= 1, got 0",
    ),
    (
      lambda x: tied_prefix_init(jax.random.key(0), 4, 2, sigma=-1.0),
      "sigma must be non-negative, got -1.0",
    ),
    (
      lambda x: required_length([1, 2, 4], [1, 2, 4], 0.1),
      "gaps must fall with length, got a slope of 1",
    ),
    (
      lambda x: required_length([1, 2], [1, 0.5], 0.1),
      "x must be a vector of at least 3 numbers, got shape (2,)",
    ),
    (
      lambda x: required_length([1, 2, 4], [4, 2, 1], 0.0),
      "tol must be positive, got 0.0",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call(queries())


def _other_values():
  return context()[0], np.ones((N, 5, V + 1))
