"""The one dispatcher: which implementation of an operation runs where.

``implementation=None`` never fails: it takes the best branch that the platform
of the *lowering* offers, so that code compiled for a platform which is not the
default one gets that platform's branch. A named implementation runs or raises
NotImplementedError; it is never replaced by another one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core
from jax.interpreters import batching, mlir

from jaxattn import _checks, _compat


class Branch(NamedTuple):
  """One implementation of an operation.

  Attributes:
    fn: the function; all branches of an operation have one signature.
    platform: the platform that ``implementation=None`` takes it on; None if it
      is only taken by name.
    unsupported: why these operands cannot use it here; None if they can.
  """

  fn: Callable[..., Any]
  platform: str | None = None
  unsupported: str | None = None


def dispatch(
  implementation: str | None,
  branches: Mapping[str, Branch | Sequence[Branch]],
  *operands: Any,
) -> Any:
  """Calls one of ``branches`` on ``operands``.

  Args:
    implementation: a key of ``branches``, or None for the best one of the
      platform that the computation is lowered for.
    branches: by name; must hold "xla", which runs everywhere. What has a kernel
      for each of several platforms is a sequence of those: under its name, each
      platform gets its own, and lowering for another one fails.
    *operands: arrays and pytrees of arrays.

  Returns:
    What the branch returns.

  Raises:
    ValueError: if ``implementation`` is not a key of ``branches``.
    NotImplementedError: if a named branch does not support the operands, or,
      when it is lowered, the platform.
  """
  _checks.check_choice("implementation", implementation, (None, *branches))
  if implementation is None:
    return _best(branches, operands)
  branch = branches[implementation]
  if not isinstance(branch, Branch):
    return _kernel_of_platform(implementation, branches, operands)
  if branch.unsupported is not None:
    raise NotImplementedError(_cannot_run(implementation, branch.unsupported))
  return branch.fn(*operands)


def _best(
  branches: Mapping[str, Branch | Sequence[Branch]], operands: Any
) -> Any:
  offered = {}
  for entry in branches.values():
    for b in (entry,) if isinstance(entry, Branch) else entry:
      if b.platform is not None and b.unsupported is None:
        if b.platform != "cuda" or gpu_reason() is None:
          offered[b.platform] = b.fn
  xla = branches["xla"]
  assert isinstance(xla, Branch)
  # Neither platform's compiler cuts a kernel into shards.
  if not offered or _compat.is_sharded_by_compiler(*jax.tree.leaves(operands)):
    return xla.fn(*operands)
  return lax.platform_dependent(*operands, default=xla.fn, **offered)


def _kernel_of_platform(
  implementation: str,
  branches: Mapping[str, Branch | Sequence[Branch]],
  operands: Any,
) -> Any:
  xla, kernels = branches["xla"], branches[implementation]
  assert isinstance(xla, Branch)
  assert not isinstance(kernels, Branch)
  if _compat.is_sharded_by_compiler(*jax.tree.leaves(operands)):
    needed = "what is on several devices needs jax.shard_map around the call"
    raise NotImplementedError(_cannot_run(implementation, needed))
  # Without any GPU, this may be compiled for another machine.
  if jax.default_backend() == "gpu" and (reason := gpu_reason()):
    kernels = [
      b._replace(unsupported=reason) if b.platform == "cuda" else b
      for b in kernels
    ]
  reasons = [b.unsupported for b in kernels]
  if None not in reasons:
    raise NotImplementedError(
      _cannot_run(implementation, "; ".join(dict.fromkeys(map(str, reasons))))
    )

  def refuse(reason: str) -> Callable[..., Any]:
    message = _cannot_run(implementation, reason)

    def fail(*operands: Any) -> Any:
      axes = _compat.varying_axes(operands)
      outputs = jax.eval_shape(xla.fn, *operands)

      def output(y: Any) -> jax.Array:
        y = _compat.full_varying(y.shape, 0, y.dtype, axes)
        return _refuse.bind(y, message=message)

      return jax.tree.map(output, outputs)

    return fail

  by_platform = {
    str(b.platform): b.fn if b.unsupported is None else refuse(b.unsupported)
    for b in kernels
  }
  names = {"tpu": "a TPU", "cuda": "an NVIDIA GPU"}
  needed = " or ".join(names[platform] for platform in by_platform)
  return lax.platform_dependent(
    *operands,
    default=refuse(
      f"it needs {needed}; 'xla' and 'pallas_interpret' run everywhere"
    ),
    **by_platform,
  )


def _cannot_run(implementation: str, reason: str) -> str:
  return f"implementation={implementation!r} cannot run here: {reason}"


def gpu_reason() -> str | None:
  """Why the first device cannot run kernels for GPUs; None if it can."""
  device = jax.local_devices()[0]
  if device.platform != "gpu":
    return "it needs an NVIDIA GPU"
  # On ROCm this is a name.
  capability = str(getattr(device, "compute_capability", "none"))
  # Kernels multiply by instructions of sm_90a, which has no successors.
  if capability.split(".")[0] == "9":
    return None
  return f"it needs a GPU of compute capability 9, got {capability}"


# The identity, which no platform can compile: only then is it known that a
# named kernel was lowered for a platform that has none.
_refuse = core.Primitive("jaxattn_refuse")
_refuse.def_abstract_eval(lambda x, *, message: x)
batching.defvectorized(_refuse)


def _refuse_lowering(ctx: Any, x: Any, *, message: str) -> Any:
  raise NotImplementedError(message)


def _refuse_eagerly(x: Any, *, message: str) -> Any:
  raise NotImplementedError(message)


_refuse.def_impl(_refuse_eagerly)
mlir.register_lowering(_refuse, _refuse_lowering)
