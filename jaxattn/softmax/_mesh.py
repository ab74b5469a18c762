"""Exact attention on meshes with explicit axes.

Under sharding-in-types, loops over blocks of a sharded axis have no meaning.
So a call whose inputs are sharded over explicit axes becomes a ``shard_map``:
batch, heads and queries stay where they are, keys and values are gathered along
their sequence, and each shard knows the position of its first query.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxattn import _compat
from jaxattn.softmax._call import Operands


def over_explicit_axes(
  attend: Callable[[Operands], tuple[jax.Array, jax.Array]], x: Operands
) -> tuple[jax.Array, jax.Array]:
  """Calls ``attend`` once, or once on each shard of an explicit mesh.

  Args:
    attend: operands (in 4-D layout) to output (B, T, N, Hv) and (B, T, N).
    x: the operands, without an offset.

  Returns:
    Output and log-sum-exp, sharded as ``x.query`` is.
  """
  specs = _operand_specs(x)
  axes = {a for spec in specs if spec is not None for a in _names(spec)}
  if not axes:
    return attend(x)
  batch, queries, heads, _ = specs.query

  def local(*arrays: Any) -> tuple[jax.Array, jax.Array]:
    y = Operands(*arrays)
    if queries is not None:
      y = y._replace(offset=lax.axis_index(queries) * y.query.shape[1])
    return attend(y)

  arrays = [
    y if spec is None else _compat.reshard(y, spec)
    for y, spec in zip(x, specs, strict=True)
  ]
  return _compat.shard_map(
    local,
    in_specs=tuple(P() if spec is None else spec for spec in specs),
    out_specs=(P(batch, queries, heads, None), P(batch, queries, heads)),
    axis_names=axes,
  )(*arrays)


def _operand_specs(x: Operands) -> Operands:
  batch, queries, heads, head_dim = _explicit_spec(x.query)
  sizes = _compat.typeof(x.query).sharding.mesh.shape
  if heads is not None and x.key.shape[2] % _size(heads, sizes):
    heads = None  # too few key heads to keep the query heads apart
  del head_dim  # contracted: never left sharded

  def logits_spec(y: jax.Array | None) -> P | None:
    if y is None:
      return None
    axes = (batch, heads, queries, None)
    return P(
      *(a if n > 1 else None for a, n in zip(axes, y.shape, strict=True))
    )

  keys = P(batch, None, heads, None)
  lengths = P(batch)
  return Operands(
    P(batch, queries, heads, None),
    keys,
    keys,
    logits_spec(x.bias),
    logits_spec(x.mask),
    None if x.query_lengths is None else lengths,
    None if x.key_lengths is None else lengths,
    None,
  )


def _explicit_spec(y: jax.Array) -> tuple[Any, ...]:
  """Explicit mesh axes of each dimension, None where there are none."""
  sharding = _compat.typeof(y).sharding
  explicit = {
    name
    for name, kind in zip(
      sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True
    )
    if kind == _compat.AxisType.Explicit
  }
  spec = tuple(sharding.spec) + (None,) * (y.ndim - len(sharding.spec))
  return tuple(a if set(_names((a,))) <= explicit else None for a in spec)


def _names(spec: Any) -> list[str]:
  names = []
  for axis in spec:
    if axis is not None:
      names.extend(axis if isinstance(axis, tuple) else (axis,))
  return names


def _size(axis: Any, sizes: Any) -> int:
  size = 1
  for name in _names((axis,)):
    size *= sizes[name]
  return size
