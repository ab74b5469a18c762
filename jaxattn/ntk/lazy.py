"""How far a training was from that of a fixed kernel."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.ntk import _blocks


class LazyMetrics(NamedTuple):
  r"""How far a training was from that of a fixed kernel; scalars.

  Over seeds take the median: features like exponentials are log-normal, and one
  neuron can move the mean by orders of magnitude.

  Attributes:
    kernel_change: :math:`\|H_T - H_0\|_F / \|H_0\|_F`.
    move_rms: root mean square of the distances that neurons moved.
    move_max: the largest of these distances.
    kernel_limit_gap: :math:`\|H_0 - H_\infty\|_F / \|H_\infty\|_F`; None
      without ``kernel_limit``.
    fn_gap: :math:`\|f_T - f_T^H\| / \|f_T^H\|` of the outputs that came out
      and those that the kernel predicts; None without them.
    alignment: :math:`\langle H_T, y y^\top \rangle / (\|H_T\|_F \|y\|^2)`;
      None without ``targets``.
  """

  kernel_change: jax.Array
  move_rms: jax.Array
  move_max: jax.Array
  kernel_limit_gap: jax.Array | None = None
  fn_gap: jax.Array | None = None
  alignment: jax.Array | None = None


def lazy_metrics(
  kernel0: jax.Array,
  kernel1: jax.Array,
  params0: Any,
  params1: Any,
  *,
  kernel_limit: jax.Array | None = None,
  outputs: jax.Array | None = None,
  outputs_predicted: jax.Array | None = None,
  targets: jax.Array | None = None,
) -> LazyMetrics:
  """Measures how lazy a training was: what moved, and how far.

  Args:
    kernel0: (n, n) or (n, O, n, O), at the start.
    kernel1: the same at the end.
    params0: parameters at the start, a pytree; the first axis of each array
      counts neurons (transpose what counts them elsewhere).
    params1: the same at the end.
    kernel_limit: that of infinite width, like ``kernel0``; or (n, n), the same
      for each output, beside kernels (n, O, n, O).
    outputs: outputs at the end, on any data.
    outputs_predicted: what they should be, of the same shape: outputs at the
      start plus what :func:`jaxattn.ntk.descent_test` says.
    targets: (n,) or (n, O), with which the kernel at the end is to align.

  Returns:
    :class:`LazyMetrics`.

  Raises:
    ValueError: if shapes do not fit, or only one of the two outputs is given.

  Cost:
    Linear in the arguments.

  Source:
    arXiv 1812.07956; arXiv 1203.0550 for the alignment.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import lazy_metrics
    >>> w = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    >>> metrics = lazy_metrics(jnp.eye(2), 1.5 * jnp.eye(2), w, 0 * w)
    >>> print(metrics.kernel_change, metrics.move_max)
    0.5 5.0
  """
  kernel0, kernel1 = jnp.asarray(kernel0), jnp.asarray(kernel1)
  _blocks.check_kernel(kernel0, "kernel0")
  _checks.check_shape("kernel1", kernel1, kernel0.shape, "kernel0's")
  moves = jnp.concatenate(jax.tree.leaves(_moves(params0, params1)))
  limit_gap = fn_gap = alignment = None
  if kernel_limit is not None:
    limit_gap = _distance(kernel0, _check_limit(kernel_limit, kernel0.shape))
  if (outputs is None) != (outputs_predicted is None):
    raise ValueError("outputs and outputs_predicted must come together")
  if outputs is not None:
    predicted = jnp.asarray(outputs_predicted)
    _checks.check_shape("outputs", outputs, predicted.shape, "the predicted")
    fn_gap = _distance(jnp.asarray(outputs), predicted)
  if targets is not None:
    targets = jnp.asarray(targets)
    data = kernel1.shape[: kernel1.ndim // 2]
    _blocks.check_residual(targets, data, "targets")
    alignment = _alignment(kernel1, targets)
  return LazyMetrics(
    kernel_change=_distance(kernel1, kernel0),
    move_rms=jnp.sqrt(jnp.square(moves).mean()),
    move_max=moves.max(),
    kernel_limit_gap=limit_gap,
    fn_gap=fn_gap,
    alignment=alignment,
  )


def _check_limit(limit: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The limit, of a kernel's shape."""
  limit = jnp.asarray(limit)
  if limit.ndim < len(shape):
    n, num_outputs = shape[:2]
    _checks.check_shape("kernel_limit", limit, (n, n), "(n, n)")
    same = jnp.eye(num_outputs, dtype=limit.dtype)
    return limit[:, None, :, None] * same[None, :, None]
  _checks.check_shape("kernel_limit", limit, shape, "kernel0's")
  return limit


def _moves(params0: Any, params1: Any) -> Any:
  """Of each leaf (m, ...) the m distances."""
  shapes = [jax.tree.map(jnp.shape, p) for p in (params0, params1)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f"params0 and params1 must have the same shapes, got {shapes[0]} and "
      f"{shapes[1]}"
    )
  if not jax.tree.leaves(params0):
    raise ValueError("params0 must hold an array")

  def move(a: jax.Array, b: jax.Array) -> jax.Array:
    difference = jnp.atleast_1d(jnp.asarray(b) - jnp.asarray(a))
    rows = difference.reshape(len(difference), -1)
    return jnp.sqrt(jnp.square(rows).sum(1))

  return jax.tree.map(move, params0, params1)


def _distance(a: jax.Array, b: jax.Array) -> jax.Array:
  """Distance of a from b, relative to b."""
  return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())


def _alignment(kernel: jax.Array, targets: jax.Array) -> jax.Array:
  size = math.prod(kernel.shape[: kernel.ndim // 2])
  matrix, columns = kernel.reshape(size, size), targets.reshape(size, -1)
  moved = jnp.matmul(matrix, columns, precision=lax.Precision.HIGHEST)
  inner = jnp.vdot(columns, moved)
  # Of outputs that do not mix the kernel is as many copies of the matrix.
  norm = jnp.linalg.norm(matrix) * columns.shape[1] ** 0.5
  return inner / (norm * jnp.square(columns).sum())
