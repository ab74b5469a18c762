r"""The dense formula of tensor attention; what every implementation must equal.

.. math::

  s_{ijl} = \sum_c q_{ic} k^1_{jc} k^2_{lc}, \quad
  L_i = \log \sum_{j, l} e^{s_{ijl}}, \quad
  o_{ic} = \sum_{j, l} e^{s_{ijl} - L_i} v^1_{jc} v^2_{lc}

over the pairs that a query sees; -inf and 0 where it sees none. Takes O(T S1
S2) memory, and is differentiated by JAX.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._products import accumulator
from pallas_kernels.tensor_attention.operands import Operands, Options


def reference(x: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
  """Output (B, T, N, Hv) and log-sum-exp (B, T, N), all logits at once.

  Both of the accumulator's dtype.
  """
  dtype = accumulator(x.query.dtype)
  group = x.query.shape[2] // x.key1.shape[2]
  query = x.query.astype(dtype)
  key1, key2, value1, value2 = (
    jnp.repeat(y.astype(dtype), group, 2) for y in x[1:5]
  )
  highest = jax.lax.Precision.HIGHEST
  logits = jnp.einsum(
    "btnh,bjnh,blnh->bntjl", query, key1, key2, precision=highest
  )
  seen = _visible(x, options)
  logits = jnp.where(seen, logits, -jnp.inf)
  top = jax.lax.stop_gradient(logits.max((3, 4), keepdims=True))
  top = jnp.where(jnp.isneginf(top), 0, top)
  weights = jnp.exp(logits - top)
  total = weights.sum((3, 4), keepdims=True)
  safe = jnp.where(total == 0, 1, total)
  out = jnp.einsum(
    "bntjl,bjnh,blnh->btnh", weights / safe, value1, value2, precision=highest
  )
  lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))[..., 0, 0]
  return out, jnp.swapaxes(lse, 1, 2)


def _visible(x: Operands, options: Options) -> jax.Array:
  """Which pairs a query sees, to broadcast to (B, N, T, S1, S2)."""
  sizes = x.query.shape[1], x.key1.shape[1], x.key2.shape[1]
  seen = jnp.ones((1, 1, *sizes), bool)
  if options.is_causal:
    at, one, two = jnp.indices(sizes)[:, None, None]
    seen &= (one <= at) & (two <= at)
  if x.key_mask1 is not None:
    seen &= x.key_mask1[:, None, None, :, None]
  if x.key_mask2 is not None:
    seen &= x.key_mask2[:, None, None, None, :]
  return seen
