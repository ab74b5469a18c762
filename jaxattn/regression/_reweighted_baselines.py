"""What else to do with a doubtful prompt and a few examples to be trusted."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxattn import _checks
from jaxattn.regression._reweighted_objective import (
  ApplyFn,
  Objective,
  Prompt,
  best_step,
  check_prompts,
  descend,
)

_KINDS = (
  "vanilla",
  "append",
  "validation_only",
  "fine_tune",
  "prefix",
  "learned_examples",
  "influence",
)
# Learning rate and steps of those that are trained.
_FINE_TUNE = 1e-3, 60
_PREFIX = 0.05, 150
_NUM_LEARNED = 4
# How far examples that start from the same one are moved apart.
_JITTER = 0.1
# The weight, in mode "logit", of an example that is left out.
_DROPPED = 1e-30


class BaselineResult(NamedTuple):
  """What to predict with: ``weighted_predict(apply_fn, *result[:2], ...)``.

  Attributes:
    params: the model's parameters.
    prompt: what it is shown.
    w: weights of that prompt's examples for mode ``"logit"``; where all are 1
      any mode does.
  """

  params: Any
  prompt: Prompt
  w: jax.Array


def icl_baseline(
  apply_fn: ApplyFn,
  params: Any,
  prompt: Prompt,
  val: Prompt,
  *,
  kind: str,
) -> BaselineResult:
  """What else one could do with a prompt and a few examples to be trusted.

  * ``"vanilla"``: nothing.
  * ``"append"``: show the validation examples after the prompt.
  * ``"validation_only"``: show them instead of it. Whoever has many of them
    needs no weights.
  * ``"fine_tune"``: train all parameters on them, Adam, rate 1e-3, 60 steps.
  * ``"prefix"``: train ``params["prefix"]`` alone on them, Adam, rate 0.05, 150
    steps. Of :class:`jaxattn.models.ICLRegressor` that is vectors in front of
    the tokens; they start as they come.
  * ``"learned_examples"``: append four examples, inputs and labels learned on
    them; Adam, rate 0.05, 150 steps, starting from validation examples.
  * ``"influence"``: leave out those examples whose weight the validation loss
    at w = 1 falls with least; how many, at most half, is decided by that loss.

  Args:
    apply_fn: as for :func:`ricl`. What is trained, and ``"influence"``, calls
      it in mode ``"logit"``, the latter alone with weights that are not 1.
    params: its parameters; for ``"prefix"`` a mapping.
    prompt: m examples, some of which may be wrong.
    val: V examples that can be trusted.
    kind: one of the above.

  Returns:
    A :class:`BaselineResult`: what to predict with.

  Raises:
    ValueError: if shapes or dtypes do not fit, a prompt is empty or not finite,
      ``kind`` is unknown, or there is no prefix to train.

  Cost:
    Nothing, 60 or 150 gradients, or for ``"influence"`` one gradient and m / 2
    calls.

  Source:
    arXiv 2310.03331 compares with prompting, fine-tuning and prefixes; the
    others are this project's.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import Prompt, icl_baseline
    >>> prompt = Prompt(jnp.ones((3, 1)), jnp.array([1.0, 9.0, 1.0]))
    >>> val = Prompt(jnp.ones((2, 1)), jnp.ones(2))
    >>> found = icl_baseline(None, None, prompt, val, kind="append")
    >>> print(found.prompt.y)
    [1. 9. 1. 1. 1.]
  """
  _checks.check_choice("kind", kind, _KINDS)
  prompt, val = check_prompts(prompt, val, "logit")
  ones = jnp.ones_like(prompt.y)
  if kind == "vanilla":
    return BaselineResult(params, prompt, ones)
  if kind == "validation_only":
    return BaselineResult(params, val, jnp.ones_like(val.y))
  if kind == "append":
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), prompt, val)
    return BaselineResult(params, both, jnp.ones_like(both.y))
  has_prefix = isinstance(params, Mapping) and "prefix" in params
  if kind == "prefix" and not has_prefix:
    raise ValueError("kind='prefix' needs params['prefix'], got none")
  return _trained_baseline(apply_fn, kind, params, prompt, val)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trained_baseline(
  apply_fn: ApplyFn, kind: str, params: Any, prompt: Prompt, val: Prompt
) -> BaselineResult:
  call = Objective(apply_fn, "logit", params, prompt, val, 0.0)
  ones = jnp.ones_like(prompt.y)
  if kind == "fine_tune":
    tuned = _tuned(call, params, lambda p: p, *_FINE_TUNE)
    return BaselineResult(tuned, prompt, ones)
  if kind == "prefix":
    tuned = _tuned(
      call, params["prefix"], lambda p: {**params, "prefix": p}, *_PREFIX
    )
    return BaselineResult(tuned, prompt, ones)
  if kind == "influence":
    return BaselineResult(params, prompt, _without_worst(call))
  longer = _with_learned(call)
  return BaselineResult(params, longer, jnp.ones_like(longer.y))


def _tuned(
  call: Objective,
  part: Any,
  whole: Callable[[Any], Any],
  rate: float,
  num_steps: int,
) -> Any:
  """The parameters after a part of them is trained."""

  def loss(part: Any) -> jax.Array:
    return call._replace(params=whole(part)).loss(call.start())

  return whole(descend(loss, part, optax.adam(rate), num_steps)[0])


def _with_learned(call: Objective) -> Prompt:
  """The prompt and, after it, examples that are learned."""

  def extended(learned: Prompt) -> Prompt:
    return jax.tree.map(
      lambda x, y: jnp.concatenate([x, y]), call.prompt, learned
    )

  def loss(learned: Prompt) -> jax.Array:
    longer = call._replace(prompt=extended(learned))
    return longer.loss(longer.start())

  rate, num_steps = _PREFIX
  start = _distinct(call.val)
  return extended(descend(loss, start, optax.adam(rate), num_steps)[0])


def _distinct(val: Prompt) -> Prompt:
  """Examples to start from: two that are the same would remain so."""
  place = jnp.arange(_NUM_LEARNED)
  rows, again = place % len(val.y), place >= len(val.y)
  noise = jax.random.normal(jax.random.key(0), val.x[rows].shape, val.x.dtype)
  x = val.x[rows] + jnp.where(again[:, None], _JITTER * noise, 0)
  return Prompt(x, val.y[rows])


def _without_worst(call: Objective) -> jax.Array:
  """Weights that leave out the k worst, for the best k up to m / 2."""
  zero = call.start()
  # In which place among those whose weight had better be smaller.
  place = jnp.argsort(jnp.argsort(-jax.grad(call.loss)(zero)))
  num = jnp.arange(len(zero) // 2 + 1)
  z = jnp.where(place[None] < num[:, None], jnp.log(_DROPPED), 0.0)
  z = z.astype(zero.dtype)
  return call.weights(z[best_step(jax.vmap(call.loss)(z))])
