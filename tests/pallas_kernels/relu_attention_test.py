"""ReLU attention's TPU kernels: rungs A, B and C of the ladder."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import BlockSizes
from pallas_kernels.relu_attention import mosaic_tpu, relu_attention
from pallas_kernels.relu_attention.operands import Options
from tests.pallas_kernels._flash import assert_close
from tests.pallas_kernels._ladder import CALLS, lowered, tpu_interpreter
from tests.pallas_kernels._relu import (
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
  none = (want[1] == 0).mean()
  assert 0.5 < none < 1 if name == "few pass, mask" else none < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_of_narrow_dtypes_are_float32(dtype):
  x, options = case("plain", dtype)
  bars = cotangents(x)
  got = by_kernel(x, options, bars)
  assert {y.dtype for y in (got[1], *got[5:])} == {jnp.dtype("float32")}
  assert {y.dtype for y in (got[0], *got[2:5])} == {jnp.dtype(dtype)}
  # Weights are rounded before they meet the values, results once more.
  eps = float(jnp.finfo(dtype).eps)
  assert_close(got, by_reference(x, options, bars), 4 * eps)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 1.0, 3e37])
def test_excesses_of_any_size(size):
  # Growing along the keys, so that sums are rescaled at every block; a power
  # of the size itself would vanish or overflow.
  x, options = case("few pass, mask", jnp.float32)
  growing = jnp.arange(-8.0, 9) ** 3 / 512
  x = x._replace(
    query=size * jnp.ones_like(x.query).at[..., 1:].set(0),
    key=jnp.broadcast_to(growing[:, None, None], x.key.shape).astype("float32"),
    threshold=jnp.zeros_like(x.threshold),
    scale=jnp.float32(1),
  )
  out, norm = _forward(x, options)
  want = by_reference(x, options, cotangents(x))
  assert_close((out, norm), want[:2], 1e-5)


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
  for g, w in zip(got, want, strict=True):
    np.testing.assert_array_equal(g[:, :12], w[:, :12])
    assert np.isnan(g[:, 12:]).any()


def test_vmap_equals_a_loop():
  x, options = case("causal, grouped", jnp.float32)
  batch = jax.tree.map(
    lambda y: jnp.stack([y, y[::-1] if y.ndim else 2 * y]), x
  )
  got = jax.vmap(lambda x: _forward(x, options))(batch)
  for i in range(2):
    want = _forward(jax.tree.map(lambda y, i=i: y[i], batch), options)
    assert_close([y[i] for y in got], want, 1e-6)


@pytest.mark.parametrize("implementation", ["interpret", "reference"])
def test_public_function_and_its_gradient(implementation):
  x, options = case("causal, grouped", jnp.float64)

  def attend(query, key, value, threshold, scale):
    return relu_attention(
      query, key, value, threshold=threshold, scale=scale, alpha=options.alpha,
      is_causal=True, return_residual=True, implementation=implementation,
    )  # fmt: skip

  bars = cotangents(x)
  out, vjp = jax.vjp(attend, *x[:5])
  assert_close([*out, *vjp(bars)], by_reference(x, options, bars), 1e-13)


# --- B: copies, races and bounds, simulated ---


def test_kernels_do_not_race_nor_read_out_of_bounds():
  x, options = case("causal, grouped", jnp.float32, BlockSizes(16, 8, 8, 16))
  bars = cotangents(x)
  with tpu_interpreter() as interpret:
    got = by_kernel(x, options, bars, interpret=interpret)
  assert_close(got, by_reference(x, options, bars), 1e-5)


# --- C: lowering ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("alpha", [1, 3])
def test_lowers_for_a_tpu(alpha, dtype):
  x, options = structs(dtype), Options(alpha, True)
  assert mosaic_tpu.supports(x, options) is None

  def run(x, bars):
    out, norm = mosaic_tpu.forward(x, options)
    return mosaic_tpu.backward(x, options, out, norm, *bars)

  text = lowered(run, x, jax.eval_shape(cotangents, x), platform="tpu")
  # Forward; queries, thresholds and scale; keys and values.
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
  ],
)
def test_kernel_says_why_it_cannot(dtype, options, reason):
  x = structs(dtype)
  assert reason in str(mosaic_tpu.supports(x, Options(**options)))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"implementation": "fast"}, "implementation must be one of"),
    ({"key": jnp.ones((1, 4, 2, 3))}, "key must have shape (1, 4, 2, 8)"),
    ({"mask": jnp.ones((1, 2, 4, 4))}, "mask must be boolean, got float64"),
    ({"alpha": 0}, "alpha must be a positive integer, got 0"),
    ({"alpha": 1.0}, "alpha must be a positive integer, got 1.0"),
    ({"threshold": jnp.ones(4)}, "threshold must have shape () or (1, 4, 2)"),
    ({"scale": jnp.ones(2)}, "scale must be a scalar, got shape (2,)"),
  ],
)
def test_bad_input(change, message):
  x = jnp.ones((1, 4, 2, 8), jnp.float64)
  args = {"query": x, "key": x, "value": x, "implementation": "interpret"}
  with pytest.raises(ValueError, match=re.escape(message)):
    relu_attention(**args | change)


def test_forced_kernel_says_why_it_cannot():
  x = jnp.ones((1, 4, 2, 8), jnp.float64)
  with pytest.raises(NotImplementedError, match="takes float32 or bfloat16"):
    relu_attention(x, x, x, implementation="mosaic_tpu")


@functools.partial(jax.jit, static_argnums=1)
def _forward(x, options):
  return mosaic_tpu.forward(x, options, interpret=True)
