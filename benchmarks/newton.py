"""When does it pay to sample the rows of a Hessian, and what do peers take?

Softmax regression with a skip in float64. A sampled step has 16 d rows, drawn
with probabilities from the first two steps, which are exact; totals run from
x = 0 until the gradient is a share of the first. A sampled method converges
linearly and takes about three times the steps, so that much of what a step
saves is spent again: least at a rough tolerance, and all of it for small d. As
a preconditioner the same sample takes about as many steps as the exact Hessian.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import app

from benchmarks import _race, _solvers
from jaxattn import newton
from jaxattn.regression import softmax_resnet

_SIZES = ((50_000, 64), (100_000, 256), (400_000, 128), (100_000, 512))
_ROWS_PER_DIM = 16
# Of a step, and of totals by tolerance, where d is at least _WIDE (and n is not
# larger than _LONG).
_STEP_BAR, _TOTAL_BARS = 3.0, {1e-9: 1.1, 1e-4: 1.5}
_WIDE, _LONG = 256, 100_000
_PEER_BAR, _PEER_TOL = 8.0, 1e-8


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = []
  with jax.enable_x64(True):
    for n, d in _SIZES:
      data = _solvers.planted(n, d, condition=1.0)
      rows += [step(data), *totals(data)]
    rows += peers(50_000, 64)
    rows += peers(100_000, 256, only=("L-BFGS-B", "optax L-BFGS"))
    rows += [memory(n, d) for n, d in ((20_000, 64), (100_000, 256))]
  _race.publish("newton", "Newton's method with sampled rows", rows)


def step(data: softmax_resnet.SoftmaxResnetData) -> _race.Row:
  """One step, past the first ones."""
  n, d = len(data.b), len(data.const)
  num_rows = _ROWS_PER_DIM * d
  problem, x = softmax_resnet.problem(), jnp.full(d, 0.1)
  runs = _solvers.steps(problem, x, data, num_rows=num_rows)
  seconds = _race.race(runs)
  bar = _STEP_BAR if d >= _WIDE else None
  name = f"step, n = {n}, d = {d}: exact / sampled"
  return _race.ratio(name, seconds, "sampled", "exact", bar)


def totals(
  data: softmax_resnet.SoftmaxResnetData, rounds: int = 5
) -> list[_race.Row]:
  """The whole way, by tolerance."""
  n, d = len(data.b), len(data.const)
  has_bar = d >= _WIDE and n <= _LONG
  return [
    row
    for tol, bar in _TOTAL_BARS.items()
    for row in total(data, tol, bar if has_bar else None, rounds)
  ]


def total(
  data: softmax_resnet.SoftmaxResnetData,
  tol: float,
  bar: float | None,
  rounds: int,
) -> list[_race.Row]:
  """From x = 0 to one tolerance; the table has the steps of each."""
  n, d = len(data.b), len(data.const)
  problem, x0 = softmax_resnet.problem(), jnp.zeros(d)
  exact = newton.NewtonConfig(rtol=tol)
  sampled = exact._replace(sketch="leverage", num_rows=_ROWS_PER_DIM * d)
  configs = {
    "exact": exact,
    "sampled": sampled,
    "preconditioned": sampled._replace(linear_solver="cg"),
  }
  steps = {
    name: newton.minimize(
      problem, x0, data, config=config, rng=jax.random.key(0)
    ).num_steps
    for name, config in configs.items()
  }
  seconds = _race.race(
    {
      name: _solvers.ours(problem, x0, data, config)
      for name, config in configs.items()
    },
    rounds=rounds,
  )
  start = f"to {tol:g}, n = {n}, d = {d}: exact ({steps['exact']} steps) /"
  return [
    _race.ratio(f"{start} {name} ({steps[name]})", seconds, name, "exact", bar)
    for name in ("sampled", "preconditioned")
  ]


def peers(
  n: int, d: int, *, only: Sequence[str] = (), rounds: int = 3
) -> list[_race.Row]:
  """Columns shrink to 1/30; to a gradient of 1e-8 of the first.

  Ours is what docs/newton.md says for this d.
  """
  data, x0 = _solvers.planted(n, d), jnp.zeros(d)
  args = softmax_resnet.problem(), x0, data
  options = {"scale": float(n), "tol": _PEER_TOL}
  config = newton.NewtonConfig(rtol=_PEER_TOL)
  if d >= _WIDE:
    config = config._replace(
      sketch="leverage", num_rows=_ROWS_PER_DIM * d, linear_solver="cg"
    )
  # Made when they race: some look for their tolerances first.
  makers = {
    "L-BFGS-B": functools.partial(_solvers.scipy, "L-BFGS-B"),
    "trust-krylov": functools.partial(_solvers.scipy, "trust-krylov"),
    "optax L-BFGS": _solvers.optax_lbfgs,
    "optimistix BFGS": _solvers.optimistix_bfgs,
  }
  solvers = {"ours": _solvers.ours(*args, config)} | {
    name: makers[name](*args, **options) for name in only or makers
  }
  bars = {"L-BFGS-B": _PEER_BAR}
  name = f"fit, n = {n}, d = {d}"
  return _solvers.race(
    name, solvers, *args, _PEER_TOL, bars=bars, rounds=rounds
  )


def memory(n: int, d: int) -> _race.Row:
  """Bytes beside inputs and outputs, of the (d, d) Hessian."""
  array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float64)
  data = jax.eval_shape(softmax_resnet.prepare, array((n, d)), array((n,)))

  def ours(x: jax.Array, data: softmax_resnet.SoftmaxResnetData) -> jax.Array:
    return newton.curvature_dense(softmax_resnet.curvature(x, data))

  used, by_jax = (
    _race.temporary_bytes(jax.jit(fn), array((d,)), data)
    for fn in (ours, jax.hessian(softmax_resnet.loss))
  )
  name = (
    f"bytes of the Hessian, n = {n}, d = {d}: jax.hessian / ours "
    f"({used / 2**20:.0f} MiB)"
  )
  return _race.figure(name, by_jax / used)


if __name__ == "__main__":
  app.run(main)
