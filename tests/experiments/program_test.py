"""Experiments as programs: exit statuses, the cache, two processes."""

import json
import shutil
import socket

from tests.experiments import processes


def test_verdicts_are_exit_statuses(tmp_path):
  shared = ("--config.lengths=(256,512,1024)",)
  failing = processes.start(
    "power_sum", tmp_path / "a", *shared, "--config.accepted.slope=(4.0,5.0)"
  )
  smoke = processes.start("power_sum", tmp_path / "b", *shared, tier="smoke")
  output, _ = failing.communicate(timeout=120)
  assert failing.returncode == 3, output
  assert "verdict   not reproduced" in output
  assert "(accepted 4 to 5)" in output
  output, _ = smoke.communicate(timeout=120)
  assert smoke.returncode == 4, output
  assert processes.summary(tmp_path / "b")["verdict"] == "inconclusive"

  # The same workdir with another config is refused and left as it was.
  status, output = processes.run("power_sum", tmp_path / "b", *shared)
  assert status == 2, output
  assert "tier: 'smoke' there, 'cpu' here" in output
  assert processes.summary(tmp_path / "b")["tier"] == "smoke"


def test_damaged_compile_cache_only_warns(tmp_path):
  cache = tmp_path / "programs"
  flag = f"--compile_cache={cache}"
  status, output = processes.run("power_sum", tmp_path / "a", flag)
  assert status == 0, output
  entries = list(cache.glob("*-cache"))
  assert entries
  for entry in entries:
    entry.write_bytes(entry.read_bytes()[:20])
  shutil.rmtree(tmp_path / "a" / "points")
  before = processes.summary(tmp_path / "a")["measured"]
  status, output = processes.run("power_sum", tmp_path / "a", flag)
  assert status == 0, output
  assert "Error reading persistent compilation cache entry" in output
  assert processes.summary(tmp_path / "a")["measured"] == before


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def test_two_processes_train_as_one(tmp_path):
  flags = (
    "--config.num_steps=20",
    "--distributed",
    f"--coordinator_address=127.0.0.1:{_free_port()}",
    "--num_processes=2",
  )
  workdir = tmp_path / "two"
  pair = [
    processes.start("descent", workdir, *flags, f"--process_id={i}")
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=120)[0] for process in pair]
  assert [p.returncode for p in pair] == [3, 3], "".join(outputs)
  assert "verdict   not reproduced" in outputs[0]
  assert "verdict" not in outputs[1]
  env = json.loads((workdir / "env.json").read_text())
  assert (env["num_processes"], env["num_devices"]) == (2, 2)

  # One process alone goes on where the two stopped.
  status, output = processes.run(
    "descent", workdir, "--config.num_steps=20", "--profile"
  )
  assert status == 3, output
  assert "going on after step 20" in output
  assert list((workdir / "profile").rglob("*.xplane.pb"))
