"""Selection of the largest: against a stable sort, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.numerics import topk_indices, topk_merge

pytestmark = pytest.mark.any_x64


def _stable_topk(scores, k):
  """Indices of the k largest, by value and then by index."""
  return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def _scores(shape, levels):
  # Few levels: most entries are tied.
  rng = np.random.default_rng(0)
  return rng.integers(0, levels, shape).astype(np.float32)


@pytest.mark.parametrize("k", [1, 6, 50])
def test_indices_with_ties(k):
  scores = _scores((3, 4, 50), levels=5)
  got = topk_indices(jnp.asarray(scores), k)
  want = np.sort(_stable_topk(scores, k), -1)
  np.testing.assert_array_equal(got, want)


def test_indices_of_blocks():
  scores = _scores((4, 60), levels=100)
  got = topk_indices(jnp.asarray(scores), 15, block_size=5)
  want = np.sort(_stable_topk(scores.reshape(4, 12, 5).sum(-1), 3), -1)
  np.testing.assert_array_equal(got, want)


def test_indices_keep_infinities_last():
  scores = jnp.array([-jnp.inf, 2.0, -jnp.inf, 1.0])
  np.testing.assert_array_equal(topk_indices(scores, 3), [0, 1, 3])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_merge_in_order_is_one_selection(shared, dtype):
  scores = _scores((3, 4, 64), levels=6).astype(dtype)
  k, size = 10, 16

  @jax.jit
  def fold(scores):
    values, indices = jax.lax.top_k(scores[..., :size], k)
    for start in range(size, 64, size):
      block = scores[..., start : start + size]
      new = jnp.arange(start, start + size, dtype=jnp.int32)
      new = new if shared else jnp.broadcast_to(new, block.shape)
      values, indices = topk_merge(values, indices, block, new)
    return values, indices

  values, indices = fold(jnp.asarray(scores))
  want = _stable_topk(scores, k)
  np.testing.assert_array_equal(indices, want)
  np.testing.assert_array_equal(values, np.take_along_axis(scores, want, -1))


def test_merge_gradient_reaches_what_is_kept():
  new = jnp.array([2, 3, 4], jnp.int32)

  def weighted(old_values, new_values):
    values, _ = topk_merge(
      old_values, jnp.array([0, 1], jnp.int32), new_values, new
    )
    return values @ jnp.array([1.0, 10.0])

  old_grad, new_grad = jax.grad(weighted, (0, 1))(
    jnp.array([5.0, 1.0]), jnp.array([0.0, 7.0, 2.0])
  )
  np.testing.assert_array_equal(old_grad, [10, 0])
  np.testing.assert_array_equal(new_grad, [0, 1, 0])


@pytest.mark.parametrize(
  ("k", "options", "message"),
  [
    (0, {}, r"k must be in \[1, 8\], got 0"),
    (9, {}, r"k must be in \[1, 8\], got 9"),
    (2.0, {}, r"k must be an integer in \[1, 8\], got 2.0"),
    (4, {"block_size": 3}, "block_size must divide the 8 scores and k = 4"),
    (3, {"block_size": 2}, "block_size must divide the 8 scores and k = 3"),
    (4, {"block_size": 0}, r"block_size must be in \[1, 8\], got 0"),
  ],
)
def test_refused_indices(k, options, message):
  with pytest.raises(ValueError, match=message):
    topk_indices(jnp.zeros(8), k, **options)


@pytest.mark.parametrize(
  ("shapes", "dtype", "message"),
  [
    (((2, 3), (2, 4), (2, 5), (5,)), "int32", "indices must have shape"),
    (((2, 3), (2, 3), (1, 5), (5,)), "int32", "new_values must have shape"),
    (((2, 3), (2, 3), (2, 5), (4,)), "int32", r"new_indices .* shape \(5,\)"),
    (((2, 3), (2, 3), (2, 5), (2, 4)), "int32", "new_indices must have shape"),
    (((2, 3), (2, 3), (2, 5), (5,)), "int8", "must have one dtype"),
  ],
)
def test_refused_merge(shapes, dtype, message):
  values, indices, new_values, new_indices = shapes
  with pytest.raises(ValueError, match=message):
    topk_merge(
      jnp.zeros(values),
      jnp.zeros(indices, "int32"),
      jnp.zeros(new_values),
      jnp.zeros(new_indices, dtype),
    )
