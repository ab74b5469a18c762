"""The ledger: one row a system, as data and as Markdown.

A row is the content of a ``summary.json``. The row of a run that crashed has
the verdict ``crashed`` and no measurements.
"""

import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.harness import files
from experiments.harness import verdict as verdict_lib

CRASHED = "crashed"
Row = dict[str, Any]

# What differs from one run to the next although nothing changed.
_NOISE = ("seconds", "timed", "commit")


def read_ledger(path: pathlib.Path) -> list[Row]:
  """Reads ``ledger.json``; no rows if there is no such file."""
  return files.read_json(path) if path.exists() else []


def merge(
  old: Sequence[Row], new: Iterable[Row], slugs: Iterable[str]
) -> list[Row]:
  """Puts new rows in the place of old ones.

  A new row that differs from the old one only in wall-clock times and commit
  leaves the old one, so that running everything again changes no file.

  Args:
    old: rows of the ledger so far.
    new: rows of the systems that ran.
    slugs: systems that there are; rows of others are dropped.

  Returns:
    One row a system that has one, in the order of the slugs.
  """
  rows = {row["slug"]: row for row in old}
  for row in new:
    row = files.as_json(row)
    if _without_noise(row) != _without_noise(rows.get(row["slug"], {})):
      rows[row["slug"]] = row
  return [rows[slug] for slug in sorted(set(slugs)) if slug in rows]


def crashed_row(slug: str, tier: str, before: Row | None) -> Row:
  """Returns the row of a run that crashed.

  Args:
    slug: the system.
    tier: the tier it ran at.
    before: its last row, for what the system claims; None if it has none.
  """
  said = {k: (before or {}).get(k, "") for k in ("claim", "source", "paper")}
  return {
    "slug": slug,
    "tier": tier,
    **said,
    "measured": {},
    "timed": {},
    "accepted": {},
    "verdict": CRASHED,
    "seconds": 0.0,
    "versions": {},
    "commit": "",
  }


def table(
  rows: Sequence[Row], *, everything: bool = False, most: int | None = None
) -> str:
  """Writes rows as a Markdown table.

  Args:
    rows: rows of the ledger.
    everything: also numbers that decide nothing, and how long it took.
    most: numbers shown of a row, those that miss their range first; None = all.

  Returns:
    The table, ending in a newline.
  """
  head = ["System", "Claim", "Paper", "Measured", "Verdict"]
  head += ["Takes"] if everything else []
  lines = [head, ["---"] * len(head)]
  for row in rows:
    claim = f"{row['claim']} ({row['source']})" if row["claim"] else ""
    shown = _measurements(row, everything, most)
    cells = [f"`{row['slug']}`", claim, row["paper"], shown, row["verdict"]]
    lines.append(cells + ([_duration(row["seconds"])] if everything else []))
  return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def describe_number(value: float | str) -> str:
  """Writes a number with four digits; JSON's ``"nan"`` stays as it is."""
  return value if isinstance(value, str) else f"{value:.4g}"


def inside(value: float | str, accepted: Sequence[float | None]) -> bool:
  """Says whether a number lies in its range; JSON's ``"nan"`` does not."""
  low, high = accepted
  return (
    not isinstance(value, str)
    and (low is None or low <= value)
    and (high is None or value <= high)
  )


def _without_noise(row: Row) -> Row:
  return {k: v for k, v in row.items() if k not in _NOISE}


def _measurements(row: Row, everything: bool, most: int | None) -> str:
  parts, missed = [], []
  for name, value in (row["measured"] | row["timed"]).items():
    accepted = row["accepted"].get(name)
    wanted = (
      f" (accepted: {verdict_lib.describe_range(accepted)})" if accepted else ""
    )
    if accepted or everything:
      parts.append(f"{name} {describe_number(value)}{wanted}")
      missed.append(bool(accepted) and not inside(value, accepted))
  if most is None or len(parts) <= most:
    return "<br>".join(parts)
  # Sorting keeps the order of those that are alike.
  order = sorted(range(len(parts)), key=lambda i: not missed[i])
  shown = [parts[i] for i in order[:most]]
  rest = [missed[i] for i in order[most:]]
  tail = f"and {len(rest)} more, {len(rest) - sum(rest)} of them in their range"
  return "<br>".join([*shown, tail])


def _duration(seconds: float) -> str:
  # Coarse, because it is committed and no two runs take equally long.
  minutes = math.ceil(seconds / 60)
  return "under 1 min" if minutes <= 1 else f"{minutes} min"


def _cell(text: str) -> str:
  return " ".join(text.replace("|", "\\|").split())
