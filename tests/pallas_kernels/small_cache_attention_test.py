"""Attention for a small cache: rungs A, B and C of the ladder."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.small_cache_attention import (
  mosaic_tpu,
  small_cache_attention,
)
from pallas_kernels.small_cache_attention.operands import Operands, Options
from tests._recompile import quick_jit
from tests.pallas_kernels._flash import assert_close
from tests.pallas_kernels._ladder import CALLS, lowered, tpu_interpreter
from tests.pallas_kernels._small_cache import (
  CASES,
  by_kernel,
  by_reference,
  case,
)

# --- A: the mathematics, interpreted ---


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_dense_formula(name):
  x, options, bar = case(name, jnp.float64)
  want = by_reference(x, options, bar)
  assert_close(by_kernel(x, options, bar), want, 1e-13)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_of_narrow_dtypes_are_float32(dtype):
  x, options, bar = case("causal, grouped", dtype)
  got = by_kernel(x, options, bar)
  assert got[1].dtype == jnp.float32
  assert {y.dtype for y in (got[0], *got[2:])} == {jnp.dtype(dtype)}
  # Weights and their cotangents are rounded where they are written, results
  # once more.
  eps = float(jnp.finfo(dtype).eps)
  assert_close(got, by_reference(x, options, bar), 4 * eps)


def test_vmap_equals_a_loop():
  x, options, _ = case("causal, grouped", jnp.float32)
  run = quick_jit(
    functools.partial(mosaic_tpu.forward, options=options, interpret=True)
  )
  batch = jax.tree.map(lambda y: jnp.stack([y, y[:, ::-1]]), x)
  got = jax.vmap(run)(batch)
  for i in range(2):
    want = run(jax.tree.map(lambda y, i=i: y[i], batch))
    assert_close([y[i] for y in got], want, 1e-6)


@pytest.mark.parametrize(
  ("dtype", "tol"), [("float32", 2e-6), ("bfloat16", 2e-2)]
)
def test_equals_attention_of_jax(dtype, tol):
  x, options, _ = case("causal, more keys", dtype)
  # JAX wants values as wide as keys.
  x = x._replace(value=x.value[..., :4])
  got = small_cache_attention(
    *x, block_size=8, is_causal=True, implementation="interpret"
  )
  want = jax.nn.dot_product_attention(*x, is_causal=True)
  assert options.is_causal
  assert_close([got], [want], tol)


@pytest.mark.parametrize("implementation", ["interpret", "reference"])
def test_public_function_and_its_gradient(implementation):
  x, options, bar = case("causal, grouped", jnp.float64)

  def attend(*x):
    return small_cache_attention(
      *x,
      block_size=options.block_size,
      is_causal=options.is_causal,
      implementation=implementation,
    )

  def run(x, bar):
    out, vjp = jax.vjp(attend, *x)
    return out, *vjp(bar)

  out, _, *gradients = by_reference(x, options, bar)
  assert_close(quick_jit(run)(x, bar), [out, *gradients], 1e-13)


# --- B: copies, races and bounds, simulated ---


def test_kernels_do_not_race_nor_read_out_of_bounds():
  x, options, bar = case("causal, grouped", jnp.float32)
  # Fewer steps to wait for, and still two tiles along each sequence.
  options = options._replace(block_size=8)
  with tpu_interpreter() as interpret:
    got = by_kernel(x, options, bar, interpret=interpret)
  assert_close(got, by_reference(x, options, bar), 1e-5)


# --- C: lowering ---


def _structs(dtype="bfloat16"):
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
  keys = 1, 640, 2
  return Operands(
    shape((1, 1000, 4, 640)), shape((*keys, 640)), shape((*keys, 80))
  )


@pytest.mark.parametrize(
  ("dtype", "is_causal"), [("bfloat16", False), ("float32", True)]
)
def test_lowers_for_a_tpu(dtype, is_causal):
  def run(*x):
    def loss(*x):
      out = small_cache_attention(
        *x, is_causal=is_causal, implementation="mosaic_tpu"
      )
      return out.astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))(*x)

  text = lowered(run, *_structs(dtype), platform="tpu")
  # Scores and values; weights, their cotangents, and three gradients.
  assert text.count(f"@{CALLS['tpu']}") == 7


# --- what is refused ---


@pytest.mark.parametrize(
  ("change", "options", "reason"),
  [
    ({"dtype": "float16"}, {}, "takes float32 or bfloat16, got float16"),
    (
      {},
      {"block_size": 200},
      "block_size must be a multiple of 128 on a TPU, got 200: use 256",
    ),
    (
      {"dtype": "float32"},
      {"block_size": 1024},
      "block_size=1024 needs 26 MiB of a TPU's VMEM, which has 16: use "
      "block_size=768",
    ),
  ],
)
def test_kernel_says_why_it_cannot(change, options, reason):
  x = _structs(**change)
  assert reason in str(mosaic_tpu.supports(x, Options(**options)))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"implementation": "fast"}, "implementation must be one of"),
    ({"key": jnp.ones((1, 4, 2, 3))}, "key must have shape (1, 4, 2, 8)"),
    ({"value": jnp.ones((1, 5, 2, 8))}, "value must have shape (1, 4, 2) + Hv"),
    ({"query": jnp.ones((1, 4, 3, 8))}, "the 2 heads of key must divide the 3"),
    ({"query": jnp.ones((4, 2, 8))}, "query must be floating of 4 dimensions"),
    ({"query": jnp.ones((1, 4, 2, 8), "float32")}, "must have one dtype"),
    ({"query": jnp.ones((1, 0, 2, 8))}, "query must hold numbers, got shape"),
    ({"block_size": 0}, "block_size must be a positive integer, got 0"),
    ({"block_size": 8.0}, "block_size must be a positive integer, got 8.0"),
  ],
)
def test_bad_input(change, message):
  x = jnp.ones((1, 4, 2, 8), jnp.float64)
  args = {"query": x, "key": x, "value": x, "implementation": "interpret"}
  with pytest.raises(ValueError, match=re.escape(message)):
    small_cache_attention(**args | change)


def test_forced_kernel_says_why_it_cannot():
  x = jnp.ones((1, 4, 2, 8), jnp.float64)
  with pytest.raises(NotImplementedError, match="takes float32 or bfloat16"):
    small_cache_attention(x, x, x, implementation="mosaic_tpu")
