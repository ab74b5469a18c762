"""What does a training step of a whole model gain from linear attention?

Peers: the same model, with the same parameters, with exact attention in tiles
and with ``jax.nn``'s dense attention; both with all of a layer kept for the
gradient and with each layer computed again. Degree 2 on heads of 8, float32,
causal; projections and the network of each layer are part of the step. Not a
peer: ``glassroom/sata_attention``, by its own account a proof of concept in
PyTorch that is not optimized for speed, of which there is no release to pin.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app

from benchmarks import _race
from jaxattn.attention import (
  attention_layer_gradients,
  attention_layer_gradients_lowrank,
)
from jaxattn.models import Transformer, TransformerConfig

_POLYNOMIAL = (("degree", 2), ("radius", 1.0))


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = [
    *training_step(8192, ("softmax",), bar=5.0),
    *training_step(2048, ("softmax", "dot_product")),
    *closed_forms(8192),
  ]
  title = "Training step of a transformer"
  _race.publish("multilayer_gradient", title, rows)


def training_step(
  length: int, peers: tuple[str, ...], bar: float | None = None
) -> list[_race.Row]:
  """Two layers of 64 = 8 x 8: gradient in all parameters."""
  rows = []
  for remat in (False, True):
    config = TransformerConfig(num_layers=2, vocab_size=128, remat=remat)
    steps, args = {}, _arguments(config, length)
    for name in ("polynomial", *peers):
      options = _POLYNOMIAL if name == "polynomial" else ()
      steps[name] = _step(
        config._replace(attention=name, attention_options=options)
      )
    seconds = _race.race(
      {n: functools.partial(f, *args) for n, f in steps.items()}, rounds=5
    )
    how = "layers computed again" if remat else "layers kept"
    name = f"step, 2 layers, T = {length}, {how}"
    for peer in peers:
      # The fastest exact step is the one to beat.
      needed = bar if peer == "softmax" and not remat else None
      rows.append(
        _race.ratio(
          f"{name}: {peer} / polynomial", seconds, "polynomial", peer, needed
        )
      )
    ours = _race.temporary_bytes(steps["polynomial"], *args)
    rows += [
      _race.figure(
        f"{name}: bytes of {peer} / polynomial",
        _race.temporary_bytes(steps[peer], *args) / ours,
      )
      for peer in peers
    ]
  return rows


def _step(config: TransformerConfig) -> Callable[..., Any]:
  model = Transformer(config)

  def loss(params: Any, ids: jax.Array) -> jax.Array:
    logits = model.apply(params, ids)
    return jax.nn.log_softmax(logits)[..., 0].mean()  # pyright: ignore[reportArgumentType]

  return jax.jit(jax.grad(loss))


def _arguments(config: TransformerConfig, length: int) -> tuple[Any, Any]:
  ids = np.random.default_rng(0).integers(128, size=(1, length), dtype=np.int32)
  return Transformer(config).init(jax.random.key(0), ids), jax.numpy.array(ids)


def closed_forms(length: int) -> list[_race.Row]:
  """One layer of one head of 8: gradients in closed form."""
  rng = np.random.default_rng(0)
  shapes = [(1, length, 8), (8, 8), (8, 8), (1, length, 8)]
  arrays = [rng.standard_normal(s, np.float32) / 4 for s in shapes]
  contestants = {
    "exact": jax.jit(attention_layer_gradients),
    "ours": jax.jit(
      functools.partial(attention_layer_gradients_lowrank, degree=2, radius=1.0)
    ),
  }
  seconds = _race.race(
    {n: functools.partial(f, *arrays) for n, f in contestants.items()}
  )
  name = f"closed forms of one layer, T = {length}, D = 8: exact / low rank"
  return [_race.ratio(name, seconds, "ours", "exact")]


if __name__ == "__main__":
  app.run(main)
