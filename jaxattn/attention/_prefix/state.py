r"""The state of a prefix: sums of features, filled token by token.

:math:`Z = \sum_r \phi(k_r) v_r^\top` and :math:`k = \sum_r \phi(k_r)` over
the tokens of a prefix. Tokens can be added and taken away, in any order.
Source: arXiv 2406.14036.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.features import FeatureMap, apply_feature_map, feature_moments
from jaxattn.features.maps import as_feature_map
from jaxattn.numerics._dtypes import accumulator


class PrefixState(NamedTuple):
  """A prefix of any length, folded through a feature map.

  Source: arXiv 2406.14036.

  Attributes:
    z: (K, r, Hv) sum of products of key features and values; N heads, one for
      each query head, are allowed too where a state is asked.
    k: (K, r) sum of key features.
  """

  z: jax.Array
  k: jax.Array


def prefix_state_init(
  num_heads: int,
  num_features: int,
  value_dim: int,
  *,
  dtype: Any = jnp.float32,
) -> PrefixState:
  """State of an empty prefix: attention to it is attention without it.

  Args:
    num_heads: K, or N for a state of its own for each query head.
    num_features: r of the feature map.
    value_dim: Hv.
    dtype: of both arrays: float32 or float64. Sums of many tokens stall in 16
      bits.

  Returns:
    A state of zeros.

  Raises:
    ValueError: if a size is no positive integer, or ``dtype`` is another one.

  Cost:
    O(K r Hv) memory.

  Source:
    this project.

  Example:
    >>> state = prefix_state_init(2, 8, 4)
    >>> state.z.shape, state.k.shape
    ((2, 8, 4), (2, 8))
  """
  for name, size in (
    ("num_heads", num_heads),
    ("num_features", num_features),
    ("value_dim", value_dim),
  ):
    _checks.check_integer(name, size, 1, None)
  _check_sums("dtype", dtype)
  return PrefixState(
    jnp.zeros((num_heads, num_features, value_dim), dtype),
    jnp.zeros((num_heads, num_features), dtype),
  )


def prefix_state_update(
  state: PrefixState,
  key: jax.Array,
  value: jax.Array,
  *,
  feature_map: str | FeatureMap = "elu",
  scale: float | jax.Array | None = None,
) -> PrefixState:
  """State of the prefix with more tokens: adds their features and products.

  States add up: that of two prefixes after one another is the sum of theirs.
  Keys must carry whatever rotation they need beforehand.

  Args:
    state: of the prefix before, one head for each key head.
    key: (m, K, H), floating.
    value: (m, K, Hv).
    feature_map: "elu", "identity", "relu" or a ``FeatureMap``; the one that
      queries will use.
    scale: factor on the logits; None = 1 / sqrt(H).

  Returns:
    The new state, of the dtype of ``state``.

  Raises:
    ValueError: if shapes, dtypes or options do not fit.

  Cost:
    m r Hv multiply-adds a head; O(K r Hv) memory, whatever m.

  Source:
    arXiv 2406.14036.

  Example:
    >>> import jax
    >>> key, value = jax.random.normal(jax.random.key(0), (2, 100, 2, 8))
    >>> state = prefix_state_update(prefix_state_init(2, 8, 8), key, value)
    >>> bool((state.k > 0).all())
    True
  """
  return _changed(state, key, value, feature_map, scale, 1)


def prefix_state_downdate(
  state: PrefixState,
  key: jax.Array,
  value: jax.Array,
  *,
  feature_map: str | FeatureMap = "elu",
  scale: float | jax.Array | None = None,
) -> PrefixState:
  """State of the prefix without some of its tokens, up to rounding.

  Args:
    state: of the prefix, one head for each key head.
    key: (m, K, H) of the tokens to take away, floating.
    value: (m, K, Hv).
    feature_map: as it was when they were added.
    scale: as it was when they were added.

  Returns:
    The new state, of the dtype of ``state``.

  Raises:
    ValueError: if shapes, dtypes or options do not fit.

  Cost:
    As :func:`prefix_state_update`.

  Source:
    this project.

  Example:
    >>> import jax
    >>> pair = jax.random.normal(jax.random.key(0), (2, 100, 2, 8))
    >>> state = prefix_state_update(prefix_state_init(2, 8, 8), *pair)
    >>> bool(abs(prefix_state_downdate(state, *pair).k).max() < 1e-3)
    True
  """
  return _changed(state, key, value, feature_map, scale, -1)


def _check_sums(name: str, dtype: Any) -> None:
  dtype = jnp.dtype(dtype)
  if dtype not in (jnp.float32, jnp.float64):
    raise ValueError(f"{name} must be float32 or float64, got {dtype}")


def _changed(
  state: PrefixState,
  key: jax.Array,
  value: jax.Array,
  feature_map: str | FeatureMap,
  scale: Any,
  sign: int,
) -> PrefixState:
  state = PrefixState(*map(jnp.asarray, state))
  key, value = jnp.asarray(key), jnp.asarray(value)
  _checks.check_rank("key", key, 3)
  sizes = _checks.check_attention(key, key, value)
  check_scale(scale)
  feature_map = as_feature_map(feature_map)
  heads = {"key": sizes.num_kv_heads}
  dims = sizes.head_dim, sizes.value_dim
  check_state(state, heads, feature_map, *dims)
  _check_sums("dtype of state.z", state.z.dtype)
  return _add(state, key, value, feature_map, scale, sign)


@functools.partial(jax.jit, static_argnames="sign")
def _add(
  state: PrefixState,
  key: jax.Array,
  value: jax.Array,
  feature_map: FeatureMap,
  scale: Any,
  sign: int,
) -> PrefixState:
  scale = scale_of(scale, key)

  def feature_fn(x: jax.Array) -> jax.Array:
    return apply_feature_map(feature_map, x, scale=scale)

  moments = sign * feature_moments(feature_fn, key, value)
  z, k = moments[..., :-1], moments[..., -1]
  return PrefixState(
    state.z + z.astype(state.z.dtype), state.k + k.astype(state.k.dtype)
  )


def scale_of(scale: Any, x: jax.Array) -> jax.Array:
  """The factor on the logits of queries or keys ``x``, None resolved."""
  scale = 1 / math.sqrt(x.shape[-1]) if scale is None else scale
  return jnp.asarray(scale, accumulator(x.dtype))


def check_scale(scale: Any) -> None:
  """Refuses scales without a square root, which features need."""
  if scale is not None:
    _checks.check_scalar("scale", scale)
    _checks.check_positive("scale", scale)


def check_state(
  state: PrefixState,
  heads: dict[str, int] | None,
  feature_map: FeatureMap,
  head_dim: int,
  value_dim: int | None,
) -> None:
  """Raises unless a state fits a call.

  Args:
    state: the state.
    heads: numbers of heads that would do, by the argument that has them; or
      None if any will do.
    feature_map: of the call.
    head_dim: H.
    value_dim: Hv, or None if any will do.
  """
  z, k = state
  _checks.check_rank("state.z", z, 3)
  _checks.check_floating("state.z", z)
  _checks.check_floating("state.k", k)
  _checks.check_shape("state.k", k, z.shape[:2], "that of state.z without Hv")
  if heads is not None and len(z) not in heads.values():
    wanted = " and ".join(f"{name} has {n}" for name, n in heads.items())
    raise ValueError(f"state.z has {len(z)} heads, {wanted}")
  num_features = feature_dim(feature_map, head_dim)
  if z.shape[1] != num_features:
    raise ValueError(
      f"state.z has {z.shape[1]} features, feature_map has {num_features} for "
      f"heads of size {head_dim}"
    )
  if value_dim is not None and z.shape[2] != value_dim:
    raise ValueError(
      f"value dim of state ({z.shape[2]}) != value dim ({value_dim})"
    )


def feature_dim(feature_map: FeatureMap, head_dim: int) -> int:
  """Number of features of a vector of size ``head_dim``."""
  x = jax.ShapeDtypeStruct((head_dim,), jnp.float32)
  apply = functools.partial(apply_feature_map, feature_map)
  return jax.eval_shape(apply, x).shape[-1]
