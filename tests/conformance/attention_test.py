"""What every attention function must do, whatever it computes."""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxattn.attention
from tests._dense import float64, value_and_vjp
from tests._recompile import no_recompilation, quick_jit
from tests.conformance._attention import MEMBERS, B, H, K, N, T

pytestmark = pytest.mark.any_x64

_all = pytest.mark.parametrize("name", sorted(MEMBERS))
_LOGITS = (B, N, T, T)
_NARROW = ["bfloat16", "float16", "float32"]
_DTYPES = _NARROW + ["float64"] * jax.config.read("jax_enable_x64")
# Values are not as wide as keys, to tell the two apart.
_SQUARE = ((B, T, N, H), (B, T, K, H), (B, T, K, H - 2))
_MULTI_QUERY = ((2, 13, 3, 5), (2, 19, 1, 5), (2, 19, 1, 7))
_UNBATCHED = ((13, 4, 6), (9, 2, 6), (9, 2, 6))


def _taking(parameter):
  return [name for name in sorted(MEMBERS) if MEMBERS[name].takes(parameter)]


def _inputs(shapes=_SQUARE, dtype="float32"):
  """Cotangent, query, key and value."""
  rng = np.random.default_rng(0)
  query, _, value = shapes
  shapes = (query[:-1] + value[-1:], *shapes)
  return [jnp.asarray(rng.standard_normal(x), dtype) for x in shapes]


def _mask(member):
  """A random mask of full shape; the first batch element hides everything."""
  seen = np.random.default_rng(1).random(_LOGITS) < 0.6
  seen = np.array(member.hide(seen))
  seen[0] = False
  return seen


@functools.cache
def _run(name, is_causal=False):
  """(cotangent, query, key, value, seen) -> output, three gradients."""
  options = {"is_causal": True} if is_causal else {}

  def run(cotangent, query, key, value, seen=None):
    fn = functools.partial(MEMBERS[name].call, seen=seen, **options)
    return value_and_vjp(fn, cotangent, query, key, value)

  return quick_jit(run)


@functools.cache
def _compiled_oracle(name):
  def run(cotangent, query, key, value, seen):
    fn = functools.partial(MEMBERS[name].oracle, seen=seen, scale=None)
    return value_and_vjp(fn, cotangent, query, key, value)

  return quick_jit(run)


def _oracle(name, *args, seen=None):
  """What ``_run`` should give, in float64 in either mode of x64."""
  if seen is None:
    seen = np.ones((1,) * args[0].ndim, bool)
  with jax.enable_x64(True):
    out, grads = _compiled_oracle(name)(*float64(*args), seen)
  return [np.asarray(x) for x in (out, *grads)]


def _flat(result):
  out, grads = result
  return [out, *grads]


def _assert_close(got, want, eps, atol=None):
  """Elementwise within a few ``eps``, relative to the scale of the array."""
  for g, w in zip(got, want, strict=True):
    g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
    bound = eps * np.abs(w).max() if atol is None else atol
    np.testing.assert_allclose(g, w, rtol=eps, atol=bound)


def _eps(dtype):
  return float(jnp.finfo(dtype).eps)


@functools.cache
def _masked(name, dtype):
  """One masked call and its oracle: several tests look at it."""
  args, seen = _inputs(dtype=dtype), _mask(MEMBERS[name])
  return _flat(_run(name)(*args, seen)), _oracle(name, *args, seen=seen)


# --- values, gradients, dtypes ---


@pytest.mark.parametrize("dtype", _DTYPES)
@_all
def test_values_gradients_and_dtype(name, dtype):
  got, want = _masked(name, dtype)
  assert {x.dtype for x in got} == {jnp.dtype(dtype)}
  # Sums of 16-bit products are float32: all that is lost is the last rounding,
  # and in gradients that of the output.
  few = 16 if jnp.finfo(dtype).bits > 16 else 1
  _assert_close(
    got[:1], want[:1], few * _eps(dtype), atol=_eps(dtype) / 8 * few
  )
  _assert_close(got[1:], want[1:], few * _eps(dtype))


@pytest.mark.parametrize("shapes", [_MULTI_QUERY, _UNBATCHED])
@_all
def test_shapes(name, shapes):
  args = _inputs(shapes)
  *batch, t, n, _ = shapes[0]
  seen = np.random.default_rng(1).random((*batch, n, t, shapes[1][-3])) < 0.6
  seen = MEMBERS[name].hide(seen)
  causal = MEMBERS[name].takes("is_causal")
  got = _flat(_run(name, is_causal=causal)(*args, seen))
  assert [x.shape for x in got] == [x.shape for x in args]
  if causal:
    seen = seen & np.tri(t, shapes[1][-3], dtype=bool)
  want = _oracle(name, *args, seen=seen)
  _assert_close(got, want, 16 * _eps("float32"))


@_all
def test_vmap_over_unbatched_is_a_batch(name):
  args, seen = _inputs(), _mask(MEMBERS[name])
  fn = jax.vmap(lambda *x: MEMBERS[name].call(*x))
  if MEMBERS[name].takes("mask"):
    got = quick_jit(lambda c, *x: value_and_vjp(lambda *y: fn(*y, seen), c, *x))
    want = _masked(name, "float32")[1]
  else:
    got = quick_jit(lambda c, *x: value_and_vjp(fn, c, *x))
    want = _oracle(name, *args)
  _assert_close(_flat(got(*args)), want, 16 * _eps("float32"))


@_all
def test_large_logits_do_not_overflow(name):
  for dtype in ("float16", "float32"):
    cotangent, query, key, value = _inputs(dtype=dtype)
    args = (cotangent, 1e4 * query, key, value)
    seen = _mask(MEMBERS[name])
    got = _flat(_run(name)(*args, seen))
    # A logit of 1e4 is rounded by 1e-3, in float32 sums of either dtype.
    want = _oracle(name, *args, seen=seen)
    _assert_close(got, want, 4e-3)


@_all
def test_query_that_sees_nothing_gives_zero(name):
  for dtype in ("bfloat16", "float32"):
    out, dq, *others = _masked(name, dtype)[0]
    # With a prefix it attends to that alone.
    attended = [out, dq] if MEMBERS[name].has_prefix else []
    for x in (out, dq, *others):
      assert jnp.isfinite(x).all()
      assert x[0].any() == any(x is y for y in attended)
      assert x[1].any()


# --- symmetries ---


@_all
def test_order_of_keys_queries_batch_and_heads(name):
  member = MEMBERS[name]
  c, q, k, v = _inputs()
  seen = np.broadcast_to(_mask(member), _LOGITS)
  order = np.random.default_rng(2).permutation(T)
  out, dq, dk, dv = _flat(_run(name)(c, q, k, v, member.hide(seen)))

  def check(want, seen, *args):
    got = _flat(_run(name)(*args, member.hide(seen)))
    _assert_close(got, want, 16 * _eps("float32"))

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


@pytest.mark.parametrize("name", _taking("is_causal"))
def test_future_changes_nothing(name):
  now, (c, *args) = 9, _inputs()
  later = np.arange(T)[:, None, None] >= now
  c = jnp.where(later, 0, c)
  got = _flat(_run(name, is_causal=True)(c, *args))
  want = _oracle(name, c, *args, seen=np.tri(T, dtype=bool)[None, None])
  _assert_close(got, want, 16 * _eps("float32"))

  args = [jnp.where(later, 3 * x[::-1] + 1, x) for x in args]
  changed = _flat(_run(name, is_causal=True)(c, *args))
  for before, after in zip(got, changed, strict=True):
    np.testing.assert_array_equal(before[:, :now], after[:, :now])
  for gradient in changed[1:]:
    assert not gradient[:, now:].any()


# --- masks and other options ---


@pytest.mark.parametrize(
  "shape", list(itertools.product(*((1, n) for n in _LOGITS)))
)
@pytest.mark.parametrize("name", _taking("mask"))
def test_mask_of_every_broadcastable_shape(name, shape):
  c, *args = _inputs()
  mask = np.random.default_rng(sum(shape)).random(shape) < 0.6
  full = np.broadcast_to(mask, _LOGITS)
  got = quick_jit(MEMBERS[name].call)(*args, mask)
  want = _oracle(name, c, *args, seen=full)[:1]
  _assert_close([got], want, 16 * _eps("float32"))


def _options(kind):
  return [(n, o) for n in sorted(MEMBERS) for o in getattr(MEMBERS[n], kind)]


@functools.cache
def _with(name, **options):
  call = functools.partial(MEMBERS[name].call, **options)
  return jax.tree.leaves(quick_jit(call)(*_inputs()[1:]))


@_all
def test_every_option_is_listed(name):
  member = MEMBERS[name]
  _, _, _, *options = inspect.signature(member.fn).parameters.values()
  assert sorted(o.name for o in options) == sorted(
    [*member.effects, *member.neutral]
  )
  assert all(o.kind != o.VAR_KEYWORD for o in options)


@pytest.mark.parametrize(("name", "option"), _options("effects"))
def test_option_is_not_ignored(name, option):
  call = functools.partial(
    MEMBERS[name].call, **{option: MEMBERS[name].effects[option]}
  )
  changed = jax.tree.leaves(quick_jit(call)(*_inputs()[1:]))
  plain = _with(name)
  assert len(changed) > len(plain) or not np.allclose(changed[0], plain[0])


@pytest.mark.parametrize(("name", "option"), _options("neutral"))
def test_option_does_not_change_the_result(name, option):
  good, bad = MEMBERS[name].neutral[option]
  _assert_close(
    _with(name, **{option: good}), _with(name), 16 * _eps("float32")
  )
  with pytest.raises(ValueError, match=re.compile(option, re.IGNORECASE)):
    MEMBERS[name].call(*_inputs()[1:], **{option: bad})


@_all
def test_precision_reaches_the_products(name):
  call = functools.partial(MEMBERS[name].call, precision="highest")
  program = str(jax.make_jaxpr(call)(*_inputs()[1:]))
  products = program.count("dot_general[")
  assert products > 0
  assert program.count("precision=(Precision.HIGHEST") == products


# --- refused arguments ---

_Q, _K, _V = (2, 3, 4, 5), (2, 6, 2, 5), (2, 6, 2, 5)
_BAD_SHAPES = [
  ((3, 4), _K, _V, "query must have 3 or 4 dimensions, got shape (3, 4)"),
  (_Q, (1, *_K), _V, "key must have 3 or 4 dimensions, got shape (1, 2, 6,"),
  (_Q, _K, (5,), "value must have 3 or 4 dimensions, got shape (5,)"),
  # Lengths, heads and sizes that do not fit each other.
  (_Q, _K[1:], _V, "key must have shape (2, *, *, 5) = (B, S, K, H), got (6,"),
  (_Q, (3, 6, 2, 5), _V, "key must have shape (2, *, *, 5) = (B, S, K, H)"),
  (_Q, (2, 6, 2, 4), _V, "(2, *, *, 5) = (B, S, K, H), got (2, 6, 2, 4)"),
  (_Q, _K, (2, 7, 2, 5), "value must have shape (2, 6, 2, *) = (B, S, K, Hv)"),
  (_Q, _K, (2, 6, 4, 5), "(2, 6, 2, *) = (B, S, K, Hv), got (2, 6, 4, 5)"),
  (_Q[1:], _K[1:], (7, 2, 5), "value must have shape (6, 2, *) = (S, K, Hv)"),
  (_Q, (2, 6, 3, 5), (2, 6, 3, 5), "the 3 heads of key and value must divide"),
  # Nothing to attend with or to.
  ((2, 0, 4, 5), _K, _V, "query must not be empty, got shape (2, 0, 4, 5)"),
  (_Q, (2, 0, 2, 5), (2, 0, 2, 5), "key must not be empty, got shape (2, 0,"),
  (_Q, (2, 6, 0, 5), (2, 6, 0, 5), "key must not be empty, got shape (2, 6,"),
  (_Q, _K, (2, 6, 2, 0), "value must not be empty, got shape (2, 6, 2, 0)"),
]
_BAD_OPTIONS = [
  ("is_causal", 1, "is_causal must be one of False, True, got 1"),
  ("is_causal", "yes", "is_causal must be one of False, True, got 'yes'"),
  ("implementation", "fast", "implementation must be one of None, 'xla'"),
  ("scale", np.ones(4, np.float32), "scale must be a real scalar, got array"),
  ("scale", "large", "scale must be a real scalar, got 'large'"),
  ("scale", 1j, "scale must be a real scalar, got 1j"),
  ("mask", np.ones((2, 4, 3, 6)), "mask must be boolean (True = attend), got"),
  ("mask", np.ones((2, 2, 3, 6), bool), "= (2, 4, 3, 6), got shape"),
  ("mask", np.ones((2, 6), bool), "mask must be broadcastable to (B, N, T, S)"),
  (
    "key_mask",
    np.ones((2, 6)),
    "key_mask must be boolean (True = attend), got",
  ),
  (
    "key_mask",
    np.ones((2, 3), bool),
    "key_mask must have shape (2, 6) = (B, S",
  ),
]


@pytest.mark.parametrize(("query", "key", "value", "message"), _BAD_SHAPES)
@_all
def test_refused_shapes(name, query, key, value, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    MEMBERS[name].call(*map(jnp.ones, (query, key, value)))


@pytest.mark.parametrize(("option", "bad", "message"), _BAD_OPTIONS)
@_all
def test_refused_options(name, option, bad, message):
  call = functools.partial(MEMBERS[name].call, **{option: bad})
  if MEMBERS[name].takes(option):
    error = pytest.raises(ValueError, match=re.escape(message))
  else:
    error = pytest.raises(TypeError, match="unexpected keyword argument")
  with error:
    call(*map(jnp.ones, (_Q, _K, _V)))


@pytest.mark.parametrize("name", _taking("mask"))
def test_masks_of_lower_rank_broadcast(name):
  args = _inputs()[1:]
  seen = _mask(MEMBERS[name])[1, 0]
  low = MEMBERS[name].call(*args, mask=jnp.asarray(seen))
  full = MEMBERS[name].call(*args, mask=jnp.asarray(seen[None, None]))
  np.testing.assert_array_equal(low, full)


@_all
def test_refused_rank_of_unbatched_mask(name):
  message = "mask must be broadcastable to (N, T, S) = (4, 3, 6), got shape (2"
  if not MEMBERS[name].takes("mask"):
    message = "key_mask must have shape (6,) = (S,)"
  args = [jnp.ones(x[1:]) for x in (_Q, _K, _V)]
  with pytest.raises(ValueError, match=re.escape(message)):
    MEMBERS[name].call(*args, seen=np.ones((2, 4, 3, 6), bool))


@_all
def test_refused_dtypes(name):
  member = MEMBERS[name]
  q, k, v = _inputs()[1:]
  with pytest.raises(
    ValueError, match="query must have a floating dtype, got i"
  ):
    member.call(q.astype(int), k, v)
  with pytest.raises(
    ValueError, match="got key of bfloat16 and query of float32"
  ):
    member.call(q, k.astype("bfloat16"), v)
  with pytest.raises(ValueError, match="got value of float16 and query of"):
    member.call(q, k, v.astype("float16"))


# --- how the functions compile ---


@pytest.mark.parametrize("how", ["eager", "jit", "gradient"])
@_all
def test_second_call_does_not_recompile(name, how):
  call = MEMBERS[name].call
  fn = {
    "eager": lambda _, *x: call(*x),
    "jit": quick_jit(lambda _, *x: call(*x)),
    "gradient": functools.partial(value_and_vjp, call),
  }[how]
  first, second = _inputs(), [2 * x for x in _inputs()]
  jax.block_until_ready(fn(*first))
  with no_recompilation():
    jax.block_until_ready(fn(*second))


@pytest.mark.parametrize("dtype", _NARROW)
@_all
def test_strict_dtype_promotion(name, dtype):
  args, seen = _inputs(dtype=dtype), jnp.asarray(_mask(MEMBERS[name]))
  call = functools.partial(MEMBERS[name].call, seen=seen)
  with jax.numpy_dtype_promotion("strict"):
    jax.eval_shape(functools.partial(value_and_vjp, call), *args)


# --- sharding ---


def _sharded_reference(name):
  causal = MEMBERS[name].takes("is_causal")
  return _flat(_run(name, is_causal=causal)(*_inputs()))


@pytest.mark.parametrize(
  "spec", [P("x"), P(None, "x")], ids=["batch", "length"]
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@_all
def test_sharded_inputs(name, kind, spec):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
  run = _run(name, is_causal=MEMBERS[name].takes("is_causal"))
  with jax.set_mesh(mesh):
    args = jax.device_put(_inputs(), NamedSharding(mesh, spec))
    got = _flat(run(*args))
  _assert_close(got, _sharded_reference(name), 16 * _eps("float32"))
  if kind == AxisType.Explicit:
    pad = (None,) * (4 - len(spec))
    assert all(x.sharding.spec == P(*spec, *pad) for x in got)


@_all
def test_shard_map_over_batch(name):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  causal = MEMBERS[name].takes("is_causal")
  options = {"is_causal": True} if causal else {}
  fn = jax.shard_map(
    functools.partial(MEMBERS[name].call, **options),
    mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=True,
  )  # fmt: skip
  got = quick_jit(functools.partial(value_and_vjp, fn))(*_inputs())
  _assert_close(_flat(got), _sharded_reference(name), 16 * _eps("float32"))


@_all
def test_shard_map_over_queries(name):
  # Keys and values are on every device, so their gradients sum over devices.
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  member, rows = MEMBERS[name], P(None, "x")
  seen = np.broadcast_to(_mask(member), _LOGITS)

  def attend(*args):
    return member.call(*args[:3], seen=member.hide(args[3]))

  fn = jax.shard_map(
    attend, mesh=mesh, in_specs=(rows, P(), P(), P(None, None, "x")),
    out_specs=rows, check_vma=True,
  )  # fmt: skip
  run = functools.partial(value_and_vjp, lambda *x: fn(*x, seen))
  got = quick_jit(run)(*_inputs())
  _assert_close(_flat(got), _masked(name, "float32")[1], 16 * _eps("float32"))


# --- the list itself ---


def test_every_public_attention_function_is_listed():
  found = set()
  for name in jaxattn.attention.__all__:
    fn = getattr(jaxattn.attention, name)
    if inspect.isfunction(inspect.unwrap(fn)):
      first = list(inspect.signature(fn).parameters)[:3]
      # A fit returns parameters, not attention.
      if first == ["query", "key", "value"] and not name.startswith("fit_"):
        found.add(name)
  assert "softmax_attention" in found
  assert found <= set(MEMBERS)
