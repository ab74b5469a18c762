"""The one trainer: jitted steps, metrics, checkpoints and exact resume."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from experiments.harness import checkpoint
from experiments.harness import workdir as workdir_lib
from experiments.harness.progress import progress

_LOG = logging.getLogger(__name__)

Params = TypeVar("Params")
LossFn = Callable[..., tuple[jax.Array, Mapping[str, jax.Array]]]


class TrainState(NamedTuple):
  """All that the next step depends on; what a checkpoint holds.

  Attributes:
    step: () int32 steps done; also the cursor into the data.
    params: the parameters.
    opt_state: the optimizer's state.
    rng: key of the run; step ``i`` uses ``fold_in(rng, i)``.
    bad_step: () int32 the first step whose loss was not finite, or -1.
  """

  step: jax.Array
  params: Any
  opt_state: optax.OptState
  rng: jax.Array
  bad_step: jax.Array


def train_loop(
  rng: jax.Array,
  loss_fn: LossFn,
  params: Params,
  batches: Callable[[int], Any],
  *,
  optimizer: optax.GradientTransformation,
  num_steps: int,
  workdir: workdir_lib.Workdir,
  name: str = "train",
  log_every: int = 100,
  checkpoint_every: int = 1000,
  nan_stop: bool = True,
  transfer_guard: str = "allow",
) -> Params:
  """Minimizes a loss; broken off and called again, it goes on exactly.

  Args:
    rng: key for what is random in the loss.
    loss_fn: ``(params, batch, rng) -> (loss, metrics)``, where ``metrics``
      maps names to scalars.
    params: initial parameters; left intact.
    batches: ``step -> batch``. Because the batch is a function of the step,
      the step is the whole cursor and nothing is read twice or skipped.
    optimizer: an optax optimizer; its ``update`` also gets ``value=loss``.
    num_steps: steps to train in all, those before a kill included.
    workdir: the run's folder.
    name: of this training, if a run has several: its series in
      ``metrics.jsonl`` and its folder under ``checkpoints/``.
    log_every: steps between lines of metrics.
    checkpoint_every: steps between checkpoints; the last is always saved.
    nan_stop: stop at a loss that is not finite, instead of going on.
    transfer_guard: ``"allow"``, ``"log"`` or ``"disallow"``: what JAX does
      about implicit transfers while a batch is made and a step is taken.

  Returns:
    The parameters after ``num_steps`` steps.

  Raises:
    FloatingPointError: under ``nan_stop``, naming the first bad step; no
      checkpoint is written after it.
  """
  saver = checkpoint.Checkpointer(workdir.path / "checkpoints" / name)
  writer = workdir.metrics.series(name)
  state = _init(rng, params, optimizer)
  restored = saver.restore(state)
  first, state = restored if restored else (0, state)
  if first:
    _LOG.info("%s: going on after step %d", name, first)
  step_fn = _jitted_step(loss_fn, optimizer)

  for step in progress(range(first, num_steps), name):
    with jax.transfer_guard(transfer_guard):
      batch = jax.tree.map(_put, batches(step))
      state, metrics = step_fn(state, batch)
    done = step + 1
    logs = done % log_every == 0 or done == num_steps
    saves = done % checkpoint_every == 0 or done == num_steps
    if nan_stop and (logs or saves):
      _check_finite(name, state)
    if logs:
      writer.write(done, **jax.device_get(metrics))
    if saves:
      saver.save(done, state)
      workdir.save_seconds()
  return state.params


def _init(
  rng: jax.Array, params: Any, optimizer: optax.GradientTransformation
) -> TrainState:
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    # Steps donate their state; the caller keeps what it passed.
    params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    rng=jnp.copy(rng),
    bad_step=jnp.full((), -1, jnp.int32),
  )
  return _on_mesh_of(jax.tree.leaves(state.params)[0], state)


def _on_mesh_of(param: jax.Array, state: TrainState) -> TrainState:
  """Replicates counters and keys over the mesh that the parameters are on."""
  if not isinstance(param.sharding, jax.NamedSharding):
    return state
  # Not device_put, which refuses devices of other processes.
  replicate = jax.jit(
    jnp.copy, out_shardings=jax.NamedSharding(param.sharding.mesh, jax.P())
  )
  devices = param.sharding.device_set
  return jax.tree.map(
    lambda x: x if x.sharding.device_set == devices else replicate(x), state
  )


def _put(x: Any) -> jax.Array:
  return x if isinstance(x, jax.Array) else jax.device_put(x)


def _jitted_step(
  loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
  update = optax.with_extra_args_support(optimizer).update

  def step_fn(
    state: TrainState, batch: Any
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    rng = jax.random.fold_in(state.rng, state.step)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, metrics), grads = grad_fn(state.params, batch, rng)
    updates, opt_state = update(
      grads, state.opt_state, state.params, value=loss
    )
    is_first = (state.bad_step < 0) & ~jnp.isfinite(loss)
    next_state = TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      rng=state.rng,
      bad_step=jnp.where(is_first, state.step, state.bad_step),
    )
    return next_state, {"loss": loss, **metrics}

  return jax.jit(step_fn, donate_argnums=0)


def _check_finite(name: str, state: TrainState) -> None:
  bad_step = int(state.bad_step)
  if bad_step >= 0:
    raise FloatingPointError(
      f"{name}: the loss of step {bad_step} is not finite; the checkpoints "
      "before it are kept"
    )
