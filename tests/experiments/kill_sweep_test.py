"""A sweep killed at random moments ends with the numbers of an unbroken one."""

import random

from tests.experiments import processes


def test_killed_sweep_measures_the_same(tmp_path):
  unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
  flags = ("--config.pause=0.15",)
  reference = processes.start("power_sum", unbroken, *flags)
  for _ in range(3):
    process = processes.start("power_sum", broken, *flags)
    processes.kill_after(process, "points/*/*.npz", broken)
  # What a kill in the middle of a write leaves, and a disk that ran full.
  stored = sorted((broken / "points" / "sum").glob("*.npz"))
  (stored[0].parent / f".{stored[0].name}.1.tmp").write_bytes(b"half")
  damaged = random.choice(stored)
  damaged.write_bytes(damaged.read_bytes()[:100])

  status, output = processes.run("power_sum", broken, *flags)
  reference_output, _ = reference.communicate(timeout=120)

  assert reference.returncode == 0, reference_output
  assert status == 0, output
  assert f"point {damaged} is damaged" in output
  got, expected = processes.summary(broken), processes.summary(unbroken)
  assert got["measured"] == expected["measured"]
  assert got["verdict"] == expected["verdict"] == "reproduced"
  for name in ("metrics.jsonl", "figure_data.npz", "config.json"):
    assert (broken / name).read_bytes() == (unbroken / name).read_bytes()
