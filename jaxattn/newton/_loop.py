"""The loop around steps of Newton's method, and why it ends."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Reasons of a state; of a result also that its steps were over.
RUNNING = -1
MAX_STEPS, GRADIENT, FLAT, STUCK, BAD_START = range(5)


def iterate(
  one: Callable[..., tuple[Any, Any]], start: tuple[Any, ...], max_steps: int
) -> tuple[Any, Any]:
  """The state after the last step, and a log with a row for each step.

  ``one`` takes what it returned first, a tuple whose first entry is the state
  with its ``reason`` and ``num_steps``. Unused rows of the log are NaN or -1.
  """

  def running(carry: Any) -> jax.Array:
    (state, *_), _ = carry
    return (state.reason == RUNNING) & (state.num_steps < max_steps)

  def body(carry: Any) -> Any:
    now, log = carry
    new, info = one(*now)
    at = now[0].num_steps
    return new, jax.tree.map(lambda y, z: y.at[at].set(z), log, info)

  def unused(s: jax.ShapeDtypeStruct) -> jax.Array:
    is_float = jnp.issubdtype(s.dtype, jnp.floating)
    return jnp.full((max_steps,), jnp.nan if is_float else -1, s.dtype)

  log = jax.tree.map(unused, jax.eval_shape(one, *start)[1])
  (state, *_), log = lax.while_loop(running, body, (start, log))
  reason = jnp.where(state.reason == RUNNING, MAX_STEPS, state.reason)
  return state._replace(reason=reason), log
