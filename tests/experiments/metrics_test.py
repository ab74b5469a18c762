"""Metrics end up as if a run had never been broken."""

import json

import numpy as np

from experiments import harness


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_strict_json(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = harness.MetricsWriter(path)
  writer.write(np.int64(1), loss=np.float32(0.5), grad=float("inf"), name="σ")
  writer.write(2, x=np.array([1.0, np.nan]))
  assert _rows(path) == [
    {"series": "main", "step": 1, "loss": 0.5, "grad": "inf", "name": "σ"},
    {"series": "main", "step": 2, "x": [1.0, "nan"]},
  ]


def test_going_on_truncates_past_the_restored_step(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = harness.MetricsWriter(path)
  for step in range(1, 6):
    writer.write(step, loss=float(step))
  again = harness.MetricsWriter(path)
  again.write(4, loss=-4.0)
  again.write(5, loss=-5.0)
  assert [r["loss"] for r in _rows(path)] == [1.0, 2.0, 3.0, -4.0, -5.0]


def test_series_are_truncated_apart(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = harness.MetricsWriter(path)
  for step in (1, 2):
    writer.series("a").write(step, x=step)
    writer.series("b").write(step, x=step)
  harness.MetricsWriter(path, "a").write(1, x=7)
  rows = [(r["series"], r["step"], r["x"]) for r in _rows(path)]
  assert rows == [("b", 1, 1), ("b", 2, 2), ("a", 1, 7)]


def test_half_written_line_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  harness.MetricsWriter(path).write(1, x=1)
  with path.open("a") as file:
    file.write('{"series": "main", "st')
  assert len(harness.read_metrics(path)) == 1
  harness.MetricsWriter(path).write(2, x=2)
  assert [r["x"] for r in harness.read_metrics(path)] == [1, 2]


def test_no_file_has_no_rows(tmp_path):
  assert harness.read_metrics(tmp_path / "none.jsonl") == []
