"""Searching for the input of a gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.models.leakage import LeakageBlock
from jaxattn.regression import gradient_leakage, tokens
from tests._recompile import no_recompilation
from tests.regression import _leakage

_SHAPE = (8, 16)
_CONFIG = gradient_leakage.AttackConfig(init_scale=0.5)


def _attack(leaked, seed=0, **options):
  """Two starts on the reference block; compiled once in this file."""
  _, params, _, block, _ = _leakage.reference()
  options = {"num_starts": 2, "config": _CONFIG} | options
  return gradient_leakage.attack(
    jax.random.key(seed), block.loss, params, leaked, shape=_SHAPE, **options
  )


def _metrics(found):
  embed, _, ids, _, _ = _leakage.reference()
  got = tokens.reconstruction_metrics(found.embeddings, embed[ids], vocab=embed)
  return float(got["rel_error"]), float(got["token_accuracy"])


@functools.lru_cache(maxsize=1)
def _found():
  return _attack(_leakage.reference()[-1])


def test_gauss_newton_recovers_everything():
  found = _found()
  assert _metrics(found) == (pytest.approx(0, abs=1e-10), 1.0)
  assert found.label == _leakage.LABEL
  assert (found.num_steps <= 40).all()
  assert (found.losses < 1e-20).all()
  for log, num in zip(found.log, found.num_steps, strict=True):
    assert np.isfinite(log[:num]).all()
    assert np.isnan(log[num:]).all()
    assert (np.diff(log[:num]) < 0).all()


def test_descents_end_far_above():
  leaked = _leakage.reference()[-1]
  best = max(_metrics(_found())[0], 1e-15)
  more = gradient_leakage.AttackConfig(max_steps=4000)
  for method, y, config, error, accuracy, behind in (
    # By steps it is not far behind, if it has thirty times as many.
    ("dlg", _leakage.LABEL, gradient_leakage.AttackConfig(), 1e-8, 1.0, 1e2),
    ("tag", None, more, 1.5, 0.25, 1e4),
    ("cosine", None, more, 1.0, 0.5, 1e4),
  ):
    found = _attack(leaked, method=method, y=y, config=config, num_starts=1)
    got = _metrics(found)
    assert got[0] <= error
    assert got[1] >= accuracy
    assert got[0] >= behind * best
    assert found.label == _leakage.LABEL
    assert found.log.shape == (1, found.num_steps[0])
    np.testing.assert_allclose(found.losses[0], found.log.min())


def test_label_may_be_searched_for_too():
  leaked = _leakage.reference()[-1]
  config = gradient_leakage.AttackConfig(max_steps=500)
  found = _attack(leaked, method="dlg", num_starts=2, config=config)
  error, accuracy = _metrics(found)
  assert found.label == _leakage.LABEL
  assert error < 0.1
  assert accuracy == 1.0


def test_error_is_proportional_to_noise():
  leaked = _leakage.reference()[-1]
  keys = jax.random.split(jax.random.key(3), len(leaked))
  noise = {
    k: jax.random.normal(key, leaked[k].shape) for k, key in zip(leaked, keys)
  }
  size = [
    np.sqrt(sum(float((x**2).sum()) for x in tree.values()))
    for tree in (leaked, noise)
  ]
  sizes, errors = np.array([1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3]), []
  for eta in sizes:
    step = eta * size[0] / size[1]
    noisy = {k: g + step * noise[k] for k, g in leaked.items()}
    error, accuracy = _metrics(_attack(noisy))
    errors.append(error)
    assert eta > 0.1 or accuracy == 1.0
  slope = np.polyfit(np.log(sizes[:3]), np.log(errors[:3]), 1)[0]
  assert 0.9 <= slope <= 1.1
  assert 2 <= errors[0] / 1e-4 <= 4.5
  assert 2 <= errors[3] / 3e-2 <= 4.5
  assert errors[5] > 0.5
  assert accuracy < 0.7


def test_without_positions_order_is_lost():
  n, d = 4, 8
  embed, params = _leakage.arrays(n=n, d=d, mlp=16, num_classes=4)
  params = params | {"pos": jnp.zeros((n, d))}
  x = embed[np.array([3, 17, 40, 55])]
  block = LeakageBlock(mlp=16, num_classes=4)
  seen = {k: k != "pos" for k in params}
  found = gradient_leakage.attack(
    jax.random.key(1),
    block.loss,
    params,
    jax.jit(jax.grad(block.loss))(params, x, 1),
    shape=(n, d),
    num_starts=4,
    mask_leaves=seen,
    config=_CONFIG,
  )
  assert found.losses.min() < 1e-20
  metrics = functools.partial(
    tokens.reconstruction_metrics, found.embeddings, x, vocab=embed
  )
  assert metrics(permutation=True)["rel_error"] < 1e-8
  assert metrics()["rel_error"] > 0.1


def test_products_alone_find_the_same(monkeypatch):
  """Beyond 512 unknowns no Jacobian is formed."""
  n, d = 4, 8
  embed, params = _leakage.arrays(n=n, d=d, mlp=16, num_classes=4)
  x = embed[np.array([3, 17, 40, 55])]
  block = LeakageBlock(mlp=16, num_classes=4)
  leaked = jax.jit(jax.grad(block.loss))(params, x, 1)
  monkeypatch.setattr(gradient_leakage, "_DENSE", 0)
  found = gradient_leakage.attack(
    jax.random.key(0),
    block.loss,
    params,
    leaked,
    shape=(n, d),
    y=1,
    num_starts=2,
    config=_CONFIG,
  )
  assert _leakage.relative_error(found.embeddings, x) < 1e-6


def test_new_gradients_do_not_recompile():
  _found()
  other = jax.tree.map(lambda g: 1.1 * g, _leakage.reference()[-1])
  with no_recompilation():
    _attack(other, seed=1)


# --- refusals ---


def test_a_fitted_example_tells_nothing():
  embed, params, ids, block, _ = _leakage.reference()
  x = embed[ids]
  fitted = jax.nn.softmax(jax.jit(block.apply)({"params": params}, x))
  leaked = jax.jit(jax.grad(block.loss))(params, x, fitted)
  # Exactly 0 but for rounding, far below what is refused.
  with pytest.raises(
    ValueError, match=r"leaked gradient norm .* is below 1e-12"
  ):
    _attack(leaked, y=fitted)
  nothing = jax.tree.map(jnp.zeros_like, leaked)
  message = "leaked gradient norm 0 is below 1e-12"
  with pytest.raises(ValueError, match=message):
    _attack(nothing)


@pytest.mark.parametrize(
  ("change", "options", "message"),
  [
    (lambda g: {"w": g["w_q"]}, {}, "leaked must have the same tree structure"),
    (
      lambda g: g | {"w_q": jnp.full((16, 16), jnp.nan)},
      {},
      "leaked contains non-finite values",
    ),
    (
      lambda g: g | {"w_q": jnp.ones((16, 4))},
      {},
      "leaked must have shape (16, 16) = that of params, got (16, 4)",
    ),
    (
      lambda g: g,
      {"method": "x"},
      "method must be one of 'gauss_newton', 'dlg', 'tag', 'cosine', got 'x'",
    ),
    (lambda g: g, {"num_starts": 0}, "num_starts must be >= 1, got 0"),
    (
      lambda g: g,
      {"mask_leaves": {"w_q": True}},
      "mask_leaves must have the same tree structure as params",
    ),
    (
      lambda g: g,
      {"mask_leaves": dict.fromkeys(_leakage.reference()[1], False)},
      "mask_leaves must leave a gradient to see, got all False",
    ),
    (
      lambda g: g,
      {"config": gradient_leakage.AttackConfig(learning_rate=0.1)},
      "learning_rate must be None with method='gauss_newton', got 0.1",
    ),
    (
      lambda g: g,
      {"config": gradient_leakage.AttackConfig(max_steps=0)},
      "max_steps must be >= 1, got 0",
    ),
    (
      lambda g: g,
      {"config": gradient_leakage.AttackConfig(init_scale=0.0)},
      "init_scale must be positive, got 0.0",
    ),
    (
      lambda g: g,
      {"config": gradient_leakage.AttackConfig(bias_key="b")},
      "y is required: leaked has no gradient 'b' to read the label from",
    ),
    (
      lambda g: g,
      {"mask_leaves": {k: k != "b_c" for k in _leakage.reference()[1]}},
      "y is required: mask_leaves hides 'b_c', which tells the label",
    ),
  ],
)
def test_refusals(change, options, message):
  leaked = change(_leakage.reference()[-1])
  with pytest.raises(ValueError, match=re.escape(message)):
    _attack(leaked, **options)


@pytest.mark.parametrize(
  ("shape", "message"),
  [
    ((8,), "shape must be (n, d) or (B, n, d), got (8,)"),
    ((8, 0), "shape must be >= 1, got 0"),
    ((2, 8, 16), "y is required for a batch: its gradients tell no label"),
  ],
)
def test_refused_shapes(shape, message):
  _, params, _, block, leaked = _leakage.reference()
  with pytest.raises(ValueError, match=re.escape(message)):
    gradient_leakage.attack(
      jax.random.key(0), block.loss, params, leaked, shape=shape
    )


def test_too_few_equations_warn():
  _, params, _, block, leaked = _leakage.reference()
  seen = {k: k == "b_1" for k in params}
  with pytest.warns(UserWarning, match="128 unknowns, 32 equations"):
    jax.eval_shape(
      lambda g: gradient_leakage.attack(
        jax.random.key(0),
        block.loss,
        params,
        g,
        shape=_SHAPE,
        y=_leakage.LABEL,
        mask_leaves=seen,
      ),
      leaked,
    )


def test_equations_that_depend_on_each_other_warn():
  n, d = 32, 8
  embed, params = _leakage.arrays(n=n, d=d, mlp=16, num_classes=4)
  x = embed[_leakage.token_ids(n)]
  block = LeakageBlock(mlp=16, num_classes=4)
  with pytest.warns(
    UserWarning, match="256 unknowns, 128 independent equations"
  ):
    gradient_leakage.attack(
      jax.random.key(0),
      block.loss,
      params,
      jax.jit(jax.grad(block.loss))(params, x, 1),
      shape=(n, d),
      y=1,
      mask_leaves={k: k in ("w_q", "w_k", "w_v", "w_o") for k in params},
      config=gradient_leakage.AttackConfig(max_steps=1, init_scale=0.5),
    )


def test_problem_is_what_the_attack_solves():
  _, params, *_, block, leaked = _leakage.reference()
  seen = {name: name != "pos" for name in params}
  ours = gradient_leakage.problem(block.loss, (8, 16), mask_leaves=seen)
  again = gradient_leakage.problem(block.loss, [8, 16], mask_leaves=seen)
  assert ours is again
  data = gradient_leakage.GradientLeakageData(params, leaked, 2)
  x = jnp.full(128, 0.1)
  guess = jax.grad(block.loss)(params, x.reshape(8, 16), 2)
  matching = gradient_leakage.gradient_matching_loss()
  guess, target = ({k: g[k] for k in g if seen[k]} for g in (guess, leaked))
  np.testing.assert_allclose(ours.loss(x, data), matching(guess, target))
  with pytest.raises(ValueError, match=r"shape must be .n, d. or .B, n, d."):
    gradient_leakage.problem(block.loss, (8,))
  with pytest.raises(ValueError, match="mask_leaves must leave a gradient"):
    gradient_leakage.problem(
      block.loss, (8, 16), mask_leaves=dict.fromkeys(params, False)
    )
