"""Iterating to a fixed point, and the gradient of what is found."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.numerics import fixed_point, fixed_point_iteration
from tests._recompile import quick_jit


def test_stops_where_it_stands_still():
  found = fixed_point_iteration(jnp.cos, 1.0, tol=1e-6, max_steps=100)
  steps, x = [], 1.0
  while not steps or steps[-1] > 1e-6:
    new = np.cos(x)
    steps.append(abs(new - x))
    x = new
  assert int(found.num_steps) == len(steps)
  assert bool(found.converged)
  np.testing.assert_allclose(found.x, x, rtol=1e-14)
  np.testing.assert_allclose(found.residuals, steps[-1], rtol=1e-6)
  found = fixed_point_iteration(
    jnp.cos, 1.0, tol=1e-6, max_steps=99, record=True
  )
  np.testing.assert_allclose(found.residuals[: len(steps)], steps, rtol=1e-6)
  assert jnp.isnan(found.residuals[len(steps) :]).all()
  found = fixed_point_iteration(jnp.cos, 1.0, tol=1e-6, max_steps=7)
  assert int(found.num_steps) == 7
  assert not bool(found.converged)


def test_exact_halting_of_integers_and_trees():
  def collatz(state):
    n, steps = state
    after = jnp.where(n % 2 == 0, n // 2, 3 * n + 1)
    return jnp.where(n == 1, n, after), jnp.where(n == 1, steps, steps + 1)

  start = jnp.uint32(27), jnp.float32(0)
  found = fixed_point_iteration(collatz, start, max_steps=200)
  assert [int(leaf) for leaf in found.x] == [1, 111]
  # One application more, to see that nothing changes.
  assert int(found.num_steps) == 112
  assert not fixed_point_iteration(collatz, start, max_steps=111).converged


def test_each_of_a_batch_stops_by_itself():
  run = functools.partial(
    fixed_point_iteration, lambda x: x / 2, tol=1e-3, max_steps=50
  )
  starts = jnp.array([1.0, 1e-2, 1e-9, 1e3])
  batch = jax.vmap(run)(starts)
  alone = [run(x) for x in starts]
  np.testing.assert_array_equal(batch.num_steps, [x.num_steps for x in alone])
  np.testing.assert_array_equal(batch.x, [x.x for x in alone])
  assert len({int(n) for n in batch.num_steps}) == 4


@pytest.mark.parametrize("size", [6, 600])
def test_gradient_is_that_of_the_limit(size):
  # The large one takes GMRES.
  rng = np.random.default_rng(0)
  a = jnp.asarray(0.5 * rng.standard_normal((size, size)) / size**0.5)
  b, c = jnp.asarray(rng.standard_normal((2, size)))

  def f(params, x):
    a, b, _ = params
    return {"x": jnp.tanh(a @ x["x"] + b)}

  def limit(a, b, x0):
    params = a, b, jnp.arange(3)
    found = fixed_point(f, params, {"x": x0}, tol=1e-15, max_steps=300)
    return c @ found["x"], found["x"]

  x0 = jnp.zeros(size)
  grad = quick_jit(jax.grad(limit, argnums=(0, 1, 2), has_aux=True))
  (a_bar, b_bar, x0_bar), x = grad(a, b, x0)
  slope = np.diag(1 - np.asarray(x) ** 2)
  u = np.linalg.solve(np.eye(size) - (slope @ a).T, c)
  np.testing.assert_allclose(b_bar, slope @ u, rtol=1e-11, atol=1e-13)
  want = np.outer(slope @ u, x)
  np.testing.assert_allclose(a_bar, want, rtol=1e-11, atol=1e-13)
  assert not x0_bar.any()


def test_gradient_is_that_of_the_unrolled_loop():
  def unrolled(y):
    x = jnp.ones(())
    for _ in range(60):
      x = jnp.cos(y * x)
    return x

  def implicit(y):
    step = lambda y, x: jnp.cos(y * x)  # noqa: E731
    return fixed_point(step, y, 1.0, tol=0.0, max_steps=200)

  got, want = (jax.grad(f)(0.7) for f in (implicit, unrolled))
  np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"tol": -1.0, "max_steps": 3}, "tol must be non-negative, got -1.0"),
    ({"tol": 1.0, "max_steps": 0}, "max_steps must be >= 1, got 0"),
  ],
)
def test_refused(options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    fixed_point_iteration(jnp.cos, 1.0, **options)
  with pytest.raises(ValueError, match=re.escape(message)):
    fixed_point(lambda p, x: x, 1.0, 1.0, **options)


def test_refused_options():
  with pytest.raises(ValueError, match="record must be one of False, True, go"):
    fixed_point_iteration(jnp.cos, 1.0, max_steps=3, record=2)
  with pytest.raises(ValueError, match="x0 must have a floating dtype, got in"):
    fixed_point(lambda p, x: x, 1.0, jnp.arange(3), tol=0.0, max_steps=3)
