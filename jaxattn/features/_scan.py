r"""Attention whose kernel is an inner product of features, by prefix sums.

With features :math:`\phi`, weights w and values extended by a column of ones,

.. math::

  S = \sum_j \phi(k_j) [v_j, 1]^\top, \qquad
  [n_i, d_i] = \phi(q_i)^\top (w \circ S), \qquad o_i = n_i / d_i,

in time linear in the number of tokens. Causal attention keeps S of the chunks
before, and takes the pairs inside a chunk one by one. Features exist for one
chunk at a time, in the gradient too: the backward rule computes them again.

Arrays are held features first, for P pairs of batch element and key head and G
query heads to each: query (P, d, G, T), key (P, d, S), value (P, v, S) with the
row of ones last, S as (P, m, v).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _compat
from jaxattn.features import _chunks, _scan_grad, maps
from jaxattn.features._chunks import Spec
from jaxattn.numerics._sizes import largest_divisor


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  spec: Spec,
  sketch: maps.FeatureMap | None = None,
) -> jax.Array:
  """Attention in the public layout, all in the accumulation dtype.

  Args:
    query: (B, T, N, d), scaled.
    key: (B, S, K, d), 0 where hidden.
    value: (B, S, K, v), with the column of ones last; 0 where hidden.
    spec: static facts.
    sketch: random features of the kernel, without a gradient.

  Returns:
    (B, T, N, v - 1); 0 for a query that sees no key.
  """
  run = functools.partial(attend_pairs, spec=spec, sketch=sketch)
  return over_pairs(run, query, key, value, spec)


def over_pairs(
  attend_pairs: Any,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  spec: Spec,
) -> jax.Array:
  """Calls ``attend_pairs`` on what ``attend`` takes, features first."""
  if spec.is_causal:
    # Keys behind the last query are seen by nobody.
    key, value = (_chunks.fit(x, query.shape[1], 1) for x in (key, value))
  operands = by_pair(query, key.shape[2]), tokens_last(key), tokens_last(value)
  return by_head(attend_pairs(*operands), query)


def attend_pairs(
  *operands: jax.Array, spec: Spec, sketch: maps.FeatureMap | None = None
) -> jax.Array:
  """(P, d, G, T), (P, d, S), (P, v, S) -> (P, v - 1, G, T)."""
  num_features = spec._replace(sketch=sketch).num_features(operands[1].shape[1])
  attend_group = functools.partial(_attend_group, sketch, spec)
  return over_groups(attend_group, operands, num_features, spec)


def by_pair(query: jax.Array, num_kv_heads: int) -> jax.Array:
  """(B, T, N, d) -> (P, d, G, T)."""
  b, t, n, d = query.shape
  query = query.reshape(b, t, num_kv_heads, n // num_kv_heads, d)
  query = query.transpose(0, 2, 4, 3, 1)
  return query.reshape(b * num_kv_heads, d, n // num_kv_heads, t)


def tokens_last(x: jax.Array) -> jax.Array:
  """(B, S, K, v) -> (P, v, S)."""
  b, s, k, v = x.shape
  return x.transpose(0, 2, 3, 1).reshape(b * k, v, s)


def by_head(out: jax.Array, query: jax.Array) -> jax.Array:
  """(P, v, G, T) -> (B, T, N, v) of the queries (B, T, N, d)."""
  b, t, n, _ = query.shape
  _, v, g, _ = out.shape
  out = out.reshape(b, n // g, v, g, t).transpose(0, 4, 1, 3, 2)
  return out.reshape(b, t, n, v)


def over_groups(
  attend_group: Any, operands: Any, num_features: int, spec: Spec
) -> Any:
  """Group by group of pairs, so that the features of a chunk stay in cache.

  Args:
    attend_group: from operands with some of the pairs.
    operands: arrays that begin with P, the queries (P, d, G, T) first.
    num_features: m, features of a token.
    spec: static facts.
  """
  pairs, _, heads, _ = operands[0].shape
  size = num_features * (spec.chunk_size or _chunks.MIN_CHUNK) * heads
  group = largest_divisor(pairs, _chunks.CHUNK_FEATURES // size)
  if group == pairs:
    return attend_group(operands)
  operands = jax.tree.map(
    lambda x: x.reshape(-1, group, *x.shape[1:]), operands
  )
  out = lax.map(attend_group, operands)
  return jax.tree.map(lambda x: x.reshape(pairs, *x.shape[2:]), out)


def _attend_group(sketch: Any, spec: Spec, operands: Any) -> jax.Array:
  return _attend(*operands, sketch, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  sketch: maps.FeatureMap | None,
  spec: Spec,
) -> jax.Array:
  """(P, d, G, T), (P, d, S), (P, v, S) -> (P, v - 1, G, T)."""
  return _attend_fwd(query, key, value, sketch, spec)[0]


def _attend_fwd(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  sketch: maps.FeatureMap | None,
  spec: Spec,
) -> tuple[jax.Array, Any]:
  result = forward(query, key, value, spec._replace(sketch=sketch))
  return result[0], (query, key, value, sketch, *result)


def _attend_bwd(
  spec: Spec, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array | None, ...]:
  query, key, value, sketch, out, denominator, total = residuals
  bars = backward(
    query, key, value, out, denominator, total, cotangent,
    spec._replace(sketch=sketch),
  )  # fmt: skip
  return *bars, None


def forward(
  query: jax.Array, key: jax.Array, value: jax.Array, spec: Spec
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Output, and what the backward pass reads of it: denominators, moments."""
  if spec.is_causal:
    total, summed = None, _causal_sums(query, key, value, spec)
  else:
    total = _chunks.moments(key, value, spec)
    summed = _chunks.sums(query, spec.weigh(total, key.shape[1]), spec)
  return *divide(summed, spec), total


def backward(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  out: jax.Array,
  denominator: jax.Array,
  total: jax.Array | None,
  cotangent: jax.Array,
  spec: Spec,
) -> tuple[jax.Array, ...]:
  """Cotangents of query, key and value."""
  summed = divide_bwd(cotangent, out, denominator, spec)
  if total is None:
    grads = _scan_grad.causal_bwd(query, key, value, summed, spec)
  else:
    grads = _scan_grad.full_bwd(query, key, value, total, summed, spec)
  return tuple(map(_compat.sum_like, grads, (query, key, value)))


_attend.defvjp(_attend_fwd, _attend_bwd)


def divide(summed: jax.Array, spec: Spec) -> tuple[jax.Array, jax.Array]:
  """(P, v, G, T) sums to outputs and the denominators that were used."""
  out, denominator = summed[:, :-1], summed[:, -1:]
  if not spec.normalize:
    return out, jnp.ones_like(denominator)
  floor = jnp.asarray(spec.min_denominator, summed.dtype)
  small = jnp.abs(denominator) < floor
  least = jnp.where(denominator < 0, -floor, floor)
  denominator = jnp.where(small, least, denominator)
  # Nothing seen: no weights, and 0 for an output.
  safe = jnp.where(denominator == 0, 1, denominator)
  return out / safe, safe


def divide_bwd(
  cotangent: jax.Array, out: jax.Array, denominator: jax.Array, spec: Spec
) -> jax.Array:
  """Cotangent of the sums (P, v, G, T)."""
  if not spec.normalize:
    return jnp.concatenate([cotangent, jnp.zeros_like(cotangent[:, :1])], 1)
  last = -(cotangent * out).sum(1, keepdims=True)
  # A denominator at its floor is a constant.
  floor = jnp.asarray(spec.min_denominator, out.dtype)
  last = jnp.where(jnp.abs(denominator) <= floor, 0, last)
  return jnp.concatenate([cotangent, last], 1) / denominator


def _causal_sums(
  query: jax.Array, key: jax.Array, value: jax.Array, spec: Spec
) -> jax.Array:
  size, d = query.shape[3], key.shape[1]
  cut = _chunks.staircase(query, value, spec)
  arrays = tuple(cut.fold(x) for x in (query, key, value))

  def step(total: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
    q, k, v = x
    part = _chunks.outer(spec.features(k), v, spec)
    before, total = cut.sums_before(part, total)
    phi = spec.features(_chunks.flat(q))
    seen = _chunks.project(spec.weigh(before, d), phi, spec)
    weights = _chunks.local_weights(q, k, spec)
    inside = _chunks.products("pvs,pgts->pvgt", v, weights, spec)
    return total, seen.reshape(inside.shape) + inside

  shape = (key.shape[0], spec.num_features(d), value.shape[1])
  start = _chunks.zeros(shape, query, key, value)
  return cut.unfold(lax.scan(step, start, arrays)[1], size)
