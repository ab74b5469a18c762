"""Settings of the tests of experiments."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def compile_fast() -> Iterator[None]:
  """Smoke runs compile much and compute little: without optimizations."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
