"""A pass over a stream of any length, and what a state of it weighs."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def stream(fn: Callable[[Any, Any], Any], state: Any, chunks: Any) -> Any:
  """Carries a state through a stream, chunk by chunk.

  The stream itself need never exist: ``chunks`` may be the numbers of chunks,
  ``range(n)``, from which ``fn`` draws or computes what it adds; or a Python
  iterator that reads from a disk or a socket.

  Args:
    fn: ``fn(state, chunk) -> state``, of the same structure, shapes and dtypes;
      traced. The same function compiles once, a lambda made anew each time.
    state: what to start from; any pytree.
    chunks: a ``range``, for one loop on the device, of which any length is the
      same program; a pytree of arrays with a leading axis that counts chunks,
      for one ``lax.scan``, which has a gradient; or an iterator over pytrees of
      equal shapes, for a loop on the host.

  Returns:
    The state behind the last chunk.

  Raises:
    ValueError: if ``chunks`` is a pytree without arrays, or with leading axes
      of different sizes.

  Cost:
    That of the calls, and memory of one of them.

  Source:
    this project.

  Example:
    >>> import jax
    >>> from jaxattn.attention import moment_init, moment_update
    >>> def step(state, i):
    ...   rng = jax.random.fold_in(jax.random.key(0), i)
    ...   key, value = jax.random.normal(rng, (2, 1, 256, 1, 4))
    ...   return moment_update(state, key, value)
    >>> empty = moment_init(1, 1, 4, 4, degree=2)
    >>> stream(step, empty, range(400)).count.tolist()
    [102400]
  """
  if isinstance(chunks, Iterator):
    step = jax.jit(fn)
    for chunk in chunks:
      state = step(state, chunk)
    return state
  if isinstance(chunks, range):
    return _loop(fn, state, chunks.start, chunks.step, len(chunks))
  chunks = jax.tree.map(jnp.asarray, chunks)
  sizes = {x.shape[:1] for x in jax.tree.leaves(chunks)}
  if len(sizes) != 1 or sizes == {()}:
    raise ValueError(
      "chunks must be a range, an iterator, or arrays with one leading axis "
      f"that counts chunks, got leading axes {sorted(sizes)}"
    )
  return _scan(fn, state, chunks)


@functools.partial(jax.jit, static_argnums=0)
def _scan(fn: Callable[[Any, Any], Any], state: Any, chunks: Any) -> Any:
  return lax.scan(lambda s, chunk: (fn(s, chunk), None), state, chunks)[0]


@functools.partial(jax.jit, static_argnums=0)
def _loop(
  fn: Callable[[Any, Any], Any],
  state: Any,
  start: jax.Array,
  step: jax.Array,
  num: jax.Array,
) -> Any:
  return lax.fori_loop(0, num, lambda i, s: fn(s, start + step * i), state)


def state_bytes(state: Any) -> int:
  """Bytes of all arrays of a state.

  Args:
    state: any pytree of arrays, or of ``jax.ShapeDtypeStruct``.

  Returns:
    The number; it does not depend on what was streamed.

  Raises:
    ValueError: if the state has a leaf that is no array.

  Cost:
    O(1).

  Source:
    this project.

  Example:
    >>> from jaxattn.attention import moment_init
    >>> state_bytes(moment_init(1, 1, 8, 8, degree=2))  # 2 * 405 numbers, and 2
    3248
  """
  total = 0
  for x in jax.tree.leaves(state):
    if not hasattr(x, "dtype") or not hasattr(x, "size"):
      raise ValueError(f"state must hold arrays only, got {x!r}")
    total += int(x.size) * x.dtype.itemsize
  return total
