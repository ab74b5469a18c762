"""Points of a sweep as bytes: ``.npz`` archives that round-trip exactly."""

import io
import logging
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

_LOG = logging.getLogger(__name__)

# Whatever numpy and zipfile raise on a file that is not whole.
_DAMAGE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)


def encode_point(values: Mapping[str, Any]) -> bytes:
  """Packs named numbers and arrays.

  Args:
    values: arrays (of NumPy or JAX) and numbers by name.

  Returns:
    The bytes of an ``.npz`` archive.

  Raises:
    ValueError: if a value is not an array of numbers, booleans or strings.

  Example:
    >>> decode_point(encode_point({"slope": 0.5, "x": [1.0, 2.0]}))
    {'slope': 0.5, 'x': array([1., 2.])}
  """
  arrays = {name: np.asarray(value) for name, value in values.items()}
  for name, array in arrays.items():
    if array.dtype.kind not in "biufcU":
      raise ValueError(
        f"a point must hold numbers, booleans or strings, got dtype "
        f"{array.dtype} for {name!r}"
      )
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
  return buffer.getvalue()


def decode_point(payload: bytes) -> dict[str, Any]:
  """Unpacks :func:`encode_point`; what was a number comes back as a number."""
  with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
    arrays = {name: archive[name] for name in archive.files}
  return {k: v if v.ndim else v.item() for k, v in arrays.items()}


def read_point(path: pathlib.Path) -> bytes:
  """Reads a stored point.

  Args:
    path: file that may be missing, or damaged by a full disk.

  Returns:
    Its bytes if they decode; otherwise nothing, and a damaged file is named
    in the log.
  """
  if not path.exists():
    return b""
  try:
    payload = path.read_bytes()
    decode_point(payload)
  except _DAMAGE as error:
    _LOG.warning("point %s is damaged (%s): computing it again", path, error)
    return b""
  return payload
