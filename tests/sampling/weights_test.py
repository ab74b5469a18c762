"""Lewis' and John's weights, against their equations."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.sampling import john_weights, lewis_weights
from jaxattn.sampling.dikin import weights
from jaxattn.sketch import leverage_scores
from tests._recompile import no_recompilation

_N, _D = 40, 5


def _matrix(seed=0, n=_N, d=_D):
  """Rows of very different sizes."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, d)) * np.exp(2 * rng.normal(size=(n, 1)))


def _scores(w, power, a):
  return leverage_scores(jnp.asarray(w)[:, None] ** power * a)


@pytest.mark.parametrize("p", [2.0, 3.0, 4.0, 2 * (1 + math.log(_N)), 30.0])
def test_lewis_weights_solve_their_equation(p):
  a = _matrix()
  w = lewis_weights(a, p, num_iters=400)
  residual = w - _scores(w, 1 / 2 - 1 / p, a)
  assert np.abs(residual).max() < 1e-8
  np.testing.assert_allclose(w.sum(), _D, rtol=1e-8)
  c = w ** (1 - 2 / p)
  assert c.sum() <= _N ** (2 / p) * _D ** (1 - 2 / p) * (1 + 1e-12)
  # The squared norms of the rows in the metric: each is at most 1.
  hessian = (a * np.asarray(c)[:, None]).T @ a
  norms = (a * np.linalg.solve(hessian, a.T).T).sum(1)
  np.testing.assert_allclose(norms, w ** (2 / p), rtol=1e-5)


def test_for_p_2_they_are_the_leverage_scores():
  a = _matrix()
  got = lewis_weights(a, 2.0, num_iters=1)
  np.testing.assert_allclose(got, leverage_scores(a), rtol=1e-9)


def test_every_row_twice_has_half_the_weight():
  a = _matrix()
  once = lewis_weights(a, 4.0, num_iters=100)
  twice = lewis_weights(np.concatenate([a, a]), 4.0, num_iters=100)
  np.testing.assert_allclose(twice, np.tile(once, 2) / 2, rtol=1e-8)


@pytest.mark.parametrize("p", [1.0, 3.0])
def test_converges_with_whole_steps_below_4(p):
  a = _matrix(1)
  w = lewis_weights(a, p, num_iters=200)
  assert np.abs(w - _scores(w, 1 / 2 - 1 / p, a)).max() < 1e-8


def test_step_size_is_better_than_that_of_the_textbooks():
  """Measured for p = 9.4 after 20 steps: about 1e-2 against 0.7."""
  a, p = jnp.asarray(_matrix()), 2 * (1 + math.log(_N))
  best = lewis_weights(a, p, num_iters=400)

  def textbook(_, w):
    hessian = (a * w[:, None] ** (1 - 2 / p)).T @ a
    return w ** (1 - 2 / p) * (a * jnp.linalg.solve(hessian, a.T).T).sum(1)

  slow = jax.lax.fori_loop(0, 20, textbook, jnp.full(_N, _D / _N))
  error = np.abs(lewis_weights(a, p, num_iters=20) / best - 1).max()
  assert error < 0.05
  assert np.abs(slow / best - 1).max() > 10 * error


def test_john_weights():
  a = _matrix(n=400, d=10)
  power = (1 - 1 / math.log2(80)) / 2
  errors = []
  for num_iters in (20, 40):
    w = john_weights(a, num_iters=num_iters)
    np.testing.assert_allclose(w.sum(), 15, rtol=1e-9)
    residual = w - _scores(w, power, a) - 10 / 800
    errors.append(np.abs(residual).max())
  assert errors[0] < 1e-2
  assert errors[1] < 1e-5


def test_products_of_columns_change_nothing():
  a = jnp.asarray(_matrix())
  plain, fast = weights.Rows(a, None), weights.prepare_rows(a)
  assert fast.products is not None
  scale = jnp.linspace(0.5, 2, _N)
  for fn in (
    weights.leverage,
    weights.gram,
    lambda r, s: weights.lewis(r, s, 6.0, 4),
    lambda r, s: weights.john(r, s, 4),
  ):
    np.testing.assert_allclose(fn(fast, scale), fn(plain, scale), rtol=1e-8)
  want = weights.leverage(plain, jnp.ones(_N))
  np.testing.assert_allclose(want, leverage_scores(a), rtol=1e-9)


def test_many_chains_are_one_product_of_matrices():
  rows = weights.prepare_rows(jnp.asarray(_matrix()))
  scales = jnp.ones((64, _N))
  jaxpr = str(jax.make_jaxpr(jax.vmap(weights.gram, (None, 0)))(rows, scales))
  assert jaxpr.count("dot_general") == 1
  assert "64,25" in jaxpr.replace(" ", "")


def test_large_bodies_keep_no_products():
  a = jax.ShapeDtypeStruct((20_000, 200), jnp.float32)
  assert jax.eval_shape(weights.prepare_rows, a).products is None


@pytest.mark.any_x64
def test_half_precision():
  a = jnp.asarray(_matrix(), jnp.bfloat16)
  for fn in (lambda a: lewis_weights(a, 4.0), john_weights):
    got, want = fn(a), fn(a.astype(jnp.float32))
    assert got.dtype == a.dtype
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=1e-2)


def test_no_recompilation():
  a, b = jnp.asarray(_matrix()), jnp.asarray(_matrix(1))
  lewis_weights(a, 3.0), john_weights(a)
  with no_recompilation():
    lewis_weights(b, 3.0), john_weights(b)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: lewis_weights(jnp.ones(3), 2.0), "a must have 2 dimensions"),
    (lambda: lewis_weights(jnp.ones((3, 1)), 0.0), "p must be positive and"),
    (lambda: lewis_weights(jnp.ones((3, 1)), -1.0), "finite, got -1.0"),
    (lambda: lewis_weights(jnp.ones((3, 1)), math.inf), "got inf"),
    (
      lambda: lewis_weights(jnp.ones((3, 1)), 2.0, num_iters=0),
      "num_iters must be >= 1, got 0",
    ),
    (lambda: john_weights(jnp.ones((1, 3))), "as many rows as columns"),
    (lambda: john_weights(jnp.ones((3, 1), int)), "floating dtype"),
    (
      lambda: john_weights(jnp.ones((3, 1)), num_iters=0),
      "num_iters must be >= 1, got 0",
    ),
  ],
)
def test_refused_inputs(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
