"""The one place for JAX names that move between releases.

Spelled as the newest release spells them. Helpers about *varying axes* live
here too: inside ``jax.shard_map`` every array has a set of mesh axes over which
its value differs, and loops and gradients must keep that set.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import layout

AxisType = jax.sharding.AxisType
auto_axes = jax.sharding.auto_axes
make_mesh = jax.make_mesh
pcast = lax.pcast
reshard = getattr(jax, "reshard", None) or jax.sharding.reshard
shard_map = jax.shard_map
typeof = jax.typeof


def row_major(x: jax.Array) -> jax.Array:
  """Has the last axis of ``x`` lie contiguously in memory.

  A transpose is no copy for the compiler, and rows looked up in what was
  transposed are gathered number by number.
  """
  order = layout.Layout(tuple(range(x.ndim)))
  return layout.with_layout_constraint(x, order)


def varying_axes(*arrays: Any) -> frozenset[str]:
  """Mesh axes over which at least one of the ``arrays`` varies."""
  axes: frozenset[str] = frozenset()
  for x in jax.tree.leaves(arrays):
    axes |= typeof(x).manual_axis_type.varying
  return axes


def cast_varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  """Marks ``x`` as varying over ``axes``, so that it can start a loop carry."""
  missing = tuple(sorted(axes - varying_axes(x)))
  return pcast(x, missing, to="varying") if missing else x


def full_varying(
  shape: Sequence[int], fill: float, dtype: Any, axes: frozenset[str]
) -> jax.Array:
  """A constant array that varies over ``axes``."""
  return cast_varying(jnp.full(shape, fill, dtype), axes)


def sum_like(cotangent: jax.Array, primal: jax.Array) -> jax.Array:
  """Sums a cotangent over the axes on which its primal does not vary.

  A ``custom_vjp`` backward rule needs this under ``shard_map``: an input that
  every device shares gets a contribution from each of them.
  """
  axes = tuple(sorted(varying_axes(cotangent) - varying_axes(primal)))
  total = lax.psum(cotangent, axes) if axes else cotangent
  return cast_varying(total, varying_axes(primal))


def has_explicit_axes(x: jax.Array) -> bool:
  """Whether an array lies on a mesh with explicit axes."""
  return AxisType.Explicit in typeof(x).sharding.mesh.axis_types


def is_sharded_by_compiler(*arrays: Any) -> bool:
  """Whether an array lies on devices of which a kernel is not told."""
  for x in arrays:
    mesh = typeof(x).sharding.mesh
    for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True):
      if kind == AxisType.Auto and size > 1:
        return True
  return False


def over_explicit_axes(
  fn: Callable[..., Any], query: jax.Array
) -> Callable[..., Any]:
  """Lets the compiler place what ``fn`` does on a mesh with explicit axes.

  Args:
    fn: a function of batched arrays to arrays (B, T, N, ...).
    query: (B, T, N, H); outputs are sharded over B, T and N as it is.

  Returns:
    ``fn``, or a wrapped ``fn`` if ``query`` lies on a mesh with explicit axes.
  """
  if not has_explicit_axes(query):
    return fn
  spec = jax.sharding.PartitionSpec(*typeof(query).sharding.spec[:3])
  return auto_axes(fn, out_sharding=spec)
