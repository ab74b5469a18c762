"""Reading safetensors: values, and an error for every damaged file."""

import json

import numpy as np
import pytest

from jaxattn.models import _safetensors


def _entry(dtype, shape, begin, end):
  return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _content(header, data=b""):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + data


def _read(tmp_path, content):
  path = tmp_path / "x.safetensors"
  path.write_bytes(content)
  return _safetensors.read_safetensors(path)


def test_values_shapes_and_dtypes_come_back(tmp_path):
  arrays = {
    "F16": np.array([1.5, -2.0], np.float16),
    "F32": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "F64": np.array(np.pi),
    "I32": np.array([[-5]], np.int32),
    "I64": np.array([2**40, -1]),
  }
  header, data = {"__metadata__": {"format": "pt"}}, b""
  for name, x in arrays.items():
    end = len(data) + x.nbytes
    header[name] = _entry(name, x.shape, len(data), end)
    data += x.tobytes()
  got = _read(tmp_path, _content(header, data))
  assert sorted(got) == sorted(arrays)
  for name, x in arrays.items():
    assert got[name].dtype == x.dtype
    np.testing.assert_array_equal(got[name], x, strict=True)


def test_every_truncation_is_refused(tmp_path):
  header = {"a": _entry("F32", [2], 0, 8), "b": _entry("F32", [1], 8, 12)}
  content = _content(header, bytes(12))
  _read(tmp_path, content)
  for size in range(len(content)):
    with pytest.raises(ValueError, match=r"must begin|is cut short"):
      _read(tmp_path, content[:size])


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "must begin with 8 bytes of header length, got 0 bytes"),
    (b"\xff" * 8, "its header should take 18446744073709551615 bytes"),
    (_content(b"{'a'"), "has a garbled header: Expecting property name"),
    (_content(b"\xff\xfe{}"), "has a garbled header: "),
    (_content([1]), "expected a JSON object, got list"),
    (_content({"a": 3}), "garbled entry for tensor 'a': 3"),
    (_content({"a": {"dtype": "F32"}}), "garbled entry for tensor 'a'"),
    (_content({"a": _entry("F32", ["x"], 0, 4)}), "garbled entry for tensor"),
    (_content({"a": _entry("F32", [-1], 0, 4)}), "garbled entry for tensor"),
    (_content({"a": _entry("F32", [1.5], 0, 6)}), "garbled entry for tensor"),
    (_content({"a": _entry("F32", [1], "p", 4)}), "garbled entry for tensor"),
    (_content({"a": _entry("BF16", [1], 0, 2)}), "F64, I32, I64, got BF16"),
    (
      _content({"a": _entry("F32", [2], 0, 4)}, bytes(4)),
      r"must take 8 bytes for F32 \(2,\), got 4",
    ),
    (
      _content({"a": _entry("F32", [1], 4, 8)}, bytes(4)),
      "should end at byte 8 of the data, the file has 4",
    ),
    (
      _content({"a": _entry("F32", [1], -4, 0)}, bytes(4)),
      "garbled entry for tensor",
    ),
  ],
)
def test_damaged_files_are_refused_by_message(tmp_path, content, message):
  with pytest.raises(ValueError, match=message):
    _read(tmp_path, content)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
    _safetensors.read_safetensors(tmp_path / "none.safetensors")
