"""NTK-Attention on a GPU: exact attention whose sums begin with the prefix."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels._compat import pl
from pallas_kernels.flash_attention._gpu_kernels import (
  Tile,
  column,
  fetch_once,
  ids,
  online_softmax,
  store,
)


def forward_kernel(tile: Tile, bounds: Any, *refs: Any) -> None:
  plan, tile = tile.plan, tile._replace(bounds=bounds)
  query_ref, acc_ref, top_ref, total_ref, key_ref, value_ref = refs[:6]
  out_ref, log_ref, sign_ref, buffers, barriers = refs[6:]
  query, first, top, total, keys, values, out = buffers
  b, n, i = at = ids()
  rows = pl.ds(i * np.int32(plan.block_q), plan.block_q)
  sources = [ref.at[b, rows, n] for ref in (query_ref, acc_ref)]
  sources += [ref.at[b, n, rows] for ref in (top_ref, total_ref)]
  each = zip(sources, buffers[:4], barriers[:4], strict=True)
  fetch_once([(source, to, barrier.at[0]) for source, to, barrier in each])
  copies = (key_ref, keys, barriers[4]), (value_ref, values, barriers[5])
  start = first[...], top[...], total[...]
  acc, peak, sums = online_softmax(tile, at, query, copies, start)
  none = sums == 0
  size = jnp.where(none, 1.0, jnp.abs(sums))
  sign = sums / size
  out[...] = (acc * column(sign / size, out.shape)).astype(out.dtype)
  top[...] = jnp.where(none, -jnp.inf, peak + jnp.log(size))
  total[...] = sign
  store(
    (out, out_ref.at[b, rows, n]),
    (top, log_ref.at[b, n, rows]),
    (total, sign_ref.at[b, n, rows]),
  )
