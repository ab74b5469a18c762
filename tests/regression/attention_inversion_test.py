"""Inversion of attention: derivatives, what can be known, what is found."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import newton
from jaxattn.attention import softmax_attention
from jaxattn.regression import attention_inversion

_MODELS = ("weights", "output", "both")
_CONFIG = newton.NewtonConfig(max_steps=150, rtol=0.0, atol=1e-13)


def _instance(n, d, seed=0, scale=1.0, heads=None):
  rng = np.random.default_rng(seed)
  tokens = scale * rng.normal(size=(n, d))
  stack = () if heads is None else (heads,)
  w = rng.normal(size=(*stack, d, d)) / 2
  return tokens, w, rng.normal(size=(*stack, d, d))


def _prepare(model, w, v, weights, output, **options):
  """Data of one of the three models of observation."""
  if model == "weights":
    return attention_inversion.prepare(w, weights=weights, **options)
  if model == "output":
    return attention_inversion.prepare(w, v, output=output, **options)
  return attention_inversion.prepare(
    w, v, weights=weights, output=output, **options
  )


def _planted(model, tokens, w, v, *, is_causal=False):
  seen = attention_inversion.predict(tokens, w, v, is_causal=is_causal)
  return _prepare(model, w, v, *seen, is_causal=is_causal)


def _random(model, heads, is_causal, ridge, seed=0):
  """Data that the tokens do not fit, so that no term of a derivative is 0."""
  tokens, w, v = _instance(5, 3, seed, heads=heads)
  other = np.random.default_rng(seed + 100).normal(size=(5, 3))
  seen = attention_inversion.predict(other, w, v[..., :2], is_causal=is_causal)
  data = _prepare(model, w, v[..., :2], *seen, is_causal=is_causal, ridge=ridge)
  return jnp.asarray(tokens).reshape(-1), data


def _plain_loss(x, data):
  """The loss as it is written down, head by head."""
  tokens = x.reshape(-1, data.w.shape[-1])
  total = data.ridge * (tokens**2).sum()
  for h, w in enumerate(data.w):
    logits = tokens @ w @ tokens.T
    if data.bias is not None:
      logits = jnp.where(jnp.isneginf(data.bias), -1e300, logits)
    probs = jnp.exp(logits - logits.max(1, keepdims=True))
    probs = probs / probs.sum(1, keepdims=True)
    if data.weights is not None:
      total += ((probs - data.weights[h]) ** 2).sum()
    if data.output is not None:
      total += ((probs @ tokens @ data.v[h] - data.output[h]) ** 2).sum()
  return total / 2


def _errors(found, tokens):
  gaps = np.asarray(found.all_tokens) - tokens
  return np.linalg.norm(gaps, axis=(1, 2)) / np.linalg.norm(tokens)


# --- derivatives ---


@pytest.mark.parametrize("model", _MODELS)
@pytest.mark.parametrize(
  ("heads", "is_causal", "ridge"),
  [(None, False, 0.0), (2, True, 0.3)],
)
def test_derivatives_are_those_of_the_loss(model, heads, is_causal, ridge):
  x, data = _random(model, heads, is_causal, ridge)
  direction = jnp.asarray(np.random.default_rng(9).normal(size=x.shape))

  @jax.jit
  def both(x, data):
    h = attention_inversion.curvature(x, data)
    ours = (
      attention_inversion.loss(x, data),
      *attention_inversion.value_and_grad(x, data),
      attention_inversion.hvp(x, direction, data),
      h.matrix,
    )
    value, grad = jax.value_and_grad(_plain_loss)(x, data)
    hessian = jax.hessian(_plain_loss)(x, data)
    return ours, (value, value, grad, hessian @ direction, hessian)

  for got, want in zip(*both(x, data), strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("model", _MODELS)
def test_gauss_newton_is_the_gram_of_the_jacobian(model):
  x, data = _random(model, 2, True, 0.3)

  @jax.jit
  def both(x, data):
    def seen(x):
      got = attention_inversion.predict(
        x.reshape(5, 3), data.w, data.v, is_causal=True
      )
      pairs = zip(got, (data.weights, data.output), strict=True)
      return [y for y, z in pairs if z is not None]

    parts = [j.reshape(-1, len(x)) for j in jax.jacobian(seen)(x)]
    gram = sum(j.T @ j for j in parts) + 0.3 * jnp.eye(len(x))
    h = attention_inversion.gauss_newton(x, data)
    return newton.curvature_dense(h, dim=len(x)), gram

  np.testing.assert_allclose(*both(x, data), rtol=0, atol=1e-12)


# --- the layer ---


@pytest.mark.parametrize("is_causal", [False, True])
def test_layer_is_dot_product_attention(is_causal):
  tokens, w, v = _instance(7, 4, heads=3)
  weights, output = attention_inversion.predict(
    tokens, w, v, is_causal=is_causal
  )
  query, value = (np.einsum("nd,hde->nhe", tokens, x)[None] for x in (w, v))
  key = np.broadcast_to(tokens[None, :, None], query.shape)
  # JAX's own takes its softmax in single precision.
  for attend, tol in (
    (jax.nn.dot_product_attention, 1e-6),
    (softmax_attention, 1e-13),
  ):
    want = attend(query, key, value, scale=1.0, is_causal=is_causal)
    want = want[0].swapaxes(0, 1)
    np.testing.assert_allclose(output, want, rtol=0, atol=tol)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-14)
  # One head alone comes back without its axis.
  one = attention_inversion.predict(tokens, w[1], v[1], is_causal=is_causal)
  np.testing.assert_allclose(one[0], weights[1], atol=1e-15)
  np.testing.assert_allclose(one[1], output[1], atol=1e-14)


def test_sign():
  tokens, w, v = _instance(6, 4)
  (weights, output), (same, opposite) = (
    attention_inversion.predict(s * tokens, w, v) for s in (1, -1)
  )
  np.testing.assert_array_equal(weights, same)
  np.testing.assert_array_equal(output, -opposite)


@pytest.mark.parametrize("symmetric", [False, True])
def test_stabilizer_leaves_the_weights(symmetric):
  tokens, w, v = _instance(6, 4)
  if symmetric:
    w = np.eye(4)
    change = np.linalg.qr(v)[0]
  else:
    # Two solutions of one congruence differ by an element of the stabilizer.
    change = np.linalg.solve(
      v, attention_inversion.congruence_solve(v @ w @ v.T, w)
    )
    assert abs(abs(change) - np.eye(4)).max() > 0.1
  np.testing.assert_allclose(change @ w @ change.T, w, atol=1e-10)
  before = attention_inversion.predict(tokens, w, v)
  after = attention_inversion.predict(tokens @ change, w, v)
  np.testing.assert_allclose(after[0], before[0], atol=1e-10)
  assert abs(after[1] - before[1]).max() > 0.1


# --- what can be known ---


@pytest.mark.parametrize("d", [2, 3, 4, 5, 6])
def test_nullity_of_one_head(d):
  tokens, w, v = _instance(3 * d, d, scale=0.7)

  def nullity(model, w):
    data = _planted(model, tokens, w, v)
    rank, nullity, _ = attention_inversion.identifiability_report(tokens, data)
    assert rank + nullity == 3 * d * d
    return int(nullity)

  symmetric = (w + w.T) / 2
  assert nullity("weights", w) == d // 2
  assert nullity("weights", symmetric) == d * (d - 1) // 2
  if d == 4:
    for model in ("output", "both"):
      assert nullity(model, w) == nullity(model, symmetric) == 0


@pytest.mark.parametrize("d", [3, 4, 6])
def test_two_heads_leak_what_one_does_not(d):
  tokens, w, _ = _instance(3 * d, d, scale=0.7, heads=2)
  data = _planted("weights", tokens, w, None)
  _, nullity, condition = attention_inversion.identifiability_report(
    tokens, data
  )
  assert nullity == 0
  assert condition <= 40
  # A causal mask hides no more than there was.
  data = _planted("weights", tokens, w[0], None, is_causal=True)
  report = attention_inversion.identifiability_report(tokens, data)
  assert report[1] == d // 2


def test_report_against_the_jacobian():
  tokens, w, v = _instance(4, 3)
  data = _planted("both", tokens, w, v[:, :1])

  def seen(tokens):
    got = attention_inversion.predict(tokens, w, v[:, :1])
    return jnp.concatenate([x.ravel() for x in got])

  jacobian = jax.jacobian(seen)(tokens).reshape(20, 12)
  rank, nullity, condition = attention_inversion.identifiability_report(
    tokens, data
  )
  assert (rank, nullity) == (np.linalg.matrix_rank(jacobian), 0)
  np.testing.assert_allclose(condition, np.linalg.cond(jacobian), rtol=1e-9)


def test_fewer_numbers_than_unknowns():
  tokens, w, v = _instance(6, 4)
  data = _planted("output", tokens, w, v[:, :1])
  rank, nullity, condition = attention_inversion.identifiability_report(
    tokens, data
  )
  assert (rank, nullity, condition) == (6, 18, np.inf)


def test_one_token_has_no_weights():
  tokens, w, v = _instance(1, 3)
  data = _planted("weights", tokens, w, v)
  np.testing.assert_array_equal(data.weights, 1)
  report = attention_inversion.identifiability_report(tokens, data)
  assert report == (0, 3, np.inf)


def test_sharp_attention_hides():
  report = jax.jit(attention_inversion.identifiability_report)
  for model, least in (("both", (50, 1e3, 5e4)), ("output", (1e3, 1e5, 1e9))):
    found = []
    for seed in range(8):
      tokens, w, v = _instance(12, 4, seed)
      data = [_planted(model, tokens, s * w, v) for s in (1, 4, 8)]
      found.append([report(tokens, x) for x in data])
    _, nullities, conditions = np.moveaxis(np.array(found), 2, 0)
    assert (conditions[:, 1:] > 5 * conditions[:, :-1]).all(), model
    assert (np.median(conditions, 0) >= least).all(), model
    # Beyond recovery from outputs alone.
    assert nullities[0].tolist() == (
      [0, 0, 0] if model == "both" else [0, 0, 1]
    )


# --- what is found ---


def test_weights_and_outputs_give_the_tokens():
  least = {0: 10, 1: 16}
  for seed, radius in itertools.product((0, 1), (0.1, 0.3, None)):
    tokens, w, v = _instance(8, 4, seed)
    found = attention_inversion.invert_attention(
      jax.random.PRNGKey(seed),
      _planted("both", tokens, w, v),
      8,
      init_scale=radius or 1.0,
      x0=None if radius is None else tokens,
      config=_CONFIG,
    )
    errors = _errors(found, tokens)
    if radius is None:
      assert (errors < 1e-3).sum() >= least[seed]
    else:
      assert errors.max() < 1e-3
      assert np.median(errors) < 1e-14
      assert found.num_steps.max() <= 20
    best = np.argmin(found.all_losses)
    assert found.loss == found.all_losses[best]
    np.testing.assert_array_equal(found.tokens, found.all_tokens[best])


def test_ridges_reach_what_newton_does_not():
  tokens, w, v = _instance(8, 8)
  invert = functools.partial(
    attention_inversion.invert_attention,
    jax.random.PRNGKey(0),
    _planted("both", tokens, w, v),
    8,
    num_starts=8,
  )
  shares = []
  for ridges in ((), (0.1, 0.01)):
    found = invert(ridges=ridges)
    shares.append((_errors(found, tokens) < 1e-3).mean())
    assert found.num_steps.max() <= 150
  assert shares[0] < 0.5 <= shares[1]
  # All but the last phase leave the ridge of the data alone.
  np.testing.assert_array_less(found.loss, 1e-20)


def test_outputs_alone_have_wrong_zeros():
  invert = functools.partial(
    attention_inversion.invert_attention, length=8, config=_CONFIG
  )
  counts = {}
  for seed, radius in itertools.product((0, 1), (0.1, None)):
    tokens, w, v = _instance(8, 4, seed)
    found = invert(
      jax.random.PRNGKey(seed),
      _planted("output", tokens, w, v),
      init_scale=radius or 1.0,
      x0=None if radius is None else tokens,
    )
    right = _errors(found, tokens) < 1e-3
    counts[seed, radius] = right.sum()
    zero = np.asarray(found.all_losses) < 1e-20
    if seed == 1:
      assert zero.sum() > right.sum()
  assert counts[0, 0.1] == 16
  assert counts[1, None] >= 7


def test_weights_alone_give_the_tokens_up_to_the_stabilizer():
  tokens, w, _ = _instance(8, 4)
  found = attention_inversion.invert_attention(
    jax.random.PRNGKey(0),
    _planted("weights", tokens, w, None),
    8,
    init_scale=0.3,
    x0=tokens,
    config=_CONFIG,
  )
  assert found.all_losses.max() < 1e-20
  assert _errors(found, tokens).min() > 1e-3
  for other in np.asarray(found.all_tokens):
    change = np.linalg.lstsq(tokens, other, rcond=None)[0]
    np.testing.assert_allclose(tokens @ change, other, atol=1e-8)
    np.testing.assert_allclose(change @ w @ change.T, w, atol=1e-8)


def test_weights_of_two_heads_give_the_tokens_up_to_their_sign():
  tokens, w, _ = _instance(8, 4, heads=2)
  found = attention_inversion.invert_attention(
    jax.random.PRNGKey(0),
    _planted("weights", tokens, w, None),
    8,
    init_scale=0.3,
    x0=-tokens,
    config=_CONFIG,
  )
  assert _errors(found, -tokens).max() < 1e-10


def test_order_of_convergence():
  tokens, w, v = _instance(8, 4)
  data = _planted("both", tokens, w, v)
  truth = jnp.asarray(tokens).reshape(-1)

  @jax.jit
  @jax.vmap
  def errors(start):
    def body(state, _):
      error = jnp.linalg.norm(state.x - truth) / jnp.linalg.norm(truth)
      return newton.step(attention_inversion.problem(), state, data)[0], error

    state = newton.init(attention_inversion.problem(), start, data)
    return jax.lax.scan(body, state, length=14)[1]

  noise = np.random.default_rng(0).normal(size=(5, 32))
  orders = []
  for row in np.asarray(errors(truth[None] + 0.1 * noise)):
    inside = row[(row < 3e-2) & (row > 1e-14)]
    e1, e2, e3 = np.log(inside[-3:])
    orders.append((e3 - e2) / (e2 - e1))
  assert 1.6 < np.median(orders) < 2.6


def test_large_ridge_gives_zero():
  tokens, w, v = _instance(8, 4)
  seen = attention_inversion.predict(tokens, w, v)
  sizes = []
  for ridge in (1e2, 1e4, 1e6):
    found = attention_inversion.invert_attention(
      jax.random.key(0),
      _prepare("both", w, v, *seen, ridge=ridge),
      8,
      config=_CONFIG,
    )
    sizes.append(abs(found.all_tokens).max())
  assert sizes[0] < 1
  np.testing.assert_allclose(sizes[1:], [sizes[0] / 1e2, sizes[0] / 1e4], 0.1)


def test_many_unknowns_take_products(monkeypatch):
  x, data = _random("both", 2, True, 0.3)
  dense = attention_inversion.curvature(x, data).matrix
  monkeypatch.setattr(attention_inversion, "_DENSE_UNKNOWNS", len(x) - 1)
  operator = attention_inversion.curvature(x, data)
  assert isinstance(operator, newton.OperatorCurvature)
  got = jax.jit(newton.curvature_dense, static_argnames="dim")(
    operator, dim=len(x)
  )
  np.testing.assert_allclose(got, dense, rtol=0, atol=1e-12)


def test_conjugate_gradients():
  tokens, w, v = _instance(4, 2)
  found = attention_inversion.invert_attention(
    jax.random.key(0),
    _planted("both", tokens, w, v),
    4,
    num_starts=2,
    init_scale=0.05,
    x0=tokens,
    config=newton.NewtonConfig(linear_solver="cg", curvature="gauss_newton"),
  )
  assert _errors(found, tokens).max() < 1e-8


def test_single_precision_stays():
  tokens, w, v = (jnp.asarray(x, jnp.float32) for x in _instance(4, 2))
  data = _planted("both", tokens, w, v)
  found = attention_inversion.invert_attention(
    jax.random.key(0), data, 4, num_starts=2, init_scale=0.1, x0=tokens
  )
  assert {x.dtype for x in found[:4]} == {jnp.dtype(jnp.float32)}
  assert _errors(found, np.asarray(tokens)).max() < 1e-3


def test_does_not_compile_again():
  sizes = []
  for seed in range(3):
    tokens, w, v = _instance(8, 4, seed)
    attention_inversion.invert_attention(
      jax.random.key(seed), _planted("both", tokens, w, v), 8, config=_CONFIG
    )
    sizes.append(attention_inversion._solve._cache_size())
  assert sizes[0] == sizes[1] == sizes[2]
  assert attention_inversion.problem() is attention_inversion.problem()


# --- refused ---

_EYE = np.eye(3)
_HALF = np.full((2, 2), 0.5)


def _data():
  return attention_inversion.prepare(_EYE, weights=_HALF)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: attention_inversion.prepare(_EYE),
      "at least one of weights, output must be given",
    ),
    (
      lambda: attention_inversion.prepare(_EYE, weights=np.ones((8, 7)) / 7),
      "weights must be square (n, n), got (8, 7)",
    ),
    (
      lambda: attention_inversion.prepare(_EYE, output=np.ones((2, 3))),
      "output requires v",
    ),
    (
      lambda: attention_inversion.prepare(_EYE, _EYE, weights=_HALF),
      "v is of no use without output",
    ),
    (
      lambda: attention_inversion.prepare(
        _EYE, weights=np.diag([1.0, 1, 1, 0.7])
      ),
      "weights rows must sum to 1, row 3 sums to 0.7",
    ),
    (
      lambda: attention_inversion.prepare(
        np.stack([_EYE, _EYE]), weights=np.stack([_HALF, 2 * _HALF])
      ),
      "weights rows must sum to 1, row 0 of head 1 sums to 2",
    ),
    (
      lambda: attention_inversion.prepare(
        _EYE, weights=np.array([[1.5, -0.5], [0.5, 0.5]])
      ),
      "weights must be non-negative, got -0.5",
    ),
    (
      lambda: attention_inversion.prepare(_EYE, weights=_HALF, is_causal=True),
      "weights must be 0 on later keys with is_causal, row 0 has 0.5 there",
    ),
    (
      lambda: attention_inversion.invert_attention(
        jax.random.key(0), _data(), 2, ridges=(0.1, 0.0)
      ),
      "ridges must be positive, got 0.0",
    ),
    (
      lambda: attention_inversion.invert_attention(
        jax.random.key(0),
        _data(),
        2,
        ridges=(0.1,),
        config=newton.NewtonConfig(max_steps=1),
      ),
      "max_steps must exceed the 1 ridges, got 1",
    ),
    (
      lambda: attention_inversion.prepare(_EYE, weights=np.nan * _HALF),
      "weights contains non-finite values",
    ),
    (
      lambda: attention_inversion.prepare(np.nan * _EYE, weights=_HALF),
      "w contains non-finite values",
    ),
    (
      lambda: attention_inversion.prepare(
        _EYE, _EYE, output=np.full((2, 3), np.inf)
      ),
      "output contains non-finite values",
    ),
    (
      lambda: attention_inversion.prepare(np.ones((2, 3)), weights=_HALF),
      "w must have shape (1, 3, 3) = (N, d, d), got (1, 2, 3)",
    ),
    (
      lambda: attention_inversion.prepare(
        np.stack([_EYE, _EYE]), weights=_HALF
      ),
      "weights must have shape (2, 2, 2) = (N, n, n), got (1, 2, 2)",
    ),
    (
      lambda: attention_inversion.prepare(
        _EYE, _EYE, weights=_HALF, output=np.ones((3, 3))
      ),
      "output must have shape (1, 2, 3) = (N, n, Hv), got (1, 3, 3)",
    ),
    (
      lambda: attention_inversion.prepare(_EYE, weights=_HALF, ridge=-1.0),
      "ridge must be non-negative, got -1.0",
    ),
    (
      lambda: attention_inversion.prepare(_EYE, weights=_HALF, is_causal=1),
      "is_causal must be one of False, True, got 1",
    ),
    (
      lambda: attention_inversion.prepare(np.eye(3, dtype=int), weights=_HALF),
      "w must have a floating dtype, got int64",
    ),
    (
      lambda: attention_inversion.predict(np.ones((2, 3)), np.eye(2)),
      "w must have shape (1, 3, 3) = (N, d, d), got (1, 2, 2)",
    ),
    (
      lambda: attention_inversion.predict(
        np.ones((2, 3)), _EYE, np.stack([_EYE, _EYE])
      ),
      "v must have 2 dimensions, got shape (2, 3, 3)",
    ),
    (
      lambda: attention_inversion.loss(jnp.zeros(5), _data()),
      "x must have shape (6,) = (n d,), got (5,)",
    ),
    (
      lambda: attention_inversion.hvp(jnp.zeros(6), jnp.zeros(5), _data()),
      "v must have shape (6,) = that of x, got (5,)",
    ),
    (
      lambda: attention_inversion.invert_attention(
        jax.random.key(0), _data(), 3
      ),
      "length must be 2, the number of tokens observed, got 3",
    ),
    (
      lambda: attention_inversion.invert_attention(
        jax.random.key(0), _data(), 2, num_starts=0
      ),
      "num_starts must be >= 1, got 0",
    ),
    (
      lambda: attention_inversion.invert_attention(
        jax.random.key(0), _data(), 2, init_scale=0.0
      ),
      "init_scale must be positive, got 0.0",
    ),
    (
      lambda: attention_inversion.invert_attention(
        jax.random.key(0), _data(), 2, x0=jnp.zeros(6)
      ),
      "x0 must have shape (2, 3) = (n, d), got (6,)",
    ),
    (
      lambda: attention_inversion.identifiability_report(
        jnp.zeros((3, 3)), _data()
      ),
      "tokens must have shape (2, 3) = (n, d), got (3, 3)",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
