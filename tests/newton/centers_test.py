"""Analytic centers: closed forms, invariances, and polytopes without one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxattn import newton
from jaxattn.newton.centers import analytic_center
from tests._recompile import no_recompilation, quick_jit


def _tiled(rows, b):
  """A x <= b in 12 rows, so that all cases share one compilation."""
  times = 12 // len(b)
  return np.tile(np.asarray(rows, float), (times, 1)), np.tile(b, times)


def _box():
  return _tiled([[1, 0], [-1, 0], [0, 1], [0, -1]], np.ones(4))


def _random(seed=0, shift=0.0):
  """A bounded polytope, as far from 0 as the shift says."""
  rng = np.random.default_rng(seed)
  a, b = rng.normal(size=(12, 2)), 1 + rng.uniform(size=12)
  return a, b + a @ np.full(2, shift)


def test_simplex():
  """x >= 0 and sum(x) <= 1: all slacks are equal at the center."""
  found = analytic_center(*_tiled([[-1, 0], [0, -1], [1, 1]], [0.0, 0, 1]))
  np.testing.assert_allclose(found.x, 1 / 3, rtol=1e-10)
  np.testing.assert_allclose(found.loss, 12 * np.log(3), rtol=1e-12)
  used = found.log.loss[: found.num_steps]
  assert (np.diff(used) <= 0).all()


def test_repeated_facets_push_the_center_away():
  """k copies of x <= 1 in [-1, 1]: k / (1 - x) = 1 / (1 + x)."""
  k = 5
  walls = [[1, 0]] * k + [[-1, 0]] + [[0, 1]] * 3 + [[0, -1]] * 3
  found = analytic_center(np.array(walls, float), np.ones(12))
  np.testing.assert_allclose(found.x, [(1 - k) / (1 + k), 0], atol=1e-10)


@pytest.mark.parametrize("shift", [0.0, 10.0, -1000.0])
def test_center_is_where_the_barrier_is_level(shift):
  a, b = _random(shift=shift)
  found = analytic_center(a, b)
  assert found.reason in (1, 2)
  slack = b - a @ np.asarray(found.x)
  assert slack.min() > 0
  # The gradient over the sum of its parts.
  grad, parts = a.T @ (1 / slack), abs(a).T @ (1 / slack)
  np.testing.assert_allclose(grad / parts, 0, atol=1e-9)
  want = optimize.minimize(
    lambda x: -np.log(np.maximum(b - a @ (x + shift), 1e-300)).sum(),
    np.zeros(2),
    method="Nelder-Mead",
    options={"xatol": 1e-7, "fatol": 1e-12, "maxiter": 5000},
  ).x
  np.testing.assert_allclose(found.x, want + shift, atol=1e-5)
  np.testing.assert_allclose(found.loss, -np.log(slack).sum(), rtol=1e-10)


def test_units_change_nothing():
  a, b = _random(shift=3.0)
  units, rows = np.array([1e-5, 1e6]), np.geomspace(1e-4, 1e4, 12)
  want = analytic_center(a, b)
  start = np.full(2, 3.0)
  got = analytic_center(rows[:, None] * a * units, rows * b, start / units)
  np.testing.assert_allclose(got.x * units, want.x, rtol=1e-8)
  same = analytic_center(a, b, start)
  assert got.num_steps == same.num_steps
  steps = slice(0, int(same.num_steps) - 2)
  np.testing.assert_allclose(
    got.log.grad_norm[steps], same.log.grad_norm[steps], rtol=1e-5
  )


def test_thin_polytopes_far_away():
  """Phase I must find an interval of length 1e-6 at 1e3."""
  a, b = _box()
  b = np.tile([1e3 + 1e-6, -1e3, 1, 1], 3)
  found = analytic_center(a, b)
  np.testing.assert_allclose(found.x[0] - 1e3, 5e-7, rtol=1e-3)
  np.testing.assert_allclose(found.x[1], 0, atol=1e-8)


def test_half_a_million_rows_are_traced():
  a = jax.ShapeDtypeStruct((500_000, 8), jnp.float32)
  b = jax.ShapeDtypeStruct((500_000,), jnp.float32)
  assert jax.eval_shape(analytic_center, a, b).x.shape == (8,)


def test_single_precision():
  a, b = _random(shift=2.0)
  found = analytic_center(a.astype(np.float32), b.astype(np.float32))
  assert found.x.dtype == jnp.float32
  np.testing.assert_allclose(found.x, analytic_center(a, b).x, atol=2e-5)


@pytest.mark.parametrize("unit", [1e-3, 1e-6])
def test_many_rows_and_unlike_units_in_single_precision(unit):
  """All slacks are 1 at (0.3, 0), which makes it the center."""
  turn = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
  a = np.stack([np.cos(turn), unit * np.sin(turn)], 1).astype(np.float32)
  b = (1 + 0.3 * np.cos(turn)).astype(np.float32)
  x = np.asarray(analytic_center(a, b).x)
  np.testing.assert_allclose(x * [1, unit], [0.3, 0], atol=1e-5)


_UNBOUNDED = {
  "quadrant": _tiled(np.eye(2), np.ones(2)),
  "strip without a lid": _tiled([[1, 0], [-1, 0], [0, 1]], np.ones(3)),
  "leaning strip": _tiled([[1, 1], [-1, -1], [0, 1]], np.ones(3)),
  "wedge away from 0": _tiled([[1, -2], [-3, 1]], -np.ones(2)),
}


def test_maps_and_reasons_under_a_transformation():
  """Where nothing can be raised, ``reason`` tells."""
  a, b = _box()
  nan = b.copy()
  nan[1] = np.nan
  cases = [
    (a, b),
    (a, b + a @ np.full(2, 5.0)),
    (a, np.where(a[:, 0] == 0, 1.0, -1.0)),
    (a, nan),
    (np.repeat(a[:, :1], 2, 1), b),
    *_UNBOUNDED.values(),
  ]
  run = quick_jit(jax.vmap(analytic_center))
  found = run(*map(jnp.asarray, map(np.stack, zip(*cases, strict=True))))
  np.testing.assert_allclose(found.x[:2], [[0, 0], [5, 5]], atol=1e-9)
  assert found.reason[0] in (1, 2)
  assert found.reason[1] in (1, 2)
  assert found.reason[2:].tolist() == [4, 4, 4, 0, 0, 0, 0]
  assert np.isfinite(found.x).all()


def test_bad_starts_under_a_transformation():
  a, b = _box()
  outside = np.full(2, 2.0)
  found = quick_jit(analytic_center)(a, b, outside)
  assert found.reason == 4
  np.testing.assert_array_equal(found.x, outside)


def test_nan_is_a_reason_and_no_error():
  a, b = _box()
  assert analytic_center(a, b * np.inf).reason == 4
  a[0, 0] = np.nan
  assert analytic_center(a, b).reason == 4


def test_few_steps_are_no_proof_of_an_unbounded_polytope():
  a, b = _box()
  corner = np.full(2, 0.9999)
  config = newton.NewtonConfig(max_steps=1)
  assert analytic_center(a, b, corner, config=config).reason == 0
  assert analytic_center(a, b, corner).reason in (1, 2)


@pytest.mark.parametrize("name", _UNBOUNDED)
def test_unbounded_polytopes_are_refused(name):
  with pytest.raises(ValueError, match="the polytope is unbounded and has no"):
    analytic_center(*_UNBOUNDED[name])


def test_compiles_once():
  analytic_center(*map(jnp.asarray, _random()))
  a, b = map(jnp.asarray, _random(seed=1))
  with no_recompilation():
    analytic_center(a, b)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ((np.ones(3), np.ones(3)), "a must have 2 dimensions, got shape (3,)"),
    ((np.ones((3, 2), int), np.ones(3)), "a must have a floating dtype"),
    ((np.ones((3, 2)), np.ones(2)), "b must have shape (3,) = (n,), got (2,)"),
    (
      (*_box(), np.zeros(3)),
      "x0 must have shape (2,) = (d,), got (3,)",
    ),
    (
      (*_box(), np.array([0.5, -1.3])),
      "x0 is not in the interior: min(b - Ax) = -0.3",
    ),
    (
      _tiled([[1, 0], [-1, 0], [0, 1]], [0.5, -0.74, 1.0]),
      "the polytope has no interior point, best slack -0.12",
    ),
    (
      _tiled([[1, 2], [-1, -2], [2, 4]], np.ones(3)),
      "a must have full column rank 2, got rank 1",
    ),
  ],
)
def test_refused_arguments(args, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    analytic_center(*args)
