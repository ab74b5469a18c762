"""A layer of tensor attention, as a flax module."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.attention.tensor import (
  polynomial_tensor_attention,
  tensor_attention,
)
from jaxattn.features.coefficients import static_positive
from jaxattn.numerics._dtypes import accumulator


class TensorAttention(nn.Module):
  r"""Multi-head attention to all pairs of tokens of a sequence.

  Called on (B, T, D) floating inputs it projects them to queries, two keys and
  two values, attends by :func:`jaxattn.attention.tensor_attention`, or with a
  ``degree`` by its polynomial relative in linear time, and returns (B, T, D).
  Parameters depend on D, the heads and ``null_token``: one tree serves the
  exact and the polynomial layer.

  A softmax cannot attend to nothing. With a null token, one more key and value
  in both roles, learned for each head, it can attend to nothing, or to one
  token instead of a pair.

  With a ``radius`` R, vectors x of queries and keys are replaced by
  :math:`x (1 + \|x\|_3^3)^{-1/3}`, of 3-norm less than 1, and logits multiplied
  by R: by Hoelder's inequality no logit exceeds R, the promise that a
  polynomial needs.

  Attributes:
    num_heads: heads.
    head_dim: size of a head, of keys and of values.
    null_token: whether there is a null token.
    radius: bound on the logits; None = none, and a scale of 1 / sqrt(head_dim).
    degree: even degree of the polynomial in place of exp, for which ``radius``
      is required; None = exact.
    is_causal: token t sees pairs of tokens 0 to t; without a null token.

  Raises:
    ValueError: when called, if a field or the input does not fit.

  Cost:
    That of the attention, and 6 T D num_heads head_dim multiply-adds.

  Source:
    arXiv 2405.16411 for the layer; null token and bound are this project's.

  Example:
    >>> import jax
    >>> from jaxattn.models import TensorAttention
    >>> x = jax.random.normal(jax.random.key(0), (3, 20, 16))
    >>> exact = TensorAttention(radius=1.0)
    >>> params = exact.init(jax.random.key(1), x)
    >>> fast = TensorAttention(radius=1.0, degree=4)
    >>> out = fast.apply(params, x)
    >>> out.shape, bool(abs(out - exact.apply(params, x)).max() < 1e-3)
    ((3, 20, 16), True)
  """

  num_heads: int = 4
  head_dim: int = 8
  null_token: bool = True
  radius: float | None = None
  degree: int | None = None
  is_causal: bool = False

  @nn.compact
  def __call__(
    self, x: jax.Array, *, key_mask: jax.Array | None = None
  ) -> jax.Array:
    """Attends; ``key_mask``, boolean (B, T), hides tokens in both roles."""
    key_mask = None if key_mask is None else jnp.asarray(key_mask)
    self._check(x, key_mask)
    heads = self.num_heads, self.head_dim
    query = nn.DenseGeneral(heads, name="query")(x)
    names = ("key1", "key2", "value1", "value2")
    arrays = [nn.DenseGeneral(heads, name=name)(x) for name in names]
    if self.null_token:
      arrays = [
        self._with_null(name, y) for name, y in zip(names, arrays, strict=True)
      ]
      if key_mask is not None:
        key_mask = jnp.pad(key_mask, ((0, 0), (0, 1)), constant_values=True)
    if self.radius is not None:
      query, *arrays[:2] = map(_shrink, (query, *arrays[:2]))
    y = self._attend(query, arrays, key_mask)
    return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(y)

  def _with_null(self, name: str, y: jax.Array) -> jax.Array:
    """(B, T, N, H) with a learned token behind."""
    start = nn.initializers.normal(self.head_dim**-0.5)
    null = self.param(f"null_{name}", start, y.shape[2:]).astype(y.dtype)
    null = jnp.broadcast_to(null[None, None], (y.shape[0], 1, *null.shape))
    return jnp.concatenate((y, null), 1)

  def _attend(
    self, query: jax.Array, arrays: list[jax.Array], key_mask: jax.Array | None
  ) -> jax.Array:
    key1, key2, value1, value2 = arrays
    if self.degree is None or self.radius is None:
      return tensor_attention(
        query, key1, key2, value1, value2,
        scale=self.radius, is_causal=self.is_causal,
        key_mask1=key_mask, key_mask2=key_mask,
      )  # fmt: skip
    return polynomial_tensor_attention(
      query, key1, key2, value1, value2, degree=self.degree, radius=self.radius,
      scale=self.radius, is_causal=self.is_causal,
      key_mask1=key_mask, key_mask2=key_mask,
    )  # fmt: skip

  def _check(self, x: jax.Array, key_mask: jax.Array | None) -> None:
    _checks.check_integer("num_heads", self.num_heads, 1, None)
    _checks.check_integer("head_dim", self.head_dim, 1, None)
    for name in ("null_token", "is_causal"):
      _checks.check_choice(name, getattr(self, name), (False, True))
    if self.is_causal and self.null_token:
      raise ValueError("null_token must be False with is_causal=True")
    if self.radius is not None:
      static_positive("radius", self.radius)
    elif self.degree is not None:
      raise ValueError(f"radius is required when degree={self.degree}")
    _checks.check_rank("x", x, 3)
    _checks.check_floating("x", x)
    if key_mask is not None:
      _checks.check_boolean("key_mask", key_mask)
      _checks.check_shape("key_mask", key_mask, x.shape[:2], "(B, T) of x")


def _shrink(x: jax.Array) -> jax.Array:
  """Vectors of a 3-norm less than 1, almost as they are if that is small."""
  # Cubes of 16 bits would be infinite early.
  wide = x.astype(accumulator(x.dtype))
  cubes = (jnp.abs(wide) ** 3).sum(-1, keepdims=True)
  return (wide * (1 + cubes) ** (-1 / 3)).astype(x.dtype)
