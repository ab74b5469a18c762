"""Attention to scalars: closed forms, symmetries, and what theory says."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import attention_layer_gradients
from jaxattn.data import permutation_floor, residual_ssm, sample_residual_ssm
from jaxattn.models import (
  scalar_attention_apply,
  scalar_attention_grad,
  scalar_attention_init,
  scalar_attention_ntk,
)
from jaxattn.models._lag_softmax import softmax_means
from tests._jaxpr import array_sizes
from tests._recompile import no_recompilation

_KINDS = ("plain", "residual", "position_bias", "rope", "patch", "differential")


def _close(got, want, tol=1e-12):
  np.testing.assert_allclose(got, want, rtol=tol, atol=tol)


def _init(kind="plain", width=6, dim=8, seed=0, **options):
  options = {"patch_size": 2, **options} if kind == "patch" else options
  return scalar_attention_init(
    jax.random.key(seed), width, dim, kind=kind, **options
  )


def _random(kind="plain", width=6, dim=8, seed=0):
  """Parameters without structure."""
  rng = np.random.default_rng(seed)
  params = _init(kind, width + width % 2, dim)
  params = {k: v[:width] for k, v in params.items()}
  return {k: jnp.asarray(rng.normal(size=v.shape)) for k, v in params.items()}


def _inputs(n=20, dim=8, seed=1):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(n, dim)))


def _plain(params, x, kind="plain"):
  """The model as it is written down, with all weights at once."""
  w, a = params["w"], params["a"]
  m, d, last = len(w), x.shape[1], x[:, -1]
  softmax = functools.partial(jax.nn.softmax, axis=-1)
  if kind == "patch":
    tokens = x.reshape(len(x), -1, w.shape[1])
    query = tokens[:, -1, None] * w[None]
    prob = softmax(jnp.einsum("imp,ijp->imj", query, tokens))
    return jnp.einsum("imj,ijp,mp->i", prob, tokens, a) / math.sqrt(m)
  logits = jnp.einsum("i,m,ij->imj", last, w, x)
  if kind == "position_bias":
    logits += params["bias"][None]
  elif kind == "rope":
    logits *= jnp.cos(jnp.arange(d)[::-1])[None, None]
  prob = softmax(logits)
  if kind == "differential":
    second = softmax(jnp.einsum("i,m,ij->imj", last, params["second"], x))
    prob -= params["mix"][None, :, None] * second
  values = x - last[:, None] if kind == "residual" else x
  f = jnp.einsum("imj,ij,m->i", prob, values, a) / math.sqrt(m)
  return f + last if kind == "residual" else f


# --- the model ---


@pytest.mark.parametrize("kind", _KINDS)
def test_model_and_gradients_are_those_of_the_formula(kind):
  """In all parameters and in x."""
  params, x = _random(kind, seed=2), _inputs()
  y = jnp.sin(jnp.arange(len(x)))

  def loss(apply, params, x):
    f = apply(params, x, kind=kind)
    return jnp.square(f - y).sum() / 2, f

  def both(params, x):
    return [
      jax.grad(functools.partial(loss, apply), (0, 1), has_aux=True)(params, x)
      for apply in (scalar_attention_apply, _plain)
    ]

  jax.tree.map(_close, *jax.jit(both)(params, x))


def test_second_derivatives():
  kind = "position_bias"
  params, x = _random(kind, width=2, dim=4), _inputs(3, 4)

  def both(params):
    return [
      jax.jacrev(jax.grad(lambda p, f=f: jnp.sin(f(p, x, kind=kind)).sum()))(
        params
      )
      for f in (scalar_attention_apply, _plain)
    ]

  jax.tree.map(_close, *jax.jit(both)(params))


def test_gradient_and_kernel_in_closed_form():
  """The kernel is the Gram matrix of the Jacobian."""
  params, x = _random(width=7, seed=3), _inputs(12)
  y = _inputs(12, 8, 4)[:, 0]

  @jax.jit
  def wanted(w):
    f = functools.partial(_plain, x=x)
    with_w = lambda w: f({**params, "w": w})  # noqa: E731
    jacobian = jax.jacrev(with_w)(w)
    return jacobian.T @ (with_w(w) - y), jacobian @ jacobian.T

  grad, kernel = wanted(params["w"])
  _close(scalar_attention_grad(params, x, y), grad)
  _close(scalar_attention_ntk(params, x, x), kernel)
  _close(scalar_attention_ntk(params, x[:5], x[5:]), kernel[:5, 5:])


def test_gradient_of_a_layer_of_attention():
  """dL/dW of softmax(X W X^T) X W_V: the source's formula, and autodiff."""
  rng = np.random.default_rng(6)
  x, g, w, w_v = (rng.normal(size=(s, 4)) for s in (6, 6, 4, 4))
  s = np.exp(x @ w @ x.T)
  s /= s.sum(1, keepdims=True)
  out = s @ x @ w_v
  inner = s * (g @ w_v.T @ x.T - (out * g).sum(1, keepdims=True))
  found = attention_layer_gradients(
    *map(jnp.asarray, (x, w, w_v, g)), scale=1.0, is_causal=False
  )
  _close(found[1], x.T @ inner @ x)

  def loss(w):
    return (g * (jax.nn.softmax(x @ w @ x.T, axis=1) @ x @ w_v)).sum()

  _close(found[1], jax.grad(loss)(w))


def test_patches_of_one_lag_are_plain():
  params, x = _random(), _inputs()
  patched = {k: v[:, None] for k, v in params.items()}
  _close(
    scalar_attention_apply(patched, x, kind="patch"),
    scalar_attention_apply(params, x),
  )


# --- symmetries and degenerate cases ---


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("width", [2, 130])
def test_first_output_is_exactly_nothing(kind, width):
  x = _inputs(40)
  f = scalar_attention_apply(_init(kind, width), x, kind=kind)
  want = x[:, -1] if kind == "residual" else jnp.zeros(40)
  np.testing.assert_array_equal(f, want)


@pytest.mark.parametrize("kind", _KINDS)
def test_odd_function(kind):
  params, x = _random(kind), _inputs()
  f = functools.partial(scalar_attention_apply, params, kind=kind)
  np.testing.assert_array_equal(f(-x), -f(x))


def test_order_of_past_lags():
  x = _inputs()
  order = jnp.array([3, 6, 0, 1, 5, 2, 4, 7])
  for kind in _KINDS:
    params = _random(kind)
    f, g = (
      scalar_attention_apply(params, z, kind=kind) for z in (x, x[:, order])
    )
    if kind in ("plain", "residual", "differential"):
      np.testing.assert_allclose(g, f, rtol=0, atol=1e-14)
    else:
      assert abs(g - f).max() > 0.01, kind


def test_bias_of_zeros_is_plain():
  params, x = _random("position_bias"), _inputs()
  params["bias"] *= 0
  plain = {k: params[k] for k in ("w", "a")}
  _close(
    scalar_attention_apply(params, x, kind="position_bias"),
    scalar_attention_apply(plain, x),
  )


def test_equal_lags_have_no_gradient():
  params = _random()
  x = jnp.array([[0.1], [-3.0], [1e6]]) * jnp.ones((3, 8))
  assert not scalar_attention_ntk(params, x, x).any()
  assert not scalar_attention_grad(params, x, x[:, 0] + 1).any()
  want = params["a"].sum() / math.sqrt(6) * x[:, 0]
  _close(scalar_attention_apply(params, x), want)


def test_two_lags_ignore_no_order():
  """One past lag has one order: the floor is 0."""
  params, x = _random(dim=2), _inputs(9, 2)
  _close(scalar_attention_apply(params, x), _plain(params, x))
  task = residual_ssm(jax.random.key(0), 2, kind="paper")
  assert permutation_floor(task) == 0


@pytest.mark.parametrize(
  ("kind", "dtype", "tol"),
  [*((kind, "float32", 2e-4) for kind in _KINDS), ("plain", "bfloat16", 0.02)],
)
def test_large_logits(kind, dtype, tol):
  """x_d w x of some 1e4 overflow any exponential; differences count."""
  params, x = _random(kind), 100 * _inputs()
  params, x = jax.tree.map(lambda v: v.astype(dtype), (params, x))
  f = scalar_attention_apply(params, x, kind=kind)
  assert f.dtype == dtype
  exact = jax.tree.map(lambda v: v.astype("float64"), (params, x))
  want = _plain(*exact, kind)
  np.testing.assert_allclose(
    f.astype("float64"), want, rtol=tol, atol=500 * tol
  )
  grad = jax.grad(
    lambda p: scalar_attention_apply(p, x, kind=kind).astype("float32").sum()
  )(params)
  assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves(grad))


def test_shifted_inputs_lose_no_digits():
  params, x = _random(), _inputs()
  small = params | {"w": params["w"] / 1000}
  shifted = (x + 1000).astype("float32")
  exact = shifted.astype("float64")
  got = scalar_attention_ntk(
    jax.tree.map(lambda v: v.astype("float32"), small), shifted, shifted
  )
  want = scalar_attention_ntk(small, exact, exact)
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_no_array_of_all_weights():
  """Nothing of size (n, m, d) in forward or gradient."""
  params, x = _random(width=64, dim=32), _inputs(128, 32)
  y = x[:, 0]
  total = 128 * 64 * 32

  def loss(params):
    return jnp.square(scalar_attention_apply(params, x) - y).sum()

  assert max(array_sizes(jax.grad(loss), params)) < total / 4
  assert max(array_sizes(scalar_attention_grad, params, x, y)) < total / 4
  dense = jax.grad(lambda p: _plain(p, x).sum())
  assert max(array_sizes(dense, params)) >= total


def test_second_call_compiles_nothing():
  x, y = _inputs(), _inputs()[:, 0]
  both = _random(seed=1), _random(seed=2)

  def call(params):
    scalar_attention_apply(params, x)
    scalar_attention_grad(params, x, y)
    scalar_attention_ntk(params, x, x)

  call(both[0])
  with no_recompilation():
    call(both[1])


# --- theory ---


@pytest.mark.parametrize("dim", [2, 4, 8])
def test_mass_on_the_last_lag(dim):
  """Theorem 5.3: for w < 0 the last lag gets least on average.

  All others share the rest equally. Limits are 1 / d at w = 0 and (2 / d)
  (1 - 2^-d) and (2 / d) 2^-d at infinity.
  """
  w, n = jnp.array([-200.0, -5.0, -1.0, -0.1, 0.0, 200.0]), 50_000
  x = jnp.asarray(np.random.default_rng(0).normal(size=(n, dim)))
  last = jnp.zeros_like(x).at[:, -1].set(1)
  (mass,), _ = jax.jit(softmax_means)(x[:, -1:] * w[None], x, (last,), None)
  mass = np.asarray(mass)
  mean, error = mass.mean(0), mass.std(0) / np.sqrt(n)
  assert (mean[:4] + 4 * error[:4] < 1 / dim).all()
  _close(mean[4], 1 / dim)
  for i, limit in ((0, 2.0**-dim), (5, 1 - 2.0**-dim)):
    # A finite w is less than 1 / |w| from it.
    assert abs(mean[i] - 2 / dim * limit) < 4 * error[i] + 1 / 200
  if dim == 4:
    stated = np.array([0.0327, 0.4699])
    assert (abs(mean[[0, 5]] - stated) < 4 * error[[0, 5]]).all()


def test_first_step_is_along_the_signs():
  """For gamma > 0 every neuron moves towards its sign; for < 0 none does."""
  steps = {}
  for gamma in (0.5, -0.5):
    ssm = residual_ssm(jax.random.key(0), 8, gamma=gamma)
    x, y, _ = sample_residual_ssm(jax.random.key(1), ssm, 128)
    for width in (32, 256, 1024):
      params = _init(width=width)
      step = -scalar_attention_grad(params, x, y)
      steps[gamma, width] = float((params["a"] * step > 0).mean())
  assert steps == {key: float(key[0] > 0) for key in steps}


# --- refused ---


@pytest.mark.parametrize(
  ("width", "dim", "options", "message"),
  [
    (7, 8, {}, "width must be even, for pairs of heads, got 7"),
    (0, 8, {}, "width must be >= 2, got 0"),
    (4, 1, {}, "dim must be >= 2, got 1"),
    (4, 8, {"kind": "magic"}, "kind must be one of 'plain', 'residual'"),
    (4, 8, {"kind": "patch"}, "patch_size must be an integer in [1, 8]"),
    (
      4,
      8,
      {"kind": "patch", "patch_size": 3},
      "patch_size must divide dim=8, got 3",
    ),
    (
      4,
      8,
      {"patch_size": 2},
      "patch_size must be None for kind='plain', got 2",
    ),
  ],
)
def test_refused_beginnings(width, dim, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    scalar_attention_init(jax.random.key(0), width, dim, **options)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda p, x: scalar_attention_apply(p, x, kind="rpe"),
      "kind must be one of 'plain', 'residual', 'position_bias', 'rope'",
    ),
    (
      lambda p, x: scalar_attention_apply(p, x, kind="position_bias"),
      "params of kind='position_bias' must have the entries w, a, bias, got a",
    ),
    (
      lambda p, x: scalar_attention_apply(
        _init("position_bias", 6, 9), x, kind="position_bias"
      ),
      "x must have shape (*, 9) = (n, d), d of the bias, got (20, 8)",
    ),
    (
      lambda p, x: scalar_attention_apply(
        _init("patch", 6, 9, patch_size=3), x, kind="patch"
      ),
      "x must have a multiple of patch_size=3 lags, got 8",
    ),
    (
      lambda p, x: scalar_attention_apply({**p, "a": p["a"][1:]}, x),
      "params['a'] must have shape (6,) = as w, got (5,)",
    ),
    (
      lambda p, x: scalar_attention_apply(p, x[0]),
      "x must have 2 dimensions, got shape (8,)",
    ),
    (
      lambda p, x: scalar_attention_apply(p, jnp.ones((2, 8), int)),
      "x must have a floating dtype, got int",
    ),
    (
      lambda p, x: scalar_attention_grad(p, x, x[:, :1]),
      "y must have shape (20,) = (n,), got (20, 1)",
    ),
    (
      lambda p, x: scalar_attention_ntk(p, x, x[:, 1:]),
      "x2 must have shape (*, 8) = (n2, d), d of x1, got (20, 7)",
    ),
  ],
)
def test_refused_calls(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call(_init(), _inputs())
