"""Flows as forecasters: normalization, training, samples."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.models import (
  DiT,
  FlowMLP,
  normalize_windows,
  sample_forecast,
  train_flow,
)
from jaxattn.sampling import cfm_loss, empirical_velocity
from tests._recompile import no_recompilation, quick_jit

_KEY = jax.random.key(0)
_MLP = FlowMLP(horizon=6, history=4, width=16)


def _normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@functools.cache
def _params(model):
  x = jnp.zeros((1, model.horizon, model.channels))
  history = jnp.zeros((1, model.history, model.channels))
  params = quick_jit(model.init)(_KEY, x, 0.5, history)
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  moved = [x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
  return jax.tree.unflatten(tree, moved)


# --- normalization ---


def test_windows_are_normalized_by_their_own_past():
  history = _normal(5, 7, 2) * jnp.array([[[1.0, 1e-6]]])
  scaled, last, scale = normalize_windows(history, global_std=2.0)
  np.testing.assert_allclose(scale[:, 0, 0], history[..., 0].std(1))
  # No smaller than 1e-3 of the series.
  np.testing.assert_allclose(scale[:, 0, 1], 2e-3)
  np.testing.assert_allclose(last, history[:, -1:])
  np.testing.assert_allclose(last + scale * scaled, history, atol=1e-15)
  per_channel = normalize_windows(history, global_std=jnp.array([2.0, 1e-5]))
  np.testing.assert_allclose(per_channel[2][:, 0, 1], history[..., 1].std(1))


@pytest.mark.parametrize(
  "model",
  [_MLP, DiT(horizon=4, history=8, width=16, num_layers=1, num_heads=2)],
)
def test_forecasts_follow_level_and_scale(model):
  history = _normal(6, model.history, 1)
  draw = functools.partial(
    sample_forecast,
    _KEY,
    _params(model),
    model=model,
    num_samples=4,
    num_steps=3,
  )
  samples = draw(history)
  assert samples.shape == (4, 6, model.horizon, 1)
  np.testing.assert_allclose(
    draw(3.5 * history - 20), 3.5 * samples - 20, rtol=1e-5, atol=1e-5
  )
  # Unless they shall not.
  plain = draw(history, normalize=False)
  assert jnp.abs(draw(history + 1, normalize=False) - plain - 1).max() > 1e-3


def test_cached_histories_make_the_same_forecasts():
  model = DiT(
    horizon=4,
    history=8,
    width=16,
    num_layers=1,
    num_heads=2,
    history_mode="cross",
  )
  history, params = _normal(3, 8, 1), _params(model)
  draw = functools.partial(sample_forecast, _KEY, params, model=model)
  got = draw(history, num_samples=2, num_steps=2, normalize=False)
  # Step by step, without a cache.
  z = jax.random.normal(_KEY, got.shape)
  apply = quick_jit(jax.vmap(model.apply, (None, 0, None, None)))
  for t in (0.0, 0.5):
    first = apply(params, z, t, history)
    z = z + 0.25 * (first + apply(params, z + 0.5 * first, t + 0.5, history))
  np.testing.assert_allclose(got, z, rtol=0, atol=1e-5)


def test_forecasts_are_compiled_once():
  draw = functools.partial(
    sample_forecast, model=_MLP, num_samples=2, num_steps=1
  )
  draw(_KEY, _params(_MLP), _normal(3, 4, 1))
  history = _normal(3, 4, 1, seed=2)
  with no_recompilation():
    draw(_KEY, _params(_MLP), history)


# --- training ---


def test_training_finds_a_constant():
  """A future that is known: the velocity carries all noise to it."""
  history = _normal(64, 4, 1)
  future = (
    history[:, -1:] + jnp.array([1.0, -1.0, 2.0, 0.0, 0.5, 3.0])[None, :, None]
  )
  future = jnp.asarray(future, jnp.float32)
  train = functools.partial(
    train_flow, _KEY, _MLP, history, future, num_steps=300, batch_size=64
  )
  params, log = train(learning_rate=1e-2, normalize=False)
  assert log.losses.shape == (300,)
  assert log.losses[-20:].mean() < 0.2 * log.losses[:20].mean()
  assert log.best == -1
  samples = sample_forecast(
    _KEY, params, history, model=_MLP, num_samples=20, normalize=False
  )
  bias = (samples.mean(0) - future)[..., 0].mean(0)
  assert jnp.abs(bias).max() < 0.3


def test_validation_keeps_the_best():
  """With few windows the last parameters are not the best."""
  history = _normal(264, 4, 1)
  future = history[:, -1:] + 0.5 * _normal(264, 6, 1, seed=1)
  val = history[8:], future[8:]
  train = functools.partial(
    train_flow,
    _KEY,
    _MLP,
    history[:8],
    future[:8],
    normalize=False,
    learning_rate=0.02,
  )
  params, log = train(num_steps=200, batch_size=32, val=val, num_evals=20)
  assert log.val_losses.shape == (20,)
  assert log.best == jnp.argmin(log.val_losses) < 19
  zero = cfm_loss(_KEY, lambda x, t, h: jnp.zeros_like(x), val[1], val[0])
  velocity = functools.partial(_MLP.apply, params)
  best = cfm_loss(_KEY, velocity, val[1], val[0])
  # Of what is returned, up to the noise of other times.
  np.testing.assert_allclose(best[1].per_dim, log.val_losses.min(), rtol=0.15)
  assert best[0] < zero[0]


def test_the_regularizer_reaches_the_model():
  """Ends become polynomial as its weight grows."""
  history, future = _normal(16, 4, 1), _normal(16, 6, 1, seed=1)

  def rough(weight):
    params, _ = train_flow(
      _KEY,
      _MLP,
      history,
      future,
      num_steps=150,
      batch_size=32,
      learning_rate=1e-2,
      reg_weight=weight,
      degree=0,
    )
    x = _normal(200, 6, 1, seed=4)
    v = _MLP.apply(params, x, 0.0, jnp.tile(history, (13, 1, 1))[:200])
    end = x + v
    return ((end - end.mean(1, keepdims=True)) ** 2).mean()

  assert rough(100.0) < 0.3 * rough(0.0)


def test_seeds_by_vmap():
  history, future = _normal(8, 4, 1), _normal(8, 6, 1, seed=1)
  train = functools.partial(
    train_flow, model=_MLP, history=history, future=future, num_steps=3
  )
  rngs = jax.random.split(_KEY, 2)
  many = jax.vmap(lambda rng: train(rng)[1].losses)(rngs)
  np.testing.assert_allclose(many[1], train(rngs[1])[1].losses, rtol=1e-5)


@pytest.mark.slow
def test_dit_overfits_to_the_best_velocity_of_its_data():
  """Eight futures of one history: what is least is known, and reached."""
  model = DiT(horizon=4, history=4)
  future = _normal(8, 4, 1, seed=5).astype(jnp.float32)
  history = jnp.zeros((8, 4, 1), jnp.float32)
  params, _ = train_flow(
    _KEY,
    model,
    history,
    future,
    num_steps=1500,
    batch_size=256,
    learning_rate=2e-3,
    normalize=False,
  )
  n = 8192
  data = future[..., 0]
  y = jnp.tile(future, (n // 8, 1, 1))

  @jax.jit
  def losses(rng):
    def best(x, t, h):
      return empirical_velocity(x[..., 0], t, data)[..., None]

    velocity = functools.partial(model.apply, params)
    cond = jnp.zeros((n, 4, 1), jnp.float32)
    # The same times and noise.
    return [cfm_loss(rng, v, y, cond)[1].squares for v in (velocity, best)]

  got, least = losses(jax.random.key(9))
  error = (got - least).std() / n**0.5
  assert -3 * error < (got - least).mean()
  assert got.mean() < 1.05 * least.mean()


# --- what is refused ---

_H, _F = np.zeros((5, 4, 1)), np.zeros((5, 6, 1))
_train = functools.partial(train_flow, _KEY, _MLP)
_draw = functools.partial(sample_forecast, _KEY, None, model=_MLP)
_REFUSED = [
  (lambda: _draw(_H[:, :3]), "history must have shape (5, 4, 1)"),
  (lambda: _draw(np.full((5, 4, 1), np.nan)),
   "history must be finite, got 20 entries that are not"),
  (lambda: _draw(_H, num_samples=0), "num_samples must be >= 1, got 0"),
  (lambda: _draw(_H, num_steps=0), "num_steps must be >= 1, got 0"),
  (lambda: _draw(_H, method="verlet"), "method must be one of 'euler'"),
  (lambda: _draw(_H, normalize=1), "normalize must be one of"),
  (lambda: normalize_windows(_H, global_std=0.0),
   "global_std must be positive"),
  (lambda: normalize_windows(_H, global_std=np.ones(2)),
   "global_std must have shape (1,)"),
  (lambda: _train(_H, _F[:4]), "future must have shape (5, 6, 1)"),
  (lambda: _train(_H[:0], _F[:0]), "history must hold a window, got none"),
  (lambda: _train(_H, np.full((5, 6, 1), np.inf)),
   "future must be finite, got 30 entries that are not"),
  (lambda: _train(_H, _F, num_steps=0), "num_steps must be >= 1"),
  (lambda: _train(_H, _F, batch_size=0), "batch_size must be >= 1"),
  (lambda: _train(_H, _F, learning_rate=0.0), "learning_rate must be positive"),
  (lambda: _train(_H, _F, reg_weight=-1.0), "reg_weight must be non-negative"),
  (lambda: _train(_H, _F, degree=6), "degree must be in [0, 5], got 6"),
  (lambda: _train(_H, _F, kind="soft"), "kind must be one of"),
  (lambda: _train(_H, _F, val=(_H, _F[:, :2])), "val future must have shape"),
  (lambda: _train(_H, _F, val=(_H, _F), num_steps=5, num_evals=2),
   "num_evals must divide num_steps=5, got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), _REFUSED)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
