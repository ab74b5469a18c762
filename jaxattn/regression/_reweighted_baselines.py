"""What else to do with a doubtful prompt and a few examples to be trusted."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxattn import _checks
from jaxattn.regression._reweighted_objective import (
  ApplyFn,
  Objective,
  Prompt,
  check_prompts,
  descend,
  to_w,
)

_KINDS = (
  "vanilla",
  "append",
  "validation_only",
  "fine_tune",
  "prefix",
  "influence",
)
# Learning rate and steps of two of them, and how long the prefix is.
_FINE_TUNE = 1e-3, 60
_PREFIX = 0.05, 150
_PREFIX_LENGTH = 4
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
  * ``"prefix"``: append four examples, inputs and labels learned on them; Adam,
    rate 0.05, 150 steps, starting from validation examples.
  * ``"influence"``: leave out those examples whose weight the validation loss
    at w = 1 falls with least; how many, at most half, is decided by that loss.

  Args:
    apply_fn: as for :func:`ricl`; for ``"influence"`` it must know mode
      ``"logit"``.
    params: its parameters.
    prompt: m examples, some of which may be wrong.
    val: V examples that can be trusted.
    kind: one of the above.

  Returns:
    A :class:`BaselineResult`: what to predict with.

  Raises:
    ValueError: if shapes do not fit, a prompt is empty or not finite, or
      ``kind`` is unknown.

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
  return _trained_baseline(apply_fn, kind, params, prompt, val)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trained_baseline(
  apply_fn: ApplyFn, kind: str, params: Any, prompt: Prompt, val: Prompt
) -> BaselineResult:
  ones = jnp.ones_like(prompt.y)
  call = Objective(apply_fn, "logit", params, prompt, val, 0.0)
  if kind == "fine_tune":
    rate, num_steps = _FINE_TUNE
    params, _ = descend(
      lambda p: call._replace(params=p).loss(jnp.zeros_like(ones)),
      params,
      optax.adam(rate),
      num_steps,
    )
    return BaselineResult(params, prompt, ones)
  if kind == "influence":
    return BaselineResult(params, prompt, _without_worst(call))
  rate, num_steps = _PREFIX

  def extended(prefix: Prompt) -> Prompt:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), prompt, prefix)

  def loss(prefix: Prompt) -> jax.Array:
    longer = extended(prefix)
    return call._replace(prompt=longer).loss(jnp.zeros_like(longer.y))

  rows = jnp.arange(_PREFIX_LENGTH) % len(val.y)
  start = jax.tree.map(lambda x: x[rows], val)
  prefix, _ = descend(loss, start, optax.adam(rate), num_steps)
  longer = extended(prefix)
  return BaselineResult(params, longer, jnp.ones_like(longer.y))


def _without_worst(call: Objective) -> jax.Array:
  """Weights that leave out the k worst, for the best k up to m / 2."""
  zero = jnp.zeros_like(call.prompt.y)
  # In which place among those whose weight had better be smaller.
  place = jnp.argsort(jnp.argsort(-jax.grad(call.loss)(zero)))
  num = jnp.arange(len(zero) // 2 + 1)
  z = jnp.where(place[None] < num[:, None], jnp.log(_DROPPED), 0.0)
  z = z.astype(zero.dtype)
  return to_w(z[jax.vmap(call.loss)(z).argmin()], "logit")
