"""Means under a softmax over lags, one lag at a time.

Heads of size 1 with one query each: the exact attention of this library would
take every head for a query of its own and hold all weights at once. Here sums
run over the lags; what is kept is of size samples times heads. The largest
logit is known beforehand, so that nothing is rescaled on the way.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def softmax_means(
  query: jax.Array,
  key: jax.Array,
  values: tuple[jax.Array, ...],
  bias: jax.Array | None,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """Means of several values under softmax(query key + bias).

  Args:
    query: (n, m).
    key: (n, d).
    values: (n, d) each.
    bias: (m, d).

  Returns:
    Means, (n, m) each, and the logarithm of the normalizer, (n, m).
  """
  peak = _peak(query, key, bias)
  lags = (key.T, tuple(v.T for v in values), None if bias is None else bias.T)

  def terms(lag: Any) -> tuple[jax.Array, ...]:
    key, values, bias = lag
    e = jnp.exp(_logits(query, key, bias) - peak)
    return (e, *(e * v[:, None] for v in values))

  def step(sums: Any, lag: Any) -> tuple[Any, None]:
    return tuple(s + t for s, t in zip(sums, terms(lag))), None

  first, rest = (
    jax.tree.map(lambda x, i=i: x[i], lags) for i in (0, slice(1, None))
  )
  (total, *sums), _ = lax.scan(step, terms(first), rest)
  return tuple(s / total for s in sums), peak + jnp.log(total)


def _logits(
  query: jax.Array, key: jax.Array, bias: jax.Array | None
) -> jax.Array:
  logits = query * key[:, None]
  return logits if bias is None else logits + bias[None]


def _peak(
  query: jax.Array, key: jax.Array, bias: jax.Array | None
) -> jax.Array:
  if bias is None:
    # A product is largest at one end: no pass over the lags.
    top, bottom = key.max(1)[:, None], key.min(1)[:, None]
    return jnp.where(query > 0, query * top, query * bottom)

  def step(peak: jax.Array, lag: Any) -> tuple[jax.Array, None]:
    return jnp.maximum(peak, _logits(query, *lag)), None

  first = _logits(query, key[:, 0], bias[:, 0])
  return lax.scan(step, first, (key.T[1:], bias.T[1:]))[0]


@jax.custom_vjp
def softmax_mean(
  query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None
) -> jax.Array:
  """Mean of ``value`` under softmax(query key + bias), (n, m)."""
  return softmax_means(query, key, (value,), bias)[0][0]


def _mean_forward(
  query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, Any]:
  values = value, key, value * key
  (mean, mean_key, mean_product), log = softmax_means(query, key, values, bias)
  slope = mean_product - mean * mean_key
  return mean, (query, key, value, bias, mean, slope, log)


def _mean_backward(saved: Any, g: jax.Array) -> Any:
  query, key, value, bias, mean, slope, log = saved

  # XLA drops this loop where only the query's cotangent is asked for.
  def step(_: None, lag: Any) -> tuple[None, Any]:
    key, value, bias = lag
    direct = g * jnp.exp(_logits(query, key, bias) - log)
    logit = direct * (value[:, None] - mean)
    sums = (logit * query).sum(1), direct.sum(1)
    return None, (*sums, None if bias is None else logit.sum(0))

  lags = key.T, value.T, None if bias is None else bias.T
  _, (of_key, of_value, of_bias) = lax.scan(step, None, lags)
  of_bias = None if bias is None else of_bias.T
  return g * slope, of_key.T, of_value.T, of_bias


softmax_mean.defvjp(_mean_forward, _mean_backward)
