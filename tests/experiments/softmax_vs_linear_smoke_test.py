"""The smallest run of softmax-vs-linear, twice."""

from tests.experiments import smoke


def test_smoke(tmp_path):
  smoke.run_twice("softmax_vs_linear", tmp_path, num_checks=23)
