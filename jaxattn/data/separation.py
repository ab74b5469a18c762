r"""Two data sets that differ in one token: the separation of arXiv 2310.11685.

With :math:`L = \sqrt{\ln n}`, :math:`n = t (d - 2)`, a position j3 and
b + c = 1, the matrix A of n tokens of size d has

* column 0: :math:`a L e_{j_3}`, the one special token;
* columns 1 to d - 2: :math:`b L [I; \dots; I]`, t identities on top of each
  other;
* column d - 1: :math:`c L 1_n`.

The two sets differ in the amplitude a alone: at least 0.7, or below 0.1.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn import _checks


def separation_dataset(
  rng: jax.Array,
  *,
  length: int,
  dim: int,
  amplitude: float | jax.Array,
  b: float | jax.Array,
  batch_size: int = 1,
  dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
  r"""Draws matrices whose tokens are alike but for one, at a random position.

  Every row sums to :math:`\sqrt{\ln n}`, that of the special token to
  :math:`(1 + a) \sqrt{\ln n}`.

  Args:
    rng: PRNG key.
    length: n, tokens; a multiple of dim - 2.
    dim: d >= 4, size of a token.
    amplitude: a >= 0 of the special token; may be traced.
    b: share of the token's own direction, in [0.1, 0.9]; may be traced.
    batch_size: matrices to draw.
    dtype: of the matrices.

  Returns:
    Matrices (batch_size, n, d), and the positions (batch_size,) of their
    special tokens, int32.

  Raises:
    ValueError: if a size or a parameter is out of its range, for instance
      "length=100 must be a multiple of dim-2=48".

  Cost:
    O(batch_size n d).

  Source:
    arXiv 2310.11685, the data model of its lower bound, as it can be
    reconstructed from abstract and introduction.

  Example:
    >>> import jax
    >>> from jaxattn.data import separation_dataset
    >>> a, j3 = separation_dataset(
    ...   jax.random.key(0), length=96, dim=50, amplitude=0.7, b=0.2
    ... )
    >>> a.shape, bool(a[0].sum(-1).argmax() == j3[0])
    ((1, 96, 50), True)
  """
  _checks.check_integer("dim", dim, 4, None)
  _checks.check_integer("length", length, 2, None)
  _checks.check_integer("batch_size", batch_size, 1, None)
  if length % (dim - 2):
    raise ValueError(f"length={length} must be a multiple of dim-2={dim - 2}")
  for name, value in (("amplitude", amplitude), ("b", b)):
    _checks.check_scalar(name, value)
  _checks.check_nonnegative("amplitude", amplitude)
  _checks.check_range("b", b, 0.1, 0.9)
  return _draw(rng, amplitude, b, length, dim, batch_size, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _draw(
  rng: jax.Array,
  amplitude: Any,
  b: Any,
  length: int,
  dim: int,
  batch_size: int,
  dtype: Any,
) -> tuple[jax.Array, jax.Array]:
  size = math.sqrt(math.log(length))
  amplitude, b = (jnp.asarray(x, dtype) for x in (amplitude, b))
  j3 = jax.random.randint(rng, (batch_size,), 0, length, jnp.int32)
  special = jnp.arange(length, dtype=jnp.int32)[None] == j3[:, None]
  own = jnp.tile(jnp.eye(dim - 2, dtype=dtype), (length // (dim - 2), 1))
  own = jnp.broadcast_to(own, (batch_size, *own.shape))
  shared = jnp.ones((batch_size, length, 1), dtype)
  special = special[..., None].astype(dtype)
  columns = (amplitude * special, b * own, (1 - b) * shared)
  return size * jnp.concatenate(columns, -1), j3
