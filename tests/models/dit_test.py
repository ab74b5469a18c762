"""A diffusion transformer: what it is at first, its modes, its inputs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.models import DiT, HistoryCache, encode_history
from tests._recompile import quick_jit

_KEY = jax.random.key(0)
_SMALL = {"width": 16, "num_layers": 2, "num_heads": 2, "channels": 2}
_dit = functools.partial(DiT, horizon=8, history=12, **_SMALL)
_MODES = ("joint", "cross")


def _normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def _inputs(num=3):
  return _normal(num, 8, 2), jnp.linspace(0.1, 1, num), _normal(num, 12, 2)


def _moved(model, *inputs):
  """Parameters none of which are 0, as after training."""
  params = quick_jit(model.init)(_KEY, *inputs)
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  leaves = [x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
  return jax.tree.unflatten(tree, leaves)


def _plain(params, x, t, history, patch=4, heads=2):
  """The model of mode "joint", written down in one piece."""
  p = params["params"]

  def dense(name, z):
    return z @ p[name]["kernel"] + p[name]["bias"]

  def norm(z):
    centered = z - z.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)

  def tokens(y, i):
    y = dense(f"embed_{i}", y.reshape(len(y), -1, patch * y.shape[-1]))
    return y + (p[f"position_{i}"] + p["segments"][i])

  def attend(q, k, v):
    split = (*q.shape[:2], heads, -1)
    q, k, v = (y.reshape(split) for y in (q, k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    return np.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), v).reshape(
      *q.shape[:2], -1
    )

  width = p["segments"].shape[1]
  rate = 1000 * 10_000 ** (-np.arange(width // 2) / (width // 2))
  angle = np.asarray(t)[:, None] * rate
  e = np.concatenate([np.sin(angle), np.cos(angle)], 1)
  e = jax.nn.silu(dense("time_1", jax.nn.silu(dense("time_0", e))))
  z = np.concatenate([tokens(history, 0), tokens(x, 1)], 1)
  for i in range(2):
    p_all, p = p, p[f"blocks_{i}"]
    b1, s1, g1, b2, s2, g2 = np.split(dense("modulation", e)[:, None], 6, -1)
    qkv = np.split(dense("qkv", norm(z) * (1 + s1) + b1), 3, -1)
    z = z + g1 * dense("out", attend(*qkv))
    hidden = jax.nn.gelu(dense("mlp_0", norm(z) * (1 + s2) + b2))
    z = z + g2 * dense("mlp_1", hidden)
    p = p_all
  shift, scale = np.split(dense("modulation", e)[:, None], 2, -1)
  z = norm(z[:, -(x.shape[1] // patch) :]) * (1 + scale) + shift
  return dense("head", z).reshape(x.shape)


def test_joint_model_is_the_written_one():
  model, inputs = _dit(), _inputs()
  params = _moved(model, *inputs)
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  with jax.numpy_rank_promotion("allow"):
    want = _plain(wide, *(np.asarray(x) for x in inputs))
  # Angles of up to 1000 are kept in single precision.
  got = quick_jit(model.apply)(params, *inputs)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)
  assert np.abs(want).max() > 0.1


@pytest.mark.parametrize("mode", _MODES)
def test_zero_at_first(mode):
  model, (x, t, history) = _dit(history_mode=mode), _inputs()

  @quick_jit
  def first(rng):
    params = model.init(rng, x, t, history)
    loss = lambda p: ((model.apply(p, x, t, history) - 1) ** 2).sum()  # noqa: E731
    return model.apply(params, x, t, history), jax.grad(loss)(params), params

  v, grads, params = first(_KEY)
  assert (v == 0).all()
  grads = grads["params"]
  # Only the output learns at once, and then all the others.
  assert jnp.abs(grads["head"]["kernel"]).max() > 1e-3
  assert jnp.abs(grads["blocks_0"]["qkv"]["kernel"]).max() == 0
  size = sum(x.size for x in jax.tree.leaves(params))
  w, p_c = model.width, model.patch * model.channels
  layer = 6 * w * (w + 1) + 4 * w * (w + 1) + 8 * w * w + 5 * w
  rest = 2 * w * (p_c + 1) + 5 * w + 2 * w + 2 * w * (w + 1)
  out = 2 * w * (w + 1) + p_c * (w + 1)
  assert size == 2 * layer + rest + out


@pytest.mark.parametrize("mode", _MODES)
def test_rows_do_not_see_each_other(mode):
  model, inputs = _dit(history_mode=mode), _inputs()
  params = _moved(model, *inputs)

  @quick_jit
  def both(params, x, t, history):
    one = lambda x, t, h: model.apply(params, x[None], t, h[None])[0]  # noqa: E731
    return model.apply(params, x, t, history), jax.vmap(one)(x, t, history)

  together, apart = both(params, *inputs)
  np.testing.assert_allclose(together, apart, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", _MODES)
def test_patches_have_positions(mode):
  """One step of training from the start does not make them visible yet."""
  model, (x, t, history) = _dit(history_mode=mode), _inputs()
  params = _moved(model, x, t, history)
  swapped = jnp.concatenate(
    [history[:, 4:8], history[:, :4], history[:, 8:]], 1
  )
  apply = quick_jit(model.apply)
  gap = apply(params, x, t, history) - apply(params, x, t, swapped)
  assert jnp.abs(gap).max() > 1e-3
  # Without positions they could be exchanged.
  bare = jax.tree_util.tree_map_with_path(
    lambda path, p: p * ("position" not in str(path)), params
  )
  gap = apply(bare, x, t, history) - apply(bare, x, t, swapped)
  assert jnp.abs(gap).max() < 1e-5


def test_a_cache_stands_for_the_history():
  model, (x, t, history) = _dit(history_mode="cross"), _inputs()
  params = _moved(model, x, t, history)
  cache = encode_history(params, history, model=model)
  assert cache.key.shape == (2, 3, 3, 2, 8)
  apply = quick_jit(model.apply)
  want, got = (apply(params, x, t, h) for h in (history, cache))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
  # It knows neither time nor the future; the output knows the history.
  other = apply(params, x, t, cache._replace(value=2 * cache.value))
  assert jnp.abs(other - got).max() > 1e-3


@pytest.mark.parametrize("mode", _MODES)
def test_bfloat16(mode):
  model, (x, t, history) = _dit(history_mode=mode), _inputs()
  x, t, history = (y.astype(jnp.float32) for y in (x, t, history))
  params = _moved(model, x, t, history)
  want = quick_jit(model.apply)(params, x, t, history)
  low = quick_jit(_dit(history_mode=mode, dtype=jnp.bfloat16).apply)
  got = low(params, x, t, history)
  assert got.dtype == want.dtype == jnp.float32
  assert jnp.abs(got - want).max() < 2e-2 * jnp.abs(want).max()
  assert jnp.abs(got - want).max() > 0
  assert low(params, x.astype(jnp.bfloat16), t, history).dtype == jnp.bfloat16


_X, _T, _H = np.zeros((3, 8, 2)), np.zeros(3), np.zeros((3, 12, 2))
_CACHE = HistoryCache(np.zeros((2, 3, 3, 2, 8)), np.zeros((2, 3, 3, 2, 8)))
_REFUSED = [
  ({"patch": 5}, (), "patch must divide history=12 and horizon=8, got 5"),
  ({"num_heads": 3}, (), "num_heads must divide width=16, got 3"),
  ({"width": 15, "num_heads": 1}, (), "width must be even, got 15"),
  ({"num_layers": 0}, (), "num_layers must be >= 1, got 0"),
  ({"history_mode": "both"}, (), "history_mode must be one of 'joint',"),
  ({}, (_X[:, :4], _T, _H), "x must have shape (3, 8, 2)"),
  ({}, (_X, _T[:2], _H), "t must have shape (3,) = (B,), got (2,)"),
  ({}, (_X, _T + 2, _H), "t must be in [0, 1]"),
  ({}, (_X, _T, _X), "history must have shape (3, 12, 2)"),
  ({}, (_X, _T, _H.astype(int)), "history must have a floating dtype"),
  ({}, (_X, _T, _CACHE), "history must be an array in mode 'joint'"),
  ({"history_mode": "cross"}, (_X[:2], _T[:2], _CACHE),
   "history.key must have shape (2, 2, 3, 2, 8)"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "inputs", "message"), _REFUSED)
def test_refused(fields, inputs, message):
  model = DiT(**{"horizon": 8, "history": 12, **_SMALL, **fields})
  with pytest.raises(ValueError, match=re.escape(message)):
    model.init(_KEY, *(inputs or (_X, _T, _H)))


def test_only_cross_is_encoded():
  with pytest.raises(ValueError, match=r"model\.history_mode must be 'cross'"):
    encode_history({}, _H, model=_dit())
