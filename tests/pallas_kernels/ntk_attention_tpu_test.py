"""NTK-Attention's TPU kernels, compiled for TPUs: rung D of the ladder."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxattn.attention import PrefixState, ntk_attention
from pallas_kernels.ntk_attention import mosaic_tpu
from pallas_kernels.ntk_attention.operands import Options
from tests.pallas_kernels._ladder import (
  CALLS,
  compiled_for,
  temporary_bytes,
  tpu_devices,
)
from tests.pallas_kernels._ntk import cotangents, structs

pytestmark = pytest.mark.aot_tpu

BOTH = pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])


def _num_kernels(executable):
  return executable.as_text().count(f'custom_call_target="{CALLS["tpu"]}"')


@BOTH
def test_what_none_takes_compiles_and_memory_is_linear(topology):
  def gradients(*args):
    def loss(query, key, value, z, k):
      state = PrefixState(z, k)
      out = ntk_attention(query, key, value, state, is_causal=True)
      return out.astype(jnp.float32).sum()

    return jax.grad(loss, tuple(range(5)))(*args)

  device, *_ = tpu_devices(topology)
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  wide = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  state = wide((2, 128, 128)), wide((2, 128))
  sizes = {}
  for length in (4096, 16384):
    keys = shape((1, length, 2, 128))
    args = shape((1, length, 4, 128)), keys, keys, *state
    executable = compiled_for(device, gradients, *args)
    # Forward; queries; keys and values.
    assert _num_kernels(executable) == 3
    sizes[length] = temporary_bytes(executable)
  assert 2 < sizes[16384] / sizes[4096] < 4.5
  # One head's scores alone would be far more.
  assert sizes[16384] < 16384**2


@BOTH
@pytest.mark.parametrize(
  ("dtype", "num_features", "heads"),
  [("bfloat16", 200, 4), ("float32", 2145, 2)],
)
def test_all_that_hides_or_shifts_scores_compiles(
  topology, dtype, num_features, heads
):
  x = structs(dtype, num_features, heads, everything=True)
  options = Options(0.1, True)
  assert mosaic_tpu.supports(x, options) is None

  def run(x, bars):
    out, total = mosaic_tpu.forward(x, options)
    return mosaic_tpu.backward(x, options, out, total, *bars)

  device, *_ = tpu_devices(topology)
  bars = jax.eval_shape(cotangents, x)
  assert _num_kernels(compiled_for(device, run, x, bars)) == 4
