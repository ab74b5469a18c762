r"""The dense formula of exact attention; what every implementation must equal.

.. math::

  s_{ij} = \text{scale} \cdot q_i \cdot k_j + b_{ij}, \quad
  L_i = \log \sum_j e^{s_{ij}}, \quad o_i = \sum_j e^{s_{ij} - L_i} v_j

over the keys that a query sees; one that sees none gives 0, and -inf for L.
Takes O(T S) memory, and is differentiated by JAX.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._products import accumulator
from pallas_kernels.flash_attention.operands import (
  Operands,
  Options,
)


def reference(x: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
  """Output (B, T, N, Hv) and log-sum-exp (B, T, N), all logits at once."""
  dtype = accumulator(x.query.dtype)
  group = x.query.shape[2] // x.key.shape[2]
  query, key, value = (y.astype(dtype) for y in x[:3])
  key, value = (jnp.repeat(y, group, 2) for y in (key, value))
  highest = jax.lax.Precision.HIGHEST
  logits = jnp.einsum("btnh,bsnh->bnts", query, key, precision=highest)
  logits *= options.scale
  if x.bias is not None:
    logits += x.bias.astype(dtype)
  seen = visible(x, options)
  logits = jnp.where(seen, logits, -jnp.inf)
  top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  top = jnp.where(jnp.isneginf(top), 0, top)
  weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - top, 0)), 0)
  total = weights.sum(-1, keepdims=True)
  none = total == 0
  weights = weights / jnp.where(none, 1, total)
  out = jnp.einsum("bnts,bsnh->btnh", weights, value, precision=highest)
  lse = top + jnp.log(jnp.where(none, 1, total))
  lse = jnp.where(none, -jnp.inf, lse)[..., 0]
  return out.astype(x.query.dtype), jnp.swapaxes(lse, 1, 2)


def visible(x: Operands, options: Options) -> jax.Array:
  """(B, N|1, T, S): which keys a query sees."""
  b, t, s = *x.query.shape[:2], x.key.shape[1]
  query_at = jnp.arange(t)[:, None]
  at = query_at + (0 if x.offset is None else x.offset)
  key_at = jnp.arange(s)[None]
  seen = jnp.ones((b, 1, t, s), bool)
  parts = []
  if options.before is not None:
    parts.append((key_at >= at - options.before)[None, None])
  if options.after is not None:
    parts.append((key_at <= at + options.after)[None, None])
  if x.mask is not None:
    parts.append(x.mask)
  if x.query_segments is not None:
    same = x.query_segments[:, :, None] == x.key_segments[:, None]
    parts.append(same[:, None])
  for lengths, place in ((x.query_lengths, query_at), (x.key_lengths, key_at)):
    if lengths is not None:
      parts.append(place[None, None] < lengths[:, None, None, None])
  for part in parts:
    seen = seen & part
  return seen
