r"""Linear attention: the weight of a pair is an inner product of features.

.. math::

  o_i = \frac{\sum_j \langle \phi(q_i), \phi(k_j) \rangle v_j}
             {\sum_j \langle \phi(q_i), \phi(k_j) \rangle}

so keys and values are summed up once, in a state whose size does not grow with
their number. Source: Katharopoulos et al., arXiv 2006.16236.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn._dispatch import Branch, dispatch
from jaxattn.features import FeatureMap, apply_feature_map, moment_attention
from jaxattn.numerics._dtypes import accumulator


def linear_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  feature_map: str | FeatureMap = "elu",
  normalize: bool = True,
  key_mask: jax.Array | None = None,
  mask: None = None,
  bias: None = None,
  min_denominator: float = 1e-6,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  implementation: str | None = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  r"""Attention with kernel phi(q) . phi(k), in linear time.

  ``"elu"`` (elu + 1) has positive weights, ``"relu"`` weights that may all be
  0, and ``"identity"`` the raw scores themselves, whose sum may have any sign:
  the quotient is then large wherever it is near 0, and ``normalize=False`` is
  the stable choice in training. ``taylor_map(2)`` has the positive weights
  :math:`1 + s + s^2 / 2`; for kernels that are polynomials of the score
  :func:`jaxattn.attention.polynomial_attention` is faster, because it never
  holds the features of all tokens.

  Reverse mode of any order works; forward mode is not offered.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    key: (B, S, K, H). K divides N: each key head serves N / K query heads.
    value: (B, S, K, Hv).
    feature_map: ``"elu"``, ``"identity"``, ``"relu"``, or a
      :class:`jaxattn.features.FeatureMap`.
    normalize: divide by the sum of weights; False leaves the weighted sum.
    key_mask: boolean (B, S); True = attend.
    mask: must be None: of an arbitrary (T, S) mask nothing in linear time can
      make use.
    bias: must be None, for the same reason.
    min_denominator: a sum of weights below this in absolute value is replaced
      by it, with the sign that it had. Positive sums are, too: with ``"elu"``
      and very negative queries and keys, whose weights are that small, the
      output is then less than the average; 0 replaces no sum.
    scale: s > 0, the map is applied to sqrt(s) q and sqrt(s) k; None = 1. May
      be traced.
    is_causal: query t sees keys 0 to t.
    implementation: None or "xla".
    precision: of the matrix products.

  Returns:
    (B, T, N, Hv) of the dtype of ``query``; 0 for a query that sees no key.

  Raises:
    ValueError: if shapes, dtypes or options do not fit.

  Cost:
    (T + S) r (Hv + 1) multiply-adds a head for r features (H for the named
    maps); causal, some T (r + Hv) times a chunk more. O((T + S) r) memory, also
    for the gradient.

  Source:
    arXiv 2006.16236, equations 5 and 9; ``"identity"`` is the linear attention
    of arXiv 2310.11685.

  Example:
    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 4, 16))
    >>> linear_attention(q, k, v, is_causal=True).shape
    (1, 128, 4, 16)
  """
  _checks.check_no_mask(mask, bias)
  query, key, value = map(jnp.asarray, (query, key, value))
  key_mask = None if key_mask is None else jnp.asarray(key_mask)
  _checks.check_attention(query, key, value, key_mask=key_mask)
  attend = functools.partial(
    _linear_attention,
    feature_map=feature_map,
    scale=1.0 if scale is None else scale,
    key_mask=key_mask,
    is_causal=is_causal,
    normalize=normalize,
    min_denominator=min_denominator,
    precision=precision,
  )
  return dispatch(implementation, {"xla": Branch(attend)}, query, key, value)


def _linear_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  feature_map: str | FeatureMap,
  scale: Any,
  key_mask: jax.Array | None,
  **options: Any,
) -> jax.Array:
  dtype = accumulator(query.dtype)
  if key_mask is not None:
    # Before the map: what is hidden must not reach the gradient either.
    key = jnp.where(key_mask[..., None, None], key, 0)
  query_features, key_features = (
    apply_feature_map(feature_map, x.astype(dtype), scale=scale)
    for x in (query, key)
  )
  out = moment_attention(
    query_features,
    key_features,
    value.astype(dtype),
    key_mask=key_mask,
    **options,
  )
  return out.astype(query.dtype)
