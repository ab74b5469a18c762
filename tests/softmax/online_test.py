"""Online softmax: parts merge to the whole, in any order."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.softmax import (
  OnlineSoftmax,
  online_softmax_finalize,
  online_softmax_init,
  online_softmax_merge,
  online_softmax_update,
)
from tests._dense import softmax
from tests._recompile import quick_jit

pytestmark = pytest.mark.any_x64

_T, _S, _DIM, _PARTS = 5, 12, 3, 4


def _inputs():
  """Logits with hidden keys; query 0 sees none, query 1 one part only."""
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((2, _T, _S)) * 4
  logits[rng.random(logits.shape) < 0.3] = -np.inf
  logits[:, 0] = -np.inf
  logits[:, 1, : _S - _S // _PARTS] = -np.inf
  value = rng.standard_normal((2, _S, _DIM))
  return jnp.asarray(logits), jnp.asarray(value)


def _parts(logits, value):
  logits = jnp.split(logits, _PARTS, axis=-1)
  value = jnp.split(value, _PARTS, axis=-2)
  return [online_softmax_init(x, v) for x, v in zip(logits, value)]


def _whole(logits, value):
  weights, lse = softmax(logits, True)
  return jnp.einsum("bts,bsh->bth", weights, value), lse


def _assert_close(got, want):
  tol = 64 * float(jnp.finfo(got[0].dtype).eps)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=tol, atol=tol)


def test_parts_in_every_order_give_the_whole():
  @quick_jit
  def run(logits, value):
    parts = _parts(logits, value)
    merged = [
      functools.reduce(online_softmax_merge, order)
      for order in itertools.permutations(parts)
    ]
    a, b, c, d = parts
    pairs = online_softmax_merge(
      online_softmax_merge(a, b), online_softmax_merge(c, d)
    )
    finals = [online_softmax_finalize(x) for x in [pairs, *merged]]
    return _whole(logits, value), finals

  want, finals = run(*_inputs())
  assert len(finals) == 25
  for got in finals:
    _assert_close(got, want)


def test_merge_is_commutative_and_associative_as_states():
  a, b, c, _ = _parts(*_inputs())
  merge = online_softmax_merge
  _assert_close(merge(a, b), merge(b, a))
  _assert_close(merge(merge(a, b), c), merge(a, merge(b, c)))


def test_update_is_merge_with_the_new_part():
  logits, value = _inputs()
  state = online_softmax_init(logits[..., :3], value[:, :3])
  for start in range(3, _S, 3):
    at = slice(start, start + 3)
    state = online_softmax_update(state, logits[..., at], value[:, at])
  _assert_close(online_softmax_finalize(state), _whole(logits, value))


def test_query_without_keys_is_zero_and_neutral():
  logits, value = _inputs()
  a, b, *_ = _parts(logits, value)
  out, lse = online_softmax_finalize(online_softmax_merge(a, b))
  assert not out[:, :2].any()
  assert np.isneginf(lse[:, :2]).all()
  nothing = online_softmax_init(jnp.full_like(logits, -jnp.inf), value)
  state = online_softmax_merge(a, b)
  for merged in (
    online_softmax_merge(state, nothing),
    online_softmax_merge(nothing, state),
  ):
    _assert_close(merged, state)


def test_gradient_through_merges():
  logits, value = _inputs()
  seen = jnp.isfinite(logits)

  def loss(fn):
    def run(logits, value):
      out, lse = fn(jnp.where(seen, logits, -jnp.inf), value)
      return jnp.sin(out).sum() + jnp.where(lse > -1e9, lse, 0).sum()

    return quick_jit(jax.grad(run, (0, 1)))

  def merged(logits, value):
    state = functools.reduce(online_softmax_merge, _parts(logits, value))
    return online_softmax_finalize(state)

  finite = jnp.where(seen, logits, 0)
  got, want = (loss(fn)(finite, value) for fn in (merged, _whole))
  assert all(jnp.isfinite(g).all() for g in got)
  _assert_close(got, want)


def test_huge_and_tiny_logits():
  value = jnp.array([[1.0], [2.0]])
  for shift in (1e30, 1e4, -1e4, -1e30):
    state = online_softmax_init(jnp.full((1, 2), shift), value)
    out, lse = online_softmax_finalize(online_softmax_merge(state, state))
    np.testing.assert_allclose(out, [[1.5]], rtol=1e-6)
    np.testing.assert_allclose(lse, [shift + np.log(4.0)], rtol=1e-6)


def test_stacked_moments():
  @quick_jit
  def run(logits, x):
    stacked = jnp.concatenate([x, x**2], -1)
    first, second = jnp.split(logits, 2, -1)
    state = online_softmax_init(first, stacked[:, : _S // 2])
    state = online_softmax_update(state, second, stacked[:, _S // 2 :])
    mean, square = jnp.split(online_softmax_finalize(state)[0], 2, -1)
    weights, _ = softmax(logits, True)
    want = jnp.einsum("bts,bsh->bth", weights, x)
    gap = x[:, None] - want[:, :, None]
    variance = jnp.einsum("bts,btsh->bth", weights, gap**2)
    return (mean, square - mean**2), (want, variance)

  logits, x = _inputs()
  _assert_close(*run(logits[:, 1:], x))


def test_linear_attention_state_merges_into_a_softmax():
  # A prefix known only through phi(q) . Z and phi(q) . k joins exact keys.
  rng = np.random.default_rng(1)
  phi, features = rng.random((_T, 6)), rng.random((7, 6))
  prefix_value = rng.standard_normal((7, _DIM))
  logits, value = rng.standard_normal((_T, 4)), rng.standard_normal((4, _DIM))
  prefix = OnlineSoftmax(
    acc=jnp.asarray(phi @ (features.T @ prefix_value)),
    denom=jnp.asarray(phi @ features.sum(0)),
    max=jnp.zeros(_T),
  )
  exact = online_softmax_init(jnp.asarray(logits), jnp.asarray(value))
  out, lse = online_softmax_finalize(online_softmax_merge(exact, prefix))

  weights = np.concatenate([np.exp(logits), phi @ features.T], 1)
  total = weights.sum(1, keepdims=True)
  want = weights / total @ np.concatenate([value, prefix_value])
  _assert_close([out, lse], [want, np.log(total[:, 0])])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_state_has_the_dtype_of_logits(dtype):
  logits, value = _inputs()
  logits = logits.astype("float32")
  state = online_softmax_init(logits, value.astype(dtype))
  state = online_softmax_update(state, logits, value.astype(dtype))
  assert {x.dtype for x in state} == {jnp.dtype("float32")}


def test_refused_shapes():
  logits, value = _inputs()
  message = "value must have as many rows as logits has columns, got value"
  for call in (
    lambda: online_softmax_init(logits, value[:, 1:]),
    lambda: online_softmax_update(
      online_softmax_init(logits, value), logits, value[:, 1:]
    ),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  a = online_softmax_init(logits, value)
  b = online_softmax_init(logits[:, 1:], value)
  message = "b.acc must have shape (2, 5, 3) = a.acc.shape, got (2, 4, 3)"
  with pytest.raises(ValueError, match=re.escape(message)):
    online_softmax_merge(a, b)
