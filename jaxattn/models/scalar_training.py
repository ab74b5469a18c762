"""Training of attention to scalars, and what its theory wants to know of it."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxattn import _checks
from jaxattn.models import scalar_attention as model
from jaxattn.numerics import power_iteration

__all__ = ["ScalarAttentionHistory", "train_scalar_attention"]

Params = model.Params
Data = tuple[jax.Array, jax.Array]

# Those whose tangent kernel has a closed form.
_WITH_KERNEL = ("plain", "residual")
_RANK_TOL = 1e-6
# Samples at a time where there is no gradient: memory is that times heads.
_ROWS = 4096


class ScalarAttentionHistory(NamedTuple):
  """What happened in training, at the start and after each ``log_every`` steps.

  Attributes:
    step: (num_logs,), steps taken.
    risk: (num_logs,), mean squared error on all training data.
    eval_risk: name of an evaluation set -> (num_logs,), the same on it.
    alignment: (num_logs,), share of heads with a_r w_r > 0.
    drift: (num_logs,), mean of a_r (w_r - w_r(0)).
    max_shift: (num_logs,), the largest absolute value of w_r - w_r(0).
    kernel_max: (num_logs,), the largest eigenvalue of the tangent kernel of w
      on the training data. None unless ``log_kernel``.
    kernel_rank: (num_logs,), eigenvalues above 1e-6 of the largest; take
      float64 to tell that from rounding. None where ``kernel_max`` is.
  """

  step: jax.Array
  risk: jax.Array
  eval_risk: dict[str, jax.Array]
  alignment: jax.Array
  drift: jax.Array
  max_shift: jax.Array
  kernel_max: jax.Array | None
  kernel_rank: jax.Array | None


def train_scalar_attention(
  params: Params,
  data: Data,
  *,
  kind: str = "plain",
  learning_rate: float | jax.Array | None = None,
  num_steps: int,
  log_every: int = 1,
  eval_sets: Mapping[str, Data] | None = None,
  optimizer: optax.GradientTransformation | None = None,
  batch_size: int | None = None,
  rng: jax.Array | None = None,
  train_output: bool = False,
  log_kernel: bool = False,
) -> tuple[Params, ScalarAttentionHistory]:
  r"""Trains all parameters but the output weights a.

  Steps are of gradient descent on the sum :math:`\frac12 \sum_i (f(x_i) -
  y_i)^2`, over all data or a batch, or of ``optimizer`` with its gradient.

  Args:
    params: from :func:`scalar_attention_init`.
    data: x (n, d) and y (n,).
    kind: as above.
    learning_rate: of gradient descent, on a sum: of the order of one over the
      largest eigenvalue of the kernel. None = exactly that, for ``"plain"`` and
      ``"residual"``.
    num_steps: steps, a multiple of ``log_every``.
    log_every: steps from one entry of the history to the next.
    eval_sets: name -> (x, y), further data to measure the risk on.
    optimizer: in place of gradient descent; keep it, as another one compiles
      anew. With weight decay, for instance ``optax.adamw(1e-2)``.
    batch_size: samples of a step, drawn with replacement; None = all data.
    rng: PRNG key, for batches only.
    train_output: train a, too.
    log_kernel: have the kernel's spectrum in the history; of ``"plain"`` and
      ``"residual"`` only.

  Returns:
    The parameters, and a :class:`ScalarAttentionHistory`.

  Raises:
    ValueError: if shapes or numbers do not fit, or ``learning_rate`` is missing
      where it has no default or comes beside an ``optimizer``, or of
      ``batch_size`` and ``rng`` one is given alone, or ``log_kernel`` is asked
      of a kind without.

  Cost:
    O(n m d) a step, n the batch's, and O(n m) memory; each entry of the history
    O(n m d), n that of all data, in O(m) memory, and with ``log_kernel`` the
    eigenvalues of a matrix of size min(n, m) in O(n m).

  Source:
    arXiv 2412.06061, section 5, for the quantities of the history.

  Example:
    >>> import jax
    >>> from jaxattn.models import scalar_attention_init, train_scalar_attention
    >>> params = scalar_attention_init(jax.random.key(0), 16, 4)
    >>> x = jax.random.normal(jax.random.key(1), (200, 4))
    >>> data = x, x[:, -1]
    >>> _, history = train_scalar_attention(
    ...   params, data, num_steps=20, log_every=10
    ... )
    >>> print(history.step, bool(history.risk[-1] < history.risk[0]))
    [ 0 10 20] True
  """
  data = _check_data("data", params, data, kind)
  sets = {
    name: _check_data(f"eval_sets[{name!r}]", params, value, kind)
    for name, value in (eval_sets or {}).items()
  }
  _checks.check_integer("log_every", log_every, 1, None)
  _checks.check_integer("num_steps", num_steps, 0, None)
  if num_steps % log_every:
    raise ValueError(
      f"num_steps must be a multiple of log_every={log_every}, got {num_steps}"
    )
  _checks.check_choice("train_output", train_output, (False, True))
  _checks.check_choice("log_kernel", log_kernel, (False, True))
  if log_kernel and kind not in _WITH_KERNEL:
    raise ValueError(
      f"log_kernel needs a kind of {', '.join(_WITH_KERNEL)}, got {kind!r}"
    )
  _check_batches(batch_size, rng)
  _check_rate(learning_rate, optimizer, kind, train_output)
  if learning_rate is None and optimizer is None:
    learning_rate = _default_rate(params, data[0])
  return _train(
    params,
    data,
    sets,
    learning_rate,
    rng,
    kind=kind,
    num_steps=num_steps,
    log_every=log_every,
    optimizer=optimizer,
    batch_size=batch_size,
    train_output=train_output,
    log_kernel=log_kernel,
  )


# --- checks ---


def _check_data(name: str, params: Params, data: Data, kind: str) -> Data:
  x, y = data
  x = model.check_call(params, x, kind, f"x of {name}")
  return x, model.check_targets(f"y of {name}", y, x)


def _check_batches(batch_size: int | None, rng: jax.Array | None) -> None:
  if batch_size is not None:
    _checks.check_integer("batch_size", batch_size, 1, None)
    if rng is None:
      raise ValueError("rng is required when batch_size is given")
  elif rng is not None:
    raise ValueError("rng must be None without a batch_size: nothing is drawn")


def _check_rate(
  learning_rate: float | jax.Array | None,
  optimizer: optax.GradientTransformation | None,
  kind: str,
  train_output: bool,
) -> None:
  if learning_rate is not None:
    _checks.check_scalar("learning_rate", learning_rate)
    _checks.check_positive("learning_rate", learning_rate)
    if optimizer is not None:
      raise ValueError(
        f"learning_rate must be None beside an optimizer, got {learning_rate}"
      )
  elif optimizer is None and (train_output or kind not in _WITH_KERNEL):
    raise ValueError(
      "learning_rate is required for kind="
      f"{kind!r} and train_output={train_output}: its kernel is not that of w"
    )


# --- the kernel ---


@jax.jit
def _default_rate(params: Params, x: jax.Array) -> jax.Array:
  _, params, (x,) = model.widened(params, x)
  slopes = model.slopes(params, x)

  def matvec(v: jax.Array) -> jax.Array:
    return model.product_of(slopes.T, model.product_of(slopes, v))

  # But for signs of rows and columns slopes are not negative, and so is this
  # start, as it must be in order not to be orthogonal to the eigenvector.
  start = model.product_of(slopes.T, jnp.sign(x[:, -1]))
  top, _ = power_iteration(matvec, start)
  # Where nothing has a slope any rate does.
  return jnp.where(top > 0, 1 / jnp.where(top > 0, top, 1), 1)


# --- training ---


@functools.partial(
  jax.jit,
  static_argnames=(
    "kind",
    "num_steps",
    "log_every",
    "optimizer",
    "batch_size",
    "train_output",
    "log_kernel",
  ),
)
def _train(
  params: Params,
  data: Data,
  eval_sets: dict[str, Data],
  learning_rate: jax.Array | None,
  rng: jax.Array | None,
  *,
  kind: str,
  num_steps: int,
  log_every: int,
  optimizer: optax.GradientTransformation | None,
  batch_size: int | None,
  train_output: bool,
  log_kernel: bool,
) -> tuple[Params, ScalarAttentionHistory]:
  if optimizer is None:
    assert learning_rate is not None
    optimizer = optax.sgd(jnp.asarray(learning_rate, params["w"].dtype))
  start = params
  fixed = {} if train_output else {"a": params["a"]}
  free = {k: v for k, v in params.items() if k not in fixed}

  def loss(free: Params, batch: Data) -> jax.Array:
    x, y = batch
    f = model.scalar_attention_apply({**free, **fixed}, x, kind=kind)
    return jnp.square(f - y).sum() / 2

  def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
    free, state = carry
    grads = jax.grad(loss)(free, _batch(data, rng, i, batch_size))
    updates, state = optimizer.update(grads, state, free)
    return (optax.apply_updates(free, updates), state), None

  def entry(free: Params, step: jax.Array) -> ScalarAttentionHistory:
    params = {**free, **fixed}
    top, rank = _kernel_spectrum(params, data[0]) if log_kernel else (None,) * 2
    shift = params["w"] - start["w"]
    return ScalarAttentionHistory(
      step=step,
      risk=_risk(params, data, kind),
      eval_risk={k: _risk(params, v, kind) for k, v in eval_sets.items()},
      alignment=(params["a"] * params["w"] > 0).mean(),
      drift=(params["a"] * shift).mean(),
      max_shift=jnp.abs(shift).max(),
      kernel_max=top,
      kernel_rank=rank,
    )

  def chunk(carry: Any, first: jax.Array) -> tuple[Any, Any]:
    carry, _ = lax.scan(step, carry, first + jnp.arange(log_every))
    return carry, entry(carry[0], first + log_every)

  carry = free, optimizer.init(free)
  first = entry(free, jnp.asarray(0))
  starts = jnp.arange(0, num_steps, log_every)
  (free, _), rest = lax.scan(chunk, carry, starts)
  history = jax.tree.map(
    lambda a, b: jnp.concatenate([a[None], b]), first, rest
  )
  return {**free, **fixed}, history


def _batch(
  data: Data, rng: jax.Array | None, i: jax.Array, batch_size: int | None
) -> Data:
  if batch_size is None:
    return data
  assert rng is not None
  x, y = data
  rows = jax.random.randint(
    jax.random.fold_in(rng, i), (batch_size,), 0, len(y)
  )
  return x[rows], y[rows]


def _risk(params: Params, data: Data, kind: str) -> jax.Array:
  def squared(sample: Data) -> jax.Array:
    x, y = sample
    f = model.scalar_attention_apply(params, x[None], kind=kind)[0]
    return jnp.square(f - y)

  return lax.map(squared, data, batch_size=_ROWS).mean()


def _kernel_spectrum(
  params: Params, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  _, params, (x,) = model.widened(params, x)
  slopes = model.slopes(params, x)
  if slopes.shape[0] > slopes.shape[1]:
    slopes = slopes.T
  # Either product has the eigenvalues of the kernel that are not 0.
  sizes = jnp.linalg.eigvalsh(model.product_of(slopes, slopes.T))
  return sizes[-1], (sizes > _RANK_TOL * sizes[-1]).sum()
