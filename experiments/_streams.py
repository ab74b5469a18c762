"""Real streams of keys and values, and the memory that a call takes."""

import pathlib
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxattn.data import load_image_patches, load_text
from jaxattn.models import load_minilm, minilm_tokenize

IMAGE_WIDTH = 640
# Principal components that are kept of anything.
_MAX_DIM = 8
_CHUNK = 4096
_PROC = pathlib.Path("/proc/self")


def load_image(num_pixels: int) -> tuple[np.ndarray, np.ndarray]:
  """First pixels (n, 3) of a photograph; components (n, 8) of their patches."""
  pixels, patches = load_image_patches()
  return pixels[:num_pixels], principal(patches[:num_pixels])


def load_tokens(max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
  """Pretrained embeddings of a text's tokens, and of those that follow.

  Returns:
    Two arrays (n, 8): principal components of the embeddings of the tokens, and
    of their successors, at most 1 in norm.
  """
  text = load_text()
  # No token is shorter than a character.
  ids, mask = minilm_tokenize([text[: 8 * max_tokens]], len(text))
  tokens = ids[0][mask[0]][1:-1][: max_tokens + 1]
  components = principal(np.asarray(load_minilm()["word"]["embedding"])[tokens])
  components /= np.linalg.norm(components, axis=1).max()
  return components[:-1], components[1:]


def principal(rows: np.ndarray) -> np.ndarray:
  """The first 8 principal components (n, 8) of rows (n, d), centered."""
  mean = rows.mean(0, dtype=np.float64)
  centered = rows.astype(np.float64) - mean
  _, vectors = np.linalg.eigh(centered.T @ centered)
  return centered @ vectors[:, : -_MAX_DIM - 1 : -1]


def stream_keys(components: np.ndarray, dim: int, radius: float) -> np.ndarray:
  """Keys (n, dim) whose products with each other are at most a radius."""
  key = components[:, :dim]
  return key * (np.sqrt(radius) / np.linalg.norm(key, axis=1).max())


def chunks(rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Rows of one size at a time, and which of them are any."""
  for start in range(0, len(rows), _CHUNK):
    part = rows[start : start + _CHUNK]
    mask = np.arange(_CHUNK) < len(part)
    yield np.pad(part, ((0, _CHUNK - len(part)), (0, 0))), mask


def peak_bytes(run: Callable[[], Any]) -> tuple[int, Any]:
  """By how much memory grew at most during a call, and its result.

  That of the process, or that of the accelerator where there is one. Of what
  was larger before, accelerators and systems other than Linux only know that it
  did not grow further.
  """
  if jax.default_backend() != "cpu":
    before = _device("bytes_in_use")
    out = jax.block_until_ready(run())
    return _device("peak_bytes_in_use") - before, out
  if sys.platform == "linux":
    # Forgets the peak of all that was before.
    (_PROC / "clear_refs").write_text("5")
    before = _status("VmRSS")
    out = jax.block_until_ready(run())
    return max(0, _status("VmHWM") - before), out
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  out = jax.block_until_ready(run())
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return after - before, out


def _device(name: str) -> int:
  stats = jax.local_devices()[0].memory_stats()
  if stats is None:
    raise RuntimeError("this accelerator reports no memory statistics")
  return stats[name]


def _status(name: str) -> int:
  lines = (_PROC / "status").read_text().splitlines()
  (line,) = (x for x in lines if x.startswith(f"{name}:"))
  return 1024 * int(line.split()[1])
