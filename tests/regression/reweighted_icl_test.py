"""Reweighted prompts: linear attention in closed form, a network, refusals."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn.looped.icl import sample_icl_task
from jaxattn.models.icl import ICLRegressor
from jaxattn.regression import reweighted_icl
from jaxattn.regression.reweighted_icl import Prompt

_MODES = ("embedding", "logit", "value")
_MODEL = ICLRegressor(width=16)


def _linear(params, prompt, query, w, mode):
  """Linear attention, F = (1 / m) sum_i w_i y_i <x_i, M x>: linear in w."""
  del mode
  m, d = prompt.x.shape
  shrink = params / (1 + (d + 1) / m)
  return query @ (prompt.x.T @ (w * prompt.y)) * shrink / m


def _kernel(params, prompt, query, w, mode):
  """One layer of softmax attention; a weight is a multiplicity."""
  del mode
  logits = params * (query @ prompt.x.T) + jnp.log(w)[None]
  return jax.nn.softmax(logits, axis=-1) @ prompt.y


def _column(*args):
  return _linear(*args)[:, None]


def _task(seed=0, m=16, num_val=16, d=3, dtype=float):
  rng = np.random.default_rng(seed)
  theta = rng.normal(size=d)
  x = rng.normal(size=(m + num_val, d))
  y = x @ theta
  y[: m // 3] = rng.normal(size=m // 3)
  x, y = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
  return Prompt(x[:m], y[:m]), Prompt(x[m:], y[m:])


@functools.cache
def _network(dtype=jnp.float64):
  prompt, val = _task()
  params = _MODEL.init(jax.random.key(0), prompt, val.x)
  return jax.tree.map(lambda x: x.astype(dtype), params)


def _jacobian(apply_fn, params, prompt, val, mode="embedding"):
  def predict(w):
    return apply_fn(params, prompt, val.x, w, mode)

  return jax.jacrev(predict)(jnp.ones_like(prompt.y))


# --- what weights are ---


@pytest.mark.parametrize("mode", _MODES)
def test_weights_of_one_change_no_bit(mode):
  prompt, val = _task(dtype=np.float32)
  params = _network(jnp.float32)
  plain = _MODEL.apply(params, prompt, val.x)
  weighted = reweighted_icl.weighted_predict(
    _MODEL.apply, params, prompt, val.x, jnp.ones_like(prompt.y), mode=mode
  )
  np.testing.assert_array_equal(weighted, plain)
  # And others do change it.
  other = jnp.full_like(prompt.y, 0.9).at[3].set(1.5)
  weighted = reweighted_icl.weighted_predict(
    _MODEL.apply, params, prompt, val.x, other, mode=mode
  )
  assert abs(weighted - plain).max() > 1e-3


def test_logit_weights_are_multiplicities():
  prompt, val = _task(dtype=np.float32)
  params = _network(jnp.float32)

  def predict(rows, w):
    some = Prompt(prompt.x[rows], prompt.y[rows])
    w = jnp.asarray(w, jnp.float32)
    return reweighted_icl.weighted_predict(
      _MODEL.apply, params, some, val.x, w, mode="logit"
    )

  rows, ones = np.arange(16), np.ones(16)
  twice = predict(np.append(rows, 5), np.ones(17))
  np.testing.assert_allclose(
    predict(rows, np.where(rows == 5, 2, 1)), twice, rtol=0, atol=1e-5
  )
  without = predict(np.delete(rows, 5), np.ones(15))
  np.testing.assert_allclose(
    predict(rows, np.where(rows == 5, 1e-30, 1)), without, rtol=0, atol=1e-5
  )
  assert abs(twice - predict(rows, ones)).max() > 1e-3
  assert abs(without - predict(rows, ones)).max() > 1e-3


@pytest.mark.parametrize("mode", _MODES)
def test_gradient_of_the_objective(mode):
  prompt, val = _task(num_val=5)
  loss = jax.jit(
    functools.partial(
      reweighted_icl.validation_loss,
      apply_fn=_MODEL.apply,
      params=_network(),
      prompt=prompt,
      val=val,
      mode=mode,
    )
  )
  rng = np.random.default_rng(1)
  w = jnp.asarray(rng.uniform(0.5, 1.5, 16))
  step = 1e-5 * jnp.eye(16)
  both = jax.vmap(loss)(jnp.concatenate([w[None] + step, w[None] - step]))
  want = (both[:16] - both[16:]) / 2e-5
  np.testing.assert_allclose(jax.grad(loss)(w), want, rtol=0, atol=1e-6)


def test_a_norm_before_the_attention_undoes_embedding_weights():
  prompt, val = _task()
  rng = np.random.default_rng(0)
  maps = jnp.asarray(rng.normal(size=(4, 5, 5)) / 2)

  def model(normed, prompt, query, w, mode):
    # One head without a skip: what is weighted is seen through the norm only.
    def embed(x, y):
      z = jnp.concatenate([x, y[:, None], jnp.ones((len(y), 1))], 1) @ maps[0]
      return z

    keys, queries = embed(*prompt), embed(query, jnp.zeros(len(query)))
    if mode == "embedding":
      keys = keys * w[:, None]
    if normed:
      keys, queries = (
        (z - z.mean(1, keepdims=True))
        / jnp.sqrt(z.var(1, keepdims=True) + 1e-6)
        for z in (keys, queries)
      )
    logits = (queries @ maps[1]) @ keys.T
    if mode == "logit":
      logits = logits + jnp.log(w)[None]
    return (jax.nn.softmax(logits, axis=1) @ (keys @ maps[2])).sum(1)

  size = {
    (normed, mode): abs(_jacobian(model, normed, prompt, val, mode)).max()
    for normed in (False, True)
    for mode in ("embedding", "logit")
  }
  assert size[True, "embedding"] < 1e-3 * size[False, "embedding"]
  assert size[True, "logit"] > 0.1 * size[False, "logit"]


# --- RICL and LARICL against closed forms ---


@pytest.mark.parametrize("num_val", [6, 16])
def test_of_linear_attention_both_are_ridge_regression(num_val):
  prompt, val = _task(num_val=num_val)
  args = _linear, 8.0, prompt, val
  jacobian = _jacobian(*args)
  residual = jacobian @ jnp.ones(16) - val.y
  ridge = 1.0
  gram = jacobian.T @ jacobian + ridge * jnp.eye(16)
  want = 1 - jnp.linalg.solve(gram, jacobian.T @ residual)
  got = reweighted_icl.laricl(*args, ridge=ridge, line_search=False)
  # The dual solve against the primal one where there are few.
  np.testing.assert_allclose(got.w, want, rtol=0, atol=1e-10)
  searched = reweighted_icl.laricl(*args, ridge=ridge)
  np.testing.assert_allclose(searched.w, want, rtol=0, atol=1e-10)
  descent = reweighted_icl.ricl(
    *args, ridge=ridge, optimizer="gradient_descent", num_steps=3000
  )
  np.testing.assert_allclose(descent.w, want, rtol=0, atol=1e-8)
  assert abs(want - 1).max() > 0.3


def test_without_a_ridge():
  prompt, val = _task(m=3, num_val=16)
  args = _linear, 8.0, prompt, val
  got = reweighted_icl.laricl(*args, ridge=0.0)
  jacobian = _jacobian(*args)
  want = np.linalg.lstsq(jacobian, val.y, rcond=None)[0]
  np.testing.assert_allclose(got.w, want, rtol=0, atol=1e-11)


def test_weights_tend_to_one_like_one_over_the_ridge():
  prompt, val = _task(num_val=6)
  moved = [
    ridge
    * (
      reweighted_icl.laricl(
        _MODEL.apply, _network(), prompt, val, ridge=ridge
      ).w
      - 1
    )
    for ridge in (1e3, 1e4)
  ]
  size = float(abs(moved[0]).max())
  np.testing.assert_allclose(*moved, rtol=0, atol=0.05 * size)
  assert size > 0.1


@pytest.mark.parametrize("mode", _MODES)
def test_gradient_descent_falls_at_each_step(mode):
  prompt, val = _task(num_val=6)
  args = _MODEL.apply, _network(), prompt, val
  # The same number on |z|^2 in all modes.
  options = {"ridge": 10.0 if mode == "logit" else 1.0, "mode": mode}

  def loss(w):
    return reweighted_icl.validation_loss(w, *args, **options)

  optimizer = "gradient_descent"
  if mode == "value":
    # L grows on the way, and by the one at the start it ends in a cycle. So
    # that of the ball which no descent can leave: ridge |z|^2 / 2V <= L_0.
    radius = (12 * float(loss(jnp.ones(16)))) ** 0.5
    rng = np.random.default_rng(0)
    away = rng.normal(size=(64, 16))
    away *= radius / np.linalg.norm(away, axis=1, keepdims=True)
    away *= rng.uniform(size=(64, 1))
    hessians = jax.jit(jax.vmap(jax.hessian(loss)))(jnp.asarray(1 + away))
    smooth = float(abs(jnp.linalg.eigvalsh(hessians)).max())
    optimizer = optax.sgd(1 / smooth)
  found = reweighted_icl.ricl(
    *args, **options, optimizer=optimizer, num_steps=100
  )
  assert (np.diff(found.losses) <= 1e-14).all()
  assert found.losses[-1] < 0.9 * found.losses[0]
  np.testing.assert_allclose(found.losses[-1], loss(found.w), rtol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 8, 64])
def test_rate_of_gradient_descent(num_steps):
  prompt, val = _task(num_val=6)
  args = _linear, 8.0, prompt, val
  least = reweighted_icl.laricl(*args).losses[-1]
  found = reweighted_icl.ricl(
    *args, optimizer="gradient_descent", num_steps=num_steps
  )
  grad = jax.grad(reweighted_icl.validation_loss)(found.w, *args)
  jacobian = _jacobian(*args)
  largest = jnp.linalg.eigvalsh(jacobian @ jacobian.T)[-1] + 0.1
  bound = 2 * largest / 6 * (found.losses[0] - least) / num_steps
  # Of a quadratic the last gradient is the smallest.
  assert grad @ grad <= bound


@pytest.mark.parametrize("mode", _MODES)
def test_rounds_of_laricl_lead_to_ricl(mode):
  prompt, val = _task(num_val=6)
  args = _MODEL.apply, _network(), prompt, val
  # So large that of all minima there is one; in logit mode it counts a tenth.
  options = {"ridge": 30.0 if mode == "logit" else 3.0, "mode": mode}
  found = reweighted_icl.ricl(
    *args, **options, num_steps=1500, optimizer=optax.adam(0.02)
  )
  rounds = reweighted_icl.laricl(*args, **options, num_rounds=40)
  assert (np.diff(rounds.losses) <= 0).all()
  gap = rounds.losses - found.losses[-1]
  assert gap[1] < 0.7 * gap[0]
  assert abs(gap[-1]) < 1e-3 * gap[0]
  w0 = reweighted_icl.ricl(*args, **options, w0=rounds.w, num_steps=1)
  np.testing.assert_allclose(w0.losses[0], rounds.losses[-1], rtol=1e-9)


def test_a_full_step_can_be_bad_and_the_search_is_not():
  prompt, val = (
    Prompt(jnp.ones((1, 1)), jnp.ones(1)),
    Prompt(jnp.ones((1, 1)), jnp.zeros(1)),
  )

  def steep(params, prompt, query, w, mode):
    del params, prompt, mode
    return jnp.arctan(4 * w) * jnp.ones(len(query))

  args = steep, None, prompt, val
  full = reweighted_icl.laricl(*args, ridge=1e-6, line_search=False)
  assert full.losses[1] > full.losses[0]
  searched = reweighted_icl.laricl(*args, ridge=1e-6)
  assert searched.losses[1] < searched.losses[0]


@pytest.mark.parametrize(
  ("mode", "z", "share"),
  [
    ("embedding", lambda w: w - 1, 1.0),
    ("logit", jnp.log, 0.1),
    ("value", lambda w: w - 1, 1.0),
  ],
)
def test_the_objective_is_what_is_written_down(mode, z, share):
  prompt, val = _task(num_val=6)
  w = jnp.asarray(np.random.default_rng(3).uniform(0.5, 1.5, 16))
  got = reweighted_icl.validation_loss(
    w, _kernel, 2.0, prompt, val, ridge=0.7, mode=mode
  )
  error = ((_kernel(2.0, prompt, val.x, w, mode) - val.y) ** 2).sum()
  want = (error + share * 0.7 * (z(w) ** 2).sum()) / 12
  np.testing.assert_allclose(got, want, rtol=1e-13)


def test_laricl_has_the_ridge_of_the_objective_in_logit_mode():
  prompt, val = _task(num_val=6)
  got = reweighted_icl.laricl(
    _kernel, 2.0, prompt, val, ridge=2.0, mode="logit", line_search=False
  )
  jacobian = _jacobian(_kernel, 2.0, prompt, val, "logit")
  residual = _kernel(2.0, prompt, val.x, jnp.ones(16), "logit") - val.y
  gram = jacobian.T @ jacobian + 0.2 * jnp.eye(16)
  want = jnp.exp(-jnp.linalg.solve(gram, jacobian.T @ residual))
  np.testing.assert_allclose(got.w, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_val", [3, 6, 16])
def test_a_clean_prompt_is_not_hurt(num_val):
  @jax.jit
  @jax.vmap
  def errors(rng):
    task = sample_icl_task(
      rng, num_examples=16 + num_val, dim=3, num_queries=32
    )
    prompt = Prompt(task.x[:16], task.y[:16])
    args = _linear, 1.0, prompt, Prompt(task.x[16:], task.y[16:])
    found = (
      jnp.ones_like(prompt.y),
      reweighted_icl.ricl(*args).w,
      reweighted_icl.laricl(*args).w,
    )
    return [
      jnp.square(
        _linear(1.0, prompt, task.queries, w, "embedding") - task.targets
      ).mean()
      for w in found
    ]

  vanilla, *ours = errors(jax.random.split(jax.random.key(0), 32))
  for error in ours:
    assert np.median(error) <= 1.2 * np.median(vanilla)


# --- where a number is possible, there is one ---


@pytest.mark.parametrize("line_search", [True, False])
def test_of_a_singular_system_no_step_is_taken(line_search):
  prompt, val = _task(m=3, num_val=6)
  prompt = Prompt(prompt.x, prompt.y.at[1].set(0.0))
  got = reweighted_icl.laricl(
    _linear, 8.0, prompt, val, ridge=0.0, line_search=line_search
  )
  np.testing.assert_array_equal(got.w, 1)
  assert got.losses[0] == got.losses[1]


def test_a_model_that_does_not_see_the_weights_leaves_them():
  prompt, val = _task(m=3, num_val=6)

  def blind(params, prompt, query, w, mode):
    del params, prompt, w, mode
    return query.sum(1)

  got = reweighted_icl.ricl(
    blind,
    None,
    prompt,
    val,
    ridge=0.0,
    optimizer="gradient_descent",
    num_steps=3,
  )
  np.testing.assert_array_equal(got.w, 1)


def test_sixteen_bits_are_learned_from_in_thirty_two():
  prompt, val = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _task(num_val=6))
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (prompt, val))

  def exact(params, prompt, query, w, mode):
    # So that all that differs is what is done with the answers.
    prompt = jax.tree.map(lambda x: x.astype(jnp.float32), prompt)
    rest = query.astype(jnp.float32), w.astype(jnp.float32), mode
    return _linear(params, prompt, *rest)

  for learn in (reweighted_icl.ricl, reweighted_icl.laricl):
    got, want = learn(exact, 8.0, prompt, val), learn(exact, 8.0, *wide)
    assert got.w.dtype == jnp.bfloat16
    assert got.losses.dtype == jnp.float32
    # Weights are rounded where the model sees them.
    np.testing.assert_allclose(got.losses, want.losses, rtol=0.05)
    np.testing.assert_allclose(
      got.w.astype(jnp.float32), want.w, rtol=0, atol=0.03
    )


def test_nothing_is_compiled_again():
  prompt, val = _task(num_val=6)
  calls = []

  def counted(*args):
    calls.append(None)
    return _linear(*args)

  optimizer = optax.adam(0.01)
  for ridge in (0.1, 0.2):
    for shift in (0.0, 1.0):
      args = counted, 8.0 + shift, Prompt(prompt.x, prompt.y + shift), val
      reweighted_icl.ricl(*args, ridge=ridge, optimizer=optimizer, num_steps=3)
      reweighted_icl.laricl(*args, ridge=ridge)
    if ridge == 0.1:
      first = len(calls)
  assert len(calls) == first > 0


# --- symmetries ---


@pytest.mark.parametrize("mode", _MODES)
def test_permuting_the_prompt_permutes_the_weights(mode):
  prompt, val = _task(num_val=6)
  order = np.random.default_rng(2).permutation(16)
  args = _MODEL.apply, _network()

  @jax.jit
  def both(prompt):
    slow = reweighted_icl.ricl(*args, prompt, val, mode=mode, num_steps=30)
    return slow.w, reweighted_icl.laricl(*args, prompt, val, mode=mode).w

  mixed = Prompt(prompt.x[order], prompt.y[order])
  for straight, permuted in zip(both(prompt), both(mixed), strict=True):
    np.testing.assert_allclose(straight[order], permuted, rtol=0, atol=1e-8)
  # Examples that are the same get the same weight.
  same = Prompt(
    prompt.x.at[9].set(prompt.x[4]), prompt.y.at[9].set(prompt.y[4])
  )
  for w in both(same):
    np.testing.assert_allclose(w[4], w[9], rtol=0, atol=1e-8)
    assert np.ptp(w) > 1e-2


def test_many_prompts_at_once():
  tasks = [_task(seed, num_val=6) for seed in range(3)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *tasks)

  def both(prompt, val):
    args = _MODEL.apply, _network(), prompt, val
    return (
      reweighted_icl.ricl(*args, num_steps=20).w,
      reweighted_icl.laricl(*args).w,
    )

  together = jax.vmap(both)(*stacked)
  for i, task in enumerate(tasks):
    for many, one in zip(together, both(*task), strict=True):
      np.testing.assert_allclose(many[i], one, rtol=0, atol=1e-10)


def test_rank_examples():
  w = jnp.array([1.0, -0.5, 1.0, 0.2])
  np.testing.assert_array_equal(reweighted_icl.rank_examples(w), [1, 3, 0, 2])


# --- baselines ---


def _fit(result, val, mode="logit"):
  out = reweighted_icl.weighted_predict(
    _kernel, result.params, result.prompt, val.x, result.w, mode=mode
  )
  return float(((out - val.y) ** 2).mean())


def test_baselines():
  prompt, val = _task(num_val=6)
  wrong = Prompt(prompt.x, prompt.y.at[2].add(30.0).at[7].add(30.0))
  found = {
    kind: reweighted_icl.icl_baseline(
      _kernel, jnp.array(1.0), wrong, val, kind=kind
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
  prompt, val = _task(num_val=1)
  found = reweighted_icl.icl_baseline(
    _kernel, jnp.array(1.0), prompt, val, kind="learned_examples"
  )
  learned = np.asarray(found.prompt.x[16:])
  gaps = np.linalg.norm(learned[:, None] - learned[None], axis=-1)
  assert gaps[~np.eye(4, dtype=bool)].min() > 0.01


def test_a_prefix_is_trained_and_nothing_else():
  prompt, val = _task(num_val=6)
  tokens = 0.02 * jax.random.normal(jax.random.key(0), (4, 16))
  start = {**_network(), "prefix": {"tokens": tokens}}
  found = reweighted_icl.icl_baseline(
    _MODEL.apply, start, prompt, val, kind="prefix"
  )
  for x, y in zip(
    jax.tree.leaves(found.params["params"]),
    jax.tree.leaves(_network()["params"]),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)
  # 150 steps of Adam, each of them no longer than its rate.
  moved = abs(found.params["prefix"]["tokens"] - tokens)
  assert 0.05 < moved.max() < 150 * 0.05
  ones = jnp.ones(16)
  before, after = (
    reweighted_icl.validation_loss(
      ones, _MODEL.apply, params, prompt, val, mode="logit"
    )
    for params in (start, found.params)
  )
  assert after < 0.5 * before
  np.testing.assert_array_equal(found.w, ones)


def test_fine_tuning_is_adam_on_all_parameters():
  prompt, val = _task(num_val=6)
  found = reweighted_icl.icl_baseline(
    _linear, jnp.array(2.0), prompt, val, kind="fine_tune"
  )
  # Far from the minimum each step of Adam is its rate.
  np.testing.assert_allclose(found.params, 2 + 60e-3, rtol=0, atol=2e-3)


# --- refused ---

_GOOD = _task(num_val=6)


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
      learn(_linear, 1.0, **args)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: reweighted_icl.weighted_predict(
        _linear, 1.0, _GOOD[0], _GOOD[1].x, jnp.ones(8)
      ),
      "w must have shape (16,) = (m,), got (8,)",
    ),
    (
      lambda: reweighted_icl.weighted_predict(
        _linear, 1.0, _GOOD[0], _GOOD[1].x, jnp.zeros(16), mode="logit"
      ),
      "mode='logit' needs w > 0",
    ),
    (
      lambda: reweighted_icl.weighted_predict(
        _linear, 1.0, _GOOD[0], jnp.ones((2, 4)), jnp.ones(16)
      ),
      "query must have shape (*, 3) = (Q, d), got (2, 4)",
    ),
    (
      lambda: reweighted_icl.laricl(_linear, 1.0, *_GOOD, num_rounds=0),
      "num_rounds must be >= 1, got 0",
    ),
    (
      lambda: reweighted_icl.ricl(_linear, 1.0, *_GOOD, num_steps=0),
      "num_steps must be >= 1, got 0",
    ),
    (
      lambda: reweighted_icl.ricl(_linear, 1.0, *_GOOD, optimizer="adam"),
      "optimizer must be one of 'gradient_descent', got 'adam'",
    ),
    (
      lambda: reweighted_icl.icl_baseline(_linear, 1.0, *_GOOD, kind="x"),
      "kind must be one of 'vanilla', 'append', 'validation_only'",
    ),
    (
      lambda: reweighted_icl.icl_baseline(_linear, 1.0, *_GOOD, kind="prefix"),
      "kind='prefix' needs params['prefix'], got none",
    ),
    (
      lambda: reweighted_icl.ricl(_column, 1.0, *_GOOD),
      "what apply_fn returns must have shape (6,) = (Q,), got (6, 1)",
    ),
    (
      lambda: reweighted_icl.weighted_predict(
        _column, 1.0, _GOOD[0], _GOOD[1].x, jnp.ones(16)
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
