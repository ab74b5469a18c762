"""Tensor attention's TPU kernels: rungs A, B and C of the ladder."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.iocomplexity import blockspec_traffic
from pallas_kernels._compat import pl
from pallas_kernels.tensor_attention import (
  TensorBlockSizes,
  config,
  mosaic_tpu,
  tensor_attention,
)
from pallas_kernels.tensor_attention.operands import Options
from tests._dense import value_and_vjp
from tests._recompile import quick_jit
from tests.pallas_kernels._flash import assert_close
from tests.pallas_kernels._ladder import CALLS, lowered, tpu_interpreter
from tests.pallas_kernels._tensor import (
  CASES,
  both_passes,
  by_kernel,
  by_reference,
  case,
  cotangent,
  structs,
)

# --- A: the mathematics, interpreted ---


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_dense_formula(name):
  x, options = case(name, jnp.float64)
  out_bar = cotangent(x)
  want = by_reference(x, options, out_bar)
  assert_close(by_kernel(x, options, out_bar), want, 1e-13)
  hidden = np.isneginf(want[1]).mean()
  assert 0.4 < hidden < 0.7 if "masks" in name else hidden == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_of_narrow_dtypes_are_float32(dtype):
  x, options = case("causal, grouped", dtype)
  out_bar = cotangent(x)
  got = by_kernel(x, options, out_bar)
  float32 = jnp.dtype("float32")
  assert [y.dtype for y in got] == [
    float32, float32, x.query.dtype, float32, x.key2.dtype, float32,
    x.value2.dtype,
  ]  # fmt: skip
  # Pairs and weights are rounded before they are multiplied, results once more.
  eps = float(jnp.finfo(dtype).eps)
  assert_close(got, by_reference(x, options, out_bar), 4 * eps)


def test_what_no_query_sees_is_never_read():
  x, options = case("causal, grouped", jnp.float32)
  out, lse = _forward(x, options)
  # Queries 0 to 4 are a block, whose pairs end with second key 7.
  later = {
    name: getattr(x, name).at[:, 8:].set(jnp.nan) for name in x._fields[1:5]
  }
  got = _forward(x._replace(**later), options)
  for g, w in zip(got, (out, lse), strict=True):
    np.testing.assert_array_equal(g[:, :5], w[:, :5])
    assert np.isnan(g[:, 8:]).all()
  # Nor is what is hidden from all.
  x, options = case("masks", jnp.float32)
  hidden = {
    name: jnp.where(mask[:, :, None, None], getattr(x, name), jnp.nan)
    for mask, names in (
      (x.key_mask1, ("key1", "value1")),
      (x.key_mask2, ("key2", "value2")),
    )
    for name in names
  }
  out_bar = cotangent(x)
  got = by_kernel(x._replace(**hidden), options, out_bar)
  assert_close(got, by_kernel(x, options, out_bar), 0)


def test_vmap_equals_a_loop():
  x, options = case("causal, masks", jnp.float32)
  batch = jax.tree.map(lambda y: jnp.stack([y, y[::-1]]), x)
  out_bar = cotangent(x)
  run = functools.partial(both_passes, out_bar=out_bar, options=options)
  both = quick_jit(jax.vmap(run))(batch)
  for i in range(2):
    one = jax.tree.map(lambda y, i=i: y[i], batch)
    assert_close([y[i] for y in both], by_kernel(one, options, out_bar), 1e-6)


@pytest.mark.parametrize("implementation", ["interpret", "reference"])
def test_public_function_and_its_gradient(implementation):
  x, options = case("causal, masks", jnp.float64)

  def attend(scale, *floats):
    return tensor_attention(
      *floats, scale=scale, is_causal=True, key_mask1=x.key_mask1,
      key_mask2=x.key_mask2, block_sizes=options.block_sizes,
      implementation=implementation,
    )  # fmt: skip

  out_bar = cotangent(x)
  run = quick_jit(functools.partial(value_and_vjp, attend))
  out, bars = run(out_bar, jnp.float64(0.7), *x[:5])
  scale_bar, query_bar, key1_bar, *others = bars
  want = by_reference(x._replace(key1=0.7 * x.key1), options, out_bar)
  got = [out, query_bar, key1_bar / 0.7, *others]
  assert_close(got, [want[0], *want[2:]], 1e-13)
  np.testing.assert_allclose(scale_bar, (want[3] * x.key1).sum(), rtol=1e-12)


# --- B: copies, races and bounds, simulated ---


def test_kernels_do_not_race_nor_read_out_of_bounds():
  sizes = TensorBlockSizes(5, 6, 8, 6, 6, 8, 6)
  x, options = case("causal, masks", jnp.float32, sizes)
  out_bar = cotangent(x)
  with tpu_interpreter() as interpret:
    got = by_kernel(x, options, out_bar, interpret=interpret)
  assert_close(got, by_reference(x, options, out_bar), 1e-5)


# --- C: lowering ---


@pytest.mark.parametrize(
  ("masked", "dtype"), [(False, "bfloat16"), (True, "float32")]
)
def test_lowers_for_a_tpu(masked, dtype):
  x, options = structs(dtype, masked=masked), Options(not masked)
  assert mosaic_tpu.supports(x, options) is None

  def run(x, out_bar):
    out, lse = mosaic_tpu.forward(x, options)
    return mosaic_tpu.backward(x, options, out, lse, out_bar)

  text = lowered(run, x, jax.eval_shape(cotangent, x), platform="tpu")
  assert text.count(f"@{CALLS['tpu']}") == 2


# --- what is moved ---


@pytest.mark.parametrize("is_causal", [False, True])
def test_grids_move_what_the_passes_say(is_causal, monkeypatch):
  # Blocks: 3 of queries, 4 of first and 2 of second keys; backward, where
  # first keys are one slab, 4 and 2.
  n, h, sizes = 24, 3, TensorBlockSizes(8, 6, 12, 6, 24, 12, 24)
  grids, call = {}, pl.pallas_call

  def spy(*args, grid_spec, name, **options):
    grids[name] = grid_spec
    return call(*args, grid_spec=grid_spec, name=name, **options)

  monkeypatch.setattr(pl, "pallas_call", spy)
  x = jax.ShapeDtypeStruct((1, n, 1, h), jnp.float32)
  attend = functools.partial(
    tensor_attention, is_causal=is_causal, block_sizes=sizes,
    implementation="interpret",
  )  # fmt: skip
  jax.eval_shape(jax.grad(lambda *x: attend(*x).sum()), *[x] * 5)
  forward, backward = map(_words, grids.values())
  query, key1, key2, *_, out, lse = forward
  assert (query, out, lse) == (n * h, n * h, n)
  # Queries 0 to 7 see first blocks 0 and 1 of 0 to 3, queries 8 to 15 0 to 2;
  # of second ones, the former see block 0 alone, which stays for the latter.
  assert key1 == h * 6 * ((2 + 3 + 4) if is_causal else 3 * 4)
  assert key2 == h * 12 * (
    (1 + (2 * 3 - 1) + 2 * 4) if is_causal else 3 * 4 * 2
  )
  query, key1, key2, *_ = backward
  # Queries 0 to 11 do not see second keys 12 to 23.
  assert query == h * 6 * ((4 + 2) if is_causal else 2 * 4)
  assert key1 == key2 == n * h
  # All gradients leave once.
  assert backward[-5:] == (n * h,) * 5


def _words(grid_spec):
  """Words of each operand that a kernel moves."""

  def numbers(spec):
    def index_map(*ids):
      return spec.index_map(*map(np.int32, ids), np.zeros(2, np.int32))

    return types.SimpleNamespace(
      block_shape=spec.block_shape, index_map=index_map
    )

  specs = *grid_spec.in_specs, *grid_spec.out_specs
  return blockspec_traffic(grid_spec.grid, [numbers(spec) for spec in specs])


# --- block sizes ---


@pytest.mark.parametrize(
  "field", [field.name for field in dataclasses.fields(TensorBlockSizes)]
)
@pytest.mark.parametrize("size", [0, 1.5, None, True])
def test_refuses_what_is_no_positive_integer(field, size):
  message = f"{field} must be a positive integer, got {size!r}"
  with pytest.raises(ValueError, match=re.escape(message)):
    TensorBlockSizes(**{field: size})


def test_refuses_slabs_of_parts_of_blocks():
  message = "slab_q_bwd must be a multiple of block_q_bwd=512, got 768"
  with pytest.raises(ValueError, match=message):
    TensorBlockSizes(slab_q_bwd=768)


def test_block_sizes_are_those_of_the_call():
  # Shared by a group of 2, of one size, and made to fit.
  x = structs(length=640)
  sizes = config.tpu_block_sizes(x, Options(), exact=False)
  assert (sizes.block_q, sizes.block_k2, sizes.slab_q_bwd) == (256, 320, 768)
  wide = structs("float32", length=2048, h=640, hv=640)
  assert mosaic_tpu.supports(wide, Options()) is None
  fits = config.tpu_block_sizes(wide, Options(), exact=False)
  assert fits.block_k1 < config.TPU.block_k1
  # What fits is what is asked for, then.
  assert mosaic_tpu.supports(wide, Options(block_sizes=fits)) is None


# --- what is refused ---


@pytest.mark.parametrize(
  ("x", "options", "reason"),
  [
    (structs("float16"), {}, "takes float32 or bfloat16, got float16"),
    (
      structs(),
      {"precision": "high"},
      "precision None, 'default' or 'highest'",
    ),
    (
      structs(),
      {"block_sizes": TensorBlockSizes(block_q=5)},
      "block_q must be a multiple of 128 on a TPU, got 5: use 128",
    ),
    (
      structs(),
      {"block_sizes": TensorBlockSizes(block_k2_bwd=40)},
      "block_k2_bwd must be a multiple of 16 on a TPU, got 40: use 48",
    ),
    (
      structs(length=2048),
      {"block_sizes": TensorBlockSizes(2048, 512, 2048)},
      "MiB of a TPU's VMEM, which has 16: use block_k1=64, block_k2=",
    ),
    (
      structs(h=32768, hv=32768),
      {},
      "do not fit into the 16 MiB of a TPU's VMEM with any block sizes",
    ),
  ],
)
def test_kernel_says_why_it_cannot(x, options, reason):
  assert reason in str(mosaic_tpu.supports(x, Options(**options)))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"implementation": "fast"}, "implementation must be one of"),
    ({"key1": (1, 4, 2, 3)}, "key1 must have shape (1, 4, 2, 8)"),
    ({"key2": (1, 4, 1, 8)}, "value2 must have shape (1, 4, 1) + Hv"),
    (
      {"key2": (1, 4, 1, 8), "value2": (1, 4, 1, 8)},
      "key2 must have as many heads as key1 and of one size",
    ),
    ({"value2": (1, 4, 2, 3)}, "value2 must have as many heads as value1"),
    ({"key_mask1": (1, 4)}, "key_mask1 must be boolean (1, 4), got float64"),
    ({"scale": (2,)}, "scale must be a scalar, got shape (2,)"),
    (
      {"key1": (1, 3, 2, 8), "value1": (1, 3, 2, 8), "is_causal": True},
      "query, key1 and key2 of one length, got T=4, S1=3, S2=4",
    ),
  ],
)
def test_bad_input(change, message):
  names = "query", "key1", "key2", "value1", "value2"
  args = dict.fromkeys(names, (1, 4, 2, 8)) | change
  args = {
    name: jnp.ones(y, jnp.float64) if isinstance(y, tuple) else y
    for name, y in args.items()
  }
  with pytest.raises(ValueError, match=re.escape(message)):
    tensor_attention(**({"implementation": "interpret"} | args))


def test_forced_kernel_says_why_it_cannot():
  x = jnp.ones((1, 4, 2, 8), jnp.float64)
  with pytest.raises(NotImplementedError, match="takes float32 or bfloat16"):
    tensor_attention(x, x, x, x, x, implementation="mosaic_tpu")


@functools.partial(jax.jit, static_argnums=1)
def _forward(x, options):
  return mosaic_tpu.forward(x, options, interpret=True)
