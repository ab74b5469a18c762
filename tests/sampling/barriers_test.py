"""Hessians of barriers: automatic differentiation and identities."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.sampling import (
  LeverageSample,
  Polytope,
  Spectrahedron,
  TensorSRHT,
  barrier_hessian,
  chebyshev_center,
)
from jaxattn.sampling.dikin import barriers
from jaxattn.sketch import leverage_scores
from tests.sampling import _bodies

_KINDS = ("log", "vaidya", "john", "lee_sidford")


def _log_barrier(x, body):
  return -jnp.log(body.b - body.a @ x).sum()


def _log_det_barrier(x, body):
  return -jnp.linalg.slogdet(jnp.tensordot(x, body.mats, 1) - body.const)[1]


def _points(body, num=3, seed=1):
  """Inside of a body around 0, near the boundary some of them."""
  d = body.a.shape[1]
  u = np.random.default_rng(seed).normal(size=(num, d))
  reach = 1 / (body.a @ u.T / body.b[:, None]).max(0)
  return jnp.asarray(u * (np.linspace(0.1, 0.99, num) * reach)[:, None])


def test_log_barrier():
  body = _bodies.random_polytope(12, 4)
  for x in _points(body):
    want = jax.hessian(_log_barrier)(x, body)
    np.testing.assert_allclose(barrier_hessian(body, x), want, rtol=1e-10)
    grad = jax.grad(_log_barrier)(x, body)
    assert grad @ jnp.linalg.solve(want, grad) <= 12 + 1e-9


def test_log_det_barrier():
  body = _bodies.random_spectrahedron(4, 3)
  x = 0.05 * jnp.arange(1.0, 4.0)
  want = jax.hessian(_log_det_barrier)(x, body)
  got = barrier_hessian(body, x)
  np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def _cone_point(n):
  """A point of the cone of positive matrices, of any trace."""
  mats = _bodies.psd_cone(n).mats[:, :n, :n]
  half = np.random.default_rng(n).normal(size=(n, n))
  x = jnp.asarray(_bodies.flat_symmetric(half @ half.T + np.eye(n)))
  return Spectrahedron(mats, jnp.zeros((n, n))), x


@pytest.mark.parametrize("n", [2, 3, 4, 6, 8])
def test_the_cone_of_positive_matrices(n):
  """Where both of the theorem's quantities are known."""
  body, x = _cone_point(n)
  hessian = barrier_hessian(body, x)
  grad = jax.grad(_log_det_barrier)(x, body)
  nu = grad @ jnp.linalg.solve(hessian, grad)
  np.testing.assert_allclose(nu, n, rtol=1e-9)

  def log_det(x):
    factor = jnp.linalg.cholesky(jnp.tensordot(x, body.mats, 1))
    whole = barriers.bodies.spectrahedron_hessian(body, factor)
    return jnp.linalg.slogdet(whole)[1]

  slope = jax.grad(log_det)(x)
  square = slope @ jnp.linalg.solve(hessian, slope)
  np.testing.assert_allclose(square, n * (n + 1) ** 2, rtol=1e-8)


def test_volume_of_the_log_barrier_in_the_local_norm():
  """The gradient of log det H is 2 A_x^T sigma; its square is below 4 d."""
  body = _bodies.random_polytope(12, 4)
  rows = barriers.prepare(body).rows

  def log_det(x):
    scale = (body.b - body.a @ x) ** -2
    return jnp.linalg.slogdet(barriers.weights.gram(rows, scale))[1]

  for x in _points(body):
    scaled = body.a / (body.b - body.a @ x)[:, None]
    sigma = leverage_scores(scaled)
    slope = jax.grad(log_det)(x)
    want = 2 * scaled.T @ sigma
    np.testing.assert_allclose(slope, want, rtol=1e-9)
    hessian = barrier_hessian(body, x)
    square = slope @ jnp.linalg.solve(hessian, slope)
    onto = scaled @ jnp.linalg.solve(hessian, scaled.T)
    np.testing.assert_allclose(square, 4 * sigma @ onto @ sigma, rtol=1e-9)
    assert square <= 4 * 4 + 1e-9


@pytest.mark.parametrize("kind", _KINDS)
def test_weights_of_each_kind(kind):
  body = _bodies.random_polytope(12, 4)
  x = _points(body)[1]
  scaled = np.asarray(body.a / (body.b - body.a @ x)[:, None])
  iters = 5
  c = np.ones(12)
  if kind == "vaidya":
    c = np.asarray(leverage_scores(scaled)) + 4 / 12
  elif kind == "john":
    c = np.asarray(barriers.weights.john_weights(scaled, num_iters=iters))
  elif kind == "lee_sidford":
    p = 2 * (1 + math.log(12))
    w = barriers.weights.lewis_weights(scaled, p, num_iters=iters)
    c = np.asarray(w) ** (1 - 2 / p)
  got = barrier_hessian(body, x, kind=kind, num_iters=iters)
  want = (scaled * c[:, None]).T @ scaled
  np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("kind", ["log", "lee_sidford"])
def test_dikin_ellipsoids_lie_in_the_body_and_its_mirror_image(kind):
  """a_i^T H^-1 a_i <= s_i^2: with Lewis weights as with none."""
  for seed in range(3):
    body = _bodies.random_polytope(20, 4, seed)
    for x in _points(body):
      hessian = barrier_hessian(body, x, kind=kind, num_iters=100)
      reach = (body.a * jnp.linalg.solve(hessian, body.a.T).T).sum(1)
      assert (jnp.sqrt(reach) <= (body.b - body.a @ x) * (1 + 1e-9)).all()


def test_symmetry_of_lee_and_sidford():
  """K within E(sqrt(nu)), nu <= e d: the sum of the weights."""
  body = _bodies.random_polytope(200, 3)
  scaled = np.asarray(body.a / body.b[:, None])
  hessian = barrier_hessian(body, jnp.zeros(3), kind="lee_sidford")
  nu = float(np.trace(np.linalg.solve(scaled.T @ scaled, hessian)))
  assert nu <= 3  # weights are at most about 1
  p = 2 * (1 + math.log(200))
  w = barriers.weights.lewis_weights(scaled, p, num_iters=200)
  assert (w ** (1 - 2 / p)).sum() <= math.e * 3


# --- sketches ---


def _mean_sketch(body, x, how, num):
  prepared = barriers.prepare(body)

  def one(key):
    return barriers.hessian_at(prepared, x, "log", 4, how, key)[1]

  return jax.jit(jax.vmap(one))(_bodies.keys(num))


@pytest.mark.parametrize("which", ["polytope", "spectrahedron"])
def test_sketches_are_unbiased(which):
  if which == "polytope":
    body, how = _bodies.random_polytope(60, 4), LeverageSample(12)
    x = _points(body)[1]
  else:
    body, how = _bodies.random_spectrahedron(5, 3), TensorSRHT(8)
    x = 0.05 * jnp.ones(3)
  got = _mean_sketch(body, x, how, 4000)
  want = barrier_hessian(body, x)
  error = got.std(0) / 4000**0.5
  assert float((jnp.abs(got.mean(0) - want) / error).max()) < 4.5
  # They are not exact either.
  assert float((error / jnp.abs(want)).max()) > 1e-4


def test_more_rows_than_there_are_is_the_exact_hessian():
  body = _bodies.random_polytope(12, 4)
  x = _points(body)[1]
  got = _mean_sketch(body, x, LeverageSample(100_000_000), 2)
  want = barrier_hessian(body, x)
  np.testing.assert_allclose(got, jnp.stack([want, want]), rtol=1e-9)


def test_common_coins_keep_common_rows():
  """The noise of nearby points cancels."""
  body = _bodies.random_polytope(200, 3)
  prepared, x = barriers.prepare(body), jnp.zeros(3)

  def log_ratio(rng_x, rng_z):
    how = LeverageSample(20)
    first, second = (
      barriers.hessian_at(prepared, point, "log", 4, how, rng)[1]
      for point, rng in ((x, rng_x), (x + 1e-3, rng_z))
    )
    return jnp.linalg.slogdet(first)[1] - jnp.linalg.slogdet(second)[1]

  both = jax.jit(jax.vmap(log_ratio))
  some, other = _bodies.keys(200), _bodies.keys(200, 1)
  assert both(some, some).std() < 0.3 * both(some, other).std()


def test_outside_there_is_none():
  body = _bodies.box(2)
  assert jnp.isnan(barrier_hessian(body, jnp.full(2, 1.5))).all()
  body = _bodies.random_spectrahedron(4, 3)
  assert jnp.isnan(barrier_hessian(body, jnp.full(3, 100.0))).all()


_BOX = Polytope(jnp.ones((2, 1)), jnp.ones(2))
_SPECTRAHEDRON = Spectrahedron(jnp.ones((1, 2, 2)), -jnp.eye(2))


@pytest.mark.parametrize(
  ("body", "kwargs", "message"),
  [
    (Polytope(jnp.ones(3), jnp.ones(3)), {}, "a must have 2 dimensions"),
    (Polytope(jnp.ones((3, 1)), jnp.ones(2)), {}, "b must have shape (3,)"),
    (Polytope(jnp.ones((0, 1)), jnp.ones(0)), {}, "a must not be empty"),
    (
      Polytope(jnp.ones((3, 1), jnp.bfloat16), jnp.ones(3)),
      {},
      "a must be float32 or float64, got bfloat16",
    ),
    (Polytope(jnp.full((3, 1), jnp.nan), jnp.ones(3)), {}, "a must be finite"),
    (_BOX, {"kind": "lewis"}, "kind must be one of 'log'"),
    (_SPECTRAHEDRON, {"kind": "john"}, "kind must be one of 'log', got 'john'"),
    (_BOX, {"num_iters": 0}, "num_iters must be >= 1, got 0"),
    (_BOX, {"x": jnp.zeros(2)}, "x must have shape (1,)"),
    (
      Spectrahedron(jnp.ones((1, 2, 3)), jnp.eye(2)),
      {},
      "mats must have shape (1, 2, 2) = (d, n, n), got (1, 2, 3)",
    ),
    (
      Spectrahedron(jnp.ones((1, 2, 2)), jnp.eye(3)),
      {},
      "const must have shape (2, 2)",
    ),
    (
      Spectrahedron(jnp.array([[[0.0, 1.0], [0.5, 0.0]]]), jnp.eye(2)),
      {},
      "mats must be symmetric, got asymmetry 0.5",
    ),
    ((jnp.ones((2, 1)), jnp.ones(2)), {}, "body must be a Polytope or"),
  ],
)
def test_refused_inputs(body, kwargs, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    barrier_hessian(body, **({"x": jnp.zeros(1)} | kwargs))


def test_points_of_the_helper_are_inside():
  body = _bodies.random_polytope(12, 4)
  assert chebyshev_center(*body)[1] > 0
  assert (body.b[None] > _points(body) @ body.a.T).all()
