"""Sphinx directive that writes one system's row of the ledger into its page.

``{ledger} attention-sparsity`` becomes claim, paper, measurements and verdict,
read from ``results/ledger.json``. No number on a page is typed by hand.
"""

import pathlib

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from experiments.harness import ledger, verdict

_LEDGER = pathlib.Path(__file__).parents[2] / "results" / "ledger.json"


class LedgerDirective(SphinxDirective):
  """The row of the system that the argument names."""

  required_arguments = 1

  def run(self) -> list[nodes.Node]:
    """Returns the row as nodes; an unknown system fails the build."""
    self.env.note_dependency(str(_LEDGER))
    slug = self.arguments[0]
    rows = {row["slug"]: row for row in ledger.read_ledger(_LEDGER)}
    if slug not in rows:
      raise self.error(
        f"results/ledger.json has no row {slug!r}: run "
        f"make reproduce ONLY={slug}"
      )
    return self.parse_text_to_nodes(summary(rows[slug]))


def summary(row: ledger.Row) -> str:
  """Returns one row of the ledger as Markdown."""
  lines = [
    f"**Verdict: {row['verdict']}** (tier `{row['tier']}`, "
    f"{row['seconds']:.0f} s on jax {row['versions'].get('jax', '?')})",
    "",
    f"* Claim: {row['claim']} ({row['source']})",
    f"* The paper: {row['paper']}",
    "",
    "| Measured | Value | Accepted |",
    "| --- | --- | --- |",
  ]
  for name, value in (row["measured"] | row["timed"]).items():
    bounds = row["accepted"].get(name)
    wanted = verdict.describe_range(bounds) if bounds else "reported only"
    cells = [name, ledger.describe_number(value), wanted]
    lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
  return "\n".join(lines) + "\n"


def setup(app: Sphinx) -> dict[str, bool]:
  """Registers the directive."""
  app.add_directive("ledger", LedgerDirective)
  return {"parallel_read_safe": True}
