"""Small real tables that ship with scikit-learn, as arrays."""

import types

import numpy as np


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


def _datasets(caller: str) -> types.ModuleType:
  # An extra of this package, so not imported with it.
  try:
    from sklearn import datasets
  except ModuleNotFoundError as error:
    raise ImportError(
      f"{caller} needs scikit-learn: pip install 'jaxattn[data]'"
    ) from error
  return datasets
