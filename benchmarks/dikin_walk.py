"""How fast is a Dikin walk, and when is another walk the better one?

In seconds of the processor, all threads counted, on one core: peers use one,
and more would only divide steps as short as these. Ours runs 32 chains at once
in float32. Steps against the Dikin walks of hopsy and of polytopewalk;
independent draws, of the worst coordinate, against hopsy's, each at the best of
its step sizes: polytopewalk's have another law, as its walk solves with the
wrong triangle of the metric. Then the walks that do better: hit and run in
bodies that are round, or were rounded, and NUTS where a density that is smooth
and narrow makes the body matter little. And those that do worse: hit and run in
a network that is not rounded, and in boxes ever longer.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import blackjax  # pyright: ignore[reportMissingImports]
import hopsy  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from polytopewalk import dense  # pyright: ignore[reportMissingImports]

from benchmarks import _race
from experiments import _convex_bodies
from jaxattn.data import load_flux_polytope
from jaxattn.sampling import (
  Polytope,
  SamplingAlgorithm,
  chebyshev_center,
  coordinate_hit_and_run,
  dikin_walk,
  effective_sample_size,
  potential_scale_reduction,
  round_polytope,
  sample_chains,
)

_HOPSY_BAR, _POLYTOPEWALK_BAR, _DRAWS_BAR, _ASPECT_BAR = 2.0, 5.0, 2.0, 0.7
# Constraints and dimensions; steps of each of our chains, and of peers; the
# first has no bar.
_SIZES = {
  (20, 10): (20_000, 300_000),
  (200, 10): (20_000, 100_000),
  (500, 50): (1000, 5000),
  (1000, 100): (200, 500),
}
_CHAINS, _THIN = 32, 10
# Each optimum lies within.
_OUR_RADII = (1.5, 2.0, 3.0, 4.5, 7.0)
_HOPSY_RADII = (2.0, 4.0, 6.0, 9.0, 13.0)
_ASPECTS = (1.0, 10.0, 100.0)
# Of a normal density in a cube, in which a step size of 0.4 is about the best.
_SIGMA, _NARROW_RADIUS = 0.1, 0.4
_PROPOSALS = {
  "hit and run": hopsy.UniformHitAndRunProposal,
  "hit and run (coordinates)": hopsy.UniformCoordinateHitAndRunProposal,
  "billiard walk": hopsy.BilliardWalkProposal,
}


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  # Before JAX starts its threads, one for each core that it sees.
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  rows = [
    *(row for n, d in _SIZES for row in steps(n, d)),
    lee_sidford(20, 10),
    *draws(200, 10),
    narrow(10),
    *network(),
    *aspects(10),
  ]
  _race.publish("dikin_walk", "Dikin walks", rows)


# --- rows ---


def steps(n: int, d: int) -> list[_race.Row]:
  """Seconds of a step, of the logarithmic barrier and of Vaidya's."""
  body, (num, num_peers) = _body(n, d), _SIZES[n, d]
  a, b, start = *_host(body), np.zeros(d)
  contestants = {
    kind: functools.partial(
      _ours, dikin_walk(None, body, kind=kind), num, start
    )
    for kind in ("log", "vaidya")
  } | {
    "hopsy": functools.partial(_hopsy_dikin, a, b, 2.0, num_peers),
    "polytopewalk": functools.partial(
      dense.DikinWalk().generateCompleteWalk, num_peers, start, a, b
    ),
    "polytopewalk's Vaidya": functools.partial(
      dense.VaidyaWalk().generateCompleteWalk, num_peers // 4, start, a, b
    ),
  }
  taken = dict.fromkeys(contestants, num_peers) | {
    "log": _CHAINS * num,
    "vaidya": _CHAINS * num,
    "polytopewalk's Vaidya": num_peers // 4,
  }
  seconds = {
    name: [s / taken[name] for s in each]
    for name, each in _race_cpu(contestants).items()
  }
  bars = (_HOPSY_BAR, _POLYTOPEWALK_BAR) if n >= 200 else (None, None)
  us = 1e6 * statistics.median(seconds["log"])
  what = f"n = {n}, d = {d}, a step"
  return [
    _race.ratio(
      f"{what} (ours {us:.2g} us): hopsy / ours",
      seconds,
      "log",
      "hopsy",
      bars[0],
    ),
    _race.ratio(
      f"{what}: polytopewalk / ours", seconds, "log", "polytopewalk", bars[1]
    ),
    _race.ratio(
      f"{what}, Vaidya: polytopewalk / ours",
      seconds,
      "vaidya",
      "polytopewalk's Vaidya",
    ),
  ]


def lee_sidford(n: int, d: int) -> _race.Row:
  """Seconds of a step; the peer finds the weights by gradient descent."""
  body, (num, _) = _body(n, d), _SIZES[n, d]
  a, b, start = *_host(body), np.zeros(d)
  num_peer = 500
  seconds = _race_cpu(
    {
      "ours": functools.partial(
        _ours, dikin_walk(None, body, kind="lee_sidford"), num // 4, start
      ),
      "peer": functools.partial(
        dense.DikinLSWalk().generateCompleteWalk, num_peer, start, a, b
      ),
    }
  )
  taken = {"ours": _CHAINS * (num // 4), "peer": num_peer}
  seconds = {
    who: [s / taken[who] for s in each] for who, each in seconds.items()
  }
  return _race.ratio(
    f"n = {n}, d = {d}, a step, Lee-Sidford: polytopewalk / ours",
    seconds,
    "ours",
    "peer",
  )


def draws(n: int, d: int) -> list[_race.Row]:
  """Independent draws a second in a round body."""
  body, (num, num_peers) = _body(n, d), _SIZES[n, d]
  a, b, start = *_host(body), np.zeros(d)
  ours = {
    radius: functools.partial(
      _ours, dikin_walk(None, body, step_size=radius), num, start
    )
    for radius in _OUR_RADII
  }
  hopsys = {
    radius: functools.partial(_hopsy_dikin, a, b, radius, 4 * num_peers)
    for radius in _HOPSY_RADII
  }
  best, best_hopsy = _best(ours), _best(hopsys)
  contestants = {
    "ours": ours[best],
    "hopsy": hopsys[best_hopsy],
    "our hit and run": functools.partial(
      _ours, coordinate_hit_and_run(None, body), num, start
    ),
    "hopsy's hit and run": functools.partial(_hopsy_hit_and_run, a, b, 10**6),
  }
  seconds = _per_draw(contestants)
  speed = 1 / statistics.median(seconds["ours"])
  what = f"n = {n}, d = {d}, a draw"
  return [
    _race.ratio(
      f"{what}, at r = {best:g} and {best_hopsy:g} (ours {speed:.0f} a "
      "second): hopsy / ours",
      seconds,
      "ours",
      "hopsy",
      _DRAWS_BAR,
    ),
    *(
      _race.ratio(
        f"{what}: {who} (coordinates) / our Dikin", seconds, "ours", who
      )
      for who in ("our hit and run", "hopsy's hit and run")
    ),
  ]


def narrow(d: int) -> _race.Row:
  """Draws of a narrow normal density in a cube, against NUTS without one."""
  body = _convex_bodies.repeated_box(d, 1, everywhere=True)
  walk = dikin_walk(
    lambda x: -(x @ x) / (2 * _SIGMA**2), body, step_size=_NARROW_RADIUS
  )
  seconds = _per_draw(
    {
      "ours": functools.partial(_ours, walk, 20_000, np.zeros(d)),
      "nuts": _nuts(d),
    }
  )
  return _race.ratio(
    f"normal of deviation {_SIGMA:g} in a cube, d = {d}, a draw: blackjax's "
    "NUTS of artanh x / our Dikin",
    seconds,
    "ours",
    "nuts",
  )


def network() -> list[_race.Row]:
  """Independent draws a second of the core metabolism of E. coli."""
  with jax.enable_x64(True):
    body, _ = load_flux_polytope("textbook")
    a, b, affine = round_polytope(*_host(body))
  body = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), body)
  center, _ = chebyshev_center(*_host(body))
  walk = dikin_walk(None, body, step_size=1.2)

  def rounded() -> np.ndarray:
    return _hopsy_hit_and_run(a, b, 10**6) @ affine.matrix.T

  ours = functools.partial(_ours, walk, 20_000, center)
  seconds = _per_draw({"ours": ours, "hopsy": rounded})
  speeds = {name: 1 / statistics.median(each) for name, each in seconds.items()}
  mixed = {"our Dikin, 32 chains of 20000": ours()} | {
    f"hopsy's {name}, 4 chains of 100000": np.concatenate(
      [
        _hopsy_hit_and_run(*_host(body), 10**5, proposal, center, seed)
        for seed in range(4)
      ]
    )
    for name, proposal in _PROPOSALS.items()
  }
  return [
    _race.ratio(
      "core of E. coli, a draw: hopsy's hit and run (coordinates), rounded, "
      f"{speeds['hopsy']:.0f} a second / our Dikin, unrounded, "
      f"{speeds['ours']:.0f} a second",
      seconds,
      "ours",
      "hopsy",
    ),
    *(
      _race.figure(
        f"core of E. coli, unrounded, R-hat of the worst coordinate: {name}",
        float(potential_scale_reduction(jnp.asarray(x)).max()),
        None,
      )
      for name, x in mixed.items()
    ),
  ]


def aspects(d: int) -> list[_race.Row]:
  """Independent draws of as many steps, in boxes ever longer."""
  names = ("our Dikin", "hopsy's Dikin", "hopsy's hit and run")
  sizes: dict[str, list[float]] = {name: [] for name in names}
  for aspect in _ASPECTS:
    body, to_cube = _convex_bodies.rotated_box(d, aspect, 0)
    a, b = _host(body)
    many = 500_000
    walks = {
      "our Dikin": functools.partial(
        _ours, dikin_walk(None, body), 20_000, np.zeros(d)
      ),
      "hopsy's Dikin": functools.partial(_hopsy_dikin, a, b, 2.0, many),
      "hopsy's hit and run": functools.partial(
        _hopsy_hit_and_run, a, b, many, hopsy.UniformHitAndRunProposal
      ),
    }
    for name, walk in walks.items():
      x = jnp.asarray(np.asarray(walk()) @ np.asarray(to_cube).T)
      sizes[name].append(float(effective_sample_size(x).min()))
  return [
    _race.figure(
      f"rotated boxes of aspect up to {_ASPECTS[-1]:g}, draws in as many "
      f"steps, least / most: {name}",
      min(each) / max(each),
      _ASPECT_BAR if name == "our Dikin" else None,
    )
    for name, each in sizes.items()
  ]


# --- walks: (chains, draws, d) ---


def _ours(walk: SamplingAlgorithm, num: int, start: np.ndarray) -> jax.Array:
  positions = jnp.broadcast_to(
    jnp.asarray(start, jnp.float32), (_CHAINS, len(start))
  )
  found, _, _ = sample_chains(
    jax.random.key(0), walk, positions, num, thin=_THIN
  )
  return jax.block_until_ready(found)


def _hopsy_dikin(
  a: np.ndarray, b: np.ndarray, radius: float, num: int
) -> np.ndarray:
  chain = hopsy.MarkovChain(
    hopsy.Problem(a, b),
    proposal=hopsy.DikinWalkProposal,
    starting_point=np.zeros(a.shape[1]),
  )
  chain.proposal.stepsize = radius
  rng = hopsy.RandomNumberGenerator(0)
  return hopsy.sample(chain, rng, n_samples=num // _THIN, thinning=_THIN)[1]


def _hopsy_hit_and_run(
  a: np.ndarray,
  b: np.ndarray,
  num: int,
  proposal: Any = hopsy.UniformCoordinateHitAndRunProposal,
  start: np.ndarray | None = None,
  seed: int = 0,
) -> np.ndarray:
  start = np.zeros(a.shape[1]) if start is None else np.asarray(start)
  chain = hopsy.MarkovChain(
    hopsy.Problem(a, b), proposal=proposal, starting_point=start
  )
  rng = hopsy.RandomNumberGenerator(seed)
  return hopsy.sample(chain, rng, n_samples=num // _THIN, thinning=_THIN)[1]


def _nuts(d: int) -> Callable[[], jax.Array]:
  """A normal density in (-1, 1)^d, of u = artanh x with its volume."""

  def logdensity(u: jax.Array) -> jax.Array:
    x = jnp.tanh(u)
    return -(x @ x) / (2 * _SIGMA**2) + jnp.log1p(-(x**2)).sum()

  warmup: Any = blackjax.window_adaptation(blackjax.nuts, logdensity)
  (_, found), _ = warmup.run(jax.random.key(0), jnp.zeros(d), 1000)
  walk: Any = blackjax.nuts(logdensity, **found)

  @jax.jit
  def run(rng: jax.Array) -> jax.Array:
    def step(state: Any, rng: jax.Array) -> tuple[Any, jax.Array]:
      state, _ = walk.step(rng, state)
      return state, jnp.tanh(state.position)

    def chain(rng: jax.Array) -> jax.Array:
      keys = jax.random.split(rng, 1000)
      return jax.lax.scan(step, walk.init(jnp.zeros(d)), keys)[1]

    return jax.vmap(chain)(jax.random.split(rng, _CHAINS))

  return lambda: jax.block_until_ready(run(jax.random.key(1)))


# --- seconds of the processor ---


def _race_cpu(
  contestants: dict[str, Callable[[], Any]], rounds: int = 5
) -> dict[str, list[float]]:
  return _race.race(contestants, rounds=rounds, clock=time.process_time)


def _per_draw(
  contestants: dict[str, Callable[[], Any]],
) -> dict[str, list[float]]:
  """Seconds of an independent draw, of the worst coordinate."""
  sizes = {
    name: float(effective_sample_size(jnp.asarray(walk())).min())
    for name, walk in contestants.items()
  }
  return {
    name: [s / sizes[name] for s in each]
    for name, each in _race_cpu(contestants).items()
  }


def _best(walks: dict[float, Callable[[], Any]]) -> float:
  """The step size with most independent draws: all take the same time."""
  sizes = {
    radius: float(effective_sample_size(jnp.asarray(walk())).min())
    for radius, walk in walks.items()
  }
  return max(sizes, key=lambda radius: sizes[radius])


def _body(n: int, d: int) -> Polytope:
  if n == 2 * d:
    return _convex_bodies.repeated_box(d, 1, everywhere=True)
  return _convex_bodies.random_polytope(n, d, 0)


def _host(body: Polytope) -> tuple[np.ndarray, np.ndarray]:
  return np.asarray(body.a, np.float64), np.asarray(body.b, np.float64)


if __name__ == "__main__":
  app.run(main)
