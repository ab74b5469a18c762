"""NTK-Attention's GPU kernels: rungs A, B and C, and E, of the ladder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxattn.attention import PrefixState, ntk_attention
from pallas_kernels.flash_attention import BlockSizes
from pallas_kernels.ntk_attention import mosaic_gpu
from pallas_kernels.ntk_attention.operands import Options
from tests._recompile import quick_jit
from tests.pallas_kernels._flash import assert_close
from tests.pallas_kernels._ladder import (
  CALLS,
  compiled_for,
  cuda_device,
  gpu_interpreter,
  lowered,
  temporary_bytes,
)
from tests.pallas_kernels._ntk import (
  by_kernel,
  by_reference,
  cotangents,
  operands,
  structs,
)

_EPS = float(jnp.finfo(jnp.bfloat16).eps)

# --- A and B: one interpreter shows the mathematics and the order of copies ---


def test_values_gradients_and_order_of_copies():
  # Grouped heads. Sums over the prefix outweigh those over the keys, and are
  # of either sign; one query has none.
  x = operands((2, 70, 130, 2, 1, 64, 60), 5, 2, {}, "bfloat16")
  slope = 300 * jnp.sign(jnp.arange(70) - 35).astype("float32")
  features = (1 + x.query_features) * slope[None, :, None, None]
  x = x._replace(query_features=features)
  options, bars = Options(0.1, True), cotangents(x)
  # Keys that no query sees fill a block of their own.
  unread = x._replace(
    key=x.key.at[:, 128:].set(jnp.nan), value=x.value.at[:, 128:].set(jnp.nan)
  )
  with gpu_interpreter() as interpret:
    got = by_kernel(
      unread, options, bars, backend=mosaic_gpu, interpret=interpret
    )
  want = by_reference(x, options, bars)
  assert set(np.unique(want[2])) == {-1, 1}
  np.testing.assert_array_equal(got[2], want[2])
  # Weights are rounded before they meet the values, results once more.
  assert_close(got, want, 4 * _EPS)


def test_vmap_is_a_larger_batch_and_sums_may_have_any_size():
  x = operands((1, 10, 64, 1, 1, 64, 64), 5, 1, {}, "bfloat16")
  x, options = x._replace(query=10 * x.query), Options(1.0)
  sizes = jnp.asarray([0, 1e-30, 1, 1e30], jnp.float32)

  def forward(size):
    y = x._replace(z=x.z * size, k=x.k * size)
    return mosaic_gpu.forward(y, options, interpret=interpret)

  with gpu_interpreter() as interpret:
    got = quick_jit(jax.vmap(forward))(sizes)
  for i, size in enumerate(sizes):
    y = x._replace(z=x.z * size, k=x.k * size)
    want = by_reference(y, options, cotangents(y))[:3]
    assert_close([y[i] for y in jax.tree.leaves(got)], want, 2 * _EPS)


# --- C: lowering ---


def _gradients(query, key, value, z, k):
  def loss(query, key, value, z, k):
    out = ntk_attention(
      query, key, value, PrefixState(z, k), is_causal=True,
      implementation="pallas",
    )  # fmt: skip
    return out.astype(jnp.float32).sum()

  return jax.grad(loss, tuple(range(5)))(query, key, value, z, k)


def _inputs(length, head_dim=128):
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  wide = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  keys = shape((2, length, 2, head_dim))
  state = wide((2, head_dim, head_dim)), wide((2, head_dim))
  return shape((2, length, 4, head_dim)), keys, keys, *state


def test_lowers_for_a_gpu_also_under_vmap_and_shard_map():
  args = _inputs(200, 80)
  text = lowered(_gradients, *args, platform="cuda")
  # Forward; queries; keys and values.
  assert text.count(f"@{CALLS['cuda']}") == 3
  mapped = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), args
  )
  text = lowered(jax.vmap(_gradients), *mapped, platform="cuda")
  assert text.count(f"@{CALLS['cuda']}") == 3
  mesh = jax.make_mesh((2,), ("block",), axis_types=(AxisType.Auto,))
  specs = *[P("block")] * 3, P(), P()
  sharded = jax.shard_map(
    _gradients, mesh=mesh, in_specs=specs, out_specs=specs
  )
  text = lowered(sharded, *args, platform="cuda")
  assert text.count(f"@{CALLS['cuda']}") == 3
  assert "nvshmem" not in text


# --- E: ptxas ---


@pytest.mark.aot_cuda
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_for_an_h100_and_memory_is_linear(head_dim):
  sizes = {}
  # Long enough for features to be made in tiles.
  for length in (16384, 65536):
    executable = compiled_for(
      cuda_device(), _gradients, *_inputs(length, head_dim)
    )
    # Forward; queries; keys and values.
    assert executable.as_text().count(f'target="{CALLS["cuda"]}"') == 3
    sizes[length] = temporary_bytes(executable)
  assert 3 < sizes[65536] / sizes[16384] < 4.5
  # One head's logits alone would be far more.
  assert sizes[65536] < 65536**2


@pytest.mark.aot_cuda
@pytest.mark.parametrize("blocks", [(128, 64), (64, 128)])
def test_largest_blocks_fit_into_shared_memory(blocks):
  x = structs(h=128, hv=128)
  options = Options(1.0, True, BlockSizes(*blocks, 128, 128))
  assert mosaic_gpu.supports(x, options) is None

  def run(x, bars):
    out, total = mosaic_gpu.forward(x, options)
    return mosaic_gpu.backward(x, options, out, total, *bars)

  bars = jax.eval_shape(cotangents, x)
  executable = compiled_for(cuda_device(), run, x, bars)
  assert executable.as_text().count(f'target="{CALLS["cuda"]}"') == 3


# --- what is refused ---


@pytest.mark.parametrize(
  ("change", "options", "reason"),
  [
    ({"dtype": "float32"}, {}, "takes float16 or bfloat16, got float32"),
    ({"everything": True}, {}, "the GPU kernel takes no bias"),
    ({}, {"precision": "highest"}, "takes no precision, got 'highest'"),
    (
      {"h": 128, "hv": 128},
      {"block_sizes": BlockSizes(128, 128, 64, 64)},
      "block_q=128 with block_k=128 needs 257 KiB of a GPU's shared memory, "
      "which has 227: use block_k=64",
    ),
  ],
)
def test_kernel_says_why_it_cannot(change, options, reason):
  x = structs(**change)
  assert reason in str(mosaic_gpu.supports(x, Options(1.0, **options)))
