"""ReLU attention by a kernel that the caller names; validates, never chooses.

``jaxattn.attention.relu_attention`` chooses: it calls the same pieces, and the
XLA path where there is no kernel.
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
from pallas_kernels.relu_attention import mosaic_gpu, mosaic_tpu
from pallas_kernels.relu_attention.operands import Gradients, Operands, Options
from pallas_kernels.relu_attention.reference import reference

_KERNELS = {"mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}
_IMPLEMENTATIONS = ("reference", *_KERNELS, "interpret")

_attend = differentiable(reference, _KERNELS, Gradients._fields)


def relu_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  threshold: float | jax.Array = 0.0,
  alpha: int = 1,
  mask: jax.Array | None = None,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  return_residual: bool = False,
  block_sizes: BlockSizes | None = None,
  implementation: str,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  r"""Attention with weights max(scale q.k - threshold, 0)^alpha, normalized.

  A query that no key passes gives 0.

  Args:
    query: (B, T, N, H); floating.
    key: (B, S, K, H). K divides N: each key head serves N / K query heads.
    value: (B, S, K, Hv).
    threshold: what a scaled score must exceed; () or (B, T, N). Has a gradient.
    alpha: power of the weights, a positive integer.
    mask: boolean (B|1, N|1, T|1, S|1); True = attend.
    scale: factor on the scores; None = 1 / sqrt(H). Has a gradient.
    is_causal: query t sees keys 0 to t.
    return_residual: also return the norm of the excesses that pass, of order
      alpha; it has a gradient.
    block_sizes: tiles; None = those of exact attention.
    implementation: "mosaic_tpu", "mosaic_gpu" (float16 or bfloat16, no mask),
      "interpret" (the TPU's, anywhere), or "reference" (the dense formula).

  Returns:
    (B, T, N, Hv), and with ``return_residual`` the norm (B, T, N).

  Raises:
    ValueError: if shapes, dtypes or options do not fit.
    NotImplementedError: if the kernel cannot take these operands.

  Cost:
    4 T S H flops a head forward, 14 T S H backward; O(T + S) memory.

  Source:
    arXiv 2410.10165 (ReLU^alpha attention); tiles as in arXiv 2307.08691.

  Example:
    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 4, 16))
    >>> relu_attention(q, k, v, alpha=2, implementation="interpret").shape
    (1, 128, 4, 16)
  """
  check_implementation(implementation, _IMPLEMENTATIONS)
  check_heads(query, key, value)
  check_scores(query, key, mask=mask)
  if isinstance(alpha, bool) or not isinstance(alpha, int) or alpha < 1:
    raise ValueError(f"alpha must be a positive integer, got {alpha!r}")
  dtype = accumulator(query.dtype)
  threshold = jnp.asarray(threshold, dtype)
  if threshold.shape not in ((), query.shape[:3]):
    raise ValueError(
      f"threshold must have shape () or {query.shape[:3]}, got "
      f"{threshold.shape}"
    )
  scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
  x = Operands(
    query,
    key,
    value,
    jnp.broadcast_to(threshold, query.shape[:3]),
    jnp.asarray(scale, dtype),
    mask,
  )
  if x.scale.shape:
    raise ValueError(f"scale must be a scalar, got shape {x.scale.shape}")
  options = Options(alpha, bool(is_causal), block_sizes)
  out, norm = _attend(implementation, options, x)
  return (out, norm) if return_residual else out
