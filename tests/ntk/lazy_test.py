"""Measures of laziness: by hand, and of a network that gets lazier."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.ntk import lazy_metrics


def _kernel(n=3, outputs=2, seed=0):
  features = np.random.default_rng(seed).standard_normal((n, outputs, 9))
  return np.einsum("iap,jbp->iajb", features, features)


def test_by_hand():
  k0, k1, limit = (_kernel(seed=i) for i in range(3))
  rng = np.random.default_rng(3)
  y, outputs, predicted = rng.standard_normal((3, 3, 2))
  start = {"w": np.zeros((4, 2)), "b": np.ones(2)}
  end = {"w": np.array([[3.0, 4], [0, 0], [0, 0], [0, 1]]), "b": np.ones(2)}
  got = lazy_metrics(
    k0,
    k1,
    start,
    end,
    kernel_limit=limit,
    outputs=outputs,
    outputs_predicted=predicted,
    targets=y,
  )
  norm = np.linalg.norm
  flat = y.ravel()
  matrix = k1.reshape(6, 6)
  want = (
    norm(k1 - k0) / norm(k0),
    np.sqrt(26 / 6),
    5.0,
    norm(k0 - limit) / norm(limit),
    norm(outputs - predicted) / norm(predicted),
    flat @ matrix @ flat / (norm(matrix) * flat @ flat),
  )
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_alignment_of_outputs_that_do_not_mix():
  k, y = _kernel(outputs=1)[:, 0, :, 0], np.random.default_rng(1).random((3, 2))
  whole = np.einsum("ij,ab->iajb", k, np.eye(2))
  w = np.ones((2, 1))
  small, large = (lazy_metrics(h, h, w, w, targets=y) for h in (k, whole))
  np.testing.assert_allclose(small.alignment, large.alignment, rtol=1e-12)
  assert small.kernel_limit_gap is None
  assert small.fn_gap is None
  # A kernel that is the targets' own is aligned, whatever its size.
  y = y[:, 0]
  own = lazy_metrics(k, 5 * np.outer(y, y), w, w, targets=y)
  np.testing.assert_allclose(own.alignment, 1, rtol=1e-12)


@pytest.mark.any_x64
def test_limit_of_one_output_stands_for_each():
  k0, limit = (_kernel(seed=i).astype("float32") for i in range(2))
  w, limit = np.ones((2, 1), "float32"), limit[:, 0, :, 0]
  whole = np.einsum("ij,ab->iajb", limit, np.eye(2, dtype="float32"))
  gaps = [
    lazy_metrics(k0, k0, w, w, kernel_limit=k).kernel_limit_gap
    for k in (limit, whole)
  ]
  assert gaps[0].dtype == jnp.float32
  np.testing.assert_allclose(gaps[0], gaps[1], rtol=1e-6)
  assert gaps[0] > 0.1


def test_refused():
  k, w = _kernel(), jnp.ones((2, 2))
  for call, message in (
    (
      lambda: lazy_metrics(k, k[:2], w, w),
      "kernel1 must have shape (3, 2, 3, 2) = kernel0's, got (2, 2, 3, 2)",
    ),
    (
      lambda: lazy_metrics(k, k, w, w[:1]),
      "params0 and params1 must have the same shapes, got (2, 2) and (1, 2)",
    ),
    (lambda: lazy_metrics(k, k, {}, {}), "params0 must hold an array"),
    (
      lambda: lazy_metrics(k, k, w, w, outputs=w),
      "outputs and outputs_predicted must come together",
    ),
    (
      lambda: lazy_metrics(k, k, w, w, outputs=w, outputs_predicted=w[0]),
      "outputs must have shape (2,) = the predicted, got (2, 2)",
    ),
    (
      lambda: lazy_metrics(k, k, w, w, kernel_limit=k[0]),
      "kernel_limit must have shape (3, 3) = (n, n), got (2, 3, 2)",
    ),
    (
      lambda: lazy_metrics(k, k, w, w, kernel_limit=k[:2]),
      "kernel_limit must have shape (3, 2, 3, 2) = kernel0's, got (2, 2, 3, 2)",
    ),
    (
      lambda: lazy_metrics(k, k, w, w, targets=w),
      "targets must have shape (3, 2) = data of the kernel, got (2, 2)",
    ),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      call()
