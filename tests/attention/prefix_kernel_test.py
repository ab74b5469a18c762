"""Attention to a prefix's state by its kernel, as ``ntk_attention`` does."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import PrefixState, ntk_attention
from jaxattn.features import favor_map, taylor_map
from tests._recompile import quick_jit
from tests.attention._prefix import normal, prefix_call


def _call(dtype="float64", *, sign=1.0, heads=2, r=8):
  """Query, key, value and a state of mixed or of one sign."""
  query, key, value, *_ = prefix_call(1.5, t=13, s=9, n=4, kv=2)
  z, k = normal((heads, r, 8), (heads, r))
  k = sign * np.abs(k) if sign else k
  arrays = (query, key, value, 4 * z, 4 * k)
  return tuple(jnp.asarray(x, dtype) for x in arrays)


def _attend(*args, implementation=None, **options):
  *call, z, k = args
  return ntk_attention(
    *call, PrefixState(z, k), implementation=implementation, **options
  )


def _run(args, *, with_info=True, **options):
  """Outputs, and gradients of all floating arguments."""
  info = {"return_info": True} if with_info else {}

  def run(*args):
    outs, vjp = jax.vjp(lambda *x: _attend(*x, **options, **info), *args)
    bars = jax.tree.map(
      lambda x: (
        x * jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype)
      ),
      jax.tree.map(jnp.ones_like, outs),
    )
    return *jax.tree.leaves(outs), *vjp(bars)

  return quick_jit(run)(*args)


# Mask, bias, a state for each query head; sums of weights of either sign.
_MASK = np.random.default_rng(0).random((4, 13, 9)) < 0.5
_MASK[:, 5:7] = False
_CASES = {
  "plain": ({}, {}),
  "grouped, causal": ({}, {"is_causal": True, "scale": 0.3}),
  "own states, signs": (
    {"sign": 0.0, "heads": 4},
    {"mask": _MASK, "bias": normal((4, 13, 9))[0]},
  ),
  "negative": ({"sign": -1.0}, {"mask": _MASK}),
}


@pytest.mark.parametrize("name", _CASES)
def test_all_implementations_agree(name):
  call, options = _CASES[name]
  args = _call(**call)
  want = _run(args, implementation="xla", **options)
  if name != "plain" and "causal" not in name:
    assert (want[1] < 0).any()
  for implementation in (None, "pallas_interpret"):
    got = _run(args, implementation=implementation, **options)
    for g, w in zip(got, want, strict=True):
      np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-10)


def test_second_derivatives_and_those_of_a_feature_map():
  *call, z, k = _call(r=5, sign=0.0)
  drawn = favor_map(jax.random.key(0), 8, 5)

  def slope(implementation, step):
    def loss(step):
      query = call[0] * step
      state = PrefixState(z * step, k)
      moved = jax.tree.map(lambda x: x * step, drawn)
      out = ntk_attention(
        query, *call[1:], state, feature_map=moved, scale=step / 4,
        implementation=implementation,
      )  # fmt: skip
      return (out**2).sum()

    return jax.value_and_grad(jax.grad(loss))(step)

  # The scale is traced.
  got, want = (
    quick_jit(functools.partial(slope, name))(0.9)
    for name in ("pallas_interpret", "xla")
  )
  np.testing.assert_allclose(got, want, rtol=1e-8)


def test_a_state_that_is_read_with_no_keys():
  query, *_, z, k = _call()
  options = {"return_info": True}
  for state in (PrefixState(z, k), PrefixState(0 * z, 0 * k)):
    want = ntk_attention(query, None, None, state, **options)
    got = ntk_attention(
      query, None, None, state, implementation="pallas_interpret", **options
    )
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(g, w, rtol=0, atol=1e-14)
  # Nothing at all: 0, and shares of 0.
  assert not any(x.any() for x in jax.tree.leaves(got))


def test_narrow_operands_lose_one_rounding_to_products():
  args = _call("bfloat16")
  wide = [x.astype("float64") for x in args]
  want = _run(wide, with_info=False)
  for implementation in (None, "xla", "pallas_interpret"):
    got = _run(args, with_info=False, implementation=implementation)
    for g, w in zip(got, want, strict=True):
      assert g.dtype == jnp.bfloat16
      atol = 4 * 2**-8 * np.abs(w).max()
      np.testing.assert_allclose(g.astype("float64"), w, rtol=0, atol=atol)


# --- where it runs ---


def _lowered(r, feature_map, implementation=None, length=300):
  def loss(*args):
    out = _attend(*args, feature_map=feature_map, implementation=implementation)
    return out.sum()

  *call, z, k = (jax.typeof(x) for x in _call("float32", r=r))
  call = (x.update(shape=(length, *x.shape[1:])) for x in call)
  traced = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).trace(*call, z, k)
  return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.any_x64
@pytest.mark.parametrize("implementation", [None, "pallas"])
def test_a_tpu_takes_the_kernels(implementation):
  text = _lowered(8, "elu", implementation)
  # Forward, queries, keys and values; no loop of the XLA path.
  assert text.count("@tpu_custom_call") == 3
  assert text.count("ntk_attention_forward") == 1
  assert "stablehlo.while" not in text


@pytest.mark.any_x64
def test_many_features_are_read_by_a_kernel_that_is_named_only():
  for implementation, count in ((None, 0), ("pallas", 1)):
    text = _lowered(45, taylor_map(2), implementation)
    assert text.count("@tpu_custom_call") == 3
    assert text.count("ntk_attention_forward") == count


def test_kernels_are_refused_where_they_cannot_run():
  for dtype, message in (
    ("float32", "it needs a TPU or an NVIDIA GPU; 'xla' and"),
    ("float64", "takes float32 or bfloat16, got float64"),
  ):
    with pytest.raises(NotImplementedError, match=message):
      _attend(*_call(dtype), implementation="pallas")
  with pytest.raises(
    ValueError, match="implementation must be one of None, 'x"
  ):
    _attend(*_call(), implementation="fast")


def test_a_mesh_with_explicit_axes_is_left_to_xla():
  kind = jax.sharding.AxisType.Explicit
  mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
  *call, z, k = _call("float32")
  with jax.set_mesh(mesh):
    spec = jax.sharding.PartitionSpec("x")
    call = [jax.device_put(jnp.stack([x, x]), spec) for x in call]
    message = re.escape("needs jax.shard_map around the call")
    with pytest.raises(NotImplementedError, match=message):
      _attend(*call, z, k, implementation="pallas")
    got = _attend(*call, z, k)
  want = _attend(*_call("float32"))
  np.testing.assert_allclose(np.asarray(got)[1], want, atol=1e-5)
