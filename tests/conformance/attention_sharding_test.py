"""How every attention function must run on many devices; who must be here."""

import functools
import inspect

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxattn.attention
from tests._dense import value_and_vjp
from tests._recompile import quick_jit
from tests.conformance._attention import MEMBERS
from tests.conformance._attention_calls import (
  LOGITS,
  all_members,
  assert_close,
  compiled,
  eps_of,
  flat,
  inputs,
  mask_of,
  masked,
)

pytestmark = pytest.mark.any_x64

# --- sharding ---


def _sharded_reference(name):
  causal = MEMBERS[name].takes("is_causal")
  return flat(compiled(name, is_causal=causal)(*inputs()))


@pytest.mark.parametrize(
  "spec", [P("x"), P(None, "x")], ids=["batch", "length"]
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@all_members
def test_sharded_inputs(name, kind, spec):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
  run = compiled(name, is_causal=MEMBERS[name].takes("is_causal"))
  with jax.set_mesh(mesh):
    args = jax.device_put(inputs(), NamedSharding(mesh, spec))
    got = flat(run(*args))
  assert_close(got, _sharded_reference(name), 16 * eps_of("float32"))
  if kind == AxisType.Explicit:
    pad = (None,) * (4 - len(spec))
    assert all(x.sharding.spec == P(*spec, *pad) for x in got)


@all_members
def test_shard_map_over_batch(name):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  causal = MEMBERS[name].takes("is_causal")
  options = {"is_causal": True} if causal else {}
  fn = jax.shard_map(
    functools.partial(MEMBERS[name].call, **options),
    mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=True,
  )  # fmt: skip
  if MEMBERS[name].unmapped:
    with pytest.raises(NotImplementedError, match="interpreter"):
      fn(*inputs()[1:])
    return
  got = quick_jit(functools.partial(value_and_vjp, fn))(*inputs())
  assert_close(flat(got), _sharded_reference(name), 16 * eps_of("float32"))


@all_members
def test_shard_map_over_queries(name):
  # Keys and values are on every device, so their gradients sum over devices.
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  member, rows = MEMBERS[name], P(None, "x")
  seen = np.broadcast_to(mask_of(member), LOGITS)

  def attend(*args):
    return member.call(*args[:3], seen=member.hide(args[3]))

  fn = jax.shard_map(
    attend, mesh=mesh, in_specs=(rows, P(), P(), P(None, None, "x")),
    out_specs=rows, check_vma=True,
  )  # fmt: skip
  if member.unmapped:
    with pytest.raises(NotImplementedError, match="interpreter"):
      fn(*inputs()[1:], seen)
    return
  run = functools.partial(value_and_vjp, lambda *x: fn(*x, seen))
  got = quick_jit(run)(*inputs())
  assert_close(flat(got), masked(name, "float32")[1], 16 * eps_of("float32"))


# --- the list itself ---


def test_every_public_attention_function_is_listed():
  found = set()
  for name in jaxattn.attention.__all__:
    fn = getattr(jaxattn.attention, name)
    if inspect.isfunction(inspect.unwrap(fn)):
      first = list(inspect.signature(fn).parameters)[:3]
      arrays = first in (["query", "key", "value"], ["query", "key1", "key2"])
      # A fit returns parameters, a radius a number, not attention.
      if arrays and not name.startswith("fit_") and "radius" not in name:
        found.add(name)
  assert "softmax_attention" in found
  assert found <= set(MEMBERS)
