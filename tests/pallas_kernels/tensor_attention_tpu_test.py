"""Tensor attention's TPU kernels, compiled for TPUs: rung D of the ladder."""

import jax
import jax.numpy as jnp
import pytest

from jaxattn.attention import tensor_attention
from pallas_kernels.tensor_attention import config, mosaic_tpu
from pallas_kernels.tensor_attention.operands import Options
from tests.pallas_kernels._ladder import (
  CALLS,
  compiled_for,
  temporary_bytes,
  tpu_devices,
)
from tests.pallas_kernels._tensor import cotangent, structs

pytestmark = pytest.mark.aot_tpu

BOTH = pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])


def _num_kernels(executable):
  return executable.as_text().count(f'custom_call_target="{CALLS["tpu"]}"')


@BOTH
def test_what_none_takes_compiles_and_memory_is_linear(topology):
  def gradients(*args):
    def loss(*args):
      out = tensor_attention(*args, is_causal=True)
      return out.astype(jnp.float32).sum()

    return jax.grad(loss, tuple(range(5)))(*args)

  device, *_ = tpu_devices(topology)
  sizes = {}
  for length in (1024, 2560):
    arrays = [jax.ShapeDtypeStruct((1, length, 2, 128), jnp.bfloat16)] * 5
    executable = compiled_for(device, gradients, *arrays)
    # Forward; all gradients.
    assert _num_kernels(executable) == 2
    sizes[length] = temporary_bytes(executable)
  assert 2 < sizes[2560] / sizes[1024] < 3.5
  # Less than the logits of two queries.
  assert sizes[2560] < 2 * 2 * 4 * 2560**2


@BOTH
@pytest.mark.parametrize(
  ("is_causal", "dtype"), [(True, "bfloat16"), (False, "float32")]
)
def test_all_that_hides_pairs_compiles(topology, is_causal, dtype):
  x, options = structs(dtype, masked=not is_causal), Options(is_causal)
  assert mosaic_tpu.supports(x, options) is None

  def run(x, out_bar):
    out, lse = mosaic_tpu.forward(x, options)
    return mosaic_tpu.backward(x, options, out, lse, out_bar)

  device, *_ = tpu_devices(topology)
  executable = compiled_for(device, run, x, jax.eval_shape(cotangent, x))
  assert _num_kernels(executable) == 2


@BOTH
def test_what_is_said_to_fit_does(topology):
  # As large as heads and blocks may be.
  x = structs("float32", length=2048, h=640, hv=640)
  sizes = config.tpu_block_sizes(x, Options(), exact=False)
  assert sizes != config.TPU
  device, *_ = tpu_devices(topology)

  def run(x, out_bar):
    out, lse = mosaic_tpu.forward(x, Options())
    return mosaic_tpu.backward(x, Options(), out, lse, out_bar)

  compiled_for(device, run, x, jax.eval_shape(cotangent, x))
