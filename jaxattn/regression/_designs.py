"""What the problems with a vector of unknowns ask of their data."""

import jax
import jax.numpy as jnp

from jaxattn import _checks, newton


def check_design(
  name: str, a: jax.Array | newton.Design
) -> tuple[jax.Array | newton.Design, int, jnp.dtype]:
  """A design as an array or a sparse one, its number of rows and its dtype."""
  if not isinstance(a, newton.Design):
    a = jnp.asarray(a)
    _checks.check_rank(name, a, 2)
  values = a.values if isinstance(a, newton.Design) else a
  _checks.check_floating(name, values)
  if not len(values):
    raise ValueError(f"{name} must have at least one row, got none")
  return a, len(values), values.dtype


def regularizer(
  a: jax.Array | newton.Design,
  w: float | jax.Array,
  ridge: float | jax.Array,
  n: int,
  dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Squared weights (n,), the ridge, and A^T diag(w^2) A + ridge I."""
  _checks.check_nonnegative("w", w)
  _checks.check_scalar("ridge", ridge)
  _checks.check_nonnegative("ridge", ridge)
  w2 = jnp.asarray(w, dtype) ** 2
  if w2.ndim:
    _checks.check_shape("w", w2, (n,), "(n,)")
  w2 = jnp.broadcast_to(w2, (n,))
  ridge = jnp.asarray(ridge, dtype)
  const = newton.weighted_gram(a, w2)
  return w2, ridge, const + ridge * jnp.eye(len(const), dtype=dtype)


def check_start(x0: jax.Array | None, d: int, dtype: jnp.dtype) -> jax.Array:
  """The start (d,); zeros for None."""
  if x0 is None:
    return jnp.zeros(d, dtype)
  x0 = jnp.asarray(x0)
  _checks.check_shape("x0", x0, (d,), "(d,)")
  _checks.check_floating("x0", x0)
  return x0.astype(dtype)
