"""The objective of reweighting, what it is made of, and what it refuses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxattn import _checks
from jaxattn.numerics.linalg import power_iteration

MODES = ("embedding", "logit", "value")


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
  return jnp.log(w) if mode == "logit" else w - 1


def to_w(z: jax.Array, mode: str) -> jax.Array:
  return jnp.exp(z) if mode == "logit" else 1 + z


class Objective(NamedTuple):
  """A model, its prompt, and what it should say: functions of z."""

  apply_fn: ApplyFn
  mode: str
  params: Any
  prompt: Prompt
  val: Prompt
  ridge: Any

  def residual(self, z: jax.Array) -> jax.Array:
    w = to_w(z, self.mode)
    val = self.val
    out = self.apply_fn(self.params, self.prompt, val.x, w, self.mode)
    return out - val.y

  def loss(self, z: jax.Array) -> jax.Array:
    r = self.residual(z)
    return (r @ r + jnp.asarray(self.ridge, z.dtype) * (z @ z)) / (2 * len(r))

  def smoothness(self, z: jax.Array) -> jax.Array:
    """Largest eigenvalue of (J^T J + ridge I) / V."""
    r, push = jax.linearize(self.residual, z)
    pull = jax.linear_transpose(push, z)
    start = jax.random.normal(jax.random.key(0), z.shape, z.dtype)
    largest, _ = power_iteration(lambda v: pull(push(v))[0], start)
    return (largest + jnp.asarray(self.ridge, z.dtype)) / len(r)


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
    if _checks.is_concrete(values) and not np.isfinite(values).all():
      raise ValueError(f"{label} must be finite, got NaN or infinity")
  return Prompt(x, y)


def check_prompts(
  prompt: Prompt, val: Prompt, mode: str
) -> tuple[Prompt, Prompt]:
  prompt = check_prompt("prompt", prompt, mode)
  val = check_prompt("val", val, mode)
  width = prompt.x.shape[1]
  _checks.check_shape("val.x", val.x, (None, width), "(V, d)")
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
