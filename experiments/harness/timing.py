"""Seconds of calls that are compared with each other."""

import functools
import math
import operator
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def least_seconds(
  contestants: Mapping[str, Callable[[], Any]],
  *,
  rounds: int,
  at_least: float = 0.0,
  in_turn: bool = True,
) -> dict[str, float]:
  """Least seconds of each contestant, after compilation and a warm-up.

  Args:
    contestants: calls without arguments, by name.
    rounds: how often each of them runs.
    at_least: seconds that all of it takes at least: quick calls run more often,
      and none is measured by its first few, while caches and clocks are cold.
    in_turn: whether they run in turn, for times that are near each other. Not
      so, for each takes ``at_least`` then, where one is so slow that it leaves
      nothing of another's where a processor is quick to find it.
  """
  if not in_turn:
    alone = ({name: run} for name, run in contestants.items())
    found = (least_seconds(x, rounds=rounds, at_least=at_least) for x in alone)
    return functools.reduce(operator.or_, found)
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
