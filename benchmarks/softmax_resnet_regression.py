"""How much faster is Newton's method with a structured Hessian than its peers?

Softmax regression with a skip in float64: n = 50000 items, d = 64 features
whose columns shrink to 1/30, from x = 0 until the gradient is 1e-8 of the
first. Peers: L-BFGS-B of scipy, L-BFGS of optax and BFGS of optimistix, on our
loss and gradient; and the Hessian of JAX against ours.
"""

import functools

import jax
import jax.numpy as jnp
from absl import app

from benchmarks import _race, _solvers
from jaxattn import newton
from jaxattn.regression import softmax_resnet

_FIT_BAR, _HESSIAN_BAR = 8.0, 10.0
_TOL = 1e-8


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  with jax.enable_x64(True):
    rows = [*fit(50_000, 64), *hessian(20_000, 64), targets(5000, 32, 16)]
  _race.publish(
    "softmax_resnet_regression", "Softmax regression with a skip", rows
  )


def fit(n: int, d: int, rounds: int = 5) -> list[_race.Row]:
  """From x = 0 to a gradient of 1e-8 of the first."""
  data, x0 = _solvers.planted(n, d), jnp.zeros(d)
  problem = softmax_resnet.problem()
  args, options = (problem, x0, data), {"scale": float(n), "tol": _TOL}
  config = newton.NewtonConfig(rtol=_TOL)
  solvers = {
    "ours": _solvers.ours(*args, config),
    "L-BFGS-B": _solvers.scipy("L-BFGS-B", *args, **options),
    "optax L-BFGS": _solvers.optax_lbfgs(*args, **options),
    "optimistix BFGS": _solvers.optimistix_bfgs(*args, **options),
  }
  bars = {"L-BFGS-B": _FIT_BAR}
  name = f"fit, n = {n}, d = {d}"
  return _solvers.race(name, solvers, *args, _TOL, bars=bars, rounds=rounds)


def hessian(n: int, d: int) -> list[_race.Row]:
  """The whole matrix, (d, d)."""
  data, x = _solvers.planted(n, d), jnp.full(d, 0.1)
  name, problem = f"n = {n}, d = {d}", softmax_resnet.problem()
  assert isinstance(data.a, jax.Array)
  return _solvers.hessians(name, problem, x, data, data.a, _HESSIAN_BAR)


def targets(n: int, d: int, num: int) -> _race.Row:
  """Several targets at once, against one after the other."""
  data = _solvers.planted(n, d)
  many = jnp.stack([jnp.roll(data.b, 7 * i) for i in range(num)])
  fit_one = jax.jit(
    lambda b: softmax_resnet.fit_softmax_resnet(data.a, b, w=0.1 / n).x
  )
  fit_all = jax.jit(jax.vmap(fit_one))
  seconds = _race.race(
    {
      "together": functools.partial(fit_all, many),
      "in turn": lambda: [fit_one(b) for b in many],
    }
  )
  name = f"{num} targets, n = {n}, d = {d}: in turn / by vmap"
  return _race.ratio(name, seconds, "together", "in turn")


if __name__ == "__main__":
  app.run(main)
