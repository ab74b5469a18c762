"""The block that leaks: its formula, and what it refuses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxattn.models.leakage import LeakageBlock
from tests.regression import _leakage


def _plain_logits(params, x, residual, pooling, mlp):
  """By hand, in NumPy."""
  p = {k: np.asarray(v) for k, v in params.items()}
  z = np.asarray(x) + p["pos"]
  q, k, v = z @ p["w_q"], z @ p["w_k"], z @ p["w_v"]
  weights = special.softmax(q @ k.T / np.sqrt(q.shape[1]), 1)
  o = weights @ v @ p["w_o"] + (z if residual else 0)
  if mlp:
    a = o @ p["w_1"] + p["b_1"]
    gelu = a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    o = o + gelu @ p["w_2"]
  pooled = o.mean(0) if pooling == "mean" else o[0]
  return pooled @ p["w_c"] + p["b_c"]


@pytest.mark.parametrize(
  ("residual", "pooling", "mlp"),
  list(itertools.product((False, True), ("mean", "cls"), (0, 32))),
)
def test_formula(residual, pooling, mlp):
  embed, params = _leakage.arrays()
  x = embed[_leakage.token_ids()]
  if not mlp:
    params = _leakage.without_mlp(params)
  block = LeakageBlock(residual=residual, pooling=pooling, mlp=mlp)
  own = block.init(jax.random.key(0), x)["params"]
  assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
  logits = block.apply({"params": params}, x)
  want = _plain_logits(params, x, residual, pooling, mlp)
  np.testing.assert_allclose(logits, want, rtol=1e-12)
  loss = special.logsumexp(want) - want[3]
  np.testing.assert_allclose(block.loss(params, x, 3), loss, rtol=1e-12)
  soft = np.array([0.1, 0.2, 0.3, 0.4, 0.0])
  loss = special.logsumexp(want) - soft @ want
  np.testing.assert_allclose(block.loss(params, x, soft), loss, rtol=1e-12)


def test_head_dim_and_dtype():
  block = LeakageBlock(head_dim=3, mlp=0, num_classes=2)
  x = jnp.ones((4, 6), jnp.float32)
  params = block.init(jax.random.key(0), x)["params"]
  assert params["w_q"].shape == (6, 3)
  assert params["w_o"].shape == (3, 6)
  assert block.loss(params, x, 0).dtype == jnp.float32


@pytest.mark.parametrize(
  ("fields", "x", "message"),
  [
    (
      {"pooling": "max"},
      np.ones((3, 4)),
      "pooling must be one of 'mean', 'cls'",
    ),
    ({"mlp": -1}, np.ones((3, 4)), "mlp must be >= 0, got -1"),
    ({"num_classes": 1}, np.ones((3, 4)), "num_classes must be >= 2, got 1"),
    ({"head_dim": 0}, np.ones((3, 4)), "head_dim must be >= 1, got 0"),
    ({"residual": 1}, np.ones((3, 4)), "residual must be one of False, True"),
    ({}, np.ones((2, 3, 4)), "embeddings must have 2 dimensions, got shape"),
    ({}, np.ones((3, 4), int), "embeddings must have a floating dtype"),
  ],
)
def test_refusals(fields, x, message):
  with pytest.raises(ValueError, match=message):
    LeakageBlock(**fields).init(jax.random.key(0), x)


def test_refused_labels():
  block = LeakageBlock()
  _, params = _leakage.arrays()
  x = jnp.ones((8, 16))
  with pytest.raises(ValueError, match=r"y must have 0 dimensions"):
    block.loss(params, x, jnp.array([1]))
  with pytest.raises(ValueError, match=r"y must have shape \(5,\)"):
    block.loss(params, x, jnp.ones(4))
