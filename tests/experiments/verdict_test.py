"""Verdicts are computed, and never from numbers that are not there."""

import math

import pytest

from experiments import harness
from experiments.harness import files
from tests.experiments import toy

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
  ("checks", "expected"),
  [
    ([], "inconclusive"),
    ([("a", 1.0)], "inconclusive"),
    ([("a", 1.0, 0.0, 2.0)], "reproduced"),
    ([("a", 1.0, 1.0, 1.0)], "reproduced"),
    ([("a", 1.0, 0.0, 2.0), ("b", 9.0)], "reproduced"),
    ([("a", 1.0, 0.0, 2.0), ("b", NAN)], "reproduced"),
    ([("a", 2.5, 0.0, 2.0)], "not reproduced"),
    ([("a", 2.5, 3.0)], "not reproduced"),
    ([("a", 2.5, -INF, 2.0)], "not reproduced"),
    ([("a", NAN, 0.0, 2.0)], "inconclusive"),
    ([("a", INF, 0.0)], "inconclusive"),
    ([("a", -INF, -INF, 1.0)], "inconclusive"),
    ([("a", NAN, 0.0, 2.0), ("b", 1.0, 0.0, 2.0)], "inconclusive"),
    ([("a", NAN, 0.0, 2.0), ("b", 3.0, 0.0, 2.0)], "not reproduced"),
  ],
)
def test_decide(checks, expected):
  checks = [harness.Check(*check) for check in checks]
  assert harness.decide(checks) == expected
  assert harness.decide(checks[::-1]) == expected


@pytest.mark.parametrize(
  ("checks", "message"),
  [
    ([("a", 1.0, 2.0, 1.0)], r"'a' must have low <= high, got \[2.0, 1.0\]"),
    ([("a", 1.0, NAN, 1.0)], r"'a' must have low <= high, got \[nan, 1.0\]"),
    ([("a", 1.0), ("a", 2.0)], "two checks are called 'a'"),
  ],
)
def test_decide_refuses(checks, message):
  with pytest.raises(ValueError, match=message):
    harness.decide([harness.Check(*check) for check in checks])


def _finish(wd, **kwargs):
  checks = [
    harness.Check("slope", 0.5, 0.4, 0.6),
    harness.Check("misfit", NAN),
    harness.Check("ratio", 4, low=3),
  ]
  return harness.finish(
    wd, claim="c", source="s", paper="1/2", checks=checks, **kwargs
  )


def test_finish_writes_the_verdict(tmp_path):
  wd = harness.open_workdir(tmp_path, toy.config(timed=True))
  timed = [harness.Check("speed-up", 1.5, low=3.0)]
  verdict = _finish(wd, timed=timed)
  written = files.read_json(tmp_path / "summary.json")
  assert written == files.as_json(verdict._asdict())
  assert written["measured"] == {"slope": 0.5, "misfit": "nan", "ratio": 4.0}
  assert written["timed"] == {"speed-up": 1.5}
  assert written["accepted"] == {
    "slope": [0.4, 0.6],
    "ratio": [3.0, None],
    "speed-up": [3.0, None],
  }
  assert written["verdict"] == "not reproduced"
  assert written["versions"]["jax"]
  assert written["commit"]


def test_smoke_decides_nothing(tmp_path):
  wd = harness.open_workdir(tmp_path, toy.config(tier="smoke"))
  assert _finish(wd).verdict == "inconclusive"


def test_timed_checks_must_be_announced(tmp_path):
  wd = harness.open_workdir(tmp_path, toy.config())
  with pytest.raises(ValueError, match="timed checks need"):
    _finish(wd, timed=[harness.Check("speed-up", 4.0, low=3.0)])
  assert not (tmp_path / "summary.json").exists()
