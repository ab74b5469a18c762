r"""The dense formula of ReLU attention; what every implementation must equal.

.. math::

  e_{ij} = \max(\text{scale} \cdot q_i \cdot k_j - b_i, 0), \quad
  n_i = \Big(\sum_j e_{ij}^\alpha\Big)^{1/\alpha}, \quad
  o_i = \sum_j (e_{ij} / n_i)^\alpha v_j

over the keys that a query sees; 0 and 0 where no key passes. Takes O(T S)
memory, and is differentiated by JAX.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._products import accumulator
from pallas_kernels.flash_attention.reference import visible
from pallas_kernels.relu_attention.operands import Operands, Options, as_flash


def reference(x: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
  """Output (B, T, N, Hv) and norm (B, T, N), all scores at once."""
  dtype = accumulator(x.query.dtype)
  group = x.query.shape[2] // x.key.shape[2]
  query, key, value = (y.astype(dtype) for y in x[:3])
  key, value = (jnp.repeat(y, group, 2) for y in (key, value))
  highest = jax.lax.Precision.HIGHEST
  scores = jnp.einsum("btnh,bsnh->bnts", query, key, precision=highest)
  threshold = jnp.swapaxes(x.threshold, 1, 2)[..., None]
  excess = jax.nn.relu(x.scale * scores - threshold)
  excess = jnp.where(visible(*as_flash(x, options)), excess, 0)
  top = jax.lax.stop_gradient(excess.max(-1, keepdims=True))
  top = jnp.where(top == 0, 1, top)
  weights = (excess / top) ** options.alpha
  total = weights.sum(-1, keepdims=True)
  safe = jnp.where(total == 0, 1, total)
  out = jnp.einsum("bnts,bsnh->btnh", weights / safe, value, precision=highest)
  norm = jnp.where(total == 0, 0, top * safe ** (1 / options.alpha))[..., 0]
  return out.astype(x.query.dtype), jnp.swapaxes(norm, 1, 2)
