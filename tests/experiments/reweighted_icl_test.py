"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments import reweighted_icl as experiment
from tests.experiments import smoke

_CONFIG = "configs/reweighted_icl.py"


def test_area_under_the_curve():
  w = np.array([[0.1, 0.9, 1.0, 1.1], [1.0, 0.2, 0.2, 3.0]])
  wrong = np.array([[True, False, False, False], [True, True, False, False]])
  # All three pairs in order; of four pairs one, and a tie for a half.
  np.testing.assert_allclose(
    experiment.roc_auc(w, wrong), (1 + 2.5 / 4) / 2, rtol=1e-12
  )


@pytest.mark.parametrize("tier", ["smoke", "cpu"])
def test_tasks_differ_in_what_is_spoiled_alone(tier):
  config = harness.load_config(f"{_CONFIG}:{tier}")
  num_val = min(config.nums_val)
  clean = experiment.spoiled_tasks(config, "clean", num_val)
  for kind, num, _ in config.corruptions:
    prompt, *rest = experiment.spoiled_tasks(config, kind, num_val)
    for x, y in zip(jax.tree.leaves(rest), jax.tree.leaves(clean[1:])):
      np.testing.assert_array_equal(x, y)
    wrong = (prompt.y != clean[0].y) | (prompt.x != clean[0].x).any(-1)
    np.testing.assert_array_equal(wrong.sum(1), num)


def test_patients():
  config = harness.load_config(f"{_CONFIG}:cpu")
  prompt, val, query, target = experiment.diabetes_tasks(config)
  assert prompt.x.shape == (config.num_tasks, 16, 3)
  assert val.y.shape == (config.num_tasks, config.diabetes_num_val)
  assert query.shape[:2] == target.shape
  # Of the size of what the model was trained on: x of unit, y of variance 3.
  np.testing.assert_allclose(jnp.square(query).mean(), 1, atol=0.15)
  np.testing.assert_allclose(jnp.square(target).mean(), 3, atol=0.5)


def test_full_size_is_traced():
  config = harness.load_config(f"{_CONFIG}:full")
  from jaxattn.models.icl import init_icl

  model, rng = experiment.regressor(config), jax.random.key(0)
  params = jax.eval_shape(lambda: init_icl(rng, model, config.dim))
  loss, _ = jax.eval_shape(
    functools.partial(experiment.training_loss, config=config, model=model),
    params,
    (),
    rng,
  )
  assert loss.shape == ()
  num_val = config.nums_val[0]
  tasks = jax.eval_shape(
    lambda: experiment.spoiled_tasks(config, "imbalanced", num_val)
  )
  errors = jax.eval_shape(
    functools.partial(experiment.baseline_errors, model=model), params, tasks
  )
  more, w = jax.eval_shape(
    functools.partial(
      experiment.reweighted_errors, model=model, num_steps=config.num_steps
    ),
    params,
    tasks,
    config.ridge,
  )
  assert len(w) == 3
  for x in w.values():
    assert x.shape == (config.num_tasks, config.num_examples)
  for error in (errors | more).values():
    assert error.shape == (config.num_tasks,)


def test_smoke(tmp_path):
  smoke.run_twice("reweighted_icl", tmp_path, num_checks=9)
