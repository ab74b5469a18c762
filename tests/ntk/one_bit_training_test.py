"""Training of signs: what predicts it, and how what it misses shrinks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.ntk import descent_recursion, mlp_ntk, one_bit
from jaxattn.scaling import fit_slope, sweep

_KEY = jax.random.key(1)
_DIM, _DATA, _STEPS, _SEEDS = 16, 10, 30, 32
# When most outputs have come near to their targets.
_LATE = 60
_WIDTHS = (256, 1024, 4096, 16384)


@functools.cache
def _problem():
  """Inputs, targets, the rate, and kernels by name."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(_DATA, _DIM))
  x = jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
  y = jnp.asarray(rng.choice([-1.0, 1.0], _DATA), jnp.float32)
  ste, secant = one_bit.ste_kernel(x).kernel, one_bit.secant_kernel(x).kernel
  full = mlp_ntk(x, depth=1, weight_scale=float(_DIM), trainable="hidden")[1]
  c = one_bit.effective_rate().astype(x.dtype)
  kernels = {"ste": ste, "c secant": c * secant, "full": full}
  return x, y, 0.3 / jnp.linalg.eigvalsh(ste)[-1], kernels


@functools.cache
def _predicted(name):
  """(_LATE + 1, n) outputs by step that a kernel predicts."""
  _, y, rate, kernels = _problem()
  steps = jnp.arange(_LATE + 1)
  return np.asarray(
    y[None] - descent_recursion(kernels[name], y, rate, steps)[0]
  )


def _train(rng, width, x, y, rate, kappa=1.0, *, quantized, num_steps=_STEPS):
  params = one_bit.init(rng, width, _DIM, paired=False)
  trained, log = one_bit.train_one_bit(
    params,
    x,
    y,
    learning_rate=rate / kappa**2,
    num_steps=num_steps,
    quantized=quantized,
    kappa=kappa,
  )
  flipped = (trained.latent >= 0) != (params.latent >= 0)
  moved = jnp.sqrt(jnp.square(trained.latent - params.latent).mean())
  return {"f": log.f, "flipped": flipped.mean(), "moved": moved}


_signs = functools.partial(_train, quantized=True)
_long = functools.partial(_train, quantized=True, num_steps=_LATE)
_full = functools.partial(_train, quantized=False)


def _swept(fn, widths, num_seeds):
  """Values as NumPy arrays, led by (width, seed)."""
  values = sweep(_KEY, fn, widths, num_seeds, args=_problem()[:3]).values
  return jax.tree.map(np.asarray, values)


@functools.cache
def _runs():
  return _swept(_signs, _WIDTHS, _SEEDS)


def _coefficient(f, predicted):
  return (f * predicted).sum() / (predicted**2).sum()


def test_the_secant_kernel_predicts_the_mean_where_others_do_not():
  mean = _runs()["f"][-1, :16].mean(0)
  for t in (5, 10):
    assert 0.93 <= _coefficient(mean[t], _predicted("c secant")[t]) <= 1.05
  assert _coefficient(mean[1], _predicted("ste")[1]) < 0.75


def test_flips_shrink_like_the_root_of_the_width():
  flipped = _runs()["flipped"].mean(1)
  assert -0.6 < fit_slope(_WIDTHS, flipped).slope < -0.4


def test_one_step_of_one_run_scatters_by_the_fourth_root():
  f = _runs()["f"][1:, :, 1]
  mean = f.mean(1, keepdims=True)
  scatter = np.square(f - mean).sum(-1).mean(1) / np.square(mean).sum((1, 2))
  assert -0.35 < fit_slope(_WIDTHS[1:], np.sqrt(scatter)).slope < -0.15


def test_averages_over_steps_remove_what_flips_back_and_forth():
  f = _swept(_long, (4096,), 8)["f"][0, :, -10:]
  error = f - _predicted("c secant")[-10:]
  single = np.sqrt((error**2).sum(-1).mean(1))
  averaged = np.linalg.norm(error.mean(1), axis=-1)
  assert np.median(single / averaged) > 3


def test_full_precision_follows_its_kernel_at_the_usual_rate():
  widths = (*_WIDTHS[::3], 2048)
  error = _swept(_full, widths, 4)["f"] - _predicted("full")[: _STEPS + 1]
  error = np.median(np.sqrt(np.square(error).sum((2, 3))), 1)
  error /= np.linalg.norm(_predicted("full")[: _STEPS + 1])
  assert error[1] < 0.005
  assert -0.7 < fit_slope(widths, error).slope < -0.3


def test_kappa_scales_outputs_and_movement():
  x, y, rate, _ = _problem()
  params = one_bit.init(_KEY, 256, _DIM, paired=False)
  for quantized in (True, False):
    one, half = (
      one_bit.apply(params, x, quantized=quantized, kappa=kappa)
      for kappa in (1.0, 0.5)
    )
    np.testing.assert_array_equal(half, one / 2)
  # The same outputs, at four times the rate, by twice the movement.
  for quantized, what, slack, near in (
    (False, "moved", 0.05, 0.01),
    (True, "flipped", 0.1, 0.3),
  ):
    train = functools.partial(_train, width=16384, quantized=quantized)
    both = jax.jit(
      lambda kappas, train=train: lax.map(
        lambda kappa: train(_KEY, x=x, y=y, rate=rate, kappa=kappa), kappas
      )
    )(jnp.array([1.0, 0.5], x.dtype))
    one, half = (jax.tree.map(lambda v, i=i: v[i], both) for i in (0, 1))
    assert abs(float(half[what] / one[what]) / 2 - 1) < slack
    gap = jnp.linalg.norm(half["f"] - one["f"]) / jnp.linalg.norm(one["f"])
    assert gap < near
