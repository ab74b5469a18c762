r"""Top-k attention: the softmax over the k largest logits of each query.

With :math:`R_i` the k largest logits of row i, :math:`p` the full softmax and
:math:`\tau_i = \sum_{j \notin R_i} p_{ij}` the *tail mass*, the output is

.. math::

  o_i^{(k)} = \sum_{j \in R_i} \frac{p_{ij}}{1 - \tau_i} v_j, \qquad
  o_i - o_i^{(k)} = \tau_i (\mu_\text{tail} - \mu_\text{head}),

where the means are taken under the softmax over the complement of R and over
R. Hence :math:`\|o_i - o_i^{(k)}\|_\infty \le 2 \tau_i \max |v|`: the error
is certified without computing the exact output. Source: arXiv 2404.02690 for
the notion of an (eps, k)-sparse row; the identity is this project's.
"""

import functools
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks, _compat
from jaxattn._dispatch import Branch, dispatch
from jaxattn.attention import _rows
from jaxattn.numerics import topk_merge

# Up to here a row is selected from at once; beyond, from a running list.
_FULL_LENGTH = 4096
_CHUNK_SIZE = 2048
# Gathered keys (or values) of one head in a tile: 512 KiB of float32.
_TILE_GATHERED = 1 << 17


class TopKInfo(NamedTuple):
  """What top-k attention left out, of the accumulation dtype; no gradient.

  Source: this project.

  Attributes:
    tail_mass: (B, T, N) softmax mass of the entries that were not selected; 0
      for a query that sees no key.
    bound: (B, T, N) bound on the largest absolute difference to exact
      attention, 2 tail_mass max|v|; holds up to rounding.
    indices: (B, T, N, k) int32 selected keys in ascending order. A query that
      sees fewer than k keys fills the list up with S, one past the last key.
  """

  tail_mass: jax.Array
  bound: jax.Array
  indices: jax.Array


@overload
def topk_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  k: int,
  chunk_size: int | None = ...,
  return_info: Literal[False] = ...,
  scale: float | jax.Array | None = ...,
  is_causal: bool = ...,
  mask: jax.Array | None = ...,
  implementation: str | None = ...,
  precision: lax.PrecisionLike = ...,
) -> jax.Array: ...


@overload
def topk_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  k: int,
  chunk_size: int | None = ...,
  return_info: Literal[True],
  scale: float | jax.Array | None = ...,
  is_causal: bool = ...,
  mask: jax.Array | None = ...,
  implementation: str | None = ...,
  precision: lax.PrecisionLike = ...,
) -> tuple[jax.Array, TopKInfo]: ...


def topk_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  k: int,
  chunk_size: int | None = None,
  return_info: bool = False,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  mask: jax.Array | None = None,
  implementation: str | None = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array | tuple[jax.Array, TopKInfo]:
  r"""Attention to the k largest logits of each query, with a certificate.

  Ties go to the lower index. A query that sees fewer than k keys uses all of
  them, one that sees none gives 0 with zero gradient. The selection is constant
  between ties: gradients flow to selected entries only and are those of a
  softmax that is masked to them. Forward and reverse mode of any order work.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    key: (B, S, K, H). K divides N: each key head serves N / K query heads.
    value: (B, S, K, Hv).
    k: keys that each query attends to, in [1, S].
    chunk_size: keys visited at a time. None = all of them where S <= 4096 or
      T = 1, else max(k, 2048). Memory and speed only.
    return_info: also return the tail mass, the error bound and the indices.
    scale: factor on the logits; None = 1 / sqrt(H). May be traced.
    is_causal: query t sees keys 0 to t.
    mask: boolean, broadcastable to (B, N, T, S); True = attend.
    implementation: None or "xla".
    precision: of the matrix products.

  Returns:
    (B, T, N, Hv) of the dtype of ``query``; with ``return_info`` also a
    :class:`TopKInfo`.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, for instance "k must
      be in [1, 1024], got 2048".

  Cost:
    T S H multiply-adds for the logits, O(T S log k) for the selection and
    2 T k H for the output, a head; O(T k) memory beside a tile of logits, also
    for the gradient.

  Source:
    arXiv 2404.02690; the certificate is this project's.

  Example:
    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 4, 16))
    >>> out, info = topk_attention(q, k, v, k=16, return_info=True)
    >>> out.shape, info.tail_mass.shape, info.indices.shape
    ((1, 128, 4, 16), (1, 128, 4), (1, 128, 4, 16))
  """
  query, key, value = map(jnp.asarray, (query, key, value))
  mask = None if mask is None else jnp.asarray(mask)
  sizes = _checks.check_attention(query, key, value, mask=mask)
  _checks.check_integer("k", k, 1, sizes.key_length)
  _rows.check_options(scale, is_causal, chunk_size)
  if chunk_size is None:
    whole = sizes.key_length <= _FULL_LENGTH or sizes.query_length == 1
    # A block shorter than the list would cost more to merge than to read.
    chunk_size = sizes.key_length if whole else max(k, _CHUNK_SIZE)
  attend = functools.partial(
    _topk_attention,
    k=k,
    chunk_size=chunk_size,
    return_info=return_info,
    is_causal=is_causal,
    precision=precision,
  )
  operands = (query, key, value, mask)
  operands = tuple(map(_checks.four_dims, operands))
  attend = _compat.over_explicit_axes(attend, operands[0])
  out = dispatch(implementation, {"xla": Branch(attend)}, *operands, scale)
  return out if sizes.batch else jax.tree.map(lambda x: x[0], out)


@functools.partial(
  jax.jit,
  static_argnames=(
    "k",
    "chunk_size",
    "return_info",
    "is_causal",
    "precision",
  ),
)
def _topk_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None,
  scale: Any,
  *,
  k: int,
  chunk_size: int,
  return_info: bool,
  is_causal: bool,
  precision: lax.PrecisionLike,
) -> jax.Array | tuple[jax.Array, TopKInfo]:
  call = _rows.rows(
    query, key, mask, scale=scale, is_causal=is_causal, precision=precision
  )
  frozen = call._replace(
    query=lax.stop_gradient(call.query),
    key=lax.stop_gradient(key),
    scale=lax.stop_gradient(call.scale),
  )
  values, indices, lse = _select(frozen, k, chunk_size)
  out = _rows.from_rows(_attend(call, value, indices)).astype(query.dtype)
  if not return_info:
    return out
  tail_mass = _tail_mass(values, lse)
  largest = jnp.abs(lax.stop_gradient(value)).max((1, 3)).astype(lse.dtype)
  bound = 2 * tail_mass * largest[..., None, None]
  # Sorted only here: the output does not depend on the order.
  info = TopKInfo(tail_mass, bound, lax.sort(indices))
  return out, jax.tree.map(_rows.from_rows, info)


def _select(
  call: _rows.Rows, k: int, chunk_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Largest logits, where they are, and the log-sum-exp of all logits."""
  unused = call.key.shape[1]

  def first(logits: jax.Array, start: int) -> tuple[jax.Array, ...]:
    del start
    values, indices = _rows.top_of_block(logits, k, unused=unused)
    return values, indices, jax.nn.logsumexp(logits, -1)

  def update(
    state: tuple[jax.Array, ...], logits: jax.Array, start: jax.Array
  ) -> tuple[jax.Array, ...]:
    values, indices, lse = state
    new = start + jnp.arange(logits.shape[-1], dtype=indices.dtype)
    values, indices = topk_merge(values, indices, logits, new)
    return values, indices, jnp.logaddexp(lse, jax.nn.logsumexp(logits, -1))

  values, indices, lse = _rows.fold_logits(call, chunk_size, first, update)
  # Asks for -inf, so that a NaN is selected and seen rather than hidden.
  return values, jnp.where(values == -jnp.inf, unused, indices), lse


def _tail_mass(values: jax.Array, lse: jax.Array) -> jax.Array:
  """1 - sum exp(values - lse), at least 0, and 0 where nothing is seen."""
  gap = jax.nn.logsumexp(values, -1) - lse
  gap = jnp.where(lse == -jnp.inf, 0, gap)
  return jnp.maximum(-jnp.expm1(gap), 0)


def _attend(
  call: _rows.Rows, value: jax.Array, indices: jax.Array
) -> jax.Array:
  """Softmax over selected keys only, in tiles of queries."""
  *_, t, k = indices.shape
  largest = max(call.key.shape[-1], value.shape[-1])
  num_tiles = _rows.count_tiles(t, _TILE_GATHERED // (k * largest))

  def one_tile(x: tuple[jax.Array, jax.Array]) -> jax.Array:
    query, indices = x
    return _attend_tile(call._replace(query=query), value, indices)

  if num_tiles == 1:
    return one_tile((call.query, indices))
  tiles = (_rows.tile(call.query, num_tiles), _rows.tile(indices, num_tiles))
  # Gathered keys and values are gathered again for the gradient, not kept.
  return _rows.untile(lax.map(jax.checkpoint(one_tile), tiles), t)


def _attend_tile(
  call: _rows.Rows, value: jax.Array, indices: jax.Array
) -> jax.Array:
  dtype = call.scale.dtype
  key = _gather(call.key, indices).astype(dtype)
  value = _gather(value, indices).astype(dtype)
  query = call.query.astype(dtype)
  logits = call.scale * jnp.einsum(
    "bkgth,bkgtjh->bkgtj", query, key, precision=call.precision
  )
  used = indices < call.key.shape[1]
  peak = jnp.max(logits, -1, where=used, initial=-jnp.inf, keepdims=True)
  peak = lax.stop_gradient(jnp.where(peak == -jnp.inf, 0, peak))
  weights = jnp.where(used, jnp.exp(jnp.where(used, logits - peak, 0)), 0)
  total = weights.sum(-1, keepdims=True)
  weights = weights / jnp.where(total == 0, 1, total)
  return jnp.einsum(
    "bkgtj,bkgtjh->bkgth", weights, value, precision=call.precision
  )


def _gather(x: jax.Array, indices: jax.Array) -> jax.Array:
  """Rows (B, K, G, T, k, H) of x (B, S, K, H); 0 where the index is S."""
  b, s, kv, h = x.shape
  # One flat axis of rows: a gather that is batched over K as well would first
  # bring the heads of x to the front, a copy of all of x.
  head = jnp.arange(kv, dtype=indices.dtype).reshape(1, kv, 1, 1, 1)
  take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)
  return jax.vmap(take)(x.reshape(b, s * kv, h), indices * kv + head)
