"""Spoiled prompts: what changes, by how much, and what does not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.data import icl
from jaxattn.looped.icl import sample_icl_task
from jaxattn.regression.reweighted_icl import Prompt

_KINDS = ("bias_some", "noise_some", "other_task", "imbalanced")


def _draw(kind, num, scale, num_tasks=400, m=16, d=3):
  def one(rng):
    task = sample_icl_task(rng, num_examples=m, dim=d)
    clean = Prompt(task.x, task.y)
    spoiled = icl.corrupt_prompt(
      jax.random.fold_in(rng, 1),
      clean,
      kind=kind,
      num_corrupted=num,
      scale=scale,
    )
    return clean, spoiled, task.w

  return jax.vmap(one)(jax.random.split(jax.random.key(0), num_tasks))


@pytest.mark.parametrize("kind", _KINDS)
def test_as_many_as_were_asked_for(kind):
  clean, spoiled, _ = _draw(kind, 6, 1.0)
  wrong = (clean.y != spoiled.y) | (clean.x != spoiled.x).any(-1)
  np.testing.assert_array_equal(wrong.sum(1), 6)
  # Each place is as likely as any other: 400 draws of 6 / 16.
  np.testing.assert_allclose(wrong.mean(0), 6 / 16, rtol=0, atol=0.1)
  if kind != "imbalanced":
    np.testing.assert_array_equal(clean.x, spoiled.x)


def test_bias_and_noise():
  clean, spoiled, _ = _draw("bias_some", 8, 2.0)
  moved = np.asarray(spoiled.y - clean.y)
  np.testing.assert_allclose(moved[moved != 0], 2, rtol=0, atol=1e-5)
  clean, spoiled, _ = _draw("noise_some", 8, 2.0)
  size = np.sqrt((clean.y**2).mean(1, keepdims=True))
  drawn = np.asarray(spoiled.y / size)[np.asarray(spoiled.y != clean.y)]
  np.testing.assert_allclose([drawn.mean(), drawn.std()], [0, 2], atol=0.15)
  # Of the right label it knows nothing.
  right = np.asarray(clean.y)[np.asarray(spoiled.y != clean.y)]
  assert abs(np.corrcoef(drawn, right)[0, 1]) < 0.1


def test_another_task_is_one_task():
  clean, spoiled, _ = _draw("other_task", 8, 1.5)
  coefs = []
  for x, y, was in zip(*map(np.asarray, (*spoiled, clean.y)), strict=True):
    rows = y != was
    coef, *_ = np.linalg.lstsq(x[rows], y[rows], rcond=None)
    np.testing.assert_allclose(x[rows] @ coef, y[rows], rtol=0, atol=1e-4)
    coefs.append(coef)
  np.testing.assert_allclose(np.std(coefs), 1.5, rtol=0.1)


def test_imbalanced_inputs_lie_on_a_line_and_labels_stay_right():
  clean, spoiled, w = _draw("imbalanced", 14, 1.0)
  exact = jnp.einsum("bnd,bd->bn", spoiled.x, w)
  np.testing.assert_allclose(spoiled.y, exact, rtol=0, atol=1e-4)
  np.testing.assert_allclose(
    jnp.linalg.norm(spoiled.x, axis=-1),
    jnp.linalg.norm(clean.x, axis=-1),
    rtol=1e-5,
  )
  for x, was in zip(np.asarray(spoiled.x), np.asarray(clean.x), strict=True):
    moved = x[(x != was).any(-1)]
    sizes = np.linalg.svd(moved, compute_uv=False)
    assert sizes[1] < 1e-5 * sizes[0]


def test_imbalanced_of_inputs_that_lie_on_a_line():
  x = jnp.linspace(1.0, 4.0, 4)[:, None] * jnp.array([[3.0, 4.0]]) / 5
  prompt = Prompt(x, 2 * jnp.linspace(1.0, 4.0, 4))
  got = icl.corrupt_prompt(
    jax.random.key(0), prompt, kind="imbalanced", num_corrupted=4
  )
  # Of all fits the least is along the line.
  task = 2 * jnp.array([3.0, 4.0]) / 5
  np.testing.assert_allclose(got.y, got.x @ task, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
  ("prompt", "options", "message"),
  [
    (
      Prompt(jnp.ones((4, 2)), jnp.ones(4)),
      {"kind": "x", "num_corrupted": 1},
      "kind must be one of 'bias_some', 'noise_some', 'other_task'",
    ),
    (
      Prompt(jnp.ones((4, 2)), jnp.ones(4)),
      {"kind": "bias_some", "num_corrupted": 5},
      "num_corrupted must be in [0, 4], got 5",
    ),
    (
      Prompt(jnp.ones((4, 2)), jnp.ones(4)),
      {"kind": "bias_some", "num_corrupted": 1, "scale": 0.0},
      "scale must be positive, got 0.0",
    ),
    (
      Prompt(jnp.ones((4, 2)), jnp.ones(3)),
      {"kind": "bias_some", "num_corrupted": 1},
      "prompt.y must have shape (4,) = (m,), got (3,)",
    ),
    (
      Prompt(jnp.ones((2, 4)), jnp.ones(2)),
      {"kind": "imbalanced", "num_corrupted": 1},
      "kind='imbalanced' needs as many examples as dimensions, got 2 of 4",
    ),
  ],
)
def test_refused(prompt, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    icl.corrupt_prompt(jax.random.key(0), prompt, **options)
