"""What every attention function must make of its arguments."""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests._recompile import quick_jit
from tests.conformance._attention import MEMBERS
from tests.conformance._attention_calls import (
  LOGITS,
  all_members,
  all_public,
  assert_close,
  eps_of,
  inputs,
  mask_of,
  oracle,
  taking,
)

pytestmark = pytest.mark.any_x64

# --- masks and other options ---


@pytest.mark.parametrize(
  "shape", list(itertools.product(*((1, n) for n in LOGITS)))
)
@pytest.mark.parametrize("name", taking("mask"))
def test_mask_of_every_broadcastable_shape(name, shape):
  c, *args = inputs()
  mask = np.random.default_rng(sum(shape)).random(shape) < 0.6
  full = np.broadcast_to(mask, LOGITS)
  got = quick_jit(MEMBERS[name].call)(*args, mask)
  want = oracle(name, c, *args, seen=full)[:1]
  assert_close([got], want, 16 * eps_of("float32"))


def _options(kind):
  return [(n, o) for n in sorted(MEMBERS) for o in getattr(MEMBERS[n], kind)]


@functools.cache
def _with(name, **options):
  call = functools.partial(MEMBERS[name].call, **options)
  return jax.tree.leaves(quick_jit(call)(*inputs()[1:]))


@all_members
def test_every_option_is_listed(name):
  member = MEMBERS[name]
  parameters = list(inspect.signature(member.fn).parameters.values())
  options = parameters[member.num_arrays :]
  assert sorted(o.name for o in options) == sorted(
    [*member.effects, *member.neutral]
  )
  assert all(o.kind != o.VAR_KEYWORD for o in options)


@pytest.mark.parametrize(("name", "option"), _options("effects"))
def test_option_is_not_ignored(name, option):
  call = functools.partial(
    MEMBERS[name].call, **{option: MEMBERS[name].effects[option]}
  )
  changed = jax.tree.leaves(quick_jit(call)(*inputs()[1:]))
  plain = _with(name)
  assert len(changed) > len(plain) or not np.allclose(changed[0], plain[0])


@pytest.mark.parametrize(("name", "option"), _options("neutral"))
def test_option_does_not_change_the_result(name, option):
  good, bad = MEMBERS[name].neutral[option]
  assert_close(
    _with(name, **{option: good}), _with(name), 16 * eps_of("float32")
  )
  with pytest.raises(ValueError, match=re.compile(option, re.IGNORECASE)):
    MEMBERS[name].call(*inputs()[1:], **{option: bad})


@all_public
def test_precision_reaches_the_products(name):
  call = functools.partial(MEMBERS[name].call, precision="highest")
  program = str(jax.make_jaxpr(call)(*inputs()[1:]))
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
@all_public
def test_refused_shapes(name, query, key, value, message):
  message = re.escape(MEMBERS[name].words(message))
  with pytest.raises(ValueError, match=message):
    MEMBERS[name].call(*map(jnp.ones, (query, key, value)))


@all_public
def test_no_keys(name):
  query, key, value = inputs()[1:]
  none = key[:, :0], value[:, :0]
  if not MEMBERS[name].no_keys:
    message = f"key must not be empty, got shape {none[0].shape}"
    message = re.escape(MEMBERS[name].words(message))
    with pytest.raises(ValueError, match=message):
      MEMBERS[name].call(query, *none)
    return
  hidden = np.zeros((1, 1, 1, 1), bool)
  want = MEMBERS[name].call(query, key, value, mask=hidden)
  # The suite's prefix for as many keys.
  options = MEMBERS[name].options(key.shape[1])
  got = MEMBERS[name].fn(query, *none, **options)
  assert np.isfinite(got).all()
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("option", "bad", "message"), _BAD_OPTIONS)
@all_public
def test_refused_options(name, option, bad, message):
  call = functools.partial(MEMBERS[name].call, **{option: bad})
  if MEMBERS[name].takes(option):
    error = pytest.raises(ValueError, match=re.escape(message))
  elif option in MEMBERS[name].refuses:
    error = pytest.raises(ValueError, match=f"{option} must be None, got shape")
  else:
    error = pytest.raises(TypeError, match="unexpected keyword argument")
  with error:
    call(*map(jnp.ones, (_Q, _K, _V)))


@pytest.mark.parametrize("name", taking("mask"))
def test_masks_of_lower_rank_broadcast(name):
  args = inputs()[1:]
  seen = mask_of(MEMBERS[name])[1, 0]
  low = MEMBERS[name].call(*args, mask=jnp.asarray(seen))
  full = MEMBERS[name].call(*args, mask=jnp.asarray(seen[None, None]))
  np.testing.assert_array_equal(low, full)


@all_public
def test_refused_rank_of_unbatched_mask(name):
  message = "mask must be broadcastable to (N, T, S) = (4, 3, 6), got shape (2"
  if not MEMBERS[name].takes("mask"):
    message = "key_mask must have shape (6,) = (S,)"
  args = [jnp.ones(x[1:]) for x in (_Q, _K, _V)]
  message = re.escape(MEMBERS[name].words(message))
  with pytest.raises(ValueError, match=message):
    MEMBERS[name].call(*args, seen=np.ones((2, 4, 3, 6), bool))


@all_public
def test_refused_dtypes(name):
  member = MEMBERS[name]
  q, k, v = inputs()[1:]
  with pytest.raises(
    ValueError, match="query must have a floating dtype, got i"
  ):
    member.call(q.astype(int), k, v)
  message = member.words("got key of bfloat16 and query of float32")
  with pytest.raises(ValueError, match=message):
    member.call(q, k.astype("bfloat16"), v)
  message = member.words("got value of float16 and query of")
  with pytest.raises(ValueError, match=message):
    member.call(q, k, v.astype("float16"))
