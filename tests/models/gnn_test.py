"""Graph networks: by loops, their kernels, and what those say of training."""

import functools
import re

import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pytest

from jaxattn.data import from_networkx, pad_graphs
from jaxattn.models import gnn_apply, gnn_init, gnn_with_taps, train_gnn
from jaxattn.ntk import empirical_ntk, graph_gntk, node_gntk, structured_ntk
from jaxattn.scaling import fit_slope
from tests.ntk._graphs import atlas

_ARCH = {"num_blocks": 2, "num_mlp_layers": 2}
_nodes_with_taps = functools.partial(gnn_with_taps, readout="node")


def _batch(num=6, dtype="float64", **options):
  adjacencies, features = atlas(num)
  return pad_graphs(adjacencies, [x.astype(dtype) for x in features], **options)


def _union(num=6, dtype="float32"):
  """One graph, of all of them, in a batch."""
  batch = _batch(num, dtype, aggregate="degree")
  mask = np.asarray(batch.mask).ravel()
  op = jax.scipy.linalg.block_diag(*batch.op)[mask][:, mask]
  features = batch.features.reshape(len(mask), -1)[mask]
  return type(batch)(op[None], features[None], jnp.ones((1, len(op)), bool))


def _init(width, batch, seed=0, jumping=True, **arch):
  p = batch.features.shape[2]
  dtype = batch.features.dtype
  rng = jax.random.fold_in(jax.random.key(seed), width)
  return gnn_init(
    rng, width, p, jumping=jumping, dtype=dtype, **{**_ARCH, **arch}
  )


# --- the network ---


@pytest.mark.parametrize("jumping", [False, True])
def test_apply_is_the_definition(jumping):
  batch = _batch(6, max_nodes=8, aggregate="degree")
  params = _init(5, batch, jumping=jumping)
  assert [len(block) for block in params.dense] == [2, 2]
  assert len(params.heads) == (3 if jumping else 1)
  adjacencies, features = atlas(6)
  nodes = gnn_apply(params, batch, readout="node")
  for g, (a, x) in enumerate(zip(adjacencies, features, strict=True)):
    s, h = a + np.eye(len(a)), x
    s /= s.sum(1, keepdims=True)
    reads = [h]
    for block in params.dense:
      h = s @ h
      for w in block:
        h = np.sqrt(2 / 5) * np.maximum(h @ w.T, 0)
      reads.append(h)
    reads = reads if jumping else reads[-1:]
    want = sum(h @ v for h, v in zip(reads, params.heads, strict=True))
    np.testing.assert_allclose(nodes[g, : len(a)], want, rtol=1e-12, atol=1e-13)
    assert not nodes[g, len(a) :].any()
  np.testing.assert_allclose(gnn_apply(params, batch), nodes.sum(1), rtol=1e-12)


def test_structured_kernel_is_that_of_jacobians():
  batch = _batch(4, aggregate="degree")
  params = _init(7, batch)
  for readout, with_taps in (
    ("sum", gnn_with_taps),
    ("node", _nodes_with_taps),
  ):
    want = empirical_ntk(
      lambda p, x, r=readout: gnn_with_taps(p, x, readout=r)[0], params, batch
    )
    got = structured_ntk(with_taps, params, batch)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


# --- infinite width ---


def _kernel_gap(width, batch, with_taps, limit, num=16):
  """Relative distances of the kernels of networks from their limit."""

  @jax.jit
  def gaps(seeds):
    def gap(seed):
      kernel = structured_ntk(with_taps, _init(width, batch, seed), batch)
      apart = kernel.reshape(limit.shape) - limit
      return jnp.linalg.norm(apart) / jnp.linalg.norm(limit)

    return jax.lax.map(gap, seeds)

  return np.asarray(gaps(jnp.arange(num)))


@pytest.mark.parametrize("readout", ["sum", "node"])
def test_kernels_tend_to_their_limits(readout):
  if readout == "sum":
    batch, with_taps = _batch(6, "float32", aggregate="degree"), gnn_with_taps
    limit = graph_gntk(batch, **_ARCH)
  else:
    batch, with_taps = _union(3), _nodes_with_taps
    op, x, _ = (y[0] for y in batch)
    limit = node_gntk(op, x, jumping=True, **_ARCH)
  narrow, wide = (_kernel_gap(m, batch, with_taps, limit) for m in (32, 1024))
  assert np.median(wide) < 0.12
  # What they have in common, of a few large entries, makes medians scatter.
  slope = np.log((wide**2).mean() / (narrow**2).mean()) / 2 / np.log(32)
  assert -0.75 < slope < -0.3


@pytest.mark.slow
@pytest.mark.parametrize("readout", ["sum", "node"])
def test_kernels_tend_to_their_limits_like_a_root(readout):
  if readout == "sum":
    batch, with_taps = _batch(6, "float32", aggregate="degree"), gnn_with_taps
    limit = graph_gntk(batch, **_ARCH)
  else:
    batch, with_taps = _union(6), _nodes_with_taps
    op, x, _ = (y[0] for y in batch)
    limit = node_gntk(op, x, jumping=True, **_ARCH)
  widths = [64, 128, 256, 512, 1024, 2048]
  medians = [
    np.median(_kernel_gap(m, batch, with_taps, limit, 4)) for m in widths
  ]
  assert medians[4] < 0.12
  assert -0.75 < fit_slope(widths, medians).slope < -0.3


def test_covariance_of_untrained_networks():
  batch = _batch(5, "float32", aggregate="degree")
  want = graph_gntk(batch, num_blocks=2, num_mlp_layers=1, kind="nngp")

  # Of a finite network the mean is off by O(1/m): 1 % or so.
  @jax.jit
  def outputs(seeds):
    def of_one(seed):
      return gnn_apply(_init(64, batch, seed, num_mlp_layers=1), batch)

    return jax.lax.map(of_one, seeds, batch_size=50)

  f = outputs(jnp.arange(8000))
  size = jnp.sqrt(jnp.diagonal(want))
  error = (f.T @ f / len(f) - want) / jnp.outer(size, size)
  assert abs(error).max() < 0.05


# --- training ---


def _descent(kernel, k_test, residual, rate, num_steps):
  """What descent predicts on data of ``k_test``, by eigenvalues."""
  sizes, vectors = np.linalg.eigh(kernel)
  shrunk = (1 - (1 - rate * sizes) ** num_steps) / sizes
  return k_test @ (vectors * shrunk) @ (vectors.T @ residual)


@pytest.mark.parametrize(
  ("width", "of_limit"),
  [
    # Of networks so narrow the limit is some 20 % away.
    (256, False),
    pytest.param(1024, True, marks=pytest.mark.slow),
  ],
)
def test_training_is_regression_with_the_kernel(width, of_limit):
  batch = _batch(10, "float32", aggregate="degree")
  # No two that train are so alike that their difference is learned late.
  order = np.array([0, 5, 2, 7, 4, 9, 1, 6, 3, 8])
  train, test = (
    type(batch)(*(x[rows] for x in batch)) for rows in (order[:6], order[6:])
  )
  params = _init(width, batch)
  if of_limit:
    own = graph_gntk(_batch(10, aggregate="degree"), **_ARCH)
  else:
    own = structured_ntk(gnn_with_taps, params, batch)[:, 0, :, 0]
  own = np.asarray(own, np.float64)[order][:, order]
  kernel, k_test = own[:6, :6], own[6:, :6]
  rate = 0.5 / np.linalg.eigvalsh(kernel)[-1]
  y = np.random.default_rng(1).normal(size=6)
  start = [gnn_apply(params, x) for x in (train, test)]
  trained, history = train_gnn(
    params, train, start[0] + y, learning_rate=rate, num_steps=600
  )
  ends = [gnn_apply(trained, x) for x in (train, test)]
  moved = [b - a for a, b in zip(start, ends, strict=True)]
  for got, k, bar in zip(moved, (kernel, k_test), (1e-3, 0.08), strict=True):
    want = _descent(kernel, k, y, rate, 600)
    assert np.linalg.norm(got - want) < bar * np.linalg.norm(want)
  assert history.loss.shape == (601,)
  np.testing.assert_allclose(history.loss[0], (y**2).sum() / 2, rtol=1e-4)
  assert history.loss[-1] < 1e-4 * history.loss[0]


def _club():
  """One graph, no two nodes of which are alike."""
  adjacencies, features = from_networkx(
    [networkx.karate_club_graph()], features="onehot"
  )
  features = [x.astype(np.float32) for x in features]
  return pad_graphs(adjacencies, features, aggregate="degree")


def test_few_labels_decide_all_nodes():
  batch = _club()
  op, x, _ = (y[0] for y in batch)
  arch = {"num_blocks": 2, "num_mlp_layers": 1}
  limit = node_gntk(op, x, jumping=True, **arch).astype(np.float64)
  n = len(x)
  assert len(np.unique(limit, axis=0)) == n
  seen = np.arange(n) % 3 == 0
  kernel = limit[seen][:, seen]
  rate = 0.5 / np.linalg.eigvalsh(kernel)[-1]
  y = np.random.default_rng(0).normal(size=(1, n))
  params = _init(1024, batch, **arch)
  start = gnn_apply(params, batch, readout="node")
  trained, _ = train_gnn(
    params,
    batch,
    start + y,
    learning_rate=rate,
    num_steps=150,
    readout="node",
    train_mask=jnp.asarray(seen)[None],
  )
  moved = (gnn_apply(trained, batch, readout="node") - start)[0]
  want = _descent(kernel, limit[:, seen], y[0, seen], rate, 150)
  assert np.linalg.norm(moved - want) < 0.1 * np.linalg.norm(want)
  assert np.linalg.norm(want[~seen]) > 0.1 * np.linalg.norm(want[seen])


def test_narrow_dtypes_are_widened_inside():
  batch = _batch(4, "bfloat16", aggregate="degree")
  params = _init(16, batch)
  got = gnn_apply(params, batch)
  assert got.dtype == jnp.bfloat16
  wide = jax.tree.map(
    lambda x: x.astype(jnp.float32), (params, batch._replace(mask=()))
  )
  want = gnn_apply(wide[0], wide[1]._replace(mask=batch.mask))
  # One rounding, at the end.
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))
  _, layers = gnn_with_taps(params, batch)
  assert {x.dtype for layer in layers for x in layer} == {jnp.dtype("float32")}
  trained, history = train_gnn(
    params, batch, jnp.ones(4), learning_rate=1e-4, num_steps=1
  )
  assert trained.heads[0].dtype == jnp.bfloat16
  assert np.isfinite(history.loss.astype(np.float32)).all()


# --- what is refused ---


def test_refused():
  batch = _batch(3)
  params = _init(4, batch)
  n, p = batch.features.shape[1:]
  good = {"learning_rate": 0.1, "num_steps": 1}
  y = np.zeros(3)
  (first, second), *blocks = params.dense
  other = params._replace(dense=((first, second.astype("float32")), *blocks))
  narrow = params._replace(dense=((first, second[:, 1:]), *blocks))
  for call, message in (
    (lambda: _init(0, batch), "width must be >= 1, got 0"),
    (lambda: _init(4, batch, num_blocks=0), "num_blocks must be >= 1, got 0"),
    (
      lambda: _init(4, batch, num_mlp_layers=0),
      "num_mlp_layers must be >= 1, got 0",
    ),
    (lambda: _init(4, batch, jumping=2), "jumping must be one of False, True"),
    (
      lambda: gnn_apply(params, batch, readout="mean"),
      "readout must be one of 'sum', 'node', got 'mean'",
    ),
    (
      lambda: gnn_apply(
        params, batch._replace(features=batch.features[..., 1:])
      ),
      f"features of batch must have shape (3, {n}, {p}) = (G, N, p)",
    ),
    (
      lambda: gnn_apply(params, _batch(3, "float32")),
      "all arrays must have one dtype",
    ),
    (
      lambda: gnn_apply(other, batch),
      "all arrays must have one dtype, got params.dense[0][1] of float32",
    ),
    (
      lambda: gnn_apply(narrow, batch),
      "params.dense[0][1] must have shape (4, 4) = (m, inputs), got (4, 3)",
    ),
    (
      lambda: gnn_apply(params._replace(heads=params.heads[:2]), batch),
      "params.heads must be 1, or 3 with jumping knowledge, got 2",
    ),
    (
      lambda: gnn_apply(params._replace(heads=params.heads[1:2] * 3), batch),
      f"params.heads[0] must have shape ({p},) = (inputs,), got (4,)",
    ),
    (
      lambda: gnn_apply(params, batch._replace(mask=batch.mask.astype(int))),
      "mask of batch must be boolean (True = a node), got int",
    ),
    (
      lambda: gnn_with_taps(params, batch, (y,)),
      "taps must be one array a dense map, 7, got 1",
    ),
    (
      lambda: gnn_with_taps(params, batch, (y,) * 7),
      f"taps[0] must have shape (3, {n}, 1) = (G, N, size), got (3,)",
    ),
    (
      lambda: train_gnn(params, batch, y[1:], **good),
      "targets must have shape (3,) = (G,), got (2,)",
    ),
    (
      lambda: train_gnn(params, batch, y, readout="node", **good),
      f"targets must have shape (3, {n}) = (G, N), got (3,)",
    ),
    (
      lambda: train_gnn(params, batch, y, train_mask=y[1:] > 0, **good),
      "train_mask must have shape (3,) = (G,), got (2,)",
    ),
    (
      lambda: train_gnn(params, batch, y, train_mask=y, **good),
      "train_mask must be boolean, got float64",
    ),
    (
      lambda: train_gnn(params, batch, y, learning_rate=0.0, num_steps=1),
      "learning_rate must be positive, got 0.0",
    ),
    (
      lambda: train_gnn(params, batch, y, learning_rate=0.1, num_steps=-1),
      "num_steps must be >= 0, got -1",
    ),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      call()
