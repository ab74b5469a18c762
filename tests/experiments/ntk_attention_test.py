"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _ntk_tuning, harness
from experiments import ntk_attention as experiment
from jaxattn.data import load_digits
from jaxattn.ntk import tied_prefix_ntk, tied_prefix_output
from jaxattn.scaling import fit_slope

_CONFIG = "configs/ntk_attention.py"
_COLUMNS = (256, 1024, 4096)


def _config(**fields):
  config = harness.load_config(f"{_CONFIG}:cpu")
  config.update(fields)
  return config


@pytest.fixture(scope="module")
def trained():
  """Four seeds of training with each number of columns."""
  points = [experiment.training_point(_config(), m) for m in _COLUMNS]
  return {name: np.stack([p[name] for p in points]) for name in points[0]}


def test_columns_move_less_the_more_there_are(trained):
  moved = experiment.geometric_mean(trained["paired_moved"])
  np.testing.assert_allclose(moved, [0.102, 0.0515, 0.0228], rtol=0.3)
  assert -0.65 <= fit_slope(_COLUMNS, moved).slope <= -0.4


def test_kernel_moves_less_and_least_with_paired_signs(trained):
  paired = experiment.geometric_mean(trained["paired_kernel_change"])
  random = experiment.geometric_mean(trained["random_kernel_change"])
  assert fit_slope(_COLUMNS, paired).slope <= -0.9
  assert -1.3 <= fit_slope(_COLUMNS, random).slope <= -0.6
  for got, want in (
    (paired, [3.2e-4, 5.5e-5, 9.7e-6]),
    (random, [1.1e-2, 3.5e-3, 1.4e-3]),
  ):
    np.testing.assert_allclose(np.log(got / want), 0, atol=np.log(3))
  # The change of first order cancels between columns of a pair.
  assert np.all(random > 10 * paired)


def test_fixed_kernel_predicts_the_loss(trained):
  gap = np.log(trained["paired_losses"] / trained["paired_predicted"])
  np.testing.assert_allclose(gap[..., 0], 0, atol=1e-12)
  assert np.abs(gap[-1, :, -1]).max() < 1e-3
  assert np.all(np.abs(gap[-1]) <= np.abs(gap[0]).max())


def test_training_is_gradient_descent_on_the_sum_of_squares():
  with jax.enable_x64(True):
    rng, m, n, d = jax.random.key(5), 10, 3, 2
    run = experiment.train_tied_prefix(
      rng, True, 0.5, length=m, num_data=n, dim=d, num_steps=3
    )
    rngs = jax.random.split(rng, 4)
    w = np.tile(jax.random.normal(rngs[0], (m, d))[: m // 2], (2, 1))
    a = np.repeat([1.0, -1.0], m // 2)
    x, y = (np.array(jax.random.normal(r, (n, d))) for r in rngs[2:])
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    kernel = tied_prefix_ntk(w, a, x)
    largest = np.linalg.eigvalsh(kernel.reshape(n * d, n * d))[-1]
    jacobian = jax.jacobian(tied_prefix_output)
    losses, start = [], w
    for _ in range(4):
      error = m * tied_prefix_output(w, a, x) - y
      losses.append(np.square(error).sum() / 2)
      gradient = m * np.einsum("nd,ndij->ij", error, jacobian(w, a, x))
      last, w = w, w - 0.5 / (m * largest) * gradient
  np.testing.assert_allclose(run["losses"], losses, rtol=1e-10)
  np.testing.assert_allclose(run["moved"], np.linalg.norm(last - start))


def test_edge_of_the_step_size():
  """Monotone up to 2 / lambda_max, and not beyond, on four seeds of four."""
  point = experiment.rates_point(_config())
  np.testing.assert_array_equal(point["falls"], [1, 1, 0])
  assert point["rate_losses"].shape == (3, 61)


def test_error_of_the_kernel():
  rng = np.random.default_rng(0)
  query, key = rng.uniform(-1, 1, (2, 9, 1, 4))
  s = np.einsum("tnh,mnh->tm", query, key) / 2
  for degree, taylor in ((1, 1 + s), (2, 1 + s + s**2 / 2)):
    want = np.abs(taylor / np.exp(s) - 1).max()
    got = experiment.kernel_error(jnp.asarray(query), jnp.asarray(key), degree)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_classes_are_split_and_images_cut_into_patches():
  with jax.enable_x64(False):
    parts = _ntk_tuning.digit_patches(jax.random.key(0), range(5, 10))
  assert [len(y) for _, y in parts] == [448, 179, 269]
  assert {int(y) for _, labels in parts for y in labels} == set(range(5))
  pixels, labels = load_digits()
  images = pixels[labels >= 5].reshape(-1, 8, 8) / 8 - 1
  patches = images[:, 2:4, 6:8].reshape(-1, 4)  # Second row, last column.
  got = np.concatenate([x[:, 7] for x, _ in parts])
  np.testing.assert_array_equal(
    got[np.lexsort(got.T)], patches[np.lexsort(patches.T)]
  )


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  run = functools.partial(
    experiment.train_tied_prefix,
    length=max(config.columns),
    num_data=config.num_data,
    dim=config.dim,
    num_steps=config.num_steps,
  )
  out = jax.eval_shape(run, jax.random.key(0), True, 1.0)
  assert out["losses"].shape == (config.num_steps + 1,)


def test_refused_parts(tmp_path):
  config = _config(parts=("training", "dancing"))
  with pytest.raises(harness.UsageError, match="parts must be among training"):
    experiment.run(config, tmp_path)
