r"""A small transformer that learns to regress in context.

Example tokens are :math:`(x_i, y_i, 1)`, query tokens :math:`(x_q, 0, 0)`,
mapped linearly to ``width`` numbers. There are no positions, and the attention
is not normalized: otherwise the size of an embedding would mean nothing.
Queries attend to the examples and to themselves, so that any number of them
shares one pass.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxattn import _checks
from jaxattn.looped.icl import sample_icl_task
from jaxattn.regression.reweighted_icl import MODES, Prompt

__all__ = ["ICLHistory", "ICLRegressor", "train_icl"]

_BATCH_SIZE = 64
_NUM_QUERIES = 8
_LEARNING_RATE = 3e-3


class ICLHistory(NamedTuple):
  """What happened in training.

  Attributes:
    losses: (num_steps,), mean squared error of each batch before its step.
  """

  losses: jax.Array


class ICLRegressor(nn.Module):
  r"""Predicts the labels of queries from the weighted examples of a prompt.

  A layer is :math:`z + \mathrm{attention}(z)`, without a norm, and then
  :math:`z + \mathrm{mlp}(\mathrm{norm}(z))` with 4 ``width`` hidden units
  (GELU). Weights w of the examples act in one of three ways:

  * ``"embedding"``: the embedding of example i is multiplied by w_i;
  * ``"logit"``: log w_i is added to every logit of key i, so that w_i = 2 is
    what showing the example twice is, and w_i -> 0 what leaving it out is;
  * ``"value"``: the value of example i is multiplied by w_i in every layer.

  Vectors (P, width) in ``params["prefix"]["tokens"]``, if there is such a
  collection beside the parameters, stand in front of the embedded examples and
  are seen as they are: prefix tuning at the input.

  ``ICLRegressor().apply`` is an ``apply_fn`` of
  :func:`jaxattn.regression.ricl` and its kin. Keep the model: another one, even
  of the same fields, is compiled again.

  Attributes:
    width: size of a token.
    num_layers: layers.
    num_heads: heads; divides ``width``.

  Raises:
    ValueError: when called, if a field or an input does not fit.

  Cost:
    O((m + Q) (m + Q + width) width) a layer for Q queries.

  Source:
    this project; the task is that of arXiv 2208.01066.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import ICLRegressor
    >>> from jaxattn.regression import Prompt, weighted_predict
    >>> prompt, query = Prompt(jnp.ones((5, 3)), jnp.ones(5)), jnp.ones((2, 3))
    >>> model = ICLRegressor()
    >>> params = model.init(jax.random.key(0), prompt, query)
    >>> w = jnp.ones(5)
    >>> weighted_predict(model.apply, params, prompt, query, w).shape
    (2,)
  """

  width: int = 32
  num_layers: int = 2
  num_heads: int = 2

  @nn.compact
  def __call__(
    self,
    prompt: Prompt,
    query: jax.Array,
    w: jax.Array | None = None,
    mode: str = "embedding",
  ) -> jax.Array:
    """Predicts (Q,) labels of (Q, d) queries; without w, unweighted."""
    self._check(prompt, query, w, mode)
    z = nn.Dense(self.width, use_bias=False, name="embed")(
      _tokens(prompt, query)
    )
    prefix = self._prefix(z)
    z, m = jnp.concatenate([prefix, z]), len(prefix) + len(prompt.x)
    if w is not None:
      # Of a prefix and of a query nothing is weighted.
      w = jnp.pad(w, (len(prefix), len(query)), constant_values=1)
    if w is not None and mode == "embedding":
      z = z * w[:, None]
    keys = jnp.arange(len(z))[None] < m
    mask = keys | jnp.eye(len(z), dtype=bool)
    for i in range(self.num_layers):
      z = _Layer(self.num_heads, name=f"layer_{i}")(z, w, mask, mode)
    return nn.Dense(1, name="head")(z[m:])[:, 0]

  def _prefix(self, z: jax.Array) -> jax.Array:
    if not self.has_variable("prefix", "tokens"):
      return z[:0]
    prefix = jnp.asarray(self.get_variable("prefix", "tokens"))
    shape = None, self.width
    _checks.check_shape(
      "params['prefix']['tokens']", prefix, shape, "(P, width)"
    )
    return prefix.astype(z.dtype)

  def _check(
    self, prompt: Prompt, query: jax.Array, w: jax.Array | None, mode: str
  ) -> None:
    for name in ("width", "num_layers", "num_heads"):
      _checks.check_integer(name, getattr(self, name), 1, None)
    if self.width % self.num_heads:
      raise ValueError(
        f"num_heads must divide width={self.width}, got {self.num_heads}"
      )
    _checks.check_choice("mode", mode, MODES)
    _checks.check_rank("prompt.x", prompt.x, 2)
    m, d = prompt.x.shape
    _checks.check_shape("prompt.y", prompt.y, (m,), "(m,)")
    _checks.check_shape("query", query, (None, d), "(Q, d)")
    if w is not None:
      _checks.check_shape("w", w, (m,), "(m,)")


class _Layer(nn.Module):
  """Attention without, and a network of one hidden layer with a norm."""

  num_heads: int

  @nn.compact
  def __call__(
    self, z: jax.Array, w: jax.Array | None, mask: jax.Array, mode: str
  ) -> jax.Array:
    width = z.shape[-1]
    heads = self.num_heads, width // self.num_heads
    query, key, value = (
      nn.DenseGeneral(heads, name=name)(z) for name in ("query", "key", "value")
    )
    # Written out: forward mode through a custom_vjp is not to be had, and
    # jax.nn's takes the softmax in float32 whatever comes in.
    logits = jnp.einsum("qnh,knh->nqk", query, key) / heads[1] ** 0.5
    if w is not None and mode == "logit":
      logits = logits + jnp.log(w)[None, None]
    if w is not None and mode == "value":
      value = value * w[:, None, None]
    attended = jax.nn.softmax(jnp.where(mask[None], logits, -jnp.inf), -1)
    out = jnp.einsum("nqk,knh->qnh", attended, value)
    z = z + nn.DenseGeneral(width, axis=(-2, -1), name="out")(out)
    y = nn.LayerNorm(name="norm")(z)
    y = nn.gelu(nn.Dense(4 * width, name="mlp_in")(y))
    return z + nn.Dense(width, name="mlp_out")(y)


def train_icl(
  rng: jax.Array,
  *,
  dim: int,
  num_examples: int = 16,
  num_steps: int = 4000,
  model: ICLRegressor | None = None,
) -> tuple[Any, ICLHistory]:
  r"""Trains a regressor on fresh linear tasks.

  Tasks are :func:`jaxattn.looped.sample_icl_task`'s without noise, 64 of 8
  queries a batch; Adam with a cosine schedule that starts from 3e-3.

  Args:
    rng: PRNG key.
    dim: d of the tasks.
    num_examples: m, examples of a prompt.
    num_steps: steps.
    model: the regressor; None = ``ICLRegressor()``.

  Returns:
    Its parameters, and an :class:`ICLHistory`.

  Raises:
    ValueError: if a size is below 1.

  Cost:
    About 25 ms a step of the default model on two CPU cores.

  Source:
    this project's recipe for the task of arXiv 2208.01066.

  Example:
    >>> import jax
    >>> from jaxattn.models import train_icl
    >>> params, history = train_icl(jax.random.key(0), dim=2, num_steps=2)
    >>> history.losses.shape
    (2,)
  """
  _checks.check_integer("dim", dim, 1, None)
  _checks.check_integer("num_examples", num_examples, 1, None)
  _checks.check_integer("num_steps", num_steps, 1, None)
  return _train(rng, model or ICLRegressor(), dim, num_examples, num_steps)


def init_icl(rng: jax.Array, model: ICLRegressor, dim: int) -> Any:
  """Parameters to start from, which do not depend on the prompt's length."""
  x = jnp.zeros((1, dim), jnp.float32)
  return model.init(rng, Prompt(x, x[:, 0]), x)


def icl_optimizer(num_steps: int) -> optax.GradientTransformation:
  """What :func:`train_icl` steps with."""
  return optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, num_steps))


@functools.partial(jax.jit, static_argnames=("model", "dim", "num_examples"))
def icl_loss(
  params: Any,
  rng: jax.Array,
  *,
  model: ICLRegressor,
  dim: int,
  num_examples: int,
) -> jax.Array:
  """Mean squared error on a batch of fresh tasks."""

  def error(rng: jax.Array) -> jax.Array:
    task = sample_icl_task(
      rng, num_examples=num_examples, dim=dim, num_queries=_NUM_QUERIES
    )
    out = model.apply(params, Prompt(task.x, task.y), task.queries)
    return jnp.square(jnp.asarray(out) - task.targets).mean()

  return jax.vmap(error)(jax.random.split(rng, _BATCH_SIZE)).mean()


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _train(
  rng: jax.Array,
  model: ICLRegressor,
  dim: int,
  num_examples: int,
  num_steps: int,
) -> tuple[Any, ICLHistory]:
  optimizer = icl_optimizer(num_steps)
  params = init_icl(rng, model, dim)
  loss = functools.partial(
    icl_loss, model=model, dim=dim, num_examples=num_examples
  )

  def step(carry: Any, i: jax.Array) -> tuple[Any, jax.Array]:
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(rng, i))
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  carry = params, optimizer.init(params)
  (params, _), losses = lax.scan(step, carry, jnp.arange(num_steps))
  return params, ICLHistory(losses)


def _tokens(prompt: Prompt, query: jax.Array) -> jax.Array:
  x, y = prompt
  examples = jnp.concatenate([x, y[:, None], jnp.ones_like(y)[:, None]], 1)
  nothing = jnp.zeros((len(query), 2), query.dtype)
  return jnp.concatenate([examples, jnp.concatenate([query, nothing], 1)])
