r"""Feature maps: what stands in for exp in attention of linear cost.

A map :math:`\phi: R^H \to R^r` gives the kernel
:math:`\phi(\sqrt s\, q) \cdot \phi(\sqrt s\, k)`, s the scale of the logits:

* Taylor features are :math:`\sum_{j \le g} (s \langle q, k \rangle)^j / j!`;
* FAVOR+ features are positive and :math:`e^{s \langle q, k \rangle}` in
  expectation (arXiv 2009.14794);
* sketched features are a polynomial of the inner product in expectation;
* elu + 1, relu and the identity are learnable parametrizations, positive (or
  not) and cheap; they do not approximate exp.

A map is data: it passes through ``jit``, ``vmap`` and ``grad`` as a pytree.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxattn import _checks
from jaxattn.features.coefficients import read_coefficients
from jaxattn.features.monomials import taylor_features
from jaxattn.numerics._dtypes import accumulator
from jaxattn.sketch import (
  PolySketch,
  poly_sketch_apply,
  poly_sketch_init,
  tensor_sketch_apply,
  tensor_sketch_init,
)

_NAMES = ("elu", "identity", "relu")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["arrays"],
  meta_fields=["kind", "dim", "degrees"],
)
@dataclasses.dataclass(frozen=True)
class FeatureMap:
  """A feature map, made by one of the functions of this module.

  Source: this project.

  Attributes:
    kind: "elu", "identity", "relu", "taylor", "favor" or "sketched"; static.
    dim: H, of "favor" and "sketched"; None takes any; static.
    degrees: of "taylor", its one degree; of "sketched", those of the terms;
      static.
    arrays: what was drawn: projections, or weights and sketches.
  """

  kind: str
  dim: int | None = None
  degrees: tuple[int, ...] = ()
  arrays: Any = None


def apply_feature_map(
  feature_map: str | FeatureMap, x: jax.Array, *, scale: float | jax.Array = 1.0
) -> jax.Array:
  r"""Features of queries or keys: the map applied to sqrt(scale) x.

  Args:
    feature_map: ``"elu"`` (elu + 1, positive), ``"relu"``, ``"identity"``, or a
      :class:`FeatureMap`.
    x: (..., H), floating.
    scale: s > 0, factor on the logits, shared by both sides; may be traced.

  Returns:
    (..., r) of the dtype of ``x``; computed in float32 for 16-bit inputs.

  Raises:
    ValueError: if the name is unknown, ``x`` is not floating or not of the
      size that the map was drawn for, or ``scale`` is not positive.

  Cost:
    O(r) a vector; O(r H) for FAVOR+, see :func:`tensor_sketch_apply` for
    sketches.

  Source:
    arXiv 2006.16236 for elu + 1; see each factory for the others.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.array([-1.0, 0.0, 2.0])
    >>> print(apply_feature_map("elu", x).round(2))
    [0.37 1.   3.  ]
    >>> apply_feature_map(taylor_map(2), x).shape
    (10,)
  """
  x = jnp.asarray(x)
  if x.ndim == 0:
    raise ValueError("x must have shape (..., H), got a scalar")
  _checks.check_floating("x", x)
  _checks.check_scalar("scale", scale)
  _checks.check_positive("scale", scale)
  feature_map = as_feature_map(feature_map)
  if feature_map.dim not in (None, x.shape[-1]):
    raise ValueError(
      f"x must have shape (..., {feature_map.dim}), got {x.shape}"
    )
  return _apply(feature_map, x, scale)


def taylor_map(degree: int) -> FeatureMap:
  r"""Features whose inner product is the Taylor polynomial of exp.

  Args:
    degree: g >= 0. With an odd one the kernel is negative below some logit: -1
      for degree 1, about -1.6 for degree 3.

  Returns:
    The map; C(H + g, g) features.

  Raises:
    ValueError: if ``degree`` is negative.

  Cost:
    O(1); see :func:`taylor_features` for its use.

  Source:
    arXiv 2302.13214; degree 1 is the map of arXiv 2406.14036, section 4.

  Example:
    >>> taylor_map(2)
    FeatureMap(kind='taylor', dim=None, degrees=(2,), arrays=None)
  """
  _checks.check_integer("degree", degree, 0, None)
  return FeatureMap("taylor", degrees=(int(degree),))


def favor_map(
  rng: jax.Array, dim: int, num_features: int, *, orthogonal: bool = True
) -> FeatureMap:
  r"""Draws positive random features of exp, unbiased.

  .. math:: \phi(x)_i = \frac{1}{\sqrt r}
    \exp\bigl(\langle w_i, x \rangle - \tfrac12 \|x\|^2\bigr), \qquad
    E\, \phi(x) \cdot \phi(y) = e^{\langle x, y \rangle}

  The relative variance is about :math:`e^{\|x + y\|^2} / r`: for small vectors
  only.

  Args:
    rng: key.
    dim: H, size of a vector.
    num_features: r.
    orthogonal: the w_i are orthogonal within blocks of H, which lowers the
      variance; each is N(0, I) either way.

  Returns:
    The map.

  Raises:
    ValueError: if a size is too small.

  Cost:
    O(r H^2) time with ``orthogonal``, O(r H) memory.

  Source:
    arXiv 2009.14794, lemma 1 and section 2.4.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> phi = favor_map(jax.random.key(0), 4, 256)
    >>> x = apply_feature_map(phi, jnp.full(4, 0.25))
    >>> print(x.shape, bool(abs(x @ x - jnp.exp(0.25)) < 0.1))
    (256,) True
  """
  _checks.check_integer("dim", dim, 1, None)
  _checks.check_integer("num_features", num_features, 1, None)
  _checks.check_choice("orthogonal", orthogonal, (False, True))
  if not orthogonal:
    projections = jax.random.normal(rng, (num_features, dim))
    return FeatureMap("favor", int(dim), arrays=projections)
  rng_direction, rng_length = jax.random.split(rng)
  blocks = -(-num_features // dim)
  direction = jax.random.orthogonal(rng_direction, dim, (blocks,))
  direction = direction.reshape(-1, dim)[:num_features]
  gauss = jax.random.normal(rng_length, (num_features, dim))
  length = jnp.linalg.norm(gauss, axis=-1, keepdims=True)
  return FeatureMap("favor", int(dim), arrays=direction * length)


def sketched_map(
  rng: jax.Array,
  dim: int,
  coefficients: ArrayLike,
  sketch_dim: int,
  *,
  method: str = "tensor_sketch",
) -> FeatureMap:
  r"""Draws features of a polynomial of the inner product.

  .. math:: E\, \phi(x) \cdot \phi(y) = \sum_j c_j \langle x, y \rangle^j

  Unbiased for the polynomial; a ratio of sums of it, as attention is, is not.
  Terms of degree 0 and 1 are exact, each higher one is a sketch of its own. The
  error of a term is about
  :math:`c_j \|x\|^j \|y\|^j / \sqrt{\text{sketch\_dim}}`: for rough accuracy,
  where C(H + g, g) exact features are too many. Estimates may be negative.

  Args:
    rng: key.
    dim: H, size of a vector.
    coefficients: (g + 1,) numbers c_j >= 0, constant first, such as
      :func:`polynomial_coefficients`; on the host.
    sketch_dim: features of each term of degree 2 and more that is not 0.
    method: ``"tensor_sketch"`` or ``"poly_sketch"``.

  Returns:
    The map; at most 1 + H + (g - 1) sketch_dim features.

  Raises:
    ValueError: if a size is too small, the method unknown, or the coefficients
      are no vector of non-negative numbers, or all 0.

  Cost:
    As the sketches of all degrees.

  Source:
    Pham and Pagh, KDD 2013, and arXiv 2310.01655; the sum over degrees is this
    project's.

  Example:
    >>> import jax
    >>> phi = sketched_map(jax.random.key(0), 64, [1.0, 1.0, 0.5], 256)
    >>> apply_feature_map(phi, jax.numpy.ones(64)).shape
    (321,)
  """
  coefficients = read_coefficients(coefficients)
  valid = np.isfinite(coefficients) & (coefficients >= 0)
  if not (valid.all() and coefficients.any()):
    raise ValueError(
      "coefficients must be a vector of finite numbers >= 0, not all of them "
      f"0, got {coefficients}"
    )
  _checks.check_integer("dim", dim, 1, None)
  _checks.check_integer("sketch_dim", sketch_dim, 1, None)
  _checks.check_choice("method", method, ("tensor_sketch", "poly_sketch"))
  init = tensor_sketch_init if method == "tensor_sketch" else poly_sketch_init
  degrees = tuple(map(int, np.flatnonzero(coefficients)))
  sketches = [
    init(jax.random.fold_in(rng, j), dim, sketch_dim, j) if j > 1 else None
    for j in degrees
  ]
  roots = jnp.asarray(np.sqrt(coefficients[list(degrees)]))
  return FeatureMap("sketched", int(dim), degrees, (roots, sketches))


def as_feature_map(feature_map: str | FeatureMap) -> FeatureMap:
  """Turns a name into a map; what is a map stays."""
  if isinstance(feature_map, FeatureMap):
    return feature_map
  if feature_map not in _NAMES:
    raise ValueError(
      f"feature_map must be one of {', '.join(map(repr, _NAMES))} or a "
      f"FeatureMap, got {feature_map!r}"
    )
  return FeatureMap(feature_map)


@jax.jit
def _apply(
  feature_map: FeatureMap, x: jax.Array, scale: float | jax.Array
) -> jax.Array:
  dtype = accumulator(x.dtype)
  scale = jnp.asarray(scale, dtype)
  if feature_map.kind == "taylor":
    (degree,) = feature_map.degrees
    features = taylor_features(x.astype(dtype), degree, scale=scale)
    return features.astype(x.dtype)
  transform = {
    # Not elu(x) + 1, which rounds exp(x) to 0 long before it is.
    "elu": lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x))),
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "favor": functools.partial(_favor, feature_map.arrays),
    "sketched": functools.partial(_sketched, feature_map),
  }[feature_map.kind]
  return transform(x.astype(dtype) * jnp.sqrt(scale)).astype(x.dtype)


def _favor(projections: jax.Array, x: jax.Array) -> jax.Array:
  projections = projections.astype(x.dtype)
  half_norm = (x * x).sum(-1, keepdims=True) / 2
  return jnp.exp(x @ projections.T - half_norm) / len(projections) ** 0.5


def _sketched(feature_map: FeatureMap, x: jax.Array) -> jax.Array:
  roots, sketches = feature_map.arrays
  roots = roots.astype(x.dtype)
  terms = zip(feature_map.degrees, roots, sketches, strict=True)
  parts = [root * _power(degree, sketch, x) for degree, root, sketch in terms]
  return jnp.concatenate(parts, -1)


def _power(degree: int, sketch: Any, x: jax.Array) -> jax.Array:
  """Features of <x, y>^degree."""
  if degree < 2:
    return x if degree else jnp.ones_like(x[..., :1])
  if isinstance(sketch, PolySketch):
    return poly_sketch_apply(sketch, x)
  return tensor_sketch_apply(sketch, x)
