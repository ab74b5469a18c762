"""Sizes that the hardware has, and blocks that are made to fit them."""

import dataclasses
from typing import Any

TPU_LANES = 128
TPU_VMEM = 16 * 2**20
GPU_SHARED = 227 * 2**10
# Blocks along the second and the third axis of a GPU's grid.
GPU_BLOCKS = 65535


def up(size: int, multiple: int) -> int:
  """The least multiple that is no smaller."""
  return -(-size // multiple) * multiple


def check_positive(sizes: Any) -> None:
  """Refuses a dataclass of which a field is no positive integer.

  Raises:
    ValueError: naming the field.
  """
  for field in dataclasses.fields(sizes):
    size = getattr(sizes, field.name)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
      raise ValueError(f"{field.name} must be a positive integer, got {size!r}")
