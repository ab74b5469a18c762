"""Runs every experiment there is and writes the ledger.

``python -m experiments.reproduce [--only=slug,...] [--tier=cpu]
[--workdir=results]`` writes ``ledger.json``, ``LEDGER.md`` and ``index.html``;
tiers other than ``cpu`` write into ``results/<tier>``, and only tier ``full``
uses an accelerator (unless JAX_PLATFORMS says so). What is finished and still
stands is not run again. Ends with status 0 if every experiment reached
a verdict, whichever (that a claim fails is a result), 1 if one crashed, and 2
if the call was wrong.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import ml_collections
from absl import app, flags

from experiments import tables
from experiments.harness import app as app_lib
from experiments.harness import config as config_lib
from experiments.harness import files, ledger, page, provenance
from experiments.harness import workdir as workdir_lib

# What a system that never ran is taken to need, in seconds.
_UNKNOWN_SECONDS = {"smoke": 15.0, "cpu": 120.0, "full": 3600.0}
_MAX_JOBS = 4


class Experiment(NamedTuple):
  """One experiment binary and its configuration.

  Attributes:
    slug: the system.
    module: what ``python -m`` runs.
    config_file: path relative to the clone.
  """

  slug: str
  module: str
  config_file: str


def discover(
  package: str = "experiments", configs: str = "configs"
) -> list[Experiment]:
  """Finds the modules that have a configuration of the same name.

  Args:
    package: folder of the experiments, relative to the clone.
    configs: folder of their configurations.

  Returns:
    The experiments, sorted by slug.
  """
  names = {p.stem for p in (provenance.ROOT / package).glob("[!_]*.py")}
  twins = {p.stem for p in (provenance.ROOT / configs).glob("[!_]*.py")}
  return [
    Experiment(
      slug=name.replace("_", "-"),
      module=f"{package.replace('/', '.')}.{name}",
      config_file=f"{configs}/{name}.py",
    )
    for name in sorted(names & twins)
  ]


def select(
  experiments: Sequence[Experiment], only: Sequence[str]
) -> list[Experiment]:
  """Returns those named in ``only``, or all if it is empty.

  Raises:
    UsageError: naming the unknown slugs and the known ones.
  """
  known = [e.slug for e in experiments]
  unknown = sorted(set(only) - set(known))
  if unknown:
    raise config_lib.UsageError(
      f"--only names unknown systems {', '.join(unknown)}; there are: "
      + (", ".join(known) or "none")
    )
  return [e for e in experiments if not only or e.slug in only]


def reproduce(
  experiments: Sequence[Experiment],
  tier: str,
  workdir: pathlib.Path,
  only: Sequence[str] = (),
) -> int:
  """Runs experiments and writes the ledger.

  Args:
    experiments: all that there are.
    tier: ``smoke``, ``cpu`` or ``full``.
    workdir: folder of the ledger; each system gets a folder in it.
    only: slugs to run; empty for all.

  Returns:
    0 if all reached a verdict, 1 if one crashed.

  Raises:
    UsageError: if ``only`` names an unknown system, or ``workdir`` is no
      folder that can be written.
  """
  chosen = select(experiments, only)
  root = (workdir if tier == "cpu" else workdir / tier).resolve()
  workdir_lib.check_writable(root)
  old = ledger.read_ledger(root / "ledger.json")
  before = {row["slug"]: row for row in old}
  pending = [e for e in chosen if not _is_finished(e, tier, root)]
  _print_estimate(chosen, pending, before, tier)
  crashed = _run_all(pending, tier, root)
  new = [
    ledger.crashed_row(e.slug, tier, before.get(e.slug))
    if e.slug in crashed
    else files.read_json(root / e.slug / "summary.json")
    for e in chosen
  ]
  rows = ledger.merge(old, new, [e.slug for e in experiments])
  files.write_json(root / "ledger.json", rows)
  files.write_text(root / "LEDGER.md", tables.ledger_page(rows))
  files.write_text(root / "index.html", page.render(rows, root))
  print(f"wrote {root / 'index.html'} and LEDGER.md beside it")
  return 1 if crashed else 0


def _is_finished(experiment: Experiment, tier: str, root: pathlib.Path) -> bool:
  return workdir_lib.is_finished(
    root / experiment.slug, _load_config(experiment, tier)
  )


def _load_config(
  experiment: Experiment, tier: str
) -> ml_collections.ConfigDict:
  return config_lib.load_config(
    f"{provenance.ROOT / experiment.config_file}:{tier}"
  )


def _print_estimate(
  chosen: Sequence[Experiment],
  pending: Sequence[Experiment],
  before: dict[str, ledger.Row],
  tier: str,
) -> None:
  seconds = sum(
    before.get(e.slug, {}).get("seconds") or _UNKNOWN_SECONDS[tier]
    for e in pending
  )
  print(
    f"{len(chosen)} experiments at tier {tier}: {len(chosen) - len(pending)} "
    f"up to date, {len(pending)} to run, about {seconds / 60:.1f} minutes",
    flush=True,
  )


def _run_all(
  pending: Sequence[Experiment], tier: str, root: pathlib.Path
) -> set[str]:
  """Runs experiments and returns the slugs of those that crashed."""
  timed = [e for e in pending if _load_config(e, tier).get("timed", False)]
  untimed = [e for e in pending if e not in timed]
  # At tier full each experiment wants the accelerator to itself.
  jobs = 1 if tier == "full" else min(os.cpu_count() or 1, _MAX_JOBS)
  run = functools.partial(_run_one, tier=tier, root=root)
  crashed = _run_parallel(functools.partial(run, alone=False), untimed, jobs)
  return crashed | _run_parallel(functools.partial(run, alone=True), timed, 1)


def _run_parallel(
  run: Callable[[Experiment], bool],
  experiments: Sequence[Experiment],
  jobs: int,
) -> set[str]:
  pool = concurrent.futures.ThreadPoolExecutor(jobs)
  try:
    done = list(pool.map(run, experiments))
  finally:
    # After Ctrl-C nothing more is started.
    pool.shutdown(cancel_futures=True)
  return {e.slug for e, ok in zip(experiments, done) if not ok}


def _run_one(
  experiment: Experiment, *, tier: str, root: pathlib.Path, alone: bool
) -> bool:
  """Runs one experiment in a process; says whether it reached a verdict."""
  folder = root / experiment.slug
  config = _load_config(experiment, tier)
  if not workdir_lib.holds_config(folder, config):
    workdir_lib.set_aside(folder)
  log = root / "logs" / f"{experiment.slug}.log"
  log.parent.mkdir(parents=True, exist_ok=True)
  config_file = provenance.ROOT / experiment.config_file
  command = [sys.executable, "-m", experiment.module]
  command += [f"--config={config_file}:{tier}", f"--workdir={folder}"]
  with _machine_lock(alone), log.open("w") as output:
    status = subprocess.run(
      command,
      cwd=provenance.ROOT,
      env=_environment(tier),
      stdout=output,
      stderr=subprocess.STDOUT,
    ).returncode
  ok = status in app_lib.EXIT_STATUS.values()
  outcome = (
    files.read_json(folder / "summary.json")["verdict"]
    if ok
    else f"crashed with status {status}, see {log}"
  )
  print(f"  {experiment.slug}: {outcome}", flush=True)
  return ok


def _environment(tier: str) -> dict[str, str]:
  # The smaller tiers are about CPUs, and would share an accelerator's memory.
  default = {} if tier == "full" else {"JAX_PLATFORMS": "cpu"}
  return {**default, **os.environ}


@contextlib.contextmanager
def _machine_lock(alone: bool) -> Iterator[None]:
  # Shared by those that are not timed, over all checkouts of this user:
  # nothing runs beside a timed experiment.
  path = app_lib.default_cache_dir().parent / "timed.lock"
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    yield


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    print(f"reproduce: {error}", file=sys.stderr)
    sys.exit(app_lib.BAD_USAGE)


def _main(argv: Sequence[str]) -> int:
  del argv
  try:
    return reproduce(
      discover(),
      flags.FLAGS.tier,
      pathlib.Path(flags.FLAGS.workdir),
      flags.FLAGS.only,
    )
  except config_lib.UsageError as error:
    print(f"reproduce: {error}", file=sys.stderr)
    return app_lib.BAD_USAGE


if __name__ == "__main__":
  flags.DEFINE_list("only", [], "Slugs of the systems to run, if not all.")
  flags.DEFINE_enum("tier", "cpu", config_lib.TIERS, "Size of the runs.")
  flags.DEFINE_string("workdir", "results", "Folder of the ledger.")
  app.run(_main, flags_parser=_parse_flags)
