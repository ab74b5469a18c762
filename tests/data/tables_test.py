"""Tables of scikit-learn as arrays, and what is said where it is missing."""

import sys

import numpy as np
import pytest
from sklearn import datasets

from jaxattn.data import load_digits


def test_digits():
  pixels, labels = load_digits()
  images, want = datasets.load_digits(return_X_y=True)
  np.testing.assert_array_equal(pixels, images)
  np.testing.assert_array_equal(labels, want)
  assert (pixels.shape, pixels.dtype) == ((1797, 64), np.float32)
  assert (labels.shape, labels.dtype) == ((1797,), np.int32)
  assert (pixels.min(), pixels.max()) == (0, 16)
  assert np.bincount(labels).min() >= 174


def test_missing_scikit_learn_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  with pytest.raises(ImportError, match=r"pip install 'jaxattn\[data\]'"):
    load_digits()
