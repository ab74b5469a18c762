"""Implicit gradients by each solver; their values are in minimize_test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import newton

_ROWS, _PARAMETERS = 6, 40


def _loss(x, data):
  a, b, ridge = data
  return jnp.logaddexp(0, a @ x).sum() - b @ (a @ x) + ridge * (x @ x) / 2


def _curvature(x, data):
  a, _, ridge = data
  share = jax.nn.sigmoid(a @ x)
  nothing = jnp.zeros((len(x), 0), x.dtype), jnp.zeros((0, 0), x.dtype)
  return newton.StructuredCurvature(a, share * (1 - share), *nothing, ridge)


_PROBLEM = newton.Problem(_loss, jax.value_and_grad(_loss), _curvature)


def _data():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(_ROWS, _PARAMETERS)), rng.uniform(size=_ROWS)
  return jnp.asarray(a), jnp.asarray(b), jnp.asarray(0.3)


def _gradient(solver):
  def outer(data):
    x = newton.implicit_solution(
      _PROBLEM,
      jnp.zeros(_PARAMETERS),
      data,
      config=newton.NewtonConfig(rtol=1e-13, linear_solver=solver),
    )
    return jnp.sin(jnp.arange(_PARAMETERS)) @ x

  return jax.grad(outer)


@pytest.mark.parametrize("solver", ["woodbury", "dual", "cg"])
def test_solvers_agree(solver):
  for got, want in zip(
    _gradient(solver)(_data()), _gradient("cholesky")(_data()), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
  ("solver", "square"), [("cholesky", True), ("dual", False), ("cg", False)]
)
def test_no_square_matrix_where_the_solver_forms_none(solver, square):
  program = str(jax.make_jaxpr(_gradient(solver))(_data()))
  assert (f"f64[{_PARAMETERS},{_PARAMETERS}]" in program) == square
