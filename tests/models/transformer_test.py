"""The transformer against its formula, and one attention against another."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.features import rope
from jaxattn.models import Transformer
from tests import _dense
from tests._jaxpr import array_sizes
from tests.models._transformer import (
  CONFIG,
  B,
  D,
  T,
  polynomial,
  random_params,
  vectors,
)

# --- the formula ---


def _norm(kind, params, x):
  if kind is None:
    return x
  if kind == "layer":
    x = x - x.mean(-1, keepdims=True)
  y = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  weights = [params[n][None, None] for n in ("scale", "bias") if n in params]
  return y * weights[0] + (weights[1] if len(weights) > 1 else 0)


def _by_hand(config, params, x, positions=None):
  """The model written down with dense matrices, layer by layer."""
  params = params["params"]
  positions = jnp.arange(x.shape[1]) if positions is None else positions
  if not jnp.issubdtype(x.dtype, jnp.floating):
    x = params["embed"]["embedding"][x]
  for i in range(config.num_layers):
    at = (lambda y: y) if config.tied_layers else (lambda y, i=i: y[i])
    p = jax.tree.map(at, params["layers"])
    y = _norm(config.norm, p.get("attention_norm"), x)
    query, key, value = (
      jnp.einsum("btd,dnh->btnh", y, p[n]["kernel"])
      for n in ("query", "key", "value")
    )
    scale = config.head_dim**-0.5
    if config.qk_norm:
      scale = 1.0
      query, key = (
        z * config.qk_norm / jnp.linalg.norm(z, axis=-1, keepdims=True)
        for z in (query, key)
      )
    if config.positions:
      query, key = rope(query, positions), rope(key, positions)
    seen = _dense.visible(*[x.shape[1]] * 2, is_causal=config.is_causal)
    out, _ = _dense.dense_attention(
      query, key, value, seen=seen[None, None], scale=scale
    )
    y = jnp.einsum("btnh,nhd->btd", out, p["out"]["kernel"])
    x = x + y if config.residual else y
    if config.mlp_ratio:
      y = _norm(config.norm, p.get("mlp_norm"), x)
      act = getattr(jax.nn, config.activation)
      y = act(y @ p["mlp_in"]["kernel"]) @ p["mlp_out"]["kernel"]
      x = x + y if config.residual else y
  x = _norm(config.norm, params.get("norm"), x)
  return x @ params["head"]["kernel"] if config.vocab_size else x


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"norm": "layer", "qk_norm": None, "activation": "relu"},
    {"norm": None, "residual": False, "is_causal": False, "positions": None},
    {"mlp_ratio": 0, "tied_layers": True, "vocab_size": 13, "head_dim": 6},
    {"activation": "tanh", "remat": False, "qk_norm": 2.0},
  ],
)
def test_model_is_its_formula(changes):
  config = CONFIG._replace(**changes)
  ids = jax.random.randint(jax.random.key(3), (B, T), 0, 13)
  x = ids if config.vocab_size else vectors()
  params = random_params(config, x)

  @jax.jit
  def outputs(params):
    return Transformer(config).apply(params, x), _by_hand(config, params, x)

  got, want = outputs(params)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
  assert got.shape == (B, T, config.vocab_size or D)


def test_positions_and_embedded_input():
  config = CONFIG._replace(vocab_size=13)
  ids = jax.random.randint(jax.random.key(3), (B, T), 0, 13)
  params = random_params(config, ids)
  rows = jnp.stack((jnp.arange(T) + 5, 3 * jnp.arange(T)))

  @jax.jit
  def outputs(params):
    apply = functools.partial(Transformer(config).apply, params)
    x = params["params"]["embed"]["embedding"][ids]
    shifted = apply(ids, jnp.arange(T) + 5)
    return apply(ids), apply(x), shifted, apply(ids, rows)

  plain, embedded, shifted, each = outputs(params)
  np.testing.assert_allclose(embedded, plain, atol=1e-12)
  # Only differences of positions matter.
  np.testing.assert_allclose(shifted, plain, atol=1e-6)
  np.testing.assert_allclose(each[0], plain[0], atol=1e-6)
  assert np.abs(each[1] - plain[1]).max() > 1e-3


# --- sizes ---


def test_no_square_array_in_the_gradient():
  t = 4096
  config = polynomial(CONFIG._replace(vocab_size=13), 2, 1.0)
  ids = jax.ShapeDtypeStruct((1, t), jnp.int32)
  params = jax.eval_shape(Transformer(config).init, jax.random.key(0), ids)

  def loss(params, ids):
    return (Transformer(config).apply(params, ids) ** 2).sum()

  largest = max(array_sizes(jax.grad(loss), params, ids))
  assert t * config.dim <= largest < t**2 / 10


def test_what_is_compiled_does_not_grow_with_depth():
  x = vectors()

  def size(num_layers):
    config = CONFIG._replace(num_layers=num_layers)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), x)
    return len(str(jax.make_jaxpr(Transformer(config).apply)(params, x)))

  assert size(40) < 1.02 * size(3)


def test_second_call_does_not_compile():
  config = CONFIG._replace(vocab_size=13)
  ids = jnp.zeros((B, T), jnp.int32)
  params = Transformer(config).init(jax.random.key(0), ids)
  apply = jax.jit(Transformer(config).apply)
  assert apply(params, ids).dtype == jnp.float32
  apply(params, ids + 1)
  assert apply._cache_size() == 1


# --- refused input ---


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_layers": 0}, "num_layers must be >= 1, got 0"),
    ({"head_dim": 0}, "head_dim must be >= 1, got 0"),
    ({"mlp_ratio": -1.0}, r"mlp_ratio must be non-negative, got -1\.0"),
    ({"vocab_size": 0}, "vocab_size must be >= 1, got 0"),
    (
      {"norm": "batch"},
      "norm must be one of 'rms', 'layer', None, g",
    ),
    (
      {"positions": "sine"},
      "positions must be one of 'rope', None, got",
    ),
    ({"activation": "erf"}, "activation must be one of 'gelu', .*, got 'erf'"),
    ({"attention": "x"}, "attention must be one of 'softmax', .*, got 'x'"),
    ({"qk_norm": 0.0}, r"qk_norm must be positive, got 0\.0"),
    (
      {"attention_options": (("dropout_rate", 0.1),)},
      "softmax_attention takes the options .*, got 'dropout_rate'",
    ),
    (
      {
        "attention": "polynomial",
        "attention_options": (("degree", 2), ("radius", 1.0)),
        "qk_norm": 1.5,
      },
      r"qk_norm=1\.5 admits logits up to 2\.25, beyond the radius=1\.0",
    ),
    ({"head_dim": 3}, "even"),
  ],
)
def test_bad_configuration_is_refused(changes, message):
  config = CONFIG._replace(**changes)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(Transformer(config).init, jax.random.key(0), vectors())


@pytest.mark.parametrize(
  ("vocab_size", "ids", "positions", "message"),
  [
    (None, np.ones((2, 5, 7)), None, r"ids must have shape \(\*, \*, 8\)"),
    (
      None,
      np.ones((2, 5), int),
      None,
      "ids must be vectors .*vocab_size is",
    ),
    (13, np.ones((2, 5, 8), int), None, "ids must have 2 dimensions"),
    (13, np.ones((2, 5), bool), None, "ids must be integers or vectors, got"),
    (13, np.ones((2, 5), int), np.arange(4), r"positions must have shape \(5,"),
    (
      13,
      np.ones((2, 5), int),
      np.ones((3, 5), int),
      r"shape \(2, 5\), got",
    ),
  ],
)
def test_bad_input_is_refused(vocab_size, ids, positions, message):
  config = CONFIG._replace(vocab_size=vocab_size)
  init = Transformer(config).init
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(init, jax.random.key(0), ids, positions)


def test_positions_without_a_use_are_refused():
  init = Transformer(CONFIG._replace(positions=None)).init
  with pytest.raises(ValueError, match="positions must be None: the model tak"):
    jax.eval_shape(init, jax.random.key(0), vectors(), jnp.arange(T))
