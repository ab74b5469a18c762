"""Compiling in tests: never twice for the same shapes, and quickly."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax


class _Compilations(logging.Handler):
  """Collects the names of what XLA is asked to compile."""

  def __init__(self):
    super().__init__(logging.DEBUG)
    self.names: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    message = record.getMessage()
    if message.startswith("Compiling "):
      self.names.append(message.split()[1])


@contextlib.contextmanager
def log_compilations() -> Iterator[list[str]]:
  """Yields a list that grows by one name for every compilation inside.

  A hit in the persistent cache on disk counts too: it means that the function
  was traced and lowered again.
  """
  handler = _Compilations()
  logger = logging.getLogger("jax")
  logger.addHandler(handler)
  try:
    with jax.log_compiles(True):
      yield handler.names
  finally:
    logger.removeHandler(handler)


@contextlib.contextmanager
def no_recompilation() -> Iterator[None]:
  """Fails if anything is compiled inside; warm the function up before."""
  with log_compilations() as names:
    yield
  assert not names, f"compiled again: {', '.join(names)}"


def quick_jit(fn: Callable[..., Any]) -> Any:
  """``jax.jit`` that compiles in half of the time.

  What is left out is LLVM's work on each loop: the program is the same, and
  arrays in tests are too small for its speed to matter.
  """
  return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})
