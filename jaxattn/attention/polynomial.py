r"""Softmax attention in almost linear time, for bounded logits.

With :math:`S = \text{scale} \cdot Q K^\top`, :math:`|S_{ij}| \le R`, and a
polynomial p of even degree g with :math:`|p(x) e^{-x} - 1| \le \varepsilon` on
[-R, R],

.. math::

  \tilde A_{ij} = p(S_{ij}) = \sum_{|\alpha| \le g}
    w_\alpha (\text{scale} \cdot q_i)^\alpha k_j^\alpha, \qquad
  \tilde O = \operatorname{diag}(\tilde A 1)^{-1} \tilde A V

needs :math:`m = \binom{H + g}{g}` features a token and no matrix of T x S.
Each output is off by at most the range of its value column times
:math:`\varepsilon / (1 + \sqrt{1 - \varepsilon^2})`. Sources: arXiv 2302.13214
for the idea and its limits, arXiv 2402.04497 for the gradient; polynomials,
bound and chunked causal form are this project's.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks, _compat
from jaxattn.features import _chunks, _scan, _scan_kernels, maps
from jaxattn.features.coefficients import polynomial_coefficients
from jaxattn.features.monomials import check_feature_count
from jaxattn.numerics._dtypes import accumulator

_IMPLEMENTATIONS = (None, "xla", "pallas", "pallas_interpret")
# The highest powers of balanced keys stay below 2 to this.
_MAX_EXPONENT = 64
# A power of two that float32 has, and its inverse.
_MAX_STEPS = 120
# Tokens that the size of queries and keys is read from.
_SAMPLE = 512


def polynomial_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  degree: int,
  radius: float,
  coefficients: str = "minimax",
  sigma: float | None = None,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  key_mask: jax.Array | None = None,
  mask: None = None,
  bias: None = None,
  local: str = "exact",
  center_keys: bool | None = None,
  key_shift: jax.Array | None = None,
  backward: str = "surrogate",
  sketch_dim: int | None = None,
  rng: jax.Array | None = None,
  allow_odd: bool = False,
  chunk_size: int | None = None,
  implementation: str | None = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  r"""Softmax attention with exp replaced by a polynomial, in linear time.

  Worth it when T and S exceed about 4 C(H + g, g), so for many small heads.
  What error to expect: :func:`jaxattn.features.attention_error_bound` of
  :func:`jaxattn.features.polynomial_error`. How large logits are:
  :func:`jaxattn.attention.logit_radius`, with the same shift of the keys as
  here; given the radius, it is the checked mode. Nothing here checks that the
  logits stay within the radius; with an even degree weights stay positive
  beyond it.

  A common shift of all keys changes no softmax, so that non-causal calls
  subtract the mean of the keys first, which makes most logits smaller. If all
  that is known is a bound on the logits as they are, pass
  ``center_keys=False``: with the shift some may reach twice that.

  Only the logits matter, not how their size is shared between queries and keys:
  both are multiplied by a power of two, for their features not to overflow.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    key: (B, S, K, H). K divides N: each key head serves N / K query heads.
    value: (B, S, K, Hv).
    degree: g, even, at least 0; see ``allow_odd``.
    radius: R > 0, bound on the logits after the shift of the keys; a static
      number.
    coefficients: ``"minimax"``, ``"taylor"`` or ``"gaussian"``, as in
      :func:`jaxattn.features.polynomial_coefficients`.
    sigma: spread of the logits, for ``"gaussian"``.
    scale: factor on the logits; None = 1 / sqrt(H). May be traced.
    is_causal: query t sees keys 0 to t.
    key_mask: boolean (B, S); True = attend.
    mask: must be None: of an arbitrary (T, S) mask nothing in linear time can
      make use.
    bias: must be None, for the same reason.
    local: weights of the pairs inside a chunk of causal attention: ``"exact"``
      takes exp where a logit is within the radius and p beyond it,
      ``"polynomial"`` p, or what a sketch makes of it, so that the result is
      the same kernel everywhere and does not depend on ``chunk_size``.
    center_keys: subtract the mean of the keys that the mask shows. None = where
      that leaks nothing, which is without ``is_causal`` or ``key_shift``.
    key_shift: (K, H) subtracted from the keys, a constant of the model; may be
      used with ``is_causal``.
    backward: ``"surrogate"`` is the gradient of what the forward computes.
      ``"closed_form"`` puts the approximate weights into the exact formula:
      closer to the gradient of exact attention at an equal degree, but of H
      times as many products, and not the gradient of this function.
    sketch_dim: None, or number of random features to take for each degree from
      2 on instead of all monomials, for large H. Each weight is unbiased, with
      an error of about 1 / sqrt(sketch_dim) of the product of the norms to the
      power g, and can be negative. Where their sum is less than the radius
      promises, all keys get more alike; the output, a ratio, is biased, and can
      leave the range of the values. Needs ``rng``; see
      :func:`jaxattn.features.sketched_map`.
    rng: key of the sketch.
    allow_odd: permit odd degrees, whose weights change sign just left of -R.
    chunk_size: tokens at a time; None = chosen from sizes.
    implementation: None = best of the platform, "xla" = scans over chunks,
      "pallas" = the kernels of ``pallas_kernels.polynomial_attention``,
      "pallas_interpret" = the TPU's, interpreted on any platform. Kernels have
      ``backward="surrogate"`` and no sketch. With ``local="exact"`` what a
      ``chunk_size`` of None means is their own affair.
    precision: of the matrix products.

  Returns:
    (B, T, N, Hv) of the dtype of ``query``; 0 for a query that sees no key.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, for instance "degree
      must be even unless allow_odd=True, got 3".
    NotImplementedError: if the named implementation cannot run here.

  Cost:
    (T + S) m (Hv + 1) multiply-adds a head with m = C(H + g, g), and T c
    (H + Hv) more in causal calls with chunks of c = 64 to 128; the gradient
    a few times that. O(T + S) memory and m (Hv + 1) a head, or H times
    that for the closed form. With a sketch m is its number of features.

  Source:
    arXiv 2302.13214, theorem 1.1; arXiv 2402.04497, theorem 1.3, for
    ``backward="closed_form"``; arXiv 2310.01655 for sketched features.

  Example:
    >>> import jax
    >>> from jaxattn.attention import softmax_attention
    >>> q, k, v = 0.5 * jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
    >>> out = polynomial_attention(q, k, v, degree=4, radius=1.0)
    >>> bool(abs(out - softmax_attention(q, k, v)).max() < 1e-3)
    True
  """
  _checks.check_no_mask(mask, bias)
  arrays = tuple(map(jnp.asarray, (query, key, value)))
  key_mask = None if key_mask is None else jnp.asarray(key_mask)
  sizes = _checks.check_attention(*arrays, key_mask=key_mask)
  _check_degree(degree, allow_odd, sizes.head_dim, sketch_dim)
  _checks.check_choice("is_causal", is_causal, (False, True))
  _checks.check_choice("local", local, ("exact", "polynomial"))
  _checks.check_choice("backward", backward, ("surrogate", "closed_form"))
  if scale is not None:
    _checks.check_scalar("scale", scale)
  if chunk_size is not None:
    _checks.check_integer("chunk_size", chunk_size, 1, None)
  key_shift = None if key_shift is None else jnp.asarray(key_shift)
  check_shift(arrays[1], center_keys, key_shift, is_causal)
  if center_keys is None:
    center_keys = not is_causal and key_shift is None
  _check_sketch(sketch_dim, rng, backward)
  implementation = _implementation(implementation, backward, sketch_dim)
  _checks.check_choice(
    "coefficients", coefficients, ("minimax", "taylor", "gaussian")
  )
  polynomial = polynomial_coefficients(
    degree, radius, kind=coefficients, sigma=sigma
  )
  exact_local = is_causal and local == "exact"
  spec = _chunks.Spec(
    coefficients=tuple(map(float, polynomial)),
    radius=float(radius) if exact_local or sketch_dim is not None else None,
    exact_local=exact_local,
    closed_form=backward == "closed_form",
    is_causal=is_causal,
    chunk_size=chunk_size,
    precision=precision,
  )
  arrays = tuple(map(_checks.four_dims, arrays))
  if key_mask is not None:
    key_mask = key_mask.reshape(arrays[1].shape[:2])
  attend = functools.partial(
    _polynomial_attention,
    spec=spec,
    center_keys=center_keys,
    sketch_dim=sketch_dim,
    implementation=implementation,
    on_mesh=_compat.has_explicit_axes(arrays[0]),
  )
  attend = _compat.over_explicit_axes(attend, arrays[0])
  out = attend(*arrays, scale, key_mask, key_shift, rng)
  return out if sizes.batch else out[0]


def _check_degree(
  degree: Any, allow_odd: bool, dim: int, sketch_dim: int | None
) -> None:
  _checks.check_integer("degree", degree, 0, None)
  _checks.check_choice("allow_odd", allow_odd, (False, True))
  if degree % 2 and not allow_odd:
    raise ValueError(
      f"degree must be even unless allow_odd=True, got {degree}: weights of an "
      "odd degree change sign"
    )
  if sketch_dim is None:
    check_feature_count(dim, degree)


def check_shift(
  key: jax.Array, center_keys: bool | None, key_shift: Any, is_causal: bool
) -> None:
  """Checks how the keys (..., S, K, H) are to be shifted."""
  _checks.check_choice("center_keys", center_keys, (None, False, True))
  if center_keys and is_causal:
    raise ValueError(
      "center_keys must not be True with is_causal=True: the mean of all keys "
      "would tell of the future; pass a constant key_shift"
    )
  if center_keys and key_shift is not None:
    raise ValueError("center_keys must not be True with a key_shift")
  if key_shift is not None:
    _checks.check_shape("key_shift", key_shift, key.shape[-2:], "(K, H)")


def _implementation(
  asked: str | None, backward: str, sketch_dim: int | None
) -> str | None:
  """What to run; None = what is best of the scans and the kernels."""
  _checks.check_choice("implementation", asked, _IMPLEMENTATIONS)
  if backward == "surrogate" and sketch_dim is None:
    return asked
  if asked not in (None, "xla"):
    raise NotImplementedError(
      f"implementation={asked!r} cannot run here: kernels have "
      "backward='surrogate' and no sketch_dim"
    )
  return "xla"


def _check_sketch(sketch_dim: Any, rng: Any, backward: str) -> None:
  if sketch_dim is None:
    if rng is not None:
      raise ValueError("rng must be None without sketch_dim")
    return
  _checks.check_integer("sketch_dim", sketch_dim, 1, None)
  if rng is None:
    raise ValueError(f"rng is required when sketch_dim={sketch_dim}")
  if backward != "surrogate":
    raise ValueError(
      f"backward must be 'surrogate' with a sketch, got {backward!r}"
    )


@functools.partial(
  jax.jit,
  static_argnames=(
    "spec",
    "center_keys",
    "sketch_dim",
    "implementation",
    "on_mesh",
  ),
)
def _polynomial_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  scale: Any,
  key_mask: jax.Array | None,
  key_shift: jax.Array | None,
  rng: jax.Array | None,
  *,
  spec: _chunks.Spec,
  center_keys: bool,
  sketch_dim: int | None,
  implementation: str | None,
  on_mesh: bool,
) -> jax.Array:
  dtype = accumulator(query.dtype)
  q, k, v = (x.astype(dtype) for x in (query, key, value))
  k = shift_keys(k, key_mask, key_shift, center_keys)
  scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
  assert spec.coefficients is not None
  degree = len(spec.coefficients) - 1
  shown = sample(k) if key_mask is None else k
  q, (k,) = balanced(q * jnp.asarray(scale, dtype), (k,), (shown,), degree)
  v = _chunks.hide(_chunks.ones_column(v), key_mask)
  if sketch_dim is None and implementation == "xla":
    out = _scan.attend(q, k, v, spec)
  elif sketch_dim is None:
    call = _scan_kernels.Call(implementation, spec, on_mesh)
    out = _scan_kernels.attend(call, q, k, v)
  else:
    assert rng is not None
    sketch = maps.sketched_map(rng, q.shape[-1], spec.coefficients, sketch_dim)
    out = _sketched_attention(q, k, v, spec, sketch)
  return out.astype(query.dtype)


def _sketched_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  spec: _chunks.Spec,
  sketch: maps.FeatureMap,
) -> jax.Array:
  """Attention by random features, values (B, S, K, Hv + 1) with ones last.

  Where the sum of weights falls short of what the radius promises, all keys
  that are seen share what is missing evenly: weights still sum to one.
  """
  sums = spec._replace(normalize=False)
  # The last column of the values is left out of what is not normalized.
  sums = _scan.attend(query, key, _chunks.ones_column(value), sums, sketch)
  out, denominator = sums[..., :-1], sums[..., -1:]
  least, mean_value = _promised(query, key, value, spec)
  missing = jnp.maximum(least - denominator, 0)
  denominator += missing
  return (out + missing * mean_value) / jnp.where(
    denominator == 0, 1, denominator
  )


def _promised(
  query: jax.Array, key: jax.Array, value: jax.Array, spec: _chunks.Spec
) -> tuple[jax.Array, jax.Array]:
  """Least sum of weights (B, T, N, 1) by the radius, and mean of the values.

  The mean of exp of the logits is no less than exp of their mean, for which the
  mean of the keys will do.
  """
  assert spec.radius is not None
  total = jnp.concatenate([key, value], -1)
  if spec.is_causal:
    total = jnp.cumsum(_chunks.fit(total, query.shape[1], 1), 1)
  else:
    total = total.sum(1, keepdims=True)
  total = jnp.repeat(total, query.shape[2] // key.shape[2], 2)
  seen = total[..., -1:]
  mean = total[..., :-1] / jnp.maximum(seen, 1)
  mean_key, mean_value = jnp.split(mean, [key.shape[-1]], -1)
  logits = (query * mean_key).sum(-1, keepdims=True)
  logits = jnp.clip(logits, -spec.radius, spec.radius)
  return _least_ratio(spec) * seen * jnp.exp(logits), mean_value


def _least_ratio(spec: _chunks.Spec) -> float:
  """Least ratio of a weight to exp within the radius; 0 if it is negative."""
  assert spec.radius is not None
  assert spec.coefficients is not None
  x = np.linspace(-spec.radius, spec.radius, 1001)
  weights = np.polynomial.polynomial.polyval(x, spec.coefficients)
  return max(0.0, float((weights * np.exp(-x)).min()))


def balanced(
  query: jax.Array,
  keys: tuple[jax.Array, ...],
  shown: tuple[jax.Array, ...],
  degree: int,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Shares the size of the logits evenly between queries and keys.

  All are multiplied by powers of two, with product 1, so that no bit of a
  result changes unless something overflows: nothing is told of the future.

  Args:
    query: (B, T, N, H).
    keys: of (B, S, K, H); a logit is a sum of products of them all.
    shown: some of the keys of each, to tell their size from.
    degree: g, the highest power that is taken.
  """
  b, t, n, d = query.shape
  kv = keys[0].shape[2]
  grouped = query.reshape(b, t, kv, n // kv, d)
  of_query = _root_mean_square(sample(grouped), (1, 3, 4))
  of_keys = [_root_mean_square(x, (1, 3)) for x in shown]
  # An outlier among the queries must not push the keys out of range.
  bound = 2.0 ** (_MAX_EXPONENT // max(degree, 1))
  # Roots first: a product of them all might overflow itself.
  roots = [x ** (1 / (len(keys) + 1)) for x in (of_query, *of_keys)]
  target = functools.reduce(jnp.multiply, roots)
  target = jnp.clip(target, 1 / bound, bound)
  factors = [_power_of_two(x / target)[:, None, :, None] for x in of_keys]
  for factor in factors:
    grouped = grouped * factor[..., None]
  keys = tuple(k * (1 / f) for k, f in zip(keys, factors, strict=True))
  return grouped.reshape(query.shape), keys


def sample(x: jax.Array) -> jax.Array:
  """Evenly spaced tokens of (B, T, ...): a pass over all would be felt."""
  return x[:, :: max(1, x.shape[1] // _SAMPLE)]


def _root_mean_square(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  x = lax.stop_gradient(x)
  return jnp.sqrt((x * x).mean(axes))


def _power_of_two(x: jax.Array) -> jax.Array:
  """Rounded down to one; 1 for what is not positive and finite."""
  inside = (x > 2.0**-_MAX_STEPS) & (x < 2.0**_MAX_STEPS)
  exponent = jnp.asarray(jnp.inf, x.dtype).view(f"int{8 * x.dtype.itemsize}")
  bits = x.view(exponent.dtype) & exponent
  # By bits, as this is done for each entry anew: loops are fused.
  return jnp.where(inside, bits.view(x.dtype), 1)


def shift_keys(
  key: jax.Array,
  key_mask: jax.Array | None,
  key_shift: Any,
  center_keys: bool,
) -> jax.Array:
  """Keys (B, S, K, H) less a constant (K, H), or their mean; 0 if hidden."""
  if key_shift is not None:
    key = key - jnp.asarray(key_shift, key.dtype)[None, None]
  key = _chunks.hide(key, key_mask)
  if center_keys:
    key = _chunks.hide(key - _mean(key, key_mask), key_mask)
  return key


def _mean(key: jax.Array, key_mask: jax.Array | None) -> jax.Array:
  """Mean (B, 1, K, H) of the keys that are seen; the others are 0."""
  if key_mask is None:
    return key.mean(1, keepdims=True)
  seen = jnp.maximum(key_mask.sum(1, dtype=key.dtype), 1)
  return key.sum(1, keepdims=True) / seen[:, None, None, None]
