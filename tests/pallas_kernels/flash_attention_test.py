"""Exact attention's TPU kernels: rungs A, B and C of the ladder."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import (
  BlockSizes,
  flash_attention,
  mosaic_tpu,
)
from pallas_kernels.flash_attention.operands import Options
from tests._recompile import quick_jit
from tests.pallas_kernels._flash import (
  CASES,
  assert_close,
  by_kernel,
  by_reference,
  case,
  cotangents,
  structs,
)
from tests.pallas_kernels._ladder import CALLS, lowered, tpu_interpreter

# --- A: the mathematics, interpreted ---


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_dense_formula(name):
  x, options = case(name, jnp.float64)
  bars = cotangents(x)
  want = by_reference(x, options, bars)
  assert_close(by_kernel(x, options, bars), want, 1e-13)
  # A case with a mask of its own has queries that see nothing.
  sees_all = name in ("plain", "causal, grouped")
  assert np.isneginf(want[1]).any() == (not sees_all)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_of_narrow_dtypes_are_float32(dtype):
  x, options = case("plain", dtype)
  bars = cotangents(x)
  got = by_kernel(x, options, bars)
  assert got[1].dtype == jnp.float32
  assert {y.dtype for y in (got[0], *got[2:])} == {jnp.dtype(dtype)}
  # Weights are rounded before they meet the values, results once more.
  eps = float(jnp.finfo(dtype).eps)
  assert_close(got, by_reference(x, options, bars), 4 * eps)


def test_skipped_blocks_are_never_read():
  x, options = case("causal, grouped", jnp.float32)
  bars = cotangents(x)
  want = by_reference(x, options, bars)
  # The first block of queries sees one block of keys; the rest is poison for
  # it, and so is what lies behind the keys' length for all.
  poisoned = x._replace(
    key=x.key.at[:, 15:].set(jnp.nan),
    value=x.value.at[:, 15:].set(jnp.nan),
    key_lengths=jnp.full(1, 15),
  )
  hidden = x._replace(key_lengths=jnp.full(1, 15))
  got = by_kernel(poisoned, options, bars)
  assert_close(got, by_reference(hidden, options, bars), 1e-5)
  assert not np.allclose(got[0], want[0])


def test_vmap_equals_a_loop():
  # Lengths too, which steer the grid.
  x, options = case("lengths, offset", jnp.float32)
  batch = jax.tree.map(
    lambda y: jnp.stack([y, y[::-1]] if y.ndim else [y, y]), x
  )
  run = quick_jit(
    functools.partial(mosaic_tpu.forward, options=options, interpret=True)
  )
  got = jax.vmap(run)(batch)
  for i in range(2):
    want = run(jax.tree.map(lambda y, i=i: y[i], batch))
    assert_close([y[i] for y in got], want, 1e-6)


@pytest.mark.parametrize(
  ("dtype", "tol"), [("float32", 2e-6), ("bfloat16", 2e-2)]
)
def test_equals_attention_of_jax(dtype, tol):
  rng = np.random.default_rng(0)
  shapes = (2, 24, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8)
  x = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
  got = flash_attention(
    *x,
    is_causal=True,
    block_sizes=BlockSizes(16, 16, 16, 16),
    implementation="interpret",
  )
  want = jax.nn.dot_product_attention(*x, is_causal=True)
  assert got.dtype == want.dtype
  np.testing.assert_allclose(*(np.float64(y) for y in (got, want)), tol, tol)


def test_a_window_may_be_wider_than_positions_are():
  x = jnp.ones((1, 20, 1, 4))
  wide, all_ = (
    flash_attention(x, x, x, local_window_size=w, implementation="interpret")
    for w in ((2**31, 2**40), None)
  )
  assert jnp.array_equal(wide, all_)


@pytest.mark.parametrize("implementation", ["interpret", "reference"])
def test_public_function_and_its_gradient(implementation):
  x, _ = case("segments", jnp.float64)
  x = x._replace(bias=None)

  def attend(implementation, *floats):
    return flash_attention(
      *floats,
      mask=x.mask,
      segment_ids=(x.query_segments, x.key_segments),
      scale=0.4,
      return_residual=True,
      implementation=implementation,
    )

  bars = cotangents(x)
  out, vjp = jax.vjp(functools.partial(attend, implementation), *x[:3])
  want = by_reference(x, Options(0.4), bars)
  assert_close([*out, *vjp(bars)], want, 1e-13)


# --- B: copies, races and bounds, simulated ---


@pytest.mark.parametrize("name", ["causal, grouped", "lengths, offset"])
def test_kernels_do_not_race_nor_read_out_of_bounds(name):
  x, options = case(name, jnp.float32, BlockSizes(16, 8, 8, 16))
  bars = cotangents(x)
  with tpu_interpreter() as interpret:
    got = by_kernel(x, options, bars, interpret=interpret)
  assert_close(got, by_reference(x, options, bars), 1e-5)


# --- C: lowering ---


@pytest.mark.parametrize("everything", [False, True])
def test_lowers_for_a_tpu(everything):
  x = structs(everything=everything)
  options = Options(0.1, 300, 0)
  assert mosaic_tpu.supports(x, options) is None

  def run(x, bars):
    out, lse = mosaic_tpu.forward(x, options)
    return mosaic_tpu.backward(x, options, out, lse, *bars)

  text = lowered(run, x, jax.eval_shape(cotangents, x), platform="tpu")
  # Forward, queries, keys and values; and the bias.
  assert text.count(f"@{CALLS['tpu']}") == 3 + everything


# --- what is refused ---


@pytest.mark.parametrize(
  ("change", "options", "reason"),
  [
    ({"dtype": "float16"}, {}, "takes float32 or bfloat16, got float16"),
    ({}, {"precision": "high"}, "precision None, 'default' or 'highest'"),
    (
      {},
      {"block_sizes": BlockSizes(128, 100, 128, 128)},
      "block_k must be a multiple of 128 on a TPU, got 100: use 128",
    ),
    (
      {"dtype": "float32"},
      {"block_sizes": BlockSizes(512, 512, 1024, 1024)},
      "block_q_bwd=1024 with block_k_bwd=640 needs 18 MiB of a TPU's VMEM, "
      "which has 16: use block_k_bwd=384",
    ),
  ],
)
def test_kernel_says_why_it_cannot(change, options, reason):
  x = jax.tree.map(
    lambda y: jax.ShapeDtypeStruct(y.shape, change.get("dtype", y.dtype)),
    structs(),
  )
  assert reason in str(mosaic_tpu.supports(x, Options(0.1, **options)))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"implementation": "fast"}, "implementation must be one of"),
    ({"key": jnp.ones((1, 4, 2, 3))}, "key must have shape (1, 4, 2, 8)"),
    ({"value": jnp.ones((1, 5, 2, 8))}, "value must have shape (1, 4, 2) + Hv"),
    ({"query": jnp.ones((1, 4, 3, 8))}, "the 2 heads of key must divide the 3"),
    ({"query": jnp.ones((4, 2, 8))}, "query must be floating of 4 dimensions"),
    ({"query": jnp.ones((1, 4, 2, 8), "float32")}, "must have one dtype"),
    ({"bias": jnp.ones((1, 2, 4, 3))}, "bias must have 4 dimensions, each 1"),
    ({"mask": jnp.ones((1, 2, 4, 4))}, "mask must be boolean, got float64"),
    ({"segment_ids": jnp.ones((1, 4))}, "segment_ids must be integers (1, 4)"),
    ({"query": jnp.ones((1, 0, 2, 8))}, "query must hold numbers, got shape"),
    ({"local_window_size": -1}, "local_window_size must be an integer >= 0"),
  ],
)
def test_bad_input(change, message):
  x = jnp.ones((1, 4, 2, 8), jnp.float64)
  args = {"query": x, "key": x, "value": x, "implementation": "interpret"}
  with pytest.raises(ValueError, match=re.escape(message)):
    flash_attention(**args | change)


def test_forced_kernel_says_why_it_cannot():
  x = jnp.ones((1, 4, 2, 8), jnp.float64)
  with pytest.raises(NotImplementedError, match="takes float32 or bfloat16"):
    flash_attention(x, x, x, implementation="mosaic_tpu")
