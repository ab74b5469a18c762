"""A trainable prefix of any length, as a flax module."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.attention import PrefixState, ntk_attention
from jaxattn.attention._prefix.state import feature_dim
from jaxattn.features import FeatureMap
from jaxattn.features.maps import as_feature_map

# softplus(-10) = 4.5e-5: almost no prefix, and not at a point without slope.
_RAW_START = -10.0
_POSITIVITY = ("softplus", "abs", "none")


class NTKAttention(nn.Module):
  r"""Attention with a trainable prefix state, for projected heads.

  Called on ``(query, key, value)`` in the layout (B, T, N, H), as they come out
  of frozen projections, it returns :func:`jaxattn.attention.ntk_attention`
  with a state of its own: z, and k kept positive. Only these are parameters,
  r (Hv + 1) numbers a head, and untrained they leave the output as it is
  without a prefix, but for weights of 5e-5. So a trained attention is replaced
  by this module, its projections frozen, and fine-tuned. One module is one
  state: layers that hold the same module share it.

  Attributes:
    feature_map: "elu", "relu" or a ``FeatureMap``.
    num_kv_heads: heads of the state; None = one for each query head.
    rank: s, z is a product of r by s and s by Hv; None = any matrix.
    positivity: how k comes from its parameter: "softplus"; "abs", which has no
      slope at 0; or "none", as it is: for states of Taylor features, whose k
      has entries of either sign.
    allow_odd: permit Taylor features of an odd degree, degree 1 being the
      source's; sums of weights may then vanish.
    is_causal: query t sees context keys 0 to t.
    scale: factor on the logits; None = 1 / sqrt(H).

  Raises:
    ValueError: when called, if a field or the input does not fit.

  Cost:
    That of ``ntk_attention``; parameters r (Hv + 1) a head, with a rank
    s (r + Hv) + r.

  Source:
    arXiv 2406.14036; ``positivity="abs"`` is what its public code does.

  Example:
    >>> import jax
    >>> from jaxattn.attention import softmax_attention
    >>> qkv = jax.random.normal(jax.random.key(0), (3, 1, 16, 2, 8))
    >>> module = NTKAttention()
    >>> out, params = module.init_with_output(jax.random.key(1), *qkv)
    >>> jax.tree.map(lambda x: x.shape, params["params"])
    {'k': (2, 8), 'z': (2, 8, 8)}
    >>> bool(abs(out - softmax_attention(*qkv)).max() < 1e-3)
    True
  """

  feature_map: str | FeatureMap = "elu"
  num_kv_heads: int | None = None
  rank: int | None = None
  positivity: str = "softplus"
  allow_odd: bool = False
  is_causal: bool = False
  scale: float | None = None

  @nn.compact
  def __call__(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Attends; ``mask`` is about the context, as in ``ntk_attention``."""
    sizes = _checks.check_attention(query, key, value, mask=mask)
    heads = self.num_kv_heads or sizes.num_heads
    r = self._check(sizes.head_dim, sizes.value_dim)
    zeros = nn.initializers.zeros
    if self.rank is None:
      z = self.param("z", zeros, (heads, r, sizes.value_dim))
    else:
      first = nn.initializers.normal(r**-0.5)
      left = self.param("z_left", first, (heads, r, self.rank))
      right = self.param("z_right", zeros, (heads, self.rank, sizes.value_dim))
      z = jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
    start = _RAW_START if self.positivity == "softplus" else 4.5e-5
    raw = self.param("k", nn.initializers.constant(start), (heads, r))
    positive = {"softplus": nn.softplus, "abs": jnp.abs, "none": jnp.asarray}
    return ntk_attention(
      query,
      key,
      value,
      PrefixState(z, positive[self.positivity](raw)),
      feature_map=self.feature_map,
      scale=self.scale,
      allow_odd=self.allow_odd,
      is_causal=self.is_causal,
      mask=mask,
    )

  def params_from_state(self, state: PrefixState) -> dict[str, Any]:
    """Parameters that start from a state, that of a real prefix for example.

    Args:
      state: a state of as many heads as the module has; its k positive unless
        ``positivity`` is "none".

    Returns:
      The parameters, for ``apply({"params": ...}, ...)``. With a rank, z is
      the nearest matrix of that rank; where z has fewer directions, the rest
      of its right factor is 0 and can be trained.

    Raises:
      ValueError: if sizes do not fit, or a concrete k is not positive, which
        Taylor features do not promise.
    """
    _checks.check_choice("positivity", self.positivity, _POSITIVITY)
    heads, r, value_dim = state.z.shape
    if self.num_kv_heads not in (None, heads):
      raise ValueError(
        f"state has {heads} heads, num_kv_heads is {self.num_kv_heads}"
      )
    self._check_rank(r, value_dim)
    raw = state.k
    refused = _checks.is_concrete(state.k) and not (state.k > 0).all()
    if self.positivity != "none" and refused:
      raise ValueError(
        f"state.k must be positive with positivity={self.positivity!r}, got "
        f"{state.k.min()}; 'none' takes any"
      )
    if self.positivity == "softplus":
      # Its inverse, log(e^k - 1), which does not overflow like this.
      raw = state.k + jnp.log(-jnp.expm1(-state.k))
    if self.rank is None:
      return {"z": state.z, "k": raw}
    left, size, right = jnp.linalg.svd(state.z, full_matrices=False)
    size = size[..., : self.rank]
    # Where both factors vanish no gradient would ever move them.
    void = size <= jnp.finfo(size.dtype).eps * r * size[..., :1]
    root = jnp.sqrt(jnp.where(void, 0, size))
    first = jnp.where(void, 1, root)
    return {
      "z_left": left[..., : self.rank] * first[..., None, :],
      "z_right": root[..., None] * right[..., : self.rank, :],
      "k": raw,
    }

  def _check_rank(self, num_features: int, value_dim: int) -> None:
    if self.rank is not None:
      most = min(num_features, value_dim)
      _checks.check_integer("rank", self.rank, 1, most)

  def _check(self, head_dim: int, value_dim: int) -> int:
    """Checks the fields, and returns the number of features."""
    _checks.check_choice("positivity", self.positivity, _POSITIVITY)
    if self.num_kv_heads is not None:
      _checks.check_integer("num_kv_heads", self.num_kv_heads, 1, None)
    r = feature_dim(as_feature_map(self.feature_map), head_dim)
    self._check_rank(r, value_dim)
    return r
