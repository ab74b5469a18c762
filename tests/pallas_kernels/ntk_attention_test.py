"""NTK-Attention's TPU kernels: rungs A, B and C of the ladder."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import BlockSizes
from pallas_kernels.ntk_attention import mosaic_tpu, ntk_attention
from pallas_kernels.ntk_attention.operands import Operands, Options
from tests._recompile import quick_jit
from tests.pallas_kernels._flash import assert_close
from tests.pallas_kernels._ladder import CALLS, lowered, tpu_interpreter
from tests.pallas_kernels._ntk import (
  CASES,
  by_kernel,
  by_reference,
  case,
  cotangents,
  structs,
)

# --- A: the mathematics, interpreted ---


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_dense_formula(name):
  x, options = case(name, jnp.float64)
  bars = cotangents(x)
  want = by_reference(x, options, bars)
  assert_close(by_kernel(x, options, bars), want, 1e-13)
  # Sums of weights of all signs, and of nothing.
  signs = {-1, 0, 1} if name == "signs, mask, bias" else {1}
  assert set(np.unique(want[2])) == signs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_of_narrow_dtypes_are_float32(dtype):
  x, options = case("plain", dtype)
  bars = cotangents(x)
  got = by_kernel(x, options, bars)
  assert {y.dtype for y in (*got[1:3], *got[6:])} == {jnp.dtype("float32")}
  assert {y.dtype for y in (got[0], *got[3:6])} == {jnp.dtype(dtype)}
  # Weights are rounded before they meet the values, results once more.
  eps = float(jnp.finfo(dtype).eps)
  assert_close(got, by_reference(x, options, bars), 4 * eps)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_prefixes_of_any_size(size):
  # Logits from -200 to 200 meet sums over the prefix that would hide them, or
  # be hidden by them, if either were relative to 1.
  x, options = case("plain", jnp.float32)
  steps = jnp.linspace(0, 40, 16, dtype=jnp.float32)
  x = x._replace(
    query=x.query * steps[None, :, None, None],
    query_features=x.query_features * jnp.float32(size),
  )
  out, total = _forward(x, options)
  want = by_reference(x, options, cotangents(x))[:3]
  assert np.isfinite(want[1]).all()
  assert_close((out, *total), want, 1e-5)


def test_skipped_blocks_are_never_read():
  x, options = case("causal, grouped", jnp.float32)
  want = _forward(x, options)
  # Queries 0 to 11 see nothing of the last two blocks of keys.
  got = _forward(
    x._replace(
      key=x.key.at[:, 12:].set(jnp.nan), value=x.value.at[:, 12:].set(jnp.nan)
    ),
    options,
  )
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(g[:, :12], w[:, :12])
  assert np.isnan(got[0][:, 12:]).any()


def test_vmap_equals_a_loop():
  # States too.
  x, options = case("causal, grouped", jnp.float32)
  batch = jax.tree.map(lambda y: jnp.stack([y, y[::-1]]), x)
  got = jax.vmap(lambda x: _forward(x, options))(batch)
  for i in range(2):
    want = _forward(jax.tree.map(lambda y, i=i: y[i], batch), options)
    pairs = jax.tree.leaves(got), jax.tree.leaves(want)
    assert_close([y[i] for y in pairs[0]], pairs[1], 1e-6)


@pytest.mark.parametrize("implementation", ["interpret", "reference"])
def test_public_function_and_its_gradient(implementation):
  x, options = case("signs, mask, bias", jnp.float64)

  def attend(*floats):
    *floats, bias = floats
    return ntk_attention(
      *floats, bias=bias, mask=x.mask, scale=options.scale,
      return_residual=True, implementation=implementation,
    )  # fmt: skip

  def run(floats, bars):
    result, vjp = jax.vjp(attend, *floats)
    return *jax.tree.leaves(result), *vjp(bars)

  bars = cotangents(x)
  got = quick_jit(run)(x[:7], bars)
  assert_close(got, by_reference(x, options, bars), 1e-12)


# --- B: copies, races and bounds, simulated ---


def test_kernels_do_not_race_nor_read_out_of_bounds():
  x, options = case("causal, grouped", jnp.float32, BlockSizes(16, 8, 8, 16))
  bars = cotangents(x)
  with tpu_interpreter() as interpret:
    got = by_kernel(x, options, bars, interpret=interpret)
  assert_close(got, by_reference(x, options, bars), 1e-5)


# --- C: lowering ---


@pytest.mark.parametrize(
  ("dtype", "num_features", "heads"),
  [("bfloat16", 64, 2), ("float32", 2145, 2), ("bfloat16", 200, 4)],
)
def test_lowers_for_a_tpu(dtype, num_features, heads):
  x = structs(dtype, num_features, heads)
  options = Options(0.1, True)
  assert mosaic_tpu.supports(x, options) is None

  def run(x, bars):
    out, total = mosaic_tpu.forward(x, options)
    return mosaic_tpu.backward(x, options, out, total, *bars)

  text = lowered(run, x, jax.eval_shape(cotangents, x), platform="tpu")
  # Forward; queries; keys and values.
  assert text.count(f"@{CALLS['tpu']}") == 3


# --- what is refused ---


@pytest.mark.parametrize(
  ("dtype", "options", "reason"),
  [
    ("float16", {}, "takes float32 or bfloat16, got float16"),
    (
      "float32",
      {"precision": "high"},
      "precision None, 'default' or 'highest'",
    ),
    (
      "float32",
      {"block_sizes": BlockSizes(128, 100, 128, 128)},
      "block_k must be a multiple of 128 on a TPU, got 100: use 128",
    ),
    (
      "float32",
      {"block_features": 200},
      "block_features must be a multiple of 128 on a TPU, got 200: use 256",
    ),
    (
      "bfloat16",
      {"block_sizes": BlockSizes(1024, 256, 512, 512), "block_features": 512},
      "leaves 7936 KiB of a TPU's VMEM to features, and 512 of them take 8544: "
      "use block_features=128",
    ),
    (
      "float32",
      {"block_sizes": BlockSizes(1024, 512, 512, 256)},
      "leaves 0 KiB of a TPU's VMEM to features, and 128 of them take 2136: "
      "use block_k=256",
    ),
  ],
)
def test_kernel_says_why_it_cannot(dtype, options, reason):
  x = structs(dtype, 1000, everything=True)._replace(mask=None)
  assert reason in str(mosaic_tpu.supports(x, Options(0.1, **options)))


def test_kernel_refuses_heads_that_do_not_fit():
  narrow, shape = (
    functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    for dtype in ("bfloat16", "float32")
  )
  query, key = narrow((1, 256, 32, 128)), narrow((1, 256, 1, 128))
  prefix = shape((1, 256, 32, 128)), shape((32, 128, 128)), shape((32, 128))
  x = Operands(query, key, key, *prefix)
  reason = mosaic_tpu.supports(x, Options(1.0))
  assert "use fewer heads of query to one of key" in str(reason)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"implementation": "fast"}, "implementation must be one of"),
    ({"key": jnp.ones((1, 4, 2, 3))}, "key must have shape (1, 4, 2, 8)"),
    ({"mask": jnp.ones((1, 2, 4, 4))}, "mask must be boolean, got float64"),
    (
      {"query_features": jnp.ones((1, 4, 5))},
      "query_features must have shape (1, 4, 2) + r, got (1, 4, 5)",
    ),
    ({"z": jnp.ones((2, 5, 8), int)}, "z must be floating, got int64"),
    ({"z": jnp.ones((2, 5, 7))}, "z must have shape (2, 5, 8), got (2, 5, 7)"),
    ({"k": jnp.ones(5)}, "k must have shape (2, 5), got (5,)"),
    ({"block_features": 0}, "block_features must be a positive integer, got 0"),
  ],
)
def test_bad_input(change, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    ntk_attention(**_arguments() | change)


def test_forced_kernel_says_why_it_cannot():
  with pytest.raises(NotImplementedError, match="takes float32 or bfloat16"):
    ntk_attention(**_arguments() | {"implementation": "mosaic_tpu"})


def _arguments():
  x = jnp.ones((1, 4, 2, 8), jnp.float64)
  return {
    "query": x,
    "key": x,
    "value": x,
    "query_features": x[..., :5],
    "z": jnp.ones((2, 5, 8)),
    "k": jnp.ones((2, 5)),
    "implementation": "interpret",
  }


@functools.partial(jax.jit, static_argnums=1)
def _forward(x, options):
  return mosaic_tpu.forward(x, options, interpret=True)
