"""The public API: what it is, and that it is documented.

The names and signatures are committed in ``api_snapshot.txt``, so that no
change of them goes unseen. After a change that is meant, write it anew with

    python -m tests.api_test
"""

import dataclasses
import inspect
import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import pytest

import jaxattn
from tests._public import public_modules, public_names

_SNAPSHOT = pathlib.Path(__file__).with_name("api_snapshot.txt")


def _signature(obj):
  """Names, kinds and defaults; how an annotation prints is Python's affair."""
  signature = inspect.signature(obj)
  parameters = [
    p.replace(annotation=p.empty)
    for name, p in signature.parameters.items()
    if name not in _inherited(obj)
  ]
  return str(
    signature.replace(parameters=parameters, return_annotation=signature.empty)
  )


def _inherited(obj):
  """What flax gives each module: a parent and a name."""
  is_module = inspect.isclass(obj) and issubclass(obj, nn.Module)
  return {"parent", "name"} if is_module else set()


def _snapshot():
  lines = [
    f"{name}{_signature(obj)}" if callable(obj) else f"{name} = {obj!r}"
    for name, obj in sorted(public_names().items())
  ]
  return "\n".join(lines) + "\n"


_NAMES = public_names()
_CALLABLES = sorted(name for name, obj in _NAMES.items() if callable(obj))
_FUNCTIONS = [n for n in _CALLABLES if not inspect.isclass(_NAMES[n])]
_CLASSES = [n for n in _CALLABLES if inspect.isclass(_NAMES[n])]


def test_api_is_the_committed_one():
  assert " at 0x" not in _snapshot(), "a default has no stable repr"
  assert _snapshot() == _SNAPSHOT.read_text(), (
    "the public API changed; if that is meant: python -m tests.api_test"
  )


def test_lists_of_names_are_complete():
  for name, module in public_modules().items():
    names = getattr(module, "__all__", [])
    # A re-exported public function that is missing from the list is lost.
    functions = {
      n
      for n, obj in vars(module).items()
      if inspect.isfunction(obj)
      and not n.startswith("_")
      and (obj.__module__ == name or hasattr(module, "__path__"))
    }
    assert functions <= set(names), name


# Names that packages use as namespaces share: newton.init, margin.apply. And
# the center of a body is that of a polytope's (a, b), given as one thing.
_SHARED = {"analytic_center", "apply", "build_kernel", "init"}


def test_one_name_is_one_thing():
  things = {}
  packages = {n for n, m in public_modules().items() if hasattr(m, "__path__")}
  for name, obj in _NAMES.items():
    # Modules of one problem each are used by name: two_layer.loss.
    package, _, short = name.rpartition(".")
    if package not in packages or short in _SHARED:
      continue
    # A kernel bears the name of the function that chooses it.
    if package == f"pallas_kernels.{short}":
      continue
    assert things.setdefault(short, obj) is obj, f"{short} has two meanings"


# --- documentation ---


def _sections(obj):
  """Section title -> text, of a docstring in Google style."""
  parts = re.split(r"^([A-Z][a-z]+):", inspect.getdoc(obj) or "", flags=re.M)
  return dict(zip(parts[1::2], parts[2::2], strict=True))


def _undescribed(names, text):
  return [n for n in names if not re.search(rf"^ +\*{{0,2}}{n}:", text, re.M)]


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_function_is_documented(name):
  sections = _sections(_NAMES[name])
  parameters = list(inspect.signature(_NAMES[name]).parameters)
  required = {"Returns", "Raises", "Source", "Example"}
  required |= {"Args"} if parameters else set()
  assert required - set(sections) == set()
  assert _undescribed(parameters, sections.get("Args", "")) == []
  assert ">>> " in sections["Example"]


@pytest.mark.parametrize("name", _CLASSES)
def test_class_is_documented(name):
  cls = _NAMES[name]
  # A source is asked of functions: most types are plain containers.
  sections = _sections(cls)
  fields = getattr(cls, "_fields", None)
  if fields is None and dataclasses.is_dataclass(cls):
    names = (field.name for field in dataclasses.fields(cls))
    fields = [name for name in names if name not in _inherited(cls)]
  if fields is None:
    fields = ()
    assert inspect.getdoc(cls)
  assert _undescribed(fields, sections.get("Attributes", "")) == []


# --- imports ---

_IMPORTS = """
import sys
import jax
before = set(sys.modules)
import jaxattn
own = {m for m in set(sys.modules) - before if not m.startswith("_")}
assert own == {"jaxattn"}, own
assert sorted(jaxattn.__all__) == dir(jaxattn)
for name in jaxattn.__all__:
  if name not in ("__version__", "models", "data"):
    getattr(jaxattn, name)
heavy = {"flax", "orbax", "matplotlib", "ml_collections"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert "jaxattn.attention" in sys.modules
"""


def test_import_is_light():
  done = subprocess.run(
    [sys.executable, "-c", _IMPORTS], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def test_unknown_subpackage():
  with pytest.raises(AttributeError, match="'jaxattn' has no attribute 'magic"):
    jaxattn.magic  # noqa: B018


if __name__ == "__main__":
  _SNAPSHOT.write_text(_snapshot())
