"""Sweeps of the harness: points, resume, devices."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import harness
from jaxattn.scaling import sweep

_KEY = jax.random.key(0)


def _fn(rng, width, scale):
  x = scale * jax.random.normal(rng, (width,))
  return {"largest": x.max(), "sorted": jnp.sort(x)[:2]}


def _open(folder):
  config = ml_collections.ConfigDict({"slug": "toy", "tier": "smoke"})
  return harness.open_workdir(folder, config)


def test_is_the_sweep_and_goes_on(tmp_path):
  # 8 seeds are divided among the 8 devices, 3 are not.
  for num_seeds in (8, 3):
    name = f"seeds/{num_seeds}"
    run = (_KEY, _fn, (3, 5), num_seeds)
    got = harness.sweep_widths(_open(tmp_path), name, *run, args=(2.0,))
    want = sweep(*run, args=(2.0,)).values
    assert got["sorted"].shape == (2, num_seeds, 2)
    for key, values in want.items():
      np.testing.assert_allclose(got[key], values, rtol=1e-12)
  # Of three widths two are there: only the third is computed.
  traced = []

  def counted(rng, width, scale):
    traced.append(width)
    return _fn(rng, width, scale)

  run = (_KEY, counted, (3, 4, 5), 3)
  again = harness.sweep_widths(_open(tmp_path), name, *run, args=(2.0,))
  assert set(traced) == {4}
  np.testing.assert_array_equal(again["sorted"][::2], got["sorted"])


def test_what_is_kept_of_a_width(tmp_path):
  def then(width, found):
    assert isinstance(found["largest"], np.ndarray)
    return {"mean": found["largest"].mean(), "width": width}

  run = (_KEY, _fn, (3, 5), 4)
  got = harness.sweep_widths(_open(tmp_path), "w", *run, args=(1.0,), then=then)
  want = sweep(*run, args=(1.0,)).values["largest"].mean(1)
  np.testing.assert_array_equal(got["width"], [3, 5])
  np.testing.assert_allclose(got["mean"], want, rtol=1e-12)
