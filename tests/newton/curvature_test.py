"""Structured Hessians against dense algebra."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import newton
from jaxattn.newton import _solve

_N, _P, _K = 40, 7, 3


def _normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def _sparse(n=_N, p=_P, stored=3):
  rng = np.random.default_rng(1)
  # With repetitions, whose entries add up.
  indices = jnp.asarray(rng.integers(0, p, (n, stored)))
  return newton.Design(indices, _normal(n, stored, seed=2), p)


def _dense(a):
  if not isinstance(a, newton.Design):
    return np.asarray(a)
  out = np.zeros((len(a.values), a.dim))
  for row, (columns, values) in enumerate(zip(a.indices, a.values)):
    for column, value in zip(columns, values):
      out[row, column] += value
  return out


_DESIGNS = {"dense": lambda: _normal(_N, _P), "sparse": _sparse}


@pytest.fixture(params=_DESIGNS)
def design(request):
  return _DESIGNS[request.param]()


def _structured(a, const=None, center=None, seed=3):
  core = _normal(_K, _K, seed=seed)
  return newton.StructuredCurvature(
    a,
    _normal(_N, seed=seed + 1),
    _normal(_dense(a).shape[1], _K, seed=seed + 2),
    core + core.T,
    jnp.asarray(0.5) if const is None else const,
    center,
  )


def _matrix(c):
  a, p = _dense(c.design), _dense(c.design).shape[1]
  const = c.const * np.eye(p) if np.ndim(c.const) == 0 else c.const
  return a.T @ np.diag(c.weight) @ a + c.low @ c.core @ c.low.T + const


def test_products_with_a_design(design):
  a = _dense(design)
  for x in (_normal(_P), _normal(_P, 2)):
    np.testing.assert_allclose(newton.design_matvec(design, x), a @ x)
  for v in (_normal(_N), _normal(2, _N)):
    np.testing.assert_allclose(newton.design_vecmat(v, design), v @ a)
  rows = jnp.array([5, 5, 0])
  np.testing.assert_allclose(newton.design_rows(design, rows), a[rows])


@pytest.mark.parametrize("block", [1, 7 * 9, 1 << 19])
@pytest.mark.parametrize("centered", [False, True])
def test_weighted_gram_is_its_formula(monkeypatch, design, block, centered):
  # Blocks of one row, of nine with a remainder, and of all.
  monkeypatch.setattr(newton.curvature, "_BLOCK_ENTRIES", block)
  weight = _normal(_N)
  center = _normal(_P, seed=5) if centered else None
  a = _dense(design) - (0 if center is None else np.asarray(center))
  got = newton.weighted_gram(design, weight, center=center)
  np.testing.assert_allclose(got, a.T @ np.diag(weight) @ a, atol=1e-12)


@pytest.mark.parametrize("const", [0.5, "matrix"])
def test_structured_curvature_is_its_matrix(design, const):
  if const == "matrix":
    const = _normal(_P, _P)
    const += const.T
  c, v = _structured(design, jnp.asarray(const)), _normal(_P)
  want = _matrix(c)
  np.testing.assert_allclose(newton.curvature_dense(c), want, atol=1e-12)
  np.testing.assert_allclose(
    newton.curvature_matvec(c, v), want @ v, atol=1e-12
  )


def test_operators_and_matrices():
  matrix, v = _normal(4, 4), _normal(4)
  operator = newton.OperatorCurvature(
    jax.tree_util.Partial(lambda x: matrix @ x)
  )
  for c in (newton.DenseCurvature(matrix), operator):
    np.testing.assert_allclose(newton.curvature_dense(c, dim=4), matrix)
    np.testing.assert_allclose(newton.curvature_matvec(c, v), matrix @ v)
  with pytest.raises(ValueError, match="dim is required for an Operator"):
    newton.curvature_dense(operator)


@pytest.mark.parametrize("seed", range(3))
def test_recentering_is_exact(design, seed):
  """Weights of both signs; each row once, so that nothing is left to chance."""
  c = _structured(design, center=_normal(_P, seed=10 + seed), seed=20 + seed)
  drawn = newton.curvature_sample(
    jax.random.key(0), c, jnp.full(_N, 1 / _N), num_rows=8 * _N
  )
  # What is drawn has the identity's other terms as columns: put all rows back.
  whole = drawn._replace(
    design=_dense(design) - np.asarray(c.center), weight=c.weight
  )
  want = _matrix(c)
  scale = np.abs(want).max()
  np.testing.assert_allclose(_matrix(whole), want, atol=3e-13 * scale)


def test_samples_are_unbiased(design):
  c = _structured(design, center=_normal(_P))
  prob = jax.nn.softmax(_normal(_N, seed=9))

  def one(rng):
    return newton.curvature_dense(newton.curvature_sample(rng, c, prob, 16))

  draws = jax.lax.map(one, jax.random.split(jax.random.key(1), 4000))
  off = draws.mean(0) - _matrix(c)
  assert (jnp.abs(off) <= 4.5 * draws.std(0) / 4000**0.5 + 1e-12).all()


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("n", [200, 15])
def test_solvers_agree(n, singular):
  """Weights and core of both signs, around a positive definite matrix."""
  p = 60
  rng = np.random.default_rng(n)
  core = rng.standard_normal((_K, _K))
  if singular:
    core[:, 0] = core[0] = 0
  c = newton.StructuredCurvature(
    jnp.asarray(rng.standard_normal((n, p))),
    jnp.asarray(rng.standard_normal(n) * 0.1),
    jnp.asarray(rng.standard_normal((p, _K))),
    jnp.asarray(core + core.T),
    jnp.asarray(400.0),
  )
  b, shift = jnp.asarray(rng.standard_normal(p)), jnp.asarray(0.3)
  want = np.linalg.solve(_matrix(c) + 0.3 * np.eye(p), b)
  factor = _solve.cholesky_factor(newton.curvature_dense(c), shift)
  got = {
    "cholesky": _solve.cholesky_solve(factor, b),
    "woodbury": _solve.structured_solver(c, b, dual=False)(shift),
    "dual": _solve.structured_solver(c, b, dual=True)(shift),
    "cg": _solve.cg_solve(c, b, shift, 1e-13),
  }
  assert np.linalg.eigvalsh(_matrix(c))[0] > 0
  for name, x in got.items():
    np.testing.assert_allclose(x, want, rtol=1e-9, atol=1e-11, err_msg=name)


def test_conjugate_gradients_stop_where_the_curvature_is_negative():
  c = newton.DenseCurvature(jnp.diag(jnp.array([1.0, -2.0, 3.0])))
  for b in (jnp.array([0.0, 1.0, 0.0]), jnp.array([1.0, 0.5, 1.0])):
    x = _solve.cg_solve(c, b, jnp.asarray(0.0), 1e-10)
    assert np.isfinite(x).all()
    assert x @ b > 0


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: newton.design_matvec(jnp.ones((3, 2)), jnp.ones(3)),
      "x must have shape (2,) = (p, ...), got (3,)",
    ),
    (
      lambda: newton.design_vecmat(jnp.ones(2), jnp.ones((3, 2))),
      "v must have shape (3,) = (..., n), got (2,)",
    ),
    (
      lambda: newton.design_rows(jnp.ones((3, 2)), jnp.ones(2)),
      "indices must be integers, got dtype float",
    ),
    (
      lambda: newton.weighted_gram(jnp.ones((3, 2)), jnp.ones(2)),
      "weight must have shape (3,) = (n,), got (2,)",
    ),
    (
      lambda: newton.weighted_gram(
        jnp.ones((3, 2)), jnp.ones(3), center=jnp.ones(3)
      ),
      "center must have shape (2,) = (p,), got (3,)",
    ),
    (
      lambda: newton.curvature_sample(
        jax.random.key(0),
        newton.DenseCurvature(jnp.eye(2)),
        jnp.ones(2),
        3,
      ),
      "curvature must be a StructuredCurvature, got DenseCurvature",
    ),
  ],
)
def test_refused_arguments(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


def test_products_with_a_sparse_design_hold_no_copy_of_it_for_each_row():
  n, k, num = 2000, 20, 16
  rng = np.random.default_rng(0)
  indices = jnp.asarray(rng.integers(0, 50, (n, k)))
  design = newton.Design(indices, jnp.ones((n, k)), 50)
  v = jnp.ones((num, n))
  program = jax.jit(newton.design_vecmat).lower(v, design).compile()
  temporary = program.memory_analysis().temp_size_in_bytes
  # A copy for each would be 8 * num * n * k.
  assert temporary < 8 * (6 * num * n + 4 * n * k)
