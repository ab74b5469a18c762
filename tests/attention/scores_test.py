"""Sparsity statistics against dense formulas, and theory against samples."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import stats

from jaxattn import _compat
from jaxattn.attention import scores
from tests._recompile import no_recompilation, quick_jit


def _sorted_rows(rows, n, rng=0):
  """Standard normal logits (rows, n) in descending order."""
  z = np.random.default_rng(rng).standard_normal((rows, n), np.float32)
  return -np.sort(-z, axis=-1)


def _weights(logits):
  """Softmax of descending rows, and its cumulative sum, in float64."""
  weights = np.exp((logits - logits[:, :1]).astype(np.float64))
  weights /= weights.sum(-1, keepdims=True)
  return weights, np.cumsum(weights, -1)


# --- the Gaussian law against samples (n = 65536, 200 rows) ---


@functools.cache
def _samples():
  return _sorted_rows(200, 65536)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("sigma", "t", "eps"), [(0.5, 4, 0.1), (1, 4, 0.01), (2, 16, 0.1)]
)
def test_gaussian_row_against_samples(sigma, t, eps):
  n = 65536
  weights, mass = _weights(sigma * _samples())

  count = (weights > t / n).sum(-1).mean()
  expected = scores.gaussian_count_above(sigma, n, t)
  # Below a hundred only the order of magnitude is asked for.
  np.testing.assert_allclose(count, expected, rtol=0.03 if count > 100 else 0.1)

  ks = np.array([n // 100, n // 10, n // 2])
  np.testing.assert_allclose(
    mass[:, ks - 1].mean(0),
    scores.gaussian_topk_mass(sigma, n, ks),
    atol=3e-3,
  )

  budget = ((1 - mass) > eps).sum(-1).mean() + 1
  np.testing.assert_allclose(
    budget, scores.gaussian_budget(sigma, n, eps), rtol=0.03
  )


@pytest.mark.parametrize(
  ("fn", "sigma", "x", "expected"),
  [
    (scores.gaussian_count_above, 1.0, 4.0, 1941.7),
    (scores.gaussian_count_above, 2.0, 16.0, 557.7),
    (scores.gaussian_count_above, 0.5, 4.0, 82.1),
    (scores.gaussian_count_above, 2.0, 1.0, 10398),
    (scores.gaussian_topk_mass, 1.0, 655.36, 0.0924),
    (scores.gaussian_topk_mass, 1.0, 6553.6, 0.3891),
    (scores.gaussian_topk_mass, 1.0, 32768, 0.8413),
    (scores.gaussian_topk_mass, 2.0, 655.36, 0.3721),
    (scores.gaussian_budget, 0.5, 0.1, 51299),
    (scores.gaussian_budget, 1.0, 0.01, 59483),
    (scores.gaussian_budget, 2.0, 0.1, 15482),
    (scores.gaussian_budget, 2.0, 0.01, 41151),
  ],
)
def test_published_values(fn, sigma, x, expected):
  # All digits that are printed.
  np.testing.assert_allclose(fn(sigma, 65536, x), expected, rtol=5e-4)


# --- closed forms ---


def test_closed_forms_against_scipy_in_both_tails():
  sigma = np.array([0.1, 0.5, 1, 3, 8])[:, None]
  n = 1e6
  t = np.array([1e-6, 0.5, 1, 40, 1e5])[None]
  want = n * stats.norm.sf((np.log(t) + sigma**2 / 2) / sigma)
  got = scores.gaussian_count_above(sigma, n, t)
  np.testing.assert_allclose(got, want, rtol=1e-8)
  chernoff = n * np.exp(-((np.log(t) + sigma**2 / 2) ** 2) / (2 * sigma**2))
  assert (got <= np.where(np.log(t) > -(sigma**2) / 2, chernoff, n)).all()

  k = np.array([1, 10, 1e3, 5e5, 1e6])[None]
  want = stats.norm.cdf(sigma - stats.norm.isf(k / n))
  got = scores.gaussian_topk_mass(sigma, n, k)
  np.testing.assert_allclose(got, want, rtol=1e-9)

  eps = np.array([1e-12, 1e-3, 0.5, 0.999])[None]
  want = n * stats.norm.sf(sigma + stats.norm.ppf(eps))
  got = scores.gaussian_budget(sigma, n, eps)
  np.testing.assert_allclose(got, want, rtol=1e-9)
  # A budget keeps the mass that it was asked for.
  inside = (got >= 1) & (eps > 1e-9)
  tail = 1 - scores.gaussian_topk_mass(sigma, n, np.clip(got, 1, n))
  np.testing.assert_allclose(
    np.where(inside, tail, 1), np.where(inside, eps, 1), rtol=1e-4
  )


@pytest.mark.any_x64
def test_float32_keeps_the_tails():
  sigma, n = np.float32(6), np.float32(2**20)
  got = scores.gaussian_count_above(sigma, n, np.float32(2**19))
  z = (math.log(2**19) + 18) / 6
  np.testing.assert_allclose(got, 2**20 * stats.norm.sf(z), rtol=1e-3)
  got = scores.gaussian_topk_mass(np.float32(0.1), n, np.float32(1))
  want = stats.norm.cdf(0.1 - stats.norm.isf(2**-20))
  np.testing.assert_allclose(got, want, rtol=1e-3)
  got = scores.gaussian_budget(sigma, n, np.float32(1e-6))
  want = 2**20 * stats.norm.sf(6 + stats.norm.ppf(1e-6))
  np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.any_x64
def test_equal_logits_are_the_limit_of_no_spread():
  np.testing.assert_array_equal(
    scores.gaussian_count_above(0.0, 50, jnp.array([0.99, 1.01])), [50, 0]
  )
  np.testing.assert_allclose(
    scores.gaussian_topk_mass(0.0, 50, jnp.array([1, 20, 50])),
    [0.02, 0.4, 1],
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    scores.gaussian_budget(0.0, 50, 0.1), 45, rtol=1e-5
  )
  slope = jax.grad(scores.gaussian_count_above)
  assert jnp.isfinite(jax.vmap(lambda s: slope(s, 50.0, 2.0))(jnp.zeros(1)))


def test_gradients_against_differences():
  step = 1e-5
  for fn, x in (
    (scores.gaussian_count_above, 4.0),
    (scores.gaussian_topk_mass, 30.0),
    (scores.gaussian_budget, 0.1),
  ):
    for i, args in enumerate([(1.5, 1000.0, x)] * 3):
      up = [a + step * (i == j) for j, a in enumerate(args)]
      down = [a - step * (i == j) for j, a in enumerate(args)]
      want = (fn(*up) - fn(*down)) / (2 * step)
      got = jax.jit(jax.grad(fn, i))(*args)
      np.testing.assert_allclose(got, want, rtol=1e-5)


def test_exponent_is_the_limit_of_the_slope_of_the_budget():
  s = np.array([0.25, 0.5, 0.8, 1.0, 1.2, math.sqrt(2), 3])
  want = [0.96875, 0.875, 0.68, 0.5, 0.28, 0, 0]
  np.testing.assert_allclose(scores.gaussian_exponent(s), want, atol=1e-15)
  # The slope approaches it like 1 / log n; with it 2^500 is still 0.002 away.
  log_n = np.log(2.0) * np.array([500.0, 500.5])
  budget = log_n + stats.norm.logsf(s[:5, None] * np.sqrt(log_n))
  slope = np.diff(budget)[:, 0] / np.diff(log_n)
  np.testing.assert_allclose(slope, want[:5], atol=2e-3)


def test_row_sigma_is_the_spread_of_the_logits():
  rng = np.random.default_rng(0)
  d, h, n = 24, 8, 20000
  w_query, w_key = rng.standard_normal((2, d, h))
  x = rng.standard_normal((2, 5, d))
  sigma = scores.row_sigma(x, w_query, w_key)
  assert sigma.shape == (2, 5)
  fresh = rng.standard_normal((n, d)) @ w_key
  logits = np.einsum("bth,nh->btn", x @ w_query, fresh) / math.sqrt(h)
  np.testing.assert_allclose(logits.std(-1), sigma, rtol=0.02)
  for row, spread in zip(logits.reshape(-1, n), np.ravel(sigma), strict=True):
    assert stats.kstest(row / spread, "norm").pvalue > 1e-3
  np.testing.assert_allclose(
    scores.row_sigma(x, w_query, w_key, scale=-1), sigma * math.sqrt(h)
  )


# --- measured profiles ---


def _inputs(t, s, *, n=4, kv=2, h=6, batch=(2,), dtype="float64"):
  rng = np.random.default_rng(0)
  query = 3 * rng.standard_normal((*batch, t, n, h))
  return query.astype(dtype), rng.standard_normal((*batch, s, kv, h), dtype)


def _dense_profile(query, key, t, k, seen, scale):
  """(B, N, T, ...) statistics, row by row."""
  key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
  logits = scale * np.einsum("btnh,bsnh->bnts", query, key)
  fields = []
  for row, visible in zip(
    logits.reshape(-1, logits.shape[-1]),
    np.broadcast_to(seen, logits.shape).reshape(-1, logits.shape[-1]),
    strict=True,
  ):
    x = row[visible]
    lse = np.logaddexp.reduce(x)
    p = np.sort(np.exp(x - lse))[::-1]
    spread = x.std() > 1e-12
    fields.append(
      np.concatenate(
        [
          [x.mean(), x.std()],
          [stats.skew(x), stats.kurtosis(x)] if spread else [0, 0],
          [lse, x.max()],
          [(p > level / x.size).sum() for level in t],
          [p[:size].sum() for size in k],
        ]
      )
    )
  table = np.array(fields).reshape(*logits.shape[:3], -1)
  return np.split(table, [1, 2, 3, 4, 5, 6, 6 + len(t)], -1)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 16])
def test_profile_against_dense(is_causal, chunk_size):
  query, key = _inputs(11, 37)
  rng = np.random.default_rng(1)
  mask = rng.random((2, 1, 11, 37)) < 0.7
  mask[..., 0] = True
  t, k = (0.2, 1.0, 5.0), (1, 8, 30)
  got = scores.sparsity_profile(
    query, key, t=t, k=k, mask=mask, is_causal=is_causal, scale=0.7,
    chunk_size=chunk_size,
  )  # fmt: skip
  seen = mask & np.tri(11, 37, dtype=bool) if is_causal else mask
  want = _dense_profile(query, key, t, k, seen, 0.7)
  for name, g, w in zip(got._fields, got, want, strict=True):
    w = w if name in ("count_above", "topk_mass") else w[..., 0]
    # Moments of a row of two keys lose digits to cancellation.
    np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.any_x64
def test_profile_of_gaussian_rows_is_as_predicted():
  n, sigma = 5000, 1.5
  rng = np.random.default_rng(2)
  query = rng.standard_normal((40, 1, 64)).astype(np.float32)
  query *= sigma * 8 / np.linalg.norm(query, axis=-1, keepdims=True)
  key = rng.standard_normal((n, 1, 64), np.float32)
  got = scores.sparsity_profile(query, key, t=(1.0, 4.0), k=(50, 500, 2500))
  assert got.std.shape == (1, 40)
  np.testing.assert_allclose(got.std, sigma, rtol=0.06)
  np.testing.assert_allclose(got.skew, 0, atol=0.15)
  np.testing.assert_allclose(got.kurtosis, 0, atol=0.4)
  lse = math.log(n) + sigma**2 / 2
  np.testing.assert_allclose(got.lse.mean(), lse, rtol=5e-3)
  np.testing.assert_allclose(
    got.count_above.mean((0, 1)),
    scores.gaussian_count_above(sigma, n, jnp.array([1.0, 4.0])),
    rtol=0.03,
  )
  np.testing.assert_allclose(
    got.topk_mass.mean((0, 1)),
    scores.gaussian_topk_mass(sigma, n, jnp.array([50, 500, 2500])),
    atol=0.01,
  )


@pytest.mark.any_x64
def test_profile_of_equal_logits():
  query, key = (
    np.full((3, 2, 4), 0.3, "float32"),
    np.ones((50, 1, 4), "float32"),
  )
  got = scores.sparsity_profile(
    query, key, t=(0.99, 1.01), k=(1, 20, 50), chunk_size=16
  )
  np.testing.assert_array_equal(got.count_above[..., 0], 50)
  np.testing.assert_array_equal(got.count_above[..., 1], 0)
  np.testing.assert_allclose(got.mean, 0.6, rtol=1e-6)
  np.testing.assert_allclose(got.std, 0, atol=1e-6)
  np.testing.assert_array_equal(got.skew, 0)
  np.testing.assert_array_equal(got.kurtosis, 0)
  want = np.broadcast_to([0.02, 0.4, 1], (2, 3, 3))
  np.testing.assert_allclose(got.topk_mass, want, rtol=1e-6)


@pytest.mark.any_x64
def test_profile_of_hidden_rows():
  query, key = _inputs(3, 20, dtype="float32")
  mask = np.ones((2, 4, 3, 20), bool)
  mask[:, :, 1] = False
  got = scores.sparsity_profile(query, key, mask=mask, k=(2, 20))
  for name, field in got._asdict().items():
    want = -np.inf if name in ("lse", "max") else 0
    np.testing.assert_array_equal(field[:, :, 1], want, err_msg=name)
    assert jnp.isfinite(field[:, :, 0]).all()


@pytest.mark.any_x64
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_without_promotion(dtype):
  query, key = _inputs(5, 20, dtype="float32")
  call = functools.partial(
    scores.sparsity_profile, k=(1, 4), is_causal=True, chunk_size=8
  )
  with jax.numpy_dtype_promotion("strict"):
    narrow = [jnp.asarray(x, dtype) for x in (query, key)]
    got = call(*narrow)
    want = call(*(x.astype("float32") for x in narrow))
    sigma = jnp.ones(3, dtype)
    assert scores.gaussian_budget(sigma, 100, 0.1).dtype == jnp.float32
    assert scores.gaussian_topk_mass(sigma, 100, 10).dtype == jnp.float32
    assert scores.gaussian_count_above(sigma, 100, 2.0).dtype == jnp.float32
    weights = jnp.ones((4, 2), dtype)
    assert scores.row_sigma(weights.T, weights, weights).dtype == dtype
  assert got.std.dtype == got.topk_mass.dtype == jnp.float32
  assert got.count_above.dtype == jnp.int32
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, got, want)


@pytest.mark.any_x64
def test_profile_needs_no_score_matrix():
  args = [jax.ShapeDtypeStruct((1, n, 1, 64), "float32") for n in (256, 16384)]
  compiled = quick_jit(scores.sparsity_profile).lower(*args).compile()
  matrix = 256 * 16384 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < matrix / 4


@pytest.mark.any_x64
def test_profile_compiles_once():
  query, key = _inputs(3, 20, dtype="float32")
  call = functools.partial(scores.sparsity_profile, k=(1, 4))
  jax.block_until_ready(call(query, key, t=(1.0, 2.0), scale=0.5))
  with no_recompilation():
    call(query + 1, key, t=(0.5, 3.0), scale=0.25)


@pytest.mark.any_x64
@pytest.mark.parametrize("spec", [P("x"), P(None, "x")])
def test_profile_on_a_mesh(spec):
  query, key = _inputs(16, 70, batch=(8,), dtype="float32")
  call = functools.partial(scores.sparsity_profile, k=(1, 40), chunk_size=32)
  want = call(query, key)
  keys = spec if spec == P("x") else P()
  out = P(*spec[:1], None, *spec[1:])
  mesh = _compat.make_mesh((8,), ("x",), axis_types=(_compat.AxisType.Auto,))
  sharded = _compat.shard_map(
    call, mesh=mesh, in_specs=(spec, keys), out_specs=out, check_vma=True
  )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, jax.jit(sharded)(query, key), want)

  mesh = _compat.make_mesh(
    (8,), ("x",), axis_types=(_compat.AxisType.Explicit,)
  )
  with jax.set_mesh(mesh):
    args = [
      jax.device_put(x, jax.NamedSharding(mesh, p))
      for x, p in ((query, spec), (key, keys))
    ]
    got = jax.jit(call)(*args)
    jax.tree.map(close, got, want)


# --- budgets ---


@pytest.mark.any_x64
def test_adaptive_budget():
  budget = functools.partial(scores.adaptive_budget, alpha=2.0)
  assert budget(10_000, exponent=0.5, bucket=False) == 200
  assert budget(10_000, exponent=0.5) == 256
  assert budget(1000, exponent=1 / 3, bucket=False) == 20
  assert budget(1, exponent=0.5) == 1
  assert budget(300, exponent=1) == 300
  assert scores.adaptive_budget(100, alpha=1e-9, exponent=0) == 1
  for n in range(1, 5000):
    plain, rounded = (budget(n, exponent=0.7, bucket=b) for b in (False, True))
    assert plain <= rounded <= n
    assert rounded == n or (rounded < 2 * plain and rounded.bit_count() == 1)


def test_fit_recovers_the_law_that_made_the_budgets():
  ns = np.array([100, 1000, 5000, 40000])
  exact = scores.fit_budget_law(ns, 3 * ns**0.6)
  np.testing.assert_allclose(exact, (3, 0.6), rtol=1e-10)
  ks = [
    scores.adaptive_budget(int(n), alpha=3, exponent=0.6, bucket=False)
    for n in ns
  ]
  np.testing.assert_allclose(
    scores.fit_budget_law(ns, np.array(ks)), (3, 0.6), rtol=0.02
  )


# --- refused ---


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: scores.gaussian_count_above(-1.0, 10, 1.0),
      "sigma must be non-negative, got -1.0",
    ),
    (
      lambda: scores.gaussian_topk_mass(np.array([1, -2.0]), 10, 1),
      "sigma must be non-negative, got",
    ),
    (
      lambda: scores.gaussian_count_above(1.0, 10, 0.0),
      "t must be positive, got 0.0",
    ),
    (lambda: scores.gaussian_budget(1.0, 0, 0.1), "n must be positive, got 0"),
    (
      lambda: scores.gaussian_budget(1.0, 10, 0.0),
      r"eps must be in \(0, 1\), got 0.0",
    ),
    (
      lambda: scores.gaussian_budget(1.0, 10, 1.0),
      r"eps must be in \(0, 1\), got 1.0",
    ),
    (
      lambda: scores.gaussian_topk_mass(1.0, 1024, 2048),
      r"k must be in \[1, 1024\], got 2048",
    ),
    (
      lambda: scores.gaussian_topk_mass(1.0, 1024, 0),
      r"k must be in \[1, 1024\], got 0",
    ),
    (lambda: scores.gaussian_exponent(-0.1), "s must be non-negative"),
    (
      lambda: scores.adaptive_budget(10, alpha=1.0, exponent=1.1),
      r"exponent must be in \[0, 1\], got 1.1",
    ),
    (
      lambda: scores.adaptive_budget(10, alpha=0.0, exponent=0.5),
      "alpha must be positive, got 0.0",
    ),
    (
      lambda: scores.adaptive_budget(0, alpha=1.0, exponent=0.5),
      "n must be >= 1, got 0",
    ),
    (
      lambda: scores.fit_budget_law([1, 2, 3], [1, 2]),
      r"ks must have shape \(3,\)",
    ),
    (
      lambda: scores.fit_budget_law([1, 2, 3], [1, 2, 0]),
      r"ks must be positive, got \[1 2 0\]",
    ),
    (
      lambda: scores.fit_budget_law([1, 2], [1, 2]),
      "a vector of at least 3 numbers",
    ),
    (
      lambda: scores.row_sigma(
        np.ones((2, 3)), np.ones((4, 2)), np.ones((4, 2))
      ),
      r"x must have shape \(..., 4\), got \(2, 3\)",
    ),
    (
      lambda: scores.row_sigma(
        np.ones((2, 4)), np.ones((4, 2)), np.ones((4, 3))
      ),
      r"w_key must have shape \(4, 2\)",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"k": (1, 256)}, r"k must be in \[1, 20\], got 256"),
    ({"k": ()}, r"k must be a tuple of numbers, got \(\)"),
    ({"k": 4}, "k must be a tuple of numbers, got 4"),
    ({"t": (1.0, 0.0)}, r"t must be positive, got \(1.0, 0.0\)"),
    ({"mask": np.ones((2, 4, 3, 19), bool)}, "mask must be broadcastable to"),
    ({"mask": np.ones((2, 4, 3, 20))}, "mask must be boolean"),
    ({"chunk_size": -1}, "chunk_size must be >= 1, got -1"),
    ({"is_causal": None}, "is_causal must be one of False, True, got None"),
    ({"scale": np.ones(2)}, "scale must be a real scalar, got array"),
  ],
)
def test_profile_refuses(options, message):
  query, key = _inputs(3, 20)
  with pytest.raises(ValueError, match=message):
    scores.sparsity_profile(query, key, **({"k": (1,)} | options))
