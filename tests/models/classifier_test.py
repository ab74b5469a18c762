"""Classifiers and regressors whose attention is swapped."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.models import AttentionClassifier, PooledRegressor, attention_fn


def _inputs(*shape, dtype="float32", seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def _shapes(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


# --- AttentionClassifier ---


@pytest.mark.any_x64
@pytest.mark.parametrize("pooling", ["mean", "cls", "threshold"])
def test_swapping_attention_keeps_the_parameters(pooling):
  x = _inputs(3, 20, 5)
  kinds = (
    "softmax",
    "dot_product",
    attention_fn("softmax"),
    jax.nn.dot_product_attention,
    ("softmax", jax.nn.dot_product_attention),
  )
  models = [
    AttentionClassifier(kind, num_classes=4, pooling=pooling) for kind in kinds
  ]
  params = models[0].init(jax.random.key(0), x)
  for model in models:
    again = model.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    # All of these are exact, so the outputs are equal too; a threshold sums
    # over the tokens, and its outputs are as large as that.
    want = models[0].apply(params, x)
    np.testing.assert_allclose(
      model.apply(params, x), want, rtol=0, atol=1e-6 * np.abs(want).max()
    )


def test_approximate_attention_has_the_same_parameters():
  x = _inputs(2, 8, 3)
  want = AttentionClassifier(num_classes=4).init(jax.random.key(0), x)
  polynomial = attention_fn("polynomial", degree=2, radius=1.0)
  for attention in ("linear", polynomial):
    model = AttentionClassifier(attention, num_classes=4)
    got = model.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_layers_by_hand():
  x = _inputs(2, 7, 3, dtype="float64")
  model = AttentionClassifier(num_classes=4, num_heads=2, head_dim=3, mlp=5)
  params = model.init(jax.random.key(0), x)["params"]
  params = jax.tree.map(
    lambda p: p + 0.1 * _inputs(*p.shape, dtype="float64", seed=p.size), params
  )

  def dense(p, x):
    return x @ p["kernel"] + p["bias"]

  def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return (
      x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]
      + p["bias"]
    )

  def heads(p, x):
    return np.einsum("btd,dnh->btnh", x, p["kernel"]) + p["bias"]

  p = jax.tree.map(np.asarray, params)
  with jax.numpy_rank_promotion("allow"):
    y = dense(p["embed"], x) + p["positions"]
    for name in ("layer_0", "layer_1"):
      q = p[name]
      z = norm(q["attention_norm"], y)
      query, key, value = (heads(q[k], z) for k in ("query", "key", "value"))
      scores = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(3)
      weights = np.exp(scores)
      weights /= weights.sum(-1, keepdims=True)
      z = np.einsum("bnts,bsnh->btnh", weights, value)
      z = np.einsum("btnh,nhd->btd", z, q["out"]["kernel"])
      y = y + z + q["out"]["bias"]
      z = dense(q["mlp_in"], norm(q["mlp_norm"], y))
      z = np.asarray(nn.gelu(z))
      y = y + dense(q["mlp_out"], z)
    want = dense(p["head"], norm(p["norm"], y).mean(1))
  got = model.apply({"params": params}, x)
  assert got.dtype == jnp.float64
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.any_x64
def test_threshold_pooling_starts_at_zero_and_has_a_gradient():
  x = _inputs(2, 7, 3)
  model = AttentionClassifier(pooling="threshold", num_layers=1, mlp=0)
  params = model.init(jax.random.key(0), x)
  assert not params["params"]["tau"].any()
  assert "mlp_in" not in params["params"]["layer_0"]

  def total(params):
    return (model.apply(params, x) ** 2).sum()

  tau = jax.jit(jax.grad(total))(params)["params"]["tau"]
  assert tau.shape == (1, 1, 32)
  assert tau.any()


@pytest.mark.any_x64
def test_without_pooling_each_token_is_classified_by_what_it_sees():
  x = _inputs(2, 7, 3)
  causal = functools.partial(jax.nn.dot_product_attention, is_causal=True)
  model = AttentionClassifier(causal, num_classes=4, pooling="none")
  params = model.init(jax.random.key(0), x)
  apply = jax.jit(model.apply)
  before = apply(params, x)
  changed = x.copy()
  changed[:, 5] += 1
  after = apply(params, changed)
  assert before.shape == (2, 7, 4)
  np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-6)
  assert (jnp.abs(before - after)[:, 5:].max(-1) > 1e-3).all()


@pytest.mark.any_x64
def test_each_layer_calls_its_own_attention():
  calls = []

  def spy(name, query, key, value):
    calls.append((name, query.shape))
    return value

  first, second = (functools.partial(spy, name) for name in "ab")
  model = AttentionClassifier((first, second), num_heads=3, head_dim=4)
  model.init(jax.random.key(0), _inputs(2, 7, 3))
  assert calls == [("a", (2, 7, 3, 4)), ("b", (2, 7, 3, 4))]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"attention": "none"},
      "attention must be one of 'softmax', 'dot_product'",
    ),
    ({"attention": 3}, "attention must be a name or a function, got 3"),
    (
      {"attention": ("softmax",)},
      "attention must be one or num_layers=2 of th",
    ),
    ({"pooling": "max"}, "pooling must be one of 'threshold', 'cls', 'mean', "),
    ({"num_heads": 0}, "num_heads must be >= 1, got 0"),
    ({"head_dim": 0}, "head_dim must be >= 1, got 0"),
    ({"num_layers": 0}, "num_layers must be >= 1, got 0"),
    ({"num_classes": 0}, "num_classes must be >= 1, got 0"),
    ({"mlp": -1}, "mlp must be >= 0, got -1"),
  ],
)
def test_refused_classifier(fields, message):
  with pytest.raises(ValueError, match=message):
    AttentionClassifier(**fields).init(jax.random.key(0), _inputs(2, 7, 3))


@pytest.mark.parametrize("model", [AttentionClassifier(), PooledRegressor()])
def test_refused_inputs(model):
  with pytest.raises(ValueError, match="x must have 3 dimensions"):
    model.init(jax.random.key(0), _inputs(7, 3))
  with pytest.raises(ValueError, match="x must have a floating dtype"):
    model.init(jax.random.key(0), np.ones((2, 7, 3), int))


# --- PooledRegressor ---


def test_regressor_formulas():
  x = _inputs(3, 6, 4, dtype="float64")
  params = PooledRegressor().init(jax.random.key(0), x)
  params["params"]["beta"] = jnp.asarray(0.3)
  params["params"]["gain"] = jnp.asarray(1.7)
  p = jax.tree.map(np.asarray, params["params"])
  key = x @ p["key"]
  score = (key @ p["query"])[..., 0] + 0.3
  value = (x @ p["value"])[..., 0]

  def elu(z):
    return np.where(z > 0, z + 1, np.exp(z))

  kernel = (elu(key) @ elu(p["query"]))[..., 0]
  softmax = np.exp(score)
  for kind, weights in (
    ("softmax", softmax / softmax.sum(-1, keepdims=True)),
    ("linear", score / 6),
    ("elu", kernel / kernel.sum(-1, keepdims=True)),
  ):
    model = PooledRegressor(kind)
    want = 1.7 * (weights * value).sum(-1)
    np.testing.assert_allclose(model.apply(params, x), want, atol=1e-12)
    assert _shapes(model.init(jax.random.key(1), x)) == _shapes(
      PooledRegressor().init(jax.random.key(1), x)
    )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"attention": "relu"}, "attention must be one of 'softmax', 'linear', 'e"),
    ({"num_features": 0}, "num_features must be >= 1, got 0"),
  ],
)
def test_refused_regressor(fields, message):
  with pytest.raises(ValueError, match=message):
    PooledRegressor(**fields).init(jax.random.key(0), _inputs(2, 7, 3))
