"""How fast are tangent kernels of models, and of infinite width?

Peers: the derivatives of a whole batch by ``jax.jacrev``, contracted; for the
closed form, the mean over networks that are drawn. neural-tangents 0.6.5, the
library for this, does not import on a JAX that this package runs on.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app

from benchmarks import _race
from jaxattn.models import MLP, mlp_with_taps
from jaxattn.ntk import empirical_ntk, mlp_ntk, structured_ntk

STRUCTURED_BAR = 20.0
# Seconds and bytes that the Gram matrix of the large network may take.
_SECONDS, _BYTES = 3.0, 2**30

# Input, widths, data.
SIZES = (
  (64, (512, 512, 512, 10), 32),
  (64, (256, 256, 256, 1), 128),
  (64, (4096, 1), 256),
)
_LARGE = (64, (4096, 1), 2048)
# Networks that are drawn for the mean, and their width.
_DRAWS, _WIDTH = 64, 1024


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = [row for size in SIZES for row in against_jacrev(*size)]
  rows += large(*_LARGE)
  rows.append(closed_form(64, 256, 3))
  _race.publish("empirical_ntk", "Tangent kernels", rows)


def setup(dim: int, widths: tuple[int, ...], n: int) -> tuple[Any, ...]:
  """A network, its parameters and data on the sphere."""
  x = jax.random.normal(jax.random.key(0), (n, dim))
  x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
  model = MLP(widths)
  return model, model.init(jax.random.key(1), x), x


def of_batch(
  apply_fn: Callable[..., jax.Array], params: Any, x: jax.Array
) -> jax.Array:
  """The kernel as one writes it down: O n cotangents, each through n rows."""
  leaves = jax.tree.leaves(jax.jacrev(apply_fn)(params, x))
  flat = [leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves]
  terms = [jnp.einsum("iap,jbp->iajb", leaf, leaf) for leaf in flat]
  return functools.reduce(jnp.add, terms)


def against_jacrev(
  dim: int, widths: tuple[int, ...], n: int
) -> list[_race.Row]:
  """Our three ways against the derivatives of the batch."""
  model, params, x = setup(dim, widths, n)
  naive = jax.jit(functools.partial(of_batch, model.apply))
  seconds = _race.race(
    {
      "jacrev": lambda: naive(params, x),
      "structured": lambda: structured_ntk(mlp_with_taps, params, x),
      "jacobian": lambda: empirical_ntk(model.apply, params, x),
      "ntvp": lambda: empirical_ntk(model.apply, params, x, method="ntvp"),
    },
    rounds=5,
  )
  shape = "-".join(map(str, (dim, *widths)))
  bars = {"structured": STRUCTURED_BAR, "jacobian": None, "ntvp": None}
  return [
    _race.ratio(
      f"{shape}, n = {n}: jacrev / {ours}", seconds, ours, "jacrev", b
    )
    for ours, b in bars.items()
  ]


def large(dim: int, widths: tuple[int, ...], n: int) -> list[_race.Row]:
  """The time and memory that may be taken, over what is."""
  _, params, x = setup(dim, widths, n)
  run = jax.jit(functools.partial(structured_ntk, mlp_with_taps))
  seconds = _race.race({"ours": lambda: run(params, x)}, rounds=5)
  taken = sorted(seconds["ours"])[2]
  held = _race.temporary_bytes(run, params, x) + n * n * 4
  shape = "-".join(map(str, (dim, *widths)))
  return [
    _race.figure(
      f"{shape}, n = {n}: {_SECONDS:g} s / structured ({taken:.2f} s)",
      _SECONDS / taken,
      1.0,
    ),
    _race.figure(
      f"{shape}, n = {n}: 1 GiB / structured ({held / 2**20:.0f} MiB)",
      _BYTES / held,
      1.0,
    ),
  ]


def closed_form(dim: int, n: int, depth: int) -> _race.Row:
  """Infinite width against a mean over draws, which is off by percents."""
  _, _, x = setup(dim, (1,), n)
  model = MLP((_WIDTH,) * depth + (1,))

  def draw(rng: jax.Array) -> jax.Array:
    return structured_ntk(mlp_with_taps, model.init(rng, x), x)[:, 0, :, 0]

  @jax.jit
  def mean(rngs: jax.Array) -> jax.Array:
    return jax.lax.map(draw, rngs).mean(0)

  rngs = jax.random.split(jax.random.key(2), _DRAWS)
  exact = mlp_ntk(x, depth=depth)[1]
  error = jnp.linalg.norm(mean(rngs) - exact) / jnp.linalg.norm(exact)
  seconds = _race.race(
    {
      "ours": lambda: mlp_ntk(x, depth=depth),
      "draws": lambda: mean(rngs),
    },
    rounds=5,
  )
  return _race.ratio(
    f"{depth} hidden layers, n = {n}: mean of {_DRAWS} networks of width "
    f"{_WIDTH} (off by {100 * float(error):.1f} %) / closed form",
    seconds,
    "ours",
    "draws",
  )


if __name__ == "__main__":
  app.run(main)
