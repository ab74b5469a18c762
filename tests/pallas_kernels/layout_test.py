"""Every operation has what dispatchers rely on; none lacks its gradient."""

import importlib
import pathlib

import pytest

import pallas_kernels

_FOLDERS = [
  path.parent
  for path in pathlib.Path(*pallas_kernels.__path__).glob("*/api.py")
]
_BACKENDS = [path for folder in _FOLDERS for path in folder.glob("mosaic_*.py")]


def _name(path):
  return f"pallas_kernels.{path.parent.name}.{path.stem}"


@pytest.mark.parametrize("path", _BACKENDS, ids=_name)
def test_kernels_have_a_gradient_and_say_what_they_take(path):
  module = importlib.import_module(_name(path))
  for name in ("supports", "forward", "backward"):
    assert callable(getattr(module, name))


@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_bears_the_name_of_its_function(folder):
  package = f"pallas_kernels.{folder.name}"
  assert folder.name in importlib.import_module(package).__all__
  reference = importlib.import_module(f"{package}.reference").reference
  assert callable(reference)


def test_which_operations_have_kernels():
  on = {"mosaic_tpu": set(), "mosaic_gpu": set()}
  for path in _BACKENDS:
    on[path.stem].add(path.parent.name)
  gpu = {f"{name}_attention" for name in ("flash", "polynomial", "ntk", "relu")}
  assert on["mosaic_gpu"] == gpu
  tpu = gpu | {"tensor_attention", "small_cache_attention"}
  assert on["mosaic_tpu"] == tpu == {folder.name for folder in _FOLDERS}
