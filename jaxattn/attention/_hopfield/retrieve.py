"""Updates until each query stands still, and the gradient of that."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import checkify

from jaxattn import _checks
from jaxattn.attention._hopfield import dense, inputs, rows
from jaxattn.attention._hopfield import state as stored
from jaxattn.attention.radius import logit_radius
from jaxattn.features import taylor_error_bound
from jaxattn.numerics import fixed_point
from jaxattn.numerics._dtypes import accumulator

_METHODS = ("dense", "lowrank")
_BACKWARDS = ("unrolled", "implicit")


class HopfieldInfo(NamedTuple):
  """How retrieval ended, for each query.

  Attributes:
    num_steps: (...,) int32, updates until the query stood still.
    energy: (...,) of what was retrieved; low-rank where the updates were.
    residual: (...,) largest change of an entry in the last update.
  """

  num_steps: jax.Array
  energy: jax.Array
  residual: jax.Array


@overload
def hopfield_retrieve(
  x: jax.Array,
  patterns: jax.Array | None,
  beta: float | jax.Array,
  *,
  max_steps: int = ...,
  tol: float | jax.Array = ...,
  method: str = ...,
  state: stored.HopfieldState | None = ...,
  backward: str = ...,
  return_info: Literal[False] = ...,
) -> jax.Array: ...


@overload
def hopfield_retrieve(
  x: jax.Array,
  patterns: jax.Array | None,
  beta: float | jax.Array,
  *,
  max_steps: int = ...,
  tol: float | jax.Array = ...,
  method: str = ...,
  state: stored.HopfieldState | None = ...,
  backward: str = ...,
  return_info: Literal[True],
) -> tuple[jax.Array, HopfieldInfo]: ...


def hopfield_retrieve(
  x: jax.Array,
  patterns: jax.Array | None,
  beta: float | jax.Array,
  *,
  max_steps: int = 32,
  tol: float | jax.Array = 1e-5,
  method: str = "dense",
  state: stored.HopfieldState | None = None,
  backward: str = "unrolled",
  return_info: bool = False,
) -> jax.Array | tuple[jax.Array, HopfieldInfo]:
  r"""Iterates the update until each query stands still.

  A query whose entries change by no more than ``tol`` is done, whatever the
  others do, and once all are no more updates are computed.

  Args:
    x: (..., d) noisy or partial patterns, floating.
    patterns: (M, d), of the same dtype. With a state they may be None, unless
      the energy is asked for, which holds their largest norm.
    beta: inverse temperature, > 0; may be traced.
    max_steps: at most so many updates, at least 1.
    tol: >= 0; may be traced.
    method: ``"dense"``, or ``"lowrank"``, updates by ``state``.
    state: of :func:`hopfield_store`, with the same ``beta``; the gradient in
      beta flows through the state. If it was stored with values, ask for one
      step: the next would start from a value.
    backward: ``"unrolled"`` differentiates the updates as they were taken, in
      reverse mode; ``"implicit"`` the fixed point by the implicit function
      theorem, which keeps nothing of the way and has no gradient in ``x``; it
      is right where the iteration has converged.
    return_info: also return a :class:`HopfieldInfo`.

  Returns:
    (..., d) of the dtype of ``x``, with the info if asked for. NaN where only
    tracing hides that ``beta`` is not that of the state, or that a second
    update would start from a value.

  Raises:
    ValueError: if shapes, dtypes or options do not fit; outside of ``jit`` also
      if the features cannot promise any accuracy for these logits, as "low-rank
      retrieval invalid: kernel error bound 3.1 >= 1; reduce beta or use
      method='dense'". By norms, or by the logits with ``patterns`` if these
      are all that the state holds.
    checkify.JaxRuntimeError: the same from ``err.throw()`` of a checkified
      caller, by norms alone.

  Cost:
    4 M d flops a query and update, or 2 r (d + 2) low-rank. The unrolled
    gradient keeps each step, and its updates go on under ``vmap`` until
    ``max_steps``, whatever has converged; the implicit one takes one update
    more and solves a system of size d for each query.

  Source:
    arXiv 2008.02217, theorem 1, for convergence; arXiv 2402.04520 for the
    low-rank path.

  Example:
    >>> import jax
    >>> patterns = jax.random.normal(jax.random.key(0), (50, 64))
    >>> noise = 0.5 * jax.random.normal(jax.random.key(1), (50, 64))
    >>> got, info = hopfield_retrieve(
    ...   patterns + noise, patterns, 1.0, return_info=True
    ... )
    >>> bool(abs(got - patterns).max() < 1e-3), int(info.num_steps.max())
    (True, 2)
  """
  x = jnp.asarray(x)
  patterns = None if patterns is None else jnp.asarray(patterns)
  _checks.check_choice("method", method, _METHODS)
  _checks.check_choice("backward", backward, _BACKWARDS)
  _checks.check_choice("return_info", return_info, (False, True))
  _checks.check_integer("max_steps", max_steps, 1, None)
  _checks.check_scalar("tol", tol)
  _checks.check_nonnegative("tol", tol)
  if method == "dense":
    if state is not None:
      raise ValueError("state must be None with method='dense'")
    if patterns is None:
      raise ValueError("patterns must be (M, d) with method='dense', got None")
    x, patterns = inputs.check_query(x, patterns, beta)
  else:
    one_update = max_steps == 1 and backward == "unrolled" and not return_info
    state = _check_lowrank(x, patterns, beta, state, one_update)
    if patterns is None and return_info:
      raise ValueError(
        "patterns are required with return_info=True, got None: the energy "
        "holds their largest norm"
      )
    _check_promise(x, patterns, beta, state, max_steps)
  out, info = _retrieve(
    x,
    patterns,
    beta,
    tol,
    state,
    max_steps=max_steps,
    implicit=backward == "implicit",
    return_info=return_info,
  )
  return (out, info) if return_info else out


def iterate_queries(
  step: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  *,
  tol: float | jax.Array,
  max_steps: int,
  unrolled: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Updates queries, the last axis of ``x``, until each stands still.

  Args:
    step: from (..., d) to the same, query by query.
    x: (..., d), floating.
    tol: a query of which no entry changes by more is done.
    max_steps: at most so many steps.
    unrolled: keep what reverse mode needs, at the price that under ``vmap`` no
      step is saved.

  Returns:
    The queries, with number of steps (...,) int32 and last residual (...,).
  """

  def move(carry: Any) -> Any:
    x, residual, num_steps = carry
    going = ~(residual <= tol)
    new = step(x)
    change = jnp.abs(new - x).max(-1)
    return (
      jnp.where(going[..., None], new, x),
      jnp.where(going, lax.stop_gradient(change), residual),
      num_steps + going.astype(jnp.int32),
    )

  def one(carry: Any, _: None) -> tuple[Any, None]:
    # Steps that nobody needs are skipped; a loop of unknown length would have
    # no gradient.
    all_done = (carry[1] <= tol).all()
    return lax.cond(all_done, lambda c: c, move, carry), None

  residual = jnp.full_like(lax.stop_gradient(x[..., 0]), jnp.inf)
  start = x, residual, jnp.zeros_like(residual, jnp.int32)
  if unrolled:
    (x, residual, num_steps), _ = lax.scan(one, start, length=max_steps)
  else:
    # A query that still moves has taken every step.
    going = lambda c: (~(c[1] <= tol) & (c[2] < max_steps)).any()  # noqa: E731
    x, residual, num_steps = lax.while_loop(going, move, start)
  return x, num_steps, residual


def _check_lowrank(
  x: jax.Array,
  patterns: jax.Array | None,
  beta: Any,
  state: Any,
  one_update: bool,
) -> stored.HopfieldState:
  if state is None:
    raise ValueError(
      "state is required with method='lowrank': hopfield_store makes one"
    )
  state = stored.check_state(state)
  inputs.check_dtype("x", x, state.z.dtype)
  inputs.check_dim(x, len(state.mean))
  inputs.check_beta(beta)
  if patterns is not None:
    inputs.check_patterns(patterns)
    _checks.check_one_dtype(x=x, patterns=patterns)
    _checks.check_shape("patterns", patterns, (None, x.shape[-1]), "(M, d)")
  if state.z.shape[1] != x.shape[-1] and not one_update:
    raise ValueError(
      "max_steps must be 1, unrolled and without info, for a state whose "
      f"values have size {state.z.shape[1]} and its patterns {x.shape[-1]}"
    )
  if (
    _checks.is_concrete(state.has_values)
    and state.has_values
    and not one_update
  ):
    raise ValueError(
      "max_steps must be 1, unrolled and without info, for a state that was "
      "stored with values: the next update would start from one"
    )
  return state


def _check_promise(
  x: jax.Array,
  patterns: jax.Array | None,
  beta: Any,
  state: stored.HopfieldState,
  max_steps: int,
) -> None:
  """Raises if values are known and no accuracy can be promised for them."""
  if not all(map(_checks.is_concrete, (x, beta, *state))):
    return
  held, beta = float(state.beta), float(beta)
  if abs(held - beta) > 1e-6 * held:
    raise ValueError(f"beta must be that of the state, {held:g}, got {beta}")
  wide = x.astype(state.mean.dtype)
  longest = float(jnp.linalg.norm(wide, axis=-1).max())
  if max_steps > 1:
    # Later queries lie between the patterns.
    between = float(jnp.linalg.norm(state.mean) + state.radius)
    longest = max(longest, between)
  largest = beta * longest * float(state.radius)
  degree = stored.degree_of(state)
  bound = _kernel_error(largest, degree)
  if bound >= 1 and patterns is not None and _are_stored(patterns, state):
    # That was by norms. Measured logits may be much smaller.
    key = patterns.astype(wide.dtype) - state.mean[None]
    queries = [wide.reshape(-1, 1, len(state.mean))]
    if max_steps > 1:
      queries.append(patterns.astype(wide.dtype)[:, None])
    largest = max(
      float(logit_radius(q, key[:, None], scale=beta)) for q in queries
    )
    bound = _kernel_error(largest, degree)
  if bound >= 1:
    raise ValueError(
      f"low-rank retrieval invalid: kernel error bound {bound:.2g} >= 1; "
      "reduce beta or use method='dense'"
    )


def _are_stored(patterns: jax.Array, state: stored.HopfieldState) -> bool:
  """Whether these are as many as those of the state, and as long."""
  if not _checks.is_concrete(patterns):
    return False
  key = patterns.astype(state.mean.dtype) - state.mean[None]
  longest = float(jnp.linalg.norm(key, axis=1).max())
  many = len(patterns) == round(float(state.k[0]))
  return many and longest >= (1 - 1e-5) * float(state.radius)


def _kernel_error(largest: float, degree: int) -> float:
  return taylor_error_bound(largest, degree) if largest > 0 else 0.0


def _debug_promise(
  x: jax.Array, state: stored.HopfieldState, max_steps: int
) -> None:
  """As :func:`_check_promise`, under checkify, by norms."""
  longest = jnp.linalg.norm(x, axis=-1).max()
  if max_steps > 1:
    between = jnp.linalg.norm(state.mean) + state.radius
    longest = jnp.maximum(longest, between)
  order = stored.degree_of(state) + 1
  largest = state.beta * longest * state.radius
  log = 2 * largest + order * jnp.log(largest) - math.lgamma(order + 1)
  checkify.debug_check(
    log < 0,
    "low-rank retrieval invalid: kernel error bound {bound} >= 1; reduce beta "
    "or use method='dense'",
    bound=jnp.exp(log),
  )


@functools.partial(
  jax.jit, static_argnames=("max_steps", "implicit", "return_info")
)
def _retrieve(
  x: jax.Array,
  patterns: jax.Array | None,
  beta: Any,
  tol: Any,
  state: stored.HopfieldState | None,
  *,
  max_steps: int,
  implicit: bool,
  return_info: bool,
) -> tuple[jax.Array, HopfieldInfo | None]:
  dtype = accumulator(x.dtype) if state is None else state.z.dtype
  wide, tol = rows.flat(x).astype(dtype), jnp.asarray(tol, dtype)
  keys = None if patterns is None else patterns.astype(dtype)
  params: Any = (keys, jnp.asarray(beta, dtype)) if state is None else state
  step = _dense_step if state is None else stored.lowrank_step
  one_update = max_steps == 1 and not return_info and not implicit
  if state is not None:
    _debug_promise(wide, state, max_steps)
    # What could not be checked while tracing.
    is_same = jnp.abs(beta - state.beta) <= 1e-6 * state.beta
    is_sound = is_same if one_update else is_same & ~state.has_values
    wide = jnp.where(is_sound, wide, jnp.nan)
  if one_update:
    # The one case in which values need not be patterns.
    out = step(params, wide)
    return out.reshape(*x.shape[:-1], -1).astype(x.dtype), None
  if implicit:
    fixed, wide = lax.stop_gradient((params, wide))
    row = _dense_row if state is None else stored.lowrank_row
  else:
    fixed, row = params, None
  out, num_steps, residual = iterate_queries(
    functools.partial(step, fixed),
    wide,
    tol=tol,
    max_steps=max_steps,
    unrolled=not implicit,
  )
  if row is not None:
    out = _with_implicit_gradient(row, params, lax.stop_gradient(out))
  info = None
  if return_info:
    assert keys is not None
    if state is None:
      energy = dense.energy(out, keys, beta)
    else:
      energy = stored.lowrank_energy(out, keys, state)
    numbers = num_steps, energy.astype(x.dtype), residual.astype(x.dtype)
    info = HopfieldInfo(*(y.reshape(x.shape[:-1]) for y in numbers))
  return out.reshape(x.shape).astype(x.dtype), info


def _with_implicit_gradient(
  row: Callable[[Any, jax.Array], jax.Array], params: Any, x: jax.Array
) -> jax.Array:
  """(L, d) fixed points as they are, differentiated as such."""
  largest = max(leaf.size for leaf in jax.tree.leaves(params))

  def one(x: jax.Array) -> jax.Array:
    return fixed_point(row, params, x, tol=math.inf, max_steps=1)

  # The gradient holds a Jacobian of what a row is made from.
  after = rows.by_rows(one, largest * x.shape[1], x)
  # Nothing is added: an update more would be one that nobody counted.
  return x + (after - lax.stop_gradient(after))


def _dense_step(params: Any, x: jax.Array) -> jax.Array:
  patterns, beta = params
  return dense.update(x, patterns, beta, patterns)


def _dense_row(params: Any, x: jax.Array) -> jax.Array:
  """The same for one query, with derivatives of any kind."""
  patterns, beta = params
  exact = lax.Precision.HIGHEST
  weights = jax.nn.softmax(beta * jnp.dot(patterns, x, precision=exact))
  return jnp.dot(weights, patterns, precision=exact)
