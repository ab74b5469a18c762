"""Fits of softmax regression with a skip, by every way of solving."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import newton
from jaxattn.regression import fit_softmax_resnet, softmax_resnet
from tests.regression._softmax_resnet import planted as _instance


def test_one_dimension_by_brute_force():
  rng = np.random.default_rng(2)
  a = rng.normal(size=(30, 1))
  b = softmax_resnet.predict(np.array([0.8]), a) * (
    1 + 0.1 * rng.normal(size=30)
  )
  data = softmax_resnet.prepare(a, b, w=1e-3)
  inside = softmax_resnet.problem().in_domain
  run = jax.jit(jax.vmap(lambda x: softmax_resnet.loss(x, data)))
  allowed = jax.jit(jax.vmap(lambda x: inside(x, data)))
  grid = np.linspace(-5, 5, 200_001)[:, None]
  losses = np.where(allowed(grid), run(grid), np.inf)
  # Once more around the best point: 200 times as fine.
  fine = grid[losses.argmin()] + np.linspace(-5e-5, 5e-5, 401)[:, None]
  losses = run(fine)
  best = fine[losses.argmin(), 0]
  for start in (-1.0, -0.5, 0.0, 0.5, 1.5):
    found = fit_softmax_resnet(a, b, w=1e-3, x0=jnp.array([start]))
    assert found.reason == 1
    np.testing.assert_allclose(found.x[0], best, rtol=0, atol=1e-6)
    assert found.loss <= losses.min() + 1e-15
    values = jnp.asarray([found.x - 1e-6, found.x + 1e-6])
    assert (run(values) > found.loss).all()


def test_steps_stay_where_the_normalizer_is_positive():
  a, b = jnp.array([[1.0], [0.5]]), jnp.array([-0.5, 1.5])
  for x, alpha in ((0.0, 2.0), (-0.6, 0.39), (-1.0, -0.53)):
    sign, log = softmax_resnet.log_alpha(jnp.array([x]), a)
    np.testing.assert_allclose(sign * jnp.exp(log), alpha, atol=5e-3)
  start = jnp.array([-0.6])
  found = fit_softmax_resnet(a, b, x0=start)
  # The whole first step would cross alpha = 0.
  size = found.log.step_size[0]
  assert 0 < size < 1
  once = fit_softmax_resnet(
    a, b, x0=start, config=newton.NewtonConfig(max_steps=1)
  )
  whole = start + (once.x - start) / size
  assert softmax_resnet.log_alpha(whole, a)[0] == -1
  assert found.reason == 1
  assert softmax_resnet.log_alpha(found.x, a)[0] == 1
  assert all(np.isfinite(x[: found.num_steps]).all() for x in found.log)


def test_profiles_that_must_stay_positive():
  a, b = jnp.array([[1.0], [0.5]]), jnp.array([-0.5, 1.5])
  data = softmax_resnet.prepare(a, b)
  problem = softmax_resnet.problem(positive=True)
  found = newton.minimize(problem, jnp.zeros(1), data)
  # It ends at the wall, y_1 = -W(1) = -0.567..., where f_1 is 0.
  f = softmax_resnet.predict(found.x, a)
  assert (f > 0).all()
  np.testing.assert_allclose(found.x[0], -0.5671432904, atol=1e-6)


def test_positive_profiles_with_entries_that_round_to_zero():
  inside = softmax_resnet.problem(positive=True).in_domain
  a = jnp.eye(2, dtype="float32")
  for rho in (0.0, 1.0):
    data = softmax_resnet.prepare(a, jnp.ones(2) / 2, residual_scale=rho)
    x = jnp.array([110.0, 0.0], "float32")
    assert softmax_resnet.predict(x, a, residual_scale=rho)[1] == 0
    assert inside(x, data)
    # e^-200 is 0 in float32: of a softmax still positive, not with a skip.
    assert inside(jnp.array([-200.0, 0.0], "float32"), data) == (rho == 0)
    assert not inside(jnp.array([jnp.nan, 0.0], "float32"), data)


def test_nothing_to_do():
  a = jnp.asarray(np.random.default_rng(0).normal(size=(30, 4)))
  b = softmax_resnet.predict(jnp.zeros(4), a)
  found = fit_softmax_resnet(a, b)
  assert (found.reason, found.num_steps) == (1, 0)
  assert not found.x.any()


def test_a_heavy_regularizer_leaves_nothing():
  data, _ = _instance(300, 4)
  sizes = [
    float(jnp.linalg.norm(fit_softmax_resnet(data.a, data.b, w=w).x))
    for w in (1.0, 4.0, 16.0)
  ]
  slopes = np.diff(np.log(sizes)) / np.log(4)
  np.testing.assert_allclose(slopes, -2, atol=0.05)


def test_several_targets_by_vmap():
  data, _ = _instance(200, 4)
  targets = jnp.stack([data.b, jnp.roll(data.b, 1), jnp.roll(data.b, 7)])
  fit = functools.partial(fit_softmax_resnet, data.a, w=1e-3)
  together = jax.vmap(fit)(targets)
  for i, b in enumerate(targets):
    np.testing.assert_allclose(fit(b).x, together.x[i], rtol=0, atol=1e-12)


def test_sparse_designs():
  rng = np.random.default_rng(0)
  design = newton.Design(
    jnp.asarray(rng.integers(0, 6, (100, 2))),
    jnp.asarray(rng.normal(size=(100, 2))),
    6,
  )
  dense = newton.design_rows(design, jnp.arange(100))
  b = jnp.asarray(rng.dirichlet(np.ones(100)))
  got, want = (fit_softmax_resnet(a, b, w=1e-2) for a in (design, dense))
  np.testing.assert_allclose(got.x, want.x, atol=1e-10)


@pytest.mark.parametrize("sketch", ["leverage", "uniform"])
@pytest.mark.parametrize("refresh", [0, 5])
def test_sketched_fit_finds_the_same_minimum(sketch, refresh):
  n = 4000
  data, _ = _instance(n, 8, w=0.1 / n)
  want = fit_softmax_resnet(data.a, data.b, w=0.1 / n)
  config = newton.NewtonConfig(
    sketch=sketch, max_steps=100, rtol=1e-10, refresh=refresh
  )
  got = fit_softmax_resnet(
    data.a, data.b, w=0.1 / n, config=config, rng=jax.random.key(0)
  )
  assert got.reason == 1
  np.testing.assert_allclose(got.x, want.x, rtol=1e-5)
  rows = got.log.num_rows[: got.num_steps]
  assert (rows[:2] == n).all()
  assert rows[2] == 32 * 8
  if refresh:
    assert (rows[::refresh] == n).all()


@pytest.mark.parametrize("sketch", ["leverage", "uniform"])
def test_samples_precondition(sketch):
  """The steps are exact ones, and products with the Hessian few."""
  n = 4000
  data, _ = _instance(n, 8, w=0.1 / n)
  want = fit_softmax_resnet(data.a, data.b, w=0.1 / n)
  config = newton.NewtonConfig(
    sketch=sketch, linear_solver="cg", num_rows=16 * 8
  )
  got = fit_softmax_resnet(
    data.a, data.b, w=0.1 / n, config=config, rng=jax.random.key(0)
  )
  assert got.reason == 1
  np.testing.assert_allclose(got.x, want.x, rtol=1e-5)
  assert got.num_steps <= want.num_steps + 2
  assert (got.log.num_rows[: got.num_steps] == 16 * 8).all()


def test_a_sample_that_tells_nothing_still_solves():
  """Two rows of 4000: the preconditioner is all but the constant."""
  n = 4000
  data, _ = _instance(n, 8, w=0.1 / n)
  want = fit_softmax_resnet(data.a, data.b, w=0.1 / n)
  config = newton.NewtonConfig(
    sketch="uniform", linear_solver="cg", num_rows=2, max_steps=200
  )
  got = fit_softmax_resnet(
    data.a, data.b, w=0.1 / n, config=config, rng=jax.random.key(0)
  )
  assert got.reason == 1
  np.testing.assert_allclose(got.x, want.x, rtol=1e-5)


@pytest.mark.parametrize("solver", ["woodbury", "dual", "cg"])
def test_linear_solvers_find_the_same_minimum(solver):
  """Of a problem with more unknowns than rows, and a ridge alone."""
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(15, 40)) / 6, rng.dirichlet(np.ones(15))
  ridge = 1e-3
  want = fit_softmax_resnet(a, b, ridge=ridge)
  data = softmax_resnet.prepare(a, b, ridge=ridge)
  problem = softmax_resnet.problem()
  if solver == "dual":
    # Which asks for the constant as a number.
    dense = problem.curvature
    problem = problem._replace(
      curvature=lambda x, data: dense(x, data)._replace(const=data.ridge),
      expand=None,
    )
  config = newton.NewtonConfig(linear_solver=solver)
  got = newton.minimize(problem, jnp.zeros(40), data, config=config)
  assert got.reason == 1
  np.testing.assert_allclose(got.x, want.x, rtol=0, atol=1e-8)


def test_fit_in_float32():
  data, _ = _instance(500, 5, w=1e-3)
  want = fit_softmax_resnet(data.a, data.b, w=1e-3)
  config = newton.NewtonConfig(rtol=1e-4)
  a, b = data.a.astype("float32"), data.b.astype("float32")
  got = fit_softmax_resnet(a, b, w=1e-3, x0=jnp.zeros(5), config=config)
  assert got.x.dtype == got.loss.dtype == jnp.float32
  assert got.reason in (1, 2)
  np.testing.assert_allclose(got.x, want.x, rtol=1e-2)


def test_implicit_gradient_of_a_structured_problem():
  data, _ = _instance(60, 3, w=1e-2)
  config = newton.NewtonConfig(rtol=1e-13)

  @jax.jit
  def outer(b):
    x = newton.implicit_solution(
      softmax_resnet.problem(), jnp.zeros(3), data._replace(b=b), config=config
    )
    return (x**2).sum()

  grad, h = jax.grad(outer)(data.b), 1e-4
  for i in (0, 17):
    e = h * jnp.eye(60)[i]
    want = (outer(data.b + e) - outer(data.b - e)) / (2 * h)
    np.testing.assert_allclose(grad[i], want, atol=1e-6)
