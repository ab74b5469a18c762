"""What does one call over widths and seeds save?

Gradient descent of a two-layer network, from a new process to the last number:
compilation counts, since that is what a sweep is made of. Peers: a Python loop
over seeds and widths around a compiled run, as one writes it at first; and
``"padded"`` and ``"buckets"`` against ``"per_width"``, for long runs and short.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app
from jax import lax

from benchmarks import _race
from jaxattn.scaling import sweep

_LOOP_BAR = 1.0
_WIDTHS = tuple(2**k for k in range(5, 12))
_DATA, _DIM, _SEEDS = 128, 32, 4
_LONG, _SHORT = 300, 20


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = [
    *against_loop(_LONG),
    *against_padded(_LONG, "with compilation", _cold),
    *against_padded(_LONG, "compiled before", _race.race),
    *against_padded(_SHORT, "with compilation", _cold),
  ]
  _race.publish("width_sweep", "Sweeps over widths and seeds", rows)


def against_loop(num_steps: int) -> list[_race.Row]:
  """One compiled run for each width, called for each seed, or ours."""
  question = f"widths 32 to 2048, {_SEEDS} seeds, {num_steps} steps: loop"
  contestants = {
    "ours": functools.partial(_sweep, num_steps),
    "loop": functools.partial(_loop, num_steps),
  }
  return [
    _race.ratio(
      f"{question} / per_width, with compilation",
      _cold(contestants),
      "ours",
      "loop",
      _LOOP_BAR,
    ),
  ]


def against_padded(
  num_steps: int,
  what: str,
  run: Callable[..., dict[str, list[float]]],
) -> list[_race.Row]:
  """Methods of the sweep against each other; which wins is the question."""
  contestants = {
    method: functools.partial(_sweep, num_steps, method=method)
    for method in ("per_width", "padded", "buckets")
  }
  seconds = run(contestants, rounds=3)
  return [
    _race.ratio(
      f"{num_steps} steps, {what}: {peer} / per_width",
      seconds,
      "per_width",
      peer,
    )
    for peer in ("padded", "buckets")
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
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  print("seconds, cold:", medians)
  return seconds


def _sweep(num_steps: int, method: str = "per_width") -> Any:
  fn = _training(num_steps)
  return sweep(jax.random.key(0), fn, _WIDTHS, _SEEDS, method=method).values


def _loop(num_steps: int) -> list[jax.Array]:
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
