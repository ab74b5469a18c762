"""ReLU attention in XLA: keys in blocks, queries in tiles."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _compat
from jaxattn.attention import _rows
from jaxattn.numerics._dtypes import accumulator
from pallas_kernels.relu_attention.operands import Gradients, Operands, Options

_BLOCK = 512
# Scores of one head in a tile: 256 KiB of float32.
_TILE_SCORES = 1 << 16


def forward(x: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
  """Output (B, T, N, Hv) and norm (B, T, N); JAX can differentiate both."""
  call = _call(x, options)
  threshold = _to_rows(x.threshold[..., None], x)
  factor = _exact_reciprocal(_largest_excess(call, threshold))
  sums = _scaled_sums(x, options, factor)
  total = sums[..., -1:]
  safe = jnp.where(total == 0, 1, total)
  root = safe if options.alpha == 1 else safe ** (1 / options.alpha)
  norm = jnp.where(total == 0, 0, root / factor)
  out = _rows.from_rows(sums[..., :-1] / safe).astype(x.query.dtype)
  return out, _rows.from_rows(norm)[..., 0]


def backward(
  x: Operands,
  options: Options,
  out: jax.Array,
  norm: jax.Array,
  out_bar: jax.Array,
  norm_bar: jax.Array,
) -> Gradients:
  r"""Cotangents of all but the mask; JAX can differentiate them.

  Relative to the norm, weights :math:`u^\alpha` of a query add up to 1, so that
  :math:`\bar o \cdot \sum_j u_j^\alpha v_j - \delta \sum_j u_j^\alpha` has
  the gradient that is asked for, with :math:`\delta = \bar o \cdot o - \bar n
  n / \alpha`.
  """
  dtype = norm.dtype
  out_bar = out_bar.astype(dtype)
  delta = (out_bar * out.astype(dtype)).sum(-1)
  delta -= norm_bar * norm / options.alpha
  # Where nothing passes, nothing does relative to any other number.
  inverse = _to_rows((1 / jnp.where(norm == 0, 1, norm))[..., None], x)
  bars = jnp.concatenate((out_bar, -delta[..., None]), -1)

  def sums(*floats: jax.Array) -> jax.Array:
    return _scaled_sums(Operands(*floats, mask=x.mask), options, inverse)

  # Each device's own share, as kernels give it.
  axes = _compat.varying_axes(x, out_bar)
  _, vjp = jax.vjp(sums, *(_compat.cast_varying(y, axes) for y in x[:5]))
  return Gradients(*vjp(_to_rows(bars, x)))


def _call(x: Operands, options: Options) -> _rows.Rows:
  return _rows.rows(
    x.query,
    x.key,
    x.mask,
    scale=x.scale,
    is_causal=options.is_causal,
    precision=options.precision,
  )


def _to_rows(y: jax.Array, x: Operands) -> jax.Array:
  """(B, T, N, ...) to (B, K, G, T, ...)."""
  b, t, n = y.shape[:3]
  kv = x.key.shape[2]
  return jnp.moveaxis(y.reshape(b, t, kv, n // kv, *y.shape[3:]), 1, 3)


def _scaled_sums(x: Operands, options: Options, factor: jax.Array) -> jax.Array:
  """(B, K, G, T, Hv + 1) sums of w [v, 1], for excesses times ``factor``."""
  call, dtype = _call(x, options), accumulator(x.query.dtype)
  threshold = _to_rows(x.threshold[..., None], x)
  call = call._replace(
    query=call.query.astype(dtype), scale=call.scale * factor
  )
  return _fold(call, x.value.astype(dtype), threshold * factor, options.alpha)


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
