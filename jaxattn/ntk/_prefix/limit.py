r"""Tangent kernels of infinitely long prefixes with Gaussian entries.

As m grows, :math:`m S_r \to e^{k_r \cdot x + b} / (z_p + z_c)`, and sums over r
become expectations, in which :math:`e^{w \cdot u}` tilts a Gaussian,
:math:`E[e^{w \cdot u} g(w)] = e^{\sigma^2 |u|^2 / 2} E[g(w + \sigma^2 u)]` with
:math:`u = x + x'`. Source: this project; arXiv 2406.14036 for the setting.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.ntk._prefix import context as contexts
from jaxattn.ntk._prefix.context import Context, Datum, einsum


def prefix_limit_kernel(
  x1: jax.Array,
  x2: jax.Array | None = None,
  context1: Context | None = None,
  context2: Context | None = None,
  *,
  key_std: float | jax.Array = 1.0,
  value_std: float | jax.Array = 1.0,
  train: tuple[str, ...] = ("key", "value"),
  prefix_bias: float | jax.Array = 0.0,
  count_normalized: bool = True,
) -> jax.Array:
  r"""The kernel that :func:`prefix_ntk` tends to as a prefix gets longer.

  With :math:`z_p = e^{b + \sigma^2 |x|^2 / 2}`,
  :math:`\pi = z_p / (z_p + z_c)` and :math:`\bar c = (1 - \pi)\, o_c`, which is
  also the limit of the output,

  .. math::

    H_\infty(x, x') = \pi \pi' e^{\sigma^2 x \cdot x'} \big[ I + (x \cdot x')
      (\sigma_v^2 I + \bar c\, \bar c'^\top) \big],

  for keys from :math:`N(0, \sigma^2 I)` and values from
  :math:`N(0, \sigma_v^2 I)`.

  Args:
    x1: (n1, d) queries.
    x2: (n2, d) queries; None = ``x1``.
    context1: of ``x1``; see :func:`prefix_output`.
    context2: of ``x2``; given if and only if ``context1`` and ``x2`` are.
    key_std: sigma, standard deviation of key entries.
    value_std: sigma_v, that of value entries.
    train: ("key", "value"), ("key",) or ("value",).
    prefix_bias: b, added to the logits of the prefix.
    count_normalized: False = without the log m, for data without context alone.

  Returns:
    (n1, v, n2, v) with contexts. Without, the kernel is a multiple of the
    identity for each pair of data, and that factor is returned: (n1, n2).

  Raises:
    ValueError: if shapes, dtypes or options do not fit, or there is a context
      and no normalization.

  Cost:
    O(n1 n2 (d + v^2)) time, O(n1 n2 v^2) memory; O(n1 n2) without contexts.

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> print(prefix_limit_kernel(jnp.eye(2), key_std=0.0))
    [[2. 1.]
     [1. 2.]]
  """
  for name, std in (("key_std", key_std), ("value_std", value_std)):
    _checks.check_scalar(name, std)
    _checks.check_nonnegative(name, std)
  contexts.check_train(train)
  contexts.check_bias(prefix_bias, count_normalized)
  if not count_normalized and context1 is not None:
    raise ValueError(
      "prefix_limit_kernel: without normalization the context vanishes as "
      "length grows; pass context=None or count_normalized=True"
    )
  caller = "prefix_limit_kernel"
  data = contexts.check_pair(caller, x1, x2, context1, context2, (None, None))
  dtype, data = contexts.widen(data)
  kernel = _limit(data, key_std, value_std, prefix_bias, train)
  return kernel.astype(dtype)


def tied_prefix_limit_kernel(
  x1: jax.Array,
  x2: jax.Array | None = None,
  *,
  sigma: float | jax.Array = 1.0,
) -> jax.Array:
  r"""The kernel that :func:`tied_prefix_ntk` tends to for paired columns.

  .. math::

    H_\infty(x, x') = e^{\sigma^2 x \cdot x'} \big[ (x \cdot x') (\sigma^2 I
      + \sigma^4 u u^\top) + \sigma^2 u\, x^\top + \sigma^2 x' u^\top + I
      \big], \qquad u = x + x',

  rows belonging to the output at x and columns to that at x'.

  Args:
    x1: (n1, d) queries.
    x2: (n2, d) queries; None = ``x1``.
    sigma: standard deviation of the entries of the prefix columns.

  Returns:
    (n1, d, n2, d): outputs of x1 by outputs of x2.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``sigma`` is negative.

  Cost:
    O(n1 n2 d^2) time and memory.

  Source:
    this project; the model is that of arXiv 2406.14036.

  Example:
    >>> import jax.numpy as jnp
    >>> print(tied_prefix_limit_kernel(jnp.ones((1, 1)), sigma=0.0))
    [[[[1.]]]]
  """
  _checks.check_scalar("sigma", sigma)
  _checks.check_nonnegative("sigma", sigma)
  x1 = jnp.asarray(x1)
  x2 = x1 if x2 is None else jnp.asarray(x2)
  contexts.check_data("x1", x1)
  contexts.check_data("x2", x2, x1.shape[1])
  dtype, (x1, x2) = contexts.widen((x1, x2))
  return _tied_limit(x1, x2, sigma).astype(dtype)


@functools.partial(jax.jit, static_argnames="train")
def _limit(
  data: list[Datum],
  key_std: Any,
  value_std: Any,
  prefix_bias: Any,
  train: tuple[str, ...],
) -> jax.Array:
  (x1, context1), (x2, _) = data[0], data[-1]
  dtype = x1.dtype
  var, value_var = (jnp.asarray(s, dtype) ** 2 for s in (key_std, value_std))
  log_scales, rests = [], []
  for x, context in data:
    log_prefix = prefix_bias + var * jnp.square(x).sum(-1) / 2
    total, rest = contexts.share(log_prefix.astype(dtype), context)
    log_scales.append(log_prefix - total)
    rests.append(rest)
  gram = einsum("id,jd->ij", x1, x2)
  # One exponential: factors may be out of range where their product is not.
  row, column = log_scales[0][:, None], log_scales[-1][None]
  scale = jnp.exp(var * gram + row + column)
  keys, values = (float(name in train) for name in ("key", "value"))
  factor = scale * (values + keys * value_var * gram)
  if context1 is None:
    return factor
  eye = jnp.eye(rests[0].shape[1], dtype=dtype)
  kernel = einsum("ij,lk->iljk", factor, eye)
  rank_one = einsum("il,jk->iljk", rests[0], rests[-1])
  return kernel + keys * (scale * gram)[:, None, :, None] * rank_one


@jax.jit
def _tied_limit(x1: jax.Array, x2: jax.Array, sigma: Any) -> jax.Array:
  dtype, d = x1.dtype, x1.shape[1]
  var = jnp.asarray(sigma, dtype) ** 2
  gram = einsum("id,jd->ij", x1, x2)
  u = x1[:, None] + x2[None]
  eye = jnp.eye(d, dtype=dtype)
  kernel = var**2 * einsum("ij,ijl,ijk->iljk", gram, u, u)
  kernel += var * einsum("ijl,ik->iljk", u, x1)
  kernel += var * einsum("ijk,jl->iljk", u, x2)
  kernel += einsum("ij,lk->iljk", 1 + var * gram, eye)
  return jnp.exp(var * gram)[:, None, :, None] * kernel
