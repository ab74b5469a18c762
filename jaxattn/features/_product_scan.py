r"""Attention to tuples of tokens, one from each of several key sequences.

Where the kernel of a query and a tuple is an inner product of features with the
*product* of the features of its keys, and its value the product of its values,

.. math::

  M_r = \sum_j \phi(k_{rj}) [v_{rj}, 1]^\top, \qquad
  [n_i, d_i] = \phi(q_i)^\top (w \circ M_1 \circ \dots \circ M_k), \qquad
  o_i = n_i / d_i,

a sum over all tuples is a product of sums over tokens. Causal attention, which
sees the tuples whose tokens all come no later, takes the products of running
sums; unlike those of one key sequence they do not split into what comes before
a chunk and what is inside.

Arrays are held as in :mod:`jaxattn.features._scan`.
"""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _compat
from jaxattn.features import _chunks, _scan, _scan_grad
from jaxattn.features._chunks import Spec

# Tokens of a chunk of causal attention, and numbers in the running sums that
# exist at a time, m (Hv + 1) for each token: half a MiB of float32.
_CAUSAL_CHUNK = 16
_CAUSAL_SUMS = 1 << 17

Arrays = tuple[jax.Array, ...]


def attend(
  query: jax.Array, keys: Arrays, values: Arrays, spec: Spec
) -> jax.Array:
  """Attention in the public layout, all in the accumulation dtype.

  Args:
    query: (B, T, N, d), scaled.
    keys: of (B, S, K, d), 0 where hidden.
    values: of (B, S, K, v), with the column of ones last; 0 where hidden.
    spec: static facts.

  Returns:
    (B, T, N, v - 1); 0 for a query that sees no tuple.
  """
  heads, dim = keys[0].shape[2:]
  num_features = spec.num_features(dim)
  if spec.is_causal:
    num_features *= values[0].shape[3]
    spec = spec._replace(chunk_size=spec.chunk_size or _CAUSAL_CHUNK)
  operands = (
    _scan.by_pair(query, heads),
    tuple(map(_scan.tokens_last, keys)),
    tuple(map(_scan.tokens_last, values)),
  )
  attend_group = functools.partial(_attend_group, spec)
  out = _scan.over_groups(attend_group, operands, num_features, spec)
  return _scan.by_head(out, query)


def _attend_group(spec: Spec, operands: Any) -> jax.Array:
  query, keys, values = operands
  if spec.is_causal:
    return _scan.divide(_causal_sums(query, keys, values, spec), spec)[0]
  return _attend(query, keys, values, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(
  query: jax.Array, keys: Arrays, values: Arrays, spec: Spec
) -> jax.Array:
  """(P, d, G, T), of (P, d, S), of (P, v, S) -> (P, v - 1, G, T)."""
  return _attend_fwd(query, keys, values, spec)[0]


def _attend_fwd(
  query: jax.Array, keys: Arrays, values: Arrays, spec: Spec
) -> tuple[jax.Array, Any]:
  totals = [
    _chunks.moments(k, v, spec) for k, v in zip(keys, values, strict=True)
  ]
  weighted = spec.weigh(_product(totals), query.shape[1])
  out, denominator = _scan.divide(_chunks.sums(query, weighted, spec), spec)
  return out, (query, keys, values, totals, out, denominator)


def _attend_bwd(
  spec: Spec, residuals: Any, cotangent: jax.Array
) -> tuple[Any, ...]:
  query, keys, values, totals, out, denominator = residuals
  summed = _scan.divide_bwd(cotangent, out, denominator, spec)
  (p, d, g, t), pairs = query.shape, list(zip(keys, values, strict=True))
  rows = query.reshape(p, d, g * t), summed.reshape(p, -1, g * t)
  tables = totals
  if spec.closed_form:
    tables = [_chunks.moments(k, v, spec, _chunks.pairs) for k, v in pairs]
  weighted = spec.weigh(_product(tables), d)
  d_query, _, d_total = _scan_grad.pull_all(*rows, weighted, spec)
  d_total = spec.weigh(d_total, d)
  d_table = d_total
  if spec.closed_form:
    d_table = spec.weigh(_chunks.moments(*rows, spec, _chunks.pairs), d)
  grads: list[tuple[jax.Array, jax.Array]] = []
  for r, (k, v) in enumerate(pairs):
    others = _product([d_table, *tables[:r], *tables[r + 1 :]])
    d_key, d_value, _ = _scan_grad.pull_all(k, v, others, spec)
    if spec.closed_form:
      others = _product([d_total, *totals[:r], *totals[r + 1 :]])
      d_value = _chunks.sums(k[:, :, None], others, spec)[:, :, 0]
    grads.append((d_key, d_value))
  d_keys, d_values = map(tuple, zip(*grads, strict=True))
  found = d_query.reshape(query.shape), d_keys, d_values
  return jax.tree.map(_compat.sum_like, found, (query, keys, values))


_attend.defvjp(_attend_fwd, _attend_bwd)


def _product(tables: list[jax.Array]) -> jax.Array:
  return functools.reduce(operator.mul, tables)


def _causal_sums(
  query: jax.Array, keys: Arrays, values: Arrays, spec: Spec
) -> jax.Array:
  """(P, v, G, T) sums over the tuples that each query sees."""
  length = query.shape[3]
  shape = (
    query.shape[0],
    spec.num_features(query.shape[1]),
    values[0].shape[1],
  )
  cut = _staircase(query, shape, spec)

  def step(totals: Arrays, x: Any) -> tuple[Arrays, jax.Array]:
    q, ks, vs = x
    running: list[jax.Array] = []
    after: list[jax.Array] = []
    for total, k, v in zip(totals, ks, vs, strict=True):
      inside = _prefix_sums(k, v, spec)
      before, total = cut.sums_before(inside[..., -1], total)
      running.append(before[..., None] + inside)
      after.append(total)
    weights = _product(running)
    # Head by head: a fifth axis makes this loop ten times slower on a CPU.
    seen = [_seen(q[:, :, g], weights, spec) for g in range(q.shape[2])]
    return tuple(after), jnp.stack(seen, 2)

  arrays = jax.tree.map(cut.fold, (query, keys, values))
  start = tuple(_chunks.zeros(shape, query, *keys, *values) for _ in keys)
  return cut.unfold(_scan_in_two(step, start, arrays), length)


def _staircase(
  query: jax.Array, shape: tuple[int, int, int], spec: Spec
) -> _chunks.Staircase:
  """Chunks of one running sum for each token, some of them at a time."""
  length = query.shape[3]
  chunk = min(spec.chunk_size or _CAUSAL_CHUNK, length)
  num = -(-length // chunk)
  most = _CAUSAL_SUMS // (math.prod(shape) * chunk)
  steps = -(-num // max(1, min(num, most)))
  return _chunks.Staircase(steps, -(-num // steps), chunk)


def _prefix_sums(k: jax.Array, v: jax.Array, spec: Spec) -> jax.Array:
  """(P, d, c), (P, v, c) -> (P, m, v, c) sums up to each token of a chunk."""
  phi = jnp.concatenate(spec.features(k), 1)
  each = phi[:, :, None] * v[:, None]
  p, m, width, c = each.shape
  # Three times as fast as cumsum. Of as many digits, whatever the device.
  ones = jnp.tri(c, dtype=each.dtype).T
  out = jnp.matmul(
    each.reshape(p, m * width, c), ones, precision=lax.Precision.HIGHEST
  )
  return out.reshape(each.shape)


def _seen(q: jax.Array, sums: jax.Array, spec: Spec) -> jax.Array:
  """(P, d, c), (P, m, v, c) -> (P, v, c), token by token."""
  phi = spec.weigh(jnp.concatenate(spec.features(q), 1), q.shape[1])
  return (phi[:, :, None] * sums).sum(1)


def _scan_in_two(step: Any, start: Any, arrays: Any) -> jax.Array:
  """What ``step`` returns, (num, ...), by a scan of scans.

  For the gradient only the carries between the outer steps are kept, and those
  inside one of them: twice the square root of as many as there are steps. All
  else is computed again.
  """
  num = jax.tree.leaves(arrays)[0].shape[0]
  inner = math.isqrt(num - 1) + 1
  outer = -(-num // inner)

  def fold(x: jax.Array) -> jax.Array:
    x = _chunks.fit(x, outer * inner, 0)
    return x.reshape(outer, inner, *x.shape[1:])

  def steps(carry: Any, x: Any) -> tuple[Any, jax.Array]:
    return lax.scan(jax.checkpoint(step), carry, x)

  arrays = jax.tree.map(fold, arrays)
  out = lax.scan(jax.checkpoint(steps), start, arrays)[1]
  return out.reshape(outer * inner, *out.shape[2:])[:num]
