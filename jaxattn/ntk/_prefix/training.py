r"""Gradient descent on a prefix, at any scale of its output.

The model is :math:`F(x) = \gamma\, (o(x) - o_0(x))` with the output
:math:`o_0` of the prefix as drawn, the loss :math:`\tfrac12 \sum_i |F(x_i) -
y_i|^2`. In units of :func:`prefix_ntk` a step of size :math:`\eta` is one of
:math:`\eta \gamma^2 / m` on the outputs. At :math:`\gamma = m`, the scale of
the paper, a long prefix hardly moves, and F is kernel regression; at
:math:`\gamma = \sqrt m` it learns its kernel at these lengths, at 1 more so.
Source: arXiv 2406.14036; the scales are those of Chizat et al., arXiv
1812.07956.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.ntk._prefix import context as contexts
from jaxattn.ntk._prefix import finite
from jaxattn.ntk._prefix.context import Context, Datum
from jaxattn.ntk.empirical import ntk_vector_product
from jaxattn.numerics import power_iteration
from jaxattn.softmax import Prefix, prefix_init


class PrefixHistory(NamedTuple):
  """How a prefix was trained.

  Source: this project.

  Attributes:
    loss: (num_steps + 1,) before each step, and at the end.
    learning_rate: () step size on the loss.
    initial: the prefix as drawn, whose output F is relative to.
    output: (n, v) F of the data at the end.
    output_eval: (n_eval, v) the same of ``x_eval``; None without.
    outputs: (num_steps + 1, n, v) F of the data at each entry of ``loss``; None
      unless recorded.
  """

  loss: jax.Array
  learning_rate: jax.Array
  initial: Prefix
  output: jax.Array
  output_eval: jax.Array | None
  outputs: jax.Array | None


def train_prefix(
  rng: jax.Array,
  x: jax.Array,
  y: jax.Array,
  context: Context | None = None,
  *,
  length: int,
  output_scale: str | float | jax.Array = "m",
  learning_rate_fraction: float | jax.Array = 0.5,
  num_steps: int,
  x_eval: jax.Array | None = None,
  context_eval: Context | None = None,
  key_std: float = 1.0,
  value_std: float = 1.0,
  prefix_bias: float | jax.Array = 0.0,
  count_normalized: bool = True,
  record: bool = False,
) -> tuple[Prefix, PrefixHistory]:
  r"""Draws a prefix of one head and fits it by gradient descent.

  Args:
    rng: PRNG key.
    x: (n, d) queries.
    y: (n, v) targets of :math:`F = \gamma (o - o_0)`.
    context: of ``x``; see :func:`prefix_output`.
    length: m.
    output_scale: gamma: "m", "sqrt_m", or a positive number.
    learning_rate_fraction: c in the step size :math:`c\, m / (\gamma^2
      \lambda_{\max})`, of the kernel at the start; up to 1, while descent is
      stable below 2.
    num_steps: steps to take.
    x_eval: (n_eval, d) queries to evaluate F on at the end.
    context_eval: of ``x_eval``.
    key_std: standard deviation of key entries at the start.
    value_std: the same of value entries.
    prefix_bias: added to the logits of the prefix.
    count_normalized: subtract log m from them too.
    record: keep the outputs at all steps.

  Returns:
    The prefix, key (m, 1, d) and value (m, 1, v), for ``prefix_attention`` with
    ``scale=1.0`` and the same bias and normalization; and its history.

  Raises:
    ValueError: if shapes, dtypes or options do not fit.

  Cost:
    O(n m (d + v)) time a step, and 31 times that for the largest eigenvalue by
    power iteration, which is at most lambda_max; O(n m) memory.

  Source:
    arXiv 2406.14036, its training of a prefix; the context, and normalization
    by the length, are this project's.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> rng_x, rng = jax.random.split(jax.random.key(0))
    >>> x = jax.random.normal(rng_x, (8, 4)) / 2
    >>> y = jnp.sin(2 * x[:, :1])
    >>> prefix, history = train_prefix(
    ...   rng, x, y, length=512, learning_rate_fraction=1.0, num_steps=500
    ... )
    >>> prefix.key.shape, bool(history.loss[-1] < 0.01 * history.loss[0])
    ((512, 1, 4), True)
  """
  x, y = jnp.asarray(x), jnp.asarray(y)
  contexts.check_data("x", x)
  _checks.check_floating("y", y)
  _checks.check_shape("y", y, (len(x), None), "(n, v)")
  _checks.check_integer("length", length, 1, None)
  scale = _scale(output_scale, length)
  _checks.check_scalar("learning_rate_fraction", learning_rate_fraction)
  _checks.check_positive("learning_rate_fraction", learning_rate_fraction)
  _checks.check_range(
    "learning_rate_fraction", learning_rate_fraction, 0, math.inf, closed=False
  )
  _checks.check_integer("num_steps", num_steps, 1, None)
  contexts.check_bias(prefix_bias, count_normalized)
  _checks.check_choice("record", record, (False, True))
  data = [("context", x, context)]
  if x_eval is not None:
    x_eval = jnp.asarray(x_eval)
    contexts.check_data("x_eval", x_eval, x.shape[1])
    data.append(("context_eval", x_eval, context_eval))
  elif context_eval is not None:
    raise ValueError("context_eval must be None if x_eval is, got a context")
  both = []
  for name, queries, pairs in data:
    summary = contexts.summarize("train_prefix", name, pairs, queries)
    contexts.check_values(name, summary, y.shape[1])
    both.append((queries, summary))
  dtype, (y, both) = contexts.widen((y, both))
  rng_prefix, rng_start = jax.random.split(rng)
  initial = prefix_init(
    rng_prefix,
    length,
    1,
    x.shape[1],
    value_dim=y.shape[1],
    key_std=key_std,
    value_std=value_std,
    dtype=y.dtype,
  )
  bias = contexts.log_weight(prefix_bias, count_normalized, length)
  args = rng_start, initial, y, both, scale, learning_rate_fraction, bias
  found = _train(*args, num_steps=num_steps, record=record)
  return jax.tree.map(lambda z: z.astype(dtype), found)


def _scale(
  output_scale: str | float | jax.Array, length: int
) -> float | jax.Array:
  if isinstance(output_scale, str):
    _checks.check_choice("output_scale", output_scale, ("m", "sqrt_m"))
    return float(length) if output_scale == "m" else math.sqrt(length)
  _checks.check_scalar("output_scale", output_scale)
  _checks.check_positive("output_scale", output_scale)
  _checks.check_range("output_scale", output_scale, 0, math.inf, closed=False)
  return output_scale


@functools.partial(jax.jit, static_argnames=("num_steps", "record"))
def _train(
  rng: jax.Array,
  initial: Prefix,
  y: jax.Array,
  data: list[Datum],
  scale: Any,
  fraction: Any,
  bias: Any,
  *,
  num_steps: int,
  record: bool,
) -> tuple[Prefix, PrefixHistory]:
  scale, fraction = (jnp.asarray(z, y.dtype) for z in (scale, fraction))

  def outputs(moved: Prefix, data: Datum) -> jax.Array:
    key, value = jax.tree.map(lambda p, q: (p + q)[:, 0], initial, moved)
    return finite.output(key, value, *data, bias)

  # Steps are added up apart from the prefix, next to which they are so small
  # that they would be rounded.
  zero = jax.tree.map(jnp.zeros_like, initial)
  offsets = [outputs(zero, part) for part in data]

  def model(moved: Prefix, part: int = 0) -> jax.Array:
    return scale * (outputs(moved, data[part]) - offsets[part])

  start = jax.random.normal(rng, y.shape, y.dtype)
  product = functools.partial(
    ntk_vector_product,
    lambda moved, x: scale * outputs(moved, x),
    zero,
    data[0],
  )
  learning_rate = fraction / power_iteration(product, start)[0]

  def step(moved: Prefix, _: None) -> tuple[Prefix, tuple[Any, ...]]:
    out, vjp = jax.vjp(model, moved)
    (gradient,) = vjp(out - y)
    moved = jax.tree.map(lambda p, g: p - learning_rate * g, moved, gradient)
    return moved, (_loss(out, y), out if record else None)

  moved, (losses, recorded) = lax.scan(step, zero, length=num_steps)
  out = model(moved)
  history = PrefixHistory(
    loss=jnp.append(losses, _loss(out, y)),
    learning_rate=learning_rate,
    initial=initial,
    output=out,
    output_eval=model(moved, 1) if len(data) == 2 else None,
    outputs=jnp.concatenate((recorded, out[None])) if record else None,
  )
  return jax.tree.map(jnp.add, initial, moved), history


def _loss(out: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.square(out - y).sum() / 2
