r"""Graph networks of finite width, whose tangent kernels have a closed form.

B blocks of R dense layers of width m, each block after an aggregation of
neighbors:

.. math::

  h \leftarrow S h, \qquad
  h \leftarrow \sqrt{2 / m}\; \mathrm{relu}(h W^\top) \quad \text{(R times)}.

A node's output is :math:`v_B \cdot h_u^{(B)}`, or with jumping knowledge
:math:`v_0 \cdot X_u + \sum_b v_b \cdot h_u^{(b)}`; a graph's is the sum over
its nodes. As m grows the tangent kernel of the first is
:func:`jaxattn.ntk.node_gntk`, of the second :func:`jaxattn.ntk.graph_gntk`.
Sources: arXiv 1905.13192; arXiv 2309.07452.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.ntk import DenseTap, GraphBatch
from jaxattn.ntk.graph import check_batch, widened

_READOUTS = ("sum", "node")
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

__all__ = [
  "GNNHistory",
  "GNNParams",
  "gnn_apply",
  "gnn_init",
  "gnn_with_taps",
  "train_gnn",
]


class GNNParams(NamedTuple):
  """Parameters of a graph network.

  Attributes:
    dense: B blocks of R matrices, (m, p) the first of all, (m, m) the others.
    heads: what outputs are read with: (m,) for the last block; with jumping
      knowledge (p,) for the features and (m,) for each block.
  """

  dense: tuple[tuple[jax.Array, ...], ...]
  heads: tuple[jax.Array, ...]


class GNNHistory(NamedTuple):
  """What happened in training.

  Attributes:
    loss: (num_steps + 1,), before each step and after the last.
  """

  loss: jax.Array


def gnn_init(
  rng: jax.Array,
  width: int,
  feature_dim: int,
  *,
  num_blocks: int,
  num_mlp_layers: int,
  jumping: bool,
  dtype: Any = jnp.float32,
) -> GNNParams:
  """Draws all parameters from N(0, 1).

  Args:
    rng: PRNG key.
    width: m.
    feature_dim: p.
    num_blocks: B, at least 1.
    num_mlp_layers: R, dense layers of a block, at least 1.
    jumping: jumping knowledge: the output reads all blocks and the features.
    dtype: of all parameters.

  Returns:
    A :class:`GNNParams`.

  Raises:
    ValueError: if a number is below 1.

  Cost:
    (B R - 1) m^2 + p m numbers and the heads.

  Source:
    arXiv 1905.13192, section 3.

  Example:
    >>> import jax
    >>> from jaxattn.models import gnn_init
    >>> params = gnn_init(
    ...   jax.random.key(0), 8, 3, num_blocks=2, num_mlp_layers=1, jumping=True
    ... )
    >>> [w.shape for (w,) in params.dense], [v.shape for v in params.heads]
    ([(8, 3), (8, 8)], [(3,), (8,), (8,)])
  """
  for name, value in (
    ("width", width),
    ("feature_dim", feature_dim),
    ("num_blocks", num_blocks),
    ("num_mlp_layers", num_mlp_layers),
  ):
    _checks.check_integer(name, value, 1, None)
  _checks.check_choice("jumping", jumping, (False, True))
  num = num_blocks * num_mlp_layers
  sizes = [feature_dim, *(width,) * num]
  shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
  reads = [feature_dim, *(width,) * num_blocks] if jumping else [width]
  keys = jax.random.split(rng, num + len(reads))
  dense = [
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys[:num], shapes, strict=True)
  ]
  heads = (
    jax.random.normal(key, (size,), dtype)
    for key, size in zip(keys[num:], reads, strict=True)
  )
  blocks = (
    tuple(dense[i : i + num_mlp_layers]) for i in range(0, num, num_mlp_layers)
  )
  return GNNParams(tuple(blocks), tuple(heads))


def gnn_apply(
  params: GNNParams, batch: GraphBatch, *, readout: str = "sum"
) -> jax.Array:
  """Outputs of graphs or of nodes.

  Args:
    params: from :func:`gnn_init`.
    batch: (G) graphs, from :func:`jaxattn.data.pad_graphs`.
    readout: ``"sum"`` over the nodes of each graph, or ``"node"``.

  Returns:
    (G,), or (G, N) with 0 for nodes that do not exist.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``readout`` is unknown.

  Cost:
    O(G N (N m + m^2) B R) time.

  Source:
    arXiv 1905.13192, section 3; arXiv 2309.07452 for nodes.

  Example:
    >>> import jax
    >>> import numpy as np
    >>> from jaxattn.data import pad_graphs
    >>> from jaxattn.models import gnn_apply, gnn_init
    >>> batch = pad_graphs([1 - np.eye(3)], [np.eye(3)])
    >>> params = gnn_init(
    ...   jax.random.key(0), 8, 3, num_blocks=1, num_mlp_layers=1, jumping=True
    ... )
    >>> gnn_apply(params, batch).shape
    (1,)
    >>> gnn_apply(params, batch, readout="node").shape
    (1, 3)
  """
  y, _ = gnn_with_taps(params, batch, readout=readout)
  return y[:, 0] if readout == "sum" else y


def gnn_with_taps(
  params: GNNParams,
  batch: GraphBatch,
  taps: tuple[jax.Array, ...] | None = None,
  *,
  readout: str = "sum",
) -> tuple[jax.Array, tuple[DenseTap, ...]]:
  """The network as :func:`jaxattn.ntk.structured_ntk` asks for it.

  Args:
    params: from :func:`gnn_init`.
    batch: (G) graphs, from :func:`jaxattn.data.pad_graphs`.
    taps: None, or an array like the outputs of each dense map, which is added
      to them.
    readout: ``"sum"`` over the nodes of each graph, or ``"node"``; the latter
      through ``functools.partial``, one object for all calls.

  Returns:
    (G, 1) or (G, N), and a ``DenseTap`` of each dense map, (G, N, size), in the
    order of the computation, heads among them. Nodes are places that share
    weights.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``readout`` is unknown.

  Cost:
    As :func:`gnn_apply`.

  Source:
    this project.

  Example:
    >>> import jax
    >>> import numpy as np
    >>> from jaxattn.data import pad_graphs
    >>> from jaxattn.models import gnn_init, gnn_with_taps
    >>> from jaxattn.ntk import structured_ntk
    >>> batch = pad_graphs([1 - np.eye(3), np.zeros((3, 3))], [np.eye(3)] * 2)
    >>> params = gnn_init(
    ...   jax.random.key(0), 8, 3, num_blocks=1, num_mlp_layers=1, jumping=True
    ... )
    >>> structured_ntk(gnn_with_taps, params, batch).shape
    (2, 1, 2, 1)
  """
  _checks.check_choice("readout", readout, _READOUTS)
  batch = _check(params, batch)
  op, h = widened(batch)
  layers: list[DenseTap] = []

  def dense(h: jax.Array, w: jax.Array) -> jax.Array:
    z = _einsum("gui,oi->guo", h, w.astype(h.dtype))
    if taps is not None:
      tap = taps[len(layers)]
      _checks.check_shape(f"taps[{len(layers)}]", tap, z.shape, "(G, N, size)")
      z = z + tap
    layers.append(DenseTap(h, z))
    return z

  num_layers = len(params.heads) + sum(map(len, params.dense))
  if taps is not None and len(taps) != num_layers:
    raise ValueError(
      f"taps must be one array a dense map, {num_layers}, got {len(taps)}"
    )
  heads = iter(params.heads)
  jumping = len(params.heads) > 1
  out = dense(h, next(heads)[None]) if jumping else jnp.zeros_like(h[..., :1])
  for block, weights in enumerate(params.dense):
    h = _einsum("guv,gvi->gui", op, h)
    for w in weights:
      h = (2 / len(w)) ** 0.5 * jax.nn.relu(dense(h, w))
    if jumping or block == len(params.dense) - 1:
      out = out + dense(h, next(heads)[None])
  y = jnp.where(batch.mask, out[..., 0], 0)
  y = y.sum(1, keepdims=True) if readout == "sum" else y
  return y.astype(batch.features.dtype), tuple(layers)


def train_gnn(
  params: GNNParams,
  batch: GraphBatch,
  targets: jax.Array,
  *,
  learning_rate: float | jax.Array,
  num_steps: int,
  readout: str = "sum",
  train_mask: jax.Array | None = None,
) -> tuple[GNNParams, GNNHistory]:
  r"""Gradient descent on :math:`\frac12 \sum (f - y)^2`, all data at a time.

  Args:
    params: from :func:`gnn_init`.
    batch: (G) graphs, from :func:`jaxattn.data.pad_graphs`.
    targets: (G,), or (G, N) for nodes.
    learning_rate: step size on the sum; of the order of one over the largest
      eigenvalue of the kernel.
    num_steps: steps.
    readout: ``"sum"`` over the nodes of each graph, or ``"node"``.
    train_mask: as the targets, boolean: which of them count; None = all, of
      nodes all that exist.

  Returns:
    The parameters, and a :class:`GNNHistory`.

  Raises:
    ValueError: if shapes or dtypes do not fit, or numbers are out of range.

  Cost:
    Three calls of :func:`gnn_apply` a step.

  Source:
    arXiv 2309.07452, section 3.

  Example:
    >>> import jax
    >>> import numpy as np
    >>> from jaxattn.data import pad_graphs
    >>> from jaxattn.models import gnn_init, train_gnn
    >>> batch = pad_graphs([1 - np.eye(3), np.zeros((3, 3))], [np.eye(3)] * 2)
    >>> params = gnn_init(
    ...   jax.random.key(0), 64, 3, num_blocks=1, num_mlp_layers=1, jumping=True
    ... )
    >>> _, history = train_gnn(
    ...   params, batch, np.array([1.0, 0.0]), learning_rate=0.01, num_steps=50
    ... )
    >>> bool(history.loss[-1] < history.loss[0] / 10)
    True
  """
  _checks.check_choice("readout", readout, _READOUTS)
  batch = _check(params, batch)
  targets = jnp.asarray(targets)
  shape = batch.mask.shape[: 1 if readout == "sum" else 2]
  meaning = "(G,)" if readout == "sum" else "(G, N)"
  _checks.check_shape("targets", targets, shape, meaning)
  _checks.check_floating("targets", targets)
  _checks.check_scalar("learning_rate", learning_rate)
  _checks.check_positive("learning_rate", learning_rate)
  _checks.check_integer("num_steps", num_steps, 0, None)
  seen = jnp.ones(shape, bool) if readout == "sum" else batch.mask
  if train_mask is not None:
    train_mask = jnp.asarray(train_mask)
    _checks.check_shape("train_mask", train_mask, shape, meaning)
    if train_mask.dtype != jnp.bool_:
      raise ValueError(f"train_mask must be boolean, got {train_mask.dtype}")
    seen = seen & train_mask
  return _train(params, batch, targets, seen, learning_rate, num_steps, readout)


def _check(params: GNNParams, batch: GraphBatch) -> GraphBatch:
  """The batch as arrays, if they and the parameters fit each other."""
  batch = check_batch("batch", batch)
  g, n, p = batch.features.shape
  m, first = params.dense[0][0].shape
  _checks.check_shape(
    "features of batch", batch.features, (g, n, first), "(G, N, p)"
  )
  arrays = {"features": batch.features}
  for b, block in enumerate(params.dense):
    for r, w in enumerate(block):
      name = f"params.dense[{b}][{r}]"
      _checks.check_shape(name, w, (m, m if b + r else p), "(m, inputs)")
      arrays[name] = w
  num = len(params.dense)
  if len(params.heads) not in (1, num + 1):
    raise ValueError(
      f"params.heads must be 1, or {num + 1} with jumping knowledge, got "
      f"{len(params.heads)}"
    )
  for i, v in enumerate(params.heads):
    size = p if i == 0 and len(params.heads) > 1 else m
    _checks.check_shape(f"params.heads[{i}]", v, (size,), "(inputs,)")
    arrays[f"params.heads[{i}]"] = v
  _checks.check_one_dtype(**arrays)
  return batch


@functools.partial(jax.jit, static_argnums=(5, 6))
def _train(
  params: GNNParams,
  batch: GraphBatch,
  targets: jax.Array,
  seen: jax.Array,
  learning_rate: jax.Array,
  num_steps: int,
  readout: str,
) -> tuple[GNNParams, GNNHistory]:
  def loss(params: GNNParams) -> jax.Array:
    f = gnn_apply(params, batch, readout=readout)
    return jnp.square(jnp.where(seen, f - targets.astype(f.dtype), 0)).sum() / 2

  def step(params: GNNParams, _: None) -> tuple[GNNParams, jax.Array]:
    value, grads = jax.value_and_grad(loss)(params)
    params = jax.tree.map(
      lambda x, g: x - jnp.asarray(learning_rate, x.dtype) * g, params, grads
    )
    return params, value

  params, losses = lax.scan(step, params, length=num_steps)
  return params, GNNHistory(jnp.append(losses, loss(params)))
