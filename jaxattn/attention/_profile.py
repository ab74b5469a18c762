"""Statistics of rows of logits, from two passes over blocks of keys."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn.attention import _rows


class Moments(NamedTuple):
  """Number, mean, and sums of powers of deviations from the mean."""

  count: jax.Array
  mean: jax.Array
  m2: jax.Array
  m3: jax.Array
  m4: jax.Array


class Summary(NamedTuple):
  """What the first pass knows of each row.

  Attributes:
    moments: of the visible logits.
    lse: log-sum-exp.
    largest: (..., k) the largest logits in descending order, padded with -inf.
  """

  moments: Moments
  lse: jax.Array
  largest: jax.Array


def summarize(call: _rows.Rows, chunk_size: int, k: int) -> Summary:
  """First pass: moments, log-sum-exp and the k largest logits of each row."""

  def first(logits: jax.Array, start: Any) -> Summary:
    del start
    largest, _ = _rows.top_of_block(logits, k, unused=0)
    return Summary(_moments(logits), jax.nn.logsumexp(logits, -1), largest)

  def update(state: Summary, logits: jax.Array, start: Any) -> Summary:
    del start
    return Summary(
      _merge(state.moments, _moments(logits)),
      jnp.logaddexp(state.lse, jax.nn.logsumexp(logits, -1)),
      jax.lax.top_k(jnp.concatenate([state.largest, logits], -1), k)[0],
    )

  return _rows.fold_logits(call, chunk_size, first, update)


def count_above(
  call: _rows.Rows, chunk_size: int, thresholds: jax.Array
) -> jax.Array:
  """Second pass: (B, K, G, T, m) logits above (B, K, G, T, m) thresholds."""

  def first(logits: jax.Array, start: Any, levels: jax.Array) -> jax.Array:
    del start
    # One level at a time: a product of levels and keys would not fit a tile.
    counts = [
      (logits > levels[..., i : i + 1]).sum(-1, dtype=jnp.int32)
      for i in range(levels.shape[-1])
    ]
    return jnp.stack(counts, -1)

  def update(state: Any, logits: Any, start: Any, levels: Any) -> jax.Array:
    return state + first(logits, start, levels)

  return _rows.fold_logits(call, chunk_size, first, update, thresholds)


def shape_of(moments: Moments) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Standard deviation, skewness and excess kurtosis; 0 where undefined."""
  count = jnp.maximum(moments.count, 1)
  variance = moments.m2 / count
  # What is left of equal logits is rounding, and has no shape.
  rounding = 16 * jnp.finfo(variance.dtype).eps * moments.mean
  positive = variance > rounding**2
  safe = jnp.where(positive, variance, 1)
  skew = jnp.where(positive, moments.m3 / count / safe**1.5, 0)
  kurtosis = jnp.where(positive, moments.m4 / count / safe**2 - 3, 0)
  return jnp.sqrt(variance), skew, kurtosis


def _moments(logits: jax.Array) -> Moments:
  visible = logits > -jnp.inf
  count = visible.sum(-1, dtype=logits.dtype)
  total = jnp.where(visible, logits, 0).sum(-1)
  mean = total / jnp.maximum(count, 1)
  deviation = jnp.where(visible, logits - mean[..., None], 0)
  return Moments(count, mean, *((deviation**p).sum(-1) for p in (2, 3, 4)))


def _merge(a: Moments, b: Moments) -> Moments:
  count = a.count + b.count
  total = jnp.maximum(count, 1)
  share_a, share_b = a.count / total, b.count / total
  delta = b.mean - a.mean
  both = total * share_a * share_b
  m2 = a.m2 + b.m2 + delta**2 * both
  m3 = a.m3 + b.m3 + delta**3 * both * (share_a - share_b)
  m3 += 3 * delta * (share_a * b.m2 - share_b * a.m2)
  m4 = a.m4 + b.m4
  m4 += delta**4 * both * (share_a**2 - share_a * share_b + share_b**2)
  m4 += 6 * delta**2 * (share_a**2 * b.m2 + share_b**2 * a.m2)
  m4 += 4 * delta * (share_a * b.m3 - share_b * a.m3)
  return Moments(count, a.mean + delta * share_b, m2, m3, m4)
