"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import gradient_leakage as experiment
from experiments import harness
from jaxattn.models.leakage import LeakageBlock
from jaxattn.regression import gradient_leakage

_CONFIG = "configs/gradient_leakage.py"
_NETWORK = ("w_1", "b_1", "w_2")


@pytest.mark.parametrize("kind", experiment.ARCHITECTURES)
def test_gates_make_the_blocks(kind):
  pooling, residual, mlp = kind
  rng = np.random.default_rng(0)
  params = experiment.draw_block(rng, 4, 6, 8, 3)
  x = jnp.asarray(rng.normal(size=(4, 6)))
  gated = experiment.gated_params(params, *kind)
  value, grads = jax.jit(jax.value_and_grad(experiment.gated_loss))(gated, x, 2)
  block = LeakageBlock(
    pooling=pooling, residual=residual, mlp=8 * mlp, num_classes=3
  )
  own = {k: v for k, v in params.items() if mlp or k not in _NETWORK}
  want, right = jax.jit(jax.value_and_grad(block.loss))(own, x, 2)
  np.testing.assert_allclose(value, want, rtol=1e-12)
  for name, gradient in right.items():
    np.testing.assert_allclose(grads[name], gradient, atol=1e-13)
  # What is switched off tells nothing.
  assert mlp or all(not grads[name].any() for name in _NETWORK)


def test_average_of_descent_is_the_one_of_a_plain_loop():
  def loss(x):
    return jnp.log1p(x**2).sum() / 2

  start, key = jnp.full(5, 3.0), jax.random.key(0)
  got, curvature = jax.jit(functools.partial(experiment._descend, loss))(
    key, start, 0.3, 0.0, 40
  )
  x, total = np.full(5, 3.0), 0.0
  for _ in range(40):
    grad = x / (1 + x**2)
    total += grad @ grad
    x -= 0.3 * grad
  np.testing.assert_allclose(got, total / 40, rtol=1e-10)
  hessian = (1 - x**2) / (1 + x**2) ** 2
  np.testing.assert_allclose(curvature, abs(hessian).max(), rtol=1e-3)


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  n, dim = max(config.lengths), config.dim
  params = jax.eval_shape(
    lambda: experiment.gated_params(
      experiment.draw_block(
        np.random.default_rng(0), n, dim, config.mlp, config.num_classes
      ),
      *experiment.ARCHITECTURES[0],
    )
  )
  seen = {k: k not in ("residual", "pool") for k in params}
  x = jax.ShapeDtypeStruct((n, dim), jnp.float64)

  def call(params, x):
    leaked = jax.grad(experiment.gated_loss)(params, x, 1)
    return gradient_leakage.attack(
      jax.random.key(0),
      experiment.gated_loss,
      params,
      leaked,
      shape=x.shape,
      y=1,
      num_starts=config.num_starts,
      mask_leaves=seen,
      config=gradient_leakage.AttackConfig(max_steps=config.max_steps),
    )

  found = jax.eval_shape(call, params, x)
  assert found.embeddings.shape == (n, dim)
  assert found.log.shape == (config.num_starts, config.max_steps)


def test_smoke(tmp_path):
  config = harness.load_config(f"{_CONFIG}:smoke")
  verdict = experiment.run(config, tmp_path / "a")
  assert verdict.verdict == "inconclusive"
  assert len(verdict.accepted) >= 8
  ratio = verdict.measured["squared gradient over its bound"]
  assert 0 < ratio <= 1
  assert math.isfinite(verdict.measured["share of blocks of full rank"])
  assert (tmp_path / "a" / "figure.png").stat().st_size > 10_000
  # The points are stored: a second call only draws and decides again.
  again = experiment.run(config, tmp_path / "a")
  np.testing.assert_equal(again.measured, verdict.measured)
