"""Small real tables that ship with scikit-learn, as arrays."""

import types

import numpy as np

from jaxattn import _checks

_IMAGES = ("china", "flower")


def load_digits() -> tuple[np.ndarray, np.ndarray]:
  """Returns 1797 handwritten digits of 8 x 8 pixels, in their fixed order.

  Grey levels are the integers 0 to 16. Neighbours in the order are of one
  writer, so shuffle before splitting unless writers are to be kept apart.

  Returns:
    Pixels, (1797, 64) float32, row by row of the image, and labels 0 to 9,
    (1797,) int32.

  Raises:
    ImportError: if scikit-learn is missing, naming the extra that brings it.

  Cost:
    Milliseconds, once scikit-learn is imported.

  Source:
    scikit-learn's copy of the test part of "Optical Recognition of Handwritten
    Digits" of the UCI repository.

  Example:
    >>> from jaxattn.data import load_digits
    >>> pixels, labels = load_digits()
    >>> pixels.shape, labels[:4].tolist()
    ((1797, 64), [0, 1, 2, 3])
  """
  pixels, labels = _datasets("load_digits").load_digits(return_X_y=True)
  return np.asarray(pixels, np.float32), np.asarray(labels, np.int32)


def load_breast_cancer() -> tuple[np.ndarray, np.ndarray]:
  """Returns 30 measurements of 569 tumours, in their fixed order.

  Means, standard errors and largest values of ten features of cell nuclei, each
  in its own unit: standardize the columns before fitting anything.

  Returns:
    Features, (569, 30) float32, and labels, (569,) int32: 0 = malignant (212 of
    them), 1 = benign.

  Raises:
    ImportError: if scikit-learn is missing, naming the extra that brings it.

  Cost:
    Milliseconds, once scikit-learn is imported.

  Source:
    scikit-learn's copy of "Breast Cancer Wisconsin (Diagnostic)" of the UCI
    repository.

  Example:
    >>> from jaxattn.data import load_breast_cancer
    >>> features, labels = load_breast_cancer()
    >>> features.shape, int((labels == 0).sum())
    ((569, 30), 212)
  """
  loader = _datasets("load_breast_cancer").load_breast_cancer
  features, labels = loader(return_X_y=True)
  return np.asarray(features, np.float32), np.asarray(labels, np.int32)


def load_image_patches(
  name: str = "china", *, patch_size: int = 5
) -> tuple[np.ndarray, np.ndarray]:
  """Returns a photograph of 427 x 640 pixels, and the patch around each.

  A stream of 273280 real tokens: patches are its keys, pixels its values.
  Beyond its borders the image is reflected.

  Args:
    name: ``"china"``, a temple, or ``"flower"``.
    patch_size: pixels along a side of a patch, odd.

  Returns:
    Pixels, (273280, 3) float32 in [0, 1], red, green and blue, row by row of
    the image; and patches, (273280, 3 patch_size^2) float32, row by row too.

  Raises:
    ImportError: if scikit-learn is missing, naming the extra that brings it;
      or if Pillow is, which reads the file.
    ValueError: if the name is unknown, or ``patch_size`` even or not in
      [1, 427].

  Cost:
    12 patch_size^2 bytes a pixel.

  Source:
    scikit-learn's sample images.

  Example:
    >>> from jaxattn.data import load_image_patches
    >>> pixels, patches = load_image_patches(patch_size=3)
    >>> patches.shape, bool((patches[:, 12:15] == pixels).all())
    ((273280, 27), True)
  """
  _checks.check_choice("name", name, _IMAGES)
  _checks.check_integer("patch_size", patch_size, 1, 427)
  if patch_size % 2 == 0:
    raise ValueError(f"patch_size must be odd, got {patch_size}")
  datasets = _datasets("load_image_patches")
  image = np.asarray(datasets.load_sample_image(f"{name}.jpg"), np.float32)
  image /= 255
  margin = patch_size // 2
  padded = np.pad(
    image, ((margin, margin), (margin, margin), (0, 0)), "reflect"
  )
  window = patch_size, patch_size
  patches = np.lib.stride_tricks.sliding_window_view(padded, window, (0, 1))
  patches = np.moveaxis(patches, 2, -1).reshape(-1, 3 * patch_size**2)
  return image.reshape(-1, 3), patches


def _datasets(caller: str) -> types.ModuleType:
  # An extra of this package, so not imported with it.
  try:
    from sklearn import datasets
  except ModuleNotFoundError as error:
    raise ImportError(
      f"{caller} needs scikit-learn: pip install 'jaxattn[data]'"
    ) from error
  return datasets
