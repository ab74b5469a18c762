"""Margins of networks that add modulo p, against the closed form."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.ntk import margin
from tests._recompile import no_recompilation

# k, p
_SIZES = ((2, 7), (2, 23), (3, 7), (3, 11), (4, 5), (4, 7))
_KINDS = ("lattice", "grid3", "paper")


def _data(p, k):
  inputs = np.array(list(itertools.product(range(p), repeat=k)))
  return inputs, inputs.sum(1) % p


def _dense(params, inputs):
  """Outputs by products with one-hot vectors, in NumPy."""
  u, w = (np.asarray(x, np.float64) for x in params)
  hot = np.eye(w.shape[1])[np.asarray(inputs)]
  hidden = np.einsum("nkp,mkp->nm", hot, u)
  return hidden ** u.shape[1] @ w


def _dense_margins(params, p, k):
  inputs, labels = _data(p, k)
  out = _dense(params, inputs)
  rows = np.arange(len(out))
  own = out[rows, labels].copy()
  out[rows, labels] = -np.inf
  return own - out.max(1)


@functools.cache
def _exact(kind, p, k):
  return margin.fourier_network(p, k, kind=kind, dtype=jnp.float64)


# --- the network ---


def test_is_what_is_written_down():
  for k, p in ((2, 5), (3, 7)):
    params = margin.init(jax.random.key(k), 6, p, k, dtype=jnp.float64)
    inputs, labels = _data(p, k)
    got = margin.modular_inputs(p, k)
    np.testing.assert_array_equal(got, inputs)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(margin.modular_labels(got, p), labels)
    out = margin.apply(params, got)
    np.testing.assert_allclose(out, _dense(params, inputs), rtol=0, atol=1e-13)
    norms = [
      np.sqrt((np.asarray(u) ** 2).sum() + (np.asarray(w) ** 2).sum())
      for u, w in zip(*params, strict=True)
    ]
    want = np.linalg.norm(norms, k + 1)
    np.testing.assert_allclose(margin.group_norm(params), want, rtol=1e-12)


def test_initial_numbers_have_their_size():
  params = margin.init(jax.random.key(0), 400, 11, 3, std=0.25)
  assert params.inner.dtype == jnp.float32
  for x in params:
    # Six standard errors of a mean and of a standard deviation.
    error = 6 * 0.25 / math.sqrt(x.size)
    assert abs(float(x.mean())) < error
    assert abs(float(x.std()) - 0.25) < error / math.sqrt(2)


def test_outputs_are_homogeneous():
  for k, p in ((2, 5), (3, 5)):
    params = margin.init(jax.random.key(0), 6, p, k, dtype=jnp.float64)
    larger = jax.tree.map(lambda x: 1.7 * x, params)
    inputs = margin.modular_inputs(p, k)
    np.testing.assert_allclose(
      margin.apply(larger, inputs),
      1.7 ** (k + 1) * margin.apply(params, inputs),
      rtol=1e-12,
    )
    np.testing.assert_allclose(
      margin.group_norm(larger), 1.7 * margin.group_norm(params), rtol=1e-12
    )
    one, other = margin.normalize(params), margin.normalize(larger)
    np.testing.assert_allclose(margin.group_norm(one), 1, rtol=1e-12)
    raw = margin.evaluate_margin(params).minimum
    scaled = raw / margin.group_norm(params) ** (k + 1)
    for net in (one, other):
      got = margin.evaluate_margin(net).minimum
      np.testing.assert_allclose(got, scaled, rtol=1e-10)


def test_gradient_is_that_of_the_dense_network():
  k, p = 3, 5
  params = margin.init(jax.random.key(0), 4, p, k, dtype=jnp.float64)
  inputs = jnp.array([[0, 1, 2], [4, 4, 4], [0, 1, 3], [0, 1, 2]])
  weights = jax.random.normal(jax.random.key(1), (4, p), jnp.float64)

  def ours(params):
    return (weights * margin.apply(params, inputs)).sum()

  def dense(params):
    hot = jax.nn.one_hot(inputs, p, dtype=jnp.float64)
    hidden = jnp.einsum("nkp,mkp->nm", hot, params.inner)
    return (weights * (hidden**k @ params.outer)).sum()

  for got, want in zip(jax.grad(ours)(params), jax.grad(dense)(params)):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)


def test_no_gradient_is_lost_at_zero():
  zero = margin.PolyNet(jnp.zeros((3, 2, 5)), jnp.zeros((3, 5)))
  grads = jax.grad(margin.network.norm_power)(zero)
  for x in jax.tree.leaves(grads):
    np.testing.assert_array_equal(x, 0)
  assert margin.group_norm(zero) == 0


@pytest.mark.parametrize("k", [2, 3])
def test_power_of_the_norm(k):
  params = margin.init(jax.random.key(0), 5, 7, k, dtype=jnp.float64)
  np.testing.assert_allclose(
    margin.network.norm_power(params),
    margin.group_norm(params) ** (k + 1),
    rtol=1e-12,
  )


@pytest.mark.any_x64
def test_dtype_is_kept_and_nothing_compiles_twice():
  inputs = margin.modular_inputs(5, 3)
  net = margin.fourier_network(5, 3)
  want = _dense(net, inputs)
  out = margin.apply(net, inputs)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, want, rtol=0, atol=1e-5 * want.max())
  with no_recompilation():
    margin.apply(net, inputs)
  half = margin.fourier_network(5, 3, dtype=jnp.bfloat16)
  assert margin.apply(half, inputs).dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(margin.apply(half, inputs), np.float64),
    _dense(half, inputs),
    rtol=2**-8,
    atol=1e-4 * want.max(),
  )
  found = margin.evaluate_margin(half)
  for x in (margin.group_norm(half), found.minimum, found.maximum):
    assert x.dtype == jnp.bfloat16
  assert found.accuracy.dtype == jnp.float32


def test_what_is_out_of_range_is_not_clamped():
  net = margin.fourier_network(5, 2)
  inputs = jnp.array([[1, 5], [-1, 0], [4, 4]])
  out = jax.jit(margin.apply)(net, inputs)
  np.testing.assert_array_equal(np.isnan(out).all(1), [True, True, False])


def test_zeros_have_no_direction():
  zeros = margin.PolyNet(jnp.zeros((3, 2, 5)), jnp.zeros((3, 5)))
  for x in margin.normalize(zeros):
    np.testing.assert_array_equal(x, 0)


# --- the largest margin ---


def test_closed_form():
  got = margin.max_margin(23, 2) * 22 * math.sqrt(23) * 6**1.5 / 4
  np.testing.assert_allclose(got, 1, rtol=0, atol=1e-15)
  for p in (5, 11, 23, 97):
    got = margin.max_margin(p, 3) * 16 * p * (p - 1) / 3
    np.testing.assert_allclose(got, 1, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", _KINDS)
def test_networks_have_the_largest_margin(kind):
  for k, p in _SIZES:
    net, best = _exact(kind, p, k), margin.max_margin(p, k)
    np.testing.assert_allclose(margin.group_norm(net), 1, rtol=0, atol=1e-12)
    inputs, labels = _data(p, k)
    out = _dense(net, inputs)
    wrong = out[np.arange(p)[None] != labels[:, None]].reshape(-1, p - 1)
    assert np.ptp(wrong, axis=1).max() < 1e-12 * best, (k, p)
    own = out[np.arange(len(out)), labels]
    gaps = (own - wrong.max(1)) / best
    np.testing.assert_allclose(gaps, 1, rtol=0, atol=1e-10)
    # A wrong label gets -1 of p - 1 parts, not 0.
    np.testing.assert_allclose(own, -(p - 1) * wrong[:, 0], rtol=1e-9)


@pytest.mark.parametrize("kind", _KINDS)
def test_outputs_are_sums_of_cosines(kind):
  for k, p in ((2, 7), (3, 11), (4, 5)):
    net = _exact(kind, p, k)
    m = len(net.outer)
    count = 2 * m // (p - 1)
    size = m ** (-1 / (k + 1)) * math.sqrt(2 / ((k + 1) * p))
    inputs, labels = _data(p, k)
    t = labels[:, None] - np.arange(p)
    waves = 2 * np.pi * np.arange(1, (p + 1) // 2) / p
    total = np.cos(waves * t[..., None]).sum(-1)
    scale = size ** (k + 1) * count * math.factorial(k) / 2**k
    got = margin.apply(net, inputs)
    np.testing.assert_allclose(got, scale * total, rtol=0, atol=1e-12 * scale)


def test_numbers_of_neurons():
  paper = [len(_exact("paper", p, k).outer) for k, p in _SIZES]
  assert paper == [24, 88, 96, 160, 256, 384]
  for k, p in _SIZES:
    assert len(_exact("lattice", p, k).outer) == 3 ** (k - 1) * (p - 1)


@pytest.mark.parametrize("p", [9, 15])
def test_odd_is_enough(p):
  for kind in _KINDS:
    gaps = _dense_margins(_exact(kind, p, 2), p, 2)
    np.testing.assert_allclose(gaps, margin.max_margin(p, 2), rtol=1e-10)


def test_many_terms():
  for k in (5, 6):
    gaps = _dense_margins(_exact("lattice", 3, k), 3, k)
    np.testing.assert_allclose(gaps, margin.max_margin(3, k), rtol=1e-10)


def test_shifts_and_relabelings():
  k, p, r = 3, 7, 3
  net = _exact("lattice", p, k)
  inputs = margin.modular_inputs(p, k)
  shifted = inputs.at[:, 0].set((inputs[:, 0] + 1) % p)
  got = jnp.roll(margin.apply(net, shifted), -1, axis=1)
  want = margin.apply(net, inputs)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-15)
  order = r * np.arange(p) % p
  other = margin.PolyNet(net.inner[..., order], net.outer[..., order])
  best = margin.max_margin(p, k)
  got = margin.evaluate_margin(other).minimum
  np.testing.assert_allclose(got, best, rtol=1e-10)
  was = np.asarray(margin.fourier_report(net).frequency)
  now = np.asarray(margin.fourier_report(other).frequency)
  turned = r * was % p
  np.testing.assert_array_equal(now, np.minimum(turned, p - turned))
  assert set(now) == set(was)


def test_without_a_frequency():
  k = 2
  for p, want in ((11, 0.8047), (23, 0.9096)):
    net = _exact("lattice", p, k)
    keep = np.asarray(margin.fourier_report(net).frequency) != 2
    rest = margin.PolyNet(net.inner[keep], net.outer[keep])
    rest = margin.normalize(rest)
    got = _dense_margins(rest, p, k).min() / margin.max_margin(p, k)
    factor = (p / 2 - 1 - math.cos(math.pi / p)) * 2 / p * (p - 1) / (p - 3)
    np.testing.assert_allclose(got, factor, rtol=1e-10)
    np.testing.assert_allclose(factor, want, atol=5e-5)
    inputs, labels = _data(p, k)
    out = _dense(rest, inputs)
    wrong = out[np.arange(p)[None] != labels[:, None]].reshape(-1, p - 1)
    assert np.ptp(wrong, axis=1).min() > 0.1 * margin.max_margin(p, k)


def test_one_neuron_of_another_frequency():
  p, k = 11, 2
  net = _exact("lattice", p, k)
  a = np.arange(p)
  order = 2 * a % p
  moved = margin.PolyNet(
    net.inner.at[0].set(net.inner[0][:, order]),
    net.outer.at[0].set(net.outer[0][order]),
  )
  np.testing.assert_allclose(margin.group_norm(moved), 1, rtol=1e-12)
  ratio = margin.evaluate_margin(moved).minimum / margin.max_margin(p, k)
  assert ratio < 0.99


# --- designs ---


def test_designs_are_exact():
  for k in (2, 3, 4, 5):
    for kind in _KINDS:
      steps, n = margin.design._design(kind, k)
      assert margin.is_exact_design(steps, n, k), (kind, k)
    two = list(itertools.product(range(2), repeat=k))
    assert not margin.is_exact_design(two, 2, k)


def test_smallest_lattice_of_two_terms():
  def works(n, g):
    steps = np.outer(np.arange(n), g) % n
    return margin.is_exact_design(steps, n, 2)

  found = {
    n: {g for g in itertools.product(range(n), repeat=2) if works(n, g)}
    for n in range(1, 7)
  }
  assert all(not found[n] for n in range(1, 6))
  assert {(1, 4), (2, 5), (4, 1)} <= found[6]


def test_design_is_decided_as_sums_decide():
  # Sums of roots of unity, in floating point.
  rng = np.random.default_rng(0)
  for n in (4, 6, 12, 15):
    counts = rng.integers(0, 2, (40, n))
    counts[::2] += np.roll(counts[::2], n // 2, axis=1)
    counts[::3] = counts[::3, :1]
    omega = np.exp(2j * np.pi * np.arange(n) / n)
    want = np.abs(counts @ omega) < 1e-9
    np.testing.assert_array_equal(margin.design._vanishes(counts), want)
    assert 0 < want.sum() < len(want)


def test_own_phases():
  steps, n = margin.design._design("grid3", 2)
  got = margin.fourier_network(7, 2, phases=(steps, n), dtype=jnp.float64)
  for x, y in zip(got, _exact("grid3", 7, 2)):
    np.testing.assert_array_equal(x, y)


# --- reports ---


def test_margin_of_any_network():
  k, p = 3, 5
  params = margin.init(jax.random.key(3), 7, p, k, std=1.0, dtype=jnp.float64)
  gaps = _dense_margins(params, p, k)
  assert 0 < (gaps > 0).mean() < 1
  for chunk_size in (None, 7, 1000):
    found = margin.evaluate_margin(params, chunk_size=chunk_size)
    np.testing.assert_allclose(found.minimum, gaps.min(), rtol=1e-12)
    np.testing.assert_allclose(found.maximum, gaps.max(), rtol=1e-12)
    np.testing.assert_allclose(found.accuracy, (gaps > 0).mean(), rtol=1e-12)


def test_margin_is_computed_in_bounded_memory():
  shape = jax.ShapeDtypeStruct
  net = margin.PolyNet(
    shape((2944, 4, 47), jnp.float32), shape((2944, 47), jnp.float32)
  )
  evaluate = jax.jit(margin.evaluate_margin, static_argnames="chunk_size")
  compiled = evaluate.lower(net, chunk_size=256).compile()
  # The sums of one chunk are 3 MB; of all inputs they would be 57 GB.
  assert compiled.memory_analysis().temp_size_in_bytes < 3e7


@pytest.mark.parametrize(("k", "p"), [(2, 7), (3, 5)])
def test_expected_margin(k, p):
  params = margin.init(jax.random.key(0), 200, p, k, dtype=jnp.float64)
  norms = np.sqrt(margin.network.norms(params))
  unit = margin.PolyNet(
    params.inner / norms[:, None, None], params.outer / norms[:, None]
  )
  inputs, labels = _data(p, k)
  hot = np.eye(p)[inputs]
  hidden = np.einsum("nkp,mkp->nm", hot, unit.inner) ** k
  # Of one neuron f is hidden times w.
  w = np.asarray(unit.outer)
  gain = (p * w[:, labels] - w.sum(1, keepdims=True)) / (p - 1)
  want = (hidden * gain.T).mean(0)
  got = margin.expected_margin(unit)
  best = margin.max_margin(p, k)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * best)
  assert float(got.max()) <= best * (1 + 1e-9)


@pytest.mark.parametrize(("k", "p"), [(2, 7), (3, 5)])
def test_no_neuron_does_better(k, p):
  best = margin.max_margin(p, k)
  params = margin.init(jax.random.key(1), 64, p, k, dtype=jnp.float64)

  def project(params):
    size = jnp.sqrt(margin.network.norms(params))
    return margin.PolyNet(
      params.inner / size[:, None, None], params.outer / size[:, None]
    )

  def step(params, _):
    grads = jax.grad(lambda q: margin.expected_margin(q).sum())(params)
    moved = jax.tree.map(lambda x, g: x + 0.1 * g / best, params, grads)
    return project(moved), None

  @jax.jit
  def ascend(params):
    end, _ = jax.lax.scan(step, project(params), length=4000)
    return margin.expected_margin(end), end

  values, end = ascend(params)
  assert float(values.max()) <= best * (1 + 1e-9)
  assert float(values.max()) >= 0.999 * best
  # What is found is a cosine of one frequency in all of its vectors.
  report = margin.fourier_report(end)
  top = int(values.argmax())
  assert report.power_share[top].min() > 0.99
  assert report.alignment[top] > 0.99


@pytest.mark.parametrize("kind", _KINDS)
def test_spectra_of_exact_networks(kind):
  for k, p in ((2, 23), (3, 11)):
    net = _exact(kind, p, k)
    report = margin.fourier_report(net)
    assert report.power_share.shape == (len(net.outer), k + 1)
    np.testing.assert_allclose(report.power_share, 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(report.alignment, 1, rtol=0, atol=1e-12)
    assert report.active.all()
    assert report.coverage == (p - 1) // 2
    counts = np.bincount(report.frequency)[1:]
    assert counts.tolist() == [2 * len(net.outer) // (p - 1)] * len(counts)


def test_spectra_of_mixed_neurons():
  p = 7
  a = 2 * np.pi * np.arange(p) / p
  # Frequencies 1 and 3, with amplitudes 3 and 1, and a constant of 1.
  mixed = 3 * np.cos(a) + np.cos(3 * a) + 1
  pure = np.cos(2 * a + 0.5)
  inner = np.stack([[mixed, 5 * pure], [0 * a, 0 * a], [pure, pure]])
  outer = np.stack([pure, 0 * a, 1e-3 * np.cos(2 * a)])
  inner[2] *= 1e-3
  net = margin.PolyNet(jnp.asarray(inner), jnp.asarray(outer))
  report = margin.fourier_report(net)
  share = 9 / (9 + 1 + 2)
  np.testing.assert_allclose(
    report.power_share,
    [[share, 1, 1], [0, 0, 0], [1, 1, 1]],
    rtol=0,
    atol=1e-12,
  )
  assert report.frequency[0] == 2
  assert report.active.tolist() == [True, False, False]
  assert report.coverage == 1
  # Phases 0.5 and 0.5 against 0.
  np.testing.assert_allclose(report.alignment[2], math.cos(1), rtol=1e-9)


# --- what is refused ---

_NET = margin.PolyNet(jnp.zeros((4, 2, 5)), jnp.zeros((4, 5)))
_BIG = margin.PolyNet(jnp.zeros((1, 9, 9)), jnp.zeros((1, 9)))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: margin.fourier_network(8, 2),
      "modulus must be odd and >= 3, got 8",
    ),
    (lambda: margin.max_margin(1, 2), "modulus must be odd and >= 3, got 1"),
    (
      lambda: margin.max_margin(5.0, 2),
      "modulus must be odd and >= 3, got 5.0",
    ),
    (lambda: margin.max_margin(5, 1), "num_terms must be >= 2, got 1"),
    (
      lambda: margin.init(jax.random.key(0), 0, 5, 2),
      "width must be >= 1, got 0",
    ),
    (
      lambda: margin.init(jax.random.key(0), 4, 5, 2, std=-1.0),
      "std must be positive, got -1.0",
    ),
    (
      lambda: margin.modular_inputs(97, 5),
      "modulus**num_terms must be at most 2**28, got 97**5 = 8587340257",
    ),
    (
      lambda: margin.modular_labels(jnp.array([[0, 5]]), 5),
      "all inputs must be in [0, 4], got [[0 5]]",
    ),
    (
      lambda: margin.apply(_NET, jnp.array([[0, -1]])),
      "all inputs must be in [0, 4], got [[ 0 -1]]",
    ),
    (
      lambda: margin.apply(_NET, jnp.zeros((3, 2))),
      "inputs must be integers, got float64",
    ),
    (
      lambda: margin.apply(_NET, jnp.zeros((3, 3), int)),
      "inputs must have shape (*, 2) = (n, k), got (3, 3)",
    ),
    (
      lambda: margin.group_norm(_NET._replace(outer=jnp.zeros((4, 7)))),
      "params.outer must have shape (4, 5) = (m, p), got (4, 7)",
    ),
    (
      lambda: margin.normalize(_NET._replace(outer=jnp.zeros((4, 5), "f4"))),
      "all arrays must have one dtype, got params.outer of float32",
    ),
    (
      lambda: margin.fourier_report(_NET._replace(inner=jnp.zeros((4, 5)))),
      "params.inner must have 3 dimensions, got shape (4, 5)",
    ),
    (
      lambda: margin.expected_margin(
        margin.PolyNet(jnp.zeros((4, 2, 6)), jnp.zeros((4, 6)))
      ),
      "modulus must be odd and >= 3, got 6",
    ),
    (
      lambda: margin.evaluate_margin(_BIG),
      "chunk_size is required for more than 2**28 inputs, got 9**9 = 387420489",
    ),
    (
      lambda: margin.evaluate_margin(
        margin.PolyNet(jnp.zeros((1, 9, 11)), jnp.zeros((1, 11))), chunk_size=9
      ),
      "there must be less than 2**31 inputs, got 11**9",
    ),
    (
      lambda: margin.evaluate_margin(_NET, chunk_size=0),
      "chunk_size must be >= 1, got 0",
    ),
    (
      lambda: margin.fourier_network(5, 3, kind="grid"),
      "kind must be one of 'lattice', 'grid3', 'paper', got 'grid'",
    ),
    (
      lambda: margin.fourier_network(
        5, 3, phases=(list(itertools.product(range(2), repeat=3)), 2)
      ),
      "phases are not an exact design for num_terms=3: harmonic (2, 0, 0) "
      "does not vanish",
    ),
    (
      lambda: margin.fourier_network(5, 2, kind="paper", phases=([[0, 0]], 2)),
      "kind must be left out beside phases, got 'paper'",
    ),
    (
      lambda: margin.is_exact_design([[0.5, 1.0]], 3, 2),
      "phases must be one or more rows of integers, got shape (1, 2) of float",
    ),
    (
      lambda: margin.is_exact_design([[0, 1, 2]], 3, 2),
      "phases must have shape (*, 2) = (Q, k), got (1, 3)",
    ),
    (
      lambda: margin.is_exact_design([[0, 1]], 0, 2),
      "n must be >= 1, got 0",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
