"""Reweighted softmax regression: derivatives, planted examples, refusals."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import newton
from jaxattn.regression import _reweighted_bilevel as bilevel
from jaxattn.regression import reweighted_icl, softmax_resnet

_RIDGE = 1e-2


def _instance(seed=0, m=6, num_val=6, n=10, d=4):
  """Two of the examples have random targets."""
  rng = np.random.default_rng(seed)
  planted = rng.normal(size=d)
  a = rng.normal(size=(m + num_val, n, d))
  b = np.array(jax.nn.softmax(a @ planted))
  b[:2] = rng.dirichlet(np.ones(n), size=2)
  a, b = jnp.asarray(a), jnp.asarray(b)
  return (a[:m], b[:m], a[m:], b[m:]), planted


def _plain_loss(x, w, a, b):
  """The inner problem as it is written down."""
  error = jax.nn.softmax(a @ x, axis=-1) - b
  return w @ (error**2).sum(1) / 2 + _RIDGE * (x @ x) / 2


def _solve(w, a, b, **options):
  data = bilevel._prepare(a, b, a, b, _RIDGE)[0]._replace(w=w)
  return newton.minimize(
    bilevel._PROBLEM,
    jnp.zeros(a.shape[-1]),
    data,
    config=newton.NewtonConfig(rtol=0.0, atol=1e-14, **options),
  )


def _val_loss(x, a, b):
  data = jax.vmap(
    functools.partial(softmax_resnet.prepare, residual_scale=0.0)
  )(a, b)
  return jax.vmap(softmax_resnet.loss, (None, 0))(x, data).sum()


def test_inner_problem_is_what_is_written():
  (a, b, *_), planted = _instance()
  w = jnp.linspace(0.1, 2, 6)
  data = bilevel._prepare(a, b, a, b, _RIDGE)[0]._replace(w=w)
  x = jnp.asarray(planted) / 2
  value, grad = jax.value_and_grad(_plain_loss)(x, w, a, b)
  got = bilevel._PROBLEM.value_and_grad(x, data)
  np.testing.assert_allclose(got[0], value, rtol=1e-13)
  np.testing.assert_allclose(got[1], grad, rtol=0, atol=1e-14)
  np.testing.assert_allclose(
    bilevel._PROBLEM.curvature(x, data).matrix,
    jax.hessian(_plain_loss)(x, w, a, b),
    rtol=0,
    atol=1e-14,
  )


def test_hypergradient_against_central_differences():
  args, _ = _instance()
  a, b, a_val, b_val = args
  w = jnp.linspace(0.5, 1.5, 6)

  @jax.jit
  def outer(w):
    found = _solve(w, a, b)
    return _val_loss(found.x, a_val, b_val), found.grad_norm

  step = 1e-4 * jnp.eye(6)
  values, norms = jax.vmap(outer)(
    jnp.concatenate([w[None] + step, w[None] - step])
  )
  assert norms.max() < 1e-13
  want = (values[:6] - values[6:]) / 2e-4
  x = _solve(w, a, b).x
  got = reweighted_icl.hypergradient(w, x, *args, ridge=_RIDGE)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
  assert abs(want).max() > 1e-2


def test_hypergradient_notices_an_unfinished_solve():
  args, _ = _instance()
  w = jnp.ones(6)
  right = _solve(w, *args[:2]).x
  early = _solve(w, *args[:2], max_steps=1).x
  fn = functools.partial(reweighted_icl.hypergradient, ridge=_RIDGE)
  with pytest.raises(ValueError, match="x must be stationary, got a gradient"):
    fn(w, early, *args)
  # Where nothing can be raised it is no number; a right x is one.
  assert jnp.isnan(jax.jit(fn)(w, early, *args)).all()
  np.testing.assert_allclose(
    jax.jit(fn)(w, right, *args), fn(w, right, *args), rtol=1e-14
  )
  # It would have been wrong, and by far.
  data, val = bilevel._prepare(*args, _RIDGE)
  wrong, _ = bilevel._hypergradient(early, data, val)
  exact = fn(w, right, *args)
  assert abs(wrong - exact).max() > 0.04 * abs(exact).max()


def test_an_unfinished_solve_is_noticed_by_both(monkeypatch):
  args, _ = _instance(seed=3)
  calls = [
    functools.partial(fn, ridge=_RIDGE, **{name: 1})
    for fn, name in (
      (reweighted_icl.ricl_bilevel, "num_steps"),
      (reweighted_icl.laricl_bilevel, "num_rounds"),
    )
  ]
  monkeypatch.setattr(bilevel, "_CONFIG", newton.NewtonConfig(max_steps=1))
  # Compiled programs have the solver's options in them.
  monkeypatch.setattr(bilevel, "_ricl", _again(bilevel._ricl))
  monkeypatch.setattr(bilevel, "_laricl", _again(bilevel._laricl))
  for call in calls:
    with pytest.raises(ValueError, match="inner problem must be solved, got a"):
      call(*args)
    assert jnp.isnan(jax.jit(call)(*args).w).all()


def _again(jitted):
  def run(data, val, number, count):
    return jitted.__wrapped__(data, val, number, count)

  return run


def test_a_perfect_fit_is_no_unfinished_solve():
  (a, _, a_val, _), planted = _instance()
  a, a_val = a.astype(jnp.float32), a_val.astype(jnp.float32)
  b, b_val = (jax.nn.softmax(x @ jnp.float32(planted)) for x in (a, a_val))
  found = reweighted_icl.ricl_bilevel(
    a, b, a_val, b_val, ridge=1e-6, num_steps=5
  )
  assert found.val_losses.max() < 1e-9
  x = found.x
  got = reweighted_icl.hypergradient(found.w, x, a, b, a_val, b_val, ridge=1e-6)
  assert jnp.isfinite(got).all()


def test_implicit_derivative_is_the_hypergradient():
  args, _ = _instance()
  data, val = bilevel._prepare(*args, _RIDGE)
  w = jnp.linspace(0.5, 1.5, 6)

  def outer(w):
    x = bilevel._solve(jnp.zeros(4), data._replace(w=w))
    return bilevel._val_loss(x, val), x

  grad, x = jax.jit(jax.grad(outer, has_aux=True))(w)
  want = reweighted_icl.hypergradient(w, x, *args, ridge=_RIDGE)
  np.testing.assert_allclose(grad, want, rtol=0, atol=1e-9)


def test_ricl_switches_planted_examples_off():
  args, planted = _instance()
  found = reweighted_icl.ricl_bilevel(*args, ridge=_RIDGE)
  assert found.val_losses.shape == (151,)
  assert found.val_losses[-1] < found.val_losses[0] / 200
  np.testing.assert_array_equal(found.w[:2], 0)
  assert (found.w[2:] > 1.6).all()
  assert np.linalg.norm(found.x - planted) < 0.03
  # The inner problem was solved each time.
  assert found.grad_norms.max() < 1e-9


def test_laricl_gets_much_of_it_and_rounds_the_rest():
  args, _ = _instance()

  @jax.jit
  def after(ridge):
    return [
      reweighted_icl.laricl_bilevel(
        *args, ridge=_RIDGE, weight_ridge=ridge, num_rounds=num
      )
      for num in (1, 6)
    ]

  ridges = jnp.array([1e-4, 1e-3, 1e-2, 1e-1])
  one, six = jax.vmap(after)(ridges)
  start = one.val_losses[:, 0]
  assert (one.val_losses[:3, 1] < start[:3] / 9).all()
  assert (six.val_losses[:3, -1] < start[:3] / 200).all()
  # A ridge as large as that gets there more slowly.
  assert one.val_losses[3, 1] < 0.7 * start[3]
  assert six.val_losses[3, -1] < start[3] / 20
  np.testing.assert_array_equal(six.w[2, :2], 0)
  assert (six.w[2, 2:] > 1.3).all()
  assert six.grad_norms.max() < 1e-9


def test_no_round_of_laricl_does_harm():
  # Here full steps end at twice the loss that the first of them had.
  args, _ = _instance(seed=2, num_val=4)
  found = reweighted_icl.laricl_bilevel(
    *args, ridge=_RIDGE, weight_ridge=1e-4, num_rounds=6
  )
  assert (np.diff(found.val_losses) <= 0).all()
  assert found.val_losses[-1] < found.val_losses[0] / 50


def test_linearization_is_the_derivative():
  args, _ = _instance()
  # A large ridge makes the step a small one along the gradient.
  big = 1e6
  found = reweighted_icl.laricl_bilevel(*args, ridge=_RIDGE, weight_ridge=big)
  x = bilevel._solve(jnp.zeros(4), bilevel._prepare(*args, _RIDGE)[0])
  grad = reweighted_icl.hypergradient(jnp.ones(6), x, *args, ridge=_RIDGE)
  np.testing.assert_allclose(big * (found.w - 1), -grad, rtol=0, atol=1e-6)


def test_symmetries():
  args, _ = _instance()
  a, b, a_val, b_val = args
  order = np.array([3, 0, 5, 1, 4, 2])

  @jax.jit
  def both(a, b):
    rest = a_val, b_val
    return (
      reweighted_icl.ricl_bilevel(a, b, *rest, ridge=_RIDGE, num_steps=10).w,
      reweighted_icl.laricl_bilevel(a, b, *rest, ridge=_RIDGE).w,
    )

  permuted = both(a[order], b[order])
  for straight, mixed in zip(both(a, b), permuted, strict=True):
    np.testing.assert_allclose(straight[order], mixed, rtol=0, atol=1e-9)
  for w in both(a.at[4].set(a[3]), b.at[4].set(b[3])):
    np.testing.assert_allclose(w[3], w[4], rtol=0, atol=1e-9)


_GOOD = _instance()[0]


@pytest.mark.parametrize(
  ("index", "value", "message"),
  [
    (0, jnp.ones((6, 10)), "a must have 3 dimensions, got shape (6, 10)"),
    (0, jnp.ones((0, 10, 4)), "a needs at least one example"),
    (1, jnp.ones((6, 9)), "b must have shape (6, 10) = a.shape[:2]"),
    (2, jnp.ones((6, 10, 3)), "a_val must have shape (*, *, 4) = (V, n, d)"),
    (2, jnp.ones((0, 10, 4)), "a_val needs at least one example"),
  ],
)
def test_refused_shapes(index, value, message):
  args = [value if i == index else x for i, x in enumerate(_GOOD)]
  if not len(value):
    args[index + 1] = jnp.ones((0, 10))
  elif index == 2:
    args[3] = jnp.ones(value.shape[:2])
  for fn in (reweighted_icl.ricl_bilevel, reweighted_icl.laricl_bilevel):
    with pytest.raises(ValueError, match=re.escape(message)):
      fn(*args, ridge=_RIDGE)


@pytest.mark.parametrize(
  ("fn", "options", "message"),
  [
    (reweighted_icl.ricl_bilevel, {"ridge": 0.0}, "ridge must be positive"),
    (reweighted_icl.ricl_bilevel, {"num_steps": 0}, "num_steps must be >= 1"),
    (reweighted_icl.ricl_bilevel, {"step_size": 0.0}, "step_size must be"),
    (reweighted_icl.laricl_bilevel, {"num_rounds": 0}, "num_rounds must be"),
    (
      reweighted_icl.laricl_bilevel,
      {"weight_ridge": 0.0},
      "weight_ridge must be positive, got 0.0",
    ),
  ],
)
def test_refused_options(fn, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    fn(*_GOOD, **{"ridge": _RIDGE, **options})


@pytest.mark.parametrize("index", range(4))
def test_refused_if_not_finite_or_of_two_dtypes(index):
  name = ("a", "b", "a_val", "b_val")[index]
  args = list(_GOOD)
  args[index] = args[index].at[(1,) * args[index].ndim].set(jnp.nan)
  for fn in (
    reweighted_icl.ricl_bilevel,
    reweighted_icl.laricl_bilevel,
    functools.partial(reweighted_icl.hypergradient, jnp.ones(6), jnp.zeros(4)),
  ):
    with pytest.raises(ValueError, match=f"^{name} must be finite, got NaN"):
      fn(*args, ridge=_RIDGE)
  if index == 2:
    args[2] = _GOOD[2].astype(jnp.float32)
    with pytest.raises(ValueError, match="one dtype, got a_val of float32 and"):
      reweighted_icl.ricl_bilevel(*args, ridge=_RIDGE)


def test_refused_by_hypergradient():
  fn = functools.partial(reweighted_icl.hypergradient, ridge=_RIDGE)
  with pytest.raises(ValueError, match=re.escape("w must have shape (6,)")):
    fn(jnp.ones(5), jnp.zeros(4), *_GOOD)
  with pytest.raises(ValueError, match=re.escape("x must have shape (4,)")):
    fn(jnp.ones(6), jnp.zeros(3), *_GOOD)
