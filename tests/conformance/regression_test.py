"""What holds for every regression problem, in float64 to rounding."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn import newton
from tests.conformance._regression import MEMBERS, minimum
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
    shared = {}
    if problem.expand is not None:
      value, grad, hessian = problem.expand(x, data)
      told = newton.curvature_dense(hessian(data), dim=p, dtype=x.dtype)
      alone = problem.value_and_grad(x, data)
      shared |= {
        "loss of all at once": (value, alone[0]),
        "gradient of all at once": (grad, alone[1]),
        "Hessian of all at once": (told, dense),
      }
    return shared | {
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
      room = tol * np.abs(want).max()
      np.testing.assert_allclose(got, want, rtol=0, atol=room, err_msg=name)
      if name == "gauss_newton":
        assert np.linalg.eigvalsh(got)[0] >= -1e-12 * np.abs(got).max()
      if name == "hessian":
        negative += np.linalg.eigvalsh(got)[0] < -1e-9 * np.abs(got).max()
  # Papers that call the Hessian positive need their regularizer for it.
  assert negative


def test_a_pure_step_is_quadratic_and_within_its_bound(member):
  found, data = minimum(member)
  best = np.asarray(found.x)
  known = jax.jit(
    lambda x, data: newton.local_certificate(
      jax.random.key(0), member.problem, x, data, radius=5e-3
    )
  )(best, data)
  least, lipschitz = map(np.asarray, (known.least_eigenvalue, known.lipschitz))
  assert least > 0
  # |x+ - x*| <= M r^2 / (2 (l - M r)), for M r < l.
  r = 0.9 * 0.5 ** np.arange(4) * least / lipschitz
  config = newton.NewtonConfig(pure=True, max_steps=1, rtol=0.0)
  side = _sampling.near(best, 1.0) - best

  def after(x):
    return newton.minimize(member.problem, x, data, config=config).x

  ends = jax.vmap(after)(best + r[:, None] * side)
  errors = np.linalg.norm(np.asarray(ends) - best, axis=1)
  assert (errors <= lipschitz * r**2 / (2 * (least - lipschitz * r))).all()
  order = np.polyfit(np.log(r), np.log(errors), 1)[0]
  assert 1.6 <= order <= 2.6
