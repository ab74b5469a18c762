"""Small real tables that ship with scikit-learn, as arrays."""

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
  # An extra of this package, so not imported with it.
  try:
    from sklearn import datasets
  except ModuleNotFoundError as error:
    raise ImportError(
      "load_digits needs scikit-learn: pip install 'jaxattn[data]'"
    ) from error
  pixels, labels = datasets.load_digits(return_X_y=True)
  return np.asarray(pixels, np.float32), np.asarray(labels, np.int32)
