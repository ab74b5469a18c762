r"""Forecasts by flows: normalization of windows, training, samples.

A model is a flax module on (x, t, history), as :class:`jaxattn.models.DiT` or
:class:`FlowMLP`: the velocity that carries noise to the future of a history.
Each window is normalized by its own past,

.. math:: y' = \frac{y - h_L}{s}, \qquad
  s = \max(\operatorname{std}(h),\, 10^{-3} \sigma),

channel by channel, with :math:`\sigma` the standard deviation of the whole
series: forecasts follow its level and scale. Nothing of the future is looked
at. Source: arXiv 2210.02747 for the loss; arXiv 2503.14076 for flows as
forecasters.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxattn import _checks
from jaxattn.models.dit import (
  DiT,
  HistoryCache,
  check_history,
  check_velocity_inputs,
  encode_history,
)
from jaxattn.numerics._dtypes import accumulator
from jaxattn.sampling import cfm_loss, flow_loss, sample_flow

__all__ = [
  "FlowHistory",
  "FlowMLP",
  "normalize_windows",
  "sample_forecast",
  "train_flow",
]

_FLOOR = 1e-3
# Sines and cosines of pi t to this multiple: with quicker ones the velocity is
# rough in time, and solvers of a higher order gain nothing.
_TIME_WAVES = 4
_EMA, _EMA_RAMP = 0.999, 10
_WEIGHT_DECAY, _MAX_GRADIENT = 1e-4, 1.0
# Draws of time and noise for each window of validation.
_VAL_DRAWS = 4


class FlowHistory(NamedTuple):
  """What happened in training.

  Attributes:
    losses: (num_steps,) the loss of each batch before its step, over the number
      of coordinates.
    val_losses: (num_evals,) the loss of flow matching on the validation
      windows, over the number of coordinates; empty without them.
    best: () which of them was least, -1 without them.
  """

  losses: jax.Array
  val_losses: jax.Array
  best: jax.Array


class FlowMLP(nn.Module):
  r"""A network of hidden layers: the smallest velocity of a forecast's flow.

  Its inputs are x, the history, t, and sine and cosine of :math:`\pi k t` for k
  up to 4, so that it is smooth in time. Called as :class:`DiT` is: on x
  (B, T, C), t of shape () or (B,) and the history (B, L, C). It returns
  (B, T, C), exactly 0 at first.

  Attributes:
    horizon: T, steps to forecast.
    history: L, steps of the past.
    channels: C.
    width: units of a hidden layer.
    num_layers: hidden layers.

  Raises:
    ValueError: when called, if a field or an input does not fit.

  Cost:
    O((L C + T C + num_layers width) width) a row.

  Source:
    this project.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import FlowMLP
    >>> model = FlowMLP(horizon=8, history=16)
    >>> x, history = jnp.ones((2, 8, 1)), jnp.ones((2, 16, 1))
    >>> params = model.init(jax.random.key(0), x, 0.5, history)
    >>> model.apply(params, x, 0.5, history).shape
    (2, 8, 1)
  """

  horizon: int
  history: int
  channels: int = 1
  width: int = 128
  num_layers: int = 2

  @nn.compact
  def __call__(
    self, x: jax.Array, t: float | jax.Array, history: jax.Array
  ) -> jax.Array:
    """The velocity, (B, T, C)."""
    x, t = jnp.asarray(x), jnp.asarray(t)
    for name in ("horizon", "history", "channels", "width", "num_layers"):
      _checks.check_integer(name, getattr(self, name), 1, None)
    check_velocity_inputs(self, x, t)
    check_history(self, history, len(x))
    times = _time_features(jnp.broadcast_to(t, x.shape[:1]))
    flat = (y.reshape(len(x), -1) for y in (x, history))
    z = jnp.concatenate([*flat, times.astype(x.dtype)], axis=1)
    for i in range(self.num_layers):
      z = nn.silu(nn.Dense(self.width, name=f"layer_{i}")(z))
    size = self.horizon * self.channels
    head = nn.Dense(size, kernel_init=nn.initializers.zeros, name="head")
    return head(z).reshape(x.shape).astype(x.dtype)


def normalize_windows(
  history: jax.Array, *, global_std: float | jax.Array = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
  r"""Each history less its last value, over its own standard deviation.

  Args:
    history: (B, L, C), floating.
    global_std: sigma of the whole series, () or (C,), positive; 1 if it was
      standardized. A history with less than 1e-3 of it is taken to have that.

  Returns:
    The normalized history (B, L, C), the last values (B, 1, C) and the scales
    (B, 1, C): a future y becomes (y - last) / scale.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``global_std`` is not
      positive.

  Cost:
    O(B L C).

  Source:
    this project; of the kind of arXiv 2205.13504's.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import normalize_windows
    >>> history = jnp.array([2.0, 6.0]).reshape(1, 2, 1)
    >>> scaled, last, scale = normalize_windows(history)
    >>> print(scaled.ravel(), last.ravel(), scale.ravel())
    [-2.  0.] [6.] [2.]
  """
  history, global_std = jnp.asarray(history), jnp.asarray(global_std)
  _checks.check_rank("history", history, 3)
  _checks.check_floating("history", history)
  if global_std.ndim:
    shape = history.shape[2:]
    _checks.check_shape("global_std", global_std, shape, "() or (C,)")
  _checks.check_positive("global_std", global_std)
  last = history[:, -1:]
  least = (_FLOOR * global_std).astype(history.dtype)
  least = jnp.broadcast_to(least, (1, 1, history.shape[2]))
  scale = jnp.maximum(history.std(1, keepdims=True), least)
  return (history - last) / scale, last, scale


def sample_forecast(
  rng: jax.Array,
  params: Any,
  history: jax.Array,
  *,
  model: nn.Module,
  num_samples: int = 100,
  method: str = "heun",
  num_steps: int | None = None,
  normalize: bool = True,
  global_std: float | jax.Array = 1.0,
) -> jax.Array:
  """Futures of histories, drawn from a trained flow.

  The history goes through a :class:`DiT` of mode "cross" once for all.

  Args:
    rng: PRNG key.
    params: of the model.
    history: (B, L, C), floating and finite.
    model: (x, t, history) -> (B, T, C), a flax module with a ``horizon``.
    num_samples: S, at least 1; scores as :func:`jaxattn.sampling.crps` need 2.
    method: of :func:`jaxattn.sampling.sample_flow`; "tsit5" is often quickest
      on a CPU, and needs diffrax.
    num_steps: None = 20; of "tsit5" None.
    normalize: as in training, see :func:`train_flow`.
    global_std: as in training.

  Returns:
    (S, B, T, C), in the default floating dtype.

  Raises:
    ValueError: if shapes or dtypes do not fit, a history is not finite, a
      number is out of range or a name unknown.
    ImportError: for "tsit5" if diffrax is missing, naming the extra.

  Cost:
    1, 2, 2 or 4 evaluations of the model on S B rows a step.

  Source:
    arXiv 2503.14076.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import FlowMLP, sample_forecast
    >>> model = FlowMLP(horizon=3, history=4)
    >>> x, history = jnp.ones((2, 3, 1)), jnp.ones((2, 4, 1))
    >>> params = model.init(jax.random.key(0), x, 0.5, history)
    >>> samples = sample_forecast(
    ...   jax.random.key(1), params, history, model=model, num_samples=5
    ... )
    >>> samples.shape, samples.mean((0, 1)).shape  # untrained: noise
    ((5, 2, 3, 1), (3, 1))
  """
  history = jnp.asarray(history)
  check_history(model, history, len(history))
  _check_finite("history", history)
  _checks.check_integer("num_samples", num_samples, 1, None)
  _checks.check_choice("normalize", normalize, (False, True))
  last = scale = None
  if normalize:
    history, last, scale = normalize_windows(history, global_std=global_std)
  cond = history
  if isinstance(model, DiT) and model.history_mode == "cross":
    cond = _encode(params, history, model=model)
  horizon, channels = model.horizon, model.channels  # pyright: ignore[reportAttributeAccessIssue]
  samples = sample_flow(
    rng,
    _velocity(model),
    (params, cond),
    (num_samples, len(history), horizon, channels),
    method=method,
    num_steps=num_steps,
  )
  if last is None or scale is None:
    return samples
  return last[None] + scale[None] * samples


def train_flow(
  rng: jax.Array,
  model: nn.Module,
  history: jax.Array,
  future: jax.Array,
  *,
  num_steps: int = 1500,
  batch_size: int = 256,
  learning_rate: float | jax.Array = 1e-3,
  reg_weight: float | jax.Array = 0.0,
  degree: int = 3,
  kind: str = "hard",
  normalize: bool = True,
  global_std: float | jax.Array = 1.0,
  val: tuple[jax.Array, jax.Array] | None = None,
  num_evals: int = 10,
) -> tuple[Any, FlowHistory]:
  r"""Trains a flow on windows by flow matching.

  AdamW with a cosine schedule and gradients of norm 1 at most; antithetic
  times; what is returned is an exponential mean of the parameters, of decay
  min(0.999, (1 + k) / (10 + k)) at step k. With validation windows, the best of
  ``num_evals`` such means: with few windows a flow memorizes them.

  Args:
    rng: PRNG key.
    model: (x, t, history) -> (B, T, C), a flax module.
    history: (n, L, C), floating and finite.
    future: (n, T, C).
    num_steps: steps; a multiple of ``num_evals`` with validation windows.
    batch_size: windows of a step, drawn with replacement.
    learning_rate: at first.
    reg_weight: lambda of :func:`jaxattn.sampling.flow_loss`, for few windows.
    degree: K of the same.
    kind: of the same.
    normalize: train on windows normalized by :func:`normalize_windows`.
    global_std: of the same.
    val: (history, future) of validation windows.
    num_evals: evaluations on them.

  Returns:
    The parameters, and a :class:`FlowHistory`.

  Raises:
    ValueError: if shapes or dtypes do not fit, windows are not finite
      somewhere, a number is out of range or a name unknown.

  Cost:
    ``num_steps`` gradients on ``batch_size`` rows.

  Source:
    arXiv 2210.02747, arXiv 2503.14076.

  Example:
    >>> import jax
    >>> from jaxattn.models import FlowMLP, train_flow
    >>> windows = jax.random.normal(jax.random.key(0), (64, 9, 1)).cumsum(1)
    >>> model = FlowMLP(horizon=5, history=4, width=16)
    >>> params, log = train_flow(
    ...   jax.random.key(1), model, windows[:, :4], windows[:, 4:], num_steps=50
    ... )
    >>> log.losses.shape, bool(log.losses[-10:].mean() < log.losses[:10].mean())
    ((50,), True)
  """
  history, future = jnp.asarray(history), jnp.asarray(future)
  _check_windows("", model, history, future)
  _checks.check_integer("num_steps", num_steps, 1, None)
  _checks.check_integer("batch_size", batch_size, 1, None)
  _checks.check_positive("learning_rate", learning_rate)
  _checks.check_scalar("reg_weight", reg_weight)
  _checks.check_nonnegative("reg_weight", reg_weight)
  _checks.check_choice("normalize", normalize, (False, True))
  if val is not None:
    val = jnp.asarray(val[0]), jnp.asarray(val[1])
    _check_windows("val ", model, *val)
    _checks.check_integer("num_evals", num_evals, 1, num_steps)
    if num_steps % num_evals:
      raise ValueError(
        f"num_evals must divide num_steps={num_steps}, got {num_evals}"
      )
  if normalize:
    history, future = _normalized(history, future, global_std)
    val = val and _normalized(*val, global_std)
  return _train(
    rng,
    history,
    future,
    val,
    learning_rate,
    reg_weight,
    model=model,
    num_steps=num_steps,
    batch_size=batch_size,
    degree=degree,
    kind=kind,
    num_evals=num_evals,
  )


# --- inside ---


def _time_features(t: jax.Array) -> jax.Array:
  """(B, 1 + 2 waves), in float32: t itself needs it."""
  t = t.astype(jnp.float32)[:, None]
  waves = jnp.arange(1, _TIME_WAVES + 1, dtype=jnp.float32)
  angle = jnp.pi * waves[None] * t
  return jnp.concatenate([t, jnp.sin(angle), jnp.cos(angle)], axis=1)


@functools.lru_cache(maxsize=64)
def _velocity(model: nn.Module) -> Callable[..., jax.Array]:
  """One function for one model: what is compiled for it is found again."""

  def velocity(x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
    params, history = cond
    # Whatever else a module may return.
    v: Any = model.apply(params, x, t, history)
    return v

  return velocity


@functools.partial(jax.jit, static_argnames="model")
def _encode(params: Any, history: jax.Array, *, model: Any) -> HistoryCache:
  return encode_history(params, history, model=model)


def _check_finite(name: str, x: jax.Array) -> None:
  if not _checks.is_concrete(x):
    return
  bad = int((~np.isfinite(np.asarray(x))).sum())
  if bad:
    raise ValueError(f"{name} must be finite, got {bad} entries that are not")


def _check_windows(
  which: str, model: Any, history: jax.Array, future: jax.Array
) -> None:
  check_history(model, history, len(history))
  _checks.check_floating(f"{which}future", future)
  shape = (len(history), model.horizon, model.channels)
  meaning = "(n, horizon, channels)"
  _checks.check_shape(f"{which}future", future, shape, meaning)
  if not len(history):
    raise ValueError(f"{which}history must hold a window, got none")
  _check_finite(f"{which}history", history)
  _check_finite(f"{which}future", future)


def _normalized(
  history: jax.Array, future: jax.Array, global_std: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
  history, last, scale = normalize_windows(history, global_std=global_std)
  return history, (future - last) / scale


class _State(NamedTuple):
  params: Any
  mean: Any
  opt_state: Any


@functools.partial(
  jax.jit,
  static_argnames=(
    "model",
    "num_steps",
    "batch_size",
    "degree",
    "kind",
    "num_evals",
  ),
)
def _train(
  rng: jax.Array,
  history: jax.Array,
  future: jax.Array,
  val: tuple[jax.Array, jax.Array] | None,
  learning_rate: float | jax.Array,
  reg_weight: float | jax.Array,
  *,
  model: nn.Module,
  num_steps: int,
  batch_size: int,
  degree: int,
  kind: str,
  num_evals: int,
) -> tuple[Any, FlowHistory]:
  rng_init, rng_val, rng = jax.random.split(rng, 3)
  params = model.init(rng_init, future[:1], jnp.zeros(()), history[:1])
  optimizer = optax.chain(
    optax.clip_by_global_norm(_MAX_GRADIENT),
    optax.adamw(
      optax.cosine_decay_schedule(learning_rate, num_steps),
      weight_decay=_WEIGHT_DECAY,
    ),
  )
  size = future[0].size
  # Whatever else a module may return.
  apply_fn: Any = model.apply

  def loss(params: Any, rng: jax.Array, batch: Any) -> jax.Array:
    total, _ = flow_loss(
      rng,
      params,
      batch,
      apply_fn=apply_fn,
      reg_weight=reg_weight,
      degree=degree,
      kind=kind,
      t_sampler="antithetic",
    )
    return total / size

  def step(state: _State, k: jax.Array) -> tuple[_State, jax.Array]:
    rng_i, rng_loss = jax.random.split(jax.random.fold_in(rng, k))
    i = jax.random.randint(rng_i, (batch_size,), 0, len(history))
    batch = history[i], future[i]
    value, grad = jax.value_and_grad(loss)(state.params, rng_loss, batch)
    updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(_EMA, (1 + k) / (_EMA_RAMP + k))
    mean = jax.tree.map(
      lambda a, b: (a + (1 - decay) * (b - a)).astype(a.dtype),
      state.mean,
      params,
    )
    return _State(params, mean, opt_state), value

  start = _State(params, params, optimizer.init(params))
  steps = jnp.arange(num_steps)
  if val is None:
    state, losses = lax.scan(step, start, steps)
    none = jnp.zeros(0, losses.dtype)
    return state.mean, FlowHistory(losses, none, jnp.array(-1))
  held_out = val

  def validate(params: Any) -> jax.Array:
    velocity = functools.partial(apply_fn, params)

    def one(rng: jax.Array) -> jax.Array:
      # The same times and noise for all that are compared.
      return cfm_loss(rng, velocity, held_out[1], held_out[0])[1].per_dim

    return lax.map(one, jax.random.split(rng_val, _VAL_DRAWS)).mean()

  def stage(
    carry: tuple[_State, Any, jax.Array], steps: jax.Array
  ) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    state, best, least = carry
    state, losses = lax.scan(step, state, steps)
    value = validate(state.mean)
    better = value < least
    best = jax.tree.map(lambda a, b: jnp.where(better, a, b), state.mean, best)
    return (state, best, jnp.minimum(value, least)), (losses, value)

  least = jnp.full((), jnp.inf, accumulator(future.dtype))
  (_, best, _), (losses, values) = lax.scan(
    stage, (start, params, least), steps.reshape(num_evals, -1)
  )
  return best, FlowHistory(losses.ravel(), values, jnp.argmin(values))
