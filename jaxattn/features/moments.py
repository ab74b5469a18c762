r"""Moments of features: the state under every linear-time attention.

.. math:: S = \sum_j \phi(k_j) [v_j, 1]^\top \in \mathbb R^{m \times (H_v + 1)}

A query needs nothing else of the keys: its numerator is
:math:`\phi(q)^\top S` without the last column, its denominator the last.
Source: Katharopoulos et al., arXiv 2006.16236, equations 5 and 9 to 12.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks, _compat
from jaxattn.features import _chunks, _scan
from jaxattn.numerics._dtypes import accumulator

_CHUNK_SIZE = 1024


def feature_moments(
  feature_fn: Callable[[jax.Array], jax.Array],
  key: jax.Array,
  value: jax.Array,
  *,
  key_mask: jax.Array | None = None,
  chunk_size: int | None = None,
) -> jax.Array:
  r"""Sums the outer products of features and extended values.

  .. math:: S = \sum_{j} \phi(k_j) [v_j, 1]^\top

  Moments of disjoint sets of keys add up. Differentiable in keys and values,
  and in what ``feature_fn`` closes over.

  Args:
    feature_fn: (..., H) to (..., r), row by row; hashable. The same function
      compiles once, a lambda made anew each time: call those under ``jit``.
    key: (B, S, K, H), or (S, K, H) without a batch; floating.
    value: (B, S, K, Hv).
    key_mask: boolean (B, S); keys with False are left out, NaN included.
    chunk_size: keys at a time; None = 1024. Memory and speed only.

  Returns:
    (B, K, r, Hv + 1) of the accumulation dtype; the last column is the sum of
    the features.

  Raises:
    ValueError: if shapes, dtypes or ``chunk_size`` do not fit.

  Cost:
    S r (Hv + 1) multiply-adds a head; features exist for one chunk at a time,
    and are computed again for the gradient.

  Source:
    arXiv 2006.16236, equations 10 to 12.

  Example:
    >>> import jax
    >>> k, v = jax.random.normal(jax.random.key(0), (2, 3, 100, 4, 8))
    >>> feature_moments(jax.nn.relu, k, v).shape
    (3, 4, 8, 9)
  """
  key, value = jnp.asarray(key), jnp.asarray(value)
  key_mask = None if key_mask is None else jnp.asarray(key_mask)
  sizes = _checks.check_attention(key, key, value, key_mask=key_mask)
  chunk_size = _CHUNK_SIZE if chunk_size is None else chunk_size
  _checks.check_integer("chunk_size", chunk_size, 1, None)
  dtype = accumulator(key.dtype)
  key, value = (_checks.four_dims(x).astype(dtype) for x in (key, value))
  if key_mask is not None:
    key_mask = key_mask.reshape(key.shape[:2])
  out = _feature_moments(key, value, key_mask, feature_fn, chunk_size)
  return out if sizes.batch else out[0]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _feature_moments(
  key: jax.Array,
  value: jax.Array,
  key_mask: jax.Array | None,
  feature_fn: Callable[[jax.Array], jax.Array],
  chunk_size: int,
) -> jax.Array:
  key = _chunks.hide(key, key_mask)
  value = _chunks.hide(_chunks.ones_column(value), key_mask)
  num = -(-key.shape[1] // chunk_size)
  size = -(-key.shape[1] // num)
  key, value = (_chunks.fit(x, size * num, 1) for x in (key, value))

  @jax.checkpoint
  def part(i: Any) -> jax.Array:
    k, v = (
      lax.dynamic_slice_in_dim(x, i * size, size, 1) for x in (key, value)
    )
    return jnp.einsum("bskr,bskv->bkrv", feature_fn(k).astype(v.dtype), v)

  def step(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
    return total + part(i), None

  total = part(jnp.int32(0))
  if num > 1:
    steps = jnp.arange(1, num, dtype=jnp.int32)
    total, _ = lax.scan(step, total, steps)
  return total


def moment_attention(
  query_features: jax.Array,
  key_features: jax.Array,
  value: jax.Array,
  *,
  key_mask: jax.Array | None = None,
  is_causal: bool = False,
  normalize: bool = True,
  min_denominator: float = 0.0,
  chunk_size: int | None = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  r"""Attention whose weights are inner products of given features.

  .. math:: o_i = \frac{\sum_j \langle \phi_i, \psi_j \rangle v_j}
    {\sum_j \langle \phi_i, \psi_j \rangle}

  in linear time. Causal attention takes the pairs of a chunk one by one and
  everything before it from a running sum. Reverse mode of any order works, at
  O(T + S) memory for the first.

  Args:
    query_features: (B, T, N, r), or (T, N, r) without a batch; floating.
    key_features: (B, S, K, r); K divides N.
    value: (B, S, K, Hv).
    key_mask: boolean (B, S); True = attend.
    is_causal: query t sees keys 0 to t.
    normalize: divide by the sum of weights; False leaves the numerator.
    min_denominator: a sum of weights smaller than this, in absolute value, is
      replaced by it, with the sign that it had.
    chunk_size: tokens at a time; None = chosen from sizes. Memory and speed
      only.
    precision: of the matrix products.

  Returns:
    (B, T, N, Hv) of the dtype of ``query_features``; 0 for a query that sees no
    key.

  Raises:
    ValueError: if shapes, dtypes or options do not fit.

  Cost:
    (T + S) r (Hv + 1) multiply-adds a head; causal, T c (r + Hv) more with
    chunks of c.

  Source:
    arXiv 2006.16236, equations 5 and 9.

  Example:
    >>> import jax
    >>> q, k, v = jax.random.uniform(jax.random.key(0), (3, 1, 300, 2, 8))
    >>> moment_attention(q, k, v, is_causal=True).shape
    (1, 300, 2, 8)
  """
  arrays = tuple(map(jnp.asarray, (query_features, key_features, value)))
  key_mask = None if key_mask is None else jnp.asarray(key_mask)
  sizes = _checks.check_attention(*arrays, key_mask=key_mask)
  for name, flag in (("is_causal", is_causal), ("normalize", normalize)):
    _checks.check_choice(name, flag, (False, True))
  _checks.check_nonnegative("min_denominator", min_denominator)
  if chunk_size is not None:
    _checks.check_integer("chunk_size", chunk_size, 1, None)
  spec = _chunks.Spec(
    is_causal=is_causal,
    normalize=normalize,
    min_denominator=float(min_denominator),
    chunk_size=chunk_size,
    precision=precision,
  )
  arrays = tuple(map(_checks.four_dims, arrays))
  if key_mask is not None:
    key_mask = key_mask.reshape(arrays[1].shape[:2])
  attend = functools.partial(_moment_attention, spec=spec)
  attend = _compat.over_explicit_axes(attend, arrays[0])
  out = attend(*arrays, key_mask)
  return out if sizes.batch else out[0]


@functools.partial(jax.jit, static_argnames="spec")
def _moment_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  key_mask: jax.Array | None,
  *,
  spec: _chunks.Spec,
) -> jax.Array:
  dtype = accumulator(query.dtype)
  q, k, v = (x.astype(dtype) for x in (query, key, value))
  k = _chunks.hide(k, key_mask)
  v = _chunks.hide(_chunks.ones_column(v), key_mask)
  return _scan.attend(q, k, v, spec).astype(query.dtype)
