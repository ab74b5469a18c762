"""A workdir belongs to one run and keeps what it has."""

import numpy as np
import pytest
from jax import numpy as jnp

from experiments import harness
from experiments.harness import files
from experiments.harness import workdir as workdir_lib
from tests.experiments import toy


def _fail():
  raise AssertionError("computed although it was stored")


def test_writes_config_and_environment(tmp_path):
  config = toy.config(lengths=(1, 2), accepted={"slope": (0.1, 0.2)})
  harness.open_workdir(tmp_path / "a" / "b", config)
  assert files.read_json(tmp_path / "a" / "b" / "config.json") == {
    "slug": "toy",
    "tier": "cpu",
    "lengths": [1, 2],
    "accepted": {"slope": [0.1, 0.2]},
  }
  env = files.read_json(tmp_path / "a" / "b" / "env.json")
  assert env["versions"]["jax"]
  assert "experiments/harness/workdir.py" in env["sources"]
  assert not any(".venv" in path for path in env["sources"])


def test_refuses_another_config(tmp_path):
  wd = harness.open_workdir(tmp_path, toy.config(seed=0))
  wd.point("a", lambda: {"x": 1.0})
  with pytest.raises(ValueError, match="'toy' there, 'other' here"):
    harness.open_workdir(tmp_path, toy.config(seed=0, slug="other"))
  with pytest.raises(harness.UsageError, match="seed: 0 there, 1 here"):
    harness.open_workdir(tmp_path, toy.config(seed=1))
  wd = harness.open_workdir(tmp_path, toy.config(seed=0))
  assert wd.point("a", _fail) == {"x": 1.0}


def test_refuses_a_path_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("not a folder")
  for path in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(
      harness.UsageError, match=f"folder that can be written, got {path}"
    ):
      harness.open_workdir(path, toy.config())
  assert (tmp_path / "file").read_text() == "not a folder"


def test_refuses_numbers_that_are_not_finite(tmp_path):
  with pytest.raises(harness.UsageError, match="rate must be finite"):
    harness.open_workdir(tmp_path / "w", toy.config(rate=float("nan")))
  assert not (tmp_path / "w").exists()


def test_point_round_trips_exactly(tmp_path):
  values = {
    "float": np.float32(0.1),
    "int": 3,
    "flag": True,
    "name": "σ",
    "array": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 7,
    "complex": np.array([1j, 2.0]),
  }
  wd = harness.open_workdir(tmp_path, toy.config())
  fresh = wd.point("layer=1/all", lambda: values)
  wd = harness.open_workdir(tmp_path, toy.config())
  stored = wd.point("layer=1/all", _fail)
  assert (tmp_path / "points" / "layer=1" / "all.npz").exists()
  for name, value in values.items():
    assert type(fresh[name]) is type(stored[name])
    np.testing.assert_array_equal(fresh[name], value)
    np.testing.assert_array_equal(stored[name], value)
  assert fresh["array"].dtype == np.float32
  assert isinstance(fresh["float"], float)


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_damaged_point_is_computed_again(tmp_path, caplog, keep):
  wd = harness.open_workdir(tmp_path, toy.config())
  wd.point("a", lambda: {"x": np.arange(9.0)})
  path = tmp_path / "points" / "a.npz"
  path.write_bytes(path.read_bytes()[:keep])
  wd = harness.open_workdir(tmp_path, toy.config())
  assert wd.point("a", lambda: {"x": 2.0}) == {"x": 2.0}
  assert f"point {path} is damaged" in caplog.text
  wd = harness.open_workdir(tmp_path, toy.config())
  assert wd.point("a", _fail) == {"x": 2.0}


def test_flipped_byte_is_noticed(tmp_path):
  wd = harness.open_workdir(tmp_path, toy.config())
  wd.point("a", lambda: {"x": np.arange(9.0)})
  path = tmp_path / "points" / "a.npz"
  payload = bytearray(path.read_bytes())
  payload[len(payload) // 2] ^= 1
  path.write_bytes(payload)
  wd = harness.open_workdir(tmp_path, toy.config())
  assert wd.point("a", lambda: {"x": 2.0}) == {"x": 2.0}


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../b", "a//b", "a b"])
def test_point_refuses_malformed_names(tmp_path, name):
  wd = harness.open_workdir(tmp_path, toy.config())
  with pytest.raises(ValueError, match="malformed point name"):
    wd.point(name, _fail)


def test_point_refuses_a_name_used_twice(tmp_path):
  wd = harness.open_workdir(tmp_path, toy.config())
  wd.point("a", lambda: {"x": 1.0})
  with pytest.raises(ValueError, match="'a' was asked for before"):
    wd.point("a", lambda: {"x": 2.0})


def test_point_refuses_objects(tmp_path):
  wd = harness.open_workdir(tmp_path, toy.config())
  with pytest.raises(ValueError, match="dtype object for 'x'"):
    wd.point("a", lambda: {"x": None})
  assert not (tmp_path / "points").exists()


def test_changed_sources_set_the_old_run_aside(tmp_path, caplog):
  path = tmp_path / "run"
  wd = harness.open_workdir(path, toy.config())
  wd.point("a", lambda: {"x": 1.0})
  env = files.read_json(path / "env.json")
  env["sources"]["experiments/__init__.py"] = "another hash"
  files.write_json(path / "env.json", env)
  wd = harness.open_workdir(path, toy.config())
  assert wd.point("a", lambda: {"x": 2.0}) == {"x": 2.0}
  assert (tmp_path / "run.stale-1" / "points" / "a.npz").exists()
  assert "changes in experiments/__init__.py" in caplog.text


def test_finished_until_something_changes(tmp_path):
  config = toy.config(seed=0)
  assert not workdir_lib.is_finished(tmp_path, config)
  wd = harness.open_workdir(tmp_path, config)
  assert not workdir_lib.is_finished(tmp_path, config)
  harness.finish(wd, claim="", source="", paper="", checks=[])
  assert workdir_lib.is_finished(tmp_path, config)
  assert not workdir_lib.is_finished(tmp_path, toy.config(seed=1))
  env = files.read_json(tmp_path / "env.json")
  env["versions"]["jax"] = "0.0.1"
  files.write_json(tmp_path / "env.json", env)
  assert not workdir_lib.is_finished(tmp_path, config)


def test_seconds_add_up_over_attempts(tmp_path):
  harness.open_workdir(tmp_path, toy.config())
  files.write_json(tmp_path / "seconds.json", 100.0)
  wd = harness.open_workdir(tmp_path, toy.config())
  assert 100.0 <= wd.save_seconds() < 200.0
