"""Closed-form gradients of layers against autodiff of the dense formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import (
  attention_layer_gradients,
  attention_layer_gradients_lowrank,
  multilayer_gradients,
  polynomial_attention,
)
from jaxattn.features import polynomial_coefficients, polynomial_error
from tests import _dense

_B, _T, _D = 2, 20, 4


def _arrays(*heads, b=_B, t=_T, d=_D, dv=_D):
  rngs = jax.random.split(jax.random.key(0), 4)
  shapes = [(b, t, d), (*heads, d, d), (*heads, d, dv), (b, t, *heads, dv)]
  return [
    jax.random.normal(rng, s) for rng, s in zip(rngs, shapes, strict=True)
  ]


def _close(got, want, tolerance):
  """Equal up to ``tolerance`` of the largest entry, and nothing else."""
  atol = tolerance * np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def _layer(x, w, w_v, *, scale, is_causal):
  """The layer itself, with dense matrices."""
  logits = scale * jnp.einsum("btd,de,bse->bts", x, w, x)
  seen = _dense.visible(x.shape[1], x.shape[1], is_causal=is_causal)
  f = jax.nn.softmax(jnp.where(seen[None], logits, -jnp.inf))
  return f @ (x @ w_v)


def _autodiff(x, w, w_v, g, *, scale, is_causal):
  def inner(x, w, w_v):
    if w.ndim == 2:
      return (g * _layer(x, w, w_v, scale=scale, is_causal=is_causal)).sum()
    heads = jax.vmap(
      functools.partial(_layer, scale=scale, is_causal=is_causal),
      in_axes=(None, 0, 0),
      out_axes=2,
    )
    return (g * heads(x, w, w_v)).sum()

  return jax.grad(inner, argnums=(0, 1, 2))(x, w, w_v)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [(), (3,)])
def test_closed_forms_are_the_gradients(heads, is_causal):
  arrays = _arrays(*heads, dv=5)
  call = {"scale": 1 / _D, "is_causal": is_causal}
  want = jax.jit(functools.partial(_autodiff, **call))(*arrays)
  got = attention_layer_gradients(*arrays, **call)
  for g, w in zip(got, want, strict=True):
    assert g.shape == w.shape
    _close(g, w, 1e-14)


def _matrices(f, x, w, w_v, g, scale):
  """The closed forms with f, q and p written down, for one sequence."""
  fq = f * (g @ (x @ w_v).T)
  p = fq - fq.sum(1, keepdims=True) * f
  return (
    scale * (p @ x @ w.T + p.T @ x @ w) + f.T @ g @ w_v.T,
    scale * x.T @ p @ x,
    x.T @ f.T @ g,
  )


def test_the_papers_matrices_give_the_same():
  x, w, w_v, g = _arrays(b=1)
  x, g, scale = x[0], g[0], 0.7
  f = jax.nn.softmax(scale * x @ w @ x.T)
  np.testing.assert_allclose(
    (f * (g @ (x @ w_v).T)).sum(1), (g * (f @ (x @ w_v))).sum(1), rtol=1e-12
  )
  got = attention_layer_gradients(x, w, w_v, g, scale=scale)
  want = _matrices(f, x, w, w_v, g, scale)
  for a, b in zip(got, want, strict=True):
    _close(a, b, 1e-13)


def test_separate_query_and_key_weights():
  x, _, w_v, g = _arrays()
  w_q, w_k = jax.random.normal(jax.random.key(1), (2, _D, 3))
  dw = attention_layer_gradients(x, w_q @ w_k.T, w_v, g).dw

  def loss(w_q, w_k):
    call = {"scale": _D**-0.5, "is_causal": False}
    return (g * _layer(x, w_q @ w_k.T, w_v, **call)).sum()

  dw_q, dw_k = jax.grad(loss, argnums=(0, 1))(w_q, w_k)
  _close(dw @ w_k, dw_q, 1e-12)
  _close(dw.T @ w_q, dw_k, 1e-12)


def _small(t, heads=()):
  """Arrays whose logits stay within 1."""
  x, w, w_v, g = _arrays(*heads, b=1, t=t)
  largest = jnp.abs(jnp.einsum("btd,...de,bse->...bts", x, w, x)).max()
  return x, w / largest * 2, w_v, g  # The default scale is 1 / 2.


@pytest.mark.parametrize("is_causal", [False, True])
def test_low_rank_forms_converge_with_the_degree(is_causal):
  arrays = _small(256)
  exact = attention_layer_gradients(*arrays, is_causal=is_causal)
  for degree in (2, 4, 6):
    eps = polynomial_error(polynomial_coefficients(degree, 1.0), 1.0)
    fast = attention_layer_gradients_lowrank(
      *arrays, degree=degree, radius=1.0, is_causal=is_causal
    )
    for f, e in zip(fast, exact, strict=True):
      error = jnp.linalg.norm((f - e).ravel()) / jnp.linalg.norm(e.ravel())
      assert error < 20 * eps


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("degree", [0, 4])
def test_low_rank_forms_are_those_of_the_polynomials_matrix(degree, is_causal):
  """Of every entry: inside a chunk of causal attention, too."""
  x, w, w_v, g = _small(64)
  x, g = x[0], g[0]
  coefficients = jnp.asarray(polynomial_coefficients(degree, 1.0)[::-1])
  f = jnp.polyval(coefficients, 0.5 * x @ w @ x.T)
  f = jnp.tril(f) if is_causal else f
  f = f / f.sum(1, keepdims=True)
  got = attention_layer_gradients_lowrank(
    x, w, w_v, g, degree=degree, radius=1.0, is_causal=is_causal
  )
  for a, b in zip(got, _matrices(f, x, w, w_v, g, 0.5), strict=True):
    _close(a, b, 1e-12)


def test_options_may_be_arrays_and_the_scale_traced():
  arrays = _small(64)
  lowrank = functools.partial(attention_layer_gradients_lowrank, *arrays)
  numbers = functools.partial(
    lowrank, degree=2, coefficients="gaussian", radius=1.0, sigma=0.25
  )
  want = numbers(scale=0.5)
  got = numbers(
    degree=np.int64(2),
    radius=jnp.float32(1),
    sigma=jnp.float64(0.25),
    scale=0.5,
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
  exact = functools.partial(attention_layer_gradients, *arrays)
  for fn, expected in ((numbers, want), (exact, exact())):
    got = jax.jit(lambda scale, fn=fn: fn(scale=scale))(0.5)
    for a, b in zip(got, expected, strict=True):
      _close(a, b, 1e-13)
  with pytest.raises(ValueError, match="radius must be positive and finite"):
    lowrank(degree=4, radius=jnp.float32(-1))
  with pytest.raises(ValueError, match="degree must be an integer >= 0"):
    lowrank(degree=jnp.float32(4), radius=1.0)


def test_low_rank_forms_with_heads_and_other_coefficients():
  arrays = _small(64, (3,))
  exact = attention_layer_gradients(*arrays)
  fast = attention_layer_gradients_lowrank(
    *arrays, degree=4, radius=1.0, coefficients="gaussian", sigma=0.3
  )
  for f, e in zip(fast, exact, strict=True):
    assert f.shape == e.shape
    _close(f, e, 2e-3)


def test_dtype_is_kept_and_nothing_is_compiled_twice():
  arrays = [a.astype(jnp.float32) for a in _arrays()]
  for fn in (
    attention_layer_gradients,
    functools.partial(attention_layer_gradients_lowrank, degree=2, radius=8.0),
  ):
    jitted = jax.jit(fn)
    assert {d.dtype for d in jitted(*arrays)} == {jnp.dtype(jnp.float32)}
    jitted(*(a + 1 for a in arrays))
    assert jitted._cache_size() == 1


# --- many layers ---


def _layers(attend):
  """A residual attention layer and a token-wise one, both with parameters."""

  def attention(params, x):
    query, key, value = (x @ params[n] for n in ("q", "k", "v"))
    out = attend(*(y[:, :, None] for y in (query, key, value)))
    return x + out[:, :, 0] @ params["o"]

  def mlp(params, x):
    return x + jax.nn.gelu(x @ params["in"]) @ params["out"]

  rngs = jax.random.split(jax.random.key(2), 12)
  init = [jax.random.normal(rng, (_D, _D)) / 4 for rng in rngs]
  params = [
    dict(zip("qkvo", init[:4], strict=True)),
    {"in": init[4], "out": init[5]},
    dict(zip("qkvo", init[6:10], strict=True)),
    {"in": init[10], "out": init[11]},
  ]
  return params, [attention, mlp, attention, mlp]


_LOSSES = {
  "squares": lambda x: (x**2).sum() / 2,
  "cross_entropy": lambda x: -jax.nn.log_softmax(x)[:, :, 1].mean(),
  "log_mean_exp": lambda x: jax.nn.logsumexp(x) - np.log(x.size),
}


def _dense_polynomial(query, key, value, *, coefficients):
  logits = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(_D)
  weights = jnp.polyval(jnp.asarray(coefficients[::-1]), logits)
  weights = weights / weights.sum(-1, keepdims=True)
  return jnp.einsum("bnts,bsnh->btnh", weights, value)


@pytest.mark.parametrize("name", list(_LOSSES))
def test_any_loss_through_many_layers(name):
  """Low-rank layers against autodiff through dense matrices."""
  x = _arrays()[0]
  loss = _LOSSES[name]
  attend = functools.partial(
    polynomial_attention, degree=4, radius=2.0, center_keys=False
  )
  params, layers = _layers(attend)
  coefficients = polynomial_coefficients(4, 2.0)
  dense = functools.partial(_dense_polynomial, coefficients=coefficients)

  def whole(params, x):
    for p, layer in zip(params, _layers(dense)[1], strict=True):
      x = layer(p, x)
    return loss(x)

  grads, dx = jax.jit(
    lambda params, x: multilayer_gradients(params, x, loss, layers)
  )(params, x)
  want, want_dx = jax.jit(jax.grad(whole, argnums=(0, 1)))(params, x)
  _close(dx, want_dx, 1e-10)
  for got, expected in zip(
    jax.tree.leaves(grads), jax.tree.leaves(want), strict=True
  ):
    _close(got, expected, 1e-10)


# --- refused input ---


@pytest.mark.parametrize(
  ("name", "array", "message"),
  [
    ("x", np.ones(4), "x must have 2 or 3 dimensions"),
    ("x", np.ones((2, 20, 4), int), "x must have a floating dtype"),
    ("g", np.ones(3, np.float32), "one dtype, got g of float32 and x of float"),
    ("w", np.ones((4, 5)), r"w must have shape \(4, 4\), got \(4, 5\)"),
    ("w", np.ones((3, 4, 4)), r"w_v must have shape \(3, 4, \*\), got \(4, 4"),
    ("w_v", np.ones((5, 4)), r"w_v must have shape \(4, \*\), got \(5, 4\)"),
    (
      "g",
      np.ones((2, 20, 5)),
      r"g must have shape \(2, 20, 4\), got \(2, 20",
    ),
    ("g", np.ones((20, 4)), r"g must have shape \(2, 20, 4\), got \(20, 4\)"),
    ("scale", "1", "scale must be a real scalar, got '1'"),
    ("is_causal", 1, "is_causal must be one of False, True, got 1"),
  ],
)
def test_bad_input_is_refused_by_message(name, array, message):
  call = dict(zip(("x", "w", "w_v", "g"), _arrays(), strict=True))
  call[name] = array
  lowrank = functools.partial(
    attention_layer_gradients_lowrank, degree=2, radius=1.0
  )
  for fn in (attention_layer_gradients, lowrank):
    with pytest.raises(ValueError, match=message):
      fn(**call)


def test_bad_layers_are_refused():
  x = jnp.ones(3)
  layer = jnp.multiply
  with pytest.raises(ValueError, match="at least one layer, got none"):
    multilayer_gradients((), x, jnp.sum, ())
  with pytest.raises(ValueError, match="one entry for each of 2 layers, got 1"):
    multilayer_gradients((2.0,), x, jnp.sum, (layer, layer))
  with pytest.raises(ValueError, match=r"return a scalar, got shape \(3,\)"):
    multilayer_gradients((2.0,), x, jnp.exp, (layer,))
