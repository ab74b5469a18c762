"""What the pieces of polynomial attention take and return."""

import math
from typing import Any, NamedTuple


class Operands(NamedTuple):
  """Arrays of one call: tokens last, as lanes.

  P pairs of a batch element and a key head, G query heads to each.

  Attributes:
    query: (P, H, G, T), scaled.
    key: (P, H, S), 0 where hidden.
    value: (P, Hv + 1, S), a row of ones last; 0 where hidden.
  """

  query: Any
  key: Any
  value: Any


class Options(NamedTuple):
  """Static facts of one call.

  Attributes:
    weights: of the m monomials, those of a degree after those of the one below,
      ordered in a degree by largest variable, then as in the degree below.
    degree: g, of the polynomial.
    is_causal: query t sees keys 0 to t.
    radius: None, or pairs inside a chunk of causal attention take exp where the
      logit is no larger than this.
    chunk_size: tokens at a time; None = that of the platform.
    precision: of the matrix products.
  """

  weights: tuple[float, ...]
  degree: int
  is_causal: bool = False
  radius: float | None = None
  chunk_size: int | None = None
  precision: Any = None

  def coefficients(self, dim: int) -> tuple[float, ...]:
    """Those of the polynomial: weights of the powers of variable 0."""
    firsts = [level(dim, j)[0] for j in range(self.degree + 1)]
    return tuple(self.weights[first] for first in firsts)


class Gradients(NamedTuple):
  """Cotangents of query, key and value, shaped and typed as those."""

  query: Any
  key: Any
  value: Any


def level(dim: int, degree: int) -> tuple[int, int]:
  """First of the monomials of one degree, and how many there are."""
  first = math.comb(dim + degree - 1, degree - 1) if degree else 0
  return first, math.comb(dim + degree - 1, degree)


def products(dim: int, degree: int) -> list[tuple[int, int, int, int]]:
  """How monomials of degree 2 and up come about, a block at a time.

  Those of degree j with largest variable v are v times those of degree j - 1 in
  variables 0 to v, which are the first of theirs.

  Args:
    dim: number of variables.
    degree: the highest one.

  Returns:
    Of each block: variable, first factor, first product, number of them.
  """
  blocks = []
  for j in range(2, degree + 1):
    before, at = level(dim, j - 1)[0], level(dim, j)[0]
    for variable in range(dim):
      size = math.comb(variable + j - 1, j - 1)
      blocks.append((variable, before, at, size))
      at += size
  return blocks


def multinomial_weights(
  dim: int, coefficients: tuple[float, ...]
) -> list[float]:
  """Weights that make monomials this polynomial of an inner product."""
  degree = len(coefficients) - 1
  # Of each monomial: |a|! / a!, largest variable, and the power of that.
  counts, largest, power = [1.0], [-1], [0]
  if degree:
    counts, power = counts + [1.0] * dim, power + [1] * dim
    largest.extend(range(dim))
  for variable, before, _, size in products(dim, degree):
    for i in range(before, before + size):
      power.append(power[i] + 1 if largest[i] == variable else 1)
      largest.append(variable)
      counts.append(counts[i] / power[-1])
  factors = [
    math.factorial(j) * c
    for j, c in enumerate(coefficients)
    for _ in range(level(dim, j)[1])
  ]
  return [n * factor for n, factor in zip(counts, factors, strict=True)]
