"""How smooth scores are, and the bounds on solvers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxattn.sampling import (
  ddpm_kl_bound,
  dpom_steps,
  dpum_steps,
  gmm_denoise,
  gmm_init,
  gmm_init_kl_bound,
  gmm_sample,
  gmm_score,
  gmm_score_jacobian,
  gmm_score_lipschitz_bound,
  gmm_second_moment,
  ou,
  perturbed_score,
  score_from_denoiser,
  straight,
  tv_kl_1d,
)
from tests.sampling._mixtures import line_mixture, random_mixture


def _repeated(gmm, copies):
  """The same density from more components."""
  return gmm._replace(
    log_weights=jnp.tile(gmm.log_weights - np.log(copies), copies),
    means=jnp.tile(gmm.means, (copies, 1)),
    eigenvalues=jnp.tile(gmm.eigenvalues, (copies, 1)),
    eigenvectors=jnp.tile(gmm.eigenvectors, (copies, 1, 1)),
  )


# --- the Lipschitz constant ---


def _spectra(gmm, x, t):
  """Extreme eigenvalues of the Jacobian at each point."""
  values = jnp.linalg.eigvalsh(gmm_score_jacobian(gmm, x, t))
  return values[:, 0], values[:, -1]


@pytest.mark.parametrize("kind", ["full", "shared"])
def test_no_point_violates_a_bound(kind):
  gmm = random_mixture(6, 3, kind=kind)

  @jax.jit
  @jax.vmap
  def found(rng, t):
    rng_x, rng_wide = jax.random.split(rng)
    near = gmm_sample(rng_x, gmm, 4000, t)
    wide = 6 * jax.random.normal(rng_wide, (3000, 3))
    x = jnp.concatenate([near, wide])
    centers = jnp.exp(-t) * gmm.means
    radius = jnp.linalg.norm(x[:, None] - centers[None], axis=-1).max(1)
    local = jax.vmap(lambda r: gmm_score_lipschitz_bound(gmm, t, radius=r))(
      radius
    )
    v = jnp.exp(-2 * t) * gmm.eigenvalues - jnp.expm1(-2 * t)
    everywhere = gmm_score_lipschitz_bound(gmm, t)
    return *_spectra(gmm, x, t), local, 1 / v.min(), everywhere

  rngs = jax.random.split(jax.random.key(0), 3)
  low, high, local, inverse, everywhere = map(
    np.asarray, found(rngs, jnp.array([0.0, 0.3, 1.0]))
  )
  size = np.maximum(np.abs(low), np.abs(high))
  assert (low >= -inverse[:, None] * (1 + 1e-12)).all()
  assert (size <= local * (1 + 1e-12)).all()
  if kind == "shared":
    assert (size.max(1) <= everywhere * (1 + 1e-12)).all()
    # And it is no empty promise.
    assert (size.max(1) >= 0.3 * everywhere).all()
  else:
    assert (everywhere == np.inf).all()


def test_two_components_attain_the_bound():
  means = jnp.array([[2.0, 0.0, 1.0], [-2.0, 0.0, -1.0]])
  gmm = gmm_init([0.5, 0.5], means, [0.7, 0.7])
  bound = gmm_score_lipschitz_bound(gmm, 0.2)
  top = jnp.linalg.eigvalsh(gmm_score_jacobian(gmm, jnp.zeros(3), 0.2))[-1]
  np.testing.assert_allclose(top, bound, rtol=1e-14)


def test_crossing_covariances_have_no_global_constant():
  gmm = gmm_init([0.5, 0.5], jnp.zeros((2, 2)), [[1.0, 4.0], [4.0, 1.0]])
  x = jnp.array([1.0, 10.0, 100.0])[:, None] * jnp.ones((1, 2))
  _, top = _spectra(gmm, x, 0.1)
  np.testing.assert_allclose(top, [-0.39, 24.6, 2525], rtol=0.01)
  assert 95 <= top[2] / top[1] <= 110
  assert gmm_score_lipschitz_bound(gmm, 0.1) == np.inf
  # Within a radius there is one.
  local = gmm_score_lipschitz_bound(gmm, 0.1, radius=100 * np.sqrt(2))
  assert top[2] <= local < np.inf


@pytest.mark.parametrize("kind", ["full", "shared"])
def test_bounds_do_not_depend_on_the_number_of_components(kind):
  gmm = random_mixture(3, 4, kind=kind)
  if kind == "shared":
    gmm = gmm._replace(
      eigenvalues=jnp.tile(gmm.eigenvalues, (3, 1)),
      eigenvectors=jnp.tile(gmm.eigenvectors, (3, 1, 1)),
    )
  more = _repeated(gmm, 4)

  @jax.jit
  def found(gmm):
    return (
      gmm_score_lipschitz_bound(gmm, 0.3),
      gmm_score_lipschitz_bound(gmm, 0.3, radius=2.0),
      gmm_second_moment(gmm, 0.3),
      gmm_init_kl_bound(gmm, 3.0),
    )

  np.testing.assert_allclose(found(more), found(gmm), rtol=1e-14)


def test_bounds_on_the_straight_path():
  gmm = random_mixture(4, 3, kind="isotropic")
  gmm = gmm._replace(eigenvalues=jnp.full((4, 1), 0.3))
  bound = functools.partial(gmm_score_lipschitz_bound, schedule=straight())
  np.testing.assert_allclose(bound(gmm, 0.0), 1.0, rtol=1e-14)
  np.testing.assert_allclose(
    bound(gmm, 1.0), gmm_score_lipschitz_bound(gmm, 0.0), rtol=1e-14
  )


@pytest.mark.any_x64
def test_bounds_of_16_bits_are_computed_in_32():
  rng = np.random.default_rng(0)
  # More terms than 8 bits can count.
  means = jnp.asarray(rng.normal(size=(300, 8)), jnp.bfloat16)
  gmm = gmm_init(np.full(300, 1 / 300), means, np.full(300, 0.5))

  @jax.jit
  def found(gmm):
    return (
      gmm_score_lipschitz_bound(gmm, 0.3),
      gmm_second_moment(gmm, 0.3),
      gmm_init_kl_bound(gmm, 1.0),
    )

  wide = found(jax.tree.map(lambda x: x.astype(jnp.float32), gmm))
  for got, want in zip(found(gmm), wide):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


# --- moments, and the cost of starting from noise ---


def test_second_moment_of_samples():
  gmm, n = random_mixture(5, 3, kind="diagonal"), 400_000
  x = np.asarray(gmm_sample(jax.random.key(0), gmm, n, 0.3))
  found = gmm_second_moment(gmm, 0.3)
  np.testing.assert_allclose((x**2).sum(1).mean(), found, rtol=5e-3)


def test_second_moment_at_the_ends():
  gmm = random_mixture(5, 3)
  weights = np.exp(gmm.log_weights)
  each = np.sum(gmm.means**2 + gmm.eigenvalues, axis=1)
  np.testing.assert_allclose(gmm_second_moment(gmm, 0.0), weights @ each)
  np.testing.assert_allclose(gmm_second_moment(gmm, 50.0), 3.0)
  for t in (0.0, 0.5, 2.0):
    assert gmm_second_moment(gmm, t) <= max(each.max(), 3) * (1 + 1e-14)


def _kl_to_noise(gmm, t):
  """By quadrature, in one dimension."""
  a, b2 = np.exp(-t), -np.expm1(-2 * t)
  v = a**2 * np.asarray(gmm.eigenvalues)[:, 0] + b2
  weights, means = np.exp(gmm.log_weights), a * np.asarray(gmm.means)[:, 0]

  def term(x):
    p = weights @ (np.exp(-((x - means) ** 2) / (2 * v)) / np.sqrt(v))
    return p * (np.log(p) + x**2 / 2) / np.sqrt(2 * np.pi)

  return integrate.quad(term, -8, 8, epsabs=1e-13, limit=200)[0]


def test_cost_of_starting_from_noise():
  line, alone = line_mixture(), gmm_init([1.0], jnp.array([[1.5]]), [0.4])
  times = (1.0, 2.0, 3.0, 4.0)
  bounds = [float(gmm_init_kl_bound(line, t)) for t in times]
  costs = [_kl_to_noise(line, t) for t in times]
  np.testing.assert_allclose(costs, [0.0307, 2.2e-3, 2.6e-4, 3.4e-5], rtol=0.03)
  assert (np.array(costs) <= bounds).all()
  for t in times:
    exact = _kl_to_noise(alone, t)
    np.testing.assert_allclose(gmm_init_kl_bound(alone, t), exact, atol=1e-11)
  # It decays like e^(-2 T).
  for found in (costs, bounds):
    slope = np.polyfit(times[1:], np.log(found[1:]), 1)[0]
    assert -2.1 <= slope <= -1.9


# --- bounds on solvers ---


@functools.partial(jax.jit, static_argnames=("dim", "num_steps", "t_max"))
def _path_kl(v, num_steps, *, dim=1, t_max=5.0):
  """Of "ddpm" on N(0, v I): the error of the score along paths of that law."""
  gmm = gmm_init([1.0], jnp.zeros((1, dim)), jnp.array([v]))
  nodes, weights = np.polynomial.legendre.leggauss(8)
  h = t_max / num_steps
  start = jnp.linspace(t_max, 0.0, num_steps + 1)[:-1, None]
  t = start - h * jnp.asarray(nodes + 1)[None] / 2

  def slope(t):  # Of the score, which is linear.
    return gmm_score_jacobian(gmm, jnp.zeros(dim), t)

  def products(a, b):
    return jnp.einsum("nqij,nqij->nq", *jnp.broadcast_arrays(a, b))

  first, then = (jnp.vectorize(slope, signature="()->(d,d)")(s) for s in
                 (start, t))  # fmt: skip
  var_first, var_then = (jnp.exp(-2 * s) * v - jnp.expm1(-2 * s) for s in
                         (start, t))  # fmt: skip
  # E y_n y_t^T is e^-(t_n - t) V_t I.
  error = products(first, first) * var_first + products(then, then) * var_then
  error -= 2 * products(first, then) * jnp.exp(t - start) * var_then
  return (error * jnp.asarray(weights)[None] * h / 2).sum()


@pytest.mark.parametrize(
  ("v", "slope", "share"), [(0.1, 0.964, 0.021), (0.5, 0.992, 0.29)]
)
def test_path_divergence_of_ddpm(v, slope, share):
  found = {n: float(_path_kl(v, n)) for n in (200, 400)}
  np.testing.assert_allclose(np.log2(found[200] / found[400]), slope, atol=2e-3)
  steps = 25 / v**2 / 400
  np.testing.assert_allclose(found[400] / steps, share, rtol=0.03)
  for dim in (1, 7):
    of_dim = float(_path_kl(v, 400, dim=dim))
    # Linear in d, as components of a product are independent.
    np.testing.assert_allclose(of_dim, dim * found[400], rtol=1e-10)
    bound = functools.partial(
      ddpm_kl_bound,
      lipschitz=1 / v,
      dim=dim,
      t_max=5.0,
      num_steps=400,
      second_moment=dim * v,
    )
    plain = bound(score_error=0.0)
    assert of_dim <= plain
    start = bound(lipschitz=1e-9, score_error=0.0)
    np.testing.assert_allclose(plain - start, dim * steps, rtol=1e-10)
    np.testing.assert_allclose(
      bound(score_error=0.2) - plain, 5 * 0.04, rtol=1e-10
    )


@pytest.mark.slow
def test_marginal_divergence_is_below_that_of_paths():
  """Data processing, of N(0, v): the exact law at 0 against whole paths."""
  v, num_steps, t_max = 0.5, 40, 6.0
  gmm = gmm_init([1.0], jnp.zeros((1, 1)), [v])
  law = tv_kl_1d(gmm, method="ddpm", num_steps=num_steps, t_max=t_max)
  paths = _path_kl(v, num_steps, t_max=t_max) + gmm_init_kl_bound(gmm, t_max)
  assert 0 < law.kl <= paths
  assert law.tv <= np.sqrt(law.kl / 2)


def test_first_term_bounds_the_cost_of_starting_from_noise():
  gmm = line_mixture()
  for t_max in (1.0, 3.0, 5.0):
    start = ddpm_kl_bound(
      lipschitz=1e-9,
      dim=1,
      t_max=t_max,
      num_steps=1,
      score_error=0.0,
      second_moment=gmm_second_moment(gmm, 0.0),
    )
    assert _kl_to_noise(gmm, t_max) <= start + 1e-13


def test_orders_of_steps():
  assert dpom_steps(2.0, 16, 0.25) == 8 * 16 * 16
  assert dpum_steps(2.0, 16, 0.25) == 4 * 4 * 4


# --- other scores ---


def test_score_from_denoiser():
  gmm, x = random_mixture(3, 2), np.random.default_rng(0).normal(size=(6, 2))
  for path in (ou(), ou(0.5), straight()):

    @jax.jit
    def found(x, path=path):
      options = {"schedule": path}
      denoised = gmm_denoise(gmm, x, 0.4, **options)
      return (
        score_from_denoiser(x, 0.4, denoised, **options),
        gmm_score(gmm, x, 0.4, **options),
      )

    np.testing.assert_allclose(*found(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_error_of_a_perturbed_score(d):
  x = 3 * np.random.default_rng(0).normal(size=(50, d))
  worse = perturbed_score(jax.random.key(1), lambda x, t: -x, 0.3)
  error = np.asarray(worse(x, 1.0) + x)
  np.testing.assert_allclose(np.linalg.norm(error, axis=1), 0.3, rtol=1e-12)
  np.testing.assert_array_equal(worse(x, 2.0), worse(x, 1.0))
  other = perturbed_score(jax.random.key(4), lambda x, t: -x, 0.3)
  if d > 1:
    assert np.abs(error - error[0]).max() > 0.1
    assert np.abs(np.asarray(other(x, 1.0) + x) - error).max() > 0.1
    # Smooth: of the size of its norm times that of the frequency.
    slope = jax.jacobian(lambda x: worse(x, 1.0) + x)(x[0])
    assert np.linalg.norm(slope) < 0.3 * 4 * np.sqrt(d)


# --- refusals ---


def _bound(**options):
  call = {
    "lipschitz": 1.0, "dim": 1, "t_max": 1.0, "num_steps": 1,
    "score_error": 0.0, "second_moment": 1.0,
  }  # fmt: skip
  return ddpm_kl_bound(**call | options)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: gmm_score_lipschitz_bound(line_mixture(), 0.0, radius=0.0),
      "radius must be positive, got 0.0",
    ),
    (
      lambda: gmm_score_lipschitz_bound(line_mixture(), jnp.ones(2)),
      "t must be a real scalar",
    ),
    (lambda: _bound(lipschitz=0.0), "lipschitz must be positive, got 0.0"),
    (lambda: _bound(dim=0), "dim must be >= 1, got 0"),
    (lambda: _bound(t_max=0.0), "t_max must be positive, got 0.0"),
    (lambda: _bound(num_steps=0), "num_steps must be >= 1, got 0"),
    (lambda: _bound(score_error=-1.0), "score_error must be non-negative"),
    (lambda: _bound(second_moment=-1.0), "second_moment must be non-negative"),
    (lambda: dpum_steps(1.0, 4, 1.0), "eps must be in (0, 1), got 1.0"),
    (lambda: dpom_steps(-1.0, 4, 0.1), "lipschitz must be positive, got -1.0"),
    (
      lambda: perturbed_score(jax.random.key(0), lambda x, t: x, -0.1),
      "score_error must be non-negative, got -0.1",
    ),
    (
      lambda: score_from_denoiser(jnp.ones(2), 0.5, jnp.ones(3), schedule=ou()),
      "denoised must have shape (2,) = x.shape, got (3,)",
    ),
  ],
)
def test_refused_arguments(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
