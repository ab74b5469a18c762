"""Exact attention by a kernel that the caller names; validates, never chooses.

``jaxattn.attention.softmax_attention`` chooses: it calls the same pieces, and
the XLA path where there is no kernel.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._calls import differentiable
from pallas_kernels._checks import (
  check_heads,
  check_implementation,
  check_scores,
)
from pallas_kernels.flash_attention import mosaic_gpu, mosaic_tpu
from pallas_kernels.flash_attention.config import BlockSizes
from pallas_kernels.flash_attention.operands import Gradients, Operands, Options
from pallas_kernels.flash_attention.reference import reference

_KERNELS = {"mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}
_IMPLEMENTATIONS = ("reference", *_KERNELS, "interpret")

_attend = differentiable(reference, _KERNELS, Gradients._fields)


def flash_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  segment_ids: jax.Array | Sequence[jax.Array] | None = None,
  scale: float | None = None,
  is_causal: bool = False,
  local_window_size: int | tuple[int, int] | None = None,
  return_residual: bool = False,
  block_sizes: BlockSizes | None = None,
  implementation: str,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  r"""Exact attention, :math:`\mathrm{softmax}(\text{scale}\,QK^\top + B)\,V`.

  A query that sees no key gives 0, and a log-sum-exp of -inf.

  Args:
    query: (B, T, N, H); floating.
    key: (B, S, K, H). K divides N: each key head serves N / K query heads.
    value: (B, S, K, Hv).
    bias: floating (B|1, N|1, T|1, S|1), added to the logits; has a gradient.
    mask: boolean (B|1, N|1, T|1, S|1); True = attend.
    segment_ids: integers (B, T), or a pair (B, T), (B, S): a query sees the
      keys of its own segment.
    scale: factor on the logits; None = 1 / sqrt(H).
    is_causal: query t sees keys 0 to t.
    local_window_size: (left, right) or one integer for both: query t sees keys
      t - left to t + right.
    return_residual: also return the log-sum-exp.
    block_sizes: tiles; None = those of ``config``.
    implementation: "mosaic_tpu", "mosaic_gpu" (float16 or bfloat16, no bias,
      mask or segments), "interpret" (the TPU's, anywhere), or "reference" (the
      dense formula).

  Returns:
    (B, T, N, Hv), and with ``return_residual`` the log-sum-exp (B, T, N).

  Raises:
    ValueError: if shapes, dtypes or options do not fit.
    NotImplementedError: if the kernel cannot take these operands.

  Cost:
    4 T S H flops a head forward, 14 T S H backward; O(T + S) memory.

  Source:
    arXiv 2307.08691, algorithms 1 and 2.

  Example:
    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 4, 16))
    >>> flash_attention(q, k, v, implementation="interpret").shape
    (1, 128, 4, 16)
  """
  check_implementation(implementation, _IMPLEMENTATIONS)
  check_heads(query, key, value)
  check_scores(query, key, bias=bias, mask=mask)
  segments = _segments(segment_ids, query.shape[:2], key.shape[:2])
  x = Operands(query, key, value, bias, mask, *segments)
  scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
  before, after = _window(local_window_size)
  after = 0 if is_causal else after
  options = Options(scale, before, after, block_sizes)
  out, lse = _attend(implementation, options, x)
  return (out, lse) if return_residual else out


def _segments(
  ids: Any, query: tuple[int, ...], key: tuple[int, ...]
) -> tuple[Any, Any]:
  if ids is None:
    return None, None
  pair = tuple(ids) if isinstance(ids, tuple | list) else (ids, ids)
  for x, shape in zip(pair, (query, key)):
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(
        f"segment_ids must be integers {query}, or a pair {query}, {key}; got "
        f"{x.dtype} {x.shape}"
      )
  return pair[0], pair[1]


def _window(size: Any) -> tuple[int | None, int | None]:
  if size is None:
    return None, None
  sides = size if isinstance(size, tuple) else (size, size)
  if len(sides) != 2 or any(not isinstance(s, int) or s < 0 for s in sides):
    raise ValueError(
      "local_window_size must be an integer >= 0 or a pair (left, right) of "
      f"those, got {size!r}"
    )
  # Positions are int32, and so are those at the ends of a window.
  return min(sides[0], 1 << 30), min(sides[1], 1 << 30)
