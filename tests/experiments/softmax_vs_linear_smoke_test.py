"""The smallest run of softmax-vs-linear, twice."""

import math

from experiments import harness
from experiments import softmax_vs_linear as experiment

_CONFIG = "configs/softmax_vs_linear.py"


def test_smoke(tmp_path):
  config = harness.load_config(f"{_CONFIG}:smoke")
  verdict = experiment.run(config, tmp_path / "a")
  assert verdict.verdict == "inconclusive"
  assert all(map(math.isfinite, verdict.measured.values()))
  assert len(verdict.accepted) > 15
  assert (tmp_path / "a" / "figure.png").stat().st_size > 10_000
  # Points are stored and trainings saved: a second call only draws and decides.
  again = experiment.run(config, tmp_path / "a")
  assert again.measured == verdict.measured
