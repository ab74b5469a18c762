"""The smallest run of ntk-attention, twice."""

import math

import jax

from experiments import harness
from experiments import ntk_attention as experiment

_CONFIG = "configs/ntk_attention.py"


def test_smoke(tmp_path):
  config = harness.load_config(f"{_CONFIG}:smoke")
  with jax.enable_x64(False):
    verdict = experiment.run(config, tmp_path / "a")
  assert verdict.verdict == "inconclusive"
  assert all(map(math.isfinite, verdict.measured.values()))
  assert len(verdict.accepted) == 12
  assert (tmp_path / "a" / "figure.png").stat().st_size > 10_000
  # The points are stored: a second call only draws and decides again.
  again = experiment.run(config, tmp_path / "a")
  assert again.measured == verdict.measured
