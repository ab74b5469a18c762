"""Several processes: one mesh over all devices, and process 0 writes."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.harness import config as config_lib


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  initialization_timeout: int = 300,
) -> None:
  """Joins the processes of one run; call before JAX touches a device.

  Args:
    coordinator_address: ``host:port`` of process 0. Left out, JAX asks the
      cluster that it finds: TPU pods, SLURM, Kubernetes, Open MPI.
    num_processes: how many processes there are.
    process_id: which of them this one is.
    initialization_timeout: seconds to wait for the others.

  Raises:
    UsageError: if there is no cluster and something was left out.
  """
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      initialization_timeout=initialization_timeout,
    )
  except ValueError as error:
    raise config_lib.UsageError(
      f"--distributed: {error} Outside a cluster that JAX knows, give "
      "--coordinator_address, --num_processes and --process_id."
    ) from error


def device_mesh(axis_name: str = "data") -> jax.sharding.Mesh:
  """Returns a mesh with one axis over the devices of all processes.

  Args:
    axis_name: name of the axis.

  Returns:
    A mesh whose axis is Auto: the compiler propagates shardings.

  Example:
    >>> device_mesh().axis_names
    ('data',)
  """
  return jax.make_mesh(
    (jax.device_count(),), (axis_name,), (jax.sharding.AxisType.Auto,)
  )


def broadcast_bytes(payload: bytes) -> bytes:
  """Returns what process 0 passed, in every process.

  Args:
    payload: bytes; those of processes other than 0 are ignored.

  Returns:
    The bytes of process 0, so that all take the same branches even where
    only process 0 sees the files.
  """
  if jax.process_count() == 1:
    return payload
  size = multihost_utils.broadcast_one_to_all(np.int32(len(payload)))
  buffer = np.zeros(int(size), np.uint8)
  if jax.process_index() == 0:
    buffer[:] = np.frombuffer(payload, np.uint8)
  if not buffer.size:
    return b""
  return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes()
