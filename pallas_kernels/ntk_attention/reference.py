r"""The dense formula of NTK-Attention; what every implementation must equal.

.. math::

  D_i = \sum_j e^{s_{ij}} + k^\top \phi_i, \qquad
  o_i = \frac{1}{D_i} \Big(\sum_j e^{s_{ij}} v_j + Z^\top \phi_i\Big), \qquad
  s_{ij} = \text{scale} \cdot q_i \cdot k_j + b_{ij}

over the keys that a query sees; 0 where the denominator is 0. Takes O(T S)
memory, and is differentiated by JAX.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._products import accumulator
from pallas_kernels.flash_attention.reference import visible
from pallas_kernels.ntk_attention.operands import (
  Operands,
  Options,
  Total,
  as_flash,
)


def reference(x: Operands, options: Options) -> tuple[jax.Array, Total]:
  """Output (B, T, N, Hv) and the sum of all weights, all logits at once."""
  dtype = accumulator(x.query.dtype)
  einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  heads = x.query.shape[2]
  query, key, value = (y.astype(dtype) for y in x[:3])
  key, value = (jnp.repeat(y, heads // y.shape[2], 2) for y in (key, value))
  z, k = (jnp.repeat(y.astype(dtype), heads // len(y), 0) for y in (x.z, x.k))
  logits = options.scale * einsum("btnh,bsnh->bnts", query, key)
  if x.bias is not None:
    logits += x.bias.astype(dtype)
  seen = visible(*as_flash(x, options))
  features = x.query_features.astype(dtype)
  sums = einsum("btnr,nrv->bntv", features, z)
  denominator = einsum("btnr,nr->bnt", features, k)[..., None]
  size = jnp.maximum(jnp.abs(sums).max(-1, keepdims=True), abs(denominator))
  top = jnp.where(seen, logits, -jnp.inf).max(-1, keepdims=True)
  top = jax.lax.stop_gradient(jnp.maximum(top, jnp.log(size)))
  top = jnp.where(jnp.isneginf(top), 0, top)
  weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - top, 0)), 0)
  shrink = jnp.exp(-top)
  total = weights.sum(-1, keepdims=True) + shrink * denominator
  out = einsum("bnts,bsnv->bntv", weights, value) + shrink * sums
  none = total == 0
  safe = jnp.where(none, 1, total)
  out = jnp.swapaxes(jnp.where(none, 0, out / safe), 1, 2)
  log = jnp.where(none, -jnp.inf, top + jnp.log(jnp.abs(safe)))
  log, sign = (jnp.swapaxes(y[..., 0], 1, 2) for y in (log, jnp.sign(total)))
  return out.astype(x.query.dtype), Total(log, sign)
