"""Reads safetensors files with numpy alone.

The format: eight bytes with the length n of a header (little-endian), n bytes
of JSON ``{name: {"dtype", "shape", "data_offsets": [a, b]}}``, then the raw
data, in which a tensor is the bytes from a to b.
"""

import json
import math
import os
from typing import Any

import numpy as np

_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8"}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Returns the tensors of a safetensors file as read-only arrays by name.

  Args:
    path: the file.

  Returns:
    A dict from tensor name to array; the arrays are views of one buffer.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is cut short, garbled, or holds a dtype that is not
      one of F16, F32, F64, I32, I64.
  """
  with open(path, "rb") as file:
    content = file.read()
  header, data = _split(content, path)
  return {
    name: _tensor(name, entry, data, path)
    for name, entry in header.items()
    if name != "__metadata__"
  }


def _split(
  content: bytes, path: str | os.PathLike[str]
) -> tuple[dict[str, Any], memoryview]:
  if len(content) < 8:
    raise ValueError(
      f"{path} is no safetensors file: it must begin with 8 bytes of header "
      f"length, got {len(content)} bytes"
    )
  length = int.from_bytes(content[:8], "little")
  if length > len(content) - 8:
    raise ValueError(
      f"{path} is cut short or garbled: its header should take {length} bytes, "
      f"the file has {len(content) - 8} after the header length"
    )
  try:
    header = json.loads(content[8 : 8 + length])
  except ValueError as error:  # JSON and Unicode errors are both ValueErrors.
    raise ValueError(f"{path} has a garbled header: {error}") from error
  if not isinstance(header, dict):
    raise ValueError(
      f"{path} has a garbled header: expected a JSON object, got "
      f"{type(header).__name__}"
    )
  return header, memoryview(content)[8 + length :]


def _tensor(
  name: str, entry: Any, data: memoryview, path: str | os.PathLike[str]
) -> np.ndarray:
  try:
    dtype_name, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    sizes = (begin, end, *shape)
    if not all(isinstance(n, int) for n in sizes) or min(sizes) < 0:
      raise ValueError("sizes and offsets must be natural numbers")
  except (TypeError, KeyError, ValueError) as error:
    raise ValueError(
      f"{path} has a garbled entry for tensor {name!r}: {entry!r}"
    ) from error
  if dtype_name not in _DTYPES:
    raise ValueError(
      f"tensor {name!r} of {path} must have one of the dtypes "
      f"{', '.join(_DTYPES)}, got {dtype_name}"
    )
  dtype = np.dtype(_DTYPES[dtype_name])
  size = math.prod(shape) * dtype.itemsize
  if end - begin != size:
    raise ValueError(
      f"tensor {name!r} of {path} must take {size} bytes for "
      f"{dtype_name} {shape}, got {end - begin}"
    )
  if end > len(data):
    raise ValueError(
      f"{path} is cut short: tensor {name!r} should end at byte {end} of the "
      f"data, the file has {len(data)}"
    )
  return np.frombuffer(data[begin:end], dtype).reshape(shape)
