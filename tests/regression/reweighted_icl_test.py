"""Reweighted prompts: linear attention in closed form, and a network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn.looped.icl import sample_icl_task
from jaxattn.regression import reweighted_icl
from jaxattn.regression.reweighted_icl import Prompt
from tests.regression import _prompts

# --- what weights are ---


@pytest.mark.parametrize("mode", _prompts.MODES)
def test_weights_of_one_change_no_bit(mode):
  prompt, val = _prompts.task(dtype=np.float32)
  params = _prompts.network(jnp.float32)
  plain = _prompts.MODEL.apply(params, prompt, val.x)
  weighted = reweighted_icl.weighted_predict(
    _prompts.MODEL.apply,
    params,
    prompt,
    val.x,
    jnp.ones_like(prompt.y),
    mode=mode,
  )
  np.testing.assert_array_equal(weighted, plain)
  # And others do change it.
  other = jnp.full_like(prompt.y, 0.9).at[3].set(1.5)
  weighted = reweighted_icl.weighted_predict(
    _prompts.MODEL.apply, params, prompt, val.x, other, mode=mode
  )
  assert abs(weighted - plain).max() > 1e-3


def test_logit_weights_are_multiplicities():
  prompt, val = _prompts.task(dtype=np.float32)
  params = _prompts.network(jnp.float32)

  def predict(rows, w):
    some = Prompt(prompt.x[rows], prompt.y[rows])
    w = jnp.asarray(w, jnp.float32)
    return reweighted_icl.weighted_predict(
      _prompts.MODEL.apply, params, some, val.x, w, mode="logit"
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


@pytest.mark.parametrize("mode", _prompts.MODES)
def test_gradient_of_the_objective(mode):
  prompt, val = _prompts.task(num_val=5)
  loss = jax.jit(
    functools.partial(
      reweighted_icl.validation_loss,
      apply_fn=_prompts.MODEL.apply,
      params=_prompts.network(),
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
  prompt, val = _prompts.task()
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
    (normed, mode): abs(
      _prompts.jacobian(model, normed, prompt, val, mode)
    ).max()
    for normed in (False, True)
    for mode in ("embedding", "logit")
  }
  assert size[True, "embedding"] < 1e-3 * size[False, "embedding"]
  assert size[True, "logit"] > 0.1 * size[False, "logit"]


# --- RICL and LARICL against closed forms ---


@pytest.mark.parametrize("num_val", [6, 16])
def test_of_linear_attention_both_are_ridge_regression(num_val):
  prompt, val = _prompts.task(num_val=num_val)
  args = _prompts.linear, 8.0, prompt, val
  jacobian = _prompts.jacobian(*args)
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
  prompt, val = _prompts.task(m=3, num_val=16)
  args = _prompts.linear, 8.0, prompt, val
  got = reweighted_icl.laricl(*args, ridge=0.0)
  jacobian = _prompts.jacobian(*args)
  want = np.linalg.lstsq(jacobian, val.y, rcond=None)[0]
  np.testing.assert_allclose(got.w, want, rtol=0, atol=1e-11)


def test_weights_tend_to_one_like_one_over_the_ridge():
  prompt, val = _prompts.task(num_val=6)
  moved = [
    ridge
    * (
      reweighted_icl.laricl(
        _prompts.MODEL.apply, _prompts.network(), prompt, val, ridge=ridge
      ).w
      - 1
    )
    for ridge in (1e3, 1e4)
  ]
  size = float(abs(moved[0]).max())
  np.testing.assert_allclose(*moved, rtol=0, atol=0.05 * size)
  assert size > 0.1


@pytest.mark.parametrize("mode", _prompts.MODES)
def test_gradient_descent_falls_at_each_step(mode):
  prompt, val = _prompts.task(num_val=6)
  args = _prompts.MODEL.apply, _prompts.network(), prompt, val
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
  prompt, val = _prompts.task(num_val=6)
  args = _prompts.linear, 8.0, prompt, val
  least = reweighted_icl.laricl(*args).losses[-1]
  found = reweighted_icl.ricl(
    *args, optimizer="gradient_descent", num_steps=num_steps
  )
  grad = jax.grad(reweighted_icl.validation_loss)(found.w, *args)
  jacobian = _prompts.jacobian(*args)
  largest = jnp.linalg.eigvalsh(jacobian @ jacobian.T)[-1] + 0.1
  bound = 2 * largest / 6 * (found.losses[0] - least) / num_steps
  # Of a quadratic the last gradient is the smallest.
  assert grad @ grad <= bound


@pytest.mark.parametrize("mode", _prompts.MODES)
def test_rounds_of_laricl_lead_to_ricl(mode):
  prompt, val = _prompts.task(num_val=6)
  args = _prompts.MODEL.apply, _prompts.network(), prompt, val
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
  prompt, val = _prompts.task(num_val=6)
  w = jnp.asarray(np.random.default_rng(3).uniform(0.5, 1.5, 16))
  got = reweighted_icl.validation_loss(
    w, _prompts.kernel, 2.0, prompt, val, ridge=0.7, mode=mode
  )
  error = ((_prompts.kernel(2.0, prompt, val.x, w, mode) - val.y) ** 2).sum()
  want = (error + share * 0.7 * (z(w) ** 2).sum()) / 12
  np.testing.assert_allclose(got, want, rtol=1e-13)


def test_laricl_has_the_ridge_of_the_objective_in_logit_mode():
  prompt, val = _prompts.task(num_val=6)
  got = reweighted_icl.laricl(
    _prompts.kernel,
    2.0,
    prompt,
    val,
    ridge=2.0,
    mode="logit",
    line_search=False,
  )
  jacobian = _prompts.jacobian(_prompts.kernel, 2.0, prompt, val, "logit")
  residual = _prompts.kernel(2.0, prompt, val.x, jnp.ones(16), "logit") - val.y
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
    args = _prompts.linear, 1.0, prompt, Prompt(task.x[16:], task.y[16:])
    found = (
      jnp.ones_like(prompt.y),
      reweighted_icl.ricl(*args).w,
      reweighted_icl.laricl(*args).w,
    )
    return [
      jnp.square(
        _prompts.linear(1.0, prompt, task.queries, w, "embedding")
        - task.targets
      ).mean()
      for w in found
    ]

  vanilla, *ours = errors(jax.random.split(jax.random.key(0), 32))
  for error in ours:
    assert np.median(error) <= 1.2 * np.median(vanilla)


# --- where a number is possible, there is one ---


@pytest.mark.parametrize("line_search", [True, False])
def test_of_a_singular_system_no_step_is_taken(line_search):
  prompt, val = _prompts.task(m=3, num_val=6)
  prompt = Prompt(prompt.x, prompt.y.at[1].set(0.0))
  got = reweighted_icl.laricl(
    _prompts.linear, 8.0, prompt, val, ridge=0.0, line_search=line_search
  )
  np.testing.assert_array_equal(got.w, 1)
  assert got.losses[0] == got.losses[1]


def test_a_model_that_does_not_see_the_weights_leaves_them():
  prompt, val = _prompts.task(m=3, num_val=6)

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
  prompt, val = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16), _prompts.task(num_val=6)
  )
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (prompt, val))

  def exact(params, prompt, query, w, mode):
    # So that all that differs is what is done with the answers.
    prompt = jax.tree.map(lambda x: x.astype(jnp.float32), prompt)
    rest = query.astype(jnp.float32), w.astype(jnp.float32), mode
    return _prompts.linear(params, prompt, *rest)

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
  prompt, val = _prompts.task(num_val=6)
  calls = []

  def counted(*args):
    calls.append(None)
    return _prompts.linear(*args)

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


@pytest.mark.parametrize("mode", _prompts.MODES)
def test_permuting_the_prompt_permutes_the_weights(mode):
  prompt, val = _prompts.task(num_val=6)
  order = np.random.default_rng(2).permutation(16)
  args = _prompts.MODEL.apply, _prompts.network()

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
  tasks = [_prompts.task(seed, num_val=6) for seed in range(3)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *tasks)

  def both(prompt, val):
    args = _prompts.MODEL.apply, _prompts.network(), prompt, val
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
