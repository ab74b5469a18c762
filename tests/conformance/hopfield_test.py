"""Hopfield retrieval under the contract of attention functions.

It has no axes for batch and heads, no mask and a temperature for a scale: what
is left of the contract is asked of it under ``jax.vmap``, by the inputs and the
oracle that all attention functions share.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn.attention import (
  hopfield_energy,
  hopfield_retrieve,
  hopfield_store,
  hopfield_update,
)
from tests._dense import value_and_vjp
from tests._recompile import quick_jit
from tests.conformance._attention import H, K, N
from tests.conformance._attention_calls import (
  assert_close,
  eps_of,
  flat,
  inputs,
  oracle,
)

pytestmark = pytest.mark.any_x64

_BETA = H**-0.5


def _attend(query, key, value):
  """(B, T, N, H) queries by heads of memories."""
  key, value = (jnp.repeat(x, N // K, 2) for x in (key, value))
  one = lambda q, k, v: hopfield_update(q, k, _BETA, v)  # noqa: E731
  heads = jax.vmap(one, in_axes=1, out_axes=1)
  return jax.vmap(heads)(query, key, value)


_run = quick_jit(functools.partial(value_and_vjp, _attend))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_gradients_and_dtype(dtype):
  args = inputs(dtype=dtype)
  got, want = flat(_run(*args)), oracle("softmax_attention", *args)
  assert {x.dtype for x in got} == {jnp.dtype(dtype)}
  few = 16 if dtype == "float32" else 1
  assert_close(got[:1], want[:1], few * eps_of(dtype), atol=eps_of(dtype) * few)
  # Gradients of repeated heads are summed in the dtype of the keys.
  assert_close(got[1:], want[1:], 4 * few * eps_of(dtype))


def test_large_logits_do_not_overflow():
  for dtype in ("float16", "float32"):
    cotangent, query, key, value = inputs(dtype=dtype)
    args = cotangent, 1e4 * query, key, value
    assert_close(flat(_run(*args)), oracle("softmax_attention", *args), 4e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_queries(kind):
  rng = np.random.default_rng(0)
  x, patterns = (
    jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)
    for shape in ((8, 5, 4), (30, 4))
  )

  @quick_jit
  def run(x, patterns):
    state = hopfield_store(patterns, 1.0, degree=2)
    low = {"method": "lowrank", "state": state}
    return (
      hopfield_energy(x, patterns, 1.0),
      hopfield_update(x, patterns, 1.0),
      hopfield_retrieve(x, patterns, 1.0, max_steps=3),
      hopfield_retrieve(x, patterns, 1.0, max_steps=3, **low),
      jax.grad(lambda x: hopfield_update(x, patterns, 1.0)[..., 0].sum())(x),
    )

  want = run(x, patterns)
  mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
  with jax.set_mesh(mesh):
    shard = functools.partial(NamedSharding, mesh)
    x = jax.device_put(x, shard(P("x")))
    got = run(x, jax.device_put(patterns, shard(P())))
  assert_close(got, want, 16 * eps_of("float32"))
