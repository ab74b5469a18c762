"""The fixed network on top of softmax and linear attention, and its theory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import linear_attention
from jaxattn.data import separation_dataset
from jaxattn.models import (
  separation_false_positive,
  separation_network,
  separation_transition,
  separation_weight,
)
from tests._recompile import no_recompilation
from tests.models._separation import (
  draw_signs,
  num_neurons,
  outputs,
)

# --- the weight of the special token ---


@pytest.mark.parametrize(
  ("length", "dim", "value"),
  [(980, 100, 0.7875), (2000, 102, 0.8092), (4096, 258, 0.8293)],
)
def test_weight_is_that_of_the_dense_softmax(length, dim, value):
  a, j3 = separation_dataset(
    jax.random.key(0),
    length=length,
    dim=dim,
    amplitude=0.7,
    b=0.2,
    dtype="float64",
  )
  rho = np.asarray(a[0]).sum(-1)
  for row in (int(j3[0]), int(j3[0]) - 1):
    scores = rho[row] * rho
    weights = np.exp(scores - scores.max())
    weight = weights[j3[0]] / weights.sum()
    own = None if row == j3[0] else 0.0
    got = separation_weight(length, 0.7, query_amplitude=own)
    np.testing.assert_allclose(got, weight, rtol=1e-10)
    if own is None:
      assert abs(weight - value) < 5e-5


def test_weight_tends_to_one_above_the_golden_ratio():
  golden = (math.sqrt(5) - 1) / 2
  for shift, limit in ((0.05, 1.0), (-0.05, 0.0)):
    weights = [separation_weight(10**k, golden + shift) for k in (4, 40, 80)]
    assert np.all(np.diff(np.abs(np.array(weights) - limit)) < 0)
    np.testing.assert_allclose(weights[-1], limit, atol=1e-6)
  np.testing.assert_allclose(separation_weight(10**6, golden), 0.5, atol=1e-6)


# --- softmax separates, linear does not ---


@pytest.mark.parametrize(
  ("length", "dim", "b"), [(980, 100, 0.2), (4096, 258, 0.3)]
)
def test_separation(length, dim, b):
  run = functools.partial(
    outputs,
    num_seeds=40,
    length=length,
    dim=dim,
    m=num_neurons(length),
  )
  rng = jax.random.key(7)
  assert (run(rng, 0.7, b, attention="softmax") > 0).sum() == 40
  assert (run(rng, 0.1, b, attention="softmax") > 0).sum() == 0
  assert (run(rng, 0.7, b, attention="linear") > 0).sum() == 0
  assert (run(rng, 0.1, b, attention="linear") > 0).sum() == 0


def test_fast_evaluation_is_the_dense_one():
  rng = np.random.default_rng(0)
  ones = 0
  for i in range(20):
    dim = int(rng.integers(4, 12))
    length = (dim - 2) * int(rng.integers(2, 16))
    amplitude, b = rng.uniform(0, 1.5), rng.uniform(0.1, 0.9)
    a, _ = separation_dataset(
      jax.random.key(i),
      length=length,
      dim=dim,
      amplitude=amplitude,
      b=b,
      batch_size=2,
      dtype="float64",
    )
    signs = rng.choice((-1.0, 1.0), (13, dim))
    y = rng.standard_normal((dim, dim)) if i % 2 else None
    for attention in ("softmax", "linear"):
      run = functools.partial(
        separation_network, a, signs, b=b, attention=attention, y=y
      )
      fast, dense = run(), run(x=jnp.ones((dim, dim)))
      np.testing.assert_allclose(fast, dense, rtol=1e-9)
      ones += int((fast > 0).sum())
  assert 10 < ones < 80


def test_cross_attention_is_the_dense_one_and_has_its_own_weight():
  length, dim, b = 60, 12, 0.3
  draw = functools.partial(
    separation_dataset, length=length, dim=dim, b=b, dtype="float64"
  )
  a, j3 = draw(jax.random.key(0), amplitude=1.3, batch_size=3)
  query, _ = draw(jax.random.key(1), amplitude=0.0, batch_size=3)
  signs = draw_signs(jax.random.key(2), 20, dim)
  for attention in ("softmax", "linear"):
    run = functools.partial(
      separation_network, a, signs, b=b, attention=attention, query=query[:, :7]
    )
    np.testing.assert_allclose(run(), run(x=jnp.ones((dim, dim))), rtol=1e-9)
  scores = np.asarray(query[0]).sum(-1)[:1] * np.asarray(a[0]).sum(-1)
  weight = np.exp(scores[j3[0]]) / np.exp(scores).sum()
  got = separation_weight(length, 1.3, query_amplitude=0)
  np.testing.assert_allclose(got, weight, rtol=1e-10)


@pytest.mark.any_x64
def test_more_than_two_row_sums_give_nan():
  a = np.full((2, 6, 4), 0.5, np.float32)
  a[1, 0] *= 2
  a[1, 1] *= 3
  out = separation_network(a, np.ones((1, 4), np.float32), b=0.5)
  assert np.isnan(out[1])
  assert np.isfinite(out[0])


# --- what the gap is, and what it is not ---


def test_rows_of_linear_attention_are_all_the_same():
  a, _ = separation_dataset(
    jax.random.key(0), length=96, dim=50, amplitude=0.7, b=0.2, dtype="float64"
  )
  # Weights of all ones: a score is the product of two sums.
  sums = a[0].sum(-1)[:, None, None]
  c = linear_attention(sums, sums, a[0][:, None], feature_map="identity")
  assert np.ptp(c, axis=0).max() <= 1e-12


@pytest.mark.parametrize(("amplitude", "score"), [(0.1, 1.1), (0.7, 1.7)])
def test_other_weights_let_linear_attention_separate(amplitude, score):
  length, dim, b = 96, 50, 0.2
  a, _ = separation_dataset(
    jax.random.key(0), length=length, dim=dim, amplitude=amplitude, b=b,
    dtype="float64",
  )  # fmt: skip
  x = jnp.zeros((dim, dim)).at[0, 0].set(1)
  run = functools.partial(
    separation_network, a, jnp.ones((1, dim)), b=b, attention="linear", x=x
  )
  size = math.sqrt(math.log(length))
  # All other rows are 0, so F is the score of the special row above tau.
  np.testing.assert_allclose(run()[0], (score - 0.9) * size, rtol=1e-12)
  # A threshold between the two scores tells the two data sets apart.
  assert (run(margin=0.6)[0] > 0) == (amplitude == 0.7)


# --- what a caller relies on ---


@pytest.mark.any_x64
def test_float32_and_no_recompilation():
  a, _ = separation_dataset(
    jax.random.key(0), length=96, dim=50, amplitude=0.7, b=0.2, batch_size=2
  )
  signs = jax.random.rademacher(jax.random.key(1), (40, 50), jnp.float32)
  out = jax.block_until_ready(separation_network(a, signs, b=0.2))
  assert out.dtype == jnp.float32
  assert out.shape == (2,)
  others = jax.block_until_ready(-signs)
  with no_recompilation():
    separation_network(a, others, b=0.3)


@pytest.mark.any_x64
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_matrices_are_told_apart(dtype):
  draw = functools.partial(
    separation_dataset, length=980, dim=100, b=0.2, batch_size=4, dtype=dtype
  )
  signs = jax.random.rademacher(jax.random.key(1), (93, 100), jnp.float32)
  run = functools.partial(separation_network, signs=signs, b=0.2)
  large, _ = draw(jax.random.key(0), amplitude=0.9)
  small, _ = draw(jax.random.key(0), amplitude=0.05)
  out = run(large)
  assert out.dtype == jnp.dtype(dtype)
  # Entries are rounded, and so is the sum: 2^-8 of each.
  want = run(large.astype(jnp.float32))
  np.testing.assert_allclose(
    out.astype(jnp.float32), want, rtol=2 * float(jnp.finfo(dtype).eps)
  )
  assert (out > 0).all()
  assert not run(small).any()
  assert not run(large, attention="linear").any()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"attention": "relu"},
      "attention must be one of 'softmax', 'linear', got",
    ),
    ({"b": 0.95}, r"b must be in \[0.1, 0.9\], got 0.95"),
    ({"a": np.ones((8, 5))}, "a must have 3 dimensions"),
    ({"a": np.ones((2, 1, 5))}, "length must be >= 2, got 1"),
    ({"a": np.ones((2, 8, 5), int)}, "a must have a floating dtype"),
    ({"signs": np.ones((3, 4))}, r"signs must have shape \(\*, 5\) = \(m, d\)"),
    ({"signs": np.ones((0, 5))}, "num_neurons must be >= 1, got 0"),
    ({"x": np.ones((5, 4))}, r"x must have shape \(5, 5\) = \(d, d\)"),
    ({"y": np.ones((4, 5))}, r"y must have shape \(5, 5\) = \(d, d\)"),
    ({"query": np.ones((1, 8, 5))}, r"query must have shape \(2, \*, 5\) = "),
  ],
)
def test_refused_network(options, message):
  good = {"a": np.ones((2, 8, 5)), "signs": np.ones((3, 5)), "b": 0.2}
  with pytest.raises(ValueError, match=message):
    separation_network(**(good | options))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: separation_weight(1, 0.7), "length must be >= 2, got 1"),
    (lambda: separation_weight(9, -0.7), "amplitude must be non-negative, got"),
    (
      lambda: separation_weight(9, 0.7, query_amplitude=-1),
      "query_amplitude must be non-negative, got -1",
    ),
    (lambda: separation_transition(1, 0.2), "length must be >= 2, got 1"),
    (lambda: separation_transition(99, 0.0), r"b must be in \[0.1, 0.9\]"),
    (
      lambda: separation_transition(99, 0.2, margin=0.0),
      r"margin must be in \(0, 1.2\), got 0.0",
    ),
    (
      lambda: separation_transition(2, 0.9, margin=0.3),
      r"margin must be crossed by an amplitude in \(0, 4\), got 0.3",
    ),
    (lambda: separation_false_positive(3, 0.2, 9), "dim must be >= 4, got 3"),
    (lambda: separation_false_positive(9, 2.0, 9), r"b must be in \[0.1, 0.9"),
    (
      lambda: separation_false_positive(9, 0.2, 0),
      "num_neurons must be >= 1, got 0",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
