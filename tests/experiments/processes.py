"""Starting, killing and reading toy experiments in processes of their own."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]


def start(
  name: str, workdir: pathlib.Path, *flags: str, tier: str = "cpu"
) -> subprocess.Popen[str]:
  """Starts a toy; its compile cache lies beside its workdir."""
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      f"tests.experiments.toys.{name}",
      f"--config=tests/experiments/toys/configs/{name}.py:{tier}",
      f"--workdir={workdir}",
      *flags,
    ],
    cwd=ROOT,
    env={**os.environ, "XDG_CACHE_HOME": str(workdir.parent / "cache")},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def run(
  name: str, workdir: pathlib.Path, *flags: str, tier: str = "cpu"
) -> tuple[int, str]:
  """Runs a toy to its end; returns its exit status and what it printed."""
  process = start(name, workdir, *flags, tier=tier)
  output, _ = process.communicate(timeout=120)
  return process.returncode, output


def kill_after(
  process: subprocess.Popen[str], pattern: str, workdir: pathlib.Path
) -> None:
  """Kills a toy at a random moment after a new file of ``pattern`` exists."""
  before = set(workdir.glob(pattern))
  deadline = time.monotonic() + 60
  while process.poll() is None and time.monotonic() < deadline:
    if set(workdir.glob(pattern)) - before:
      time.sleep(random.uniform(0.0, 0.4))
      break
    time.sleep(0.005)
  process.kill()
  process.communicate()


def summary(workdir: pathlib.Path) -> dict:
  """Reads ``summary.json``."""
  return json.loads((workdir / "summary.json").read_text())
