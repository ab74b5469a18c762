"""The one dispatcher: which implementation of an operation runs where.

``implementation=None`` never fails: it takes the best branch that the platform
of the *lowering* offers, so that code compiled for a platform which is not the
default one gets that platform's branch. A named implementation runs or raises
NotImplementedError; it is never replaced by another one.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import lax

from jaxattn import _checks


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
  branches: Mapping[str, Branch],
  *operands: Any,
) -> Any:
  """Calls one of ``branches`` on ``operands``.

  Args:
    implementation: a key of ``branches``, or None for the best one of the
      platform that the computation is lowered for.
    branches: by name; must hold "xla", which runs everywhere.
    *operands: arrays and pytrees of arrays.

  Returns:
    What the branch returns.

  Raises:
    ValueError: if ``implementation`` is not a key of ``branches``.
    NotImplementedError: if a named branch does not support the operands.
  """
  _checks.check_choice("implementation", implementation, (None, *branches))
  if implementation is not None:
    branch = branches[implementation]
    if branch.unsupported is not None:
      raise NotImplementedError(
        f"implementation={implementation!r} cannot run here: "
        f"{branch.unsupported}"
      )
    return branch.fn(*operands)
  offered = {
    b.platform: b.fn
    for b in branches.values()
    if b.platform is not None and b.unsupported is None
  }
  if not offered:
    return branches["xla"].fn(*operands)
  return lax.platform_dependent(
    *operands, default=branches["xla"].fn, **offered
  )
