"""Softmax regression with a skip: closed forms, theorems, solver."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import newton
from jaxattn.regression import fit_softmax_resnet, softmax_resnet
from tests.regression import _sampling
from tests.regression._softmax_resnet import planted as _instance

_SCALES = (0.0, 0.3, 1.0)


def _random(n=40, d=5, seed=0, residual_scale=1.0, w=0.3, ridge=0.1):
  rng = np.random.default_rng(seed)
  a, b = rng.normal(size=(n, d)) / 2, rng.dirichlet(np.ones(n))
  data = softmax_resnet.prepare(
    a, b, w=w * rng.uniform(size=n), ridge=ridge, residual_scale=residual_scale
  )
  return data, jnp.asarray(0.5 * rng.normal(size=d))


def _plain_loss(x, data):
  """The loss as it is written down."""
  y = data.a @ x
  u = jnp.exp(y) + data.residual_scale * y
  f = u / u.sum()
  penalty = (data.w2 * y**2).sum() + data.ridge * (x**2).sum()
  return (((f - data.b) ** 2).sum() + penalty) / 2


def _dense(x, data):
  return newton.curvature_dense(softmax_resnet.curvature(x, data))


# --- closed forms ---


@pytest.mark.parametrize("residual_scale", _SCALES)
@pytest.mark.parametrize("seed", range(5))
def test_derivatives_are_those_of_the_loss(residual_scale, seed):
  data, x = _random(seed=seed, residual_scale=residual_scale)
  value, grad = softmax_resnet.value_and_grad(x, data)
  want = jax.value_and_grad(_plain_loss)(x, data)
  np.testing.assert_allclose(value, want[0], rtol=1e-13)
  np.testing.assert_allclose(softmax_resnet.loss(x, data), value, rtol=1e-15)
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
  close(grad, want[1])
  close(_dense(x, data), jax.hessian(_plain_loss)(x, data))
  v = jnp.arange(1.0, 6.0)
  close(
    newton.curvature_matvec(softmax_resnet.curvature(x, data), v),
    _dense(x, data) @ v,
  )


@pytest.mark.parametrize("residual_scale", _SCALES)
def test_gauss_newton_part(residual_scale):
  data, x = _random(residual_scale=residual_scale)

  def predict(x):
    return softmax_resnet.predict(x, data.a, residual_scale=residual_scale)

  jacobian = jax.jacobian(predict)(x)
  got = newton.curvature_dense(softmax_resnet.gauss_newton(x, data))
  want = jacobian.T @ jacobian + data.const
  np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("residual_scale", _SCALES)
def test_hessian_by_rows(residual_scale):
  data, x = _random(residual_scale=residual_scale)
  a, rho = np.asarray(data.a), residual_scale
  y = a @ np.asarray(x)
  alpha = (np.exp(y) + rho * y).sum()
  f, v = (np.exp(y) + rho * y) / alpha, (np.exp(y) + rho) / alpha
  c = f - np.asarray(data.b)
  tilde, mean = c - c @ f, a.T @ v
  first = v[:, None] * a - f[:, None] * mean
  centered = a - mean
  want = first.T @ first + centered.T @ np.diag(tilde * v) @ centered
  want -= (tilde @ v) * np.outer(mean, mean)
  want -= rho / alpha * a.T @ np.diag(tilde) @ a
  want += data.const
  got = _dense(x, data)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * abs(want).max())


def test_hessian_of_softmax_is_one_centered_gram():
  data, x = _random(residual_scale=0.0)
  f = jax.nn.softmax(data.a @ x)
  c = f - data.b
  gram = newton.weighted_gram(
    data.a, f**2 + f * (c - c @ f), center=data.a.T @ f
  )
  want = gram + data.const
  np.testing.assert_allclose(_dense(x, data), want, rtol=0, atol=1e-13)


def test_without_a_skip_it_is_softmax():
  data, x = _random(residual_scale=0.0, w=0.0, ridge=0.0)
  got = softmax_resnet.predict(x, data.a, residual_scale=0.0)
  np.testing.assert_allclose(got, jax.nn.softmax(data.a @ x), rtol=1e-13)
  # A column of ones moves all entries of y by the same: nothing changes.
  a = jnp.concatenate([data.a, jnp.ones((40, 1))], 1)
  more = softmax_resnet.prepare(a, data.b, residual_scale=0.0)
  want = softmax_resnet.loss(x, data)
  for t in (-3.0, 0.0, 7.0):
    moved = jnp.append(x, t)
    got = softmax_resnet.loss(moved, more)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    hessian = _dense(moved, more)
    np.testing.assert_allclose(hessian[:5, :5], _dense(x, data), atol=1e-14)
    np.testing.assert_allclose(hessian[-1], 0, atol=1e-15)


@pytest.mark.parametrize(
  ("dtype", "top", "tol"), [("float64", 800.0, 1e-10), ("float32", 200.0, 1e-4)]
)
@pytest.mark.parametrize("second", [(0.01, 0.5), (1.0, 1.0)])
def test_large_logits(dtype, top, tol, second):
  # One large logit, and two that are nearly equal.
  a = np.array([[1.0, 0.0], second, [0.02, -1.0]])
  x, b = np.array([top, 0.3]), np.array([0.2, 0.5, 0.3])
  data = softmax_resnet.prepare(
    jnp.asarray(a, dtype), jnp.asarray(b, dtype), ridge=0.1
  )
  value, grad = softmax_resnet.value_and_grad(jnp.asarray(x, dtype), data)
  hessian = _dense(jnp.asarray(x, dtype), data)
  # The reference has the range of extended precision: e^800 is a number there.
  a, x, b = (np.asarray(z, np.longdouble) for z in (a, x, b))
  y = a @ np.asarray(x)
  alpha = (np.exp(y) + y).sum()
  f, v, z = (np.exp(y) + y) / alpha, (np.exp(y) + 1) / alpha, np.exp(y) / alpha
  c = f - b
  want = (c @ c) / 2 + np.longdouble(0.1) * (x @ x) / 2
  np.testing.assert_allclose(value, float(want), rtol=tol)
  want = a.T @ (v * (c - c @ f)) + np.longdouble(0.1) * x
  np.testing.assert_allclose(grad, want.astype(float), rtol=tol, atol=tol)
  diagonal = v**2 + (c - c @ f) * z
  p = v * (f + c)
  inner = np.diag(diagonal) + (f @ f + 2 * (c @ f)) * np.outer(v, v)
  inner -= np.outer(v, p) + np.outer(p, v)
  want = a.T @ inner @ a + np.longdouble(0.1) * np.eye(2)
  room = tol * float(abs(want).max())
  np.testing.assert_allclose(hessian, want.astype(float), rtol=0, atol=room)


# --- theorems, and where they fail ---


def test_hessian_is_indefinite_without_a_regularizer():
  """Against the abstract of the source; with weights of 2 it is not."""
  n, d = 20, 3

  def least_eigenvalue(seed, w):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, d))
    data = softmax_resnet.prepare(a, np.eye(n)[0], w=w)
    x = jnp.asarray(rng.normal(size=d))
    return np.linalg.eigvalsh(_dense(x, data))[0]

  negative = [least_eigenvalue(seed, 0.0) < 0 for seed in range(400)]
  assert sum(negative) >= 100
  assert all(least_eigenvalue(seed, 2.0) > 0 for seed in range(400))


def test_newton_on_a_planted_instance():
  n = 2000
  data, _ = _instance(n, 10, w=0.1 / n)
  config = newton.NewtonConfig(rtol=1e-12)
  found = newton.minimize(
    softmax_resnet.problem(), jnp.zeros(10), data, config=config
  )
  assert found.reason == 1
  assert found.num_steps <= 8
  assert jnp.linalg.norm(found.x) > 1


def test_pure_newton_is_quadratic():
  n = 2000
  data, _ = _instance(n, 10, w=0.1 / n)
  problem = softmax_resnet.problem()
  best = _sampling.minimum(problem, data, 10)
  errors = _sampling.errors_of_pure_steps(
    problem, _sampling.near(best, 0.16), best, data
  )
  assert 1.6 <= _sampling.order(errors) <= 2.6
  assert errors[3] < 1e-9


@pytest.mark.parametrize(("rows", "most"), [(80, 0.2), (20, 0.5)])
def test_sampled_newton_contracts(rows, most):
  n, d = 2000, 10
  data, _ = _instance(n, d, w=0.1 / n)
  best = _sampling.minimum(softmax_resnet.problem(), data, d)
  h = softmax_resnet.curvature(best, data)
  hessian, prob = newton.curvature_dense(h), _sampling.leverage(h)
  x = best + 0.05 * np.random.default_rng(0).normal(size=d)

  @jax.jit
  def one(x, rng):
    h = softmax_resnet.curvature(x, data)
    h = newton.curvature_dense(newton.curvature_sample(rng, h, prob, rows * d))
    return x - jnp.linalg.solve(h, softmax_resnet.value_and_grad(x, data)[1])

  sizes = [_sampling.norm_in(hessian, x - best)]
  for i in range(5):
    x = one(x, jax.random.key(i))
    sizes.append(_sampling.norm_in(hessian, x - best))
  # The first step also has the curvature of the path in it.
  factors = np.divide(sizes[2:], sizes[1:-1])
  assert factors.max() <= most


@pytest.mark.slow
def test_error_of_a_sketch_follows_its_law():
  n, d = 20_000, 10
  data, _ = _instance(n, d, w=0.1 / n)
  best = _sampling.minimum(softmax_resnet.problem(), data, d)
  h = softmax_resnet.curvature(best, data)
  exact, medians, sizes = newton.curvature_dense(h), [], (20, 80, 320)
  for rows in sizes:
    median = _sampling.median_error(h, exact, num_rows=rows * d)
    medians.append(float(median))
    law = 2 * math.sqrt(1 / rows) + 1 / rows
    assert 0.65 * law <= medians[-1] <= 1.35 * law
  slope = np.polyfit(np.log(sizes), np.log(medians), 1)[0]
  assert -0.62 <= slope <= -0.42


def test_sampling_without_centering_fails_on_concentrated_outputs():
  n, d = 20_000, 10
  rng = np.random.default_rng(1)
  a, planted = rng.normal(size=(n, d)), rng.normal(size=d)
  planted *= 3 / np.std(a @ planted)
  f = softmax_resnet.predict(planted, a, residual_scale=0.0)
  assert f.max() / f.mean() > 50
  b = f * (1 + 0.05 * rng.normal(size=n))
  data = softmax_resnet.prepare(a, b, w=1e-3 / n, residual_scale=0.0)
  h = softmax_resnet.curvature(jnp.asarray(planted), data)
  # Of the same rows, drawn as the theory says: by centered leverage.
  error = functools.partial(
    _sampling.median_error,
    exact=newton.curvature_dense(h),
    prob=_sampling.leverage(h),
    num_rows=16 * d,
  )
  assert error(h) < 1
  assert 10 < error(h._replace(center=None)) < np.inf


# --- refusals ---


@pytest.mark.parametrize(
  ("a", "b", "options", "message"),
  [
    (np.ones(5), np.ones(5), {}, "a must have 2 dimensions, got shape (5,)"),
    (
      np.ones((64, 2)),
      np.ones(10),
      {},
      "b must have shape (64,) = (n,), got (10,)",
    ),
    (np.ones((3, 2), int), np.ones(3), {}, "a must have a floating dtype"),
    (
      np.ones((3, 2)),
      np.ones(3),
      {"residual_scale": -1.0},
      "residual_scale must be non-negative, got -1.0",
    ),
    (
      np.ones((3, 2)),
      np.ones(3),
      {"residual_scale": np.ones(3)},
      "residual_scale must be a real scalar, got array(",
    ),
    (
      np.ones((3, 2)),
      np.ones(3),
      {"ridge": np.ones(3)},
      "ridge must be a real scalar, got array(",
    ),
    (np.ones((3, 2)), np.ones(3), {"w": -1.0}, "w must be non-negative, got"),
    (
      np.ones((3, 2)),
      np.ones(3),
      {"w": np.ones(2)},
      "w must have shape (3,) = (n,), got (2,)",
    ),
    (
      np.ones((3, 2)),
      np.ones(3),
      {"x0": np.zeros(3)},
      "x0 must have shape (2,) = (d,), got (3,)",
    ),
  ],
)
def test_refused_arguments(a, b, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    fit_softmax_resnet(a, b, **options)


@pytest.mark.parametrize(
  ("alpha_min", "message"),
  [(0.0, "positive, got 0.0"), (2.0, "in [0, 1], got 2.0")],
)
def test_refused_domains(alpha_min, message):
  with pytest.raises(
    ValueError, match=re.escape(f"alpha_min must be {message}")
  ):
    softmax_resnet.problem(alpha_min=alpha_min)


@pytest.mark.parametrize("function", ["predict", "log_alpha"])
def test_refused_scales(function):
  call = getattr(softmax_resnet, function)
  with pytest.raises(ValueError, match="residual_scale must be a real scalar"):
    call(jnp.ones(2), jnp.eye(2), residual_scale=jnp.ones(2))


def test_ridge_and_scale_may_be_mapped_over():
  data, x = _random()

  def total(ridge, rho):
    made = softmax_resnet.prepare(
      data.a, data.b, ridge=ridge, residual_scale=rho
    )
    f = softmax_resnet.predict(x, data.a, residual_scale=rho)
    return softmax_resnet.loss(x, made), f

  ridges, scales = jnp.array([0.0, 0.1]), jnp.array([0.3, 1.0])
  together = jax.vmap(total)(ridges, scales)
  for i in range(2):
    alone = total(float(ridges[i]), float(scales[i]))
    for got, want in zip(together, alone):
      np.testing.assert_allclose(got[i], want, rtol=1e-12)


@pytest.mark.parametrize("which", ["a", "b"])
def test_data_that_are_not_finite(which):
  data, _ = _instance(50, 3)
  arrays = {"a": data.a, "b": data.b}
  arrays[which] = arrays[which].at[0].set(np.nan)
  found = fit_softmax_resnet(**arrays)
  assert found.reason == 4
  assert not found.x.any()
