"""The one place for Pallas names that move between JAX releases.

Kernels import Pallas from here, so that a renamed symbol is mended once. This
is the twin of ``jaxattn/_compat.py``: kernels import nothing of ``jaxattn``.
"""

import inspect
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

__all__ = [
  "block_ids",
  "gpu_interpreter",
  "gpu_load",
  "gpu_races_found",
  "gpu_store",
  "grid_name",
  "out_struct",
  "pl",
  "plgpu",
  "pltpu",
  "reset_gpu_interpreter",
  "tpu_races_found",
  "vary_with",
  "varying_axes",
]


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


def vary_with(x: jax.Array, operands: Any) -> jax.Array:
  """``x``, which was made from ``operands`` by code that forgets their axes."""
  missing = tuple(sorted(varying_axes(operands) - varying_axes(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


def grid_name(axis: str) -> str:
  """Name of a grid's axis that no mesh has: JAX asks for those first."""
  return f"pallas_kernels.{axis}"


def block_ids(*axes: str) -> tuple[jax.Array, ...]:
  """Which block this is, along axes that ``grid_name`` named."""
  return tuple(jax.lax.axis_index(grid_name(axis)) for axis in axes)


def tpu_races_found() -> bool:
  """Whether the last kernel under ``pltpu.InterpretParams`` raced."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  races = interpret_pallas_call.races
  if races is None:
    raise ValueError("no kernel ran with InterpretParams(detect_races=True)")
  return races.races_found


def gpu_races_found() -> bool:
  """Whether the last kernel under ``gpu_interpreter`` raced."""
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

  return gpu_callbacks.get_races().races_found


def reset_gpu_interpreter() -> None:
  """Forgets what an interpreted kernel left, which may have failed."""
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

  interpret_pallas_call.reset_gpu_interpret_mode_state()


def gpu_interpreter(**params: Any) -> Any:
  """What to pass as ``interpret`` of ``plgpu.kernel`` to run it anywhere."""
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

  return InterpretGPUParams(**params)


def gpu_load(ref: Any) -> jax.Array:
  """What lies in a GPU's shared memory, if need be with conflicts of banks."""
  load: Any = plgpu.load
  indices = (...,) if "idx" in inspect.signature(load).parameters else ()
  return load(ref, *indices, optimized=False)


def gpu_store(ref: Any, value: jax.Array) -> None:
  """Writes to a GPU's shared memory, if need be with conflicts of banks."""
  store: Any = getattr(plgpu, "store", None)
  if store is None:  # and what Pallas writes need not be free of them
    ref[...] = value
  else:
    store(ref, value, optimized=False)
