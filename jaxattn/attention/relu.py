r"""ReLU attention: weights that are powers of a rectified score.

.. math::

  w_{ij} = \max(\text{scale} \cdot q_i \cdot k_j - b_i,\ 0)^\alpha, \qquad
  o_i = \frac{\sum_j w_{ij} v_j}{\sum_j w_{ij}},

and 0 where no key passes the threshold. Unlike a softmax it gives most keys a
weight of exactly 0. Numerator and denominator are plain sums over keys, so they
are added up block by block and every block is computed again for the gradient.

The ratio does not change if all weights of a query are divided by one number.
Here that is a power of two (exact in floating point) just above the largest
excess :math:`\text{scale} \cdot q_i \cdot k_j - b_i` among the keys that the
query sees, so that no power :math:`\alpha` overflows and some do not vanish.
Source: arXiv 2410.10165, definition of ReLU attention; it leaves 0/0 open.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks, _compat
from jaxattn._dispatch import Branch, dispatch
from jaxattn.attention import _rows
from jaxattn.numerics._dtypes import accumulator

_BLOCK = 512
# Scores of one head in a tile: 256 KiB of float32.
_TILE_SCORES = 1 << 16


def relu_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  threshold: float | jax.Array = 0.0,
  alpha: int = 1,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  mask: jax.Array | None = None,
  implementation: str | None = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  r"""Attention with weights max(scale q.k - threshold, 0)^alpha, normalized.

  All keys are scored; no (T, S) array is ever held. A query that no key passes
  gives 0 with zero gradient, and so does one that sees no key. Where a score
  equals the threshold the derivative is taken to be 0. Forward and reverse mode
  of any order work.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    key: (B, S, K, H). K divides N: each key head serves N / K query heads.
    value: (B, S, K, Hv).
    threshold: what a scaled score must exceed to count; a real scalar, or
      (B, T, N), one for each query. May be traced; has a gradient.
    alpha: power of the weights, a positive integer.
    scale: factor on the scores; None = 1 / sqrt(H). May be traced.
    is_causal: query t sees keys 0 to t.
    mask: boolean, broadcastable to (B, N, T, S); True = attend.
    implementation: None or "xla".
    precision: of the matrix products.

  Returns:
    (B, T, N, Hv) of the dtype of ``query``.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, for instance "alpha
      must be >= 1, got 0".

  Cost:
    2 T S (2 H + Hv) flops a head forward, half of H's for the largest scores,
    and 5 T S (H + Hv) backward; a causal mask saves none. O(T + S) memory
    beside a tile of scores, also for the gradient.

  Source:
    arXiv 2410.10165 (ReLU^alpha attention), without its sparse search.

  Example:
    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 4, 16))
    >>> relu_attention(q, k, v, threshold=0.5, alpha=2).shape
    (1, 128, 4, 16)
  """
  query, key, value = map(jnp.asarray, (query, key, value))
  mask = None if mask is None else jnp.asarray(mask)
  sizes = _checks.check_attention(query, key, value, mask=mask)
  _checks.check_integer("alpha", alpha, 1, None)
  _rows.check_options(scale, is_causal, None)
  threshold = _threshold(threshold, query)
  attend = functools.partial(
    _relu_attention, alpha=alpha, is_causal=is_causal, precision=precision
  )
  operands = tuple(map(_checks.four_dims, (query, key, value, mask)))
  attend = _compat.over_explicit_axes(attend, operands[0])
  out = dispatch(
    implementation, {"xla": Branch(attend)}, *operands, threshold, scale
  )
  return out if sizes.batch else out[0]


def _threshold(threshold: Any, query: jax.Array) -> jax.Array:
  """A scalar, or (B, T, N), in the dtype of the scores."""
  if jnp.ndim(threshold) == 0:
    _checks.check_scalar("threshold", threshold)
  else:
    _checks.check_floating("threshold", threshold)
    meaning = "(B, T, N)" if query.ndim == 4 else "(T, N)"
    _checks.check_shape("threshold", threshold, query.shape[:-1], meaning)
  threshold = jnp.asarray(threshold, accumulator(query.dtype))
  return threshold[None] if threshold.ndim == 2 else threshold


@functools.partial(jax.jit, static_argnames=("alpha", "is_causal", "precision"))
def _relu_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None,
  threshold: jax.Array,
  scale: Any,
  *,
  alpha: int,
  is_causal: bool,
  precision: lax.PrecisionLike,
) -> jax.Array:
  b, t, n, _ = query.shape
  kv, dtype = key.shape[2], accumulator(query.dtype)
  call = _rows.rows(
    query, key, mask, scale=scale, is_causal=is_causal, precision=precision
  )
  threshold = jnp.broadcast_to(threshold, (b, t, n)).reshape(b, t, kv, n // kv)
  threshold = jnp.moveaxis(threshold, 1, 3)[..., None]
  factor = _exact_reciprocal(_largest_excess(call, threshold))
  call = call._replace(
    query=call.query.astype(dtype), scale=call.scale * factor
  )
  sums = _fold(call, value.astype(dtype), threshold * factor, alpha)
  total = sums[..., -1:]
  out = sums[..., :-1] / jnp.where(total == 0, 1, total)
  return _rows.from_rows(out).astype(query.dtype)


def _largest_excess(call: _rows.Rows, threshold: jax.Array) -> jax.Array:
  """Largest score minus threshold of each query; -inf if it sees no key."""
  query, key, scale, threshold = lax.stop_gradient(
    (call.query, call.key, call.scale, threshold)
  )

  def first(logits: jax.Array, start: Any, threshold: jax.Array) -> jax.Array:
    del start
    return logits.max(-1, keepdims=True) - threshold

  def update(
    state: jax.Array, logits: jax.Array, start: Any, threshold: jax.Array
  ) -> jax.Array:
    return jnp.maximum(state, first(logits, start, threshold))

  call = call._replace(query=query, key=key, scale=scale)
  return _rows.fold_logits(call, _BLOCK, first, update, threshold)


def _exact_reciprocal(x: jax.Array) -> jax.Array:
  """1 / x rounded to a power of two; 1 where nothing can pass."""
  _, exponent = jnp.frexp(jnp.where((x > 0) & jnp.isfinite(x), x, 1))
  return jnp.ldexp(jnp.ones_like(x), -exponent)


def _fold(
  call: _rows.Rows, value: jax.Array, threshold: jax.Array, alpha: int
) -> jax.Array:
  """(B, K, G, T, Hv + 1) sums of w [v, 1] over the keys."""
  t, s = call.query.shape[3], call.key.shape[1]
  ones = jnp.ones_like(value[..., :1])
  value = jnp.concatenate((value, ones), -1)
  block = min(_BLOCK, s)
  head = s % block or block
  num_tiles = _rows.count_tiles(t, _TILE_SCORES // block)
  position = jnp.arange(t, dtype=jnp.int32).reshape(1, 1, 1, t, 1)
  scale = jnp.broadcast_to(call.scale, threshold.shape)
  rows = (call.query, threshold, scale, position)
  tiles = [_rows.tile(x, num_tiles) for x in rows]

  # Computed again for the gradient: what is kept is what goes in.
  @jax.checkpoint
  def visit(start: Any, key: jax.Array, value: jax.Array) -> jax.Array:
    key = key.astype(value.dtype)
    mask = _rows.mask_tiles(call.mask, start, key.shape[1], num_tiles)

    @jax.checkpoint
    def one_tile(x: Any) -> jax.Array:
      mask, query, threshold, scale, position = x
      scores = jnp.einsum(
        "bkgth,bskh->bkgts", query, key, precision=call.precision
      )
      excess = jax.nn.relu(scale * scores - threshold)
      size = key.shape[1]
      seen = _rows.visible(call.is_causal, mask, position, start, size)
      if seen is not None:
        excess = jnp.where(seen, excess, 0)
      weights = lax.integer_pow(excess, alpha)
      return jnp.einsum(
        "bkgts,bskh->bkgth", weights, value, precision=call.precision
      )

    return lax.map(one_tile, (mask, *tiles))

  def step(sums: jax.Array, x: Any) -> tuple[jax.Array, None]:
    return sums + visit(*x), None

  sums = visit(0, call.key[:, :head], value[:, :head])
  if head < s:
    starts = jnp.arange(head, s, block, dtype=jnp.int32)
    blocks = (_blocks(x[:, head:], block) for x in (call.key, value))
    sums, _ = lax.scan(step, sums, (starts, *blocks))
  return _rows.untile(sums, t)


def _blocks(x: jax.Array, size: int) -> jax.Array:
  """(B, S, ...) to (S / size, B, size, ...)."""
  return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
