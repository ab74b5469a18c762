"""What can be checked of a kernel without the accelerator it is for.

A. ``interpret=True`` against the reference: the mathematics.
B. :func:`tpu_interpreter`: copies, races, reads out of bounds or of nothing;
   :func:`gpu_interpreter`, which is A for a GPU's kernels too.
C. :func:`lowered`: tiling rules and operations that a platform lacks.
D. :func:`compiled_for` :func:`tpu_devices`: Mosaic itself, memory, sharding.
E. :func:`compiled_for` :func:`cuda_device`: ptxas, shared memory, registers.

D and E need the compilers of the platform, and a process of their own: their
files are marked ``aot_tpu`` and ``aot_cuda``, and ``make test-aot`` runs them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels import _compat

# The custom call that a kernel becomes, by platform.
CALLS = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu_v2"}

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@contextlib.contextmanager
def tpu_interpreter() -> Iterator[Any]:
  """Yields what to pass as ``interpret``; fails if kernels raced inside.

  Two cores share the parallel axes of a grid. What is not initialized is NaN,
  and a read out of bounds raises.
  """
  try:
    yield _compat.pltpu.InterpretParams(
      detect_races=True, num_cores_or_threads=2
    )
    assert not _compat.tpu_races_found()
  finally:
    _compat.pltpu.reset_tpu_interpret_mode_state()


@contextlib.contextmanager
def gpu_interpreter() -> Iterator[Any]:
  """The same for a GPU: shared memory, barriers, copies and their order."""
  try:
    yield _compat.gpu_interpreter(detect_races=True)
    assert not _compat.gpu_races_found()
  finally:
    _compat.reset_gpu_interpreter()


def lowered(fn: Callable[..., Any], *args: Any, platform: str) -> str:
  """The program for a platform that need not be there, as text."""
  traced = jax.jit(fn).trace(*args)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@functools.cache
def tpu_devices(topology: str) -> list[Any]:
  """Devices to compile for, of "v5e:2x2" or "v6e:2x2"."""
  description = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  )
  return list(description.devices)


@functools.cache
def cuda_device() -> Any:
  """An H100 to compile for."""
  jax.devices()  # loads the plugins
  description = topologies.get_topology_desc(
    platform="cuda", target_config=_H100, topology="1x1x1"
  )
  return description.devices[0]


def compiled_for(device: Any, fn: Callable[..., Any], *args: Any) -> Any:
  """The executable of ``fn`` for structs ``args`` on one device."""
  sharding = SingleDeviceSharding(device)

  def place(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.jit(fn).lower(*jax.tree.map(place, args)).compile()


def num_kernels(executable: Any, platform: str) -> int:
  """How many kernels a compiled program calls."""
  target = f'custom_call_target="{CALLS[platform]}"'
  return executable.as_text().count(target)


def temporary_bytes(executable: Any) -> int:
  """Memory beside arguments and results."""
  memory = executable.memory_analysis()
  # A TPU's executables name none of theirs temporary.
  beside = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return memory.peak_memory_in_bytes - beside
