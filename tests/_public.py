"""What is public, and how its examples are run."""

import doctest
import importlib
import inspect
import io
import pkgutil
import sys
import types

import jax

import jaxattn
import pallas_kernels


def public_modules():
  """Packages without an underscore, and modules that they list by name."""
  found = {}

  def add(module):
    if found.setdefault(module.__name__, module) is not module:
      return
    for name in getattr(module, "__all__", ()):
      if isinstance(getattr(module, name), types.ModuleType):
        add(getattr(module, name))

  for root in (jaxattn, pallas_kernels):
    add(root)
    for info in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
      if info.ispkg and "._" not in info.name:
        add(importlib.import_module(info.name))
  return dict(sorted(found.items()))


def public_names():
  """Qualified name -> object, without modules and dunders."""
  return {
    f"{module}.{name}": getattr(package, name)
    for module, package in public_modules().items()
    for name in getattr(package, "__all__", ())
    if not name.startswith("__")
    and not isinstance(getattr(package, name), types.ModuleType)
  }


def names_with_example():
  """Names with an example; an object that two packages export has one."""
  one_name = {
    obj: name for name, obj in public_names().items() if callable(obj)
  }
  return [n for obj, n in one_name.items() if ">>> " in (obj.__doc__ or "")]


def run_example(name):
  """Runs the example of a public name, and fails if it prints otherwise."""
  obj = inspect.unwrap(public_names()[name])
  globs = dict(vars(sys.modules[obj.__module__]))
  tests = doctest.DocTestFinder(recurse=False).find(obj, name, globs=globs)
  report = io.StringIO()
  runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
  # As a user runs them: without x64.
  with jax.enable_x64(False):
    for test in tests:
      runner.run(test, out=report.write)
  assert runner.failures == 0, report.getvalue()
