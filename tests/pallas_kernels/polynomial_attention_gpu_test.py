"""Polynomial attention's GPU kernels: rungs A, B, C and E of the ladder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxattn.attention import polynomial_attention
from pallas_kernels.polynomial_attention import mosaic_gpu
from pallas_kernels.polynomial_attention.reference import reference
from tests._recompile import quick_jit
from tests.pallas_kernels._ladder import (
  CALLS,
  compiled_for,
  cuda_device,
  gpu_interpreter,
  lowered,
  num_kernels,
  temporary_bytes,
)
from tests.pallas_kernels._polynomial import (
  assert_close,
  by_kernel,
  by_reference,
  cotangent,
  operands,
  options_of,
  structs,
  value_and_gradients,
)

# What two numbers of bfloat16 leave of one.
_EPS = 2.0**-16

# --- A and B: one interpreter shows the mathematics and the order of copies ---

# (P, G, T, S, H, Hv), degree, options; tiles are of 128 tokens.
_CASES = {
  "full, grouped": ((1, 2, 20, 150, 2, 3), 1, {"chunk_size": 256}),
  "two blocks of features": ((1, 1, 9, 9, 64, 2), 1, {}),
  "causal, exact, grouped, a state between chunks": (
    (1, 2, 150, 150, 1, 2),
    3,
    {"is_causal": True, "radius": 0.2, "chunk_size": 128},
  ),
}


@pytest.mark.parametrize("name", _CASES)
def test_values_gradients_and_order_of_copies(name):
  sizes, degree, extras = _CASES[name]
  x = operands(sizes, jnp.float32)
  options = options_of(sizes[4], degree, None)._replace(**extras)
  bar = cotangent(x)
  with gpu_interpreter() as interpret:
    got = by_kernel(x, options, bar, interpret=interpret, backend=mosaic_gpu)
  assert {y.dtype for y in got} == {jnp.dtype(jnp.float32)}
  assert_close(got, by_reference(x, options, bar), 2 * _EPS)
  # The first keys are hidden: a causal query there sees nothing, and gives 0.
  assert (np.asarray(got[0]) == 0).all((1, 2)).any() == options.is_causal


def test_vmap_is_a_larger_batch():
  x = operands((2, 1, 9, 9, 2, 2), jnp.float32)
  options = options_of(2, 2, None, is_causal=True)

  def run(query):
    call = x._replace(query=query)
    return mosaic_gpu.forward(call, options, interpret=interpret)[0]

  queries = jnp.stack([x.query, 2 * x.query])
  with gpu_interpreter() as interpret:
    got = quick_jit(jax.vmap(run))(queries)
  for i in range(2):
    want = reference(x._replace(query=queries[i]), options)
    assert_close([got[i]], [want], _EPS)


# --- C: lowering ---


def _gradients(query, key, value, is_causal=True):
  def loss(*args):
    return polynomial_attention(
      *args, degree=2, radius=1.0, is_causal=is_causal, implementation="pallas"
    ).sum()

  return jax.grad(loss, (0, 1, 2))(query, key, value)


def _inputs(length, head_dim=32, batch=(2,)):
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  keys = shape((*batch, length, 2, head_dim))
  return shape((*batch, length, 4, head_dim)), keys, keys


def test_lowers_for_a_gpu_under_vmap_and_shard_map():
  mesh = jax.make_mesh((2,), ("block",), axis_types=(AxisType.Auto,))
  sharded = jax.shard_map(
    jax.vmap(_gradients), mesh=mesh, in_specs=P("block"), out_specs=P("block")
  )
  text = lowered(sharded, *_inputs(1000, batch=(2, 3)), platform="cuda")
  # Pairs inside of chunks; what they leave; what is read. Backward: the same of
  # queries, and of keys, whose cotangents and values' are read apart.
  assert text.count(f"@{CALLS['cuda']}") == 3 + 3 + 4
  assert "nvshmem" not in text


def test_the_largest_heads_fit():
  x, options = structs(h=128, hv=79, g=1, t=256, degree=1)
  assert mosaic_gpu.supports(x, options) is None
  run = functools.partial(
    value_and_gradients, options=options, interpret=False, backend=mosaic_gpu
  )
  text = lowered(run, x, jax.eval_shape(cotangent, x), platform="cuda")
  assert CALLS["cuda"] in text


# --- E: ptxas ---


@pytest.mark.aot_cuda
@pytest.mark.parametrize("is_causal", [False, True])
def test_compiles_for_an_h100_and_memory_is_linear(is_causal):
  run = functools.partial(_gradients, is_causal=is_causal)
  sizes = {}
  for length in (4096, 16384):
    executable = compiled_for(cuda_device(), run, *_inputs(length))
    # Causal, the states that both passes read are summed up only once.
    assert num_kernels(executable, "cuda") == (9 if is_causal else 6)
    # Else the second half of each number would be 0.
    assert "reduce-precision" in executable.as_text()
    sizes[length] = temporary_bytes(executable)
  assert 3 < sizes[16384] / sizes[4096] < 4.5
  # Of all features one head's alone would be more than a tenth.
  features = 4 * 561 * 16384
  assert sizes[16384] < 16 * features


# --- what is refused ---


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"dtype": "bfloat16"}, "the GPU kernel takes float32, got bfloat16"),
    ({"precision": "highest"}, "precision None, 'default' or 'high', got"),
    (
      {"chunk_size": 100},
      "chunk_size must be a multiple of 128 on a GPU, got 100: use 128",
    ),
    ({"h": 129}, "takes head sizes up to 128, got 129 in query"),
    ({"hv": 129}, "takes head sizes up to 128, got 129 in value"),
    (
      {"h": 128, "hv": 80},
      "head size 128 with 80 in value needs 235 KiB of a GPU's shared memory, "
      "which has 227: use at most 79 in value",
    ),
  ],
)
def test_kernel_says_why_it_cannot(change, reason):
  x, options = structs(**change, degree=1)
  assert reason in str(mosaic_gpu.supports(x, options))
