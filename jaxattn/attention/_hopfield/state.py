"""Patterns folded into sums of their features, and retrieval from those."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.attention._hopfield import inputs, rows
from jaxattn.attention._hopfield.dense import half_largest_square
from jaxattn.features import (
  feature_count,
  feature_moments,
  taylor_features,
)
from jaxattn.numerics._dtypes import accumulator


class HopfieldState(NamedTuple):
  r"""Patterns folded into sums of Taylor features.

  Sums over patterns: those of two sets with the same ``mean`` and ``beta`` add
  up. The degree g is read from the shapes, :math:`r = \binom{d + g}{g}`.

  Source: arXiv 2402.04520; this project.

  Attributes:
    z: (r, Hv) sum of products of features and values.
    k: (r,) sum of features; its first entry is the number of patterns.
    mean: (d,) what was subtracted from every pattern, which multiplies all
      weights of a query by one factor and makes logits smaller.
    beta: () inverse temperature, which the features hold.
    radius: () bound on the norm of the patterns less ``mean``.
    has_values: () bool, whether z holds values other than the patterns, from
      which no further update can start.
  """

  z: jax.Array
  k: jax.Array
  mean: jax.Array
  beta: jax.Array
  radius: jax.Array
  has_values: jax.Array


def hopfield_store(
  patterns: jax.Array,
  beta: float | jax.Array,
  *,
  degree: int,
  values: jax.Array | None = None,
  allow_odd: bool = False,
  chunk_size: int | None = None,
) -> HopfieldState:
  r"""Stores patterns once, for retrieval whose time does not depend on M.

  .. math:: Z = \sum_\mu \phi(\xi_\mu - \bar\xi) v_\mu^\top, \qquad
    k = \sum_\mu \phi(\xi_\mu - \bar\xi)

  The weights :math:`\phi(x) \cdot \phi(\xi)` are the Taylor polynomial of
  :math:`e^{\beta x \cdot \xi}`: what error to expect, and which degree, says
  :func:`hopfield_plan`. With float32 a degree of 6 or more loses digits where
  logits are large: at -A the sum of terms as large as e^A is e^-A.

  Args:
    patterns: (M, d), floating.
    beta: inverse temperature, > 0; may be traced.
    degree: g, even and at least 0; see ``allow_odd``.
    values: (M, Hv), of the dtype of the patterns; None = the patterns.
    allow_odd: permit odd degrees, whose weights can be negative.
    chunk_size: patterns at a time; None = 1024. Memory and speed only.

  Returns:
    The state, of the accumulation dtype.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, or there would be more
      than 2^22 features.

  Cost:
    2 M r (Hv + 2) flops, r (Hv + 1) numbers.

  Source:
    arXiv 2402.04520, section 4; this project for the shift by the mean.

  Example:
    >>> import jax
    >>> from jaxattn.attention import hopfield_retrieve, hopfield_update
    >>> patterns = jax.random.normal(jax.random.key(0), (500, 4))
    >>> state = hopfield_store(patterns, 0.05, degree=4)
    >>> dense = hopfield_update(patterns[:3], patterns, 0.05)
    >>> got = hopfield_retrieve(
    ...   patterns[:3], None, 0.05, max_steps=1, method="lowrank", state=state
    ... )
    >>> bool(abs(got - dense).max() < 1e-4)
    True
  """
  patterns = jnp.asarray(patterns)
  inputs.check_patterns(patterns)
  inputs.check_beta(beta)
  _checks.check_integer("degree", degree, 0, None)
  _checks.check_choice("allow_odd", allow_odd, (False, True))
  if degree % 2 and not allow_odd:
    raise ValueError(
      f"degree must be even unless allow_odd=True, got {degree}: weights of an "
      "odd degree change sign"
    )
  if values is not None:
    values = jnp.asarray(values)
    inputs.check_values(values, patterns)
  dtype = accumulator(patterns.dtype)
  return _store(
    patterns,
    patterns if values is None else values,
    jnp.asarray(beta, dtype),
    jnp.asarray(values is not None),
    degree=degree,
    chunk_size=chunk_size,
  )


def hopfield_add(
  state: HopfieldState, pattern: jax.Array, value: jax.Array | None = None
) -> HopfieldState:
  """Stores one pattern more, or several.

  The shift stays what it was, which is exact, if not the one that makes logits
  smallest.

  Args:
    state: of :func:`hopfield_store`.
    pattern: (d,), or (n, d) for several; floating, of a dtype that is
      accumulated in that of the state.
    value: (Hv,) or (n, Hv) if the state was stored with values, else None.

  Returns:
    The new state. Where only tracing hides that ``value`` is missing, or too
    much, its ``z`` is NaN.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``value`` is missing or too
      much.

  Cost:
    2 r (Hv + 2) flops a pattern.

  Source:
    this project.

  Example:
    >>> import jax
    >>> patterns = jax.random.normal(jax.random.key(0), (500, 4))
    >>> state = hopfield_store(patterns, 0.1, degree=2)
    >>> more = hopfield_add(state, patterns[0])
    >>> print(state.k[0], more.k[0])
    500.0 501.0
  """
  return _changed(state, pattern, value, 1)


def hopfield_forget(
  state: HopfieldState, pattern: jax.Array, value: jax.Array | None = None
) -> HopfieldState:
  """Takes a stored pattern away, or several, up to rounding.

  Args:
    state: of :func:`hopfield_store`.
    pattern: (d,), or (n, d) for several; as it was stored.
    value: (Hv,) or (n, Hv) as it was stored with the pattern, else None.

  Returns:
    The new state; its ``radius`` stays what it was. That a pattern was stored
    cannot be seen from sums, and is not checked.

  Raises:
    ValueError: as :func:`hopfield_add`; outside of ``jit`` also if none would
      be left, as "state must keep a pattern, got one with 0 left".

  Cost:
    2 r (Hv + 2) flops a pattern.

  Source:
    this project.

  Example:
    >>> import jax
    >>> patterns = jax.random.normal(jax.random.key(0), (500, 4))
    >>> state = hopfield_store(patterns, 0.1, degree=2)
    >>> less = hopfield_forget(state, patterns[:100])
    >>> print(less.k[0])
    400.0
  """
  return _changed(state, pattern, value, -1)


def check_state(state: Any) -> HopfieldState:
  state = HopfieldState(*map(jnp.asarray, state))
  _checks.check_rank("state.z", state.z, 2)
  _checks.check_shape("state.k", state.k, state.z.shape[:1], "(r,)")
  _checks.check_rank("state.mean", state.mean, 1)
  degree_of(state)
  return state


def degree_of(state: HopfieldState) -> int:
  """The degree, from the number of features."""
  rank, dim = len(state.k), len(state.mean)
  degree = 0
  while feature_count(dim, degree) < rank:
    degree += 1
  if feature_count(dim, degree) != rank:
    raise ValueError(
      f"state.k must have C({dim} + g, g) features, got {rank} of them"
    )
  return degree


def lowrank_step(state: HopfieldState, x: jax.Array) -> jax.Array:
  """One update of (L, d) queries."""
  both = jnp.concatenate([state.z, state.k[:, None]], 1)

  def part(x: jax.Array) -> jax.Array:
    sums = _products(both.T, state, x)
    return (sums[:-1] / sums[-1:]).T

  return rows.in_parts(part, len(state.k), x)


def lowrank_row(state: HopfieldState, x: jax.Array) -> jax.Array:
  """The same for one query."""
  return lowrank_step(state, x[None])[0]


def _products(
  columns: jax.Array, state: HopfieldState, x: jax.Array
) -> jax.Array:
  """(c, L), of columns (c, r) and the features of (L, d) queries.

  As features lie in memory, which makes this one product of matrices.
  """
  features = taylor_features(x, degree_of(state), scale=state.beta)
  return jnp.matmul(columns, features.T, precision=lax.Precision.HIGHEST)


def lowrank_energy(
  x: jax.Array, patterns: jax.Array, state: HopfieldState
) -> jax.Array:
  # The first feature is 1 and its sum their number, beside which the others
  # may be small.
  others = state.k.at[0].set(0)[None] / state.k[0]

  def part(x: jax.Array) -> jax.Array:
    return _products(others, state, x)[0]

  log = jnp.log1p(rows.in_parts(part, len(state.k), x)) / state.beta
  shift = jnp.matmul(x, state.mean, precision=lax.Precision.HIGHEST)
  return (x * x).sum(-1) / 2 - log - shift + half_largest_square(patterns)


@functools.partial(jax.jit, static_argnames=("degree", "chunk_size"))
def _store(
  patterns: jax.Array,
  values: jax.Array,
  beta: jax.Array,
  has_values: jax.Array,
  *,
  degree: int,
  chunk_size: int | None,
) -> HopfieldState:
  keys = patterns.astype(beta.dtype)
  mean = keys.mean(0)
  keys = keys - mean[None]
  sums = _sums(keys, values.astype(beta.dtype), beta, degree, chunk_size)
  radius = jnp.linalg.norm(keys, axis=1).max()
  return HopfieldState(
    sums[:, :-1], sums[:, -1], mean, beta, radius, has_values
  )


def _sums(
  keys: jax.Array,
  values: jax.Array,
  beta: jax.Array,
  degree: int,
  chunk_size: int | None = None,
) -> jax.Array:
  """(r, Hv + 1), of patterns (M, d) that are shifted."""

  def feature_fn(x: jax.Array) -> jax.Array:
    return taylor_features(x, degree, scale=beta)

  pairs = keys[:, None], values[:, None]
  with jax.default_matmul_precision("highest"):
    return feature_moments(feature_fn, *pairs, chunk_size=chunk_size)[0]


def _changed(
  state: HopfieldState, pattern: Any, value: Any, sign: int
) -> HopfieldState:
  state, pattern = check_state(state), jnp.asarray(pattern)
  dim, value_dim = len(state.mean), state.z.shape[1]
  _checks.check_rank("pattern", pattern, (1, 2))
  inputs.check_dtype("pattern", pattern, state.z.dtype)
  shape = *((None,) * (pattern.ndim - 1)), dim
  _checks.check_shape("pattern", pattern, shape, "(d,) or (n, d)")
  given = value is not None
  has_values = state.has_values
  known = _checks.is_concrete(has_values)
  if not given and (value_dim != dim or (known and has_values)):
    raise ValueError(
      f"value is required: the state holds values of size {value_dim}"
    )
  value = jnp.asarray(value) if given else pattern
  inputs.check_dtype("value", value, state.z.dtype)
  shape = *pattern.shape[:-1], value_dim
  _checks.check_shape("value", value, shape, "one for each pattern")
  if given and value_dim == dim and known and not has_values:
    raise ValueError("value must be None: the state holds patterns alone")
  patterns = jnp.atleast_2d(pattern)
  if sign < 0 and _checks.is_concrete(state.k):
    left = round(float(state.k[0])) - len(patterns)
    if left < 1:
      raise ValueError(f"state must keep a pattern, got one with {left} left")
  return _change(state, patterns, jnp.atleast_2d(value), sign, given)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _change(
  state: HopfieldState,
  patterns: jax.Array,
  values: jax.Array,
  sign: int,
  given: bool,
) -> HopfieldState:
  dtype = state.z.dtype
  keys = patterns.astype(dtype) - state.mean[None]
  degree = degree_of(state)
  sums = sign * _sums(keys, values.astype(dtype), state.beta, degree)
  radius = state.radius
  if sign > 0:
    radius = jnp.maximum(radius, jnp.linalg.norm(keys, axis=1).max())
  z = jnp.where(state.has_values == given, state.z + sums[:, :-1], jnp.nan)
  return state._replace(z=z, k=state.k + sums[:, -1], radius=radius)
