"""The examples in the harness are true."""

import doctest
import importlib
import pkgutil

import pytest

from experiments import harness

MODULES = sorted(m.name for m in pkgutil.iter_modules(harness.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
  module = importlib.import_module(f"experiments.harness.{name}")
  assert doctest.testmod(module).failed == 0
