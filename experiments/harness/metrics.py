"""Metrics as JSON lines: they grep, diff and resume without a server."""

import json
import pathlib
from typing import Any

import jax

from experiments.harness import files


class MetricsWriter:
  r"""Appends ``{"series": ..., "step": ..., name: value, ...}`` to a file.

  A run that goes on after a kill repeats steps: the first write to a series
  drops the lines of that series at or past its step, and any half-written
  line. So the file ends up as if the run had never been broken.

  Example:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> writer = MetricsWriter(path)
    >>> writer.write(1, loss=0.5)
    >>> path.read_text()
    '{"series": "main", "step": 1, "loss": 0.5}\n'
  """

  def __init__(self, path: pathlib.Path, series: str = "main"):
    """Makes a writer; nothing is written yet.

    Args:
      path: the file; it need not exist.
      series: name of the stream of steps, for runs that have several.
    """
    self._path = path
    self._series = series
    self._trimmed = False

  def series(self, name: str) -> "MetricsWriter":
    """Returns a writer of another series in the same file."""
    return MetricsWriter(self._path, name)

  def write(self, step: int, **values: Any) -> None:
    """Appends one line; in a distributed run, only from process 0.

    Args:
      step: position in the series; must grow.
      **values: numbers, strings or small arrays by name.
    """
    if jax.process_index() != 0:
      return
    if not self._trimmed:
      self._trim(int(step))
      self._trimmed = True
    line = {"series": self._series, "step": int(step), **values}
    with self._path.open("a", encoding="utf-8") as file:
      file.write(files.to_json(line) + "\n")

  def _trim(self, step: int) -> None:
    rows = read_metrics(self._path)
    kept = [r for r in rows if r["series"] != self._series or r["step"] < step]
    text = "".join(files.to_json(row) + "\n" for row in kept)
    files.write_text(self._path, text)


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the whole lines of a metrics file; none if there is no file.

  Args:
    path: a file that :class:`MetricsWriter` wrote.

  Returns:
    One dict a line; a half-written last line is left out.
  """
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").split("\n")
  return [json.loads(line) for line in lines[:-1]]
