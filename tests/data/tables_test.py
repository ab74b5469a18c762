"""Tables of scikit-learn as arrays, and what is said where it is missing."""

import sys

import numpy as np
import pytest
from sklearn import datasets

from jaxattn.data import tables


def test_digits():
  pixels, labels = tables.load_digits()
  images, want = datasets.load_digits(return_X_y=True)
  np.testing.assert_array_equal(pixels, images)
  np.testing.assert_array_equal(labels, want)
  assert (pixels.shape, pixels.dtype) == ((1797, 64), np.float32)
  assert (labels.shape, labels.dtype) == ((1797,), np.int32)
  assert (pixels.min(), pixels.max()) == (0, 16)
  assert np.bincount(labels).min() >= 174


def test_breast_cancer():
  features, labels = tables.load_breast_cancer()
  values, want = datasets.load_breast_cancer(return_X_y=True)
  np.testing.assert_allclose(features, values, rtol=1e-6)
  np.testing.assert_array_equal(labels, want)
  assert (features.shape, features.dtype) == ((569, 30), np.float32)
  assert labels.dtype == np.int32
  # Fewer are malignant, and their cells are larger.
  assert np.bincount(labels).tolist() == [212, 357]
  radius = features[:, 0]
  assert radius[labels == 0].mean() > 1.3 * radius[labels == 1].mean()


@pytest.mark.parametrize("name", ["load_digits", "load_breast_cancer"])
def test_missing_scikit_learn_names_the_extra(monkeypatch, name):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  message = rf"{name} needs scikit-learn: pip install 'jaxattn\[data\]'"
  with pytest.raises(ImportError, match=message):
    getattr(tables, name)()
