"""The experiment's own mathematics, its sizes, and the claims it decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="the models need flax")

from experiments import harness
from experiments import softmax_vs_linear as experiment
from jaxattn.data import recall_batch, separation_dataset
from jaxattn.models import separation_network

_CONFIG = "configs/softmax_vs_linear.py"


@pytest.mark.parametrize("is_cross", [False, True])
def test_rates_are_shares_of_positive_outputs(is_cross):
  sizes = {"length": 96, "dim": 18}
  rng, num_draws, amplitude, b = jax.random.key(3), 12, 0.35, 0.2
  got = experiment.rates(
    rng,
    jnp.float32(amplitude),
    jnp.float32(b),
    num_neurons=20,
    num_draws=num_draws,
    is_cross=is_cross,
    **sizes,
  )
  want = np.zeros(2)
  for key in jax.random.split(rng, num_draws):
    where, sign = jax.random.split(key)
    a, _ = separation_dataset(where, amplitude=amplitude, b=b, **sizes)
    query = None
    if is_cross:
      # All rows of the queries, and all scores.
      query, _ = separation_dataset(where, amplitude=0.0, b=b, **sizes)
    signs = jax.random.rademacher(sign, (20, 18), a.dtype)
    for i, kind in enumerate(("softmax", "linear")):
      out = separation_network(
        a, signs, b=b, attention=kind, query=query, x=jnp.ones((18, 18))
      )
      want[i] += float(out[0] > 0) / num_draws
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert 0 < want[0] < 1 or is_cross


def test_an_output_that_is_no_number_is_not_silent(monkeypatch):
  from jaxattn import models

  def no_number(a, signs, **options):
    return jnp.full(a.shape[0], jnp.nan)

  monkeypatch.setattr(models, "separation_network", no_number)
  out = experiment.rates(
    jax.random.key(0), jnp.float32(0.7), jnp.float32(0.2), length=66, dim=13,
    num_neurons=3, num_draws=2,
  )  # fmt: skip
  assert np.isnan(out).all()
  check = harness.Check("silent", float(out[1]), -1.0, 0.02)
  assert harness.decide([check]) != "reproduced"


def test_recall_beyond_the_rank_of_the_state_is_decided():
  config = harness.load_config(f"{_CONFIG}:full")
  assert max(config.pairs) > experiment.recall_rank(config)
  recall = {"accuracy": np.ones((len(config.pairs), 2))}
  checks = experiment._reported(config, recall, {})
  failed = [c.name for c in checks if not c.low <= c.measured <= c.high]
  assert failed == ["recall, linear (elu), 128 pairs"]


def test_transition_finds_a_step():
  def at(amplitude):
    return [float(amplitude > 0.437), 0.0]

  found = experiment.transition(at, 12)
  assert abs(found - 0.437) < 1.6 / 2**12


def _second_moments(length, spike):
  """Of the score times the value, of the value, both summed, and of y.

  Means over one marked and the other tokens, by Gauss-Hermite quadrature, which
  is exact for polynomials of this degree; tokens are independent and of mean 0.
  """
  nodes, weights = np.polynomial.hermite_e.hermegauss(6)
  weights = weights / weights.sum()
  value = nodes[None, :]
  both = weights[:, None] * weights[None, :]

  def token(score, answer):
    score = np.broadcast_to(score, both.shape)
    value_, answer = (np.broadcast_to(x, both.shape) for x in (value, answer))
    z = np.stack((score * value_, value_, answer))
    assert np.abs((both * z).sum((1, 2))).max() < 1e-14
    return np.einsum("ijk,ljk,jk->il", z, z, both)

  marked = token(spike, value)
  return marked + (length - 1) * token(nodes[:, None], 0.0)


@pytest.mark.parametrize("length", [8, 32, 128])
def test_best_linear_answer_has_the_closed_forms(length):
  # Least squares on one query, without and with an offset in the score.
  spike = 4.0
  moments = _second_moments(length, spike)
  for columns, want in (
    ([0], (length - 1) / (spike**2 + length - 1)),
    ([0, 1], (length - 1) / (spike**2 + length)),
  ):
    gram, cross = moments[np.ix_(columns, columns)], moments[columns, 2]
    gain = np.linalg.solve(gram, cross)
    left = (moments[2, 2] - gain @ cross) / moments[2, 2]
    np.testing.assert_allclose(left, want, rtol=1e-12)


def test_each_start_and_kind_is_trained_on_its_own():
  config = harness.load_config(f"{_CONFIG}:smoke")
  rng = jax.random.key(0)
  params = experiment.regression_params(config, rng, ("softmax", "linear"))
  batch = experiment.regression_batch(config, rng, 8, 0)

  def total(params):
    return experiment.regression_loss(params, batch, rng, config=config)[0]

  together = jax.grad(total)(params)
  alone = jax.grad(total)({"linear": params["linear"]})
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
    together["linear"],
    alone["linear"],
  )
  first = jax.tree.leaves(together)
  assert all(leaf.shape[0] == config.num_starts for leaf in first)


def test_recall_loss_counts_values_that_are_asked_for():
  config = harness.load_config(f"{_CONFIG}:smoke")
  batch = recall_batch(jax.random.key(0), 5, 4, config.vocab)
  tokens, targets, mask = batch

  class Oracle:
    """Right in the second half of the sequences, wrong in the first."""

    def apply(self, right, inputs):
      assert inputs.shape == (*tokens.shape, 2 * config.vocab)
      answer = jnp.where(mask, targets - config.vocab, 0)
      answer = answer.at[3:].add(1 - right) % config.vocab
      return 50.0 * jax.nn.one_hot(answer, config.vocab)

  for right, share in ((1, 1.0), (0, 0.6)):
    loss, metrics = experiment.recall_loss(
      right, batch, jax.random.key(0), model=Oracle(), config=config
    )
    np.testing.assert_allclose(metrics["accuracy"], share, rtol=1e-6)
    np.testing.assert_allclose(loss, 50 * (1 - share), atol=1e-4)


def test_full_size_traces():
  config = harness.load_config(f"{_CONFIG}:full")
  rng = jax.random.key(0)
  n = max(config.lengths)
  rates = functools.partial(
    experiment.rates,
    length=n,
    dim=config.dim,
    num_neurons=experiment.num_neurons(config, n),
    num_draws=config.num_draws,
  )
  assert jax.eval_shape(rates, rng, jnp.float32(0.7), 0.2).shape == (2,)

  length, kinds = max(config.regression_lengths), ("softmax", "linear", "elu")
  params = jax.eval_shape(
    lambda rng: experiment.regression_params(config, rng, kinds), rng
  )
  x = jax.ShapeDtypeStruct(
    (config.regression_batch, length, config.regression_dim), "float32"
  )
  y = jax.ShapeDtypeStruct((config.regression_batch,), "float32")
  loss = functools.partial(experiment.regression_loss, config=config)
  assert jax.eval_shape(loss, params, (x, y), rng)[0].shape == ()

  def shapes(rng):
    pairs = max(config.pairs)
    batch = recall_batch(rng, config.recall_batch, pairs, config.vocab)
    losses = []
    for kind in ("softmax", "linear (elu)"):
      model = experiment.recall_model(config, kind)
      inputs = experiment.recall_inputs(config, batch[0])
      losses.append(
        experiment.recall_loss(
          model.init(rng, inputs), batch, rng, model=model, config=config
        )[0]
      )
    return losses

  assert [x.shape for x in jax.eval_shape(shapes, rng)] == [(), ()]
