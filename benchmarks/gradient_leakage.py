"""How much sooner does Gauss-Newton find the input of a gradient?

Against L-BFGS (the descent of DLG) and Adam with warm-up (TAG), in optax, on
the same program for the gradient: the least number of steps after which each
has a relative error of 1e-6 is found first, and that many steps are raced. A
peer that never gets there is raced at its whole budget, and the ratio is a
lower bound; where Gauss-Newton does not, the ratio is 0. And a span attack on a
vocabulary of 50000 words against the two seconds that it may take.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import _race
from jaxattn.models.leakage import LeakageBlock
from jaxattn.regression import gradient_leakage

_TARGET = 1e-6
_BUDGETS = {"gauss_newton": 60, "dlg": 8000, "tag": 8000}
_BAR = 10.0
_SPAN_SECONDS = 2.0
_SIZES = ((8, 16), (16, 16), (32, 16))


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  jax.config.update("jax_enable_x64", True)
  rows = [row for size in _SIZES for row in attacks(*size)]
  rows.append(span(50_000, 768, 32))
  _race.publish("gradient_leakage", "Gradient leakage", rows)


def attacks(n: int, d: int) -> list[_race.Row]:
  """Seconds to the target, on a block with all it takes to leak."""
  block = LeakageBlock(mlp=2 * d)
  rng = np.random.default_rng(0)
  x = jnp.asarray(0.5 * rng.normal(size=(n, d)))
  params = block.init(jax.random.key(1), x)["params"]
  leaked = jax.jit(jax.grad(block.loss))(params, x, 2)
  run = functools.partial(_attack, block, params, leaked, (n, d))
  steps = {m: _steps_needed(run, x, m) for m in _BUDGETS}
  contestants = {
    m: functools.partial(run, m, steps[m] or _BUDGETS[m]) for m in _BUDGETS
  }
  seconds = _race.race(contestants, rounds=5)
  rows = []
  for peer in ("dlg", "tag"):
    late = "" if steps[peer] else f", which never gets there ({_BUDGETS[peer]})"
    name = f"n = {n}, d = {d}, to {_TARGET:g}: {peer}{late} / Gauss-Newton"
    rows.append(
      _race.ratio(name, seconds, "gauss_newton", peer, _BAR)
      if steps["gauss_newton"]
      else _race.figure(f"{name}, which misses it", 0.0, _BAR)
    )
  return rows


def _attack(
  block: LeakageBlock,
  params: Any,
  leaked: Any,
  shape: tuple[int, int],
  method: str,
  max_steps: int,
) -> gradient_leakage.AttackResult:
  config = gradient_leakage.AttackConfig(max_steps=max_steps, init_scale=0.5)
  return gradient_leakage.attack(
    jax.random.key(0),
    block.loss,
    params,
    leaked,
    shape=shape,
    y=2,
    method=method,
    config=config,
  )


def _steps_needed(
  run: Callable[..., gradient_leakage.AttackResult], x: jax.Array, method: str
) -> int:
  """Fewest steps, to a factor of 1.5, that end below the target; 0 = none."""
  found, steps = 0, _BUDGETS[method]
  while steps:
    error = jnp.linalg.norm(run(method, steps).embeddings - x)
    if error > _TARGET * jnp.linalg.norm(x):
      break
    found, steps = steps, int(steps / 1.5)
  return found


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
