"""Progress on the host, never inside a trace."""

import logging
import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

import jax

_LOG = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 10.0

T = TypeVar("T")


def progress(items: Collection[T], label: str) -> Iterator[T]:
  """Yields ``items`` while showing how far the loop is.

  A bar on a terminal; elsewhere log lines, at most one every ten seconds.

  Args:
    items: what to loop over; its length must be known.
    label: what the items are, as ``"exponents"``.

  Yields:
    Each item.

  Example:
    >>> sum(progress(range(4), "terms"))
    6
  """
  if jax.process_index() != 0:
    yield from items
  elif sys.stderr.isatty():
    yield from _bar(items, label)
  else:
    yield from _lines(items, label)


def _bar(items: Collection[T], label: str) -> Iterator[T]:
  from rich import console
  from rich import progress as rich_progress

  # Everything goes to stderr: stdout is for results.
  yield from rich_progress.track(
    items, label, len(items), console=console.Console(stderr=True)
  )


def _lines(items: Collection[T], label: str) -> Iterator[T]:
  last = -_SECONDS_BETWEEN_LINES
  for i, item in enumerate(items):
    now = time.monotonic()
    if now - last >= _SECONDS_BETWEEN_LINES:
      _LOG.info("%s: %d of %d", label, i + 1, len(items))
      last = now
    yield item
  _LOG.info("%s: all %d done", label, len(items))
