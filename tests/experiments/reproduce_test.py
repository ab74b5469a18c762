"""Running everything: crashes, resume, the lock, the page and the tables."""

import fcntl
import re
import threading

import pytest

from experiments import reproduce, tables
from experiments.harness import config as config_lib
from experiments.harness import files, ledger, page
from tests.experiments import processes

TOYS = reproduce.discover(
  "tests/experiments/toys", "tests/experiments/toys/configs"
)
RUN = ("crash", "power-sum", "stopwatch")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  root = tmp_path_factory.mktemp("results")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    status = reproduce.reproduce(TOYS, "cpu", root, RUN)
  return root, status


def test_discovers_modules_with_a_configuration():
  assert [e.slug for e in TOYS] == [
    "crash",
    "descent",
    "power-sum",
    "stopwatch",
  ]
  assert TOYS[2].module == "tests.experiments.toys.power_sum"
  own = reproduce.discover()
  assert not {"reproduce", "tables"} & {e.slug for e in own}


def test_refuses_unknown_systems_with_those_there_are():
  with pytest.raises(
    config_lib.UsageError,
    match="unknown systems nix; there are: crash, descent, power-sum",
  ):
    reproduce.select(TOYS, ["nix", "crash"])


def test_refuses_a_workdir_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("not a folder")
  with pytest.raises(config_lib.UsageError, match="must be a folder"):
    reproduce.reproduce(TOYS, "cpu", tmp_path / "file")


def test_survives_a_crash(results):
  root, status = results
  assert status == 1
  rows = {r["slug"]: r for r in files.read_json(root / "ledger.json")}
  assert list(rows) == list(RUN)
  assert rows["crash"]["verdict"] == "crashed"
  assert rows["power-sum"]["verdict"] == "reproduced"
  assert rows["stopwatch"]["verdict"] == "reproduced"
  assert rows["power-sum"] == files.read_json(root / "power-sum/summary.json")
  log = (root / "logs" / "crash.log").read_text()
  assert "RuntimeError: this toy always <crashes>" in log


def test_ledger_names_no_machine_path(results):
  root, _ = results
  for name in ("ledger.json", "LEDGER.md"):
    text = (root / name).read_text()
    assert str(root) not in text
    assert str(processes.ROOT) not in text


def test_page_is_self_contained(results):
  root, _ = results
  text = (root / "index.html").read_text()
  assert not re.search(r'(?:src|href)="(?!data:|#)', text)
  assert "http" not in text
  assert text.count("data:image/png;base64,") == 1
  assert "RuntimeError: this toy always &lt;crashes&gt;" in text
  assert "The sum of the first n squares grows like n³." in text
  for row in files.read_json(root / "ledger.json"):
    assert f'<tr id="{row["slug"]}">' in text
  for name in ("counts", "rows", "versions"):
    assert f"<!-- {name} -->" not in text


def test_second_call_reruns_only_what_crashed(results, capfd, monkeypatch):
  root, _ = results
  monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
  before = {
    name: (root / name).read_bytes() for name in ("ledger.json", "LEDGER.md")
  }
  summary = root / "power-sum" / "summary.json"
  stamp = summary.stat().st_mtime_ns
  status = reproduce.reproduce(TOYS, "cpu", root, RUN)
  assert status == 1
  assert summary.stat().st_mtime_ns == stamp
  assert "2 up to date, 1 to run" in capfd.readouterr().out
  for name, payload in before.items():
    assert (root / name).read_bytes() == payload


def test_mismatch_is_pending(results):
  root, _ = results
  toy = TOYS[2]
  assert reproduce._is_finished(toy, "cpu", root)
  assert not reproduce._is_finished(toy, "full", root)
  env = files.read_json(root / "power-sum" / "env.json")
  sources = {**env["sources"], "experiments/__init__.py": "another"}
  files.write_json(root / "power-sum" / "env.json", {**env, "sources": sources})
  assert not reproduce._is_finished(toy, "cpu", root)
  files.write_json(root / "power-sum" / "env.json", env)
  assert reproduce._is_finished(toy, "cpu", root)


def test_untimed_experiments_run_side_by_side():
  meeting = threading.Barrier(2, timeout=30)

  def run(experiment):
    meeting.wait()
    return experiment.slug != "crash"

  assert reproduce._run_parallel(run, TOYS[:2], jobs=2) == {"crash"}


def test_timed_experiment_holds_the_machine(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

  def is_free(kind):
    with (tmp_path / "jaxattn" / "timed.lock").open("w") as file:
      try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
      except BlockingIOError:
        return False
      return True

  with reproduce._machine_lock(alone=False):
    assert is_free(fcntl.LOCK_SH)
    assert not is_free(fcntl.LOCK_EX)
  with reproduce._machine_lock(alone=True):
    assert not is_free(fcntl.LOCK_SH)
  assert is_free(fcntl.LOCK_EX)


def test_nothing_is_started_after_an_interrupt():
  started = []

  def run(experiment):
    started.append(experiment.slug)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    reproduce._run_parallel(run, TOYS, jobs=1)
  assert len(started) < len(TOYS)


def _row(**changes):
  return {
    "slug": "a-system",
    "tier": "cpu",
    "claim": "Grows | slowly.",
    "source": "arXiv:0000.00000, Thm 1",
    "paper": "1/2",
    "measured": {"slope": 0.51234, "misfit": "nan"},
    "timed": {"speed-up": 3.21987},
    "accepted": {"slope": [0.4, 0.6], "speed-up": [3.0, None]},
    "verdict": "reproduced",
    "seconds": 61.0,
    "versions": {"jax": "0.10.2"},
    "commit": "abc",
    **changes,
  }


def test_merge_ignores_what_never_repeats():
  old = [_row()]
  noise = _row(seconds=99.0, timed={"speed-up": 3.3}, commit="def")
  assert ledger.merge(old, [noise], ["a-system"]) == old
  changed = _row(measured={"slope": 0.6})
  assert ledger.merge(old, [changed], ["a-system"]) == [changed]
  assert ledger.merge(old, [], []) == []
  other = _row(slug="b-system")
  assert ledger.merge(old, [other], ["b-system", "a-system"]) == [*old, other]


def test_table():
  short = ledger.table([_row()])
  assert short == (
    "| System | Claim | Paper | Measured | Verdict |\n"
    "| --- | --- | --- | --- | --- |\n"
    "| `a-system` | Grows \\| slowly. (arXiv:0000.00000, Thm 1) | 1/2 | "
    "slope 0.5123 (accepted: 0.4 to 0.6)<br>"
    "speed-up 3.22 (accepted: at least 3) | reproduced |\n"
  )
  brief = ledger.table([_row(measured={"slope": 0.7, "size": 1.0})], most=1)
  assert "| slope 0.7 (accepted: 0.4 to 0.6)<br>and 1 more, 1 of" in brief
  full = ledger.table([_row()], everything=True)
  assert "misfit nan" in full
  assert full.endswith("| reproduced | 2 min |\n")


def test_page_shows_each_number_against_its_range(tmp_path):
  row = _row(measured={"slope": -0.7, "misfit": "nan"}, verdict="inconclusive")
  text = page.render([row], tmp_path)
  assert "−0.7" in text
  assert '<span class="out">✗ accepted would be 0.4 to 0.6</span>' in text
  assert '<span class="in">✓ accepted at least 3</span>' in text
  assert '<span class="chip open">' in text
  assert "no figure" in text


@pytest.fixture
def clone(tmp_path):
  for name in ("README.md", "docs/ledger.md"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
  files.write_json(tmp_path / "results" / "ledger.json", [_row()])
  return tmp_path


def test_tables_are_rewritten_and_checked(clone):
  wanted = tables.pages(clone)
  stale = tables.difference(wanted)
  assert "-old" in stale
  assert "+| `a-system` |" in stale
  for path, text in wanted.items():
    files.write_text(path, text)
  assert tables.difference(tables.pages(clone)) == ""
  readme = (clone / "README.md").read_text()
  assert readme.startswith(f"before\n{tables.BEGIN}\n| System |")
  assert readme.endswith(f"| reproduced |\n{tables.END}\nafter\n")
  assert "2 min" in (clone / "results" / "LEDGER.md").read_text()


def test_tables_need_their_markers(clone):
  (clone / "README.md").write_text("no markers")
  with pytest.raises(config_lib.UsageError, match="must hold <!-- ledger"):
    tables.pages(clone)
