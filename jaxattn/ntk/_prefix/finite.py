r"""The tangent kernel of a prefix of m keys and values, in closed form.

One head: logits of a query x are :math:`k_r \cdot x + b - \log m` on the
prefix and :math:`k_c \cdot x` on a context that is not trained. With
:math:`S = \mathrm{softmax}` of all of them and
:math:`o = \sum_r S_r v_r + \sum_c S_c v_c`,

.. math::

  \frac{\partial o_\ell}{\partial v_{r\ell}} = S_r, \qquad
  \frac{\partial o_\ell}{\partial k_r} = S_r (v_{r\ell} - o_\ell)\, x .

What is trained is :math:`F = \gamma (o - o_0)`; the kernel here is m times
that of o, which has a limit as m grows, and :math:`m / \gamma^2` times that of
F. Source: arXiv 2406.14036 for prefixes in the kernel regime; this kernel is
this project's.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.ntk._prefix import context as contexts
from jaxattn.ntk._prefix.context import (
  Context,
  Datum,
  PrefixContext,
  einsum,
)

# Floats of one block of the prefix, over all data and outputs: 32 MiB.
BLOCK = 1 << 22


def prefix_output(
  prefix_key: jax.Array,
  prefix_value: jax.Array,
  x: jax.Array,
  context: Context | None = None,
  *,
  prefix_bias: float | jax.Array = 0.0,
  count_normalized: bool = True,
) -> jax.Array:
  r"""Attention of one head to a prefix and to the context of each datum.

  .. math::

    o(x) = \frac{\sum_r e^{k_r \cdot x + b - \log m} v_r
      + \sum_c e^{k_c \cdot x} v_c}
      {\sum_r e^{k_r \cdot x + b - \log m} + \sum_c e^{k_c \cdot x}}

  Args:
    prefix_key: (m, d), floating.
    prefix_value: (m, v).
    x: (n, d) queries, any scale already applied to them.
    context: None, or a pair of keys (L, d) and values (L, v) that all data
      share, or (n, L, d) and (n, L, v), or a :class:`PrefixContext`.
    prefix_bias: b, added to the logits of the prefix.
    count_normalized: subtract log m from them too.

  Returns:
    (n, v), of the dtype that all arrays promote to.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``prefix_bias`` is no finite
      number.

  Cost:
    O(n m (d + v)) time, O(n m) memory.

  Source:
    arXiv 2406.14036; ``count_normalized`` is this project's.

  Example:
    >>> import jax.numpy as jnp
    >>> key, value = jnp.zeros((2, 3)), jnp.array([[1.0], [3.0]])
    >>> one = jnp.zeros((1, 3)), jnp.array([[8.0]])
    >>> print(prefix_output(key, value, jnp.ones((1, 3)), one))
    [[5.]]
  """
  key, value, x = map(jnp.asarray, (prefix_key, prefix_value, x))
  contexts.check_prefix(key, value)
  contexts.check_data("x", x, key.shape[1])
  contexts.check_bias(prefix_bias, count_normalized)
  summary = contexts.summarize("prefix_output", "context", context, x)
  contexts.check_values("context", summary, value.shape[1])
  bias = contexts.log_weight(prefix_bias, count_normalized, len(key))
  dtype, arrays = contexts.widen((key, value, x, summary))
  return output(*arrays, bias).astype(dtype)


def prefix_ntk(
  prefix_key: jax.Array,
  prefix_value: jax.Array,
  x1: jax.Array,
  x2: jax.Array | None = None,
  context1: Context | None = None,
  context2: Context | None = None,
  *,
  train: tuple[str, ...] = ("key", "value"),
  prefix_bias: float | jax.Array = 0.0,
  count_normalized: bool = True,
  chunk_size: int | None = None,
) -> jax.Array:
  r"""Tangent kernel of a prefix of finite length.

  With :math:`s = m S` and :math:`e_r = v_r - o(x)`,

  .. math::

    H(x, x') = \frac1m \sum_r s_r s'_r
      \big[ I + (x \cdot x')\, e_r e_r'^\top \big],

  the first term from training values, the second from training keys.

  Args:
    prefix_key: (m, d), floating.
    prefix_value: (m, v).
    x1: (n1, d) queries.
    x2: (n2, d) queries; None = ``x1``.
    context1: of ``x1``; see :func:`prefix_output`.
    context2: of ``x2``; given if and only if ``context1`` and ``x2`` are.
    train: ("key", "value"), ("key",) or ("value",).
    prefix_bias: b, added to the logits of the prefix.
    count_normalized: subtract log m from them too.
    chunk_size: keys visited at a time; memory only. None = as many as fit some
      tens of MiB.

  Returns:
    (n1, v, n2, v): outputs of x1 by outputs of x2; positive semidefinite as an
    (n1 v, n1 v) matrix if ``x2`` is None.

  Raises:
    ValueError: if shapes, dtypes or options do not fit.

  Cost:
    O(n1 n2 v^2 m + (n1 + n2) m d) time; O((n1 + n2) (m + v chunk_size) + n1 n2
    v^2) memory: no Jacobian is formed, which would be d times as large.

  Source:
    this project; arXiv 2406.14036 studies such a kernel.

  Example:
    >>> import jax
    >>> from jaxattn.softmax import prefix_init
    >>> prefix = prefix_init(jax.random.key(0), 256, 1, 3, value_dim=2)
    >>> x = jax.random.normal(jax.random.key(1), (5, 3))
    >>> prefix_ntk(prefix.key[:, 0], prefix.value[:, 0], x).shape
    (5, 2, 5, 2)
  """
  key, value = jnp.asarray(prefix_key), jnp.asarray(prefix_value)
  contexts.check_prefix(key, value)
  contexts.check_train(train)
  contexts.check_bias(prefix_bias, count_normalized)
  data = contexts.check_pair(
    "prefix_ntk", x1, x2, context1, context2, (key.shape[1], value.shape[1])
  )
  if chunk_size is None:
    num_data = sum(len(x) for x, _ in data)
    chunk_size = max(1, BLOCK // (num_data * (value.shape[1] + 1)))
  _checks.check_integer("chunk_size", chunk_size, 1, None)
  dtype, arrays = contexts.widen((key, value, data))
  bias = contexts.log_weight(prefix_bias, count_normalized, len(key))
  kernel = _ntk(*arrays, bias, train, min(chunk_size, len(key)))
  return kernel.astype(dtype)


@jax.jit
def output(
  key: jax.Array,
  value: jax.Array,
  x: jax.Array,
  context: PrefixContext | None,
  bias: Any,
) -> jax.Array:
  """Output of checked arrays of one dtype."""
  return attend(key, value, x, context, bias)[0]


def attend(
  key: jax.Array,
  value: jax.Array,
  x: jax.Array,
  context: PrefixContext | None,
  bias: Any,
) -> tuple[jax.Array, jax.Array]:
  """Output (n, v) and log of the whole mass (n,)."""
  logits = einsum("nd,md->nm", x, key) + jnp.asarray(bias, x.dtype)
  total, rest = contexts.share(jax.nn.logsumexp(logits, -1), context)
  weights = jnp.exp(logits - total[:, None])
  return einsum("nm,mv->nv", weights, value) + rest, total


@functools.partial(jax.jit, static_argnames=("train", "chunk_size"))
def _ntk(
  key: jax.Array,
  value: jax.Array,
  data: list[Datum],
  bias: Any,
  train: tuple[str, ...],
  chunk_size: int,
) -> jax.Array:
  (m, v), dtype = value.shape, key.dtype
  left, right = data[0][0], data[-1][0]
  parts = [(x, *attend(key, value, x, c, bias)) for x, c in data]
  shift = jnp.asarray(bias, dtype) + math.log(m) / 2

  def step(
    sums: list[jax.Array], chunk: tuple[jax.Array, ...]
  ) -> tuple[list[jax.Array], None]:
    rows = [factors(part, shift, *chunk) for part in parts]
    new = [einsum("ac,bc->ab", rows[0][k], rows[-1][k]) for k in train]
    return [a + b for a, b in zip(sums, new)], None

  sizes = {"value": (len(left), len(right))}
  sizes["key"] = (len(left) * v, len(right) * v)
  zeros = [jnp.zeros(sizes[name], dtype) for name in train]
  arrays = key, value, jnp.ones((m, 1), bool)
  sums, _ = lax.scan(step, zeros, tuple(chunked(y, chunk_size) for y in arrays))
  kernel = jnp.zeros((len(left), v, len(right), v), dtype)
  for name, total in zip(train, sums):
    if name == "value":
      kernel += einsum("ij,lk->iljk", total, jnp.eye(v, dtype=dtype))
    else:
      gram = einsum("id,jd->ij", left, right)[:, None, :, None]
      kernel += gram * total.reshape(kernel.shape)
  return kernel


def chunked(y: jax.Array, chunk_size: int) -> jax.Array:
  """(m, k) as (chunks, chunk_size, k), the last one filled up with zeros."""
  num_chunks = -(-len(y) // chunk_size)
  y = jnp.pad(y, ((0, num_chunks * chunk_size - len(y)), (0, 0)))
  return y.reshape(num_chunks, chunk_size, -1)


def factors(
  part: tuple[jax.Array, ...],
  shift: jax.Array,
  key: jax.Array,
  value: jax.Array,
  seen: jax.Array,
) -> dict[str, jax.Array]:
  """Rows of what is trained, whose products are summed over the prefix."""
  x, out, total = part
  logits = einsum("nd,cd->nc", x, key) + (shift - total)[:, None]
  # sqrt(m) S, and 0 for what only fills up the last chunk.
  s = jnp.where(seen.T, jnp.exp(logits), 0)
  # (n v, c): the sum over the chunk is then one product of matrices.
  errors = s[:, None] * (value.T[None] - out[:, :, None])
  return {"value": s, "key": errors.reshape(-1, errors.shape[-1])}
