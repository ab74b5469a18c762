"""The gradient of NTK-Attention, by that of exact attention.

See ``mosaic_tpu``: nothing here is larger than the features.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._products import accumulator, precision_of
from pallas_kernels.ntk_attention.operands import (
  Gradients,
  Operands,
  Options,
  Total,
  as_flash,
)


def backward_by(
  attend: Callable[..., Any],
  x: Operands,
  options: Options,
  out: jax.Array,
  total: Total,
  out_bar: jax.Array,
  total_bar: Total,
) -> Gradients:
  """Cotangents of all operands but the mask.

  Args:
    attend: backward pass of exact attention.
    x: the operands.
    options: static facts.
    out: (B, T, N, Hv), from the forward pass.
    total: from the forward pass.
    out_bar: cotangent of ``out``.
    total_bar: cotangent of ``total``; a sign has none.

  Returns:
    Each of its operand's shape and dtype; None for a bias that is None.
  """
  bars = attend(
    *as_flash(x, options),
    out,
    total.log,
    *keys_share(total, out_bar, total_bar),
  )
  dtype = accumulator(x.query.dtype)
  shares = prefix_share(out, total, out_bar, total_bar)
  sums_bar = jnp.concatenate((shares[0], shares[1][..., None]), -1)
  states = jnp.concatenate((x.z, x.k[..., None]), -1).astype(dtype)
  b, t, n, _ = x.query.shape
  by_state = b, t, len(states), n // len(states), -1
  sums_bar = sums_bar.reshape(by_state)
  features = x.query_features.astype(dtype).reshape(by_state)
  einsum = functools.partial(
    jnp.einsum, precision=precision_of(options.precision)
  )
  features_bar = einsum("btkgv,krv->btkgr", sums_bar, states)
  states_bar = einsum("btkgr,btkgv->krv", features, sums_bar)
  return Gradients(
    bars.query,
    bars.key,
    bars.value,
    features_bar.reshape(b, t, n, -1).astype(x.query_features.dtype),
    states_bar[..., :-1].astype(x.z.dtype),
    states_bar[..., -1].astype(x.k.dtype),
    bars.bias,
  )


def keys_share(
  total: Total, out_bar: jax.Array, total_bar: Total
) -> tuple[jax.Array, jax.Array]:
  """Cotangents of output and log-sum-exp, for exact attention to the keys.

  Its weights are positive: the sign of their sum belongs to the cotangents.
  """
  sign = total.sign.astype(out_bar.dtype)[..., None]
  return out_bar * sign, total_bar.log * total.sign


def prefix_share(
  out: jax.Array, total: Total, out_bar: jax.Array, total_bar: Total
) -> tuple[jax.Array, jax.Array]:
  """Cotangents (B, T, N, Hv) and (B, T, N) of the sums over the prefix."""
  dtype = total.log.dtype
  least = jnp.log(jnp.finfo(dtype).tiny)
  # What is smaller than this is 0, and has no gradient.
  inverse = total.sign * jnp.exp(-jnp.maximum(total.log, least))
  inverse = jnp.where(total.log < least, 0, inverse)
  out_bar = out_bar.astype(dtype)
  delta = (out_bar * out.astype(dtype)).sum(-1) - total_bar.log
  return out_bar * inverse[..., None], -delta * inverse
