"""The layer of tensor attention: what it computes, and what it refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import tensor_attention, tensor_logit_radius
from jaxattn.features import attention_error_bound
from jaxattn.models import TensorAttention
from jaxattn.models.tensor import _shrink
from tests._recompile import quick_jit


def _inputs(length=7):
  return jax.random.normal(jax.random.key(0), (2, length, 5))


def _project(params, name, x):
  p = params["params"][name]
  return jnp.einsum("btd,dnh->btnh", x, p["kernel"]) + p["bias"][None, None]


def test_layer_by_hand():
  x, mask = _inputs(), jnp.arange(14).reshape(2, 7) % 5 > 0
  layer = TensorAttention(num_heads=3, head_dim=4)
  out, params = layer.init_with_output(jax.random.key(1), x, key_mask=mask)
  arrays = []
  for name in ("key1", "key2", "value1", "value2"):
    null = params["params"][f"null_{name}"]
    null = jnp.broadcast_to(null[None, None], (2, 1, 3, 4))
    arrays.append(jnp.concatenate((_project(params, name, x), null), 1))
  seen = jnp.concatenate((mask, jnp.ones((2, 1), bool)), 1)
  y = tensor_attention(
    _project(params, "query", x), *arrays, key_mask1=seen, key_mask2=seen
  )
  p = params["params"]["out"]
  want = jnp.einsum("btnh,nhd->btd", y, p["kernel"]) + p["bias"][None, None]
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


def test_radius_is_kept_and_the_polynomial_is_close():
  x = 30 * _inputs()
  exact = TensorAttention(radius=2.0)
  params = exact.init(jax.random.key(1), x)
  arrays = [_shrink(_project(params, n, x)) for n in ("query", "key1", "key2")]
  largest = tensor_logit_radius(*arrays, scale=2.0)
  assert 0.2 < largest < 2
  small = 1e-3 * arrays[0]
  np.testing.assert_allclose(_shrink(small), small, rtol=1e-6)
  want = exact.apply(params, x)
  for degree, eps in ((4, 1.45e-2), (6, 3.56e-4)):
    got = TensorAttention(radius=2.0, degree=degree).apply(params, x)
    error = jnp.abs(got - want).max()
    # Products of values, through the last map.
    names = ("value1", "value2")
    spread = [jnp.abs(_project(params, n, x)).max((0, 1)) for n in names]
    products = spread[0] * spread[1]
    values = jnp.stack((products, -products))[None]
    bound = attention_error_bound(eps, values)[0]
    kernel = jnp.abs(params["params"]["out"]["kernel"])
    limit = jnp.einsum("nh,nhd->d", bound, kernel).max()
    assert 0 < error <= limit


def test_long_vectors_of_16_bits_are_shrunk():
  x = jnp.array([100.0, -100.0], jnp.float16)
  got = _shrink(x)
  assert got.dtype == jnp.float16
  np.testing.assert_allclose(
    got, [0.5 ** (1 / 3), -(0.5 ** (1 / 3))], rtol=1e-3
  )


def test_parameters_do_not_depend_on_what_attends():
  x = _inputs()
  shapes = [
    jax.tree.map(jnp.shape, layer.init(jax.random.key(0), x))
    for layer in (
      TensorAttention(),
      TensorAttention(radius=1.0),
      TensorAttention(radius=1.0, degree=2),
    )
  ]
  assert shapes[0] == shapes[1] == shapes[2]


def test_causal_layer_and_gradient():
  x = _inputs()
  layer = TensorAttention(
    null_token=False, is_causal=True, radius=1.0, degree=2
  )
  params = layer.init(jax.random.key(1), x)

  @quick_jit
  def pull(x):
    return jax.grad(lambda x: layer.apply(params, x)[:, :4].sum())(x)

  grad = pull(x)
  assert grad[:, :4].any((0, 2)).all()
  assert not grad[:, 4:].any()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"degree": 2}, "radius is required when degree=2"),
    ({"degree": 3, "radius": 1.0}, "degree must be even, got 3"),
    ({"radius": -1.0}, "radius must be positive and finite, got -1.0"),
    ({"radius": np.inf}, "radius must be positive and finite, got inf"),
    ({"is_causal": True}, "null_token must be False with is_causal=True"),
    ({"null_token": 1}, "null_token must be one of False, True, got 1"),
    ({"num_heads": 0}, "num_heads must be >= 1, got 0"),
    ({"head_dim": 0}, "head_dim must be >= 1, got 0"),
  ],
)
def test_refused_fields(fields, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    TensorAttention(**fields).init(jax.random.key(0), _inputs())


def test_refused_inputs():
  for x, message in (
    (jnp.ones((3, 4)), "x must have 3 dimensions, got shape (3, 4)"),
    (jnp.ones((2, 3, 4), int), "x must have a floating dtype, got int"),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      TensorAttention().init(jax.random.key(0), x)
  for mask, message in (
    (np.ones((2, 7)), "key_mask must be boolean (True = attend), got dtype f"),
    (np.ones(7, bool), "key_mask must have shape (2, 7) = (B, T) of x, got (7"),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      TensorAttention().init(jax.random.key(0), _inputs(), key_mask=mask)
