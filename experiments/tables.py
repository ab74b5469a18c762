"""Tables of the ledger in README.md and docs: generated, never typed.

``python -m experiments.tables`` rewrites what stands between the markers from
``results/ledger.json``; with ``--check`` it changes nothing, prints the
difference and ends with status 1 if there is one.
"""

import difflib
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from experiments.harness import config as config_lib
from experiments.harness import files, ledger, provenance

BEGIN = "<!-- ledger:begin -->"
END = "<!-- ledger:end -->"

# Numbers of a system in the README; the page of the ledger has all.
_MOST = 3

_HEADING = """# Ledger

One row a system. Every verdict was computed by `python -m
experiments.reproduce` from the run, against ranges fixed before it; a claim
that did not hold is listed as such.

"""


def pages(root: pathlib.Path) -> dict[pathlib.Path, str]:
  """Returns what each file with a table should hold.

  Args:
    root: the clone.

  Returns:
    Text by path.

  Raises:
    UsageError: if a file lacks the markers.
  """
  rows = ledger.read_ledger(root / "results" / "ledger.json")
  wanted = {
    path: replace_block(path, ledger.table(rows, most=most))
    for path, most in (
      (root / "README.md", _MOST),
      (root / "docs" / "ledger.md", None),
    )
  }
  wanted[root / "results" / "LEDGER.md"] = ledger_page(rows)
  return wanted


def ledger_page(rows: Sequence[ledger.Row]) -> str:
  """Returns the text of ``LEDGER.md``."""
  return _HEADING + ledger.table(rows, everything=True)


def replace_block(path: pathlib.Path, table: str) -> str:
  """Returns the text of ``path`` with ``table`` between the markers."""
  text = path.read_text(encoding="utf-8")
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not begin or not end:
    raise config_lib.UsageError(f"{path} must hold {BEGIN} and then {END}")
  return f"{before}{BEGIN}\n{table}{END}{after}"


def difference(wanted: dict[pathlib.Path, str]) -> str:
  """Returns a unified diff from the files to what they should hold."""
  lines: list[str] = []
  for path, text in wanted.items():
    there = path.read_text(encoding="utf-8") if path.exists() else ""
    lines += difflib.unified_diff(
      there.splitlines(keepends=True),
      text.splitlines(keepends=True),
      f"{path.name} (there)",
      f"{path.name} (from ledger.json)",
    )
  return "".join(lines)


def _main(argv: Sequence[str]) -> int:
  del argv
  wanted = pages(provenance.ROOT)
  stale = difference(wanted)
  if not flags.FLAGS.check:
    for path, text in wanted.items():
      files.write_text(path, text)
    return 0
  if stale:
    print(stale + "run python -m experiments.tables", file=sys.stderr)
  return 1 if stale else 0


if __name__ == "__main__":
  flags.DEFINE_bool("check", False, "Only say whether the tables are stale.")
  app.run(_main)
