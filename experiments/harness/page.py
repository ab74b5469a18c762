"""The ledger as one self-contained HTML page."""

import base64
import html
import pathlib
from collections.abc import Iterator, Sequence

from experiments.harness import ledger
from experiments.harness import verdict as verdict_lib

_TEMPLATE = pathlib.Path(__file__).with_name("page.html")
_LOG_LINES = 30

# Class name and sign of each verdict; the order is that of the counts.
_VERDICTS = {
  verdict_lib.REPRODUCED: ("good", "✓"),
  verdict_lib.NOT_REPRODUCED: ("bad", "✗"),
  verdict_lib.INCONCLUSIVE: ("open", "?"),
  ledger.CRASHED: ("crashed", "!"),
}


def render(rows: Sequence[ledger.Row], root: pathlib.Path) -> str:
  """Writes the page.

  Args:
    rows: rows of the ledger.
    root: folder with ``<slug>/figure.png``, embedded where there is one, and
      ``logs/<slug>.log``, whose end is shown of a run that crashed.

  Returns:
    HTML that refers to nothing outside itself.
  """
  parts = {
    "counts": "".join(_counts(rows)),
    "rows": "\n".join(_row(row, root) for row in rows),
    "versions": html.escape(_versions(rows)),
  }
  page = _TEMPLATE.read_text(encoding="utf-8")
  for name, part in parts.items():
    page = page.replace(f"<!-- {name} -->", part)
  return page


def _counts(rows: Sequence[ledger.Row]) -> Iterator[str]:
  for verdict in _VERDICTS:
    number = sum(row["verdict"] == verdict for row in rows)
    if number:
      yield f"<li><b>{number}</b> {_chip(verdict)}</li>"


def _versions(rows: Sequence[ledger.Row]) -> str:
  found = {(k, v) for row in rows for k, v in row["versions"].items()}
  return ", ".join(f"{name} {version}" for name, version in sorted(found))


def _row(row: ledger.Row, root: pathlib.Path) -> str:
  slug = html.escape(row["slug"])
  order = list(_VERDICTS).index(row["verdict"])
  chip = _chip(row["verdict"])
  seconds = f"{row['seconds']:.0f} s" if row["seconds"] else "–"
  return f"""<tr id="{slug}">
<td class="figure">{_figure(row, root)}</td>
<th scope="row"><a href="#{slug}">{slug}</a>{_claim(row)}</th>
<td data-label="Paper">{html.escape(row["paper"])}</td>
<td data-label="Measured">{_measured(row, root)}</td>
<td class="verdict" data-label="Verdict" data-sort="{order}">{chip}</td>
<td data-label="Time" data-sort="{row["seconds"]}" class="time">{seconds}</td>
</tr>"""


def _claim(row: ledger.Row) -> str:
  claim, source = html.escape(row["claim"]), html.escape(row["source"])
  return f"{claim}<small>{source}</small>"


def _chip(verdict: str) -> str:
  name, sign = _VERDICTS[verdict]
  icon = f'<span aria-hidden="true">{sign}</span>'
  return f'<span class="chip {name}">{icon} {verdict}</span>'


def _figure(row: ledger.Row, root: pathlib.Path) -> str:
  file = root / row["slug"] / "figure.png"
  if row["verdict"] == ledger.CRASHED or not file.exists():
    return '<span class="none">no figure</span>'
  data = base64.b64encode(file.read_bytes()).decode()
  slug = html.escape(row["slug"])
  return (
    f'<button type="button" aria-label="Enlarge the figure of {slug}">'
    f'<img alt="Figure of {slug}: {html.escape(row["claim"])}" '
    f'src="data:image/png;base64,{data}"></button>'
  )


def _measured(row: ledger.Row, root: pathlib.Path) -> str:
  if row["verdict"] == ledger.CRASHED:
    return _log(root / "logs" / f"{row['slug']}.log")
  values, accepted = row["measured"] | row["timed"], row["accepted"]
  decided, other = (
    "".join(
      _number(name, value, row)
      for name, value in values.items()
      if (name in accepted) is decides
    )
    for decides in (True, False)
  )
  if not other:
    return f"<dl>{decided}</dl>"
  return (
    f"<dl>{decided}</dl><details><summary>also measured</summary>"
    f"<dl>{other}</dl></details>"
  )


def _number(name: str, value: float | str, row: ledger.Row) -> str:
  accepted = row["accepted"].get(name)
  wanted = ""
  if accepted:
    inside = ledger.inside(value, accepted)
    mark, word = ("✓", "accepted") if inside else ("✗", "accepted would be")
    title = f"{word} {_minus(verdict_lib.describe_range(accepted))}"
    wanted = f'<span class="{"in" if inside else "out"}">{mark} {title}</span>'
  number = html.escape(_minus(ledger.describe_number(value)))
  return f"<div><dt>{html.escape(name)}</dt><dd>{number} {wanted}</dd></div>"


def _minus(text: str) -> str:
  return text.replace("-", "\N{MINUS SIGN}")


def _log(file: pathlib.Path) -> str:
  if not file.exists():
    return ""
  lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
  tail = html.escape("\n".join(lines[-_LOG_LINES:]))
  return (
    "<details><summary>last lines of its log</summary>"
    f"<pre>{tail}</pre></details>"
  )
