"""Rivals of reweighted prompts, and what both refuse."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.regression import reweighted_icl
from jaxattn.regression.reweighted_icl import Prompt
from tests.regression import _prompts

# --- baselines ---


def _fit(result, val, mode="logit"):
  out = reweighted_icl.weighted_predict(
    _prompts.kernel, result.params, result.prompt, val.x, result.w, mode=mode
  )
  return float(((out - val.y) ** 2).mean())


def test_baselines():
  prompt, val = _prompts.task(num_val=6)
  wrong = Prompt(prompt.x, prompt.y.at[2].add(30.0).at[7].add(30.0))
  found = {
    kind: reweighted_icl.icl_baseline(
      _prompts.kernel, jnp.array(1.0), wrong, val, kind=kind
    )
    for kind in (
      "vanilla",
      "append",
      "validation_only",
      "fine_tune",
      "learned_examples",
      "influence",
    )
  }
  lengths = {kind: len(f.prompt.y) for kind, f in found.items()}
  assert lengths == {
    "vanilla": 16,
    "append": 22,
    "validation_only": 6,
    "fine_tune": 16,
    "learned_examples": 20,
    "influence": 16,
  }
  both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), wrong, val)
  np.testing.assert_array_equal(found["append"].prompt.y, both.y)
  np.testing.assert_array_equal(found["validation_only"].prompt.x, val.x)
  left_out = np.flatnonzero(found["influence"].w < 1)
  assert {2, 7} <= set(left_out)
  assert len(left_out) <= 8
  errors = {kind: _fit(f, val) for kind, f in found.items()}
  # Of one parameter, the scale of the logits, there is little to be had.
  assert errors["fine_tune"] < errors["vanilla"]
  assert errors["learned_examples"] < 0.9 * errors["vanilla"]
  assert errors["influence"] < 0.1 * errors["vanilla"]


def test_learned_examples_that_start_as_one_part():
  prompt, val = _prompts.task(num_val=1)
  found = reweighted_icl.icl_baseline(
    _prompts.kernel, jnp.array(1.0), prompt, val, kind="learned_examples"
  )
  learned = np.asarray(found.prompt.x[16:])
  gaps = np.linalg.norm(learned[:, None] - learned[None], axis=-1)
  assert gaps[~np.eye(4, dtype=bool)].min() > 0.01


def test_a_prefix_is_trained_and_nothing_else():
  prompt, val = _prompts.task(num_val=6)
  tokens = 0.02 * jax.random.normal(jax.random.key(0), (4, 16))
  start = {**_prompts.network(), "prefix": {"tokens": tokens}}
  found = reweighted_icl.icl_baseline(
    _prompts.MODEL.apply, start, prompt, val, kind="prefix"
  )
  for x, y in zip(
    jax.tree.leaves(found.params["params"]),
    jax.tree.leaves(_prompts.network()["params"]),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)
  # 150 steps of Adam, each of them no longer than its rate.
  moved = abs(found.params["prefix"]["tokens"] - tokens)
  assert 0.05 < moved.max() < 150 * 0.05
  ones = jnp.ones(16)
  before, after = (
    reweighted_icl.validation_loss(
      ones, _prompts.MODEL.apply, params, prompt, val, mode="logit"
    )
    for params in (start, found.params)
  )
  assert after < 0.5 * before
  np.testing.assert_array_equal(found.w, ones)


def test_fine_tuning_is_adam_on_all_parameters():
  prompt, val = _prompts.task(num_val=6)
  found = reweighted_icl.icl_baseline(
    _prompts.linear, jnp.array(2.0), prompt, val, kind="fine_tune"
  )
  # Far from the minimum each step of Adam is its rate.
  np.testing.assert_allclose(found.params, 2 + 60e-3, rtol=0, atol=2e-3)


# --- refused ---

_GOOD = _prompts.task(num_val=6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"mode": "x"},
      "mode must be one of 'embedding', 'logit', 'value', got 'x'",
    ),
    ({"ridge": 0.0}, "ridge must be > 0 when V < m, got 0.0"),
    ({"ridge": -1.0}, "ridge must be non-negative, got -1.0"),
    (
      {"prompt": Prompt(jnp.ones((0, 3)), jnp.ones(0))},
      "prompt needs at least one example",
    ),
    (
      {"val": Prompt(jnp.ones((0, 3)), jnp.ones(0))},
      "val needs at least one example",
    ),
    (
      {"prompt": Prompt(_GOOD[0].x, _GOOD[0].y.at[1].set(jnp.nan))},
      "prompt.y must be finite",
    ),
    (
      {"prompt": Prompt(_GOOD[0].x, jnp.ones(8))},
      "prompt.y must have shape (16,) = (m,), got (8,)",
    ),
    (
      {"prompt": Prompt(jnp.ones(3), jnp.ones(3))},
      "prompt.x must have 2 dimensions, got shape (3,)",
    ),
    (
      {"val": Prompt(jnp.ones((4, 2)), jnp.ones(4))},
      "val.x must have shape (*, 3) = (V, d), got (4, 2)",
    ),
    (
      {"val": Prompt(*(x.astype(jnp.float32) for x in _GOOD[1]))},
      "one dtype, got val.x of float32 and prompt.x of float64",
    ),
  ],
)
def test_refused_by_both(change, message):
  args = {"prompt": _GOOD[0], "val": _GOOD[1], **change}
  for learn in (reweighted_icl.ricl, reweighted_icl.laricl):
    with pytest.raises(ValueError, match=re.escape(message)):
      learn(_prompts.linear, 1.0, **args)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: reweighted_icl.weighted_predict(
        _prompts.linear, 1.0, _GOOD[0], _GOOD[1].x, jnp.ones(8)
      ),
      "w must have shape (16,) = (m,), got (8,)",
    ),
    (
      lambda: reweighted_icl.weighted_predict(
        _prompts.linear, 1.0, _GOOD[0], _GOOD[1].x, jnp.zeros(16), mode="logit"
      ),
      "mode='logit' needs w > 0",
    ),
    (
      lambda: reweighted_icl.weighted_predict(
        _prompts.linear, 1.0, _GOOD[0], jnp.ones((2, 4)), jnp.ones(16)
      ),
      "query must have shape (*, 3) = (Q, d), got (2, 4)",
    ),
    (
      lambda: reweighted_icl.laricl(_prompts.linear, 1.0, *_GOOD, num_rounds=0),
      "num_rounds must be >= 1, got 0",
    ),
    (
      lambda: reweighted_icl.ricl(_prompts.linear, 1.0, *_GOOD, num_steps=0),
      "num_steps must be >= 1, got 0",
    ),
    (
      lambda: reweighted_icl.ricl(
        _prompts.linear, 1.0, *_GOOD, optimizer="adam"
      ),
      "optimizer must be one of 'gradient_descent', got 'adam'",
    ),
    (
      lambda: reweighted_icl.icl_baseline(
        _prompts.linear, 1.0, *_GOOD, kind="x"
      ),
      "kind must be one of 'vanilla', 'append', 'validation_only'",
    ),
    (
      lambda: reweighted_icl.icl_baseline(
        _prompts.linear, 1.0, *_GOOD, kind="prefix"
      ),
      "kind='prefix' needs params['prefix'], got none",
    ),
    (
      lambda: reweighted_icl.ricl(_prompts.column, 1.0, *_GOOD),
      "what apply_fn returns must have shape (6,) = (Q,), got (6, 1)",
    ),
    (
      lambda: reweighted_icl.weighted_predict(
        _prompts.column, 1.0, _GOOD[0], _GOOD[1].x, jnp.ones(16)
      ),
      "what apply_fn returns must have shape (6,) = (Q,), got (6, 1)",
    ),
    (
      lambda: reweighted_icl.rank_examples(jnp.ones((2, 2))),
      "w must have 1 dimensions, got shape (2, 2)",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
