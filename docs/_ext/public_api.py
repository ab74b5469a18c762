"""Sphinx extension: which names are public, and that each has a page."""

import importlib
import inspect
import types

import jax
import jax.typing
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.typing import stringify_annotation

import jaxattn

_LOG = logging.getLogger(__name__)

# Python writes out what an alias of a union stands for; readers know the alias.
_TYPE_ALIASES = {
  stringify_annotation(jax.typing.ArrayLike, "smart"): "ArrayLike",
  stringify_annotation(jax.lax.PrecisionLike, "smart"): "PrecisionLike",
}


def public_names() -> dict[str, object]:
  """Returns what packages list in ``__all__``, by full name.

  Then what the modules list that packages list: they are used by name. A union
  of types is told on the pages of these types.
  """
  shorts = sorted(set(jaxattn.__all__) - {"__version__"})
  listed = _listed([importlib.import_module(f"jaxattn.{s}") for s in shorts])
  modules = [x for x in listed.values() if isinstance(x, types.ModuleType)]
  listed |= _listed(modules)
  return {
    name: value
    for name, value in listed.items()
    if not isinstance(value, (types.ModuleType, types.UnionType))
  }


def _listed(modules: list[types.ModuleType]) -> dict[str, object]:
  return {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in modules
    for name in module.__all__
  }


def aliases() -> dict[str, str]:
  """Returns the names of objects that an earlier package also exports.

  Their pages point to the first name, rather than say everything twice.
  """
  first: dict[int, str] = {}
  for name, value in public_names().items():
    first.setdefault(id(value), name)
  return {
    name: first[id(value)]
    for name, value in public_names().items()
    if first[id(value)] != name
  }


def background() -> dict[str, str]:
  """Returns the modules whose docstring has the formula behind a name."""
  modules = {
    name: inspect.getmodule(value) for name, value in public_names().items()
  }
  return {
    name: module.__name__
    for name, module in modules.items()
    if module and "math:" in (module.__doc__ or "")
  }


def check(app: Sphinx, env: BuildEnvironment) -> None:
  """Warns of public names without a page, which fails a build with ``-W``."""
  for name in public_names():
    if f"api/generated/{name}" not in env.found_docs:
      _LOG.warning("%s is public but has no page: see docs/api/index.md", name)


def shorten(
  app: Sphinx,
  what: str,
  name: str,
  obj: object,
  options: object,
  signature: str | None,
  returns: str | None,
) -> tuple[str | None, str | None]:
  """Puts the names of JAX's type aliases back into a signature."""
  for union, alias in _TYPE_ALIASES.items():
    signature = signature and signature.replace(union, alias)
  return signature, returns


def setup(app: Sphinx) -> dict[str, bool]:
  """Registers the check and the signatures."""
  app.connect("env-check-consistency", check)
  app.connect("autodoc-process-signature", shorten)
  return {"parallel_read_safe": True}
