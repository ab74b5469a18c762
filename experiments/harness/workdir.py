"""The folder of one run: what it holds, and how a broken run goes on."""

import dataclasses
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

from experiments.harness import config as config_lib
from experiments.harness import distributed, files, metrics, points, provenance

_LOG = logging.getLogger(__name__)
_POINT_NAME = re.compile(r"[\w=+,-][\w=+,.-]*(/[\w=+,-][\w=+,.-]*)*")


@dataclasses.dataclass(frozen=True)
class Workdir:
  """A folder that :func:`open_workdir` has prepared.

  Attributes:
    path: the folder.
    config: the configuration of the run, as written in ``config.json``.
    metrics: writer of ``metrics.jsonl``.
    started: ``time.monotonic()`` of a run without interruptions that would
      have come as far.
  """

  path: pathlib.Path
  config: ml_collections.ConfigDict
  metrics: metrics.MetricsWriter
  started: float
  _asked: set[str] = dataclasses.field(default_factory=set, repr=False)

  def point(
    self, name: str, compute: Callable[[], Mapping[str, Any]]
  ) -> dict[str, Any]:
    """Returns one point of a sweep, computing it only once.

    The store is append-only: ``points/<name>.npz``. A point that a kill cut
    short does not exist, a damaged one is computed again.

    Args:
      name: unique in the run, as ``"half_mass/n=256"``.
      compute: called if the point is not stored; returns named numbers and
        arrays, equal in all processes of a distributed run.

    Returns:
      The stored values: NumPy arrays and Python numbers, the same objects
      whether they were computed now or read.

    Raises:
      ValueError: if the name is malformed or was asked for before.
    """
    if not _POINT_NAME.fullmatch(name):
      raise ValueError(f"malformed point name {name!r}, expected as 'a/n=2'")
    if name in self._asked:
      raise ValueError(f"point {name!r} was asked for before in this run")
    self._asked.add(name)
    path = self.path / "points" / f"{name}.npz"
    payload = distributed.broadcast_bytes(points.read_point(path))
    if not payload:
      payload = points.encode_point(compute())
      if jax.process_index() == 0:
        files.write_bytes(path, payload)
        self.save_seconds()
    return points.decode_point(payload)

  def save_seconds(self) -> float:
    """Records and returns the seconds spent so far, over all attempts."""
    seconds = time.monotonic() - self.started
    if jax.process_index() == 0:
      files.write_json(self.path / "seconds.json", round(seconds, 3))
    return seconds


def open_workdir(
  path: str | os.PathLike[str], config: ml_collections.ConfigDict
) -> Workdir:
  """Creates the folder of a run, or goes on with the run that it holds.

  Writes ``config.json`` and ``env.json``. What a run with the same
  configuration left is kept and used, unless source files or JAX changed
  since: then the folder is renamed to ``<path>.stale-<n>`` and the run begins
  anew.

  Args:
    path: folder of this run alone.
    config: configuration with string fields ``slug`` and ``tier``.

  Returns:
    The :class:`Workdir`.

  Raises:
    UsageError: a ValueError, if the configuration is not finite, if the
      folder cannot be written, or if it holds another configuration.
  """
  config_lib.check_config(config)
  path = pathlib.Path(path).resolve()
  if jax.process_index() == 0:
    check_writable(path)
    _check_same_config(path, config)
    _set_aside_if_stale(path)
    if not (path / "env.json").exists():
      files.write_json(path / "env.json", provenance.environment())
    files.write_json(path / "config.json", config.to_dict())
  return Workdir(
    path=path,
    config=config,
    metrics=metrics.MetricsWriter(path / "metrics.jsonl"),
    started=time.monotonic() - _seconds_before(path),
  )


def check_writable(path: pathlib.Path) -> None:
  """Creates a folder; raises UsageError unless it can be written."""
  try:
    path.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path / ".writable", b"")
    (path / ".writable").unlink()
  except OSError as error:
    raise config_lib.UsageError(
      f"the workdir must be a folder that can be written, got {path}: {error}"
    ) from error


def holds_config(path: pathlib.Path, config: ml_collections.ConfigDict) -> bool:
  """Says whether a run with ``config`` may go on in ``path``.

  Args:
    path: folder that need not exist.
    config: configuration that is wanted.

  Returns:
    False if the folder holds a run with another configuration.
  """
  file = path / "config.json"
  return not file.exists() or files.read_json(file) == _normalized(config)


def is_finished(path: pathlib.Path, config: ml_collections.ConfigDict) -> bool:
  """Says whether ``path`` holds a finished run that still stands.

  Args:
    path: folder of a run.
    config: configuration that is wanted.

  Returns:
    True if there is a summary of this configuration and neither source
    files nor JAX changed since.
  """
  return (
    (path / "summary.json").exists()
    and (path / "env.json").exists()
    and holds_config(path, config)
    and not provenance.changes_since(files.read_json(path / "env.json"))
  )


def record_sources(path: pathlib.Path) -> None:
  """Adds the modules imported since to ``env.json``, at the end of a run.

  Args:
    path: folder of the run. Hashes taken at its beginning stay: a file that
      was edited meanwhile is not the one that ran.
  """
  env = files.read_json(path / "env.json")
  env["sources"] = provenance.source_hashes() | env["sources"]
  files.write_json(path / "env.json", env)


def set_aside(path: pathlib.Path) -> pathlib.Path:
  """Renames a folder to the first free ``<path>.stale-<n>`` and returns it."""
  n = 1
  while (aside := path.with_name(f"{path.name}.stale-{n}")).exists():
    n += 1
  return path.rename(aside)


def _check_same_config(
  path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
  if holds_config(path, config):
    return
  there, here = files.read_json(path / "config.json"), _normalized(config)
  differing = [
    f"  {name}: {there.get(name)!r} there, {here.get(name)!r} here"
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
  raise config_lib.UsageError(
    f"the workdir {path} holds a run with another config (choose another "
    "folder, or remove it):\n" + "\n".join(differing)
  )


def _set_aside_if_stale(path: pathlib.Path) -> None:
  if not (path / "env.json").exists():
    return
  changes = provenance.changes_since(files.read_json(path / "env.json"))
  if changes:
    aside = set_aside(path)
    path.mkdir()
    _LOG.warning(
      "the run in %s was made before changes in %s: moved it to %s",
      path,
      ", ".join(changes),
      aside.name,
    )


def _normalized(config: ml_collections.ConfigDict) -> dict[str, Any]:
  return files.as_json(config.to_dict())


def _seconds_before(path: pathlib.Path) -> float:
  file = path / "seconds.json"
  return float(files.read_json(file)) if file.exists() else 0.0
