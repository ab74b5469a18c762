"""The command line: ``python -m jaxattn.selfcheck``."""

import sys
from collections.abc import Iterator, Sequence

from absl import app, flags

from jaxattn import selfcheck

_BAD_USAGE = 2


def parse_flags(
  argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS
) -> list[selfcheck.Operation]:
  """What to check; a mistake ends the program with status 2."""
  names = [operation.name for operation in selfcheck.OPERATIONS]
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
  return [o for o in selfcheck.OPERATIONS if o.name in flag_values.only]


def main(operations: Sequence[selfcheck.Operation]) -> int:
  """Prints the report; returns 1 if something is wrong, else 0."""
  wrong = 0

  def rows() -> Iterator[selfcheck.Row]:
    nonlocal wrong
    for row in selfcheck.selfcheck(operations):
      wrong |= selfcheck.is_wrong(row)
      yield row

  for line in selfcheck.markdown(rows()):
    print(line, flush=True)
  return int(wrong)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
