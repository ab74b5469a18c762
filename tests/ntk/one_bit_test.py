"""Networks of signs: gradients, kernels by brute force, packing, refusals."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.ntk import mlp_ntk, one_bit
from jaxattn.ntk.one_bit import table
from jaxattn.numerics import pack_signs
from jaxattn.scaling import fit_slope
from tests._recompile import no_recompilation

_KEY = jax.random.key(0)


def _inputs(n, d, dtype=np.float64):
  x = np.random.default_rng(d).normal(size=(n, d))
  return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), dtype)


# --- signs ---


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_signs_are_exact_and_gradients_pass(dtype):
  w = jnp.array([-3.0, -1e-6, -0.0, 0.0, 1e-6, 0.7, 3.0], dtype)
  want = np.array([-1, -1, 1, 1, 1, 1, 1])
  total = lambda w, back: (one_bit.sign_ste(w, backward=back) * w).sum()  # noqa: E731
  q = jax.jit(one_bit.sign_ste)(w)
  assert q.dtype == dtype
  np.testing.assert_array_equal(q.astype(float), want)
  # d(q w) = q + w dq.
  for back, slope in (("identity", np.ones(7)), ("clip", np.abs(w) <= 1)):
    grads = jax.jit(jax.vmap(jax.grad(total), (0, None)), static_argnums=1)
    got = grads(jnp.stack([w, w]), back)[1]
    assert got.dtype == dtype
    slope = jnp.asarray(slope, dtype)
    np.testing.assert_array_equal(got, jnp.asarray(want, dtype) + slope * w)


def test_rows_are_quantized():
  w = jnp.array([[1.0, 2.0, 6.0], [-1.0, 0.0, 4.0]])
  q, scale, shift = one_bit.quantize_rows(w)
  np.testing.assert_array_equal(q, [[1, 1, 1], [-1, 1, 1]])
  np.testing.assert_array_equal(scale, (1, 1))
  np.testing.assert_array_equal(shift, (0, 0))
  q, scale, shift = one_bit.quantize_rows(w, center=True, scale="std")
  np.testing.assert_array_equal(q, [[-1, -1, 1], [-1, -1, 1]])
  np.testing.assert_allclose(scale, np.std(w, axis=1))
  np.testing.assert_allclose(shift, (3, 1))
  mean = one_bit.quantize_rows(w, scale="absmean")[1]
  np.testing.assert_allclose(mean, (3, 5 / 3))

  def layer(w):
    q, scale, shift = one_bit.quantize_rows(w, center=True, scale="absmean")
    return (scale[:, None] * q + shift[:, None]).sum()

  # Through the signs alone: scale and shift are constants.
  np.testing.assert_allclose(jax.grad(layer)(w), np.tile(mean[:, None], 3))


# --- the network ---


def test_paired_neurons_begin_as_zero_and_gradient_is_straight_through():
  x, y = _inputs(7, 12), jnp.arange(7.0)
  params = one_bit.init(_KEY, 30, 12, dtype=jnp.float64)
  np.testing.assert_allclose(one_bit.apply(params, x), 0, rtol=0, atol=1e-14)
  params = one_bit.init(_KEY, 31, 12, paired=False, dtype=jnp.float64)

  def loss(w):
    f = one_bit.apply(params._replace(latent=w), x, kappa=0.5)
    return ((f - y) ** 2).sum() / 2

  w, a = (np.asarray(p) for p in params)
  q = np.where(w >= 0, 1, -1)
  z = x @ q.T
  f = 0.5 / 31**0.5 * np.maximum(z, 0) @ a
  want = 0.5 / 31**0.5 * np.einsum("i,ir,r,id->rd", f - y, z > 0, a, x)
  np.testing.assert_allclose(one_bit.apply(params, x, kappa=0.5), f, rtol=1e-12)
  np.testing.assert_allclose(
    jax.grad(loss)(params.latent), want, rtol=1e-12, atol=1e-14
  )
  full = one_bit.apply(params, x, quantized=False)
  np.testing.assert_allclose(
    full, np.maximum(x @ w.T, 0) @ a / 31**0.5, rtol=1e-12
  )


@pytest.mark.parametrize(("dtype", "tolerance"), [("f4", 1e-6), ("f8", 1e-12)])
def test_gradients_in_both_dtypes(dtype, tolerance):
  x, y = _inputs(7, 12, dtype), jnp.arange(7, dtype=dtype)
  params = one_bit.init(_KEY, 64, 12, paired=False, dtype=dtype)

  def loss(w):
    f = one_bit.apply(params._replace(latent=w), x)
    return ((f - y) ** 2).sum() / 2

  w, a = (np.asarray(p, float) for p in params)
  z = np.asarray(x, float) @ np.where(w >= 0, 1, -1).T
  error = np.maximum(z, 0) @ a / 8 - np.asarray(y, float)
  want = np.einsum("i,ir,r,id->rd", error, z > 0, a, np.asarray(x)) / 8
  got = jax.grad(loss)(params.latent)
  off = np.linalg.norm(got - want) / np.linalg.norm(want)
  assert off < tolerance


def test_kernel_scales_by_the_square_of_kappa():
  x = _inputs(5, 12)
  params = one_bit.init(_KEY, 40, 12, paired=False, dtype=jnp.float64)

  def kernel(kappa):
    def f(w):
      return one_bit.apply(params._replace(latent=w), x, kappa=kappa)

    rows = jax.jacrev(f)(params.latent).reshape(5, -1)
    return rows @ rows.T

  np.testing.assert_allclose(kernel(0.5), kernel(1.0) / 4, rtol=1e-12)


@pytest.mark.parametrize(
  ("m", "d"), [(3, 1), (5, 31), (1024, 32), (1500, 33), (7, 64)]
)
def test_packed_network_is_the_network(m, d):
  params = one_bit.init(_KEY, m, d, paired=False)
  x, words = _inputs(6, d, np.float32), pack_signs(params.latent)
  assert words.nbytes == 4 * m * -(-d // 32)
  got = one_bit.packed_apply(x, words, params.output, kappa=0.5)
  want = one_bit.apply(params, x, kappa=0.5)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


# --- kernels ---


def _all_signs(d):
  return np.array(list(itertools.product((-1.0, 1.0), repeat=d)))


def test_kernels_against_loops():
  x1, x2 = np.asarray(_inputs(3, 10)), np.asarray(_inputs(5, 10))[3:]
  signs = _all_signs(10)
  relu = lambda z: np.maximum(z, 0)  # noqa: E731
  ste, secant = np.zeros((2, 3, 2))
  for j, i in itertools.product(range(3), range(2)):
    on = signs @ x2[i] > 0
    ste[j, i] = x1[j] @ x2[i] * np.mean(on & (signs @ x1[j] > 0))
    for k in range(10):
      up, down = signs.copy(), signs.copy()
      up[:, k], down[:, k] = 1, -1
      change = (relu(up @ x1[j]) - relu(down @ x1[j])) / 2
      secant[j, i] += x2[i, k] * np.mean(change * on)
  got = one_bit.ste_kernel(x1, x2)
  np.testing.assert_allclose(got.kernel, ste, rtol=0, atol=1e-12)
  np.testing.assert_array_equal(got.standard_error, np.zeros((3, 2)))
  got = one_bit.secant_kernel(x1, x2)
  np.testing.assert_allclose(got.kernel, secant, rtol=0, atol=1e-12)


def test_sums_that_are_zero_are_not_on():
  whole = np.array(
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 2, 3, 0], [1, 2, 3, 4]], float
  )
  signs = _all_signs(4)
  on = (signs @ whole.T > 0).astype(float)
  share = on.T @ on / len(signs)
  np.testing.assert_allclose(np.diag(share)[:2], [0.5, 0.25])
  x = whole / np.linalg.norm(whole, axis=1, keepdims=True)
  for dtype in ("float32", "float64"):
    got = one_bit.ste_kernel(jnp.asarray(x, dtype)).kernel
    tolerance = 10 * np.finfo(dtype).eps
    np.testing.assert_allclose(got, (x @ x.T) * share, rtol=0, atol=tolerance)


def test_kernels_of_sixteen_dimensions():
  x = _inputs(8, 16)
  ste, secant = (
    np.asarray(fn(x).kernel)
    for fn in (one_bit.ste_kernel, one_bit.secant_kernel)
  )
  limit = mlp_ntk(x, depth=1, weight_scale=16.0, trainable="hidden")[1]
  assert np.linalg.norm(ste - limit) < 0.015 * np.linalg.norm(limit)
  skew = np.linalg.norm(secant - secant.T) / np.linalg.norm(secant)
  assert 0.002 < skew < 0.02
  assert 0.80 < (np.diag(secant) / np.diag(ste)).mean() < 0.88


def test_what_is_no_number_stays_none():
  assert np.isnan(one_bit.sign_ste(jnp.array([jnp.nan, 1.0]))[0])
  with pytest.raises(ValueError, match="signs must not hold NaN"):
    pack_signs(jnp.array([jnp.nan, 1.0]))


def test_kernels_agree_by_chance_and_on_the_diagonal():
  x = _inputs(6, 12)
  for fn in (one_bit.ste_kernel, one_bit.secant_kernel):
    exact = fn(x).kernel
    drawn = fn(x, method="mc", num_samples=40_000, rng=_KEY)
    score = (drawn.kernel - exact) / drawn.standard_error
    assert 0.6 < float(jnp.sqrt((score**2).mean())) < 1.6
    assert jnp.abs(score).max() < 4.5
    assert drawn.standard_error.max() < 0.005
  secant, ste = one_bit.secant_kernel(x).kernel, one_bit.ste_kernel(x).kernel
  assert (jnp.diag(secant) <= jnp.diag(ste)).all()
  # The limit of large d, from which d = 12 is a few percent away.
  limit = mlp_ntk(x, depth=1, weight_scale=12.0, trainable="hidden")[1]
  np.testing.assert_allclose(ste, limit, rtol=0, atol=0.03 * limit.max())
  assert float(one_bit.effective_rate(2.0)) == pytest.approx(0.39894228)


def test_gradients_of_wide_networks_have_the_kernel():
  x = _inputs(6, 12, np.float32)
  want = one_bit.ste_kernel(x).kernel
  widths = [2**k for k in range(8, 17, 2)]

  @jax.jit
  @jax.vmap
  def gaps(rng):
    params = one_bit.init(rng, widths[-1], 12, paired=False)
    on = (x @ one_bit.sign_ste(params.latent).T > 0).astype(x.dtype)
    # The first m neurons are a network of width m.
    grams = jnp.stack(
      [(x @ x.T) * (on[:, :m] @ on[:, :m].T) / m for m in widths]
    )
    return jnp.linalg.norm(grams - want[None], axis=(1, 2))

  gap = jnp.median(gaps(jax.random.split(_KEY, 8)), 0) / jnp.linalg.norm(want)
  assert gap[-1] < 0.02
  assert -0.6 < fit_slope(widths, gap).slope < -0.4
  # And gradients as JAX takes them are those of the first lines.
  params = one_bit.init(_KEY, 2**16, 12, paired=False)
  f = lambda w: one_bit.apply(params._replace(latent=w), x)  # noqa: E731
  jacobian = jax.jit(jax.jacrev(f))(params.latent).reshape(6, -1)
  np.testing.assert_allclose(jacobian @ jacobian.T, want, rtol=0, atol=0.01)


# --- what training records ---


def test_history_against_a_loop():
  x, y, x_eval = _inputs(5, 8), np.arange(5.0) - 2, _inputs(9, 8)[5:]
  params = one_bit.init(_KEY, 9, 8, paired=False, dtype=jnp.float64)
  rates = np.linspace(0.3, 0.1, 6)
  train = functools.partial(
    one_bit.train_one_bit,
    x=x,
    y=y,
    learning_rate=rates,
    num_steps=6,
    window=4,
    x_eval=x_eval,
    eval_steps=(2, 6),
  )
  trained, log = train(params)
  with no_recompilation():
    train(params)
  f, w, flips = [], params.latent, []
  for t in range(7):
    now = params._replace(latent=w)
    f.append(
      [one_bit.apply(now, z) - one_bit.apply(params, z) for z in (x, x_eval)]
    )
    if t < 6:
      out, pull = jax.vjp(
        lambda w: one_bit.apply(params._replace(latent=w), x), w
      )
      before, w = w, w - rates[t] * pull(f[-1][0] - y)[0]
      flips.append(((w >= 0) != (before >= 0)).sum())
  out, out_eval = (np.stack([row[i] for row in f]) for i in (0, 1))
  mean = lambda a, t: a[max(0, t - 3) : t + 1].mean(0)  # noqa: E731
  np.testing.assert_allclose(trained.latent, w, rtol=1e-10)
  np.testing.assert_allclose(log.f, out, rtol=1e-10, atol=1e-14)
  np.testing.assert_allclose(log.loss, ((out - y) ** 2).sum(1) / 2, rtol=1e-10)
  averaged = [((mean(out, t) - y) ** 2).sum() / 2 for t in range(7)]
  np.testing.assert_allclose(log.loss_avg, averaged, rtol=1e-10)
  np.testing.assert_array_equal(log.flips, flips)
  np.testing.assert_allclose(log.f_eval, out_eval[[2, 6]], rtol=1e-10)
  want = [mean(out_eval, 2), mean(out_eval, 6)]
  np.testing.assert_allclose(log.f_eval_avg, want, rtol=1e-10)
  np.testing.assert_allclose(log.input_norm_range, 1)


def test_generalization_difference():
  x = _inputs(4, 8)
  params = one_bit.init(_KEY, 8, 8, dtype=jnp.float64)
  log = one_bit.train_one_bit(
    params, x, x[:, 0], learning_rate=0.5, num_steps=10, x_eval=x
  )[1]
  other = log._replace(f_eval=log.f_eval + 0.5, f_eval_avg=log.f_eval_avg - 2)
  got = one_bit.generalization_difference(log, other)
  np.testing.assert_allclose(got, [2.0])
  got = one_bit.generalization_difference(log, other, averaged=False)
  np.testing.assert_allclose(got, [0.5])
  with pytest.raises(ValueError, match=r"same x_eval, got shapes \(1, 0\) and"):
    one_bit.generalization_difference(
      log._replace(f_eval_avg=jnp.zeros((1, 0))), log
    )


def test_table_is_that_of_single_runs():
  x = _inputs(40, 8)
  y = jnp.sign(x[:, 0])
  data = x[:24], y[:24], x[24:], y[24:]
  call = functools.partial(
    one_bit.scaling_table,
    data=data,
    widths=(8, 16),
    data_sizes=(12, 24),
    steps_grid=(10, 20),
    num_seeds=2,
  )
  table = call(_KEY)
  other = jax.random.key(1)
  with no_recompilation():
    call(other)
  assert table.train.shape == table.test_avg.shape == (2, 2, 2, 2)
  np.testing.assert_array_equal(table.sizes, (72, 144))
  np.testing.assert_allclose(
    table.compute[1, 0], 6 * 144 * 12 * np.array([10, 20])
  )
  rng = jax.random.fold_in(jax.random.fold_in(_KEY, 16), 1)
  rng_order, rng_params = jax.random.split(jax.random.fold_in(rng, 12))
  order = jax.random.permutation(rng_order, 24)[:12]
  x_few = x[order]
  kernel = mlp_ntk(x_few, depth=1, weight_scale=8.0, trainable="hidden")[1]
  rate = 0.5 / jnp.linalg.eigvalsh(kernel)[-1] / one_bit.effective_rate()
  log = one_bit.train_one_bit(
    one_bit.init(rng_params, 16, 8, dtype=x.dtype),
    x_few,
    y[order],
    learning_rate=rate,
    num_steps=20,
    x_eval=data[2],
  )[1]
  want = 2 * np.array([log.loss[10], log.loss[20]]) / 12
  np.testing.assert_allclose(table.train[1, 1, 0], want, rtol=1e-4)
  want = ((log.f_eval_avg[0] - data[3]) ** 2).mean()
  np.testing.assert_allclose(table.test_avg[1, 1, 0, 1], want, rtol=1e-4)


def test_largest_eigenvalue_of_antipodal_data(monkeypatch):
  u = _inputs(6, 12)
  x = jnp.concatenate([u, -u])
  kernel = mlp_ntk(x, depth=1, weight_scale=12.0, trainable="hidden")[1]
  want = jnp.linalg.eigvalsh(kernel)[-1]
  np.testing.assert_allclose(table.largest_eigenvalue(x), want, rtol=1e-3)
  monkeypatch.setattr(table, "_MAX_ROWS", 4)
  monkeypatch.setattr(table, "_CHUNK", 5)
  np.testing.assert_allclose(table.largest_eigenvalue(x), want, rtol=1e-3)


# --- refused ---

_PARAMS = one_bit.OneBit(jnp.ones((4, 8)), jnp.ones(4))
_X, _Y = jnp.ones((3, 8)), jnp.ones(3)


def _train(**changes):
  options = {"learning_rate": 0.1, "num_steps": 20} | changes
  return one_bit.train_one_bit(_PARAMS, _X, _Y, **options)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: one_bit.sign_ste(_X, backward="tanh"), "backward must be one of"),
    (lambda: one_bit.sign_ste(jnp.ones(3, int)), "w must have a floating dty"),
    (lambda: one_bit.quantize_rows(_X, scale="max"), "scale must be one of 'n"),
    (
      lambda: one_bit.init(_KEY, 7, 8),
      "width must be even for paired neurons, got 7",
    ),
    (
      lambda: one_bit.ste_kernel(jnp.ones((2, 64))),
      "ste_kernel: exact enumeration needs dim <= 20, got 64; use method='mc'",
    ),
    (
      lambda: one_bit.secant_kernel(jnp.ones((2, 64))),
      "secant_kernel: exact enumeration needs dim <= 20, got 64",
    ),
    (lambda: one_bit.ste_kernel(_X, method="mc"), "rng is required when metho"),
    (lambda: one_bit.ste_kernel(_X, rng=_KEY), "rng must be None with method="),
    (
      lambda: one_bit.ste_kernel(_X, num_samples=99),
      "num_samples must be None with method='exact'",
    ),
    (
      lambda: one_bit.ste_kernel(_X, method="mc", rng=_KEY, num_samples=9),
      "num_samples must be >= 32, got 9",
    ),
    (
      lambda: one_bit.ste_kernel(_X, jnp.ones((2, 7))),
      r"x2 must have shape \(\*, 8\) = \(n2, d\), got \(2, 7\)",
    ),
    (
      lambda: one_bit.apply(_PARAMS, _X, kappa=0.0),
      r"kappa must be in \(0, 1\], got 0.0",
    ),
    (lambda: _train(kappa=1.5), r"kappa must be in \(0, 1\], got 1.5"),
    (lambda: one_bit.apply(_PARAMS, _X[:, :7]), r"x must have shape \(\*, 8\)"),
    (lambda: _train(window=0), r"window must be in \[1, 20\], got 0"),
    (lambda: _train(window=21), r"window must be in \[1, 20\], got 21"),
    (lambda: _train(learning_rate=-1.0), "learning_rate must be positive"),
    (
      lambda: _train(learning_rate=np.inf),
      r"learning_rate must be in \(0, inf\), got inf",
    ),
    (
      lambda: _train(learning_rate=jnp.ones(3)),
      r"learning_rate must have shape \(20,\)",
    ),
    (lambda: _train(eval_steps=(21,)), r"eval_steps must be in \[0, 20\]"),
    (lambda: _train(eval_steps=(9, 4)), "eval_steps must be ascending"),
    (
      lambda: one_bit.packed_apply(
        jnp.ones((2, 65)), jnp.zeros((4, 2), jnp.uint32), jnp.ones(4)
      ),
      r"packed must have shape \(4, 3\) = \(m, words of 65 signs\), got \(4, 2",
    ),
    (
      lambda: one_bit.packed_apply(_X, jnp.zeros((4, 1), int), jnp.ones(4)),
      "packed must have dtype uint32",
    ),
    (
      lambda: one_bit.scaling_table(
        _KEY, (_X, _Y, _X, _Y), (4, 8), (2, 4), (10, 20)
      ),
      r"data_sizes must be in \[1, 3\], got 4",
    ),
    (
      lambda: one_bit.scaling_table(
        _KEY, (_X, _Y, _X, _Y), (4, 8), (2, 3), (5, 20)
      ),
      "steps_grid must be >= 10, got 5",
    ),
    (lambda: one_bit.effective_rate(0.0), "latent_std must be positive"),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
