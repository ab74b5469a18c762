r"""Sweeps over widths and seeds: one function, arrays over (width, seed).

The key of width m and seed s is ``fold_in(fold_in(rng, m), s)``. A result
therefore depends neither on the other widths of a sweep nor on how many seeds
it has, and a sweep may be cut into calls of one width each.

Widths set shapes, and shapes are compiled. Either each width has a program of
its own, or widths share one whose arrays have the size of the largest, in which
the surplus is masked: |widths| max / sum of them as much work for widths that
double, and one compilation. See :func:`sweep`.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxattn import _checks, _compat
from jaxattn.numerics._sizes import largest_divisor

_METHODS = ("per_width", "padded", "buckets")


class SweepResult(NamedTuple):
  """What a function returned, by width and by seed.

  Attributes:
    values: what the function returns, each array led by axes (width, seed).
    widths: (W,) the widths, in the order in which they were given.
  """

  values: Any
  widths: jax.Array


class _Group(NamedTuple):
  """Widths that share a program: the only one, or those padded to a size."""

  widths: tuple[int, ...]
  size: int


def sweep(
  rng: jax.Array,
  fn: Callable[..., Any],
  widths: Sequence[int],
  num_seeds: int,
  *,
  args: Sequence[Any] = (),
  method: str = "per_width",
  max_width: int | None = None,
  memory_limit: int = 2**31,
  mesh: jax.sharding.Mesh | None = None,
) -> SweepResult:
  """Calls a function for each width and each seed.

  Seeds run side by side (``vmap``), or in turn where what they keep at a time
  exceeds ``memory_limit``; with a mesh each device has its share of them.
  Programs are kept with ``fn``: a second call with the same function does not
  compile, one with a new lambda does. Of this repository's experiments,
  ``experiments.harness.sweep_widths`` shows progress and keeps each width, so
  that a run that was killed goes on.

  Methods, and what ``fn`` is called with:

  * ``"per_width"``: ``fn(rng, width, *args)``, an int: shapes may depend on it.
    One compilation a width.
  * ``"padded"``: ``fn(rng, width, *args, max_width=max_width)``, a traced width
    and the size of all arrays, an int. One compilation. Surplus neurons must
    have no output, get no gradient (nor decay) and no share of a normalizer,
    and scale factors must take ``width``.
  * ``"buckets"``: the same, padded to the next power of four; one compilation
    for each that occurs.

  Padding wins where compilation takes longer than all that is computed, or
  where all widths must be in one program. Draws of size ``max_width`` are not
  those of size ``width``, nor does one begin with the other.

  Args:
    rng: PRNG key.
    fn: function whose results are arrays of shapes that do not depend on the
      width.
    widths: different positive integers.
    num_seeds: results for each width; a multiple of the devices of ``mesh``.
    args: arrays, and trees of them, that all calls share, such as data. What
      ``fn`` closes over is compiled into each program instead.
    method: ``"per_width"``, ``"padded"`` or ``"buckets"``.
    max_width: of ``"padded"`` only: the size; None = the largest width.
    memory_limit: bytes that seeds may take side by side on a device. What one
      takes is estimated from its program as traced, without fusion: too much
      rather than too little.
    mesh: devices among which seeds are divided, over all axes; None = those
      on which JAX computes anyway.

  Returns:
    A :class:`SweepResult`.

  Raises:
    ValueError: if ``widths`` is empty or holds anything but different positive
      integers, if ``num_seeds`` or ``memory_limit`` is not a positive integer
      or the devices do not divide the seeds, if the method is unknown, if
      ``max_width`` comes without ``"padded"`` or is less than a width, or if
      the shape or dtype of a result depends on the width.

  Cost:
    That of ``fn`` for each width and seed; padded, that of the largest.

  Source:
    this project.

  Example:
    >>> import jax
    >>> def largest(rng, width):
    ...   return {"largest": jax.random.uniform(rng, (width,)).max()}
    >>> found = sweep(jax.random.key(0), largest, (10, 1000), num_seeds=4)
    >>> print(found.values["largest"].shape, found.widths)
    (2, 4) [  10 1000]
    >>> bool((found.values["largest"][1] > 0.99).all())
    True
  """
  widths = _checked_widths(widths)
  _checks.check_integer("num_seeds", num_seeds, 1, None)
  _checks.check_integer("memory_limit", memory_limit, 1, None)
  _checks.check_choice("method", method, _METHODS)
  if mesh is not None and num_seeds % mesh.size:
    raise ValueError(
      f"num_seeds must be a multiple of the {mesh.size} devices of mesh, got "
      f"{num_seeds}"
    )
  padded = method != "per_width"
  groups = _grouped(widths, method, max_width)
  args = tuple(args)
  _check_results(rng, fn, groups, padded, args)
  found: dict[int, Any] = {}
  for group in groups:
    values = _run(
      _keys(rng, jnp.array(group.widths, jnp.int32), num_seeds),
      args,
      fn=fn,
      group=group,
      padded=padded,
      memory_limit=memory_limit,
      mesh=mesh,
    )
    found |= dict(zip(group.widths, values, strict=True))
  values = jax.tree.map(lambda *x: jnp.stack(x), *(found[w] for w in widths))
  return SweepResult(values, jnp.array(widths, jnp.int32))


def _checked_widths(widths: Sequence[int]) -> tuple[int, ...]:
  widths = tuple(widths)
  for width in widths:
    _checks.check_integer("widths", width, 1, None)
  if not widths or len(set(widths)) < len(widths):
    raise ValueError(f"widths must be different, at least one, got {widths}")
  return tuple(int(width) for width in widths)


def _grouped(
  widths: tuple[int, ...], method: str, max_width: int | None
) -> list[_Group]:
  if method != "padded" and max_width is not None:
    raise ValueError(
      f'max_width is of method "padded", got {max_width} and "{method}"'
    )
  if method == "per_width":
    return [_Group((width,), width) for width in widths]
  if method == "padded":
    size = max(widths) if max_width is None else max_width
    _checks.check_integer("max_width", size, max(widths), None)
    return [_Group(widths, size)]
  buckets: dict[int, list[int]] = {}
  for width in widths:
    buckets.setdefault(_bucket(width), []).append(width)
  return [_Group(tuple(inside), size) for size, inside in buckets.items()]


def _bucket(width: int) -> int:
  """The least power of four that is no less."""
  return 4 ** -(-(width - 1).bit_length() // 2)


# --- checks of results ---


def _check_results(
  rng: jax.Array,
  fn: Callable[..., Any],
  groups: list[_Group],
  padded: bool,
  args: tuple[Any, ...],
) -> None:
  """Raises before anything runs; what is traced here is not traced again."""
  first: Any = None
  for group in groups:
    one = functools.partial(_one, fn=fn, size=group.size, padded=padded)
    shapes = jax.eval_shape(one, rng, jnp.int32(group.widths[0]), args)
    first = shapes if first is None else first
    _check_same(first, shapes, groups[0].size, group.size)


def _check_same(want: Any, got: Any, first: int, width: int) -> None:
  def leaves(tree: Any) -> dict[str, str]:
    return {
      jax.tree_util.keystr(path) or "the result": f"{x.dtype}{x.shape}"
      for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }

  one, other = leaves(want), leaves(got)
  for path in one.keys() | other.keys():
    if one.get(path) != other.get(path):
      raise ValueError(
        "fn must return arrays whose shapes and dtypes do not depend on the "
        f"width, got {path} as {one.get(path)} at width {first} and as "
        f"{other.get(path)} at width {width}"
      )


# --- programs ---


@functools.partial(jax.jit, static_argnames=("fn", "size", "padded"))
def _one(
  rng: jax.Array,
  width: jax.Array,
  args: tuple[Any, ...],
  *,
  fn: Callable[..., Any],
  size: int,
  padded: bool,
) -> Any:
  """One seed; jitted so that all who call it share one trace."""
  if padded:
    return fn(rng, width, *args, max_width=size)
  return fn(rng, size, *args)


@functools.partial(jax.jit, static_argnums=2)
def _keys(rng: jax.Array, widths: jax.Array, num_seeds: int) -> jax.Array:
  """(W, S), apart from the programs: widths share it, and it is slow to make.

  Each key is that of its width and its seed alone.
  """
  fold = jax.random.fold_in

  def of_width(width: jax.Array) -> jax.Array:
    rng_width = fold(rng, width)
    return jax.vmap(lambda seed: fold(rng_width, seed))(jnp.arange(num_seeds))

  return jax.vmap(of_width)(widths)


@functools.partial(
  jax.jit, static_argnames=("fn", "group", "padded", "memory_limit", "mesh")
)
def _run(
  keys: jax.Array,
  args: tuple[Any, ...],
  *,
  fn: Callable[..., Any],
  group: _Group,
  padded: bool,
  memory_limit: int,
  mesh: jax.sharding.Mesh | None,
) -> list[Any]:
  """Results of all seeds, for each width of a group."""
  widths = jnp.array(group.widths, jnp.int32)

  def run(keys: jax.Array, args: tuple[Any, ...]) -> Any:
    """(W, S, ...) of (W, S) keys, in as many turns as memory asks for."""

    def one(rng: jax.Array, width: jax.Array) -> Any:
      return _one(rng, width, args, fn=fn, size=group.size, padded=padded)

    shape, num = keys.shape[:2], keys.shape[0] * keys.shape[1]
    flat = keys.reshape(num, *keys.shape[2:])
    inputs = flat, jnp.repeat(widths, shape[1])
    side_by_side = max(1, memory_limit // _live_bytes(one, flat[0], widths[0]))
    if num <= side_by_side:
      values = jax.vmap(one)(*inputs)
    else:
      values = lax.map(
        lambda x: one(*x),
        inputs,
        batch_size=largest_divisor(num, side_by_side),
      )
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), values)

  values = (
    run(keys, args) if mesh is None else _on_devices(run, keys, args, mesh)
  )
  return [
    jax.tree.map(operator.itemgetter(i), values) for i in range(widths.size)
  ]


def _on_devices(
  run: Callable[..., Any],
  keys: jax.Array,
  args: tuple[Any, ...],
  mesh: jax.sharding.Mesh,
) -> Any:
  """Each device runs its seeds, which it takes from the keys of all."""
  axes, share = mesh.axis_names, keys.shape[1] // mesh.size

  def local(keys: jax.Array, args: tuple[Any, ...]) -> Any:
    first = lax.axis_index(axes) * share
    return run(lax.dynamic_slice_in_dim(keys, first, share, axis=1), args)

  # Loops inside fn start from constants, which vary over no axis: nothing that
  # devices exchange or transpose needs the check.
  return _compat.shard_map(
    local, mesh=mesh, in_specs=P(), out_specs=P(None, axes), check_vma=False
  )(keys, args)


def _live_bytes(fn: Callable[..., Any], *args: Any) -> int:
  """Most bytes of arrays that a call keeps at a time, if nothing is fused."""
  return max(1, _peak(jax.make_jaxpr(fn)(*args).jaxpr))


def _peak(jaxpr: Any) -> int:
  def nbytes(values: set[Any]) -> int:
    return sum(
      v.aval.size * v.aval.dtype.itemsize
      for v in values
      if hasattr(v.aval, "dtype")
    )

  # Constants and args are not counted: all seeds share them.
  constants = set(jaxpr.constvars)
  last = dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
  for i, eqn in reversed(list(enumerate(jaxpr.eqns))):
    last = dict.fromkeys(_variables(eqn.invars), i) | last
  live = peak = nbytes(set(jaxpr.invars))
  for i, eqn in enumerate(jaxpr.eqns):
    inner = map(_peak, jax.extend.core.jaxprs_in_params(eqn.params))
    made = _variables(eqn.outvars)
    live += nbytes(made)
    peak = max(peak, live + max(inner, default=0))
    ended = {v for v in _variables(eqn.invars) | made if last.get(v, i) == i}
    live -= nbytes(ended - constants)
  return peak


def _variables(values: Any) -> set[Any]:
  """Without literals."""
  return {v for v in values if isinstance(v, jax.extend.core.Var)}
