"""How every attention function must compile."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests._dense import value_and_vjp
from tests._recompile import no_recompilation, quick_jit
from tests.conformance._attention import MEMBERS
from tests.conformance._attention_calls import (
  NARROW,
  all_members,
  inputs,
  mask_of,
)

pytestmark = pytest.mark.any_x64


@pytest.mark.parametrize("how", ["eager", "jit", "gradient"])
@all_members
def test_second_call_does_not_recompile(name, how):
  call = MEMBERS[name].call
  fn = {
    "eager": lambda _, *x: call(*x),
    "jit": quick_jit(lambda _, *x: call(*x)),
    "gradient": functools.partial(value_and_vjp, call),
  }[how]
  first, second = inputs(), [2 * x for x in inputs()]
  jax.block_until_ready(fn(*first))
  with no_recompilation():
    jax.block_until_ready(fn(*second))


@pytest.mark.parametrize("dtype", NARROW)
@all_members
def test_strict_dtype_promotion(name, dtype):
  args, seen = inputs(dtype=dtype), jnp.asarray(mask_of(MEMBERS[name]))
  call = functools.partial(MEMBERS[name].call, seen=seen)
  with jax.numpy_dtype_promotion("strict"):
    jax.eval_shape(functools.partial(value_and_vjp, call), *args)
