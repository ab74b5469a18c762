"""Exact attention's TPU kernels, compiled for TPUs: rung D of the ladder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn.attention import softmax_attention
from pallas_kernels.flash_attention import BlockSizes, mosaic_tpu
from pallas_kernels.flash_attention.operands import Operands, Options
from tests.pallas_kernels._flash import cotangents, structs
from tests.pallas_kernels._ladder import (
  compiled_for,
  num_kernels,
  temporary_bytes,
  tpu_devices,
)

pytestmark = pytest.mark.aot_tpu

BOTH = pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])


def _gradients(query, key, value, block_sizes=None):
  def loss(*args):
    out = softmax_attention(*args, is_causal=True, block_sizes=block_sizes)
    return out.astype(jnp.float32).sum()

  return jax.grad(loss, (0, 1, 2))(query, key, value)


def _inputs(length, heads=(4, 2), head_dim=128, dtype="bfloat16"):
  n, k = heads
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
  keys = shape((1, length, k, head_dim))
  return shape((1, length, n, head_dim)), keys, keys


@BOTH
def test_what_none_takes_compiles_and_memory_is_linear(topology):
  device, *_ = tpu_devices(topology)
  sizes = {}
  for length in (4096, 16384):
    executable = compiled_for(device, _gradients, *_inputs(length))
    # Forward; queries; keys and values.
    assert num_kernels(executable, "tpu") == 3
    sizes[length] = temporary_bytes(executable)
  assert 3 < sizes[16384] / sizes[4096] < 4.5
  # One head's logits alone would be far more.
  assert sizes[16384] < 16384**2


@pytest.mark.parametrize(
  ("heads", "dtype", "sizes"),
  [
    ((32, 1), "bfloat16", None),
    ((2, 2), "float32", None),
    ((2, 2), "bfloat16", BlockSizes(2048, 1024, 2048, 512)),
  ],
)
def test_what_is_said_to_fit_into_vmem_fits(heads, dtype, sizes):
  args = _inputs(4096, heads, dtype=dtype)
  assert (
    mosaic_tpu.supports(Operands(*args), Options(1.0, None, 0, sizes)) is None
  )
  device, *_ = tpu_devices("v5e:2x2")
  executable = compiled_for(
    device, functools.partial(_gradients, block_sizes=sizes), *args
  )
  assert num_kernels(executable, "tpu") == 3


# Blocks, longest sequence, heads and head size of attention-io's tier "full".
@pytest.mark.parametrize("block", [128, 256, 512, 1024])
def test_what_the_experiment_times_at_full_size_fits(block):
  sizes = BlockSizes(block, block, block, block)
  run = functools.partial(softmax_attention, block_sizes=sizes)
  args = _inputs(32768, (8, 8), 64)
  executable = compiled_for(tpu_devices("v5e:2x2")[0], run, *args)
  assert num_kernels(executable, "tpu") == 1


@BOTH
@pytest.mark.parametrize(
  ("dtype", "head_dim"), [("bfloat16", 80), ("float32", 64)]
)
def test_all_that_hides_or_shifts_scores_compiles(topology, dtype, head_dim):
  x = structs(h=head_dim, dtype=dtype, everything=True)
  options = Options(0.1, 300, 0)
  assert mosaic_tpu.supports(x, options) is None

  def run(x, bars):
    out, lse = mosaic_tpu.forward(x, options)
    return mosaic_tpu.backward(x, options, out, lse, *bars)

  device, *_ = tpu_devices(topology)
  bars = jax.eval_shape(cotangents, x)
  assert num_kernels(compiled_for(device, run, x, bars), "tpu") == 4


@pytest.mark.parametrize("spec", [P("x"), P(None, "x")])
def test_four_chips_share_the_work(spec):
  mesh = Mesh(
    np.array(tpu_devices("v5e:2x2")), ("x",), axis_types=(AxisType.Explicit,)
  )
  args = [
    jax.ShapeDtypeStruct(
      (4, *x.shape[1:]), x.dtype, sharding=NamedSharding(mesh, spec)
    )
    for x in _inputs(2048)
  ]
  with jax.set_mesh(mesh):
    executable = jax.jit(_gradients).lower(*args).compile()
  assert num_kernels(executable, "tpu") == 3
  # Each chip has a quarter of the queries; keys of a cut length are gathered.
  assert ("all-gather" in executable.as_text()) == (spec == P(None, "x"))
