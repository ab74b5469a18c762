r"""Small models whose attention is swapped while their parameters stay.

:class:`AttentionClassifier` reads a sequence of vectors through layers of
attention, :class:`PooledRegressor` through one learned query. Neither's
parameters depend on ``attention``: models of two kinds of attention can start
from, or share, the same ones, and what differs between them is the attention
alone.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.models.adapters import attention_fn

# (query, key, value) -> output, in the layout (B, T, N, H).
Attention = str | Callable[..., Any]

_POOLINGS = ("threshold", "cls", "mean", "none")
_REGRESSORS = ("softmax", "linear", "elu")


class AttentionClassifier(nn.Module):
  r"""Classifies sequences of vectors: embedding, layers, pooling, a linear map.

  A layer is :math:`x + \mathrm{attention}(\mathrm{norm}(x))`, followed by the
  same with a network of one hidden layer (GELU) unless ``mlp`` is 0. Learned
  positions are added to the embedding. Called on (B, T, F) floating inputs it
  returns (B, num_classes) logits; parameters depend on T and F, and not on
  ``attention``.

  Attributes:
    attention: a name that :func:`jaxattn.models.attention_fn` knows, or a
      function ``(query, key, value) -> output`` in the layout (B, T, N, H) with
      its options filled in and no ``**kwargs``; or a tuple of these, one a
      layer.
    num_classes: logits that come out.
    num_heads: heads of each layer.
    head_dim: size of a head; vectors are num_heads * head_dim long.
    num_layers: layers.
    mlp: hidden units of the network of each layer; 0 = no such network.
    pooling: what of the normalized output is classified: the mean of the
      tokens (``"mean"``); a learned token put before the others (``"cls"``);
      the sum over tokens of :math:`\max(x - \tau, 0)` with a learned
      :math:`\tau` for each unit (``"threshold"``, the readout of arXiv
      2310.11685); or each token by itself (``"none"``), which gives
      (B, T, num_classes).

  Raises:
    ValueError: when called, if a field or the input does not fit.

  Cost:
    O(T (num_heads head_dim)^2) a layer for the linear maps, and the attention.

  Source:
    this project; the comparison is that of arXiv 2310.11685.

  Example:
    >>> import jax
    >>> from jaxattn.models import AttentionClassifier
    >>> x = jax.random.normal(jax.random.key(0), (3, 20, 5))
    >>> model = AttentionClassifier(num_classes=10)
    >>> params = model.init(jax.random.key(1), x)
    >>> dense = AttentionClassifier(num_classes=10, attention="dot_product")
    >>> model.apply(params, x).shape, dense.apply(params, x).shape
    ((3, 10), (3, 10))
  """

  attention: Attention | tuple[Attention, ...] = "softmax"
  num_classes: int = 2
  num_heads: int = 2
  head_dim: int = 16
  num_layers: int = 2
  mlp: int = 64
  pooling: str = "mean"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Classifies (B, T, F) inputs; see the class for what comes out."""
    attentions = self._check(x)
    dim = self.num_heads * self.head_dim
    x = nn.Dense(dim, name="embed")(x)
    if self.pooling == "cls":
      first = self.param("cls", nn.initializers.normal(0.02), (1, 1, dim))
      first = jnp.broadcast_to(first, (x.shape[0], 1, dim)).astype(x.dtype)
      x = jnp.concatenate((first, x), 1)
    place = nn.initializers.normal(0.1)
    x = x + self.param("positions", place, (1, *x.shape[1:]))
    for i, attention in enumerate(attentions):
      x = _Layer(
        attention, self.num_heads, self.head_dim, self.mlp, name=f"layer_{i}"
      )(x)
    x = self._pool(nn.LayerNorm(name="norm")(x))
    return nn.Dense(self.num_classes, name="head")(x)

  def _check(self, x: jax.Array) -> list[Callable[..., Any]]:
    """Checks fields and input, and returns one function a layer."""
    for name in ("num_classes", "num_heads", "head_dim", "num_layers"):
      _checks.check_integer(name, getattr(self, name), 1, None)
    _checks.check_integer("mlp", self.mlp, 0, None)
    _checks.check_choice("pooling", self.pooling, _POOLINGS)
    _checks.check_rank("x", x, 3)
    _checks.check_floating("x", x)
    kinds = self.attention
    if not isinstance(kinds, tuple | list):  # flax may hold it as a list
      kinds = (kinds,) * self.num_layers
    if len(kinds) != self.num_layers:
      raise ValueError(
        f"attention must be one or num_layers={self.num_layers} of them, got "
        f"{len(kinds)}"
      )
    return [attention_fn(kind) for kind in kinds]

  def _pool(self, x: jax.Array) -> jax.Array:
    if self.pooling == "none":
      return x
    if self.pooling == "cls":
      return x[:, 0]
    if self.pooling == "mean":
      return x.mean(1)
    tau = self.param("tau", nn.initializers.zeros, (1, 1, x.shape[-1]))
    return nn.relu(x - tau).sum(1)


class PooledRegressor(nn.Module):
  r"""One learned query pools a sequence of vectors into one number.

  With keys :math:`k_j = K^\top x_j`, a query :math:`q`, scores :math:`s_j =
  \langle q, k_j \rangle + \beta`, values :math:`v_j = \langle v, x_j \rangle`
  and a gain :math:`g`, called on (B, L, d) inputs it returns (B,) numbers:

  * ``"softmax"``: :math:`g \sum_j \mathrm{softmax}(s)_j v_j`;
  * ``"linear"``: :math:`(g / L) \sum_j s_j v_j`;
  * ``"elu"``: :math:`g \sum_j w_j v_j / \sum_j w_j` with :math:`w_j =
    \langle \phi(q), \phi(k_j) \rangle`, :math:`\phi = \mathrm{elu} + 1`.

  The parameters are the same in all three, though :math:`\beta` matters to
  ``"linear"`` alone: it cancels in a softmax, and ``"elu"`` has no place for
  it. An elu of the score itself would be close to an exponential
  of it, which no finite sum of keys computes: it is no linear attention.

  Attributes:
    attention: ``"softmax"``, ``"linear"`` or ``"elu"``.
    num_features: size r of query and keys, the rank of linear attention.

  Raises:
    ValueError: when called, if a field or the input does not fit.

  Cost:
    O(L d) an input; O(L d r) with ``"elu"``.

  Source:
    arXiv 2509.21936 for the task that it is fitted to (regression on one
    location); the regressor is this project's.

  Example:
    >>> import jax
    >>> from jaxattn.models import PooledRegressor
    >>> x = jax.random.normal(jax.random.key(0), (3, 20, 5))
    >>> params = PooledRegressor().init(jax.random.key(1), x)
    >>> PooledRegressor(attention="linear").apply(params, x).shape
    (3,)
  """

  attention: str = "softmax"
  num_features: int = 16

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Pools (B, L, d) inputs into (B,) numbers."""
    _checks.check_choice("attention", self.attention, _REGRESSORS)
    _checks.check_integer("num_features", self.num_features, 1, None)
    _checks.check_rank("x", x, 3)
    _checks.check_floating("x", x)
    (d, r), small = (
      (x.shape[-1], self.num_features),
      nn.initializers.normal(0.1),
    )
    query = self.param("query", nn.initializers.normal(r**-0.5), (r, 1))
    key = self.param("key", small, (d, r))
    value = x @ self.param("value", small, (d, 1))
    beta = self.param("beta", nn.initializers.zeros, ())
    gain = self.param("gain", nn.initializers.ones, ())
    if self.attention == "elu":
      weights = (nn.elu(x @ key) + 1) @ (nn.elu(query) + 1)
      weights = weights / weights.sum(1, keepdims=True)
    else:
      scores = x @ (key @ query) + beta
      linear = self.attention == "linear"
      weights = scores / x.shape[1] if linear else nn.softmax(scores, 1)
    return gain * (weights * value).sum((1, 2))


class _Layer(nn.Module):
  """Attention, and a network of one hidden layer, each with norm and skip."""

  attention: Callable[..., Any]
  num_heads: int
  head_dim: int
  mlp: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    heads = self.num_heads, self.head_dim
    y = nn.LayerNorm(name="attention_norm")(x)
    query, key, value = (
      nn.DenseGeneral(heads, name=name)(y) for name in ("query", "key", "value")
    )
    y = self.attention(query, key, value)
    x = x + nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(y)
    if not self.mlp:
      return x
    y = nn.LayerNorm(name="mlp_norm")(x)
    y = nn.gelu(nn.Dense(self.mlp, name="mlp_in")(y))
    return x + nn.Dense(x.shape[-1], name="mlp_out")(y)
