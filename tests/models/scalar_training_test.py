"""Training of attention to scalars: steps, the history, what theory says."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn.data import (
  permutation_floor,
  residual_ssm,
  sample_residual_ssm,
  sample_sign_inconsistent,
)
from jaxattn.models import (
  scalar_attention_apply,
  scalar_attention_grad,
  scalar_attention_init,
  scalar_attention_ntk,
  train_scalar_attention,
)
from tests._recompile import no_recompilation


def _init(kind="plain", width=6, dim=8, seed=0):
  return scalar_attention_init(
    jax.random.key(seed),
    width,
    dim,
    kind=kind,
    patch_size=2 if kind == "patch" else None,
  )


def _task(n=128, seed=1, **options):
  ssm = residual_ssm(jax.random.key(0), 8, **options)
  x, y, _ = sample_residual_ssm(jax.random.key(seed), ssm, n)
  return ssm, (x, y)


def test_steps_are_gradient_descent():
  _, (x, y) = _task(30)
  params = want = _init()
  for _ in range(4):
    step = 0.01 * scalar_attention_grad(want, x, y)
    want = {**want, "w": want["w"] - step}
  got, history = train_scalar_attention(
    params, (x, y), learning_rate=0.01, num_steps=4, log_every=2
  )
  np.testing.assert_allclose(got["w"], want["w"], rtol=1e-12)
  np.testing.assert_array_equal(got["a"], params["a"])
  assert history.step.tolist() == [0, 2, 4]


def test_history_is_what_it_says():
  ssm, data = _task(30)
  other = sample_sign_inconsistent(jax.random.key(5), ssm, 40)[:2]
  params = _init()
  train = functools.partial(
    train_scalar_attention,
    params,
    data,
    learning_rate=0.05,
    num_steps=3,
    eval_sets={"ood": other},
    log_kernel=True,
  )
  trained, history = train()
  for i, p in ((0, params), (3, trained)):
    for got, (x, y) in (
      (history.risk, data),
      (history.eval_risk["ood"], other),
    ):
      want = jnp.square(scalar_attention_apply(p, x) - y).mean()
      np.testing.assert_allclose(got[i], want, rtol=1e-12)
    a, w, shift = p["a"], p["w"], p["w"] - params["w"]
    assert history.alignment[i] == (a * w > 0).mean()
    np.testing.assert_allclose(history.drift[i], (a * shift).mean(), atol=1e-15)
    np.testing.assert_allclose(history.max_shift[i], abs(shift).max())
    kernel = scalar_attention_ntk(p, data[0], data[0])
    sizes = np.linalg.eigvalsh(kernel)
    np.testing.assert_allclose(history.kernel_max[i], sizes[-1], rtol=1e-12)
    assert history.kernel_rank[i] == (sizes > 1e-6 * sizes[-1]).sum()
  np.testing.assert_allclose(history.risk[0], jnp.square(data[1]).mean())


def test_default_rate_is_one_over_the_kernel():
  _, (x, y) = _task(40)
  for kind in ("plain", "residual"):
    params = _init(kind)
    rate = 1 / jnp.linalg.eigvalsh(scalar_attention_ntk(params, x, x))[-1]
    train = functools.partial(
      train_scalar_attention, params, (x, y), kind=kind, num_steps=1
    )
    got, want = (p["w"] for p, _ in (train(), train(learning_rate=rate)))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_nothing_to_learn_stays():
  """Equal lags: no slope, and a rate of one over nothing."""
  x = jnp.ones((5, 3)) * jnp.arange(1.0, 6)[:, None]
  params = _init(dim=3)
  trained, history = train_scalar_attention(params, (x, x[:, 0]), num_steps=2)
  np.testing.assert_array_equal(trained["w"], params["w"])
  assert np.isfinite(history.risk).all()


@pytest.mark.parametrize(
  ("kind", "train_output"),
  [
    ("position_bias", False),
    ("patch", False),
    ("differential", True),
    ("rope", True),
  ],
)
def test_every_kind_learns(kind, train_output):
  _, data = _task(200)
  params, optimizer = _init(kind), _adam()
  trained, history = train_scalar_attention(
    params,
    data,
    kind=kind,
    num_steps=30,
    log_every=30,
    optimizer=optimizer,
    train_output=train_output,
  )
  assert history.risk[-1] < history.risk[0]
  moved = {k for k in params if (trained[k] != params[k]).any()}
  assert moved == set(params) - (set() if train_output else {"a"})
  assert history.kernel_max is history.kernel_rank is None


@functools.cache
def _adam():
  return optax.adam(2e-2)


def test_batches_are_drawn_from_the_data():
  _, data = _task(64)
  params = _init()
  run = functools.partial(
    train_scalar_attention, params, data, num_steps=6, learning_rate=0.01
  )
  first, again, other = (
    run(batch_size=16, rng=jax.random.key(seed))[0]["w"] for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert abs(first - other).max() > 1e-6
  # The gradient of a batch is the mean of those of its rows: on average the
  # first step is 16 / 64 of that on all.
  x, y = data
  one = functools.partial(
    train_scalar_attention, params, data, num_steps=1, learning_rate=1e-3
  )
  trained = jax.jit(jax.vmap(lambda rng: one(batch_size=16, rng=rng)[0]["w"]))
  rngs = jax.random.split(jax.random.key(2), 300)
  steps = trained(rngs) - params["w"][None]
  want = -1e-3 * scalar_attention_grad(params, x, y) / 4
  error = np.std(steps, axis=0) / math.sqrt(300)
  assert (abs(np.mean(steps, axis=0) - want) < 4.5 * error).all()


def test_weight_decay_is_an_optimizers():
  _, data = _task(64)
  params = _init()
  decay = optax.chain(optax.add_decayed_weights(1e3), optax.sgd(1e-3))
  trained, _ = train_scalar_attention(
    params, data, num_steps=1, optimizer=decay
  )
  plain, _ = train_scalar_attention(
    params, data, num_steps=1, learning_rate=1e-3
  )
  np.testing.assert_allclose(trained["w"], plain["w"] - params["w"], rtol=1e-10)


def test_dtype_stays():
  _, data = _task(32)
  params, data = jax.tree.map(lambda v: v.astype("float32"), (_init(), data))
  trained, history = train_scalar_attention(params, data, num_steps=2)
  assert {v.dtype for v in trained.values()} == {jnp.dtype("float32")}
  assert history.risk.dtype == jnp.float32


def test_second_training_compiles_nothing():
  data, other = _task(32)[1], _task(32, seed=2)[1]
  train_scalar_attention(_init(), data, num_steps=2)
  params = _init(seed=1)
  with no_recompilation():
    train_scalar_attention(params, other, num_steps=2)


# --- theory ---


@pytest.mark.slow
def test_drift_shrinks_with_width():
  """Mean a_r (w_r - w_r(0)) after 200 steps falls like m^-1/2: by 5.7 here.

  Of single draws of the data both drifts and their ratio scatter widely.
  """
  drifts = {}
  for width in (32, 1024):
    train = functools.partial(
      train_scalar_attention, num_steps=200, log_every=200
    )
    drifts[width] = np.mean(
      [
        train(_init(width=width, seed=seed), _task(seed=seed + 1)[1])[1].drift
        for seed in range(4)
      ],
      axis=0,
    )[-1]
  assert 4 <= drifts[32] / drifts[1024] <= 8


@pytest.mark.slow
def test_plain_attention_stays_above_the_floor_and_a_bias_does_not():
  """Adam, 2500 steps of 256 samples, 4096 in all, 128 heads."""
  ssm, data = _task(4096)
  floor = permutation_floor(ssm)
  draws = sample_residual_ssm, sample_sign_inconsistent
  sets = {
    name: draw(jax.random.key(9), ssm, 20_000)[:2]
    for name, draw in zip(("id", "ood"), draws)
  }
  optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, 2500))
  risks = {}
  for kind in ("plain", "position_bias"):
    params = _init(kind, width=128)
    _, history = train_scalar_attention(
      params,
      data,
      kind=kind,
      num_steps=2500,
      log_every=2500,
      optimizer=optimizer,
      batch_size=256,
      rng=jax.random.key(0),
      eval_sets=sets,
      train_output=True,
    )
    risks[kind] = {k: float(v[-1]) for k, v in history.eval_risk.items()}
  assert risks["plain"]["id"] > floor - 3 * math.sqrt(2 / 20_000)
  assert risks["plain"]["ood"] > 25 * 0.02
  assert risks["position_bias"]["ood"] < 1.3 * 0.02


# --- refused ---

_BAD = [
  (
    {"num_steps": 3, "log_every": 2},
    "num_steps must be a multiple of log_every=2, got 3",
  ),
  ({"log_every": 0}, "log_every must be >= 1, got 0"),
  ({"num_steps": -1}, "num_steps must be >= 0, got -1"),
  ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
  (
    {"learning_rate": 0.1, "optimizer": optax.sgd(0.1)},
    "learning_rate must be None beside an optimizer, got 0.1",
  ),
  ({"batch_size": 4}, "rng is required when batch_size is given"),
  ({"rng": 0}, "rng must be None without a batch_size"),
  (
    {"batch_size": 0, "rng": 0},
    "batch_size must be >= 1, got 0",
  ),
  (
    {"train_output": True},
    "learning_rate is required for kind='plain' and train_output=True",
  ),
  (
    {"log_kernel": True, "kind": "rope", "learning_rate": 0.1},
    "log_kernel needs a kind of plain, residual, got 'rope'",
  ),
  ({"log_kernel": None}, "log_kernel must be one of False, True, got None"),
  ({"train_output": 2}, "train_output must be one of False, True, got 2"),
  ({"kind": "magic"}, "kind must be one of 'plain'"),
  (
    {"eval_sets": {"ood": (np.ones((4, 8)), np.ones(5))}},
    "y of eval_sets['ood'] must have shape (4,) = (n,), got (5,)",
  ),
  (
    {"data": (np.ones(8), np.ones(1))},
    "x of data must have 2 dimensions, got shape (8,)",
  ),
]


@pytest.mark.parametrize(("options", "message"), _BAD)
def test_refused_arguments(options, message):
  options = {"num_steps": 2, "data": _task(10)[1], **options}
  with pytest.raises(ValueError, match=re.escape(message)):
    train_scalar_attention(_init(), **options)


def test_refused_kind_without_a_kernel():
  message = "learning_rate is required for kind='rope' and train_output=False"
  with pytest.raises(ValueError, match=re.escape(message)):
    train_scalar_attention(
      _init("rope"), _task(10)[1], kind="rope", num_steps=1
    )
