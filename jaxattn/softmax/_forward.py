"""Forward pass of tiled exact attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _compat
from jaxattn.numerics._dtypes import accumulator
from jaxattn.softmax import _call, _tiles, online


def forward(
  x: _call.Operands, *, spec: _call.Spec, cpu: bool
) -> tuple[jax.Array, jax.Array]:
  """Output and log-sum-exp.

  Args:
    x: the operands.
    spec: static facts.
    cpu: whether to plan for a CPU.

  Returns:
    (B, T, K, G, Hv) of the queries' dtype and (B, T, K, G) of the
    accumulator's.
  """
  plan = _call.plan(x, spec, cpu=cpu, backward=False)
  b, t, k, g, _ = x.query.shape
  full = functools.partial(
    _compat.full_varying,
    fill=0,
    dtype=accumulator(x.query.dtype),
    axes=_compat.varying_axes(x),
  )

  def step(group: _call.Group, carry: Any) -> Any:
    out, lse = _group_forward(group)
    return _call.put(carry[0], out, group), _call.put(carry[1], lse, group)

  start = full((b, t, k, g, x.value.shape[-1])), full((b, t, k, g, 1))
  out, lse = _call.over_groups(x, spec, plan, step, start, cpu=cpu)
  return out.astype(x.query.dtype), lse[..., 0]


def _group_forward(group: _call.Group) -> tuple[jax.Array, jax.Array]:
  """(P, G, T, Hv) and (P, G, T, 1)."""
  x, spec, plan = group.call, group.spec, group.plan
  p, g, t, _ = group.query.shape
  hv = group.value.shape[-1]
  dtype = accumulator(x.query.dtype)
  full = functools.partial(
    _compat.full_varying, dtype=dtype, axes=_compat.varying_axes(x)
  )

  def query_block(i: Any, carry: Any) -> Any:
    query = _call.scaled_query(group, i)

    def key_block(j: Any, state: online.OnlineSoftmax, edge: bool) -> Any:
      return _add_keys(state, query, group, i, j, edge)

    nothing = online.OnlineSoftmax(
      full((p, plan.rows, hv), 0),
      full((p, plan.rows), 0),
      full((p, plan.rows), -jnp.inf),
    )
    first = plan.queries.start(i) + _call.offset(x)
    last = first + plan.queries.block - 1
    visit = _tiles.visit(plan.keys, first, last, spec.band)
    if plan.diagonal is None:
      state = _tiles.walk(visit, key_block, nothing)
    else:
      state = _staircase(nothing, group, i)
      state = _tiles.walk(visit.inner(), key_block, state)
    out, lse = online.online_softmax_finalize(state)
    at = _tiles.at(0, 0, plan.queries.start(i), 0)
    shape = (p, g, plan.queries.block, -1)
    return (
      lax.dynamic_update_slice(carry[0], out.reshape(shape), at),
      lax.dynamic_update_slice(carry[1], lse.reshape(shape), at),
    )

  start = full((p, g, t, hv), 0), full((p, g, t, 1), 0)
  return _tiles.loop(0, plan.queries.num_blocks, query_block, start)


def _add_keys(
  state: online.OnlineSoftmax,
  query: tuple[jax.Array, float],
  group: _call.Group,
  i: Any,
  j: Any,
  edge: bool,
) -> online.OnlineSoftmax:
  """Adds block ``j`` of the keys to the state of the queries of block ``i``."""
  spec, dtype = group.spec, accumulator(group.call.query.dtype)
  key, value = _call.key_value(group, i, j, edge)
  logits = _call.dot(query[0], key, spec, dtype)
  logits = _call.mask_logits(logits, query[1], group, i, j, edge=edge)
  return online.online_softmax_update(
    state, logits, value, precision=spec.precision
  )


def _staircase(
  state: online.OnlineSoftmax, group: _call.Group, i: Any
) -> online.OnlineSoftmax:
  """Adds the keys at the positions of block ``i`` itself, for a causal mask.

  Step by step along the diagonal: later keys meet only the queries after them.
  """
  plan, steps = group.plan, group.plan.diagonal
  assert steps is not None
  num = plan.queries.block // steps.block
  for step in range(num):
    queries = plan.queries.tail(step * steps.block)
    below = group._replace(plan=plan._replace(queries=queries, keys=steps))
    query = _call.scaled_query(below, i)
    part = _add_keys(
      _rows_below(state, below), query, below, i, i * num + step, True
    )
    state = _put_rows_below(state, part, below)
  return state


def _rows_below(state: online.OnlineSoftmax, group: _call.Group) -> Any:
  """The state of those queries of each head that the plan does not skip."""
  plan, skipped = group.plan, group.plan.queries.skipped

  def cut(y: jax.Array) -> jax.Array:
    y = y.reshape(plan.pairs, plan.query_heads, -1, *y.shape[2:])
    return y[:, :, skipped:].reshape(plan.pairs, plan.rows, *y.shape[3:])

  return jax.tree.map(cut, state)


def _put_rows_below(
  state: online.OnlineSoftmax, part: Any, group: _call.Group
) -> Any:
  """The state with these rows replaced by ``part``."""
  plan, skipped = group.plan, group.plan.queries.skipped

  def put(y: jax.Array, z: jax.Array) -> jax.Array:
    by_head = plan.pairs, plan.query_heads, -1
    total = y.reshape(*by_head, *y.shape[2:])
    total = total.at[:, :, skipped:].set(z.reshape(*by_head, *y.shape[2:]))
    return total.reshape(y.shape)

  return jax.tree.map(put, state, part)
