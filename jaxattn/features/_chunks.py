"""Pieces of prefix sums of features: blocks of features, chunks of tokens."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _compat
from jaxattn.features import maps, monomials

# Features of a chunk, all heads of a group together: 4 MiB of float32.
CHUNK_FEATURES = 1 << 20
MIN_CHUNK, _MAX_CHUNK = 256, 2048
_MIN_CAUSAL_CHUNK, _MAX_CAUSAL_CHUNK = 64, 128

# Features, cut along m.
Blocks = tuple[jax.Array, ...]


class Spec(NamedTuple):
  """Static facts of one call.

  Attributes:
    coefficients: of the polynomial kernel; None = inputs are features already,
      and the kernel is their inner product.
    radius: largest absolute logit that is promised; None = none is needed.
    exact_local: use exp for pairs inside a chunk of causal attention whose
      logit is within the radius.
    closed_form: put the weights into the exact formula of the gradient, instead
      of differentiating the kernel; right for a kernel near exp.
    is_causal: query t sees keys 0 to t.
    normalize: divide by the sum of weights.
    min_denominator: least size of that sum.
    chunk_size: tokens at a time; None = chosen from sizes.
    precision: of the matrix products.
    sketch: random features of the polynomial kernel in place of monomials. As
      it holds arrays, it is set only inside of what is given the others.
  """

  coefficients: tuple[float, ...] | None = None
  radius: float | None = None
  exact_local: bool = False
  closed_form: bool = False
  is_causal: bool = False
  normalize: bool = True
  min_denominator: float = 0.0
  chunk_size: int | None = None
  precision: Any = None
  sketch: maps.FeatureMap | None = None

  def features(self, x: jax.Array) -> tuple[jax.Array, ...]:
    """(..., d, c) -> blocks of (..., m, c)."""
    if self.sketch is not None:
      x = maps.apply_feature_map(self.sketch, jnp.swapaxes(x, -1, -2))
      return (jnp.swapaxes(x, -1, -2),)
    if self.coefficients is None:
      return (x,)
    return monomials.monomial_blocks(x, len(self.coefficients) - 1)

  def num_features(self, dim: int) -> int:
    """M, from d."""
    if self.sketch is not None:
      x = jax.ShapeDtypeStruct((dim, 1), jnp.float32)
      return jax.eval_shape(self.features, x)[0].shape[0]
    if self.coefficients is None:
      return dim
    return monomials.feature_count(dim, len(self.coefficients) - 1)

  def weigh(self, moments: jax.Array, dim: int) -> jax.Array:
    """Multiplies (..., m, v) by the weights of the features."""
    if self.coefficients is None or self.sketch is not None:
      return moments
    weights = _weights(dim, self.coefficients)
    return moments * jnp.asarray(weights, moments.dtype).reshape(
      (1,) * (moments.ndim - 2) + (-1, 1)
    )

  def local(self, logits: jax.Array) -> jax.Array:
    """The kernel of a pair inside a chunk, from its inner product."""
    if not self.exact_local:
      return self._kernel(logits)
    assert self.radius is not None
    # Beyond the radius exp would outgrow the weights of all other chunks.
    inside = jnp.abs(logits) <= self.radius
    exact = jnp.exp(jnp.where(inside, logits, 0))
    return jnp.where(inside, exact, self._polynomial(logits))

  def _kernel(self, logits: jax.Array) -> jax.Array:
    if self.coefficients is None or self.sketch is not None:
      return logits
    return self._polynomial(logits)

  def _polynomial(self, logits: jax.Array) -> jax.Array:
    assert self.coefficients is not None
    total = jnp.full_like(logits, self.coefficients[-1])
    for c in self.coefficients[-2::-1]:
      total = total * logits + jnp.asarray(c, logits.dtype)
    return total


# A trace asks for them in each of its loops.
@functools.lru_cache(maxsize=16)
def _weights(dim: int, coefficients: tuple[float, ...]) -> np.ndarray:
  return monomials.monomial_weights(dim, coefficients)


@functools.lru_cache(maxsize=16)
def static_weights(
  dim: int, coefficients: tuple[float, ...]
) -> tuple[float, ...]:
  """Weights of the features as plain numbers, for kernels."""
  return tuple(_weights(dim, coefficients).tolist())


def local_weights(q: jax.Array, k: jax.Array, spec: Spec) -> jax.Array:
  """(P, G, c, c) kernel of the pairs in a chunk, 0 above the diagonal."""
  if spec.sketch is not None and not spec.exact_local:
    (phi,), (k,) = spec.features(flat(q)), spec.features(k)
    q = phi.reshape(*phi.shape[:2], *q.shape[2:])
  logits = products("pdgt,pds->pgts", q, k, spec)
  return lower(spec.local(lower(logits)))


def lower(x: jax.Array) -> jax.Array:
  """Zero above the diagonal, where logits may be large."""
  return jnp.where(jnp.tri(x.shape[-1], dtype=bool)[None, None], x, 0)


def values(x: jax.Array, v: jax.Array) -> jax.Array:
  """The columns of ordinary moments: what is summed with the features of x."""
  del x
  return v


def pairs(x: jax.Array, v: jax.Array) -> jax.Array:
  """(P, d, c), (P, v, c) -> (P, d * v, c), columns of the closed form."""
  product = x[:, :, None] * v[:, None]
  return product.reshape(x.shape[0], -1, x.shape[2])


def moments(
  key: jax.Array,
  value: jax.Array,
  spec: Spec,
  columns: Callable[[jax.Array, jax.Array], jax.Array] = values,
) -> jax.Array:
  """(P, d, S), (P, v, S) -> (P, m, v), unweighted; other columns, other v."""
  start = no_moments(columns, key, value, spec, key, value)
  chunk, num = chunk_sizes(key, spec, start.shape[2])
  key, value = (fit(x, chunk * num, 2) for x in (key, value))

  def step(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
    k, v = (at(x, i, chunk) for x in (key, value))
    return total + outer(spec.features(k), columns(k, v), spec), None

  return scan(step, start, num)[0]


def sums(query: jax.Array, weighted: jax.Array, spec: Spec) -> jax.Array:
  """(P, d, G, T), (P, m, v) -> (P, v, G, T)."""
  p, d, g, t = query.shape
  query = query.reshape(p, d, g * t)
  chunk, num = chunk_sizes(query, spec, weighted.shape[2])
  query = fit(query, chunk * num, 2)

  def step(_: None, i: jax.Array) -> tuple[None, jax.Array]:
    return None, project(weighted, spec.features(at(query, i, chunk)), spec)

  out = join(scan(step, None, num)[1], g * t)
  return out.reshape(p, -1, g, t)


def flat(x: jax.Array) -> jax.Array:
  """(P, a, G, c) -> (P, a, G * c)."""
  return x.reshape(*x.shape[:2], -1)


def products(how: str, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
  return jnp.einsum(how, a, b, precision=spec.precision)


def outer(phi: Blocks, v: jax.Array, spec: Spec) -> jax.Array:
  """Blocks of (P, m, c), (P, v, c) -> (P, m, v)."""
  parts = [products("pmc,pvc->pmv", x, v, spec) for x in phi]
  return jnp.concatenate(parts, 1)


def project(weighted: jax.Array, phi: Blocks, spec: Spec) -> jax.Array:
  """(P, m, v), blocks of (P, m, c) -> (P, v, c)."""
  parts = zip(_split(weighted, phi), phi, strict=True)
  totals = [products("pmv,pmc->pvc", w, x, spec) for w, x in parts]
  return functools.reduce(jnp.add, totals)


def back(weighted: jax.Array, v: jax.Array, phi: Blocks, spec: Spec) -> Blocks:
  """(P, m, v), (P, v, c) -> blocks of (P, m, c), like ``phi``."""
  parts = _split(weighted, phi)
  return tuple(products("pmv,pvc->pmc", w, v, spec) for w in parts)


def _split(weighted: jax.Array, phi: Blocks) -> list[jax.Array]:
  ends = np.cumsum([x.shape[1] for x in phi])[:-1]
  return jnp.split(weighted, ends, axis=1)


def chunk_sizes(x: jax.Array, spec: Spec, width: int) -> tuple[int, int]:
  """Tokens in a chunk of x (P, d, L), and number of chunks.

  Args:
    x: what features are made of.
    spec: static facts.
    width: numbers a token that features are multiplied with, or make.
  """
  p, d, length = x.shape
  chunk = spec.chunk_size
  if chunk is None:
    chunk = CHUNK_FEATURES // (p * max(spec.num_features(d), width))
    chunk = max(MIN_CHUNK, min(_MAX_CHUNK, chunk))
  num = -(-length // chunk)
  # Even chunks, so that little is padded.
  return -(-length // num), num


def fit(x: jax.Array, size: int, axis: int) -> jax.Array:
  """Cuts ``axis`` to a size, or pads it with zeros."""
  x = lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
  pad = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
  return jnp.pad(x, pad) if size > x.shape[axis] else x


def at(x: jax.Array, i: jax.Array, chunk: int) -> jax.Array:
  """Chunk ``i`` of the last axis."""
  return lax.dynamic_slice_in_dim(x, i * chunk, chunk, x.ndim - 1)


def join(chunks: jax.Array, size: int) -> jax.Array:
  """(num, ..., c) -> (..., size)."""
  x = jnp.moveaxis(chunks, 0, -2)
  return x.reshape(*x.shape[:-2], -1)[..., :size]


class Staircase(NamedTuple):
  """Chunks of causal attention, some of them at a time.

  The chunks of one step are rows of a batch: their moments are computed
  together, and what is before each is a cumulative sum over them.

  Attributes:
    num_steps: steps of the scan.
    num_chunks: chunks in a step.
    chunk: tokens in a chunk.
  """

  num_steps: int
  num_chunks: int
  chunk: int

  def fold(self, x: jax.Array) -> jax.Array:
    """(P, ..., L) -> (steps, P * chunks, ..., c)."""
    sizes = tuple(self)
    x = fit(x, int(np.prod(sizes)), x.ndim - 1)
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], *sizes), (-3, -2), (0, 2))
    return x.reshape(x.shape[0], -1, *x.shape[3:])

  def unfold(self, x: jax.Array, size: int) -> jax.Array:
    """(steps, P * chunks, ..., c) -> (P, ..., size)."""
    x = x.reshape(self.num_steps, -1, self.num_chunks, *x.shape[2:])
    x = jnp.moveaxis(x, (0, 2), (-3, -2))
    return x.reshape(*x.shape[:-3], -1)[..., :size]

  def sums_before(
    self, parts: jax.Array, total: jax.Array, *, reverse: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    """Sum of the parts before each, and of all.

    Args:
      parts: (P * chunks, m, v) of the chunks of this step.
      total: (P, m, v) of the steps before.
      reverse: whether "before" means behind.

    Returns:
      (P * chunks, m, v), and (P, m, v) with this step.
    """
    by_chunk = parts.reshape(-1, self.num_chunks, *parts.shape[1:])
    if reverse:
      by_chunk = jnp.flip(by_chunk, 1)
    ends = total[:, None] + jnp.cumsum(by_chunk, 1)
    before = jnp.concatenate([total[:, None], ends[:, :-1]], 1)
    if reverse:
      before = jnp.flip(before, 1)
    return before.reshape(parts.shape), ends[:, -1]


def staircase(query: jax.Array, value: jax.Array, spec: Spec) -> Staircase:
  """Cuts a causal call: query (P, d, G, T), value (P, v, T)."""
  p, d, g, length = query.shape
  chunk = spec.chunk_size
  if chunk is None:
    # Pairs in a chunk cost as much as m features.
    chunk = max(_MIN_CAUSAL_CHUNK, min(_MAX_CAUSAL_CHUNK, spec.num_features(d)))
  num = -(-length // chunk)
  # Even chunks, so that little is padded.
  chunk = -(-length // num)
  width = value.shape[1] * (d if spec.closed_form else 1)
  most = CHUNK_FEATURES // (p * spec.num_features(d) * max(g * chunk, width))
  steps = -(-num // max(1, min(_MAX_CHUNK // chunk, most)))
  return Staircase(steps, -(-num // steps), chunk)


def scan(step: Any, start: Any, num: int) -> Any:
  if num == 1:
    carry, y = step(start, jnp.int32(0))
    return carry, jax.tree.map(lambda z: z[None], y)
  steps = jnp.arange(num, dtype=jnp.int32)
  return lax.scan(step, start, steps)


def zeros(shape: tuple[int, ...], *like: jax.Array) -> jax.Array:
  return _compat.full_varying(
    shape, 0, like[0].dtype, _compat.varying_axes(like)
  )


def no_moments(
  columns: Callable[[jax.Array, jax.Array], jax.Array],
  key: jax.Array,
  value: jax.Array,
  spec: Spec,
  *like: jax.Array,
) -> jax.Array:
  """(P, m, v) zeros to add moments to, v the number of ``columns``."""
  p, d, _ = key.shape
  width = columns(key[..., :1], value[..., :1]).shape[1]
  return zeros((p, spec.num_features(d), width), *like)


def ones_column(value: jax.Array) -> jax.Array:
  """Values (..., S, K, Hv) with a column of ones behind."""
  return jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)


def hide(x: jax.Array, key_mask: jax.Array | None) -> jax.Array:
  """0 in (B, S, K, ...) where a key mask (B, S) is False, NaN included."""
  if key_mask is None:
    return x
  return jnp.where(key_mask[..., None, None], x, 0)
