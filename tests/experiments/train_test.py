"""The trainer: exact resume, guards, and what it leaves on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import harness
from tests.experiments import toy

TARGET = np.linspace(-1.0, 1.0, 4, dtype=np.float32)


def _loss(params, batch, rng):
  noise = 0.01 * jax.random.normal(rng, batch.shape[:1], jnp.float32)
  loss = jnp.mean((batch @ (params["w"] - TARGET) + noise) ** 2)
  return loss, {"norm": jnp.linalg.norm(params["w"])}


def _batches(step):
  return np.random.default_rng(step).standard_normal((8, 4), np.float32)


def _train(path, num_steps, loss_fn=_loss, batches=_batches, **kwargs):
  return harness.train_loop(
    jax.random.key(0),
    loss_fn,
    {"w": jnp.zeros(4, jnp.float32)},
    batches,
    optimizer=optax.chain(optax.clip(1.0), optax.adam(0.1)),
    num_steps=num_steps,
    workdir=harness.open_workdir(path, toy.config()),
    **{"log_every": 2, "checkpoint_every": 5, **kwargs},
  )


def test_interrupted_is_equal_to_unbroken(tmp_path):
  whole = _train(tmp_path / "whole", 20)
  _train(tmp_path / "parts", 10)
  # Steps 11 to 13 are logged but not saved, as a kill would leave them.
  path = tmp_path / "parts" / "metrics.jsonl"
  with path.open("a") as file:
    file.write('{"series": "train", "step": 12, "loss": 0.0}\n{"seri')
  parts = _train(tmp_path / "parts", 20)
  np.testing.assert_array_equal(whole["w"], parts["w"])
  expected = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
  assert path.read_bytes() == expected
  rows = harness.read_metrics(path)
  assert [r["step"] for r in rows] == list(range(2, 21, 2))
  assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]


def test_finished_training_only_restores(tmp_path):
  trained = _train(tmp_path, 5)

  def fail(step):
    raise AssertionError(f"batch {step} was asked for")

  again = _train(tmp_path, 5, batches=fail)
  np.testing.assert_array_equal(trained["w"], again["w"])


def test_trainings_of_one_run_are_kept_apart(tmp_path):
  wd = harness.open_workdir(tmp_path, toy.config())
  for name, rate in (("slow", 0.001), ("fast", 0.1)):
    harness.train_loop(
      jax.random.key(0),
      _loss,
      {"w": jnp.zeros(4, jnp.float32)},
      _batches,
      optimizer=optax.sgd(rate),
      num_steps=4,
      workdir=wd,
      name=name,
    )
  rows = harness.read_metrics(tmp_path / "metrics.jsonl")
  assert [(r["series"], r["step"]) for r in rows] == [("slow", 4), ("fast", 4)]
  assert rows[0]["norm"] < rows[1]["norm"]
  for name in ("slow", "fast"):
    assert (tmp_path / "checkpoints" / name / "4.json").exists()


def test_callers_parameters_survive_donation(tmp_path):
  params = {"w": jnp.ones(4, jnp.float32)}
  harness.train_loop(
    jax.random.key(0),
    _loss,
    params,
    _batches,
    optimizer=optax.sgd(0.1),
    num_steps=2,
    workdir=harness.open_workdir(tmp_path, toy.config()),
  )
  np.testing.assert_array_equal(params["w"], np.ones(4))


def _poisoned(params, batch, rng):
  loss, metrics = _loss(params, batch, rng)
  return loss * jnp.where(batch[0, 0] == 7.0, jnp.nan, 1.0), metrics


def _poisoned_batches(step):
  batch = _batches(step)
  batch[0, 0] = 7.0 if step == 6 else 0.0
  return batch


def test_nan_stops_and_spares_the_checkpoints(tmp_path):
  with pytest.raises(FloatingPointError, match="loss of step 6 is not finite"):
    _train(tmp_path, 20, _poisoned, _poisoned_batches)
  saved = sorted(p.name for p in (tmp_path / "checkpoints/train").iterdir())
  assert saved == ["5", "5.json"]
  assert harness.read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 6


def test_nan_goes_on_where_divergence_is_a_result(tmp_path):
  params = _train(tmp_path, 10, _poisoned, _poisoned_batches, nan_stop=False)
  assert np.isnan(params["w"]).all()
  assert harness.read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] == "nan"


def test_transfer_guard_finds_hidden_transfers(tmp_path):
  _train(tmp_path / "explicit", 2, transfer_guard="disallow")

  def hidden(step):
    return jnp.asarray(_batches(step)) + step

  with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
    _train(tmp_path / "hidden", 2, batches=hidden, transfer_guard="disallow")


def test_sharded_batches_train_on_a_mesh(tmp_path):
  mesh = harness.device_mesh("data")
  everywhere = jax.NamedSharding(mesh, jax.P())

  def batches(step):
    return jax.device_put(
      _batches(step), jax.NamedSharding(mesh, jax.P("data"))
    )

  params = harness.train_loop(
    jax.random.key(0),
    _loss,
    jax.device_put({"w": np.zeros(4, np.float32)}, everywhere),
    batches,
    optimizer=optax.chain(optax.clip(1.0), optax.adam(0.1)),
    num_steps=10,
    workdir=harness.open_workdir(tmp_path / "mesh", toy.config()),
  )
  assert params["w"].sharding.device_set == set(jax.devices())
  np.testing.assert_allclose(
    params["w"], _train(tmp_path / "one", 10)["w"], rtol=1e-5, atol=1e-6
  )


def test_optimizer_may_ask_for_the_value(tmp_path):
  wd = harness.open_workdir(tmp_path, toy.config())
  params = harness.train_loop(
    jax.random.key(0),
    _loss,
    {"w": jnp.zeros(4, jnp.float32)},
    _batches,
    optimizer=optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    num_steps=3,
    workdir=wd,
  )
  assert np.isfinite(params["w"]).all()
