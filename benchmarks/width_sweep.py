"""What does one call over widths and seeds save?

Gradient descent of a two-layer network, from a new process to the last number:
compilation counts, since that is much of a sweep. Peers: a Python loop over
seeds and widths around a run compiled for each width; and ``"padded"`` and
``"buckets"`` against ``"per_width"``, for long runs and short.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app
from jax import lax

from benchmarks import _race
from jaxattn.scaling import sweep

_WIDTHS = tuple(2**k for k in range(5, 12))
_DATA, _DIM, _SEEDS = 128, 32, 4
_LONG, _SHORT = 300, 20
# What padding costs in arithmetic. Which of the rest wins is the question.
_BARS = {("padded", "compiled before", _LONG): 3.5}


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = [
    *race("per_width", ("loop",), _LONG),
    *race("per_width", ("padded", "buckets"), _LONG),
    *race("per_width", ("padded", "buckets"), _SHORT),
  ]
  _race.publish("width_sweep", "Sweeps over widths and seeds", rows)


def race(ours: str, peers: tuple[str, ...], num_steps: int) -> list[_race.Row]:
  """With and without compilation."""
  contestants = {
    name: functools.partial(
      _loop if name == "loop" else _sweep, name, num_steps
    )
    for name in (ours, *peers)
  }
  runs = {"with compilation": _cold, "compiled before": _race.race}
  return [
    _race.ratio(
      f"widths {_WIDTHS[0]} to {_WIDTHS[-1]}, {_SEEDS} seeds, {num_steps} "
      f"steps, {what}: {peer} / {ours}",
      seconds,
      ours,
      peer,
      _BARS.get((peer, what, num_steps)),
    )
    for what, run in runs.items()
    for seconds in [run(contestants, rounds=3)]
    for peer in peers
  ]


def _cold(
  contestants: dict[str, Callable[[], Any]], rounds: int = 3
) -> dict[str, list[float]]:
  """As :func:`_race.race`, forgetting all programs before each run."""
  seconds: dict[str, list[float]] = {name: [] for name in contestants}
  for _ in range(rounds):
    for name, run in contestants.items():
      jax.clear_caches()
      start = time.perf_counter()
      jax.block_until_ready(run())
      seconds[name].append(time.perf_counter() - start)
  return seconds


def _sweep(method: str, num_steps: int) -> Any:
  fn = _training(num_steps)
  return sweep(jax.random.key(0), fn, _WIDTHS, _SEEDS, method=method).values


def _loop(name: str, num_steps: int) -> list[jax.Array]:
  del name
  run = jax.jit(_training(num_steps), static_argnums=1)
  rng = jax.random.key(0)
  return [
    run(jax.random.fold_in(rng, seed), width)
    for width in _WIDTHS
    for seed in range(_SEEDS)
  ]


@functools.cache
def _training(num_steps: int) -> Callable[..., jax.Array]:
  """One run of gradient descent; the same function each time."""

  def train(
    rng: jax.Array, width: int, max_width: int | None = None
  ) -> jax.Array:
    size = width if max_width is None else max_width
    rngs = jax.random.split(rng, 4)
    w = jax.random.normal(rngs[0], (size, _DIM))
    a = jax.random.rademacher(rngs[1], (size,), w.dtype)
    a *= (jnp.arange(size) < width) / jnp.sqrt(jnp.asarray(width, w.dtype))
    x = jax.random.normal(rngs[2], (_DATA, _DIM)) / _DIM**0.5
    y = jax.random.normal(rngs[3], (_DATA,))

    def loss(w: jax.Array) -> jax.Array:
      return ((jax.nn.relu(x @ w.T) @ a - y) ** 2).sum() / 2

    def step(w: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
      value, grad = jax.value_and_grad(loss)(w)
      return w - 0.1 * grad, value

    return lax.scan(step, w, None, length=num_steps)[1]

  return train


if __name__ == "__main__":
  app.run(main)
