"""Polynomial attention by a kernel that the caller names; never chooses.

``jaxattn.attention.polynomial_attention`` chooses, and knows polynomials.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._checks import check_heads, check_implementation
from pallas_kernels._products import accumulator
from pallas_kernels.polynomial_attention import mosaic_gpu, mosaic_tpu
from pallas_kernels.polynomial_attention.operands import (
  Operands,
  Options,
  multinomial_weights,
)
from pallas_kernels.polynomial_attention.reference import reference

_KERNELS = {"mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}
_IMPLEMENTATIONS = ("reference", *_KERNELS, "interpret")


def polynomial_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  degree: int,
  weights: Sequence[float] | np.ndarray,
  scale: float | None = None,
  is_causal: bool = False,
  key_mask: jax.Array | None = None,
  local: str = "exact",
  radius: float | None = None,
  chunk_size: int | None = None,
  implementation: str,
) -> jax.Array:
  r"""Attention whose weights are a polynomial of the logits, in linear time.

  .. math:: p(s) = \sum_j c_j s^j = \sum_\alpha w_\alpha q^\alpha k^\alpha,
    \qquad w_\alpha = c_{|\alpha|} \frac{|\alpha|!}{\alpha!}

  Args:
    query: (B, T, N, H); floating.
    key: (B, S, K, H). K divides N: each key head serves N / K query heads.
    value: (B, S, K, Hv).
    degree: g, at least 0.
    weights: (C(H + g, g),) numbers w, ordered by degree, then by largest
      variable v, then as the monomials of one degree less in variables 0 to v.
    scale: factor on the logits; None = 1 / sqrt(H).
    is_causal: query t sees keys 0 to t.
    key_mask: boolean (B, S); True = attend.
    local: of pairs inside a chunk of causal attention: "exact" takes exp where
      the logit is within the radius, "polynomial" p.
    radius: bound on the logits; needed for "exact".
    chunk_size: tokens at a time; None = that of ``config``.
    implementation: "mosaic_tpu", "mosaic_gpu", "interpret" (the TPU's,
      anywhere), or "reference" (the dense formula).

  Returns:
    (B, T, N, Hv) of the dtype of ``query``; 0 for a query that sees no key.

  Raises:
    ValueError: if shapes, dtypes or options do not fit.
    NotImplementedError: if the kernel cannot take these operands.

  Cost:
    2 (T + S) m (Hv + 1) flops a head with m = C(H + g, g), and O(T + S) memory.

  Source:
    arXiv 2302.13214, theorem 1.1, for the method.

  Example:
    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 4, 2))
    >>> out = polynomial_attention(
    ...   q, k, v, degree=2, weights=[1, 1, 1, 0.5, 1, 0.5],
    ...   implementation="interpret",
    ... )
    >>> out.shape
    (1, 128, 4, 2)
  """
  check_implementation(implementation, _IMPLEMENTATIONS)
  check_heads(query, key, value)
  if key_mask is not None and (
    key_mask.shape != key.shape[:2] or key_mask.dtype != jnp.bool_
  ):
    raise ValueError(
      f"key_mask must be boolean {key.shape[:2]}, got {key_mask.dtype} "
      f"{key_mask.shape}"
    )
  if not isinstance(is_causal, bool):
    raise ValueError(f"is_causal must be True or False, got {is_causal!r}")
  if local not in ("exact", "polynomial"):
    raise ValueError(f"local must be 'exact' or 'polynomial', got {local!r}")
  exact = is_causal and local == "exact"
  if exact and radius is None:
    raise ValueError("radius must be a number with is_causal and local='exact'")
  _check_size("degree", degree, 0)
  if chunk_size is not None:
    _check_size("chunk_size", chunk_size, 1)
  options = Options(
    _check_weights(weights, key.shape[3], degree),
    degree,
    is_causal,
    radius if exact else None,
    chunk_size,
  )
  scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
  x = _operands(query, key, value, scale, key_mask, is_causal)
  reason = None
  if implementation in _KERNELS:
    reason = _KERNELS[implementation].supports(x, options)
  if reason is not None:
    raise NotImplementedError(reason)
  out = _attend(implementation, options, x)
  b, t, n, _ = query.shape
  out = out.reshape(b, n // out.shape[2], -1, out.shape[2], t)
  out = out.transpose(0, 4, 1, 3, 2)
  return out.reshape(b, t, n, -1).astype(query.dtype)


def _check_size(name: str, size: Any, least: int) -> None:
  if isinstance(size, bool) or not isinstance(size, int) or size < least:
    raise ValueError(f"{name} must be an integer >= {least}, got {size!r}")


def _check_weights(
  weights: Sequence[float] | np.ndarray, dim: int, degree: int
) -> tuple[float, ...]:
  numbers = tuple(map(float, weights))
  size = math.comb(dim + degree, degree)
  if len(numbers) != size:
    raise ValueError(
      f"weights must be C({dim} + {degree}, {degree}) = {size} numbers, got "
      f"{len(numbers)}"
    )
  coefficients = Options(numbers, degree).coefficients(dim)
  if not np.allclose(numbers, multinomial_weights(dim, coefficients), 1e-5, 0):
    raise ValueError(
      "weights must be c_j times multinomial coefficients, for one number c_j "
      "a degree: else they are no polynomial of the logits"
    )
  return numbers


def _operands(
  query: jax.Array, key: jax.Array, value: jax.Array, scale: float,
  key_mask: jax.Array | None, is_causal: bool,
) -> Operands:  # fmt: skip
  dtype = accumulator(query.dtype)
  query, key, value = (x.astype(dtype) for x in (query, key, value))
  value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)
  if key_mask is not None:
    seen = key_mask[:, :, None, None]
    key, value = (jnp.where(seen, x, 0) for x in (key, value))
  b, t, n, h = query.shape
  k = key.shape[2]
  if is_causal:
    # Keys behind the last query are seen by nobody.
    key, value = (_fit(x, t) for x in (key, value))
  query = (query * scale).reshape(b, t, k, n // k, h).transpose(0, 2, 4, 3, 1)
  key, value = (
    x.transpose(0, 2, 3, 1).reshape(b * k, x.shape[3], -1) for x in (key, value)
  )
  return Operands(query.reshape(b * k, h, n // k, t), key, value)


def _fit(x: jax.Array, length: int) -> jax.Array:
  more = max(0, length - x.shape[1])
  return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))[:, :length]


def _forward(
  implementation: str, options: Options, x: Operands
) -> tuple[jax.Array, Any]:
  if implementation == "reference":
    return reference(x, options), None
  kernels = _KERNELS.get(implementation, mosaic_tpu)
  interpret = implementation == "interpret"
  out, *residual = kernels.forward(x, options, interpret=interpret)
  return out, residual


def _output(implementation: str, options: Options, x: Operands) -> jax.Array:
  return _forward(implementation, options, x)[0]


_attend: Any = jax.custom_vjp(_output, nondiff_argnums=(0, 1))


def _attend_fwd(implementation: str, options: Options, x: Operands) -> Any:
  out, residual = _forward(implementation, options, x)
  return out, (x, out, residual)


def _attend_bwd(
  implementation: str, options: Options, residuals: Any, out_bar: jax.Array
) -> tuple[Operands]:
  x, out, residual = residuals
  if implementation == "reference":
    _, vjp = jax.vjp(functools.partial(reference, options=options), x)
    return vjp(out_bar)
  denominator, total = residual
  kernels = _KERNELS.get(implementation, mosaic_tpu)
  bars = kernels.backward(
    x, options, total, mosaic_tpu.divide_bar(out, denominator, out_bar),
    interpret=implementation == "interpret",
  )  # fmt: skip
  return (Operands(*bars),)


_attend.defvjp(_attend_fwd, _attend_bwd)
