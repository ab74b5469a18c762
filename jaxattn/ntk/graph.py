r"""Tangent kernels of graph networks whose width is infinite.

The network of B blocks of R dense layers starts from the features h = X of the
nodes. A block aggregates neighbors and then applies its layers:

.. math::

  h \leftarrow S h, \qquad
  h \leftarrow \sqrt{2 / m}\; \mathrm{relu}(h W^\top) \quad \text{(R times)},

with :math:`S = \operatorname{diag}(c) (A + I)`. A node's output is
:math:`f(u) = v_B \cdot h_u^{(B)}`, or with jumping knowledge :math:`v_0 \cdot
X_u + \sum_{b=1}^B v_b \cdot h_u^{(b)}`; a graph's is the sum over its nodes.
All entries of W and v are drawn from N(0, 1) and trained.

As m grows, the covariance of a layer's entries at the nodes of two graphs and
the tangent kernel follow from

.. math::

  \Sigma = \Theta = X X'^\top; \qquad
  \Sigma \leftarrow S \Sigma S'^\top, \quad
  \Theta \leftarrow S \Theta S'^\top; \qquad
  \Sigma \leftarrow \sqrt{q q'}\, \kappa_1(\rho), \quad
  \Theta \leftarrow \Theta \circ \kappa_0(\rho) + \Sigma,

in the same order, where :func:`jaxattn.ntk.relu_covariance` is the last step
and q the variances, diagonals of the covariance of each graph with itself. The
kernel is the last :math:`\Theta`, or with jumping knowledge :math:`X X'^\top`
and the :math:`\Theta` after each block; of graphs, the sum of its entries.
Sources: Du et al., arXiv 1905.13192, for graphs; Qin et al., arXiv 2309.07452,
for nodes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from jaxattn import _checks
from jaxattn.ntk._blocks import blocked_gram
from jaxattn.ntk.infinite import relu_covariance
from jaxattn.numerics._dtypes import accumulator

_KINDS = ("ntk", "nngp")
# Entries of a work array, for a pair of chunks: on a CPU they stay in a cache,
# elsewhere they keep the device busy.
_CPU_BLOCK, _BLOCK = 1 << 15, 1 << 24
# Nodes from which on a product with a dense S costs more than one with a sparse
# one, if that has fewer entries a row than this.
_DENSE_NODES, _SPARSE_ROW = 8192, 64
# Nodes of the smallest bucket, and graphs that make one worth its compilation.
_SMALLEST, _FEWEST = 8, 16
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class GraphBatch(NamedTuple):
  """Graphs of different sizes, padded to one.

  Attributes:
    op: (G, N, N), S of each graph: its row u holds the weights with which node
      u adds up its neighbors and itself.
    features: (G, N, p), X of each graph.
    mask: (G, N), boolean: which nodes exist. What other rows hold is not seen.
  """

  op: jax.Array
  features: jax.Array
  mask: jax.Array


class _Arch(NamedTuple):
  """What is static in a kernel."""

  num_blocks: int
  num_mlp_layers: int
  jumping: bool
  kind: str


class _Side(NamedTuple):
  """Graphs of one bucket, as a pair of chunks needs them.

  Attributes:
    op: (G, N, N).
    features: (G, N, p).
    variances: (G, B, N), before the dense layers of each block.
    own: (G,), kernel of each graph with itself.
  """

  op: jax.Array
  features: jax.Array
  variances: jax.Array
  own: jax.Array


def graph_gntk(
  batch1: GraphBatch,
  batch2: GraphBatch | None = None,
  *,
  num_blocks: int,
  num_mlp_layers: int,
  jumping: bool = True,
  kind: str = "ntk",
  chunk_size: int | None = None,
  normalize: bool = False,
) -> jax.Array:
  r"""The kernel between graphs, for a network that sums over nodes.

  .. math:: K(g, g') = \sum_{u \in g,\, u' \in g'} \Theta(u, u')

  with the recursion of the module. Graphs that the Weisfeiler-Lehman test does
  not tell apart have equal rows: a Gram matrix may be singular, and regression
  needs a ridge. Entries grow like the square of the number of nodes, unless
  ``normalize``.

  Graphs are sorted into buckets of up to 8, 16, 32, ... nodes, so that padding
  costs little; inside ``jit``, where sizes are not known, there is one bucket.
  A batch that falls into buckets otherwise is compiled anew: for cross
  validation compute one Gram matrix and take its rows.

  Args:
    batch1: (G1) graphs, from :func:`jaxattn.data.pad_graphs`.
    batch2: (G2) graphs, of features of the same size; None = ``batch1``.
    num_blocks: B, at least 1.
    num_mlp_layers: R, dense layers of a block, at least 1.
    jumping: jumping knowledge: the output reads all blocks and the features.
    kind: ``"ntk"``, or ``"nngp"`` for the covariance of untrained outputs,
      :math:`\Sigma` in place of :math:`\Theta`.
    chunk_size: graphs on either side of a work array; speed and memory only.
      None = as many as keep it in a cache, or an accelerator busy.
    normalize: divide by :math:`\sqrt{K(g, g) K(g', g')}`.

  Returns:
    (G1, G2).

  Raises:
    ValueError: if shapes or dtypes do not fit, features of the two batches
      differ in size, or an option is out of range.

  Cost:
    O(G1 G2 N^2 (N + R) B) time, half of it if ``batch2`` is None; memory
    O(G N (N + B)) beside inputs, the result and the work arrays.

  Source:
    arXiv 1905.13192, section 4, without the factor 2 of its public
    implementation, and with B + 1 for its number of layers.

  Example:
    >>> import numpy as np
    >>> from jaxattn.data import pad_graphs
    >>> from jaxattn.ntk import graph_gntk
    >>> path = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    >>> batch = pad_graphs([path, 1 - np.eye(3)], [np.ones((3, 1))] * 2)
    >>> print(graph_gntk(batch, num_blocks=1, num_mlp_layers=1))
    [[107. 135.]
     [135. 171.]]
  """
  batch1 = check_batch("batch1", batch1)
  if batch2 is not None:
    batch2 = check_batch("batch2", batch2)
    _check_pair(batch1, batch2)
  arch = _check_arch(num_blocks, num_mlp_layers, jumping, kind)
  if chunk_size is not None:
    _checks.check_integer("chunk_size", chunk_size, 1, None)
  _checks.check_choice("normalize", normalize, (False, True))
  order1, sizes1 = _buckets(batch1.mask)
  order2, sizes2 = (None, None) if batch2 is None else _buckets(batch2.mask)
  return _graph_gntk(
    batch1, batch2, order1, order2, sizes1, sizes2, arch, chunk_size, normalize
  )


def node_gntk(
  op: jax.Array | sparse.BCOO,
  features: jax.Array,
  *,
  num_blocks: int,
  num_mlp_layers: int,
  jumping: bool = False,
  kind: str = "ntk",
) -> jax.Array:
  r"""The kernel between nodes of one graph.

  .. math:: K(u, u') = \Theta(u, u')

  with the recursion of the module; B = 1 is the kernel of an MLP of R hidden
  layers at the rows of S X.

  Args:
    op: (n, n), S, which need not be symmetric; an array, or a sparse ``BCOO``
      matrix. An array of more than 8192 nodes whose values are known is made
      sparse if it has less than 64 entries a row.
    features: (n, p), X.
    num_blocks: B, at least 1.
    num_mlp_layers: R, dense layers of a block, at least 1.
    jumping: jumping knowledge: the output reads all blocks and the features.
    kind: ``"ntk"``, or ``"nngp"`` for the covariance of untrained outputs.

  Returns:
    (n, n).

  Raises:
    ValueError: if shapes or dtypes do not fit, or an option is out of range.

  Cost:
    O(n^2 (n + R) B) time with a dense S, O(n (edges + n R) B) with a sparse
    one, with its zeros; O(n^2) memory.

  Source:
    arXiv 2309.07452, the node-level kernel.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import node_gntk
    >>> op = jnp.array([[0.5, 0.5], [0.5, 0.5]])
    >>> print(node_gntk(op, jnp.eye(2), num_blocks=1, num_mlp_layers=1))
    [[1. 1.]
     [1. 1.]]
  """
  features = jnp.asarray(features)
  op = op if isinstance(op, sparse.BCOO) else jnp.asarray(op)
  if isinstance(op, sparse.BCOO) and (op.n_batch or op.n_dense):
    raise ValueError(
      f"op must be sparse in all its axes, got n_batch={op.n_batch} and "
      f"n_dense={op.n_dense}"
    )
  _checks.check_rank("features", features, 2)
  n = len(features)
  _checks.check_shape("op", op, (n, n), "(n, n), n nodes of features")
  _checks.check_one_dtype(features=features, op=op)
  arch = _check_arch(num_blocks, num_mlp_layers, jumping, kind)
  return _node_gntk(_sparse_if_large(op), features, arch)


def self_covariances(
  batch: GraphBatch, *, num_blocks: int, num_mlp_layers: int
) -> jax.Array:
  r"""Variances of all layers' entries at each node.

  The diagonals of :math:`\Sigma` of each graph with itself, before each dense
  layer. A ReLU layer keeps them, so that those of one block are alike.

  Args:
    batch: (G) graphs, from :func:`jaxattn.data.pad_graphs`.
    num_blocks: B, at least 1.
    num_mlp_layers: R, dense layers of a block, at least 1.

  Returns:
    (B R, G, N), 0 for nodes that do not exist.

  Raises:
    ValueError: if shapes or dtypes do not fit, or a number is below 1.

  Cost:
    O(G N^2 (N + R) B) time, O(G N^2) memory.

  Source:
    arXiv 1905.13192, section 4.

  Example:
    >>> import numpy as np
    >>> from jaxattn.data import pad_graphs
    >>> from jaxattn.ntk import self_covariances
    >>> batch = pad_graphs([np.zeros((1, 1))], [np.array([[3.0, 4.0]])])
    >>> print(self_covariances(batch, num_blocks=1, num_mlp_layers=2))
    [[[25.]]
    <BLANKLINE>
     [[25.]]]
  """
  batch = check_batch("batch", batch)
  arch = _check_arch(num_blocks, num_mlp_layers, False, "nngp")
  return _self_covariances(batch, arch)


# --- checks, and what networks of finite width share ---


def check_batch(name: str, batch: GraphBatch) -> GraphBatch:
  """The batch as arrays, if they are those of one."""
  op, features, mask = map(jnp.asarray, batch)
  _checks.check_rank(f"features of {name}", features, 3)
  g, n, _ = features.shape
  if not features.size:
    raise ValueError(
      f"features of {name} must not be empty, got shape {features.shape}"
    )
  _checks.check_shape(f"op of {name}", op, (g, n, n), "(G, N, N)")
  _checks.check_shape(f"mask of {name}", mask, (g, n), "(G, N)")
  _checks.check_one_dtype(features=features, op=op)
  if mask.dtype != jnp.bool_:
    raise ValueError(
      f"mask of {name} must be boolean (True = a node), got {mask.dtype}"
    )
  return GraphBatch(op, features, mask)


def _check_pair(batch1: GraphBatch, batch2: GraphBatch) -> None:
  p1, p2 = (batch.features.shape[2] for batch in (batch1, batch2))
  if p1 != p2:
    raise ValueError(
      f"features of batch1 and batch2 must have one size, got p={p1} and p={p2}"
    )
  _checks.check_one_dtype(batch1=batch1.features, batch2=batch2.features)


def _check_arch(
  num_blocks: int, num_mlp_layers: int, jumping: bool, kind: str
) -> _Arch:
  _checks.check_integer("num_blocks", num_blocks, 1, None)
  _checks.check_integer("num_mlp_layers", num_mlp_layers, 1, None)
  _checks.check_choice("jumping", jumping, (False, True))
  _checks.check_choice("kind", kind, _KINDS)
  return _Arch(num_blocks, num_mlp_layers, jumping, kind)


# --- the recursion ---


def _recursion(
  cov: jax.Array,
  arch: _Arch,
  spread: Callable[[jax.Array], jax.Array],
  variances: Callable[[int, jax.Array], tuple[jax.Array, jax.Array]],
  read: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """What the output reads, of one array of pairs of nodes.

  Args:
    cov: inner products of features.
    arch: the network.
    spread: aggregation on both sides.
    variances: number of the block, covariance after aggregation -> variances of
      both sides, broadcastable to it.
    read: sums over nodes, or does not.
  """
  ntk, total = cov, read(cov)
  for block in range(arch.num_blocks):
    cov = spread(cov)
    # As yet they are equal.
    ntk = spread(ntk) if block else cov
    var1, var2 = variances(block, cov)
    for _ in range(arch.num_mlp_layers):
      cov, dot = relu_covariance(cov, var1, var2)
      ntk = ntk * dot + cov
    found = read(ntk if arch.kind == "ntk" else cov)
    total = total + found if arch.jumping else found
  return total


def _own(
  op: jax.Array, features: jax.Array, arch: _Arch
) -> tuple[jax.Array, jax.Array]:
  """(B, N) variances of one graph, and its kernel with itself."""
  seen = []

  def variances(_: int, cov: jax.Array) -> tuple[jax.Array, jax.Array]:
    seen.append(jnp.diagonal(cov))
    return seen[-1][:, None], seen[-1][None]

  def spread(x: jax.Array) -> jax.Array:
    return _einsum("ab,bc,dc->ad", op, x, op)

  cov = _einsum("up,vp->uv", features, features)
  own = _recursion(cov, arch, spread, variances, jnp.sum)
  return jnp.stack(seen), own


def _pairs(arch: _Arch, side1: _Side, side2: _Side) -> jax.Array:
  """(G1, G2) kernel of two chunks of graphs."""

  def spread(x: jax.Array) -> jax.Array:
    half = _einsum("cab,cbdv->cadv", side1.op, x)
    return _einsum("cadv,dwv->cadw", half, side2.op)

  def variances(block: int, _: jax.Array) -> tuple[jax.Array, jax.Array]:
    var1, var2 = side1.variances[:, block], side2.variances[:, block]
    return var1[:, :, None, None], var2[None, None]

  cov = _einsum("cup,dvp->cudv", side1.features, side2.features)
  return _recursion(cov, arch, spread, variances, lambda x: x.sum((1, 3)))


# --- graphs ---


@functools.partial(jax.jit, static_argnames="arch")
def _self_covariances(batch: GraphBatch, arch: _Arch) -> jax.Array:
  op, features = widened(batch)
  var, _ = jax.vmap(functools.partial(_own, arch=arch))(op, features)
  var = jnp.swapaxes(var, 0, 1).astype(batch.features.dtype)
  return jnp.repeat(var, arch.num_mlp_layers, axis=0)


@functools.partial(
  jax.jit,
  static_argnames=("sizes1", "sizes2", "arch", "chunk_size", "normalize"),
)
def _graph_gntk(
  batch1: GraphBatch,
  batch2: GraphBatch | None,
  order1: jax.Array,
  order2: jax.Array | None,
  sizes1: tuple[tuple[int, int], ...],
  sizes2: tuple[tuple[int, int], ...] | None,
  arch: _Arch,
  chunk_size: int | None,
  normalize: bool,
) -> jax.Array:
  dtype = batch1.features.dtype
  sides1 = _sides(batch1, order1, sizes1, arch)
  if batch2 is None:
    sides2, order2 = sides1, order1
  else:
    assert order2 is not None
    assert sizes2 is not None
    sides2 = _sides(batch2, order2, sizes2, arch)
  rows: list[list[Any]] = [[None] * len(sides2) for _ in sides1]
  for i, side1 in enumerate(sides1):
    for j, side2 in enumerate(sides2):
      if batch2 is None and j < i:
        rows[i][j] = rows[j][i].T
        continue
      same = batch2 is None and i == j
      rows[i][j] = _gram(arch, side1, None if same else side2, chunk_size)
  gram = jnp.concatenate([jnp.concatenate(row, 1) for row in rows])
  if normalize:
    own1, own2 = (
      jnp.concatenate([side.own for side in sides])
      for sides in (sides1, sides2)
    )
    size = jnp.sqrt(own1)[:, None] * jnp.sqrt(own2)[None]
    gram = jnp.where(size > 0, gram / jnp.where(size > 0, size, 1), 0)
  # From the order of buckets to that of the batch.
  gram = gram[jnp.argsort(order1)][:, jnp.argsort(order2)]
  return gram.astype(dtype)


def _gram(
  arch: _Arch, side1: _Side, side2: _Side | None, chunk_size: int | None
) -> jax.Array:
  """Kernel of two buckets, or of one with itself."""
  other = side1 if side2 is None else side2
  if chunk_size is None:
    block = _CPU_BLOCK if jax.default_backend() == "cpu" else _BLOCK
    entries = side1.op.shape[1] * other.op.shape[1]
    chunk_size = max(1, math.isqrt(block // entries))

  def of_blocks(rows: jax.Array, columns: jax.Array) -> jax.Array:
    block1 = _Side(*(x[rows] for x in side1))
    block2 = _Side(*(x[columns] for x in other))
    return _pairs(arch, block1, block2)

  # By number, as arrays of different buckets differ in shape.
  rows = jnp.arange(len(side1.own))
  columns = None if side2 is None else jnp.arange(len(side2.own))
  return blocked_gram(of_blocks, rows, columns, chunk_size=chunk_size)


def _sides(
  batch: GraphBatch,
  order: jax.Array,
  sizes: tuple[tuple[int, int], ...],
  arch: _Arch,
) -> list[_Side]:
  """The buckets, of (graphs, nodes), in the order of ``sizes``."""
  op, features = (x[order] for x in widened(batch))
  sides, first = [], 0
  for num, n in sizes:
    rows = slice(first, first + num)
    side_op, side_x = op[rows, :n, :n], features[rows, :n]
    variances, own = jax.vmap(functools.partial(_own, arch=arch))(
      side_op, side_x
    )
    sides.append(_Side(side_op, side_x, variances, own))
    first += num
  return sides


def _buckets(
  mask: jax.Array,
) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
  """Graphs by size, and the (graphs, nodes) of each bucket."""
  num, n = mask.shape
  if not _checks.is_concrete(mask):
    return np.arange(num), ((num, n),)
  # One more than the last node that exists.
  ends = n - np.argmax(np.asarray(mask)[:, ::-1], axis=1)
  tops = np.maximum(_SMALLEST, 2 ** np.ceil(np.log2(ends)).astype(int))
  tops = np.minimum(tops, n)
  buckets, waiting = [], 0
  for size, count in zip(*np.unique(tops, return_counts=True), strict=True):
    waiting += int(count)
    if waiting >= _FEWEST or size == tops.max():
      buckets.append((waiting, int(size)))
      waiting = 0
  return np.argsort(tops, kind="stable"), tuple(buckets)


def widened(batch: GraphBatch) -> tuple[jax.Array, jax.Array]:
  """S and X, zero where there is no node, in the dtype of sums."""
  wide = accumulator(batch.features.dtype)
  seen = batch.mask[:, :, None]
  op = jnp.where(seen & batch.mask[:, None], batch.op, 0)
  return op.astype(wide), jnp.where(seen, batch.features, 0).astype(wide)


# --- nodes ---


def _sparse_if_large(op: jax.Array | sparse.BCOO) -> jax.Array | sparse.BCOO:
  if isinstance(op, sparse.BCOO) or not _checks.is_concrete(op):
    return op
  n = len(op)
  if n <= _DENSE_NODES or int(jnp.count_nonzero(op)) >= n * _SPARSE_ROW:
    return op
  return sparse.BCOO.fromdense(op)


@functools.partial(jax.jit, static_argnames="arch")
def _node_gntk(
  op: jax.Array | sparse.BCOO, features: jax.Array, arch: _Arch
) -> jax.Array:
  dtype = features.dtype
  wide = accumulator(dtype)
  op, features = op.astype(wide), features.astype(wide)

  def product(x: jax.Array) -> jax.Array:
    if isinstance(op, sparse.BCOO):
      return _sparse_product(op, x)
    return _einsum("ab,bc->ac", op, x)

  def variances(_: int, cov: jax.Array) -> tuple[jax.Array, jax.Array]:
    var = jnp.diagonal(cov)
    return var[:, None], var[None]

  # Covariance and kernel are symmetric: S K S' from products on one side.
  return _recursion(
    _einsum("up,vp->uv", features, features),
    arch,
    lambda x: product(product(x).T),
    variances,
    lambda x: x,
  ).astype(dtype)


def _sparse_product(op: sparse.BCOO, x: jax.Array) -> jax.Array:
  """S x for a sparse S, some columns at a time: each takes all its entries."""
  rows, columns = op.indices[:, 0], op.indices[:, 1]

  def times(column: jax.Array) -> jax.Array:
    # Entries that fill up a matrix are outside of it.
    terms = op.data * column.at[columns].get(mode="fill", fill_value=0)
    return jnp.zeros_like(column).at[rows].add(terms, mode="drop")

  size = max(1, _BLOCK // max(len(rows), 1))
  return jax.lax.map(times, x.T, batch_size=min(size, x.shape[1])).T
