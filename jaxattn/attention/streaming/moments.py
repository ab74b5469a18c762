r"""Attention over a stream by its moments: exact sums, a state of fixed size.

With the monomials :math:`\varphi` and weights w of a polynomial p in place of
exp, all that a query needs of the keys and values so far is

.. math::

  M = \sum_j \varphi(k_j) [v_j, 1]^\top \in \mathbb R^{m \times (H_v + 1)},
  \qquad [n, d] = (w \circ \varphi(\text{scale} \cdot q))^\top M, \qquad
  o = n / d,

:math:`m = \binom{H + g}{g}` numbers a column, however many tokens there were.
The only error is that of the polynomial: states add, and tokens can be taken
away again. Radius and scale come with the query, so that one state serves all.
Source: arXiv 2311.14652 for the task; keys and values that arrive together
need no sketch of theirs.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks, _compat
from jaxattn.features import _chunks
from jaxattn.features.coefficients import polynomial_coefficients
from jaxattn.features.monomials import check_feature_count, feature_count
from jaxattn.numerics.summation import compensated_add

# Some accelerators round the factors of a float32 product otherwise.
PRECISION = lax.Precision.HIGHEST


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["moments", "compensation", "max_norm", "count"],
  meta_fields=["degree"],
)
@dataclasses.dataclass(frozen=True)
class MomentState:
  """The moments of a stream of keys and values.

  Source: arXiv 2311.14652.

  Attributes:
    moments: (B, K, m, Hv + 1) sums of products of key features and values, and
      of features in the last column; unweighted.
    compensation: of the same shape: what rounding added to ``moments``.
    max_norm: (B, K) largest Euclidean norm of any key so far, of those taken
      away too.
    count: (B,) int32, tokens added less tokens taken away; from 2^31 - 1 on it
      stays there.
    degree: g, static.
  """

  moments: jax.Array
  compensation: jax.Array
  max_norm: jax.Array
  count: jax.Array
  degree: int


class MomentInfo(NamedTuple):
  """What :func:`moment_query` says of its answer.

  Source: this project.

  Attributes:
    radius_used: (B, T, N) bound on the logits of a query, its norm times the
      largest norm of a key; without a gradient. Where it is within ``radius``
      the promise about the error holds; where it is not, it may.
  """

  radius_used: jax.Array


def moment_init(
  batch_size: int,
  num_kv_heads: int,
  dim: int,
  value_dim: int,
  *,
  degree: int,
  dtype: Any = jnp.float32,
) -> MomentState:
  """State of a stream of which nothing has come yet.

  Smaller than a cache of n keys and values from n = m (Hv + 1) / (H + Hv) on
  (twice that with the compensation).

  Args:
    batch_size: B.
    num_kv_heads: K.
    dim: H, size of a key.
    value_dim: Hv.
    degree: g of the polynomial, even: weights of odd degrees change sign.
    dtype: of the sums: float32, or float64 where JAX has it enabled.

  Returns:
    A state of zeros.

  Raises:
    ValueError: if a size is no positive integer, the degree is odd or
      negative, there would be more than 2^22 features, or ``dtype`` is another
      one.

  Cost:
    2 B K m (Hv + 1) numbers, m = C(H + g, g).

  Source:
    arXiv 2311.14652.

  Example:
    >>> state = moment_init(1, 2, 8, 4, degree=2)
    >>> state.moments.shape
    (1, 2, 45, 5)
  """
  for name, size in (
    ("batch_size", batch_size),
    ("num_kv_heads", num_kv_heads),
    ("dim", dim),
    ("value_dim", value_dim),
  ):
    _checks.check_integer(name, size, 1, None)
  check_even(degree)
  check_feature_count(dim, degree)
  dtype = check_sum_dtype(dtype)
  shape = batch_size, num_kv_heads, feature_count(dim, degree), value_dim + 1
  # Two arrays: a caller may donate the state.
  moments, compensation = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
  max_norm = jnp.zeros(shape[:2], dtype)
  count = jnp.zeros(batch_size, jnp.int32)
  return MomentState(moments, compensation, max_norm, count, degree)


def moment_update(
  state: MomentState,
  key: jax.Array,
  value: jax.Array,
  *,
  key_mask: jax.Array | None = None,
) -> MomentState:
  """State of the stream with more tokens, one or many.

  Sums are compensated from call to call: a float32 state forgets no digits,
  however many there are. Within a call chunks of at most 2048 tokens are added
  up plainly. Calls of 256 tokens and more are much cheaper a token. A common
  shift of all keys changes no softmax: keys with a known mean are better
  without it, as in ``polynomial_attention(key_shift=...)``.

  Args:
    state: of the tokens before.
    key: (B, S, K, H), floating.
    value: (B, S, K, Hv).
    key_mask: boolean (B, S); tokens with False are left out, NaN included.

  Returns:
    The new state, of the dtype and the shapes of ``state``.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    S m (Hv + 1) multiply-adds a head; features exist for one chunk at a time.

  Source:
    arXiv 2311.14652.

  Example:
    >>> import jax
    >>> key, value = jax.random.normal(jax.random.key(0), (2, 1, 100, 2, 8))
    >>> state = moment_update(moment_init(1, 2, 8, 8, degree=2), key, value)
    >>> state.count.tolist()
    [100]
  """
  return _changed(state, key, value, key_mask, 1)


def moment_downdate(
  state: MomentState,
  key: jax.Array,
  value: jax.Array,
  *,
  key_mask: jax.Array | None = None,
) -> MomentState:
  """State of the stream without some of its tokens, up to rounding.

  For a sliding window over the last w tokens keep these in a ring buffer, add
  what comes and take away what leaves. Rounding is left behind: sum the window
  anew every 2^16 tokens or so.

  Args:
    state: of tokens, those to take away among them.
    key: (B, S, K, H) of those, floating.
    value: (B, S, K, Hv).
    key_mask: boolean (B, S); tokens with False stay.

  Returns:
    The new state, of the dtype and the shapes of ``state``. Its ``max_norm`` is
    that of all keys that ever came.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    As :func:`moment_update`.

  Source:
    this project.

  Example:
    >>> import jax
    >>> pair = jax.random.normal(jax.random.key(0), (2, 1, 100, 2, 8))
    >>> state = moment_update(moment_init(1, 2, 8, 8, degree=2), *pair)
    >>> empty = moment_downdate(state, *pair)
    >>> bool(abs(empty.moments).max() < 1e-3), empty.count.tolist()
    (True, [0])
  """
  return _changed(state, key, value, key_mask, -1)


def moment_merge(a: MomentState, b: MomentState) -> MomentState:
  """State of two streams together: shards of one stream, for instance.

  Args:
    a: a state.
    b: another one of the same degree, shapes and dtype.

  Returns:
    The state that all tokens together would have given.

  Raises:
    ValueError: if degree, shapes or dtypes differ.

  Cost:
    Five additions a number of the state.

  Source:
    arXiv 2311.14652.

  Example:
    >>> import jax
    >>> key, value = jax.random.normal(jax.random.key(0), (2, 1, 100, 2, 8))
    >>> empty = moment_init(1, 2, 8, 8, degree=2)
    >>> a = moment_update(empty, key[:, :50], value[:, :50])
    >>> b = moment_update(empty, key[:, 50:], value[:, 50:])
    >>> moment_merge(a, b).count.tolist()
    [100]
  """
  if a.degree != b.degree:
    raise ValueError(
      f"states to merge must have one degree, got {a.degree} and {b.degree}"
    )
  _checks.check_shape("b.moments", b.moments, a.moments.shape, "that of a")
  _checks.check_one_dtype(**{"a.moments": a.moments, "b.moments": b.moments})
  # What rounding added to b is added back with what it added to a.
  moments, compensation = compensated_add(
    a.moments, a.compensation + b.compensation, b.moments
  )
  return MomentState(
    moments,
    compensation,
    jnp.maximum(a.max_norm, b.max_norm),
    add_counts(a.count, b.count),
    a.degree,
  )


def moment_decay(state: MomentState, decay: float | jax.Array) -> MomentState:
  r"""State of a stream whose tokens so far count less.

  .. math:: M \leftarrow \gamma M

  Called before each token, an exponential forgetting: weights of attention are
  multiplied by :math:`\gamma` to the power of their age. A sum of weights stays
  the divisor. All tokens of one :func:`moment_update` are of one age: where
  each is to be older than the next, update by one at a time.

  Args:
    state: the state.
    decay: gamma in (0, 1]; may be traced.

  Returns:
    The new state; ``count`` and ``max_norm`` are as they were.

  Raises:
    ValueError: if ``decay`` is no real scalar, or not in (0, 1].

  Cost:
    One product a number of the state.

  Source:
    this project.

  Example:
    >>> import jax
    >>> key, value = jax.random.normal(jax.random.key(0), (2, 1, 100, 2, 8))
    >>> state = moment_update(moment_init(1, 2, 8, 8, degree=2), key, value)
    >>> float(moment_decay(state, 0.5).moments[0, 0, 0, -1])
    50.0
  """
  _checks.check_scalar("decay", decay)
  if _checks.is_concrete(decay) and not 0 < float(decay) <= 1:
    raise ValueError(f"decay must be in (0, 1], got {decay}")
  decay = jnp.asarray(decay, state.moments.dtype)
  return dataclasses.replace(
    state,
    moments=decay * state.moments,
    compensation=decay * state.compensation,
  )


def moment_query(
  state: MomentState,
  query: jax.Array,
  *,
  radius: float,
  coefficients: str = "minimax",
  scale: float | jax.Array | None = None,
  return_info: bool = False,
) -> Any:
  r"""Attention of queries to all tokens of a stream so far.

  What ``polynomial_attention(center_keys=False)`` of them gives, to rounding.
  Each output is off by at most the range of its value column times
  :math:`\varepsilon / (1 + \sqrt{1 - \varepsilon^2})`, :math:`\varepsilon` the
  :func:`~jaxattn.features.polynomial_error` of the polynomial, whatever the
  length of the stream.

  Args:
    state: of the stream.
    query: (B, T, N, H), floating; K divides N.
    radius: R > 0, bound on the logits; a static number. Nothing checks it; see
      ``return_info``.
    coefficients: ``"minimax"`` or ``"taylor"``.
    scale: factor on the logits; None = 1 / sqrt(H). May be traced.
    return_info: also return a :class:`MomentInfo`.

  Returns:
    (B, T, N, Hv) of the dtype of ``query``; 0 where a batch element has no
    tokens, or decay has left nothing of them. With ``return_info`` a pair of it
    and the info.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, or if, outside of
      ``jit``, there are no tokens in any batch element.

  Cost:
    m (Hv + 1) multiply-adds a query, whatever the length of the stream. Outside
    of ``jit`` a call waits for ``state.count``: decode in a loop under ``jit``.

  Source:
    arXiv 2311.14652.

  Example:
    >>> import jax
    >>> from jaxattn.attention import softmax_attention
    >>> q, k, v = 0.5 * jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
    >>> state = moment_update(moment_init(1, 2, 8, 8, degree=4), k, v)
    >>> out = moment_query(state, q, radius=1.0)
    >>> bool(abs(out - softmax_attention(q, k, v)).max() < 1e-3)
    True
  """
  query = jnp.asarray(query)
  _check_query(state, query)
  _checks.check_choice("coefficients", coefficients, ("minimax", "taylor"))
  _checks.check_choice("return_info", return_info, (False, True))
  if scale is not None:
    _checks.check_scalar("scale", scale)
  polynomial = polynomial_coefficients(state.degree, radius, kind=coefficients)
  if _checks.is_concrete(state.count) and not np.any(np.asarray(state.count)):
    raise ValueError("state must hold tokens, got one without any update")
  scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
  ask = functools.partial(_query, coefficients=tuple(map(float, polynomial)))
  ask = _compat.over_explicit_axes(ask, query)
  out, info = ask(state, query, scale)
  return (out, info) if return_info else out


def check_even(degree: Any) -> None:
  """Refuses degrees whose weights may be negative."""
  _checks.check_integer("degree", degree, 0, None)
  if degree % 2:
    raise ValueError(
      f"degree must be even, got {degree}: weights of an odd degree change sign"
    )


def check_sum_dtype(dtype: Any) -> Any:
  """Refuses dtypes of sums that are none, or that JAX would narrow."""
  dtype = jnp.dtype(dtype)
  if dtype not in (jnp.float32, jnp.float64):
    raise ValueError(f"dtype must be float32 or float64, got {dtype}")
  if jax.dtypes.canonicalize_dtype(dtype) != dtype:
    raise ValueError(
      f"dtype must be float32 unless jax_enable_x64 is set, got {dtype}"
    )
  return dtype


def add_counts(a: jax.Array, b: jax.Array) -> jax.Array:
  """Sum of int32 counts, of which the largest stands for all larger ones."""
  most, total = jnp.iinfo(jnp.int32).max, a + b
  full = (a == most) | (b == most) | ((a > 0) & (b > 0) & (total < 0))
  return jnp.where(full, most, total)


def norms(x: jax.Array) -> jax.Array:
  """Norms over the last axis, without a gradient: at 0 they have none."""
  x = lax.stop_gradient(x)
  return jnp.sqrt((x * x).sum(-1))


def _changed(
  state: MomentState,
  key: jax.Array,
  value: jax.Array,
  key_mask: jax.Array | None,
  sign: int,
) -> MomentState:
  key, value = jnp.asarray(key), jnp.asarray(value)
  _checks.check_rank("key", key, 4)
  key_mask = None if key_mask is None else jnp.asarray(key_mask)
  sizes = _checks.check_attention(key, key, value, key_mask=key_mask)
  got = *sizes.batch, sizes.num_kv_heads, None, sizes.value_dim + 1
  _checks.check_shape(
    "state.moments", state.moments, got, "(B, K, m, Hv + 1) of key and value"
  )
  _check_dim("key", key, state)
  add = _over_explicit_axes(functools.partial(_add, sign=sign), key, state)
  return add(state, key, value, key_mask)


def _over_explicit_axes(fn: Any, key: jax.Array, state: MomentState) -> Any:
  """As ``_compat.over_explicit_axes``, for sums over the tokens of ``key``."""
  sharding = _compat.typeof(key).sharding
  if _compat.AxisType.Explicit not in sharding.mesh.axis_types:
    return fn
  batch, _, heads, _ = sharding.spec
  spec = jax.sharding.PartitionSpec(batch, heads)
  of_batch = jax.sharding.PartitionSpec(batch)
  out = MomentState(spec, spec, spec, of_batch, state.degree)  # pyright: ignore
  return _compat.auto_axes(fn, out_sharding=out)


def _check_dim(name: str, x: jax.Array, state: MomentState) -> None:
  num, dim = state.moments.shape[2], x.shape[-1]
  if num != feature_count(dim, state.degree):
    raise ValueError(
      f"{name} has heads of size {dim}, which have "
      f"{feature_count(dim, state.degree)} features of degree {state.degree}, "
      f"state.moments has {num}"
    )


def _check_query(state: MomentState, query: jax.Array) -> None:
  _checks.check_rank("query", query, 4)
  _checks.check_floating("query", query)
  b, k = state.moments.shape[:2]
  _checks.check_shape("query", query, (b, None, None, None), "(B, T, N, H)")
  if 0 in query.shape:
    raise ValueError(f"query must not be empty, got shape {query.shape}")
  if query.shape[2] % k:
    raise ValueError(
      f"the {k} heads of the state must divide the {query.shape[2]} heads of "
      "query"
    )
  _check_dim("query", query, state)


def exact_spec(coefficients: tuple[float, ...]) -> _chunks.Spec:
  """Products of all digits: what is lost here no compensation brings back."""
  return _chunks.Spec(coefficients=coefficients, precision=PRECISION)


@functools.partial(jax.jit, static_argnames="sign")
def _add(
  state: MomentState,
  key: jax.Array,
  value: jax.Array,
  key_mask: jax.Array | None,
  sign: int,
) -> MomentState:
  dtype = state.moments.dtype
  b, s, kv, _ = key.shape
  key = _chunks.hide(key.astype(dtype), key_mask)
  value = _chunks.hide(_chunks.ones_column(value.astype(dtype)), key_mask)
  k, v = (
    x.transpose(0, 2, 3, 1).reshape(b * kv, x.shape[-1], s)
    for x in (key, value)
  )
  # Unweighted monomials: any coefficients will do.
  spec = exact_spec((1.0,) * (state.degree + 1))
  new = _chunks.moments(k, v, spec)
  moments, compensation = compensated_add(
    state.moments, state.compensation, sign * new.reshape(state.moments.shape)
  )
  if key_mask is None:
    tokens = jnp.full(b, s, jnp.int32)
  else:
    tokens = key_mask.sum(1, dtype=jnp.int32)
  return MomentState(
    moments,
    compensation,
    jnp.maximum(state.max_norm, norms(key).max(1)),
    add_counts(state.count, sign * tokens),
    state.degree,
  )


@functools.partial(jax.jit, static_argnames="coefficients")
def _query(
  state: MomentState,
  query: jax.Array,
  scale: Any,
  coefficients: tuple[float, ...],
) -> tuple[jax.Array, MomentInfo]:
  dtype = state.moments.dtype
  b, t, n, d = query.shape
  kv, m, width = state.moments.shape[1:]
  scaled = query.astype(dtype) * jnp.asarray(scale, dtype)
  grouped = scaled.reshape(b, t, kv, n // kv, d)
  q = grouped.transpose(0, 2, 4, 3, 1).reshape(b * kv, d, n // kv, t)
  spec = exact_spec(coefficients)
  moments = state.moments.reshape(b * kv, m, width)
  sums = _chunks.sums(q, spec.weigh(moments, d), spec)
  sums = sums.reshape(b, kv, width, n // kv, t).transpose(0, 4, 1, 3, 2)
  sums = sums.reshape(b, t, n, width)
  seen = (state.count > 0)[:, None, None, None] & (sums[..., -1:] != 0)
  denominator = jnp.where(seen, sums[..., -1:], 1)
  out = jnp.where(seen, sums[..., :-1] / denominator, 0).astype(query.dtype)
  used = norms(grouped) * state.max_norm[:, None, :, None]
  return out, MomentInfo(used.reshape(b, t, n))
