r"""Fits the state of a prefix to the outputs that it should give.

Summing features gives the state of given tokens, which is only as good as the
feature map. A state can also be asked for by what attention should return: the
equations are linear in it. Source: this project.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.attention._prefix import _least_squares
from jaxattn.attention._prefix.exact import context_part
from jaxattn.attention._prefix.state import (
  PrefixState,
  check_scale,
  scale_of,
)
from jaxattn.features import FeatureMap, apply_feature_map
from jaxattn.features.maps import as_feature_map
from jaxattn.numerics._dtypes import accumulator


def fit_prefix_state(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  target: jax.Array,
  *,
  feature_map: str | FeatureMap = "elu",
  log_mass: jax.Array | None = None,
  ridge: float | jax.Array = 1e-6,
  scale: float | jax.Array | None = None,
) -> PrefixState:
  r"""State under which ``ntk_attention`` returns what it should, nearly.

  For the context output c, its log-sum-exp l and the target o of each query,

  .. math:: Z^\top \phi(q) - o\, k^\top \phi(q) = e^l (o - c)

  is linear in (Z, k) and solved by ridge least squares, one head of keys at a
  time; the queries of a group share it. Outputs alone say little about the
  size of k where c hardly varies: give ``log_mass`` if it is known. Nothing
  keeps k positive: on queries far from those given a denominator may not be,
  and ``ntk_attention`` reports it.

  Args:
    query: (B, T, N, H), or (T, N, H); samples of the queries to come.
    key: (B, S, K, H), the context; each query sees all of it.
    value: (B, S, K, Hv).
    target: (B, T, N, Hv) wanted outputs, for instance of
      :func:`~jaxattn.attention.prefix_attention`.
    feature_map: "elu", "identity", "relu" or a ``FeatureMap``; the one that
      queries will use.
    log_mass: (B, T, N) logarithm of the sum of exponentials over the prefix,
      the log-sum-exp of ``softmax_attention`` to it; also fitted, and used to
      weight each query by its denominator.
    ridge: factor on half the sum of squares of z and k, relative to the mean
      eigenvalue of the least-squares problem of a column of z; positive.
    scale: factor on the logits; None = 1 / sqrt(H).

  Returns:
    A state of K heads, of the accumulation dtype.

  Raises:
    ValueError: if shapes, dtypes or options do not fit.

  Cost:
    O(R Hv r^2) time and O(R r) memory a head, for R = B T N / K rows and r
    features: for hundreds of features, not thousands.

  Source:
    this project.

  Example:
    >>> import jax
    >>> from jaxattn.attention import ntk_attention, prefix_attention
    >>> from jaxattn.attention import softmax_attention
    >>> q, k, v = 0.5 * jax.random.normal(jax.random.key(0), (3, 256, 1, 4))
    >>> prefix = jax.random.normal(jax.random.key(1), (2, 64, 1, 4))
    >>> target = prefix_attention(q, k, v, *prefix)
    >>> _, log_mass = softmax_attention(q, *prefix, return_residual=True)
    >>> state = fit_prefix_state(q, k, v, target, log_mass=log_mass)
    >>> error = ntk_attention(q, k, v, state) - target
    >>> without = softmax_attention(q, k, v) - target
    >>> bool(jax.numpy.linalg.norm(error) < jax.numpy.linalg.norm(without) / 2)
    True
  """
  query, key, value, target = map(jnp.asarray, (query, key, value, target))
  _checks.check_attention(query, key, value)
  shape = *query.shape[:-1], value.shape[-1]
  _checks.check_shape("target", target, shape, "that of the output")
  _checks.check_floating("target", target)
  if log_mass is not None:
    log_mass = jnp.asarray(log_mass)
    _checks.check_shape("log_mass", log_mass, shape[:-1], "(B, T, N)")
    _checks.check_floating("log_mass", log_mass)
  check_scale(scale)
  _checks.check_scalar("ridge", ridge)
  _checks.check_positive("ridge", ridge)
  arrays = map(_checks.four_dims, (query, key, value, target))
  if log_mass is not None:
    log_mass = log_mass.reshape((-1, *shape[-3:-1]))
  return _fit(*arrays, log_mass, as_feature_map(feature_map), ridge, scale)


@jax.jit
def _fit(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  target: jax.Array,
  log_mass: jax.Array | None,
  feature_map: FeatureMap,
  ridge: Any,
  scale: Any,
) -> PrefixState:
  dtype = accumulator(query.dtype)
  query, key, value, target = (
    x.astype(dtype) for x in (query, key, value, target)
  )
  kv = key.shape[2]
  highest = lax.Precision.HIGHEST
  context, _, lse = context_part(
    query, key, value, None, None, scale=scale, precision=highest
  )
  phi = apply_feature_map(feature_map, query, scale=scale_of(scale, query))

  def rows(x: jax.Array) -> jax.Array:
    """(B, T, N, ...) to (K, B T G, ...)."""
    b, t, n, *rest = x.shape
    x = jnp.moveaxis(x.reshape(b * t, kv, n // kv, *rest), 1, 0)
    return x.reshape(kv, -1, *rest)

  def one_head(x: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    return _least_squares.fit_head(**x, ridge=jnp.asarray(ridge, dtype))

  if log_mass is not None:
    log_mass = log_mass.astype(dtype)
  arrays = {
    "phi": phi,
    "target": target,
    "context": context,
    "lse": lse,
    "log_mass": log_mass,
  }
  return PrefixState(*lax.map(one_head, jax.tree.map(rows, arrays)))
