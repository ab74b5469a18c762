"""Checks every kernel on the machine at hand, and times it against its peers.

``python -m jaxattn.selfcheck [--only=flash_attention,...]`` prints a table in
Markdown, for an issue. It ends with status 0 if all is well, 1 if something is
wrong, and 2 if the call was.

Each kernel, forward and gradient, is held against the dense formula, which is
evaluated on the same machine in float32. Where the platform has kernels they
are compiled, at a size worth timing; elsewhere those for TPUs are interpreted
at a tiny one, which says nothing about speed. A kernel that fails is a row with
what it said.

A new kernel joins ``OPERATIONS`` in ``jaxattn/_selfcheck/operations.py``.
"""

import sys
from collections.abc import Iterator, Sequence

from absl import app, flags

from jaxattn._selfcheck.checks import (
  Row,
  how_kernels_run,
  is_wrong,
  selfcheck,
)
from jaxattn._selfcheck.operations import OPERATIONS, Operation
from jaxattn._selfcheck.table import markdown

__all__ = ["how_kernels_run", "markdown", "selfcheck"]

_BAD_USAGE = 2


def parse_flags(
  argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS
) -> list[Operation]:
  """What to check; a mistake ends the program with status 2."""
  names = [operation.name for operation in OPERATIONS]
  flags.DEFINE_list("only", names, "What to check.", flag_values=flag_values)
  try:
    rest = flag_values(list(argv))[1:]
    unknown = rest or sorted(set(flag_values.only) - set(names))
    if unknown or not flag_values.only:
      raise flags.Error(f"there is no {', '.join(unknown) or 'operation'}")
  except flags.Error as error:
    print(f"selfcheck: {error}", file=sys.stderr)
    print(f"usage: python -m jaxattn.selfcheck [--only=NAME,...] with names of "
          f"{', '.join(names)}", file=sys.stderr)  # fmt: skip
    sys.exit(_BAD_USAGE)
  return [o for o in OPERATIONS if o.name in flag_values.only]


def main(operations: Sequence[Operation]) -> int:
  """Prints the report; returns 1 if something is wrong, else 0."""
  wrong = 0

  def rows() -> Iterator[Row]:
    nonlocal wrong
    for row in selfcheck(operations):
      wrong |= is_wrong(row)
      yield row

  for line in markdown(rows()):
    print(line, flush=True)
  return int(wrong)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
