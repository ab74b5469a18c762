"""Forecasters: closed forms, real series, and a small transformer."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn.data import (
  residual_linear_risk,
  residual_ssm,
  sample_residual_ssm,
  sample_sign_inconsistent,
  split_series,
  standardize,
  windows,
)
from jaxattn.models import (
  AttentionForecaster,
  nlinear_fit,
  nlinear_predict,
  persistence,
  residual_linear_apply,
  residual_linear_fit,
  seasonal_naive,
)
from tests.data._series import load_or_skip

# History, horizon; windows of training and test; squared and absolute error of
# N-Linear; squared error of persistence.
_REAL = {
  ("co2", 0): (104, 26, 1469, 432, 0.0033, 0.0452, 0.0891),
  ("sunspots_monthly", 0): (132, 24, 2029, 601, 0.5111, 0.5479, 1.2159),
  ("tmy3", 0): (96, 24, 6013, 1729, 0.1369, 0.2844, 0.3488),
  ("tmy3", 5): (96, 24, 6013, 1729, 0.0679, 0.1526, 0.6824),
  ("taylor", 0): (336, 48, 2439, 760, 0.0078, 0.0660, 1.5669),
  ("elec_equip", 0): (48, 12, 120, 41, 0.0591, 0.1890, 0.3596),
  ("sunspots_yearly", 0): (33, 5, 179, 58, 0.7988, 0.6724, 5.0413),
}
_KINDS = ("plain", "position_bias", "rope", "differential")


def _normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


# --- linear ---


def test_residual_linear_is_an_inner_product():
  v, x = _normal(4), _normal(9, 5, seed=1)
  want = (x[:, :-1] - x[:, -1:]) @ v + x[:, -1]
  np.testing.assert_allclose(residual_linear_apply(v, x), want)
  # Weights of sum 1.
  np.testing.assert_allclose(residual_linear_apply(v, x + 3), want + 3)


@pytest.mark.parametrize("ridge", [0.0, 2.5])
def test_residual_linear_fit_is_least_squares(ridge):
  x, y = _normal(40, 5), _normal(40, seed=1)
  z, target = x[:, :-1] - x[:, -1:], y - x[:, -1]
  want = np.linalg.solve(z.T @ z + ridge * np.eye(4), z.T @ target)
  got = residual_linear_fit(x, y, ridge=ridge)
  np.testing.assert_allclose(got, want, rtol=1e-10)


def test_residual_linear_risk_is_that_of_noise():
  """After a fit of 4096 samples, and where signs change, too."""
  ssm = residual_ssm(jax.random.key(0), 8, noise=0.1)
  v = residual_linear_fit(
    *sample_residual_ssm(jax.random.key(1), ssm, 4096)[:2]
  )
  np.testing.assert_allclose(v, ssm.coef[:-1], atol=0.02)
  best = residual_linear_risk(ssm)
  assert residual_linear_risk(ssm, v) < 1.02 * best
  for draw in (sample_residual_ssm, sample_sign_inconsistent):
    x, y, _ = draw(jax.random.key(2), ssm, 20_000)
    risk = jnp.square(residual_linear_apply(v, x) - y).mean()
    # .0200 and 4.5 deviations of a mean of 20000 squares.
    assert abs(risk - 0.02) < 4.5 * 0.02 * (2 / 20_000) ** 0.5 + 1e-4


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.3])
def test_nlinear_is_the_formula(ridge):
  x, y = _normal(50, 6), _normal(50, 4, seed=1)
  a, b = x - x[:, -1:], y - x[:, -1:]
  gram = np.array(a.T @ a + 50 * ridge * np.eye(6))
  # The last column is 0: without a ridge nothing determines its row.
  gram[-1, -1] += ridge == 0
  w = nlinear_fit(x, y, ridge=ridge)
  np.testing.assert_allclose(w, np.linalg.solve(gram, a.T @ b), atol=1e-12)
  assert not w[-1].any()
  np.testing.assert_allclose(
    nlinear_predict(w, x), x[:, -1:] + a @ w, rtol=1e-12
  )


def test_channels_share_weights_and_nothing_else():
  x, y = _normal(50, 6, 3), _normal(50, 4, 3, seed=1)
  w = nlinear_fit(x, y)
  rows = [np.concatenate([v[..., c] for c in range(3)]) for v in (x, y)]
  np.testing.assert_allclose(w, nlinear_fit(*rows), rtol=1e-10)
  calls = [
    functools.partial(nlinear_predict, w),
    lambda x: persistence(x, 4),
    lambda x: seasonal_naive(x, 4, period=3),
  ]
  for call in calls:
    together = call(x)
    assert together.shape == (50, 4, 3)
    for c in range(3):
      np.testing.assert_allclose(together[..., c], call(x[..., c]), rtol=1e-12)


def test_naive_forecasts_repeat_the_end():
  x = jnp.arange(10.0)[None]
  assert persistence(x, 3).tolist() == [[9, 9, 9]]
  want = [[6, 7, 8, 9, 6, 7, 8, 9, 6]]
  assert seasonal_naive(x, 9, period=4).tolist() == want
  assert seasonal_naive(x, 2, period=10).tolist() == [[0, 1]]


@pytest.mark.parametrize(
  ("case", "dtype"),
  [(("co2", 0), "float64"), *((case, "float32") for case in _REAL)],
  ids=str,
)
def test_real_series(case, dtype):
  """A wrong split or a leak moves these by far more than 2 percent."""
  name, column = case
  history, horizon, num_train, num_test, mse, mae, naive = _REAL[case]
  values = load_or_skip(name).values[:, [column]].astype(dtype)
  train, _, test = split_series(values)
  z, *_ = standardize(values, train)
  x, y = windows(z[train], history, horizon)
  x_test, y_test = windows(z[test.start - history :], history, horizon)
  assert (len(x), len(x_test)) == (num_train, num_test)
  got = nlinear_predict(nlinear_fit(x, y, ridge=1e-3), x_test)
  assert got.dtype == dtype
  found = [
    jnp.square(got - y_test).mean(),
    abs(got - y_test).mean(),
    jnp.square(persistence(x_test, horizon) - y_test).mean(),
  ]
  # The table has four decimals.
  np.testing.assert_allclose(found, [mse, mae, naive], rtol=0.02, atol=5e-5)


# --- attention ---


def _begin(model, x):
  return jax.jit(model.init)(jax.random.key(0), x)


@pytest.mark.parametrize("kind", _KINDS)
def test_forecaster(kind):
  x = _normal(3, 12, 2).astype("float32")
  model = AttentionForecaster(horizon=5, kind=kind, patch_size=3, num_layers=1)
  params = _begin(model, x)
  apply = jax.jit(model.apply)
  y = apply(params, x)
  assert y.shape == (3, 5, 2)
  # The last value is taken off and put back; channels are apart.
  np.testing.assert_allclose(apply(params, x + 2), y + 2, atol=1e-5)
  if kind == "plain":
    alone = apply(params, x[..., 1])
    np.testing.assert_allclose(alone, y[..., 1], atol=1e-5)
  # Patches before the last, in another order.
  order = jnp.array([3, 4, 5, 6, 7, 8, 0, 1, 2, 9, 10, 11])
  layers = params["params"]
  if kind == "position_bias":
    assert not layers["layer_0"]["bias"].any()
    layers["layer_0"]["bias"] += _normal(4, 4, 4).astype("float32")
  changed = abs(apply(params, x[:, order]) - apply(params, x)).max()
  if kind in ("plain", "differential"):
    assert changed < 1e-5
  else:
    assert changed > 1e-4


def test_forecaster_without_a_skip():
  x = _normal(3, 12)
  model = AttentionForecaster(
    horizon=2, residual=False, patch_size=3, num_layers=1
  )
  params = _begin(model, x)
  apply = jax.jit(model.apply)
  assert abs(apply(params, x + 2) - apply(params, x) - 2).max() > 0.1


def test_forecaster_of_one_token_is_a_network():
  """With one token there is nothing to attend to but itself."""
  x = _normal(4, 6)
  models = [
    AttentionForecaster(horizon=2, kind=kind, patch_size=6, num_layers=1)
    for kind in ("position_bias", "plain", "rope")
  ]
  params = _begin(models[0], x)
  bare = jax.tree.map(lambda x: x, params)
  del bare["params"]["layer_0"]["bias"]

  @jax.jit
  def outputs(params, bare):
    trees = params, bare, bare
    return [model.apply(tree, x) for model, tree in zip(models, trees)]

  want, *found = outputs(params, bare)
  for got in found:
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_forecaster_learns_a_wave():
  """Of any phase: what comes next is linear in the past."""
  t = np.arange(150) * 0.4
  z = (np.sin(t) + 0.5 * np.sin(2.1 * t))[:, None].astype("float32")
  x, y = (jnp.asarray(v) for v in windows(z, 12, 3))
  model = AttentionForecaster(horizon=3, patch_size=4, num_layers=1)
  optimizer = optax.adam(1e-2)
  params = _begin(model, x[:1])

  def loss(params):
    return jnp.square(model.apply(params, x) - y).mean()

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  carry = params, optimizer.init(params)
  _, losses = jax.jit(lambda c: jax.lax.scan(step, c, length=100))(carry)
  naive = jnp.square(persistence(x, 3) - y).mean()
  assert losses[-1] < 0.05 * naive


# --- refused ---

_X = np.ones((5, 6))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: residual_linear_apply(np.ones(6), _X),
      "v must have shape (5,) = (d - 1,), got (6,)",
    ),
    (
      lambda: residual_linear_apply(np.ones(5), _X[0]),
      "x must have 2 dimensions, got shape (6,)",
    ),
    (
      lambda: residual_linear_fit(_X[:, :1], np.ones(5)),
      "x must hold 2 lags or more, got 1",
    ),
    (
      lambda: residual_linear_fit(_X, np.ones(4)),
      "y must have shape (5,) = (n,), got (4,)",
    ),
    (
      lambda: residual_linear_fit(_X, np.ones(5), ridge=-1.0),
      "ridge must be non-negative, got -1.0",
    ),
    (
      lambda: nlinear_fit(_X, np.ones((4, 2))),
      "windows_y must have shape (5, *) = (n, H) or (n, H, C), got (4, 2)",
    ),
    (
      lambda: nlinear_fit(_X, np.ones((5, 2, 1))),
      "windows_y must have 2 dimensions, got shape (5, 2, 1)",
    ),
    (
      lambda: nlinear_fit(_X[:, :1], _X),
      "windows_x must hold 2 steps or more, got 1",
    ),
    (
      lambda: nlinear_fit(_X, _X, ridge=-1.0),
      "ridge must be non-negative, got -1.0",
    ),
    (
      lambda: nlinear_fit(_X.astype(int), _X),
      "windows_x must have a floating dtype, got int",
    ),
    (
      lambda: nlinear_predict(np.ones((5, 2)), _X),
      "w must have shape (6, *) = (L, H), got (5, 2)",
    ),
    (lambda: persistence(_X, 0), "horizon must be >= 1, got 0"),
    (
      lambda: persistence(_X[:0], 1),
      "x must not be empty, got shape (0, 6)",
    ),
    (
      lambda: seasonal_naive(_X, 2, period=7),
      "period must be in [1, 6], got 7",
    ),
  ],
)
def test_refused_arguments(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"kind": "residual"}, "kind must be one of 'plain', 'position_bias'"),
    ({"patch_size": 4}, "patch_size must divide the 6 steps of x, got 4"),
    ({"horizon": 0}, "horizon must be >= 1, got 0"),
    ({"num_layers": 0}, "num_layers must be >= 1, got 0"),
    ({"residual": 2}, "residual must be one of False, True, got 2"),
    ({"kind": "rope", "head_dim": 3}, "head_dim"),
  ],
)
def test_refused_forecasters(fields, message):
  model = AttentionForecaster(**{"horizon": 2, **fields})
  with pytest.raises(ValueError, match=re.escape(message)):
    model.init(jax.random.key(0), _X)
