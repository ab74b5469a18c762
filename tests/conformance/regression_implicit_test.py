"""The gradient of every regression problem's minimum in its data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import newton
from tests.conformance._regression import MEMBERS


@pytest.fixture(params=MEMBERS, ids=lambda m: m.name)
def member(request):
  return request.param


def test_implicit_gradient_is_a_difference_quotient(member):
  data, start = member.planted()
  config = newton.NewtonConfig(mu0=member.mu0, rtol=1e-13, max_steps=100)
  leaf = getattr(data, member.leaf)
  goal = jnp.sin(jnp.arange(len(start), dtype=leaf.dtype))
  sides = np.random.default_rng(0).normal(size=(3, *leaf.shape))

  # One program for both: what costs is to compile the solver.
  @jax.jit
  @jax.value_and_grad
  def outer(leaf):
    x = newton.implicit_solution(
      member.problem,
      start,
      data._replace(**{member.leaf: leaf}),
      config=config,
    )
    return goal @ x

  grad = outer(leaf)[1]
  for side in sides * jnp.abs(leaf).max():
    long, short = (
      (outer(leaf + h * side)[0] - outer(leaf - h * side)[0]) / (2 * h)
      for h in (2e-4, 1e-4)
    )
    # Without their error of second order, which can be 5e-6.
    want = (4 * short - long) / 3
    np.testing.assert_allclose((grad * side).sum(), want, rtol=1e-6)
