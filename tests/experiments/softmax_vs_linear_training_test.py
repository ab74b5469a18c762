"""Both kinds of attention, trained to find one location."""

import jax
import pytest

from experiments import harness
from experiments import softmax_vs_linear as experiment

pytest.importorskip("flax", reason="the models need flax")


@pytest.fixture(autouse=True)
def compile_fast():
  """Compiled as users do: this one computes more than it compiles."""


@pytest.mark.slow
@pytest.mark.parametrize("length", [8, 32])
def test_linear_stays_at_its_closed_form(tmp_path, length):
  config = harness.load_config("configs/softmax_vs_linear.py:cpu")
  config.kernel_lengths = ()
  wd = harness.open_workdir(tmp_path / "a", config)
  with jax.enable_x64(False):
    point = experiment.regression_point(config, wd, length)
  softmax, linear, _ = point["error"]
  assert abs(linear - point["closed_form"]) < 0.02
  assert softmax < 0.01
