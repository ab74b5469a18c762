"""Straight-through training, what it records, and how fast signs follow."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks
from jaxattn.ntk.one_bit import network
from jaxattn.ntk.one_bit.network import OneBit


class OneBitHistory(NamedTuple):
  """What training recorded; outputs are differences to those at the start.

  Attributes:
    loss: (T + 1,) half sums of squares after 0, 1, ... steps.
    loss_avg: (T + 1,) the same of outputs averaged over the last ``window``
      steps (or as many as there are).
    flips: (T,) signs that each step changed.
    f: (T + 1, n) outputs on the data.
    f_eval: (E, n_eval) outputs on ``x_eval`` after each of ``eval_steps``.
    f_eval_avg: (E, n_eval) the same, averaged over the last ``window`` steps.
    input_norm_range: (2,) least and largest norm of a row of x; theory has 1.
  """

  loss: jax.Array
  loss_avg: jax.Array
  flips: jax.Array
  f: jax.Array
  f_eval: jax.Array
  f_eval_avg: jax.Array
  input_norm_range: jax.Array


def train_one_bit(
  params: OneBit,
  x: jax.Array,
  y: jax.Array,
  *,
  learning_rate: float | jax.Array,
  num_steps: int,
  quantized: bool = True,
  kappa: float | jax.Array = 1.0,
  window: int = 10,
  x_eval: jax.Array | None = None,
  eval_steps: Sequence[int] | None = None,
) -> tuple[OneBit, OneBitHistory]:
  r"""Gradient descent on :math:`\tfrac12 \sum_i (f(x_i) - f_0(x_i) - y_i)^2`.

  What the network was at the start is taken off; 0 if neurons are paired. Late
  in training of signs the loss is dominated by weights that flip back and
  forth, at any width and rate: look at averages over ``window`` steps, or let
  the rate fall. Adam's normalization would amplify flips.

  Args:
    params: parameters to start from.
    x: (n, d) inputs.
    y: (n,) targets.
    learning_rate: positive, one or (num_steps,); in units of the kernel of the
      network, of which it should be below 2 / lambda_max.
    num_steps: T.
    quantized: train the network of signs, or its twin of full precision.
    kappa: in (0, 1].
    window: steps averaged over, at most ``num_steps``.
    x_eval: (n_eval, d) held-out inputs; None = none.
    eval_steps: ascending numbers of steps after which they are evaluated;
      None = ``num_steps`` alone.

  Returns:
    Trained parameters, and the log as :class:`OneBitHistory`.

  Raises:
    ValueError: if shapes or dtypes do not fit, ``kappa`` is not in (0, 1],
      ``window`` not in [1, num_steps], the rate not positive, or ``eval_steps``
      not ascending in [0, num_steps].

  Cost:
    O(n m d) a step, as much as full precision, and O(n (m + T)) memory;
    ``x_eval`` costs only in the ``window`` steps before each evaluation.

  Source:
    arXiv 2411.01663, section 3.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import one_bit
    >>> rngs = jax.random.split(jax.random.key(0))
    >>> x = jax.random.normal(rngs[0], (8, 16)) / 4
    >>> params = one_bit.init(rngs[1], 4096, 16)
    >>> y = jnp.sign(x[:, 0])
    >>> _, log = one_bit.train_one_bit(
    ...   params, x, y, learning_rate=0.5, num_steps=60
    ... )
    >>> bool(log.loss_avg[-1] < 0.02 * log.loss[0])
    True
  """
  x, y = jnp.asarray(x), jnp.asarray(y)
  x_eval = x[:0] if x_eval is None else jnp.asarray(x_eval)
  network.check_params(params, x=x, x_eval=x_eval)
  _checks.check_one_dtype(x=x, y=y)
  _checks.check_shape("y", y, (len(x),), "(n,)")
  _checks.check_integer("num_steps", num_steps, 1, None)
  _checks.check_integer("window", window, 1, num_steps)
  network.check_kappa(kappa)
  rate = jnp.asarray(learning_rate, x.dtype)
  _checks.check_positive("learning_rate", rate)
  _checks.check_range("learning_rate", rate, 0, math.inf, closed=False)
  if rate.ndim:
    _checks.check_shape("learning_rate", rate, (num_steps,), "(num_steps,)")
  steps = (num_steps,) if eval_steps is None else tuple(eval_steps)
  for step in steps:
    _checks.check_integer("eval_steps", step, 0, num_steps)
  if not steps or list(steps) != sorted(set(steps)):
    raise ValueError(f"eval_steps must be ascending, at least one, got {steps}")
  rates = jnp.broadcast_to(rate, (num_steps,))
  return _train(
    params, x, y, rates, kappa, x_eval, quantized, window, tuple(steps)
  )


def effective_rate(latent_std: float | jax.Array = 1.0) -> jax.Array:
  r"""How far signs move in the mean when latent weights move by one.

  .. math:: c = 2 \varphi(0) / s = \sqrt{2 / \pi} / s

  Args:
    latent_std: s, standard deviation of the latent weights.

  Returns:
    (), or the shape of ``latent_std``.

  Raises:
    ValueError: if ``latent_std`` is not positive.

  Cost:
    O(1).

  Source:
    this project.

  Example:
    >>> print(effective_rate())
    0.7978846
  """
  _checks.check_positive("latent_std", latent_std)
  return math.sqrt(2 / math.pi) / jnp.asarray(latent_std, float)


def generalization_difference(
  history_a: OneBitHistory, history_b: OneBitHistory, *, averaged: bool = True
) -> jax.Array:
  """Root mean square difference of outputs on held-out inputs.

  Of a network and its twin, trained from one start for as many steps. Scaling
  both down makes it small, and says nothing.

  Args:
    history_a: log of one.
    history_b: log of the other, on the same ``x_eval``.
    averaged: outputs averaged over a few steps, or of the last alone.

  Returns:
    (E,), one for each of ``eval_steps``; leading axes of both stay.

  Raises:
    ValueError: if the outputs differ in shape or there are none.

  Cost:
    O(n_eval).

  Source:
    arXiv 2411.01663, section 5.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import one_bit
    >>> x = jnp.eye(8)
    >>> params = one_bit.init(jax.random.key(0), 32, 8)
    >>> logs = [
    ...   one_bit.train_one_bit(
    ...     params, x, x[0], learning_rate=0.5, num_steps=10, x_eval=-x,
    ...     quantized=quantized,
    ...   )[1]
    ...   for quantized in (True, False)
    ... ]
    >>> generalization_difference(*logs).shape
    (1,)
  """
  name = "f_eval_avg" if averaged else "f_eval"
  a, b = getattr(history_a, name), getattr(history_b, name)
  if a.shape != b.shape or not a.size:
    raise ValueError(
      "both histories must hold outputs on the same x_eval, got shapes "
      f"{a.shape} and {b.shape}"
    )
  return jnp.sqrt(jnp.square(a - b).mean(-1))


@functools.partial(
  jax.jit, static_argnames=("quantized", "window", "eval_steps")
)
def _train(
  params: OneBit,
  x: jax.Array,
  y: jax.Array,
  rates: jax.Array,
  kappa: float | jax.Array,
  x_eval: jax.Array,
  quantized: bool,
  window: int,
  eval_steps: tuple[int, ...],
) -> tuple[OneBit, OneBitHistory]:
  def outputs(x: jax.Array) -> Callable[[jax.Array], jax.Array]:
    def f(w: jax.Array) -> jax.Array:
      return network.apply(
        params._replace(latent=w), x, quantized=quantized, kappa=kappa
      )

    start = f(params.latent)
    return lambda w: f(w) - start

  f, f_eval = outputs(x), outputs(x_eval)
  shares = _eval_shares(len(rates), window, eval_steps).astype(x.dtype)

  def record(sums: jax.Array, w: jax.Array, share: jax.Array) -> jax.Array:
    return lax.cond(
      (share > 0).any(),
      lambda: sums + share[..., None] * f_eval(w)[None, None],
      lambda: sums,
    )

  def step(carry: tuple[jax.Array, ...], inputs: Any) -> tuple[Any, Any]:
    (w, sums), (rate, share) = carry, inputs
    out, pull = jax.vjp(f, w)
    (grad,) = pull(out - y)
    moved = w - rate * grad
    flips = ((moved >= 0) != (w >= 0)).sum()
    return (moved, record(sums, w, share)), (out, flips)

  sums = jnp.zeros((*shares.shape[1:], len(x_eval)), x.dtype)
  (w, sums), (outs, flips) = lax.scan(
    step, (params.latent, sums), (rates, shares[:-1])
  )
  outs = jnp.concatenate([outs, f(w)[None]])
  last, average = record(sums, w, shares[-1])
  norms = jnp.linalg.norm(x, axis=1)
  history = OneBitHistory(
    loss=_half_squares(outs - y[None]),
    loss_avg=_half_squares(_running_mean(outs, window) - y[None]),
    flips=flips,
    f=outs,
    f_eval=last,
    f_eval_avg=average,
    input_norm_range=jnp.stack([norms.min(), norms.max()]),
  )
  return params._replace(latent=w), history


def _eval_shares(
  num_steps: int, window: int, eval_steps: tuple[int, ...]
) -> np.ndarray:
  """(T + 1, 2, E): weights of the output after t steps in what is recorded.

  First in the output at an evaluation, then in the average up to it.
  """
  t, end = np.arange(num_steps + 1)[:, None], np.array(eval_steps)[None]
  inside = (t <= end) & (t > end - window)
  return np.stack([t == end, inside / np.minimum(window, end + 1)], 1)


def _running_mean(values: jax.Array, window: int) -> jax.Array:
  """Means over the last ``window`` rows, or as many as there are."""
  zero = jnp.zeros((), values.dtype)
  sums = lax.reduce_window(
    values, zero, lax.add, (window, 1), (1, 1), ((window - 1, 0), (0, 0))
  )
  num = np.minimum(np.arange(1, len(values) + 1), window)
  return sums / num[:, None].astype(values.dtype)


def _half_squares(error: jax.Array) -> jax.Array:
  return jnp.square(error).sum(-1) / 2
