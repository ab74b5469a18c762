"""The smallest run of an experiment, twice."""

import importlib
import math

from experiments import harness


def run_twice(system, path, *, num_checks):
  """Runs tier smoke as a user would, checks what holds for every experiment.

  Returns the verdict, for what holds for this one.
  """
  experiment = importlib.import_module(f"experiments.{system}")
  config = harness.load_config(f"configs/{system}.py:smoke")
  verdict = experiment.run(config, path)
  assert verdict.verdict == "inconclusive"
  assert all(map(math.isfinite, verdict.measured.values()))
  assert all(map(math.isfinite, verdict.timed.values()))
  found = len(verdict.accepted)
  assert found == num_checks, f"{found} checks, not {num_checks}"
  assert (path / "figure.png").stat().st_size > 10_000
  # Points are stored and trainings saved: a second call only draws and decides.
  again = experiment.run(config, path)
  assert again.measured == verdict.measured
  assert again.timed == verdict.timed
  return verdict
