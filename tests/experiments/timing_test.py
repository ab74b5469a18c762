"""Seconds of quick calls."""

import time

from experiments import harness


def test_quick_calls_run_for_as_long_as_is_asked():
  ran = []
  begin = time.perf_counter()
  seconds = harness.least_seconds(
    {"a": lambda: ran.append(0)}, rounds=2, at_least=0.05
  )
  assert 0.05 <= time.perf_counter() - begin
  # However many that are.
  assert len(ran) > 500
  assert 0 <= seconds["a"] < 0.05
