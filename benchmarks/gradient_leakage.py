"""How much sooner does Gauss-Newton find the input of a gradient?

Against L-BFGS (DLG as published: the label is sought with the input, starts are
standard normal) and Adam with warm-up (TAG), in optax, on the same program for
the gradient. DLG that is told the label and starts where we do races too; no
bar speaks of it. Each runs the least number of steps after which its relative
error is 1e-6. A peer that is not there after a dozen times the time of
Gauss-Newton is raced at that budget, and the ratio is a lower bound; where
Gauss-Newton does not get there, the ratio is 0. And a span attack on a
vocabulary of 50000 words against the two seconds that it may take.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import _race
from jaxattn.models.leakage import LeakageBlock
from jaxattn.regression import gradient_leakage

_TARGET = 1e-6
_SPREAD = 0.5
_BAR = 10.0
_SPAN_SECONDS = 2.0
_SIZES = ((8, 16), (16, 16))
# Steps of ours; of peers, how much longer than ours they may run.
_MAX_STEPS, _PATIENCE = 60, 12.0


class _Method(NamedTuple):
  """What races: a method, the label it is told, the spread of its start."""

  name: str
  label: int | None
  spread: float


_OURS = _Method("gauss_newton", None, _SPREAD)
_PEERS = {
  "DLG": _Method("dlg", None, 1.0),
  "DLG, told the label and our start": _Method("dlg", 2, _SPREAD),
  "TAG": _Method("tag", None, _SPREAD),
}
_WITHOUT_BAR = "DLG, told the label and our start"


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  jax.config.update("jax_enable_x64", True)
  rows = [row for size in _SIZES for row in attacks(*size)]
  rows.append(span(50_000, 768, 32))
  _race.publish("gradient_leakage", "Gradient leakage", rows)


def attacks(
  n: int, d: int, *, patience: float = _PATIENCE, rounds: int = 3
) -> list[_race.Row]:
  """Seconds to the target, on a block with all it takes to leak."""
  block = LeakageBlock(mlp=2 * d)
  rng = np.random.default_rng(0)
  x = jnp.asarray(_SPREAD * rng.normal(size=(n, d)))
  params = block.init(jax.random.key(1), x)["params"]
  leaked = jax.jit(jax.grad(block.loss))(params, x, 2)
  run = functools.partial(_attack, block, params, leaked, (n, d))
  ours, found = _steps_needed(run, x, _OURS, 10, math.inf)
  contestants = {"ours": functools.partial(run, _OURS, ours)}
  allowed = patience * _timed(contestants["ours"])[0]
  labels = {}
  for name, method in _PEERS.items():
    steps, there = _steps_needed(run, x, method, 500, allowed)
    labels[name] = (
      f"{name}, {steps} steps"
      if there
      else (f"{name}, which is not there after {steps} steps")
    )
    contestants[name] = functools.partial(run, method, steps)
  seconds = _race.race(contestants, rounds=rounds)
  rows = []
  for name, label in labels.items():
    bar = None if name == _WITHOUT_BAR else _BAR
    what = f"n = {n}, d = {d}, to {_TARGET:g}: {label} / Gauss-Newton"
    rows.append(
      _race.ratio(what, seconds, "ours", name, bar)
      if found
      else _race.figure(f"{what}, which misses it", 0.0, bar)
    )
  return rows


def _attack(
  block: LeakageBlock,
  params: Any,
  leaked: Any,
  shape: tuple[int, int],
  method: _Method,
  max_steps: int,
) -> gradient_leakage.AttackResult:
  config = gradient_leakage.AttackConfig(
    max_steps=max_steps, init_scale=method.spread
  )
  return gradient_leakage.attack(
    jax.random.key(0),
    block.loss,
    params,
    leaked,
    shape=shape,
    y=method.label,
    method=method.name,
    config=config,
  )


def _timed(
  run: Callable[[], gradient_leakage.AttackResult],
) -> tuple[float, jax.Array]:
  """Seconds of a second call, and the embeddings found."""
  jax.block_until_ready(run())
  start = time.perf_counter()
  found = jax.block_until_ready(run())
  return time.perf_counter() - start, found.embeddings


def _steps_needed(
  run: Callable[..., gradient_leakage.AttackResult],
  x: jax.Array,
  method: _Method,
  steps: int,
  allowed: float,
) -> tuple[int, bool]:
  """About the fewest steps that end below the target, and whether any do.

  Twice as many until they do or take longer than allowed, and never more than
  our own method has; then two thirds while they still do.
  """
  most = _MAX_STEPS if method == _OURS else math.inf

  def attempt(steps: int) -> tuple[float, bool]:
    seconds, found = _timed(functools.partial(run, method, steps))
    gap = jnp.linalg.norm(found - x)
    return seconds, bool(gap <= _TARGET * jnp.linalg.norm(x))

  seconds, there = attempt(steps)
  while not there and seconds < allowed and steps < most:
    steps = int(min(2 * steps, most))
    seconds, there = attempt(steps)
  if there:
    while attempt(int(steps / 1.5))[1]:
      steps = int(steps / 1.5)
  return steps, there


def span(vocab: int, dim: int, n: int) -> _race.Row:
  """Two seconds over the time of a span attack."""
  rng = np.random.default_rng(0)
  embed = jnp.asarray(rng.standard_normal((vocab, dim), np.float32))
  pos = jnp.asarray(0.1 * rng.standard_normal((n, dim), np.float32))
  tokens = embed[rng.integers(vocab, size=n)] + pos
  leaked = {
    name: tokens.T @ jnp.asarray(rng.standard_normal((n, dim), np.float32))
    for name in ("w_q", "w_k", "w_v")
  }
  run = functools.partial(
    jax.jit(gradient_leakage.span_attack), leaked, embed, pos
  )
  seconds = statistics.median(_race.race({"span": run})["span"])
  name = f"span attack, V = {vocab}, d = {dim}, n = {n}: two seconds / ours"
  return _race.figure(name, _SPAN_SECONDS / seconds, 1.0)


if __name__ == "__main__":
  app.run(main)
