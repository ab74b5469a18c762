"""Kernels of graphs: loops over nodes, the public code's numbers, symmetry."""

import functools
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pytest
from jax.experimental import sparse

from jaxattn.data import from_networkx, pad_graphs
from jaxattn.ntk import (
  GraphBatch,
  graph_gntk,
  mlp_ntk,
  node_gntk,
  self_covariances,
)
from jaxattn.ntk import graph as graph_module
from tests._recompile import no_recompilation
from tests.ntk._graphs import atlas, literal_gntk

_AGGREGATES = ("uniform", "degree")
_REFERENCE = pathlib.Path(__file__).parent / "gntk_reference.npz"


def _batch(num=6, dtype="float64", **options):
  adjacencies, features = atlas(num)
  return pad_graphs(adjacencies, [x.astype(dtype) for x in features], **options)


def _at(batch, index):
  return GraphBatch(*(x[index] for x in batch))


# --- values ---


def test_single_nodes_by_hand():
  rho = np.array([-0.5, 0.0, 0.3, 1.0])
  other = np.stack([rho, np.sqrt(1 - rho**2)], 1)
  empty = np.zeros((1, 1))
  left = pad_graphs([empty], [np.array([[1.0, 0.0]])])
  right = pad_graphs([empty] * 4, list(other[:, None]))
  got = graph_gntk(left, right, num_blocks=1, num_mlp_layers=1, jumping=False)
  angle = np.arccos(rho)
  want = rho * (np.pi - angle) + rho * (np.pi - angle) + np.sin(angle)
  np.testing.assert_allclose(got[0], want / np.pi, rtol=1e-14, atol=1e-15)
  np.testing.assert_allclose(got[0, [1, 3]], [1 / np.pi, 2], rtol=1e-14)


@pytest.mark.parametrize("layers", [1, 2])
def test_loops_over_nodes(layers):
  adjacencies, features = atlas(12)
  keys = list(itertools.product((1, 2, 3), (False, True)))

  @jax.jit
  def kernels(batch):
    return [
      graph_gntk(batch, num_blocks=b, num_mlp_layers=layers, jumping=j)
      for b, j in keys
    ]

  for aggregate in _AGGREGATES:
    want = literal_gntk(
      adjacencies, features, aggregate=aggregate, layers=layers, blocks=3
    )
    got = kernels(pad_graphs(adjacencies, features, aggregate=aggregate))
    for key, gram in zip(keys, got, strict=True):
      np.testing.assert_allclose(gram, want[key], rtol=1e-12)


def test_nodes_that_look_alike_in_extended_precision():
  """Where the loop in double precision rounds as the kernel does."""
  adjacencies, features = atlas(3)
  want = literal_gntk(
    adjacencies, features, aggregate="degree", layers=2, blocks=2, exact=True
  )
  batch = pad_graphs(adjacencies, features, aggregate="degree")
  got = graph_gntk(batch, num_blocks=2, num_mlp_layers=2)
  np.testing.assert_allclose(got, want[2, True], rtol=1e-14)


# The numbers of 20 pairs were made once, in float64, by the code published with
# arXiv 1905.13192 on graphs of tests/ntk/_graphs.py, and are kept as they came.
@pytest.mark.parametrize(
  ("dtype", "rtol"), [("float64", 1e-9), ("float32", 5e-5)]
)
def test_numbers_of_the_public_implementation(dtype, rtol):
  """Which are twice these kernels."""
  with np.load(_REFERENCE) as reference:
    numbers = {key: reference[key] for key in reference.files}
  archs = sorted({tuple(x) for x in numbers["arch"].tolist()})
  batches = {a: _batch(12, dtype, aggregate=a) for a in _AGGREGATES}

  @jax.jit
  def kernels(batches):
    return [
      graph_gntk(
        batches[_AGGREGATES[degree]],
        num_blocks=blocks,
        num_mlp_layers=layers,
        jumping=bool(jumping),
      )
      for blocks, layers, jumping, degree in archs
    ]

  grams = dict(zip(archs, kernels(batches), strict=True))
  got = [
    2 * grams[tuple(arch)][i, j]
    for arch, (i, j) in zip(
      numbers["arch"].tolist(), numbers["pair"].tolist(), strict=True
    )
  ]
  assert len(got) == 20
  np.testing.assert_allclose(np.array(got), numbers["value"], rtol=rtol)


def test_buckets_and_chunks_are_only_speed(monkeypatch):
  monkeypatch.setattr(graph_module, "_FEWEST", 2)
  adjacencies, features = from_networkx(
    [networkx.path_graph(n) for n in (3, 12, 5, 20, 9, 4, 17)],
  )
  batch = pad_graphs(adjacencies, features, aggregate="degree")
  sizes = graph_module._buckets(batch.mask)[1]
  assert sizes == ((3, 8), (2, 16), (2, 20))
  call = functools.partial(graph_gntk, num_blocks=1, num_mlp_layers=1)
  # Sizes that are not known: one bucket.
  want = jax.jit(call)(batch)
  np.testing.assert_allclose(call(batch), want, rtol=1e-12)
  part = call(_at(batch, slice(4)), _at(batch, slice(2, None)), chunk_size=2)
  np.testing.assert_allclose(part, want[:4, 2:], rtol=1e-12)


# --- symmetries ---


@functools.partial(jax.jit, static_argnames="jumping")
def _gram(batch1, batch2=None, jumping=True):
  return graph_gntk(
    batch1, batch2, num_blocks=2, num_mlp_layers=2, jumping=jumping
  )


def test_padding_order_of_nodes_and_of_graphs():
  want = _gram(_batch(max_nodes=7))
  call = functools.partial(graph_gntk, num_blocks=2, num_mlp_layers=2)
  for n in (7, 16):
    got = call(_batch(max_nodes=n))
    np.testing.assert_allclose(got, want, rtol=1e-12)
  # One bucket of 16, most of it padding.
  padded = _gram(_batch(max_nodes=16))
  np.testing.assert_allclose(padded, want, rtol=1e-12)
  rng = np.random.default_rng(0)
  adjacencies, features = atlas(6)
  orders = [rng.permutation(len(a)) for a in adjacencies]
  turned = pad_graphs(
    [a[p][:, p] for a, p in zip(adjacencies, orders)],
    [x[p] for x, p in zip(features, orders)],
  )
  np.testing.assert_allclose(_gram(turned), want, rtol=1e-12)
  order = rng.permutation(6)
  moved = _gram(_at(_batch(), order))
  np.testing.assert_allclose(moved, want[order][:, order], rtol=1e-12)


def test_positive_semidefinite_and_normalized():
  batch = _batch(24)
  first, rest = _at(batch, slice(10)), _at(batch, slice(10, None))
  call = functools.partial(graph_gntk, num_blocks=2, num_mlp_layers=1)

  @jax.jit
  def grams(batch, first, rest):
    nothing = batch._replace(features=jnp.zeros_like(batch.features))
    unit = (call(x, normalize=True) for x in (batch, nothing))
    return call(batch), call(first, rest), *unit

  gram, block, unit, zero = grams(batch, first, rest)
  sizes = np.linalg.eigvalsh(gram)
  assert sizes[0] >= -1e-10 * sizes[-1]
  np.testing.assert_allclose(block, gram[:10, 10:], rtol=1e-12)
  root = np.sqrt(np.diagonal(gram))
  np.testing.assert_allclose(unit, gram / np.outer(root, root), rtol=1e-12)
  np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize("jumping", [False, True])
def test_what_colors_of_neighbors_cannot_tell(jumping):
  ring = networkx.cycle_graph(6)
  rings = networkx.disjoint_union(*[networkx.cycle_graph(3)] * 2)
  adjacencies, _ = from_networkx([ring, rings, networkx.path_graph(6)])
  constant = [np.ones((6, 1))] * 3
  marked = [np.stack([np.ones(6), np.eye(6)[0]], 1)] * 3

  @jax.jit
  def grams(batch):
    return [
      graph_gntk(batch, num_blocks=b, num_mlp_layers=1, jumping=jumping)
      for b in (1, 2, 3)
    ]

  for gram in grams(pad_graphs(adjacencies, constant)):
    np.testing.assert_allclose(gram[0], gram[1], rtol=1e-12)
  # One block tells how many neighbors have the mark: 3 here and there.
  once, *more = grams(pad_graphs(adjacencies, marked))
  np.testing.assert_allclose(once[0], once[1], rtol=1e-12)
  for gram in more:
    assert abs(gram[0] / gram[1] - 1).max() > 1e-4


def test_variances():
  batch = _batch(6, max_nodes=9)
  got = self_covariances(batch, num_blocks=2, num_mlp_layers=2)
  assert got.shape == (4, 6, 9)
  inner = batch.op @ batch.features
  np.testing.assert_allclose(got[0], jnp.square(inner).sum(-1), rtol=1e-14)
  # A layer keeps them, an aggregation does not.
  np.testing.assert_array_equal(got[0], got[1])
  np.testing.assert_array_equal(got[2], got[3])
  assert not np.asarray(got)[:, ~np.asarray(batch.mask)].any()
  assert np.asarray(got)[:, np.asarray(batch.mask)].all()
  # What a graph of one block has before its layers, and after.
  first = batch.op[0], batch.features[0]
  nngp = node_gntk(*first, num_blocks=1, num_mlp_layers=3, kind="nngp")
  np.testing.assert_allclose(jnp.diag(nngp), got[0, 0], rtol=1e-14)


def test_what_is_not_there_is_not_seen():
  batch = _batch(6, max_nodes=8)
  lost = ~batch.mask
  poisoned = batch._replace(
    op=jnp.where(lost[:, None] | lost[:, :, None], jnp.nan, batch.op),
    features=jnp.where(lost[..., None], jnp.nan, batch.features),
  )

  def total(features, batch):
    batch = batch._replace(features=features)
    return graph_gntk(batch, num_blocks=2, num_mlp_layers=1).sum()

  both = jax.jit(jax.value_and_grad(total))
  want, slope = both(batch.features, batch)
  got, same = both(poisoned.features, poisoned)
  np.testing.assert_allclose(got, want, rtol=1e-14)
  np.testing.assert_allclose(same, slope, rtol=1e-13)
  # Derivatives are those, though nodes that look alike have the angle 0: the
  # kernel has a kink there, which only differences on both sides do not see,
  # and below this step the rounding of angles.
  side = (
    np.random.default_rng(0).normal(size=slope.shape) * batch.mask[..., None]
  )
  h = 1e-5
  up, down = (both(batch.features + s * side, batch)[0] for s in (h, -h))
  np.testing.assert_allclose(
    (slope * side).sum(), (up - down) / 2 / h, rtol=1e-6
  )


# --- nodes, and MLPs ---


def test_one_block_is_an_mlp():
  batch = _batch(3, aggregate="degree")
  op, x = batch.op[2], batch.features[2]
  p = x.shape[1]
  got = node_gntk(op, x, num_blocks=1, num_mlp_layers=3)
  nngp = node_gntk(op, x, num_blocks=1, num_mlp_layers=3, kind="nngp")
  # Whose first layer divides by the number of inputs.
  want = mlp_ntk(op @ x, depth=3)
  np.testing.assert_allclose(nngp, p * want[0], rtol=1e-12)
  np.testing.assert_allclose(got, p * want[1], rtol=1e-12)


def test_without_edges_a_sum_of_mlp_kernels():
  rng = np.random.default_rng(0)
  features = [rng.normal(size=(n, 3)) for n in (2, 5, 3)]
  batch = pad_graphs([np.zeros((len(x), len(x))) for x in features], features)
  got = graph_gntk(batch, num_blocks=2, num_mlp_layers=2, jumping=False)
  _, ntk = mlp_ntk(np.concatenate(features), depth=4)
  sums = np.add.reduceat(np.add.reduceat(3 * ntk, [0, 2, 7], 0), [0, 2, 7], 1)
  np.testing.assert_allclose(got, sums, rtol=1e-12)


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_nodes_of_a_graph_are_those_of_its_sum(kind, monkeypatch):
  batch = _batch(6, aggregate="degree")
  op, x = batch.op[5], batch.features[5]
  options = {"num_blocks": 2, "num_mlp_layers": 2, "kind": kind}
  for jumping in (False, True):
    nodes = node_gntk(op, x, jumping=jumping, **options)
    both = _at(batch, slice(5, 6))
    total = graph_gntk(both, jumping=jumping, **options)
    np.testing.assert_allclose(nodes.sum(), total[0, 0], rtol=1e-12)
    # With places for entries that there are not.
    matrix = sparse.BCOO.fromdense(op, nse=60)
    thin = node_gntk(matrix, x, jumping=jumping, **options)
    np.testing.assert_allclose(thin, nodes, rtol=1e-12)
  assert not isinstance(graph_module._sparse_if_large(op), sparse.BCOO)
  monkeypatch.setattr(graph_module, "_DENSE_NODES", 6)
  assert isinstance(graph_module._sparse_if_large(op), sparse.BCOO)
  # As many entries as rows: more than are worth it.
  monkeypatch.setattr(graph_module, "_SPARSE_ROW", 1)
  assert not isinstance(graph_module._sparse_if_large(op), sparse.BCOO)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_that_goes_in_comes_out(dtype):
  got = _gram(_batch(6, dtype, aggregate="degree"))
  assert got.dtype == dtype
  exact = _gram(_batch(6, aggregate="degree"))
  np.testing.assert_allclose(got.astype("float64"), exact, rtol=0.01)


def test_compiles_once():
  call = functools.partial(graph_gntk, num_blocks=1, num_mlp_layers=1)
  first, second = _batch(6), _batch(6, aggregate="degree")
  call(first)
  with no_recompilation():
    call(second)


# --- what is refused ---


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_blocks": 0}, "num_blocks must be >= 1, got 0"),
    ({"num_mlp_layers": 0}, "num_mlp_layers must be >= 1, got 0"),
    ({"jumping": 2}, "jumping must be one of False, True, got 2"),
    ({"kind": "ridge"}, "kind must be one of 'ntk', 'nngp', got 'ridge'"),
    ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
    ({"normalize": None}, "normalize must be one of False, True, got None"),
  ],
)
def test_refused_options(change, message):
  options = {"num_blocks": 1, "num_mlp_layers": 1, **change}
  with pytest.raises(ValueError, match=re.escape(message)):
    graph_gntk(_batch(), **options)


def test_refused_batches():
  batch = _batch()
  n = batch.mask.shape[1]
  call = functools.partial(graph_gntk, num_blocks=1, num_mlp_layers=1)
  fewer = batch._replace(features=batch.features[..., 1:])
  size = batch.features.shape[2]
  for args, message in (
    (
      (batch, fewer),
      "features of batch1 and batch2 must have one size, got "
      f"p={size} and p={size - 1}",
    ),
    ((batch, _batch(dtype="float32")), "all arrays must have one dtype"),
    (
      (batch._replace(op=batch.op[:, 1:]),),
      f"op of batch1 must have shape (6, {n}, {n}) = (G, N, N)",
    ),
    ((batch._replace(features=batch.mask),), "features of batch1 must have 3"),
    (
      (_at(batch, slice(0)),),
      f"features of batch1 must not be empty, got shape (0, {n}, {size})",
    ),
    ((batch, batch._replace(mask=batch.mask[:5])), "mask of batch2 must have"),
    (
      (batch._replace(mask=batch.op[..., 0]),),
      "mask of batch1 must be boolean (True = a node), got float64",
    ),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      call(*args)
  with pytest.raises(ValueError, match=r"op must have shape \(7, 7\)"):
    node_gntk(
      batch.op[0, 1:], batch.features[0], num_blocks=1, num_mlp_layers=1
    )
  with pytest.raises(ValueError, match="op must be sparse in all its axes"):
    node_gntk(
      sparse.BCOO.fromdense(batch.op[0], n_dense=1),
      batch.features[0],
      num_blocks=1,
      num_mlp_layers=1,
    )
  with pytest.raises(ValueError, match="op of batch must have shape"):
    self_covariances(
      batch._replace(op=batch.op[0]), num_blocks=1, num_mlp_layers=1
    )
