"""ReLU attention's GPU kernels: rungs A, B and C, and E, of the ladder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxattn.attention import relu_attention
from pallas_kernels import relu_attention as kernels
from pallas_kernels.flash_attention import BlockSizes
from pallas_kernels.relu_attention import mosaic_gpu
from pallas_kernels.relu_attention.operands import Options
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
from tests.pallas_kernels._relu import (
  by_kernel,
  by_reference,
  cotangents,
  operands,
  structs,
)

# --- A and B: one interpreter shows the mathematics and the order of copies ---


@pytest.mark.parametrize(
  ("dtype", "sizes", "options"),
  [
    # Keys that no query sees fill a block of their own.
    ("bfloat16", (2, 70, 150, 2, 1, 64, 60), Options(2, True)),
    ("float16", (1, 64, 70, 1, 1, 32, 64), Options(1)),
  ],
)
def test_values_gradients_and_order_of_copies(dtype, sizes, options):
  x = operands(sizes, -0.5, None, dtype)
  # Every third query is far below its threshold.
  x = x._replace(threshold=x.threshold.at[:, ::3].set(100))
  bars, unread = cotangents(x), x
  if options.is_causal:
    unread = x._replace(
      key=x.key.at[:, 128:].set(jnp.nan), value=x.value.at[:, 128:].set(jnp.nan)
    )
  with gpu_interpreter() as interpret:
    got = by_kernel(
      unread, options, bars, backend=mosaic_gpu, interpret=interpret
    )
  assert {y.dtype for y in (got[1], *got[5:])} == {jnp.dtype("float32")}
  assert {y.dtype for y in (got[0], *got[2:5])} == {jnp.dtype(dtype)}
  want = by_reference(x, options, bars)
  np.testing.assert_array_equal(want[1][:, ::3], 0)
  np.testing.assert_array_equal(want[1] == 0, got[1] == 0)
  # Weights are rounded before they meet the values, results once more.
  assert_close(got, want, 4 * float(jnp.finfo(dtype).eps))


def test_vmap_is_a_larger_batch_and_excesses_may_have_any_size():
  # Growing along the keys, so that sums are rescaled at every block; a power
  # of the size itself would vanish or overflow.
  x = operands((1, 10, 128, 1, 1, 64, 64), 0.0, None, "bfloat16")
  growing = jnp.arange(-16.0, 112) / 128
  x = x._replace(
    query=jnp.zeros_like(x.query).at[..., 0].set(1),
    key=jnp.broadcast_to(growing[:, None, None], x.key.shape).astype(
      x.key.dtype
    ),
    threshold=jnp.zeros_like(x.threshold),
  )
  scales, options = jnp.asarray([1e-30, 1.0, 3e37], jnp.float32), Options(3)
  with gpu_interpreter() as interpret:
    got = quick_jit(
      jax.vmap(
        lambda scale: mosaic_gpu.forward(
          x._replace(scale=scale), options, interpret=interpret
        )
      )
    )(scales)
  for i, scale in enumerate(scales):
    y = x._replace(scale=scale)
    want = by_reference(y, options, cotangents(y))
    assert_close(
      [y[i] for y in got], want[:2], float(jnp.finfo("bfloat16").eps)
    )


# --- C: lowering ---


def _gradients(*args, alpha=1):
  """Of queries, keys, values; threshold and scale, if there are any."""

  def loss(query, key, value, threshold=0.0, scale=None):
    out = relu_attention(
      query, key, value, threshold=threshold, scale=scale, alpha=alpha,
      is_causal=True, implementation="pallas",
    )  # fmt: skip
    return out.astype(jnp.float32).sum()

  return jax.grad(loss, tuple(range(len(args))))(*args)


def _inputs(length, head_dim=128):
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  keys = shape((2, length, 2, head_dim))
  return shape((2, length, 4, head_dim)), keys, keys


@pytest.mark.parametrize("alpha", [1, 2, 3])
def test_lowers_for_a_gpu(alpha):
  gradients = functools.partial(_gradients, alpha=alpha)
  text = lowered(gradients, *_inputs(200, 80), platform="cuda")
  # Forward; queries, thresholds and scale; keys and values.
  assert text.count(f"@{CALLS['cuda']}") == 3


def test_lowers_under_vmap_and_shard_map():
  wide = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  args = *_inputs(200), wide((2, 200, 4)), wide(())
  mapped = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), args
  )
  text = lowered(jax.vmap(_gradients), *mapped, platform="cuda")
  assert text.count(f"@{CALLS['cuda']}") == 3
  mesh = jax.make_mesh((2,), ("block",), axis_types=(AxisType.Auto,))
  specs = *[P("block")] * 4, P()
  sharded = jax.shard_map(
    _gradients, mesh=mesh, in_specs=specs, out_specs=specs
  )
  text = lowered(sharded, *args, platform="cuda")
  assert text.count(f"@{CALLS['cuda']}") == 3
  assert "nvshmem" not in text


# --- E: ptxas ---


@pytest.mark.aot_cuda
@pytest.mark.parametrize(("head_dim", "alpha"), [(64, 1), (128, 2)])
def test_compiles_for_an_h100_and_memory_is_linear(head_dim, alpha):
  sizes = {}
  gradients = functools.partial(_gradients, alpha=alpha)
  for length in (4096, 16384):
    executable = compiled_for(
      cuda_device(), gradients, *_inputs(length, head_dim)
    )
    # Forward; queries, thresholds and scale; keys and values.
    assert executable.as_text().count(f'target="{CALLS["cuda"]}"') == 3
    sizes[length] = temporary_bytes(executable)
  assert 3 < sizes[16384] / sizes[4096] < 4.5
  # One head's scores alone would be far more.
  assert sizes[16384] < 16384**2


@pytest.mark.aot_cuda
def test_largest_blocks_fit_into_shared_memory():
  x, options = structs(h=128, hv=128), Options(1, True, BlockSizes(*[128] * 4))
  x = x._replace(mask=None)
  assert mosaic_gpu.supports(x, options) is None

  def run(x, bars):
    out, norm = mosaic_gpu.forward(x, options)
    return mosaic_gpu.backward(x, options, out, norm, *bars)

  bars = jax.eval_shape(cotangents, x)
  executable = compiled_for(cuda_device(), run, x, bars)
  assert executable.as_text().count(f'target="{CALLS["cuda"]}"') == 3


# --- what is refused ---


@pytest.mark.parametrize(
  ("change", "options", "reason"),
  [
    ({"dtype": "float32"}, {}, "takes float16 or bfloat16, got float32"),
    ({"mask": True}, {}, "the GPU kernel takes no mask"),
    ({}, {"precision": "highest"}, "takes no precision, got 'highest'"),
    (
      {},
      {"block_sizes": BlockSizes(64, 64, 64, 96)},
      "block_k_bwd must be 64 or 128 on a GPU, got 96",
    ),
  ],
)
def test_kernel_says_why_it_cannot(change, options, reason):
  x = structs(change.get("dtype", "bfloat16"))
  x = x if "mask" in change else x._replace(mask=None)
  assert reason in str(mosaic_gpu.supports(x, Options(**options)))


def test_forced_kernel_says_why_it_cannot():
  x = jnp.ones((1, 4, 2, 129), jnp.bfloat16)
  with pytest.raises(
    NotImplementedError, match="head sizes up to 128, got 129 in query"
  ):
    kernels.relu_attention(x, x, x, implementation="mosaic_gpu")


def test_kernel_is_refused_when_a_gpu_cannot_take_the_dtype():
  args = [jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)] * 3
  with pytest.raises(
    NotImplementedError,
    match=r"implementation='pallas' cannot run here: the GPU kernel takes "
    r"float16 or bfloat16, got float32",
  ):
    lowered(_gradients, *args, platform="cuda")
