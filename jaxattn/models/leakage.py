r"""One block of a transformer, small and plain: a target for gradient leakage.

From the embeddings of a sequence, with :math:`z` their sum with positions,

.. math::

  o = \mathrm{softmax}\big(z W_q (z W_k)^\top / \sqrt h\big)\, z W_v W_o
    \; [+ z], \qquad o \mathrel{+}= \mathrm{gelu}(o W_1 + b_1) W_2, \qquad
  \mathrm{logits} = u W_c + b_c,

with u the mean of o over tokens, or its first row. The softmax is written out:
an attack differentiates the gradient once more, in forward mode, which kernels
with a backward pass of their own do not offer.
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn import _checks

_POOLINGS = ("mean", "cls")


class LeakageBlock(nn.Module):
  r"""A block whose choices decide what its gradient gives away.

  Called on one sequence (n, d) it returns (num_classes,) logits; ``loss`` is
  the cross-entropy. Parameters, a flat dict: ``pos`` (n, d); ``w_q``, ``w_k``
  and ``w_v`` (d, h); ``w_o`` (h, d); with ``mlp`` also ``w_1``, ``b_1`` and
  ``w_2``; ``w_c`` (d, num_classes) and ``b_c``.

  Attributes:
    residual: add the input of attention to its output. The network always
      adds.
    pooling: ``"mean"`` over tokens, or ``"cls"``, the first token.
    mlp: hidden units of the network; 0 = no network.
    num_classes: logits that come out.
    head_dim: h; None = d.

  Raises:
    ValueError: when called, if a field or the input does not fit.

  Cost:
    O(n^2 h + n d h + n d mlp).

  Source:
    the setting of arXiv 2311.13624; the block is this project's.

  Example:
    >>> import jax
    >>> from jaxattn.models import LeakageBlock
    >>> block = LeakageBlock(mlp=16)
    >>> x = jax.random.normal(jax.random.key(0), (8, 4))
    >>> params = block.init(jax.random.key(1), x)["params"]
    >>> grads = jax.grad(block.loss)(params, x, 2)
    >>> grads["b_c"].argmin()
    Array(2, dtype=int32)
  """

  residual: bool = True
  pooling: str = "mean"
  mlp: int = 32
  num_classes: int = 5
  head_dim: int | None = None

  @nn.compact
  def __call__(self, embeddings: jax.Array) -> jax.Array:
    """Maps (n, d) embeddings to (num_classes,) logits."""
    self._check(embeddings)
    dtype = embeddings.dtype
    n, d = embeddings.shape
    h = self.head_dim or d
    small = nn.initializers.normal(0.1)

    def weight(name: str, rows: int, columns: int) -> jax.Array:
      init = nn.initializers.normal(rows**-0.5)
      return self.param(name, init, (rows, columns), dtype)

    z = embeddings + self.param("pos", small, (n, d), dtype)
    q, k, v = (z @ weight(name, d, h) for name in ("w_q", "w_k", "w_v"))
    o = nn.softmax(q @ k.T / h**0.5) @ v @ weight("w_o", h, d)
    if self.residual:
      o = o + z
    if self.mlp:
      bias = self.param("b_1", small, (self.mlp,), dtype)
      hidden = nn.gelu(o @ weight("w_1", d, self.mlp) + bias[None])
      o = o + hidden @ weight("w_2", self.mlp, d)
    pooled = o.mean(0) if self.pooling == "mean" else o[0]
    bias = self.param("b_c", small, (self.num_classes,), dtype)
    return pooled @ weight("w_c", d, self.num_classes) + bias

  def loss(
    self, params: dict[str, jax.Array], embeddings: jax.Array, y: jax.Array
  ) -> jax.Array:
    """The cross-entropy of one sequence.

    Args:
      params: the parameters, without the ``"params"`` of ``init`` around them.
      embeddings: (n, d).
      y: the class, an integer; or (num_classes,) probabilities.

    Returns:
      ().
    """
    y = jnp.asarray(y)
    logits = cast(jax.Array, self.apply({"params": params}, embeddings))
    log_p = nn.log_softmax(logits)
    if jnp.issubdtype(y.dtype, jnp.integer):
      _checks.check_rank("y", y, 0)
      return -log_p[y]
    _checks.check_shape("y", y, (self.num_classes,), "(num_classes,)")
    return -y @ log_p

  def _check(self, embeddings: jax.Array) -> None:
    _checks.check_choice("residual", self.residual, (False, True))
    _checks.check_choice("pooling", self.pooling, _POOLINGS)
    _checks.check_integer("mlp", self.mlp, 0, None)
    _checks.check_integer("num_classes", self.num_classes, 2, None)
    if self.head_dim is not None:
      _checks.check_integer("head_dim", self.head_dim, 1, None)
    _checks.check_rank("embeddings", embeddings, 2)
    _checks.check_floating("embeddings", embeddings)
