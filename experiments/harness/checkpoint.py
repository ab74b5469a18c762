"""Training states on disk: orbax, with a way back past damaged steps."""

import logging
import pathlib
import shutil
import zlib
from typing import Any, TypeVar

import jax

from experiments.harness import distributed, files

_LOG = logging.getLogger(__name__)
_MAX_TO_KEEP = 3

T = TypeVar("T")


class Checkpointer:
  """Saves and restores one training state under ``directory/<step>``.

  Beside each step stands ``<step>.json`` with the checksums of its files,
  written last: a step without it, or that differs from it, is damaged. Three
  steps are kept. A distributed run needs a folder that all processes share.
  """

  def __init__(self, directory: pathlib.Path):
    """Opens the store.

    Args:
      directory: absolute path of a folder for this state alone.
    """
    # Two seconds of import that only trainings pay.
    import orbax.checkpoint as ocp

    self._directory = directory
    self._abstract = ocp.utils.to_shape_dtype_struct
    self._orbax = ocp.StandardCheckpointer()

  def save(self, step: int, tree: Any) -> None:
    """Saves ``tree`` as step ``step`` and waits until it is on disk.

    Args:
      step: number of the step; one saved before is replaced.
      tree: pytree of arrays; typed PRNG keys and NamedTuples round-trip.
    """
    self._orbax.save(self._directory / str(step), tree, force=True)
    self._orbax.wait_until_finished()
    if jax.process_index() == 0:
      sums = _checksums(self._directory / str(step))
      files.write_json(self._directory / f"{step}.json", sums)
      for old in _steps(self._directory)[_MAX_TO_KEEP:]:
        (self._directory / f"{old}.json").unlink()
        shutil.rmtree(self._directory / str(old), ignore_errors=True)

  def restore(self, abstract: T) -> tuple[int, T] | None:
    """Returns the newest step that is whole.

    Args:
      abstract: a tree of the same structure, of arrays or of
        ``jax.ShapeDtypeStruct`` with shardings. The result has its types and
        shardings, so a state may move to another number of devices.

    Returns:
      ``(step, tree)``, or None if there is none. A step that was cut short
      or damaged is named in the log, and the one before it is used.

    Raises:
      ValueError: if the step is whole, but of another structure.
    """
    step = distributed.broadcast_bytes(_newest_whole_step(self._directory))
    if not step:
      return None
    target = jax.tree.map(self._abstract, abstract)
    return int(step), self._orbax.restore(
      self._directory / step.decode(), target
    )


def _newest_whole_step(directory: pathlib.Path) -> bytes:
  for step in _steps(directory):
    expected = files.read_json(directory / f"{step}.json")
    if _checksums(directory / str(step)) == expected:
      return str(step).encode()
    _LOG.warning(
      "checkpoint %s is damaged: using the one before",
      directory / str(step),
    )
  return b""


def _steps(directory: pathlib.Path) -> list[int]:
  found = (p.stem for p in directory.glob("*.json"))
  return sorted((int(s) for s in found if s.isdigit()), reverse=True)


def _checksums(directory: pathlib.Path) -> dict[str, int]:
  return {
    path.relative_to(directory).as_posix(): zlib.crc32(path.read_bytes())
    for path in sorted(directory.rglob("*"))
    if path.is_file()
  }
