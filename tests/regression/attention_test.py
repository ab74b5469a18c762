"""Regression with a head of attention: closed forms, identities, refusals."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import newton
from jaxattn.attention import softmax_attention
from jaxattn.regression import _head_calculus as calculus
from jaxattn.regression import attention
from tests._jaxpr import array_sizes


def _random(sizes=(7, 7, 3, 3, 3, 3), seed=0, **options):
  """Data and unknowns of sizes n1, n2, d1, d2, d3, dv."""
  n1, n2, d1, d2, d3, dv = sizes
  rng = np.random.default_rng(seed)
  shapes = (n1, d1), (n2, d2), (n2, d3), (n1, dv)
  data = attention.prepare(
    *(rng.normal(size=shape) for shape in shapes), **options
  )
  x, y = rng.normal(size=(d1, d2)) / 2, rng.normal(size=(d3, dv))
  return data, jnp.asarray(x), jnp.asarray(y)


def _flat(x, y):
  return jnp.concatenate([x.reshape(-1), y.reshape(-1)])


def _plain_output(x, y, data):
  logits = data.a1 @ x @ data.a2.T
  if data.bias is not None:
    logits = logits + data.bias
  if data.num_keys is not None:
    logits = jnp.where(np.tri(len(logits)) > 0, logits, -jnp.inf)
  return jax.nn.softmax(logits) @ data.a3 @ y


def _plain_loss(v, data, sizes=(3, 3, 3, 3)):
  """The loss as it is written down."""
  d1, d2, d3, dv = sizes
  x, y = v[: d1 * d2].reshape(d1, d2), v[d1 * d2 :].reshape(d3, dv)
  fit = ((_plain_output(x, y, data) - data.b) ** 2).sum()
  penalty = data.ridge_x * (x**2).sum() + data.ridge_y * (y**2).sum()
  return (fit + penalty) / 2


_SIZES = {
  "square": (7, 7, 3, 3, 3, 3),
  "cross": (6, 8, 2, 4, 3, 1),
  # More than one block of queries, and one query that fills none.
  "blocks": (401, 401, 2, 2, 2, 1),
}
_MANY = np.random.default_rng(4).random((401, 401)) < 0.5
_MASKS = {
  "none": {},
  "causal": {"is_causal": True},
  "mask": {"mask": np.random.default_rng(3).random((7, 7)) < 0.5},
}
_CASES = [("square", mask) for mask in _MASKS]
_CASES += [("cross", "none"), ("blocks", "none"), ("blocks", "causal")]


@pytest.mark.parametrize(("size", "mask"), _CASES)
def test_derivatives_are_those_of_the_loss(size, mask):
  sizes = _SIZES[size]
  data, x, y = _random(sizes, ridge_x=0.1, ridge_y=0.2, **_MASKS[mask])
  v, plain = _flat(x, y), functools.partial(_plain_loss, sizes=sizes[2:])

  @jax.jit
  def both(v, data):
    blocks = attention.hessian_blocks(x, y, data)
    products = jax.vmap(lambda u: attention.hvp(v, u, data))(jnp.eye(len(v)))
    return attention.value_and_grad(v, data), blocks, products

  @jax.jit
  def reference(v, data):
    return jax.value_and_grad(plain)(v, data), jax.hessian(plain)(v, data)

  (value, grad), blocks, products = both(v, data)
  (want_value, want_grad), hessian = reference(v, data)
  np.testing.assert_allclose(value, want_value, rtol=1e-13)
  np.testing.assert_allclose(attention.loss(v, data), want_value, rtol=1e-13)
  np.testing.assert_allclose(grad, want_grad, rtol=0, atol=1e-11)
  np.testing.assert_allclose(products, hessian, rtol=0, atol=1e-11)
  num = x.size
  wants = hessian[:num, :num], hessian[:num, num:], hessian[num:, num:]
  for block, want in zip(blocks, wants, strict=True):
    np.testing.assert_allclose(block, want, rtol=0, atol=1e-11)
  np.testing.assert_allclose(
    attention.curvature(v, data).matrix, hessian, rtol=0, atol=1e-11
  )


def test_rows_of_all_blocks_of_queries():
  data, x, y = _random(_SIZES["blocks"], mask=_MANY)
  out = attention.predict(x, y, *data[:3], bias=data.bias)
  want = _plain_output(x, y, data)
  np.testing.assert_allclose(out, want, rtol=0, atol=1e-13)
  w, z = calculus.blocks_and_rows(x, y, data, exact=False)[1]
  np.testing.assert_allclose(z @ y, want, rtol=0, atol=1e-13)
  # A row of the Jacobian with respect to X: that of the last query.
  jacobian = jax.jacobian(lambda x: _plain_output(x, y, data)[-1, 0])(x)
  np.testing.assert_allclose(
    np.outer(data.a1[-1], w[-1, :, 0]), jacobian, rtol=0, atol=1e-13
  )
  # Weights follow their queries.
  weight = np.where(np.arange(401) < 390, 0.0, 2.0)
  got = calculus.blocks(x, y, data, weight, exact=True)
  few = calculus.take_queries(data, lambda z: z[390:])
  for block, want in zip(got, attention.hessian_blocks(x, y, few)):
    np.testing.assert_allclose(block, 2 * want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_array_of_all_pairs_of_tokens(is_causal):
  n, d = 1000, 2
  arrays = [jnp.ones((n, d))] * 4
  options = {"is_causal": is_causal}
  data = attention.prepare(*arrays, **options)
  x, v = jnp.ones((d, d)), jnp.ones(2 * d * d)
  calls = [
    lambda: attention.prepare(*arrays, **options),
    lambda: attention.predict(x, x, *arrays[:3], **options),
    lambda: attention.value_and_grad(v, data),
    lambda: attention.loss(v, data),
    lambda: attention.hvp(v, v, data),
    lambda: attention.hessian_blocks(x, x, data),
    lambda: attention.gauss_newton(v, data),
    lambda: attention.optimal_values(x, data),
  ]
  for method in ("joint", "varpro", "greedy", "sketched"):
    for solver in ("cholesky", "cg") if method != "sketched" else ("cholesky",):
      config = newton.NewtonConfig(linear_solver=solver)
      calls.append(
        functools.partial(
          attention.fit_attention,
          jax.random.key(0),
          *arrays,
          method=method,
          config=config,
          **options,
        )
      )
  for call in calls:
    assert max(array_sizes(call)) <= 1.1 * calculus._BLOCK_ENTRIES < n * n / 5


def test_gauss_newton_is_the_square_of_the_jacobian():
  sizes = _SIZES["cross"]
  data, x, y = _random(sizes, ridge_x=0.1, ridge_y=0.2)
  v, num = _flat(x, y), x.size

  def output(v):
    parts = v[:num].reshape(x.shape), v[num:].reshape(y.shape)
    return _plain_output(*parts, data).reshape(-1)

  jacobian = jax.jacobian(output)(v)
  ridges = np.repeat([0.1, 0.2], [num, y.size])
  want = jacobian.T @ jacobian + np.diag(ridges)
  got = attention.gauss_newton(v, data).matrix
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  operator = attention.problem(matrix_free=True).gauss_newton(v, data)
  got = newton.curvature_dense(operator, dim=len(v))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_tensor_trick():
  """vec(A1 X A2^T) = (A1 kron A2) vec(X), by rows, and blocks of it."""
  data, x, y = _random((5, 5, 3, 3, 3, 3))
  both = jnp.kron(data.a1, data.a2)
  logits = data.a1 @ x @ data.a2.T
  np.testing.assert_allclose(both @ x.reshape(-1), logits.reshape(-1))
  # The loss as a sum over queries and outputs, each of its own features.
  total = 0.0
  for j, a in enumerate(data.a1):
    features = jnp.kron(a[None], data.a2)
    weights = jnp.exp(features @ x.reshape(-1))
    weights /= weights.sum()
    for i in range(3):
      total += (weights @ (data.a3 @ y[:, i]) - data.b[j, i]) ** 2
  np.testing.assert_allclose(
    attention.loss(_flat(x, y), data), total / 2, rtol=1e-12
  )


@pytest.mark.parametrize("sizes", [(7, 7, 3, 3, 3, 3), (6, 8, 2, 4, 3, 5)])
def test_prediction_is_dot_product_attention(sizes):
  data, x, y = _random(sizes)
  w = attention.to_dot_product_attention(x, y)
  arrays = data.a1, data.a2, data.a3
  q, k, v = (
    (a @ w[name])[None, :, None]
    for a, name in zip(arrays, ("query", "key", "value"), strict=True)
  )
  want = attention.predict(x, y, *arrays)
  # That of JAX has its logits in float32, whatever comes in.
  for attend, tol in (
    (softmax_attention, 1e-12),
    (jax.nn.dot_product_attention, 2e-6),
  ):
    out = attend(q, k, v, scale=w["scale"])[0, :, 0]
    np.testing.assert_allclose(out[:, : sizes[-1]], want, rtol=0, atol=tol)
    assert not out[:, sizes[-1] :].any()


def test_factors_of_queries_and_keys():
  _, x, _ = _random((6, 8, 3, 5, 3, 1))
  q, k = attention.factor_qk(x)
  np.testing.assert_allclose(q @ k.T, x, rtol=0, atol=1e-14)
  np.testing.assert_allclose(q.T @ q, k.T @ k, rtol=0, atol=1e-14)
  q, k = attention.factor_qk(x, 2)
  assert (q.shape, k.shape) == ((3, 2), (5, 2))
  least = np.linalg.svd(x, compute_uv=False)[2]
  np.testing.assert_allclose(np.linalg.norm(x - q @ k.T, 2), least, rtol=1e-12)


def test_masked_predictions_ignore_hidden_keys():
  data, x, y = _random(mask=np.tri(7) > 0)
  a1, a2, a3 = (np.asarray(a) for a in data[:3])
  out = attention.predict(x, y, a1, a2, a3, is_causal=True)
  again = attention.predict(x, y, a1, a2, a3, bias=data.bias)
  np.testing.assert_allclose(again, out, rtol=0, atol=1e-15)
  for j in range(7):
    weights = np.exp(a1[j] @ x @ a2[: j + 1].T)
    row = weights @ a3[: j + 1] @ y / weights.sum()
    np.testing.assert_allclose(out[j], row, rtol=0, atol=1e-14)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_optimal_values(ridge):
  data, x, _ = _random((20, 20, 3, 3, 3, 2), ridge_y=ridge)
  y = attention.optimal_values(x, data)
  weights = jax.nn.softmax(data.a1 @ x @ data.a2.T)
  rows = np.concatenate([weights @ data.a3, np.sqrt(ridge) * np.eye(3)])
  targets = np.concatenate([data.b, np.zeros((3, 2))])
  want = np.linalg.lstsq(rows, targets)[0]
  np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)
  grad = attention.value_and_grad(_flat(x, y), data)[1]
  assert jnp.abs(grad[x.size :]).max() <= 1e-12
  assert jnp.abs(grad[: x.size]).max() > 1e-3


def test_zero_is_where_all_queries_see_the_same():
  data, x, y = _random()
  x = 0 * x
  out = attention.predict(x, y, data.a1, data.a2, data.a3)
  mean = data.a3.mean(0) @ y
  np.testing.assert_allclose(out, jnp.broadcast_to(mean[None], out.shape))
  blocks = jax.jit(attention.hessian_blocks)(x, y, data)
  hessian = jax.jit(jax.hessian(_plain_loss))(_flat(x, y), data)
  np.testing.assert_allclose(blocks[0], hessian[:9, :9], rtol=0, atol=1e-12)
  # A saddle, and no minimum of X, for generic data.
  assert np.linalg.eigvalsh(blocks[0])[0] < -1e-3
  # The values of least norm among many.
  y = attention.optimal_values(x, data)
  want = (
    jnp.outer(data.a3.mean(0), data.b.mean(0)) / (data.a3.mean(0) ** 2).sum()
  )
  np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)


def test_reduced_derivatives():
  """Of the loss with the best Y: against autodiff through a linear solve."""
  data, x, _ = _random((20, 20, 3, 3, 3, 3), ridge_x=0.1, ridge_y=0.05)

  def reduced(v, data):
    z = jax.nn.softmax(data.a1 @ v.reshape(3, 3) @ data.a2.T) @ data.a3
    gram = z.T @ z + data.ridge_y * jnp.eye(3)
    y = jnp.linalg.solve(gram, z.T @ data.b)
    return _plain_loss(_flat(v, y), data)

  v = x.reshape(-1)

  @jax.jit
  def reference(v, data):
    return jax.value_and_grad(reduced)(v, data), jax.hessian(reduced)(v, data)

  (value, grad), hessian = reference(v, data)
  y = attention.optimal_values(x, data)
  h_xx, h_xy, h_yy = attention.hessian_blocks(x, y, data)
  wants = {
    "varpro": h_xx - h_xy @ jnp.linalg.solve(h_yy, h_xy.T),
    "greedy": h_xx,
  }
  np.testing.assert_allclose(wants["varpro"], hessian, rtol=0, atol=1e-9)
  for method, want in wants.items():
    problem = attention.problem(method=method)
    got = problem.value_and_grad(v, data)
    np.testing.assert_allclose(got[0], value, rtol=1e-12)
    np.testing.assert_allclose(problem.loss(v, data), value, rtol=1e-12)
    np.testing.assert_allclose(got[1], grad, rtol=0, atol=1e-11)
    matrix = problem.curvature(v, data).matrix
    np.testing.assert_allclose(matrix, want, rtol=0, atol=1e-10)
    free = attention.problem(method=method, matrix_free=True)
    for name in ("curvature", "gauss_newton"):
      dense = getattr(problem, name)(v, data).matrix
      operator = getattr(free, name)(v, data)
      got = newton.curvature_dense(operator, dim=9)
      np.testing.assert_allclose(got, dense, rtol=0, atol=1e-11)
  least = np.linalg.eigvalsh(problem.gauss_newton(v, data).matrix)[0]
  assert least > 0


def test_keys_with_a_constant_leave_queries_undetermined():
  rng = np.random.default_rng(0)
  n, d = 20, 3
  a1, a2, a3 = rng.normal(size=(3, n, d))
  a2[:, 0] = 1
  x, y = rng.normal(size=(d, d)) / 2, rng.normal(size=(d, d))
  b = attention.predict(x, y, a1, a2, a3)
  moved = x + np.outer(rng.normal(size=d), [1, 0, 0])
  np.testing.assert_allclose(
    attention.predict(moved, y, a1, a2, a3), b, rtol=0, atol=1e-12
  )
  data = attention.prepare(a1, a2, a3, b)
  sizes = np.linalg.eigvalsh(attention.hessian_blocks(x, y, data)[0])
  assert (sizes[:d] < 1e-12 * sizes[-1]).all()
  assert sizes[d] > 1e-6 * sizes[-1]


# --- refusals ---

_A = np.ones((4, 2))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"a2": np.ones((48, 2)), "a3": np.ones((40, 2))},
      "a2 and a3 must have the same number of rows, got 48 and 40",
    ),
    (
      {"b": np.ones((3, 2))},
      "b must have shape (4, *) = (n1, dv), got (3, 2)",
    ),
    ({"a1": np.ones(4)}, "a1 must have 2 dimensions, got shape (4,)"),
    ({"a1": np.ones((4, 2), int)}, "a1 must have a floating dtype"),
    ({"b": np.ones((4, 0))}, "b must not be empty, got shape (4, 0)"),
    ({"ridge_x": -0.1}, "ridge_x must be non-negative, got -0.1"),
    ({"ridge_y": -0.1}, "ridge_y must be non-negative, got -0.1"),
    ({"ridge_x": np.ones(3)}, "ridge_x must be a real scalar"),
    (
      {"a1": np.ones((3, 2)), "b": np.ones((3, 2)), "is_causal": True},
      "is_causal needs n1 == n2, got 3 and 4",
    ),
    (
      {"mask": np.arange(4)[:, None] + np.zeros((1, 4)) < 3},
      "row 3 of mask has no allowed key",
    ),
    (
      {"mask": ~np.eye(4, dtype=bool), "is_causal": True},
      "row 0 of mask has no allowed key",
    ),
    ({"mask": np.ones((4, 4))}, "mask must be boolean"),
    (
      {"mask": np.ones((4, 3), bool)},
      "mask must have shape (4, 4) = (n1, n2), got (4, 3)",
    ),
  ],
)
def test_refused_data(change, message):
  arrays = {"a1": _A, "a2": _A, "a3": _A, "b": _A} | change
  with pytest.raises(ValueError, match=re.escape(message)):
    attention.prepare(**arrays)


def test_refused_unknowns():
  data, x = attention.prepare(_A, _A, _A, _A), jnp.zeros((2, 2))
  with pytest.raises(ValueError, match=re.escape("x must have shape (8,)")):
    attention.loss(jnp.zeros(7), data)
  with pytest.raises(ValueError, match=re.escape("v must have shape (8,)")):
    attention.hvp(jnp.zeros(8), jnp.zeros(7), data)
  with pytest.raises(ValueError, match=re.escape("y must have shape (2, 2)")):
    attention.hessian_blocks(jnp.zeros((2, 2)), jnp.zeros((2, 3)), data)
  with pytest.raises(ValueError, match=re.escape("x must have shape (2, 2)")):
    attention.optimal_values(jnp.zeros(4), data)
  with pytest.raises(ValueError, match=re.escape("y must have shape (2, *)")):
    attention.predict(jnp.zeros((2, 2)), jnp.zeros((3, 2)), _A, _A, _A)
  with pytest.raises(ValueError, match="is_causal needs n1 == n2, got 2 and 4"):
    attention.predict(x, x, _A[:2], _A, _A, is_causal=True)
  with pytest.raises(
    ValueError, match=re.escape("bias must have shape (4, 4)")
  ):
    attention.predict(x, x, _A, _A, _A, bias=np.zeros((4, 3)))
  with pytest.raises(ValueError, match=re.escape("rank must be in [1, 2]")):
    attention.factor_qk(jnp.zeros((2, 3)), 3)
  with pytest.raises(ValueError, match="x must have 2 dimensions"):
    attention.factor_qk(jnp.zeros(3))
  with pytest.raises(ValueError, match="y must have 2 dimensions"):
    attention.to_dot_product_attention(jnp.zeros((2, 3)), jnp.zeros(2))


def test_refused_problems():
  message = "method must be one of 'joint', 'greedy', 'varpro', got 'sketched'"
  with pytest.raises(ValueError, match=re.escape(message)):
    attention.problem(method="sketched")
  with pytest.raises(ValueError, match="matrix_free must be one of"):
    attention.problem(matrix_free="cg")
  data = jax.eval_shape(attention.prepare, *[jnp.ones((64, 64))] * 4)
  message = (
    "dense Hessian of size d1*d2 + d3*dv = 8192 exceeds max_dense = 4096; use "
    "linear_solver='cg'"
  )
  for method in ("joint", "varpro"):
    curvature = attention.problem(method=method).curvature
    x = jax.ShapeDtypeStruct((8192 if method == "joint" else 4096,), float)
    with pytest.raises(ValueError, match=re.escape(message)):
      jax.eval_shape(curvature, x, data)
