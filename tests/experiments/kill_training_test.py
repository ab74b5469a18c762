"""A training killed at random moments ends with the same parameters."""

from tests.experiments import processes


def test_killed_training_measures_the_same(tmp_path):
  unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
  flags = ("--config.pause=0.01",)
  reference = processes.start("descent", unbroken, *flags)
  for _ in range(3):
    process = processes.start("descent", broken, *flags)
    processes.kill_after(process, "checkpoints/train/*.json", broken)

  status, output = processes.run("descent", broken, *flags)
  reference_output, _ = reference.communicate(timeout=120)

  assert reference.returncode == 0, reference_output
  assert status == 0, output
  assert "going on after step" in output
  got, expected = processes.summary(broken), processes.summary(unbroken)
  assert got["measured"] == expected["measured"]
  metrics = (unbroken / "metrics.jsonl").read_bytes()
  assert (broken / "metrics.jsonl").read_bytes() == metrics
