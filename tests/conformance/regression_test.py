"""What holds for every regression problem, in float64 to rounding."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn import newton
from tests._recompile import no_recompilation
from tests.conformance._regression import MEMBERS
from tests.regression import _sampling

_SEEDS = range(5)


@pytest.fixture(params=MEMBERS, ids=lambda m: m.name)
def member(request):
  return request.param


def test_list_is_complete():
  regression = jaxattn.regression
  public = {
    name
    for name in regression.__all__
    if isinstance(getattr(regression, name), types.ModuleType)
    and hasattr(getattr(regression, name), "problem")
  }
  assert public == {m.name.partition("-")[0] for m in MEMBERS}


def _both(member):
  """(points, (p, p) Hessian by autodiff and closed form, and the gradients)."""
  problem = member.problem
  loss = problem.loss

  @jax.jit
  def evaluate(x, data):
    h = problem.curvature(x, data)
    p = len(x)
    v = jnp.cos(jnp.arange(p, dtype=x.dtype))
    dense = newton.curvature_dense(h, dim=p, dtype=x.dtype)
    gauss = newton.curvature_dense(
      problem.gauss_newton(x, data), dim=p, dtype=x.dtype
    )
    return {
      "loss": (problem.value_and_grad(x, data)[0], loss(x, data)),
      "grad": (problem.value_and_grad(x, data)[1], jax.grad(loss)(x, data)),
      "hessian": (dense, jax.hessian(loss)(x, data)),
      "product": (newton.curvature_matvec(h, v), dense @ v),
      "gauss_newton": (gauss, gauss.T),
    }

  return evaluate


def test_closed_forms_are_those_of_autodiff(member):
  evaluate, negative = _both(member), 0
  for seed in _SEEDS:
    data, x = member.make(seed)
    assert member.problem.in_domain is None or member.problem.in_domain(x, data)
    for name, (got, want) in evaluate(x, data).items():
      tol = 1e-11 if name in ("loss", "grad") else 1e-9
      room = tol * max(np.abs(want).max(), 1e-3)
      np.testing.assert_allclose(got, want, rtol=0, atol=room, err_msg=name)
      if name == "gauss_newton":
        assert np.linalg.eigvalsh(got)[0] >= -1e-12 * np.abs(got).max()
      if name == "hessian":
        negative += np.linalg.eigvalsh(got)[0] < -1e-9 * np.abs(got).max()
  # Papers that call the Hessian positive need their regularizer for it.
  assert (negative > 0) == member.indefinite


@functools.cache
def _minimum(member):
  data, start = member.planted()
  config = newton.NewtonConfig(mu0=member.mu0, rtol=1e-14, max_steps=100)
  return newton.minimize(member.problem, start, data, config=config), data


def test_pure_steps_are_quadratic_and_within_their_bound(member):
  found, data = _minimum(member)
  best = found.x
  known = newton.local_certificate(
    jax.random.key(0), member.problem, best, data, radius=5e-3
  )
  least, lipschitz = known.least_eigenvalue, known.lipschitz
  assert least > 0
  r = float(0.9 * least / lipschitz)
  errors = _sampling.errors_of_pure_steps(
    member.problem, _sampling.near(best, r), best, data
  )
  assert errors[1] <= lipschitz * r**2 / (2 * (least - lipschitz * r))
  assert 1.6 <= _sampling.order(errors) <= 2.6


def test_vmap_over_starts_is_a_loop(member):
  found, data = _minimum(member)
  # Before rounding rules: there the paths part.
  config = newton.NewtonConfig(mu0=member.mu0, rtol=0.0, max_steps=3)
  starts = [_sampling.near(found.x, 0.05, seed) for seed in range(8)]

  def run(x):
    return newton.minimize(member.problem, x, data, config=config)

  together = jax.vmap(run)(jnp.stack(starts))
  run(starts[0])
  with no_recompilation():
    alone = [np.asarray(run(x).x) for x in starts]
  np.testing.assert_allclose(alone, together.x, rtol=0, atol=1e-12)


def test_implicit_gradient_is_a_difference_quotient(member):
  data, start = member.planted()
  config = newton.NewtonConfig(mu0=member.mu0, rtol=1e-13, max_steps=100)
  leaf = getattr(data, member.leaf)
  goal = jnp.sin(jnp.arange(len(start), dtype=leaf.dtype))
  side = np.random.default_rng(0).normal(size=leaf.shape) * jnp.abs(leaf).max()

  @jax.jit
  def outer(leaf):
    x = newton.implicit_solution(
      member.problem,
      start,
      data._replace(**{member.leaf: leaf}),
      config=config,
    )
    return goal @ x

  got = (jax.grad(outer)(leaf) * side).sum()
  h = 1e-4
  want = (outer(leaf + h * side) - outer(leaf - h * side)) / (2 * h)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_float32_stays_float32(member):
  data, start = member.planted()
  to32 = lambda z: z.astype("float32")  # noqa: E731
  data, start = jax.tree.map(to32, data), to32(start)
  config = newton.NewtonConfig(mu0=member.mu0, rtol=1e-4)
  found = newton.minimize(member.problem, start, data, config=config)
  assert found.x.dtype == found.loss.dtype == jnp.float32
  assert found.reason in (1, 2, 3)
  exact, _ = _minimum(member)
  assert found.loss <= exact.loss * (1 + 1e-3) + 1e-7
