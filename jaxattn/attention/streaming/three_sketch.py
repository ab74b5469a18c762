r"""Attention over separate streams of values, keys and queries, by sketches.

Where keys and values do not arrive together their products cannot be summed.
With a CountSketch :math:`\Psi` of s buckets over the tokens, the features
:math:`U` of the keys and the values V are kept as :math:`\Psi U` and
:math:`\Psi V`, for :math:`U^\top V \approx (\Psi U)^\top \Psi V`. The outputs
of the queries are not kept either: a second CountSketch, over the queries,
holds them until those few that differ from the mean of the values are asked
for.

Both sketches are centered first: rows of attention sum to one, so that

.. math:: o(q) = \bar v + \frac{1}{D(q)} \sum_{\alpha \ne 0} w_\alpha
  (\text{scale} \cdot q)^\alpha \, [(\Psi U - \Psi 1 \bar u^\top)^\top
  (\Psi V - \Psi 1 \bar v^\top)]_\alpha

where D is known exactly. What is left does not fall with the length of the
stream, but like :math:`1 / \sqrt s`: where keys and values do arrive together,
take :func:`~jaxattn.attention.moment_update`, which has no such error in less
memory. Source: arXiv 2311.14652; the centering is this project's.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import _checks
from jaxattn.attention.streaming.moments import (
  PRECISION,
  add_counts,
  check_even,
  check_sum_dtype,
  exact_spec,
  norms,
)
from jaxattn.features import _chunks
from jaxattn.features.coefficients import polynomial_coefficients
from jaxattn.features.monomials import (
  check_feature_count,
  feature_count,
  monomial_features,
)
from jaxattn.numerics.summation import compensated_add
from jaxattn.sketch.count_sketch import (
  check_start,
  count_sketch_recover,
  count_sketch_table,
)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "value_sketch",
    "key_sketch",
    "feature_sum",
    "feature_compensation",
    "value_sum",
    "value_compensation",
    "num_keys",
    "num_values",
    "max_norm",
    "product",
    "query_table",
    "radius_used",
    "seeds",
  ],
  meta_fields=["degree", "query_sketch", "finalized"],
)
@dataclasses.dataclass(frozen=True)
class ThreeSketchState:
  """Sketches of three streams.

  Source: arXiv 2311.14652.

  Attributes:
    value_sketch: (s, Hv) of the values; no rows once finalized.
    key_sketch: (s, m + 1) of the features of the keys, and of ones in the last
      column; no rows once finalized.
    feature_sum: (m,) sum of the features, not sketched.
    feature_compensation: (m,) what rounding added to ``feature_sum``.
    value_sum: (Hv,) sum of the values, not sketched.
    value_compensation: (Hv,) what rounding added to ``value_sum``.
    num_keys: () int32; from 2^31 - 1 on it stays there.
    num_values: () int32, likewise.
    max_norm: () largest Euclidean norm of any key so far.
    product: (m, Hv), product of the two sketches once finalized.
    query_table: (depth, w, Hv) of the outputs less the mean of the values, or
      (depth, w, m) of the features of the queries.
    radius_used: () bound on the logits of all queries so far: the largest of
      their norms, scaled, times ``max_norm``. Where it is beyond the radius
      that they came with, the bound on the error is not promised.
    seeds: (1 + depth, 2) uint32 of all hashes.
    degree: g, static.
    query_sketch: what ``query_table`` is of: ``"output"`` or ``"features"``.
    finalized: whether keys and values are complete, static.
  """

  value_sketch: jax.Array
  key_sketch: jax.Array
  feature_sum: jax.Array
  feature_compensation: jax.Array
  value_sum: jax.Array
  value_compensation: jax.Array
  num_keys: jax.Array
  num_values: jax.Array
  max_norm: jax.Array
  product: jax.Array
  query_table: jax.Array
  radius_used: jax.Array
  seeds: jax.Array
  degree: int
  query_sketch: str
  finalized: bool


def three_sketch_init(
  rng: jax.Array,
  *,
  dim: int,
  value_dim: int,
  degree: int,
  k: int,
  eps1: float,
  eps2: float,
  depth: int = 9,
  query_sketch: str = "output",
  dtype: Any = jnp.float32,
) -> ThreeSketchState:
  r"""Empty sketches of a size that answers for an error.

  :math:`s = \lceil 2 / \varepsilon_2^2 \rceil` buckets for the tokens, so that
  the product of the sketches is off by at most :math:`\varepsilon_2 \|U\|_F
  \|V\|_F` in root mean square, and :math:`w = \lceil 4 k / \varepsilon_1
  \rceil` in each of ``depth`` rows for the queries, so that the k entries found
  in a column are as good as the best k but for a factor
  :math:`1 + \varepsilon_1`.

  Args:
    rng: PRNG key. States of one key merge, others do not.
    dim: H, size of a key.
    value_dim: Hv.
    degree: g of the polynomial, even.
    k: number of queries with an output of their own.
    eps1: in (0, 1).
    eps2: in (0, 1).
    depth: rows of the second sketch, whose median counts.
    query_sketch: ``"output"`` sketches the outputs; ``"features"`` the features
      of the queries, m / Hv times as large, as the paper has it. Both decode to
      the same, and take queries only behind :func:`three_sketch_finalize`: the
      second is there to be compared with.
    dtype: of the sums: float32, or float64 where JAX has it enabled.

  Returns:
    A state of zeros.

  Raises:
    ValueError: if a size or option is out of its range, or the degree odd.

  Cost:
    s (m + 1 + Hv) + depth w Hv numbers, m = C(H + g, g), and some m Hv; with
    ``"features"`` depth w m in place of depth w Hv.

  Source:
    arXiv 2311.14652, theorem 1.2.

  Example:
    >>> import jax
    >>> state = three_sketch_init(
    ...   jax.random.key(0), dim=4, value_dim=2, degree=2, k=8, eps1=0.5,
    ...   eps2=0.1
    ... )
    >>> state.key_sketch.shape, state.query_table.shape
    ((200, 16), (9, 64, 2))
  """
  for name, size in (
    ("dim", dim),
    ("value_dim", value_dim),
    ("k", k),
    ("depth", depth),
  ):
    _checks.check_integer(name, size, 1, None)
  for name, eps in (("eps1", eps1), ("eps2", eps2)):
    _checks.check_scalar(name, eps)
    _checks.check_range(name, eps, 0.0, 1.0, closed=False)
  check_even(degree)
  check_feature_count(dim, degree)
  _checks.check_choice("query_sketch", query_sketch, ("output", "features"))
  dtype = check_sum_dtype(dtype)
  m, s = feature_count(dim, degree), math.ceil(2 / eps2**2)
  table = depth, math.ceil(4 * k / eps1), value_dim
  if query_sketch == "features":
    table = *table[:2], m
  return ThreeSketchState(
    value_sketch=jnp.zeros((s, value_dim), dtype),
    key_sketch=jnp.zeros((s, m + 1), dtype),
    feature_sum=jnp.zeros(m, dtype),
    feature_compensation=jnp.zeros(m, dtype),
    value_sum=jnp.zeros(value_dim, dtype),
    value_compensation=jnp.zeros(value_dim, dtype),
    num_keys=jnp.zeros((), jnp.int32),
    num_values=jnp.zeros((), jnp.int32),
    max_norm=jnp.zeros((), dtype),
    product=jnp.zeros((m, value_dim), dtype),
    query_table=jnp.zeros(table, dtype),
    radius_used=jnp.zeros((), dtype),
    seeds=jax.random.bits(rng, (1 + depth, 2), jnp.uint32),
    degree=degree,
    query_sketch=query_sketch,
    finalized=False,
  )


def three_sketch_update_value(
  state: ThreeSketchState, start: int | jax.Array, value: jax.Array
) -> ThreeSketchState:
  """State with more values; those of keys may come before or after.

  Args:
    state: not finalized yet.
    start: index of the first of these tokens in the stream, with start + S <=
      2^32; may be traced.
    value: (S, Hv), floating.

  Returns:
    The new state, of the dtype and the shapes of ``state``.

  Raises:
    ValueError: if the state is finalized, or shapes or dtypes do not fit.

  Cost:
    O(S Hv).

  Source:
    arXiv 2311.14652.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> state = three_sketch_init(
    ...   jax.random.key(0), dim=4, value_dim=2, degree=2, k=8, eps1=0.5,
    ...   eps2=0.1
    ... )
    >>> state = three_sketch_update_value(state, 0, jnp.ones((100, 2)))
    >>> state.value_sum.tolist()
    [100.0, 100.0]
  """
  value = jnp.asarray(value)
  _check_open(state, "three_sketch_update_value")
  _check_rows("value", value, start)
  layout = (None, *state.value_sum.shape)
  _checks.check_shape("value", value, layout, "(S, Hv)")
  return _add_value(state, jnp.asarray(start, jnp.uint32), value)


def three_sketch_update_key(
  state: ThreeSketchState, start: int | jax.Array, key: jax.Array
) -> ThreeSketchState:
  """State with more keys; their values may come before or after.

  Args:
    state: not finalized yet.
    start: index of the first of these tokens in the stream, as it is for their
      values, with start + S <= 2^32; may be traced.
    key: (S, H), floating.

  Returns:
    The new state, of the dtype and the shapes of ``state``.

  Raises:
    ValueError: if the state is finalized, or shapes or dtypes do not fit.

  Cost:
    O(S m) time and memory: of a long stream, one chunk at a time.

  Source:
    arXiv 2311.14652.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> state = three_sketch_init(
    ...   jax.random.key(0), dim=4, value_dim=2, degree=2, k=8, eps1=0.5,
    ...   eps2=0.1
    ... )
    >>> state = three_sketch_update_key(state, 0, jnp.ones((100, 4)))
    >>> state.feature_sum[:2].tolist()
    [100.0, 100.0]
  """
  key = jnp.asarray(key)
  _check_open(state, "three_sketch_update_key")
  _check_rows("key", key, start)
  _check_dim("key", key, state)
  return _add_key(state, jnp.asarray(start, jnp.uint32), key)


def three_sketch_finalize(state: ThreeSketchState) -> ThreeSketchState:
  """Closes the streams of keys and values: centers, and multiplies the two.

  Under ``jit`` numbers of tokens are not looked at: a state without keys gives
  finite answers that mean nothing.

  Args:
    state: with as many keys as values.

  Returns:
    A state that takes queries, without the first two sketches.

  Raises:
    ValueError: if it is finalized already; or if, outside of ``jit``, there are
      no keys, or not as many as values.

  Cost:
    s m Hv multiply-adds, once.

  Source:
    arXiv 2311.14652; the centering is this project's.

  Example:
    >>> import jax
    >>> key, value = jax.random.normal(jax.random.key(1), (2, 100, 4))
    >>> state = three_sketch_init(
    ...   jax.random.key(0), dim=4, value_dim=4, degree=2, k=8, eps1=0.5,
    ...   eps2=0.1
    ... )
    >>> state = three_sketch_update_value(state, 0, value)
    >>> state = three_sketch_update_key(state, 0, key)
    >>> three_sketch_finalize(state).key_sketch.shape
    (0, 16)
  """
  _check_open(state, "three_sketch_finalize")
  counts = state.num_keys, state.num_values
  if all(map(_checks.is_concrete, counts)):
    keys, values = map(int, counts)
    if keys != values or keys == 0:
      raise ValueError(
        f"state must hold as many keys as values, and some, got {keys} keys "
        f"and {values} values"
      )
  return _finalize(state)


def three_sketch_update_query(
  state: ThreeSketchState,
  start: int | jax.Array,
  query: jax.Array,
  *,
  radius: float,
  scale: float | jax.Array | None = None,
) -> ThreeSketchState:
  """State with more queries, whose outputs are sketched and forgotten.

  Args:
    state: finalized.
    start: index of the first of these queries, with start + T <= 2^32; may be
      traced.
    query: (T, H), floating.
    radius: R > 0, bound on the logits; a static number. Nothing checks it: see
      ``radius_used`` of the state.
    scale: factor on the logits; None = 1 / sqrt(H). May be traced.

  Returns:
    The new state, of the dtype and the shapes of ``state``.

  Raises:
    ValueError: if the state is not finalized, or shapes, dtypes or options do
      not fit.

  Cost:
    T (m + depth) (Hv + 1) multiply-adds; O(T m) memory.

  Source:
    arXiv 2311.14652.

  Example:
    >>> import jax
    >>> key, value = jax.random.normal(jax.random.key(1), (2, 100, 4))
    >>> state = three_sketch_init(
    ...   jax.random.key(0), dim=4, value_dim=4, degree=2, k=8, eps1=0.5,
    ...   eps2=0.1
    ... )
    >>> state = three_sketch_update_value(state, 0, value)
    >>> state = three_sketch_finalize(three_sketch_update_key(state, 0, key))
    >>> state = three_sketch_update_query(state, 0, key, radius=2.0)
    >>> bool(abs(state.query_table).max() > 0)
    True
  """
  query = jnp.asarray(query)
  _check_final(state, "three_sketch_update_query")
  _check_rows("query", query, start)
  _check_dim("query", query, state)
  if scale is not None:
    _checks.check_scalar("scale", scale)
  polynomial = polynomial_coefficients(state.degree, radius)
  scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
  return _add_query(
    state,
    jnp.asarray(start, jnp.uint32),
    query,
    scale,
    tuple(map(float, polynomial)),
  )


def three_sketch_merge(
  a: ThreeSketchState, b: ThreeSketchState
) -> ThreeSketchState:
  """State of two parts of the streams together, as of two devices.

  Either both are not finalized, and hold other tokens; or both come from one
  finalized state, and hold other queries since.

  Args:
    a: a state.
    b: another one, of the same key, sizes and options.

  Returns:
    The state that both parts together would have given.

  Raises:
    ValueError: if options, shapes or dtypes differ; or if, outside of ``jit``,
      seeds do, or what the two were finalized with.

  Cost:
    One addition a number.

  Source:
    arXiv 2311.14652.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> empty = three_sketch_init(
    ...   jax.random.key(0), dim=4, value_dim=2, degree=2, k=8, eps1=0.5,
    ...   eps2=0.1
    ... )
    >>> a = three_sketch_update_value(empty, 0, jnp.ones((50, 2)))
    >>> b = three_sketch_update_value(empty, 50, jnp.ones((50, 2)))
    >>> three_sketch_merge(a, b).value_sum.tolist()
    [100.0, 100.0]
  """
  for name in ("degree", "query_sketch", "finalized"):
    x, y = getattr(a, name), getattr(b, name)
    if x != y:
      raise ValueError(f"states to merge must have one {name}, got {x} and {y}")
  shared = ["seeds"]
  if a.finalized:
    shared += ["product", "num_keys", "num_values"]
    shared += [f"{name}_sum" for name in ("feature", "value")]
    shared += [f"{name}_compensation" for name in ("feature", "value")]
  merged = {}
  for field in dataclasses.fields(a):
    name = field.name
    if name in ("degree", "query_sketch", "finalized"):
      continue
    x, y = getattr(a, name), getattr(b, name)
    _checks.check_shape(f"b.{name}", y, x.shape, "that of a")
    if x.dtype != y.dtype:
      raise ValueError(f"b.{name} must be of {x.dtype} as a, got {y.dtype}")
    if name in shared and _differ(x, y):
      raise ValueError(
        f"states to merge must have the same {name}: both of one rng, and "
        "queries of one finalized state"
      )
    if name in ("max_norm", "radius_used"):
      merged[name] = jnp.maximum(x, y)
    elif name in ("num_keys", "num_values"):
      merged[name] = x if a.finalized else add_counts(x, y)
    elif name not in shared:
      merged[name] = x + y
  if not a.finalized:
    # What rounding added to b is added back with what it added to a.
    for name in ("feature", "value"):
      merged |= _added(a, name, *_sum_of(b, name))
  return dataclasses.replace(a, **merged)


def three_sketch_decode(
  state: ThreeSketchState, *, num_queries: int, k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  r"""Queries whose outputs differ from the mean of the values, by column.

  .. math:: \|T_c - y_c\|_2 \le (1 + \varepsilon_1)
    \min_{y' \text{ k-sparse}} \|y' - (y_c - \bar v_c)\|_2
    + (2 + \varepsilon_1) \|e_c\|_2

  for the column c of the outputs y, with :math:`T_c` the mean and the k entries
  found. The promise is empty where many outputs differ from the mean. An entry
  of :math:`e_c` is what the first two sketches and the polynomial put on one
  output: about :math:`\varepsilon_2 \|a\|_2 \|V_c\|_2` for a query with the
  weights a, unless they are all alike, and at most the bound of
  :func:`~jaxattn.features.attention_error_bound`. So :math:`\|e_c\|_2` grows
  with the root of the number of queries that are unlike the rest.

  Args:
    state: finalized, with the queries 0 to ``num_queries - 1``.
    num_queries: how many there were.
    k: number to find in each column; no more than ``num_queries`` are returned.
      Of more than were planned for with :func:`three_sketch_init` errors grow.

  Returns:
    Indices of queries, (Hv, k) int32, those farthest from the mean first; their
    outputs less the mean, (Hv, k); and the mean of the values, (Hv,).

  Raises:
    ValueError: if the state is not finalized, a number is too small, or k so
      large that 2 k entries, or ``num_queries``, are more than a column of the
      table can tell apart, depth w.

  Cost:
    O(num_queries depth Hv + k^3 Hv) time; memory of a chunk of queries, and of
    (2 k)^2 numbers.

  Source:
    arXiv 2311.14652, theorem 1.2.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> key, value = jax.random.uniform(jax.random.key(1), (2, 1000, 4)) - 0.5
    >>> state = three_sketch_init(
    ...   jax.random.key(0), dim=4, value_dim=4, degree=2, k=2, eps1=0.5,
    ...   eps2=0.1
    ... )
    >>> state = three_sketch_update_value(state, 0, value)
    >>> state = three_sketch_finalize(three_sketch_update_key(state, 0, key))
    >>> query = jnp.zeros((500, 4)).at[123].set(1.0)
    >>> state = three_sketch_update_query(state, 0, query, radius=1.0)
    >>> found, _, _ = three_sketch_decode(state, num_queries=500, k=1)
    >>> found[:, 0].tolist()
    [123, 123, 123, 123]
  """
  _check_final(state, "three_sketch_decode")
  table = state.query_table
  if state.query_sketch == "features":
    table = jnp.einsum("rwm,mv->rwv", table, state.product, precision=PRECISION)
  seeds = state.seeds[1:]
  indices, values = count_sketch_recover(seeds, table, num_queries, k)
  return indices, values, _mean(state, state.value_sum)


def _check_open(state: ThreeSketchState, name: str) -> None:
  if state.finalized:
    raise ValueError(f"{name} called after three_sketch_finalize")


def _check_final(state: ThreeSketchState, name: str) -> None:
  if not state.finalized:
    raise ValueError(f"{name} called before three_sketch_finalize")


def _check_rows(name: str, x: jax.Array, start: Any) -> None:
  check_start(start)
  _checks.check_rank(name, x, 2)
  _checks.check_floating(name, x)
  if 0 in x.shape:
    raise ValueError(f"{name} must not be empty, got shape {x.shape}")


def _check_dim(name: str, x: jax.Array, state: ThreeSketchState) -> None:
  num, dim = state.feature_sum.size, x.shape[-1]
  if num != feature_count(dim, state.degree):
    raise ValueError(
      f"{name} has vectors of size {dim}, which have "
      f"{feature_count(dim, state.degree)} features of degree {state.degree}, "
      f"the state has {num}"
    )


def _differ(x: jax.Array, y: jax.Array) -> bool:
  concrete = _checks.is_concrete(x) and _checks.is_concrete(y)
  return concrete and not np.array_equal(x, y)


def _mean(state: ThreeSketchState, total: jax.Array) -> jax.Array:
  # The sum of the constant feature is the number of tokens, beyond int32 too.
  return total / jnp.maximum(state.feature_sum[0], 1)


def _sum_of(state: ThreeSketchState, name: str) -> tuple[jax.Array, jax.Array]:
  return getattr(state, f"{name}_sum"), getattr(state, f"{name}_compensation")


def _added(
  state: ThreeSketchState, name: str, x: jax.Array, compensation: Any = 0
) -> dict[str, jax.Array]:
  total, before = _sum_of(state, name)
  total, after = compensated_add(total, before + compensation, x)
  return {f"{name}_sum": total, f"{name}_compensation": after}


@jax.jit
def _add_value(
  state: ThreeSketchState, start: jax.Array, value: jax.Array
) -> ThreeSketchState:
  value = value.astype(state.value_sum.dtype)
  num_rows = len(state.value_sketch)
  sketch = count_sketch_table(state.seeds[:1], value, num_rows, start=start)[0]
  return dataclasses.replace(
    state,
    value_sketch=state.value_sketch + sketch,
    num_values=add_counts(state.num_values, jnp.int32(len(value))),
    **_added(state, "value", value.sum(0)),
  )


@jax.jit
def _add_key(
  state: ThreeSketchState, start: jax.Array, key: jax.Array
) -> ThreeSketchState:
  key = key.astype(state.feature_sum.dtype)
  phi = monomial_features(key, state.degree)
  num_rows = len(state.key_sketch)
  sketch = count_sketch_table(
    state.seeds[:1], _chunks.ones_column(phi), num_rows, start=start
  )[0]
  return dataclasses.replace(
    state,
    key_sketch=state.key_sketch + sketch,
    num_keys=add_counts(state.num_keys, jnp.int32(len(key))),
    max_norm=jnp.maximum(state.max_norm, norms(key).max()),
    **_added(state, "feature", phi.sum(0)),
  )


@jax.jit
def _finalize(state: ThreeSketchState) -> ThreeSketchState:
  keys, ones = state.key_sketch[:, :-1], state.key_sketch[:, -1:]
  means = _mean(state, state.feature_sum), _mean(state, state.value_sum)
  keys, values = (
    x - ones * mean[None]
    for x, mean in zip((keys, state.value_sketch), means, strict=True)
  )
  # The constant feature sums the centered values: exactly 0, as it is here.
  return dataclasses.replace(
    state,
    product=jnp.matmul(keys.T, values, precision=PRECISION).at[0].set(0),
    key_sketch=state.key_sketch[:0],
    value_sketch=state.value_sketch[:0],
    finalized=True,
  )


@functools.partial(jax.jit, static_argnames="coefficients")
def _add_query(
  state: ThreeSketchState,
  start: jax.Array,
  query: jax.Array,
  scale: Any,
  coefficients: tuple[float, ...],
) -> ThreeSketchState:
  dtype = state.feature_sum.dtype
  spec = exact_spec(coefficients)
  query = query.astype(dtype) * jnp.asarray(scale, dtype)
  used = norms(query).max() * state.max_norm
  # Features first, as moments are.
  query = query.T
  phi = spec.weigh(jnp.concatenate(spec.features(query)), len(query)).T
  total = jnp.matmul(phi, state.feature_sum, precision=PRECISION)
  rows = phi / jnp.where(total == 0, 1, total)[:, None]
  if state.query_sketch == "output":
    rows = jnp.matmul(rows, state.product, precision=PRECISION)
  width = state.query_table.shape[1]
  table = count_sketch_table(state.seeds[1:], rows, width, start=start)
  return dataclasses.replace(
    state,
    query_table=state.query_table + table,
    radius_used=jnp.maximum(state.radius_used, used),
  )
