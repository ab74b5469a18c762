"""Energy and update by all patterns."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.attention._hopfield import inputs, rows
from jaxattn.numerics._dtypes import accumulator
from jaxattn.softmax import softmax_attention

# Energies are differences of large numbers, which fewer digits would not show.
_HIGHEST = lax.Precision.HIGHEST


def hopfield_energy(
  x: jax.Array, patterns: jax.Array, beta: float | jax.Array
) -> jax.Array:
  r"""Energy of states of the network, between 0 and twice the largest norm^2.

  .. math:: E(x) = -\beta^{-1} \log \tfrac1M \sum_\mu e^{\beta \xi_\mu \cdot x}
    + \tfrac12 |x|^2 + \tfrac12 \max_\mu |\xi_\mu|^2

  Its gradient is :math:`x - T(x)`. The bounds hold for x in the ball of the
  patterns, :math:`|x| \le \max_\mu |\xi_\mu|`.

  Args:
    x: (..., d), floating.
    patterns: (M, d), of the same dtype.
    beta: inverse temperature, > 0; may be traced.

  Returns:
    (...,) of the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit or ``beta`` is not positive.

  Cost:
    2 M d flops a state; no more than some 2^20 similarities at a time.

  Source:
    arXiv 2008.02217, equation 2.

  Example:
    >>> import jax.numpy as jnp
    >>> patterns = 3 * jnp.eye(4)
    >>> x = jnp.stack([patterns[0], patterns.mean(0)])
    >>> stored, mean = hopfield_energy(x, patterns, 1.0)
    >>> print(f"{stored:.2f} {mean:.2f}")
    1.39 3.38
  """
  x, patterns = inputs.check_query(x, patterns, beta)
  return energy(x, patterns, beta)


def hopfield_update(
  x: jax.Array,
  patterns: jax.Array,
  beta: float | jax.Array,
  values: jax.Array | None = None,
) -> jax.Array:
  r"""One step of retrieval: attention to the patterns.

  .. math:: T(x) = V^\top \mathrm{softmax}(\beta\, \Xi x)

  For large ``beta`` this is the pattern of the largest inner product with x,
  for small ``beta`` the mean of all. The energy never increases if the values
  are the patterns.

  Args:
    x: (..., d), floating.
    patterns: (M, d), of the same dtype.
    beta: inverse temperature, > 0; may be traced.
    values: (M, Hv), of the same dtype; None = the patterns.

  Returns:
    (..., Hv) of the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit or ``beta`` is not positive, for
      instance "query dim 32 != pattern dim 64".

  Cost:
    2 M (d + Hv) flops a query, and no array of all similarities: that of
    :func:`jaxattn.attention.softmax_attention`.

  Source:
    arXiv 2008.02217, equation 3.

  Example:
    >>> import jax.numpy as jnp
    >>> patterns = 3 * jnp.eye(4)
    >>> noisy = patterns[0] + jnp.array([-1.0, 0.5, 0.0, 0.0])
    >>> print(hopfield_update(noisy, patterns, 2.0).round(2))
    [3. 0. 0. 0.]
  """
  x, patterns = inputs.check_query(x, patterns, beta)
  if values is not None:
    values = jnp.asarray(values)
    inputs.check_values(values, patterns)
  return update(x, patterns, beta, patterns if values is None else values)


def _log_mean_exp(logits: jax.Array) -> jax.Array:
  """Over the last axis, with all its digits.

  Logits that are close to each other, as all are for small beta, have a mean
  of exp close to 1; where one is far above the others, 1 + that mean - 1 would
  lose all but 1 / M of it.
  """
  peak = lax.stop_gradient(logits.max(-1, keepdims=True))
  below = logits - peak
  close = below.min(-1) > -1
  near = jnp.where(close[..., None], below, 0)
  log = jnp.where(
    close, jnp.log1p(jnp.expm1(near).mean(-1)), jnp.log(jnp.exp(below).mean(-1))
  )
  return log + peak[..., 0]


@jax.jit
def energy(x: jax.Array, patterns: jax.Array, beta: Any) -> jax.Array:
  dtype = accumulator(x.dtype)
  wide, keys = x.astype(dtype), patterns.astype(dtype)
  beta = jnp.asarray(beta, dtype)

  def one(x: jax.Array) -> jax.Array:
    return (x * x).sum() / 2 - _log_mean_exp(
      beta * jnp.matmul(keys, x, precision=_HIGHEST)
    ) / beta

  flat = rows.by_rows(one, len(keys), rows.flat(wide))
  out = flat.reshape(x.shape[:-1]) + half_largest_square(keys)
  return out.astype(x.dtype)


def half_largest_square(patterns: jax.Array) -> jax.Array:
  return (patterns * patterns).sum(-1).max() / 2


@jax.jit
def update(
  x: jax.Array, patterns: jax.Array, beta: Any, values: jax.Array
) -> jax.Array:
  # Wide: a traced scale multiplies the queries in the dtype that they have.
  dtype = accumulator(x.dtype)
  heads = (y.astype(dtype)[:, None] for y in (rows.flat(x), patterns, values))
  out = softmax_attention(*heads, scale=beta).astype(x.dtype)
  return out[:, 0].reshape(*x.shape[:-1], -1)
