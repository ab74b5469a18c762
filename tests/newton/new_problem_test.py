"""The problem that WORKSPACE.md writes in a few lines is a whole one."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxattn import newton

_PAGE = pathlib.Path(__file__).parents[2] / "WORKSPACE.md"


@pytest.fixture(scope="module")
def written():
  section = _PAGE.read_text().partition("## Add a regression problem")[2]
  (block,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.S)
  lines = [line for line in block.splitlines() if line.strip()]
  assert len(lines) < 40
  names = {"__name__": "written"}
  exec(block, names)
  return names


@pytest.fixture(scope="module")
def data(written):
  rng = np.random.default_rng(0)
  a = rng.normal(size=(2000, 4))
  b = rng.uniform(size=2000) < 1 / (1 + np.exp(-a @ [1.0, -2.0, 0.5, 0.0]))
  return written["LogisticData"](
    jnp.asarray(a), jnp.asarray(b, float), jnp.asarray(0.1)
  )


def test_derivatives(written, data):
  problem, x = written["PROBLEM"], jnp.array([0.3, -0.1, 0.2, 1.0])
  value, grad = problem.value_and_grad(x, data)
  want = jax.value_and_grad(problem.loss)(x, data)
  np.testing.assert_allclose(value, want[0], rtol=1e-12)
  np.testing.assert_allclose(grad, want[1], rtol=1e-11)
  np.testing.assert_allclose(
    newton.curvature_dense(problem.curvature(x, data)),
    jax.hessian(problem.loss)(x, data),
    rtol=0,
    atol=1e-10,
  )


@pytest.mark.parametrize("sketch", [None, "leverage"])
def test_fit(written, data, sketch):
  config = newton.NewtonConfig(sketch=sketch)
  rng = None if sketch is None else jax.random.key(0)
  problem = written["PROBLEM"]
  found = newton.minimize(problem, jnp.zeros(4), data, config=config, rng=rng)
  assert found.reason == 1
  want = optimize.minimize(
    lambda x: tuple(map(np.asarray, problem.value_and_grad(x, data))),
    np.zeros(4),
    jac=True,
    method="BFGS",
    options={"gtol": 1e-8},
  )
  np.testing.assert_allclose(found.x, want.x, rtol=0, atol=1e-7)


def test_gradient_in_the_data(written, data):
  def first(ridge):
    return newton.implicit_solution(
      written["PROBLEM"], jnp.zeros(4), data._replace(ridge=ridge)
    )[0]

  run, h = jax.jit(first), 1e-3
  got = jax.grad(run)(data.ridge)
  want = (run(data.ridge + h) - run(data.ridge - h)) / (2 * h)
  np.testing.assert_allclose(got, want, rtol=1e-5)
