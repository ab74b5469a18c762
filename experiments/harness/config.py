"""Configurations: loading ``configs/<system>.py:<tier>`` and checking fields.

Every mistake is answered with the list of what there is, as a
:class:`UsageError`, which :func:`experiments.harness.main` turns into exit
status 2.
"""

import math
import pathlib
import runpy
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

TIERS = ("smoke", "cpu", "full")


class UsageError(ValueError):
  """A mistake in how an experiment was called, not in what it computed."""


def load_config(spec: str) -> ml_collections.ConfigDict:
  """Loads the configuration that ``path/to/file.py[:tier]`` names.

  Args:
    spec: path of a Python file with ``get_config(tier)``, then optionally a
      colon and one of :data:`TIERS`.

  Returns:
    The locked configuration.

  Raises:
    UsageError: if there is no such file or tier, if the file has no
      ``get_config``, or if a field is not finite.

  Example:
    >>> load_config("configs/nothing.py:cpu")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    experiments.harness.config.UsageError: no config file configs/nothing.py...
  """
  path, colon, tier = spec.partition(":")
  if colon and tier not in TIERS:
    raise UsageError(
      f"unknown tier {tier!r} in --config={spec}, expected one of "
      + ", ".join(TIERS)
    )
  get_config = _load_get_config(pathlib.Path(path))
  if get_config is None:
    raise UsageError(f"{path} must define get_config(tier)")
  config = get_config(tier) if colon else get_config()
  check_config(config)
  return config.lock()


def check_config(config: ml_collections.ConfigDict) -> None:
  """Raises unless ``config`` carries a slug and a tier and is finite."""
  for name in ("slug", "tier"):
    if not isinstance(config.get(name), str):
      raise UsageError(f"the config must have a string field {name!r}")
  if config.tier not in TIERS:
    raise UsageError(
      f"config.tier must be one of {', '.join(TIERS)}, got {config.tier!r}"
    )
  for name, value in _leaves(config):
    if isinstance(value, float) and not math.isfinite(value):
      raise UsageError(
        f"config.{name} must be finite, got {value}; " + describe_fields(config)
      )


def check_overrides(
  config: ml_collections.ConfigDict, default: ml_collections.ConfigDict
) -> None:
  """Raises if an override is one that flags let through but should not.

  Args:
    config: configuration after the overrides.
    default: the same configuration before them.

  Raises:
    UsageError: if a number is not finite, the slug or the tier changed, or an
      element of a sequence is of another type than before.
  """
  check_config(config)
  for name in ("slug", "tier"):
    if config[name] != default[name]:
      raise UsageError(f"config.{name} cannot be set by a flag")
  before = dict(_fields(default))
  for name, value in _fields(config):
    if not isinstance(value, (tuple, list)) or not before[name]:
      continue
    expected = {type(v) for _, v in _elements(before[name])}
    allowed = tuple(expected | ({int} if float in expected else set()))
    for _, element in _elements(value):
      if type(element) not in allowed:
        raise UsageError(
          f"config.{name} must hold "
          + " or ".join(sorted(t.__name__ for t in expected))
          + f", got {element!r} in {value!r}"
        )


def check_parts(config: Any, parts: Sequence[str]) -> None:
  """Raises unless ``config.parts`` selects some of an experiment's parts.

  Args:
    config: configuration with a field ``parts``.
    parts: all that there are.

  Raises:
    UsageError: if none is selected, or one that does not exist.
  """
  if not config.parts or not set(config.parts) <= set(parts):
    raise UsageError(
      f"parts must be among {', '.join(parts)}, got {config.parts}"
    )


def describe_fields(config: ml_collections.ConfigDict) -> str:
  """Lists the fields of ``config`` with their values, for messages."""
  fields = (f"  config.{name} = {value!r}" for name, value in _fields(config))
  return "the fields are:\n" + "\n".join(fields)


def field_names(config: ml_collections.ConfigDict) -> set[str]:
  """Returns the dotted names of all fields and groups of fields."""
  names = {name for name, _ in _fields(config)}
  groups = {
    name.rsplit(".", depth)[0]
    for name in names
    for depth in range(1, name.count(".") + 1)
  }
  return names | groups


def _leaves(config: ml_collections.ConfigDict) -> Iterator[tuple[str, Any]]:
  for name, value in _fields(config):
    for suffix, element in _elements(value):
      yield name + suffix, element


def _load_get_config(path: pathlib.Path) -> Any:
  if not path.is_file():
    there = sorted(str(p) for p in path.parent.glob("[!_]*.py"))
    raise UsageError(
      f"no config file {path}; in {path.parent}/ there are: "
      + (", ".join(there) or "none")
    )
  return runpy.run_path(str(path)).get("get_config")


def _fields(
  config: ml_collections.ConfigDict, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
  for name in sorted(config):
    value = config[name]
    if isinstance(value, ml_collections.ConfigDict):
      yield from _fields(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _elements(value: Any, suffix: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(value, (tuple, list)):
    for i, v in enumerate(value):
      yield from _elements(v, f"{suffix}[{i}]")
  else:
    yield suffix, value
