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

_CONFIG = "configs/gradient_leakage.py"
_NETWORK = ("w_1", "b_1", "w_2")


# One program for all cells.
_GATED = jax.jit(jax.value_and_grad(experiment.gated_loss))


@functools.cache
def _block(pooling, residual, mlp):
  block = LeakageBlock(
    pooling=pooling, residual=residual, mlp=8 * mlp, num_classes=3
  )
  return jax.jit(jax.value_and_grad(block.loss))


@pytest.mark.parametrize("kind", experiment.CELLS)
def test_gates_make_the_blocks(kind):
  pooling, residual, mlp, seen = kind
  rng = np.random.default_rng(0)
  params = experiment.draw_block(rng, 4, 6, 8, 3)
  x = jnp.asarray(rng.normal(size=(4, 6)))
  gated = experiment.gated_params(params, *kind)
  value, grads = _GATED(gated, x, 2)
  own = {k: v for k, v in params.items() if mlp or k not in _NETWORK}
  want, right = _block(pooling, residual, mlp)(own, x, 2)
  np.testing.assert_allclose(value, want, rtol=1e-12)
  hidden = {"all": (), "no pos": ("pos",)}.get(
    seen, ("pos", "w_1", "b_1", "w_2", "w_c", "b_c")
  )
  for name, gradient in right.items():
    shown = gradient * (name not in hidden)
    np.testing.assert_allclose(grads[name], shown, atol=1e-13)
  # What is switched off tells nothing.
  assert mlp or all(not grads[name].any() for name in _NETWORK)


def test_a_batch_under_layers_is_recovered():
  config = harness.load_config(f"{_CONFIG}:full")
  config.stack.update(
    num_layers=2, batch=2, length=2, dim=8, mlp=16, num_starts=4, max_steps=99
  )
  point = experiment.stack_point(config)
  (check,) = experiment._stack_checks(config, {"stack": point})
  assert check.name == "error of 2 sequences under 2 layers"
  assert check.measured < 1e-6 == check.high


def test_average_of_descent_is_the_one_of_a_plain_loop():
  def loss(x):
    return jnp.log1p(x**2).sum() / 2

  start, key = jnp.full(5, 3.0), jax.random.key(0)
  got, curvature, last = jax.jit(
    functools.partial(experiment._descend, loss, num_probes=4)
  )(key, start, 0.3, 0.0, 40)
  x, total, curvatures = np.full(5, 3.0), 0.0, []
  for t in range(40):
    grad = x / (1 + x**2)
    total += grad @ grad
    x -= 0.3 * grad
    if t % 10 == 9:
      curvatures.append(abs((1 - x**2) / (1 + x**2) ** 2).max())
  np.testing.assert_allclose(got, total / 40, rtol=1e-10)
  np.testing.assert_allclose(curvature, max(curvatures), rtol=1e-3)
  np.testing.assert_allclose(last, np.log1p(x**2).sum() / 2, rtol=1e-10)


def test_slopes_are_decided_where_the_bound_says_something():
  steps = np.array([1.0, 2.0, 4.0, 8.0])
  point = {
    "std": np.full(4, 0.1),
    "steps": steps,
    "average": np.array([1.0, 2**-0.5, 2**-1.0, 2**-1.5]) * [1.5, 1, 1, 1],
    "bound": 4 / np.sqrt(steps),
    "start": 3.0,
  }
  slopes = experiment._slopes(point)
  assert slopes[0.1][1] == pytest.approx(-0.5)
  assert slopes[0.1][0] < -0.55
  # Three numbers of steps at least.
  assert math.isnan(experiment._slopes(point | {"start": 2.0})[0.1][1])


@pytest.mark.parametrize("n", [4, 64])
def test_full_size_is_traced(n):
  config = harness.load_config(f"{_CONFIG}:full")
  assert n in config.lengths
  dim, num = config.dim, len(experiment.CELLS)
  params = jax.eval_shape(
    lambda: experiment.gated_params(
      experiment.draw_block(
        np.random.default_rng(0), n, dim, config.mlp, config.num_classes
      ),
      *experiment.CELLS[0],
    )
  )
  params, x = (
    jax.tree.map(
      lambda v: jax.ShapeDtypeStruct((num, *v.shape), jnp.float64), tree
    )
    for tree in (params, jax.ShapeDtypeStruct((n, dim), jnp.float64))
  )
  keys = jax.random.split(jax.random.key(0), num)
  (rank, _), found = jax.eval_shape(
    functools.partial(experiment._attack_cells, config), keys, params, x
  )
  assert rank.shape == (num,)
  assert found.embeddings.shape == (num, n, dim)


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
