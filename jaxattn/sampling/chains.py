r"""Runs many chains at once, with a step size found in a warm-up.

An algorithm is a pair of functions in the form of blackjax, whose own loops and
diagnostics take it: ``init(position, rng=None) -> state`` and ``step(rng,
state, step_size=None) -> (state, info)``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks, _compat

__all__ = ["SamplingAlgorithm", "sample_chains"]

# log r moves by (acceptance - target) / k^0.6 after step k.
_DECAY = 0.6


class SamplingAlgorithm(NamedTuple):
  """How to start a chain, and how to go on.

  Attributes:
    init: (position, rng=None) -> state; a state has a ``position`` and a
      ``logdensity``, -inf where no chain may start.
    step: (rng, state, step_size=None) -> (state, info); None = the algorithm's
      own step size. An info has an ``acceptance_rate``.
    step_size: the algorithm's own; None if it has none.
  """

  init: Callable[..., Any]
  step: Callable[..., Any]
  step_size: float | None = None


def sample_chains(
  rng: jax.Array,
  algorithm: SamplingAlgorithm,
  positions: jax.Array,
  num_steps: int,
  *,
  thin: int = 1,
  num_warmup: int = 0,
  target_acceptance_rate: float = 0.35,
) -> tuple[jax.Array, Any, jax.Array | None]:
  r"""Draws with independent chains, one from each position.

  During the warm-up, whose draws are dropped,

  .. math:: \log r \leftarrow \log r + k^{-0.6} (\bar a_k - a^*)

  after step k, with the acceptance rate averaged over chains. Afterwards r is
  kept: a chain that goes on adapting has another law.

  Args:
    rng: PRNG key.
    algorithm: what to run, as :func:`dikin_walk` makes it. The same object in
      another call is not compiled again.
    positions: (C, d), where chains start; on a mesh they stay as they are.
    num_steps: steps after the warm-up, a multiple of ``thin``.
    thin: every how many steps a draw is kept.
    num_warmup: steps of the warm-up. They adapt nothing if the algorithm has
      no step size.
    target_acceptance_rate: a* in (0, 1).

  Returns:
    Draws (C, num_steps / thin, d); the algorithm's infos of the steps that led
    to them, (C, num_steps / thin) each; and the step size of all of them, None
    if the algorithm has none.

  Raises:
    ValueError: if ``positions`` is no floating matrix, a number of steps does
      not fit, or a chain starts where the density is 0.

  Cost:
    That of the steps, and the memory of what is returned.

  Source:
    Robbins and Monro for the adaptation; the exponent and the target of
    arXiv:2410.05700's walk were chosen by measurement.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import Polytope, dikin_walk, sample_chains
    >>> box = Polytope(jnp.concatenate([jnp.eye(2), -jnp.eye(2)]), jnp.ones(4))
    >>> draws, infos, step_size = sample_chains(
    ...   jax.random.key(0), dikin_walk(None, box), jnp.zeros((64, 2)), 100,
    ...   thin=5, num_warmup=200,
    ... )
    >>> draws.shape, bool(jnp.abs(infos.acceptance_rate.mean() - 0.35) < 0.05)
    ((64, 20, 2), True)
  """
  positions = jnp.asarray(positions)
  _checks.check_rank("positions", positions, 2)
  _checks.check_floating("positions", positions)
  _checks.check_integer("thin", thin, 1, None)
  _checks.check_integer("num_steps", num_steps, 1, None)
  _checks.check_integer("num_warmup", num_warmup, 0, None)
  target = target_acceptance_rate
  _checks.check_range("target_acceptance_rate", target, 0.0, 1.0, closed=False)
  if num_steps % thin:
    raise ValueError(
      f"num_steps must be a multiple of thin={thin}, got {num_steps}"
    )
  rng_start, rng_warm, rng_run = jax.random.split(rng, 3)
  states = _start(rng_start, positions, algorithm=algorithm)
  _check_states(algorithm, states, positions)
  own = getattr(algorithm, "step_size", None)
  step_size = None if own is None else jnp.asarray(own, positions.dtype)
  if num_warmup:
    states, step_size = _warm_up(
      rng_warm,
      states,
      step_size,
      target,
      algorithm=algorithm,
      num=num_warmup,
    )
  draws, infos = _run(
    rng_run,
    states,
    step_size,
    algorithm=algorithm,
    num=num_steps // thin,
    thin=thin,
  )
  return draws, infos, step_size


def _check_states(
  algorithm: SamplingAlgorithm, states: Any, positions: jax.Array
) -> None:
  if not _checks.is_concrete(states.logdensity):
    return
  possible = np.isfinite(np.asarray(states.logdensity))
  if possible.all():
    return
  chain = int(np.argmin(possible))
  try:
    # Alone it is not traced, and the algorithm can say what is wrong.
    algorithm.init(positions[chain])
  except ValueError as error:
    raise ValueError(f"positions[{chain}]: {error}") from error
  raise ValueError(
    f"positions[{chain}] has log density {states.logdensity[chain]}"
  )


@functools.partial(jax.jit, static_argnames="algorithm")
def _start(
  rng: jax.Array, positions: jax.Array, *, algorithm: SamplingAlgorithm
) -> Any:
  def start(rng: jax.Array, positions: jax.Array) -> Any:
    keys = jax.random.split(rng, len(positions))
    return jax.vmap(algorithm.init)(positions, keys)

  return _over_chains(start, positions)(rng, positions)


def _step_all(
  rng: jax.Array, states: Any, step_size: Any, algorithm: SamplingAlgorithm
) -> tuple[Any, Any]:
  keys = jax.random.split(rng, len(states.logdensity))
  if step_size is None:
    return jax.vmap(algorithm.step)(keys, states)
  return jax.vmap(algorithm.step, (0, 0, None))(keys, states, step_size)


@functools.partial(jax.jit, static_argnames=("algorithm", "num"))
def _warm_up(
  rng: jax.Array,
  states: Any,
  step_size: jax.Array | None,
  target: float,
  *,
  algorithm: SamplingAlgorithm,
  num: int,
) -> tuple[Any, jax.Array | None]:
  def warm_up(
    rng: jax.Array, states: Any, step_size: Any, target: Any
  ) -> tuple[Any, Any]:
    def body(carry: tuple[Any, Any], k: jax.Array) -> tuple[Any, None]:
      states, step_size = carry
      key = jax.random.fold_in(rng, k)
      states, info = _step_all(key, states, step_size, algorithm)
      if step_size is not None:
        excess = info.acceptance_rate.mean() - target
        rate = (k + 1).astype(step_size.dtype) ** -_DECAY
        step_size = step_size * jnp.exp(rate * excess).astype(step_size.dtype)
      return (states, step_size), None

    return lax.scan(body, (states, step_size), jnp.arange(num))[0]

  place = _over_chains(warm_up, states.position, scalar_too=True)
  return place(rng, states, step_size, target)


@functools.partial(jax.jit, static_argnames=("algorithm", "num", "thin"))
def _run(
  rng: jax.Array,
  states: Any,
  step_size: jax.Array | None,
  *,
  algorithm: SamplingAlgorithm,
  num: int,
  thin: int,
) -> tuple[jax.Array, Any]:
  def run(rng: jax.Array, states: Any, step_size: Any) -> tuple[Any, Any]:
    def step(k: jax.Array, states: Any) -> tuple[Any, Any]:
      key = jax.random.fold_in(rng, k)
      return _step_all(key, states, step_size, algorithm)

    def body(states: Any, k: jax.Array) -> tuple[Any, Any]:
      first, last = k * thin, (k + 1) * thin - 1
      if thin > 1:
        states = lax.fori_loop(first, last, lambda j, s: step(j, s)[0], states)
      states, info = step(last, states)
      return states, (states.position, info)

    _, kept = lax.scan(body, states, jnp.arange(num))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), kept)

  return _over_chains(run, states.position)(rng, states, step_size)


def _over_chains(
  fn: Callable[..., Any], positions: jax.Array, *, scalar_too: bool = False
) -> Callable[..., Any]:
  """Lets the compiler place what ``fn`` does on a mesh with explicit axes.

  Outputs are sharded over chains as positions are; ``scalar_too``: the second
  of two is the same for all chains.
  """
  sharding = _compat.typeof(positions).sharding
  if _compat.AxisType.Explicit not in sharding.mesh.axis_types:
    return fn
  spec = jax.sharding.PartitionSpec(*sharding.spec[:1])
  out = (spec, jax.sharding.PartitionSpec()) if scalar_too else spec
  return _compat.auto_axes(fn, out_sharding=out)
