r"""Layers with an associative memory: association, pooling, lookup.

A head projects states R and stored patterns Y to :math:`Q = R W_Q` and
:math:`K = Y W_K`, retrieves

.. math:: Q \leftarrow \mathrm{softmax}(\beta Q K^\top) K

until it stands still or a number of steps less one is taken, and reads values
:math:`\mathrm{softmax}(\beta Q K^\top)\, Y W_V`. With one step that is
attention. Source: Ramsauer et al., arXiv 2008.02217, section 3.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.attention import softmax_attention
from jaxattn.attention._hopfield import iterate_queries
from jaxattn.attention._hopfield.inputs import check_beta


class HopfieldLayer(nn.Module):
  r"""Associates states with stored patterns.

  Called on ``(state, stored)``, (B, T, F) and (B, S, G), it returns (B, T,
  out_dim). With ``max_steps=1`` and ``norm_inputs=False`` it is
  ``flax.linen.MultiHeadDotProductAttention``, names and shapes of parameters
  included.

  Attributes:
    num_heads: N.
    head_dim: size of a state in the associative space, and of its values.
    out_dim: size of the output; None = F.
    beta: inverse temperature; None = 1 / sqrt(head_dim).
    max_steps: at most so many softmaxes, at least 1; the last one reads the
      values.
    tol: a head of a state of which no entry changes by more is done.
    norm_inputs: LayerNorm of states and of stored patterns, each with a scale
      and a bias.
    norm_hidden: LayerNorm of their projections, without either.

  Raises:
    ValueError: when called, if a field or the input does not fit.

  Cost:
    That of the projections, and 4 T S head_dim flops a head and step.

  Source:
    arXiv 2008.02217, section 3 and its public code.

  Example:
    >>> import jax
    >>> x, y = jax.random.normal(jax.random.key(0), (2, 3, 20, 8))
    >>> layer = HopfieldLayer(num_heads=2, head_dim=4, max_steps=3)
    >>> out, params = layer.init_with_output(jax.random.key(1), x, y)
    >>> out.shape
    (3, 20, 8)
  """

  num_heads: int = 1
  head_dim: int = 16
  out_dim: int | None = None
  beta: float | None = None
  max_steps: int = 1
  tol: float = 1e-4
  norm_inputs: bool = True
  norm_hidden: bool = False

  @nn.compact
  def __call__(
    self,
    state: jax.Array,
    stored: jax.Array,
    *,
    key_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Retrieves; ``key_mask``, boolean (B, S), hides stored patterns."""
    self._check(state, stored, key_mask)
    out_dim = state.shape[-1] if self.out_dim is None else self.out_dim
    if self.norm_inputs:
      state = nn.LayerNorm(name="norm_state")(state)
      stored = nn.LayerNorm(name="norm_stored")(stored)
    heads = (self.num_heads, self.head_dim)
    query = nn.DenseGeneral(heads, name="query")(state)
    key = nn.DenseGeneral(heads, name="key")(stored)
    value = nn.DenseGeneral(heads, name="value")(stored)
    if self.norm_hidden:
      query = _norm(query)
      key = _norm(key)
    beta = self.head_dim**-0.5 if self.beta is None else self.beta
    mask = None if key_mask is None else key_mask[:, None, None]

    def read(query: jax.Array, value: jax.Array) -> jax.Array:
      return softmax_attention(query, key, value, mask=mask, scale=beta)

    if self.max_steps > 1:
      query, _, _ = iterate_queries(
        lambda q: read(q, key),
        query,
        tol=self.tol,
        max_steps=self.max_steps - 1,
      )
    out = read(query, value)
    return nn.DenseGeneral(out_dim, axis=(-2, -1), name="out")(out)

  def _check(
    self, state: jax.Array, stored: jax.Array, key_mask: jax.Array | None
  ) -> None:
    for name in ("num_heads", "head_dim", "max_steps"):
      _checks.check_integer(name, getattr(self, name), 1, None)
    if self.out_dim is not None:
      _checks.check_integer("out_dim", self.out_dim, 1, None)
    if self.beta is not None:
      check_beta(self.beta)
    _checks.check_nonnegative("tol", self.tol)
    for name in ("norm_inputs", "norm_hidden"):
      _checks.check_choice(name, getattr(self, name), (False, True))
    for name, x in (("state", state), ("stored", stored)):
      _checks.check_rank(name, x, 3)
      _checks.check_floating(name, x)
    _checks.check_shape("stored", stored, (len(state), None, None), "(B, S, G)")
    if key_mask is not None:
      _checks.check_boolean("key_mask", key_mask)
      _checks.check_shape("key_mask", key_mask, stored.shape[:2], "(B, S)")


class HopfieldPooling(nn.Module):
  """Summarizes sets: trained states, the same for all of them, retrieve.

  Called on (B, S, G) it returns (B, num_queries, out_dim), whatever the order
  of a set; what ``key_mask`` hides is no part of it.

  Attributes:
    num_queries: trained states.
    layer: what they retrieve with; None = ``HopfieldLayer()``.

  Raises:
    ValueError: when called, if a field or the input does not fit.

  Cost:
    That of a :class:`HopfieldLayer` with T = num_queries.

  Source:
    arXiv 2008.02217, section 3, layer HopfieldPooling.

  Example:
    >>> import jax
    >>> bags = jax.random.normal(jax.random.key(0), (3, 20, 8))
    >>> pooling = HopfieldPooling(num_queries=2)
    >>> out, params = pooling.init_with_output(jax.random.key(1), bags)
    >>> out.shape
    (3, 2, 8)
  """

  num_queries: int = 1
  layer: HopfieldLayer | None = None

  @nn.compact
  def __call__(
    self, stored: jax.Array, *, key_mask: jax.Array | None = None
  ) -> jax.Array:
    """Pools (B, S, G); ``key_mask``, boolean (B, S), hides elements."""
    _checks.check_integer("num_queries", self.num_queries, 1, None)
    _checks.check_rank("stored", stored, 3)
    state = _trained(self, "states", self.num_queries, stored)
    return _layer(self.layer)(state, stored, key_mask=key_mask)


class HopfieldLookup(nn.Module):
  """Looks states up in a trained memory, the same for all inputs.

  Called on (B, T, F) it returns (B, T, out_dim).

  Attributes:
    num_patterns: trained patterns.
    layer: what they are retrieved with; None = ``HopfieldLayer()``.

  Raises:
    ValueError: when called, if a field or the input does not fit.

  Cost:
    That of a :class:`HopfieldLayer` with S = num_patterns.

  Source:
    arXiv 2008.02217, section 3, layer Hopfield with stored parameters.

  Example:
    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (3, 20, 8))
    >>> lookup = HopfieldLookup(num_patterns=50)
    >>> out, params = lookup.init_with_output(jax.random.key(1), x)
    >>> out.shape
    (3, 20, 8)
  """

  num_patterns: int
  layer: HopfieldLayer | None = None

  @nn.compact
  def __call__(self, state: jax.Array) -> jax.Array:
    """Looks (B, T, F) states up."""
    _checks.check_integer("num_patterns", self.num_patterns, 1, None)
    _checks.check_rank("state", state, 3)
    stored = _trained(self, "patterns", self.num_patterns, state)
    return _layer(self.layer)(state, stored)


def _layer(layer: HopfieldLayer | None) -> HopfieldLayer:
  return HopfieldLayer(name="layer") if layer is None else layer


def _trained(
  module: nn.Module, name: str, num: int, like: jax.Array
) -> jax.Array:
  """(B, num, F) parameters, the same for the whole batch ``like``."""
  shape = 1, num, like.shape[-1]
  x = module.param(name, nn.initializers.normal(1.0), shape, jnp.float32)
  return jnp.broadcast_to(x, (len(like), *shape[1:])).astype(like.dtype)


def _norm(x: jax.Array) -> jax.Array:
  return nn.LayerNorm(use_bias=False, use_scale=False)(x)
