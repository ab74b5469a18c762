"""Small caches' TPU kernels, compiled for TPUs: rung D of the ladder."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.small_cache_attention import (
  mosaic_tpu,
  small_cache_attention,
)
from pallas_kernels.small_cache_attention.operands import Operands, Options
from tests.pallas_kernels._ladder import (
  compiled_for,
  num_kernels,
  temporary_bytes,
  tpu_devices,
)

pytestmark = pytest.mark.aot_tpu

# Scores and values; weights, their cotangents, and three gradients.
_KERNELS = 7


def _gradients(*args, **options):
  def loss(*args):
    out = small_cache_attention(*args, implementation="mosaic_tpu", **options)
    return out.astype(jnp.float32).sum()

  return jax.grad(loss, (0, 1, 2))(*args)


def _inputs(length, *, heads=(4, 2), dims=(640, 640), dtype="bfloat16"):
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
  n, k = heads
  h, hv = dims
  return (
    shape((1, length, n, h)), shape((1, length, k, h)),
    shape((1, length, k, hv)),
  )  # fmt: skip


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_compiles_and_only_scores_are_quadratic(topology):
  device, *_ = tpu_devices(topology)
  for length in (8192, 16384):
    executable = compiled_for(device, _gradients, *_inputs(length))
    assert num_kernels(executable, "tpu") == _KERNELS
    # Scores of 4 heads in 32 bits; then weights and their cotangents in 16.
    scores = 4 * 4 * length**2
    assert 1 <= temporary_bytes(executable) / scores < 1.2


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize(
  ("dtype", "is_causal"), [("bfloat16", False), ("float32", True)]
)
def test_remainders_and_masks_compile(topology, dtype, is_causal):
  args = _inputs(1000, dims=(200, 80), dtype=dtype)
  run = functools.partial(_gradients, is_causal=is_causal)
  device, *_ = tpu_devices(topology)
  assert num_kernels(compiled_for(device, run, *args), "tpu") == _KERNELS


@pytest.mark.parametrize(
  ("dtype", "block_size"), [("bfloat16", 896), ("float32", 768)]
)
def test_what_is_said_to_fit_into_vmem_fits(dtype, block_size):
  args = _inputs(4096, dims=(1024, 1024), dtype=dtype)
  x, more = Operands(*args), Options(block_size=block_size + 128)
  assert mosaic_tpu.supports(x, Options(block_size=block_size)) is None
  assert f"use block_size={block_size}" in str(mosaic_tpu.supports(x, more))
  run = functools.partial(_gradients, block_size=block_size)
  device, *_ = tpu_devices("v5e:2x2")
  assert num_kernels(compiled_for(device, run, *args), "tpu") == _KERNELS
