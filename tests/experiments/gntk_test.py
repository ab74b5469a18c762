"""The experiment's own mathematics, its sizes, and its smallest run."""

import functools

import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pytest

from experiments import gntk as experiment
from experiments import harness
from jaxattn.data import from_networkx
from jaxattn.ntk import GraphBatch, graph_gntk
from tests.experiments import smoke

_CONFIG = "configs/gntk.py"


def test_numbers_of_graphs():
  for graph in (networkx.complete_graph(5), networkx.cycle_graph(6)):
    (a,), _ = from_networkx([graph])
    trees, gap = experiment._numbers(a)
    want = networkx.number_of_spanning_trees(graph)
    np.testing.assert_allclose(np.exp(trees), want, rtol=1e-10)
    np.testing.assert_allclose(gap, networkx.algebraic_connectivity(graph))


def test_colors_are_those_of_weisfeiler_and_lehman():
  ring = networkx.cycle_graph(6)
  rings = networkx.disjoint_union(*[networkx.cycle_graph(3)] * 2)
  path = networkx.path_graph(6)
  graphs = from_networkx([ring, rings, path])
  counts = experiment.color_counts(*graphs, 2)
  np.testing.assert_array_equal(counts[0], counts[1])
  # Each iteration colors each node once.
  np.testing.assert_array_equal(counts.sum(1), 18)
  # Of a path: ends and inner nodes, then next to an end or not, then thirds.
  np.testing.assert_array_equal(
    np.sort(counts[2][counts[2] > 0]), [2] * 7 + [4]
  )


def test_predictions_are_those_of_ridge_regression():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(12, 3)), rng.normal(size=12)
  config = harness.load_config(f"{_CONFIG}:cpu")
  config.ridges = (0.1,)
  fit, rest = np.arange(8), np.arange(8, 12)
  gram = x @ x.T
  got = experiment.predict(config, gram, y, fit, rest)
  a = gram[:8, :8] + 0.1 * np.trace(gram[:8, :8]) / 8 * np.eye(8)
  mean = y[:8].mean()
  want = mean + gram[8:, :8] @ np.linalg.solve(a, y[:8] - mean)
  np.testing.assert_allclose(got, want, rtol=1e-10)
  # Of what is linear nothing is left.
  y = 2 + x @ [1.0, -2.0, 0.5]
  got = experiment.least_squares(x, y, fit, rest)
  np.testing.assert_allclose(got, y[rest], rtol=1e-10)


def test_members_of_the_club():
  found = experiment.club_point(harness.load_config(f"{_CONFIG}:cpu"))
  np.testing.assert_allclose(found["two labels"], 31 / 32)
  np.testing.assert_allclose(found["one left out"], 33 / 34)


def _write_set(folder):
  """20 graphs in TU Dortmund's format: rings and paths of 3 to 7 nodes."""
  folder.mkdir()
  edges, graph_of, first = [], [], 1
  for i in range(20):
    n = 3 + i // 2 % 5
    places = [(j, j + 1) for j in range(n - 1)] + [(n - 1, 0)] * (i % 2)
    edges += [(first + u, first + v) for u, v in places]
    graph_of += [i + 1] * n
    first += n
  for what, rows in (
    ("A", [f"{u}, {v}" for u, v in edges]),
    ("graph_indicator", graph_of),
    ("graph_labels", [i % 2 for i in range(20)]),
  ):
    file = folder / f"{folder.name}_{what}.txt"
    file.write_text("".join(f"{row}\n" for row in rows))
  return str(folder)


def test_sets_of_the_user(tmp_path):
  path = _write_set(tmp_path / "RINGS")
  config = harness.load_config(f"{_CONFIG}:cpu")
  config.tu_blocks, config.tu_layers, config.tu_num_c = (1,), (1,), 2
  # Rings have no ends.
  found = experiment.tu_point(config, path)
  assert found == {"accuracy": 100.0, "deviation": 0.0}
  assert experiment.tu_folders(f"{path},") == {"RINGS": path}
  with pytest.raises(ValueError, match="tu must name folders, got"):
    experiment.tu_folders(f"{path},{path}_not")
  other = tmp_path / "b" / "RINGS"
  other.mkdir(parents=True)
  with pytest.raises(ValueError, match="folders of tu must differ in name"):
    experiment.tu_folders(f"{path},{other}")


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  num, n, blocks = config.large
  sizes = (num, n, n), (num, n, n), (num, n)
  batch = GraphBatch(
    *(
      jax.ShapeDtypeStruct(size, dtype)
      for size, dtype in zip(sizes, (jnp.float32, jnp.float32, jnp.bool_))
    )
  )
  gram = functools.partial(graph_gntk, num_blocks=blocks, num_mlp_layers=1)
  assert jax.eval_shape(gram, batch).shape == (num, num)
  for level in ("graphs", "nodes"):
    data, targets, seen = experiment.problem(config, level)
    n = len(targets)
    network = functools.partial(experiment.one_network, config, level, data)
    found = jax.eval_shape(
      functools.partial(network, rate=0.1, width=max(config.widths)),
      jax.ShapeDtypeStruct((n,), jnp.float32),
      jnp.asarray(seen),
      jax.ShapeDtypeStruct((n, n), jnp.float32),
      jax.random.key(0),
      want=jax.ShapeDtypeStruct((n,), jnp.float32),
    )
    assert set(found) == {"kernel", "train", "test"}


def test_smoke(tmp_path):
  smoke.run_twice("gntk", tmp_path / "a", num_checks=6)
