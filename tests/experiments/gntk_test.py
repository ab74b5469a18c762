"""The experiment's own mathematics, its sizes, and its smallest run."""

import functools

import jax
import jax.numpy as jnp
import networkx
import numpy as np

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
