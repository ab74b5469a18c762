"""What every attention function must compute: values, gradients, symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests._dense import value_and_vjp
from tests._recompile import quick_jit
from tests.conformance._attention import MEMBERS, K, N, T
from tests.conformance._attention_calls import (
  DTYPES,
  LOGITS,
  MULTI_QUERY,
  UNBATCHED,
  all_members,
  assert_close,
  compiled,
  eps_of,
  flat,
  inputs,
  mask_of,
  masked,
  oracle,
  taking,
)

pytestmark = pytest.mark.any_x64

# --- values, gradients, dtypes ---


@pytest.mark.parametrize("dtype", DTYPES)
@all_members
def test_values_gradients_and_dtype(name, dtype):
  got, want = masked(name, dtype)
  assert {x.dtype for x in got} == {jnp.dtype(dtype)}
  # Sums of 16-bit products are float32: all that is lost is the last rounding,
  # and in gradients that of the output.
  few = 4 if MEMBERS[name].narrow_weights else 1
  # Largest logits of pairs are 8, others 4.7: as much more is lost in weights.
  wide = 32 if MEMBERS[name].in_pairs else 16
  few = wide if jnp.finfo(dtype).bits > 16 else few
  assert_close(
    got[:1], want[:1], few * eps_of(dtype), atol=eps_of(dtype) / 8 * few
  )
  assert_close(got[1:], want[1:], few * eps_of(dtype))


@pytest.mark.parametrize("shapes", [MULTI_QUERY, UNBATCHED])
@all_members
def test_shapes(name, shapes):
  args = inputs(shapes)
  *batch, t, n, _ = shapes[0]
  seen = np.random.default_rng(1).random((*batch, n, t, shapes[1][-3])) < 0.6
  seen = MEMBERS[name].hide(seen)
  causal = MEMBERS[name].can_be_causal(t, shapes[1][-3])
  got = flat(compiled(name, is_causal=causal)(*args, seen))
  assert [x.shape for x in got] == [x.shape for x in args]
  if causal:
    seen = seen & np.tri(t, shapes[1][-3], dtype=bool)
  want = oracle(name, *args, seen=seen)
  assert_close(got, want, 16 * eps_of("float32"))


@all_members
def test_vmap_over_unbatched_is_a_batch(name):
  args, seen = inputs(), mask_of(MEMBERS[name])
  fn = jax.vmap(lambda *x: MEMBERS[name].call(*x))
  if MEMBERS[name].takes("mask"):
    got = quick_jit(lambda c, *x: value_and_vjp(lambda *y: fn(*y, seen), c, *x))
    want = masked(name, "float32")[1]
  else:
    got = quick_jit(lambda c, *x: value_and_vjp(fn, c, *x))
    want = oracle(name, *args)
  assert_close(flat(got(*args)), want, 16 * eps_of("float32"))


@all_members
def test_large_logits_do_not_overflow(name):
  for dtype in ("float16", "float32"):
    cotangent, query, key, value = inputs(dtype=dtype)
    args = (cotangent, 1e4 * query, key, value)
    seen = mask_of(MEMBERS[name])
    got = flat(compiled(name)(*args, seen))
    # A logit of 1e4 is rounded by 1e-3, in float32 sums of either dtype.
    want = oracle(name, *args, seen=seen)
    assert_close(got, want, 4e-3)


@all_members
def test_query_that_sees_nothing_gives_zero(name):
  for dtype in ("bfloat16", "float32"):
    out, dq, *others = masked(name, dtype)[0]
    # With a prefix it attends to that alone.
    attended = [out, dq] if MEMBERS[name].has_prefix else []
    for x in (out, dq, *others):
      assert jnp.isfinite(x).all()
      assert x[0].any() == any(x is y for y in attended)
      assert x[1].any()


# --- symmetries ---


@all_members
def test_order_of_keys_queries_batch_and_heads(name):
  member = MEMBERS[name]
  c, q, k, v = inputs()
  seen = np.broadcast_to(mask_of(member), LOGITS)
  order = np.random.default_rng(2).permutation(T)
  out, dq, dk, dv = flat(compiled(name)(c, q, k, v, member.hide(seen)))

  def check(want, seen, *args):
    got = flat(compiled(name)(*args, member.hide(seen)))
    assert_close(got, want, 16 * eps_of("float32"))

  want = [out, dq, dk[:, order], dv[:, order]]
  check(want, seen[..., order], c, q, k[:, order], v[:, order])
  if member.takes("mask"):
    want = [out[:, order], dq[:, order], dk, dv]
    check(want, seen[:, :, order], c[:, order], q[:, order], k, v)
  want = [x[::-1] for x in (out, dq, dk, dv)]
  check(want, seen[::-1], *(x[::-1] for x in (c, q, k, v)))

  # Key heads change places, and with them the groups of query heads.
  def roll(x):
    return jnp.roll(x, x.shape[2] // K, axis=2)

  want = [roll(x) for x in (out, dq, dk, dv)]
  check(want, np.roll(seen, N // K, 1), *map(roll, (c, q, k, v)))


@pytest.mark.parametrize("name", taking("is_causal"))
def test_future_changes_nothing(name):
  now, (c, *args) = 9, inputs()
  later = np.arange(T)[:, None, None] >= now
  c = jnp.where(later, 0, c)
  got = flat(compiled(name, is_causal=True)(c, *args))
  want = oracle(name, c, *args, seen=np.tri(T, dtype=bool)[None, None])
  assert_close(got, want, 16 * eps_of("float32"))

  args = [jnp.where(later, 3 * x[::-1] + 1, x) for x in args]
  changed = flat(compiled(name, is_causal=True)(c, *args))
  for before, after in zip(got, changed, strict=True):
    np.testing.assert_array_equal(before[:, :now], after[:, :now])
  for gradient in changed[1:]:
    assert not gradient[:, now:].any()
