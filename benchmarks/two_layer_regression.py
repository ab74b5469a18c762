"""What does Newton's method save on a rectified readout of a softmax?

float64, n = 20000 rows, d = 64 unknowns, 32 units, from near the planted x
until the gradient is 1e-8 of the first. Peers: Levenberg-Marquardt of
optimistix on the residuals of units and regularizer, L-BFGS-B of scipy on our
loss and gradient; and the Hessian of JAX against ours.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import _race, _solvers
from jaxattn import newton
from jaxattn.regression import two_layer

_LM_BAR, _LBFGS_BAR, _HESSIAN_BAR = 5.0, 3.0, 10.0
_TOL = 1e-8
_WEIGHT = 1e-2
_SPREAD = 0.05


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  with jax.enable_x64(True):
    rows = [*fit(20_000, 64, 32), *hessian(20_000, 64, 32)]
    rows += [step(n, d, 32) for n, d in ((20_000, 64), (100_000, 256))]
  _race.publish("two_layer_regression", "Two-layer regression", rows)


def fit(n: int, d: int, m: int, rounds: int = 5) -> list[_race.Row]:
  """To a gradient of 1e-8 of the first."""
  data, x0 = planted(n, d, m)
  problem = two_layer.problem()
  args = problem, x0, data
  config = newton.NewtonConfig(mu0=1.0, rtol=_TOL)
  solvers = {
    "ours": _solvers.ours(*args, config),
    "Levenberg-Marquardt": _solvers.optimistix_lm(residual, *args, tol=_TOL),
    "L-BFGS-B": _solvers.scipy("L-BFGS-B", *args, scale=1.0, tol=_TOL),
  }
  bars = {"Levenberg-Marquardt": _LM_BAR, "L-BFGS-B": _LBFGS_BAR}
  name = f"fit, n = {n}, d = {d}, m = {m}"
  return _solvers.race(name, solvers, *args, _TOL, bars=bars, rounds=rounds)


def hessian(n: int, d: int, m: int) -> list[_race.Row]:
  """The whole matrix, (d, d)."""
  data, x = planted(n, d, m)
  name, problem = f"n = {n}, d = {d}, m = {m}", two_layer.problem()
  assert isinstance(data.a1, jax.Array)
  return _solvers.hessians(name, problem, x, data, data.a1, _HESSIAN_BAR)


def step(n: int, d: int, m: int) -> _race.Row:
  """One step with 16 d sampled rows, against an exact one."""
  data, x = planted(n, d, m)
  runs = _solvers.steps(two_layer.problem(), x, data, num_rows=16 * d)
  seconds = _race.race(runs)
  name = f"step, n = {n}, d = {d}, m = {m}: exact / sampled"
  return _race.ratio(name, seconds, "sampled", "exact")


def planted(n: int, d: int, m: int) -> tuple[two_layer.TwoLayerData, jax.Array]:
  """Targets of some x with 1 % of noise, and a start near that x."""
  rng = np.random.default_rng(3)
  a1 = jnp.asarray(rng.normal(size=(n, d)) / d**0.5)
  a2 = jnp.asarray(rng.normal(size=(m, n)))
  x = jnp.asarray(rng.normal(size=d))
  b = two_layer.predict(x, a1, a2)
  b += 0.01 * jnp.std(b) * rng.normal(size=m)
  data = two_layer.prepare(a1, a2, b, w=_WEIGHT / n**0.5)
  return data, x + _SPREAD * rng.normal(size=d)


def residual(x: jax.Array, data: two_layer.TwoLayerData) -> jax.Array:
  """(m + n,) numbers whose squares are twice the loss."""
  out = two_layer.predict(x, data.a1, data.a2) - data.b
  penalty = jnp.sqrt(data.w2) * newton.design_matvec(data.a1, x)
  return jnp.concatenate([out, penalty])


if __name__ == "__main__":
  app.run(main)
