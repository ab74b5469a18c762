"""One attention for another in a transformer: gradients, errors, training."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn.attention import attention_layer_gradients
from jaxattn.data import byte_batches, load_text
from jaxattn.models import Transformer, TransformerConfig
from tests.models._transformer import (
  B,
  D,
  T,
  polynomial,
  random_params,
  vectors,
)

_CONFIG = TransformerConfig(
  num_layers=3, dim=D, num_heads=2, head_dim=2, mlp_ratio=2.0
)


# --- one attention for another ---


def _value_and_grads(config, params, x, targets):
  def loss(params, x):
    return ((Transformer(config).apply(params, x) - targets) ** 2).sum() / 2

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)


def _close(got, want, tolerance):
  """Each array equal up to ``tolerance`` of its largest entry."""

  def close(got, want):
    atol = tolerance * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)

  jax.tree.map(close, got, want)


def test_one_tree_of_parameters_and_one_function():
  config = _CONFIG._replace(qk_norm=2**0.5)
  high = polynomial(config, 12, 2.0, local="polynomial")
  x, targets = vectors(2, B, T, D)
  params = random_params(config)
  stored = flax.serialization.to_bytes(params)
  loaded = flax.serialization.from_bytes(random_params(high, seed=5), stored)
  want, want_grads = _value_and_grads(config, params, x, targets)
  got, grads = _value_and_grads(high, loaded, x, targets)
  _close(got, want, 1e-8)
  _close(grads, want_grads, 1e-8)


def test_attention_by_name_or_function():
  def mean(query, key, value, *, is_causal=False, scale=None):
    return jnp.broadcast_to(value.mean(1, keepdims=True), value.shape)

  x, params = vectors(), random_params(_CONFIG)
  names = ("softmax", "dot_product", "linear", "relu", mean)

  @jax.jit
  def outputs(params):
    models = [Transformer(_CONFIG._replace(attention=n)) for n in names]
    return [model.apply(params, x) for model in models]

  softmax, dot_product, *others = outputs(params)
  np.testing.assert_allclose(dot_product, softmax, rtol=0, atol=1e-5)
  assert all(np.abs(out - softmax).max() > 1e-3 for out in others)


@pytest.mark.parametrize("name", ["softmax", "polynomial"])
def test_gradients_do_not_see_the_future(name):
  config = _CONFIG
  if name == "polynomial":
    config = polynomial(config, 4, 1.0, chunk_size=4)
  params, x = random_params(config), vectors()

  def loss(x):
    return (Transformer(config).apply(params, x)[:, :6] ** 3).sum()

  dx = jax.jit(jax.grad(loss))(x)
  assert np.abs(dx[:, :6]).min() > 0
  np.testing.assert_array_equal(dx[:, 6:], 0)


def test_permuted_tokens_without_mask():
  config = _CONFIG._replace(is_causal=False, positions=None)
  params, (x, targets) = random_params(config), vectors(2, B, T, D)
  order = np.random.default_rng(0).permutation(T)

  def permuted(c, x, targets):
    def loss(params, x):
      out = Transformer(c).apply(params, x)
      return ((out - targets) ** 2).sum() / 2, out

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, dx), out = grad(params, x)
    return grads, dx, out

  for c in (config, polynomial(config, 4, 1.0)):
    want_grads, *want = permuted(c, x, targets)
    grads, *got = permuted(c, x[:, order], targets[:, order])
    _close(got, [w[:, order] for w in want], 1e-12)
    _close(grads, want_grads, 1e-12)


def test_one_plain_layer_is_the_closed_form():
  config = TransformerConfig(
    num_layers=1, dim=D, num_heads=1, head_dim=D, mlp_ratio=0,
    residual=False, norm=None, positions=None, qk_norm=None,
  )  # fmt: skip
  params, (x, g) = random_params(config), vectors(2, B, T, D)

  def loss(params, x):
    return (g * Transformer(config).apply(params, x)).sum()

  grads, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
  w = {k: v["kernel"][0] for k, v in params["params"]["layers"].items()}
  grads = {k: v["kernel"][0] for k, v in grads["params"]["layers"].items()}
  w_q, w_k, w_v = (w[n][:, 0] for n in ("query", "key", "value"))
  want = attention_layer_gradients(
    x, w_q @ w_k.T, w_v, g @ w["out"][0].T, is_causal=True
  )
  _close(dx, want.dx, 1e-14)
  _close(grads["query"][:, 0], want.dw @ w_k, 1e-14)
  _close(grads["key"][:, 0], want.dw.T @ w_q, 1e-14)
  _close(grads["value"][:, 0], want.dw_v, 1e-14)


def test_rematerialized_layers_have_the_same_gradients():
  x, targets = vectors(2, B, T, D)
  params = random_params(_CONFIG)
  kept = _CONFIG._replace(remat=False)
  got = _value_and_grads(_CONFIG, params, x, targets)
  want = _value_and_grads(kept, params, x, targets)
  _close(got, want, 1e-10)


# --- training ---


@pytest.mark.slow
def test_trained_to_the_same_loss():
  """200 steps of Adam on characters, 512 positions."""
  exact = TransformerConfig(vocab_size=128, dim=32, num_heads=4)
  low = polynomial(exact, 4, 1.0, local="polynomial")
  batch_at = byte_batches(
    jax.random.key(1), load_text(), batch_size=2, length=512
  )
  batches = jnp.stack([batch_at(i) for i in range(200)])
  start, end = _train(exact, batches)
  assert end < 0.6 * start
  np.testing.assert_allclose(_train(low, batches)[1], end, rtol=0.005)


def _train(config, batches):
  """Mean losses of the first and of the last steps."""

  def loss(params, ids):
    logits = Transformer(config).apply(params, ids[:, :-1])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return nll.mean()

  @jax.jit
  def train(batches):
    params = Transformer(config).init(jax.random.key(0), batches[0])
    optimizer = optax.adam(2e-3)

    def step(carry, batch):
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params, batch)
      updates, state = optimizer.update(grads, state)
      return (optax.apply_updates(params, updates), state), value

    carry = (params, optimizer.init(params))
    return jax.lax.scan(step, carry, batches)[1]

  losses = train(batches)
  return losses[:3].mean(), losses[-10:].mean()
