"""For tests that compile much and compute little."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def compile_fast() -> Iterator[None]:
  """Compiles without most optimizations; import it into a ``conftest.py``."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
