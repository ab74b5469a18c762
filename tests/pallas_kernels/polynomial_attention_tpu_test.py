"""Polynomial attention's TPU kernels, compiled for TPUs: rung D."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxattn.attention import polynomial_attention
from pallas_kernels.polynomial_attention import mosaic_tpu
from tests.pallas_kernels._ladder import (
  compiled_for,
  num_kernels,
  temporary_bytes,
  tpu_devices,
)
from tests.pallas_kernels._polynomial import (
  cotangent,
  structs,
  value_and_gradients,
)

pytestmark = pytest.mark.aot_tpu

BOTH = pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
# Head sizes and degrees of the experiment's tier "full", and its longest call.
_FULL, _LENGTH = ((4, 4), (8, 2), (8, 4), (16, 2), (32, 2), (64, 2)), 2**20
CAUSAL = pytest.mark.parametrize("is_causal", [False, True])


def _gradients(*args, degree=2, is_causal=False):
  def loss(*args):
    return polynomial_attention(
      *args, degree=degree, radius=1.0, is_causal=is_causal
    ).sum()

  return jax.grad(loss, (0, 1, 2))(*args)


def _inputs(length, heads=(4, 2), head_dim=32):
  n, k = heads
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  keys = shape((1, length, k, head_dim))
  return shape((1, length, n, head_dim)), keys, keys


def _kernels(is_causal):
  # Forward, queries, keys and values; and the state of all keys.
  return 3 if is_causal else 4


@BOTH
@CAUSAL
def test_what_none_takes_compiles_and_memory_is_linear(topology, is_causal):
  device, *_ = tpu_devices(topology)
  run, sizes = functools.partial(_gradients, is_causal=is_causal), {}
  for length in (2**16, 2**18):
    executable = compiled_for(device, run, *_inputs(length))
    assert num_kernels(executable, "tpu") == _kernels(is_causal)
    sizes[length] = temporary_bytes(executable)
  assert 3 < sizes[2**18] / sizes[2**16] < 4.5
  # One head's 561 features would be more.
  assert sizes[2**18] < 4 * 561 * 2**18


@CAUSAL
@pytest.mark.parametrize(("head_dim", "degree"), _FULL)
def test_what_the_experiment_runs_at_full_size_fits(
  head_dim, degree, is_causal
):
  args = _inputs(_LENGTH, (1, 1), head_dim)
  run = functools.partial(_gradients, degree=degree, is_causal=is_causal)
  device, *_ = tpu_devices("v5e:2x2")
  executable = compiled_for(device, run, *args)
  assert num_kernels(executable, "tpu") == _kernels(is_causal)


@BOTH
@pytest.mark.parametrize(
  "options", [{}, {"is_causal": True}, {"is_causal": True, "radius": 1.0}]
)
def test_remainders_compile(topology, options):
  x, options = structs(degree=3, h=8, precision="highest", **options)
  assert mosaic_tpu.supports(x, options) is None
  run = functools.partial(value_and_gradients, options=options, interpret=False)
  device, *_ = tpu_devices(topology)
  executable = compiled_for(device, run, x, jax.eval_shape(cotangent, x))
  assert num_kernels(executable, "tpu") == _kernels(options.is_causal)
