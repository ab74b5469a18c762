"""Bodies whose moments are known, and networks where cobra is a stand-in."""

import gzip
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.data import birkhoff_polytope, elliptope, load_flux_polytope
from jaxattn.sampling import dikin_walk, sample_chains
from tests.sampling._bodies import assert_mean


@pytest.mark.parametrize("m", [2, 3, 5])
def test_birkhoff(m):
  body, affine = birkhoff_polytope(m)
  d = (m - 1) ** 2
  assert body.a.shape == (m * m, d)
  np.testing.assert_allclose(
    affine.matrix.T @ affine.matrix, np.eye(d), atol=1e-12
  )
  y = np.random.default_rng(0).normal(size=(20, d)) / m
  x = y @ affine.matrix.T + affine.offset
  sums = x.reshape(20, m, m)
  for axis in (1, 2):
    np.testing.assert_allclose(sums.sum(axis), 1, atol=1e-12)
  # Slacks are the entries.
  slack = np.asarray(body.b) - y @ np.asarray(body.a).T
  np.testing.assert_allclose(slack, x, atol=1e-12)


def _doubly_stochastic(num):
  """Uniform 3 x 3 ones, by rejection, as coordinates of their body."""
  rng, kept = np.random.default_rng(0), []
  while sum(map(len, kept)) < num:
    corner = rng.uniform(size=(20_000, 2, 2))
    inside = (corner.sum(1) < 1).all(1) & (corner.sum(2) < 1).all(1)
    kept.append(corner[inside & (corner.sum((1, 2)) > 1)])
  x = np.zeros((num, 3, 3))
  x[:, :2, :2] = np.concatenate(kept)[:num]
  x[:, 2, :2] = 1 - x[:, :2, :2].sum(1)
  x[:, :, 2] = 1 - x[:, :, :2].sum(2)
  _, affine = birkhoff_polytope(3)
  return (x.reshape(num, 9) - affine.offset) @ affine.matrix


@pytest.mark.parametrize("kind", ["log", "lee_sidford"])
def test_moments_of_birkhoff(kind):
  """Mean 1/3, variance 2/45, covariances -1/45 in a line, else 1/90."""
  body, affine = birkhoff_polytope(3)
  walk = dikin_walk(None, body, kind=kind, num_iters=3)
  starts = jnp.asarray(_doubly_stochastic(2000))
  draws, _, _ = sample_chains(jax.random.key(0), walk, starts, 40)
  x = np.asarray(draws) @ affine.matrix.T + affine.offset
  assert_mean(x, 1 / 3)
  off = (x - 1 / 3).reshape(*x.shape[:2], 3, 3)
  assert_mean(off**2, 2 / 45)
  assert_mean(off * np.roll(off, 1, -1), -1 / 45)
  assert_mean(off * np.roll(off, 1, -2), -1 / 45)
  assert_mean(off * np.roll(off, (1, 1), (-1, -2)), 1 / 90)
  np.testing.assert_allclose(x.reshape(*off.shape).sum(-1), 1, atol=1e-6)


def test_elliptope():
  body = elliptope(4)
  r = np.linspace(-0.3, 0.3, 6)
  got = np.tensordot(r, np.asarray(body.mats), 1) - np.asarray(body.const)
  want = np.eye(4)
  want[np.triu_indices(4, 1)] = r
  np.testing.assert_array_equal(np.triu(got), np.triu(want))
  np.testing.assert_array_equal(got, got.T)


@pytest.fixture
def cobra(monkeypatch, tmp_path):
  """What is used of cobra: a folder of models, a reader, and a matrix."""

  def read_sbml_model(path):
    with gzip.open(path, "rt") as file:
      assert file.read() == "a network"
    bounds = [(0.0, 10.0), (0.0, 1000.0), (-1000.0, 1000.0)]
    reactions = [types.SimpleNamespace(bounds=b) for b in bounds]
    return types.SimpleNamespace(reactions=reactions)

  def create_stoichiometric_matrix(model):
    assert len(model.reactions) == 3
    return np.array([[1.0, -1.0, -1.0]])

  package = tmp_path / "cobra" / "data"
  package.mkdir(parents=True)
  for folder in (package, package.parent):
    (folder / "__init__.py").touch()
  with gzip.open(package / "chain.xml.gz", "wt") as file:
    file.write("a network")
  monkeypatch.syspath_prepend(str(tmp_path))
  parts = {
    "cobra.io": types.SimpleNamespace(read_sbml_model=read_sbml_model),
    "cobra.util": types.SimpleNamespace(
      create_stoichiometric_matrix=create_stoichiometric_matrix
    ),
  }
  for name in ("cobra", "cobra.data"):
    monkeypatch.delitem(sys.modules, name, raising=False)
  for name, part in parts.items():
    monkeypatch.setitem(sys.modules, name, part)
  yield
  for name in ("cobra", "cobra.data"):
    sys.modules.pop(name, None)


@pytest.mark.usefixtures("cobra")
def test_fluxes():
  """v0 = v1 + v2 with 0 <= v0 <= 10: v2 >= -1000 follows from v1 <= 1000."""
  body, affine = load_flux_polytope("chain")
  assert affine.matrix.shape == (3, 2)
  assert body.a.shape == (4, 2)
  assert (body.b > 0).all()
  v = affine.offset + affine.matrix @ np.array([0.5, -0.25])
  np.testing.assert_allclose(v[0], v[1] + v[2], atol=1e-9)


@pytest.mark.usefixtures("cobra")
def test_unknown_network():
  with pytest.raises(ValueError, match="name must be one of 'chain', got 'x'"):
    load_flux_polytope("x")


def test_missing_cobra_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "cobra", None)
  monkeypatch.delitem(sys.modules, "cobra.io", raising=False)
  message = re.escape("needs cobra: pip install 'jaxattn[bodies]'")
  with pytest.raises(ImportError, match=message):
    load_flux_polytope("textbook")


@pytest.mark.parametrize("make", [birkhoff_polytope, elliptope])
def test_refused_sizes(make):
  with pytest.raises(ValueError, match="must be >= 2, got 1"):
    make(1)
