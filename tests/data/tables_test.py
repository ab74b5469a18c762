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


@pytest.mark.parametrize("name", ["china", "flower"])
def test_image_patches(name):
  pixels, patches = tables.load_image_patches(name)
  image = datasets.load_sample_image(f"{name}.jpg") / np.float32(255)
  np.testing.assert_array_equal(pixels, image.reshape(-1, 3))
  assert (pixels.dtype, patches.dtype) == (np.float32, np.float32)
  assert patches.shape == (427 * 640, 75)
  inside, corner = (patches[i].reshape(5, 5, 3) for i in (9 * 640 + 20, 0))
  np.testing.assert_array_equal(inside, image[7:12, 18:23])
  # Reflected, without the border twice.
  np.testing.assert_array_equal(corner[0, 1], image[2, 1])


def test_image_patches_refuse():
  with pytest.raises(ValueError, match="name must be one of 'china', 'flower'"):
    tables.load_image_patches("cat")
  with pytest.raises(ValueError, match="patch_size must be odd, got 4"):
    tables.load_image_patches(patch_size=4)
  with pytest.raises(ValueError, match=r"patch_size must be in \[1, 427\]"):
    tables.load_image_patches(patch_size=0)


@pytest.mark.parametrize(
  "name", ["load_digits", "load_breast_cancer", "load_image_patches"]
)
def test_missing_scikit_learn_names_the_extra(monkeypatch, name):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  message = rf"{name} needs scikit-learn: pip install 'jaxattn\[data\]'"
  with pytest.raises(ImportError, match=message):
    getattr(tables, name)()
