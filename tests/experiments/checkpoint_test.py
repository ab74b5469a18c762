"""Training states come back as they were, past damaged steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import harness

P = jax.P


def _state(scale, spec=None, num_devices=1):
  mesh = jax.make_mesh(
    (num_devices,),
    ("data",),
    (jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:num_devices],
  )
  params = {"w": scale * np.arange(16, dtype=np.float32).reshape(8, 2)}
  params = jax.device_put(params, jax.NamedSharding(mesh, spec or P()))
  return harness.TrainState(
    step=jnp.int32(3),
    params=params,
    opt_state=optax.adam(0.1).init(params),
    rng=jax.random.key(7),
    bad_step=jnp.int32(-1),
  )


def _assert_same(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    assert a.dtype == b.dtype
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


def test_round_trip_keeps_keys_and_named_tuples(tmp_path):
  saver = harness.Checkpointer(tmp_path / "state")
  assert saver.restore(_state(0.0)) is None
  saver.save(3, _state(1.5))
  step, state = harness.Checkpointer(tmp_path / "state").restore(_state(0.0))
  assert step == 3
  _assert_same(state, _state(1.5))
  assert isinstance(state.opt_state[0], optax.ScaleByAdamState)


def test_keeps_three_steps(tmp_path):
  saver = harness.Checkpointer(tmp_path)
  for step in (1, 2, 3, 10, 11):
    saver.save(step, _state(step))
  kept = sorted(p.name for p in tmp_path.iterdir())
  assert kept == ["10", "10.json", "11", "11.json", "3", "3.json"]


@pytest.mark.parametrize("harm", ["truncate", "remove", "flip", "unfinished"])
def test_damaged_step_gives_way_to_the_one_before(tmp_path, caplog, harm):
  saver = harness.Checkpointer(tmp_path)
  saver.save(1, _state(1.0))
  saver.save(2, _state(2.0))
  written = [p for p in (tmp_path / "2").rglob("*") if p.is_file()]
  victim = max(written, key=lambda p: p.stat().st_size)
  payload = bytearray(victim.read_bytes())
  if harm == "truncate":
    victim.write_bytes(payload[: len(payload) // 2])
  elif harm == "flip":
    payload[-1] ^= 1
    victim.write_bytes(payload)
  elif harm == "remove":
    victim.unlink()
  else:
    (tmp_path / "2.json").unlink()
  step, state = harness.Checkpointer(tmp_path).restore(_state(0.0))
  assert step == 1
  _assert_same(state, _state(1.0))
  named = f"checkpoint {tmp_path / '2'} is damaged" in caplog.text
  assert named == (harm != "unfinished")
  # The step can be reached and saved again.
  saver.save(2, _state(5.0))
  _assert_same(saver.restore(_state(0.0))[1], _state(5.0))


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1), (8, 4)])
def test_restores_on_another_number_of_devices(tmp_path, before, after):
  saver = harness.Checkpointer(tmp_path)
  saver.save(1, _state(1.0, P("data"), before))
  wanted = _state(0.0, P("data"), after)
  _, state = saver.restore(wanted)
  _assert_same(state, _state(1.0))
  for got, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted)):
    assert got.sharding == like.sharding


def test_another_structure_is_an_error_and_not_damage(tmp_path):
  saver = harness.Checkpointer(tmp_path)
  saver.save(1, {"w": jnp.zeros(3)})
  with pytest.raises(ValueError, match="structure"):
    saver.restore({"w": jnp.zeros(3), "b": jnp.zeros(1)})
  assert (tmp_path / "1").exists()
