"""The one place for Pallas names that move between JAX releases.

Kernels import Pallas from here, so that a renamed symbol is mended once. This
is the twin of ``jaxattn/_compat.py``: kernels import nothing of ``jaxattn``.
"""

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["out_struct", "pl", "pltpu", "races_found", "varying_axes"]


def varying_axes(operands: Any) -> frozenset[str]:
  """Axes of a mesh, inside ``jax.shard_map``, over which an operand varies."""
  types = (jax.typeof(x).manual_axis_type for x in jax.tree.leaves(operands))
  return frozenset[str]().union(*(t.varying for t in types))


def out_struct(
  shape: tuple[int, ...], dtype: Any, operands: Any
) -> jax.ShapeDtypeStruct:
  """What a kernel returns: it varies over all axes that its operands do."""
  varying = varying_axes(operands)
  if not varying:
    return jax.ShapeDtypeStruct(shape, dtype)
  kind = type(jax.typeof(jax.tree.leaves(operands)[0]).manual_axis_type)
  return jax.ShapeDtypeStruct(
    shape, dtype, manual_axis_type=kind(varying=varying)
  )


def races_found() -> bool:
  """Whether the last kernel under ``pltpu.InterpretParams`` raced."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  races = interpret_pallas_call.races
  if races is None:
    raise ValueError("no kernel ran with InterpretParams(detect_races=True)")
  return races.races_found
