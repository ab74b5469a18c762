"""How fast is a Gram matrix of the kernel of graphs?

Two blocks of two dense layers, degree-scaled, jumping knowledge. Peer: the
published method, one pair of graphs at a time, an aggregation as the product
with a sparse Kronecker product of both operators (here after arXiv 1905.13192,
on NumPy and SciPy in float64, in one process as ours). On the 995 graphs of
the atlas the peer is timed on a sample of pairs, which counts for all of them:
the whole takes minutes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import networkx
import numpy as np
from absl import app
from scipy import sparse

from benchmarks import _race
from experiments.gntk import connected_graphs
from jaxattn.data import from_networkx, pad_graphs
from jaxattn.ntk import graph_gntk

_MOLECULE_BAR, _ATLAS_BAR = 6.0, 50.0
_BLOCKS, _LAYERS = 2, 2
_SAMPLE = 4000
Graphs = tuple[list[np.ndarray], list[np.ndarray]]


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  molecules, atlas = (
    from_networkx(molecule_like(188)),
    from_networkx(connected_graphs(7)),
  )
  rows = [
    *race(molecules, "188 molecule-like graphs", _MOLECULE_BAR, None, 3),
    *race(atlas, "995 graphs of the atlas", _ATLAS_BAR, _SAMPLE, 5),
  ]
  _race.publish("gntk", "Kernels of graphs", rows)


def race(
  graphs: Graphs, name: str, bar: float, sample: int | None, rounds: int
) -> list[_race.Row]:
  """The whole matrix, the peer on all pairs or on a sample of them."""
  adjacencies, features = graphs
  single = [x.astype(np.float32) for x in features]
  batch = pad_graphs(adjacencies, single, aggregate="degree")
  ours = functools.partial(
    graph_gntk, batch, num_blocks=_BLOCKS, num_mlp_layers=_LAYERS
  )
  rows, columns = np.triu_indices(len(adjacencies))
  total = len(rows)
  if sample is not None:
    chosen = np.random.default_rng(0).choice(total, sample, replace=False)
    rows, columns = rows[chosen], columns[chosen]
  # Variances of each graph are its preparation, in the race if all pairs are.
  prepare = functools.partial(kron_variances, adjacencies, features)
  ready = None if sample is None else prepare()

  def peer() -> np.ndarray:
    sides = prepare() if ready is None else ready
    return kron_pairs(sides, rows, columns)

  _agree(np.asarray(ours())[rows, columns], peer(), name)
  seconds = _race.race({"ours": ours, "peer": peer}, rounds=rounds)
  scale = total / len(rows)
  seconds["peer"] = [scale * s for s in seconds["peer"]]
  label = f"Gram matrix, {name}: NumPy, pair by pair / ours"
  first = _first_call(ours)
  return [
    _race.ratio(label, seconds, "ours", "peer", bar),
    _race.figure(
      f"{name}, compilation included: NumPy / ours",
      float(np.median(seconds["peer"])) / first,
    ),
  ]


# --- the published method ---


def kron_variances(
  adjacencies: list[np.ndarray], features: list[np.ndarray]
) -> list[dict[str, Any]]:
  """Operators of each graph, and roots of its variances by layer."""
  sides = []
  for a, x in zip(adjacencies, features, strict=True):
    joined = a + np.eye(len(a))
    side = {"op": sparse.csr_array(joined), "x": x, "degree": joined.sum(1)}
    seen: list[np.ndarray] = []
    _walk(side, side, seen, None)
    sides.append(side | {"roots": seen})
  return sides


def kron_pairs(
  sides: list[dict[str, Any]], rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
  """The kernel of each pair."""
  return np.array(
    [
      _walk(sides[i], sides[j], None, (sides[i]["roots"], sides[j]["roots"]))
      for i, j in zip(rows, columns, strict=True)
    ]
  )


def _walk(
  side1: dict[str, Any],
  side2: dict[str, Any],
  seen: list[np.ndarray] | None,
  roots: tuple[list[np.ndarray], list[np.ndarray]] | None,
) -> float:
  both = sparse.kron(side1["op"], side2["op"], format="csr")
  scale = 1 / np.outer(side1["degree"], side2["degree"])
  cov = side1["x"] @ side2["x"].T
  ntk, total = cov, cov.sum()
  for block in range(_BLOCKS):
    cov = (both @ cov.ravel()).reshape(scale.shape) * scale
    ntk = (both @ ntk.ravel()).reshape(scale.shape) * scale if block else cov
    for layer in range(_LAYERS):
      if roots is None:
        root1 = root2 = np.sqrt(np.diagonal(cov))
        assert seen is not None
        seen.append(root1)
      else:
        step = block * _LAYERS + layer
        root1, root2 = roots[0][step], roots[1][step]
      size = np.outer(root1, root2)
      rho = np.clip(cov / size, -1, 1)
      dot = 1 - np.arccos(rho) / np.pi
      cov = size * (rho * dot + np.sqrt(1 - rho * rho) / np.pi)
      ntk = ntk * dot + cov
    total += ntk.sum()
  return float(total)


# --- graphs ---


def molecule_like(num: int) -> list[Any]:
  """Trees of 8 to 28 nodes, 17 on average, with a ring or two."""
  rng = np.random.default_rng(0)
  graphs = []
  for _ in range(num):
    n = int(np.clip(rng.normal(17.4, 4.5), 8, 28))
    graph = networkx.random_labeled_tree(n, seed=int(rng.integers(1 << 30)))
    graph.add_edges_from(rng.choice(n, (2, 2), replace=False))
    graphs.append(graph)
  return graphs


def _agree(ours: np.ndarray, peer: np.ndarray, name: str) -> None:
  gap = float(np.abs(ours / peer - 1).max())
  print(f"{name}: largest relative difference {gap:.1e}")


def _first_call(call: Callable[[], Any]) -> float:
  """Seconds of a call for which everything is compiled."""

  def run() -> Any:
    jax.clear_caches()
    return call()

  return _race.race({"ours": run}, rounds=1)["ours"][0]


if __name__ == "__main__":
  app.run(main)
