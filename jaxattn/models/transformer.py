r"""A transformer in which attention is exchanged while the parameters stay.

A layer is :math:`x + W_O\,\mathrm{Attn}(\mathrm{norm}(x))` followed by
:math:`x + W_2\,\sigma(W_1\,\mathrm{norm}(x))`, without biases. The attention is
any that :func:`jaxattn.models.attention_fn` takes; no parameter depends on it,
so that a checkpoint of one model loads into all others.

Layers are scanned over stacked parameters: what is compiled does not grow with
depth. Each is checkpointed: what is kept for the gradient is the layers'
inputs, O(num_layers T dim), and no (T, T) array unless the attention holds one.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import _checks
from jaxattn.attention import logit_radius
from jaxattn.attention.radius import check_radius
from jaxattn.features import rope
from jaxattn.models.adapters import Attention, attention_fn

# Of a logit: in two lengths, two rotations and their product.
_ROUNDINGS = 8
_NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": nn.gelu,
  "relu": nn.relu,
  "silu": nn.silu,
  "tanh": nn.tanh,
}


class TransformerConfig(NamedTuple):
  """What a :class:`Transformer` is; hashable.

  Attributes:
    num_layers: layers, at least 1.
    dim: size of a token's vector between layers.
    num_heads: heads of each layer.
    head_dim: size of a query, key and value of one head.
    mlp_ratio: hidden units of each layer's network over ``dim``; 0 = no such
      network.
    vocab_size: tokens there are; None = vectors in, vectors out.
    attention: a name or a function, as :func:`jaxattn.models.attention_fn`
      takes it.
    attention_options: its keywords, pairs of name and hashable value.
    is_causal: position t sees positions 0 to t.
    residual: add the input of attention, and of the network, to its output.
    norm: ``"rms"``, ``"layer"`` or None: before attention, before the network
      and after the last layer.
    positions: ``"rope"`` turns queries and keys by their position; None leaves
      the order to the causal mask.
    qk_norm: the length that all queries and keys are given, with logits that
      are their products: these stay within qk_norm^2 throughout training. None
      = as projected, with logits over sqrt(head_dim).
    activation: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"tanh"``.
    tied_layers: all layers have the same parameters.
    remat: compute each layer again for the gradient instead of keeping what is
      inside it; memory for a third more time.
  """

  num_layers: int = 2
  dim: int = 64
  num_heads: int = 8
  head_dim: int = 8
  mlp_ratio: float = 4.0
  vocab_size: int | None = None
  attention: str | Attention = "softmax"
  attention_options: tuple[tuple[str, Any], ...] = ()
  is_causal: bool = True
  residual: bool = True
  norm: str | None = "rms"
  positions: str | None = "rope"
  qk_norm: float | None = 1.0
  activation: str = "gelu"
  tied_layers: bool = False
  remat: bool = True


class TransformerStats(NamedTuple):
  """What attention saw on the way, without a gradient.

  Attributes:
    logit_radius: (num_layers,) largest absolute logit of each layer.
  """

  logit_radius: jax.Array


class Transformer(nn.Module):
  """A pre-norm transformer with any attention.

  Called on ``(ids, positions=None, *, return_stats=False)``. ``ids`` are (B, T)
  integers, or (B, T, dim) vectors: already embedded, for a gradient in them.
  ``positions`` are (T,) or (B, T), None = 0 to T - 1. Returns (B, T,
  vocab_size) logits, or (B, T, dim) without a vocabulary; with
  ``return_stats`` also :class:`TransformerStats`. The parameters are those of
  a call on integers, if there is a vocabulary.

  With ``return_stats`` and a ``radius`` among the options of attention, the
  call is checked: under ``checkify`` a logit beyond the radius raises (see
  :func:`jaxattn.attention.logit_radius`).

  Attributes:
    config: a :class:`TransformerConfig`.

  Raises:
    ValueError: when called, if the configuration or the input does not fit, for
      instance if ``qk_norm`` admits logits beyond the ``radius`` of the
      attention.

  Cost:
    O(T dim^2) a layer, and the attention, which ``return_stats`` makes
    quadratic; O(num_layers T dim) memory for the gradient.

  Source:
    this project; the model of arXiv 2408.13233, section 3, with norms.

  Example:
    >>> import jax
    >>> from jaxattn.models import Transformer, TransformerConfig
    >>> config = TransformerConfig(vocab_size=128)
    >>> model = Transformer(config)
    >>> ids = jax.numpy.arange(24).reshape(2, 12)
    >>> params = model.init(jax.random.key(0), ids)
    >>> polynomial = config._replace(
    ...   attention="polynomial",
    ...   attention_options=(("degree", 4), ("radius", 1.0)),
    ... )
    >>> logits = Transformer(polynomial).apply(params, ids)
    >>> difference = abs(logits - model.apply(params, ids)).max()
    >>> logits.shape, bool(difference < 1e-3)
    ((2, 12, 128), True)
  """

  config: TransformerConfig

  @overload
  def __call__(
    self,
    ids: jax.Array,
    positions: jax.Array | None = ...,
    *,
    return_stats: Literal[False] = ...,
  ) -> jax.Array: ...

  @overload
  def __call__(
    self,
    ids: jax.Array,
    positions: jax.Array | None = ...,
    *,
    return_stats: Literal[True],
  ) -> tuple[jax.Array, TransformerStats]: ...

  @nn.compact
  def __call__(
    self,
    ids: jax.Array,
    positions: jax.Array | None = None,
    *,
    return_stats: bool = False,
  ) -> jax.Array | tuple[jax.Array, TransformerStats]:
    """Maps (B, T) tokens or (B, T, dim) vectors to logits or vectors."""
    config = self.config
    ids = jnp.asarray(ids)
    _check_config(config)
    _check_inputs(config, ids, positions)
    x = ids
    if not jnp.issubdtype(ids.dtype, jnp.floating):
      x = nn.Embed(config.vocab_size or 0, config.dim, name="embed")(ids)
    if config.positions and positions is None:
      positions = jnp.arange(ids.shape[1])
    layers = _stack(config)(config, return_stats, name="layers")
    x, radius = layers(x, positions)
    x = _norm(config, "norm")(x)
    if config.vocab_size is not None:
      x = nn.Dense(config.vocab_size, use_bias=False, name="head")(x)
    if not return_stats:
      return x
    promised = _options(config).get("radius")
    if promised is not None:
      # Not in the layers: a gradient drops checks inside a scan. What rounding
      # adds to products of vectors of a given length breaks no promise.
      rounding = _ROUNDINGS * float(jnp.finfo(x.dtype).eps)
      check_radius(radius.max() / (1 + rounding), promised)
    return x, TransformerStats(radius)


# --- layers ---


class _Layer(nn.Module):
  """Attention and a network of one hidden layer, each with norm and skip."""

  config: TransformerConfig
  return_stats: bool

  @nn.compact
  def __call__(
    self, x: jax.Array, positions: jax.Array | None
  ) -> tuple[jax.Array, jax.Array | None]:
    config = self.config
    y, radius = self._attention(_norm(config, "attention_norm")(x), positions)
    x = x + y if config.residual else y
    if not config.mlp_ratio:
      return x, radius
    y = _norm(config, "mlp_norm")(x)
    y = _dense(round(config.mlp_ratio * config.dim), name="mlp_in")(y)
    y = _ACTIVATIONS[config.activation](y)
    y = _dense(config.dim, name="mlp_out")(y)
    return x + y if config.residual else y, radius

  def _attention(
    self, x: jax.Array, positions: jax.Array | None
  ) -> tuple[jax.Array, jax.Array | None]:
    config = self.config
    heads = (config.num_heads, config.head_dim)
    query, key, value = (
      _dense(heads, name=name)(x) for name in ("query", "key", "value")
    )
    if config.qk_norm is not None:
      query, key = (_to_length(y, config.qk_norm) for y in (query, key))
    if positions is not None:
      query, key = rope(query, positions), rope(key, positions)
    options = _options(config)
    attend = attention_fn(config.attention, **options)
    y = attend(query, key, value, is_causal=config.is_causal)
    y = _dense(config.dim, axis=(-2, -1), name="out")(y)
    if not self.return_stats:
      return y, None
    call = {"scale": options.get("scale"), "is_causal": config.is_causal}
    return y, logit_radius(query, key, **call)


def _stack(config: TransformerConfig) -> Callable[..., Any]:
  """The layers as one module over stacked (or shared) parameters."""
  # A scan's body needs no barrier against common subexpressions.
  layer = nn.remat(_Layer, prevent_cse=False) if config.remat else _Layer
  return nn.scan(
    layer,
    variable_axes={} if config.tied_layers else {"params": 0},
    variable_broadcast="params" if config.tied_layers else False,
    split_rngs={"params": not config.tied_layers},
    in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
    length=config.num_layers,
  )


def _options(config: TransformerConfig) -> dict[str, Any]:
  options = dict(config.attention_options)
  if config.qk_norm is not None:
    options.setdefault("scale", 1.0)
  if config.attention == "polynomial":
    # The radius is one of the logits as they are.
    options.setdefault("center_keys", False)
  return options


def _norm(config: TransformerConfig, name: str) -> Callable[..., jax.Array]:
  return _NORMS[config.norm](name=name) if config.norm else lambda x: x


_dense = functools.partial(nn.DenseGeneral, use_bias=False)


def _to_length(x: jax.Array, length: float) -> jax.Array:
  # The constant only ever shortens: but for rounding, no product exceeds
  # length^2.
  squared = (x**2).sum(-1, keepdims=True)
  return x * (length * jax.lax.rsqrt(squared + 1e-6))


# --- checks ---


def _check_config(config: TransformerConfig) -> None:
  for name in ("num_layers", "dim", "num_heads", "head_dim"):
    _checks.check_integer(name, getattr(config, name), 1, None)
  _checks.check_nonnegative("mlp_ratio", config.mlp_ratio)
  if config.vocab_size is not None:
    _checks.check_integer("vocab_size", config.vocab_size, 1, None)
  _checks.check_choice("norm", config.norm, (*_NORMS, None))
  _checks.check_choice("positions", config.positions, ("rope", None))
  _checks.check_choice("activation", config.activation, tuple(_ACTIVATIONS))
  if config.qk_norm is None:
    return
  _checks.check_positive("qk_norm", config.qk_norm)
  options = _options(config)
  largest = config.qk_norm**2 * abs(options["scale"])
  # Square roots of a radius are to pass.
  if largest > options.get("radius", np.inf) * (1 + 1e-6):
    raise ValueError(
      f"qk_norm={config.qk_norm} admits logits up to {largest:.4g}, beyond the "
      f"radius={options['radius']} of the attention"
    )


def _check_inputs(
  config: TransformerConfig, ids: jax.Array, positions: jax.Array | None
) -> None:
  if jnp.issubdtype(ids.dtype, jnp.floating):
    _checks.check_shape("ids", ids, (None, None, config.dim), "(B, T, dim)")
  elif not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f"ids must be integers or vectors, got dtype {ids.dtype}")
  elif config.vocab_size is None:
    raise ValueError("ids must be vectors (B, T, dim): vocab_size is None")
  else:
    _checks.check_rank("ids", ids, 2)
  if positions is None:
    return
  if config.positions is None:
    raise ValueError("positions must be None: the model takes none")
  lead = ids.shape[: jnp.ndim(positions)] if jnp.ndim(positions) == 2 else None
  _checks.check_rank("positions", positions, (1, 2))
  _checks.check_shape("positions", positions, lead or ids.shape[1:2])
