"""Training for addition modulo p, and what attention learns of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.models import modular
from jaxattn.ntk import margin
from tests._recompile import no_recompilation

# --- training ---


def _task(p, k, m, dtype=jnp.float32):
  inputs = margin.modular_inputs(p, k)
  labels = margin.modular_labels(inputs, p)
  params = margin.init(jax.random.key(0), m, p, k, dtype=dtype)
  return params, inputs, labels


@pytest.mark.slow
def test_training_finds_the_largest_margin():
  p, k = 11, 3
  params, history = modular.train_poly_net(
    *_task(p, k, 160), num_steps=5000, reg_weight=1e-4, log_every=2500
  )
  assert history.step.tolist() == [0, 2500, 5000]
  assert history.accuracy[0] < 0.5
  assert history.accuracy[-1] == 1
  best = margin.max_margin(p, k)
  # At the minimum wrong labels share a probability of lambda / gamma*.
  want = -np.log1p(-1e-4 / best)
  np.testing.assert_allclose(history.loss[-1], want, rtol=1e-3)
  found = margin.evaluate_margin(margin.normalize(params))
  assert 0.98 * best <= found.minimum <= best * (1 + 1e-5)
  assert found.accuracy == 1
  report = margin.fourier_report(params)
  active = np.asarray(report.active)
  assert report.coverage == 5
  assert np.asarray(report.power_share)[active].mean() >= 0.99
  assert np.asarray(report.alignment)[active].mean() >= 0.99


def test_steps_are_those_of_the_loss():
  p, k, weight, rate, num_steps = 5, 2, 0.3, 0.01, 4
  params, inputs, labels = _task(p, k, 4, jnp.float64)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(params):
    hot = jax.nn.one_hot(inputs, p, dtype=jnp.float64)
    out = jnp.einsum("nkp,mkp->nm", hot, params.inner) ** k @ params.outer
    logs = jnp.take_along_axis(jax.nn.log_softmax(out), labels[:, None], 1)
    norms = jnp.square(params.inner).sum((1, 2)) + (params.outer**2).sum(1)
    fit = -logs.mean()
    return fit + weight * (norms ** ((k + 1) / 2)).sum(), fit

  got, history = modular.train_poly_net(
    params,
    inputs,
    labels,
    num_steps=num_steps,
    log_every=1,
    learning_rate=rate,
    reg_weight=weight,
  )
  want = [np.asarray(x) for x in params]
  first = second = [0.0, 0.0]
  for i in range(num_steps):
    (_, fit), grads = loss(margin.PolyNet(*want))
    np.testing.assert_allclose(history.loss[i], fit, rtol=1e-9)
    first = [0.9 * x + 0.1 * g for x, g in zip(first, grads)]
    second = [0.98 * x + 0.02 * g**2 for x, g in zip(second, grads)]
    # Two steps of warm-up, then half a cosine.
    share = (0, 0.5, 1, 0.505)[i]
    want = [
      x
      - rate
      * share
      * (m / (1 - 0.9 ** (i + 1)))
      / (np.sqrt(v / (1 - 0.98 ** (i + 1))) + 1e-8)
      for x, m, v in zip(want, first, second)
    ]
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-9)


def test_all_goes_to_zero_from_a_weight_on():
  p, k = 5, 2
  edge = margin.max_margin(p, k) * (p - 1) / p
  task = _task(p, k, 20)
  ends = []
  for factor in (0.8, 1.2):
    params, _ = modular.train_poly_net(
      *task, num_steps=1500, learning_rate=0.02, reg_weight=factor * edge
    )
    ends.append(margin.network.norm_power(params) * edge)
  assert ends[0] > 0.1
  assert ends[1] < 1e-3


def test_batches_and_evaluation_sets():
  p, k = 5, 2
  params, inputs, labels = _task(p, k, 32)
  train = functools.partial(
    modular.train_poly_net,
    params,
    inputs[:20],
    labels[:20],
    num_steps=200,
    batch_size=16,
    eval_sets={
      "first": (inputs[:1], labels[:1]),
      "wrong": (inputs, 0 * labels),
    },
  )
  got, history = train(rng=jax.random.key(0))
  assert history.accuracy[-1] == 1
  assert history.eval_accuracy["first"].tolist()[-1] == 1
  out = margin.apply(got, inputs).argmax(1)
  want = float((out == 0).mean())
  np.testing.assert_allclose(history.eval_accuracy["wrong"][-1], want)
  with no_recompilation():
    train(rng=jax.random.key(0), reg_weight=1e-3, learning_rate=1e-3)
  other, _ = train(rng=jax.random.key(1))
  assert not np.array_equal(other.inner, got.inner)


# --- attention ---

_MODEL = modular.ModularTransformer(
  modulus=7, dim=6, num_heads=3, head_dim=2, embed_std=1.0
)


def _model():
  inputs = margin.modular_inputs(7, 3)[::11]
  params = _MODEL.init(jax.random.key(0), inputs)
  return jax.tree.map(lambda x: x.astype(jnp.float64), params), inputs


def test_transformer_is_what_is_written_down():
  params, inputs = _model()
  layers = jax.tree.map(np.asarray, params["params"])
  table = layers["embed"]["embedding"]
  q, k, v = (layers[name]["kernel"] for name in ("query", "key", "value"))
  want = np.zeros((len(inputs), 7))
  for i, tokens in enumerate(np.asarray(inputs)):
    z = table[tokens]
    for h in range(3):
      for t in range(3):
        logits = z @ k[:, h] @ (z[t] @ q[:, h]) / np.sqrt(2)
        weights = np.exp(logits) / np.exp(logits).sum()
        out = weights @ (z @ v[:, h])
        want[i] += out @ layers["head"]["kernel"][h] / 3
  got = _MODEL.apply(params, inputs)
  # The softmax is jax.nn's, of float32 inside.
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_order_of_terms_does_not_matter():
  params, inputs = _model()
  np.testing.assert_allclose(
    _MODEL.apply(params, inputs),
    _MODEL.apply(params, inputs[:, ::-1]),
    rtol=0,
    atol=1e-5,
  )


def test_what_is_out_of_range_is_not_wrapped():
  params, inputs = _model()
  bad = inputs[:3].at[0, 1].set(-1).at[2, 0].set(7)
  out = jax.jit(_MODEL.apply)(params, bad)
  np.testing.assert_array_equal(np.isnan(out).all(1), [True, False, True])


def test_attention_matrices():
  params, _ = _model()
  layers = params["params"]
  table = layers["embed"]["embedding"]
  got = modular.attention_matrices(params)
  for h in range(3):
    full = (
      table
      @ layers["key"]["kernel"][:, h]
      @ layers["query"]["kernel"][:, h].T
      @ table.T
    )
    want = full - full.mean(0, keepdims=True)
    np.testing.assert_allclose(got[h], want, rtol=0, atol=1e-12)


def test_shares_in_two_dimensions():
  n = 11
  a = 2 * np.pi * np.arange(n) / n
  x, y = np.meshgrid(a, a, indexing="ij")
  wave = np.cos(3 * x + 2 * y + 0.3)
  product = np.cos(x + 0.1) * np.cos(4 * y)
  matrices = jnp.asarray([wave, product, wave + product, 0 * wave])

  def shares(num_bins):
    return modular.fourier2d_share(matrices, num_bins=num_bins)

  # Power 1/2 in two bins, 1/4 in four.
  np.testing.assert_allclose(
    shares(2), [1, 1 / 2, 2 / 3, 0], rtol=0, atol=1e-12
  )
  np.testing.assert_allclose(shares(4), [1, 1, 5 / 6, 0], rtol=0, atol=1e-12)
  noise = jax.random.normal(jax.random.key(0), (n, n))
  np.testing.assert_allclose(
    modular.fourier2d_share(noise, num_bins=n * n), 1, rtol=1e-6
  )


# --- what is refused ---

_TASK = (
  margin.PolyNet(jnp.ones((4, 2, 5)), jnp.ones((4, 5))),
  jnp.zeros((3, 2), int),
  jnp.zeros(3, int),
)


def _train(*task, **options):
  return modular.train_poly_net(
    *(task or _TASK), **({"num_steps": 2} | options)
  )


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: _train(_TASK[0], _TASK[1] + 5, _TASK[2]),
      "all inputs must be in [0, 4], got",
    ),
    (
      lambda: _train(*_TASK[:2], _TASK[2] - 1),
      "all labels must be in [0, 4], got",
    ),
    (
      lambda: _train(*_TASK[:2], _TASK[2][:2]),
      "labels must have shape (3,) = (n,), got (2,)",
    ),
    (
      lambda: _train(_TASK[0], _TASK[1][:0], _TASK[2][:0]),
      "inputs must hold an input, got none",
    ),
    (
      lambda: _train(eval_sets={"test": (_TASK[1], _TASK[2] + 5)}),
      "all labels of eval_sets['test'] must be in [0, 4], got",
    ),
    (lambda: _train(num_steps=0), "num_steps must be >= 1, got 0"),
    (
      lambda: _train(log_every=3),
      "num_steps must be a multiple of log_every=3, got 2",
    ),
    (
      lambda: _train(learning_rate=0.0),
      "learning_rate must be positive, got 0.0",
    ),
    (
      lambda: _train(reg_weight=-1.0),
      "reg_weight must be non-negative, got -1.0",
    ),
    (
      lambda: _train(batch_size=4),
      "rng is required when batch_size is given",
    ),
    (
      lambda: _train(rng=jax.random.key(0)),
      "rng must be None without a batch_size: nothing is drawn",
    ),
    (
      lambda: modular.ModularTransformer(modulus=8).init(
        jax.random.key(0), _TASK[1]
      ),
      "modulus must be odd and >= 3, got 8",
    ),
    (
      lambda: modular.ModularTransformer(modulus=5, num_heads=0).init(
        jax.random.key(0), _TASK[1]
      ),
      "num_heads must be >= 1, got 0",
    ),
    (
      lambda: _MODEL.apply(_model()[0], _TASK[1] + 7),
      "all inputs must be in [0, 6], got",
    ),
    (
      lambda: modular.attention_matrices({"params": {"embed": {}}}),
      "params must be those of a ModularTransformer, with an embedding, keys "
      "and queries; 'embedding' is missing",
    ),
    (
      lambda: modular.fourier2d_share(jnp.ones((3, 4))),
      "matrix must be (..., n, n), got shape (3, 4)",
    ),
    (
      lambda: modular.fourier2d_share(jnp.ones((3, 3)), num_bins=10),
      "num_bins must be in [1, 9], got 10",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
