"""The damped Newton method on problems whose answer is known."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import newton
from tests._recompile import no_recompilation


def _quadratic_loss(x, data):
  q, b = data
  return x @ q @ x / 2 - b @ x


_QUADRATIC = newton.Problem(
  _quadratic_loss,
  jax.value_and_grad(_quadratic_loss),
  lambda x, data: newton.DenseCurvature(data[0]),
)


def _quadratic_data(seed=0, p=20):
  rng = np.random.default_rng(seed)
  half = rng.standard_normal((p, p))
  return jnp.asarray(half @ half.T + np.eye(p)), jnp.asarray(
    rng.standard_normal(p)
  )


def _autodiff(loss):
  """A problem whose curvature is a dense Hessian."""
  return newton.Problem(
    loss,
    jax.value_and_grad(loss),
    lambda x, data: newton.DenseCurvature(jax.hessian(loss)(x, data)),
  )


def test_pure_steps_solve_a_quadratic_in_one():
  data = _quadratic_data()
  config = newton.NewtonConfig(pure=True, max_steps=1)
  found = newton.minimize(_QUADRATIC, jnp.ones(20), data, config=config)
  want = np.linalg.solve(*data)
  np.testing.assert_allclose(found.x, want, rtol=0, atol=1e-12)


def test_damped_steps_solve_a_quadratic():
  data = _quadratic_data()
  config = newton.NewtonConfig(rtol=1e-12)
  found = newton.minimize(_QUADRATIC, jnp.ones(20), data, config=config)
  assert found.reason == 1
  assert found.num_steps <= 8
  np.testing.assert_allclose(found.x, np.linalg.solve(*data), atol=1e-10)
  used = found.log.loss[: found.num_steps]
  assert (np.diff(used) <= 4 * np.finfo(float).eps * abs(used[:-1])).all()
  assert np.isnan(found.log.loss[found.num_steps :]).all()
  assert (found.log.num_rows == -1).all()


def _saddle(x, data):
  del data
  return (x @ x) ** 2 / 4 - x[0] ** 2 / 2


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_leaves_a_saddle(solver):
  config = newton.NewtonConfig(linear_solver=solver)
  found = newton.minimize(
    _autodiff(_saddle), jnp.full(4, 1e-3), None, config=config
  )
  np.testing.assert_allclose(found.x, [1, 0, 0, 0], atol=1e-8)
  losses = found.log.loss[: found.num_steps]
  assert (np.diff(losses) <= 4 * np.finfo(float).eps * abs(losses[:-1])).all()
  if solver == "cholesky":
    attempts = found.num_steps + found.log.num_shifts[: found.num_steps].sum()
    assert found.num_steps == 10
    assert attempts == 19


def _barrier(x, data):
  return data @ x - jnp.log(x).sum()


def test_stays_in_the_domain():
  problem = _autodiff(_barrier)._replace(
    in_domain=lambda x, data: (x > 0).all()
  )
  data = jnp.array([0.1, 1.0, 10.0])
  found = newton.minimize(problem, jnp.full(3, 0.05), data)
  np.testing.assert_allclose(found.x, 1 / data, rtol=1e-8)
  assert all(np.isfinite(x[: found.num_steps]).all() for x in found.log)


@pytest.mark.parametrize("start", [[-1.0, 1.0, 1.0], [np.nan, 1.0, 1.0]])
def test_bad_starts_come_back(start):
  problem = _autodiff(_barrier)._replace(
    in_domain=lambda x, data: (x > 0).all()
  )
  start = jnp.array(start)
  found = newton.minimize(problem, start, jnp.ones(3))
  assert found.reason == 4
  assert found.num_steps == 0
  np.testing.assert_array_equal(found.x, start)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_stuck_at_the_edge_of_the_domain(offset):
  """Steps that only the edge makes short are no sign of a minimum."""

  def loss(x, data):
    del data
    return ((x - 2.0) ** 2).sum() / 2 + offset

  problem = _autodiff(loss)._replace(in_domain=lambda x, data: x[0] < 1)
  config = newton.NewtonConfig(max_steps=100)
  found = newton.minimize(problem, jnp.zeros(1), None, config=config)
  assert found.reason == 3
  assert 1 - 1e-12 < found.x[0] < 1
  np.testing.assert_allclose(found.grad_norm, 1.0, rtol=1e-6)


def test_stuck_at_a_kink():
  def loss(x, data):
    del data
    return 2 * jnp.abs(x - 1.0).sum() + (x**2).sum() / 2

  config = newton.NewtonConfig(max_steps=100)
  found = newton.minimize(
    _autodiff(loss), jnp.full(1, -3.0), None, config=config
  )
  assert found.reason == 3
  np.testing.assert_allclose(found.x, 1.0, atol=1e-6)


def test_the_rest_of_a_positive_hessian_may_be_indefinite():
  """Without its low-rank part, which is then what makes it positive."""

  def curvature(x, data):
    del data
    return newton.StructuredCurvature(
      jnp.eye(3),
      1 + 12 * x**2 * jnp.array([0.0, 1.0, 1.0]) - 2 * jnp.eye(3)[0],
      jnp.eye(3)[:, :1],
      3 * jnp.eye(1),
      jnp.zeros(()),
    )

  def loss(x, data):
    weights = jnp.array([2.0, 1.0, 1.0])
    return weights @ x**2 / 2 + (x[1:] ** 4).sum() - data @ x

  problem = newton.Problem(loss, jax.value_and_grad(loss), curvature)
  found = {}
  for solver in ("cholesky", "woodbury"):
    config = newton.NewtonConfig(linear_solver=solver)
    found[solver] = newton.minimize(
      problem, jnp.ones(3), jnp.array([1.0, 2.0, -3.0]), config=config
    )
    assert found[solver].reason == 1
  assert found["woodbury"].num_steps == found["cholesky"].num_steps
  assert found["woodbury"].log.num_shifts.max() == 0
  np.testing.assert_allclose(
    found["woodbury"].x, found["cholesky"].x, rtol=0, atol=1e-12
  )


def test_data_that_are_not_finite_are_a_bad_start():
  q, b = _quadratic_data()
  found = newton.minimize(_QUADRATIC, jnp.ones(20), (q, b.at[3].set(np.inf)))
  assert found.reason == 4


def test_nothing_to_do_at_the_minimum():
  found = newton.minimize(
    _QUADRATIC, jnp.zeros(20), (_quadratic_data()[0], jnp.zeros(20))
  )
  assert (found.reason, found.num_steps) == (1, 0)


def test_stops_where_rounding_rules():
  """A gradient of 0 is out of reach: the loss is 1e8 beside it."""

  def loss(x, data):
    return 1e8 + ((x - data) ** 4).sum()

  config = newton.NewtonConfig(rtol=0.0, max_steps=200)
  found = newton.minimize(
    _autodiff(loss), jnp.zeros(3), jnp.ones(3), config=config
  )
  assert found.reason == 2
  assert abs(found.x - 1).max() < 1e-1


def test_the_gradient_tells_where_the_loss_is_all_rounding():
  def smooth(x, data):
    return jnp.log(jnp.cosh(x - data)).sum()

  def value_and_grad(x, data):
    # Rounding as of a loss that is a long sum.
    noise = 10 * np.finfo(float).eps * jnp.sin(1e13 * x.sum())
    loss, grad = jax.value_and_grad(smooth)(x, data)
    return 1 + loss + noise, grad

  problem = _autodiff(smooth)._replace(value_and_grad=value_and_grad)
  config = newton.NewtonConfig(rtol=1e-15)
  starts = 0.3 * jax.random.normal(jax.random.key(0), (50, 3))
  found = jax.vmap(
    lambda x: newton.minimize(problem, x, jnp.zeros(3), config=config)
  )(starts)
  assert found.grad_norm.max() < 1e-15


def test_error_is_a_factor_in_the_norm_of_the_hessian_alone():
  """Curvature off by a tenth: a factor of 1/9 there, any in the plain one."""
  for kappa, least in ((1e2, 1.0), (1e4, 5.0), (1e6, 50.0)):
    root = np.diag([1, kappa**0.5])
    off = root @ (np.eye(2) + 0.1 * np.array([[0, 1], [1, 0]])) @ root
    data = jnp.asarray(root @ root), jnp.zeros(2)
    problem = _QUADRATIC._replace(
      curvature=lambda x, data, off=off: newton.DenseCurvature(jnp.asarray(off))
    )
    config = newton.NewtonConfig(pure=True, max_steps=1)
    angles = np.linspace(0, np.pi, 401)
    starts = np.stack([np.cos(angles), np.sin(angles) * kappa**-0.5], 1)

    def factor(norm, problem=problem, config=config, data=data, starts=starts):
      run = jax.vmap(
        lambda x: newton.minimize(problem, x, data, config=config).x
      )
      return (norm(np.asarray(run(jnp.asarray(starts)))) / norm(starts)).max()

    assert (
      factor(lambda x, root=root: np.linalg.norm(x @ root, axis=1)) <= 0.112
    )
    assert factor(lambda x: np.linalg.norm(x, axis=1)) > least


def test_vmap_over_starts_is_a_loop():
  problem, starts = _autodiff(_saddle), 0.5 * _starts(8, 4)
  together = jax.vmap(lambda x: newton.minimize(problem, x, None))(starts)
  for i, start in enumerate(starts):
    alone = newton.minimize(problem, start, None)
    assert alone.num_steps == together.num_steps[i]
    np.testing.assert_allclose(alone.x, together.x[i], rtol=0, atol=1e-12)


def _starts(*shape):
  return jnp.asarray(np.random.default_rng(5).standard_normal(shape))


def test_new_data_do_not_recompile():
  newton.minimize(_QUADRATIC, jnp.ones(20), _quadratic_data())
  others = [_quadratic_data(seed) for seed in (1, 2)]
  with no_recompilation():
    for data in others:
      newton.minimize(_QUADRATIC, jnp.ones(20), data)


def test_steps_by_hand_are_those_of_minimize():
  problem, x = _autodiff(_saddle), jnp.full(4, 0.3)
  found = newton.minimize(problem, x, None)
  state = newton.init(problem, x, None)
  losses = []
  while state.reason == -1:
    state, info = newton.step(problem, state, None)
    losses.append(info.loss)
  np.testing.assert_allclose(state.x, found.x, rtol=0, atol=1e-14)
  np.testing.assert_allclose(losses, found.log.loss[: found.num_steps])


# --- least squares ---


def _curve(x, data):
  t, y = data
  return x[0] * jnp.exp(-x[1] * t) - y


@pytest.mark.parametrize("curvature", ["newton", "gauss_newton"])
@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_least_squares(curvature, solver):
  t = jnp.linspace(0, 3, 30)
  data = (t, 2 * jnp.exp(-0.7 * t))
  problem = newton.least_squares_problem(_curve)
  config = newton.NewtonConfig(curvature=curvature, linear_solver=solver)
  found = newton.minimize(problem, jnp.array([1.0, 0.2]), data, config=config)
  np.testing.assert_allclose(found.x, [2, 0.7], rtol=1e-6)
  assert problem is newton.least_squares_problem(_curve)


def test_ridge_of_least_squares():
  a, b = _starts(30, 4), _starts(30)
  problem = newton.least_squares_problem(
    lambda x, ab: ab[0] @ x - ab[1], ridge=0.5
  )
  found = newton.minimize(problem, jnp.zeros(4), (a, b))
  want = np.linalg.solve(a.T @ a + 0.5 * np.eye(4), a.T @ b)
  np.testing.assert_allclose(found.x, want, rtol=1e-8)


# --- implicit differentiation ---


def _smooth(x, data):
  a, b = data
  return jnp.logaddexp(0, a @ x).sum() - b @ x + x @ x / 2


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_implicit_gradient_is_a_difference_quotient(solver):
  problem = _autodiff(_smooth)
  data = (_starts(12, 3), 0.3 * _starts(3))
  goal = jnp.array([1.0, -2.0, 0.5])
  config = newton.NewtonConfig(rtol=1e-13, linear_solver=solver)

  def outer(data, x0):
    x = newton.implicit_solution(problem, x0, data, config=config)
    return ((x - goal) ** 2).sum()

  grads, d_start = jax.grad(outer, argnums=(0, 1))(data, jnp.zeros(3))
  assert not d_start.any()
  run, h = jax.jit(outer), 1e-4
  for leaf, grad in zip((0, 1), grads, strict=True):
    flat = np.asarray(data[leaf]).ravel()
    for i in range(flat.size):
      values = []
      for sign in (1, -1):
        moved = flat.copy()
        moved[i] += sign * h
        new = list(data)
        new[leaf] = jnp.asarray(moved.reshape(data[leaf].shape))
        values.append(run(tuple(new), jnp.zeros(3)))
      want = (values[0] - values[1]) / (2 * h)
      np.testing.assert_allclose(np.ravel(grad)[i], want, atol=1e-6)


# --- certificate ---


def test_certificate_of_a_cubic():
  """Hessian diag(2 + 6 x): least eigenvalue 2 at 0, Lipschitz constant 6."""

  def loss(x, data):
    del data
    return (x**2 + x**3).sum()

  found = newton.local_certificate(
    jax.random.key(0),
    _autodiff(loss),
    jnp.zeros(3),
    None,
    radius=0.1,
    num_pairs=200,
  )
  np.testing.assert_allclose(found.least_eigenvalue, 2)
  # The largest entry of a difference over its length: near 6 for some pair.
  assert 5 < found.lipschitz <= 6 * (1 + 1e-9)
  np.testing.assert_allclose(found.radius, 0.2 / found.lipschitz)


# --- refusals ---


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_rows": 0, "sketch": "leverage"}, "num_rows must be >= 1, got 0"),
    ({"sketch": "x"}, "sketch must be one of None, 'leverage', 'uniform', got"),
    ({"sketch": "leverage"}, "rng is required when sketch='leverage'"),
    ({"num_rows": 5}, "num_rows and refresh are of no use without a sketch"),
    (
      {"curvature": "gauss_newton"},
      "curvature='gauss_newton' is not provided by this problem",
    ),
    (
      {"linear_solver": "dual"},
      "linear_solver='dual' needs a StructuredCurvature, got DenseCurvature",
    ),
    (
      {"linear_solver": "dual", "sketch": "uniform"},
      "linear_solver must be 'cholesky' or 'cg' with a sketch, got 'dual'",
    ),
    ({"max_steps": 0}, "max_steps must be >= 1, got 0"),
    ({"mu0": 0.0}, "mu0 must be in [1e-12, 1000000000000.0], got 0.0"),
    ({"rtol": -1.0}, "rtol must be non-negative, got -1.0"),
  ],
)
def test_refused_options(options, message):
  config = newton.NewtonConfig(**options)
  with pytest.raises(ValueError, match=re.escape(message)):
    newton.minimize(_QUADRATIC, jnp.ones(20), _quadratic_data(), config=config)


def test_refused_sketch_of_a_dense_curvature():
  config = newton.NewtonConfig(sketch="uniform")
  message = "sketch='uniform' needs a StructuredCurvature, got DenseCurvature"
  with pytest.raises(ValueError, match=message):
    newton.minimize(
      _QUADRATIC,
      jnp.ones(20),
      _quadratic_data(),
      config=config,
      rng=jax.random.key(0),
    )


@pytest.mark.parametrize(
  ("x0", "message"),
  [
    (np.ones((3, 4)), "x0 must be 1-D, got shape (3, 4)"),
    (np.ones(3, int), "x0 must have a floating dtype, got int"),
    (
      np.ones(20, np.float32),
      "x0 must have the dtype of the loss, float64, got float32",
    ),
  ],
)
def test_refused_starts(x0, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    newton.minimize(_QUADRATIC, x0, _quadratic_data())


def test_dual_needs_a_scalar_constant():
  def curvature(x, data):
    del data
    low = jnp.zeros((len(x), 0))
    return newton.StructuredCurvature(
      jnp.ones((2, len(x))),
      jnp.ones(2),
      low,
      jnp.zeros((0, 0)),
      jnp.eye(len(x)),
    )

  problem = _QUADRATIC._replace(curvature=curvature)
  config = newton.NewtonConfig(linear_solver="dual")
  message = "linear_solver='dual' needs const = ridge * I, given as a scalar"
  with pytest.raises(ValueError, match=re.escape(message)):
    newton.minimize(problem, jnp.ones(20), _quadratic_data(), config=config)
