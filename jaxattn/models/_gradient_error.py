"""How far a transformer's gradients are from those with exact attention."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattn import _checks
from jaxattn.features import polynomial_coefficients, polynomial_error
from jaxattn.models.transformer import Transformer, TransformerConfig


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
  norm = optax.tree.norm
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
