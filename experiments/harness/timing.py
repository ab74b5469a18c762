"""Seconds of calls that are compared with each other, run in turn."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def least_seconds(
  contestants: Mapping[str, Callable[[], Any]],
  *,
  rounds: int,
  at_least: float = 0.0,
) -> dict[str, float]:
  """Least seconds of each contestant, after compilation and a warm-up.

  Args:
    contestants: calls without arguments, by name.
    rounds: how often each of them runs, in turn with the others.
    at_least: seconds that all of it takes at least: quick calls run more often,
      and none is measured by its first few, while caches and clocks are cold.
  """
  for run in contestants.values():
    jax.block_until_ready(run())
  seconds = dict.fromkeys(contestants, math.inf)
  begin, num = time.perf_counter(), 0
  while num < rounds or time.perf_counter() - begin <= at_least:
    for name, run in contestants.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      seconds[name] = min(seconds[name], time.perf_counter() - start)
    num += 1
  return seconds
