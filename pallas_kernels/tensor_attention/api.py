"""Tensor attention by a kernel that the caller names; validates, never chooses.

``jaxattn.attention.tensor_attention`` chooses: it calls the same pieces, and
the XLA path where there is no kernel.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels._calls import differentiable
from pallas_kernels._checks import check_heads, check_implementation
from pallas_kernels._products import accumulator
from pallas_kernels.tensor_attention import mosaic_tpu
from pallas_kernels.tensor_attention.config import TensorBlockSizes
from pallas_kernels.tensor_attention.operands import (
  Gradients,
  Operands,
  Options,
)
from pallas_kernels.tensor_attention.reference import reference

_KERNELS = {"mosaic_tpu": mosaic_tpu}
_IMPLEMENTATIONS = ("reference", *_KERNELS, "interpret")

_attend = differentiable(reference, _KERNELS, Gradients._fields, outputs=1)


def tensor_attention(
  query: jax.Array,
  key1: jax.Array,
  key2: jax.Array,
  value1: jax.Array,
  value2: jax.Array,
  *,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  key_mask1: jax.Array | None = None,
  key_mask2: jax.Array | None = None,
  block_sizes: TensorBlockSizes | None = None,
  implementation: str,
) -> jax.Array:
  r"""Exact softmax attention to all pairs of tokens, in linear memory.

  .. math:: o_{ic} = \sum_{j, l} \operatorname{softmax}_{(j, l)}\Bigl(
    \text{scale} \sum_c q_{ic} k^1_{jc} k^2_{lc}\Bigr) v^1_{jc} v^2_{lc}

  Args:
    query: (B, T, N, H); floating.
    key1: (B, S1, K, H). K divides N: each key head serves N / K query heads.
    key2: (B, S2, K, H).
    value1: (B, S1, K, Hv).
    value2: (B, S2, K, Hv).
    scale: factor on the logits; None = 1 / sqrt(H). Has a gradient.
    is_causal: query t sees the pairs of keys 0 to t; T = S1 = S2.
    key_mask1: boolean (B, S1); True = attend.
    key_mask2: boolean (B, S2); True = attend.
    block_sizes: tiles; None = those of ``config``.
    implementation: "mosaic_tpu", "interpret" (the same, anywhere), or
      "reference" (the dense formula).

  Returns:
    (B, T, N, Hv) of the dtype of ``query``; 0 for a query that sees no pair.

  Raises:
    ValueError: if shapes, dtypes or options do not fit.
    NotImplementedError: if the kernel cannot take these operands.

  Cost:
    2 T S1 S2 (H + Hv) flops a head forward, T S1 S2 (6 H + 4 Hv) backward;
    O(T + S1 + S2) memory.

  Source:
    arXiv 2310.04064 (tensor attention); tiles as in arXiv 2307.08691.

  Example:
    >>> import jax
    >>> arrays = jax.random.normal(jax.random.key(0), (5, 1, 32, 2, 8))
    >>> tensor_attention(*arrays, implementation="interpret").shape
    (1, 32, 2, 8)
  """
  check_implementation(implementation, _IMPLEMENTATIONS)
  check_heads(query, key1, value1, ("key1", "value1"))
  check_heads(query, key2, value2, ("key2", "value2"))
  for name, x, like in (("key2", key2, key1), ("value2", value2, value1)):
    if x.shape[2:] != like.shape[2:]:
      raise ValueError(
        f"{name} must have as many heads as {name[:-1]}1 and of one size, got "
        f"{x.shape} and {like.shape}"
      )
  for name, mask, key in (
    ("key_mask1", key_mask1, key1),
    ("key_mask2", key_mask2, key2),
  ):
    if mask is not None and (
      mask.shape != key.shape[:2] or mask.dtype != jnp.bool_
    ):
      raise ValueError(
        f"{name} must be boolean {key.shape[:2]}, got {mask.dtype} {mask.shape}"
      )
  lengths = query.shape[1], key1.shape[1], key2.shape[1]
  if is_causal and len(set(lengths)) > 1:
    raise ValueError(
      "is_causal needs query, key1 and key2 of one length, got T={}, S1={}, "
      "S2={}".format(*lengths)
    )
  dtype = accumulator(query.dtype)
  scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
  scale = jnp.asarray(scale, dtype)
  if scale.shape:
    raise ValueError(f"scale must be a scalar, got shape {scale.shape}")
  x = Operands(
    query, scale * key1.astype(dtype), key2, value1.astype(dtype), value2,
    key_mask1, key_mask2,
  )  # fmt: skip
  options = Options(bool(is_causal), block_sizes)
  return _attend(implementation, options, x)[0].astype(query.dtype)
