"""What do closed forms and Newton's method save in fitting a head of attention?

To a millionth of the first gradient, float64, from one start near a planted
head: ours against scipy's L-BFGS-B and optimistix' Levenberg-Marquardt with the
same loss, differentiated by JAX. The Hessian: blocks in closed form against
``jax.hessian``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimistix  # pyright: ignore[reportMissingImports]
from absl import app
from scipy import optimize

from benchmarks import _race
from jaxattn import newton
from jaxattn.regression import attention

_RIDGE, _RTOL = 1e-3, 1e-6
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
  ours = functools.partial(
    newton.minimize,
    attention.problem(),
    start,
    data,
    config=newton.NewtonConfig(mu0=0.1, rtol=_RTOL),
  )
  contestants = {
    "ours": ours,
    "lbfgs": _lbfgs(instance),
    "lm": _levenberg_marquardt(instance),
  }
  for name, run in contestants.items():
    _report(name, run(), data)
  seconds = _race.race(contestants, rounds=3)
  name = f"n = {n}, d = {d}"
  return [
    _race.ratio(
      f"{name}: L-BFGS-B / Newton", seconds, "ours", "lbfgs", _LBFGS_BAR
    ),
    _race.ratio(
      f"{name}: Levenberg-Marquardt / Newton", seconds, "ours", "lm", _LM_BAR
    ),
  ]


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


def _lbfgs(instance: _Instance) -> Callable[[], Any]:
  data, start = instance
  both = jax.jit(jax.value_and_grad(_loss))
  target = _RTOL * float(jnp.linalg.norm(both(start, data)[1]))

  def value_and_grad(v: np.ndarray) -> tuple[float, np.ndarray]:
    value, grad = both(v, data)
    return float(value), np.asarray(grad)

  # Its own test is on the largest entry of the gradient.
  options = {
    "gtol": target / np.sqrt(start.size),
    "ftol": 0.0,
    "maxiter": 5000,
    "maxfun": 10000,
  }
  return lambda: jnp.asarray(
    optimize.minimize(
      value_and_grad,
      np.asarray(start),
      jac=True,
      method="L-BFGS-B",
      options=options,
    ).x
  )


def _levenberg_marquardt(instance: _Instance) -> Callable[[], Any]:
  data, start = instance
  # Its test is on steps: with these it ends one step or less past the gradient.
  solver = optimistix.LevenbergMarquardt(rtol=1e-4, atol=1e-4)

  @jax.jit
  def run(start: jax.Array) -> jax.Array:
    return optimistix.least_squares(
      _residual, solver, start, args=data, max_steps=200, throw=False
    ).value

  return functools.partial(run, start)


def _report(
  name: str, found: Any, data: attention.AttentionRegressionData
) -> None:
  """Prints where each ended: a race to different places is none."""
  x = found.x if isinstance(found, newton.NewtonResult) else found
  loss, grad = jax.jit(attention.value_and_grad)(x, data)
  print(f"{name}: loss {loss:.10g}, gradient {jnp.linalg.norm(grad):.2g}")


if __name__ == "__main__":
  app.run(main)
