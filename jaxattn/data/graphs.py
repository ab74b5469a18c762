r"""Graphs as arrays: padded batches, and graphs that ship in packages or files.

A graph is a symmetric adjacency matrix A without self-loops and a row of
features for each node. Kernels and networks see :math:`S = \operatorname{diag}
(c) (A + I)`, with c = 1 or one over the row sums of A + I.
"""

import importlib
import itertools
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxattn import _checks
from jaxattn.ntk import GraphBatch

_AGGREGATES = ("uniform", "degree")
# Atoms nearer than this many times the sum of their covalent radii are bonded.
_BOND = 1.25

__all__ = ["from_networkx", "load_g2_molecules", "load_tu", "pad_graphs"]


def pad_graphs(
  adjacency_list: Sequence[ArrayLike],
  feature_list: Sequence[ArrayLike],
  *,
  aggregate: str = "uniform",
  max_nodes: int | None = None,
  weights: bool = False,
) -> GraphBatch:
  r"""Puts graphs of different sizes into one batch.

  Args:
    adjacency_list: G matrices, (n_g, n_g), symmetric, zero on the diagonal: a
      node joins its own neighbors here.
    feature_list: G arrays, (n_g, p).
    aggregate: c of the module: ``"uniform"``, neighbors are added up, or
      ``"degree"``, averaged.
    max_nodes: N; None = that of the largest graph.
    weights: permit entries other than 0 and 1, not negative; a node has the
      weight 1 to itself, and ``"degree"`` divides by sums of weights.

  Returns:
    A :class:`jaxattn.ntk.GraphBatch`, of the dtype of the features if that is
    floating, else float32. Nodes come first, padding after them.

  Raises:
    ValueError: if there is no graph, or one is empty, not symmetric (directed),
      has self-loops, or weights that are not permitted; if features do not fit
      their graph or each other or are no finite numbers, or ``max_nodes`` is
      too small.

  Cost:
    O(G N (N + p)), on the host.

  Source:
    arXiv 1905.13192, section 3, for the two kinds of aggregation.

  Example:
    >>> import numpy as np
    >>> from jaxattn.data import pad_graphs
    >>> edge = np.array([[0, 1], [1, 0]])
    >>> batch = pad_graphs([edge], [np.eye(2)], aggregate="degree", max_nodes=3)
    >>> print(batch.op[0], batch.mask[0])
    [[0.5 0.5 0. ]
     [0.5 0.5 0. ]
     [0.  0.  0. ]] [ True  True False]
  """
  _checks.check_choice("aggregate", aggregate, _AGGREGATES)
  _checks.check_choice("weights", weights, (False, True))
  if len(adjacency_list) != len(feature_list) or not len(feature_list):
    raise ValueError(
      "adjacency_list and feature_list must have one length, at least 1, got "
      f"{len(adjacency_list)} and {len(feature_list)}"
    )
  adjacencies = [
    _adjacency(i, a, weights) for i, a in enumerate(adjacency_list)
  ]
  features = [np.asarray(x) for x in feature_list]
  for i, (a, x) in enumerate(zip(adjacencies, features, strict=True)):
    _check_features(i, x, len(a), features[0])
  largest = max(map(len, adjacencies))
  n = largest if max_nodes is None else max_nodes
  _checks.check_integer("max_nodes", n, 1, None)
  if n < largest:
    raise ValueError(
      f"max_nodes must be at least {largest}, the nodes of the largest graph, "
      f"got {n}"
    )
  return _padded(adjacencies, features, n, aggregate)


def from_networkx(
  graphs: Iterable[Any],
  *,
  features: str = "degree",
  weight: str | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Reads networkx graphs into lists for :func:`pad_graphs`.

  Args:
    graphs: undirected, with one edge at most between two nodes; nodes in their
      order of iteration.
    features: ``"degree"``, one-hot of the number of neighbors; ``"onehot"``, of
      the position of the node; or the name of an attribute of the nodes, whose
      numbers or vectors are taken as they are and whose strings become
      one-hot, in sorted order.
    weight: name of an attribute of the edges, for ``pad_graphs(weights=True)``;
      None = each edge counts 1.

  Returns:
    Adjacency matrices, (n_g, n_g) float64, and features, (n_g, p) float64. What
    a column of one-hot features stands for depends on all graphs that are read:
    read those to train and to test on in one call.

  Raises:
    ValueError: if there is no graph, or one is directed or a multigraph, or a
      node has no such attribute, or an edge has none.

  Cost:
    O(nodes^2 + edges) a graph.

  Source:
    arXiv 1905.13192, section 5, for degrees as features.

  Example:
    >>> import networkx
    >>> from jaxattn.data import from_networkx, pad_graphs
    >>> adjacencies, features = from_networkx([networkx.star_graph(3)])
    >>> print(features[0].argmax(1))
    [3 1 1 1]
    >>> pad_graphs(adjacencies, features).op.shape
    (1, 4, 4)
  """
  graphs = list(graphs)
  if not graphs:
    raise ValueError("graphs must not be empty")
  adjacencies = [_nx_adjacency(i, g, weight) for i, g in enumerate(graphs)]
  if features == "degree":
    # A self-loop makes no neighbor; networkx's degree counts it twice.
    degrees = [
      np.asarray([len(set(g[u]) - {u}) for u in g.nodes]) for g in graphs
    ]
    return adjacencies, _one_hot(degrees, range(max(map(max, degrees)) + 1))
  if features == "onehot":
    places = [np.arange(len(a)) for a in adjacencies]
    return adjacencies, _one_hot(places, range(max(map(len, adjacencies))))
  values = [_nx_attribute(i, g, features) for i, g in enumerate(graphs)]
  if any(isinstance(x, str) for row in values for x in row):
    kinds = sorted({x for row in values for x in row})
    return adjacencies, _one_hot([np.asarray(row) for row in values], kinds)
  return adjacencies, [
    np.asarray(row, np.float64).reshape(len(row), -1) for row in values
  ]


def load_tu(
  path: str | os.PathLike[str],
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
  """Reads a data set in the format of TU Dortmund's collection.

  A folder ``DS`` with ``DS_A.txt``, ``DS_graph_indicator.txt`` and
  ``DS_graph_labels.txt``. Features are one-hot of ``DS_node_labels.txt``; where
  there is none, the numbers of ``DS_node_attributes.txt``, which are not read
  otherwise; where there is neither, one-hot of the number of neighbors.

  Args:
    path: the folder, which has the name of the set. Its files are not shipped.

  Returns:
    Adjacency matrices and features, lists for :func:`pad_graphs`, and labels,
    (G,), as they stand in the file. Edges count once and self-loops not.

  Raises:
    FileNotFoundError: if a file is missing, naming it.
    ValueError: if files do not fit each other.

  Cost:
    O(nodes^2) memory a graph.

  Source:
    arXiv 2007.08663, for the format.

  Example:
    >>> from jaxattn.data import load_tu
    >>> adjacencies, features, labels = load_tu("MUTAG")  # doctest: +SKIP
  """
  folder = pathlib.Path(path)
  edges = _tu_table(folder, "A", int)
  graph_of = _tu_table(folder, "graph_indicator", int)[:, 0] - 1
  labels = _tu_table(folder, "graph_labels", float)[:, 0]
  num = len(labels)
  counts = np.bincount(graph_of, minlength=num)
  if (np.diff(graph_of) < 0).any() or len(counts) != num or not counts.all():
    raise ValueError(
      f"{folder.name}_graph_indicator.txt must hold 1 to {num}, sorted, for "
      f"the {num} graphs of {folder.name}_graph_labels.txt"
    )
  ends = edges.T - 1
  inside = ((ends >= 0) & (ends < len(graph_of))).all()
  if not inside or np.ptp(graph_of[ends], axis=0).any():
    raise ValueError(
      f"{folder.name}_A.txt must join nodes 1 to {len(graph_of)} of one graph"
    )
  starts = np.concatenate([[0], np.cumsum(counts)])
  adjacencies = [np.zeros((n, n)) for n in counts]
  for u, v in edges[edges[:, 0] != edges[:, 1]] - 1:
    a, first = adjacencies[graph_of[u]], starts[graph_of[u]]
    a[u - first, v - first] = a[v - first, u - first] = 1
  features = _tu_features(folder, adjacencies, starts)
  return adjacencies, features, labels


def load_g2_molecules() -> tuple[
  list[np.ndarray], list[np.ndarray], np.ndarray
]:
  """Returns the G2/97 molecules, with their enthalpies of formation.

  Those of at least two atoms and a measured enthalpy. Atoms are nodes, with
  one-hot features of their element, in alphabetical order; those nearer than
  1.25 times the sum of their covalent radii are joined.

  Returns:
    Adjacency matrices and features, lists for :func:`pad_graphs`, and
    enthalpies at 298 K, (G,), in kcal/mol; in the order of names.

  Raises:
    ImportError: if ase is missing, naming the extra that brings it.

  Cost:
    Milliseconds, once ase is imported.

  Source:
    Curtiss et al., J. Chem. Phys. 106, 1063 (1997); ase's copy of it.

  Example:
    >>> from jaxattn.data import load_g2_molecules
    >>> adjacencies, features, enthalpies = (
    ...   load_g2_molecules()
    ... )  # doctest: +SKIP
  """
  tables, symbols_of = _ase()
  kept = {
    name: molecule
    for name, molecule in sorted(tables.g2.data.items())
    if molecule.get("enthalpy") is not None and len(molecule["positions"]) > 1
  }
  symbols = {name: symbols_of(m["symbols"]) for name, m in kept.items()}
  adjacencies = []
  for name, molecule in kept.items():
    place = np.asarray(molecule["positions"], float)
    numbers = [tables.atomic_numbers[s] for s in symbols[name]]
    radius = np.asarray(tables.covalent_radii)[numbers]
    distance = np.linalg.norm(place[:, None] - place[None], axis=-1)
    bonded = distance < _BOND * (radius[:, None] + radius[None])
    adjacencies.append((bonded & ~np.eye(len(place), dtype=bool)).astype(float))
  elements = sorted({s for row in symbols.values() for s in row})
  features = _one_hot([np.asarray(row) for row in symbols.values()], elements)
  enthalpies = [molecule["enthalpy"] for molecule in kept.values()]
  return adjacencies, features, np.asarray(enthalpies, float)


# --- checks ---


def _adjacency(i: int, a: ArrayLike, weights: bool) -> np.ndarray:
  a = np.asarray(a)
  if a.ndim != 2 or a.shape[0] != a.shape[1]:
    raise ValueError(
      f"pad_graphs: adjacency {i} must be square, got shape {a.shape}"
    )
  if not a.size:
    raise ValueError(f"pad_graphs: adjacency {i} is empty: a graph has a node")
  _check_numbers(f"adjacency {i}", a)
  if not np.isfinite(a).all():
    raise ValueError(f"pad_graphs: adjacency {i} has a non-finite entry")
  if (a != a.T).any():
    raise ValueError(
      f"pad_graphs: adjacency {i} is not symmetric: directed graphs have no "
      "such kernel"
    )
  if np.diagonal(a).any():
    raise ValueError(
      f"pad_graphs: adjacency {i} already has self-loops, which are added here"
    )
  if not weights and not np.isin(a, (0, 1)).all():
    raise ValueError(
      f"pad_graphs: adjacency {i} has entries other than 0 and 1; weights=True "
      "permits them"
    )
  if (a < 0).any():
    raise ValueError(f"pad_graphs: adjacency {i} has negative weights")
  return a


def _check_features(i: int, x: np.ndarray, n: int, first: np.ndarray) -> None:
  if x.ndim != 2 or len(x) != n:
    raise ValueError(
      f"pad_graphs: features {i} must be ({n}, p), a row for each node, got "
      f"shape {x.shape}"
    )
  if x.shape[1] != first.shape[1]:
    raise ValueError(
      f"pad_graphs: features {i} have p={x.shape[1]}, those of graph 0 have "
      f"p={first.shape[1]}"
    )
  _check_numbers(f"features {i}", x)
  if not np.isfinite(x.astype(np.float64)).all():
    raise ValueError(f"pad_graphs: features {i} have a non-finite entry")


def _check_numbers(what: str, x: np.ndarray) -> None:
  real = jnp.issubdtype(x.dtype, jnp.floating)
  if not real and not np.issubdtype(x.dtype, np.integer) and x.dtype != bool:
    raise ValueError(f"pad_graphs: {what} must be real numbers, got {x.dtype}")


def _padded(
  adjacencies: list[np.ndarray],
  features: list[np.ndarray],
  n: int,
  aggregate: str,
) -> GraphBatch:
  num, p = len(features), features[0].shape[1]
  dtype = jnp.result_type(*features)
  if not jnp.issubdtype(dtype, jnp.floating):
    dtype = jnp.float32
  op, x = np.zeros((num, n, n)), np.zeros((num, n, p), dtype)
  mask = np.zeros((num, n), bool)
  for i, (a, own) in enumerate(zip(adjacencies, features, strict=True)):
    s = a + np.eye(len(a))
    if aggregate == "degree":
      s /= s.sum(1, keepdims=True)
    op[i, : len(a), : len(a)], x[i, : len(a)] = s, own
    mask[i, : len(a)] = True
  return GraphBatch(jnp.asarray(op, dtype), jnp.asarray(x), jnp.asarray(mask))


# --- readers ---


def _one_hot(
  values: Sequence[np.ndarray], kinds: Iterable[Any]
) -> list[np.ndarray]:
  kinds = np.asarray(list(kinds))
  return [(row[:, None] == kinds[None]).astype(float) for row in values]


def _nx_adjacency(i: int, graph: Any, weight: str | None) -> np.ndarray:
  if graph.is_directed():
    raise ValueError(f"graph {i} must be undirected")
  if graph.is_multigraph():
    raise ValueError(
      f"graph {i} is a multigraph: one edge at most may join two nodes"
    )
  places = {u: place for place, u in enumerate(graph.nodes)}
  if not places:
    raise ValueError(f"graph {i} is empty: a graph has a node")
  a = np.zeros((len(places), len(places)))
  for u, v, data in graph.edges(data=True):
    if weight is not None and weight not in data:
      raise ValueError(f"edge {(u, v)} of graph {i} has no {weight!r}")
    size = 1.0 if weight is None else data[weight]
    a[places[u], places[v]] = a[places[v], places[u]] = size
  return a


def _nx_attribute(i: int, graph: Any, name: str) -> list[Any]:
  lacking = [u for u, data in graph.nodes(data=True) if name not in data]
  if lacking:
    raise ValueError(
      "features must be 'degree', 'onehot' or an attribute of all nodes, got "
      f"{name!r}, which node {lacking[0]!r} of graph {i} has not"
    )
  return [data[name] for _, data in graph.nodes(data=True)]


def _tu_table(folder: pathlib.Path, what: str, dtype: type) -> np.ndarray:
  file = folder / f"{folder.name}_{what}.txt"
  return np.loadtxt(file, delimiter=",", dtype=dtype, ndmin=2)


def _tu_features(
  folder: pathlib.Path, adjacencies: list[np.ndarray], starts: np.ndarray
) -> list[np.ndarray]:
  for what, dtype in (("node_labels", int), ("node_attributes", float)):
    if not (folder / f"{folder.name}_{what}.txt").exists():
      continue
    table = _tu_table(folder, what, dtype)
    if len(table) != starts[-1]:
      raise ValueError(
        f"{folder.name}_{what}.txt must have a line for each of {starts[-1]} "
        f"nodes, got {len(table)}"
      )
    rows = [table[a:b] for a, b in itertools.pairwise(starts)]
    if what == "node_attributes":
      return rows
    return _one_hot([row[:, 0] for row in rows], np.unique(table[:, 0]))
  degrees = [a.sum(1).astype(int) for a in adjacencies]
  return _one_hot(degrees, range(max(map(max, degrees)) + 1))


def _ase() -> tuple[Any, Any]:
  # An extra of this package, so not imported with it.
  try:
    tables = importlib.import_module("ase.data")
    importlib.import_module("ase.data.g2")
    symbols = importlib.import_module("ase.symbols")
  except ModuleNotFoundError as error:
    raise ImportError(
      "load_g2_molecules needs ase: pip install 'jaxattn[molecules]'"
    ) from error
  return tables, symbols.string2symbols
