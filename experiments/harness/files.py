"""Files that are either written in full or not at all."""

import json
import math
import os
import pathlib
from typing import Any

import numpy as np


def write_bytes(path: pathlib.Path, payload: bytes) -> None:
  """Replaces ``path`` by ``payload`` in one step.

  A process killed at any moment leaves the old file or the new one; what it
  leaves of the temporary file is ignored by all readers.

  Args:
    path: file to write; its folder is created.
    payload: the whole content.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  with temporary.open("wb") as file:
    file.write(payload)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def write_text(path: pathlib.Path, text: str) -> None:
  """Replaces ``path`` by ``text`` in one step, as UTF-8."""
  write_bytes(path, text.encode())


def write_json(path: pathlib.Path, value: Any) -> None:
  """Replaces ``path`` by ``value`` as indented JSON in one step."""
  write_text(path, to_json(value, indent=2) + "\n")


def read_json(path: pathlib.Path) -> Any:
  """Reads a file that :func:`write_json` wrote."""
  return json.loads(path.read_text(encoding="utf-8"))


def as_json(value: Any) -> Any:
  """Returns what :func:`read_json` returns for a file holding ``value``."""
  return json.loads(to_json(value))


def to_json(value: Any, indent: int | None = None) -> str:
  """Writes ``value`` as strict JSON.

  Args:
    value: nested dicts and sequences of numbers, strings and small arrays.
    indent: spaces per level, or None for one line.

  Returns:
    JSON in which numbers that JSON lacks are the strings ``"nan"``, ``"inf"``
    and ``"-inf"``, and floats are exact.

  Example:
    >>> to_json({"slope": np.float32(0.5), "error": float("nan")})
    '{"slope": 0.5, "error": "nan"}'
  """
  return json.dumps(
    _plain(value), indent=indent, allow_nan=False, ensure_ascii=False
  )


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  if hasattr(value, "__array__"):
    return _plain(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value
