"""Attacks on attention that need no iteration."""

import re

import jax
import numpy as np
import pytest

from jaxattn.regression import attention_inversion


def _instance(n, d, seed=0, width=None):
  rng = np.random.default_rng(seed)
  tokens, w = rng.normal(size=(n, d)), rng.normal(size=(d, d)) / 2
  v = rng.normal(size=(d, width or d))
  return tokens, w, v, *attention_inversion.predict(tokens, w, v)


def _relative(got, want):
  return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("width", [4, 7])
def test_closed_form(width):
  for seed in range(5):
    tokens, *layer = _instance(12, 4, seed, width)
    found = attention_inversion.invert_closed_form(*layer)
    assert _relative(found, tokens) < 1e-8


def test_closed_form_of_heads_that_are_narrow():
  # Each head has fewer values than dimensions: together they have enough.
  rng = np.random.default_rng(0)
  tokens, w = rng.normal(size=(6, 4)), rng.normal(size=(2, 4, 4)) / 2
  v = rng.normal(size=(2, 4, 2))
  weights, output = attention_inversion.predict(tokens, w, v)
  found = attention_inversion.invert_closed_form(w, v, weights, output)
  assert _relative(found, tokens) < 1e-10
  traced = jax.jit(attention_inversion.invert_closed_form)
  assert _relative(traced(w, v, weights, output), tokens) < 1e-10


def test_a_bad_head_does_not_spoil_good_ones():
  rng = np.random.default_rng(3)
  tokens, v = rng.normal(size=(12, 4)), rng.normal(size=(3, 4, 4))
  w = rng.normal(size=(3, 4, 4)) / 2 * np.array([4, 1, 1])[:, None, None]
  weights, output = map(np.array, attention_inversion.predict(tokens, w, v))
  noisy = output + 1e-8 * rng.normal(size=output.shape)

  def error(heads):
    found = attention_inversion.invert_closed_form(
      w[heads], v[heads], weights[heads], noisy[heads]
    )
    return _relative(found, tokens)

  assert error([0]) > 1e-3
  assert error([0, 1, 2]) < 1e-6
  assert error([0, 1, 2]) < 1.5 * error([1, 2])
  # One that has no inverse at all is left out, unless it is needed.
  weights[0], noisy[0] = _half(12), 0
  np.testing.assert_allclose(error([0, 1, 2]), error([1, 2]), rtol=1e-6)
  with pytest.raises(ValueError, match=r"of weights exceeds 1e\+12"):
    error([0])


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5])
def test_subspace_and_congruence(d):
  for seed in range(5):
    tokens, w, _, weights, _ = _instance(3 * d + 2, d, seed)
    centered = np.log(weights)
    centered = centered - centered.mean(1, keepdims=True)
    values = np.linalg.svd(centered, compute_uv=False)
    assert values[d] / values[0] < 1e-12
    q, gram = map(np.asarray, attention_inversion.invert_subspace(weights, w))
    np.testing.assert_allclose(q.T @ q, np.eye(d), atol=1e-13)
    m = q.T @ tokens
    assert _relative(q @ m, tokens) < 1e-10
    assert _relative(m @ w @ m.T, gram) < 1e-10
    found = attention_inversion.congruence_solve(gram, w)
    assert found.dtype == np.float64
    assert _relative(found @ w @ found.T, gram) < 1e-8
    # Other tokens of the same weights.
    again, _ = attention_inversion.predict(q @ found, w)
    np.testing.assert_allclose(again, weights, atol=1e-10)


def test_subspace_without_keys_that_vanished():
  tokens, w, _, whole, _ = _instance(12, 4)
  weights = np.array(whole)
  weights[2] = np.eye(12)[2]
  with pytest.raises(ValueError, match="more than d=4 keys of positive"):
    attention_inversion.invert_subspace(weights, w)
  weights[2] = whole[2]
  weights[4, 7] = 0.0
  weights[4] /= weights[4].sum()
  q, _ = map(np.asarray, attention_inversion.invert_subspace(weights, w))
  assert _relative(q @ q.T @ tokens, tokens) < 1e-10


@pytest.mark.parametrize("d", [2, 3, 4, 5, 8])
def test_congruence_is_real_if_it_can_be(d):
  rng = np.random.default_rng(d)
  w = rng.normal(size=(d, d))
  change = rng.normal(size=(d, d))
  target = change @ w @ change.T
  m = attention_inversion.congruence_solve(target, w)
  assert m.dtype == np.float64
  np.testing.assert_allclose(m @ w @ m.T, target, atol=1e-9)
  # -W has the cosquare of W, and no real solution if d is odd.
  m = attention_inversion.congruence_solve(-w, w)
  np.testing.assert_allclose(m @ w @ m.T, -w, atol=1e-9)
  assert d % 2 == 0 or m.dtype == np.complex128


_W = np.array([[1.0, 0.5], [-0.5, 2.0]])


def _half(n):
  return np.full((n, n), 1 / n)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: attention_inversion.invert_closed_form(
        np.eye(4), np.ones((4, 3)), _half(5), np.ones((5, 3))
      ),
      "invert_closed_form needs d_v >= d, got 3 < 4",
    ),
    (
      lambda: attention_inversion.invert_closed_form(
        _W, _W, _half(5), np.ones((5, 2))
      ),
      "of weights exceeds 1e+12; use invert_attention",
    ),
    (
      lambda: attention_inversion.invert_closed_form(
        _W, np.ones((2, 2)), np.eye(4), np.ones((4, 2))
      ),
      "of v exceeds 1e+12; use invert_attention",
    ),
    (
      lambda: attention_inversion.invert_closed_form(
        _W, _W, np.eye(4) / 2, np.ones((4, 2))
      ),
      "weights rows must sum to 1, row 0 sums to 0.5",
    ),
    (
      lambda: attention_inversion.invert_closed_form(
        _W, _W, np.eye(4), np.ones((3, 2))
      ),
      "output must have shape (1, 4, 2) = (N, n, Hv), got (1, 3, 2)",
    ),
    (
      lambda: attention_inversion.invert_subspace(_half(4), np.eye(4)),
      "invert_subspace needs n > d, got n=4, d=4",
    ),
    (
      lambda: attention_inversion.invert_subspace(np.nan * _half(4), np.eye(2)),
      "weights contains non-finite values",
    ),
    (
      lambda: attention_inversion.invert_subspace(
        np.eye(4) * 2 - _half(4), np.eye(2)
      ),
      "weights must be non-negative, got -0.25",
    ),
    (
      lambda: attention_inversion.congruence_solve(np.eye(3), _W),
      "n_mat must have shape (2, 2) = that of w, got (3, 3)",
    ),
    (
      lambda: attention_inversion.congruence_solve(_W, np.eye(2)),
      "the eigenvalues of inv(w) @ w.T must be distinct",
    ),
    (
      lambda: attention_inversion.congruence_solve(np.ones((2, 2)), _W),
      "n_mat must be invertible",
    ),
    (
      lambda: attention_inversion.congruence_solve(_W, np.nan * _W),
      "w contains non-finite values",
    ),
    (
      lambda: attention_inversion.congruence_solve(np.eye(65), np.eye(65)),
      "d must be in",
    ),
    (
      lambda: jax.jit(attention_inversion.congruence_solve)(_W, _W),
      "congruence_solve works on the host and cannot be traced",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
