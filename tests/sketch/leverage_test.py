"""Leverage scores and products with their derivative, against dense algebra."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.sketch.leverage import hadamard_square_matvec, leverage_scores

_EXACT = ("qr", "cholesky")


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def _hat_diagonal(a):
  return np.einsum("ij,ji->i", a, np.linalg.pinv(a))


@pytest.mark.parametrize("method", _EXACT)
@pytest.mark.parametrize("shape", [(50, 7), (7, 7), (200, 1)])
def test_exact_scores_are_the_diagonal_of_the_projection(method, shape):
  a = _normal(*shape) * np.logspace(0, 2, shape[0])[:, None]
  got = leverage_scores(jnp.asarray(a), method=method)
  np.testing.assert_allclose(got, _hat_diagonal(a), atol=1e-9)
  np.testing.assert_allclose(got.sum(), min(shape), rtol=1e-9)


@pytest.mark.parametrize("method", _EXACT)
def test_scores_depend_on_the_column_space_only(method):
  a, t = _normal(60, 5), _normal(5, 5, seed=1)
  score = functools.partial(leverage_scores, method=method)
  np.testing.assert_allclose(score(a @ t), score(a), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", _EXACT)
def test_scores_of_a_kronecker_product(method):
  a, b = _normal(9, 3), _normal(7, 2, seed=1)
  score = functools.partial(leverage_scores, method=method)
  got = score(np.kron(a, b))
  want = np.outer(score(a), score(b)).reshape(-1)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_scores_of_deficient_matrices():
  """Duplicate and zero columns, zero rows, and more columns than rows."""
  a = _normal(40, 4)
  a = np.concatenate([a, a[:, :2], np.zeros((40, 1))], 1)
  a[5] = 0
  got = leverage_scores(jnp.asarray(a))
  np.testing.assert_allclose(got, _hat_diagonal(a), atol=1e-9)
  np.testing.assert_allclose(got.sum(), 4, rtol=1e-9)
  assert got[5] == 0
  np.testing.assert_allclose(leverage_scores(jnp.asarray(_normal(3, 8))), 1)
  assert not leverage_scores(jnp.zeros((5, 2))).any()
  # Without the rows that a square of A would need, Cholesky says so.
  assert np.isnan(leverage_scores(jnp.zeros((5, 2)), method="cholesky")).all()


@pytest.mark.parametrize("method", ["qr", "sketch"])
@pytest.mark.parametrize("scale", [1e-3, 1e-4])
def test_small_columns_of_many_rows_count_in_single_precision(scale, method):
  a = _normal(20_000, 4) * np.array([1, 1, scale, 1])
  rng = jax.random.key(0) if method == "sketch" else None
  got = leverage_scores(jnp.asarray(a, jnp.float32), method=method, rng=rng)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got.sum(), 4, rtol=1e-5 if rng is None else 0.2)


@pytest.mark.parametrize("columns", [2, 4])
def test_copies_of_a_constant_column_are_one_in_single_precision(columns):
  """All products round alike: the most that rounding can do."""
  got = leverage_scores(jnp.ones((200_000, columns), jnp.float32))
  np.testing.assert_allclose(got.sum(), 1, rtol=1e-4)


@pytest.mark.parametrize("rows", [20, 4 * 16**2])
def test_sketch_of_few_rows_is_exact(rows):
  """Where buckets are as many as rows collisions would lose rank."""
  a = jnp.asarray(_normal(rows, 16))
  got = leverage_scores(a, method="sketch", rng=jax.random.key(0))
  np.testing.assert_allclose(got, leverage_scores(a), rtol=1e-12)


# 400 buckets give .87 to 1.29, hence 256 about 1 - .13 * 1.25 to
# 1 + .29 * 1.25. With the projection it is the spread of a chi-square of 16
# over its mean, .363 to 2, and 5 percent for the buckets.
@pytest.mark.parametrize(
  ("d", "range_"), [(8, (0.84, 1.37)), (20, (0.345, 2.1))]
)
def test_sketched_scores_are_within_a_factor(d, range_):
  a = _normal(20_000, d) * np.exp(_normal(20_000, 1, seed=1))
  run = jax.jit(lambda r: leverage_scores(a, method="sketch", rng=r))
  scores = np.stack([run(jax.random.key(i)) for i in range(5)])
  ratios = scores / _hat_diagonal(a)
  low, middle, high = np.percentile(ratios, [1, 50, 99])
  assert range_[0] < low
  assert 0.93 < middle < 1.07
  assert high < range_[1]
  np.testing.assert_allclose(scores.sum(1), d, rtol=0.1)


def test_sketched_scores_of_a_deficient_matrix():
  a = _normal(3000, 4)
  a = np.concatenate([a, a[:, :2]], 1)
  got = leverage_scores(a, method="sketch", rng=jax.random.key(0))
  ratios = np.percentile(got / _hat_diagonal(a), [1, 99])
  assert 0.6 < ratios[0] < ratios[1] < 1.6


def test_half_precision_is_computed_in_single():
  a = jnp.asarray(_normal(300, 4), jnp.bfloat16)
  got = leverage_scores(a)
  assert got.dtype == jnp.bfloat16
  want = _hat_diagonal(np.asarray(a, float))
  np.testing.assert_allclose(got.astype(float), want, rtol=2**-8)


def test_product_with_the_squared_projection():
  q, t = _normal(40, 6), _normal(40, seed=1)
  got = hadamard_square_matvec(jnp.asarray(q), jnp.asarray(t))
  np.testing.assert_allclose(got, (q @ q.T) ** 2 @ t, rtol=1e-12)


def test_squared_projection_is_a_laplacian_with_the_scores():
  a = _normal(30, 4)
  q, scores = np.linalg.qr(a)[0], leverage_scores(a)
  rows = hadamard_square_matvec(q, jnp.ones(30))
  np.testing.assert_allclose(rows, scores, rtol=0, atol=1e-14)
  columns = jax.vmap(functools.partial(hadamard_square_matvec, q))(jnp.eye(30))
  laplacian = np.diag(scores) - columns
  assert np.linalg.eigvalsh(laplacian)[0] > -1e-14


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: leverage_scores(jnp.ones(3)), "a must have 2 dimensions, got"),
    (lambda: leverage_scores(np.ones((3, 2), int)), "a must have a floating"),
    (
      lambda: leverage_scores(jnp.ones((3, 2)), method="x"),
      "method must be one of 'qr', 'cholesky', 'sketch', got 'x'",
    ),
    (
      lambda: leverage_scores(jnp.ones((3, 2)), method="sketch"),
      "rng is required with method='sketch'",
    ),
    (
      lambda: leverage_scores(jnp.ones((3, 2)), rng=jax.random.key(0)),
      "rng must be None with method='qr'",
    ),
    (
      lambda: hadamard_square_matvec(jnp.ones(3), jnp.ones(3)),
      "q must have 2 dimensions, got",
    ),
    (
      lambda: hadamard_square_matvec(jnp.ones((3, 2)), jnp.ones(2)),
      "t must have shape (3,) = (n,), got (2,)",
    ),
    (
      lambda: hadamard_square_matvec(jnp.ones((3, 2)), jnp.ones(3, int)),
      "t must have a floating dtype",
    ),
  ],
)
def test_refused_arguments(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
