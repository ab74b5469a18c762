"""Two-layer softmax networks: kernels, their limits, and how they move."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from jaxattn import ntk
from jaxattn.ntk import softmax
from jaxattn.scaling import fit_slope
from tests._recompile import no_recompilation, quick_jit

_ALL = softmax.ACTIVATIONS


def _sphere(n, d, seed=0):
  x = np.random.default_rng(seed).standard_normal((n, d))
  return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def _network(m=64, d=3, o=2, seed=0, **options):
  return softmax.init(jax.random.key(seed), m, d, o, dtype="float64", **options)


def _relative(after, before):
  return float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before))


# --- closed forms ---


@pytest.mark.parametrize("activation", _ALL)
def test_kernel_is_that_of_the_derivatives(activation):
  params = softmax.perturb(jax.random.key(1), _network(), 0.5)
  x1, x2 = _sphere(5, 3), _sphere(2, 3, seed=1)

  @quick_jit
  def jacobian(hidden, x):
    return jax.jacrev(
      lambda w: softmax.apply(
        params._replace(hidden=w), x, activation=activation
      )
    )(hidden)

  j1, j2 = (jacobian(params.hidden, x) for x in (x1, x2))
  kernel = functools.partial(softmax.ntk, params, activation=activation)
  for got, left, right in ((kernel(x1), j1, j1), (kernel(x1, x2), j1, j2)):
    want = jnp.einsum("iard,jbrd->iajb", left, right) / 64
    np.testing.assert_allclose(
      got, want, rtol=0, atol=1e-12 * np.abs(want).max()
    )


def test_kernel_in_chunks_is_the_whole_kernel():
  params = softmax.perturb(jax.random.key(1), _network(), 0.5)
  x1, x2 = _sphere(5, 3), _sphere(4, 3, seed=1)
  for args in ((x1,), (x1, x2)):
    got = softmax.ntk(params, *args, chunk_size=2)
    want = softmax.ntk(params, *args)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * want.max())
  # C of 4096 data at full width would take 2^33 bytes.
  big = softmax.TwoLayer(*(jnp.zeros((2**18, k), "float32") for k in (8, 2)))
  kernel = functools.partial(softmax.ntk, chunk_size=64)
  x = jax.ShapeDtypeStruct((4096, 8), jnp.float32)
  jaxpr = jax.make_jaxpr(kernel)(big, x)
  largest = max(
    np.prod(v.aval.shape) for e in _equations(jaxpr.jaxpr) for v in e.outvars
  )
  assert jaxpr.out_avals[0].shape == (4096, 2, 4096, 2)
  assert largest == (4096 * 2) ** 2


def _equations(jaxpr):
  for e in jaxpr.eqns:
    yield e
    for inner in jaxprs_in_params(e.params):
      yield from _equations(inner)


def test_output_scales_and_paired_networks():
  x, params = _sphere(5, 3), _network(m=256)
  for activation in _ALL:
    out = softmax.apply(params, x, activation=activation)
    assert np.abs(out).max() < 1e-10
  params = softmax.perturb(jax.random.key(1), params, 0.5)
  out = softmax.apply(params, x)
  want = 256 * jax.nn.softmax(x @ params.hidden.T) @ params.output
  np.testing.assert_allclose(out, want, rtol=1e-10)
  for scale, factor in (("sqrt_m", 1 / 16), (3.0, 3 / 256)):
    got = softmax.apply(params, x, output_scale=scale)
    np.testing.assert_allclose(got, out * factor, rtol=1e-12)


def test_common_shifts_move_no_softmax():
  x, params = _sphere(6, 3), _network(m=512)
  center = np.asarray(x).sum(0)
  center /= np.linalg.norm(center)
  moved = params._replace(hidden=params.hidden + center[None])
  change = {
    a: _relative(
      softmax.ntk(moved, x, activation=a), softmax.ntk(params, x, activation=a)
    )
    for a in ("softmax", "exp")
  }
  assert change["softmax"] < 1e-14
  assert change["exp"] > 1


def test_gap_to_the_limit_falls_like_one_over_root_width():
  x = _sphere(5, 3)
  want = jnp.einsum("ij,ab->iajb", ntk.limit_kernel(x, sigma=0.7), jnp.eye(2))

  def gaps(width):
    def gap(rng):
      params = softmax.init(rng, width, 3, 2, sigma=0.7, dtype="float64")
      change = softmax.ntk(params, x) - want
      return jnp.linalg.norm(change) / jnp.linalg.norm(want)

    return quick_jit(jax.vmap(gap))(jax.random.split(jax.random.key(0), 8))

  widths = [2**8, 2**10, 2**12, 2**14, 2**16]
  means = [np.mean(gaps(width)) for width in widths]
  assert -0.6 < fit_slope(widths, means).slope < -0.4
  assert means[-1] < 0.02


@pytest.mark.parametrize("activation", _ALL)
def test_limit_is_the_expectation(activation):
  # A small deviation of weights: the mean of exponentials is then near.
  x, params = _sphere(4, 3), _network(m=2**16, o=1, sigma=0.5, paired=False)
  got = softmax.ntk(params, x, activation=activation)[:, 0, :, 0]
  want = ntk.limit_kernel(x, activation=activation, sigma=0.5)
  assert _relative(got, want) < 0.02
  part = ntk.limit_kernel(x[:1], x[1:], activation=activation, sigma=0.5)
  np.testing.assert_allclose(part, want[:1, 1:], rtol=1e-12)


def test_softmax_is_the_equilibrated_exponential():
  x = _sphere(6, 4) * np.linspace(0.3, 1, 6)[:, None]
  d = np.exp(0.8**2 * np.square(x).sum(1) / 2)
  plain = np.asarray(ntk.limit_kernel(x, sigma=0.8))
  exp = ntk.limit_kernel(x, activation="exp", sigma=0.8)
  np.testing.assert_allclose(exp, d[:, None] * plain * d, rtol=1e-12)
  # Parallel inputs of different length are told apart, equal ones and 0 not.
  smallest = {}
  rows = {"parallel": x[0] * 0.5, "equal": x[0], "zero": 0 * x[0]}
  for name, row in rows.items():
    more = jnp.concatenate((x, row[None]))
    values = np.linalg.eigvalsh(ntk.limit_kernel(more))
    assert values[0] > -1e-14 * values[-1]
    smallest[name] = values[0] / values[-1]
  assert smallest["parallel"] > 1e-9
  assert max(smallest["equal"], smallest["zero"]) < 1e-14


def test_rotations_of_inputs_and_weights_together_change_nothing():
  x, params = _sphere(5, 3), _network()
  q, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))
  turned = params._replace(hidden=params.hidden @ q)
  got, want = softmax.ntk(turned, x @ q), softmax.ntk(params, x)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


# --- perturbations ---


def test_changes_of_kernels():
  params, x = _network(m=4096, o=1, d=4), _sphere(8, 4)
  radii = jnp.array([1e-3, 1e-2, 1.0])
  profile = functools.partial(
    softmax.perturbation_profile, kinds=("random", "outward")
  )
  rngs = jax.random.split(jax.random.key(1), 8)
  # Flips of a ReLU are rare events: the mean square over directions.
  profiles = jax.vmap(profile, (0, None, None, None))(rngs, params, x, radii)
  change = jnp.sqrt(jnp.square(profiles).mean(0))
  softmax_random, exp_random, relu_random = change[:, 0]
  np.testing.assert_allclose(softmax_random[1] / softmax_random[0], 10, 0.05)
  np.testing.assert_allclose(exp_random[1] / exp_random[0], 10, 0.05)
  # A Lipschitz kernel against one that changes like the root of the radius.
  assert relu_random[1] / relu_random[0] < 4
  assert change[0, 1, 2] < change[1, 1, 2] / 2


def test_bound_holds():
  def ratio(kind, x, rng, radius):
    rngs = jax.random.split(rng, 4)
    params = softmax.init(rngs[0], 32, 3, 2, sigma=1.5, dtype="float64")
    inputs = x
    if kind == "random":
      output = jax.random.normal(rngs[1], params.output.shape, "float64")
      params, inputs = params._replace(output=output), None
    # Off the start, where outputs are 0.
    params = softmax.perturb(rngs[2], params, 1.0)
    moved = softmax.perturb(rngs[3], params, radius, kind=kind, x=inputs)
    step = jnp.linalg.norm(moved.hidden - params.hidden, axis=1)
    change = jnp.linalg.norm(softmax.ntk(moved, x) - softmax.ntk(params, x))
    bound = ntk.perturbation_bound(params, x, radius)
    return change / bound, step.max() / radius

  rngs = jax.random.split(jax.random.key(0), 50)
  for kind, longest, num, radii, least in (
    # It is of every network: of norms above 1, outputs of any size.
    ("random", 1.5, 50, (1e-3, 0.1, 0.5), 1e-4),
    # And says something: the worst change is hundredths of it.
    ("adversarial", 1.0, 5, (1e-3, 0.5), 0.005),
  ):
    x = _sphere(5, 3) * np.linspace(0.4, longest, 5)[:, None]
    ratios = quick_jit(jax.vmap(functools.partial(ratio, kind, x), (0, None)))
    for radius in radii:
      found, steps = ratios(rngs[:num], radius)
      assert found.max() <= 1
      assert found.max() > least
      assert steps.max() <= 1 + 1e-9


def test_adversarial_perturbations_are_worse():
  params, x = _network(m=32, o=1), _sphere(4, 3)
  before, radius = softmax.ntk(params, x), 0.1
  change = {}
  for kind in ("random", "adversarial"):
    moved = softmax.perturb(
      jax.random.key(1),
      params,
      radius,
      kind=kind,
      x=x if kind == "adversarial" else None,
    )
    change[kind] = jnp.linalg.norm(softmax.ntk(moved, x) - before)
  assert change["adversarial"] > 2 * change["random"]


# --- training ---


@pytest.mark.parametrize("activation", _ALL)
def test_a_step_is_one_of_gradient_descent(activation):
  x, y = _sphere(5, 3), _sphere(5, 2, seed=1)
  params = softmax.perturb(jax.random.key(1), _network(), 0.3)

  def loss(hidden):
    out = softmax.apply(
      params._replace(hidden=hidden), x, activation=activation
    )
    return jnp.square(out - y).sum() / 2

  value, gradient = quick_jit(jax.value_and_grad(loss))(params.hidden)
  run = functools.partial(
    softmax.train_two_layer, params, x, y, activation=activation, num_steps=1
  )
  trained, history = run(learning_rate=0.1)
  want = params.hidden - 0.1 / 64 * gradient
  np.testing.assert_allclose(trained.hidden, want, rtol=0, atol=1e-12)
  np.testing.assert_allclose(
    history.losses, [value, loss(want)], rtol=1e-10, atol=1e-10
  )
  np.testing.assert_array_equal(trained.output, params.output)
  other, _ = run(optimizer=optax.sgd(0.1 / 64))
  np.testing.assert_allclose(other.hidden, want, rtol=0, atol=1e-12)


def test_first_order_of_the_kernel_cancels_in_pairs():
  x, y = _sphere(6, 3), _sphere(6, 2, seed=1)

  def change(params, rate):
    moved, _ = softmax.train_two_layer(
      params, x, y, learning_rate=rate, num_steps=1
    )
    return _relative(softmax.ntk(moved, x), softmax.ntk(params, x))

  rates = [1e-3, 3e-3, 1e-2]
  for paired, order in ((True, 2), (False, 1)):
    changes = [change(_network(paired=paired), rate) for rate in rates]
    slope = fit_slope(rates, changes).slope
    np.testing.assert_allclose(slope, order, atol=0.05)


def test_linear_convergence():
  # Of a typical condition number, 42.
  x, y = _sphere(12, 4, seed=2), _sphere(12, 1, seed=1)
  params = _network(m=1024, d=4, o=1)
  factor = ntk.kernel_factor(softmax.ntk(params, x))
  _, history = softmax.train_two_layer(
    params,
    x,
    y,
    learning_rate=0.5 / factor.eigenvalues[-1],
    num_steps=2000,
  )
  assert history.losses[-1] < 1e-9
  assert (jnp.diff(history.losses) < 0).all()
  # By a factor a step, that of the smallest eigenvalue.
  found = (history.losses[1500] / history.losses[1000]) ** (1 / 500)
  values = factor.eigenvalues
  rate = (1 - 0.5 * values[0] / values[-1]) ** 2
  np.testing.assert_allclose(1 - found, 1 - rate, rtol=0.3)


def test_float32_does_not_lose_the_factor_m():
  x = _sphere(5, 3).astype("float32")
  params = softmax.init(jax.random.key(0), 2**16, 3, 1)
  moved = softmax.perturb(jax.random.key(1), params, 0.1)
  wide = jax.tree.map(lambda p: p.astype("float64"), moved)
  got = softmax.ntk(moved, x)
  assert got.dtype == jnp.float32
  want = softmax.ntk(wide, x.astype("float64"))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * want.max())


def test_16_bits_are_computed_in_32():
  x = _sphere(5, 3).astype("bfloat16")
  params = softmax.init(jax.random.key(0), 4096, 3, 1, dtype="bfloat16")
  moved = softmax.perturb(jax.random.key(1), params, 0.3)
  assert moved.hidden.dtype == jnp.bfloat16
  radii = jnp.array([1e-3, 0.1])
  wide = jax.tree.map(lambda p: p.astype("float32"), (moved, x))
  for fn in (
    softmax.apply,
    lambda params, x: softmax.perturbation_bound(params, x, 1e-3),
    lambda params, x: softmax.perturbation_profile(
      jax.random.key(2), params, x, radii
    ),
  ):
    got, want = fn(moved, x), fn(*wide)
    assert got.dtype == jnp.bfloat16
    # That of rounding what comes out, nothing more.
    np.testing.assert_allclose(
      got.astype("float32"), want, rtol=2**-8, atol=1e-6
    )


@pytest.mark.any_x64
def test_in_the_precision_that_users_have():
  x = jnp.asarray(_sphere(5, 3), "float32")
  y = jnp.ones((5, 2), "float32")
  params = softmax.init(jax.random.key(0), 2**14, 3, 2, sigma=0.5)
  want = jnp.kron(ntk.limit_kernel(x, sigma=0.5), jnp.eye(2, dtype="float32"))
  got = softmax.ntk(params, x).reshape(10, 10)
  assert got.dtype == want.dtype == jnp.float32
  assert _relative(got, want) < 0.03
  trained, history = softmax.train_two_layer(
    params,
    x,
    y,
    learning_rate=float(1 / np.linalg.eigvalsh(want)[-1]),
    num_steps=50,
  )
  assert history.losses.dtype == jnp.float32
  assert (jnp.diff(history.losses) < 0).all()
  change = _relative(softmax.ntk(trained, x), softmax.ntk(params, x))
  assert change < 1e-3
  assert ntk.perturbation_bound(params, x, 0.1) > 0


# --- conventions and refusals ---


def test_compiles_once():
  x, params = _sphere(4, 3), _network()
  y = jnp.ones((4, 2))
  other = jax.tree.map(lambda p: 2 * p, params)

  def run(params):
    softmax.apply(params, x)
    softmax.ntk(params, x)
    softmax.train_two_layer(params, x, y, learning_rate=0.1, num_steps=3)
    softmax.perturb(jax.random.key(0), params, 0.1)

  run(params)
  with no_recompilation():
    run(other)


def test_refused():
  x, params, rng = _sphere(4, 3), _network(), jax.random.key(0)
  y = jnp.ones((4, 2))
  train = functools.partial(softmax.train_two_layer, params, x)
  for call, message in (
    (
      lambda: softmax.init(rng, 65, 3, 2),
      "width must be even when paired=True, got 65",
    ),
    (
      lambda: softmax.init(rng, 64, 3, 2, sigma=0.0),
      "sigma must be positive, got 0.0",
    ),
    (lambda: softmax.init(rng, 64, 0, 2), "dim must be >= 1, got 0"),
    (
      lambda: softmax.apply(params, x, activation="gelu"),
      "activation must be one of 'softmax', 'exp', 'relu', got 'gelu'",
    ),
    (
      lambda: softmax.apply(params, x, output_scale="n"),
      "output_scale must be one of 'm', 'sqrt_m', got 'n'",
    ),
    (
      lambda: softmax.ntk(params, x[:, :2]),
      "x1 must have shape (*, 3) = (n, d), got (4, 2)",
    ),
    (
      lambda: softmax.ntk(params, x, x[:0]),
      "x2 must not be empty, got shape (0, 3)",
    ),
    (
      lambda: softmax.ntk(params._replace(output=y), x),
      "output must have shape (64, *) = (m, o), got (4, 2)",
    ),
    (
      lambda: ntk.limit_kernel(x, sigma=-1.0),
      "sigma must be positive, got -1.0",
    ),
    (
      lambda: softmax.init(rng, 64, 3, 2, sigma=jnp.ones(2)),
      "sigma must be a real scalar, got",
    ),
    (
      lambda: softmax.ntk(params, x, chunk_size=0),
      "chunk_size must be >= 1, got 0",
    ),
    (
      lambda: ntk.limit_kernel(x[:0]),
      "x1 must not be empty, got shape (0, 3)",
    ),
    (
      lambda: ntk.limit_kernel(x, x[:0]),
      "x2 must not be empty, got shape (0, 3)",
    ),
    (
      lambda: ntk.limit_kernel(x, x[:, :2]),
      "x2 must have shape (*, 3) = (n2, d), got (4, 2)",
    ),
    (
      lambda: train(y[:3], learning_rate=0.1, num_steps=2),
      "y must have shape (4, 2) = (n, o), got (3, 2)",
    ),
    (
      lambda: train(y, num_steps=2),
      "give one of learning_rate and optimizer",
    ),
    (
      lambda: train(y, learning_rate=0.0, num_steps=2),
      "learning_rate must be positive, got 0.0",
    ),
    (
      lambda: softmax.perturb(rng, params, 0.1, kind="inward"),
      "kind must be one of 'random', 'common', 'outward', 'adversarial', got",
    ),
    (
      lambda: softmax.perturb(rng, params, 0.1, kind="adversarial"),
      "x must be given with kind='adversarial', and only with it",
    ),
    (
      lambda: softmax.perturb(rng, params, 0.1, x=x),
      "x must be given with kind='adversarial', and only with it",
    ),
    (
      lambda: softmax.perturb(rng, params, 0.1, activation="exp"),
      "activation must be None with kind='random', got 'exp'",
    ),
    (
      lambda: softmax.perturb(
        rng, params, 0.1, kind="adversarial", x=x, activation="relu"
      ),
      "activation must be one of 'softmax', 'exp', got 'relu'",
    ),
    (
      lambda: ntk.perturbation_profile(
        rng, params, x, jnp.ones(1), kinds=("adversarial",)
      ),
      "activations must not hold 'relu' with 'adversarial' among kinds",
    ),
    (
      lambda: softmax.perturb(rng, params, -0.1),
      "radius must be non-negative, got -0.1",
    ),
    (
      lambda: ntk.perturbation_bound(params, x, -0.1),
      "radius must be non-negative, got -0.1",
    ),
    (
      lambda: ntk.perturbation_profile(rng, params, x, jnp.ones((1, 1))),
      "radii must have 1 dimensions, got shape (1, 1)",
    ),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      call()
