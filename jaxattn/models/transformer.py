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
from jaxattn.features import polynomial_coefficients, polynomial_error, rope
from jaxattn.models.adapters import Attention, attention_fn

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


class GradientError(NamedTuple):
  """How far a model's gradients are from those with exact attention.

  Relative errors are of Frobenius norms. With tied layers there is one entry
  for all of them, but in ``logit_radius`` and ``eps``.

  Attributes:
    relative: (num_layers,) relative error of all gradients of a layer.
    max_abs: (num_layers,) largest absolute error.
    weights: relative error of all gradients of weights together.
    inputs: relative error of the gradient in the (embedded) input.
    logit_radius: (num_layers,) largest absolute logit, of exact attention.
    eps: (num_layers,) relative error of the polynomial up to that logit; NaN
      if the attention is not ``"polynomial"``.
  """

  relative: np.ndarray
  max_abs: np.ndarray
  weights: float
  inputs: float
  logit_radius: np.ndarray
  eps: np.ndarray


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
      # Not in the layers: a gradient drops checks inside a scan.
      check_radius(radius.max(), promised)
    return x, TransformerStats(radius)


def gradient_error(
  params: Any,
  batch: tuple[jax.Array, jax.Array],
  config: TransformerConfig,
) -> GradientError:
  """Compares a model's gradients with those of exact attention.

  The loss is the mean cross-entropy for integer targets, and half the sum of
  squared differences for targets that are vectors. Errors of lower layers hold
  those of the layers above: each model is differentiated as a whole.

  Args:
    params: of a :class:`Transformer` with ``config``, as ``init`` made them.
    batch: inputs, (B, T) integers or (B, T, dim) vectors, and targets: (B, T)
      integers, or what the model returns.
    config: of the model; its attention is compared with ``"softmax"``.

  Returns:
    A :class:`GradientError` on the host.

  Raises:
    ValueError: if the configuration or the batch does not fit.

  Cost:
    A training step of each of the two models, and their logits.

  Source:
    this project; what arXiv 2408.13233, theorem 1.5, bounds.

  Example:
    >>> import jax
    >>> from jaxattn.models import Transformer, TransformerConfig
    >>> options = (("degree", 4), ("radius", 1.0), ("local", "polynomial"))
    >>> config = TransformerConfig(
    ...   dim=16, attention="polynomial", attention_options=options
    ... )
    >>> x, target = jax.random.normal(jax.random.key(0), (2, 1, 32, 16))
    >>> params = Transformer(config).init(jax.random.key(1), x)
    >>> error = gradient_error(params, (x, target), config)
    >>> error.weights < 1e-3, bool((error.logit_radius <= 1).all())
    (True, True)
  """
  inputs, targets = map(jnp.asarray, batch)
  exact = config._replace(
    attention="softmax",
    attention_options=tuple(
      (k, v) for k, v in config.attention_options if k == "scale"
    ),
  )
  want, radius = _gradients(params, inputs, targets, exact)
  got, _ = _gradients(params, inputs, targets, config)
  num_sets = 1 if config.tied_layers else config.num_layers
  errors = jax.device_get(_compare(got, want, num_sets))
  relative, max_abs, weights, dx = errors
  radius = jax.device_get(radius)
  eps = [_eps(config, float(r)) for r in radius]
  return GradientError(
    relative, max_abs, float(weights), float(dx), radius, np.array(eps)
  )


@functools.partial(jax.jit, static_argnames="config")
def _gradients(
  params: Any,
  inputs: jax.Array,
  targets: jax.Array,
  config: TransformerConfig,
) -> tuple[tuple[Any, jax.Array], jax.Array]:
  """Gradients in parameters and (embedded) input, and logit radii."""
  if not jnp.issubdtype(inputs.dtype, jnp.floating):
    inputs = params["params"]["embed"]["embedding"][inputs]

  def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    out, stats = Transformer(config).apply(params, x, return_stats=True)  # pyright: ignore[reportAssignmentType]
    return _loss(out, targets), stats.logit_radius  # pyright: ignore[reportAttributeAccessIssue]

  return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, inputs)


@functools.partial(jax.jit, static_argnames="num_sets")
def _compare(got: Any, want: Any, num_sets: int) -> tuple[jax.Array, ...]:
  """Errors by layer, relative and absolute, then of weights and of input."""
  by_layer, by_layer_want = (
    jnp.concatenate(
      [
        x.reshape(num_sets, -1)
        for x in jax.tree.leaves(grads["params"]["layers"])
      ],
      1,
    )
    for grads, _ in (got, want)
  )
  difference = by_layer - by_layer_want
  norm = functools.partial(jnp.linalg.norm, axis=1)
  relative = norm(difference) / norm(by_layer_want)
  pairs = zip(got, want, strict=True)
  return relative, jnp.abs(difference).max(1), *(_relative(*p) for p in pairs)


def _relative(got: Any, want: Any) -> jax.Array:
  def norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))

  return norm(jax.tree.map(jnp.subtract, got, want)) / norm(want)


def _loss(out: jax.Array, targets: jax.Array) -> jax.Array:
  if jnp.issubdtype(targets.dtype, jnp.floating):
    _checks.check_shape("targets", targets, out.shape)
    return ((out - targets) ** 2).sum() / 2
  _checks.check_shape("targets", targets, out.shape[:-1])
  log_p = jax.nn.log_softmax(out)
  return -jnp.take_along_axis(log_p, targets[..., None], -1).mean()


def _eps(config: TransformerConfig, radius: float) -> float:
  if config.attention != "polynomial":
    return float("nan")
  options = dict(config.attention_options)
  coefficients = polynomial_coefficients(
    options["degree"],
    options["radius"],
    kind=options.get("coefficients", "minimax"),
    sigma=options.get("sigma"),
  )
  return polynomial_error(coefficients, radius) if radius > 0 else 0.0


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
  return options


def _norm(config: TransformerConfig, name: str) -> Callable[..., jax.Array]:
  return _NORMS[config.norm](name=name) if config.norm else lambda x: x


_dense = functools.partial(nn.DenseGeneral, use_bias=False)


def _to_length(x: jax.Array, length: float) -> jax.Array:
  # The constant only ever shortens: no product exceeds length^2.
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
