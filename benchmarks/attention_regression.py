"""What do closed forms and Newton's method save in fitting a head of attention?

To a millionth of the first gradient, float64, from one start near a planted
head: ours, with the Hessian of Gauss-Newton, against L-BFGS of scipy and of
optax and Adam of optax, all with our loss and gradient, Levenberg-Marquardt of
optimistix, with the Jacobian of JAX, and ours with the whole Hessian. The
Hessian: blocks in closed form against ``jax.hessian``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app

from benchmarks import _race, _solvers
from jaxattn import newton
from jaxattn.regression import attention

_RIDGE, _RTOL = 1e-3, 1e-6
_ADAM_STEP, _ADAM_STEPS = 2e-2, 2000
_LBFGS_BAR, _LM_BAR, _HESSIAN_BAR = 10.0, 3.0, 50.0


class _Instance(NamedTuple):
  data: attention.AttentionRegressionData
  start: jax.Array


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  jax.config.update("jax_enable_x64", True)
  instance = _planted(1024, 8)
  rows = [*fits(instance), *hessian(instance), *hessian(_planted(512, 16))]
  _race.publish("attention_regression", "Regression with attention", rows)


def fits(instance: _Instance) -> list[_race.Row]:
  """Until the gradient has fallen to a millionth."""
  data, start = instance
  n, d = data.a1.shape
  problem = attention.problem()
  scale = 1 / float(attention.loss(start, data))
  of_scale = {"scale": scale, "tol": _RTOL}
  exact = newton.NewtonConfig(mu0=0.1, rtol=_RTOL)
  ours = exact._replace(curvature="gauss_newton")
  solvers = {
    "ours": _solvers.ours(problem, start, data, ours),
    "whole Hessian": _solvers.ours(problem, start, data, exact),
    "L-BFGS-B of scipy": _solvers.scipy(
      "L-BFGS-B", problem, start, data, **of_scale
    ),
    "optax.lbfgs": _solvers.optax_lbfgs(problem, start, data, **of_scale),
    "optax.adam": _adam(problem, start, data),
    "Levenberg-Marquardt of optimistix": _solvers.optimistix_lm(
      _residual, problem, start, data, tol=_RTOL
    ),
  }
  bars = {
    "L-BFGS-B of scipy": _LBFGS_BAR,
    "optax.lbfgs": _LBFGS_BAR,
    "Levenberg-Marquardt of optimistix": _LM_BAR,
  }
  return _solvers.race(
    f"n = {n}, d = {d}",
    solvers,
    problem,
    start,
    data,
    _RTOL,
    bars=bars,
    rounds=3,
  )


def hessian(instance: _Instance) -> list[_race.Row]:
  """The whole Hessian at the start."""
  data, start = instance
  n, d = data.a1.shape
  contestants: dict[str, Callable[[], object]] = {
    "ours": functools.partial(jax.jit(attention.curvature), start, data),
    "autodiff": functools.partial(jax.jit(jax.hessian(_loss)), start, data),
  }
  seconds = _race.race(contestants, rounds=3)
  name = f"Hessian of {start.size}, n = {n}, d = {d}: jax.hessian / blocks"
  return [_race.ratio(name, seconds, "ours", "autodiff", _HESSIAN_BAR)]


def _planted(n: int, d: int) -> _Instance:
  rng = np.random.default_rng(0)
  a1, a2, a3 = jnp.asarray(rng.normal(size=(3, n, d)))
  x = jnp.asarray(rng.normal(size=(d, d)) / 2)
  y = jnp.asarray(rng.normal(size=(d, d)))
  b = attention.predict(x, y, a1, a2, a3)
  b += 0.01 * rng.normal(size=b.shape)
  data = attention.prepare(a1, a2, a3, b, ridge_x=_RIDGE, ridge_y=_RIDGE)
  planted = jnp.concatenate([x.reshape(-1), y.reshape(-1)])
  return _Instance(data, planted + 0.1 * rng.normal(size=planted.shape))


def _residual(
  v: jax.Array, data: attention.AttentionRegressionData
) -> jax.Array:
  """Of the fit and of the penalties, as one would write it down."""
  d = data.a1.shape[1]
  x, y = v.reshape(2, d, d)
  weights = jax.nn.softmax(data.a1 @ x @ data.a2.T)
  fit = weights @ (data.a3 @ y) - data.b
  return jnp.concatenate([fit.reshape(-1), jnp.sqrt(_RIDGE) * v])


def _loss(v: jax.Array, data: attention.AttentionRegressionData) -> jax.Array:
  return (_residual(v, data) ** 2).sum() / 2


def _adam(
  problem: newton.Problem,
  start: jax.Array,
  data: attention.AttentionRegressionData,
) -> _solvers.Solver:
  """Adam of optax, until the gradient is as small or its steps are over."""
  optimizer = optax.adam(_ADAM_STEP)

  @jax.jit
  def run(start: jax.Array, data: attention.AttentionRegressionData) -> Any:
    grad = problem.value_and_grad(start, data)[1]
    goal = _RTOL * jnp.linalg.norm(grad)

    def running(carry: Any) -> jax.Array:
      _, _, grad, num = carry
      return (jnp.linalg.norm(grad) > goal) & (num < _ADAM_STEPS)

    def body(carry: Any) -> Any:
      x, state, grad, num = carry
      update, state = optimizer.update(grad, state)
      x = x + update
      return x, state, problem.value_and_grad(x, data)[1], num + 1

    carry = start, optimizer.init(start), grad, 0
    return jax.lax.while_loop(running, body, carry)[0]

  return functools.partial(run, start, data)


if __name__ == "__main__":
  app.run(main)
