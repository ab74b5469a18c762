"""Hopfield retrieval: its theorems, its bounds, its low-rank path."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from scipy import special

from jaxattn.attention import (
  capacity_lower_bound,
  hopfield_add,
  hopfield_energy,
  hopfield_forget,
  hopfield_plan,
  hopfield_retrieve,
  hopfield_store,
  hopfield_update,
  pattern_separation,
  retrieval_error_bound,
  topk_attention,
)
from jaxattn.attention._hopfield import rows as module
from jaxattn.features import degree_for, taylor_error_bound
from tests._jaxpr import array_sizes
from tests._recompile import no_recompilation


def _sphere(shape, radius, seed=0):
  x = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(radius * x / np.linalg.norm(x, axis=-1, keepdims=True))


def _normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def _mean_of(x, patterns, beta, values):
  weights = special.softmax(beta * np.asarray(x) @ np.asarray(patterns).T, -1)
  return weights @ np.asarray(values)


# --- dense ---


def test_update_is_attention():
  x, patterns, values = _normal(7, 8), _normal(30, 8, seed=1), _normal(30, 3)
  got = hopfield_update(x, patterns, 0.7, values)
  want = _mean_of(x, patterns, 0.7, values)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  got = hopfield_update(x, patterns, 0.7)
  heads = (y[None, :, None] for y in (x, patterns, patterns))
  peer = jax.nn.dot_product_attention(*heads, scale=0.7)
  # Theirs takes its logits in float32, whatever comes in.
  np.testing.assert_allclose(got, peer[0, :, 0], rtol=0, atol=1e-6)
  # Any leading axes; without values those of the patterns.
  box = x[:6].reshape(2, 3, 8)
  got = hopfield_update(box, patterns, jnp.float32(0.7))
  want = _mean_of(box, patterns, np.float64(np.float32(0.7)), patterns)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  one = hopfield_update(x[0], patterns, 0.7)
  np.testing.assert_allclose(one, _mean_of(x[0], patterns, 0.7, patterns))


def test_energy_is_its_formula_and_its_gradient_the_update():
  x, patterns = 2 * _normal(5, 8), _normal(30, 8, seed=1)
  for beta in (0.3, 2.0):
    lse = special.logsumexp(beta * np.asarray(x @ patterns.T), -1) / beta
    constant = np.log(30) / beta + (patterns**2).sum(1).max() / 2
    want = (x**2).sum(1) / 2 - lse + constant
    got = hopfield_energy(x, patterns, beta)
    np.testing.assert_allclose(got, want, rtol=1e-13)
    slope = jax.vmap(jax.grad(hopfield_energy), (0, None, None))
    got = slope(x, patterns, beta)
    want = x - hopfield_update(x, patterns, beta)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_energy_keeps_its_digits_at_tiny_beta():
  x, patterns = _normal(8), _normal(30, 8, seed=1)
  want = hopfield_energy(x, patterns, 1e-6)
  got = hopfield_energy(
    x.astype(jnp.float32), patterns.astype(jnp.float32), 1e-6
  )
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_energy_keeps_its_digits_where_one_pattern_dominates():
  patterns = _sphere((1 << 15, 8), 1.0).astype(jnp.float32)
  x = patterns[:4] + 0.05 * _normal(4, 8, seed=1).astype(jnp.float32)

  def both(x, patterns):
    rows = jax.vmap(jax.value_and_grad(hopfield_energy), (0, None, None))
    return rows(x, patterns, 1e4)

  got = both(x, patterns)
  wide = [y.astype(jnp.float64) for y in (x, patterns)]
  for a, b in zip(got, both(*wide), strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-7)
  np.testing.assert_allclose(
    got[1], x - hopfield_update(x, patterns, 1e4), rtol=0, atol=2e-7
  )


def test_energy_never_rises():
  patterns = _sphere((64, 16), 4.0)
  rng = np.random.default_rng(1)
  noisy = patterns[:50] + 0.8 * rng.standard_normal((50, 16))
  anywhere = _sphere((50, 16), 4.0, seed=2) * rng.random((50, 1))
  x = jnp.concatenate([noisy, anywhere])
  # The ball of the patterns, in which the bounds hold.
  length = jnp.linalg.norm(x, axis=1, keepdims=True)
  x = x * jnp.minimum(1, 4 / length)
  energies = [hopfield_energy(x, patterns, 1.0)]
  for _ in range(20):
    x = hopfield_update(x, patterns, 1.0)
    energies.append(hopfield_energy(x, patterns, 1.0))
  assert (np.diff(energies, axis=0) <= 1e-12).all()
  assert 0 <= np.min(energies)
  assert np.max(energies) <= 2 * 16
  # And a fall, not a standstill.
  assert (energies[0] - energies[-1]).min() > 1e-3


def test_retrieves_what_was_stored():
  """Of a noisy query: the energy falls from 8 to 4.158 next to the pattern."""
  patterns = _sphere((64, 16), 4.0)
  noise = 0.8 * np.random.default_rng(1).standard_normal((64, 16))
  got, info = hopfield_retrieve(
    patterns + noise, patterns, 1.0, tol=1e-10, max_steps=200, return_info=True
  )
  again = hopfield_update(got, patterns, 1.0)
  np.testing.assert_allclose(got, again, rtol=0, atol=1e-9)
  distance = np.linalg.norm(got - patterns, axis=1)
  assert (distance < 0.1).mean() > 0.9
  assert np.median(distance) < 5e-3
  start = hopfield_energy(patterns + noise, patterns, 1.0)
  assert 7 < np.median(start) < 10
  stored = np.median(np.asarray(info.energy)[distance < 0.1])
  np.testing.assert_allclose(stored, 4.158, atol=2e-3)
  np.testing.assert_allclose(
    info.energy, hopfield_energy(got, patterns, 1.0), rtol=1e-12
  )
  assert (info.residual <= 1e-10).all()


def test_each_query_stops_by_itself():
  patterns = _sphere((64, 16), 4.0)
  x = patterns[:8] + 1.2 * _normal(8, 16, seed=1)
  call = lambda x, n: hopfield_retrieve(  # noqa: E731
    x, patterns, 1.0, tol=1e-3, max_steps=n, return_info=True
  )
  got, info = call(x, 30)
  steps = np.asarray(info.num_steps)
  assert steps.min() < steps.max() < 30
  for i in range(8):
    alone = x[i]
    for _ in range(steps[i]):
      before, alone = alone, hopfield_update(alone, patterns, 1.0)
    np.testing.assert_allclose(got[i], alone, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
      info.residual[i], jnp.abs(alone - before).max(), rtol=1e-9
    )
  few = int(steps.min())
  _, info = call(x, few)
  assert (info.num_steps == few).all()
  assert (info.residual > 1e-3).any()


def test_limits_of_beta():
  patterns = _sphere((20, 8), 2.0).astype(jnp.float32)
  x = _normal(6, 8, seed=2).astype(jnp.float32)
  nearest = patterns[jnp.argmax(x @ patterns.T, -1)]
  # In float32 the weight of a pattern 104 / beta behind is 0.
  first, second = jax.lax.top_k(x @ patterns.T, 2)[0].T
  assert (first - second).min() * 1e4 > 104
  got = hopfield_update(x, patterns, 1e4)
  np.testing.assert_array_equal(got, nearest)
  assert jnp.isfinite(hopfield_energy(x, patterns, 1e4)).all()
  # Which is attention to the most similar one.
  heads = (y[:, None] for y in (x, patterns, patterns))
  np.testing.assert_array_equal(topk_attention(*heads, k=1)[:, 0], nearest)
  got = hopfield_update(x, patterns, 1e-6)
  mean = jnp.broadcast_to(patterns.mean(0)[None], got.shape)
  np.testing.assert_allclose(got, mean, atol=1e-5)


def test_close_patterns_share_a_state():
  first = _sphere((8,), 1.0)
  step = 0.1 * _sphere((8,), 1.0, seed=1)
  patterns = jnp.stack([first, first + step])
  got = hopfield_retrieve(first, patterns, 1.0)
  np.testing.assert_allclose(got, patterns.mean(0), atol=1e-2)
  assert jnp.linalg.norm(got - first) > 0.04


@pytest.mark.parametrize("method", ["dense", "lowrank"])
def test_gradients_agree_at_the_fixed_point(method):
  x, patterns = _normal(3, 4), 0.5 * _normal(9, 4, seed=1)
  target = _normal(3, 4, seed=2)

  def loss(patterns, beta, backward):
    state = None
    if method == "lowrank":
      state = hopfield_store(patterns, beta, degree=6)
    got = hopfield_retrieve(
      x,
      patterns,
      beta,
      tol=1e-12,
      max_steps=60,
      method=method,
      state=state,
      backward=backward,
    )
    return ((got - target) ** 2).sum()

  grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
  unrolled, implicit = (
    grad(patterns, 0.8, b) for b in ("unrolled", "implicit")
  )
  for got, want in zip(implicit, unrolled, strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)
    assert jnp.abs(want).max() > 1e-2


def test_implicit_gradient_ignores_the_start():
  patterns, x = 0.5 * _normal(9, 4, seed=1), _normal(4)
  loss = lambda x, b: hopfield_retrieve(  # noqa: E731
    x, patterns, 0.8, max_steps=4, tol=0.0, backward=b
  ).sum()
  assert not jax.grad(loss)(x, "implicit").any()
  assert jax.grad(loss)(x, "unrolled").any()


def test_values_do_not_depend_on_the_backward_pass():
  x, patterns = _normal(2, 3, 8), _normal(2, 20, 8, seed=1)

  def call(patterns, x, backward="implicit"):
    out = hopfield_retrieve(
      x, patterns, 1.0, max_steps=4, tol=0.3, backward=backward,
      return_info=True,
    )  # fmt: skip
    return out[0].sum(), out

  grad = jax.value_and_grad(call, has_aux=True)
  (_, got), grads = jax.jit(jax.vmap(grad))(patterns, x)
  _, want = jax.jit(jax.vmap(lambda p, x: call(p, x, "unrolled")))(patterns, x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), got, want
  )
  assert len(set(np.asarray(got[1].num_steps).flat)) > 1
  # A batch of memories has the gradients of each.
  _, alone = jax.jit(grad)(patterns[1], x[1])
  np.testing.assert_allclose(grads[1], alone, rtol=0, atol=1e-10)


def test_batches_of_memories():
  x, patterns = _normal(3, 5, 8), 2 * _normal(3, 20, 8, seed=1)
  call = lambda x, p: hopfield_retrieve(  # noqa: E731
    x, p, 1.0, max_steps=5, return_info=True
  )
  got, info = jax.jit(jax.vmap(call))(x, patterns)
  for i in range(3):
    want, want_info = call(x[i], patterns[i])
    np.testing.assert_allclose(got[i], want, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(info.num_steps[i], want_info.num_steps)


def test_rows_in_parts(monkeypatch):
  # Shapes that no other test compiles for.
  x, patterns = _normal(7, 9), _normal(31, 9, seed=1)
  monkeypatch.setattr(module, "PART", 100)

  def run(x, mu):
    energy = jax.value_and_grad(
      lambda x: hopfield_energy(x, patterns, 1.0).sum()
    )
    return energy(x), retrieval_error_bound(x, patterns, mu, 1.0)

  sizes = array_sizes(run, x, jnp.arange(7))
  assert max(sizes) == patterns.size
  got = jax.tree.map(jnp.sum, run(x, jnp.arange(7)))
  rows = [run(x[i : i + 1], jnp.array([i])) for i in range(7)]
  want = jax.tree.map(lambda *y: jnp.stack(y).sum(), *rows)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, want
  )
  products = np.array(patterns @ patterns.T)
  own = np.diag(products).copy()
  np.fill_diagonal(products, -np.inf)
  want = own - products.max(1)
  np.testing.assert_allclose(pattern_separation(patterns), want, rtol=1e-12)


# --- low-rank ---


def _bounded(largest, num=300, dim=6):
  """Queries and patterns, centered, with logits up to ``largest``."""
  x, patterns = _normal(num, dim), _normal(num, dim, seed=1)
  patterns = patterns - patterns.mean(0)[None]
  factor = largest / jnp.abs(x @ patterns.T).max()
  return x * factor, patterns


def _lowrank(x, patterns, degree, beta=1.0, **options):
  """Under ``jit``: nothing is refused for the size of its logits."""

  @jax.jit
  def run(x, patterns):
    state = hopfield_store(patterns, beta, degree=degree)
    return hopfield_retrieve(
      x, patterns, beta, max_steps=1, method="lowrank", state=state, **options
    )

  return run(x, patterns)


def test_error_of_degrees_is_within_its_bound():
  decided = 0
  for largest in (0.1, 0.5, 1.0, 2.0):
    x, patterns = _bounded(largest)
    want = hopfield_update(x, patterns, 1.0)
    before = math.inf
    for degree in (2, 4, 6, 8):
      error = float(jnp.abs(_lowrank(x, patterns, degree) - want).max())
      kernel = taylor_error_bound(largest, degree)
      if kernel < 1:
        decided += 1
        bound = 2 * kernel / (1 - kernel) * float(jnp.abs(patterns).max())
        assert error <= bound
        assert 1e-6 * bound < error or error < 1e-14
      assert error < before / 2 or error < 1e-14
      before = error
  assert decided >= 10


def test_high_degree_is_dense_and_logits_are_shifted():
  x, patterns = _bounded(0.5, num=40, dim=4)
  # A shift of all patterns makes logits as large as you like, and no harm.
  patterns = patterns + 3.0
  degree = hopfield_plan(0.5, 4, 40, 40, eps=1e-10).degree
  got = _lowrank(x, patterns, degree)
  want = hopfield_update(x, patterns, 1.0)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


def test_many_steps_and_info():
  x, patterns = _bounded(0.3, num=40, dim=4)
  patterns = 0.4 * patterns
  state = hopfield_store(patterns, 1.0, degree=10)
  call = {"tol": 1e-9, "max_steps": 40, "return_info": True}
  want, dense = hopfield_retrieve(x, patterns, 1.0, **call)
  got, info = hopfield_retrieve(
    x, patterns, 1.0, method="lowrank", state=state, **call
  )
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)
  np.testing.assert_allclose(info.energy, dense.energy, rtol=1e-9)
  assert (abs(info.num_steps - dense.num_steps) <= 1).all()


def test_states_add_up():
  patterns, values = 0.3 * _normal(50, 4), _normal(50, 3, seed=1)
  order = np.random.default_rng(2).permutation(50)
  close = lambda a, b: jax.tree.map(  # noqa: E731
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), a, b
  )
  state = hopfield_store(patterns, 2.0, degree=4, values=values)
  other = hopfield_store(
    patterns[order], 2.0, degree=4, values=values[order], chunk_size=7
  )
  close(other, state)
  # Opposite pairs leave the shift, 0, as it is.
  pairs = jnp.concatenate([patterns, -patterns])
  twice = jnp.concatenate([values, values])
  whole = hopfield_store(pairs, 2.0, degree=4, values=twice)
  less = hopfield_forget(whole, pairs[0], twice[0])
  less = hopfield_forget(less, pairs[50:51], twice[50:51])
  rest = np.delete(np.arange(100), [0, 50])
  want = hopfield_store(pairs[rest], 2.0, degree=4, values=twice[rest])
  close(less._replace(radius=want.radius), want)
  for i in (0, 50):
    less = hopfield_add(less, pairs[i], twice[i])
  close(less, whole)


def test_adding_far_patterns_is_storing_them():
  x, patterns = _bounded(0.4, num=40, dim=4)
  state = hopfield_store(patterns[:30], 1.0, degree=12)
  state = hopfield_add(state, patterns[30:])
  np.testing.assert_allclose(state.k[0], 40)
  low = {"max_steps": 1, "method": "lowrank"}
  got = hopfield_retrieve(x, None, 1.0, state=state, **low)
  want = hopfield_update(x, patterns, 1.0)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)
  state = hopfield_forget(state, patterns[:30])
  got = hopfield_retrieve(x, None, 1.0, state=state, **low)
  want = hopfield_update(x, patterns[30:], 1.0)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


def test_reads_values_once():
  x, patterns = _bounded(0.5, num=40, dim=4)
  values = _normal(40, 3)
  state = hopfield_store(patterns, 1.0, degree=10, values=values)
  low = {"method": "lowrank", "state": state}
  got = hopfield_retrieve(x, None, 1.0, max_steps=1, **low)
  want = hopfield_update(x, patterns, 1.0, values)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)
  with pytest.raises(ValueError, match="max_steps must be 1, unrolled and wit"):
    hopfield_retrieve(x, None, 1.0, **low)
  with pytest.raises(ValueError, match="value is required: the state holds va"):
    hopfield_add(state, patterns[0])


def test_sums_are_never_a_matrix_of_features():
  patterns = jax.ShapeDtypeStruct((4096, 8), jnp.float32)
  x = jax.ShapeDtypeStruct((65536, 8), jnp.float32)

  def run(x, patterns):
    state = hopfield_store(patterns, 0.125, degree=4, chunk_size=256)
    return hopfield_retrieve(
      x, None, 0.125, max_steps=2, method="lowrank", state=state
    )

  sizes = array_sizes(jax.jit(run), x, patterns)
  assert max(sizes) <= module.PART


def test_plan():
  """Degrees of the closed form for A of 1/16 to 16, and what they cost."""
  radii = (0.0625, 0.25, 1, 2.25, 4, 9, 16)
  table = [degree_for(1e-3, a, kind="taylor_bound", even=False) for a in radii]
  assert table == [2, 3, 7, 12, 20, 41, 71]
  for radius, least in zip(radii, table, strict=True):
    plan = hopfield_plan(radius, 8, 10_000, 10_000)
    assert plan.degree % 2 == 0
    assert plan.degree >= least
    # The smallest even degree whose output is as good as asked for.
    error, before = (
      taylor_error_bound(radius, g) for g in (plan.degree, plan.degree - 2)
    )
    np.testing.assert_allclose(plan.bound, 2 * error / (1 - error))
    assert plan.bound <= 1e-3
    assert before >= 1 or 2 * before / (1 - before) > 1e-3
    assert plan.rank == math.comb(8 + plan.degree, plan.degree)
    cheap = plan.flops_lowrank < plan.flops_dense
    assert plan.method == ("lowrank" if cheap else "dense")
    assert cheap == (plan.degree <= 4)
  plan = hopfield_plan(0.0625, 4, 1000, 10, num_steps=7)
  assert plan.flops_dense == 4 * 1000 * 70 * 4
  assert plan.flops_lowrank == 2 * 1070 * 15 * 6
  # Entries up to B = sqrt(A): the fast way ends below B = 1.
  radii = np.linspace(0.05, 1, 96)
  plans = [hopfield_plan(a, 8, 10_000, 10_000) for a in radii]
  paying = max(a for a, p in zip(radii, plans) if p.method == "lowrank")
  assert 0.85 < paying < 0.9
  # Equal patterns; and more features than can be stored.
  assert hopfield_plan(0.0, 8, 100, 100)[:3] == ("lowrank", 0, 1)
  large = hopfield_plan(1.0, 32, 10**9, 10**9)
  assert large.method == "dense"
  assert large.flops_lowrank < large.flops_dense
  assert large.rank > 1 << 22
  nothing = hopfield_plan(60.0, 4, 10, 10)
  assert nothing[:3] == ("dense", None, None)
  assert nothing.bound == nothing.flops_lowrank == math.inf


# --- theory ---


def test_error_bounds_hold_and_are_close():
  tightest = 0.0
  for seed in range(4):
    rng = np.random.default_rng(seed)
    patterns = jnp.asarray(rng.standard_normal((64, 16)))
    mu = rng.integers(64, size=500)
    noise = rng.uniform(0, 1.5, (500, 1)) * rng.standard_normal((500, 16))
    x = patterns[mu] + noise
    beta = (0.1, 0.3, 1.0, 3.0)[seed]
    error = jnp.linalg.norm(
      hopfield_update(x, patterns, beta) - patterns[mu], axis=1
    )
    bound = retrieval_error_bound(x, patterns, jnp.asarray(mu), beta)
    assert (error <= bound.weight * (1 + 1e-12)).all()
    assert (bound.weight <= bound.gap * (1 + 1e-12)).all()
    tightest = max(tightest, float((error / bound.weight).max()))
  assert 0.5 < tightest <= 1


def test_bound_of_low_rank_retrieval():
  x, patterns = _bounded(0.5, num=60)
  mu = jnp.argmax(x @ patterns.T, -1)
  kernel = taylor_error_bound(0.5, 4)
  bound = retrieval_error_bound(x, patterns, mu, 1.0).weight
  bound += 2 * kernel / (1 - kernel) * jnp.abs(patterns).max()
  error = jnp.abs(_lowrank(x, patterns, 4) - patterns[mu]).max(-1)
  assert (error <= bound).all()


def test_one_pattern_alone():
  pattern = _normal(1, 5)
  bound = retrieval_error_bound(_normal(5, seed=1), pattern, -1, 1.0)
  assert tuple(map(float, bound)) == (0.0, 0.0)
  assert jnp.isinf(pattern_separation(pattern)).all()


def test_separation_says_what_is_stored():
  patterns = _sphere((64, 16), 4.0)
  products = np.array(patterns @ patterns.T)
  own = np.diag(products).copy()
  np.fill_diagonal(products, -np.inf)
  want = own - products.max(1)
  np.testing.assert_allclose(pattern_separation(patterns), want, rtol=1e-12)
  # Each pattern that is separated far enough is a fixed point, nearly.
  beta, m = 4.0, 4.0
  enough = 2 / (beta * 64) + np.log(2 * 63 * 64 * beta * m * m) / beta
  stored = want >= enough
  assert 10 < stored.sum()
  got = hopfield_retrieve(patterns, patterns, beta, tol=1e-12)
  distance = np.linalg.norm(got - patterns, axis=1)
  assert distance[stored].max() <= 1 / (beta * 64 * m)


def test_capacity_constants():
  bound = capacity_lower_bound(1.0, 3.0, 20, 0.001)
  np.testing.assert_allclose(bound.c, 3.1546, atol=5e-5)
  np.testing.assert_allclose(bound.n, 7.41, atol=5e-3)
  assert bool(bound.ok)
  bound = capacity_lower_bound(1.0, 1.0, 75, 0.001)
  np.testing.assert_allclose(bound.c, 1.37188, atol=5e-6)
  np.testing.assert_allclose(bound.n, 10.97, atol=5e-3)
  assert bool(bound.ok)
  for args, want in (((1.0, 3.0, 20), 1.2733), ((1.0, 1.0, 75), -0.9409)):
    b = 2 * args[1] ** 2 / 5
    w = b / capacity_lower_bound(*args, 0.001).c
    # a + ln b, from W(e^(a + ln b)) = w.
    np.testing.assert_allclose(w + np.log(w), want, atol=5e-5)
  assert not capacity_lower_bound(1.0, 1.0, 20, 0.001).ok
  # b e^a is 0 in float32, and c beyond it: 3.6e48, of 1.6e51 that it must be.
  with jax.enable_x64(False):
    assert not capacity_lower_bound(1.0, 1.0, 2, 1e-25).ok
  # c = b / W(b e^a) means that w = b / c solves w e^w = b e^a.
  several = capacity_lower_bound(jnp.array([0.5, 2.0]), 2.0, 9, 0.1)
  b = np.array([0.5, 2.0]) * 8 / 5
  a = 2 / 8 * (1 + np.log(2 * np.array([0.5, 2.0]) * 4 * 0.1 * 8))
  w = b / several.c
  np.testing.assert_allclose(w * np.exp(w), b * np.exp(a), rtol=1e-12)


def test_what_the_capacity_promises_is_kept():
  radius = 3 * 19**0.5
  patterns = _sphere((50, 8, 20), radius)
  got = jax.vmap(lambda p: hopfield_update(p, p, 1.0))(patterns)
  assert jnp.abs(got - patterns).max() <= 1e-6 * radius


# --- dtypes, compilation, refusals ---


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(dtype):
  x, patterns = (y.astype(dtype) for y in _bounded(0.5, num=30, dim=4))
  patterns = 0.3 * patterns
  eps = float(jnp.finfo(dtype).eps) * (2 if dtype == "bfloat16" else 8)
  wide = [y.astype(jnp.float64) for y in (x, patterns)]
  state = hopfield_store(patterns, 1.0, degree=4)
  assert state.z.dtype == jnp.float32
  call = {"max_steps": 3, "tol": 0.0, "return_info": True}
  for got, want in (
    (hopfield_update(x, patterns, 1.0), hopfield_update(*wide, 1.0)),
    (hopfield_energy(x, patterns, 1.0), hopfield_energy(*wide, 1.0)),
    (
      hopfield_retrieve(x, patterns, 1.0, **call)[0],
      hopfield_retrieve(*wide, 1.0, **call)[0],
    ),
  ):
    assert got.dtype == dtype
    scale = jnp.abs(patterns).max()
    np.testing.assert_allclose(
      got.astype(jnp.float64), want, rtol=0, atol=eps * scale
    )
  with jax.numpy_dtype_promotion("strict"):
    out, info = hopfield_retrieve(
      x[:4], patterns, 1.0, method="lowrank", state=state, **call
    )
    retrieval_error_bound(x, patterns, 0, 1.0)
    pattern_separation(patterns)
    hopfield_add(state, patterns[0])
  assert {out.dtype, info.energy.dtype, info.residual.dtype} == {
    jnp.dtype(dtype)
  }


def test_second_call_does_not_recompile():
  x, patterns = _bounded(0.2, num=30, dim=4)
  patterns = 0.3 * patterns

  def run(x, patterns, beta, tol):
    state = hopfield_store(patterns, beta, degree=4)
    state = hopfield_add(state, patterns[0])
    low = {"method": "lowrank", "state": state}
    return jax.block_until_ready(
      (
        hopfield_update(x, patterns, beta),
        hopfield_energy(x, patterns, beta),
        hopfield_retrieve(x, patterns, beta, tol=tol),
        hopfield_retrieve(x, patterns, beta, tol=tol, **low),
        pattern_separation(patterns),
        retrieval_error_bound(x, patterns, 0, beta),
      )
    )

  run(x, patterns, 1.0, 1e-3)
  with no_recompilation():
    run(x, patterns, 1.0, 1e-3)


_X, _P = jnp.ones((3, 4)), jnp.ones((5, 4))
_STATE = hopfield_store(_P, 1.0, degree=2)
_VALUES = hopfield_store(_P, 1.0, degree=2, values=2 * _P)
_SINGLE = jnp.ones(4, jnp.float32)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: hopfield_update(_X, _P, -1.0), "beta must be positive, got -1.0"),
    (lambda: hopfield_update(_X, _P, math.inf), "beta must be finite, got inf"),
    (
      lambda: hopfield_retrieve(
        _SINGLE, None, 1.0, method="lowrank", state=_STATE
      ),
      "x must have a dtype that is accumulated in that of the state, float64, "
      "got float32",
    ),
    (
      lambda: hopfield_add(_STATE, _SINGLE),
      "pattern must have a dtype that is accumulated in that of the state, flo",
    ),
    (
      lambda: hopfield_add(_VALUES, _P[0], _SINGLE),
      "value must have a dtype that is accumulated in that of the state, float",
    ),
    (
      lambda: hopfield_add(_VALUES, _P[0]),
      "value is required: the state holds values of size 4",
    ),
    (
      lambda: hopfield_forget(_STATE, _P[0], _P[0]),
      "value must be None: the state holds patterns alone",
    ),
    (
      lambda: hopfield_retrieve(_X, None, 1.0, method="lowrank", state=_VALUES),
      "max_steps must be 1, unrolled and without info, for a state that was st",
    ),
    (
      lambda: hopfield_forget(_STATE, _P),
      "state must keep a pattern, got one with 0 left",
    ),
    (lambda: hopfield_energy(_X, _P, 0.0), "beta must be positive, got 0.0"),
    (
      lambda: hopfield_update(_X, jnp.ones((3, 4, 5)), 1.0),
      "patterns must be (M, d), got shape (3, 4, 5)",
    ),
    (
      lambda: hopfield_update(jnp.ones(32), jnp.ones((9, 64)), 1.0),
      "query dim 32 != pattern dim 64",
    ),
    (
      lambda: hopfield_update(_X, _P[:0], 1.0),
      "patterns must not be empty, got shape (0, 4)",
    ),
    (
      lambda: hopfield_update(_X[:0], _P, 1.0),
      "x must not be empty, got shape (0, 4)",
    ),
    (lambda: hopfield_update(1.0, _P, 1.0), "x must have shape (..., d), got"),
    (
      lambda: hopfield_update(_X.astype(jnp.float32), _P, 1.0),
      "all arrays must have one dtype, got patterns of float64",
    ),
    (
      lambda: hopfield_update(_X, _P, 1.0, jnp.ones((4, 2))),
      "values must have shape (5, *) = (M, Hv), got (4, 2)",
    ),
    (
      lambda: hopfield_store(_P, 1.0, degree=-1),
      "degree must be >= 0, got -1",
    ),
    (
      lambda: hopfield_store(_P, 1.0, degree=3),
      "degree must be even unless allow_odd=True, got 3",
    ),
    (
      lambda: hopfield_store(_P, 1.0, degree=2, chunk_size=0),
      "chunk_size must be >= 1, got 0",
    ),
    (
      lambda: hopfield_retrieve(_X, _P, 1.0, method="fast"),
      "method must be one of 'dense', 'lowrank', got 'fast'",
    ),
    (
      lambda: hopfield_retrieve(_X, _P, 1.0, backward="no"),
      "backward must be one of 'unrolled', 'implicit', got 'no'",
    ),
    (
      lambda: hopfield_retrieve(_X, _P, 1.0, max_steps=0),
      "max_steps must be >= 1, got 0",
    ),
    (
      lambda: hopfield_retrieve(_X, _P, 1.0, tol=-1.0),
      "tol must be non-negative, got -1.0",
    ),
    (
      lambda: hopfield_retrieve(_X, None, 1.0),
      "patterns must be (M, d) with method='dense', got None",
    ),
    (
      lambda: hopfield_retrieve(_X, _P, 1.0, state=_STATE),
      "state must be None with method='dense'",
    ),
    (
      lambda: hopfield_retrieve(_X, _P, 1.0, method="lowrank"),
      "state is required with method='lowrank': hopfield_store makes one",
    ),
    (
      lambda: hopfield_retrieve(_X, _P, 2.0, method="lowrank", state=_STATE),
      "beta must be that of the state, 1, got 2.0",
    ),
    (
      lambda: hopfield_retrieve(
        _X, None, 1.0, method="lowrank", state=_STATE, return_info=True
      ),
      "patterns are required with return_info=True, got None",
    ),
    (
      lambda: hopfield_retrieve(
        _X[:, :3], None, 1.0, method="lowrank", state=_STATE
      ),
      "query dim 3 != pattern dim 4",
    ),
    (
      lambda: hopfield_retrieve(
        _X,
        None,
        1.0,
        method="lowrank",
        state=_STATE._replace(k=_STATE.k[:-1], z=_STATE.z[:-1]),
      ),
      "state.k must have C(4 + g, g) features, got 14 of them",
    ),
    (lambda: hopfield_add(_STATE, jnp.ones(3)), "pattern must have shape (4,)"),
    (
      lambda: hopfield_forget(_STATE, _P[0], jnp.ones(3)),
      "value must have shape (4,) = one for each pattern, got (3,)",
    ),
    (
      lambda: hopfield_plan(1.0, 4, 10, 10, eps=0.0),
      "eps must be positive and finite, got 0.0",
    ),
    (
      lambda: hopfield_plan(math.inf, 4, 10, 10),
      "radius must be at least 0 and finite, got inf",
    ),
    (lambda: hopfield_plan(1.0, 0, 10, 10), "dim must be >= 1, got 0"),
    (
      lambda: capacity_lower_bound(1.0, 1.0, 20, 1.0),
      "delta must be in (0, 1), got 1.0",
    ),
    (lambda: capacity_lower_bound(1.0, 1.0, 1, 0.5), "dim must be >= 2, got 1"),
    (
      lambda: retrieval_error_bound(_X, _P, 5, 1.0),
      "mu must be in [-5, 4], got 5",
    ),
    (
      lambda: retrieval_error_bound(_X, _P, 0.5, 1.0),
      "mu must be integers, got dtype float",
    ),
    (
      lambda: retrieval_error_bound(_X, _P, jnp.zeros(2, int), 1.0),
      "mu must have shape (3,) = that of x without d, got (2,)",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


def test_refuses_logits_that_features_cannot_promise():
  x, patterns = _normal(5, 4), _normal(30, 4, seed=1)
  state = hopfield_store(patterns, 1.0, degree=4)
  call = {"method": "lowrank", "state": state}
  message = r"kernel error bound .* >= 1; reduce beta or use method='dense'"
  for known in (patterns, None):
    with pytest.raises(ValueError, match=message):
      hopfield_retrieve(x, known, 1.0, **call)
  # By norms alone too large, by measured logits not.
  x = jnp.zeros((1, 4)).at[0, 0].set(1.0)
  patterns = patterns.at[:, 0].multiply(0.05)
  state = hopfield_store(patterns, 1.0, degree=4)
  call = {"method": "lowrank", "state": state, "max_steps": 1}
  got = hopfield_retrieve(x, patterns, 1.0, **call)
  want = hopfield_update(x, patterns, 1.0)
  np.testing.assert_allclose(got, want, atol=1e-6)
  with pytest.raises(ValueError, match="low-rank retrieval invalid"):
    hopfield_retrieve(x, None, 1.0, **call)
  # Logits with other patterns say nothing about those of the state.
  for other in (patterns[:29], 0.01 * patterns):
    with pytest.raises(ValueError, match="low-rank retrieval invalid"):
      hopfield_retrieve(x, other, 1.0, **call)


def test_what_tracing_hides_is_seen():
  x, patterns = 0.1 * _normal(5, 4), 0.3 * _normal(30, 4, seed=1)

  def retrieve(x, beta, state, num_steps=1):
    return hopfield_retrieve(
      x, None, beta, max_steps=num_steps, method="lowrank", state=state
    )

  state = hopfield_store(patterns, 1.0, degree=4)
  values = hopfield_store(patterns, 1.0, degree=4, values=2 * patterns)
  run = jax.jit(retrieve, static_argnums=3)
  assert jnp.isfinite(run(x, 1.0, state)).all()
  assert jnp.isfinite(run(x, 1.0, values)).all()
  assert jnp.isnan(run(x, 1.1, state)).all()
  assert jnp.isnan(run(x, 1.0, values, 2)).all()
  assert jnp.isnan(jax.jit(hopfield_add)(values, x[0]).z).all()
  checked = jax.jit(checkify.checkify(retrieve))
  assert checked(x, 1.0, state)[0].get() is None
  message = checked(50 * x, 1.0, state)[0].get()
  assert message.startswith("low-rank retrieval invalid: kernel error bound")


def test_float32_low_rank_keeps_what_its_degree_allows():
  x, patterns = _bounded(2.0)
  narrow = [y.astype(jnp.float32) for y in (x, patterns)]
  error = jnp.abs(_lowrank(*narrow, 8) - _lowrank(x, patterns, 8)).max()
  # Sums of terms as large as e^A are as small as e^-A.
  eps = float(jnp.finfo(jnp.float32).eps)
  assert error <= 4 * math.exp(4) * eps * jnp.abs(patterns).max()
  # And energies, of which features change little.
  state = hopfield_store(narrow[1], 1e-6, degree=2)
  call = {"max_steps": 1, "return_info": True}
  _, got = hopfield_retrieve(
    *narrow, 1e-6, method="lowrank", state=state, **call
  )
  _, want = hopfield_retrieve(x, patterns, 1e-6, **call)
  np.testing.assert_allclose(got.energy, want.energy, rtol=1e-6)
