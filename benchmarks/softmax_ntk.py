"""What do closed forms save for two-layer softmax networks?

Peers: the kernel by ``jax.jacrev`` of each datum, contracted; a training step
against the two products of matrices that it cannot do without.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app

from benchmarks import _race
from experiments import harness
from experiments import softmax_ntk as experiment
from jaxattn.ntk import softmax, train_two_layer

KERNEL_BAR, _STEP_BAR = 20.0, 1 / 1.3
# Pairs, and seconds that a fit may take.
_FITS = ((1000, 3.0), (3000, 40.0))
_STEPS = 50


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = [kernel(256, 4096, 64), *step(256, 4096, 64)]
  rows += [fit(n, seconds) for n, seconds in _FITS]
  _race.publish("softmax_ntk", "Two-layer softmax networks", rows)


def setup(n: int, m: int, d: int) -> tuple[softmax.TwoLayer, jax.Array]:
  """A network of one output, and data on the sphere."""
  x = jax.random.normal(jax.random.key(0), (n, d))
  x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
  return softmax.init(jax.random.key(1), m, d, 1), x


def kernel(n: int, m: int, d: int) -> _race.Row:
  """Ours against derivatives of each datum."""
  params, x = setup(n, m, d)

  @jax.jit
  def jacrev(params: softmax.TwoLayer, x: jax.Array) -> jax.Array:
    def of_one(hidden: jax.Array, x: jax.Array) -> jax.Array:
      return softmax.apply(params._replace(hidden=hidden), x[None])[0, 0]

    rows = jax.vmap(jax.grad(of_one), (None, 0))(params.hidden, x)
    rows = rows.reshape(n, -1)
    return rows @ rows.T / m

  seconds = _race.race(
    {
      "ours": lambda: softmax.ntk(params, x),
      "jacrev": lambda: jacrev(params, x),
    },
    rounds=5,
  )
  name = f"kernel, n = {n}, m = {m}, d = {d}: jax.jacrev / ours"
  return _race.ratio(name, seconds, "ours", "jacrev", KERNEL_BAR)


def step(n: int, m: int, d: int) -> list[_race.Row]:
  """Two bare products over a step of ours; also with an exponential between."""
  params, x = setup(n, m, d)
  y = jnp.ones((n, 1))

  def plain(between: Callable[[jax.Array], jax.Array]) -> Callable[[], Any]:
    def one(hidden: jax.Array, _: None) -> tuple[jax.Array, None]:
      return hidden - 1e-9 * (between(hidden @ x.T) @ x), None

    run = jax.jit(lambda hidden: jax.lax.scan(one, hidden, length=_STEPS)[0])
    return lambda: run(params.hidden)

  def ours() -> Any:
    return train_two_layer(params, x, y, learning_rate=0.01, num_steps=_STEPS)

  seconds = _race.race(
    {"ours": ours, "bare": plain(lambda x: x), "exp": plain(jnp.exp)}
  )
  name = f"step, n = {n}, m = {m}, d = {d}: two bare products"
  return [
    _race.ratio(f"{name} / ours", seconds, "ours", "bare", _STEP_BAR),
    _race.ratio(f"{name} and exp / ours", seconds, "ours", "exp"),
  ]


def fit(n: int, limit: float) -> _race.Row:
  """Seconds that a fit of a denoiser at 26 times may take, over what it does.

  In float64, with the pairs that choose the time.
  """
  config = harness.load_config("configs/softmax_ntk.py:cpu")
  with jax.enable_x64(True):
    seconds = _race.race(
      {"ours": lambda: experiment.fitted(config, n, 0).coefficients}, rounds=3
    )
  taken = sorted(seconds["ours"])[1]
  return _race.figure(
    f"denoiser, n = {n}: {limit:g} s / ours ({taken:.1f} s)", limit / taken, 1.0
  )


if __name__ == "__main__":
  app.run(main)
