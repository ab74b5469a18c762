r"""Weights for the examples of a prompt, learned on a few clean examples.

A frozen in-context model :math:`F(w; x)` predicts from a prompt whose example i
counts :math:`w_i`; w = 1 is the model as it is. On V validation examples

.. math::

  L(w) = \frac{1}{2V} \sum_v \big( F(w; \tilde x_v) - \tilde y_v \big)^2
    + \frac{\rho}{2V} \|z\|^2, \qquad z = w - 1, \quad \rho = \lambda .

:func:`ricl` minimizes it over the m weights. :func:`laricl` linearizes F: with
:math:`J = \partial F / \partial z` and :math:`r = F(1) - \tilde y`,

.. math:: z = -(J^\top J + \rho I)^{-1} J^\top r .

A model offers one or more modes of weighting. In mode ``"logit"`` weights are
positive, and in all of the above z = log w and :math:`\rho = \lambda / 10`: to
leave an example out log w has to go far, w - 1 only to -1. The model is a
function ``apply_fn(params, prompt, query, w, mode)`` that returns (Q,)
predictions. Whatever its dtype is, learned weights have the prompt's; 16-bit
prompts are learned from in 32 bits.

The bilevel form, softmax regression whose examples are weighted, is
:func:`ricl_bilevel` and its kin.

Source: arXiv 2310.03331, of which the idea is taken; the form of LARICL, the
modes and the regularizer are this project's.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxattn import _checks
from jaxattn.numerics.linalg import ridge_solve
from jaxattn.regression._reweighted_baselines import (
  BaselineResult as BaselineResult,
)
from jaxattn.regression._reweighted_baselines import (
  icl_baseline as icl_baseline,
)
from jaxattn.regression._reweighted_bilevel import (
  BilevelResult as BilevelResult,
)
from jaxattn.regression._reweighted_bilevel import (
  hypergradient as hypergradient,
)
from jaxattn.regression._reweighted_bilevel import (
  laricl_bilevel as laricl_bilevel,
)
from jaxattn.regression._reweighted_bilevel import ricl_bilevel as ricl_bilevel
from jaxattn.regression._reweighted_objective import (
  MODES as MODES,
)
from jaxattn.regression._reweighted_objective import (
  STEP_SIZES,
  ApplyFn,
  Objective,
  best_step,
  check_prompt,
  check_prompts,
  check_ridge,
  check_weights,
  descend,
  predict,
  to_z,
)
from jaxattn.regression._reweighted_objective import Prompt as Prompt

__all__ = [
  "BaselineResult",
  "BilevelResult",
  "Prompt",
  "ReweightResult",
  "hypergradient",
  "icl_baseline",
  "laricl",
  "laricl_bilevel",
  "rank_examples",
  "ricl",
  "ricl_bilevel",
  "validation_loss",
  "weighted_predict",
]

_RATES = {"embedding": 0.05, "logit": 0.1, "value": 0.05}


class ReweightResult(NamedTuple):
  """Learned weights.

  Attributes:
    w: (m,), of the examples of the prompt.
    losses: (steps + 1,), the objective before each step and after the last.
  """

  w: jax.Array
  losses: jax.Array


def weighted_predict(
  apply_fn: ApplyFn,
  params: Any,
  prompt: Prompt,
  query: jax.Array,
  w: jax.Array,
  *,
  mode: str = "embedding",
) -> jax.Array:
  """Predicts queries from a prompt whose examples are weighted.

  Args:
    apply_fn: the model, ``(params, prompt, query, w, mode) -> (Q,)``.
    params: its parameters.
    prompt: m examples.
    query: (Q, d).
    w: (m,); positive in mode ``"logit"``, any sign otherwise.
    mode: ``"embedding"``, ``"logit"`` or ``"value"``: what of an example is
      weighted. The first is of no use before a norm, which undoes it.

  Returns:
    (Q,).

  Raises:
    ValueError: if shapes do not fit, those of predictions included, the prompt
      is empty or not finite, the mode is unknown, or a weight is not positive
      in mode ``"logit"``.

  Cost:
    One call of the model.

  Source:
    arXiv 2310.03331 for ``"embedding"``.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import Prompt, weighted_predict
    >>> def mean_label(params, prompt, query, w, mode):
    ...   return jnp.full(len(query), (w * prompt.y).sum() / w.sum())
    >>> prompt = Prompt(jnp.ones((2, 1)), jnp.array([0.0, 4.0]))
    >>> query, w = jnp.ones((1, 1)), jnp.array([1.0, 3.0])
    >>> print(weighted_predict(mean_label, None, prompt, query, w))
    [3.]
  """
  prompt = check_prompt("prompt", prompt, mode)
  _checks.check_shape("query", query, (None, prompt.x.shape[1]), "(Q, d)")
  w = check_weights(w, prompt, mode)
  return predict(apply_fn, params, prompt, query, w, mode)


def validation_loss(
  w: jax.Array,
  apply_fn: ApplyFn,
  params: Any,
  prompt: Prompt,
  val: Prompt,
  *,
  ridge: float | jax.Array = 0.1,
  mode: str = "embedding",
) -> jax.Array:
  r"""The objective of :func:`ricl`.

  .. math:: \frac{1}{2V} \sum_v \big( F(w; \tilde x_v) - \tilde y_v \big)^2
    + \frac{\rho}{2V} \|z\|^2

  Args:
    w: (m,).
    apply_fn: as for :func:`weighted_predict`.
    params: the model's parameters.
    prompt: m examples.
    val: V examples that can be trusted.
    ridge: lambda, at least 0: rho = lambda on z = w - 1, or lambda / 10 on
      z = log w in mode ``"logit"``.
    mode: as for :func:`weighted_predict`.

  Returns:
    ().

  Raises:
    ValueError: as :func:`weighted_predict`; if ``val`` is empty, dtypes of
      examples differ or ``ridge`` is negative.

  Cost:
    One call of the model.

  Source:
    arXiv 2310.03331; the regularizer is this project's.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import Prompt, validation_loss
    >>> def linear(params, prompt, query, w, mode):
    ...   return query @ (prompt.x.T @ (w * prompt.y))
    >>> prompt = val = Prompt(jnp.eye(2), jnp.array([1.0, 2.0]))
    >>> print(validation_loss(jnp.ones(2), linear, None, prompt, val))
    0.0
  """
  prompt, val = check_prompts(prompt, val, mode)
  _checks.check_nonnegative("ridge", ridge)
  w = check_weights(w, prompt, mode)
  call = Objective(apply_fn, mode, params, prompt, val, ridge)
  return call.loss(to_z(w, mode))


def ricl(
  apply_fn: ApplyFn,
  params: Any,
  prompt: Prompt,
  val: Prompt,
  *,
  ridge: float | jax.Array = 0.1,
  mode: str = "embedding",
  optimizer: optax.GradientTransformation | str | None = None,
  num_steps: int = 150,
  w0: jax.Array | None = None,
) -> ReweightResult:
  r"""Learns one weight for each example of a prompt (RICL).

  The model stays as it is. With ``optimizer="gradient_descent"`` the step is
  :math:`1 / \beta`, :math:`\beta` the largest eigenvalue of
  :math:`(J^\top J + \rho I) / V` at the start, by power iteration. As long
  as the objective is :math:`\beta`-smooth, it falls at each of T steps and
  :math:`\min_t \|\nabla L\|^2 \le 2 \beta (L_0 - L_*) / T`; a model that is far
  from linear may need less than that step, as an optimizer of its own.

  Args:
    apply_fn: the model, hashable, as for :func:`weighted_predict`; pass the
      same object again, and nothing is compiled again.
    params: its parameters.
    prompt: m examples, some of which may be wrong.
    val: V examples that can be trusted.
    ridge: lambda; positive if V < m.
    mode: as for :func:`weighted_predict`.
    optimizer: of optax; None = Adam, rate 0.05, or 0.1 in mode ``"logit"``; or
      ``"gradient_descent"``. Keep one of optax too: another, even of the same
      rate, is compiled again.
    num_steps: steps.
    w0: (m,), the start; None = ones.

  Returns:
    A :class:`ReweightResult` with num_steps + 1 losses.

  Raises:
    ValueError: as :func:`validation_loss`; if ``ridge`` is 0 and V < m, or an
      option is not one of its choices.

  Cost:
    num_steps gradients of the model, each with V queries in one call.

  Source:
    arXiv 2310.03331.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import Prompt, rank_examples, ricl
    >>> def mean_label(params, prompt, query, w, mode):
    ...   return jnp.full(len(query), (w * prompt.y).mean())
    >>> prompt = Prompt(jnp.ones((3, 1)), jnp.array([1.0, 9.0, 1.0]))
    >>> val = Prompt(jnp.ones((1, 1)), jnp.ones(1))
    >>> found = ricl(mean_label, None, prompt, val)
    >>> print(rank_examples(found.w))
    [1 0 2]
  """
  prompt, val = check_prompts(prompt, val, mode)
  check_ridge(ridge, prompt, val)
  _checks.check_integer("num_steps", num_steps, 1, None)
  if isinstance(optimizer, str):
    _checks.check_choice("optimizer", optimizer, ("gradient_descent",))
  if w0 is None:
    w0 = jnp.ones_like(prompt.y)
  z = to_z(check_weights(w0, prompt, mode), mode)
  return _ricl(
    apply_fn, mode, optimizer, num_steps, params, prompt, val, ridge, z
  )


def laricl(
  apply_fn: ApplyFn,
  params: Any,
  prompt: Prompt,
  val: Prompt,
  *,
  ridge: float | jax.Array = 0.1,
  mode: str = "embedding",
  num_rounds: int = 1,
  line_search: bool = True,
) -> ReweightResult:
  r"""Learns the weights from a linear approximation of the model (LARICL).

  One Jacobian and one linear system instead of a hundred gradients,

  .. math:: z = -(J^\top J + \rho I)^{-1} J^\top r
    = -J^\top (J J^\top + \rho I)^{-1} r ,

  whichever is smaller. Further rounds linearize at the weights found so far and
  lead towards the minimum that :func:`ricl` looks for.

  Args:
    apply_fn: as for :func:`ricl`.
    params: its parameters.
    prompt: m examples, some of which may be wrong.
    val: V examples that can be trusted.
    ridge: lambda; positive if V < m. With 0 the Jacobian must have full column
      rank: from a system that is singular no step is taken.
    mode: as for :func:`weighted_predict`.
    num_rounds: linearizations.
    line_search: take 1, 1/2, 1/4, 1/8 or 0 of each step, whichever has the
      smallest objective. A full step can make things worse.

  Returns:
    A :class:`ReweightResult` with num_rounds + 1 losses.

  Raises:
    ValueError: as :func:`ricl`.

  Cost:
    A round: one Jacobian, V backward passes in one batch;
    O(V m min(V, m)); and five calls of the model with a search.

  Source:
    arXiv 2310.03331 for the idea; the formula is this project's.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import Prompt, laricl
    >>> def mean_label(params, prompt, query, w, mode):
    ...   return jnp.full(len(query), (w * prompt.y).mean())
    >>> prompt = Prompt(jnp.ones((2, 1)), jnp.array([2.0, 0.0]))
    >>> val = Prompt(jnp.ones((1, 1)), jnp.full(1, 3.0))
    >>> print(laricl(mean_label, None, prompt, val, ridge=1.0).w)
    [2. 1.]
  """
  prompt, val = check_prompts(prompt, val, mode)
  check_ridge(ridge, prompt, val)
  _checks.check_integer("num_rounds", num_rounds, 1, None)
  _checks.check_choice("line_search", line_search, (False, True))
  # A ridge that is known to be 0 is solved without normal equations.
  known = _checks.is_concrete(ridge) and not np.any(np.asarray(ridge))
  return _laricl(
    apply_fn,
    mode,
    num_rounds,
    line_search,
    known,
    params,
    prompt,
    val,
    ridge,
  )


def rank_examples(w: jax.Array) -> jax.Array:
  """Orders examples by their weights, most suspicious first.

  Args:
    w: (m,), learned weights.

  Returns:
    (m,) indices, of the smallest weight first; ties keep their order.

  Raises:
    ValueError: if ``w`` is no vector.

  Cost:
    O(m log m).

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import rank_examples
    >>> print(rank_examples(jnp.array([1.1, -0.2, 0.7])))
    [1 2 0]
  """
  _checks.check_rank("w", w, 1)
  return jnp.argsort(w)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _ricl(
  apply_fn: ApplyFn,
  mode: str,
  optimizer: optax.GradientTransformation | str | None,
  num_steps: int,
  params: Any,
  prompt: Prompt,
  val: Prompt,
  ridge: float | jax.Array,
  z: jax.Array,
) -> ReweightResult:
  call = Objective(apply_fn, mode, params, prompt, val, ridge)
  if optimizer is None:
    optimizer = optax.adam(_RATES[mode])
  elif isinstance(optimizer, str):
    # A model that does not see the weights has gradient 0: any step will do.
    beta = call.smoothness(z)
    optimizer = optax.sgd(1 / jnp.where(beta > 0, beta, 1))
  z, losses = descend(call.loss, z, optimizer, num_steps)
  return ReweightResult(call.weights(z), losses)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _laricl(
  apply_fn: ApplyFn,
  mode: str,
  num_rounds: int,
  line_search: bool,
  no_ridge: bool,
  params: Any,
  prompt: Prompt,
  val: Prompt,
  ridge: float | jax.Array,
) -> ReweightResult:
  call = Objective(apply_fn, mode, params, prompt, val, ridge)
  z = call.start()
  sizes = jnp.array(STEP_SIZES if line_search else (1.0,), z.dtype)
  rho = 0.0 if no_ridge else call.z_ridge(z.dtype)

  def residual(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    r = call.residual(z)
    return r, r

  def step(z: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
    jacobian, r = jax.jacrev(residual, has_aux=True)(z)
    full = ridge_solve(jacobian, jacobian @ z - r, rho) - z
    full = jnp.where(jnp.isfinite(full).all(), full, 0)
    trials = z[None] + sizes[:, None] * full[None]
    values = jax.vmap(call.loss)(trials)
    best = best_step(values)
    return trials[best], values[best]

  first = call.loss(z)
  z, losses = lax.scan(step, z, length=num_rounds)
  return ReweightResult(call.weights(z), jnp.append(first, losses))
