"""ReLU attention's TPU kernels, compiled for TPUs: rung D of the ladder."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxattn.attention import relu_attention
from pallas_kernels.relu_attention import mosaic_tpu
from pallas_kernels.relu_attention.operands import Options
from tests.pallas_kernels._ladder import (
  compiled_for,
  num_kernels,
  temporary_bytes,
  tpu_devices,
)
from tests.pallas_kernels._relu import cotangents, structs

pytestmark = pytest.mark.aot_tpu

BOTH = pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])


@BOTH
def test_what_none_takes_compiles_and_memory_is_linear(topology):
  def gradients(*args):
    def loss(*args):
      out = relu_attention(*args, alpha=2, is_causal=True)
      return out.astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))(*args)

  device, *_ = tpu_devices(topology)
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  sizes = {}
  for length in (4096, 16384):
    keys = shape((1, length, 2, 128))
    args = shape((1, length, 4, 128)), keys, keys
    executable = compiled_for(device, gradients, *args)
    # Forward; queries; keys and values.
    assert num_kernels(executable, "tpu") == 3
    sizes[length] = temporary_bytes(executable)
  assert 3 < sizes[16384] / sizes[4096] < 4.5
  # One head's scores alone would be far more.
  assert sizes[16384] < 16384**2


@BOTH
@pytest.mark.parametrize(("dtype", "alpha"), [("bfloat16", 1), ("float32", 5)])
def test_all_that_hides_or_shifts_scores_compiles(topology, dtype, alpha):
  x, options = structs(dtype), Options(alpha, True)
  assert mosaic_tpu.supports(x, options) is None

  def run(x, bars):
    out, norm = mosaic_tpu.forward(x, options)
    return mosaic_tpu.backward(x, options, out, norm, *bars)

  device, *_ = tpu_devices(topology)
  bars = jax.eval_shape(cotangents, x)
  assert num_kernels(compiled_for(device, run, x, bars), "tpu") == 3
