"""Logits of the transformer: how large, and who watches over them."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxattn.attention import logit_radius
from jaxattn.features import rope
from jaxattn.models import Transformer
from tests.models._transformer import (
  CONFIG,
  T,
  polynomial,
  random_params,
  vectors,
)


def test_logit_radius_of_each_layer():
  config = CONFIG._replace(num_layers=1, norm=None, qk_norm=None)
  params, x = random_params(config), vectors()
  apply = jax.jit(Transformer(config).apply, static_argnames="return_stats")
  out, stats = apply(params, x, return_stats=True)
  np.testing.assert_allclose(out, apply(params, x), atol=1e-12)
  kernels = params["params"]["layers"]
  query, key = (
    rope(jnp.einsum("btd,dnh->btnh", x, kernels[n]["kernel"][0]), jnp.arange(T))
    for n in ("query", "key")
  )
  want = logit_radius(query, key, is_causal=True)
  np.testing.assert_allclose(stats.logit_radius, want[None])


def test_normalized_queries_and_keys_bound_the_logits():
  taus, x = (0.5, 2.0), vectors()
  params = jax.tree.map(lambda p: 100 * p, random_params(CONFIG))

  @jax.jit
  def radii(params):
    models = [Transformer(CONFIG._replace(qk_norm=tau)) for tau in taus]
    return [m.apply(params, x, return_stats=True)[1][0] for m in models]

  for tau, radius in zip(taus, radii(params), strict=True):
    assert radius.shape == (3,)
    assert (radius <= tau**2).all()
    assert (radius > 0.8 * tau**2).all()


def test_the_radius_is_one_of_logits_as_they_are():
  """Without a causal mask, too: keys are not centered unless asked for."""
  config = CONFIG._replace(is_causal=False)
  x, params = vectors(), random_params(config)

  def run(**options):
    low = polynomial(config, 2, 1.0, **options)
    return Transformer(low).apply(params, x)

  np.testing.assert_array_equal(run(), run(center_keys=False))
  assert jnp.abs(run() - run(center_keys=True)).max() > 1e-6


@pytest.mark.any_x64
def test_rounding_is_no_false_alarm():
  """Queries that are their own keys: logits of qk_norm^2, give or take."""
  config = polynomial(CONFIG, 2, 1.0)
  # So many that some are rounded up, whatever the order of their sums.
  x = 100 * jax.random.normal(jax.random.key(7), (256, T, 8), jnp.float32)
  params = Transformer(config).init(jax.random.key(0), x)
  layers = params["params"]["layers"]
  layers["key"] = layers["query"]
  apply = functools.partial(Transformer(config).apply, return_stats=True)
  error, (_, stats) = jax.jit(checkify.checkify(apply))(params, x)
  assert stats.logit_radius.max() > 1
  error.throw()


def test_checked_mode():
  config = polynomial(CONFIG._replace(qk_norm=None), 2, 1e-3)
  params, x = random_params(config), vectors()
  apply = functools.partial(Transformer(config).apply, return_stats=True)
  error, _ = jax.jit(checkify.checkify(apply))(params, x)
  with pytest.raises(checkify.JaxRuntimeError, match="beyond the promised rad"):
    error.throw()
  jax.jit(apply)(params, x)  # Not checked: no error.

  def loss(params):
    return apply(params, x)[0].sum()

  error, _ = jax.jit(checkify.checkify(jax.grad(loss)))(params)
  with pytest.raises(checkify.JaxRuntimeError, match="beyond the promised rad"):
    error.throw()
  config = polynomial(CONFIG, 2, 1.0)
  apply = functools.partial(Transformer(config).apply, return_stats=True)
  error, _ = jax.jit(checkify.checkify(apply))(params, x)
  error.throw()
