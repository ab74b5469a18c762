"""Rows as Markdown, under the versions and the device that they are from."""

import importlib.metadata
import platform
from collections.abc import Iterable, Iterator

import jax

import jaxattn
from jaxattn._selfcheck.checks import Row, how_kernels_run, is_wrong

_COLUMNS = (
  "operation",
  "direction",
  "dtype",
  "shape",
  "implementation",
  "largest error (bound)",
  "median ms",
  "peer",
  "peer / ours",
  "verdict",
)


def markdown(rows: Iterable[Row]) -> Iterator[str]:
  """Lines of a report: the machine, each row as it comes, and the outcome."""
  device = jax.devices()[0]
  yield (
    f"jaxattn {jaxattn.__version__}, jax {jax.__version__}, jaxlib "
    f"{importlib.metadata.version('jaxlib')}, Python "
    f"{platform.python_version()}; platform {device.platform}, device "
    f"{device.device_kind}"
  )
  yield ""
  if how_kernels_run() == "pallas_interpret":
    yield (
      "This platform compiles no kernels: they are interpreted, and no time "
      "is claimed."
    )
    yield ""
  yield _line(_COLUMNS)
  yield _line(["---"] * len(_COLUMNS))
  ok = wrong = total = 0
  for row in rows:
    yield _line(_cells(row))
    ok, wrong = ok + (row.verdict == "ok"), wrong + is_wrong(row)
    total += 1
  yield ""
  rest = total - ok - wrong
  yield f"{total} rows: {ok} ok, {wrong} wrong, {rest} not supported"


def _cells(row: Row) -> list[str]:
  return [
    *row[:5],
    "–" if row.error is None else f"{row.error:.1e} ({row.bound:.1e})",
    "not timed" if row.seconds is None else f"{row.seconds * 1e3:.3f}",
    row.peer or "–",
    "–" if row.ratio is None else f"{row.ratio:.2f}",
    row.verdict,
  ]


def _line(cells: Iterable[str]) -> str:
  return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
