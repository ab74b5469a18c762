"""Layers with an associative memory, against what they are made of."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn.attention import hopfield_retrieve, hopfield_update
from jaxattn.models import HopfieldLayer, HopfieldLookup, HopfieldPooling
from tests._recompile import quick_jit


def _inputs(dtype="float32"):
  rng = np.random.default_rng(0)
  shapes = (2, 5, 6), (2, 9, 4)
  return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def test_one_step_is_flax_attention():
  state, stored = _inputs()
  layer = HopfieldLayer(num_heads=2, head_dim=3, out_dim=5, norm_inputs=False)
  peer = nn.MultiHeadDotProductAttention(2, qkv_features=6, out_features=5)
  params = peer.init(jax.random.key(0), state, stored)
  own = layer.init(jax.random.key(0), state, stored)
  assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
  mask = np.random.default_rng(1).random((2, 9)) < 0.6
  for key_mask in (None, jnp.asarray(mask)):
    got = layer.apply(params, state, stored, key_mask=key_mask)
    full = None if key_mask is None else key_mask[:, None, None]
    want = peer.apply(params, state, stored, mask=full)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_steps_are_those_of_retrieval():
  state, stored = _inputs("float64")
  layer = HopfieldLayer(
    num_heads=2, head_dim=3, beta=2.0, max_steps=4, tol=0.3, norm_hidden=True
  )
  variables = layer.init(jax.random.key(0), state, stored)
  params = variables["params"]

  def norm(x, name=None):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + 1e-6
    )
    if name is not None:
      x = (
        x * params[name]["scale"][None, None] + params[name]["bias"][None, None]
      )
    return x

  def heads(x, name):
    return jnp.einsum("btf,fnh->nbth", x, params[name]["kernel"])

  r, y = norm(state, "norm_state"), norm(stored, "norm_stored")
  query, key, value = (
    norm(heads(r, "query")), norm(heads(y, "key")), heads(y, "value"),
  )  # fmt: skip
  steps = set()
  out = []
  for n in range(2):
    for b in range(2):
      found, info = hopfield_retrieve(
        query[n, b], key[n, b], 2.0, max_steps=3, tol=0.3, return_info=True
      )
      steps |= set(np.asarray(info.num_steps).tolist())
      out.append(hopfield_update(found, key[n, b], 2.0, value[n, b]))
  # Some stop before others.
  assert len(steps) > 1
  out = jnp.stack(out).reshape(2, 2, 5, 3)
  want = jnp.einsum("nbth,nhf->btf", out, params["out"]["kernel"])
  got = layer.apply(variables, state, stored)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_pooling_is_of_a_set():
  _, stored = _inputs()
  pooling = HopfieldPooling(num_queries=3, layer=HopfieldLayer(out_dim=7))
  params = pooling.init(jax.random.key(0), stored)
  want = pooling.apply(params, stored)
  assert want.shape == (2, 3, 7)
  got = pooling.apply(params, stored[:, ::-1])
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  # What is hidden is as good as absent.
  mask = jnp.arange(9)[None].repeat(2, 0) < 6
  got = pooling.apply(params, stored.at[:, 6:].set(100.0), key_mask=mask)
  want = pooling.apply(params, stored[:, :6])
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  # Of an empty set nothing is read but the bias of the output.
  got = pooling.apply(
    params, stored, key_mask=mask & (jnp.arange(2) > 0)[:, None]
  )
  bias = params["params"]["layer"]["out"]["bias"]
  np.testing.assert_allclose(got[0], jnp.tile(bias, (3, 1)), atol=1e-6)
  np.testing.assert_allclose(got[1], want[1], rtol=0, atol=1e-5)


def test_lookup_reads_one_memory():
  state, _ = _inputs()
  lookup = HopfieldLookup(num_patterns=11)
  params = lookup.init(jax.random.key(0), state)
  assert params["params"]["patterns"].shape == (1, 11, 6)
  got = lookup.apply(params, state)
  stored = jnp.repeat(params["params"]["patterns"], 2, 0)
  inner = {"params": params["params"]["layer"]}
  want = HopfieldLayer().apply(inner, state, stored)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_lookup_learns_a_memory():
  """Targets that one step from inputs alone could not make linear."""
  x = jax.random.normal(jax.random.key(0), (1, 32, 6))
  target = jnp.sign(x[..., :2] * x[..., 2:4])
  layer = HopfieldLayer(num_heads=2, head_dim=8, out_dim=2, max_steps=2)
  lookup = HopfieldLookup(num_patterns=40, layer=layer)
  optimizer = optax.adam(0.03)

  def loss(params):
    return jnp.square(lookup.apply(params, x) - target).mean()

  @quick_jit
  def train(params):
    def step(carry, _):
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params)
      updates, state = optimizer.update(grads, state)
      return (optax.apply_updates(params, updates), state), value

    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, length=150)[1]

  losses = train(lookup.init(jax.random.key(1), x))
  assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_heads": 0}, "num_heads must be >= 1, got 0"),
    ({"head_dim": 0}, "head_dim must be >= 1, got 0"),
    ({"out_dim": 0}, "out_dim must be >= 1, got 0"),
    ({"max_steps": 0}, "max_steps must be >= 1, got 0"),
    ({"beta": -1.0}, "beta must be positive, got -1.0"),
    ({"beta": float("inf")}, "beta must be finite, got inf"),
    ({"tol": -1.0}, "tol must be non-negative, got -1.0"),
    ({"norm_inputs": 1}, "norm_inputs must be one of False, True, got 1"),
    ({"norm_hidden": None}, "norm_hidden must be one of False, True, got No"),
  ],
)
def test_refused_fields(fields, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    HopfieldLayer(**fields).init(jax.random.key(0), *_inputs())


def test_refused_inputs():
  state, stored = _inputs()
  rng, layer = jax.random.key(0), HopfieldLayer()
  for call, message in (
    (lambda: layer.init(rng, state[0], stored), "state must have 3 dimensions"),
    (
      lambda: layer.init(rng, state, stored[:1]),
      "stored must have shape (2, *, *) = (B, S, G), got (1, 9, 4)",
    ),
    (
      lambda: layer.init(rng, state, stored, key_mask=jnp.ones((2, 9))),
      "key_mask must be boolean",
    ),
    (
      lambda: layer.init(rng, state, stored, key_mask=jnp.ones((2, 8), bool)),
      "key_mask must have shape (2, 9) = (B, S), got (2, 8)",
    ),
    (
      lambda: HopfieldPooling(num_queries=0).init(rng, stored),
      "num_queries must be >= 1, got 0",
    ),
    (
      lambda: HopfieldPooling().init(rng, stored[0]),
      "stored must have 3 dimensions, got shape (9, 4)",
    ),
    (
      lambda: HopfieldLookup(num_patterns=0).init(rng, state),
      "num_patterns must be >= 1, got 0",
    ),
    (
      lambda: HopfieldLookup(num_patterns=3).init(rng, state[0]),
      "state must have 3 dimensions, got shape (5, 6)",
    ),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      call()
