"""The largest logit: what a polynomial in place of exp must cover.

A polynomial that replaces exp is good on an interval [-R, R], and nothing in it
notices a logit outside. R is therefore a promise about the data, and this
module measures whether it is kept, exactly and without holding all logits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import checkify

from jaxattn import _checks
from jaxattn.attention import _rows, _tensor_blocks
from jaxattn.attention.polynomial import check_shift, shift_keys
from jaxattn.features import _chunks
from jaxattn.numerics._dtypes import accumulator

# Keys visited at a time; memory and speed only.
_CHUNK_SIZE = 1024


def logit_radius(
  query: jax.Array,
  key: jax.Array,
  *,
  radius: float | None = None,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  mask: jax.Array | None = None,
  key_mask: jax.Array | None = None,
  center_keys: bool = False,
  key_shift: jax.Array | None = None,
  chunk_size: int | None = None,
) -> jax.Array:
  """Largest absolute logit among the pairs that attend to each other.

  With ``radius`` the largest logit is also compared with that promise. Under
  ``jax.experimental.checkify.checkify`` one that exceeds it raises; elsewhere
  the comparison does nothing and costs nothing.

  ``polynomial_attention`` is promised a radius of the logits after its shift of
  the keys: by their mean if it is neither causal nor given another shift. Pass
  the same here.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    key: (B, S, K, H). K divides N: each key head serves N / K query heads.
    radius: the promise, as given to ``polynomial_attention``; None = none.
    scale: factor on the logits; None = 1 / sqrt(H). May be traced.
    is_causal: query t sees keys 0 to t.
    mask: boolean, broadcastable to (B, N, T, S); True = attend.
    key_mask: boolean (B, S); True = attend.
    center_keys: subtract the mean of the keys that ``key_mask`` shows; not with
      ``is_causal`` or ``key_shift``.
    key_shift: (K, H) subtracted from the keys.
    chunk_size: keys visited at a time; None = 1024. Memory and speed only.

  Returns:
    () of the accumulation dtype, without a gradient; NaN if a logit is, and 0
    if no pair attends.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, for instance "radius
      must be positive, got 0.0".
    checkify.JaxRuntimeError: from ``err.throw()`` of a checkified caller, as
      "the logits reach 3.2, beyond the promised radius 2.0".

  Cost:
    T S H multiply-adds a head: as exact attention's logits, so a check to make
    now and then. O(T + S) memory beside a tile of logits.

  Source:
    This project.

  Example:
    >>> import jax.numpy as jnp
    >>> from jax.experimental import checkify
    >>> x = jnp.array([3.0, -4.0]).reshape(2, 1, 1)
    >>> print(logit_radius(x, x))
    16.0
    >>> checked = checkify.checkify(lambda x: logit_radius(x, x, radius=10.0))
    >>> error, _ = checked(x)
    >>> print(error.get().split(" (")[0])
    the logits reach 16.0, beyond the promised radius 10.0
  """
  query, key = jnp.asarray(query), jnp.asarray(key)
  mask, key_mask, key_shift = (
    None if x is None else jnp.asarray(x) for x in (mask, key_mask, key_shift)
  )
  _checks.check_attention(query, key, key, mask=mask, key_mask=key_mask)
  _rows.check_options(scale, is_causal, chunk_size)
  _checks.check_choice("center_keys", center_keys, (False, True))
  check_shift(key, center_keys, key_shift, is_causal)
  if radius is not None:
    _checks.check_scalar("radius", radius)
    _checks.check_positive("radius", radius)
  query, key, mask = map(_checks.four_dims, (query, key, mask))
  if key_mask is not None:
    key_mask = key_mask.reshape(key.shape[:2])
  largest = _logit_radius(
    query,
    key,
    mask,
    key_mask,
    key_shift,
    scale,
    is_causal=is_causal,
    center_keys=center_keys,
    chunk_size=_CHUNK_SIZE if chunk_size is None else chunk_size,
  )
  if radius is not None:
    check_radius(largest, radius)
  return largest


def tensor_logit_radius(
  query: jax.Array,
  key1: jax.Array,
  key2: jax.Array,
  *,
  radius: float | None = None,
  scale: float | jax.Array | None = None,
  key_mask1: jax.Array | None = None,
  key_mask2: jax.Array | None = None,
  chunk_size: int | None = None,
) -> jax.Array:
  r"""Largest absolute logit of tensor attention, over all pairs of keys.

  .. math:: \max_{i, j, l} \Bigl|\text{scale} \sum_c
    q_{ic} k^1_{jc} k^2_{lc}\Bigr|

  Those that ``is_causal`` would hide count, too. With ``radius`` the largest
  logit is compared with that promise, as by :func:`logit_radius`.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    key1: (B, S1, K, H). K divides N.
    key2: (B, S2, K, H).
    radius: the promise; None = none.
    scale: factor on the logits; None = 1 / sqrt(H). May be traced.
    key_mask1: boolean (B, S1); True = attend.
    key_mask2: boolean (B, S2); True = attend.
    chunk_size: queries at a time; None = chosen from sizes. Memory and speed
      only.

  Returns:
    () of the accumulation dtype, without a gradient; NaN if a logit is, and 0
    if no pair attends.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, for instance "radius
      must be positive, got 0.0", or a head has more than 2^34 logits.
    checkify.JaxRuntimeError: as :func:`logit_radius`.

  Cost:
    T S1 S2 H multiply-adds a head; O(T + S1 + S2) memory beside a block. A
    looser bound costs O(T + S1 + S2), and serves any length: by Hoelder's
    inequality, scale times the largest 3-norms of query, first and second key.

  Source:
    This project.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.array([3.0, -4.0]).reshape(2, 1, 1)
    >>> print(tensor_logit_radius(x, x, x))
    64.0
  """
  pairs = [
    ("key1", jnp.asarray(key1), key_mask1),
    ("key2", jnp.asarray(key2), key_mask2),
  ]
  query, keys = jnp.asarray(query), []
  for name, key, mask in pairs:
    names = (name, name, f"key_mask{name[-1]}")
    mask = None if mask is None else jnp.asarray(mask)
    _checks.check_attention(query, key, key, key_mask=mask, names=names)
    _checks.check_shape(name, key, (*key.shape[:-2], *pairs[0][1].shape[-2:]))
    key = _checks.four_dims(key)
    mask = None if mask is None else mask.reshape(key.shape[:2])
    keys.append(_chunks.hide(key, mask))
  _rows.check_options(scale, False, chunk_size)
  if radius is not None:
    _checks.check_scalar("radius", radius)
    _checks.check_positive("radius", radius)
  query = _checks.four_dims(query)
  _tensor_blocks.check_num_logits(
    (query, *keys),
    "tensor_logit_radius would go through {} logits a head; scale times the "
    "largest 3-norms of query, key1 and key2 bounds them",
  )
  largest = _tensor_logit_radius(query, *keys, scale, chunk_size=chunk_size)
  if radius is not None:
    check_radius(largest, radius)
  return largest


@functools.partial(jax.jit, static_argnames="chunk_size")
def _tensor_logit_radius(
  query: jax.Array,
  key1: jax.Array,
  key2: jax.Array,
  scale: Any,
  *,
  chunk_size: int | None,
) -> jax.Array:
  dtype = accumulator(query.dtype)
  arrays = lax.stop_gradient((query, key1, key2))
  query, key1, key2 = (x.astype(dtype) for x in arrays)

  def block(x: tuple[jax.Array, jax.Array]) -> jax.Array:
    rows, _ = x
    paired = _tensor_blocks.paired_queries(rows, key1)
    keys = _tensor_blocks.for_each_query(key2, rows.shape[1])
    return logit_radius(paired, keys, scale=scale)

  longest = max(key1.shape[1], key2.shape[1])
  return _tensor_blocks.over_blocks(query, longest, chunk_size, block).max()


def check_radius(largest: jax.Array, radius: float | jax.Array) -> None:
  """Raises under checkify if ``largest``, (), exceeds ``radius``; else nothing.

  Args:
    largest: what :func:`logit_radius` found.
    radius: the promise.
  """
  # Elsewhere a check for debugging vanishes; any other would be an error.
  checkify.debug_check(
    largest <= radius,  # False for NaN, too.
    "the logits reach {largest}, beyond the promised radius {radius}",
    largest=largest,
    radius=jnp.asarray(radius, largest.dtype),
  )


@functools.partial(
  jax.jit, static_argnames=("is_causal", "center_keys", "chunk_size")
)
def _logit_radius(
  query: jax.Array,
  key: jax.Array,
  mask: jax.Array | None,
  key_mask: jax.Array | None,
  key_shift: jax.Array | None,
  scale: Any,
  *,
  is_causal: bool,
  center_keys: bool,
  chunk_size: int,
) -> jax.Array:
  query, key, scale = lax.stop_gradient((query, key, scale))
  if center_keys or key_shift is not None:
    # Not rounded to 16 bits again.
    query, key = (x.astype(accumulator(x.dtype)) for x in (query, key))
  # A hidden key is 0 then, and so are its logits.
  key = shift_keys(key, key_mask, lax.stop_gradient(key_shift), center_keys)
  call = _rows.rows(query, key, mask, scale=scale, is_causal=is_causal)

  def first(logits: jax.Array, start: Any) -> jax.Array:
    del start
    hidden = logits == -jnp.inf
    return jnp.where(hidden, 0, jnp.abs(logits)).max(-1)

  def update(state: jax.Array, logits: jax.Array, start: Any) -> jax.Array:
    return jnp.maximum(state, first(logits, start))

  return _rows.fold_logits(call, chunk_size, first, update).max()
