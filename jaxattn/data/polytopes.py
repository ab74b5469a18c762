r"""Convex bodies of which something is known, and polytopes from biology."""

import importlib
import importlib.resources
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxattn import _checks
from jaxattn.sampling import (
  Affine,
  Polytope,
  Spectrahedron,
  full_dim_polytope,
)

_SUFFIX = ".xml.gz"

__all__ = ["birkhoff_polytope", "elliptope", "load_flux_polytope"]


def birkhoff_polytope(m: int) -> tuple[Polytope, Affine]:
  r"""Doubly stochastic matrices, in coordinates in which they have an interior.

  .. math:: X \ge 0, \qquad X 1 = 1, \qquad X^\top 1 = 1, \qquad
    \operatorname{vec} X = N y + \operatorname{vec}(1 1^\top / m)

  Uniform ones have the mean 1 / m in each entry, and for m = 3 the variance
  2 / 45; covariances are -1 / 45 in a row or a column and 1 / 90 elsewhere.

  Args:
    m: rows, at least 2.

  Returns:
    The :class:`jaxattn.sampling.Polytope` of y, of :math:`(m - 1)^2`
    coordinates and :math:`m^2` constraints, and the
    :class:`jaxattn.sampling.Affine` map to the entries of X, row by row. 0 is
    the matrix of equal entries.

  Raises:
    ValueError: if ``m`` is below 2.

  Cost:
    O(m^4) memory.

  Source:
    a standard fact; the moments for m = 3 by a triangulation.

  Example:
    >>> from jaxattn.data import birkhoff_polytope
    >>> body, affine = birkhoff_polytope(3)
    >>> body.a.shape, affine.matrix.shape
    ((9, 4), (9, 4))
  """
  _checks.check_integer("m", m, 2, None)
  # Columns orthonormal, and orthogonal to the ones: all sums stay 1.
  whole = np.linalg.qr(np.column_stack([np.ones(m), np.eye(m)[:, 1:]]))[0]
  matrix = np.asarray(np.kron(whole[:, 1:], whole[:, 1:]), np.float64)
  offset = np.full(m * m, 1 / m)
  body = Polytope(jnp.asarray(-matrix), jnp.asarray(offset))
  return body, Affine(matrix, offset)


def elliptope(n: int) -> Spectrahedron:
  r"""Correlation matrices.

  .. math:: S(r) = I + \sum_{i < j} r_{ij} (E_{ij} + E_{ji}) \succeq 0

  Uniform ones have the mean 0 and the variance 1 / (n + 1) in each entry.

  Args:
    n: rows, at least 2.

  Returns:
    The body of the n (n - 1) / 2 entries above the diagonal, row by row.

  Raises:
    ValueError: if ``n`` is below 2.

  Cost:
    O(n^4) memory.

  Source:
    Joe, Generating random correlation matrices based on partial correlations,
    J. Multivariate Analysis 97 (2006), for the moments.

  Example:
    >>> from jaxattn.data import elliptope
    >>> elliptope(4).mats.shape
    (6, 4, 4)
  """
  _checks.check_integer("n", n, 2, None)
  rows, columns = np.triu_indices(n, 1)
  each, mats = np.arange(len(rows)), np.zeros((len(rows), n, n))
  mats[each, rows, columns] = mats[each, columns, rows] = 1
  return Spectrahedron(jnp.asarray(mats), jnp.asarray(-np.eye(n)))


def load_flux_polytope(name: str) -> tuple[Polytope, Affine]:
  r"""Steady states of a metabolic network.

  .. math:: S v = 0, \qquad l \le v \le u

  with S the stoichiometric matrix and v the fluxes of the reactions, whose
  ranges differ by factors of a thousand: no walk that needs a round body mixes.

  Args:
    name: of a model that ships with cobra: ``"textbook"``, the core of E. coli,
      95 reactions, or ``"iJO1366"``, 2583 of them, or another.

  Returns:
    The :class:`jaxattn.sampling.Polytope` of coordinates with an interior, and
    the :class:`jaxattn.sampling.Affine` map to the fluxes, in the order of the
    model; see :func:`jaxattn.sampling.full_dim_polytope`.

  Raises:
    ImportError: if cobra is missing, naming the extra that brings it.
    ValueError: if no such model ships with cobra.

  Cost:
    Two linear programs a reaction: seconds, or for the large one minutes.

  Source:
    Orth, Fleming and Palsson, EcoSal Plus (2010), for the core model; cobra's
    copy of it.

  Example:
    >>> from jaxattn.data import load_flux_polytope
    >>> load_flux_polytope("textbook")  # doctest: +SKIP
    (Polytope(...), Affine(...))
  """
  io, util, folder = _cobra()
  names = sorted(
    file.name.removesuffix(_SUFFIX)
    for file in folder.iterdir()
    if file.name.endswith(_SUFFIX)
  )
  _checks.check_choice("name", name, names)
  # From the file: by name it might be downloaded instead.
  model = io.read_sbml_model(str(folder / f"{name}{_SUFFIX}"))
  matrix = util.create_stoichiometric_matrix(model)
  bounds = np.array([reaction.bounds for reaction in model.reactions], float)
  return full_dim_polytope(matrix, bounds[:, 0], bounds[:, 1])


def _cobra() -> tuple[Any, Any, Any]:
  # An extra of this package, so not imported with it.
  try:
    io = importlib.import_module("cobra.io")
    util = importlib.import_module("cobra.util")
  except ModuleNotFoundError as error:
    raise ImportError(
      "load_flux_polytope needs cobra: pip install 'jaxattn[bodies]'"
    ) from error
  return io, util, importlib.resources.files("cobra.data")
