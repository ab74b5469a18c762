"""Graphs as arrays: what readers return, and what is refused."""

import re
import sys
import types

import networkx
import numpy as np
import pytest

from jaxattn.data import from_networkx, load_g2_molecules, load_tu, pad_graphs

_PATH = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])


# --- pad_graphs ---


def test_operators():
  two = np.array([[0, 1], [1, 0]])
  features = [np.arange(6.0).reshape(3, 2), np.ones((2, 2))]
  batch = pad_graphs([_PATH, two], features, max_nodes=4)
  assert batch.op.shape == (2, 4, 4)
  want = np.zeros((4, 4))
  want[:3, :3] = _PATH + np.eye(3)
  np.testing.assert_array_equal(batch.op[0], want)
  np.testing.assert_array_equal(batch.features[0, :3], features[0])
  np.testing.assert_array_equal(batch.mask.sum(1), [3, 2])
  for padding in (batch.op[1, 2:], batch.op[1, :, 2:], batch.features[1, 2:]):
    assert not padding.any()
  degree = pad_graphs([_PATH, two], features, aggregate="degree")
  assert degree.op.shape == (2, 3, 3)
  np.testing.assert_allclose(degree.op[0, 0], [0.5, 0.5, 0])
  np.testing.assert_allclose(degree.op[0, 1], [1 / 3] * 3)


def test_weights_and_dtypes():
  heavy = 2.0 * _PATH
  x = np.ones((3, 1), np.float32)
  batch = pad_graphs([heavy], [x], weights=True)
  np.testing.assert_array_equal(batch.op[0], heavy + np.eye(3))
  batch = pad_graphs([heavy], [x], weights=True, aggregate="degree")
  np.testing.assert_allclose(batch.op[0, 1], [0.4, 0.2, 0.4], rtol=1e-6)
  assert batch.op.dtype == batch.features.dtype == np.float32
  for given, want in ((np.float64, np.float64), (int, np.float32)):
    batch = pad_graphs([_PATH], [np.ones((3, 1), given)])
    assert batch.op.dtype == batch.features.dtype == want


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (
      np.ones((2, 3)),
      "pad_graphs: adjacency 1 must be square, got shape (2, 3)",
    ),
    (np.zeros((0, 0)), "pad_graphs: adjacency 1 is empty"),
    (np.triu(np.ones((3, 3)), 1), "pad_graphs: adjacency 1 is not symmetric"),
    (np.eye(3), "pad_graphs: adjacency 1 already has self-loops"),
    (2 * _PATH, "pad_graphs: adjacency 1 has entries other than 0 and 1"),
    (np.nan * _PATH, "pad_graphs: adjacency 1 has a non-finite entry"),
  ],
)
def test_refused_graphs(bad, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    pad_graphs([_PATH, bad], [np.ones((3, 1))] * 2)


def test_refused_rest():
  x = np.ones((3, 1))
  for args, options, message in (
    (([], []), {}, "must have one length, at least 1, got 0 and 0"),
    (([_PATH], [x, x]), {}, "must have one length, at least 1, got 1 and 2"),
    (
      ([_PATH], [x[1:]]),
      {},
      "features 0 must be (3, p), a row for each node, got shape (2, 1)",
    ),
    (([_PATH], [x[:, 0]]), {}, "features 0 must be (3, p)"),
    (
      ([_PATH] * 2, [x, np.nan * x]),
      {},
      "pad_graphs: features 1 have a non-finite entry",
    ),
    (([_PATH], [np.inf * x]), {}, "features 0 have a non-finite entry"),
    (
      ([_PATH], [x.astype(complex)]),
      {},
      "pad_graphs: features 0 must be real numbers, got complex128",
    ),
    (
      ([_PATH], [x.astype(str)]),
      {},
      "pad_graphs: features 0 must be real numbers, got <U",
    ),
    (
      ([_PATH.astype(str)], [x]),
      {},
      "pad_graphs: adjacency 0 must be real numbers, got <U",
    ),
    (
      ([_PATH] * 2, [x, np.ones((3, 2))]),
      {},
      "features 1 have p=2, those of graph 0 have p=1",
    ),
    (
      ([_PATH], [x]),
      {"max_nodes": 2},
      "max_nodes must be at least 3, the nodes of the largest graph, got 2",
    ),
    (([_PATH], [x]), {"aggregate": "max"}, "aggregate must be one of"),
    (([_PATH], [x]), {"weights": 1}, "weights must be one of False, True"),
    (
      ([-_PATH], [x]),
      {"weights": True},
      "pad_graphs: adjacency 0 has negative weights",
    ),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      pad_graphs(*args, **options)


# --- networkx ---


def test_features_of_networkx():
  star, path = networkx.star_graph(3), networkx.path_graph(["b", "a"])
  adjacencies, features = from_networkx([star, path])
  for graph, a in zip((star, path), adjacencies, strict=True):
    np.testing.assert_array_equal(a, networkx.to_numpy_array(graph))
  np.testing.assert_array_equal(features[0], np.eye(4)[[3, 1, 1, 1]])
  np.testing.assert_array_equal(features[1], np.eye(4)[[1, 1]])
  loop = networkx.Graph([(0, 1), (1, 1)])
  np.testing.assert_array_equal(from_networkx([loop])[1][0], np.eye(2)[[1, 1]])
  _, features = from_networkx([star, path], features="onehot")
  np.testing.assert_array_equal(features[1], np.eye(4)[:2])
  networkx.set_node_attributes(path, {"b": "N", "a": "C"}, "element")
  _, (element,) = from_networkx([path], features="element")
  np.testing.assert_array_equal(element, [[0, 1], [1, 0]])
  networkx.set_node_attributes(path, {"b": [1, 2], "a": [3, 4]}, "place")
  _, (place,) = from_networkx([path], features="place")
  np.testing.assert_array_equal(place, [[1, 2], [3, 4]])


def test_weights_of_networkx():
  club = networkx.karate_club_graph()
  (plain,), _ = from_networkx([club])
  assert set(np.unique(plain)) == {0, 1}
  (heavy,), _ = from_networkx([club], weight="weight")
  np.testing.assert_array_equal(heavy, networkx.to_numpy_array(club))


def test_refused_of_networkx():
  path = networkx.path_graph(2)
  for graphs, options, message in (
    ([], {}, "graphs must not be empty"),
    ([networkx.Graph()], {}, "graph 0 is empty"),
    ([path, networkx.DiGraph(path)], {}, "graph 1 must be undirected"),
    ([networkx.MultiGraph(path)], {}, "graph 0 is a multigraph"),
    ([path], {"weight": "size"}, "edge (0, 1) of graph 0 has no 'size'"),
    (
      [path],
      {"features": "color"},
      "features must be 'degree', 'onehot' or an attribute of all nodes, got "
      "'color', which node 0 of graph 0 has not",
    ),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      from_networkx(graphs, **options)


# --- files ---


def _write(folder, **tables):
  folder.mkdir(exist_ok=True)
  for what, text in tables.items():
    (folder / f"{folder.name}_{what}.txt").write_text(text)
  return folder


def test_files_of_tu(tmp_path):
  folder = _write(
    tmp_path / "SET",
    A="1, 2\n2, 1\n2, 3\n4, 5\n5, 4\n4, 4\n",
    graph_indicator="1\n1\n1\n2\n2\n",
    graph_labels="-1\n1\n",
  )
  adjacencies, features, labels = load_tu(folder)
  np.testing.assert_array_equal(adjacencies[0], _PATH)
  np.testing.assert_array_equal(adjacencies[1], [[0, 1], [1, 0]])
  np.testing.assert_array_equal(labels, [-1, 1])
  # Without labels of nodes, degrees.
  np.testing.assert_array_equal(features[0], np.eye(3)[[1, 2, 1]])
  _write(folder, node_attributes="0.5, 1\n2, 3\n4, 5\n6, 7\n8, 9\n")
  np.testing.assert_array_equal(load_tu(folder)[1][1], [[6, 7], [8, 9]])
  _write(folder, node_labels="3\n7\n3\n3\n7\n")
  np.testing.assert_array_equal(load_tu(str(folder))[1][1], np.eye(2))
  pad_graphs(*load_tu(folder)[:2])


def test_refused_files(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"SET_A\.txt"):
    load_tu(tmp_path / "SET")
  right = {
    "A": "1, 2\n",
    "graph_indicator": "1\n1\n2\n",
    "graph_labels": "0\n1\n",
  }
  for changed, message in (
    ({"A": "1, 3\n"}, "SET_A.txt must join nodes 1 to 3 of one graph"),
    ({"A": "0, 1\n"}, "SET_A.txt must join nodes 1 to 3 of one graph"),
    (
      {"graph_indicator": "1\n2\n1\n"},
      "SET_graph_indicator.txt must hold 1 to 2, sorted, for the 2 graphs",
    ),
    ({"graph_labels": "0\n"}, "SET_graph_indicator.txt must hold 1 to 1"),
    (
      {"node_labels": "0\n"},
      "SET_node_labels.txt must have a line for each of 3 nodes, got 1",
    ),
  ):
    folder = _write(tmp_path / "SET", **{**right, **changed})
    with pytest.raises(ValueError, match=re.escape(message)):
      load_tu(folder)


# --- molecules ---


def test_molecules():
  adjacencies, features, enthalpies = load_g2_molecules()
  assert len(adjacencies) == len(features) == len(enthalpies) == 148
  assert features[0].shape[1] == 14
  assert min(map(len, adjacencies)) == 2
  np.testing.assert_allclose(enthalpies.std(), 75, atol=0.5)
  for a in adjacencies:
    assert networkx.is_connected(networkx.from_numpy_array(a))
  pad_graphs(adjacencies, features)


def test_bonds_of_a_stand_in(monkeypatch):
  tables = types.ModuleType("ase.data")
  tables.g2 = types.ModuleType("ase.data.g2")
  tables.atomic_numbers = {"H": 1, "O": 2}
  tables.covalent_radii = [0.0, 0.4, 0.6]
  tables.g2.data = {
    "water": {
      "symbols": "OHH",
      "positions": [[0, 0, 0], [1.2, 0, 0], [0, 1.24, 0]],
      "enthalpy": -58.0,
    },
    "atom": {"symbols": "O", "positions": [[0, 0, 0]], "enthalpy": 1.0},
    "far": {
      "symbols": "HH",
      "positions": [[0, 0, 0], [0, 0, 1.01]],
      "enthalpy": 2.0,
    },
    "unknown": {"symbols": "HH", "positions": [[0, 0, 0], [0, 0, 1]]},
  }
  symbols = types.ModuleType("ase.symbols")
  symbols.string2symbols = list
  for module in (tables, tables.g2, symbols):
    monkeypatch.setitem(sys.modules, module.__name__, module)
  monkeypatch.setitem(sys.modules, "ase", types.ModuleType("ase"))
  adjacencies, features, enthalpies = load_g2_molecules()
  np.testing.assert_array_equal(enthalpies, [2, -58])
  np.testing.assert_array_equal(adjacencies[0], np.zeros((2, 2)))
  np.testing.assert_array_equal(
    adjacencies[1], [[0, 1, 1], [1, 0, 0], [1, 0, 0]]
  )
  np.testing.assert_array_equal(features[1], [[0, 1], [1, 0], [1, 0]])


def test_missing_ase_is_explained(monkeypatch):
  monkeypatch.setitem(sys.modules, "ase", None)
  for name in [name for name in sys.modules if name.startswith("ase.")]:
    monkeypatch.delitem(sys.modules, name)
  message = r"load_g2_molecules needs ase: pip install 'jaxattn\[molecules\]'"
  with pytest.raises(ImportError, match=message):
    load_g2_molecules()
