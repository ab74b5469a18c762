"""When does low-rank Hopfield retrieval pay, and what does the dense one cost?

Float32, entries uniform in [-1, 1], beta = 1 / 8, degree 4, one update of M
queries by M patterns; low rank includes storing, and has a bar at d = 8. Peer:
attention of ``jax.nn`` with its scale set to beta. The layer with three updates
is raced against the same products, of the same parameters, in PyTorch, as the
layer that its authors published forms them: that one is not on the index.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import _race
from jaxattn.attention import (
  hopfield_retrieve,
  hopfield_store,
  hopfield_update,
)
from jaxattn.models import HopfieldLayer

# d, and of it M, and how many times faster low rank must be than jax.nn.
_LOWRANK_BARS = {
  8: {512: None, 1024: None, 2048: 2.0, 4096: None, 8192: 10.0},
  # Where the two ways meet.
  4: {64: None, 256: None},
  16: {4096: None, 8192: None},
}
_DENSE_BAR, _LAYER_BAR = 1.0, 1.0
_BETA, _DEGREE = 1 / 8, 4
_STEPS = 3
# Ten times what features of this degree leave here.
_LARGEST_ERROR = 1e-4


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = []
  for dim, bars in _LOWRANK_BARS.items():
    for num, bar in bars.items():
      rows += updates(num, dim, bar)
  rows.append(layer(16, 512, 64))
  _race.publish("hopfield", "Hopfield retrieval", rows)


def updates(num: int, dim: int, bar: float | None) -> list[_race.Row]:
  """One update of ``num`` queries by as many patterns."""
  rng = np.random.default_rng(0)
  pair = tuple(jnp.asarray(rng.uniform(-1, 1, (2, num, dim)), jnp.float32))
  calls = {"ours": _dense, "lowrank": _lowrank, "jax.nn": _peer}
  contestants = {
    name: functools.partial(jax.jit(call), *pair)
    for name, call in calls.items()
  }
  wanted = contestants["jax.nn"]()
  errors = {
    name: float(jnp.abs(run() - wanted).max())
    for name, run in contestants.items()
  }
  if max(errors.values()) > _LARGEST_ERROR:
    raise RuntimeError(f"from jax.nn they differ by {errors}, d = {dim}")
  seconds = _race.race(contestants)
  name = f"M = {num}, d = {dim}"
  rows = [
    _race.ratio(
      f"{name}: jax.nn / low rank, error {errors['lowrank']:.0e}",
      seconds,
      "lowrank",
      "jax.nn",
      bar,
    ),
    _race.ratio(
      f"{name}: our dense / low rank", seconds, "lowrank", "ours", None
    ),
  ]
  if dim == 8:
    name = f"{name}: jax.nn / our dense"
    rows.append(_race.ratio(name, seconds, "ours", "jax.nn", _DENSE_BAR))
  return rows


def layer(batch: int, length: int, dim: int) -> _race.Row:
  """The layer with its projections and three softmaxes."""
  rng = np.random.default_rng(0)
  shape = 2, batch, length, dim
  state, stored = jnp.asarray(rng.standard_normal(shape), jnp.float32)
  # A tolerance of 0 stops no query before the others.
  module = HopfieldLayer(head_dim=dim, max_steps=_STEPS, tol=0.0)
  params = module.init(jax.random.key(0), state, stored)
  peer = _torch_layer(params["params"], state, stored, dim**-0.5)
  ours = functools.partial(jax.jit(module.apply), params, state, stored)
  error = np.abs(np.asarray(ours()) - peer().numpy()).max()
  if error > 1e-4:
    raise RuntimeError(f"the two layers differ by {error}")
  seconds = _race.race({"ours": ours, "torch": peer})
  return _race.ratio(
    f"layer, B = {batch}, S = {length}, d = {dim}, {_STEPS} steps: PyTorch / "
    "ours",
    seconds,
    "ours",
    "torch",
    _LAYER_BAR,
  )


def _dense(x: jax.Array, patterns: jax.Array) -> jax.Array:
  return hopfield_update(x, patterns, _BETA)


def _lowrank(x: jax.Array, patterns: jax.Array) -> jax.Array:
  state = hopfield_store(patterns, _BETA, degree=_DEGREE)
  return hopfield_retrieve(
    x, None, _BETA, max_steps=1, method="lowrank", state=state
  )


def _peer(x: jax.Array, patterns: jax.Array) -> jax.Array:
  query, key = x[:, None], patterns[:, None]
  return jax.nn.dot_product_attention(query, key, key, scale=_BETA)[:, 0]


def _torch_layer(params: Any, state: Any, stored: Any, beta: float) -> Any:
  """The same layer: products of whole batches and a softmax."""
  # The other races need no PyTorch.
  import torch  # pyright: ignore[reportMissingImports]

  def tensor(x: Any) -> Any:
    return torch.from_numpy(np.array(x))

  # One head: (F, 1, H) kernels, and (1, H, F) of the output.
  weights = {
    name: (
      tensor(params[name]["kernel"]).squeeze(0 if name == "out" else 1),
      tensor(params[name]["bias"]).flatten(),
    )
    for name in ("query", "key", "value", "out")
  }
  state, stored = tensor(state), tensor(stored)
  shape = (state.shape[-1],)

  @torch.inference_mode()
  def run() -> Any:
    norm = functools.partial(
      torch.nn.functional.layer_norm, normalized_shape=shape, eps=1e-6
    )
    x, y = norm(state), norm(stored)
    query, key, value = (
      torch.matmul(inputs, weights[name][0]) + weights[name][1]
      for inputs, name in ((x, "query"), (y, "key"), (y, "value"))
    )
    for step in range(_STEPS):
      scores = beta * torch.bmm(query, key.transpose(1, 2))
      read = value if step == _STEPS - 1 else key
      query = torch.bmm(torch.softmax(scores, -1), read)
    return torch.matmul(query, weights["out"][0]) + weights["out"][1]

  return run


if __name__ == "__main__":
  app.run(main)
