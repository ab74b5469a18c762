"""Lambert's W against scipy's, and where it ends."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxattn.numerics import lambertw


@pytest.mark.parametrize("branch", [0, -1])
def test_is_scipys(branch):
  near_zero = -np.logspace(-300, np.log10(0.3678), 300)
  x = near_zero if branch else np.append(near_zero, np.logspace(-3, 6, 300))
  want = special.lambertw(x, branch).real
  np.testing.assert_allclose(lambertw(x, branch), want, rtol=1e-12)
  # In float32 the distance to -1/e is known to 1e-7 only.
  few = np.float32(x[np.abs(x + np.exp(-1)) > 0.05])
  few = few[np.abs(few) > 1e-37]
  got = lambertw(few, branch)
  assert got.dtype == jnp.float32
  want = special.lambertw(np.float64(few), branch).real
  np.testing.assert_allclose(got, want, rtol=3e-6)


def test_ends_of_the_branches():
  edge = -np.exp(-1)
  x = np.array([edge, np.nextafter(edge, -1), edge - 1e-6, 0.0, np.inf, np.nan])
  got = lambertw(x)
  np.testing.assert_allclose(got[:2], -1, atol=1e-7)
  np.testing.assert_array_equal(got[2:], [np.nan, 0, np.inf, np.nan])
  got = lambertw(x, -1)
  np.testing.assert_allclose(got[:2], -1, atol=1e-7)
  assert jnp.isnan(got[2:]).all()


def test_derivative():
  for x, branch in ((0.7, 0), (-0.2, 0), (-0.2, -1), (0.0, 0)):
    w = float(lambertw(x, branch))
    slope = jax.grad(lambertw)(x, branch)
    np.testing.assert_allclose(slope, 1 / (np.exp(w) * (1 + w)), rtol=1e-12)


def test_refused():
  with pytest.raises(ValueError, match="branch must be one of 0, -1, got 1"):
    lambertw(1.0, 1)
  with pytest.raises(ValueError, match=re.escape("x must have a floating dty")):
    lambertw(jnp.arange(3))
