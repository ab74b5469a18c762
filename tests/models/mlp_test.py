"""Plain networks: their formula, their two parametrizations, their taps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.models import MLP, mlp_with_taps


def _inputs(n=5, d=4):
  return np.random.default_rng(0).standard_normal((n, d))


@pytest.mark.any_x64
def test_formula():
  x = _inputs().astype("float32")
  model = MLP((6, 7, 2), use_bias=True)
  params = model.init(jax.random.key(0), x)
  params = jax.tree.map(lambda p: p + 0.1, params)
  p = params["params"]
  assert [p[f"layer_{i}"]["kernel"].shape for i in range(3)] == [
    (4, 6),
    (6, 7),
    (7, 2),
  ]
  want = x
  for i, scale in enumerate((1 / 4, 2 / 6, 2 / 7)):
    layer = jax.tree.map(np.asarray, p[f"layer_{i}"])
    want = np.sqrt(scale) * want @ layer["kernel"] + layer["bias"]
    want = np.maximum(want, 0) if i < 2 else want
  got = model.apply(params, x)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_parametrizations_agree_at_the_start(activation):
  x, rng = _inputs(), jax.random.key(0)
  outputs = []
  for parametrization in ("ntk", "standard"):
    model = MLP((64, 64, 3), activation, parametrization)
    outputs.append(model.apply(model.init(rng, x), x))
  np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)
  assert 0.1 < np.std(outputs[0]) < 3


def test_taps_are_added_and_told():
  x = _inputs()
  model = MLP((6, 2), use_bias=True)
  params = model.init(jax.random.key(0), x)
  _, layers = mlp_with_taps(params, x)
  # Inputs hold the factor and the 1 of the bias, outputs what comes of them.
  np.testing.assert_allclose(layers[0].inputs, np.c_[x / 2, np.ones(5)])
  taps = [np.full(tap.outputs.shape, 0.5) for tap in layers]
  y, moved = mlp_with_taps(params, x, tuple(taps))
  np.testing.assert_allclose(moved[0].outputs, layers[0].outputs + 0.5)
  shifted = jax.tree.map(lambda p: p, params)
  for i in range(2):
    shifted["params"][f"layer_{i}"]["bias"] += 0.5
  np.testing.assert_allclose(y, model.apply(shifted, x), rtol=1e-6)


@pytest.mark.parametrize(
  ("model", "x", "message"),
  [
    (MLP(()), (5, 4), "widths must hold at least one size, got ()"),
    (MLP((3, 0)), (5, 4), "widths must be >= 1, got 0"),
    (MLP((3,)), (5,), "x must have 2 dimensions, got shape (5,)"),
    (
      MLP((3,), activation="sine"),
      (5, 4),
      "activation must be one of 'relu', 'gelu', 'tanh', got 'sine'",
    ),
    (
      MLP((3,), parametrization="mup"),
      (5, 4),
      "parametrization must be one of 'ntk', 'standard', got 'mup'",
    ),
  ],
)
def test_refused(model, x, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    model.init(jax.random.key(0), jnp.ones(x))


def test_refused_taps_and_inputs():
  x = _inputs()
  params = MLP((6, 2)).init(jax.random.key(0), x)
  for args, message in (
    ((x, (x,)), "taps must be one array a layer, 2, got 1"),
    ((x, (x, x)), "taps[0] must have shape (5, 6) = (n, width), got (5, 4)"),
    ((x[:, :3],), "x must have shape (*, 4) = (n, d), got (5, 3)"),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      mlp_with_taps(params, *args)
