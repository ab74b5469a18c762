"""NTK-Attention by a kernel that the caller names; validates, never chooses.

``jaxattn.attention.ntk_attention`` chooses, and knows feature maps.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels._calls import differentiable
from pallas_kernels._checks import (
  check_heads,
  check_implementation,
  check_scores,
)
from pallas_kernels._products import accumulator
from pallas_kernels.flash_attention.config import BlockSizes
from pallas_kernels.ntk_attention import mosaic_gpu, mosaic_tpu
from pallas_kernels.ntk_attention.operands import (
  Gradients,
  Operands,
  Options,
  Total,
)
from pallas_kernels.ntk_attention.reference import reference

_KERNELS = {"mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}
_IMPLEMENTATIONS = ("reference", *_KERNELS, "interpret")
_attend = differentiable(reference, _KERNELS, Gradients._fields)


def ntk_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  query_features: jax.Array,
  z: jax.Array,
  k: jax.Array,
  *,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  scale: float | None = None,
  is_causal: bool = False,
  return_residual: bool = False,
  block_sizes: BlockSizes | None = None,
  block_features: int | None = None,
  implementation: str,
) -> jax.Array | tuple[jax.Array, Total]:
  r"""Attention to keys, and to a prefix that is folded into a state.

  .. math:: o(q) = \frac{\sum_j e^{s_j} v_j + Z^\top \phi(q)}
    {\sum_j e^{s_j} + k^\top \phi(q)}

  and 0 where the denominator is 0. Mask, bias and causality are about the keys
  alone: every query sees all of the prefix.

  Args:
    query: (B, T, N, H); floating.
    key: (B, S, K, H). K divides N: each key head serves N / K query heads.
    value: (B, S, K, Hv).
    query_features: (B, T, N, r), floating; of the queries.
    z: (K, r, Hv) or (N, r, Hv), floating: sum of products of features and
      values.
    k: (K, r) or (N, r), as z: sum of features.
    bias: floating (B|1, N|1, T|1, S|1), added to the logits; has a gradient.
    mask: boolean (B|1, N|1, T|1, S|1); True = attend.
    scale: factor on the logits; None = 1 / sqrt(H).
    is_causal: query t sees keys 0 to t.
    return_residual: also return the denominator.
    block_sizes: tiles; None = those of exact attention.
    block_features: features in a tile; None = chosen.
    implementation: "mosaic_tpu", "mosaic_gpu" (float16 or bfloat16, no bias,
      no mask), "interpret" (the TPU's, anywhere), or "reference" (the dense
      formula).

  Returns:
    (B, T, N, Hv), and with ``return_residual`` a ``Total``, whose logarithm has
    a gradient.

  Raises:
    ValueError: if shapes, dtypes or options do not fit.
    NotImplementedError: if the kernel cannot take these operands.

  Cost:
    4 T S H + 2 T r Hv flops a head forward, 14 T S H + 4 T r Hv backward;
    O(T + S) memory beside the features.

  Source:
    arXiv 2406.14036; tiles as in arXiv 2307.08691.

  Example:
    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 4, 16))
    >>> features, z = jax.nn.elu(q) + 1, jax.numpy.ones((4, 16, 16))
    >>> sums = jax.numpy.ones((4, 16))
    >>> ntk_attention(
    ...   q, k, v, features, z, sums, implementation="interpret"
    ... ).shape
    (1, 128, 4, 16)
  """
  check_implementation(implementation, _IMPLEMENTATIONS)
  check_heads(query, key, value)
  check_scores(query, key, bias=bias, mask=mask)
  _check_prefix(query, key, value, query_features, z, k)
  if block_features is not None and (
    isinstance(block_features, bool)
    or not isinstance(block_features, int)
    or block_features < 1
  ):
    raise ValueError(
      f"block_features must be a positive integer, got {block_features!r}"
    )
  dtype = accumulator(query.dtype)
  prefix = (y.astype(dtype) for y in (query_features, z, k))
  x = Operands(query, key, value, *prefix, bias=bias, mask=mask)
  scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
  options = Options(scale, bool(is_causal), block_sizes, block_features)
  out, total = _attend(implementation, options, x)
  return (out, total) if return_residual else out


def _check_prefix(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  features: jax.Array,
  z: jax.Array,
  k: jax.Array,
) -> None:
  for name, x in (("query_features", features), ("z", z), ("k", k)):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating, got {x.dtype}")
  if features.shape[:-1] != query.shape[:-1] or features.ndim != query.ndim:
    raise ValueError(
      f"query_features must have shape {query.shape[:-1]} + r, got "
      f"{features.shape}"
    )
  heads, r = {key.shape[2], query.shape[2]}, features.shape[-1]
  shapes = [(n, r, value.shape[-1]) for n in sorted(heads)]
  if z.shape not in shapes:
    wanted = " or ".join(map(str, shapes))
    raise ValueError(f"z must have shape {wanted}, got {z.shape}")
  if k.shape != z.shape[:2]:
    raise ValueError(f"k must have shape {z.shape[:2]}, got {k.shape}")
