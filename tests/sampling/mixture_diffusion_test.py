"""The oracle of mixtures: scores, Jacobians, denoisers, samples."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxattn.attention import softmax_attention
from jaxattn.sampling import (
  gmm_denoise,
  gmm_init,
  gmm_logpdf,
  gmm_responsibilities,
  gmm_sample,
  gmm_score,
  gmm_score_jacobian,
  gmm_velocity,
  ou,
  path_sample,
  straight,
)
from tests.sampling._mixtures import covariances_of, random_mixture

_KINDS = ("full", "shared", "diagonal", "isotropic")
_TIMES = jnp.array([0.01, 0.3, 1.0, 3.0])


def _plain_logpdf(gmm, x, t):
  """As a density is written down, with matrices, on the path of ou."""
  a, b2 = jnp.exp(-t), -jnp.expm1(-2 * t)
  matrices = a**2 * covariances_of(gmm) + b2 * np.eye(len(x))[None]
  each = jax.vmap(jax.scipy.stats.multivariate_normal.logpdf, (None, 0, 0))
  return jax.nn.logsumexp(each(x, a * gmm.means, matrices) + gmm.log_weights)


# --- densities and their derivatives ---


@pytest.mark.parametrize(("k", "d"), [(1, 3), (4, 5), (10, 2)])
def test_derivatives_are_those_of_the_density(k, d):
  gmm = random_mixture(k, d)
  x = 1.5 * jax.random.normal(jax.random.key(0), (4, d))

  @jax.jit
  def found(x, t):
    logpdf = functools.partial(gmm_logpdf, gmm, t=t)
    score = functools.partial(gmm_score, gmm, t=t)
    # Of the score and not of the density twice: its gradient is tested here.
    return (
      (gmm_score(gmm, x, t), jax.grad(logpdf)(x)),
      (gmm_score_jacobian(gmm, x, t), jax.hessian(logpdf)(x)),
      (gmm_score_jacobian(gmm, x, t), jax.jacfwd(score)(x)),
    )

  every = jax.vmap(jax.vmap(found, (None, 0)), (0, None))
  for (got, want), tol in zip(every(x, _TIMES), (1e-13, 1e-12, 1e-12)):
    # The size of a derivative, not of its smallest entry, is what rounds.
    axes = tuple(range(2, got.ndim))
    size = jnp.abs(want).max(axes, keepdims=True)
    assert (jnp.abs(got - want) / size).max() < tol


@pytest.mark.parametrize("kind", _KINDS)
def test_density_against_scipy(kind):
  gmm = random_mixture(4, 3, kind=kind)
  x = np.random.default_rng(0).normal(size=(50, 3))
  each = [
    np.exp(w) * stats.multivariate_normal(mean, cov).pdf(x)
    for w, mean, cov in zip(gmm.log_weights, gmm.means, covariances_of(gmm))
  ]
  np.testing.assert_allclose(
    gmm_logpdf(gmm, jnp.asarray(x)), np.log(np.sum(each, axis=0)), rtol=1e-11
  )


@pytest.mark.parametrize("kind", _KINDS)
def test_each_kind_against_matrices(kind):
  gmm = random_mixture(4, 3, kind=kind)
  x = 2 * jax.random.normal(jax.random.key(1), (5, 3))

  @jax.jit
  def found(x, t):
    plain = functools.partial(_plain_logpdf, gmm, t=t)
    return (
      (gmm_logpdf(gmm, x, t), plain(x)),
      (gmm_score(gmm, x, t), jax.grad(plain)(x)),
      (gmm_score_jacobian(gmm, x, t), jax.hessian(plain)(x)),
    )

  for got, want in jax.vmap(found, (0, None))(x, 0.3):
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", ["full", "isotropic"])
def test_batches_are_points(kind):
  gmm = random_mixture(4, 3, kind=kind)
  x = jax.random.normal(jax.random.key(1), (2, 5, 3))

  @jax.jit
  def found(x):
    calls = (
      gmm_logpdf, gmm_responsibilities, gmm_score, gmm_score_jacobian,
      gmm_denoise, gmm_velocity,
    )  # fmt: skip
    together = [f(gmm, x, 0.3) for f in calls]
    one = lambda f: jax.vmap(jax.vmap(lambda x: f(gmm, x, 0.3)))(x)  # noqa: E731
    return together, [one(f) for f in calls]

  for got, want in zip(*found(x)):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


# --- denoiser and velocity ---


@pytest.mark.parametrize("path", [ou(), straight()], ids=lambda p: p.name)
def test_denoiser_and_velocity_by_the_score(path):
  gmm = random_mixture(4, 3)
  x, t = np.random.default_rng(1).normal(size=(6, 3)), 0.4

  @jax.jit
  def found(x):
    calls = (gmm_score, gmm_denoise, gmm_velocity)
    return [f(gmm, x, t, schedule=path) for f in calls]

  score, denoised, velocity = found(x)
  a, b = float(path.signal(t)), float(path.noise(t))
  np.testing.assert_allclose(denoised, (x + b**2 * score) / a, rtol=1e-11)
  want = -x - score if path is ou() else (x + (1 - t) * score) / t
  np.testing.assert_allclose(velocity, want, rtol=1e-11)


def test_velocity_is_a_regression():
  """On the path's own samples: of its velocities on linear features."""
  gmm, n, t = random_mixture(3, 2, kind="diagonal"), 200_000, 0.6

  @jax.jit
  def found(rng_y, rng_x):
    y = gmm_sample(rng_y, gmm, n)
    x, u = path_sample(rng_x, y, t, schedule=straight())
    return x, u - gmm_velocity(gmm, x, t, schedule=straight())

  x, gap = map(np.asarray, found(*jax.random.split(jax.random.key(0))))
  for feature in (np.ones((n, 1)), x, np.sin(x), x[:, ::-1] ** 2):
    terms = gap * feature
    error = terms.std(0) / np.sqrt(n)
    assert (np.abs(terms.mean(0)) < 4.5 * error).all()


def test_ends_of_the_straight_path():
  gmm = random_mixture(3, 2)
  x = np.random.default_rng(0).normal(size=(5, 2))
  mean = np.exp(gmm.log_weights) @ np.asarray(gmm.means)
  start = gmm_velocity(gmm, x, 0.0, schedule=straight())
  np.testing.assert_allclose(start, mean - x, rtol=1e-10)
  denoised = gmm_denoise(gmm, x, 1.0, schedule=straight())
  np.testing.assert_allclose(denoised, x, rtol=1e-10)


def test_equal_covariances_are_attention():
  """Responsibilities are softmax attention of the point to the means."""
  sigma2, t = 0.3, 0.5
  a, b2 = np.exp(-t), -np.expm1(-2 * t)
  v = a**2 * sigma2 + b2
  means, x = np.split(np.random.default_rng(0).normal(size=(11, 4)), [6])
  gmm = gmm_init(np.full(6, 1 / 6), means, np.full(6, sigma2))
  bias = -np.log(6) - a**2 * (means**2).sum(1) / (2 * v)
  key = a * means[None, :, None] / v
  attended = softmax_attention(
    jnp.asarray(x[None, :, None]),
    jnp.asarray(key),
    jnp.asarray(means[None, :, None]),
    bias=jnp.asarray(np.broadcast_to(bias, (1, 1, 5, 6))),
    scale=1.0,
  )[0, :, 0]
  want = b2 / v * attended + a * sigma2 / v * x
  np.testing.assert_allclose(gmm_denoise(gmm, x, t), want, rtol=1e-10)


# --- invariances and limits ---


@pytest.mark.parametrize("kind", ["full", "diagonal", "isotropic"])
def test_copies_of_components_change_nothing(kind):
  gmm = random_mixture(3, 4, kind=kind)
  twice = gmm._replace(
    log_weights=jnp.tile(gmm.log_weights - np.log(2), 2),
    means=jnp.tile(gmm.means, (2, 1)),
    eigenvalues=jnp.tile(gmm.eigenvalues, (2, 1)),
    eigenvectors=None
    if gmm.eigenvectors is None
    else jnp.tile(gmm.eigenvectors, (2, 1, 1)),
  )
  x = np.random.default_rng(0).normal(size=(20, 4))

  @jax.jit
  def found(gmm):
    calls = (gmm_logpdf, gmm_score, gmm_score_jacobian)
    return [f(gmm, x, 0.2) for f in calls]

  for got, want in zip(found(twice), found(gmm)):
    room = 1e-14 * float(np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=room)


def test_equal_means_have_no_covariance_of_scores():
  gmm = gmm_init([0.25, 0.75], jnp.ones((2, 3)), [0.5, 0.5])
  x = jnp.array([3.0, -1.0, 0.2])
  np.testing.assert_array_equal(gmm_score_jacobian(gmm, x), -jnp.eye(3) / 0.5)


@pytest.mark.parametrize("kind", ["full", "isotropic"])
def test_far_tails_in_float32(kind):
  gmm = jax.tree.map(
    lambda z: z.astype(jnp.float32), random_mixture(4, 5, kind=kind)
  )
  x = jnp.full(5, 1e4, jnp.float32)

  @jax.jit
  def found(t):
    calls = (gmm_logpdf, gmm_score, gmm_denoise, gmm_velocity)
    return [f(gmm, x, t) for f in calls]

  for t in (0.0, 0.01, 3.0):
    for got in found(t):
      assert np.isfinite(got).all()
      assert got.dtype == jnp.float32


def test_narrow_components_at_the_data():
  means = jnp.array([[0.0, 1.0], [1.0, 0.0]], jnp.float32)
  gmm = gmm_init([0.5, 0.5], means, [1e-8, 1e-8])
  x = jnp.array([0.5, 0.2], jnp.float32)
  for f in (gmm_logpdf, gmm_score, gmm_score_jacobian):
    assert np.isfinite(f(gmm, x, 0.0)).all()


def test_components_of_no_weight():
  gmm = gmm_init([1.0, 0.0], jnp.array([[0.0], [1.0]]), [1.0, 1.0])
  alone = gmm_init([1.0], jnp.array([[0.0]]), [1.0])
  x = jnp.array([0.7])
  for f in (gmm_logpdf, gmm_score, gmm_score_jacobian):
    np.testing.assert_allclose(f(gmm, x, 0.1), f(alone, x, 0.1), rtol=1e-14)


@pytest.mark.any_x64
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_weights_are_of_sum_1_up_to_rounding(dtype):
  means = jnp.zeros((3, 1), dtype)
  gmm = gmm_init(np.full(3, 1 / 3), means, np.ones(3))
  single = gmm_init([1.0], means[:1].astype(jnp.float32), [1.0])
  x = jnp.array([0.7], jnp.float32)
  room = 4 * float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(gmm_logpdf(gmm, x), gmm_logpdf(single, x), room)


@pytest.mark.any_x64
def test_dtype_of_the_points():
  gmm = jax.tree.map(lambda z: z.astype(jnp.float32), random_mixture(3, 2))
  x = jnp.ones((4, 2), jnp.bfloat16)

  @jax.jit
  def found(x):
    calls = (gmm_logpdf, gmm_score, gmm_score_jacobian, gmm_denoise)
    return [f(gmm, x, 0.3) for f in calls]

  for got, want in zip(found(x), found(x.astype(jnp.float32))):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


# --- samples ---


@pytest.mark.parametrize("kind", _KINDS)
def test_moments_of_samples(kind):
  gmm, n, t = random_mixture(3, 2, kind=kind), 100_000, 0.4
  x = np.asarray(gmm_sample(jax.random.key(2), gmm, n, t))
  a, b2 = np.exp(-t), -np.expm1(-2 * t)
  weights = np.exp(gmm.log_weights)
  mean = a * weights @ gmm.means
  second = a**2 * (
    np.einsum("k,ki,kj->ij", weights, gmm.means, gmm.means)
    + np.einsum("k,kij->ij", weights, covariances_of(gmm))
  ) + b2 * np.eye(2)
  products = x[:, :, None] * x[:, None]
  for got, want in ((x, mean), (products, second)):
    error = got.std(0) / np.sqrt(n)
    assert (np.abs(got.mean(0) - want) < 4.5 * error).all()


def test_samples_lie_where_the_density_says():
  """Log-densities of samples have the mean of a Gaussian's entropy."""
  gmm, n = random_mixture(1, 3), 50_000
  found = gmm_logpdf(gmm, gmm_sample(jax.random.key(0), gmm, n))
  entropy = stats.multivariate_normal(
    gmm.means[0], covariances_of(gmm)[0]
  ).entropy()
  # Its variance is d / 2.
  assert abs(found.mean() + entropy) < 4.5 * np.sqrt(1.5 / n)


# --- refusals ---


@pytest.mark.parametrize(
  ("weights", "means", "covariances", "message"),
  [
    ([0.5, 0.4], np.zeros((2, 3)), [1, 1], "weights must sum to 1, got a sum"),
    ([1.5, -0.5], np.zeros((2, 3)), [1, 1], "weights must be non-negative"),
    ([1.0], np.zeros((2, 3)), [1, 1], "weights must have shape (2,) = (k,)"),
    ([0.5, 0.5], np.zeros(2), [1, 1], "means must have 2 dimensions"),
    ([0.5, 0.5], np.zeros((2, 3), int), [1, 1], "means must have a floating"),
    (
      [0.5, 0.5],
      np.full((2, 3), np.nan),
      [1, 1],
      "means must be finite, got 6",
    ),
    (
      [0.5, 0.5],
      np.zeros((2, 3)),
      [1, -1],
      "covariances must be positive semidefinite, got a least eigenvalue of -1",
    ),
    (
      [0.5, 0.5],
      np.zeros((2, 3)),
      np.ones((4, 4)),
      "covariances must have shape (k,), (k, d), (k, d, d) or (d, d), got "
      "(4, 4) with means of shape (2, 3)",
    ),
    (
      [0.5, 0.5],
      np.zeros((2, 3)),
      np.array([[1.0, 2, 0], [2, 1, 0], [0, 0, 1]]),
      "covariances must be positive semidefinite, got a least eigenvalue of "
      "-1.0",
    ),
    (
      [0.5, 0.5],
      np.zeros((2, 3)),
      np.triu(np.ones((3, 3))),
      "covariances must be symmetric, got entries 1.0 apart",
    ),
  ],
)
def test_refused_mixtures(weights, means, covariances, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    gmm_init(weights, means, covariances)


@pytest.mark.parametrize(
  ("x", "t", "message"),
  [
    (jnp.ones(3), 0.0, "x must have shape (2,) = (..., d), got (3,)"),
    (jnp.ones(2, int), 0.0, "x must have a floating dtype"),
    (jnp.ones(2), jnp.ones(2), "t must be a real scalar"),
  ],
)
def test_refused_points(x, t, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    gmm_score(random_mixture(3, 2), x, t)


def test_a_square_of_covariances_is_read_as_diagonals():
  gmm = gmm_init([0.5, 0.5], jnp.zeros((2, 2)), [[1.0, 4.0], [4.0, 1.0]])
  assert gmm.eigenvectors is None
  shared = np.array([[[2.0, 1.0], [1.0, 2.0]]])
  gmm = gmm_init([0.5, 0.5], jnp.zeros((2, 2)), shared)
  np.testing.assert_allclose(gmm.eigenvalues, [[1.0, 3.0]])
