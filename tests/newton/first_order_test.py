"""First-order methods: rates that are theorems, projections, domains."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxattn.newton.first_order import fista, gradient_descent
from tests._recompile import no_recompilation


def _quadratic(condition=1e3, p=30, seed=0):
  """Eigenvalues from 1 / condition to 1, and the minimum."""
  rng = np.random.default_rng(seed)
  basis = np.linalg.qr(rng.normal(size=(p, p)))[0]
  sizes = np.geomspace(1 / condition, 1, p)
  return jnp.asarray(basis * sizes @ basis.T), jnp.asarray(rng.normal(size=p))


def _half_square(q, best, x):
  gradient = q @ (x - best)
  return (x - best) @ gradient / 2, gradient


def test_plain_descent_is_the_recursion():
  q, best = _quadratic()
  found = gradient_descent(
    Partial(_half_square, q, best), jnp.zeros(30), step_size=0.7, num_steps=40
  )
  x = np.zeros(30)
  for k in range(40):
    loss, grad = _half_square(q, best, x)
    np.testing.assert_allclose(found.log.loss[k], loss, rtol=1e-10)
    norm = np.linalg.norm(grad)
    np.testing.assert_allclose(found.log.grad_norm[k], norm, rtol=1e-10)
    x = x - 0.7 * grad
  np.testing.assert_allclose(found.x, x, rtol=1e-10)
  loss, grad = _half_square(q, best, x)
  np.testing.assert_allclose(found.loss, loss, rtol=1e-10)
  np.testing.assert_allclose(found.grad, grad, rtol=1e-8)
  without = fista(
    Partial(_half_square, q, best),
    jnp.zeros(30),
    step_size=0.7,
    num_steps=40,
    momentum=False,
  )
  np.testing.assert_array_equal(without.x, found.x)


def test_momentum_keeps_its_bound_where_plain_descent_breaks_it():
  q, best = _quadratic(condition=1e6)
  f, start = Partial(_half_square, q, best), jnp.zeros(30)
  steps = np.arange(1, 400)
  bound = 2 * float(best @ best) / (steps + 1.0) ** 2
  fast, plain = (
    np.array(run(f, start, step_size=1.0, num_steps=400).log.loss[1:])
    for run in (fista, gradient_descent)
  )
  # Momentum evaluates at y, one extrapolation past x: the bound has room.
  assert (fast <= bound).all()
  assert (plain > bound).any()
  # Exactly 1 / L is not too large a step: losses of plain descent never rise.
  assert (np.diff(plain) <= 0).all()


def test_linear_rate_of_plain_descent():
  q, best = _quadratic(condition=20)
  f = Partial(_half_square, q, best)
  found = gradient_descent(f, jnp.zeros(30), step_size=1.0, num_steps=2000)
  errors = np.sqrt(np.asarray(found.log.loss))
  np.testing.assert_allclose(errors[301] / errors[300], 1 - 1 / 20, rtol=1e-5)


@pytest.mark.parametrize("momentum", [False, True])
def test_projection_onto_a_box(momentum):
  q, best = _quadratic(condition=50)
  found = fista(
    Partial(_half_square, q, best),
    jnp.zeros(30),
    step_size=1.0,
    num_steps=2000,
    momentum=momentum,
    projection=lambda x: jnp.clip(x, -0.5, 0.5),
  )
  x, grad = np.asarray(found.x), np.asarray(found.grad)
  assert abs(x).max() <= 0.5
  # Of the minimum in a box: no slope inside, and outwards at the walls.
  assert (abs(x) == 0.5).any()
  inside = abs(x) < 0.5
  np.testing.assert_allclose(grad[inside], 0, atol=1e-8)
  assert (grad * x <= 1e-8)[~inside].all()
  assert found.log.grad_norm[-1] < 1e-8


def test_backtracking_needs_no_step_size_and_keeps_a_domain():
  weight = jnp.array([0.5, 1.0, 2.0])

  def value_and_grad(x):
    return weight @ x - jnp.log(x).sum(), weight - 1 / x

  found = gradient_descent(
    value_and_grad,
    jnp.full(3, 0.05),
    step_size=1e4,
    num_steps=400,
    backtracking=True,
  )
  np.testing.assert_allclose(found.x, 1 / weight, rtol=1e-3)
  losses = np.asarray(found.log.loss)
  assert np.isfinite(losses).all()
  assert (np.diff(losses) <= 4.5e-16 * abs(losses[:-1])).all()
  assert (found.log.step_size > 0).all()
  assert found.log.step_size[0] < 1


@pytest.mark.parametrize("step_size", [1.0, 1e30])
def test_backtracking_stays_where_nothing_is_lower(step_size):
  def value_and_grad(x):
    return jnp.where(x[0] == 1, 2.0, jnp.nan), jnp.ones(1)

  # Twice over, so that a failed search does not spoil the next.
  found = gradient_descent(
    value_and_grad,
    jnp.ones(1),
    step_size=step_size,
    num_steps=2,
    backtracking=True,
  )
  assert found.x[0] == 1
  assert not found.log.step_size.any()
  # It is no minimum, and does not look like one.
  np.testing.assert_allclose(found.log.grad_norm, 1)


def test_backtracking_at_a_minimum_for_ever():
  """Steps that double where none is needed would end in infinity."""
  found = gradient_descent(
    lambda x: ((x**2).sum(), 2 * x),
    jnp.zeros(2),
    step_size=1.0,
    num_steps=1200,
    backtracking=True,
  )
  np.testing.assert_array_equal(found.x, 0)
  assert not found.log.grad_norm.any()


def test_matrices_maps_and_single_precision():
  target = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)

  def value_and_grad(x):
    return ((x - target) ** 2).sum() / 2, x - target

  def run(x0):
    return fista(value_and_grad, x0, step_size=0.5, num_steps=60)

  starts = jnp.stack([jnp.zeros((2, 3)), jnp.ones((2, 3))]).astype(jnp.float32)
  found = jax.vmap(run)(starts)
  assert found.x.dtype == found.loss.dtype == jnp.float32
  assert found.log.loss.shape == (2, 60)
  for i, x0 in enumerate(starts):
    np.testing.assert_allclose(run(x0).x, found.x[i], atol=1e-6)
    np.testing.assert_allclose(found.x[i], target, atol=1e-3)


@pytest.mark.parametrize("backtracking", [False, True])
def test_compiles_once(backtracking):
  def run(seed, step_size):
    q, best = _quadratic(seed=seed)
    return gradient_descent(
      Partial(_half_square, q, best),
      jnp.zeros(30),
      step_size=jnp.asarray(step_size),
      num_steps=3,
      backtracking=backtracking,
    ).x

  run(0, 0.5)
  with no_recompilation():
    run(1, 0.7)


@pytest.mark.parametrize("method", [fista, gradient_descent])
@pytest.mark.parametrize(
  ("x0", "options", "message"),
  [
    (np.ones(2, int), {}, "x0 must have a floating dtype, got int"),
    (np.ones(2), {"step_size": 0.0}, "step_size must be positive, got 0.0"),
    (np.ones(2), {"num_steps": 0}, "num_steps must be >= 1, got 0"),
  ],
)
def test_refused_arguments(method, x0, options, message):
  options = {"step_size": 1.0, "num_steps": 1} | options
  with pytest.raises(ValueError, match=re.escape(message)):
    method(lambda x: (x.sum(), x), x0, **options)


def test_refused_switches():
  with pytest.raises(ValueError, match="momentum must be one of"):
    fista(None, np.ones(2), step_size=1.0, num_steps=1, momentum=0.5)
  with pytest.raises(ValueError, match="backtracking must be one of"):
    gradient_descent(
      None, np.ones(2), step_size=1.0, num_steps=1, backtracking="yes"
    )
