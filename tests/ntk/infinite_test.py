"""Kernels of infinite width: against integrals, draws and derivatives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxattn.ntk import mlp_ntk, relu_covariance
from tests._recompile import no_recompilation


def _by_quadrature(cov, var1, var2):
  """2 E[relu relu] and 2 P[both > 0] by integrating over the angle of (u, v).

  In polar coordinates of the whitened pair the radius integrates to 1 and 1/2.
  """
  factor = np.linalg.cholesky(np.array([[var1, cov], [cov, var2]]))

  def uv(t):
    return factor @ np.array([np.cos(t), np.sin(t)])

  def both(t):
    return np.maximum(uv(t), 0).prod() * 2 / np.pi

  def positive(t):
    return (uv(t) > 0).all() / np.pi

  # The integrands break where u or v changes sign.
  breaks = [np.pi / 2, -np.pi / 2, np.arctan2(-factor[1, 0], factor[1, 1])]
  breaks += [breaks[2] + np.pi]
  return [
    integrate.quad(f, -np.pi, np.pi, points=breaks, limit=200)[0]
    for f in (both, positive)
  ]


@pytest.mark.parametrize(
  "cov", [(0.3, 1.0, 1.0), (-1.2, 2.0, 0.9), (0.0, 0.1, 4.0), (1.9, 2.0, 2.0)]
)
def test_relu_covariance_is_the_integral(cov):
  got = relu_covariance(*map(np.float64, cov))
  np.testing.assert_allclose(got, _by_quadrature(*cov), rtol=0, atol=1e-7)


def test_ends_zeros_and_broadcasting():
  cov = jnp.array([[1.5, 0.0], [-1.5, 0.0]])
  after, dot = relu_covariance(
    cov, jnp.array([[1.5], [1.5]]), jnp.array([[1.5, 0.0]])
  )
  np.testing.assert_allclose(after, [[1.5, 0], [0, 0]], atol=1e-15)
  np.testing.assert_allclose(dot, [[1, 0.5], [0, 0.5]], atol=1e-15)
  # Rounding that lifts a correlation above 1 does no harm.
  after, dot = relu_covariance(*map(jnp.float32, (1.0000001, 1.0, 1.0)))
  assert after == dot == 1


@pytest.mark.parametrize("value", [1.0, -1.0, 0.4])
def test_derivative_of_kappa_1_is_kappa_0(value):
  one = jnp.ones(())

  def kappa_1(rho):
    return relu_covariance(rho, one, one)[0]

  rho = jnp.float64(value)
  want = relu_covariance(rho, one, one)[1]
  np.testing.assert_allclose(jax.grad(kappa_1)(rho), want, rtol=1e-15)
  assert jnp.isfinite(jax.grad(jax.grad(kappa_1))(rho))


def test_derivatives_in_all_arguments():
  args = tuple(map(jnp.float64, (0.7, 1.3, 2.1)))

  def both(*args):
    return jnp.stack(relu_covariance(*args))

  got = jnp.stack(jax.jacobian(both, argnums=(0, 1, 2))(*args))
  for i, row in enumerate(got):
    up, down = (
      both(*(x + h * (i == j) for j, x in enumerate(args)))
      for h in (1e-6, -1e-6)
    )
    np.testing.assert_allclose(row, (up - down) / 2e-6, rtol=1e-8)


def test_derivatives_at_zero_inputs_and_at_equal_ones():
  x = jnp.array([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0]])

  def energy(x):
    return sum(k.sum() for k in mlp_ntk(x, depth=3))

  gradient = jax.grad(energy)(x)
  assert jnp.isfinite(energy(x))
  assert jnp.isfinite(gradient).all()
  # Twins push alike, and Euler's identity: the energy is homogeneous.
  np.testing.assert_allclose(gradient[1], gradient[2], rtol=1e-12)
  np.testing.assert_allclose((gradient * x).sum(), 2 * energy(x), rtol=1e-12)


def test_two_layers_by_hand():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((4, 3))
  norm = np.linalg.norm(x, axis=1)
  rho = np.clip(x @ x.T / np.outer(norm, norm), -1, 1)
  angle = np.arccos(rho)
  size = np.outer(norm, norm) / 3
  sigma = size * (rho * (np.pi - angle) + np.sin(angle)) / np.pi
  hidden = x @ x.T / 3 * (np.pi - angle) / np.pi
  nngp, ntk = mlp_ntk(x, depth=1)
  # This arccos of a correlation that rounds to just below 1 is off by 1e-8.
  np.testing.assert_allclose(nngp, sigma, rtol=0, atol=1e-8)
  np.testing.assert_allclose(ntk, hidden + sigma, rtol=0, atol=1e-7)
  only = mlp_ntk(x, depth=1, weight_scale=1.0, trainable="hidden")
  np.testing.assert_allclose(only[1], hidden / 2, rtol=0, atol=1e-7)
  np.testing.assert_allclose(only[0], sigma / 2, rtol=0, atol=1e-7)


# Upper triangles of (nngp, ntk) of neural-tangents 0.6.5 (stax, float64, JAX
# 0.4.35): Dense(W_std=1), Relu, (Dense(W_std=sqrt 2), Relu) for each further
# hidden layer, Dense(W_std=sqrt 2), no biases.
_STAX = {
  1: (
    [
      *(0.147800318201, 0.111601419996, 0.063373520102, 0.091464207300),
      *(0.142898898552, 0.036489092992, 0.136741736790),
      *(1.030873916846, 0.006235097067, 0.663823463868),
    ],
    [
      *(0.295600636401, 0.191278785900, 0.010436764516, 0.083366994728),
      *(0.285797797104, -0.029628260336, 0.178164512428),
      *(2.061747833692, -0.094072991408, 1.327646927736),
    ],
  ),
  3: (
    [
      *(0.147800318201, 0.120421812067, 0.213305443114, 0.186186371885),
      *(0.142898898552, 0.200991635375, 0.202695958746),
      *(1.030873916846, 0.410318537243, 0.663823463868),
    ],
    [
      *(0.591201272803, 0.331793686737, 0.316578708040, 0.317428479364),
      *(0.571595594209, 0.278614202775, 0.404910944131),
      *(4.123495667383, 0.542787552441, 2.655293855473),
    ],
  ),
}


@pytest.mark.parametrize("depth", [1, 3])
def test_equals_neural_tangents(depth):
  x = np.random.default_rng(0).standard_normal((4, 3))
  for got, want in zip(mlp_ntk(x, depth=depth), _STAX[depth]):
    np.testing.assert_allclose(
      got[np.triu_indices(4)], want, rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("trainable", ["all", "hidden"])
def test_recursion_by_hand(trainable):
  x = np.random.default_rng(5).standard_normal((4, 3))
  c, depth = 1.5, 3
  cov = x @ x.T / 3
  ntk = cov.copy()
  for layer in range(depth):
    std = np.sqrt(np.diag(cov))
    size = np.outer(std, std)
    rho = cov / size
    np.fill_diagonal(rho, 1)
    angle = np.arctan2(np.sqrt(np.maximum(1 - rho**2, 0)), rho)
    ntk = c / 2 * (1 - angle / np.pi) * ntk
    cov = c / 2 * size * (rho * (np.pi - angle) + np.sin(angle)) / np.pi
    if layer < depth - 1 or trainable == "all":
      ntk = ntk + cov
  got = mlp_ntk(x, depth=depth, weight_scale=c, trainable=trainable)
  np.testing.assert_allclose(got[0], cov, rtol=0, atol=1e-10)
  np.testing.assert_allclose(got[1], ntk, rtol=0, atol=1e-10)


@pytest.mark.any_x64
@pytest.mark.parametrize("size", [1e20, 1e-23])
def test_variances_whose_product_is_out_of_range(size):
  size = np.float32(size)
  one = np.ones((), np.float32)
  want, want_dot = relu_covariance(one / 2, one, one)
  got, dot = relu_covariance(size / 2, size, size)
  np.testing.assert_allclose(got / size, want, rtol=1e-6)
  np.testing.assert_allclose(dot, want_dot, rtol=1e-6)
  grad = jax.grad(lambda s: relu_covariance(s / 2, s, s)[0])(size)
  np.testing.assert_allclose(grad, want, rtol=1e-5)


@pytest.mark.any_x64
def test_rectangle_is_a_block_and_depth_0_is_linear():
  x = np.random.default_rng(1).standard_normal((6, 4)).astype("float32")
  whole = jnp.stack(mlp_ntk(x, depth=2))
  part = jnp.stack(mlp_ntk(x[:2], x[2:], depth=2))
  assert part.dtype == jnp.float32
  np.testing.assert_allclose(part, whole[:, :2, 2:], rtol=2e-6, atol=1e-6)
  for kernel in mlp_ntk(x, depth=0):
    np.testing.assert_allclose(kernel, x @ x.T / 4, rtol=1e-5, atol=1e-6)
  half = mlp_ntk(x.astype(jnp.bfloat16), depth=2)[1]
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    half.astype("float32"), whole[1], rtol=0.02, atol=0.02
  )


def test_diagonal_is_exact_in_float32():
  x = np.random.default_rng(2).standard_normal((5, 7)).astype("float32")
  nngp, ntk = mlp_ntk(x, depth=4)
  np.testing.assert_allclose(jnp.diag(nngp), (x**2).mean(1), rtol=1e-6)
  np.testing.assert_allclose(jnp.diag(ntk), 5 * (x**2).mean(1), rtol=1e-6)


def test_compiles_once():
  x = jnp.ones((3, 2))
  mlp_ntk(x, depth=2, weight_scale=1.5)
  with no_recompilation():
    mlp_ntk(x, depth=2, weight_scale=1.7)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: relu_covariance(jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.ones(3)),
      "cov, var1 and var2 must be broadcastable to one shape, got (2, 3), "
      "(3, 1) and (3,)",
    ),
    (
      lambda: relu_covariance(*map(jnp.int32, (1, 1, 1))),
      "cov must have a floating dtype, got int32",
    ),
    (
      lambda: relu_covariance(*map(jnp.float32, (0.1, 1, -1))),
      "var2 must be non-negative, got -1.0",
    ),
    (
      lambda: mlp_ntk(jnp.ones(3), depth=1),
      "x1 must have 2 dimensions, got shape (3,)",
    ),
    (
      lambda: mlp_ntk(jnp.ones((2, 3)), jnp.ones((2, 4)), depth=1),
      "x2 must have shape (*, 3) = (n2, d), got (2, 4)",
    ),
    (
      lambda: mlp_ntk(jnp.ones((2, 3)), depth=-1),
      "depth must be >= 0, got -1",
    ),
    (
      lambda: mlp_ntk(jnp.ones((2, 3)), depth=1, weight_scale=0.0),
      "weight_scale must be positive, got 0.0",
    ),
    (
      lambda: mlp_ntk(jnp.ones((2, 3)), depth=1, trainable="output"),
      "trainable must be one of 'all', 'hidden', got 'output'",
    ),
    (
      lambda: mlp_ntk(jnp.ones((2, 3)), depth=0, trainable="hidden"),
      "trainable='hidden' needs depth >= 1, got 0",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
