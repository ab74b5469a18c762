r"""The dense formula of polynomial attention; all implementations equal it.

.. math::

  a_{ij} = p(q_i \cdot k_j) = \sum_\alpha w_\alpha q_i^\alpha k_j^\alpha, \qquad
  o_i = \sum_j a_{ij} v_j \Big/ \sum_j a_{ij}

over the keys that a query sees; one that sees none gives 0. With a radius,
:math:`e^{q_i \cdot k_j}` takes the place of p for pairs of one chunk with a
logit within it. Takes O(T S) memory, and is differentiated by JAX.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._products import accumulator
from pallas_kernels.polynomial_attention import config
from pallas_kernels.polynomial_attention.operands import Operands, Options


def reference(x: Operands, options: Options) -> jax.Array:
  """Output (P, Hv, G, T), all pairs at once."""
  dtype = accumulator(x.query.dtype)
  query, key, value = (y.astype(dtype) for y in x)
  highest = jax.lax.Precision.HIGHEST
  logits = jnp.einsum("pdgt,pds->pgts", query, key, precision=highest)
  coefficients = options.coefficients(key.shape[1])
  powers = [c * logits**j for j, c in enumerate(coefficients)]
  weights = functools.reduce(jnp.add, powers)
  if options.is_causal:
    t, s = jnp.indices(logits.shape[2:])[:, None, None]
    if options.radius is not None:
      chunk = config.chunk_size(x, options, exact=True)
      local = (t // chunk == s // chunk) & (jnp.abs(logits) <= options.radius)
      weights = jnp.where(local, jnp.exp(jnp.where(local, logits, 0)), weights)
    weights = jnp.where(t >= s, weights, 0)
  sums = jnp.einsum("pgts,pvs->pvgt", weights, value, precision=highest)
  total = sums[:, -1:]
  return sums[:, :-1] / jnp.where(total == 0, 1, total)
