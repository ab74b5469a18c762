"""A timed experiment: the clock does not run backwards."""

import os
import time

import ml_collections

from experiments import harness


def run(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> harness.Verdict:
  wd = harness.open_workdir(workdir, config)
  start = time.monotonic()
  return harness.finish(
    wd,
    claim="The clock does not run backwards.",
    source="experience",
    paper="0",
    checks=[],
    timed=[harness.Check("seconds", time.monotonic() - start, low=0.0)],
  )


if __name__ == "__main__":
  harness.main(run, "stopwatch")
