r"""Tensor attention on a TPU: what is done with one tile.

A tile is one first key, on a block of second keys and a block of queries of all
heads of a group. Scores lie as (second keys, rows), as those of exact attention
do: with keys :math:`k^1_j \circ k^2_l`, made in VMEM, it is a tile of that.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._compat import pl
from pallas_kernels._products import FIRST, LAST, MIDDLE, dot

ZERO = np.int32(0)


class Plan(NamedTuple):
  """Static sizes of one kernel.

  Attributes:
    group: G, query heads to a key head.
    block_q: queries of a head in a tile.
    block_1: first keys of a step.
    block_2: second keys in a tile.
    num_q: blocks of queries.
    num_1: blocks of first keys.
    num_2: blocks of second keys.
    length_q: queries, of all calls.
    length_1: first keys, of all calls.
    length_2: second keys.
    is_causal: query t sees the pairs of keys 0 to t.
    masked: whether any key may be hidden from all queries.
    precision: of the matrix products.
  """

  group: int
  block_q: int
  block_1: int
  block_2: int
  num_q: int
  num_1: int
  num_2: int
  length_q: int
  length_1: int
  length_2: int
  is_causal: bool
  masked: bool
  precision: Any

  @property
  def rows(self) -> int:
    """Queries of all heads in a tile."""
    return self.group * self.block_q

  def first_query(self, starts: Any, i: Any) -> Any:
    """Position of the first query of a block."""
    return starts[0] + i * np.int32(self.block_q)

  def num_first(self, starts: Any, i: Any) -> Any:
    """How many blocks of first keys a block of queries sees."""
    seen = self.keys_seen(starts, i, self.length_1) - starts[1]
    return _blocks(seen, self.block_1, self.num_1)

  def num_second(self, starts: Any, i: Any) -> Any:
    """How many blocks of second keys a block of queries sees."""
    seen = self.keys_seen(starts, i, self.length_2)
    return _blocks(seen, self.block_2, self.num_2)

  def lowest_query(self, starts: Any, c: Any) -> Any:
    """First of the blocks of queries that see a block of second keys."""
    if not self.is_causal:
      return ZERO
    before = c * np.int32(self.block_2) - starts[0]
    return lax.div(lax.max(before, ZERO), np.int32(self.block_q))

  def keys_seen(self, starts: Any, i: Any, length: int) -> Any:
    """Keys that the last query of a block sees, of ``length``."""
    if not self.is_causal:
      return np.int32(length)
    behind = self.first_query(starts, i) + np.int32(self.block_q)
    return lax.min(np.int32(length), behind)


def _blocks(size: Any, block: int, most: int) -> Any:
  """How many blocks hold ``size`` keys; at least one."""
  num = lax.div(size + np.int32(block - 1), np.int32(block))
  return lax.max(lax.min(num, np.int32(most)), np.int32(1))


class Refs(NamedTuple):
  """Inputs of every kernel, one block each.

  Attributes:
    query: (rows, H).
    key1: (block_1, H).
    key2: (block_2, H).
    value1: (block_1, Hv).
    value2: (block_2, Hv).
    since1: (block_1, 1) position of the first query that sees a key.
    since2: (block_2, 1).
  """

  query: Any
  key1: Any
  key2: Any
  value1: Any
  value2: Any
  since1: Any
  since2: Any


class Step(NamedTuple):
  """A step of a grid: block i of queries, a of first and c of second keys."""

  plan: Plan
  starts: Any
  refs: Refs
  i: Any
  a: Any
  c: Any

  def visit(self, body: Callable[[Any, Any], None]) -> None:
    """Calls ``body(j, edge)`` for each first key that some query sees.

    ``edge`` says whether some pair is hidden from some query.
    """
    plan, first = self.plan, self.plan.first_query(self.starts, self.i)
    offset = self.starts[1] + self.a * np.int32(plan.block_1)
    block = np.int32(plan.block_1)

    def within(seen: Any) -> Any:
      return lax.max(lax.min(seen - offset, block), ZERO)

    count = within(plan.keys_seen(self.starts, self.i, plan.length_1))
    end = (self.c + np.int32(1)) * np.int32(plan.block_2)
    inner = count
    if plan.is_causal:
      inner = within(first + np.int32(1))
      inner = jnp.where(end > first + np.int32(1), ZERO, inner)
    if plan.masked:
      inner = ZERO
    elif plan.length_2 % plan.block_2:
      inner = jnp.where(end > np.int32(plan.length_2), ZERO, inner)
    inner = lax.min(inner, count)
    if not plan.masked:
      _loop(ZERO, inner, lambda j: body(j, False))
    if plan.masked or plan.is_causal or plan.length_2 % plan.block_2:
      _loop(inner, count, lambda j: body(j, True))

  def pair(self, one: Any, other: Any, j: Any) -> tuple[jax.Array, jax.Array]:
    """(1, H) of first ones, and its products (block_2, H) with second ones."""
    row = one[pl.ds(j, 1), :]
    return row, _narrow(other[...].astype(row.dtype) * row, other)

  def logits(self, key: jax.Array, j: Any, edge: bool) -> jax.Array:
    """(block_2, rows), -inf where hidden."""
    logits = self.dot(key, self.refs.query[...].astype(key.dtype), LAST)
    if not edge:
      return logits
    since = jnp.maximum(self.refs.since2[...], self.refs.since1[pl.ds(j, 1), :])
    return jnp.where(since <= self._positions(), logits, -jnp.inf)

  def dot(self, a: jax.Array, b: jax.Array, contract: Any) -> jax.Array:
    """A product of matrices, in the accumulator's dtype."""
    return dot(a, b, contract, self.plan.precision)

  def _positions(self) -> jax.Array:
    """(1, rows) of the queries; 0 if all see the same keys."""
    plan = self.plan
    if not plan.is_causal:
      return jnp.zeros((1, plan.rows), jnp.int32)
    at = lax.broadcasted_iota(jnp.int32, (1, plan.block_q), 1)
    at += plan.first_query(self.starts, self.i)
    return jnp.concatenate([at] * plan.group, 1)


def _narrow(wide: jax.Array, like: Any) -> jax.Array:
  """What was computed, as it is multiplied: bfloat16 as such."""
  return wide.astype(like.dtype) if like.dtype == jnp.bfloat16 else wide


def _loop(start: Any, stop: Any, body: Callable[[Any], None]) -> None:
  def step(j: Any, _: None) -> None:
    body(j)

  lax.fori_loop(start, stop, step, None)


def forward_kernel(plan: Plan, starts: Any, *refs: Any) -> None:
  """Grid (B, K, num_q, num_1, num_2): pairs of blocks of keys pass by."""
  inputs, (out_ref, lse_ref) = Refs(*refs[:7]), refs[7:9]
  acc_ref, top_ref, total_ref = refs[9:]
  i, one, two = (pl.program_id(axis) for axis in (2, 3, 4))
  num_first = plan.num_first(starts, i)
  num_second = plan.num_second(starts, i)
  step = Step(plan, starts, inputs, i, one, two)

  @pl.when((one == 0) & (two == 0))
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)
    top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)

  def add(j: Any, edge: bool) -> None:
    _, key = step.pair(inputs.key1, inputs.key2, j)
    _, value = step.pair(inputs.value1, inputs.value2, j)
    logits = step.logits(key, j, edge)
    before = top_ref[...]
    top = jnp.maximum(before, logits.max(0, keepdims=True))
    # Nothing seen yet: any finite shift makes exp(-inf - shift) 0, not NaN.
    shift = jnp.where(top == -jnp.inf, jnp.zeros_like(top), top)
    weights, keep = jnp.exp(logits - shift), jnp.exp(before - shift)
    top_ref[...] = top
    total_ref[...] = keep * total_ref[...] + weights.sum(0, keepdims=True)
    part = step.dot(value, _narrow(weights, value), FIRST)
    acc_ref[...] = keep * acc_ref[...] + part

  pl.when((one < num_first) & (two < num_second))(lambda: step.visit(add))

  @pl.when((one == plan.num_1 - 1) & (two == plan.num_2 - 1))
  def _():
    total = total_ref[...]
    none = total == 0
    safe = jnp.where(none, jnp.ones_like(total), total)
    out_ref[...] = (acc_ref[...] / safe).T
    lse = top_ref[...] + jnp.log(safe)
    lse_ref[...] = jnp.where(none, jnp.full_like(lse, -jnp.inf), lse)


def backward_kernel(plan: Plan, starts: Any, *refs: Any) -> None:
  """Grid (B, K, num_2, num_q): queries pass by a block of second keys.

  Gradients of queries and first keys stay until all have passed.
  """
  inputs, (bar_ref, lse_ref, delta_ref) = Refs(*refs[:7]), refs[7:10]
  query_bar, key1_bar, key2_bar, value1_bar, value2_bar = refs[10:]
  c, step_q = pl.program_id(2), pl.program_id(3)
  i = plan.lowest_query(starts, c) + step_q
  step = Step(plan, starts, inputs, i, ZERO, c)

  @pl.when((c == 0) & (step_q == 0))
  def _():
    for ref in (query_bar, key1_bar, value1_bar):
      ref[...] = jnp.zeros_like(ref)

  @pl.when(step_q == 0)
  def _():
    for ref in (key2_bar, value2_bar):
      ref[...] = jnp.zeros_like(ref)

  def add(j: Any, edge: bool) -> None:
    key1, key = step.pair(inputs.key1, inputs.key2, j)
    value1, value = step.pair(inputs.value1, inputs.value2, j)
    query, out_bar = (y[...].astype(key.dtype) for y in (inputs.query, bar_ref))
    weights = jnp.exp(step.logits(key, j, edge) - lse_ref[...])
    bar = weights * (step.dot(value, out_bar, LAST) - delta_ref[...])
    weights, bar = _narrow(weights, query), _narrow(bar, query)
    query_bar[i] += step.dot(key, bar, FIRST)
    # Of pairs: each is one of both its factors.
    for pair_bar, row, other, one_bar, two_bar in (
      (step.dot(bar, query, MIDDLE), key1, inputs.key2, key1_bar, key2_bar),
      (
        step.dot(weights, out_bar, MIDDLE),
        value1,
        inputs.value2,
        value1_bar,
        value2_bar,
      ),
    ):
      two_bar[...] += pair_bar * row
      product = pair_bar * other[...].astype(row.dtype)
      one_bar[pl.ds(j, 1), :] += product.sum(0, keepdims=True)

  holds = plan.first_query(starts, i) < np.int32(plan.length_q)
  pl.when(holds & (i < plan.num_q))(lambda: step.visit(add))
