"""Flow matching: losses, the polynomial regularizer, exact velocities."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from scipy import integrate as quadrature

from jaxattn.sampling import (
  cfm_loss,
  empirical_velocity,
  flow_loss,
  gaussian_cfm_floor,
  gaussian_velocity,
  gd_view,
  gmm_denoise,
  gmm_init,
  gmm_velocity,
  integrate,
  memorization_ratio,
  ou,
  path_sample,
  polynomial_basis,
  polynomial_regularizer,
  straight,
  time_grid,
)
from tests._recompile import no_recompilation, quick_jit

_KEY = jax.random.key(0)
_TIMES = (0.0, 0.3, 0.6, 0.95)


def _gaussian(d=4, seed=0):
  """A mean and a covariance."""
  rng = np.random.default_rng(seed)
  root = rng.normal(size=(d, d))
  cov = root @ root.T / d + 0.1 * np.eye(d)
  return jnp.asarray(rng.normal(size=d)), jnp.asarray(cov)


def _root(cov):
  values, vectors = np.linalg.eigh(cov)
  return (vectors * np.sqrt(values)) @ vectors.T


def _normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


# --- the velocity of a Gaussian ---


def test_velocity_is_the_regression_of_the_target():
  mean, cov = _gaussian()
  n, t = 400_000, 0.6
  rng = np.random.default_rng(1)
  y = np.asarray(mean) + rng.normal(size=(n, 4)) @ np.linalg.cholesky(cov).T
  x, u = path_sample(_KEY, jnp.asarray(y), jnp.asarray(t), schedule=straight())
  x, u = np.asarray(x), np.asarray(u)
  design = np.concatenate([np.ones((n, 1)), x], axis=1)
  coef = np.linalg.solve(design.T @ design, design.T @ u)
  points = np.concatenate([np.zeros((1, 4)), np.eye(4)])
  want = gaussian_velocity(jnp.asarray(points), t, mean, cov)
  got = np.concatenate([np.ones((5, 1)), points], axis=1) @ coef
  assert np.abs(got - want).max() < 0.03


@pytest.mark.parametrize("t", _TIMES)
def test_velocity_is_that_of_a_mixture_of_one(t):
  mean, cov = _gaussian()
  x = 2 * _normal(7, 4, seed=2)
  gmm = gmm_init([1.0], mean[None], cov[None])
  want = gmm_velocity(gmm, x, t, schedule=straight())
  got = gaussian_velocity(x, t, mean, cov)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  # One time and one mean for each row.
  times, means = jnp.full(7, t), jnp.tile(mean, (7, 1))
  got = gaussian_velocity(x, times, means, cov)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  # A diagonal.
  diagonal = jnp.diag(cov)
  want = gaussian_velocity(x, t, mean, jnp.diag(diagonal))
  got = gaussian_velocity(x, t, mean, diagonal)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_flow_map():
  """m + root z, by a method of order 4; an error of order 1 by Euler's."""
  mean, cov = _gaussian()
  z = _normal(64, 4, seed=3)
  want = mean[None] + z @ _root(cov)
  velocity = functools.partial(gaussian_velocity, mean=mean, cov=cov)
  error = {}
  for method, n in (("rk4", 64), ("rk4", 128), ("euler", 64), ("euler", 128)):
    x = integrate(velocity, z, jnp.linspace(0, 1, n + 1), method=method)
    error[method, n] = np.sqrt(((x - want) ** 2).mean())
  assert error["rk4", 128] < 1e-9
  slope = {m: np.log2(error[m, 64] / error[m, 128]) for m in ("rk4", "euler")}
  assert 3.8 < slope["rk4"] < 4.2
  assert 0.9 < slope["euler"] < 1.1


def test_excess_bounds_the_distance():
  """W2^2 <= e^(1 + 2 l) excess, by Gronwall, of a field l-Lipschitz in x."""
  mean, cov = jnp.zeros(2), jnp.array([0.5, 2.0])
  bias = jnp.array([0.3, -0.4])
  z = _normal(2000, 2)

  def biased(x, t):
    return gaussian_velocity(x, t, mean, cov) + bias[None] * t

  x = integrate(biased, z, jnp.linspace(0, 1, 65), method="rk4")
  t = np.linspace(0, 1, 201)[:, None]
  values = np.asarray(cov)
  rates = (t * values - (1 - t)) / (t**2 * values + (1 - t) ** 2)
  # Of a bias b t: the integral of its square.
  bound = np.exp(1 + 2 * np.abs(rates).max()) * float(bias @ bias) / 3
  # Points of one noise are a coupling, hence no nearer than W2.
  squared = ((x - z * jnp.sqrt(cov)[None]) ** 2).sum(1).mean()
  assert 0.01 < squared < bound


def test_floor():
  mean, cov = _gaussian()
  values = np.linalg.eigvalsh(cov)
  want = sum(
    quadrature.quad(lambda t, v=v: v / (t**2 * v + (1 - t) ** 2), 0, 1)[0]
    for v in values
  )
  np.testing.assert_allclose(gaussian_cfm_floor(cov), want, rtol=1e-10)
  np.testing.assert_allclose(gaussian_cfm_floor(jnp.asarray(values)), want)

  n = 1_000_000

  @quick_jit
  def measured(rng):
    rng_y, rng_loss = jax.random.split(rng)
    y = jax.random.normal(rng_y, (n, 4)) @ jnp.linalg.cholesky(cov).T

    def velocity(x, t, cond):
      return gaussian_velocity(x, t, mean, cov)

    return cfm_loss(rng_loss, velocity, y + mean[None], None)

  loss, info = measured(_KEY)
  assert abs(loss / want - 1) < 0.005
  # It is not the tolerance that makes it pass.
  assert abs(loss - want) < 4 * info.squares.std() / n**0.5
  np.testing.assert_allclose(info.per_dim, loss / 4)


# --- the loss ---


def test_loss_of_a_biased_velocity():
  mean, cov = _gaussian()
  n, b = 50_000, jnp.array([0.5, -1.0, 0.0, 2.0])
  y = mean[None] + _normal(n, 4, seed=4) @ np.linalg.cholesky(cov).T

  @quick_jit
  def losses(rng):
    def best(x, t, cond):
      return gaussian_velocity(x, t, mean, cov)

    def biased(x, t, cond):
      return best(x, t, cond) + b[None]

    # The gradient in a bias tells the mean residual.
    def shifted(a):
      return cfm_loss(rng, lambda *z: best(*z) + a[None], y, None)[0]

    loss, info = cfm_loss(rng, best, y, None)
    slope = jax.grad(shifted)(jnp.zeros(4))
    return loss, info.squares, cfm_loss(rng, biased, y, None)[0], slope / 2

  loss, squares, shifted, residual = losses(_KEY)
  want = b @ b + 2 * b @ residual
  np.testing.assert_allclose(shifted - loss, want, rtol=1e-5)
  # Zero on average: each coordinate has less variance than all together.
  assert jnp.abs(residual).max() < 4 * jnp.sqrt(squares.mean() / n)


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_target_is_the_derivative_of_the_path(sigma_min):
  y, t = _normal(5, 3), jnp.linspace(0.05, 0.9, 5)
  path = functools.partial(path_sample, _KEY, y, schedule=straight(sigma_min))
  _, rate = jax.jvp(lambda t: path(t)[0], (t,), (jnp.ones(5),))
  np.testing.assert_allclose(path(t)[1], rate, rtol=1e-12)


def test_loss_leaves_noise_at_the_end():
  """With sigma_min the velocity of the path is 0 excess for one point."""
  sigma, point = 0.25, jnp.array([1.0, -2.0])
  schedule = straight(sigma)

  def best(x, t, cond):
    z = (x - t[:, None] * point[None]) / schedule.noise(t)[:, None]
    return point[None] - (1 - sigma) * z

  y = jnp.tile(point, (100, 1))
  assert cfm_loss(_KEY, best, y, None, schedule=schedule)[0] < 1e-20
  assert cfm_loss(_KEY, best, y, None)[0] > 1e-3


def test_times():
  y = jnp.zeros((1001, 1))

  def zero(x, t, cond):
    return jnp.zeros_like(x)

  times = {
    name: np.asarray(cfm_loss(_KEY, zero, y, None, t_sampler=name)[1].t)
    for name in ("uniform", "antithetic", "logit_normal")
  }
  pairs = times["antithetic"]
  np.testing.assert_allclose(pairs[:500] + pairs[501:], 1)
  for name in ("uniform", "antithetic"):
    assert abs(times[name].mean() - 0.5) < 4 / np.sqrt(12 * 1001)
    assert abs(times[name].var() - 1 / 12) < 0.01
  logits = np.log(times["logit_normal"] / (1 - times["logit_normal"]))
  assert abs(logits.mean()) < 4 / np.sqrt(1001)
  assert abs(logits.std() - 1) < 4 / np.sqrt(2 * 1001)


def test_antithetic_times_lose_variance():
  """An error of t leaves 1/8 of the variance of t^2, by a short integral."""
  y = jnp.zeros((64, 1))

  def velocity(x, t, cond):
    return (-x + t[:, None] - t[:, None] ** 2) / (1 - t[:, None])

  def spread(name):
    def loss(rng):
      return cfm_loss(rng, velocity, y, None, t_sampler=name)[0]

    return quick_jit(jax.vmap(loss))(jax.random.split(_KEY, 1000)).var()

  np.testing.assert_allclose(spread("uniform"), 4 / 45 / 64, rtol=0.2)
  np.testing.assert_allclose(spread("antithetic"), 1 / 90 / 64, rtol=0.2)


# --- gradient descent ---


def test_euler_is_gradient_descent():
  mean, cov = _gaussian()
  gmm = gmm_init([1.0], mean[None], cov[None])
  x, t, h = _normal(6, 4), 0.35, 0.1
  denoised = gmm_denoise(gmm, x, t, schedule=straight())
  view = gd_view(x, t, h, denoised)
  euler = x + h * gaussian_velocity(x, t, mean, cov)
  np.testing.assert_allclose(view.x_next, euler, rtol=0, atol=2e-15)

  def objective(x):
    return ((x - denoised) ** 2).sum() / 2

  np.testing.assert_allclose(view.objective.sum(), objective(x))
  descent = x - view.gd_step_size * jax.grad(objective)(x)
  np.testing.assert_allclose(view.x_next, descent, rtol=0, atol=2e-15)
  # One time and step for each row.
  rows = gd_view(x, jnp.full(6, t), jnp.full(6, h), denoised)
  np.testing.assert_array_equal(rows.x_next, view.x_next)


def test_steps_of_uniform_grids():
  """1 / (N - k): the last is 1, and lands on the denoised point."""
  n = 8
  ts = jnp.linspace(0, 1, n + 1)
  x, denoised = _normal(4, 2), _normal(4, 2, seed=1)
  sizes = [gd_view(x, t, 1 / n, denoised).gd_step_size for t in ts[:-1]]
  np.testing.assert_allclose(sizes, [1 / (n - k) for k in range(n)])
  last = gd_view(x, ts[-2], 1 / n, denoised)
  np.testing.assert_allclose(last.x_next, denoised, rtol=0, atol=1e-15)


@pytest.mark.parametrize("n", [1, 3, 7, 50])
def test_a_point_is_reached_in_any_number_of_steps(n):
  point = jnp.array([1.0, -2.0])

  def velocity(x, t):
    return gaussian_velocity(x, t, point, jnp.zeros(2))

  x = integrate(
    velocity, _normal(5, 2), jnp.linspace(0, 1, n + 1), method="euler"
  )
  np.testing.assert_allclose(x, np.tile(point, (5, 1)), rtol=0, atol=1e-14)


def test_log_grid_contracts():
  point, n = jnp.array([1.0, -2.0]), 12
  ts = time_grid(n, kind="log", t_min=0.0, t_max=0.99, schedule=straight())
  zeta = 1 - 0.01 ** (1 / n)

  def velocity(x, t):
    return gaussian_velocity(x, t, point, jnp.zeros(2))

  z = _normal(5, 2)
  for k in (1, 5, n):
    x = integrate(velocity, z, ts[: k + 1], method="euler")
    want = (1 - zeta) ** k * jnp.linalg.norm(z - point[None], axis=1)
    got = jnp.linalg.norm(x - point[None], axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-12)
  size = gd_view(z, ts[3], ts[4] - ts[3], z).gd_step_size
  np.testing.assert_allclose(size, zeta, rtol=1e-12)


# --- polynomials ---


@pytest.mark.parametrize(("length", "degree"), [(24, 6), (24, 23), (96, 95)])
def test_basis_is_orthonormal(length, degree):
  basis = np.asarray(polynomial_basis(length, degree))
  np.testing.assert_allclose(basis.T @ basis, np.eye(degree + 1), atol=1e-12)
  # Of the degree that they say, and growing towards the end.
  tau, size = np.linspace(-1, 1, length), min(degree + 1, 9)
  powers = np.polynomial.legendre.legvander(tau, size - 1)
  coef, rest = np.linalg.lstsq(powers, basis[:, :size], rcond=None)[:2]
  assert rest.max() < 1e-20
  np.testing.assert_allclose(coef, np.triu(coef), atol=1e-10)
  assert (np.diag(coef) > 0).all()


def test_analytic_functions_are_nearly_polynomials():
  errors = []
  f = np.exp(np.linspace(-1, 1, 24))
  for degree in range(1, 7):
    q = np.asarray(polynomial_basis(24, degree))
    errors.append(np.linalg.norm(f - q @ (q.T @ f)))
  want = [0.867, 0.148, 0.0189, 1.93e-3, 1.62e-4, 1.15e-5]
  np.testing.assert_allclose(errors, want, rtol=5e-3)


def test_noise_in_polynomials():
  """K + 1 of the T dimensions of noise are left."""
  q = np.asarray(polynomial_basis(24, 3))
  noise = np.random.default_rng(0).normal(size=(200_000, 24))
  left = ((noise @ q) ** 2).sum(1)
  # A chi-squared variable of 4 degrees has a variance of 8.
  assert abs(left.mean() - 4) < 4 * np.sqrt(8 / len(noise))


def test_polynomials_cost_nothing():
  tau = jnp.linspace(-1, 1, 12)
  end = jnp.stack([tau**2 - tau, 3 * tau + 1], axis=1)[None].repeat(3, 0)
  t, v = jnp.array([0.1, 0.5, 0.9]), _normal(3, 12, 2)
  x = end - (1 - t)[:, None, None] * v
  basis = polynomial_basis(12, 11)
  hard = (jnp.arange(12) > 2).astype(float)
  assert polynomial_regularizer(x, t, v, basis, hard) < 1e-25
  above = (jnp.arange(12) > 1).astype(float)
  assert polynomial_regularizer(x, t, v, basis, above) > 0.1


def test_minimizer_of_the_regularized_loss():
  """In closed form, of the loss as it is computed."""
  length, k, weight, t = 10, 2, 7.0, 0.3
  x, best = _normal(length), _normal(length, seed=1)
  basis = polynomial_basis(length, length - 1)
  hard = (jnp.arange(length) > k).astype(float)

  def loss(v):
    x_t, v_t = (y[None, :, None] for y in (x, v))
    penalty = polynomial_regularizer(x_t, jnp.full(1, t), v_t, basis, hard)
    return ((v - best) ** 2).sum() + weight * penalty

  zero = jnp.zeros(length)
  hessian, grad = quick_jit(
    lambda v: (jax.hessian(loss)(v), jax.grad(loss)(v))
  )(zero)
  found = -jnp.linalg.solve(hessian, grad)
  project = basis[:, : k + 1] @ basis[:, : k + 1].T
  off = jnp.eye(length) - project
  want = off @ best - weight * (1 - t) * (off @ x)
  want = project @ best + want / (1 + weight * (1 - t) ** 2)
  np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)


def _linear(params, x, t, history):
  return params["x"] * x + params["h"] * history.mean(1, keepdims=True)


def test_loss_of_a_forecaster():
  params = {"x": 0.4, "h": -0.3}
  batch = _normal(16, 7, 2), _normal(16, 6, 2, seed=1)
  loss = functools.partial(flow_loss, _KEY, params, batch, apply_fn=_linear)
  plain, _ = cfm_loss(
    _KEY, functools.partial(_linear, params), batch[1], batch[0]
  )
  zero, info = loss(reg_weight=0.0)
  # Bit by bit.
  assert zero == plain == info.cfm
  total, info = loss(reg_weight=3.0, degree=1)
  np.testing.assert_allclose(total, info.cfm + 3 * info.regularizer)
  # The smooth form is milder, the more so for low degrees.
  smooth = loss(reg_weight=3.0, degree=1, kind="smooth")[1].regularizer
  assert 0 < smooth < info.regularizer
  # All degrees are free.
  assert loss(degree=5)[1].regularizer == 0
  assert loss(degree=5, kind="smooth")[1].regularizer == 0
  traced, _ = jax.jit(lambda w: loss(reg_weight=w, degree=1))(3.0)
  np.testing.assert_allclose(traced, total)


def test_regularizer_by_projection():
  x, t, v = (
    _normal(3, 8, 2),
    jnp.array([0.0, 0.4, 1.0]),
    _normal(3, 8, 2, seed=1),
  )
  q = np.asarray(polynomial_basis(8, 2))
  end = np.asarray(x + (1 - t)[:, None, None] * v)
  off = end - np.einsum("tk,sk,bsc->btc", q, q, end)
  hard = (jnp.arange(8) > 2).astype(float)
  got = polynomial_regularizer(x, t, v, polynomial_basis(8, 7), hard)
  np.testing.assert_allclose(got, (off**2).sum() / 3)


# --- finite data ---


def test_one_point_is_a_point():
  x, t, point = _normal(5, 3), jnp.linspace(0, 1, 5), _normal(1, 3, seed=1)
  got = empirical_velocity(x, t, point)
  want = gaussian_velocity(x, t, point[0], jnp.zeros(3))
  np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("t", _TIMES)
def test_data_are_a_mixture_of_points(t):
  x, data = _normal(6, 3), 2 + _normal(9, 3, seed=1)
  weights = np.random.default_rng(2).dirichlet(np.ones(9))
  gmm = gmm_init(weights, data, jnp.zeros(9))
  want = gmm_velocity(gmm, x, t, schedule=straight())
  got = empirical_velocity(x, t, data, log_weights=7 + jnp.log(weights))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
  # What has no weight is not there.
  some = jnp.arange(9) < 4
  got = empirical_velocity(x, t, data, log_weights=jnp.where(some, 0, -jnp.inf))
  want = empirical_velocity(x, t, data[:4])
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


def _empirical(data, x, t):
  return empirical_velocity(x, t, data)


def test_samples_end_on_the_data():
  data, z = _normal(20, 3), _normal(50, 3, seed=1)

  def gaps(x):
    return np.linalg.norm(x[:, None] - data[None], axis=2).min(1)

  ends = functools.partial(integrate, functools.partial(_empirical, data), z)
  ts = jnp.linspace(0, 1, 201)
  x = ends(ts, method="euler")
  assert gaps(x).max() < 1e-9
  assert memorization_ratio(x, data) < 1e-9
  # The last of four evaluations is at t = 1 and on the point, hence 0: one
  # sixth of the last step is missing, whatever the number of steps.
  before, after = (gaps(ends(s, method="rk4")) for s in (ts[:-1], ts))
  np.testing.assert_allclose(after, before / 6, rtol=1e-6)


@pytest.mark.any_x64
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_low_precision(dtype):
  rng = np.random.default_rng(0)
  x, data = (jnp.asarray(rng.normal(size=(n, 3)), dtype) for n in (6, 9))
  t = jnp.linspace(0, 1, 6, dtype=jnp.float32)
  mean, cov = jnp.zeros(3, dtype), jnp.ones(3, dtype)
  assert gaussian_velocity(x, t, mean, cov).dtype == dtype
  assert gd_view(x, t * 0.9, 0.1, x).x_next.dtype == dtype
  got = empirical_velocity(x, t, data)
  assert got.dtype == dtype
  assert jnp.isfinite(got).all()
  loss, _ = cfm_loss(_KEY, lambda x, t, c: jnp.zeros_like(x), x, None)
  assert loss.dtype == jnp.float32


@pytest.mark.any_x64
def test_single_precision_near_the_end():
  """The nearest of close data far from 0 is still told."""
  data = jnp.asarray([[100.0, 0.0], [100.5, 0.0]], jnp.float32)
  t = 0.9999
  x = jnp.asarray(t, jnp.float32) * data
  got = empirical_velocity(x, t, data)
  np.testing.assert_allclose(got, (data - x) / np.float32(1 - t), rtol=0.02)


def test_gradients_are_finite():
  data = _normal(9, 3)

  def total(x, t):
    return empirical_velocity(x, t, data).sum()

  times = jnp.array([0.0, 0.5, 1.0])
  for grad in jax.grad(total, (0, 1))(_normal(3, 3, seed=1), times):
    assert jnp.isfinite(grad).all()


def test_no_recompilation():
  mean, cov = _gaussian()
  x = _normal(6, 4)

  def calls(x, t):
    gaussian_velocity(x, t, mean, cov)
    empirical_velocity(x, t, x)
    gd_view(x, t, 0.1, x)

  calls(x, 0.5)
  with no_recompilation():
    calls(x, 0.25)


# --- what is refused ---

_X, _Y = np.zeros((5, 4)), np.zeros((5, 4, 1))
_ZERO = lambda x, t, cond: x  # noqa: E731
_MODEL = lambda params, x, t, history: x  # noqa: E731
_COV = np.eye(4)
_loss = functools.partial(cfm_loss, _KEY, _ZERO)
_total = functools.partial(flow_loss, _KEY, None, (_Y, _Y), apply_fn=_MODEL)
_penalty = polynomial_regularizer
_REFUSED = [
  (lambda: _loss(np.zeros(5), None), "y must be (B, ...) and not empty, got"),
  (lambda: _loss(np.zeros((5, 4), int), None), "y must have a floating dtype"),
  (lambda: _loss(np.full((5, 4), np.nan), None),
   "y must be finite, got 20 entries"),
  (lambda: _loss(_X, None, t_sampler="beta"), "t_sampler must be one of"),
  (lambda: _loss(_X, None, schedule=ou()), "schedule must have its data at"),
  (lambda: cfm_loss(_KEY, lambda x, t, c: x[0], _X, None),
   "the velocity must have shape (5, 4)"),
  (lambda: straight(1.0), "sigma_min must be below 1"),
  (lambda: straight(-0.1), "sigma_min must be in [0, 1]"),
  (lambda: _total(reg_weight=-1.0), "reg_weight must be non-negative, got -1"),
  (lambda: _total(degree=4), "degree must be in [0, 3], got 4"),
  (lambda: _total(kind="soft"), "kind must be one of 'hard', 'smooth'"),
  (lambda: polynomial_basis(4, 4), "degree must be in [0, 3], got 4"),
  (lambda: polynomial_basis(0, 0), "length must be >= 1, got 0"),
  (lambda: _penalty(_Y, np.full(5, 1.5), _Y, _COV, np.ones(4)),
   "t must be in [0, 1.0]"),
  (lambda: _penalty(_Y, np.ones(5), _Y, np.eye(3), np.ones(3)),
   "basis must have shape (4, *) = (T, K)"),
  (lambda: _penalty(_Y, np.ones(5), _Y, _COV, -np.ones(4)),
   "weights must be non-negative"),
  (lambda: _penalty(_Y, np.ones(5), _X, _COV, np.ones(4)), "v must have shape"),
  (lambda: gaussian_velocity(_X, 1.1, _X[0], _COV), "t must be in [0, 1.0]"),
  (lambda: gaussian_velocity(_X, np.ones(4), _X[0], _COV),
   "t must have shape (5,)"),
  (lambda: gaussian_velocity(_X, 0.5, np.zeros(3), _COV),
   "mean must have shape (4,)"),
  (lambda: gaussian_velocity(_X, 0.5, _X[0], np.eye(3)),
   "cov must have shape (4, 4) or (4,), got (3, 3)"),
  (lambda: gaussian_velocity(_X, 0.5, _X[0], -_COV),
   "cov must be positive semidefinite, got a least eigenvalue of -1"),
  (lambda: gaussian_velocity(_X, 0.5, _X[0], _COV + np.eye(4, k=1)),
   "cov must be symmetric"),
  (lambda: gaussian_velocity(np.zeros(()), 0.5, _X[0], _COV),
   "x must have 1 or more dimensions"),
  (lambda: gaussian_cfm_floor(-np.ones(3)),
   "cov must be positive semidefinite"),
  (lambda: gaussian_cfm_floor(np.ones((3, 2))), "cov must have shape (3, 3)"),
  (lambda: empirical_velocity(_X, -0.1, _X), "t must be in [0, 1.0], got -0.1"),
  (lambda: empirical_velocity(_X, 0.1, np.zeros((3, 2))),
   "data must have shape (*, 4)"),
  (lambda: empirical_velocity(_X, 0.1, _X[:0]), "data must hold a point"),
  (lambda: empirical_velocity(_X, 0.1, _X, log_weights=np.ones(3)),
   "log_weights must have shape (5,)"),
  (lambda: gd_view(_X, 1.0, 0.1, _X), "t must be below 1, got 1"),
  (lambda: gd_view(_X, 0.0, np.ones(4), _X), "step_size must have shape (5,)"),
  (lambda: gd_view(_X, 0.0, 0.1, _X[0]), "denoised must have shape (5, 4)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), _REFUSED)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


def test_traced_times_are_checked_on_request():
  def velocity(t):
    return empirical_velocity(jnp.zeros(2), t, jnp.ones((1, 2)))

  error, _ = checkify.checkify(jax.jit(velocity))(1.5)
  assert "t must be in [0, 1.0], got 1.5" in (error.get() or "")
  assert checkify.checkify(jax.jit(velocity))(0.5)[0].get() is None
  # Unasked, nothing is checked, and nothing clipped but 1 - t.
  assert jnp.isfinite(jax.jit(velocity)(1.5)).all()
