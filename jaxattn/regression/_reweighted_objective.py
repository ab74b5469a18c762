"""The objective of reweighting, what it is made of, and what it refuses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxattn import _checks
from jaxattn.numerics import _dtypes
from jaxattn.numerics.linalg import power_iteration

MODES = ("embedding", "logit", "value")
# Shares of a step of LARICL, of which the best is taken.
STEP_SIZES = (1.0, 0.5, 0.25, 0.125, 0.0)
# What the ridge counts on z = log w, beside z = w - 1.
_LOGIT_RIDGE = 0.1


class Prompt(NamedTuple):
  """Labelled examples.

  Attributes:
    x: (m, d), inputs.
    y: (m,), labels.
  """

  x: jax.Array
  y: jax.Array


# (params, prompt, query (Q, d), w (m,), mode) -> (Q,)
ApplyFn = Callable[..., Any]


def to_z(w: jax.Array, mode: str) -> jax.Array:
  # In 16 bits neither a step of Adam nor a sum over examples would do.
  w = w.astype(_dtypes.accumulator(w.dtype))
  return jnp.log(w) if mode == "logit" else w - 1


def to_w(z: jax.Array, mode: str, dtype: Any) -> jax.Array:
  return (jnp.exp(z) if mode == "logit" else 1 + z).astype(dtype)


def predict(
  apply_fn: ApplyFn,
  params: Any,
  prompt: Prompt,
  query: jax.Array,
  w: jax.Array,
  mode: str,
) -> jax.Array:
  out = apply_fn(params, prompt, query, w, mode)
  # (Q, 1) less (Q,) would be (Q, Q), without a word.
  _checks.check_shape("what apply_fn returns", out, (len(query),), "(Q,)")
  return out


def best_step(values: jax.Array) -> jax.Array:
  """Which of the trials has the smallest value; NaN is none."""
  return jnp.where(jnp.isfinite(values), values, jnp.inf).argmin()


class Objective(NamedTuple):
  """A model, its prompt, and what it should say: functions of z."""

  apply_fn: ApplyFn
  mode: str
  params: Any
  prompt: Prompt
  val: Prompt
  ridge: Any

  def start(self) -> jax.Array:
    """Where weights are 1."""
    return to_z(jnp.ones_like(self.prompt.y), self.mode)

  def weights(self, z: jax.Array) -> jax.Array:
    return to_w(z, self.mode, self.prompt.y.dtype)

  def z_ridge(self, dtype: Any) -> jax.Array:
    """What |z|^2 is multiplied by."""
    share = _LOGIT_RIDGE if self.mode == "logit" else 1.0
    return share * jnp.asarray(self.ridge, dtype)

  def residual(self, z: jax.Array) -> jax.Array:
    prompt, query, w = self.prompt, self.val.x, self.weights(z)
    out = predict(self.apply_fn, self.params, prompt, query, w, self.mode)
    return out.astype(z.dtype) - self.val.y.astype(z.dtype)

  def loss(self, z: jax.Array) -> jax.Array:
    r = self.residual(z)
    return (r @ r + self.z_ridge(z.dtype) * (z @ z)) / (2 * len(r))

  def smoothness(self, z: jax.Array) -> jax.Array:
    """Largest eigenvalue of (J^T J + ridge I) / V, the ridge that of z."""
    r, push = jax.linearize(self.residual, z)
    pull = jax.linear_transpose(push, z)
    start = jax.random.normal(jax.random.key(0), z.shape, z.dtype)
    largest, _ = power_iteration(lambda v: pull(push(v))[0], start)
    return (largest + self.z_ridge(z.dtype)) / len(r)


def descend(
  loss: Callable[[Any], jax.Array],
  x: Any,
  optimizer: optax.GradientTransformation,
  num_steps: int,
) -> tuple[Any, jax.Array]:
  """Where the optimizer gets to, and the losses on the way and there."""

  def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
    x, state = carry
    value, grad = jax.value_and_grad(loss)(x)
    updates, state = optimizer.update(grad, state, x)
    return (optax.apply_updates(x, updates), state), value

  (x, _), losses = lax.scan(step, (x, optimizer.init(x)), length=num_steps)
  return x, jnp.append(losses, loss(x))


# --- checks ---


def check_prompt(name: str, prompt: Prompt, mode: str) -> Prompt:
  _checks.check_choice("mode", mode, MODES)
  x, y = jnp.asarray(prompt.x), jnp.asarray(prompt.y)
  _checks.check_rank(f"{name}.x", x, 2)
  if not len(x):
    raise ValueError(f"{name} needs at least one example")
  _checks.check_shape(f"{name}.y", y, (len(x),), "(m,)")
  for label, values in ((f"{name}.x", x), (f"{name}.y", y)):
    _checks.check_floating(label, values)
    check_finite(label, values)
  return Prompt(x, y)


def check_finite(name: str, x: jax.Array) -> None:
  if _checks.is_concrete(x) and not np.isfinite(x).all():
    raise ValueError(f"{name} must be finite, got NaN or infinity")


def check_prompts(
  prompt: Prompt, val: Prompt, mode: str
) -> tuple[Prompt, Prompt]:
  prompt = check_prompt("prompt", prompt, mode)
  val = check_prompt("val", val, mode)
  width = prompt.x.shape[1]
  _checks.check_shape("val.x", val.x, (None, width), "(V, d)")
  (x, y), (x_val, y_val) = prompt, val
  _checks.check_one_dtype(
    **{"prompt.x": x, "prompt.y": y, "val.x": x_val, "val.y": y_val}
  )
  return prompt, val


def check_weights(w: jax.Array, prompt: Prompt, mode: str) -> jax.Array:
  w = jnp.asarray(w)
  _checks.check_shape("w", w, (len(prompt.y),), "(m,)")
  _checks.check_floating("w", w)
  if mode == "logit" and _checks.is_concrete(w) and not (w > 0).all():
    raise ValueError(f"mode='logit' needs w > 0, got {w}")
  return w


def check_ridge(ridge: float | jax.Array, prompt: Prompt, val: Prompt) -> None:
  _checks.check_nonnegative("ridge", ridge)
  few = len(val.y) < len(prompt.y)
  if few and _checks.is_concrete(ridge) and not np.all(np.asarray(ridge) > 0):
    raise ValueError(
      f"ridge must be > 0 when V < m, got {ridge} with V = {len(val.y)}, "
      f"m = {len(prompt.y)}"
    )
