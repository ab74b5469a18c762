r"""Hessians of self-concordant barriers of convex bodies.

Of a polytope, :math:`H(x) = A_x^\top \operatorname{diag}(c) A_x` with
:math:`A_x = \operatorname{diag}(b - A x)^{-1} A`:

* ``"log"``: :math:`c = 1`;
* ``"vaidya"``: :math:`c = \sigma(A_x) + d / n`;
* ``"john"``: c are the :func:`john_weights` of :math:`A_x`;
* ``"lee_sidford"``: :math:`c = w^{1 - 2/p}`, w the :func:`lewis_weights` of
  :math:`A_x` for :math:`p = 2 (1 + \ln n)`.

Of a spectrahedron, with :math:`S(x) = \sum_i x_i A_i - C = L L^\top`, that of
:math:`-\log\det S`: :math:`H_{ij} = \langle L^{-1} A_i L^{-\top},\, L^{-1} A_j
L^{-\top} \rangle`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import linalg

from jaxattn import _checks, sketch
from jaxattn.sampling.dikin import bodies, weights
from jaxattn.sampling.dikin.bodies import Polytope, Spectrahedron

__all__ = ["LeverageSample", "TensorSRHT", "barrier_hessian"]

KINDS = ("log", "vaidya", "john", "lee_sidford")
Body = Polytope | Spectrahedron


class LeverageSample(NamedTuple):
  r"""Keeps each row of a polytope or drops it, by its leverage score.

  .. math:: p_i = \min(1, m \sigma_i / d), \qquad
    \tilde H = \sum_{i: u_i < p_i} h_i h_i^\top / p_i, \qquad
    H = \sum_i h_i h_i^\top

  with independent uniform :math:`u_i`: the same ones keep nearly the same rows
  at points nearby.

  Attributes:
    num_rows: m, at least d: rows that are kept at most, in expectation.
  """

  num_rows: int


class TensorSRHT(NamedTuple):
  r"""Sketches the n^2 entries of the matrices of a spectrahedron.

  .. math:: \tilde H = R^\top R, \qquad
    R_{tk} = x_t^\top A_k y_t / \sqrt s

  with the factors x and y of :func:`jaxattn.sketch.tensor_srht_factors` of
  :math:`L^{-1}` and itself, :math:`S = L L^\top`.

  Attributes:
    num_rows: s, at least d.
  """

  num_rows: int


class Prepared(NamedTuple):
  """A body, and what its metrics at all points share.

  Attributes:
    body: the body.
    rows: of a polytope; None of a spectrahedron.
  """

  body: Body
  rows: weights.Rows | None


def barrier_hessian(
  body: Body, x: jax.Array, *, kind: str = "log", num_iters: int = 4
) -> jax.Array:
  r"""The Hessian of a barrier, as the walk uses it.

  For ``"log"``, and for spectrahedra, it is the Hessian of the barrier itself;
  for the other kinds a matrix within constant factors of it.

  Args:
    body: a :class:`Polytope` or a :class:`Spectrahedron`.
    x: (d,), an interior point; taken in the dtype of the body.
    kind: ``"log"``, ``"vaidya"``, ``"john"`` or ``"lee_sidford"``; of a
      spectrahedron only the first.
    num_iters: steps for the weights of the last two.

  Returns:
    (d, d), positive definite if the body is bounded; NaN outside.

  Raises:
    ValueError: if shapes do not fit, or the kind is none of these.

  Cost:
    O(n d^2) a set of weights; of a spectrahedron O(d n^3 + d^2 n^2).

  Source:
    arXiv:2410.05700, section 2 and appendix G.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import Polytope, barrier_hessian
    >>> box = Polytope(jnp.array([[1.0], [-1.0]]), jnp.ones(2))
    >>> print(barrier_hessian(box, jnp.zeros(1)))
    [[2.]]
  """
  body, x = bodies.check_body(body), jnp.asarray(x)
  check_kind(body, kind)
  _checks.check_integer("num_iters", num_iters, 1, None)
  _checks.check_shape("x", x, (bodies.dim(body),), "(d,)")
  x = x.astype(jax.tree.leaves(body)[0].dtype)
  return _hessian(body, x, kind=kind, num_iters=num_iters)


@functools.partial(jax.jit, static_argnames=("kind", "num_iters"))
def _hessian(
  body: Body, x: jax.Array, *, kind: str, num_iters: int
) -> jax.Array:
  rows = weights.Rows(body.a, None) if isinstance(body, Polytope) else None
  inside, hessian = hessian_at(
    Prepared(body, rows), x, kind, num_iters, None, None
  )
  return jnp.where(inside, hessian, jnp.nan)


# --- for walks ---


def prepare(body: Body) -> Prepared:
  """What is computed once for all steps."""
  is_polytope = isinstance(body, Polytope)
  return Prepared(body, weights.prepare_rows(body.a) if is_polytope else None)


def is_inside(body: Body, x: jax.Array) -> jax.Array:
  """Whether x is an interior point."""
  if isinstance(body, Polytope):
    return (body.b - body.a @ x > 0).all()
  return _factor(body, x)[0]


def hessian_at(
  prepared: Prepared,
  x: jax.Array,
  kind: str,
  num_iters: int,
  how: LeverageSample | TensorSRHT | None,
  rng: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Whether x is inside, and H there, or some other matrix if it is not."""
  body = prepared.body
  if isinstance(body, Spectrahedron):
    inside, factor = _factor(body, x)
    if how is None:
      return inside, bodies.spectrahedron_hessian(body, factor)
    assert rng is not None
    return inside, _sketched(rng, body.mats, factor, how.num_rows)
  assert prepared.rows is not None
  slack = body.b - body.a @ x
  inside = (slack > 0).all()
  scale = jnp.where(inside, slack, 1) ** -2
  weight = scale * _row_weights(prepared.rows, scale, kind, num_iters)
  if how is not None:
    assert rng is not None
    score = weights.leverage(prepared.rows, weight)
    chance = jnp.clip(how.num_rows / len(x) * score, 0, 1)
    weight = weight * sketch.row_sample_poisson(rng, chance)[1]
  return inside, weights.gram(prepared.rows, weight)


def _factor(body: Spectrahedron, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Whether x is inside, and L with S(x) = L L^T, or the identity if not."""
  factor = jnp.linalg.cholesky(bodies.slack_matrix(body, x))
  inside = jnp.isfinite(factor).all() & (factor.diagonal() > 0).all()
  return inside, jnp.where(inside, factor, jnp.eye(len(factor), dtype=x.dtype))


def _sketched(
  rng: jax.Array, mats: jax.Array, factor: jax.Array, num_rows: int
) -> jax.Array:
  eye = jnp.eye(len(factor), dtype=factor.dtype)
  inverse = linalg.solve_triangular(factor, eye, lower=True)
  x, y = sketch.tensor_srht_factors(rng, inverse, inverse, num_rows)
  half = jnp.einsum("sa,kab->ksb", x, mats)
  rows = jnp.einsum("ksb,sb->ks", half, y)
  return rows @ rows.T / num_rows


def _row_weights(
  rows: weights.Rows, scale: jax.Array, kind: str, num_iters: int
) -> jax.Array:
  """c, for rows times the square root of ``scale``."""
  n, d = rows.a.shape
  if kind == "vaidya":
    return weights.leverage(rows, scale) + d / n
  if kind == "john":
    return weights.john(rows, scale, num_iters)
  if kind == "lee_sidford":
    p = 2 * (1 + math.log(n))
    return weights.lewis(rows, scale, p, num_iters) ** (1 - 2 / p)
  return jnp.ones_like(scale)


# --- checks ---


def check_kind(body: Body, kind: str) -> None:
  """Raises unless the body has such a barrier."""
  kinds = KINDS if isinstance(body, Polytope) else KINDS[:1]
  _checks.check_choice("kind", kind, kinds)


def check_sketch(body: Body, how: LeverageSample | TensorSRHT | None) -> None:
  """Raises unless the body can be sketched so."""
  if how is None:
    return
  fits = LeverageSample if isinstance(body, Polytope) else TensorSRHT
  if not isinstance(how, fits):
    raise ValueError(
      f"sketch of a {type(body).__name__} must be a {fits.__name__}, got {how}"
    )
  _checks.check_integer("num_rows", how.num_rows, bodies.dim(body), None)
