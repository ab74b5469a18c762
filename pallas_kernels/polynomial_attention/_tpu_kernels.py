"""Polynomial attention on a TPU: what is done with one chunk of tokens.

Features lie as (m, tokens) and exist for one chunk at a time; the state is (m,
Hv + 1), the sum over tokens of their features times what they carry.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import pl
from pallas_kernels._products import FIRST, LAST, MIDDLE, dot
from pallas_kernels.polynomial_attention.operands import products


class Tile(NamedTuple):
  """Static facts of a kernel.

  Attributes:
    coefficients: of the polynomial.
    radius: as in ``Options``.
    precision: of the matrix products.
  """

  coefficients: tuple[float, ...]
  radius: float | None
  precision: Any

  def dot(self, a: jax.Array, b: jax.Array, contract: Any) -> jax.Array:
    """A product of matrices."""
    return dot(a, b, contract, self.precision)

  def features(self, ref: Any, x: jax.Array) -> None:
    """Writes the monomials (m, c) of x (d, c)."""
    dim, degree = x.shape[0], len(self.coefficients) - 1
    ref[0:1] = jnp.ones_like(x[:1])
    if degree:
      ref[1 : 1 + dim] = x
    for variable, before, at, size in products(dim, degree):
      factors = ref[before : before + size]
      ref[at : at + size] = factors * x[variable : variable + 1]

  def pull(self, bar_ref: Any, features: Any, bars: Any, x: jax.Array) -> None:
    """Adds the cotangent of x (d, c), given that of its features.

    Args:
      bar_ref: what it is added to.
      features: their reference.
      bars: reference of their cotangents; those of low degree are added to.
      x: the chunk.
    """
    dim, degree = x.shape[0], len(self.coefficients) - 1
    for variable, before, at, size in reversed(products(dim, degree)):
      one, below = slice(variable, variable + 1), slice(before, before + size)
      bar = bars[at : at + size]
      bar_ref[one] += (bar * features[below]).sum(0, keepdims=True)
      bars[below] += bar * x[one]
    if degree:
      bar_ref[...] += bars[1 : 1 + dim]

  def local(
    self, query: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Weights of the pairs in a chunk (keys, queries), and their slopes."""
    logits = self.dot(key, query, FIRST)
    slopes = [j * c for j, c in enumerate(self.coefficients)][1:]
    both = _polynomial(self.coefficients, logits), _polynomial(slopes, logits)
    if self.radius is not None:
      # Beyond the radius exp would outgrow the weights of all other chunks.
      inside = jnp.abs(logits) <= self.radius
      exact = jnp.exp(jnp.where(inside, logits, jnp.zeros_like(logits)))
      both = tuple(jnp.where(inside, exact, y) for y in both)
    seen = _rows(logits, 0) <= _rows(logits, 1)
    weights, slopes = (jnp.where(seen, y, jnp.zeros_like(y)) for y in both)
    return weights, slopes

  def add(
    self, state: Any, weights: Any, features: Any, carried: jax.Array
  ) -> None:
    """Adds to a state what tokens with these features carry."""
    part = self.dot(features[...], carried, LAST)
    state[...] += part if weights is None else weights[...] * part


def _rows(x: jax.Array, axis: int) -> jax.Array:
  return lax.broadcasted_iota(jnp.int32, x.shape, axis)


def _polynomial(coefficients: Any, x: jax.Array) -> jax.Array:
  if not coefficients:
    return jnp.zeros_like(x)
  total = jnp.full_like(x, coefficients[-1])
  for c in coefficients[-2::-1]:
    total = total * x + jnp.asarray(c, x.dtype)
  return total


def _divide(sums: jax.Array, out_ref: Any, denominator_ref: Any) -> None:
  total = sums[-1:]
  # Nothing seen: no weights, and 0 for an output.
  safe = jnp.where(total == 0, jnp.ones_like(total), total)
  denominator_ref[...] = safe
  out_ref[...] = sums[:-1] / safe


def _clear(ref: Any) -> None:
  ref[...] = jnp.zeros_like(ref)


class _Step(NamedTuple):
  """Where in the grid (P, chunks, heads) a step is."""

  first: Any
  first_head: Any
  last_head: Any


def _step() -> _Step:
  chunk, head = pl.program_id(1), pl.program_id(2)
  first_head = head == 0
  last_head = head == pl.num_programs(2) - 1
  return _Step((chunk == 0) & first_head, first_head, last_head)


def causal_forward(tile: Tile, inputs: Any, outputs: Any, scratch: Any) -> None:
  """Chunks in order: the state holds the keys of all chunks before."""
  weights, query_ref, key_ref, value_ref = inputs
  state, features = scratch
  step, query, key, value = (
    _step(),
    query_ref[...],
    key_ref[...],
    value_ref[...],
  )
  pl.when(step.first)(lambda: _clear(state))
  tile.features(features, query)
  sums = tile.dot(state[...], features[...], FIRST)
  inside = tile.local(query, key)[0]
  _divide(sums + tile.dot(value, inside, MIDDLE), *outputs)

  @pl.when(step.last_head)
  def _():
    tile.features(features, key)
    tile.add(state, weights, features, value)


def causal_query(tile: Tile, inputs: Any, outputs: Any, scratch: Any) -> None:
  """Chunks in order, as forward: cotangents of the queries."""
  weights, query_ref, key_ref, value_ref, bar_ref = inputs
  (query_bar,) = outputs
  state, features, bars = scratch
  step, query, key, value = (
    _step(),
    query_ref[...],
    key_ref[...],
    value_ref[...],
  )
  bar = bar_ref[...]
  pl.when(step.first)(lambda: _clear(state))
  slopes = tile.local(query, key)[1]
  slopes *= tile.dot(value, bar, FIRST)
  query_bar[...] = tile.dot(key, slopes, MIDDLE)
  tile.features(features, query)
  bars[...] = tile.dot(state[...], bar, MIDDLE)
  tile.pull(query_bar, features, bars, query)

  @pl.when(step.last_head)
  def _():
    tile.features(features, key)
    tile.add(state, weights, features, value)


def causal_key_value(
  tile: Tile, inputs: Any, outputs: Any, scratch: Any
) -> None:
  """Chunks from the last: the state holds the queries of all behind."""
  weights, query_ref, key_ref, value_ref, bar_ref = inputs
  key_bar, value_bar = outputs
  state, features, bars = scratch
  step, query, key, value = (
    _step(),
    query_ref[...],
    key_ref[...],
    value_ref[...],
  )
  bar = bar_ref[...]
  pl.when(step.first)(lambda: _clear(state))

  @pl.when(step.first_head)
  def _():
    _clear(key_bar)
    _read_keys(tile, key, value, state, key_bar, value_bar, features, bars)

  inside, slopes = tile.local(query, key)
  slopes *= tile.dot(value, bar, FIRST)
  key_bar[...] += tile.dot(query, slopes, LAST)
  value_bar[...] += tile.dot(bar, inside, LAST)
  tile.features(features, query)
  tile.add(state, weights, features, bar)


def _read_keys(
  tile: Tile, key: Any, value: Any, state: Any, key_bar: Any, value_bar: Any,
  features: Any, bars: Any,
) -> None:  # fmt: skip
  tile.features(features, key)
  value_bar[...] = tile.dot(state[...], features[...], FIRST)
  bars[...] = tile.dot(state[...], value, MIDDLE)
  tile.pull(key_bar, features, bars, key)


def moments(tile: Tile, inputs: Any, outputs: Any, scratch: Any) -> None:
  """The state of all tokens, unweighted."""
  token_ref, carried_ref = inputs
  (state,), (features,) = outputs, scratch
  pl.when(_step().first)(lambda: _clear(state))
  tile.features(features, token_ref[...])
  tile.add(state, None, features, carried_ref[...])


def read(tile: Tile, inputs: Any, outputs: Any, scratch: Any) -> None:
  """Outputs of queries, from the weighted state of all keys."""
  state, query_ref = inputs
  (features,) = scratch
  tile.features(features, query_ref[...])
  _divide(tile.dot(state[...], features[...], FIRST), *outputs)


def full_query(tile: Tile, inputs: Any, outputs: Any, scratch: Any) -> None:
  """Cotangents of the queries, and of the weighted state."""
  state, query_ref, bar_ref = inputs
  query_bar, state_bar = outputs
  features, bars = scratch
  query, bar = query_ref[...], bar_ref[...]
  pl.when(_step().first)(lambda: _clear(state_bar))
  tile.features(features, query)
  tile.add(state_bar, None, features, bar)
  bars[...] = tile.dot(state[...], bar, MIDDLE)
  _clear(query_bar)
  tile.pull(query_bar, features, bars, query)


def full_key_value(tile: Tile, inputs: Any, outputs: Any, scratch: Any) -> None:
  """Cotangents of keys and values, from that of the state."""
  state, key_ref, value_ref = inputs
  key_bar, value_bar = outputs
  _clear(key_bar)
  _read_keys(
    tile, key_ref[...], value_ref[...], state, key_bar, value_bar, *scratch
  )
