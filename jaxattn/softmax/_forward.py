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
    query, factor = _call.scaled_query(group, i)

    def key_block(
      j: Any, state: online.OnlineSoftmax, edge: bool
    ) -> online.OnlineSoftmax:
      key, value = _call.key_value(group, i, j, edge)
      logits = _call.dot(query, key, spec, dtype)
      logits = _call.mask_logits(logits, factor, group, i, j, edge=edge)
      return online.online_softmax_update(
        state, logits, value, precision=spec.precision
      )

    nothing = online.OnlineSoftmax(
      full((p, plan.rows, hv), 0),
      full((p, plan.rows), 0),
      full((p, plan.rows), -jnp.inf),
    )
    first = plan.queries.start(i) + _call.offset(x)
    last = first + plan.queries.block - 1
    visit = _tiles.visit(plan.keys, first, last, spec.band)
    state = _tiles.walk(visit, key_block, nothing)
    out, lse = online.online_softmax_finalize(state)
    at = _tiles.at(0, 0, plan.queries.start(i), 0)
    shape = (p, g, plan.queries.block, -1)
    return (
      lax.dynamic_update_slice(carry[0], out.reshape(shape), at),
      lax.dynamic_update_slice(carry[1], lse.reshape(shape), at),
    )

  start = full((p, g, t, hv), 0), full((p, g, t, 1), 0)
  return _tiles.loop(0, plan.queries.num_blocks, query_block, start)
