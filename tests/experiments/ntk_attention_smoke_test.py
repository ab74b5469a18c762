"""The smallest run of ntk-attention, twice."""

import jax

from tests.experiments import smoke


def test_smoke(tmp_path):
  with jax.enable_x64(False):
    smoke.run_twice("ntk_attention", tmp_path, num_checks=13)
