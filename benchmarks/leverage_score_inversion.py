"""What do closed forms save in inverting leverage scores?

Float64, from the analytic center to a point at 70 % of the way to the wall, and
how often at all at 97 %.
Peers: Levenberg-Marquardt of optimistix with derivatives of JAX, and that of
scipy with our Jacobian; the Hessian and the gradient of JAX, of the loss as one
writes it down, against ours.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optimistix  # pyright: ignore[reportMissingImports]
from absl import app
from jax.scipy import linalg
from scipy import optimize

from benchmarks import _race
from experiments.leverage_score_inversion import planted
from jaxattn.regression import leverage_inversion
from jaxattn.regression.leverage_inversion import (
  LeverageInversionData,
  invert_leverage,
  leverage,
  leverage_jacobian,
)

_FIT_BAR, _HESSIAN_BAR, _GRADIENT_BAR, _SCIPY_BAR = 4.0, 4.0, 2.0, 0.5
_SHARE = 0.7
# Errors of x beyond which a solver has not solved the problem.
_SOLVED = 1e-8


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  with jax.enable_x64(True):
    rows = [
      *fit(1000, 20),
      *fit(3000, 20),
      hessian(1000, 20),
      hessian(3000, 20),
      gradient(3000, 20),
      recovery(60, 5, 30, 0.97),
    ]
  _race.publish("leverage_score_inversion", "Inverting leverage scores", rows)


def fit(n: int, d: int, rounds: int = 5) -> list[_race.Row]:
  """From the center to the point, to rounding."""
  data, x, center = planted(n, d, 0, _SHARE)
  solvers = {
    "ours": lambda: invert_leverage(data.a, data.b, data.sigma, x0=center).x,
    "optimistix": functools.partial(_optimistix(), center, data),
    "scipy": functools.partial(scipy_fit, center, data),
  }
  labels = {
    name: name if _error(run(), x) < _SOLVED else f"{name} (not solved)"
    for name, run in solvers.items()
  }
  seconds = _race.race(solvers, rounds=rounds)
  bars = {"optimistix": _FIT_BAR, "scipy": _SCIPY_BAR}
  return [
    _race.ratio(
      f"inversion, n = {n}, d = {d}: {labels[peer]} LM / {labels['ours']}",
      seconds,
      "ours",
      peer,
      bar,
    )
    for peer, bar in bars.items()
  ]


def hessian(n: int, d: int) -> _race.Row:
  """Ours against forward over reverse of the plain loss."""
  data, x, _ = planted(n, d, 0, _SHARE)
  calls = {
    "ours": lambda x, data: leverage_inversion.curvature(x, data).matrix,
    "jax": jax.hessian(plain_loss),
  }
  name = f"Hessian, n = {n}, d = {d}: jax.hessian / ours"
  return _compare(name, calls, x, data, _HESSIAN_BAR)


def gradient(n: int, d: int) -> _race.Row:
  """Ours against reverse mode on the plain loss."""
  data, x, _ = planted(n, d, 0, _SHARE)
  calls = {
    "ours": leverage_inversion.value_and_grad,
    "jax": jax.value_and_grad(plain_loss),
  }
  name = f"gradient, n = {n}, d = {d}: jax.grad / ours"
  return _compare(name, calls, x, data, _GRADIENT_BAR)


def recovery(n: int, d: int, num: int, share: float) -> _race.Row:
  """Polytopes in which we find the point over those in which scipy does.

  Near the wall: farther from it both may find all of them. The bar is one more.
  """
  found = {"ours": 0, "scipy": 0}
  for seed in range(100, 100 + num):
    data, x, center = planted(n, d, seed, share)
    ours = invert_leverage(data.a, data.b, data.sigma, x0=center).x
    found["ours"] += _error(ours, x) < _SOLVED
    found["scipy"] += _error(scipy_fit(center, data), x) < _SOLVED
  return _race.figure(
    f"found at {100 * share:.0f} % of the way in {found['ours']} of {num} "
    f"polytopes, n = {n}, d = {d}, by scipy in {found['scipy']}: ours / scipy",
    found["ours"] / max(found["scipy"], 1),
    1 + 1 / num,
  )


def plain_loss(x: jax.Array, data: LeverageInversionData) -> jax.Array:
  """The loss by a Cholesky factor and a triangular solve."""
  rows = data.a / (data.a @ x - data.b)[:, None]
  factor = jnp.linalg.cholesky(rows.T @ rows)
  half = linalg.solve_triangular(factor, rows.T, lower=True)
  return (((half**2).sum(0) - data.sigma) ** 2).sum() / 2


def scipy_fit(center: jax.Array, data: LeverageInversionData) -> np.ndarray:
  """MINPACK's Levenberg-Marquardt with our scores and Jacobian."""

  def residual(x: np.ndarray) -> np.ndarray:
    return np.asarray(leverage(jnp.asarray(x), data.a, data.b) - data.sigma)

  # SciPy's annotations know of names of methods only.
  def jacobian(x: np.ndarray) -> Any:
    return np.asarray(leverage_jacobian(jnp.asarray(x), data.a, data.b))

  jac: Any = jacobian
  return optimize.least_squares(
    residual, center, jac, method="lm", xtol=1e-13
  ).x


def _optimistix() -> Callable[..., Any]:
  solver = optimistix.LevenbergMarquardt(rtol=1e-10, atol=1e-10)

  def residual(x: jax.Array, data: LeverageInversionData) -> jax.Array:
    rows = data.a / (data.a @ x - data.b)[:, None]
    factor = jnp.linalg.cholesky(rows.T @ rows)
    half = linalg.solve_triangular(factor, rows.T, lower=True)
    return (half**2).sum(0) - data.sigma

  @jax.jit
  def run(center: jax.Array, data: LeverageInversionData) -> jax.Array:
    return optimistix.least_squares(
      residual, solver, center, data, max_steps=256, throw=False
    ).value

  return run


def _compare(
  name: str,
  calls: dict[str, Callable[..., Any]],
  x: jax.Array,
  data: LeverageInversionData,
  bar: float,
) -> _race.Row:
  contestants = {
    key: functools.partial(jax.jit(call), x, data)
    for key, call in calls.items()
  }
  return _race.ratio(name, _race.race(contestants), "ours", "jax", bar)


def _error(x: Any, want: jax.Array) -> float:
  return float(np.linalg.norm(np.asarray(x) - np.asarray(want)))


if __name__ == "__main__":
  app.run(main)
