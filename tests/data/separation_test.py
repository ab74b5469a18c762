"""The two data sets that softmax and linear attention are compared on."""

import jax
import numpy as np
import pytest

from jaxattn.data import separation_dataset
from tests._recompile import no_recompilation


def test_columns():
  n, d, a, b = 48, 10, 0.7, 0.3
  matrices, j3 = separation_dataset(
    jax.random.key(0),
    length=n,
    dim=d,
    amplitude=a,
    b=b,
    batch_size=5,
    dtype="float64",
  )
  size = np.sqrt(np.log(n))
  assert len(set(j3.tolist())) > 1
  for matrix, j in zip(matrices, j3, strict=True):
    want = np.zeros((n, d))
    want[j, 0] = a * size
    want[np.arange(n), 1 + np.arange(n) % (d - 2)] = b * size
    want[:, -1] = (1 - b) * size
    np.testing.assert_allclose(matrix, want, atol=1e-14)


@pytest.mark.any_x64
def test_positions_are_uniform_and_depend_on_the_key_alone():
  options = {"length": 8, "dim": 6, "b": 0.2, "batch_size": 4000}
  rng = jax.random.key(1)
  a, j3 = separation_dataset(rng, amplitude=0.7, **options)
  assert a.dtype == "float32"
  # Six standard deviations of a binomial count.
  counts = np.bincount(j3, minlength=8)
  assert np.abs(counts - 500).max() < 6 * np.sqrt(4000 / 8 * 7 / 8)
  with no_recompilation():
    _, again = separation_dataset(rng, amplitude=0.05, **options)
  np.testing.assert_array_equal(j3, again)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"length": 100, "dim": 50}, "length=100 must be a multiple of dim-2=48"),
    ({"dim": 3}, "dim must be >= 4, got 3"),
    ({"length": 1}, "length must be >= 2, got 1"),
    ({"b": 0.05}, r"b must be in \[0.1, 0.9\], got 0.05"),
    ({"b": 0.95}, r"b must be in \[0.1, 0.9\], got 0.95"),
    ({"amplitude": -0.1}, "amplitude must be non-negative, got -0.1"),
    ({"amplitude": "large"}, "amplitude must be a real scalar, got 'large'"),
    ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
  ],
)
def test_refused(options, message):
  good = {"length": 96, "dim": 50, "amplitude": 0.7, "b": 0.2}
  with pytest.raises(ValueError, match=message):
    separation_dataset(jax.random.key(0), **(good | options))
