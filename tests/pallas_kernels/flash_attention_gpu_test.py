"""Exact attention's GPU kernels: rungs A, B and C, and E, of the ladder."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxattn.attention import softmax_attention
from pallas_kernels.flash_attention import BlockSizes, mosaic_gpu
from pallas_kernels.flash_attention.operands import Operands, Options
from pallas_kernels.flash_attention.reference import reference
from tests._recompile import quick_jit
from tests.pallas_kernels._flash import (
  assert_close,
  by_kernel,
  by_reference,
  cotangents,
  operands,
)
from tests.pallas_kernels._ladder import (
  CALLS,
  compiled_for,
  cuda_device,
  gpu_interpreter,
  lowered,
  num_kernels,
  temporary_bytes,
)

_EPS = float(jnp.finfo(jnp.bfloat16).eps)

# --- A and B: one interpreter shows the mathematics and the order of copies ---


def test_values_gradients_and_order_of_copies():
  # Grouped heads; a window, lengths and an offset leave queries with no key.
  extras = {"lengths": True, "offset": 9}
  x = operands((2, 70, 130, 2, 1, 64, 60), extras, "bfloat16")
  x = x._replace(key_lengths=jnp.asarray([130, 50]))
  options, bars = Options(0.1, 20, 0), cotangents(x)
  with gpu_interpreter() as interpret:
    got = by_kernel(x, options, bars, backend=mosaic_gpu, interpret=interpret)
  want = by_reference(x, options, bars)
  assert jnp.isneginf(want[1]).any()
  # Weights are rounded before they meet the values, results once more.
  assert_close(got, want, 4 * _EPS)


def test_vmap_is_a_larger_batch():
  x = operands((1, 64, 64, 1, 1, 64, 64), {}, "bfloat16")
  queries, options = jnp.stack([x.query, 2 * x.query]), Options(0.1)
  with gpu_interpreter() as interpret:
    got = quick_jit(
      jax.vmap(
        lambda query: mosaic_gpu.forward(
          x._replace(query=query), options, interpret=interpret
        )
      )
    )(queries)
  for i in range(2):
    want = reference(x._replace(query=queries[i]), options)
    assert_close([y[i] for y in got], want, 4 * _EPS)


# --- C: lowering ---


def _gradients(query, key, value, lengths=None, implementation="pallas"):
  def loss(*args):
    out = softmax_attention(
      *args, is_causal=True, key_value_seq_lengths=lengths,
      implementation=implementation,
    )  # fmt: skip
    return out.astype(jnp.float32).sum()

  return jax.grad(loss, (0, 1, 2))(query, key, value)


def _inputs(length, head_dim=128):
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  keys = shape((2, length, 2, head_dim))
  return shape((2, length, 4, head_dim)), keys, keys


def test_lowers_for_a_gpu_also_under_vmap_and_shard_map():
  args = *_inputs(200, 80), jax.ShapeDtypeStruct((2,), jnp.int32)
  text = lowered(_gradients, *args, platform="cuda")
  # Forward; queries; keys and values.
  assert text.count(f"@{CALLS['cuda']}") == 3
  mapped = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), args
  )
  text = lowered(jax.vmap(_gradients), *mapped, platform="cuda")
  assert text.count(f"@{CALLS['cuda']}") == 3
  # Named as an axis of the grid: a block must not take itself for a device.
  mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
  sharded = jax.shard_map(
    _gradients, mesh=mesh, in_specs=P("batch"), out_specs=P("batch")
  )
  text = lowered(sharded, *args, platform="cuda")
  assert text.count(f"@{CALLS['cuda']}") == 3
  assert "nvshmem" not in text


# --- E: ptxas ---


@pytest.mark.aot_cuda
@pytest.mark.parametrize("head_dim", [64, 128])
def test_large_blocks_a_window_and_lengths_compile_for_an_h100(head_dim):
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float16)
  lengths = jax.ShapeDtypeStruct((2,), jnp.int32)

  def gradients(query, key, value, lengths):
    def loss(*args):
      out = softmax_attention(
        *args, key_value_seq_lengths=lengths, local_window_size=(300, 20),
        block_sizes=BlockSizes(128, 128, 128, 128), implementation="pallas",
      )  # fmt: skip
      return out.astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))(query, key, value)

  x = shape((2, 1000, 2, head_dim))
  text = compiled_for(cuda_device(), gradients, x, x, x, lengths).as_text()
  assert text.count(f'target="{CALLS["cuda"]}"') == 3


@pytest.mark.aot_cuda
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_for_an_h100_and_memory_is_linear(head_dim):
  sizes = {}
  for length in (4096, 16384):
    executable = compiled_for(
      cuda_device(), _gradients, *_inputs(length, head_dim)
    )
    # Forward; queries; keys and values.
    assert num_kernels(executable, "cuda") == 3
    sizes[length] = temporary_bytes(executable)
  assert 3 < sizes[16384] / sizes[4096] < 4.5
  # One head's logits alone would be far more.
  assert sizes[16384] < 16384**2


# --- what is refused ---


@pytest.mark.parametrize(
  ("change", "options", "reason"),
  [
    ({"dtype": "float32"}, {}, "takes float16 or bfloat16, got float32"),
    ({"value_dim": 129}, {}, "head sizes up to 128, got 129 in value"),
    ({"bias": True}, {}, "the GPU kernel takes no bias"),
    ({}, {"precision": "highest"}, "takes no precision, got 'highest'"),
    (
      {},
      {"block_sizes": BlockSizes(64, 64, 32, 64)},
      "block_q_bwd must be 64 or 128 on a GPU, got 32",
    ),
  ],
)
def test_kernel_says_why_it_cannot(change, options, reason):
  dtype = jnp.dtype(change.get("dtype", "bfloat16"))
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
  x = Operands(
    shape((1, 64, 2, 64)),
    shape((1, 64, 2, 64)),
    shape((1, 64, 2, change.get("value_dim", 64))),
    bias=shape((1, 1, 64, 64)) if "bias" in change else None,
  )
  assert reason in str(mosaic_gpu.supports(x, Options(0.1, **options)))
