"""Gradients of attention by prefix sums of features."""

import functools
from typing import Any

import jax
from jax import lax

from jaxattn.features import _chunks
from jaxattn.features._chunks import Blocks, Spec


def full_bwd(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  total: jax.Array,
  summed: jax.Array,
  spec: Spec,
) -> tuple[jax.Array, ...]:
  p, d, g, t = query.shape
  rows = query.reshape(p, d, g * t), summed.reshape(p, -1, g * t)
  if spec.closed_form:
    total = _chunks.moments(key, value, spec, _chunks.pairs)
  d_query, _, d_total = pull_all(*rows, spec.weigh(total, d), spec)
  d_total = spec.weigh(d_total, d)
  if spec.closed_form:
    pairs = _chunks.moments(*rows, spec, _chunks.pairs)
    d_key, *_ = pull_all(key, value, spec.weigh(pairs, d), spec)
    d_value = _chunks.sums(key[:, :, None], d_total, spec)[:, :, 0]
  else:
    d_key, d_value, _ = pull_all(key, value, d_total, spec)
  return d_query.reshape(query.shape), d_key, d_value


def pull_all(
  x: jax.Array, v: jax.Array, weighted: jax.Array, spec: Spec
) -> tuple[jax.Array, ...]:
  """What the features of x are good for in the gradient, chunk by chunk.

  Args:
    x: (P, d, L).
    v: (P, v, L).
    weighted: (P, m, v), or (P, m, d * v) for the closed form.
    spec: static facts.

  Returns:
    Gradient (P, d, L) of ``sum_c phi(x_c) . weighted . v_c``; the sums
    ``weighted^T phi(x)`` (P, v, L), None for the closed form; and the moments
    (P, m, v) of x and v.
  """
  size = x.shape[2]
  chunk, num = _chunks.chunk_sizes(x, spec, weighted.shape[2])
  x, v = (_chunks.fit(y, chunk * num, 2) for y in (x, v))

  def step(total: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
    x_chunk, v_chunk = _chunks.at(x, i, chunk), _chunks.at(v, i, chunk)
    d_x, sums, phi = _pull_chunk(x_chunk, v_chunk, weighted, spec)
    # Of all tokens, those of the closed form would be d times the values.
    kept = None if spec.closed_form else sums
    return total + _chunks.outer(phi, v_chunk, spec), (d_x, kept)

  start = _chunks.zeros((*weighted.shape[:2], v.shape[1]), x, v, weighted)
  total, parts = _chunks.scan(step, start, num)
  d_x, sums = jax.tree.map(lambda y: _chunks.join(y, size), parts)
  return d_x, sums, total


def _pull_chunk(
  x: jax.Array, v: jax.Array, weighted: jax.Array, spec: Spec
) -> tuple[jax.Array, jax.Array, Blocks]:
  features = spec.features
  if spec.sketch is None:
    # Monomials are looked up twice: what both uses share XLA would write out on
    # a CPU, and take twice as long.
    features = jax.checkpoint(features)
  phi, pull = jax.vjp(features, x)
  sums = _chunks.project(weighted, phi, spec)
  if spec.closed_form:
    # The derivative of exp is exp: weights, times the other vector of a pair.
    by_dim = sums.reshape(*x.shape[:2], *v.shape[1:])
    return (by_dim * v[:, None]).sum(2), sums, phi
  return pull(_chunks.back(weighted, v, phi, spec))[0], sums, phi


def causal_bwd(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  summed: jax.Array,
  spec: Spec,
) -> tuple[jax.Array, ...]:
  size, d = query.shape[3], key.shape[1]
  cut = _chunks.staircase(query, value, spec)
  arrays = tuple(cut.fold(x) for x in (query, key, value, summed))
  # What the features are multiplied with: for keys first, for values last.
  columns = (_chunks.values,)
  if spec.closed_form:
    columns = (_chunks.pairs, _chunks.values)
  starts = tuple(
    _chunks.no_moments(column, key, value, spec, query, key, value, summed)
    for column in columns
  )

  def forward(total: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
    q, k, v, dy = x
    part = _chunks.outer(spec.features(k), columns[0](k, v), spec)
    before, total = cut.sums_before(part, total)
    weighted = spec.weigh(before, d)
    d_q, *_ = _pull_chunk(_chunks.flat(q), _chunks.flat(dy), weighted, spec)
    return total, d_q.reshape(q.shape)

  def backward(
    totals: tuple[jax.Array, ...], x: Any
  ) -> tuple[Any, tuple[jax.Array, ...]]:
    q, k, v, dy = x
    d_q, d_k, d_v = _local_bwd(q, k, v, dy, spec)
    q, dy = _chunks.flat(q), _chunks.flat(dy)
    phi = spec.features(q)
    parts = (_chunks.outer(phi, column(q, dy), spec) for column in columns)
    sums = [
      cut.sums_before(part, total, reverse=True)
      for part, total in zip(parts, totals, strict=True)
    ]
    weighted = [spec.weigh(later, d) for later, _ in sums]
    d_k_later, _, phi = _pull_chunk(k, v, weighted[0], spec)
    d_v += _chunks.project(weighted[-1], phi, spec)
    return tuple(total for _, total in sums), (d_q, d_k + d_k_later, d_v)

  d_query = lax.scan(forward, starts[0], arrays)[1]
  grads = lax.scan(backward, starts, arrays, reverse=True)[1]
  return tuple(cut.unfold(x, size) for x in (d_query + grads[0], *grads[1:]))


def _local_bwd(
  q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array, spec: Spec
) -> tuple[jax.Array, ...]:
  """Gradients of q, k and v from the pairs in a chunk."""
  local_weights = functools.partial(_chunks.local_weights, spec=spec)
  weights, pull = jax.vjp(local_weights, q, k)
  d_weights = _chunks.products("pvs,pvgt->pgts", v, dy, spec)
  if spec.closed_form:
    d_logits = weights * d_weights
    d_q = _chunks.products("pgts,pds->pdgt", d_logits, k, spec)
    d_k = _chunks.products("pgts,pdgt->pds", d_logits, q, spec)
  else:
    d_q, d_k = pull(d_weights)
  return d_q, d_k, _chunks.products("pvgt,pgts->pvs", dy, weights, spec)
