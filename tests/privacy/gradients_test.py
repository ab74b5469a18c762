"""Private gradients: clipping, noise, and descent under noise."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jaxattn.privacy import gradients


def _grads(batch=6, scale=1.0, seed=0):
  rng = np.random.default_rng(seed)
  shapes = {"a": (batch, 3, 2), "b": (batch, 4)}
  return {k: jnp.asarray(scale * rng.normal(size=s)) for k, s in shapes.items()}


def _apply(grads, clip, noise_multiplier=0.0, seed=0):
  private = gradients.dp_gradient(
    jax.random.key(seed), clip=clip, noise_multiplier=noise_multiplier
  )
  state = private.init(grads)
  return private.update(grads, state)[0]


def _size(tree):
  return float(optax.tree.norm(tree))


def test_each_example_is_clipped():
  grads, clip = _grads(scale=10.0), 0.7
  for i in range(6):
    one = jax.tree.map(lambda g, i=i: g[i : i + 1], grads)
    assert _size(one) > clip
    np.testing.assert_allclose(_size(_apply(one, clip)), clip, rtol=1e-12)
  assert _size(_apply(grads, clip)) <= clip
  # Of 6 examples one removed moves the mean by clip / 6, one replaced by twice.
  for factor, sensitivity in ((0.0, clip), (-1e6, 2 * clip)):
    other = jax.tree.map(lambda g, f=factor: g.at[2].multiply(f), grads)
    gap = jax.tree.map(
      lambda x, y: x - y, _apply(grads, clip), _apply(other, clip)
    )
    np.testing.assert_allclose(_size(gap), sensitivity / 6, rtol=1e-12)


@pytest.mark.parametrize("entries", [500, 100_000])
@pytest.mark.parametrize(
  ("dtype", "rounding"),
  # Of single precision none; of 16 bits that of the answer.
  [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11)],
)
def test_clip_holds_in_every_precision(dtype, rounding, entries):
  ones = np.ones((1, entries))
  steps = np.random.default_rng(0).normal(size=(1, entries))
  for rows in (ones, steps):
    out = _apply({"a": jnp.asarray(rows, dtype)}, 1.0)["a"]
    assert out.dtype == dtype
    size = np.linalg.norm(np.asarray(out, float))
    assert 1 - 1e-5 - rounding < size <= 1 + rounding


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_examples_that_are_not_finite_count_as_nothing(bad):
  grads = _grads()
  want = _apply(jax.tree.map(lambda g: g.at[2].set(0), grads), 1.0)
  got = _apply(grads | {"a": grads["a"].at[2, 0, 0].set(bad)}, 1.0)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_short_gradients_are_left_alone():
  grads = _grads(scale=0.01)
  want = jax.tree.map(lambda g: g.mean(0), grads)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-12),
    _apply(grads, 1.0),
    want,
  )
  nothing = jax.tree.map(jnp.zeros_like, grads)
  assert _size(_apply(nothing, 1.0)) == 0


def test_same_as_optax_without_noise():
  grads = _grads(scale=2.0)
  peer = contrib.differentially_private_aggregate(0.9, 0.0, jax.random.key(0))
  want, _ = peer.update(grads, peer.init(grads))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-12),
    _apply(grads, 0.9),
    want,
  )


def test_noise_is_unbiased_and_as_large_as_it_says():
  grads, clip, sigma, draws = _grads(scale=2.0), 0.5, 3.0, 4096
  clean = _apply(grads, clip)
  keys = jax.random.split(jax.random.key(0), draws)

  @jax.jit
  @jax.vmap
  def run(key):
    private = gradients.dp_gradient(key, clip=clip, noise_multiplier=sigma)
    return private.update(grads, private.init(grads))[0]

  noisy = run(keys)
  std = sigma * clip / 6
  for name, mean in clean.items():
    gap = noisy[name] - mean[None]
    assert jnp.abs(gap.mean(0)).max() < 4 * std / math.sqrt(draws)
    np.testing.assert_allclose(gap.std(0), std, rtol=0.06)
  both = jnp.stack([noisy["a"][:, 0, 0], noisy["b"][:, 0]])
  assert abs(jnp.corrcoef(both)[0, 1]) < 4 / math.sqrt(draws)


def test_every_step_draws_anew():
  grads = _grads()
  private = gradients.dp_gradient(
    jax.random.key(1), clip=1.0, noise_multiplier=1.0
  )
  state = private.init(grads)
  first, state = private.update(grads, state)
  second, state = private.update(grads, state)
  assert state.count == 2
  assert all(jnp.abs(first[k] - second[k]).min() > 0 for k in first)
  again, _ = private.update(grads, private.init(grads))
  jax.tree.map(np.testing.assert_array_equal, again, first)


def test_in_a_chain_and_in_single_precision():
  params = {"w": jnp.ones(3, jnp.float32)}
  optimizer = optax.chain(
    gradients.dp_gradient(jax.random.key(0), clip=1.0, noise_multiplier=0.1),
    optax.sgd(0.1),
  )

  @jax.jit
  def step(params, state):
    grads = {"w": jnp.ones((4, 3), jnp.float32)}
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  moved, _ = step(params, optimizer.init(params))
  assert moved["w"].dtype == jnp.float32
  assert (moved["w"] < 1).all()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"clip": 0, "noise_multiplier": 1.0}, "clip must be positive, got 0"),
    (
      {"clip": 1.0, "noise_multiplier": -1.0},
      "noise_multiplier must be non-negative, got -1.0",
    ),
  ],
)
def test_refusals(options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    gradients.dp_gradient(jax.random.key(0), **options)


@pytest.mark.parametrize(
  "grads",
  [
    {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))},
    {"a": jnp.ones(())},
    {"a": jnp.ones((0, 2))},
  ],
)
def test_means_are_refused(grads):
  with pytest.raises(ValueError, match="updates must be gradients by example"):
    _apply(grads, 1.0)


# --- descent under noise ---


def _bound(num_steps, noise_std=0.1, **options):
  gap = 50 * math.log(10) / 2
  return gradients.perturbed_sgd_bound(
    f_gap=gap,
    smoothness=1.0,
    dim=50,
    noise_std=noise_std,
    num_steps=num_steps,
    **options,
  )


@functools.partial(jax.jit, static_argnums=(0,))
def _average(num_steps, step_size, noise_std):
  """Mean of |grad f|^2 along one run on f = sum log(1 + x^2) / 2."""

  def step(x, key):
    grad = x / (1 + x**2)
    noisy = grad + noise_std * jax.random.normal(key, x.shape)
    return x - step_size * noisy, grad @ grad

  keys = jax.random.split(jax.random.key(0), num_steps)
  return jax.lax.scan(step, jnp.full(50, 3.0), keys)[1].mean()


@pytest.mark.parametrize(
  ("noise_std", "averages"), [(0.1, (0.4831, 0.2102, 0.0995)), (1.0, None)]
)
def test_rate_of_descent_under_noise(noise_std, averages):
  steps = (400, 1600, 6400)
  found = []
  for num in steps:
    bound, step_size = _bound(num, noise_std)
    found.append(float(_average(num, step_size, noise_std)))
    assert found[-1] <= bound
  slope = np.polyfit(np.log(steps), np.log(found), 1)[0]
  assert -0.65 <= slope <= -0.4
  if averages:
    np.testing.assert_allclose(found, averages, rtol=0.03)


def test_bound():
  for num, want in ((400, 0.759), (1600, 0.379), (6400, 0.190)):
    bound, step_size = _bound(num)
    np.testing.assert_allclose(bound, want, atol=1e-3)
    # No other step has a smaller one.
    for factor in (0.5, 0.9, 1.1):
      other, _ = _bound(num, step_size=factor * step_size)
      assert other > bound
  assert _bound(10, 0.0) == (2 * 50 * math.log(10) / 2 / 10, 1.0)
  # Where the best step would be longer than is allowed.
  assert _bound(1, 0.1)[1] == 1.0


def test_stationary_variance_of_a_quadratic():
  """Exact: eta s^2 / (L (2 - eta L)) a coordinate."""
  smoothness, eta, std = 2.0, 0.3, 0.4

  def step(x, key):
    noisy = smoothness * x + std * jax.random.normal(key, x.shape)
    return x - eta * noisy, x

  keys = jax.random.split(jax.random.key(0), 4000)
  _, path = jax.jit(functools.partial(jax.lax.scan, step))(jnp.zeros(64), keys)
  want = eta * std**2 / (smoothness * (2 - eta * smoothness))
  np.testing.assert_allclose(path[100:].var(), want, rtol=0.03)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"f_gap": 0.0}, "f_gap must be positive, got 0.0"),
    ({"smoothness": -1.0}, "smoothness must be positive, got -1.0"),
    ({"dim": 0}, "dim must be >= 1, got 0"),
    ({"noise_std": -0.1}, "noise_std must be non-negative, got -0.1"),
    ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
    ({"step_size": 0.0}, "step_size must be positive, got 0.0"),
    ({"step_size": 2.0}, "step_size must be at most 1 / smoothness = 1, got 2"),
  ],
)
def test_refused_bounds(change, message):
  good = {
    "f_gap": 1.0,
    "smoothness": 1.0,
    "dim": 2,
    "noise_std": 0.1,
    "num_steps": 3,
  }
  with pytest.raises(ValueError, match=re.escape(message)):
    gradients.perturbed_sgd_bound(**(good | change))
