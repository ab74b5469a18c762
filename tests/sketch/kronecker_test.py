"""Products by columns and by rows: identities, order, refused input."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxattn.sketch import face_splitting, khatri_rao


def _matrices(*shapes):
  rng = np.random.default_rng(0)
  return [rng.standard_normal(shape) for shape in shapes]


def test_order_of_rows_and_columns():
  a, b = _matrices((3, 4), (5, 4))
  np.testing.assert_array_equal(khatri_rao(a, b), scipy.linalg.khatri_rao(a, b))
  want = [np.kron(x, y) for x, y in zip(a.T, b.T[:, :5], strict=True)]
  np.testing.assert_array_equal(face_splitting(a.T, b.T), want)


def test_identities():
  a, b, c, d = _matrices((3, 4), (5, 2), (4, 6), (2, 6))
  close = np.testing.assert_allclose
  want = khatri_rao(a @ c, b @ d)
  close(np.kron(a, b) @ khatri_rao(c, d), want, rtol=1e-12, atol=1e-12)
  e, f = _matrices((4, 5), (2, 5))
  want = (c.T @ e) * (d.T @ f)
  close(khatri_rao(c, d).T @ khatri_rao(e, f), want, rtol=1e-12, atol=1e-12)
  swapped = khatri_rao(
    face_splitting(c, _matrices((4, 3))[0]),
    face_splitting(d, _matrices((2, 3))[0]),
  )
  got = face_splitting(
    khatri_rao(c, d), khatri_rao(_matrices((4, 3))[0], _matrices((2, 3))[0])
  )
  close(got, swapped, rtol=1e-12)


@pytest.mark.parametrize(
  ("fn", "shapes", "message"),
  [
    (khatri_rao, ((3, 4), (3, 5)), "b must have shape (*, 4) = columns of a"),
    (face_splitting, ((3, 4), (2, 4)), "b must have shape (3, *) = rows of a"),
    (khatri_rao, ((3,), (3, 4)), "a must have 2 dimensions, got shape (3,)"),
  ],
)
def test_refused(fn, shapes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    fn(*map(jnp.ones, shapes))
